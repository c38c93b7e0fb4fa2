//! See [`crate::fuzzing`].
#![allow(clippy::unwrap_used, clippy::expect_used)] // They are tests.

use std::collections::BTreeSet;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
};
use openraft::{CommittedLeaderId, EntryPayload};
use raft_store::command::{AdminOrigin, AdmitNode, Done, Missing, Op, Refusal, RequestId};
use raft_store::names::{Boot, ClusterId, ContextName, Incarnation, SlotName};
use raft_store::{Entry, LogId, SnapshotMeta, Vote};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::join::{JoinAccepted, JoinDetails, join_token_text, parse_token};
use super::wire::{
    Answered, AppendFrame, Declined, Hello, HelloReply, JoinDeclined, MAX_FRAME, MAX_HELLO, PROTOCOL,
    Request, Response, TurnedAway, Vouched, receive, send,
};
use crate::admin::call::{AdminBody, AdminCall, CallError};

/// Frames between nodes; the first byte says which. Of a frame that is too long nothing is read but its length; one that
/// is accepted is read to its end and no further, and has one form.
pub fn wire(data: &[u8]) -> bool {
    let Some((kind, frame)) = data.split_first() else {
        return false;
    };
    match kind {
        0 => has_one_form::<Hello>(frame, MAX_HELLO),
        1 => has_one_form::<HelloReply>(frame, MAX_HELLO),
        2 => has_one_form::<Request>(frame, MAX_FRAME),
        3 => has_one_form::<Response>(frame, MAX_FRAME),
        _ => false,
    }
}

fn has_one_form<T: Serialize + DeserializeOwned>(frame: &[u8], limit: usize) -> bool {
    let mut rest = frame;
    let read = now(receive::<T>(&mut rest, limit));
    let taken = frame.len() - rest.len();
    let Some((length, _)) = frame.split_first_chunk::<4>() else {
        assert!(read.is_err());
        return false;
    };
    let length = u32::from_be_bytes(*length) as usize;
    if length > limit {
        assert!(read.is_err() && taken == 4);
    }
    let Ok(value) = read else { return false };
    assert_eq!(taken, 4 + length);
    let written = sent(&value);
    let again: T = now(receive(&mut written.as_slice(), limit)).expect("what was written is read");
    assert_eq!(sent(&again), written);
    true
}

fn sent<T: Serialize>(value: &T) -> Vec<u8> {
    let mut out = Vec::new();
    now(send(&mut out, value)).unwrap();
    out
}

/// What reads and writes memory only never waits.
fn now<F: Future>(future: F) -> F::Output {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("bytes in memory are there"),
    }
}

/// A join token's text.
pub fn join_token(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else {
        return false;
    };
    let Some((number, secret)) = parse_token(text) else {
        return false;
    };
    assert_eq!(
        parse_token(&join_token_text(number, &secret)),
        Some((number, secret))
    );
    assert_eq!(parse_token(&format!("{text}\n")), Some((number, secret)));
    true
}

fn hello() -> Hello {
    Hello {
        protocol: PROTOCOL,
        cluster_id: ClusterId([1; 16]),
        epoch: 1,
        name: "hsm-node-1".into(),
        raft_id: 1,
        incarnation: Incarnation([2; 16]),
        boot: Boot([3; 16]),
        log_index: 7,
    }
}

fn vote() -> Vote {
    Vote::new_committed(2, 1)
}

fn log_id() -> LogId {
    LogId::new(CommittedLeaderId::new(2, 1), 7)
}

fn call() -> AdminCall {
    AdminCall {
        id: RequestId::Client {
            principal: [4; 32],
            operation: "rotate exchange-key".into(),
            key: "k".into(),
        },
        body_hash: [5; 32],
        origin: AdminOrigin {
            fingerprint: [6; 32],
            cn: "ann".into(),
            ou: "Admin".into(),
            serial: "0b".into(),
            issuer: "CN=ca".into(),
            via_node: 2,
            evidence: None,
        },
        spki_sha256: [7; 32],
        authorities: Vec::new(),
        source: "127.0.0.1:1".into(),
        request_id: "r".into(),
        trace_id: "t".into(),
        hop: 0,
        body: AdminBody::Rotate {
            context: ContextName::new("exchange-key").unwrap(),
        },
    }
}

fn requests() -> Vec<(&'static str, Request)> {
    let rpc = AppendEntriesRequest {
        vote: vote(),
        prev_log_id: Some(log_id()),
        entries: vec![Entry {
            log_id: log_id(),
            payload: EntryPayload::Blank,
        }],
        leader_commit: Some(log_id()),
    };
    let join = JoinDetails {
        number: 5,
        secret: [8; 32],
        api_address: "a:1".into(),
        cluster_address: "c:2".into(),
        slots: vec![SlotName::new("exchange").unwrap()],
        trk_id: [9; 8],
    };
    let append = AppendFrame {
        rpc,
        quorum_ack_age_ms: Some(3),
        silent: BTreeSet::from([2, 3]),
    };
    let ask = VoteRequest {
        vote: Vote::new(3, 2),
        last_log_id: Some(log_id()),
    };
    let begin = Request::SnapshotBegin {
        vote: vote(),
        meta: SnapshotMeta::default(),
    };
    let own = Request::Own {
        nonce: [1; 16],
        op: Box::new(Op::AdmitNode(AdmitNode { node: 9 })),
    };
    vec![
        ("append", Request::Append(append)),
        ("vote", Request::Vote(ask)),
        ("snapshot-begin", begin),
        ("snapshot-chunk", Request::SnapshotChunk(b"HSMSNAP1".to_vec())),
        ("snapshot-end", Request::SnapshotEnd),
        ("admin", Request::Admin(Box::new(call()))),
        ("own", own),
        ("read-index", Request::ReadIndex),
        ("vouch", Request::Vouch(4)),
        ("join", Request::Join(Box::new(join))),
        ("stand", Request::Stand),
        ("go-away", Request::GoAway(TurnedAway::OtherCluster)),
        ("refused", Request::Refused(TurnedAway::Uninitialised)),
    ]
}

