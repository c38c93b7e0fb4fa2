//! A member's way out: asked to leave, out of Raft's membership, a tombstone.

use super::adopt::adopted;
use super::*;
use crate::state::context::KeyOrigin;
use VersionState::{DestroyScheduled, Destroyed, Destroying};

fn leave(node: RaftId, successor: Option<&str>) -> Op {
    Op::RemoveNode(RemoveNode {
        node,
        successor: successor.map(|name| NodeName::new(name).unwrap()),
        lose_keys: false,
    })
}

fn keep(node: RaftId) -> Op {
    Op::KeepNode(KeepNode { node })
}

fn bury(node: RaftId) -> Op {
    Op::BuryNode(BuryNode { node })
}

/// Voters 1, 2 and 3.
fn of_three(mut world: World) -> World {
    for (id, name) in [(2, "n2"), (3, "n3")] {
        world.state.nodes.put(id, node(name, id as u8)).unwrap();
        world.voters.insert(id);
    }
    world
}

fn status(world: &World, node: RaftId) -> NodeStatus {
    world.state.nodes.get(&node).unwrap().status.clone()
}

#[test]
fn a_member_that_is_asked_to_leave_counts_until_it_is_out_of_rafts_membership() {
    let mut world = of_three(World::new());
    let asked = world.index as i64 * 1000;
    world.ok(leave(3, None));
    let leaving = NodeStatus::Leaving {
        at: asked,
        successor: None,
    };
    assert_eq!(status(&world, 3), leaving);
    assert_eq!(world.state.members(), 3);
    world.ok(prepare(0, 1));
    world.ack(1, 1);
    world.ack(2, 1);
    assert!(matches!(
        world.refused(activate(1, &[])),
        Refusal::Conflict(Conflict::Holders { .. })
    ));
    let before = world.rows();
    assert!(matches!(
        world.refused(bury(3)),
        Refusal::Conflict(Conflict::StillVotes { .. })
    ));
    assert_eq!(world.rows(), before);
    world.ok(leave(3, None));
    assert_eq!(status(&world, 3), leaving, "asked again");
    world.voters.remove(&3);
    world.ok(bury(3));
    assert!(matches!(status(&world, 3), NodeStatus::Removed { .. }));
    world.ok(activate(1, &[]));
    let before = world.rows();
    world.ok(bury(3));
    assert_eq!(world.rows(), before, "buried once");
    for op in [leave(3, None), keep(3)] {
        assert!(matches!(
            world.refused(op),
            Refusal::Conflict(Conflict::NodeRemoved { .. })
        ));
    }
}

#[test]
fn its_tombstone_leaves_nothing_behind_that_is_kept_for_it() {
    let mut world = of_three(World::in_state(DestroyScheduled));
    world.ok_as(
        3,
        Op::ReportNode(ReportNode {
            node: 3,
            report: report(1, 3),
        }),
    );
    world.slot_key(3, slot());
    let mut generations = world.state.slots.get(&slot()).unwrap().as_ref().clone();
    for generation in &mut generations.transport {
        generation.grants.insert(Grantee::Node(3), grant(1));
        generation
            .rejected
            .insert(3, crate::state::slot::Rejected::default());
    }
    world.state.slots.put(slot(), generations).unwrap();
    world.wait_out(1);
    world.ok(begin(1));
    for id in [1, 2] {
        world.ok_as(id, ack_destroyed(id, 1));
    }
    assert_eq!(world.version_state(1), Destroying, "node 3 owes it");
    world.ok(leave(3, None));
    assert_eq!(world.version_state(1), Destroying);
    world.voters.remove(&3);
    world.ok(bury(3));
    assert_eq!(world.version_state(1), Destroyed, "nobody else did");
    let tombstone = world.state.nodes.get(&3).unwrap();
    assert!(tombstone.slot_keys.is_empty() && tombstone.name.as_str() == "n3");
    assert!(world.state.reports.get(&3).is_none());
    for generation in &world.state.slots.get(&slot()).unwrap().transport {
        assert!(!generation.grants.contains_key(&Grantee::Node(3)));
        assert!(generation.rejected.is_empty());
    }
}

