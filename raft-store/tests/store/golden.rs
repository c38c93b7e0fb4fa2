//! Golden bytes of every stored type. A change here is a `DataChange`: the old form must stay readable.
//! `UPDATE_GOLDEN=1` writes the file anew.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use openraft::{EntryPayload, Membership};
use raft_store::codec::encode;
use raft_store::command::*;
use raft_store::names::*;
use raft_store::state::ClusterMeta;
use raft_store::state::access::*;
use raft_store::state::context::*;
use raft_store::state::node::*;
use raft_store::state::requests::Request;
use raft_store::state::slot::*;
use raft_store::{Entry, MemberNode, SnapshotMeta, StoredMembership};

use crate::common::log_id;

fn name<T>(make: fn(&str) -> Result<T, InvalidName>, text: &str) -> T {
    make(text).unwrap()
}

fn material() -> KeyMaterial {
    KeyMaterial {
        transport_id: TransportId([3; 16]),
        sealed_key: vec![1, 2, 3],
        check_record: vec![4, 5],
    }
}

fn report() -> NodeReport {
    let slot = SlotReport {
        serving: true,
        state: "ready".into(),
        missing_keys: 0,
    };
    NodeReport {
        seq: 4,
        incarnation: Incarnation([5; 16]),
        boot: Boot([9; 16]),
        clock: 6,
        durable_index: 7,
        proven_at: Some(8),
        feature_level: 1,
        slots: BTreeMap::from([(name(SlotName::new, "exchange"), slot)]),
    }
}

fn acl() -> Acl {
    let entry = RoleEntry {
        role: Role::Admin,
        issuer: "CN=ca".into(),
        ou: Some("Admin".into()),
        cn: None,
        spki_sha256: Some([9; 32]),
    };
    let contexts = BTreeSet::from([name(ContextName::new, "exchange-key")]);
    Acl {
        mappings: BTreeMap::from([("Trading".into(), contexts)]),
        roles: vec![entry],
    }
}

fn slot_key() -> SlotKey {
    SlotKey {
        spki: vec![1],
        signature: vec![2],
        signer_chain: vec![vec![3]],
    }
}

fn ops() -> Vec<Op> {
    let context = || name(ContextName::new, "exchange-key");
    let slot = || name(SlotName::new, "exchange");
    let node = || name(NodeName::new, "hsm-node-1");
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
            acl: acl(),
            revocations: vec![(RevocationKey::CommonName("x".into()), "lost".into())],
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
            grants: BTreeMap::from([(Grantee::Node(1), vec![9])]),
        }),
        Op::GrantTransportKey(GrantTransportKey {
            slot: slot(),
            id: TransportId([3; 16]),
            grantee: Grantee::Node(2),
            blob: vec![9],
        }),
        Op::CreateContext(CreateContext {
            name: context(),
            uid: ContextUid([4; 16]),
            slot: slot(),
            binding: BindingMode::Private,
            policy: RotationPolicy::default(),
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
            revocations: vec![
                (
                    RevocationKey::Serial {
                        issuer: "CN=ca".into(),
                        serial: "0a".into(),
                    },
                    String::new(),
                ),
                (RevocationKey::Fingerprint([1; 32]), String::new()),
            ],
        }),
        Op::ReportNode(ReportNode {
            node: 1,
            report: report(),
        }),
    ]
}

