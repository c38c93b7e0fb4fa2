//! The other rows of the state, in every state that one can be in, and the keys they lie under.

use std::collections::BTreeSet;

use raft_store::names::*;
use raft_store::state::ClusterMeta;
use raft_store::state::access::*;
use raft_store::state::context::*;
use raft_store::state::lease::*;
use raft_store::state::node::*;
use raft_store::state::recovery::*;
use raft_store::state::replication::*;
use raft_store::state::slot::*;
use raft_store::state::table::{Row, RowKey};
use raft_store::state::usage::*;

use super::examples::*;
use super::{Lines, survives};

fn meta() -> ClusterMeta {
    ClusterMeta {
        cluster_id: ClusterId([1; 16]),
        name: "c".into(),
        epoch: 2,
        feature_level: 1,
        trk_id: [3; 8],
        created_at: 4,
    }
}

/// Contexts of every binding, under their names.
pub(super) fn contexts() -> [(&'static str, Context); 3] {
    [
        ("none", context_row(BindingMode::None, None)),
        ("shared", context_row(BindingMode::Shared, Some(2))),
        ("private", context_row(BindingMode::Private, Some(2))),
    ]
}

fn context_row(binding: BindingMode, active_version: Option<u32>) -> Context {
    Context {
        uid: ContextUid([1; 16]),
        slot: slot(),
        binding,
        policy: RotationPolicy::default(),
        highest_version: 3,
        active_version,
        created_at: 4,
    }
}

fn version_row(state: VersionState) -> KeyVersion {
    KeyVersion {
        key_uid: KeyUid([5; 16]),
        label: "kek-c-v1".into(),
        slot: slot(),
        state,
        origin: KeyOrigin::Generated,
        material: Some(material()),
        acks: BTreeSet::from([1, 2]),
        created_at: 1,
        activated_at: Some(2),
        ended_at: None,
        note: String::new(),
        destruction: None,
    }
}

/// Versions in every state, and what else one can be, under their names. The first form of the row has no more.
pub(super) fn versions() -> Vec<(&'static str, KeyVersion)> {
    use VersionState::*;
    let states = [
        Pending,
        Active,
        DecryptOnly,
        Disabled,
        DestroyScheduled,
        Destroying,
        Destroyed,
        Abandoned,
    ];
    let adopted = KeyVersion {
        origin: KeyOrigin::Adopted {
            holders: BTreeSet::from([1]),
            check_record: vec![4, 5],
        },
        material: None,
        ended_at: Some(3),
        note: "late".into(),
        ..version_row(DecryptOnly)
    };
    let named = states.map(|state| (state.as_str(), version_row(state)));
    named.into_iter().chain([("adopted", adopted)]).collect()
}

/// A version on its way to the end.
fn ending(state: VersionState, begun_at: Option<UnixMillis>, ended_at: Option<UnixMillis>) -> KeyVersion {
    let destruction = Destruction {
        scheduled_by: 5,
        scheduled_at: 6,
        from: VersionState::Disabled,
        wait_ms: 7,
        elapsed_ms: 8,
        begun_at,
        sealed_under: begun_at.map(|_| TransportId([3; 16])),
        held_by: begun_at.iter().flat_map(|_| [1, 2]).collect(),
        ended_at,
    };
    KeyVersion {
        destruction: Some(destruction),
        ..version_row(state)
    }
}

/// Every step of it, under its name.
pub(super) fn endings() -> [(&'static str, KeyVersion); 3] {
    [
        ("waiting", ending(VersionState::DestroyScheduled, None, None)),
        ("begun", ending(VersionState::Destroying, Some(9), None)),
        ("ended", ending(VersionState::Destroyed, Some(9), Some(10))),
    ]
}

fn use_row() -> VersionUse {
    VersionUse {
        encryptions: 1,
        decryptions: 2,
        last_used: 3,
        nodes: [(
            4,
            NodeUse {
                seq: 5,
                count: use_count(),
            },
        )]
        .into(),
        last_by_removed: Some(6),
    }
}

/// Slots in every state. The first form of the row knows nothing of rejected grants.
pub(super) fn slots() -> [(&'static str, Slot); 3] {
    [
        ("current", TransportMode::Standard, TransportState::Current),
        ("superseded", TransportMode::Hardened, TransportState::Superseded),
        ("destroyed", TransportMode::Standard, TransportState::Destroyed),
    ]
    .map(|(what, mode, state)| (what, slot_row(mode, state)))
}

/// One in which a node could not open its first grant, nor the next one, and was granted a third.
pub(super) fn rejecting() -> Slot {
    let rejected = Rejected {
        granters: BTreeSet::from([1]),
        latest: Some(3),
    };
    let mut slot = slot_row(TransportMode::Standard, TransportState::Current);
    for generation in &mut slot.transport {
        generation.rejected.insert(2, rejected.clone());
    }
    slot
}

/// Slots that were rekeyed: the new key on its way, and the old one too. The forms of the row before know of neither.
fn rekeyed() -> [(&'static str, Slot); 2] {
    [
        ("offered", TransportState::Offered, None),
        ("destroying", TransportState::Destroying, Some(11)),
    ]
    .map(|(what, state, ended_at)| {
        let mut slot = slot_row(TransportMode::Standard, state);
        for generation in &mut slot.transport {
            generation.acks = BTreeSet::from([1, 2]);
            generation.ended_at = ended_at;
        }
        slot.rekey = Some(SlotRekey {
            after: 1,
            requested_at: 9,
        });
        (what, slot)
    })
}

fn replication_row(former: Option<FormerKey>) -> Replication {
    Replication {
        held: [(2, BTreeSet::from([[3; 8], [4; 8]]))].into(),
        former,
        retired: vec![[5; 8]],
        since: Some(6),
    }
}

fn lease_row() -> VersionLease {
    VersionLease {
        leased: 1,
        short: true,
        nodes: [(
            2,
            NodeLease {
                boot: Boot([9; 16]),
                given: 3,
            },
        )]
        .into(),
    }
}

fn slot_row(mode: TransportMode, state: TransportState) -> Slot {
    let generation = TransportGeneration {
        id: TransportId([3; 16]),
        generation: 1,
        mode,
        check: vec![8],
        state,
        grants: grants(),
        created_at: 4,
        rejected: [].into(),
        acks: [].into(),
        ended_at: None,
    };
    Slot {
        transport: vec![generation],
        rekey: None,
    }
}

fn node_row(status: NodeStatus) -> Node {
    Node {
        name: node(),
        incarnation: Incarnation([5; 16]),
        api_address: "a".into(),
        cluster_address: "c".into(),
        status,
        slot_keys: [(slot(), slot_key())].into(),
        registered_at: 4,
    }
}

fn token(node: Option<NodeName>, used_by: Option<RaftId>) -> JoinToken {
    JoinToken {
        secret_hash: [6; 32],
        expires_at: 7,
        node,
        used_by,
    }
}

pub(super) fn lines(lines: &mut Lines) {
    lines.value("row.meta", &meta());
    for (what, context) in contexts() {
        lines.value(&format!("row.context.{what}"), &context);
    }
    for (what, version) in versions() {
        lines.value(&format!("row.version.{what}"), &version);
    }
    for (what, version) in endings() {
        lines.value(&format!("row.version.{what}"), &version);
    }
    for (what, slot) in slots().into_iter().chain([("rejecting", rejecting())]) {
        lines.value(&format!("row.slot.{what}"), &slot);
    }
    for (what, status) in [
        ("joining", NodeStatus::Joining),
        ("member", NodeStatus::Member),
        ("removed", NodeStatus::Removed { at: 9 }),
        (
            "leaving",
            NodeStatus::Leaving {
                at: 9,
                successor: Some(NodeName::new("hsm-node-4").unwrap()),
            },
        ),
    ] {
        lines.value(&format!("row.node.{what}"), &node_row(status));
    }
    lines.value("row.report", &report());
    for role in ROLES {
        let what = format!("row.acl.{role:?}").to_lowercase();
        lines.value(&what, &acl(role));
    }
    let revocation = Revocation {
        reason: "r".into(),
        revoked_at: 4,
    };
    lines.value("row.revocation", &revocation);
    lines.value("row.join_token.open", &token(None, None));
    lines.value("row.join_token.used", &token(Some(node()), Some(3)));
    lines.value("row.use", &use_row());
    lines.value("row.uncounted", &Uncounted { until: 4 });
    lines.value("row.lease", &lease_row());
    let recovery = Recovery {
        at: 1,
        survivor: 2,
        last_term: 3,
        last_index: 4,
        applied_index: 5,
        left_out: vec![6, 7],
    };
    lines.value("row.recovery", &recovery);
    for (what, slot) in rekeyed() {
        lines.value(&format!("row.slot.{what}"), &slot);
    }
    let former = FormerKey {
        id: [4; 8],
        since: 12,
    };
    lines.value("row.replication.settled", &replication_row(None));
    lines.value("row.replication.open", &replication_row(Some(former)));
    keys(lines);
}

fn keys(lines: &mut Lines) {
    lines.bytes("key.one", &RowKey::encode(&()));
    lines.bytes("key.index", &RowKey::encode(&258u64));
    lines.bytes("key.context", &context().encode());
    lines.bytes("key.slot", &slot().encode());
    lines.bytes("key.version", &version_key().encode());
    for (what, key) in revocation_keys() {
        lines.bytes(&format!("key.revocation.{what}"), &key.encode());
    }
}

/// A key that its bytes give back.
fn key<K: RowKey>(bytes: &[u8]) -> bool {
    K::decode(bytes).is_some_and(|key| key.encode() == bytes)
}

/// As the store reads it: through the row's own upgrade, from the version it was written in.
fn row<R: Row>(bytes: &[u8]) -> bool {
    R::decode(R::VERSION, bytes).is_ok() && survives::<R>(bytes)
}

/// Whether an old line is read; `None` if it is none of these.
pub(super) fn reads(what: &str, bytes: &[u8]) -> Option<bool> {
    let (kind, what) = what.split_once('.')?;
    let (what, _) = what.split_once('.').unwrap_or((what, ""));
    Some(match (kind, what) {
        ("row", "meta") => row::<ClusterMeta>(bytes),
        ("row", "context") => row::<Context>(bytes),
        ("row", "version") => row::<KeyVersion>(bytes),
        ("row", "slot") => row::<Slot>(bytes),
        ("row", "node") => row::<Node>(bytes),
        ("row", "report") => row::<NodeReport>(bytes),
        ("row", "acl") => row::<Acl>(bytes),
        ("row", "revocation") => row::<Revocation>(bytes),
        ("row", "join_token") => row::<JoinToken>(bytes),
        ("row", "use") => row::<VersionUse>(bytes),
        ("row", "uncounted") => row::<Uncounted>(bytes),
        ("row", "lease") => row::<VersionLease>(bytes),
        ("row", "recovery") => row::<Recovery>(bytes),
        ("row", "replication") => row::<Replication>(bytes),
        ("key", "one") => key::<()>(bytes),
        ("key", "index") => key::<u64>(bytes),
        ("key", "context") => key::<ContextName>(bytes),
        ("key", "slot") => key::<SlotName>(bytes),
        ("key", "version") => key::<VersionKey>(bytes),
        ("key", "revocation") => key::<RevocationKey>(bytes),
        _ => return None,
    })
}
