//! What nodes say to each other: length-prefixed frames over TLS, one request and one answer at a time.
//!
//! ```text
//! u32 big endian length, then one bincode value (see `raft_store::codec`)
//! ```
//! The first frame each way is a [`Hello`]; nothing else is read before both were accepted.

use std::collections::BTreeSet;
use std::time::Duration;

use raft_store::command::{Done, Op};
use raft_store::names::{Boot, ClusterId, Incarnation, RaftId};
use raft_store::{SnapshotMeta, TypeConfig, Vote, codec};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::ProposeError;
use super::join::{JoinAccepted, JoinDetails};
use crate::admin::call::{AdminCall, CallError, Executed};

/// Version of this protocol.
pub(super) const PROTOCOL: u16 = 1;
/// Largest frame. Entries are sent in frames of at most 768 KiB.
pub(super) const MAX_FRAME: usize = 1 << 20;
/// Largest first frame: it is read before the peer is known to be a member.
pub(super) const MAX_HELLO: usize = 4096;
/// Bytes of a snapshot in one frame.
pub(super) const SNAPSHOT_CHUNK: usize = 256 << 10;

/// Who a node says it is; checked against its certificate and the state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) protocol: u16,
    /// Zero when the node belongs to no cluster yet.
    pub(super) cluster_id: ClusterId,
    pub(super) epoch: u64,
    pub(super) name: String,
    /// Zero when it has none yet.
    pub(super) raft_id: RaftId,
    pub(super) incarnation: Incarnation,
    /// Which run of its process this is.
    pub(super) boot: Boot,
    /// Where its durable log ended when this run began: a rolled back directory shows here.
    pub(super) log_index: u64,
}

/// Why a peer is turned away. Said instead of the answering [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub(super) enum TurnedAway {
    #[error("the peer speaks protocol {theirs}, this node {ours}")]
    Protocol { ours: u16, theirs: u16 },
    #[error("the peer belongs to another cluster")]
    OtherCluster,
    #[error(
        "the peer is of epoch {theirs}, this node of epoch {ours}: whichever is of the lower one has no part in the cluster \
         any more, and has to be emptied and joined again"
    )]
    OtherEpoch { ours: u64, theirs: u64 },
    #[error("the peer's certificate is for {certificate}, it says it is {said}")]
    OtherName { certificate: String, said: String },
    #[error("raft id {0} is not a member of this cluster")]
    Unknown(RaftId),
    #[error("raft id {raft_id} belongs to another filling of that node; a wiped node has to join anew")]
    OtherIncarnation { raft_id: RaftId },
    #[error("raft id {raft_id} was removed from this cluster")]
    Removed {
        raft_id: RaftId,
        incarnation: Incarnation,
    },
    #[error(
        "the data directory of raft id {raft_id} ends at index {log_index}, the cluster has seen it at {seen_index}: \
         an older copy"
    )]
    RolledBack {
        raft_id: RaftId,
        incarnation: Incarnation,
        log_index: u64,
        seen_index: u64,
    },
    #[error("this node belongs to no cluster")]
    Uninitialised,
}

/// The answer to a [`Hello`].
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum HelloReply {
    Welcome(Hello),
    Away(TurnedAway),
}

/// A request between nodes.
#[derive(Serialize, Deserialize)]
pub(super) enum Request {
    Append(AppendFrame),
    Vote(openraft::raft::VoteRequest<RaftId>),
    SnapshotBegin {
        vote: Vote,
        meta: SnapshotMeta,
    },
    SnapshotChunk(Vec<u8>),
    SnapshotEnd,
    /// An administrator's call for the leader.
    Admin(Box<AdminCall>),
    /// A member's own operation for the leader.
    Own {
        nonce: [u8; 16],
        op: Box<Op>,
    },
    /// The leader's commit index, confirmed by a quorum.
    ReadIndex,
    /// Whether a raft id that the asking node does not know yet is a member's.
    Vouch(RaftId),
    /// A node without identity asks to be registered.
    Join(Box<JoinDetails>),
    /// The leader, about to stop, asks for an election.
    Stand,
    /// This node was removed: a member that has applied its tombstone says so, see [`TurnedAway`].
    GoAway(TurnedAway),
    /// This node was dialled and is refused for any other reason.
    Refused(TurnedAway),
}

