//! A replicated state to be built step by step, and the log of what built it.

use std::collections::{BTreeMap, BTreeSet};

use openraft::{CommittedLeaderId, LogId, Membership};
use raft_store::StoredMembership;
use raft_store::command::*;
use raft_store::names::*;
use raft_store::state::ClusterState;
use raft_store::state::access::{Acl, Role, RoleEntry};
use raft_store::state::context::{BindingMode, KeyMaterial, RotationPolicy};
use raft_store::state::node::{NodeReport, SlotReport};
use raft_store::state::slot::TransportMode;
use raft_store::storage::Published;

use super::replication_key;

pub(crate) const ISSUER: &str = "CN=Client CA";
pub(crate) const CLUSTER: ClusterId = ClusterId([1; 16]);

pub(crate) fn context(name: &str) -> ContextName {
    ContextName::new(name).unwrap()
}

pub(crate) fn slot(name: &str) -> SlotName {
    SlotName::new(name).unwrap()
}

/// Nodes 1..=n with slot `s`, its transport key and context `c` without versions.
pub(crate) struct World {
    pub(crate) state: ClusterState,
    pub(crate) index: u64,
    pub(crate) voters: BTreeSet<RaftId>,
    pub(crate) log: Vec<Op>,
}

impl World {
    pub(crate) fn new(nodes: u64) -> Self {
        let mut world = Self {
            state: ClusterState::default(),
            index: 0,
            voters: BTreeSet::from([1]),
            log: Vec::new(),
        };
        let role = |role, ou: &str| RoleEntry {
            role,
            issuer: ISSUER.to_owned(),
            ou: Some(ou.to_owned()),
            cn: None,
            spki_sha256: None,
        };
        let roles = vec![
            role(Role::Admin, "Admin"),
            role(Role::Operator, "Ops"),
            role(Role::Auditor, "Audit"),
        ];
        world.ok(Op::CreateCluster(CreateCluster {
            cluster_id: CLUSTER,
            name: "test".to_owned(),
            trk_id: replication_key().for_cluster(&CLUSTER.0).trk_id(),
            founder: 1,
            founder_name: NodeName::new("n1").unwrap(),
            incarnation: Incarnation([1; 16]),
            api_address: "a1".to_owned(),
            cluster_address: "c1".to_owned(),
            acl: Acl {
                mappings: BTreeMap::new(),
                roles,
            },
            revocations: vec![],
        }));
        world.transport("s", 1, 0);
        world.context("c", "s");
        while world.voters.len() < nodes as usize {
            let id = world.join();
            world.admit(id);
            world.voters.insert(id);
        }
        world
    }

    pub(crate) fn transport(&mut self, name: &str, id: u8, expected_generation: u32) {
        self.ok(Op::AddTransportKey(AddTransportKey {
            slot: slot(name),
            id: TransportId([id; 16]),
            expected_generation,
            mode: TransportMode::Standard,
            check: vec![7; 40],
            grants: BTreeMap::new(),
        }));
    }

    pub(crate) fn context(&mut self, name: &str, slot_name: &str) {
        self.ok(Op::CreateContext(CreateContext {
            name: context(name),
            uid: ContextUid([1; 16]),
            slot: slot(slot_name),
            binding: BindingMode::Shared,
            policy: RotationPolicy::default(),
        }));
    }

    /// A registered node that does not vote; its name is `n<raft id>`.
    pub(crate) fn join(&mut self) -> RaftId {
        let token = self.ok(Op::CreateJoinToken(CreateJoinToken {
            secret_hash: [5; 32],
            expires_at: i64::MAX,
            node: None,
        }));
        let Done::JoinToken { number } = token else {
            panic!("{token:?}")
        };
        let registered = self.ok(Op::RegisterNode(RegisterNode {
            token: number,
            secret_hash: [5; 32],
            name: NodeName::new(&format!("n{}", self.index + 1)).unwrap(),
            incarnation: Incarnation([9; 16]),
            api_address: "a".to_owned(),
            cluster_address: "c".to_owned(),
        }));
        match registered {
            Done::Registered { raft_id } => raft_id,
            other => panic!("{other:?}"),
        }
    }

    /// A joining node's report that it holds every key.
    pub(crate) fn prove(&mut self, node: RaftId) {
        self.report(node, BTreeMap::new());
    }

