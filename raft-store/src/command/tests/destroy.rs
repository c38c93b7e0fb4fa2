//! Destruction: scheduled, waited for, undone, begun, acknowledged by everybody, over.

use super::*;
use crate::command::destruction::settle;
use crate::state::context::Destruction;
use VersionState::{DecryptOnly, DestroyScheduled, Destroyed, Destroying, Disabled};

fn destruction(world: &World) -> Destruction {
    world.version(1).destruction.clone().unwrap()
}

#[test]
fn what_is_scheduled_is_of_no_use_and_remembers_what_it_was() {
    for from in [DecryptOnly, Disabled] {
        let mut world = World::in_state(from);
        let before = world.rows();
        let (index, at) = (world.index + 1, world.index as i64 * 1000);
        let done = world.ok(Op::ScheduleDestroy(schedule(1, from)));
        assert_eq!(
            done,
            Done::Version {
                context: context(),
                version: 1
            }
        );
        assert!(!world.version_state(1).is_readable());
        assert!(world.version(1).material.is_some());
        let expected = Destruction {
            scheduled_by: index,
            scheduled_at: at,
            from,
            wait_ms: LEAST_WAIT_MS,
            elapsed_ms: 0,
            begun_at: None,
            sealed_under: None,
            held_by: BTreeSet::new(),
            ended_at: None,
        };
        assert_eq!(destruction(&world), expected);
        world.ok(undo(1));
        assert_eq!(world.rows(), before, "it is {from:?} as before");
    }
}

#[test]
fn a_wait_is_no_shorter_than_configured_or_a_minute_and_no_longer_than_a_year() {
    let (day, hour, minute) = (DEFAULT_MIN_WAIT_MS, 3_600_000, MIN_WAIT_FLOOR_MS);
    assert_eq!((day, hour), (24 * hour, 60 * minute));
    for (min_wait_ms, short_wait_allowed, wait_ms, least_ms, kept) in [
        (day, false, day, day, true),
        (day, false, day - 1, day, false),
        (hour, false, hour, hour, true),
        (hour, false, hour - 1, hour, false),
        // Whatever its configuration says, no leader makes a wait shorter that is not one of a test.
        (0, false, minute, minute, true),
        (0, false, minute - 1, minute, false),
        (LEAST_WAIT_MS, false, LEAST_WAIT_MS, minute, false),
        (0, true, 1000, 1000, true),
        (0, true, 999, 1000, false),
        (hour, true, hour - 1, hour, false),
        (hour, false, MAX_WAIT_MS, hour, true),
        (hour, false, MAX_WAIT_MS + 1, hour, false),
        (u64::MAX, true, MAX_WAIT_MS, u64::MAX, false),
    ] {
        let mut world = World::in_state(DecryptOnly);
        let outcome = world.run(Op::ScheduleDestroy(ScheduleDestroy {
            wait_ms,
            min_wait_ms,
            short_wait_allowed,
            ..schedule(1, DecryptOnly)
        }));
        if kept {
            assert!(matches!(outcome, Outcome::Done(_)), "{wait_ms}: {outcome:?}");
            assert_eq!(destruction(&world).wait_ms, wait_ms);
            continue;
        }
        let invalid = Invalid::Wait {
            wait_ms,
            least_ms,
            most_ms: MAX_WAIT_MS,
        };
        assert_eq!(outcome, Outcome::Refused(invalid.into()));
    }
}

#[test]
fn a_destruction_begins_when_its_wait_is_over_and_not_before() {
    let mut world = World::in_state(DestroyScheduled);
    let expected = vec![world.seen(1)];
    world.ok(advance(LEAST_WAIT_MS - 1, expected));
    let early = Conflict::WaitNotOver {
        context: context(),
        version: 1,
        elapsed_ms: LEAST_WAIT_MS - 1,
        wait_ms: LEAST_WAIT_MS,
    };
    assert_eq!(world.refused(begin(1)), Refusal::Conflict(early));
    let expected = vec![world.seen(1)];
    world.ok(advance(1, expected));
    world.ok(begin(1));
    assert_eq!(world.version_state(1), Destroying);
}

#[test]
fn a_wall_clock_that_jumps_brings_no_destruction_nearer() {
    let mut world = World::in_state(DestroyScheduled);
    let late = Command {
        at: i64::MAX,
        ..world.command(begin(1), Origin::Node(1))
    };
    let refused = world.send(&late);
    assert!(matches!(
        refused,
        Outcome::Refused(Refusal::Conflict(Conflict::WaitNotOver { elapsed_ms: 0, .. }))
    ));
    let expected = vec![world.seen(1)];
    let late = Command {
        at: i64::MAX,
        ..world.command(advance(1, expected), Origin::Node(1))
    };
    world.send(&late);
    assert_eq!(destruction(&world).elapsed_ms, 1);
}