impl Request {
    /// What is asked for, in the audit.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Request::Append(_) => "append_entries",
            Request::Vote(_) => "vote",
            Request::SnapshotBegin { .. } | Request::SnapshotChunk(_) | Request::SnapshotEnd => "snapshot",
            Request::Admin(call) => call.body.act().name(),
            Request::Own { op, .. } => op.name(),
            Request::ReadIndex => "read_index",
            Request::Vouch(_) => "vouch",
            Request::Join(_) => "join",
            Request::Stand => "stand",
            Request::GoAway(_) => "go_away",
            Request::Refused(_) => "refused",
        }
    }

    /// The vote in Raft's own message, which says whom it speaks for; `None` for every other request.
    pub(super) fn vote(&self) -> Option<&Vote> {
        match self {
            Request::Append(frame) => Some(&frame.rpc.vote),
            Request::Vote(rpc) => Some(&rpc.vote),
            Request::SnapshotBegin { vote, .. } => Some(vote),
            _ => None,
        }
    }
}

/// openraft's AppendEntries with what followers need to know how fresh they are.
#[derive(Serialize, Deserialize)]
pub(super) struct AppendFrame {
    pub(super) rpc: openraft::raft::AppendEntriesRequest<TypeConfig>,
    /// Milliseconds since the leader last heard from a quorum; `None`: never in this term.
    pub(super) quorum_ack_age_ms: Option<u64>,
    /// Members that the leader has not heard from lately.
    pub(super) silent: BTreeSet<RaftId>,
}

/// What a frame says besides Raft's own message.
pub(super) struct FrameSaid {
    pub(super) quorum_ack_age: Option<Duration>,
    pub(super) silent: BTreeSet<RaftId>,
    /// The leader's commit index.
    pub(super) commit: u64,
}

/// The answer to a [`Request`].
#[derive(Serialize, Deserialize)]
pub(super) enum Response {
    Append(openraft::raft::AppendEntriesResponse<RaftId>),
    Vote(openraft::raft::VoteResponse<RaftId>),
    Snapshot(openraft::raft::SnapshotResponse<RaftId>),
    /// Done; or go on sending.
    More,
    Admin(Result<Answered, CallError>),
    Own(Result<Done, Declined>),
    ReadIndex(Result<u64, Declined>),
    /// Whose it is, if it is one.
    Vouch(Option<Vouched>),
    Join(Result<JoinAccepted, JoinDeclined>),
    /// Raft on the peer has stopped or is not running.
    Failed(String),
}

/// What an administrator's call has come to.
#[derive(Serialize, Deserialize)]
pub(super) struct Answered {
    /// The answer, JSON.
    pub(super) json: String,
    /// See [`Executed::index`].
    pub(super) index: u64,
}

impl From<Executed> for Answered {
    fn from(executed: Executed) -> Self {
        Self {
            json: executed.answer.to_string(),
            index: executed.index,
        }
    }
}

/// A node that is registered, as the state of the answering node has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Vouched {
    pub(super) name: String,
    pub(super) incarnation: Incarnation,
    /// Whether it is a member, not only about to join.
    pub(super) member: bool,
}

/// A [`ProposeError`] as it travels.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Declined {
    NotLeader(Option<RaftId>),
    NoQuorum,
    Unknown,
    Refused(raft_store::command::Refusal),
    TooLarge(u64),
    Busy,
    Draining,
    Uninitialised,
    NoSpace,
    Fatal(String),
    OlderCopy(RaftId),
    NotUnderstood {
        operation: String,
        level: u32,
        node: String,
        understands: u32,
    },
    EpochEnded(u64),
}

