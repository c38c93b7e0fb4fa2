//! Rotation: a key version is made in the leader's token, prepared, proven by every node, and only
//! then activated. The version a request made is found in the state, what a pending version needs is
//! decided from the state, so that a new leader goes on wherever the old one died.

pub mod by_use;
pub mod clocks;
pub mod cluster;
pub mod decide;
pub mod driver;
pub mod keys;
pub mod plan;
pub mod progress;
pub mod rotator;
pub mod schedule;
#[cfg(test)]
pub(crate) mod testing;

pub use by_use::ByUse;
pub use clocks::Clocks;
pub use cluster::Cluster;
pub use decide::Limits;
pub use driver::drive;
pub use keys::{HeldSlot, KeyMaker, TokenKeys};
pub use rotator::{ClusterKeys, Rotator};
pub use schedule::Schedule;

/// A fail point that may block: on a thread of its own, because Raft may run on this one.
pub(crate) async fn reach(name: &'static str) {
    if !fail::has_failpoints() {
        return;
    }
    let reached = tokio::task::spawn_blocking(move || {
        let _ = name;
        fail::fail_point!(name);
    });
    if let Err(error) = reached.await
        && error.is_panic()
    {
        std::panic::resume_unwind(error.into_panic());
    }
}
