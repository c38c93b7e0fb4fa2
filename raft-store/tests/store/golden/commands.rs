//! Commands, entries and what Raft keeps beside them.

use std::collections::{BTreeMap, BTreeSet};

use openraft::EntryPayload;
use raft_store::command::*;
use raft_store::names::*;
use raft_store::state::access::{RevocationKey, Role};
use raft_store::state::context::{BindingMode, RotationPolicy, VersionState};
use raft_store::state::slot::{Grantee, TransportMode};
use raft_store::{Entry, LogId, SnapshotMeta, Vote};

use super::examples::*;
use super::{Lines, before, survives};
use crate::common::{log_id, vote};

fn ops() -> Vec<Op> {
    let revoked = |key: RevocationKey| (key, "lost".to_string());
    vec![
        Op::CreateCluster(CreateCluster {
            cluster_id: ClusterId([1; 16]),
            name: "c".into(),
            trk_id: [2; 8],
            founder: 1,
            founder_name: node(),
            incarnation: Incarnation([3; 16]),
            api_address: "a:1".into(),
            cluster_address: "c:2".into(),
            acl: before::acl(Role::Admin),
            revocations: vec![revoked(RevocationKey::CommonName("x".into()))],
        }),
        Op::RegisterNode(RegisterNode {
            token: 5,
            secret_hash: [6; 32],
            name: node(),
            incarnation: Incarnation([7; 16]),
            api_address: "a:1".into(),
            cluster_address: "c:2".into(),
        }),
        Op::AdmitNode(AdmitNode { node: 9 }),
        Op::RegisterSlotKey(RegisterSlotKey {
            node: 9,
            slot: slot(),
            key: slot_key(),
        }),
        Op::AddTransportKey(AddTransportKey {
            slot: slot(),
            id: TransportId([3; 16]),
            expected_generation: 0,
            mode: TransportMode::Standard,
            check: vec![8],
            grants: BTreeMap::from([(Grantee::Node(1), grant())]),
        }),
        Op::GrantTransportKey(GrantTransportKey {
            slot: slot(),
            id: TransportId([3; 16]),
            grantee: Grantee::Node(2),
            grant: grant(),
        }),
        Op::CreateContextV1(CreateContextV1 {
            name: context(),
            uid: ContextUid([4; 16]),
            slot: slot(),
            binding: BindingMode::Private,
            policy: before::policy(),
        }),
        Op::PrepareVersion(PrepareVersion {
            context: context(),
            expected_highest: 1,
            version: 2,
            key_uid: KeyUid([5; 16]),
            label: "kek-exchange-key-v2".into(),
            material: material(),
        }),
        Op::AckVersions(AckVersions {
            node: 1,
            versions: vec![(context(), 2, KeyUid([5; 16]))],
        }),
        Op::ActivateVersion(ActivateVersion {
            context: context(),
            version: 2,
            left_out: BTreeSet::from([3]),
        }),
        Op::AbandonVersion(AbandonVersion {
            context: context(),
            version: 2,
            reason: "late".into(),
        }),
        Op::CreateJoinToken(CreateJoinToken {
            secret_hash: [6; 32],
            expires_at: 7,
            node: Some(node()),
        }),
        Op::AddRevocations(AddRevocations {
            revocations: revocation_keys().map(|(_, key)| revoked(key)).to_vec(),
        }),
        Op::ReportNodeV1(ReportNodeV1 {
            node: 1,
            report: before::report(),
        }),
        Op::SetVersionUse(SetVersionUse {
            context: context(),
            version: 2,
            expected: VersionState::DecryptOnly,
            to: VersionState::Disabled,
        }),
        Op::ScheduleDestroy(ScheduleDestroy {
            context: context(),
            version: 2,
            expected: VersionState::Disabled,
            wait_ms: 5,
            min_wait_ms: 6,
            recent_ms: 7,
            override_recent_use: true,
            short_wait_allowed: true,
        }),
        Op::UndoDestroy(UndoDestroy {
            context: context(),
            version: 2,
        }),
        Op::AdvanceWaits(AdvanceWaits {
            elapsed_ms: 5,
            expected: vec![SeenWait {
                context: context(),
                version: 2,
                scheduled_by: 6,
                elapsed_ms: 7,
            }],
        }),
        Op::BeginDestroy(BeginDestroy {
            context: context(),
            version: 2,
        }),
        Op::AckDestroyed(AckDestroyed {
            node: 1,
            versions: vec![(context(), 2, KeyUid([5; 16]))],
        }),
        Op::ReportNode(ReportNode {
            node: 1,
            report: report(),
        }),
        Op::SetAcl(SetAcl {
            expected_digest: [8; 32],
            acl: acl(Role::Admin),
        }),
        Op::RemoveRevocations(RemoveRevocations {
            revocations: revocation_keys().map(|(_, key)| key).to_vec(),
        }),
        Op::RejectGrant(RejectGrant {
            node: 2,
            slot: slot(),
            id: TransportId([3; 16]),
            grant: grant(),
        }),
        Op::CreateContext(CreateContext {
            name: context(),
            uid: ContextUid([4; 16]),
            slot: slot(),
            binding: BindingMode::Private,
            policy: RotationPolicy::default(),
        }),
        Op::LeaseInvocations(LeaseInvocations {
            node: 1,
            boot: Boot([9; 16]),
            claims: vec![Claim {
                context: context(),
                version: 2,
                key_uid: KeyUid([5; 16]),
                held: true,
                seen: 6,
                count: 7,
            }],
        }),
        Op::AdoptVersion(AdoptVersion {
            context: context(),
            version: 1,
            key_uid: KeyUid([5; 16]),
            label: "kek-exchange-key-v1".into(),
            slot: slot(),
            check_record: vec![4, 5],
            holder: 1,
            floor: 9,
            created_at: Some(6),
        }),
        Op::MoveContext(MoveContext {
            context: context(),
            from: slot(),
            to: SlotName::new("2fa").unwrap(),
        }),
        Op::ReleaseVersion(ReleaseVersion {
            context: context(),
            version: 1,
            expected: VersionState::DecryptOnly,
        }),
        Op::RemoveNode(RemoveNode {
            node: 9,
            successor: Some(NodeName::new("hsm-node-4").unwrap()),
            lose_keys: true,
        }),
        Op::KeepNode(KeepNode { node: 9 }),
        Op::BuryNode(BuryNode { node: 9 }),
        Op::RecoverQuorum(RecoverQuorum {
            epoch: 2,
            survivor: 3,
            last_term: 4,
            last_index: 5,
            applied_index: 6,
        }),
        Op::RekeyTransport(RekeyTransport {
            slot: slot(),
            expected_generation: 2,
            give_up: Some(TransportId([3; 16])),
        }),
        Op::OfferTransportKey(OfferTransportKey {
            slot: slot(),
            id: TransportId([3; 16]),
            expected_generation: 2,
            mode: TransportMode::Standard,
            check: vec![8],
            grants: BTreeMap::from([(Grantee::Node(1), grant())]),
        }),
        Op::AckTransportKey(AckTransportKey {
            node: 2,
            slot: slot(),
            id: TransportId([3; 16]),
            gone: true,
        }),
        Op::ActivateTransportKey(ActivateTransportKey {
            slot: slot(),
            id: TransportId([3; 16]),
            left_out: BTreeSet::from([3]),
        }),
        Op::DestroyTransportKey(DestroyTransportKey {
            slot: slot(),
            id: TransportId([3; 16]),
        }),
        Op::ReportReplicationKeys(ReportReplicationKeys {
            node: 2,
            held: BTreeSet::from([[4; 8], [5; 8]]),
        }),
        Op::RekeyReplication(RekeyReplication {
            from: [4; 8],
            to: [5; 8],
        }),
        Op::ResealKeys(ResealKeys {
            keys: vec![ResealedKey {
                context: context(),
                version: 7,
                replaces: [6; 32],
                sealed_key: vec![1, 2],
            }],
            grants: vec![ResealedGrant {
                slot: slot(),
                id: TransportId([3; 16]),
                node: 2,
                replaces: [7; 32],
                blob: vec![9],
            }],
        }),
    ]
}

