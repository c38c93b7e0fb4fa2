//! Bugs that are built in on purpose, so that `chaos selftest` can show that its oracles find them. `chaos/src/bugs.rs` says
//! what each of them does. Without the feature `failpoints`, which release packaging refuses, there are none.

/// Whether a bug is to be there: failpoint `bug::NAME` is armed with `return`.
#[cfg(feature = "failpoints")]
pub(crate) fn bug(point: &str) -> bool {
    fail::fail_point!(point, |_| true);
    false
}

/// Never.
#[cfg(not(feature = "failpoints"))]
pub(crate) const fn bug(_point: &str) -> bool {
    false
}
