//! What a stranger with a certificate of the cluster's CA, a node that has not joined yet, or a member that speaks
//! for others, achieves on the cluster listener of a real node: nothing, and a line in the audit that names it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

use hsm_api::ErrorCode;
use openraft::raft::{AppendEntriesRequest, VoteRequest};
use raft_store::command::{
    AckVersions, AddRevocations, AddTransportKey, CreateContext, Forbidden, GrantTransportKey,
    LeaseInvocations, Op, Refusal, RegisterSlotKey,
};
use raft_store::names::{Boot, ContextName, ContextUid, Incarnation, RaftId, SlotName, TransportId};
use raft_store::state::access::RevocationKey;
use raft_store::state::context::{BindingMode, RotationPolicy};
use raft_store::state::node::SlotKey;
use raft_store::state::slot::{Grant, Grantee, TransportMode};
use raft_store::storage::Poison;
use raft_store::{SnapshotMeta, Vote};

use super::join::JoinDetails;
use super::test_world::{WITHIN, World, rotate, tls, until};
use super::wire::{AppendFrame, Hello, JoinDeclined, Request, Response, TurnedAway};
use super::{Gate, ProposeError};

/// A term that no election has reached.
const FAR: u64 = 1 << 40;

fn vote(candidate: RaftId) -> Request {
    Request::Vote(VoteRequest {
        vote: Vote::new(FAR, candidate),
        last_log_id: None,
    })
}

fn append(leader: RaftId) -> Request {
    Request::Append(AppendFrame {
        rpc: AppendEntriesRequest {
            vote: Vote::new_committed(FAR, leader),
            prev_log_id: None,
            entries: vec![],
            leader_commit: None,
        },
        quorum_ack_age_ms: Some(0),
        silent: BTreeSet::new(),
    })
}

fn snapshot(leader: RaftId) -> Request {
    Request::SnapshotBegin {
        vote: Vote::new_committed(FAR, leader),
        meta: SnapshotMeta::default(),
    }
}