fn all() -> String {
    let mut out = String::new();
    let mut line = |what: &str, bytes: Vec<u8>| writeln!(out, "{what} {}", hex(&bytes)).unwrap();
    let admin = AdminOrigin {
        fingerprint: [1; 32],
        cn: "ann".into(),
        ou: "Admin".into(),
        serial: "0b".into(),
        issuer: "CN=ca".into(),
        via_node: 2,
        evidence: None,
    };
    for op in ops() {
        let id = RequestId::Client {
            principal: [2; 32],
            operation: "op".into(),
            key: "k".into(),
        };
        let origin = Origin::Admin(admin.clone());
        let approvals = vec![Approval {
            fingerprint: [3; 32],
            at: 4,
        }];
        let what = format!("command.{}", op.name());
        line(
            &what,
            encode(&Command {
                id,
                body_hash: [0; 32],
                origin,
                approvals,
                at: 5,
                op,
            })
            .unwrap(),
        );
    }
    let members = BTreeMap::from([(
        1,
        MemberNode {
            name: "n".into(),
            cluster_address: "c".into(),
        },
    )]);
    let membership = Membership::new(vec![BTreeSet::from([1])], members);
    let entry = |payload| Entry {
        log_id: log_id(2, 3),
        payload,
    };
    line("entry.blank", encode(&entry(EntryPayload::Blank)).unwrap());
    line(
        "entry.membership",
        encode(&entry(EntryPayload::Membership(membership.clone()))).unwrap(),
    );
    let stored = StoredMembership::new(Some(log_id(2, 3)), membership);
    let meta = SnapshotMeta {
        last_log_id: Some(log_id(2, 3)),
        last_membership: stored,
        snapshot_id: "s".into(),
    };
    line("snapshot.meta", encode(&meta).unwrap());
    let outcomes = [
        Outcome::Nothing,
        Outcome::Done(Done::Ok),
        Outcome::Done(Done::Registered { raft_id: 3 }),
        Outcome::Done(Done::Version {
            context: name(ContextName::new, "c"),
            version: 2,
        }),
        Outcome::Done(Done::JoinToken { number: 4 }),
        Outcome::Refused(Refusal::Conflict("c".into())),
        Outcome::Refused(Refusal::Exists("e".into())),
        Outcome::Refused(Refusal::NotFound("n".into())),
        Outcome::Refused(Refusal::Forbidden("f".into())),
        Outcome::Refused(Refusal::Invalid("i".into())),
        Outcome::Refused(Refusal::KeyReused),
        Outcome::Refused(Refusal::KeyExpired),
    ];
    for (number, outcome) in outcomes.into_iter().enumerate() {
        let id = RequestId::Node {
            node: 1,
            nonce: [7; 16],
        };
        line(
            &format!("row.request.{number}"),
            encode(&Request {
                id,
                body_hash: [1; 32],
                outcome: Some(outcome),
            })
            .unwrap(),
        );
    }
    let meta = ClusterMeta {
        cluster_id: ClusterId([1; 16]),
        name: "c".into(),
        epoch: 2,
        feature_level: 1,
        trk_id: [3; 8],
        created_at: 4,
    };
    line("row.meta", encode(&meta).unwrap());
    let context = Context {
        uid: ContextUid([1; 16]),
        slot: name(SlotName::new, "s"),
        binding: BindingMode::None,
        policy: RotationPolicy::default(),
        highest_version: 3,
        active_version: Some(2),
        created_at: 4,
    };
    line("row.context", encode(&context).unwrap());
    use VersionState::*;
    for state in [
        Pending,
        Active,
        DecryptOnly,
        Disabled,
        DestroyScheduled,
        Destroying,
        Destroyed,
        Abandoned,
    ] {
        let origin = match state {
            Disabled => KeyOrigin::Adopted {
                holders: BTreeSet::from([1]),
            },
            _ => KeyOrigin::Generated,
        };
        let version = KeyVersion {
            key_uid: KeyUid([5; 16]),
            label: "kek-c-v1".into(),
            state,
            origin,
            material: Some(material()),
            acks: BTreeSet::from([1, 2]),
            created_at: 1,
            activated_at: Some(2),
            ended_at: None,
            note: String::new(),
        };
        line(
            &format!("row.version.{}", state.as_str()),
            encode(&version).unwrap(),
        );
    }
    for (number, state) in [
        TransportState::Current,
        TransportState::Superseded,
        TransportState::Destroyed,
    ]
    .into_iter()
    .enumerate()
    {
        let grants = BTreeMap::from([
            (Grantee::Node(1), vec![1]),
            (Grantee::Recovery("r".into()), vec![2]),
            (Grantee::Backup("b".into()), vec![3]),
        ]);
        let generation = TransportGeneration {
            id: TransportId([3; 16]),
            generation: 1,
            mode: if number == 1 {
                TransportMode::Hardened
            } else {
                TransportMode::Standard
            },
            check: vec![8],
            state,
            grants,
            created_at: 4,
        };
        line(
            &format!("row.slot.{number}"),
            encode(&Slot {
                transport: vec![generation],
            })
            .unwrap(),
        );
    }
    for (number, status) in [
        NodeStatus::Joining,
        NodeStatus::Member,
        NodeStatus::Removed { at: 9 },
    ]
    .into_iter()
    .enumerate()
    {
        let node = Node {
            name: name(NodeName::new, "n"),
            incarnation: Incarnation([5; 16]),
            api_address: "a".into(),
            cluster_address: "c".into(),
            status,
            slot_keys: BTreeMap::from([(name(SlotName::new, "s"), slot_key())]),
            registered_at: 4,
        };
        line(&format!("row.node.{number}"), encode(&node).unwrap());
    }
    line("row.report", encode(&report()).unwrap());
    line("row.acl", encode(&acl()).unwrap());
    line(
        "row.revocation",
        encode(&Revocation {
            reason: "r".into(),
            revoked_at: 4,
        })
        .unwrap(),
    );
    let token = JoinToken {
        secret_hash: [6; 32],
        expires_at: 7,
        node: Some(name(NodeName::new, "n")),
        used_by: Some(3),
    };
    line("row.join_token", encode(&token).unwrap());
    out
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[test]
fn every_stored_type_has_the_bytes_it_always_had() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/store/golden.txt");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(path, all()).unwrap();
    }
    let golden = std::fs::read_to_string(path).unwrap();
    for (now, then) in all().lines().zip(golden.lines()) {
        assert_eq!(now, then, "stored bytes changed: this is a DataChange");
    }
    assert_eq!(all().lines().count(), golden.lines().count());
}
