//! The state of a slot, and the only ways from one to the next.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::module::lock;

/// A call hangs. When it comes back the slot is [`UNTESTED`].
pub(crate) const HUNG: &str = "hung";
/// A call that hung has come back; nothing says yet that the token is well.
pub(crate) const UNTESTED: &str = "untested";
/// The token forgot the login.
pub(crate) const LOGGED_OUT: &str = "logged_out";
/// A return code that speaks of the token as a whole.
pub(crate) const TOKEN_ERROR: &str = "token_error";
/// The known-answer test failed.
pub(crate) const KAT_FAILED: &str = "known_answer_test";

/// The token is not the one this node registered. Nothing but another opening ends it.
pub const TOKEN_REPLACED: &str = "token_replaced";
/// Nobody holds the slot any more.
pub(crate) const CLOSED: &str = "closed";

/// Whether a slot can serve.
///
/// ```text
///  (before it is open)        ┌────────── known-answer test passes ─────────┐
///   Absent: no such token     ▼                                             │
///   Locked: no usable PIN   Ready ── known-answer test fails, token error, ─┤
///      │                      │ ▲      logged out                           │
///      └────── opened ────────┘ │                                        Failed
///                             └── a call hangs (stays failed when it is back) ┘
/// ```
///
/// `token_replaced` and `closed` have no way back. A hang that comes while the slot has failed otherwise changes nothing, so that its end
/// cannot make the slot ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SlotState {
    /// No token of the configured label.
    Absent,
    /// The token is there, and its PIN is missing, refused or too weak.
    Locked,
    /// Serving.
    Ready,
    /// Not serving.
    Failed {
        /// Stable, for metrics and readiness: `hung`, `untested`, `logged_out`, `token_error`,
        /// `known_answer_test`, `token_replaced`, `closed`, `token_owned`, `duplicate_label`, `open_failed`.
        code: &'static str,
        /// For people.
        reason: String,
    },
}

impl SlotState {
    pub(crate) fn failed(code: &'static str, reason: impl Into<String>) -> Self {
        Self::Failed {
            code,
            reason: reason.into(),
        }
    }

    /// `absent`, `locked`, `ready` or `failed`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Locked => "locked",
            Self::Ready => "ready",
            Self::Failed { .. } => "failed",
        }
    }
}

impl fmt::Display for SlotState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed { code, reason } => write!(f, "failed: {code}: {reason}"),
            other => f.write_str(other.name()),
        }
    }
}

/// The state of an open slot: `Ready` or `Failed`.
pub(crate) struct StateCell {
    /// What the data path reads; always follows `state`.
    ready: AtomicBool,
    state: Mutex<SlotState>,
}

impl StateCell {
    pub(crate) fn ready() -> Self {
        Self {
            ready: AtomicBool::new(true),
            state: Mutex::new(SlotState::Ready),
        }
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    pub(crate) fn get(&self) -> SlotState {
        lock(&self.state).clone()
    }

    #[cfg(test)]
    pub(crate) fn is_failed_with(&self, code: &'static str) -> bool {
        matches!(&*lock(&self.state), SlotState::Failed { code: found, .. } if *found == code)
    }

    /// Fails the slot, unless it is only a hang of a slot that has failed already.
    pub(crate) fn fail(&self, code: &'static str, reason: impl Into<String>) {
        let mut state = lock(&self.state);
        let only_hangs = code == HUNG && *state != SlotState::Ready;
        if only_hangs || is_final(&state) && code != CLOSED {
            return;
        }
        self.ready.store(false, Ordering::Release);
        *state = SlotState::failed(code, reason);
    }

    /// The hang is over. The slot serves again once it has passed a test.
    pub(crate) fn hang_ended(&self) {
        let mut state = lock(&self.state);
        if matches!(&*state, SlotState::Failed { code, .. } if *code == HUNG) {
            *state = SlotState::failed(UNTESTED, "a call that hung has come back; a test decides");
        }
    }

    /// The known-answer test passed. Does not end a hang.
    pub(crate) fn proven(&self) {
        let mut state = lock(&self.state);
        let hangs = matches!(&*state, SlotState::Failed { code, .. } if *code == HUNG);
        if !hangs && !is_final(&state) {
            *state = SlotState::Ready;
            self.ready.store(true, Ordering::Release);
        }
    }
}

/// Whether no test and no return of a call can make the slot ready again.
fn is_final(state: &SlotState) -> bool {
    matches!(state, SlotState::Failed { code, .. } if [TOKEN_REPLACED, CLOSED].contains(code))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_hang_asks_for_a_test_and_hides_no_other_failure() {
        let cell = StateCell::ready();
        cell.fail(HUNG, "C_Encrypt");
        assert!(!cell.is_ready());
        cell.hang_ended();
        assert!(cell.is_failed_with(UNTESTED) && !cell.is_ready());
        cell.proven();
        assert!(cell.is_ready());

        cell.fail(KAT_FAILED, "key is gone");
        cell.fail(HUNG, "C_Encrypt");
        cell.hang_ended();
        assert!(cell.is_failed_with(KAT_FAILED));
        cell.proven();
        assert_eq!(cell.get(), SlotState::Ready);
    }

    #[test]
    fn a_passed_test_does_not_end_a_hang() {
        let cell = StateCell::ready();
        cell.fail(HUNG, "C_Encrypt");
        cell.proven();
        assert!(cell.is_failed_with(HUNG));
        assert!(!cell.is_ready());
    }

    #[test]
    fn a_replaced_token_stays_failed_whatever_it_proves() {
        let cell = StateCell::ready();
        cell.fail(TOKEN_REPLACED, "another node's");
        cell.proven();
        cell.fail(HUNG, "C_Encrypt");
        cell.hang_ended();
        cell.fail(KAT_FAILED, "key is gone");
        assert!(cell.is_failed_with(TOKEN_REPLACED));
        cell.fail(CLOSED, "the slot has been closed");
        assert!(cell.is_failed_with(CLOSED));
    }

    #[test]
    fn a_failed_test_outlasts_the_hang_it_comes_in() {
        let cell = StateCell::ready();
        cell.fail(HUNG, "C_Encrypt");
        cell.fail(KAT_FAILED, "key is gone");
        cell.hang_ended();
        assert!(cell.is_failed_with(KAT_FAILED));
    }

    #[test]
    fn states_print_for_people_and_for_metrics() {
        let failed = SlotState::failed(HUNG, "C_Encrypt for 3 s");
        assert_eq!(failed.to_string(), "failed: hung: C_Encrypt for 3 s");
        assert_eq!(failed.name(), "failed");
        assert_eq!(SlotState::Locked.to_string(), "locked");
    }
}
