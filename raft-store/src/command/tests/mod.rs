//! What each command does to the state, and above all what it refuses.

#![allow(clippy::unwrap_used)]

mod access;
mod adopt;
mod destroy;
mod disuse;
mod leases;
mod leaving;
mod life;
mod limits;
mod moves;
mod nodes;
mod recent_use;
mod recovery;
mod rekey;
mod removal;
mod requests;
mod sequences;
mod slots;
mod uses;
mod versions;

use std::collections::BTreeMap;

use super::*;
use crate::names::*;
use crate::state::FEATURE_LEVEL;
use crate::state::context::{BindingMode, KeyMaterial, KeyVersion, RotationPolicy, VersionKey, VersionState};
use crate::state::frozen::AclV1;
use crate::state::node::{Node, NodeReport, NodeStatus, SlotKey};
use crate::state::slot::{Grant, Grantee, TransportMode};
use crate::state::table::RowKind;

struct World {
    state: ClusterState,
    index: u64,
    leader: RaftId,
    voters: BTreeSet<RaftId>,
}

impl World {
    /// No cluster yet.
    fn empty() -> Self {
        Self {
            state: ClusterState::default(),
            index: 1,
            leader: 1,
            voters: BTreeSet::from([1]),
        }
    }

    /// A cluster of node 1 with slot `s`, its transport key and context `c`.
    fn new() -> Self {
        let mut world = Self::empty();
        world.ok(Op::CreateCluster(cluster()));
        world.ok(transport(1, 0));
        world.ok(Op::CreateContext(CreateContext {
            name: context(),
            uid: ContextUid([1; 16]),
            slot: slot(),
            binding: BindingMode::Shared,
            policy: RotationPolicy::default(),
        }));
        world
    }

    fn ok_as(&mut self, node: RaftId, op: Op) -> Done {
        match self.run_as(node, op) {
            Outcome::Done(done) => done,
            other => panic!("{other:?}"),
        }
    }

    fn command(&self, op: Op, origin: Origin) -> Command {
        let id = RequestId::Node {
            node: 1,
            nonce: u128::from(self.index).to_be_bytes(),
        };
        Command {
            id,
            body_hash: [0; 32],
            origin,
            approvals: vec![],
            at: self.index as i64 * 1000,
            op,
        }
    }

    fn send(&mut self, command: &Command) -> Outcome {
        self.index += 1;
        let cx = ApplyContext {
            index: self.index,
            at: command.at,
            origin: &command.origin,
            leader: self.leader,
            voters: &self.voters,
        };
        apply(&mut self.state, command, &cx)
    }

    fn run(&mut self, op: Op) -> Outcome {
        self.run_as(1, op)
    }

    fn run_as(&mut self, node: RaftId, op: Op) -> Outcome {
        let origin = origin(node, &op);
        let command = self.command(op, origin);
        self.send(&command)
    }

    fn ok(&mut self, op: Op) -> Done {
        self.ok_as(1, op)
    }

    fn refused(&mut self, op: Op) -> Refusal {
        self.refused_as(1, op)
    }

    fn refused_as(&mut self, node: RaftId, op: Op) -> Refusal {
        match self.run_as(node, op) {
            Outcome::Refused(refusal) => refusal,
            other => panic!("{other:?}"),
        }
    }

    fn ack(&mut self, node: RaftId, version: u32) {
        let ack = AckVersions {
            node,
            versions: vec![(context(), version, uid(version))],
        };
        let command = self.command(Op::AckVersions(ack), Origin::Node(node));
        assert!(matches!(self.send(&command), Outcome::Done(_)));
    }

    fn version(&self, version: u32) -> &KeyVersion {
        self.state.version(&context(), version).unwrap()
    }

    fn version_state(&self, version: u32) -> VersionState {
        self.version(version).state
    }

    /// The wait of a version, as a leader sees it that looks now.
    fn seen(&self, version: u32) -> SeenWait {
        let destruction = self.version(version).destruction.as_ref().unwrap();
        SeenWait {
            context: context(),
            version,
            scheduled_by: destruction.scheduled_by,
            elapsed_ms: destruction.elapsed_ms,
        }
    }

    fn token(&mut self) -> u64 {
        let token = CreateJoinToken {
            secret_hash: [5; 32],
            expires_at: i64::MAX,
            node: None,
        };
        match self.ok(Op::CreateJoinToken(token)) {
            Done::JoinToken { number } => number,
            other => panic!("{other:?}"),
        }
    }

    fn join(&mut self, name: &str, filling: u8) -> RaftId {
        let number = self.token();
        match self.ok(register(number, name, filling)) {
            Done::Registered { raft_id } => raft_id,
            other => panic!("{other:?}"),
        }
    }

    /// A joiner names its key for a slot.
    fn slot_key(&mut self, node: RaftId, slot: SlotName) {
        let key = SlotKey {
            spki: vec![9],
            epoch: 1,
            signature: vec![1],
            signer_chain: vec![],
        };
        self.ok_as(node, Op::RegisterSlotKey(RegisterSlotKey { node, slot, key }));
    }

    /// Takes a node out, without what goes with it.
    fn remove(&mut self, id: RaftId) {
        let node = self.state.nodes.get(&id).unwrap();
        let removed = Node {
            status: NodeStatus::Removed { at: 0 },
            ..Node::clone(node)
        };
        self.state.nodes.put(id, removed).unwrap();
    }

