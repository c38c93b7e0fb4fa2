//! How far token and state agree, for readiness, reports and people.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use raft_store::names::{KeyUid, RaftId, SlotName};
use raft_store::state::ClusterState;

use super::wanted::required;

/// One slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlotSync {
    /// Versions the node has to serve and does not; pending ones apart.
    pub missing_keys: u32,
    /// Steps that may bring one of them and were not tried yet.
    pub untried: u32,
    /// Objects of ended versions that are still in the token.
    pub destructions_pending: u32,
    /// When the whole token was last compared with the state; `None`: not since the start.
    pub last_full_sync: Option<Instant>,
    /// What people have to know, with remedies.
    pub problems: Vec<String>,
    /// Why the slot does not have every key although nothing is left to try, for administrators, with the section of
    /// `docs/operations.md` that says what helps.
    pub obstacle: Option<String>,
    /// Index of the state that token was last compared with.
    pub compared_at: u64,
    /// The newest applied index at which this slot had everything the state asked of it.
    pub complete_at: Option<u64>,
    /// The keys that are proven and loaded.
    pub serving: Arc<BTreeSet<KeyUid>>,
    /// The keys that were searched for in the token and not found, since the slot was opened.
    pub gone: Arc<BTreeSet<KeyUid>>,
}

/// All slots of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SyncStatus {
    /// By slot.
    pub slots: BTreeMap<SlotName, SlotSync>,
    /// `Some(i)`: with the state as of index `i` every version was held and proven, and what the state
    /// asks for has not changed since. This is what is reported: it stands still while nothing changes.
    pub proven_at: Option<u64>,
    /// The newest applied index at which token and state agreed in everything.
    pub complete_at: Option<u64>,
    /// Slots that this node has to have ([`ClusterState::slots_needed_by`]) and does not.
    pub unconfigured: Vec<SlotName>,
    /// This node's replication key is not the cluster's.
    pub wrong_replication_key: Option<String>,
}

impl SyncStatus {
    /// Versions missing in a slot.
    pub fn missing_keys(&self, slot: &str) -> u32 {
        self.slots.get(slot).map_or(0, |slot| slot.missing_keys)
    }

    /// Whether everything the state asked for at `index` is done here, in all slots.
    pub fn is_complete(&self, index: u64) -> bool {
        self.complete_at.is_some_and(|at| at >= index)
    }

    /// The same of one slot: the start gate's question where another slot is out of service everywhere.
    pub fn is_slot_complete(&self, slot: &str, index: u64) -> bool {
        let slot = self.slots.get(slot);
        slot.and_then(|slot| slot.complete_at)
            .is_some_and(|at| at >= index)
    }

    /// The oldest full comparison; `None` if a slot has had none.
    pub fn last_full_sync(&self) -> Option<Instant> {
        let all: Option<Vec<Instant>> = self.slots.values().map(|slot| slot.last_full_sync).collect();
        all?.into_iter().min()
    }
}

/// Remembers since when everything required is proven.
#[derive(Default)]
pub(super) struct Proof {
    since: Option<(u64, BTreeSet<KeyUid>)>,
}

