//! Uses of key versions: counted by nodes, added up once, asked before anything is destroyed.

use super::*;
use crate::codec::{self, MAX_COMMAND_BYTES};
use crate::command::report_node::drop_uses;
use crate::state::COUNTS_USES;
use crate::state::frozen::NodeReportV1;
use crate::state::node::{MAX_COUNT, MAX_USES};
use crate::state::usage::{NodeUse, UseCount, VersionUse};
use VersionState::{DecryptOnly, DestroyScheduled, Destroyed, Destroying};

fn key(version: u32) -> VersionKey {
    VersionKey {
        context: context(),
        version,
    }
}

fn count(encryptions: u64, decryptions: u64, last_used: UnixMillis) -> UseCount {
    UseCount {
        encryptions,
        decryptions,
        last_used,
    }
}

/// A report of node 1.
fn counted(seq: u64, uses: impl IntoIterator<Item = (u32, UseCount)>) -> Op {
    counted_by(1, 1, seq, uses)
}

fn counted_by(node: RaftId, filling: u8, seq: u64, uses: impl IntoIterator<Item = (u32, UseCount)>) -> Op {
    let uses = uses.into_iter().map(|(version, count)| (key(version), count));
    let report = NodeReport {
        uses: uses.collect(),
        ..report(seq, filling)
    };
    Op::ReportNode(ReportNode { node, report })
}

fn usage(world: &World, version: u32) -> Option<VersionUse> {
    world.state.usage(&context(), version).cloned()
}

/// The time of the next command.
fn now(world: &World) -> UnixMillis {
    world.index as i64 * 1000
}

/// Node 2 is a member too.
fn two_members() -> World {
    let mut world = World::in_state(DecryptOnly);
    world.state.nodes.put(2, node("n2", 2)).unwrap();
    world
}

#[test]
fn what_the_members_count_is_added_up_by_version() {
    let mut world = two_members();
    assert_eq!(usage(&world, 1), None);
    let later = now(&world) + 60_000;
    world.ok(counted(1, [(1, count(0, 5, later + 9)), (2, count(7, 1, 800))]));
    world.ok_as(2, counted_by(2, 2, 1, [(1, count(0, 2, later + 6))]));
    world.ok(counted(2, [(1, count(0, 3, later + 7))]));
    let of = |seq, count| NodeUse { seq, count };
    let first = VersionUse {
        encryptions: 0,
        decryptions: 10,
        last_used: later + 7,
        nodes: BTreeMap::from([
            (1, of(2, count(0, 8, later + 7))),
            (2, of(1, count(0, 2, later + 6))),
        ]),
        last_by_removed: None,
    };
    assert_eq!(usage(&world, 1), Some(first), "the latest of what each said last");
    let of_second = usage(&world, 2).unwrap();
    assert_eq!((of_second.encryptions, of_second.decryptions), (7, 1));
    assert_eq!(world.state.uses().len(), 2);
}

#[test]
fn a_use_is_no_longer_ago_than_its_report_and_a_clock_that_was_ahead_is_corrected() {
    let mut world = World::in_state(DecryptOnly);
    let last_used = |world: &World| usage(world, 1).unwrap().last_used;
    let taken = now(&world);
    world.ok(counted(1, [(1, count(0, 1, 5))]));
    assert_eq!(
        last_used(&world),
        taken,
        "the node's clock is behind the leader's"
    );
    world.ok(counted(2, [(1, count(0, 1, i64::MAX))]));
    assert_eq!(last_used(&world), i64::MAX);
    world.ok(counted(3, [(1, count(0, 0, 7))]));
    assert_eq!(last_used(&world), i64::MAX, "no use says nothing of when");
    let taken = now(&world);
    world.ok(counted(4, [(1, count(1, 0, taken + 3))]));
    assert_eq!(last_used(&world), taken + 3);
    let used = usage(&world, 1).unwrap();
    assert_eq!((used.encryptions, used.decryptions), (1, 2));
}

#[test]
fn no_use_makes_no_row() {
    let mut world = World::in_state(DecryptOnly);
    world.ok(counted(1, [(1, count(0, 0, 5))]));
    assert!(world.state.uses().is_empty());
}

#[test]
fn who_joins_counts_nothing() {
    let mut world = World::in_state(DecryptOnly);
    let id = world.join("n2", 2);
    world.slot_key(id, slot());
    world.ok_as(id, counted_by(id, 2, 1, [(1, count(0, 5, 5))]));
    assert_eq!(world.state.reports().get(&id).unwrap().seq, 1);
    assert!(world.state.uses().is_empty());
    for version in [1, 2] {
        world.ack(id, version);
    }
    world.ok(Op::AdmitNode(AdmitNode { node: id }));
    world.ok_as(id, counted_by(id, 2, 2, [(1, count(0, 3, 5))]));
    assert_eq!(usage(&world, 1).unwrap().decryptions, 3);
}

#[test]
fn a_report_counts_four_billion_uses_of_a_version_and_no_more() {
    assert_eq!(MAX_COUNT, 4_294_967_296);
    for (encryptions, decryptions, kept) in [
        (MAX_COUNT, MAX_COUNT, true),
        (MAX_COUNT + 1, 0, false),
        (0, MAX_COUNT + 1, false),
        (u64::MAX, 1, false),
    ] {
        let mut world = World::in_state(DecryptOnly);
        let before = world.rows();
        let many = count(encryptions, decryptions, 1);
        let outcome = world.run(counted(1, [(2, count(1, 1, 1)), (1, many)]));
        if kept {
            assert_eq!(outcome, Outcome::Done(Done::Ok));
            continue;
        }
        let invalid = Invalid::TooLarge {
            what: Bounded::UseCount,
            size: encryptions.max(decryptions),
            most: MAX_COUNT,
        };
        assert_eq!(outcome, Outcome::Refused(invalid.into()));
        assert_eq!(world.rows(), before, "nothing of it is taken");
    }
}

