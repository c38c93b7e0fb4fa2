//! How fresh this node is, and the start gate. After a start, and after a silence in which the cluster may have
//! gone on without this node, the gate stays shut until everything is applied that was committed at the first
//! contact with a quorum; no contact counts before. Once the gate is open, freshness is the age of the newest
//! contact, whatever that one named as committed: what is applied a moment later than it is heard of does not
//! make a node stale.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use raft_store::names::RaftId;

use super::ProposeError;
use crate::clock;
use crate::seeded::bug;

/// Whether this node has caught up with a quorum-backed leader, since its start and since its last silence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// Not yet: no quorum was heard of since the start.
    NoLeaderSeen,
    /// Not yet: what was committed at the first contact is not applied.
    CatchingUp {
        /// Index that must be applied.
        target: u64,
    },
    /// Caught up. Shut again by the first contact after a silence longer than the bound of readiness.
    Open {
        /// The applied index at which it opened: tokens must be in step with it.
        since: u64,
    },
    /// Shut until the process ends: this node leads itself with a log that is older than its cluster's.
    OlderCopy {
        /// The node that its log does not know.
        node: RaftId,
    },
    /// Shut until the process ends: the quorum was recovered without this node, and its epoch has ended.
    EpochEnded {
        /// The epoch that a voter of its own is in.
        epoch: u64,
    },
}

/// Why the gate is shut until the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shut {
    /// See [`Gate::OlderCopy`].
    OlderCopy(RaftId),
    /// See [`Gate::EpochEnded`].
    EpochEnded(u64),
}

impl From<Shut> for Gate {
    fn from(shut: Shut) -> Self {
        match shut {
            Shut::OlderCopy(node) => Gate::OlderCopy { node },
            Shut::EpochEnded(epoch) => Gate::EpochEnded { epoch },
        }
    }
}

impl From<Shut> for ProposeError {
    fn from(shut: Shut) -> Self {
        match shut {
            Shut::OlderCopy(node) => ProposeError::OlderCopy { node },
            Shut::EpochEnded(epoch) => ProposeError::EpochEnded { epoch },
        }
    }
}

/// Moments are milliseconds since the process began, plus one; 0 = never.
type Moment = u64;

#[derive(Default)]
struct Inner {
    /// Newest quorum-backed contact.
    heard: Moment,
    /// What must be applied before contacts count: what the first one after the start or the last silence
    /// named; 0 = nothing was heard yet.
    target: u64,
}

/// See the module. Written by the consensus thread, read by every request without a lock.
pub(super) struct StartGate {
    begun: Instant,
    /// Longest silence after which this node is still taken for one that missed nothing.
    bound: Duration,
    inner: Mutex<Inner>,
    /// Newest contact that counts.
    contact: AtomicU64,
    /// Applied index at which the gate opened; 0 = shut.
    open_since: AtomicU64,
    /// See [`Gate::OlderCopy`]; 0 = nobody.
    unknown: AtomicU64,
    /// See [`Gate::EpochEnded`]; 0 = it has not.
    later_epoch: AtomicU64,
}

impl StartGate {
    pub(super) fn new(bound: Duration) -> Self {
        Self {
            begun: clock::now(),
            bound,
            inner: Mutex::default(),
            contact: AtomicU64::new(0),
            open_since: AtomicU64::new(0),
            unknown: AtomicU64::new(0),
            later_epoch: AtomicU64::new(0),
        }
    }

    /// Shuts it for good, because of a node that the log does not know. Says whether it was not yet.
    pub(super) fn shut(&self, node: RaftId) -> bool {
        let first = self
            .unknown
            .compare_exchange(0, node, Ordering::AcqRel, Ordering::Acquire);
        first.is_ok()
    }

    /// Shuts it for good, because this node's epoch has ended. Says whether that was not known yet.
    pub(super) fn end_epoch(&self, later: u64) -> bool {
        self.later_epoch.fetch_max(later, Ordering::AcqRel) == 0
    }