    /// A joined node's report of one slot.
    pub(crate) fn report_slot(&mut self, node: RaftId, name: &str, state: &str) {
        let report = SlotReport {
            serving: state == "ready",
            state: state.to_owned(),
            missing_keys: 0,
        };
        self.report(node, BTreeMap::from([(slot(name), report)]));
    }

    fn report(&mut self, node: RaftId, slots: BTreeMap<SlotName, SlotReport>) {
        let seq = self.state.reports().get(&node).map_or(1, |known| known.seq + 1);
        let report = NodeReport {
            seq,
            boot: raft_store::names::Boot([0; 16]),
            incarnation: Incarnation([9; 16]),
            clock: 0,
            durable_index: 1,
            proven_at: Some(1),
            feature_level: 1,
            slots,
            uses: BTreeMap::new(),
        };
        self.ok_as(node, Op::ReportNode(ReportNode { node, report }));
    }

    pub(crate) fn admit(&mut self, node: RaftId) {
        self.prove(node);
        self.ok(Op::AdmitNode(AdmitNode { node }));
    }

    pub(crate) fn prepare(&mut self, name: &str) -> u32 {
        let highest = self.state.contexts().get(&context(name)).unwrap().highest_version;
        let version = highest + 1;
        self.ok(prepare(name, highest, version));
        version
    }

    pub(crate) fn ack(&mut self, node: RaftId, name: &str, version: u32) {
        let Some(key_uid) = self.state.version(&context(name), version).map(|v| v.key_uid) else {
            panic!("no version {version}")
        };
        let versions = vec![(context(name), version, key_uid)];
        self.ok_as(node, Op::AckVersions(AckVersions { node, versions }));
    }

    pub(crate) fn activate(&mut self, name: &str, version: u32) {
        for voter in self.voters.clone() {
            self.ack(voter, name, version);
        }
        let (context, left_out) = (context(name), BTreeSet::new());
        self.ok(Op::ActivateVersion(ActivateVersion {
            context,
            version,
            left_out,
        }));
    }

    pub(crate) fn abandon(&mut self, name: &str, version: u32) {
        let (context, reason) = (context(name), "test".to_owned());
        self.ok(Op::AbandonVersion(AbandonVersion {
            context,
            version,
            reason,
        }));
    }

    pub(crate) fn ok(&mut self, op: Op) -> Done {
        self.ok_as(1, op)
    }

    pub(crate) fn ok_as(&mut self, node: RaftId, op: Op) -> Done {
        let id = RequestId::Node {
            node,
            nonce: u128::from(self.index).to_be_bytes(),
        };
        match self.send(id, [0; 32], Origin::Node(node), op) {
            Outcome::Done(done) => done,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn send(&mut self, id: RequestId, body_hash: [u8; 32], origin: Origin, op: Op) -> Outcome {
        self.index += 1;
        let at = self.index as i64 * 1000;
        self.log.push(op.clone());
        let command = Command {
            id,
            body_hash,
            origin,
            approvals: vec![],
            at,
            op,
        };
        let cx = ApplyContext {
            index: self.index,
            at,
            origin: &command.origin,
            voters: &self.voters,
        };
        apply(&mut self.state, &command, &cx)
    }

    pub(crate) fn published(&self) -> Published {
        let membership = Membership::new(vec![self.voters.clone()], ());
        Published {
            state: self.state.clone(),
            applied: Some(LogId::new(CommittedLeaderId::new(1, 1), self.index)),
            membership: StoredMembership::new(None, membership),
            digest: 0,
            changed: self.index,
        }
    }
}

pub(crate) fn prepare(name: &str, expected_highest: u32, version: u32) -> Op {
    let mut key_uid = [0; 16];
    key_uid[..4].copy_from_slice(&version.to_be_bytes());
    key_uid[15] = name.as_bytes()[0];
    Op::PrepareVersion(PrepareVersion {
        context: context(name),
        expected_highest,
        version,
        key_uid: KeyUid(key_uid),
        label: format!("kek-{name}-v{version}"),
        material: KeyMaterial {
            transport_id: TransportId([1; 16]),
            sealed_key: vec![1],
            check_record: vec![2],
        },
    })
}
