//! A replicated state to be built step by step, and the log of what built it.

use std::collections::{BTreeMap, BTreeSet};

use openraft::{CommittedLeaderId, LogId, Membership};
use raft_store::StoredMembership;
use raft_store::command::*;
use raft_store::names::*;
use raft_store::state::ClusterState;
use raft_store::state::access::{Role, RoleEntry};
use raft_store::state::context::{BindingMode, KeyMaterial, RotationPolicy, VersionKey, VersionState};
use raft_store::state::frozen::AclV1;
use raft_store::state::node::{NodeReport, SlotKey, SlotReport};
use raft_store::state::slot::TransportMode;
use raft_store::state::usage::UseCount;
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

/// The origin of what no node does by itself.
pub(super) fn admin() -> Origin {
    Origin::Admin(AdminOrigin {
        fingerprint: [1; 32],
        cn: "ann".to_owned(),
        ou: "Admin".to_owned(),
        serial: "0b".to_owned(),
        issuer: ISSUER.to_owned(),
        via_node: 1,
        evidence: None,
    })
}

/// The node itself, or an administrator for what only one of them may do.
pub(crate) fn origin(node: RaftId, op: &Op) -> Origin {
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
            acl: AclV1 {
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

    /// A second slot of every node, with its transport key.
    pub(crate) fn second_slot(&mut self, name: &str) {
        self.transport(name, 1, 0);
        for node in self.voters.clone() {
            self.slot_key(node, slot(name));
        }
    }

    fn slot_key(&mut self, node: RaftId, slot: SlotName) {
        let key = SlotKey {
            spki: vec![1],
            epoch: 1,
            signature: vec![1],
            signer_chain: vec![],
        };
        self.ok_as(node, Op::RegisterSlotKey(RegisterSlotKey { node, slot, key }));
    }

    /// A node's keys for every slot that it has to have.
    pub(crate) fn slot_keys(&mut self, node: RaftId) {
        for slot in self.state.slots_needed_by(Some(node)) {
            self.slot_key(node, slot);
        }
    }

    /// The next versions of a context are made in another slot.
    pub(crate) fn move_to(&mut self, name: &str, to: &str) {
        let from = self.state.contexts().get(&context(name)).unwrap().slot.clone();
        self.ok(Op::MoveContext(MoveContext {
            context: context(name),
            from,
            to: slot(to),
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
        self.slot_keys(node);
        self.report(node, 0, BTreeMap::new());
    }

    /// A joined node's report that says nothing but its clock.
    pub(crate) fn report_clock(&mut self, node: RaftId, clock: UnixMillis) {
        self.report(node, clock, BTreeMap::new());
    }

    /// A joined node's report that it understands so much.
    pub(crate) fn report_level(&mut self, node: RaftId, feature_level: u32) {
        let report = NodeReport {
            feature_level,
            ..self.next_report(node)
        };
        self.ok_as(node, Op::ReportNode(ReportNode { node, report }));
    }

    /// A joined node's report of one slot.
    pub(crate) fn report_slot(&mut self, node: RaftId, name: &str, state: &str) {
        let report = SlotReport {
            serving: state == "ready",
            state: state.to_owned(),
            missing_keys: 0,
        };
        self.report(node, 0, BTreeMap::from([(slot(name), report)]));
    }

    /// A node's report that it decrypted once with a version.
    pub(crate) fn used(&mut self, node: RaftId, name: &str, version: u32, last_used: UnixMillis) {
        let key = VersionKey {
            context: context(name),
            version,
        };
        let count = UseCount {
            encryptions: 0,
            decryptions: 1,
            last_used,
        };
        let report = NodeReport {
            uses: BTreeMap::from([(key, count)]),
            ..self.next_report(node)
        };
        self.ok_as(node, Op::ReportNode(ReportNode { node, report }));
    }

    fn report(&mut self, node: RaftId, clock: UnixMillis, slots: BTreeMap<SlotName, SlotReport>) {
        let report = NodeReport {
            clock,
            slots,
            ..self.next_report(node)
        };
        self.ok_as(node, Op::ReportNode(ReportNode { node, report }));
    }

    fn next_report(&self, node: RaftId) -> NodeReport {
        NodeReport {
            seq: self.state.reports().get(&node).map_or(1, |known| known.seq + 1),
            boot: raft_store::names::Boot([0; 16]),
            incarnation: self.state.nodes().get(&node).unwrap().incarnation,
            clock: 0,
            durable_index: 1,
            proven_at: Some(1),
            feature_level: raft_store::state::FEATURE_LEVEL,
            slots: BTreeMap::new(),
            uses: BTreeMap::new(),
        }
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

    /// As [`World::prepare`], wrapped under this transport key.
    pub(crate) fn prepare_under(&mut self, name: &str, id: u8) -> u32 {
        let highest = self.state.contexts().get(&context(name)).unwrap().highest_version;
        let Op::PrepareVersion(mut op) = prepare(name, highest, highest + 1) else {
            panic!()
        };
        op.material.transport_id = TransportId([id; 16]);
        self.ok(Op::PrepareVersion(op));
        highest + 1
    }

    /// Every node says that it has these replication keys.
    pub(crate) fn hold_replication_keys(&mut self, keys: &[[u8; 8]]) {
        let standing = self.state.nodes().iter().filter(|(_, node)| node.is_standing());
        let standing: Vec<RaftId> = standing.map(|(id, _)| *id).collect();
        for node in standing {
            let held = keys.iter().copied().collect();
            self.ok_as(
                node,
                Op::ReportReplicationKeys(ReportReplicationKeys { node, held }),
            );
        }
    }

    /// Every node says that it has another replication key, which becomes the cluster's.
    pub(crate) fn rekey_replication(&mut self, to: [u8; 8]) {
        let from = self.state.meta().unwrap().trk_id;
        self.hold_replication_keys(&[from, to]);
        self.ok(Op::RekeyReplication(RekeyReplication { from, to }));
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

    fn state_of(&self, name: &str, version: u32) -> VersionState {
        self.state.version(&context(name), version).unwrap().state
    }

    pub(crate) fn set_use(&mut self, name: &str, version: u32, to: VersionState) {
        let (context, expected) = (context(name), self.state_of(name, version));
        self.ok(Op::SetVersionUse(SetVersionUse {
            context,
            version,
            expected,
            to,
        }));
    }

    pub(crate) fn schedule_destroy(&mut self, name: &str, version: u32, wait_ms: u64) {
        let (context, expected) = (context(name), self.state_of(name, version));
        self.ok(Op::ScheduleDestroy(ScheduleDestroy {
            context,
            version,
            expected,
            wait_ms,
            min_wait_ms: LEAST_WAIT_MS,
            recent_ms: 0,
            override_recent_use: true,
            short_wait_allowed: true,
        }));
    }

    /// What has passed of the wait before a destruction, in milliseconds.
    pub(crate) fn elapsed(&self, name: &str, version: u32) -> u64 {
        let version = self.state.version(&context(name), version).unwrap();
        version.destruction.as_ref().unwrap().elapsed_ms
    }

    pub(crate) fn advance(&mut self, name: &str, version: u32, elapsed_ms: u64) {
        let known = self.state.version(&context(name), version).unwrap();
        let destruction = known.destruction.as_ref().unwrap();
        let seen = SeenWait {
            context: context(name),
            version,
            scheduled_by: destruction.scheduled_by,
            elapsed_ms: destruction.elapsed_ms,
        };
        self.ok(Op::AdvanceWaits(AdvanceWaits {
            elapsed_ms,
            expected: vec![seen],
        }));
    }

    /// Waits a scheduled destruction of up to two minutes out, and begins it.
    pub(crate) fn begin_destroy(&mut self, name: &str, version: u32) {
        let known = self.state.version(&context(name), version).unwrap();
        let wait_ms = known.destruction.as_ref().unwrap().wait_ms;
        self.advance(name, version, wait_ms);
        let context = context(name);
        self.ok(Op::BeginDestroy(BeginDestroy { context, version }));
    }

    pub(crate) fn ack_destroyed(&mut self, node: RaftId, name: &str, version: u32) {
        let key_uid = self.state.version(&context(name), version).unwrap().key_uid;
        let versions = vec![(context(name), version, key_uid)];
        self.ok_as(node, Op::AckDestroyed(AckDestroyed { node, versions }));
    }

    pub(crate) fn ok(&mut self, op: Op) -> Done {
        self.ok_as(1, op)
    }

    pub(crate) fn ok_as(&mut self, node: RaftId, op: Op) -> Done {
        let id = RequestId::Node {
            node,
            nonce: u128::from(self.index).to_be_bytes(),
        };
        let origin = origin(node, &op);
        match self.send(id, [0; 32], origin, op) {
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
            leader: 1,
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
