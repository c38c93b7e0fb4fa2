//! A replicated state for tests, made by the real commands.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};

use raft_store::command::{
    AbandonVersion, AckDestroyed, AckVersions, ActivateVersion, AddTransportKey, AdoptVersion, AdvanceWaits,
    ApplyContext, BeginDestroy, Command, CreateCluster, CreateContext, CreateJoinToken, Done,
    GrantTransportKey, LEAST_WAIT_MS, MoveContext, Op, Outcome, PrepareVersion, RegisterNode,
    RegisterSlotKey, RejectGrant, ReleaseVersion, RequestId, ScheduleDestroy, SeenWait, SetVersionUse, apply,
};
use raft_store::names::{
    ClusterId, ContextName, ContextUid, Incarnation, KeyUid, NodeName, RaftId, SlotName, TransportId,
};
use raft_store::state::ClusterState;
use raft_store::state::context::{BindingMode, KeyMaterial, RotationPolicy, VersionState};
use raft_store::state::frozen::AclV1;
use raft_store::state::node::SlotKey;
use raft_store::state::slot::{Grant, Grantee, TransportMode};

use super::slot_key::SlotKeyContext;
use super::slot_key::tests::signer;
use crate::rotation::testing::origin;

/// The node the tests speak for; it founded the cluster.
pub(super) const ME: RaftId = 1;

/// The slot the tests are about.
pub(super) fn slot() -> SlotName {
    SlotName::new("exchange").unwrap()
}

pub(super) fn context(name: &str) -> ContextName {
    ContextName::new(name).unwrap()
}

/// Id of a version's key.
pub(super) fn uid(context: &str, version: u32) -> KeyUid {
    let mut bytes = [0; 16];
    bytes[0] = context.as_bytes()[0];
    bytes[1] = u8::try_from(version).unwrap();
    KeyUid(bytes)
}

/// A node's slot public key.
pub(super) fn spki(node: RaftId) -> Vec<u8> {
    format!("spki of {node}").into_bytes()
}

/// Id and check of a transport generation.
pub(super) fn transport_id(generation: u8) -> TransportId {
    TransportId([generation; 16])
}

pub(super) fn check(generation: u8) -> Vec<u8> {
    vec![generation; 40]
}

/// A grant of a transport key.
fn sealed() -> Grant {
    Grant {
        epoch: 1,
        blob: b"sealed".to_vec(),
    }
}

pub(super) struct Cluster {
    pub(super) state: ClusterState,
    index: u64,
    voters: BTreeSet<RaftId>,
}

impl Cluster {
    pub(super) fn founded() -> Self {
        let mut cluster = Self {
            state: ClusterState::default(),
            index: 1,
            voters: BTreeSet::from([ME]),
        };
        cluster.run(
            ME,
            Op::CreateCluster(CreateCluster {
                cluster_id: ClusterId([1; 16]),
                name: "test".into(),
                trk_id: [2; 8],
                founder: ME,
                founder_name: NodeName::new("hsm-node-1").unwrap(),
                incarnation: Incarnation([1; 16]),
                api_address: "a:1".into(),
                cluster_address: "c:1".into(),
                acl: AclV1::default(),
                revocations: vec![],
            }),
        );
        cluster
    }

    pub(super) fn run(&mut self, node: RaftId, op: Op) -> Done {
        self.index += 1;
        let nonce = u128::from(self.index).to_be_bytes();
        let command = Command {
            id: RequestId::Node { node, nonce },
            body_hash: [0; 32],
            origin: origin(node, &op),
            approvals: vec![],
            at: 1000,
            op,
        };
        let cx = ApplyContext {
            index: self.index,
            at: command.at,
            origin: &command.origin,
            leader: ME,
            voters: &self.voters,
        };
        match apply(&mut self.state, &command, &cx) {
            Outcome::Done(done) => done,
            other => panic!("{other:?}"),
        }
    }

    /// A node that joins under this name.
    pub(super) fn join(&mut self, name: &str) -> RaftId {
        let made = self.run(
            ME,
            Op::CreateJoinToken(CreateJoinToken {
                secret_hash: [3; 32],
                expires_at: 1_000_000,
                node: None,
            }),
        );
        let Done::JoinToken { number } = made else {
            panic!("{made:?}")
        };
        let registered = self.run(
            ME,
            Op::RegisterNode(RegisterNode {
                token: number,
                secret_hash: [3; 32],
                name: NodeName::new(name).unwrap(),
                incarnation: Incarnation([8; 16]),
                api_address: "a:2".into(),
                cluster_address: "c:2".into(),
            }),
        );
        let Done::Registered { raft_id } = registered else {
            panic!("{registered:?}")
        };
        raft_id
    }

