//! Destruction: scheduled, waited for, undone, begun. What comes then is in `removal.rs`.

use super::*;
use crate::state::context::Destruction;
use VersionState::{DecryptOnly, DestroyScheduled, Destroying, Disabled};

pub(super) fn destruction(world: &World) -> Destruction {
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
