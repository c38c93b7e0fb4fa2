//! What was used recently, or may have been, is not destroyed unless that is overridden.

use super::uses::{count, counted, now, two_members, usage};
use super::*;
use crate::state::COUNTS_USES;
use VersionState::{DecryptOnly, DestroyScheduled};

/// Version 1 is to be destroyed unless it was used within so many milliseconds.
fn unless_used(recent_ms: u64) -> Op {
    Op::ScheduleDestroy(ScheduleDestroy {
        recent_ms,
        override_recent_use: false,
        ..schedule(1, DecryptOnly)
    })
}

fn used_recently(ago_ms: u64) -> Refusal {
    let (context, version) = (context(), 1);
    Refusal::from(Conflict::UsedRecently {
        context,
        version,
        ago_ms,
    })
}

#[test]
fn a_version_that_was_used_recently_is_not_destroyed_unless_that_is_overridden() {
    let with = |recent_ms, override_recent_use| {
        let mut world = World::in_state(DecryptOnly);
        let last_used = now(&world);
        world.ok(counted(1, [(1, count(0, 1, last_used))]));
        // Five seconds later.
        world.index += 4;
        world.run(Op::ScheduleDestroy(ScheduleDestroy {
            recent_ms,
            override_recent_use,
            ..schedule(1, DecryptOnly)
        }))
    };
    assert_eq!(with(5001, false), Outcome::Refused(used_recently(5000)));
    assert!(matches!(with(5000, false), Outcome::Done(_)), "longer ago");
    assert!(matches!(with(5001, true), Outcome::Done(_)), "overridden");
    assert!(matches!(with(u64::MAX, true), Outcome::Done(_)));
}

#[test]
fn a_use_that_lies_ahead_is_recent() {
    let mut world = World::in_state(DecryptOnly);
    world.ok(counted(1, [(1, count(0, 1, i64::MAX))]));
    assert_eq!(world.refused(unless_used(0)), used_recently(0));
}

#[test]
fn a_leader_whose_clock_is_ahead_makes_no_use_long_ago() {
    let mut world = two_members();
    let used = now(&world);
    let report_of = |node: RaftId, clock, uses| {
        let report = NodeReport {
            clock,
            uses,
            ..report(1, node as u8)
        };
        Op::ReportNode(ReportNode { node, report })
    };
    // Its own report is no other witness.
    let uses = BTreeMap::from([(key(1), count(0, 1, 0))]);
    world.ok(report_of(1, i64::MAX, uses));
    world.ok_as(2, report_of(2, used + 5000, BTreeMap::new()));
    let ahead = |world: &World, recent_ms| Command {
        at: i64::MAX,
        ..world.command(unless_used(recent_ms), admin())
    };
    let command = ahead(&world, 5001);
    assert_eq!(world.send(&command), Outcome::Refused(used_recently(5000)));
    // Whoever leads next is not its own witness either.
    world.leader = 2;
    world.index += 100;
    assert!(matches!(
        world.refused(unless_used(200_000)),
        Refusal::Conflict(Conflict::UsedRecently { ago_ms, .. }) if ago_ms > 5000
    ));
    world.leader = 1;
    let command = ahead(&world, 5000);
    assert!(matches!(world.send(&command), Outcome::Done(_)));
}

/// It counts the uses and takes its own report of them, both by the same clock.
#[test]
fn what_a_leader_used_whose_clock_is_far_behind_was_used_when_the_others_say() {
    const DAY: UnixMillis = 24 * 60 * 60 * 1000;
    let (today, behind) = (1000 * DAY, 600 * DAY);
    let mut world = two_members();
    world.state.nodes.put(3, node("n3", 3)).unwrap();
    world.voters = BTreeSet::from([1, 2, 3]);
    let report_of = |node: RaftId, clock, uses| {
        let report = NodeReport {
            clock,
            uses,
            ..report(1, node as u8)
        };
        Op::ReportNode(ReportNode { node, report })
    };
    let at = |world: &World, at, origin, op| Command {
        at,
        ..world.command(op, origin)
    };
    for id in [2, 3] {
        let op = report_of(id, today - 9 + id as i64, BTreeMap::new());
        let command = at(&world, behind, Origin::Node(id), op);
        assert!(matches!(world.send(&command), Outcome::Done(_)));
    }
    let uses = BTreeMap::from([(key(1), count(0, 1, behind - 60_000))]);
    let command = at(&world, behind, Origin::Node(1), report_of(1, behind, uses));
    assert!(matches!(world.send(&command), Outcome::Done(_)));
    assert_eq!(usage(&world, 1).unwrap().last_used, today - 6);
    // By its own clock and by the right one of whoever leads next.
    let month = 30 * 24 * 60 * 60 * 1000;
    for (leader, now) in [(1, behind), (2, today)] {
        world.leader = leader;
        let command = at(&world, now, admin(), unless_used(month));
        assert_eq!(world.send(&command), Outcome::Refused(used_recently(0)));
    }
    let overridden = ScheduleDestroy {
        recent_ms: month,
        ..schedule(1, DecryptOnly)
    };
    let command = at(&world, today, admin(), Op::ScheduleDestroy(overridden));
    assert!(matches!(world.send(&command), Outcome::Done(_)));
}

