//! How far the published key ring contains the state: what a request is answered from is at least as new as what
//! this said before its ring was loaded. It moves with every applied entry, also with one that changes no key.

use std::sync::atomic::{AtomicU64, Ordering};

use hsm_api::StateIndex;
use tokio::sync::watch;

/// See the module. Written by whoever publishes the ring, after the ring; read by every request without a lock.
pub(super) struct Reached {
    epoch: AtomicU64,
    index: AtomicU64,
    told: watch::Sender<StateIndex>,
}

impl Reached {
    pub(super) fn nothing() -> Self {
        let nothing = StateIndex { epoch: 0, index: 0 };
        Self {
            epoch: AtomicU64::new(0),
            index: AtomicU64::new(0),
            told: watch::Sender::new(nothing),
        }
    }

    /// Where it is. An epoch is never paired with an index that it has not come to: at worst with an older one.
    pub(super) fn now(&self) -> StateIndex {
        let index = self.index.load(Ordering::Acquire);
        let epoch = self.epoch.load(Ordering::Acquire);
        StateIndex { epoch, index }
    }

    /// Takes note that a ring of this state is published, and wakes who waits for it. One writer at a time.
    pub(super) fn advance(&self, to: StateIndex) {
        self.epoch.store(to.epoch, Ordering::Release);
        self.index.store(to.index, Ordering::Release);
        self.told.send_if_modified(|known| {
            let moved = *known != to;
            *known = to;
            moved
        });
    }

    /// The same, for waiting.
    pub(super) fn subscribe(&self) -> watch::Receiver<StateIndex> {
        self.told.subscribe()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_is_woken_by_every_index_and_not_by_the_same_one_again() {
        let reached = Reached::nothing();
        let mut waiting = reached.subscribe();
        let at = |index| StateIndex { epoch: 1, index };
        reached.advance(at(7));
        assert!(waiting.has_changed().unwrap());
        assert_eq!((*waiting.borrow_and_update(), reached.now()), (at(7), at(7)));
        reached.advance(at(7));
        assert!(!waiting.has_changed().unwrap());
        reached.advance(at(8));
        assert!(waiting.has_changed().unwrap());
    }
}
