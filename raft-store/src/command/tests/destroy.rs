//! Destruction: scheduled, waited for, undone, begun, acknowledged by everybody, over.

use super::*;
use crate::command::destruction::settle;
use crate::state::context::Destruction;
use VersionState::{DecryptOnly, DestroyScheduled, Destroyed, Destroying, Disabled};

fn destruction(world: &World) -> Destruction {
    world.version(1).destruction.clone().unwrap()
}

/// A command of an administrator.
fn by_admin(world: &World, op: Op) -> Command {
    let admin = AdminOrigin {
        fingerprint: [1; 32],
        cn: "ann".into(),
        ou: "Admin".into(),
        serial: "0b".into(),
        issuer: "CN=ca".into(),
        via_node: 1,
        evidence: None,
    };
    world.command(op, Origin::Admin(admin))
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
            ended_at: None,
        };
        assert_eq!(destruction(&world), expected);
        world.ok(undo(1));
        assert_eq!(world.rows(), before, "it is {from:?} as before");
    }
}

#[test]
fn a_wait_is_no_shorter_than_configured_or_a_second_and_no_longer_than_a_year() {
    let (day, hour) = (DEFAULT_MIN_WAIT_MS, 3_600_000);
    assert_eq!(day, 24 * hour);
    for (min_wait_ms, wait_ms, least_ms, kept) in [
        (day, day, day, true),
        (day, day - 1, day, false),
        (hour, hour, hour, true),
        (hour, hour - 1, hour, false),
        (0, 1000, 1000, true),
        (0, 999, 1000, false),
        (hour, MAX_WAIT_MS, hour, true),
        (hour, MAX_WAIT_MS + 1, hour, false),
        (u64::MAX, MAX_WAIT_MS, u64::MAX, false),
    ] {
        let mut world = World::in_state(DecryptOnly);
        let outcome = world.run(Op::ScheduleDestroy(ScheduleDestroy {
            wait_ms,
            min_wait_ms,
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
    let twice = vec![world.seen(1); 2];
    assert!(matches!(
        world.refused(advance(1, twice)),
        Refusal::Conflict(Conflict::OtherWait { elapsed_ms: 301, .. })
    ));
    assert_eq!(destruction(&world).elapsed_ms, 300);
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

#[test]
fn only_a_node_of_the_cluster_reports_time_that_passed() {
    let mut world = World::in_state(DestroyScheduled);
    let id = world.join("n2", 2);
    let expected = vec![world.seen(1)];
    let command = by_admin(&world, advance(1, expected.clone()));
    let operation = "advance_waits".to_owned();
    assert_eq!(
        world.send(&command),
        Outcome::Refused(Forbidden::Driver { operation }.into())
    );
    world.remove(id);
    assert!(matches!(
        world.refused_as(id, advance(1, expected.clone())),
        Refusal::Forbidden(Forbidden::Removed { .. })
    ));
    // A member that is not the leader cannot send it to the leader either.
    assert!(!advance(1, expected).forwardable_from_node());
}

#[test]
fn an_administrator_schedules_and_undoes() {
    let mut world = World::in_state(DecryptOnly);
    let command = by_admin(&world, Op::ScheduleDestroy(schedule(1, DecryptOnly)));
    assert!(matches!(world.send(&command), Outcome::Done(_)));
    let command = by_admin(&world, undo(1));
    assert!(matches!(world.send(&command), Outcome::Done(_)));
    for op in [
        Op::ScheduleDestroy(schedule(1, DecryptOnly)),
        undo(1),
        begin(1),
        set_use(1, DecryptOnly, Disabled),
    ] {
        assert!(!op.forwardable_from_node(), "{}", op.name());
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

#[test]
fn a_node_that_joins_meanwhile_has_to_acknowledge_too() {
    let mut world = World::in_state(DestroyScheduled);
    let early = world.join("n2", 2);
    world.wait_out(1);
    world.ok(begin(1));
    let late = world.join("n3", 3);
    for id in [1, early] {
        world.ok_as(id, ack_destroyed(id, 1));
    }
    assert_eq!(world.version_state(1), Destroying);
    assert!(world.state.owes_destruction(late));
    world.ok_as(late, ack_destroyed(late, 1));
    assert_eq!(world.version_state(1), Destroyed);
    let later = world.join("n4", 4);
    assert!(
        !world.state.owes_destruction(later),
        "for it there is the tombstone"
    );
}

#[test]
fn a_node_that_is_removed_owes_nothing_and_the_rest_is_settled() {
    let mut world = World::in_state(DestroyScheduled);
    let gone = world.join("n2", 2);
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