    /// Registers a node's slot key, vouched for by a cluster key of its own.
    pub(super) fn registered(&mut self, node: RaftId) -> &mut Self {
        let meta = self.state.meta().unwrap().clone();
        let name = slot();
        let context = SlotKeyContext::new(&meta, node, &name);
        let vouching = self.state.nodes().get(&node).unwrap().name.clone();
        let key = signer(vouching.as_str()).sign(&context, &spki(node)).unwrap();
        self.registered_with(node, key)
    }

    pub(super) fn registered_with(&mut self, node: RaftId, key: SlotKey) -> &mut Self {
        self.run(
            node,
            Op::RegisterSlotKey(RegisterSlotKey {
                node,
                slot: slot(),
                key,
            }),
        );
        self
    }

    /// A new transport generation, granted to these nodes.
    pub(super) fn transport(&mut self, grantees: &[RaftId]) -> &mut Self {
        let highest = self
            .state
            .slots()
            .get(&slot())
            .map_or(0, |slot| slot.transport.len());
        let generation = u8::try_from(highest + 1).unwrap();
        let grants: BTreeMap<_, _> = grantees
            .iter()
            .map(|node| (Grantee::Node(*node), sealed()))
            .collect();
        self.run(
            ME,
            Op::AddTransportKey(AddTransportKey {
                slot: slot(),
                id: transport_id(generation),
                expected_generation: u32::from(generation) - 1,
                mode: TransportMode::Standard,
                check: check(generation),
                grants,
            }),
        );
        self
    }

    /// The first transport key of another slot, of a generation's id.
    pub(super) fn transport_in(&mut self, slot: &str, generation: u8) -> &mut Self {
        self.run(
            ME,
            Op::AddTransportKey(AddTransportKey {
                slot: SlotName::new(slot).unwrap(),
                id: transport_id(generation),
                expected_generation: 0,
                mode: TransportMode::Standard,
                check: check(generation),
                grants: BTreeMap::new(),
            }),
        );
        self
    }

    /// The next versions of a context are made in another slot.
    pub(super) fn move_to(&mut self, name: &str, to: &str) -> &mut Self {
        let from = self.state.contexts().get(name).unwrap().slot.clone();
        self.run(
            ME,
            Op::MoveContext(MoveContext {
                context: context(name),
                from,
                to: SlotName::new(to).unwrap(),
            }),
        );
        self
    }

    pub(super) fn grant(&mut self, generation: u8, node: RaftId) -> &mut Self {
        let (id, grantee) = (transport_id(generation), Grantee::Node(node));
        let grant = sealed();
        self.run(
            ME,
            Op::GrantTransportKey(GrantTransportKey {
                slot: slot(),
                id,
                grantee,
                grant,
            }),
        );
        self
    }

    /// The node cannot open what it was granted.
    pub(super) fn reject(&mut self, generation: u8, node: RaftId) -> &mut Self {
        let (id, grant) = (transport_id(generation), sealed());
        self.run(
            node,
            Op::RejectGrant(RejectGrant {
                node,
                slot: slot(),
                id,
                grant,
            }),
        );
        self
    }

    pub(super) fn context(&mut self, name: &str) -> &mut Self {
        self.context_in(name, "exchange")
    }

    pub(super) fn context_in(&mut self, name: &str, slot: &str) -> &mut Self {
        self.run(
            ME,
            Op::CreateContext(CreateContext {
                name: context(name),
                uid: ContextUid([name.as_bytes()[0]; 16]),
                slot: SlotName::new(slot).unwrap(),
                binding: BindingMode::Private,
                policy: RotationPolicy::default(),
            }),
        );
        self
    }

    /// Prepares a version under the current transport key of its context's slot.
    pub(super) fn pending(&mut self, name: &str, version: u32) -> KeyUid {
        let row = self.state.contexts().get(name).unwrap();
        let slot = self.state.slots().get(&row.slot).unwrap();
        let transport_id = slot.current_transport().unwrap().id;
        let key_uid = uid(name, version);
        let expected_highest = row.highest_version;
        self.run(
            ME,
            Op::PrepareVersion(PrepareVersion {
                context: context(name),
                expected_highest,
                version,
                key_uid,
                label: format!("kek-{name}-v{version}"),
                material: KeyMaterial {
                    transport_id,
                    sealed_key: b"sealed key".to_vec(),
                    check_record: b"check record".to_vec(),
                },
            }),
        );
        key_uid
    }