#[test]
fn time_that_passed_counts_once_however_often_it_is_reported() {
    let mut world = World::in_state(DestroyScheduled);
    let seen = world.seen(1);
    let command = world.command(advance(300, vec![seen.clone()]), Origin::Node(1));
    assert_eq!(world.send(&command), Outcome::Done(Done::Ok));
    assert_eq!(world.send(&command), Outcome::Done(Done::Ok), "the same request");
    assert_eq!(destruction(&world).elapsed_ms, 300);
    let other = Conflict::OtherWait {
        context: context(),
        version: 1,
        scheduled_by: seen.scheduled_by,
        elapsed_ms: 300,
    };
    let refused = world.refused(advance(300, vec![seen]));
    assert_eq!(refused, Refusal::Conflict(other), "another one that saw the same");
    assert_eq!(destruction(&world).elapsed_ms, 300);
}

/// Named again and again, each time as the one before leaves it, a wait of days would be over within one command.
#[test]
fn one_command_names_each_wait_once_and_in_order() {
    let mut world = World::in_state(DestroyScheduled);
    world.rotate(3);
    world.ok(Op::ScheduleDestroy(schedule(2, DecryptOnly)));
    let (first, second) = (world.seen(1), world.seen(2));
    let chain = |length: u64| -> Vec<SeenWait> {
        let link = |number: u64| SeenWait {
            elapsed_ms: number * MAX_ADVANCE_MS,
            ..first.clone()
        };
        (0..length).map(link).collect()
    };
    let elsewhere = SeenWait {
        context: ContextName::new("d").unwrap(),
        ..first.clone()
    };
    let a_day = 24 * 60 * 60 * 1000 / MAX_ADVANCE_MS;
    let before = world.rows();
    for (expected, version) in [
        (chain(a_day), 1),
        (chain(2), 1),
        (vec![first.clone(); 2], 1),
        (vec![first.clone(), second.clone(), second.clone()], 2),
        ([vec![first.clone(), second.clone()], chain(2)].concat(), 1),
        (vec![second.clone(), first.clone()], 1),
        (vec![elsewhere.clone(), second.clone()], 2),
    ] {
        let context = context();
        let order = Invalid::WaitOrder { context, version };
        let refused = world.refused(advance(MAX_ADVANCE_MS, expected));
        assert_eq!(refused, Refusal::from(order));
        assert_eq!(world.rows(), before);
    }
    let refused = world.refused(advance(1, vec![second.clone(), elsewhere]));
    assert!(
        matches!(refused, Refusal::NotFound(_)),
        "in order, and there is none"
    );
    world.ok(advance(MAX_ADVANCE_MS, vec![first, second]));
    assert_eq!(destruction(&world).elapsed_ms, MAX_ADVANCE_MS);
}

/// A leader that was suspended, or lies, takes many commands, each of which is seen.
#[test]
fn one_command_advances_by_two_minutes_at_most() {
    let mut world = World::in_state(DestroyScheduled);
    let expected = vec![world.seen(1)];
    for elapsed_ms in [MAX_ADVANCE_MS + 1, u64::MAX] {
        let invalid = Invalid::TooLarge {
            what: Bounded::Advance,
            size: elapsed_ms,
            most: MAX_ADVANCE_MS,
        };
        let refused = world.refused(advance(elapsed_ms, expected.clone()));
        assert_eq!(refused, Refusal::Invalid(invalid));
    }
    world.ok(advance(MAX_ADVANCE_MS, expected));
    assert_eq!(destruction(&world).elapsed_ms, 120_000);
}

#[test]
fn every_wait_that_is_named_advances_or_none_does() {
    let mut world = World::in_state(DestroyScheduled);
    world.rotate(3);
    world.ok(Op::ScheduleDestroy(schedule(2, DecryptOnly)));
    let both = vec![world.seen(1), world.seen(2)];
    world.ok(advance(10, both.clone()));
    assert_eq!([world.seen(1).elapsed_ms, world.seen(2).elapsed_ms], [10, 10]);
    let first = vec![world.seen(1)];
    world.ok(advance(10, first));
    let before = world.rows();
    let refused = world.refused(advance(10, vec![world.seen(1), both[1].clone()]));
    assert!(matches!(
        refused,
        Refusal::Conflict(Conflict::OtherWait { version: 2, .. })
    ));
    assert_eq!(world.rows(), before);
    world.ok(undo(2));
    let refused = world.refused(advance(10, vec![world.seen(1), both[1].clone()]));
    assert!(
        matches!(
            refused,
            Refusal::Conflict(Conflict::VersionState { version: 2, .. })
        ),
        "it waits no more"
    );
}

