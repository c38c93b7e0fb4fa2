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
}

impl Holding {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rotation::testing::{World, context, slot};

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
