//! Where the slots' parts come together: the key ring and the status are made of all of them, against
//! the newest state, and replaced as a whole.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use hsm_core::SlotState;
use raft_store::names::{ContextName, RaftId, SlotName};
use raft_store::storage::Published;
use tokio::sync::watch;

use super::ring::{self, Source};
use super::status::{Proof, SlotSync, SyncStatus};
use crate::keyring::{ClosedSlot, ContextKeys, KeyRing, TokenOps};

/// What one slot has to show.
#[derive(Default)]
pub(super) struct Part {
    pub(super) contexts: HashMap<ContextName, ContextKeys>,
    pub(super) sync: SlotSync,
}

#[derive(Default)]
struct Parts {
    slots: BTreeMap<SlotName, Part>,
    proof: Proof,
    wrong_replication_key: Option<String>,
}

/// See the module.
pub(super) struct Board {
    parts: Mutex<Parts>,
    ring: Arc<ArcSwap<KeyRing>>,
    status: watch::Sender<Arc<SyncStatus>>,
}

impl Board {
    /// A board for these slots. Until all of them have posted, nothing is complete.
    pub(super) fn new(slots: Vec<SlotName>, ring: Arc<ArcSwap<KeyRing>>) -> Self {
        let slots = slots.into_iter().map(|slot| (slot, Part::default())).collect();
        let parts = Parts {
            slots,
            ..Parts::default()
        };
        Self {
            parts: Mutex::new(parts),
            ring,
            status: watch::Sender::new(Arc::default()),
        }
    }

    pub(super) fn status(&self) -> Arc<SyncStatus> {
        self.status.borrow().clone()
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Arc<SyncStatus>> {
        self.status.subscribe()
    }

    /// Says once that this node's replication key is not the cluster's, or that it is again.
    pub(super) fn judge_replication_key(&self, wrong: Option<String>) {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        if parts.wrong_replication_key != wrong {
            if let Some(why) = &wrong {
                tracing::error!(target: "audit", epoch = crate::logging::epoch(), why, "wrong replication key");
            }
            parts.wrong_replication_key = wrong;
        }
    }

    /// Takes a slot's part and publishes. `latest` is asked under the lock, so that a slow slot never
    /// puts an older picture of the state in the place of a newer one.
    pub(super) fn post(
        &self,
        slot: &SlotName,
        part: Part,
        me: RaftId,
        latest: impl FnOnce() -> Arc<Published>,
    ) {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        parts.slots.insert(slot.clone(), part);
        let published = latest();
        let state = &published.state;
        let mut status = SyncStatus {
            slots: parts
                .slots
                .iter()
                .map(|(name, part)| (name.clone(), part.sync.clone()))
                .collect(),
            wrong_replication_key: parts.wrong_replication_key.clone(),
            ..SyncStatus::default()
        };
        let index = published.applied.map_or(0, |id| id.index);
        parts.proof.judge(&mut status, state, me, index);

        let mut contexts = HashMap::new();
        for part in parts.slots.values() {
            contexts.extend(
                part.contexts
                    .iter()
                    .map(|(name, keys)| (name.clone(), keys.clone())),
            );
        }
        let absent: Arc<dyn TokenOps> = Arc::new(ClosedSlot(SlotState::Absent));
        for (name, context) in state.contexts().iter() {
            if !parts.slots.contains_key(&context.slot) {
                let elsewhere = ring::contexts(state, me, &context.slot, &absent, &Source::Closed);
                contexts.extend(elsewhere.into_iter().filter(|(other, _)| other == name));
            }
        }
        self.ring.store(Arc::new(KeyRing::new(contexts)));
        self.status.send_replace(Arc::new(status));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::time::Instant;

    use super::super::testing::{Cluster, ME, slot};
    use super::*;

    #[test]
    fn contexts_of_slots_this_node_lacks_answer_that_the_slot_is_absent() {
        let ring = Arc::new(ArcSwap::from_pointee(KeyRing::default()));
        let board = Board::new(vec![slot()], Arc::clone(&ring));
        let mut cluster = Cluster::founded();
        cluster.context_in("b", "elsewhere");
        let state = cluster.state.clone();
        let latest = || {
            Arc::new(Published {
                state,
                ..Published::default()
            })
        };
        let sync = SlotSync {
            last_full_sync: Some(Instant::now()),
            ..SlotSync::default()
        };
        board.post(
            &slot(),
            Part {
                contexts: HashMap::new(),
                sync,
            },
            ME,
            latest,
        );
        let ring = ring.load();
        let (_, keys) = ring.context("b").unwrap();
        assert_eq!(keys.slot.state(), SlotState::Absent);
        let status = board.status();
        assert_eq!((status.unconfigured.len(), status.proven_at), (1, None));
        assert!(status.is_slot_complete("exchange", 0));
    }

    #[test]
    fn nothing_is_complete_before_every_slot_has_posted() {
        let board = Board::new(vec![slot(), SlotName::new("2fa").unwrap()], Arc::default());
        let state = Cluster::founded().state;
        let latest = || {
            Arc::new(Published {
                state: state.clone(),
                ..Published::default()
            })
        };
        let sync = SlotSync {
            last_full_sync: Some(Instant::now()),
            ..SlotSync::default()
        };
        let part = || Part {
            contexts: HashMap::new(),
            sync: sync.clone(),
        };
        board.post(&slot(), part(), ME, latest);
        assert!(!board.status().is_complete(0));
        board.post(&SlotName::new("2fa").unwrap(), part(), ME, latest);
        assert!(board.status().is_complete(0));
    }

    #[test]
    fn a_wrong_replication_key_shows_in_the_status() {
        let board = Board::new(vec![slot()], Arc::default());
        board.judge_replication_key(Some("other key".to_owned()));
        let state = Cluster::founded().state;
        board.post(&slot(), Part::default(), ME, || {
            Arc::new(Published {
                state,
                ..Published::default()
            })
        });
        assert_eq!(board.status().wrong_replication_key.as_deref(), Some("other key"));
    }
}
