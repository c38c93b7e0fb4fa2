//! Where the slots' parts come together. The key ring is made of what every slot has shown and of the newest state,
//! whichever of the two has changed, and replaced as a whole; so is the status. A worker that is busy with its token,
//! or hangs in it, keeps no change of the state from the ring.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use hsm_api::StateIndex;
use hsm_core::SlotState;
use raft_store::names::{ContextName, RaftId, SlotName};
use raft_store::state::ClusterState;
use raft_store::state::context::{Context, KeyVersion, VersionKey};
use raft_store::state::table::Table;
use raft_store::storage::Published;
use tokio::sync::watch;

use super::reached::Reached;
use super::ring::{self, Place, Source};
use super::status::{Proof, SlotSync, SyncStatus};
use crate::consensus::Consensus;
use crate::keyring::{ClosedSlot, KeyRing, TokenOps};
use crate::leases::Leases;

/// What one slot has to show.
pub(super) struct Part {
    pub(super) source: Source,
    pub(super) sync: SlotSync,
}

/// A slot of this node and what its worker has shown last.
struct Shown {
    ops: Arc<dyn TokenOps>,
    part: Part,
}

/// What the published ring was made of, besides the slots' parts.
struct Made {
    contexts: Table<ContextName, Context>,
    versions: Table<VersionKey, KeyVersion>,
    me: RaftId,
}

impl Made {
    fn of(state: &ClusterState, me: RaftId) -> Self {
        Self {
            contexts: state.contexts().clone(),
            versions: state.versions().clone(),
            me,
        }
    }

    /// Whether a ring of that state would be the same one.
    fn is_of(&self, state: &ClusterState, me: RaftId) -> bool {
        self.me == me
            && self.contexts.is_clone_of(state.contexts())
            && self.versions.is_clone_of(state.versions())
    }
}

struct Parts {
    slots: BTreeMap<SlotName, Shown>,
    made: Option<Made>,
    proof: Proof,
    wrong_replication_key: Option<String>,
}

/// See the module.
pub(super) struct Board {
    parts: Mutex<Parts>,
    ring: Arc<ArcSwap<KeyRing>>,
    reached: Reached,
    leases: Arc<Leases>,
    status: watch::Sender<Arc<SyncStatus>>,
}

impl Board {
    /// A board for these slots. Until all of them have posted, nothing is complete; until then a slot's token counts
    /// as one that was not looked into.
    pub(super) fn new(
        slots: impl IntoIterator<Item = (SlotName, Arc<dyn TokenOps>)>,
        ring: Arc<ArcSwap<KeyRing>>,
        leases: Arc<Leases>,
    ) -> Self {
        let unseen = |ops| Shown {
            ops,
            part: Part {
                source: Source::Unseen,
                sync: SlotSync::default(),
            },
        };
        let slots = slots.into_iter().map(|(slot, ops)| (slot, unseen(ops)));
        Self {
            parts: Mutex::new(Parts {
                slots: slots.collect(),
                made: None,
                proof: Proof::default(),
                wrong_replication_key: None,
            }),
            ring,
            reached: Reached::nothing(),
            leases,
            status: watch::Sender::new(Arc::default()),
        }
    }

