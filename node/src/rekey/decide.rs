//! The rekey driver's decision. Pure, so that a new leader goes on with what the state has. A transport key is never
//! used while a node that may serve lacks it, and never destroyed while a version needs it.

use std::collections::BTreeSet;
use std::time::Duration;

use raft_store::names::{ContextName, RaftId, SlotName, TransportId};
use raft_store::state::ClusterState;
use raft_store::state::slot::{Slot, TransportState};

use crate::rotation::Limits;
use crate::rotation::decide::required;

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Every node that may serve holds the offered transport key.
    Activate {
        /// The slot.
        slot: SlotName,
        /// The key.
        id: TransportId,
        /// Voters and members that lack it and have been silent long enough to be out of service.
        left_out: BTreeSet<RaftId>,
    },
    /// No version needs a superseded transport key.
    Destroy {
        /// The slot.
        slot: SlotName,
        /// The key.
        id: TransportId,
    },
    /// Something is sealed under the former replication key, or may be.
    Reseal,
    /// A context encrypts under a version that is wrapped under a superseded transport key.
    Rotate {
        /// The context.
        context: ContextName,
        /// Its active version.
        active: u32,
    },
}

/// Decides on everything that is open.
pub fn decide(
    state: &ClusterState,
    voters: &BTreeSet<RaftId>,
    silent_for: impl Fn(RaftId) -> Duration,
    limits: &Limits,
) -> Vec<Action> {
    let mut actions: Vec<Action> = state
        .slots()
        .iter()
        .filter_map(|(name, slot)| activate(state, voters, &silent_for, limits, (name, &**slot)))
        .collect();
    if state.replication().is_some_and(|row| row.former.is_some()) {
        actions.push(Action::Reseal);
    }
    actions.extend(unneeded(state));
    let rotate = |(context, active)| Action::Rotate { context, active };
    actions.extend(due(state).into_iter().map(rotate));
    actions
}

fn activate(
    state: &ClusterState,
    voters: &BTreeSet<RaftId>,
    silent_for: impl Fn(RaftId) -> Duration,
    limits: &Limits,
    (name, slot): (&SlotName, &Slot),
) -> Option<Action> {
    let offered = slot.offered_transport()?;
    let missing: BTreeSet<RaftId> = required(state, voters)
        .difference(&offered.acks)
        .copied()
        .collect();
    let all_silent = missing.iter().all(|id| silent_for(*id) >= limits.fence_after);
    let holders = voters.intersection(&offered.acks).count();
    (all_silent && holders * 2 > voters.len()).then(|| Action::Activate {
        slot: name.clone(),
        id: offered.id,
        left_out: missing,
    })
}

/// Superseded transport keys that no version is wrapped under any more.
fn unneeded(state: &ClusterState) -> Vec<Action> {
    let mut found = Vec::new();
    for (name, slot) in state.slots().iter() {
        let superseded = slot
            .transport
            .iter()
            .filter(|it| it.state == TransportState::Superseded);
        for generation in superseded {
            if state.wrapped_under(name, generation.id).next().is_none() {
                found.push(Action::Destroy {
                    slot: name.clone(),
                    id: generation.id,
                });
            }
        }
    }
    found
}

/// Of the [`outdated`] contexts those whose next version is not on its way.
fn due(state: &ClusterState) -> Vec<(ContextName, u32)> {
    let mut due = outdated(state);
    if !due.is_empty() {
        // Not a look at every context's versions: after years nearly all are tombstones.
        let pending: BTreeSet<&ContextName> = state.pending().map(|(key, _)| &key.context).collect();
        due.retain(|(name, _)| !pending.contains(name));
    }
    due
}

