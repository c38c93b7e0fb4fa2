//! A destruction from its beginning to its tombstone: who owes an acknowledgement, and when it is over.

use super::destroy::destruction;
use super::*;
use crate::command::destruction::settle;
use VersionState::{DecryptOnly, DestroyScheduled, Destroyed, Destroying};

#[test]
fn the_sealed_key_leaves_the_state_as_the_destruction_begins() {
    let mut world = World::in_state(DestroyScheduled);
    world.wait_out(1);
    let at = world.index as i64 * 1000;
    world.ok(begin(1));
    let version = world.version(1);
    assert_eq!((version.material.as_ref(), version.acks.len()), (None, 0));
    let begun = destruction(&world);
    assert_eq!(begun.begun_at, Some(at));
    let remnants = Some(TransportId([1; 16]));
    assert_eq!(begun.sealed_under, remnants, "old logs and backups hold it still");
    assert_eq!(begun.held_by, BTreeSet::from([1]));
    let before = world.rows();
    world.ok(begin(1));
    assert_eq!(world.rows(), before, "begun once");
    assert!(
        matches!(world.refused(undo(1)), Refusal::Conflict(_)),
        "no way back"
    );
    // An import that was under way is no acknowledgement of anything.
    world.ack(1, 1);
    assert_eq!(world.rows(), before);
}

#[test]
fn the_last_acknowledgement_ends_it_and_leaves_a_tombstone() {
    let mut world = World::in_state(DestroyScheduled);
    world.state.nodes.put(2, node("n2", 2)).unwrap();
    world.state.nodes.put(3, node("n3", 3)).unwrap();
    let before = world.version(1).clone();
    world.wait_out(1);
    world.ok(begin(1));
    for id in [2, 1] {
        assert!(world.state.owes_destruction(id));
        world.ok_as(id, ack_destroyed(id, 1));
        assert_eq!(world.version_state(1), Destroying);
        assert!(!world.state.owes_destruction(id));
    }
    let owing: Vec<RaftId> = world.state.owing(world.version(1)).map(|(id, _)| id).collect();
    assert_eq!(owing, [3], "whoever is silent is named");
    let at = world.index as i64 * 1000;
    world.ok_as(3, ack_destroyed(3, 1));
    let ended = destruction(&world);
    let tombstone = KeyVersion {
        state: Destroyed,
        material: None,
        acks: BTreeSet::from([1, 2, 3]),
        destruction: Some(ended.clone()),
        ..before
    };
    assert_eq!(
        *world.version(1),
        tombstone,
        "number, label, key_uid and times stay"
    );
    assert_eq!(ended.ended_at, Some(at));
    let before = world.rows();
    world.ok_as(3, ack_destroyed(3, 1));
    assert_eq!(world.rows(), before, "over is over");
}

/// A join that failed leaves a node behind that never says anything.
#[test]
fn who_joins_owes_what_it_had_acknowledged_to_hold_and_nothing_else() {
    let mut world = World::in_state(DecryptOnly);
    let (holder, failed) = (world.join("n2", 2), world.join("n3", 3));
    world.ack(holder, 1);
    world.ok(Op::ScheduleDestroy(schedule(1, DecryptOnly)));
    world.wait_out(1);
    world.ok(begin(1));
    assert_eq!(destruction(&world).held_by, BTreeSet::from([1, holder]));
    let late = world.join("n4", 4);
    let owing = [1, holder, failed, late].map(|id| world.state.owes_destruction(id));
    assert_eq!(owing, [true, true, false, false]);
    // What it does not owe may be acknowledged all the same: it has looked.
    world.ok_as(late, ack_destroyed(late, 1));
    world.ok(ack_destroyed(1, 1));
    assert_eq!(world.version_state(1), Destroying);
    let owing: Vec<RaftId> = world.state.owing(world.version(1)).map(|(id, _)| id).collect();
    assert_eq!(owing, [holder]);
    world.ok_as(holder, ack_destroyed(holder, 1));
    assert_eq!(world.version_state(1), Destroyed, "with nothing from the others");
}

/// Version 1 is retired, node 2 joins and holds what it has to.
fn joining(held: &[u32]) -> (World, RaftId) {
    let mut world = World::in_state(DecryptOnly);
    let id = world.join("n2", 2);
    world.slot_key(id, slot());
    for version in held {
        world.ack(id, *version);
    }
    let report = report(1, 2);
    world.ok_as(id, Op::ReportNode(ReportNode { node: id, report }));
    world.ok(Op::ScheduleDestroy(schedule(1, DecryptOnly)));
    world.wait_out(1);
    world.ok(begin(1));
    (world, id)
}

