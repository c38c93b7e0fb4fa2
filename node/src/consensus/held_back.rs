//! What keeps a node that is joining from being let in, as far as the state says: a slot of which it registered no key, a
//! transport key that nobody granted it or that it could not use, keys that it has not proven. Each reason comes with
//! what to do; the leader says them in its log, now and then.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use raft_store::names::{ContextName, RaftId, SlotName};
use raft_store::state::ClusterState;
use raft_store::state::node::{Node, NodeStatus};
use raft_store::state::slot::{Grantee, TransportGeneration};

use super::membership::is_below_members;

/// Before anything is said of a node: a join takes seconds.
const AFTER: Duration = Duration::from_secs(30);
/// Before the same is said again.
const AGAIN: Duration = Duration::from_secs(600);
/// Between looks at the state: the membership driver comes by twenty times a second while a node is on its way.
const LOOK: Duration = Duration::from_secs(1);
/// Reasons of one node that are said at once.
const MOST: usize = 8;

/// See the module. Names no key, path or serial: whoever asks a node whether it is ready is nobody in particular.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeldBack {
    /// Nothing of this slot can be granted to it.
    #[error(
        "slot {slot}: it has registered no key of its own; the slot has to be in its configuration (hsm.slots) and open \
         there (`hsmctl slot status`, `hsmctl slot unlock`), else its log says what keeps it from registering one"
    )]
    NoSlotKey {
        /// The slot.
        slot: SlotName,
    },
    /// No member has granted it the slot's transport key.
    #[error(
        "slot {slot}: no member has granted it the transport key; the slot has to be open on a member that holds it \
         (`hsmctl cluster members`), and that member's log says if it refuses the slot key that was registered"
    )]
    NoGrant {
        /// The slot.
        slot: SlotName,
    },
    /// It could not use what it was granted.
    #[error(
        "slot {slot}: it could not use the transport key that {granters} granted; another member that holds it grants anew \
         once the slot is open there. If none is left, its token cannot use what is wrapped for it (its log has the code): \
         stop it, and join with another token, an empty data directory and another node_id"
    )]
    Rejected {
        /// The slot.
        slot: SlotName,
        /// Whose grants.
        granters: String,
    },
    /// It was granted the transport key and does not serve the slot.
    #[error(
        "slot {slot}: {state} there, and {missing_keys} keys are not proven; its log says why, and `hsmctl slot status` \
         asked of it"
    )]
    Unproven {
        /// The slot.
        slot: SlotName,
        /// As it reported it.
        state: String,
        /// Versions that it lacks.
        missing_keys: u32,
    },
    /// It has to remove a key first.
    #[error(
        "it has yet to remove version {version} of {context} from its token, which was destroyed; its log says why"
    )]
    OwesDestruction {
        /// The context.
        context: ContextName,
        /// The version.
        version: u32,
    },
    /// Its release is older than every member's.
    #[error("its release is older than every member's: start it with theirs")]
    OlderRelease,
}

impl HeldBack {
    /// The slot that it is about, if it is about one.
    #[must_use]
    pub fn slot(&self) -> Option<&SlotName> {
        match self {
            Self::NoSlotKey { slot }
            | Self::NoGrant { slot }
            | Self::Rejected { slot, .. }
            | Self::Unproven { slot, .. } => Some(slot),
            Self::OwesDestruction { .. } | Self::OlderRelease => None,
        }
    }
}

/// Why a node that is joining is not a member yet; nothing for any other node, and for one that is only on its way.
#[must_use]
pub fn held_back_by(state: &ClusterState, id: RaftId) -> Vec<HeldBack> {
    let Some(node) = state.nodes().get(&id) else {
        return Vec::new();
    };
    if node.status != NodeStatus::Joining {
        return Vec::new();
    }
    let slots = state.slots_needed_by(Some(id)).into_iter();
    let mut reasons: Vec<HeldBack> = slots.filter_map(|slot| of_slot(state, id, node, slot)).collect();
    if let Some((key, _)) = state.owed_by(id).next() {
        reasons.push(HeldBack::OwesDestruction {
            context: key.context.clone(),
            version: key.version,
        });
    }
    if is_below_members(state, id) {
        reasons.push(HeldBack::OlderRelease);
    }
    reasons
}

