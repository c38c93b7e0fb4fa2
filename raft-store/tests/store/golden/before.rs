//! Forms that have changed since, in `before.txt` as the builds of then wrote them: each row with its version. Lines are
//! only ever added there, by hand, from `golden.txt` as it was before the change; `UPDATE_GOLDEN` leaves them alone.

use std::collections::BTreeMap;

use raft_store::command::Command;
use raft_store::state::access::{Acl, Role};
use raft_store::state::context::{Context, KeyOrigin, KeyVersion, RotationPolicy};
use raft_store::state::frozen::{
    AclV1, ContextV1, KeyVersionV1, KeyVersionV2, KeyVersionV3, NodeReportV1, RotationPolicyV1, SlotV1,
    SlotV2,
};
use raft_store::state::lease::MAX_INVOCATIONS;
use raft_store::state::node::NodeReport;
use raft_store::state::slot::Slot;
use raft_store::state::table::{LoadError, Row, RowKind};

use super::{examples, rows, survives};

const LINES: &str = include_str!("before.txt");

fn lines() -> BTreeMap<&'static str, Vec<u8>> {
    let lines = LINES.lines().map(|line| line.split_once(' ').unwrap());
    lines
        .map(|(what, bytes)| (what, hex::decode(bytes).unwrap()))
        .collect()
}

/// The example of a report before it counted uses.
pub(super) fn report() -> NodeReportV1 {
    let now = examples::report();
    NodeReportV1 {
        seq: now.seq,
        incarnation: now.incarnation,
        boot: now.boot,
        clock: now.clock,
        durable_index: now.durable_index,
        proven_at: now.proven_at,
        feature_level: now.feature_level,
        slots: now.slots,
    }
}

/// The example of a policy before invocations had a limit.
pub(super) fn policy() -> RotationPolicyV1 {
    let now = RotationPolicy::default();
    RotationPolicyV1 {
        interval_days: now.interval_days,
        max_versions: now.max_versions,
        cleanup_after_days: now.cleanup_after_days,
    }
}

/// The example of access control before it said more than a unit's contexts.
pub(super) fn acl(role: Role) -> AclV1 {
    let now = examples::acl(role);
    AclV1 {
        mappings: now.mappings,
        roles: now.roles,
    }
}

#[test]
fn access_control_of_the_first_form_is_upgraded_as_it_is_read() {
    let lines = lines();
    for role in examples::ROLES {
        let bytes = &lines[&*format!("row.acl@1.{role:?}").to_lowercase()];
        assert!(
            survives::<AclV1>(bytes),
            "{role:?}: its frozen struct has changed"
        );
        let upgraded = Acl {
            operations: BTreeMap::new(),
            rules: Vec::new(),
            ..examples::acl(role)
        };
        assert_eq!(Acl::decode(1, bytes).unwrap(), upgraded, "{role:?}");
    }
}

#[test]
fn key_versions_of_the_first_form_are_upgraded_as_they_are_read() {
    let lines = lines();
    for (what, version) in rows::versions() {
        let bytes = &lines[&*format!("row.version@1.{what}")];
        assert!(
            survives::<KeyVersionV1>(bytes),
            "{what}: its frozen struct has changed"
        );
        let upgraded = without_record(version);
        assert_eq!(unplaced(1, bytes), upgraded, "{what}");
    }
}

#[test]
fn contexts_of_the_first_form_are_upgraded_as_they_are_read() {
    let lines = lines();
    for (what, context) in rows::contexts() {
        let bytes = &lines[&*format!("row.context@1.{what}")];
        assert!(
            survives::<ContextV1>(bytes),
            "{what}: its frozen struct has changed"
        );
        assert_eq!(Context::decode(1, bytes).unwrap(), context, "{what}");
        assert_eq!(context.policy.max_invocations, MAX_INVOCATIONS);
    }
}