    /// A version that this node has found in a token of version 1, under the label `old-<name>-v<N>`.
    pub(super) fn adopted(&mut self, name: &str, version: u32) -> KeyUid {
        let key_uid = uid(name, version);
        let slot = self.state.contexts().get(&context(name)).unwrap().slot.clone();
        self.run(
            ME,
            Op::AdoptVersion(AdoptVersion {
                context: context(name),
                version,
                key_uid,
                label: format!("old-{name}-v{version}"),
                slot,
                check_record: b"check record".to_vec(),
                holder: ME,
                floor: 0,
                created_at: None,
            }),
        );
        key_uid
    }

    pub(super) fn ack(&mut self, node: RaftId, name: &str, version: u32) -> &mut Self {
        let versions = vec![(context(name), version, uid(name, version))];
        self.run(node, Op::AckVersions(AckVersions { node, versions }));
        self
    }

    pub(super) fn activate(&mut self, name: &str, version: u32) -> &mut Self {
        let context = context(name);
        let op = ActivateVersion {
            context,
            version,
            left_out: BTreeSet::new(),
        };
        self.run(ME, Op::ActivateVersion(op));
        self
    }

    pub(super) fn abandon(&mut self, name: &str, version: u32) -> &mut Self {
        let (context, reason) = (context(name), "test".to_owned());
        self.run(
            ME,
            Op::AbandonVersion(AbandonVersion {
                context,
                version,
                reason,
            }),
        );
        self
    }

    fn state_of(&self, name: &str, version: u32) -> VersionState {
        self.state.version(&context(name), version).unwrap().state
    }

    /// Disables a retired version, or enables it.
    pub(super) fn set_use(&mut self, name: &str, version: u32, to: VersionState) -> &mut Self {
        let (context, expected) = (context(name), self.state_of(name, version));
        self.run(
            ME,
            Op::SetVersionUse(SetVersionUse {
                context,
                version,
                expected,
                to,
            }),
        );
        self
    }

    /// Gives an adopted version back.
    pub(super) fn release(&mut self, name: &str, version: u32) -> &mut Self {
        let (context, expected) = (context(name), self.state_of(name, version));
        self.run(
            ME,
            Op::ReleaseVersion(ReleaseVersion {
                context,
                version,
                expected,
            }),
        );
        self
    }

    pub(super) fn schedule_destroy(&mut self, name: &str, version: u32) -> &mut Self {
        let (context, expected) = (context(name), self.state_of(name, version));
        self.run(
            ME,
            Op::ScheduleDestroy(ScheduleDestroy {
                context,
                version,
                expected,
                wait_ms: LEAST_WAIT_MS,
                min_wait_ms: LEAST_WAIT_MS,
                recent_ms: 0,
                override_recent_use: true,
                short_wait_allowed: true,
            }),
        );
        self
    }

    /// Waits a scheduled destruction out and begins it.
    pub(super) fn begin_destroy(&mut self, name: &str, version: u32) -> &mut Self {
        let destruction = self.state.version(&context(name), version).unwrap();
        let destruction = destruction.destruction.clone().unwrap();
        let seen = SeenWait {
            context: context(name),
            version,
            scheduled_by: destruction.scheduled_by,
            elapsed_ms: destruction.elapsed_ms,
        };
        self.run(
            ME,
            Op::AdvanceWaits(AdvanceWaits {
                elapsed_ms: destruction.wait_ms,
                expected: vec![seen],
            }),
        );
        let context = context(name);
        self.run(ME, Op::BeginDestroy(BeginDestroy { context, version }));
        self
    }

    pub(super) fn ack_destroyed(&mut self, node: RaftId, name: &str, version: u32) -> &mut Self {
        let versions = vec![(context(name), version, uid(name, version))];
        self.run(node, Op::AckDestroyed(AckDestroyed { node, versions }));
        self
    }

    /// A version that is active, acknowledged by this node.
    pub(super) fn active(&mut self, name: &str, version: u32) -> KeyUid {
        let uid = self.pending(name, version);
        self.ack(ME, name, version).activate(name, version);
        uid
    }
}