fn not_counted(node: &str, counted_ms: Option<u64>) -> Refusal {
    let node = NodeName::new(node).unwrap();
    let (context, version) = (context(), 1);
    Refusal::from(Conflict::NotCountedYet {
        context,
        version,
        node,
        counted_ms,
    })
}

/// A report of a node that understands this level, and has used nothing.
fn of_level(node: RaftId, seq: u64, feature_level: u32) -> Op {
    let report = NodeReport {
        feature_level,
        ..report(seq, node as u8)
    };
    Op::ReportNode(ReportNode { node, report })
}

/// That it reports no use says nothing.
#[test]
fn while_a_member_does_not_count_nothing_is_unused() {
    let mut world = two_members();
    // What joins has used nothing.
    world.join("n3", 3);
    assert_eq!(world.refused(unless_used(0)), not_counted("n1", None));
    world.ok(of_level(1, 1, COUNTS_USES));
    assert_eq!(world.refused(unless_used(0)), not_counted("n2", None));
    world.ok_as(2, of_level(2, 1, COUNTS_USES - 1));
    assert_eq!(world.refused(unless_used(0)), not_counted("n2", None));
    assert!(world.state.uncounted().is_empty());
    world.ok(Op::ScheduleDestroy(schedule(1, DecryptOnly)));
    assert_eq!(world.version_state(1), DestroyScheduled, "overridden");
}

#[test]
fn what_was_used_before_a_member_counted_may_be_recent() {
    let mut world = World::in_state(DecryptOnly);
    let until = |world: &World| world.state.uncounted().get(&1).map(|gap| gap.until);
    world.ok(of_level(1, 1, COUNTS_USES - 1));
    world.ok(of_level(1, 2, COUNTS_USES));
    world.index += 3;
    world.ok(of_level(1, 3, COUNTS_USES));
    let since = now(&world) - 5000;
    assert_eq!(until(&world), Some(since), "the first report that counts");
    let early = not_counted("n1", Some(5000));
    assert_eq!(world.refused(unless_used(5001)), early);
    world.ok(of_level(1, 4, COUNTS_USES - 1));
    assert_eq!(world.refused(unless_used(5001)), not_counted("n1", None));
    let since = now(&world);
    world.ok(of_level(1, 5, COUNTS_USES));
    assert_eq!(until(&world), Some(since), "it counts anew");
    world.index += 4;
    world.ok(unless_used(5000));
}

#[test]
fn what_was_used_before_counting_is_no_better_known_once_the_node_is_removed() {
    let mut world = two_members();
    world.ok(of_level(1, 1, COUNTS_USES));
    world.ok_as(2, of_level(2, 1, COUNTS_USES - 1));
    world.ok_as(2, of_level(2, 2, COUNTS_USES));
    world.remove(2);
    assert_eq!(world.refused(unless_used(10_000)), not_counted("n2", Some(1000)));
}

#[test]
fn a_clock_that_was_ahead_as_counting_began_is_corrected() {
    let mut world = World::in_state(DecryptOnly);
    world.ok(of_level(1, 1, COUNTS_USES - 1));
    let ahead = NodeReport {
        clock: i64::MAX,
        ..report(2, 1)
    };
    let (node, report) = (1, ahead);
    world.ok(Op::ReportNode(ReportNode { node, report }));
    assert_eq!(world.refused(unless_used(0)), not_counted("n1", Some(0)));
    let corrected = now(&world);
    world.ok(of_level(1, 3, COUNTS_USES));
    assert_eq!(world.state.uncounted().get(&1).unwrap().until, corrected);
    world.ok(unless_used(1000));
}

/// The first report of every node is of that level in a cluster that was made by this release.
#[test]
fn who_has_counted_since_its_first_report_is_waited_for_no_longer() {
    let mut world = World::in_state(DecryptOnly);
    let id = world.join("n2", 2);
    for (seq, feature_level) in [(1, COUNTS_USES - 1), (2, COUNTS_USES)] {
        let report = NodeReport {
            feature_level,
            ..report(seq, 2)
        };
        world.ok_as(id, Op::ReportNode(ReportNode { node: id, report }));
    }
    world.ok(of_level(1, 1, COUNTS_USES));
    assert!(world.state.uncounted().is_empty(), "who joins has used nothing");
    world.ok(unless_used(u64::MAX));
}

#[test]
fn uses_of_other_versions_and_no_use_at_all_are_in_nobodys_way() {
    let mut world = World::in_state(DecryptOnly);
    let last_used = now(&world);
    world.ok(counted(1, [(2, count(1, 0, last_used))]));
    world.ok(unless_used(10_000));
    assert_eq!(world.version_state(1), DestroyScheduled);
}