impl Proof {
    /// Fills in what follows from all slots together. `index` is the state's.
    pub(super) fn judge(&mut self, status: &mut SyncStatus, state: &ClusterState, me: RaftId, index: u64) {
        let required = required(state, me);
        let needed = state.slots_needed_by(Some(me)).into_iter();
        status.unconfigured = needed.filter(|slot| !status.slots.contains_key(slot)).collect();
        let founded = state.meta().is_some();
        for (name, slot) in &mut status.slots {
            let mut own = required.iter().filter(|(other, _)| other == name);
            let complete =
                founded && slot.last_full_sync.is_some() && own.all(|(_, uid)| slot.serving.contains(uid));
            // What is to be destroyed was counted against the state of that comparison; whether it keeps the slot out
            // of service is readiness's to say.
            slot.complete_at = complete.then_some(index.min(slot.compared_at));
        }
        let complete_at: Option<Vec<u64>> = status.slots.values().map(|slot| slot.complete_at).collect();
        let complete_at = complete_at.filter(|_| founded && status.unconfigured.is_empty());
        let Some(complete_at) = complete_at else {
            self.since = None;
            status.proven_at = None;
            status.complete_at = None;
            return;
        };
        let keys: BTreeSet<KeyUid> = required.into_iter().map(|(_, uid)| uid).collect();
        let since = match self.since.take() {
            Some((since, known)) if known == keys => since,
            _ => index,
        };
        self.since = Some((since, keys));
        status.proven_at = Some(since);
        status.complete_at = Some(complete_at.into_iter().min().unwrap_or(index));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::testing::{Cluster, ME, slot};
    use super::*;

    fn status(serving: &[KeyUid]) -> SyncStatus {
        let slot_sync = SlotSync {
            last_full_sync: Some(Instant::now()),
            compared_at: u64::MAX,
            serving: Arc::new(serving.iter().copied().collect()),
            ..SlotSync::default()
        };
        SyncStatus {
            slots: BTreeMap::from([(slot(), slot_sync)]),
            ..SyncStatus::default()
        }
    }

    #[test]
    fn proof_stands_still_while_nothing_is_asked_for() {
        let mut cluster = Cluster::founded();
        cluster.registered(ME).transport(&[]).context("a");
        let first = cluster.active("a", 1);
        let mut proof = Proof::default();
        let mut status = status(&[first]);
        proof.judge(&mut status, &cluster.state, ME, 10);
        assert_eq!((status.proven_at, status.complete_at), (Some(10), Some(10)));
        proof.judge(&mut status, &cluster.state, ME, 50);
        assert_eq!((status.proven_at, status.complete_at), (Some(10), Some(50)));
        assert!(status.is_complete(50) && !status.is_complete(51));
        assert!(status.is_slot_complete("exchange", 50) && !status.is_slot_complete("other", 1));
    }

    #[test]
    fn a_slot_is_complete_no_further_than_it_was_compared() {
        let cluster = Cluster::founded();
        let mut behind = status(&[]);
        for slot in behind.slots.values_mut() {
            slot.compared_at = 7;
        }
        Proof::default().judge(&mut behind, &cluster.state, ME, 10);
        assert_eq!(
            (behind.complete_at, behind.is_slot_complete("exchange", 8)),
            (Some(7), false)
        );
    }

    #[test]
    fn a_new_version_is_proven_at_its_own_index_and_a_pending_one_changes_nothing() {
        let mut cluster = Cluster::founded();
        cluster.registered(ME).transport(&[]).context("a");
        let first = cluster.active("a", 1);
        let mut proof = Proof::default();
        let mut before = status(&[first]);
        proof.judge(&mut before, &cluster.state, ME, 10);
        let second = cluster.pending("a", 2);
        proof.judge(&mut before, &cluster.state, ME, 20);
        assert_eq!(before.proven_at, Some(10));
        cluster.ack(ME, "a", 2).activate("a", 2);
        proof.judge(&mut before, &cluster.state, ME, 30);
        assert_eq!((before.proven_at, before.complete_at), (None, None));
        let mut after = status(&[first, second]);
        proof.judge(&mut after, &cluster.state, ME, 40);
        assert_eq!(after.proven_at, Some(40));
    }

    #[test]
    fn nothing_is_proven_before_the_token_was_looked_into_or_while_a_slot_is_not_configured() {
        let mut cluster = Cluster::founded();
        let mut proof = Proof::default();
        let mut unseen = status(&[]);
        for slot in unseen.slots.values_mut() {
            slot.last_full_sync = None;
        }
        proof.judge(&mut unseen, &cluster.state, ME, 5);
        assert_eq!(unseen.proven_at, None);
        assert_eq!(unseen.last_full_sync(), None);
        let mut seen = status(&[]);
        proof.judge(&mut seen, &cluster.state, ME, 6);
        assert_eq!(
            seen.proven_at,
            Some(6),
            "a founder without contexts has nothing to prove"
        );
        cluster.context_in("b", "elsewhere");
        proof.judge(&mut seen, &cluster.state, ME, 7);
        assert_eq!(seen.proven_at, None);
        assert_eq!(seen.unconfigured.len(), 1);
        proof.judge(&mut seen, &ClusterState::default(), ME, 8);
        assert_eq!(
            seen.complete_at, None,
            "before there is a cluster nothing is complete"
        );
    }

    #[test]
    fn a_slot_that_holds_nothing_any_more_is_not_waited_for() {
        let mut cluster = Cluster::founded();
        cluster
            .transport_in("2fa", 1)
            .context_in("a", "elsewhere")
            .move_to("a", "2fa");
        let mut moved = status(&[]);
        Proof::default().judge(&mut moved, &cluster.state, ME, 5);
        assert_eq!(moved.unconfigured, [SlotName::new("2fa").unwrap()]);
        let sync = moved.slots[&slot()].clone();
        moved.slots.insert(SlotName::new("2fa").unwrap(), sync);
        Proof::default().judge(&mut moved, &cluster.state, ME, 5);
        assert_eq!((moved.unconfigured.len(), moved.complete_at), (0, Some(5)));
    }

    #[test]
    fn what_is_to_be_destroyed_makes_no_slot_incomplete() {
        let cluster = Cluster::founded();
        let (mut clean, mut dirty) = (status(&[]), status(&[]));
        for slot in dirty.slots.values_mut() {
            slot.destructions_pending = 1;
        }
        Proof::default().judge(&mut clean, &cluster.state, ME, 5);
        Proof::default().judge(&mut dirty, &cluster.state, ME, 5);
        assert_eq!(dirty.complete_at, clean.complete_at);
    }
}