    /// Why it is shut for good.
    pub(super) fn shut_by(&self) -> Option<Shut> {
        let unless_none = |of: &AtomicU64| Some(of.load(Ordering::Acquire)).filter(|of| *of != 0);
        let ended = unless_none(&self.later_epoch).map(Shut::EpochEnded);
        ended.or_else(|| unless_none(&self.unknown).map(Shut::OlderCopy))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that at `seen` a quorum had been heard of `age` ago, and had committed up to `commit`.
    pub(super) fn contact(&self, seen: Instant, age: Duration, commit: u64, applied: u64) {
        // Whoever claims a contact from before this process began claims none that counts here.
        let Some(at) = seen
            .checked_sub(age)
            .and_then(|at| at.checked_duration_since(self.begun))
        else {
            return;
        };
        let at = u64::try_from(at.as_millis()).unwrap_or(u64::MAX - 1) + 1;
        let mut inner = self.lock();
        if at > inner.heard {
            let silence = Duration::from_millis(at - inner.heard);
            if inner.heard == 0 || silence > self.bound {
                self.open_since.store(0, Ordering::Release);
                inner.target = if bug("bug::ready_before_gate") {
                    1
                } else {
                    commit.max(1)
                };
            }
            inner.heard = at;
        }
        self.count(&inner, applied);
    }

    /// Notes what is applied.
    pub(super) fn applied(&self, applied: u64) {
        self.count(&self.lock(), applied);
    }

    fn count(&self, inner: &Inner, applied: u64) {
        if inner.target == 0 || applied < inner.target {
            return;
        }
        self.contact.store(inner.heard, Ordering::Release);
        // Opened once until it is shut: `since` must not move with every entry.
        let _ = self
            .open_since
            .compare_exchange(0, applied, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Age of the newest contact that counts; `None`: none since the start.
    pub(super) fn staleness(&self, now: Instant) -> Option<Duration> {
        if self.shut_by().is_some() {
            return None;
        }
        let contact = self.contact.load(Ordering::Acquire).checked_sub(1)?;
        Some(now.saturating_duration_since(self.begun + Duration::from_millis(contact)))
    }

    /// Where it stands.
    pub(super) fn stand(&self) -> Gate {
        if let Some(shut) = self.shut_by() {
            return shut.into();
        }
        match self.open_since.load(Ordering::Acquire) {
            0 => match self.lock().target {
                0 => Gate::NoLeaderSeen,
                target => Gate::CatchingUp { target },
            },
            since => Gate::Open { since },
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn gate() -> (StartGate, Instant) {
        let gate = StartGate::new(5 * SECOND);
        let begun = gate.begun;
        (gate, begun)
    }

    #[test]
    fn it_opens_once_what_the_first_contact_named_is_applied() {
        let (gate, begun) = gate();
        assert_eq!(gate.stand(), Gate::NoLeaderSeen);
        gate.applied(50);
        assert_eq!((gate.stand(), gate.staleness(begun)), (Gate::NoLeaderSeen, None));
        gate.contact(begun + SECOND, Duration::ZERO, 60, 50);
        assert_eq!(gate.stand(), Gate::CatchingUp { target: 60 });
        assert_eq!(gate.staleness(begun + SECOND), None);
        // Later contacts do not move the target away.
        gate.contact(begun + 2 * SECOND, Duration::ZERO, 70, 59);
        assert_eq!(gate.stand(), Gate::CatchingUp { target: 60 });
        gate.applied(61);
        assert_eq!(gate.stand(), Gate::Open { since: 61 });
        assert_eq!(gate.staleness(begun + 3 * SECOND), Some(SECOND));
        gate.applied(80);
        assert_eq!(gate.stand(), Gate::Open { since: 61 });
    }

    #[test]
    fn after_a_silence_it_is_shut_until_what_was_missed_is_applied() {
        let (gate, begun) = gate();
        gate.contact(begun + SECOND, Duration::ZERO, 10, 10);
        assert_eq!(gate.stand(), Gate::Open { since: 10 });
        // Exactly the bound is no silence yet.
        gate.contact(begun + 6 * SECOND, Duration::ZERO, 20, 10);
        assert_eq!(gate.stand(), Gate::Open { since: 10 });
        let healed = begun + 6 * SECOND + Duration::from_millis(5001);
        gate.contact(healed, Duration::ZERO, 30, 29);
        assert_eq!(gate.stand(), Gate::CatchingUp { target: 30 });
        // Until then the node is as stale as it was.
        assert_eq!(gate.staleness(healed), Some(Duration::from_millis(5001)));
        gate.contact(healed + SECOND, Duration::ZERO, 31, 30);
        assert_eq!(gate.stand(), Gate::Open { since: 30 });
        assert_eq!(gate.staleness(healed + SECOND), Some(Duration::ZERO));
    }

    #[test]
    fn once_it_is_open_a_contact_counts_when_it_is_heard() {
        let (gate, begun) = gate();
        gate.contact(begun + SECOND, Duration::ZERO, 10, 10);
        gate.contact(begun + 2 * SECOND, Duration::ZERO, 99, 10);
        assert_eq!(gate.staleness(begun + 2 * SECOND), Some(Duration::ZERO));
        assert_eq!(gate.stand(), Gate::Open { since: 10 });
    }

    #[test]
    fn a_claim_older_than_the_process_or_than_the_last_one_counts_for_nothing() {
        let (gate, begun) = gate();
        gate.contact(begun + SECOND, 2 * SECOND, 1, 1);
        assert_eq!(gate.stand(), Gate::NoLeaderSeen);
        gate.contact(begun + 4 * SECOND, SECOND, 1, 1);
        gate.contact(begun + 5 * SECOND, 4 * SECOND, 9, 1);
        assert_eq!(gate.stand(), Gate::Open { since: 1 });
        assert_eq!(gate.staleness(begun + 5 * SECOND), Some(2 * SECOND));
    }

    #[test]
    fn shut_for_good_it_stays_shut_whatever_is_heard() {
        let (gate, begun) = gate();
        gate.contact(begun + SECOND, Duration::ZERO, 10, 10);
        assert!(gate.shut(12));
        assert!(!gate.shut(15), "the first is kept");
        gate.contact(begun + 2 * SECOND, Duration::ZERO, 10, 10);
        assert_eq!(gate.stand(), Gate::OlderCopy { node: 12 });
        assert_eq!(gate.staleness(begun + 2 * SECOND), None);
    }

    #[test]
    fn the_end_of_its_epoch_shuts_it_for_good_too_and_is_what_is_said() {
        let (gate, begun) = gate();
        gate.contact(begun + SECOND, Duration::ZERO, 10, 10);
        assert!(gate.end_epoch(2));
        assert!(!gate.end_epoch(3), "said once");
        gate.shut(12);
        gate.contact(begun + 2 * SECOND, Duration::ZERO, 10, 10);
        assert_eq!(gate.stand(), Gate::EpochEnded { epoch: 3 });
        assert_eq!(gate.staleness(begun + 2 * SECOND), None);
    }

    #[test]
    fn an_empty_log_opens_it_too_once_something_is_applied() {
        let (gate, begun) = gate();
        gate.contact(begun + SECOND, Duration::ZERO, 0, 0);
        assert_eq!(gate.stand(), Gate::CatchingUp { target: 1 });
        gate.applied(1);
        assert_eq!(gate.stand(), Gate::Open { since: 1 });
    }
}
