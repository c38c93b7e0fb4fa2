//! Uses of key versions: counted by nodes, added up once, asked before anything is destroyed.

use super::*;
use crate::codec::{self, MAX_COMMAND_BYTES};
use crate::state::frozen::NodeReportV1;
use crate::state::node::MAX_USES;
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

#[test]
fn what_the_nodes_count_is_added_up_by_version() {
    let mut world = World::in_state(DecryptOnly);
    let second = world.join("n2", 2);
    assert_eq!(usage(&world, 1), None);
    world.ok(counted(1, [(1, count(0, 5, 900)), (2, count(7, 1, 800))]));
    world.ok_as(second, counted_by(second, 2, 1, [(1, count(0, 2, 600))]));
    let last = count(0, 3, 700);
    world.ok(counted(2, [(1, last)]));
    let first = VersionUse {
        encryptions: 0,
        decryptions: 10,
        last_used: 900,
        nodes: BTreeMap::from([
            (1, NodeUse { seq: 2, count: last }),
            (
                second,
                NodeUse {
                    seq: 1,
                    count: count(0, 2, 600),
                },
            ),
        ]),
    };
    assert_eq!(usage(&world, 1), Some(first), "the latest time, whoever says it");
    let of_second = usage(&world, 2).unwrap();
    assert_eq!((of_second.encryptions, of_second.decryptions), (7, 1));
    assert_eq!(world.state.uses().len(), 2);
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
    row.add(1, 2, count(9, 9, 9));
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

#[test]
fn what_a_removed_node_counted_stays_in_the_sums_alone() {
    let mut world = World::in_state(DecryptOnly);
    let gone = world.join("n2", 2);
    world.ok_as(gone, counted_by(gone, 2, 1, [(1, count(0, 2, 600))]));
    world.remove(gone);
    let refused = world.refused_as(gone, counted_by(gone, 2, 2, [(1, count(0, 2, 600))]));
    assert!(matches!(refused, Refusal::Forbidden(Forbidden::Removed { .. })));
    world.ok(counted(1, [(1, count(0, 3, 500))]));
    let used = usage(&world, 1).unwrap();
    assert_eq!((used.decryptions, used.last_used), (5, 600));
    assert!(used.nodes.keys().eq([&1]));
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

/// The time of the command after the next.
fn soon(world: &World) -> UnixMillis {
    (world.index as i64 + 1) * 1000
}

#[test]
fn a_version_that_was_used_recently_is_not_destroyed_unless_that_is_overridden() {
    let with = |recent_ms, override_recent_use| {
        let mut world = World::in_state(DecryptOnly);
        let last_used = soon(&world) - 5000;
        world.ok(counted(1, [(1, count(0, 1, last_used))]));
        world.run(Op::ScheduleDestroy(ScheduleDestroy {
            recent_ms,
            override_recent_use,
            ..schedule(1, DecryptOnly)
        }))
    };
    let used = Conflict::UsedRecently {
        context: context(),
        version: 1,
        ago_ms: 5000,
    };
    assert_eq!(with(5001, false), Outcome::Refused(used.into()));
    assert!(matches!(with(5000, false), Outcome::Done(_)), "longer ago");
    assert!(matches!(with(5001, true), Outcome::Done(_)), "overridden");
    assert!(matches!(with(u64::MAX, true), Outcome::Done(_)));
}

#[test]
fn a_use_that_lies_ahead_is_recent() {
    let mut world = World::in_state(DecryptOnly);
    world.ok(counted(1, [(1, count(0, 1, i64::MAX))]));
    let nothing = ScheduleDestroy {
        recent_ms: 0,
        ..schedule(1, DecryptOnly)
    };
    assert!(matches!(
        world.refused(Op::ScheduleDestroy(nothing)),
        Refusal::Conflict(Conflict::UsedRecently { ago_ms: 0, .. })
    ));
}

#[test]
fn uses_of_other_versions_and_no_use_at_all_are_in_nobodys_way() {
    let mut world = World::in_state(DecryptOnly);
    let last_used = soon(&world);
    world.ok(counted(1, [(2, count(1, 0, last_used))]));
    world.ok(Op::ScheduleDestroy(schedule(1, DecryptOnly)));
    assert_eq!(world.version_state(1), DestroyScheduled);
}