/// Of a client, through a member, with an approval.
fn of_client(op: Op) -> Command {
    let admin = AdminOrigin {
        fingerprint: [1; 32],
        cn: "ann".into(),
        ou: "Admin".into(),
        serial: "0b".into(),
        issuer: "CN=ca".into(),
        via_node: 2,
        evidence: None,
    };
    let approval = Approval {
        fingerprint: [3; 32],
        at: 4,
    };
    Command {
        id: RequestId::Client {
            principal: [2; 32],
            operation: "op".into(),
            key: "k".into(),
        },
        body_hash: [0; 32],
        origin: Origin::Admin(admin),
        approvals: vec![approval],
        at: 5,
        op,
    }
}

/// Of a node's own driver.
fn of_node(op: Op) -> Command {
    Command {
        id: RequestId::Node {
            node: 1,
            nonce: [7; 16],
        },
        origin: Origin::Node(1),
        approvals: vec![],
        ..of_client(op)
    }
}

pub(super) fn lines(lines: &mut Lines) {
    for op in ops() {
        let name = op.name();
        lines.value(&format!("command.{name}"), &of_client(op));
    }
    let admit = || of_node(Op::AdmitNode(AdmitNode { node: 9 }));
    lines.value("command.of_node", &admit());
    let mut evident = of_client(Op::AdmitNode(AdmitNode { node: 9 }));
    if let Origin::Admin(admin) = &mut evident.origin {
        admin.evidence = Some(vec![8]);
    }
    lines.value("command.with_evidence", &evident);
    let entry = |payload| Entry {
        log_id: log_id(2, 3),
        payload,
    };
    lines.value("entry.blank", &entry(EntryPayload::Blank));
    lines.value("entry.normal", &entry(EntryPayload::Normal(admit())));
    lines.value("entry.membership", &entry(EntryPayload::Membership(membership())));
    let committed = Vote {
        committed: true,
        ..vote(3)
    };
    lines.value("vote.open", &vote(3));
    lines.value("vote.committed", &committed);
    lines.value("purged", &log_id(2, 3));
    let meta = SnapshotMeta {
        last_log_id: Some(log_id(2, 3)),
        last_membership: stored_membership(),
        snapshot_id: "s".into(),
    };
    lines.value("snapshot.meta", &meta);
}

/// Whether an old line is read; `None` if it is none of these.
pub(super) fn reads(what: &str, bytes: &[u8]) -> Option<bool> {
    let (kind, _) = what.split_once('.').unwrap_or((what, ""));
    Some(match kind {
        "command" => survives::<Command>(bytes),
        "entry" => survives::<Entry>(bytes),
        "vote" => survives::<Vote>(bytes),
        "purged" => survives::<LogId>(bytes),
        "snapshot" => survives::<SnapshotMeta>(bytes),
        _ => return None,
    })
}

/// The position in the list is the number in the bytes: one that is missing here has no golden line.
#[test]
fn every_operation_has_its_golden_line() {
    for (number, op) in ops().into_iter().enumerate() {
        let bytes = raft_store::codec::encode(&op).unwrap();
        assert_eq!(bytes[..4], (number as u32).to_le_bytes(), "{}", op.name());
    }
    // One past the last is what no release has written.
    let next = (ops().len() as u32).to_le_bytes();
    let unknown = raft_store::codec::decode::<Op>(&next).unwrap_err();
    assert!(unknown.is_unknown_variant(), "{unknown}");
}