/// Why a join was declined.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum JoinDeclined {
    /// Ask the leader: its cluster address, if known.
    NotLeader(Option<String>),
    /// No answer yet; ask again.
    TryAgain(String),
    /// It makes no sense to ask again.
    Refused(CallError),
}

impl From<ProposeError> for Declined {
    fn from(error: ProposeError) -> Self {
        match error {
            ProposeError::NotLeader { leader } => Declined::NotLeader(leader),
            ProposeError::NoQuorum => Declined::NoQuorum,
            ProposeError::Unknown => Declined::Unknown,
            ProposeError::Refused(refusal) => Declined::Refused(refusal),
            ProposeError::TooLarge { bytes } => Declined::TooLarge(bytes as u64),
            ProposeError::Busy => Declined::Busy,
            ProposeError::Draining => Declined::Draining,
            ProposeError::Uninitialised => Declined::Uninitialised,
            ProposeError::NoSpace => Declined::NoSpace,
            ProposeError::Fatal(why) => Declined::Fatal(why),
            ProposeError::OlderCopy { node } => Declined::OlderCopy(node),
            ProposeError::EpochEnded { epoch } => Declined::EpochEnded(epoch),
            ProposeError::NotUnderstood {
                operation,
                level,
                node,
                understands,
            } => Declined::NotUnderstood {
                operation,
                level,
                node,
                understands,
            },
        }
    }
}

impl From<Declined> for ProposeError {
    fn from(declined: Declined) -> Self {
        match declined {
            Declined::NotLeader(leader) => ProposeError::NotLeader { leader },
            Declined::NoQuorum => ProposeError::NoQuorum,
            Declined::Unknown => ProposeError::Unknown,
            Declined::Refused(refusal) => ProposeError::Refused(refusal),
            Declined::TooLarge(bytes) => ProposeError::TooLarge {
                bytes: bytes as usize,
            },
            Declined::Busy => ProposeError::Busy,
            Declined::Draining => ProposeError::Draining,
            Declined::Uninitialised => ProposeError::Uninitialised,
            Declined::NoSpace => ProposeError::NoSpace,
            Declined::Fatal(why) => ProposeError::Fatal(why),
            Declined::OlderCopy(node) => ProposeError::OlderCopy { node },
            Declined::EpochEnded(epoch) => ProposeError::EpochEnded { epoch },
            Declined::NotUnderstood {
                operation,
                level,
                node,
                understands,
            } => ProposeError::NotUnderstood {
                operation,
                level,
                node,
                understands,
            },
        }
    }
}

fn invalid(why: impl ToString) -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidData, why.to_string())
}

/// Writes one value.
pub(super) async fn send<T: Serialize>(
    out: &mut (impl AsyncWrite + Unpin),
    value: &T,
) -> std::io::Result<()> {
    let body = codec::encode(value).map_err(invalid)?;
    if body.len() > MAX_FRAME {
        return Err(invalid(format!(
            "a frame of {} bytes is larger than {MAX_FRAME}",
            body.len()
        )));
    }
    let mut frame = Vec::with_capacity(body.len() + 4);
    frame.extend_from_slice(&(body.len() as u32).to_be_bytes());
    frame.extend_from_slice(&body);
    out.write_all(&frame).await?;
    out.flush().await
}

/// Reads one value of at most `limit` bytes; the length is checked before anything is allocated.
pub(super) async fn receive<T: DeserializeOwned>(
    input: &mut (impl AsyncRead + Unpin),
    limit: usize,
) -> std::io::Result<T> {
    let length = input.read_u32().await? as usize;
    if length > limit {
        return Err(invalid(format!(
            "a frame of {length} bytes is larger than {limit}"
        )));
    }
    let mut body = vec![0; length];
    input.read_exact(&mut body).await?;
    codec::decode(&body).map_err(invalid)
}