#[test]
fn a_report_counts_once_however_often_it_arrives() {
    let mut world = World::in_state(DecryptOnly);
    let report = counted(2, [(1, count(1, 1, 1))]);
    world.ok(report.clone());
    let before = world.rows();
    world.ok(report);
    world.ok(counted(2, [(1, count(9, 9, 9))]));
    world.ok(counted(1, [(1, count(9, 9, 9)), (2, count(9, 9, 9))]));
    assert_eq!(world.rows(), before);
    let mut row = usage(&world, 1).unwrap();
    row.add(1, 2, count(9, 9, 9), i64::MAX);
    assert_eq!(usage(&world, 1), Some(row), "the row knows by itself");
}

#[test]
fn a_node_sees_in_its_report_what_was_taken_of_it() {
    let mut world = World::in_state(DecryptOnly);
    let uses = BTreeMap::from([(key(1), count(0, 4, 5))]);
    world.ok(counted(1, [(1, count(0, 4, 5))]));
    assert_eq!(world.state.reports().get(&1).unwrap().uses, uses);
}

#[test]
fn a_report_counts_256_versions_and_no_more() {
    let mut world = World::in_state(DecryptOnly);
    let before = world.rows();
    let many = |most: usize| (1_u32..).take(most).map(|version| (version, count(1, 1, 1)));
    let refused = world.refused(counted(1, many(MAX_USES + 1)));
    let invalid = Invalid::TooLarge {
        what: Bounded::Uses,
        size: 257,
        most: 256,
    };
    assert_eq!(refused, Refusal::Invalid(invalid));
    assert_eq!(world.rows(), before, "nothing of it is taken");
    world.ok(counted(1, many(MAX_USES)));
    assert_eq!(world.state.uses().len(), 2, "of versions that there are");
}

#[test]
fn as_many_uses_as_a_report_takes_fit_into_a_command() {
    let context = ContextName::new(&"c".repeat(64)).unwrap();
    let of_longest = |version| VersionKey {
        context: context.clone(),
        version,
    };
    let uses = (1..=MAX_USES as u32).map(|version| (of_longest(version), count(1, 1, 1)));
    let report = NodeReport {
        uses: uses.collect(),
        ..report(1, 1)
    };
    let bytes = codec::size(&Op::ReportNode(ReportNode { node: 1, report }));
    assert!(bytes < MAX_COMMAND_BYTES as u64 / 2, "{bytes}");
}

#[test]
fn counts_stay_when_a_version_is_destroyed() {
    let mut world = World::in_state(Destroying);
    world.ok(counted(1, [(1, count(0, 5, 900))]));
    world.ok(ack_destroyed(1, 1));
    assert_eq!(world.version_state(1), Destroyed);
    assert_eq!(usage(&world, 1).unwrap().decryptions, 5);
    world.ok(counted(2, [(1, count(0, 1, 900))]));
    assert_eq!(usage(&world, 1).unwrap().decryptions, 6, "reported late");
}

/// That somebody needed the version until then is true all the same, and asked before it is destroyed.
#[test]
fn what_a_removed_node_counted_is_in_no_sum_and_only_the_time_of_its_last_use_stays() {
    let mut world = two_members();
    world.ok(counted(1, [(1, count(0, 3, 0))]));
    let taken = now(&world);
    let uses = [(1, count(4, MAX_COUNT, i64::MAX)), (2, count(1, 0, 0))];
    world.ok_as(2, counted_by(2, 2, 1, uses));
    let at = now(&world);
    world.remove(2);
    drop_uses(&mut world.state, 2, at).unwrap();
    let used = usage(&world, 1).unwrap();
    assert_eq!((used.encryptions, used.decryptions), (0, 3));
    assert!(used.nodes.keys().eq([&1]));
    assert_eq!(used.last_by_removed, Some(at), "none was after its removal");
    assert_eq!(used.last_used, at);
    let other = usage(&world, 2).unwrap();
    assert!(other.nodes.is_empty());
    assert_eq!((other.encryptions, other.last_used), (0, taken));
    let before = world.rows();
    drop_uses(&mut world.state, 2, at + 1).unwrap();
    assert_eq!(world.rows(), before);
    let late = world.refused_as(2, counted_by(2, 2, 2, [(1, count(0, 2, 600))]));
    assert!(matches!(late, Refusal::Forbidden(Forbidden::Removed { .. })));
    world.ok(counted(2, [(1, count(0, 1, 0))]));
    let used = usage(&world, 1).unwrap();
    assert_eq!((used.decryptions, used.last_by_removed), (4, Some(at)));
}

#[test]
fn a_report_of_the_form_before_counts_nothing_and_is_one_of_the_row_as_others() {
    let mut world = World::in_state(DecryptOnly);
    let report = NodeReportV1 {
        seq: 3,
        incarnation: Incarnation([1; 16]),
        boot: Boot([4; 16]),
        clock: 5,
        durable_index: 6,
        proven_at: None,
        feature_level: 1,
        slots: BTreeMap::new(),
    };
    let op = Op::ReportNodeV1(ReportNodeV1 {
        node: 1,
        report: report.clone(),
    });
    assert!(op.is_report() && op.forwardable_from_node());
    let before = world.state.requests().len();
    world.ok(op);
    assert_eq!(world.state.requests().len(), before, "outside the window");
    assert_eq!(**world.state.reports().get(&1).unwrap(), NodeReport::from(report));
    assert!(world.state.uses().is_empty());
    world.ok(counted(3, [(1, count(1, 1, 1))]));
    assert!(world.state.uses().is_empty(), "numbered as one of them");
}

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
