//! Uses of key versions: counted by nodes, added up once. What they keep from being destroyed is in `recent_use.rs`.

use super::*;
use crate::codec::{self, MAX_COMMAND_BYTES};
use crate::command::report_node::drop_uses;
use crate::state::frozen::NodeReportV1;
use crate::state::node::{MAX_COUNT, MAX_USES};
use crate::state::usage::{NodeUse, UseCount, VersionUse};
use VersionState::{DecryptOnly, Destroyed, Destroying};

pub(super) fn count(encryptions: u64, decryptions: u64, last_used: UnixMillis) -> UseCount {
    UseCount {
        encryptions,
        decryptions,
        last_used,
    }
}

/// A report of node 1.
pub(super) fn counted(seq: u64, uses: impl IntoIterator<Item = (u32, UseCount)>) -> Op {
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

pub(super) fn usage(world: &World, version: u32) -> Option<VersionUse> {
    world.state.usage(&context(), version).cloned()
}

/// The time of the next command.
pub(super) fn now(world: &World) -> UnixMillis {
    world.index as i64 * 1000
}

/// Node 2 is a member too.
pub(super) fn two_members() -> World {
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
