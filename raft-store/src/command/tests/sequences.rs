//! Whatever is asked for, in whatever order: what has to hold, holds after every command.

use proptest::prelude::*;

use super::moves::{move_to, second_slot};
use super::*;
use crate::command::destruction::settle;
use crate::state::usage::UseCount;
use VersionState::*;

/// Its kind, the version that it is about, and which of two ways it goes.
type Step = (u8, u32, bool);

fn states(world: &World) -> BTreeMap<u32, VersionState> {
    let context = context();
    let versions = world.state.versions_of(&context);
    versions
        .map(|(number, version)| (number, version.state))
        .collect()
}

fn slots(world: &World) -> BTreeMap<u32, SlotName> {
    let context = context();
    let versions = world.state.versions_of(&context);
    versions
        .map(|(number, version)| (number, version.slot.clone()))
        .collect()
}

/// The slot of the next version.
fn next_slot(world: &World) -> SlotName {
    let row = world.state.contexts().get(&context()).unwrap();
    row.slot.clone()
}

fn owed(world: &World, node: RaftId) -> Op {
    let owed = world.state.owed_by(node);
    let versions = owed.map(|(key, version)| (key.context.clone(), key.version, version.key_uid));
    Op::AckDestroyed(AckDestroyed {
        node,
        versions: versions.collect(),
    })
}

/// Takes one step; what it is not the time for is refused.
fn take(world: &mut World, joiners: &mut Vec<RaftId>, (kind, version, odd): Step) {
    let known = states(world);
    let state = known.get(&version).copied().unwrap_or(Pending);
    let highest = known.keys().copied().max().unwrap_or(0);
    let op = match kind {
        0 => {
            world.run(prepare(highest, highest + 1));
            for node in [1].into_iter().chain(joiners.iter().copied()) {
                world.ack(node, highest + 1);
            }
            if odd {
                return;
            }
            activate(highest + 1, &[])
        }
        1 => activate(version, &[]),
        2 => abandon(version),
        3 => set_use(version, state, if odd { Disabled } else { DecryptOnly }),
        4 => Op::ScheduleDestroy(ScheduleDestroy {
            override_recent_use: odd,
            ..schedule(version, state)
        }),
        5 if odd => undo(version),
        5 | 6 => {
            let scheduled = world.state.destroy_scheduled();
            let expected = scheduled.map(|(key, _)| world.seen(key.version)).collect();
            advance(LEAST_WAIT_MS / 2, expected)
        }
        7 => begin(version),
        8 => owed(world, 1),
        9 => {
            let Some(node) = joiners.last().copied() else {
                return;
            };
            let op = owed(world, node);
            world.run_as(node, op);
            return;
        }
        10 if odd => {
            let filling = world.index as u8;
            let name = format!("n{}", world.index);
            joiners.push(world.join(&name, filling));
            return;
        }
        10 => {
            let Some(node) = joiners.pop() else { return };
            world.remove(node);
            settle(&mut world.state, 0).unwrap();
            return;
        }
        11 => {
            let Some(node) = joiners.last().copied() else {
                return;
            };
            let held = world.state.held_by_members();
            let versions = held
                .map(|(key, version)| (key.context.clone(), key.version, version.key_uid))
                .collect();
            world.run_as(node, Op::AckVersions(AckVersions { node, versions }));
            for name in ["s", "t"] {
                world.slot_key(node, SlotName::new(name).unwrap());
            }
            if odd {
                return;
            }
            let incarnation = world.state.nodes().get(&node).unwrap().incarnation;
            let report = NodeReport {
                incarnation,
                ..report(world.index, 1)
            };
            world.run_as(node, Op::ReportNode(ReportNode { node, report }));
            Op::AdmitNode(AdmitNode { node })
        }
        12 => {
            let to = SlotName::new(if odd { "s" } else { "t" }).unwrap();
            move_to(next_slot(world), to)
        }
        _ => {
            let key = VersionKey {
                context: context(),
                version,
            };
            let seq = world.index;
            let count = UseCount {
                decryptions: 1,
                ..UseCount::default()
            };
            let report = NodeReport {
                uses: BTreeMap::from([(key, count)]),
                ..report(seq, 1)
            };
            Op::ReportNode(ReportNode { node: 1, report })
        }
    };
    world.run(op);
}

fn holds(world: &World, before: &BTreeMap<u32, VersionState>) -> Result<(), TestCaseError> {
    let row = world.state.contexts().get(&context()).unwrap();
    let after = states(world);
    let active: Vec<u32> = after
        .iter()
        .filter(|(_, state)| **state == Active)
        .map(|(number, _)| *number)
        .collect();
    prop_assert!(active.len() <= 1, "{active:?} are active");
    prop_assert_eq!(active.first().copied(), row.active_version);
    for (number, version) in world.state.versions_of(&context()) {
        let (state, what) = (version.state, format!("version {number}: {version:?}"));
        let gone = matches!(state, Destroying | Destroyed | Abandoned);
        prop_assert_eq!(version.material.is_none(), gone, "{}", what);
        let ending = matches!(state, DestroyScheduled | Destroying | Destroyed);
        prop_assert_eq!(version.destruction.is_some(), ending, "{}", what);
        if matches!(state, Destroying | Destroyed) {
            prop_assert!(version.destruction.as_ref().unwrap().is_due(), "{}", what);
        }
        let owing: Vec<_> = world.state.owing(version).collect();
        prop_assert_eq!(!owing.is_empty(), state == Destroying, "{}", what);
        let held = |id: &RaftId| version.destruction.as_ref().unwrap().held_by.contains(id);
        for (id, node) in &owing {
            let asked = node.is_member() || held(id);
            prop_assert!(asked, "{} holds up {}", id, what);
        }
        let was = before.get(&number).copied();
        let may = was.is_none_or(|was| was == state || was.may_become(state));
        prop_assert!(may, "it was {was:?}: {what}");
    }
    // Numbers are given once, and rows stay.
    prop_assert!(before.keys().all(|number| after.contains_key(number)));
    prop_assert_eq!(after.keys().copied().max().unwrap_or(0), row.highest_version);
    Ok(())
}

proptest! {
    #[test]
    fn no_sequence_of_commands_makes_two_versions_active_or_keeps_a_destroyed_key(
        steps in prop::collection::vec((0..14_u8, 1..5_u32, any::<bool>()), 1..120),
    ) {
        let (mut world, mut joiners) = (World::new(), Vec::new());
        second_slot(&mut world);
        for step in steps {
            let (before, placed, next) = (states(&world), slots(&world), next_slot(&world));
            take(&mut world, &mut joiners, step);
            holds(&world, &before)?;
            // A version is made where its context is, and stays there.
            for (number, slot) in slots(&world) {
                prop_assert_eq!(&slot, placed.get(&number).unwrap_or(&next), "version {}", number);
            }
        }
    }
}
