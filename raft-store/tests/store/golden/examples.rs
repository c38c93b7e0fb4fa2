//! The values whose bytes are golden.

use std::collections::{BTreeMap, BTreeSet};

use openraft::Membership;
use raft_store::names::*;
use raft_store::state::access::*;
use raft_store::state::context::*;
use raft_store::state::node::*;
use raft_store::state::slot::*;
use raft_store::state::usage::UseCount;
use raft_store::{MemberNode, StoredMembership};

use crate::common::log_id;

pub(super) const ROLES: [Role; 6] = [
    Role::Admin,
    Role::Operator,
    Role::Auditor,
    Role::Officer,
    Role::Backup,
    Role::Metrics,
];

const OPERATIONS: [Operation; 4] = [
    Operation::Encrypt,
    Operation::Decrypt,
    Operation::Rewrap,
    Operation::DataKey,
];

pub(super) fn context() -> ContextName {
    ContextName::new("exchange-key").unwrap()
}

pub(super) fn slot() -> SlotName {
    SlotName::new("exchange").unwrap()
}

pub(super) fn node() -> NodeName {
    NodeName::new("hsm-node-1").unwrap()
}

pub(super) fn material() -> KeyMaterial {
    KeyMaterial {
        transport_id: TransportId([3; 16]),
        sealed_key: vec![1, 2, 3],
        check_record: vec![4, 5],
    }
}

pub(super) fn report() -> NodeReport {
    let slot_report = SlotReport {
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
        slots: BTreeMap::from([(slot(), slot_report)]),
        uses: BTreeMap::from([(version_key(), use_count())]),
    }
}

pub(super) fn version_key() -> VersionKey {
    VersionKey {
        context: context(),
        version: 7,
    }
}

pub(super) fn use_count() -> UseCount {
    UseCount {
        encryptions: 10,
        decryptions: 11,
        last_used: 12,
    }
}

pub(super) fn acl(role: Role) -> Acl {
    let entry = RoleEntry {
        role,
        issuer: "CN=ca".into(),
        ou: Some("Admin".into()),
        cn: None,
        spki_sha256: Some([9; 32]),
    };
    let rule = AclRule {
        who: Who {
            issuer: Some("CN=ca".into()),
            ou: None,
            cn: Some("batch".into()),
        },
        contexts: BTreeSet::from([context()]),
        operations: BTreeSet::from(OPERATIONS),
    };
    Acl {
        mappings: BTreeMap::from([("Trading".into(), BTreeSet::from([context()]))]),
        roles: vec![entry],
        operations: BTreeMap::from([("Trading".into(), BTreeSet::from([Operation::Decrypt]))]),
        rules: vec![rule],
    }
}

pub(super) fn slot_key() -> SlotKey {
    SlotKey {
        spki: vec![1],
        epoch: 4,
        signature: vec![2],
        signer_chain: vec![vec![3]],
    }
}

pub(super) fn grant() -> Grant {
    Grant {
        epoch: 4,
        blob: vec![9],
    }
}

/// Every kind of grantee.
pub(super) fn grants() -> BTreeMap<Grantee, Grant> {
    BTreeMap::from([
        (Grantee::Node(1), grant()),
        (Grantee::Recovery("r".into()), grant()),
        (Grantee::Backup("b".into()), grant()),
    ])
}

/// Every kind of revocation.
pub(super) fn revocation_keys() -> [(&'static str, RevocationKey); 3] {
    let serial = RevocationKey::Serial {
        issuer: "CN=ca".into(),
        serial: "0a".into(),
    };
    [
        ("serial", serial),
        ("fingerprint", RevocationKey::Fingerprint([1; 32])),
        ("common_name", RevocationKey::CommonName("x".into())),
    ]
}

pub(super) fn membership() -> Membership<RaftId, MemberNode> {
    let member = MemberNode {
        name: "n".into(),
        cluster_address: "c".into(),
    };
    Membership::new(vec![BTreeSet::from([1])], BTreeMap::from([(1, member)]))
}

pub(super) fn stored_membership() -> StoredMembership {
    StoredMembership::new(Some(log_id(2, 3)), membership())
}
