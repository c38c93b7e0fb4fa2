//! What each command does to the state, and above all what it refuses.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use super::*;
use crate::names::*;
use crate::state::access::Acl;
use crate::state::context::{BindingMode, KeyMaterial, RotationPolicy, VersionState};
use crate::state::node::{NodeReport, NodeStatus, SlotKey};
use crate::state::requests::{CLIENTS, NODES};
use crate::state::slot::{Grantee, TransportMode};

struct World {
    state: ClusterState,
    index: u64,
    voters: BTreeSet<RaftId>,
}

impl World {
    /// A cluster of node 1 with slot `s`, its transport key and context `c`.
    fn new() -> Self {
        let mut world = Self {
            state: ClusterState::default(),
            index: 1,
            voters: BTreeSet::from([1]),
        };
        world.ok(Op::CreateCluster(CreateCluster {
            cluster_id: ClusterId([1; 16]),
            name: "test".into(),
            trk_id: [2; 8],
            founder: 1,
            founder_name: NodeName::new("n1").unwrap(),
            incarnation: Incarnation([1; 16]),
            api_address: "a".into(),
            cluster_address: "c".into(),
            acl: Acl::default(),
            revocations: vec![],
        }));
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
        let command = self.command(op, Origin::Node(node));
        match self.send(&command) {
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
            voters: &self.voters,
        };
        apply(&mut self.state, command, &cx)
    }

    fn run(&mut self, op: Op) -> Outcome {
        let command = self.command(op, Origin::Node(1));
        self.send(&command)
    }

    fn ok(&mut self, op: Op) -> Done {
        match self.run(op) {
            Outcome::Done(done) => done,
            other => panic!("{other:?}"),
        }
    }