fn slot() -> SlotName {
    SlotName::new("s").unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_with_a_node_certificate_is_no_member() {
    let world = World::new("stranger").await;
    // Under an id that may be given one day, however large.
    for id in [2, 3, 500, FAR] {
        let reason = world.turned_away(&world.hello(id)).await;
        assert_eq!(reason, TurnedAway::Unknown(id));
        world.assert_audited(id, "greeting", "is not a member");
    }
    let reason = world.turned_away(&world.hello(1)).await;
    assert!(matches!(reason, TurnedAway::OtherName { .. }), "{reason}");
    let as_n1 = Hello {
        name: "n1".into(),
        ..world.hello(1)
    };
    let reason = world.turned_away(&as_n1).await;
    assert!(matches!(reason, TurnedAway::OtherName { .. }), "{reason}");
    // Whoever it says it is, the audit has the name in its certificate.
    world.assert_audited(1, "greeting", "for stranger, it says it is n1");
    // As a node that wants to join it is greeted, and may do nothing else.
    let joining = world.hello(0);
    for (asked, request) in [
        ("key.rotate", rotate(0, 1)),
        ("key.rotate", rotate(1, 1)),
        ("vote", vote(FAR)),
        ("read_index", Request::ReadIndex),
        ("stand", Request::Stand),
        ("vouch", Request::Vouch(1)),
    ] {
        world.hung_up(&joining, request).await;
        world.assert_audited(0, asked, "it may only ask to join");
    }
    assert_eq!(world.node.view().term, 1, "no election was caused");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_connects_and_says_nothing_keeps_no_member_out() {
    let world = World::new("sleeper").await;
    let id = world.register("127.0.0.1:1").await;
    let _silent = world.silent(280);
    // A dial gives up after two seconds.
    let answer = world.ask(&world.hello(id), Request::Vouch(1)).await.unwrap();
    assert!(matches!(answer, Response::Vouch(Some(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lone_leader_whose_log_did_not_give_an_id_of_its_cluster_stops_changing_anything() {
    let world = World::new("newer").await;
    let open = || matches!(world.node.start_gate(), Gate::Open { .. });
    until("the gate to open", open).await;
    let revoke = || Op::AddRevocations(AddRevocations { revocations: vec![] });
    // Of an epoch or a cluster that is not this one, or not named as its certificate is: no proof.
    let hello = world.hello(500);
    for other in [
        Hello {
            epoch: 2,
            ..hello.clone()
        },
        Hello {
            name: "n1".into(),
            ..hello.clone()
        },
    ] {
        world.turned_away(&other).await;
    }
    let own = world.register("127.0.0.1:1").await;
    assert!(world.greet(&world.hello(own)).await.is_ok());
    world.done(revoke()).await;
    assert!(open());

    assert_eq!(world.turned_away(&hello).await, TurnedAway::Unknown(500));
    assert_eq!(world.node.start_gate(), Gate::OlderCopy { node: 500 });
    assert_eq!(world.node.staleness(), None);
    let last = world.node.view().last_log;
    let refused = world.node.propose_as_leader(revoke()).await;
    assert!(
        matches!(refused, Err(ProposeError::OlderCopy { node: 500 })),
        "{refused:?}"
    );
    assert_eq!(world.node.view().last_log, last);
    assert!(!world.is_ended() && world.node.control().get().poison.is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_its_epoch_a_node_believes_of_a_voter_of_its_own_and_of_nobody_else() {
    let world = World::new("later").await;
    let open = || matches!(world.node.start_gate(), Gate::Open { .. });
    until("the gate to open", open).await;
    let id = world.register("127.0.0.1:1").await;
    let said = |ours| TurnedAway::OtherEpoch { ours, theirs: 1 };
    let shared = &world.node.shared;
    // Who has only registered, who is in no log, and a voter under another's certificate.
    shared.accused(id, &world.hello(id).name, &said(2));
    shared.accused(500, "later", &said(2));
    shared.accused(1, "later", &said(2));
    // An earlier epoch, or this one, says nothing.
    shared.accused(1, "n1", &said(0));
    shared.accused(1, "n1", &said(1));
    assert!(open());
    shared.accused(1, "n1", &said(2));
    assert_eq!(world.node.start_gate(), Gate::EpochEnded { epoch: 2 });
    assert_eq!(world.node.staleness(), None);
    let revoke = Op::AddRevocations(AddRevocations { revocations: vec![] });
    let refused = world.node.propose_as_leader(revoke).await;
    assert!(
        matches!(refused, Err(ProposeError::EpochEnded { epoch: 2 })),
        "{refused:?}"
    );
    assert!(!world.is_ended() && world.node.control().get().poison.is_none());
}

/// What it is sent anyway it may ask for, and it may speak for itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_no_member_yet_acts_in_nobodys_name() {
    let world = World::new("joiner").await;
    let id = world.register("127.0.0.1:1").await;
    let hello = world.hello(id);
    // This node makes it a learner by itself, which is an entry too.
    until("a learner", || {
        let view = world.node.view();
        view.peers.contains_key(&id) && view.applied == view.last_log
    })
    .await;
    let term = world.node.view().term;
    let last = world.node.view().last_log;
    for (asked, request) in [
        ("key.rotate", rotate(id, 1)),
        ("stand", Request::Stand),
        // In its own name, which would make it the leader of whoever believes it.
        ("vote", vote(id)),
        ("append_entries", append(id)),
        ("snapshot", snapshot(id)),
        ("snapshot", Request::SnapshotEnd),
    ] {
        world.hung_up(&hello, request).await;
        world.assert_audited(id, asked, "it is no member yet");
    }
    assert_eq!((world.node.view().term, world.node.view().last_log), (term, last));
    let answer = world.ask(&hello, Request::ReadIndex).await.unwrap();
    assert!(matches!(answer, Response::ReadIndex(Ok(_))));
    let answer = world.ask(&hello, Request::Vouch(1)).await.unwrap();
    assert!(matches!(answer, Response::Vouch(Some(known)) if known.name == "n1"));
    // Whom its files revoke counts once it is a member.
    let revoke = Op::AddRevocations(AddRevocations { revocations: vec![] });
    let refused = world.own(&hello, revoke).await;
    assert!(matches!(refused, Refusal::Forbidden(_)), "{refused}");
    world.assert_audited(id, "add_revocations", "may not be sent by a node");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_speaks_for_itself_only() {
    let world = World::new("member").await;
    let id = world.admit().await;
    let hello = world.hello(id);
    // Somebody else's call, and a call that travels on.
    for request in [rotate(1, 1), rotate(id, 0), rotate(id, 2)] {
        world.hung_up(&hello, request).await;
    }
    world.assert_audited(id, "key.rotate", "the caller spoke to raft id 1, 1 hops away");
    world.assert_audited(id, "key.rotate", "2 hops away");
    // Its own callers' are looked at by the leader, which has nobody to do it yet.
    match world.ask(&hello, rotate(id, 1)).await.unwrap() {
        Response::Admin(Err(error)) => assert_eq!(error.code, ErrorCode::NotReady),
        _ => panic!("another answer"),
    }
    let other_filling = Hello {
        incarnation: Incarnation([9; 16]),
        ..hello.clone()
    };
    let reason = world.turned_away(&other_filling).await;
    assert_eq!(reason, TurnedAway::OtherIncarnation { raft_id: id });
    // Nobody answers at its address: it is a member and does not count for the majority.
    assert_eq!(world.voters(), BTreeSet::from([1]));
}

/// Its word is taken, whomever it names; so the leader says whose word it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_member_revokes_is_in_the_audit_as_its_own_act_and_once() {
    let world = World::new("revoker").await;
    let id = world.admit().await;
    let key = RevocationKey::CommonName("admin".to_owned());
    let revoke = |reason: &str| {
        Op::AddRevocations(AddRevocations {
            revocations: vec![(key.clone(), reason.to_owned())],
        })
    };
    for reason in ["\u{1b}[2Jlost", "again"] {
        let nonce = crate::clock::random_id();
        let own = Request::Own {
            nonce,
            op: Box::new(revoke(reason)),
        };
        let answer = world.ask(&world.hello(id), own).await.unwrap();
        assert!(matches!(answer, Response::Own(Ok(_))));
    }
    let published = world.node.published();
    let stored = published.state.revocations().get(&key).unwrap();
    assert_eq!(stored.reason, "\u{fffd}[2Jlost");
    let lines = world.audited();
    let revoked: Vec<_> = lines
        .iter()
        .filter(|line| line["action"] == "revocations.add")
        .collect();
    assert_eq!(revoked.len(), 1, "{lines:#?}");
    let line = revoked[0];
    for (field, value) in [("target", "audit"), ("outcome", "done"), ("resource", "cn admin")] {
        assert_eq!(line[field], value, "{field}");
    }
    assert_eq!(line["raft_id"], id);
    assert_eq!(line["added"], 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rafts_messages_speak_for_their_sender_only() {
    let world = World::new("ventriloquist").await;
    let id = world.admit().await;
    let hello = world.hello(id);
    let term = world.node.view().term;
    for (asked, request) in [
        ("vote", vote(1)),
        ("append_entries", append(1)),
        ("snapshot", snapshot(1)),
    ] {
        world.hung_up(&hello, request).await;
        world.assert_audited(id, asked, "the message speaks for raft id 1");
    }
    // In its own name, it would end the numbers that terms have.
    for (asked, request) in [
        ("vote", vote(id)),
        ("append_entries", append(id)),
        ("snapshot", snapshot(id)),
    ] {
        world.hung_up(&hello, request).await;
        world.assert_audited(id, asked, "is absurd");
    }
    assert_eq!(world.node.view().term, term);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_forged_is_refused_and_audited() {
    let world = World::new("forger").await;
    let id = world.admit().await;
    let hello = world.hello(id);
    let transport = TransportId([7; 16]);
    let grant = |blob: &[u8]| Grant {
        epoch: 1,
        blob: blob.to_vec(),
    };
    // The key of the one whom the grants are forged for.
    let own_key = RegisterSlotKey {
        node: 1,
        slot: slot(),
        key: key_signed_by(&world, "n1"),
    };
    world.done(Op::RegisterSlotKey(own_key)).await;
    let generation = AddTransportKey {
        slot: slot(),
        id: transport,
        expected_generation: 0,
        mode: TransportMode::Standard,
        check: vec![1; 40],
        grants: BTreeMap::from([(Grantee::Node(1), grant(b"sealed"))]),
    };
    world.done(Op::AddTransportKey(generation)).await;

    let ack = AckVersions {
        node: 1,
        versions: vec![],
    };
    let refused = world.own(&hello, Op::AckVersions(ack)).await;
    assert_eq!(refused, Refusal::from(Forbidden::NotItself { node: 1 }));
    world.assert_audited(id, "ack_versions", "only node 1 may say this of itself");

    let lease = LeaseInvocations {
        node: 1,
        boot: Boot([1; 16]),
        claims: vec![],
    };
    let refused = world.own(&hello, Op::LeaseInvocations(lease)).await;
    assert_eq!(refused, Refusal::from(Forbidden::NotItself { node: 1 }));
    world.assert_audited(id, "lease_invocations", "only node 1 may say this of itself");

    for (grantee, reason) in [
        (Grantee::Node(1), "only by a node that was granted it"),
        (Grantee::Recovery("off-line".into()), "only to nodes"),
    ] {
        let forged = GrantTransportKey {
            slot: slot(),
            id: transport,
            grantee,
            grant: grant(b"forged"),
        };
        let refused = world.own(&hello, Op::GrantTransportKey(forged)).await;
        assert!(matches!(refused, Refusal::Forbidden(_)), "{refused}");
        world.assert_audited(id, "grant_transport_key", reason);
    }

    let context = CreateContext {
        name: ContextName::new("c").unwrap(),
        uid: ContextUid([1; 16]),
        slot: slot(),
        binding: BindingMode::Shared,
        policy: RotationPolicy::default(),
    };
    let refused = world.own(&hello, Op::CreateContext(context)).await;
    assert!(matches!(refused, Refusal::Forbidden(_)), "{refused}");
    world.assert_audited(id, "create_context", "may not be sent by a node");

    // A slot key under another node's certificate.
    let substituted = RegisterSlotKey {
        node: id,
        slot: slot(),
        key: key_signed_by(&world, "n1"),
    };
    let (nonce, op) = ([4; 16], Box::new(Op::RegisterSlotKey(substituted)));
    world.hung_up(&hello, Request::Own { nonce, op }).await;
    world.assert_audited(id, "register_slot_key", "signed with another key");

    let published = world.node.published();
    assert!(published.state.contexts().is_empty());
    assert!(published.state.nodes().get(&id).unwrap().slot_keys.is_empty());
    let slot = published.state.slots().get(&slot()).unwrap();
    assert_eq!(slot.transport[0].grants.len(), 1);
}

fn key_signed_by(world: &World, name: &str) -> SlotKey {
    SlotKey {
        spki: vec![1],
        epoch: 1,
        signature: vec![2],
        signer_chain: vec![tls(world.dir.path(), name).certificate.to_vec()],
    }
}

fn accusations(world: &World) -> [TurnedAway; 2] {
    let incarnation = world.node.control().get().incarnation;
    let rolled_back = TurnedAway::RolledBack {
        raft_id: 1,
        incarnation,
        log_index: 1,
        seen_index: FAR,
    };
    let removed = TurnedAway::Removed {
        raft_id: 1,
        incarnation,
    };
    [rolled_back, removed]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_that_is_no_member_yet_ends_nobody() {
    let world = World::new("accuser").await;
    let [rolled_back, removed] = accusations(&world);
    // Dialled, because it is a learner, it answers that the leader itself has to go.
    let (address, answered) = world.refusing(removed.clone()).await;
    let id = world.register(&address).await;
    until("the leader to dial it", || answered.load(Ordering::SeqCst) >= 3).await;
    // And it says so by itself.
    for (asked, request) in [
        ("go_away", Request::GoAway(removed)),
        ("go_away", Request::GoAway(rolled_back.clone())),
        ("refused", Request::Refused(rolled_back)),
    ] {
        world.hung_up(&world.hello(id), request).await;
        world.assert_audited(id, asked, "it is no member yet");
    }
    assert!(!world.is_ended());
    assert!(world.node.control().get().poison.is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_only_other_member_is_believed() {
    let world = World::new("witness").await;
    let id = world.admit().await;
    let [_, removed] = accusations(&world);
    world.hung_up(&world.hello(id), Request::GoAway(removed)).await;
    until("the node to end", || world.is_ended()).await;
    assert_eq!(world.node.control().get().poison, Some(Poison::Removed));
}

/// It has requests in hand; a process that sees to its end is not killed under them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_node_is_ended_by_whoever_waits_for_its_removal() {
    let world = World::new("orderly").await;
    let removal = world.node.removed();
    let id = world.admit().await;
    let [_, removed] = accusations(&world);
    world.hung_up(&world.hello(id), Request::GoAway(removed)).await;
    until("word of its removal", || removal.borrow().is_some()).await;
    assert!(!world.is_ended());
    assert_eq!(world.node.control().get().poison, Some(Poison::Removed));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_join_that_is_refused_does_not_make_the_log_grow() {
    let world = World::new("guesser").await;
    let last = || world.node.view().last_log;
    let mut connection = world.greet(&world.hello(0)).await.unwrap();
    let before = last();
    let (mut refused, mut put_off) = (0, 0);
    for number in 0..150 {
        let guess = Request::Join(Box::new(JoinDetails {
            number,
            secret: [9; 32],
            api_address: "127.0.0.1:1".into(),
            cluster_address: "127.0.0.1:1".into(),
            slots: vec![],
            trk_id: [5; 8],
        }));
        match connection.call(&guess, WITHIN).await.unwrap() {
            Response::Join(Err(JoinDeclined::Refused(error))) => {
                assert_eq!(error.code, ErrorCode::AccessDenied, "{error}");
                refused += 1;
            }
            Response::Join(Err(JoinDeclined::TryAgain(_))) => put_off += 1,
            _ => panic!("another answer"),
        }
    }
    assert_eq!(last(), before);
    world.assert_audited(0, "join", "join token");
    // One node may not guess for as long as it likes.
    assert!(
        refused >= 1 && put_off >= 1,
        "{refused} refused, {put_off} put off"
    );
}
