//! A survivor that goes on alone: what begins with its epoch, and who may not begin one.

use super::*;
use VersionState::{DestroyScheduled, Destroyed};

/// What the disk of a survivor gets, once the membership has it alone.
fn recover(epoch: u64, survivor: RaftId) -> Op {
    Op::RecoverQuorum(RecoverQuorum {
        epoch,
        survivor,
        last_term: 3,
        last_index: 40,
        applied_index: 38,
    })
}

/// Members 1 to 3 and one that joins.
fn of_three() -> (World, RaftId) {
    let mut world = World::in_state(DestroyScheduled);
    for id in [2, 3] {
        let name = format!("n{id}");
        world.state.nodes.put(id, node(&name, id as u8)).unwrap();
    }
    world.voters = BTreeSet::from([1, 2, 3]);
    let joining = world.join("n4", 4);
    (world, joining)
}

#[test]
fn everybody_else_becomes_a_tombstone_and_nobody_is_waited_for() {
    let (mut world, joining) = of_three();
    world.wait_out(1);
    world.ok(begin(1));
    let ack = AckDestroyed {
        node: 1,
        versions: vec![(context(), 1, uid(1))],
    };
    world.ok(Op::AckDestroyed(ack));
    world.voters = BTreeSet::from([1]);
    world.ok(recover(2, 1));
    assert_eq!(world.state.epoch(), 2);
    for id in [2, 3, joining] {
        let status = &world.state.nodes().get(&id).unwrap().status;
        assert!(matches!(status, NodeStatus::Removed { .. }), "{id}: {status:?}");
    }
    assert_eq!(world.state.nodes().get(&1u64).unwrap().status, NodeStatus::Member);
    assert_eq!(world.version_state(1), Destroyed, "the two that owed it are gone");
    let recovery = world.state.recoveries().get(&2u64).unwrap();
    assert_eq!(recovery.left_out, [2, 3, joining]);
    assert_eq!((recovery.survivor, recovery.last_index), (1, 40));
    // Their names are free for whoever comes with an empty directory, under an id of its own.
    let again = world.join("n2", 9);
    assert!(again > joining);
}

/// What the lost voters had encrypted under versions of which the survivor knows nothing names them, and tokens that are still
/// somewhere have keys of their labels.
#[test]
fn no_number_is_given_again_that_the_lost_voters_may_have_given() {
    let (mut world, _) = of_three();
    let highest = |world: &World| world.state.contexts().get(&context()).unwrap().highest_version;
    let before = highest(&world);
    world.voters = BTreeSet::from([1]);
    world.ok(recover(2, 1));
    assert_eq!(highest(&world), before + LEFT_OUT_VERSIONS);
    assert!(matches!(
        world.refused(prepare(before, before + 1)),
        Refusal::Conflict(Conflict::HighestVersion { .. })
    ));
    world.ok(prepare(highest(&world), highest(&world) + 1));
    assert_eq!(
        world.version_state(before + LEFT_OUT_VERSIONS + 1),
        VersionState::Pending
    );
}

#[test]
fn nobody_throws_others_out_with_it() {
    let (mut world, _) = of_three();
    let before = world.rows();
    // The leader of three, another node than the survivor, an administrator.
    assert!(matches!(world.refused(recover(2, 1)), Refusal::Forbidden(_)));
    world.voters = BTreeSet::from([1]);
    assert!(matches!(world.refused(recover(2, 2)), Refusal::Forbidden(_)));
    assert!(matches!(
        world.refused_as(2, recover(2, 2)),
        Refusal::Forbidden(_)
    ));
    let command = world.command(recover(2, 1), admin());
    assert!(matches!(
        world.send(&command),
        Outcome::Refused(Refusal::Forbidden(_))
    ));
    // An epoch that is not the next one.
    for epoch in [0, 1, 3] {
        assert!(matches!(
            world.refused(recover(epoch, 1)),
            Refusal::Invalid(Invalid::Epoch { .. })
        ));
    }
    assert_eq!(world.rows(), before);
}

#[test]
fn one_that_has_not_joined_is_no_survivor() {
    let (mut world, joining) = of_three();
    world.voters = BTreeSet::from([joining]);
    world.leader = joining;
    let refused = world.refused_as(joining, recover(2, joining));
    assert!(
        matches!(refused, Refusal::Conflict(Conflict::NotProven { .. })),
        "{refused:?}"
    );
}

#[test]
fn whoever_was_asked_to_leave_stays_if_nobody_else_is_left() {
    let (mut world, _) = of_three();
    world.ok(Op::RemoveNode(RemoveNode {
        node: 1,
        successor: None,
        lose_keys: false,
    }));
    world.voters = BTreeSet::from([1]);
    world.ok(recover(2, 1));
    assert_eq!(world.state.nodes().get(&1u64).unwrap().status, NodeStatus::Member);
}