#[test]
fn a_wait_that_was_undone_begins_anew_and_gets_no_time_of_the_one_before() {
    let mut world = World::in_state(DestroyScheduled);
    let before = world.seen(1);
    world.ok(undo(1));
    assert!(matches!(
        world.refused(advance(LEAST_WAIT_MS, vec![before.clone()])),
        Refusal::Conflict(Conflict::VersionState {
            state: DecryptOnly,
            ..
        })
    ));
    world.ok(Op::ScheduleDestroy(schedule(1, DecryptOnly)));
    assert_eq!(world.seen(1).elapsed_ms, before.elapsed_ms);
    assert!(matches!(
        world.refused(advance(LEAST_WAIT_MS, vec![before])),
        Refusal::Conflict(Conflict::OtherWait { elapsed_ms: 0, .. })
    ));
    world.wait_out(1);
    world.ok(undo(1));
    world.ok(Op::ScheduleDestroy(schedule(1, DecryptOnly)));
    assert!(matches!(
        world.refused(begin(1)),
        Refusal::Conflict(Conflict::WaitNotOver { elapsed_ms: 0, .. })
    ));
}

/// Who has appended an entry stands in its log id, and in nothing that a command says.
#[test]
fn only_the_driver_of_the_leader_that_appends_it_brings_a_destruction_nearer() {
    let mut world = World::in_state(DestroyScheduled);
    world.state.nodes.put(2, node("n2", 2)).unwrap();
    let expected = vec![world.seen(1)];
    let before = world.rows();
    for op in [advance(1, expected.clone()), begin(1)] {
        let operation = op.name().to_owned();
        let driver = Refusal::from(Forbidden::Driver { operation });
        assert!(!op.forwardable_from_node(), "{}", op.name());
        assert_eq!(world.refused_as(2, op.clone()), driver, "it does not lead");
        let command = world.command(op.clone(), admin());
        assert_eq!(world.send(&command), Outcome::Refused(driver.clone()));
        world.leader = 2;
        assert_eq!(world.refused_as(1, op), driver, "it leads no more");
        world.leader = 1;
    }
    assert_eq!(world.rows(), before);
    world.leader = 2;
    world.ok_as(2, advance(1, expected));
    world.remove(2);
    let expected = vec![world.seen(1)];
    for op in [advance(1, expected), begin(1)] {
        assert!(matches!(
            world.refused_as(2, op),
            Refusal::Forbidden(Forbidden::Removed { .. })
        ));
    }
}

#[test]
fn an_administrator_disables_enables_schedules_and_undoes_and_no_node_does() {
    for (from, op) in [
        (DecryptOnly, set_use(1, DecryptOnly, Disabled)),
        (Disabled, set_use(1, Disabled, DecryptOnly)),
        (DecryptOnly, Op::ScheduleDestroy(schedule(1, DecryptOnly))),
        (DestroyScheduled, undo(1)),
    ] {
        let mut world = World::in_state(from);
        let before = world.rows();
        let operation = op.name().to_owned();
        assert!(!op.forwardable_from_node(), "{operation}");
        let command = world.command(op.clone(), Origin::Node(1));
        assert_eq!(
            world.send(&command),
            Outcome::Refused(Forbidden::Operation { operation }.into()),
            "no driver of the leader either"
        );
        assert_eq!(world.rows(), before);
        let command = world.command(op, admin());
        assert!(matches!(world.send(&command), Outcome::Done(_)));
    }
    assert!(ack_destroyed(1, 1).forwardable_from_node());
}

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

/// Such a row was never written, but could be read.
#[test]
fn a_wait_that_the_first_form_of_a_row_did_not_record_is_undone_and_never_over() {
    let mut world = World::in_state(DestroyScheduled);
    let key = VersionKey {
        context: context(),
        version: 1,
    };
    let first_form = KeyVersion {
        destruction: None,
        ..world.version(1).clone()
    };
    world.state.versions.put(key, first_form).unwrap();
    assert!(matches!(world.refused(begin(1)), Refusal::Conflict(_)));
    world.ok(undo(1));
    assert_eq!(world.version_state(1), Disabled);
}
