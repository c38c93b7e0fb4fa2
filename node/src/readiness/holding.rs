//! Whether a slot holds what the state asks for, by the newest state: what token sync has published may be a
//! moment older than that.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use raft_store::names::{KeyUid, RaftId, SlotName};
use raft_store::state::ClusterState;
use raft_store::state::context::VersionState;

use crate::sync::wanted::{concerns, versions};

/// See the module.
#[derive(Default)]
pub(super) struct Holding {
    /// The opening of the start gate at which each slot was last seen with every key.
    admitted: Mutex<BTreeMap<SlotName, u64>>,
    /// The opening of the start gate since which each slot was once seen without a key that it owes to destroy.
    cleared: Mutex<BTreeMap<SlotName, u64>>,
}

impl Holding {
    /// The destructions that keep a slot out of service, of those that it owes. At each opening of the gate it has to
    /// have done all of them, once: it was away. Afterwards it does them as they come, like every other node, and
    /// serves meanwhile: nobody reads with a key that is being destroyed, and a token that refuses to delete must not
    /// take the whole cluster out of service.
    pub(super) fn owing(&self, slot: &SlotName, gate: Option<u64>, owed: u32) -> u32 {
        let mut cleared = self.cleared.lock().unwrap_or_else(PoisonError::into_inner);
        match gate {
            Some(gate) if owed == 0 => {
                cleared.insert(slot.clone(), gate);
                0
            }
            Some(gate) if cleared.get(slot) == Some(&gate) => 0,
            _ => owed,
        }
    }

    /// The keys that keep a slot from being complete, of those that this node does not serve. At each opening
    /// of the gate it has to hold pending versions as well, once: it was away, and one of them may be activated
    /// without it at any moment. Afterwards it is waited for before a version is activated, so that pending ones
    /// keep nobody out of service.
    pub(super) fn lacking(
        &self,
        state: &ClusterState,
        me: RaftId,
        slot: &SlotName,
        gate: u64,
        serving: &BTreeSet<KeyUid>,
    ) -> u32 {
        let (mut lacking, mut pending) = (0_u32, 0_u32);
        for (_, version) in versions(state, slot) {
            let asked_for = version.state.is_readable() && concerns(version, me);
            if !asked_for || serving.contains(&version.key_uid) {
                continue;
            }
            if version.state == VersionState::Pending {
                pending += 1;
            } else {
                lacking += 1;
            }
        }
        let mut admitted = self.admitted.lock().unwrap_or_else(PoisonError::into_inner);
        if lacking == 0 && pending == 0 {
            admitted.insert(slot.clone(), gate);
        }
        if admitted.get(slot) == Some(&gate) {
            lacking
        } else {
            lacking + pending
        }
    }
}

/// How many keys of a slot are being destroyed, and not yet known to be gone from this node's token. By the newest
/// state too: one that arrives in a snapshot counts before token sync has seen it. That the cluster has not heard of
/// it is no reason: without a leader every node would be unready for what it has done.
pub(super) fn owed(state: &ClusterState, me: RaftId, slot: &SlotName, gone: &BTreeSet<KeyUid>) -> u32 {
    let owed = state
        .owed_by(me)
        .filter(|(_, version)| version.slot == *slot && !gone.contains(&version.key_uid));
    u32::try_from(owed.count()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rotation::testing::{World, context, slot};

    #[test]
    fn a_destruction_is_owed_until_the_token_was_searched_or_the_cluster_was_told() {
        let mut world = World::new(1);
        for _ in 0..2 {
            let version = world.prepare("c");
            world.activate("c", version);
        }
        let (nothing, first) = (BTreeSet::new(), key(&world, 1));
        let owes = |world: &World, gone: &BTreeSet<KeyUid>| owed(&world.state, 1, &slot("s"), gone);
        world.schedule_destroy("c", 1, 1000);
        assert_eq!(owes(&world, &nothing), 0, "it can still be undone");
        world.begin_destroy("c", 1);
        assert_eq!(owes(&world, &nothing), 1);
        assert_eq!(owes(&world, &BTreeSet::from([first])), 0);
        assert_eq!(owed(&world.state, 1, &slot("t"), &nothing), 0, "another slot's");
        world.ack_destroyed(1, "c", 1);
        assert_eq!(owes(&world, &nothing), 0);
    }

    #[test]
    fn what_is_destroyed_keeps_out_of_service_only_whoever_comes_back() {
        let (holding, slot) = (Holding::default(), slot("s"));
        assert_eq!(holding.owing(&slot, None, 2), 2, "the gate is shut");
        assert_eq!(holding.owing(&slot, Some(5), 2), 2);
        assert_eq!(holding.owing(&slot, Some(5), 0), 0);
        // As everybody has to at the same moment.
        assert_eq!(holding.owing(&slot, Some(5), 3), 0);
        assert_eq!(holding.owing(&slot, Some(9), 3), 3, "it was away");
    }

    fn key(world: &World, version: u32) -> KeyUid {
        let found = world.state.version(&context("c"), version);
        found.map(|version| version.key_uid).unwrap_or_default()
    }

    #[test]
    fn a_version_is_lacking_with_the_entry_that_activates_it() {
        let (mut world, holding) = (World::new(1), Holding::default());
        world.prepare("c");
        world.activate("c", 1);
        let serving = BTreeSet::from([key(&world, 1)]);
        let lacking = |world: &World| holding.lacking(&world.state, 1, &slot("s"), 5, &serving);
        assert_eq!(lacking(&world), 0);
        // Held by all who are waited for: a pending version changes nothing.
        world.prepare("c");
        assert_eq!(lacking(&world), 0);
        world.activate("c", 2);
        assert_eq!(lacking(&world), 1);
    }

    #[test]
    fn who_was_away_needs_pending_versions_too_before_it_serves_again() {
        let (mut world, holding) = (World::new(1), Holding::default());
        world.prepare("c");
        world.activate("c", 1);
        world.prepare("c");
        let all = BTreeSet::from([key(&world, 1), key(&world, 2)]);
        let old = BTreeSet::from([key(&world, 1)]);
        let lacking = |gate, serving| holding.lacking(&world.state, 1, &slot("s"), gate, serving);
        assert_eq!(lacking(5, &old), 1);
        assert_eq!(lacking(5, &all), 0);
        // Once it had them all, and again at the next opening only.
        assert_eq!(lacking(5, &old), 0);
        assert_eq!(lacking(6, &old), 1);
    }

    #[test]
    fn slots_are_judged_one_by_one() {
        let (mut world, holding) = (World::new(1), Holding::default());
        world.prepare("c");
        world.activate("c", 1);
        let none = BTreeSet::new();
        assert_eq!(holding.lacking(&world.state, 1, &slot("t"), 5, &none), 0);
        assert_eq!(holding.lacking(&world.state, 1, &slot("s"), 5, &none), 1);
    }
}