    fn refused(&mut self, op: Op) -> Refusal {
        match self.run(op) {
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

    fn version_state(&self, version: u32) -> VersionState {
        self.state.version(&context(), version).unwrap().state
    }

    fn join(&mut self, name: &str, filling: u8) -> RaftId {
        let expires_at = i64::MAX;
        let Done::JoinToken { number } = self.ok(Op::CreateJoinToken(CreateJoinToken {
            secret_hash: [5; 32],
            expires_at,
            node: None,
        })) else {
            panic!()
        };
        match self.ok(register(number, name, filling)) {
            Done::Registered { raft_id } => raft_id,
            other => panic!("{other:?}"),
        }
    }
}

fn context() -> ContextName {
    ContextName::new("c").unwrap()
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

#[test]
fn a_rotation_retires_the_old_version_in_the_same_entry() {
    let mut world = World::new();
    world.ok(prepare(0, 1));
    world.ack(1, 1);
    world.ok(activate(1, &[]));
    world.ok(prepare(1, 2));
    world.ack(1, 2);
    assert_eq!(world.version_state(1), VersionState::Active);
    world.ok(activate(2, &[]));
    assert_eq!(world.version_state(1), VersionState::DecryptOnly);
    assert_eq!(world.version_state(2), VersionState::Active);
    assert_eq!(
        world.state.contexts().get(&context()).unwrap().active_version,
        Some(2)
    );
}

#[test]
fn two_prepares_that_saw_the_same_highest_never_share_a_number() {
    let mut world = World::new();
    world.ok(prepare(0, 1));
    assert!(matches!(world.refused(prepare(0, 1)), Refusal::Conflict(_)));
    assert!(
        matches!(world.refused(prepare(1, 2)), Refusal::Conflict(_)),
        "one pending at a time"
    );
}

#[test]
fn an_abandoned_number_is_not_used_again_and_its_key_leaves_state() {
    let mut world = World::new();
    world.ok(prepare(0, 1));
    world.ok(Op::AbandonVersion(AbandonVersion {
        context: context(),
        version: 1,
        reason: "late".into(),
    }));
    assert_eq!(world.version_state(1), VersionState::Abandoned);
    assert!(world.state.version(&context(), 1).unwrap().material.is_none());
    assert!(matches!(world.refused(activate(1, &[])), Refusal::Conflict(_)));
    assert!(matches!(world.refused(prepare(0, 1)), Refusal::Conflict(_)));
    world.ok(prepare(1, 2));
}

#[test]
fn activation_needs_every_voter_or_its_absence_and_always_a_majority() {
    let mut world = World::new();
    world.voters = BTreeSet::from([1, 2, 3]);
    world.state.nodes.put(2, node("n2", 2));
    world.state.nodes.put(3, node("n3", 3));
    world.ok(prepare(0, 1));
    world.ack(1, 1);
    assert!(matches!(world.refused(activate(1, &[])), Refusal::Conflict(_)));
    assert!(
        matches!(world.refused(activate(1, &[2, 3])), Refusal::Conflict(_)),
        "no majority holds it"
    );
    world.ack(2, 1);
    assert!(
        matches!(world.refused(activate(1, &[])), Refusal::Conflict(_)),
        "node 3 is unaccounted for"
    );
    world.ok(activate(1, &[3]));
}

fn node(name: &str, filling: u8) -> crate::state::node::Node {
    crate::state::node::Node {
        name: NodeName::new(name).unwrap(),
        incarnation: Incarnation([filling; 16]),
        api_address: "a".into(),
        cluster_address: "c".into(),
        status: NodeStatus::Member,
        slot_keys: BTreeMap::new(),
        registered_at: 0,
    }
}

#[test]
fn a_node_speaks_only_for_itself() {
    let mut world = World::new();
    world.ok(prepare(0, 1));
    let ack = Op::AckVersions(AckVersions {
        node: 1,
        versions: vec![(context(), 1, uid(1))],
    });
    let command = world.command(ack, Origin::Node(2));
    assert!(matches!(
        world.send(&command),
        Outcome::Refused(Refusal::Forbidden(_))
    ));
    assert!(world.state.version(&context(), 1).unwrap().acks.is_empty());
}

#[test]
fn an_ack_for_another_key_under_the_same_number_counts_nothing() {
    let mut world = World::new();
    world.ok(prepare(0, 1));
    world.ok(Op::AckVersions(AckVersions {
        node: 1,
        versions: vec![(context(), 1, uid(9))],
    }));
    assert!(world.state.version(&context(), 1).unwrap().acks.is_empty());
}

#[test]
fn a_repeat_gets_the_stored_answer_and_changes_nothing() {
    let mut world = World::new();
    let command = world.command(prepare(0, 1), Origin::Node(1));
    let first = world.send(&command);
    let again = world.send(&command);
    assert_eq!(first, again);
    assert_eq!(world.state.contexts().get(&context()).unwrap().highest_version, 1);
    let other = Command {
        body_hash: [9; 32],
        ..command
    };
    assert_eq!(world.send(&other), Outcome::Refused(Refusal::KeyReused));
}

fn nothing_much() -> Op {
    Op::AddRevocations(AddRevocations { revocations: vec![] })
}

#[test]
fn the_window_is_bounded_and_what_left_it_is_still_recognised() {
    let mut world = World::new();
    let first = world.command(nothing_much(), Origin::Node(1));
    world.send(&first);
    for _ in 0..NODES.answers {
        world.ok(nothing_much());
    }
    assert_eq!(world.send(&first), Outcome::Refused(Refusal::KeyExpired));
    for _ in 0..NODES.recognised {
        world.ok(nothing_much());
    }
    assert_eq!(world.state.requests().len(), NODES.recognised);
    assert_eq!(world.send(&first), Outcome::Done(Done::Ok), "long forgotten");
}

#[test]
fn the_nodes_own_steps_push_no_clients_answer_out() {
    let mut world = World::new();
    let client = Command {
        id: RequestId::Client {
            principal: [1; 32],
            operation: "revoke".into(),
            key: "k".into(),
        },
        ..world.command(nothing_much(), Origin::Node(1))
    };
    let answer = world.send(&client);
    for _ in 0..NODES.recognised + CLIENTS.answers {
        world.ok(nothing_much());
    }
    assert_eq!(world.send(&client), answer);
    let other = Command {
        body_hash: [7; 32],
        ..client
    };
    assert_eq!(world.send(&other), Outcome::Refused(Refusal::KeyReused));
}

#[test]
fn a_join_token_works_once_but_tells_its_node_the_id_again() {
    let mut world = World::new();
    let id = world.join("n2", 2);
    let token = *world.state.join_tokens().iter().next().unwrap().0;
    assert_eq!(
        world.ok(register(token, "n2", 2)),
        Done::Registered { raft_id: id }
    );
    assert!(matches!(
        world.refused(register(token, "n3", 3)),
        Refusal::Forbidden(_)
    ));
    assert!(
        matches!(world.refused(register(token, "n2", 7)), Refusal::Exists(_)),
        "a wiped node is another node"
    );
    assert!(matches!(
        world.refused(register(token + 100, "n4", 4)),
        Refusal::Forbidden(_)
    ));
}

#[test]
fn a_node_that_never_heard_its_id_learns_it_with_a_new_token_too() {
    let mut world = World::new();
    let id = world.join("n2", 2);
    assert_eq!(world.join("n2", 2), id, "the same filling asks again");
    assert_eq!(world.state.nodes().len(), 2);
}

#[test]
fn an_expired_token_is_refused_by_the_proposers_clock() {
    let mut world = World::new();
    let expires_at = world.index as i64 * 1000 + 1;
    let Done::JoinToken { number } = world.ok(Op::CreateJoinToken(CreateJoinToken {
        secret_hash: [5; 32],
        expires_at,
        node: None,
    })) else {
        panic!()
    };
    assert!(matches!(
        world.refused(register(number, "n2", 2)),
        Refusal::Forbidden(_)
    ));
}

#[test]
fn a_learner_is_admitted_only_once_it_has_proven_every_key() {
    let mut world = World::new();
    let id = world.join("n2", 2);
    let admit = || Op::AdmitNode(AdmitNode { node: id });
    assert!(matches!(world.refused(admit()), Refusal::Conflict(_)));
    let report = NodeReport {
        seq: 1,
        boot: Boot([0; 16]),
        incarnation: Incarnation([2; 16]),
        clock: 0,
        durable_index: 1,
        proven_at: Some(1),
        feature_level: 1,
        slots: BTreeMap::new(),
    };
    let command = world.command(Op::ReportNode(ReportNode { node: id, report }), Origin::Node(id));
    world.send(&command);
    world.ok(prepare(0, 1));
    assert!(
        matches!(world.refused(admit()), Refusal::Conflict(_)),
        "a version it has not acknowledged is pending"
    );
    world.ack(id, 1);
    world.ok(admit());
}

fn slot_key(node: RaftId) -> Op {
    Op::RegisterSlotKey(RegisterSlotKey {
        node,
        slot: slot(),
        key: SlotKey {
            spki: vec![1],
            signature: vec![],
            signer_chain: vec![],
        },
    })
}

#[test]
fn a_slot_key_is_registered_once_per_raft_id() {
    let mut world = World::new();
    let key = |byte| SlotKey {
        spki: vec![byte],
        signature: vec![],
        signer_chain: vec![],
    };
    let register = |byte| {
        Op::RegisterSlotKey(RegisterSlotKey {
            node: 1,
            slot: slot(),
            key: key(byte),
        })
    };
    world.ok(register(1));
    world.ok(register(1));
    assert!(
        matches!(world.refused(register(2)), Refusal::Conflict(_)),
        "a substituted key"
    );
}

#[test]
fn an_endless_certificate_chain_is_not_kept() {
    let mut world = World::new();
    for signer_chain in [vec![vec![0]; 5], vec![vec![0; 17 << 10]]] {
        let register = Op::RegisterSlotKey(RegisterSlotKey {
            node: 1,
            slot: slot(),
            key: SlotKey {
                spki: vec![1],
                signature: vec![],
                signer_chain,
            },
        });
        assert!(matches!(world.refused(register), Refusal::Invalid(_)));
    }
}

#[test]
fn only_a_node_that_was_granted_a_transport_key_grants_it() {
    let mut world = World::new();
    let joiner = world.join("n2", 2);
    world.ok(Op::AddTransportKey(AddTransportKey {
        slot: slot(),
        id: TransportId([2; 16]),
        expected_generation: 1,
        mode: TransportMode::Standard,
        check: vec![2; 40],
        grants: BTreeMap::from([(Grantee::Node(1), vec![1])]),
    }));
    world.ok_as(joiner, slot_key(joiner));
    let grant = |blob: u8| {
        Op::GrantTransportKey(GrantTransportKey {
            slot: slot(),
            id: TransportId([2; 16]),
            grantee: Grantee::Node(joiner),
            blob: vec![blob],
        })
    };
    let granted = |world: &World| {
        let slots = world.state.slots();
        let transport = slots.get(&slot()).unwrap().current_transport().unwrap();
        transport.grants.get(&Grantee::Node(joiner)).cloned()
    };
    let forged = world.command(grant(9), Origin::Node(joiner));
    assert!(matches!(
        world.send(&forged),
        Outcome::Refused(Refusal::Forbidden(_))
    ));
    assert_eq!(granted(&world), None);
    world.ok(grant(1));
    world.ok(grant(2));
    assert_eq!(granted(&world), Some(vec![1]), "the first one stands");
}

#[test]
fn keys_are_prepared_only_under_the_current_transport_key() {
    let mut world = World::new();
    world.ok(transport(2, 1));
    assert!(matches!(world.refused(transport(3, 1)), Refusal::Conflict(_)));
    assert!(
        matches!(world.refused(prepare(0, 1)), Refusal::Conflict(_)),
        "generation 1 is superseded"
    );
}

#[test]
fn older_reports_are_ignored_and_other_incarnations_refused() {
    let mut world = World::new();
    let report = |seq, filling: u8| {
        Op::ReportNode(ReportNode {
            node: 1,
            report: NodeReport {
                seq,
                incarnation: Incarnation([filling; 16]),
                boot: Boot([0; 16]),
                clock: 0,
                durable_index: seq,
                proven_at: None,
                feature_level: 1,
                slots: BTreeMap::new(),
            },
        })
    };
    world.ok(report(2, 1));
    world.ok(report(1, 1));
    assert_eq!(world.state.reports().get(&1).unwrap().seq, 2);
    assert!(matches!(world.refused(report(3, 9)), Refusal::Forbidden(_)));
}