#[test]
fn a_removed_name_joins_again_under_another_raft_id_only() {
    let mut world = of_three(World::new());
    world.ok(leave(3, None));
    world.voters.remove(&3);
    let number = world.token();
    assert!(
        matches!(world.refused(register(number, "n3", 9)), Refusal::Exists(_)),
        "it has not left yet"
    );
    world.ok(bury(3));
    let again = world.join("n3", 9);
    assert!(again > 3);
    assert!(matches!(status(&world, 3), NodeStatus::Removed { .. }));
    assert_eq!(status(&world, again), NodeStatus::Joining);
}

#[test]
fn a_node_that_never_joined_is_removed_at_once() {
    let mut world = World::new();
    let failed = world.join("n2", 2);
    world.ok(leave(failed, None));
    assert!(matches!(status(&world, failed), NodeStatus::Removed { .. }));
}

#[test]
fn the_last_voter_stays_unless_another_takes_its_place() {
    let mut world = World::new();
    assert!(matches!(
        world.refused(leave(1, None)),
        Refusal::Conflict(Conflict::LastVoter { .. })
    ));
    world.ok(leave(1, Some("n9")));
    assert!(world.state.nodes.get(&1).unwrap().is_leaving());
}

#[test]
fn nodes_leave_one_after_the_other() {
    let mut world = of_three(World::new());
    world.ok(leave(3, Some("n9")));
    assert!(matches!(
        world.refused(leave(2, None)),
        Refusal::Conflict(Conflict::NodeLeaves { .. })
    ));
    world.ok(keep(3));
    assert_eq!(status(&world, 3), NodeStatus::Member);
    world.ok(leave(2, None));
    assert!(matches!(
        world.refused(keep(9)),
        Refusal::NotFound(Missing::Node(9))
    ));
}

#[test]
fn who_votes_takes_no_others_place() {
    let mut world = of_three(World::new());
    for successor in ["n2", "n3"] {
        assert!(matches!(
            world.refused(leave(3, Some(successor))),
            Refusal::Conflict(Conflict::SuccessorVotes { .. })
        ));
    }
    let joining = world.join("n9", 9);
    world.ok(leave(3, Some("n9")));
    // Without a successor after all.
    world.ok(leave(3, None));
    assert!(matches!(
        status(&world, 3),
        NodeStatus::Leaving { successor: None, .. }
    ));
    assert_eq!(status(&world, joining), NodeStatus::Joining);
}

#[test]
fn a_key_that_is_in_one_token_only_is_not_lost_by_the_way() {
    let mut world = World::new();
    adopted(&mut world, 1);
    world = of_three(world);
    let KeyOrigin::Adopted { holders, .. } = &world.version(1).origin else {
        panic!()
    };
    let holder = *holders.iter().next().unwrap();
    assert!(matches!(
        world.refused(leave(holder, None)),
        Refusal::Conflict(Conflict::LastHolder { version: 1, .. })
    ));
    world.ok(Op::RemoveNode(RemoveNode {
        node: holder,
        successor: None,
        lose_keys: true,
    }));
}

#[test]
fn an_administrator_or_the_leader_has_a_node_leave_and_only_the_leader_buries_it() {
    let mut world = of_three(World::new());
    let by = |world: &mut World, op: Op, origin: Origin| {
        let command = world.command(op, origin);
        world.send(&command)
    };
    let forbidden = |outcome| matches!(outcome, Outcome::Refused(Refusal::Forbidden(_)));
    assert!(forbidden(by(&mut world, leave(3, None), Origin::Node(2))));
    assert!(matches!(
        by(&mut world, leave(3, None), Origin::Node(1)),
        Outcome::Done(_)
    ));
    assert!(forbidden(by(&mut world, keep(3), Origin::Node(1))));
    world.voters.remove(&3);
    assert!(forbidden(by(&mut world, bury(3), admin())));
    assert!(forbidden(by(&mut world, bury(3), Origin::Node(2))));
    assert!(matches!(
        by(&mut world, bury(3), Origin::Node(1)),
        Outcome::Done(_)
    ));
    assert!(matches!(
        world.refused(bury(2)),
        Refusal::Conflict(Conflict::NotLeaving { .. })
    ));
}