    pub(super) fn status(&self) -> Arc<SyncStatus> {
        self.status.borrow().clone()
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Arc<SyncStatus>> {
        self.status.subscribe()
    }

    /// How far the published ring contains the state.
    pub(super) fn reached(&self) -> &Reached {
        &self.reached
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
        if let Some(shown) = parts.slots.get_mut(slot) {
            let serves_the_same = shown.part.source == part.source;
            shown.part = part;
            if !serves_the_same {
                parts.made = None;
            }
        }
        let published = latest();
        let mut status = SyncStatus {
            slots: parts
                .slots
                .iter()
                .map(|(name, shown)| (name.clone(), shown.part.sync.clone()))
                .collect(),
            wrong_replication_key: parts.wrong_replication_key.clone(),
            ..SyncStatus::default()
        };
        let index = published.applied.map_or(0, |id| id.index);
        parts.proof.judge(&mut status, &published.state, me, index);
        self.publish(&mut parts, &published, me);
        let status = Arc::new(status);
        let before = self.status.send_replace(Arc::clone(&status));
        for slot in newly_unconfigured(&before, &status) {
            tracing::error!(
                %slot,
                "key versions are in this slot, or are to be made there, and the configuration of this node lacks it: write \
                 it under hsm.slots and restart"
            );
        }
        self.leases.look_again();
    }

    /// Publishes the ring of the newest state, whatever the workers do.
    pub(super) fn refresh(&self, me: RaftId, latest: impl FnOnce() -> Arc<Published>) {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        let published = latest();
        self.publish(&mut parts, &published, me);
    }

    /// The ring first, then how far it is: whoever reads the second finds the first at least as new.
    fn publish(&self, parts: &mut Parts, published: &Published, me: RaftId) {
        let state = &published.state;
        // Before the ring: a version that is active in it has what this node was given of it.
        self.leases.look(state, me);
        if !parts.made.as_ref().is_some_and(|made| made.is_of(state, me)) {
            self.ring
                .store(Arc::new(make(&parts.slots, state, me, &self.leases)));
            parts.made = Some(Made::of(state, me));
        }
        self.reached.advance(StateIndex {
            epoch: state.epoch(),
            index: published.applied.map_or(0, |id| id.index),
        });
    }
}

/// The slots that this node lacks since the last picture: each is told once.
fn newly_unconfigured<'a>(before: &'a SyncStatus, now: &'a SyncStatus) -> impl Iterator<Item = &'a SlotName> {
    let lacking = now.unconfigured.iter();
    lacking.filter(move |slot| !before.unconfigured.contains(slot))
}

fn make(slots: &BTreeMap<SlotName, Shown>, state: &ClusterState, me: RaftId, leases: &Leases) -> KeyRing {
    let absent: Arc<dyn TokenOps> = Arc::new(ClosedSlot(SlotState::Absent));
    let place = |slot: &SlotName| match slots.get(slot) {
        Some(shown) => Place {
            ops: &shown.ops,
            source: &shown.part.source,
        },
        None => Place {
            ops: &absent,
            source: &Source::Closed,
        },
    };
    KeyRing::new(ring::contexts(state, me, place, leases))
}

/// Brings each applied entry into the ring as soon as it is applied, until `shutdown` or the end of consensus.
pub(super) async fn follow(board: Arc<Board>, consensus: Consensus, mut shutdown: watch::Receiver<bool>) {
    let mut applied = consensus.applied();
    loop {
        // Before looking: what is applied from here on wakes this again.
        applied.mark_unchanged();
        let me = consensus.raft_id().unwrap_or_default();
        board.refresh(me, || consensus.published());
        tokio::select! {
            changed = applied.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            _ = shutdown.changed() => return,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::time::{Duration, Instant};

    use raft_store::names::Boot;

    use raft_store::LogId;
    use raft_store::command::{AddRevocations, Op};
    use raft_store::state::access::RevocationKey;

    use super::super::held::{Effect, Held};
    use super::super::testing::{Cluster, ME, slot};
    use super::*;

    fn board(slots: &[&str]) -> (Board, Arc<ArcSwap<KeyRing>>) {
        let ring = Arc::new(ArcSwap::from_pointee(KeyRing::default()));
        let ops = || Arc::new(ClosedSlot(SlotState::Ready)) as Arc<dyn TokenOps>;
        let slots = slots.iter().map(|name| (SlotName::new(name).unwrap(), ops()));
        let leases = Leases::new(Boot([1; 16]), Duration::from_secs(60));
        (Board::new(slots, Arc::clone(&ring), leases), ring)
    }

    fn looked() -> SlotSync {
        SlotSync {
            last_full_sync: Some(Instant::now()),
            ..SlotSync::default()
        }
    }

    fn nothing_in(sync: SlotSync) -> Part {
        Part {
            source: Source::Token(Arc::default()),
            sync,
        }
    }

    fn published(cluster: &Cluster, index: u64) -> Arc<Published> {
        Arc::new(Published {
            state: cluster.state.clone(),
            applied: Some(LogId {
                index,
                ..LogId::default()
            }),
            ..Published::default()
        })
    }

    fn index(board: &Board) -> u64 {
        board.reached().now().index
    }

    #[test]
    fn contexts_of_slots_this_node_lacks_answer_that_the_slot_is_absent() {
        let (board, ring) = board(&["exchange"]);
        let mut cluster = Cluster::founded();
        cluster.transport_in("elsewhere", 1).context_in("b", "elsewhere");
        cluster.active("b", 1);
        board.post(&slot(), nothing_in(looked()), ME, || published(&cluster, 1));
        let ring = ring.load();
        let (_, keys) = ring.context("b").unwrap();
        let active = keys.active.as_ref().unwrap();
        assert_eq!(active.slot.ops.state(), SlotState::Absent);
        assert!(
            keys.readable.contains_key(&active.key_uid),
            "the slot's state answers"
        );
        let status = board.status();
        assert_eq!((status.unconfigured.len(), status.proven_at), (1, None));
        assert!(status.is_slot_complete("exchange", 0));
    }

    #[test]
    fn a_slot_that_the_configuration_lacks_is_told_once() {
        let lacking = |names: &[&str]| SyncStatus {
            unconfigured: names.iter().map(|name| SlotName::new(name).unwrap()).collect(),
            ..SyncStatus::default()
        };
        let told = |before: &[&str], now: &[&str]| {
            let (before, now) = (lacking(before), lacking(now));
            let told = newly_unconfigured(&before, &now).map(ToString::to_string);
            told.collect::<Vec<_>>()
        };
        assert_eq!(told(&[], &["a"]), ["a"]);
        assert_eq!(told(&["a"], &["a", "b"]), ["b"]);
        assert_eq!(told(&["a", "b"], &["a"]), [""; 0]);
    }

    #[test]
    fn nothing_is_complete_before_every_slot_has_posted() {
        let (board, _) = board(&["exchange", "2fa"]);
        let cluster = Cluster::founded();
        board.post(&slot(), nothing_in(looked()), ME, || published(&cluster, 1));
        assert!(!board.status().is_complete(0));
        let other = SlotName::new("2fa").unwrap();
        board.post(&other, nothing_in(looked()), ME, || published(&cluster, 1));
        assert!(board.status().is_complete(0));
    }

    #[test]
    fn a_wrong_replication_key_shows_in_the_status() {
        let (board, _) = board(&["exchange"]);
        board.judge_replication_key(Some("other key".to_owned()));
        let cluster = Cluster::founded();
        board.post(&slot(), nothing_in(SlotSync::default()), ME, || {
            published(&cluster, 1)
        });
        assert_eq!(board.status().wrong_replication_key.as_deref(), Some("other key"));
    }

    /// A cluster with a context whose first version is active, and a token that has it.
    fn serving() -> (Cluster, Held) {
        let mut cluster = Cluster::founded();
        cluster.registered(ME).transport(&[]).context("a");
        let first = cluster.active("a", 1);
        let mut held = Held::default();
        held.apply(Effect::Proven(first, "kek-a-v1".to_owned()));
        held.apply(Effect::Loaded(first, true));
        (cluster, held)
    }

    fn holding(held: &Held) -> Part {
        Part {
            source: Source::Token(Arc::new(held.serving())),
            sync: looked(),
        }
    }

    #[test]
    fn an_entry_that_changes_no_key_moves_the_index_and_leaves_the_ring() {
        let (board, ring) = board(&["exchange"]);
        let (mut cluster, held) = serving();
        board.post(&slot(), holding(&held), ME, || published(&cluster, 20));
        let before = ring.load_full();
        assert_eq!((index(&board), before.iter().count()), (20, 1));
        // An empty entry of a new leader, then a revocation.
        board.refresh(ME, || published(&cluster, 21));
        cluster.run(
            ME,
            Op::AddRevocations(AddRevocations {
                revocations: vec![(RevocationKey::CommonName("gone".to_owned()), String::new())],
            }),
        );
        board.refresh(ME, || published(&cluster, 22));
        board.post(&slot(), holding(&held), ME, || published(&cluster, 23));
        assert!(Arc::ptr_eq(&before, &ring.load_full()));
        let now = board.reached().now();
        assert_eq!((now.epoch, now.index), (cluster.state.epoch(), 23));
    }

    #[test]
    fn an_activation_is_in_the_ring_with_its_index_although_the_worker_is_busy() {
        let (board, ring) = board(&["exchange"]);
        let (mut cluster, mut held) = serving();
        let second = cluster.pending("a", 2);
        held.apply(Effect::Proven(second, "kek-a-v2".to_owned()));
        held.apply(Effect::Loaded(second, true));
        board.post(&slot(), holding(&held), ME, || published(&cluster, 20));
        let active = || {
            let ring = ring.load();
            let (_, keys) = ring.context("a").unwrap();
            let active = keys.active.as_ref().unwrap();
            (active.version, keys.readable.contains_key(&active.key_uid))
        };
        assert_eq!((active(), index(&board)), ((1, true), 20));
        cluster.ack(ME, "a", 2).activate("a", 2);
        board.refresh(ME, || published(&cluster, 21));
        assert_eq!((active(), index(&board)), ((2, true), 21));
    }

    #[test]
    fn a_slot_that_has_shown_nothing_has_no_key_and_holds_up_no_index() {
        let (board, ring) = board(&["exchange"]);
        let (cluster, held) = serving();
        board.refresh(ME, || published(&cluster, 20));
        let readable = || ring.load().context("a").map(|(_, keys)| keys.readable.len());
        assert_eq!((readable(), index(&board)), (Some(0), 20));
        board.post(&slot(), holding(&held), ME, || published(&cluster, 20));
        assert_eq!(readable(), Some(1));
    }
}