fn of_slot(state: &ClusterState, id: RaftId, node: &Node, slot: SlotName) -> Option<HeldBack> {
    if !node.slot_keys.contains_key(&slot) {
        return Some(HeldBack::NoSlotKey { slot });
    }
    let known = state.slots().get(&slot);
    let mut needed = known.iter().flat_map(|known| &known.transport);
    let is_missing = |generation: &&TransportGeneration| {
        !generation.state.is_ended() && !generation.grants.contains_key(&Grantee::Node(id))
    };
    if let Some(generation) = needed.find(is_missing) {
        return Some(match generation.rejected.get(&id) {
            None => HeldBack::NoGrant { slot },
            Some(rejected) => {
                let name = |id: &RaftId| state.nodes().get(id).map(|node| node.name.to_string());
                let names: Vec<String> = rejected.granters.iter().filter_map(name).collect();
                let granters = if names.is_empty() {
                    "a member".to_owned()
                } else {
                    names.join(", ")
                };
                HeldBack::Rejected { slot, granters }
            }
        });
    }
    let report = state.reports().get(&id)?.slots.get(&slot)?;
    (!report.serving).then(|| HeldBack::Unproven {
        slot,
        state: report.state.clone(),
        missing_keys: report.missing_keys,
    })
}

/// What the leader has said of whom.
#[derive(Default)]
pub(super) struct Told {
    looked: Option<Instant>,
    known: BTreeMap<RaftId, Known>,
}

struct Known {
    /// When it was first seen held back.
    since: Instant,
    /// What was last said, and when.
    said: Option<(Instant, Vec<HeldBack>)>,
}

impl Told {
    /// Says in the log what is to be said by now.
    pub(super) fn tell(&mut self, state: &ClusterState, now: Instant) {
        for (id, reasons) in self.news(state, now) {
            let node = state.nodes().get(&id).map(|node| node.name.to_string());
            let node = node.unwrap_or_default();
            for reason in reasons.iter().take(MOST) {
                let slot = reason.slot().map(ToString::to_string).unwrap_or_default();
                tracing::warn!(node, slot, %reason, "a node that is joining is held back");
            }
        }
    }