/// The contexts whose active version is wrapped under a superseded transport key, with its number. What is wrapped under
/// one cannot be wrapped anew: a key that was imported is never extractable, and a transport key unwraps no other. So
/// the way from one to the next is the next version.
#[must_use]
pub fn outdated(state: &ClusterState) -> Vec<(ContextName, u32)> {
    let superseded: BTreeSet<(&SlotName, TransportId)> = state
        .slots()
        .iter()
        .flat_map(|(name, slot)| slot.transport.iter().map(move |it| (name, it)))
        .filter(|(_, generation)| generation.state == TransportState::Superseded)
        .map(|(name, generation)| (name, generation.id))
        .collect();
    if superseded.is_empty() {
        return Vec::new();
    }
    let mut outdated = Vec::new();
    for (name, context) in state.contexts().iter() {
        let Some(number) = context.active_version else {
            continue;
        };
        let active = state.version(name, number);
        let under = active.and_then(|active| Some((&active.slot, active.material.as_ref()?.transport_id)));
        if under.is_some_and(|under| superseded.contains(&under)) {
            outdated.push((name.clone(), number));
        }
    }
    outdated
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use raft_store::command::{
        AckTransportKey, ActivateTransportKey, DestroyTransportKey, OfferTransportKey, Op, RekeyTransport,
    };
    use raft_store::state::slot::TransportMode;

    use super::*;
    use crate::rotation::testing::{World, context, slot};

    const SECOND: Duration = Duration::from_secs(1);

    fn id(number: u8) -> TransportId {
        TransportId([number; 16])
    }

    /// A transport key of `s` is asked for and offered.
    fn offer(world: &mut World, number: u8) {
        for voter in world.voters.clone() {
            world.slot_keys(voter);
        }
        let expected_generation = u32::from(number) - 1;
        world.ok(Op::RekeyTransport(RekeyTransport {
            slot: slot("s"),
            expected_generation,
            give_up: None,
        }));
        world.ok(Op::OfferTransportKey(OfferTransportKey {
            slot: slot("s"),
            id: id(number),
            expected_generation,
            mode: TransportMode::Standard,
            check: vec![number; 40],
            grants: [].into(),
        }));
    }

    fn hold(world: &mut World, node: RaftId, number: u8) {
        let op = AckTransportKey {
            node,
            slot: slot("s"),
            id: id(number),
            gone: false,
        };
        world.ok_as(node, Op::AckTransportKey(op));
    }

    fn decided(world: &World, silent: &[RaftId]) -> Vec<Action> {
        let limits = Limits::new(8 * SECOND);
        let silent_for = |node| {
            if silent.contains(&node) {
                9 * SECOND
            } else {
                SECOND
            }
        };
        decide(&world.state, &world.voters, silent_for, &limits)
    }

    fn activation(left_out: &[RaftId]) -> Action {
        Action::Activate {
            slot: slot("s"),
            id: id(2),
            left_out: left_out.iter().copied().collect(),
        }
    }

    fn activate(world: &mut World) {
        world.ok(Op::ActivateTransportKey(ActivateTransportKey {
            slot: slot("s"),
            id: id(2),
            left_out: BTreeSet::new(),
        }));
    }

    #[test]
    fn a_cluster_in_which_nothing_is_replaced_has_nothing_to_do() {
        let mut world = World::new(3);
        let version = world.prepare("c");
        world.activate("c", version);
        assert!(decided(&world, &[]).is_empty());
    }

    #[test]
    fn an_offered_key_becomes_current_once_whoever_answers_holds_it() {
        let mut world = World::new(3);
        offer(&mut world, 2);
        let voters: Vec<RaftId> = world.voters.iter().copied().collect();
        assert!(
            decided(&world, &voters[1..]).is_empty(),
            "a majority has to hold it"
        );
        hold(&mut world, voters[0], 2);
        hold(&mut world, voters[1], 2);
        assert!(decided(&world, &[]).is_empty(), "the third one answers");
        assert_eq!(decided(&world, &voters[2..]), [activation(&voters[2..])]);
        hold(&mut world, voters[2], 2);
        assert_eq!(decided(&world, &[]), [activation(&[])]);
    }

    #[test]
    fn contexts_are_rotated_away_from_the_old_key_which_goes_with_its_last_version() {
        let mut world = World::new(1);
        let first = world.prepare("c");
        world.activate("c", first);
        offer(&mut world, 2);
        hold(&mut world, 1, 2);
        assert!(
            due(&world.state).is_empty(),
            "nothing is wrapped under the new one yet"
        );
        activate(&mut world);
        let rotate = Action::Rotate {
            context: context("c"),
            active: 1,
        };
        assert_eq!(decided(&world, &[]), std::slice::from_ref(&rotate));
        world.prepare_under("c", 2);
        assert!(decided(&world, &[]).is_empty(), "its next version is on its way");
        world.abandon("c", 2);
        assert_eq!(decided(&world, &[]), [rotate]);
        world.prepare_under("c", 2);
        world.activate("c", 3);
        assert!(decided(&world, &[]).is_empty(), "version 1 still decrypts");
        world.schedule_destroy("c", 1, 1000);
        assert!(decided(&world, &[]).is_empty(), "and may be taken back");
        world.begin_destroy("c", 1);
        let destroy = Action::Destroy {
            slot: slot("s"),
            id: id(1),
        };
        assert_eq!(decided(&world, &[]), [destroy]);
        world.ok(Op::DestroyTransportKey(DestroyTransportKey {
            slot: slot("s"),
            id: id(1),
        }));
        assert!(decided(&world, &[]).is_empty());
    }

    #[test]
    fn records_are_sealed_anew_while_there_is_a_former_key() {
        let mut world = World::new(1);
        world.rekey_replication([9; 8]);
        assert_eq!(decided(&world, &[]), [Action::Reseal]);
    }
}