#[test]
fn key_versions_of_the_second_form_are_upgraded_as_they_are_read() {
    let lines = lines();
    for (what, version) in rows::versions().into_iter().chain(rows::endings()) {
        let bytes = &lines[&*format!("row.version@2.{what}")];
        assert!(
            survives::<KeyVersionV2>(bytes),
            "{what}: its frozen struct has changed"
        );
        let upgraded = without_record(version);
        assert_eq!(unplaced(2, bytes), upgraded, "{what}");
    }
}

#[test]
fn key_versions_of_the_third_form_are_upgraded_as_they_are_read() {
    let lines = lines();
    for (what, version) in rows::versions().into_iter().chain(rows::endings()) {
        let bytes = &lines[&*format!("row.version@3.{what}")];
        assert!(
            survives::<KeyVersionV3>(bytes),
            "{what}: its frozen struct has changed"
        );
        assert_eq!(unplaced(3, bytes), version, "{what}");
    }
}

/// A version that does not say in which slot it is: of a context that was never moved.
fn unplaced(version: u8, bytes: &[u8]) -> KeyVersion {
    let alone = KeyVersion::decode(version, bytes).unwrap_err();
    assert!(matches!(alone, LoadError::Damaged(_)), "{alone}");
    KeyVersion::decode_unplaced(version, bytes, &examples::slot()).unwrap()
}

/// An adopted key as a build before had it, though none ever made one.
fn without_record(mut version: KeyVersion) -> KeyVersion {
    if let KeyOrigin::Adopted { check_record, .. } = &mut version.origin {
        check_record.clear();
    }
    version
}

#[test]
fn reports_of_the_first_form_are_upgraded_as_they_are_read() {
    let lines = lines();
    let bytes = &lines["row.report@1"];
    assert!(survives::<NodeReportV1>(bytes), "its frozen struct has changed");
    let upgraded = NodeReport {
        uses: BTreeMap::new(),
        ..examples::report()
    };
    assert_eq!(NodeReport::decode(1, bytes).unwrap(), upgraded);
}

#[test]
fn slots_of_the_first_form_are_upgraded_as_they_are_read() {
    let lines = lines();
    for (what, slot) in rows::slots() {
        let bytes = &lines[&*format!("row.slot@1.{what}")];
        assert!(survives::<SlotV1>(bytes), "{what}: its frozen struct has changed");
        assert_eq!(Slot::decode(1, bytes).unwrap(), slot, "{what}");
    }
}

#[test]
fn slots_of_the_second_form_are_upgraded_as_they_are_read() {
    let lines = lines();
    for (what, slot) in rows::slots()
        .into_iter()
        .chain([("rejecting", rows::rejecting())])
    {
        let bytes = &lines[&*format!("row.slot@2.{what}")];
        assert!(survives::<SlotV2>(bytes), "{what}: its frozen struct has changed");
        assert_eq!(Slot::decode(2, bytes).unwrap(), slot, "{what}");
    }
}

/// The log has no form of its own for them: such an operation keeps its place among the others.
#[test]
fn operations_in_an_old_log_are_what_they_were() {
    for what in ["command.report_node_v1", "command.create_context_v1"] {
        assert!(survives::<Command>(&lines()[what]), "{what}");
    }
}

#[test]
fn every_line_of_a_form_before_is_read_by_a_test() {
    let versions = 3 * rows::versions().len() + 2 * rows::endings().len();
    let slots = 2 * rows::slots().len() + 1;
    let rows = versions + slots + rows::contexts().len() + examples::ROLES.len();
    assert_eq!(lines().len(), LINES.lines().count());
    // A report, and two operations.
    assert_eq!(lines().len(), rows + 3);
    let changed = [
        RowKind::Version,
        RowKind::Report,
        RowKind::Acl,
        RowKind::Slot,
        RowKind::Context,
    ];
    assert_eq!(changed.map(RowKind::version), [4, 2, 2, 3, 2]);
}