    fn news(&mut self, state: &ClusterState, now: Instant) -> Vec<(RaftId, Vec<HeldBack>)> {
        let passed = |since: Instant| now.saturating_duration_since(since);
        if self.looked.is_some_and(|at| passed(at) < LOOK) {
            return Vec::new();
        }
        self.looked = Some(now);
        let nodes = state.nodes().iter();
        let mut held: BTreeMap<RaftId, Vec<HeldBack>> = nodes
            .map(|(id, _)| (*id, held_back_by(state, *id)))
            .filter(|(_, reasons)| !reasons.is_empty())
            .collect();
        self.known.retain(|id, _| held.contains_key(id));
        held.retain(|id, reasons| {
            let known = self.known.entry(*id).or_insert(Known {
                since: now,
                said: None,
            });
            let is_due = match &known.said {
                None => passed(known.since) >= AFTER,
                Some((at, same)) if *same == *reasons => passed(*at) >= AGAIN,
                Some((at, _)) => passed(*at) >= AFTER,
            };
            if is_due {
                known.said = Some((now, reasons.clone()));
            }
            is_due
        });
        held.into_iter().collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use raft_store::command::{GrantTransportKey, Op, RejectGrant};
    use raft_store::names::TransportId;
    use raft_store::state::FEATURE_LEVEL;
    use raft_store::state::slot::Grant;

    use super::*;
    use crate::rotation::testing::{World, slot};

    const KEY: TransportId = TransportId([1; 16]);

    fn wrapped(world: &World) -> Grant {
        Grant {
            epoch: world.state.epoch(),
            blob: vec![1],
        }
    }

    fn grant(world: &mut World, to: RaftId) {
        let op = GrantTransportKey {
            slot: slot("s"),
            id: KEY,
            grantee: Grantee::Node(to),
            grant: wrapped(world),
        };
        world.ok_as(1, Op::GrantTransportKey(op));
    }

    fn reject(world: &mut World, node: RaftId) {
        let op = RejectGrant {
            node,
            slot: slot("s"),
            id: KEY,
            grant: wrapped(world),
        };
        world.ok_as(node, Op::RejectGrant(op));
    }

    #[test]
    fn each_thing_that_a_joining_node_lacks_is_named_with_its_slot_until_it_is_let_in() {
        let mut world = World::new(1);
        world.slot_keys(1);
        world.report_clock(1, 0);
        let learner = world.join();
        let slot = || slot("s");
        let now = |world: &World| held_back_by(&world.state, learner);
        assert_eq!(now(&world), [HeldBack::NoSlotKey { slot: slot() }]);
        world.slot_keys(learner);
        assert_eq!(now(&world), [HeldBack::NoGrant { slot: slot() }]);
        grant(&mut world, 1);
        grant(&mut world, learner);
        assert!(now(&world).is_empty(), "it has only just been granted it");
        reject(&mut world, learner);
        let rejected = HeldBack::Rejected {
            slot: slot(),
            granters: "a member".to_owned(),
        };
        assert_eq!(now(&world), [rejected]);
        grant(&mut world, learner);
        world.report_slot(learner, "s", "locked");
        let reasons = now(&world);
        assert!(
            matches!(&reasons[..], [HeldBack::Unproven { state, .. }] if state == "locked"),
            "{reasons:?}"
        );
        world.report_level(learner, FEATURE_LEVEL - 1);
        assert_eq!(now(&world), [HeldBack::OlderRelease]);
        world.prove(learner);
        assert!(now(&world).is_empty());
        assert!(held_back_by(&world.state, 1).is_empty(), "a member is not");
        assert!(held_back_by(&world.state, 999).is_empty());
    }

    #[test]
    fn the_leader_says_it_once_and_again_when_it_stays_or_changes() {
        let mut world = World::new(1);
        let learner = world.join();
        let (mut told, begin) = (Told::default(), Instant::now());
        let mut news = |world: &World, at: u64| {
            let news = told.news(&world.state, begin + Duration::from_secs(at));
            news.into_iter().map(|(id, _)| id).collect::<Vec<_>>()
        };
        assert!(news(&world, 0).is_empty(), "it may be on its way");
        assert!(news(&world, 29).is_empty());
        assert_eq!(news(&world, 30), [learner]);
        assert!(news(&world, 31).is_empty() && news(&world, 629).is_empty());
        assert_eq!(news(&world, 630), [learner]);
        // Something else.
        world.slot_keys(learner);
        assert!(news(&world, 659).is_empty());
        assert_eq!(news(&world, 660), [learner]);
        world.prove(learner);
        grant(&mut world, learner);
        assert!(news(&world, 2000).is_empty());
        // A later one begins anew.
        let next = world.join();
        assert!(news(&world, 3000).is_empty());
        assert_eq!(news(&world, 3030), [next]);
    }

    #[test]
    fn every_reason_says_what_to_do() {
        let slot = || slot("s");
        for (reason, part) in [
            (HeldBack::NoSlotKey { slot: slot() }, "hsm.slots"),
            (HeldBack::NoGrant { slot: slot() }, "open on a member"),
            (
                HeldBack::Rejected {
                    slot: slot(),
                    granters: "n2".to_owned(),
                },
                "that n2 granted",
            ),
        ] {
            let said = reason.to_string();
            assert!(said.starts_with("slot s: ") && said.contains(part), "{said}");
            assert_eq!(reason.slot(), Some(&slot()));
        }
    }
}