fn responses() -> Vec<(&'static str, Response)> {
    let vouched = Vouched {
        name: "hsm-node-2".into(),
        incarnation: Incarnation([2; 16]),
        member: true,
    };
    let accepted = JoinAccepted {
        raft_id: 4,
        cluster_id: ClusterId([1; 16]),
        epoch: 1,
    };
    let refused = CallError::new(hsm_api::ErrorCode::NoQuorum, "d");
    let declined = Declined::Refused(Refusal::NotFound(Missing::Node(9)));
    let granted = VoteResponse {
        vote: vote(),
        vote_granted: true,
        last_log_id: Some(log_id()),
    };
    vec![
        ("append-done", Response::Append(AppendEntriesResponse::Success)),
        (
            "append-part",
            Response::Append(AppendEntriesResponse::PartialSuccess(Some(log_id()))),
        ),
        (
            "append-conflict",
            Response::Append(AppendEntriesResponse::Conflict),
        ),
        (
            "append-higher-vote",
            Response::Append(AppendEntriesResponse::HigherVote(vote())),
        ),
        (
            "snapshot-done",
            Response::Snapshot(SnapshotResponse { vote: vote() }),
        ),
        ("vote-granted", Response::Vote(granted)),
        ("more", Response::More),
        (
            "admin-done",
            Response::Admin(Ok(Answered {
                json: "{\"version\":2}".into(),
                index: 7,
            })),
        ),
        ("admin-refused", Response::Admin(Err(refused.clone()))),
        ("own-done", Response::Own(Ok(Done::Registered { raft_id: 3 }))),
        ("own-declined", Response::Own(Err(declined))),
        ("read-index-is", Response::ReadIndex(Ok(7))),
        (
            "not-leader",
            Response::ReadIndex(Err(Declined::NotLeader(Some(2)))),
        ),
        ("vouched", Response::Vouch(Some(vouched))),
        ("join-accepted", Response::Join(Ok(accepted))),
        (
            "join-refused",
            Response::Join(Err(JoinDeclined::Refused(refused))),
        ),
        (
            "join-not-leader",
            Response::Join(Err(JoinDeclined::NotLeader(Some("c:2".into())))),
        ),
        (
            "join-try-again",
            Response::Join(Err(JoinDeclined::TryAgain("d".into()))),
        ),
        ("failed", Response::Failed("stopped".into())),
    ]
}

/// Why a peer may be turned away, beside what other examples have.
fn turned_away() -> Vec<(&'static str, TurnedAway)> {
    let incarnation = Incarnation([2; 16]);
    let other_name = TurnedAway::OtherName {
        certificate: "a".into(),
        said: "b".into(),
    };
    vec![
        ("away-protocol", TurnedAway::Protocol { ours: 1, theirs: 2 }),
        ("away-other-cluster", TurnedAway::OtherCluster),
        ("away-other-epoch", TurnedAway::OtherEpoch { ours: 1, theirs: 2 }),
        ("away-other-name", other_name),
        ("away-unknown", TurnedAway::Unknown(3)),
        (
            "away-other-incarnation",
            TurnedAway::OtherIncarnation { raft_id: 3 },
        ),
        (
            "away-removed",
            TurnedAway::Removed {
                raft_id: 3,
                incarnation,
            },
        ),
        ("away-uninitialised", TurnedAway::Uninitialised),
    ]
}

/// Why a proposal may be declined, beside what other examples have.
fn declined() -> Vec<(&'static str, Declined)> {
    let not_understood = Declined::NotUnderstood {
        operation: "rekey_slot".into(),
        level: 5,
        node: "hsm-node-2".into(),
        understands: 4,
    };
    vec![
        ("declined-no-quorum", Declined::NoQuorum),
        ("declined-unknown", Declined::Unknown),
        ("declined-too-large", Declined::TooLarge(9)),
        ("declined-busy", Declined::Busy),
        ("declined-draining", Declined::Draining),
        ("declined-uninitialised", Declined::Uninitialised),
        ("declined-no-space", Declined::NoSpace),
        ("declined-fatal", Declined::Fatal("d".into())),
        ("declined-older-copy", Declined::OlderCopy(3)),
        ("declined-not-understood", not_understood),
    ]
}

/// Frames as nodes send them, for the corpus of [`wire`].
#[must_use]
pub fn wire_seeds() -> Vec<(&'static str, Vec<u8>)> {
    let older = TurnedAway::RolledBack {
        raft_id: 3,
        incarnation: Incarnation([2; 16]),
        log_index: 4,
        seen_index: 9,
    };
    let mut seeds = vec![
        ("hello", seed(0, &hello())),
        ("welcome", seed(1, &HelloReply::Welcome(hello()))),
        ("away", seed(1, &HelloReply::Away(older))),
    ];
    seeds.extend(requests().iter().map(|(name, request)| (*name, seed(2, request))));
    seeds.extend(
        responses()
            .iter()
            .map(|(name, response)| (*name, seed(3, response))),
    );
    seeds.extend(
        turned_away()
            .into_iter()
            .map(|(name, why)| (name, seed(1, &HelloReply::Away(why)))),
    );
    seeds.extend(
        declined()
            .into_iter()
            .map(|(name, why)| (name, seed(3, &Response::ReadIndex(Err(why))))),
    );
    seeds
}

fn seed<T: Serialize>(kind: u8, value: &T) -> Vec<u8> {
    [vec![kind], sent(value)].concat()
}