    /// Every stored row but the remembered requests.
    fn rows(&self) -> Vec<(RowKind, Vec<u8>, Vec<u8>)> {
        let rows = self.state.dump().unwrap().into_iter();
        rows.filter(|row| row.kind != RowKind::Request)
            .map(|row| (row.kind, row.key, row.value.unwrap()))
            .collect()
    }
}

fn admin() -> Origin {
    Origin::Admin(AdminOrigin {
        fingerprint: [1; 32],
        cn: "ann".into(),
        ou: "Admin".into(),
        serial: "0b".into(),
        issuer: "CN=ca".into(),
        via_node: 1,
        evidence: None,
    })
}

/// The node itself, or an administrator for what only one of them may do.
fn origin(node: RaftId, op: &Op) -> Origin {
    match op {
        Op::SetVersionUse(_)
        | Op::ScheduleDestroy(_)
        | Op::UndoDestroy(_)
        | Op::SetAcl(_)
        | Op::RemoveRevocations(_)
        | Op::MoveContext(_)
        | Op::ReleaseVersion(_)
        | Op::RemoveNode(_)
        | Op::KeepNode(_)
        | Op::RekeyTransport(_)
        | Op::RekeyReplication(_) => admin(),
        _ => Origin::Node(node),
    }
}

fn cluster() -> CreateCluster {
    CreateCluster {
        cluster_id: ClusterId([1; 16]),
        name: "test".into(),
        trk_id: [2; 8],
        founder: 1,
        founder_name: NodeName::new("n1").unwrap(),
        incarnation: Incarnation([1; 16]),
        api_address: "a".into(),
        cluster_address: "c".into(),
        acl: AclV1::default(),
        revocations: vec![],
    }
}

fn context() -> ContextName {
    ContextName::new("c").unwrap()
}

fn key(version: u32) -> VersionKey {
    VersionKey {
        context: context(),
        version,
    }
}

fn slot() -> SlotName {
    SlotName::new("s").unwrap()
}

fn uid(version: u32) -> KeyUid {
    KeyUid(u128::from(version).to_be_bytes())
}

fn transport(id: u8, expected_generation: u32) -> Op {
    Op::AddTransportKey(AddTransportKey {
        slot: slot(),
        id: TransportId([id; 16]),
        expected_generation,
        mode: TransportMode::Standard,
        check: vec![1],
        grants: BTreeMap::new(),
    })
}

fn prepare(expected_highest: u32, version: u32) -> Op {
    Op::PrepareVersion(PrepareVersion {
        context: context(),
        expected_highest,
        version,
        key_uid: uid(version),
        label: format!("kek-c-v{version}"),
        material: KeyMaterial {
            transport_id: TransportId([1; 16]),
            sealed_key: vec![1],
            check_record: vec![2],
        },
    })
}

fn activate(version: u32, left_out: &[RaftId]) -> Op {
    Op::ActivateVersion(ActivateVersion {
        context: context(),
        version,
        left_out: left_out.iter().copied().collect(),
    })
}

fn abandon(version: u32) -> Op {
    Op::AbandonVersion(AbandonVersion {
        context: context(),
        version,
        reason: "late".into(),
    })
}

fn set_use(version: u32, expected: VersionState, to: VersionState) -> Op {
    Op::SetVersionUse(SetVersionUse {
        context: context(),
        version,
        expected,
        to,
    })
}

/// With the shortest wait there is, whoever used it; recent is what happened within ten seconds.
fn schedule(version: u32, expected: VersionState) -> ScheduleDestroy {
    ScheduleDestroy {
        context: context(),
        version,
        expected,
        wait_ms: LEAST_WAIT_MS,
        min_wait_ms: LEAST_WAIT_MS,
        recent_ms: 10_000,
        override_recent_use: true,
        short_wait_allowed: true,
    }
}

fn undo(version: u32) -> Op {
    Op::UndoDestroy(UndoDestroy {
        context: context(),
        version,
    })
}

fn advance(elapsed_ms: u64, expected: Vec<SeenWait>) -> Op {
    Op::AdvanceWaits(AdvanceWaits { elapsed_ms, expected })
}

fn begin(version: u32) -> Op {
    Op::BeginDestroy(BeginDestroy {
        context: context(),
        version,
    })
}

fn ack_destroyed(node: RaftId, version: u32) -> Op {
    Op::AckDestroyed(AckDestroyed {
        node,
        versions: vec![(context(), version, uid(version))],
    })
}

fn register(token: u64, name: &str, filling: u8) -> Op {
    Op::RegisterNode(RegisterNode {
        token,
        secret_hash: [5; 32],
        name: NodeName::new(name).unwrap(),
        incarnation: Incarnation([filling; 16]),
        api_address: "a".into(),
        cluster_address: "c".into(),
    })
}

fn report(seq: u64, filling: u8) -> NodeReport {
    NodeReport {
        seq,
        incarnation: Incarnation([filling; 16]),
        boot: Boot([0; 16]),
        clock: 0,
        durable_index: seq,
        proven_at: Some(1),
        feature_level: FEATURE_LEVEL,
        slots: BTreeMap::new(),
        uses: BTreeMap::new(),
    }
}

fn grant(blob: u8) -> Grant {
    Grant {
        epoch: 1,
        blob: vec![blob],
    }
}

fn node(name: &str, filling: u8) -> Node {
    Node {
        name: NodeName::new(name).unwrap(),
        incarnation: Incarnation([filling; 16]),
        api_address: "a".into(),
        cluster_address: "c".into(),
        status: NodeStatus::Member,
        slot_keys: BTreeMap::new(),
        registered_at: 0,
    }
}