#[test]
fn nobody_becomes_a_member_while_it_owes_a_destruction() {
    let (mut world, id) = joining(&[1, 2]);
    let owes = Conflict::OwesDestruction {
        node: NodeName::new("n2").unwrap(),
        context: context(),
        version: 1,
    };
    let admit = Op::AdmitNode(AdmitNode { node: id });
    assert_eq!(world.refused(admit.clone()), Refusal::Conflict(owes));
    world.ok_as(id, ack_destroyed(id, 1));
    world.ok(admit);
    assert!(!world.state.owes_destruction(id));
}

#[test]
fn who_becomes_a_member_meanwhile_has_to_acknowledge_like_one() {
    let (mut world, id) = joining(&[2]);
    assert!(!world.state.owes_destruction(id));
    world.ok(Op::AdmitNode(AdmitNode { node: id }));
    assert!(
        world.state.owes_destruction(id),
        "its token may have been here before"
    );
    world.ok(ack_destroyed(1, 1));
    assert_eq!(world.version_state(1), Destroying);
    world.ok_as(id, ack_destroyed(id, 1));
    assert_eq!(world.version_state(1), Destroyed);
}

#[test]
fn a_node_that_is_removed_owes_nothing_and_the_rest_is_settled() {
    let mut world = World::in_state(DestroyScheduled);
    let gone = 2;
    world.state.nodes.put(gone, node("n2", 2)).unwrap();
    world.wait_out(1);
    world.ok(begin(1));
    world.ok(ack_destroyed(1, 1));
    settle(&mut world.state, 7).unwrap();
    assert_eq!(world.version_state(1), Destroying, "one still owes it");
    world.remove(gone);
    assert!(!world.state.owes_destruction(gone));
    assert!(matches!(
        world.refused_as(gone, ack_destroyed(gone, 1)),
        Refusal::Forbidden(Forbidden::Removed { .. })
    ));
    settle(&mut world.state, 8).unwrap();
    assert_eq!(world.version_state(1), Destroyed);
    assert_eq!(destruction(&world).ended_at, Some(8));
}

#[test]
fn an_acknowledgement_is_of_the_node_itself_and_of_the_very_key() {
    let mut world = World::in_state(Destroying);
    let before = world.rows();
    assert!(matches!(
        world.refused_as(2, ack_destroyed(1, 1)),
        Refusal::Forbidden(Forbidden::NotItself { node: 1 })
    ));
    let other_key = AckDestroyed {
        node: 1,
        versions: vec![(context(), 1, uid(9)), (context(), 7, uid(7))],
    };
    world.ok(Op::AckDestroyed(other_key));
    assert_eq!(world.rows(), before);
}

#[test]
fn several_versions_are_acknowledged_at_once() {
    let mut world = World::in_state(Destroying);
    world.rotate(3);
    world.ok(Op::ScheduleDestroy(schedule(2, DecryptOnly)));
    let due: Vec<u32> = world
        .state
        .destroy_scheduled()
        .map(|(key, _)| key.version)
        .collect();
    assert_eq!(due, [2]);
    world.wait_out(2);
    world.ok(begin(2));
    let owed: Vec<_> = world
        .state
        .owed_by(1)
        .map(|(key, version)| (key.context.clone(), key.version, version.key_uid))
        .collect();
    assert_eq!(owed, [(context(), 1, uid(1)), (context(), 2, uid(2))]);
    world.ok(Op::AckDestroyed(AckDestroyed {
        node: 1,
        versions: owed,
    }));
    for version in [1, 2] {
        assert_eq!(world.version_state(version), Destroyed);
    }
    assert_eq!(world.state.destroying().count(), 0);
}

/// Ciphertexts outlive keys: one that names the number, the label or the key must never meet another key.
#[test]
fn nothing_of_a_tombstone_is_used_again() {
    let mut world = World::in_state(Destroyed);
    let Op::PrepareVersion(next) = prepare(2, 3) else {
        panic!()
    };
    let exists = |refusal| matches!(refusal, Refusal::Exists(Existing::Version { .. }));
    let label = "kek-c-v1".to_owned();
    assert!(world.state.label_taken(&label));
    let same_label = PrepareVersion {
        label,
        ..next.clone()
    };
    assert!(exists(world.refused(Op::PrepareVersion(same_label))));
    let same_key = PrepareVersion {
        key_uid: uid(1),
        ..next.clone()
    };
    assert!(exists(world.refused(Op::PrepareVersion(same_key))));
    assert!(matches!(world.refused(prepare(2, 1)), Refusal::Invalid(_)));
    assert!(matches!(world.refused(prepare(0, 1)), Refusal::Conflict(_)));
    world.ok(Op::PrepareVersion(next));
}
