//! Consensus: the only module that knows openraft. Runs Raft, the cluster listener and the store on one
//! thread of their own, so that requests can never starve heartbeats, and offers the rest of the node a
//! [`Consensus`] handle. Nothing on the data plane's hot path awaits anything here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use raft_store::command::Refusal;
use raft_store::names::{Boot, NodeName, RaftId};
use raft_store::storage::{ControlHandle, Published};
use tokio::sync::watch;

mod accusations;
mod admission;
mod ask;
mod autopilot;
mod budget;
mod connection;
mod elections;
#[cfg(test)]
mod forgery_tests;
mod forward;
mod found;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod gate;
mod greetings;
mod handover;
mod handshake;
mod held_back;
mod join;
mod leaving;
mod levels;
#[cfg(test)]
mod lifecycle_tests;
mod link;
mod loading;
mod membership;
mod network;
mod pool;
mod propose;
pub mod quorum;
mod refusals;
mod register;
mod repeat;
mod revoking;
mod server;
mod shared;
#[cfg(test)]
mod simulation;
mod start;
#[cfg(test)]
mod test_world;
mod vouching;
mod wire;

pub use autopilot::Autopilot;
pub use found::{FoundSeed, Founded};
pub use gate::Gate;
pub use held_back::{HeldBack, held_back_by};
pub use join::{JoinRequest, Joined, join_token_text};
pub(crate) use propose::SETTLED_AFTER;
pub use start::{ConsensusOptions, Prepared, RaftTiming, StartError, prepare, start};

use crate::admin::call::{AdminCall, CallError};
use crate::clock;
use crate::rotation::clocks::Doubt;
use shared::Shared;

/// A boxed future, as traits that are used as objects return them.
pub type BoxFuture<'a, T> = std::pin::Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What the leader does for administrators. Implemented outside consensus, because it needs tokens.
pub trait LeaderCalls: Send + Sync {
    /// Authorises the call with this node's own policy, and carries it out.
    fn execute(&self, call: AdminCall) -> BoxFuture<'_, Result<serde_json::Value, CallError>>;

    /// Whether this leader can judge what has expired by its wall clock, as join tokens do.
    ///
    /// # Errors
    /// Why not.
    fn judge_clock(&self) -> Result<(), Doubt>;
}

/// A node's part in Raft.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Serialises changes.
    Leader,
    /// Votes and follows.
    Follower,
    /// Asks for votes.
    Candidate,
    /// Follows, does not vote.
    Learner,
    /// Belongs to no cluster yet.
    Uninitialised,
}

impl Role {
    /// The role's name in API and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Leader => "leader",
            Role::Follower => "follower",
            Role::Candidate => "candidate",
            Role::Learner => "learner",
            Role::Uninitialised => "uninitialised",
        }
    }
}

/// What the leader knows of a peer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Peer {
    /// The last log index it has.
    pub matched: Option<u64>,
    /// Since its last answer; `None` if it never answered this leader.
    pub silent_for: Option<Duration>,
}

/// Where this node stands, at one moment.
#[derive(Clone, Debug)]
pub struct View {
    /// Its part.
    pub role: Role,
    /// The term.
    pub term: u64,
    /// The leader, as far as this node knows.
    pub leader: Option<RaftId>,
    /// Last index of its log.
    pub last_log: u64,
    /// Highest index known committed.
    pub committed: u64,
    /// Last index applied.
    pub applied: u64,
    /// Last index its snapshot covers.
    pub snapshot: u64,
    /// Leader only: age of the last contact with a quorum.
    pub quorum_ack_age: Option<Duration>,
    /// Age of the newest quorum-backed contact that counts; `None`: none since the start.
    pub staleness: Option<Duration>,
    /// See [`Gate`].
    pub start_gate: Gate,
    /// Members that the leader has not heard from for longer than readiness allows: on the leader its own
    /// finding, elsewhere as its last frame said.
    pub silent: BTreeSet<RaftId>,
    /// Leader only: whom a quorum can rest on, see [`Consensus::heard`].
    pub heard: BTreeSet<RaftId>,
    /// Leader only.
    pub peers: BTreeMap<RaftId, Peer>,
    /// Proposals that openraft has not answered.
    pub proposals_pending: usize,
    /// Proposals that timed out since the start.
    pub proposals_timed_out: u64,
    /// Changes of leader seen since the start.
    pub leader_changes: u64,
    /// Why Raft has stopped, if it has.
    pub stopped: Option<String>,
}

/// Why a proposal has no answer, or not the wished one.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ProposeError {
    /// Another node leads.
    #[error("this node is not the leader")]
    NotLeader {
        /// Who, if known.
        leader: Option<RaftId>,
    },
    /// The leader has not heard from a majority; nothing was appended.
    #[error("no quorum: the leader has not heard from a majority of voters lately; nothing was changed")]
    NoQuorum,
    /// No answer in time: it may or may not have been done.
    #[error("the outcome is unknown; ask again with the same Idempotency-Key")]
    Unknown,
    /// The state refuses it.
    #[error("{0}")]
    Refused(Refusal),
    /// The command is too large.
    #[error(
        "the change encodes to {bytes} bytes; at most {} fit",
        raft_store::codec::MAX_COMMAND_BYTES
    )]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// Too many proposals are in flight.
    #[error("too many changes are in flight; try again")]
    Busy,
    /// The node is stopping.
    #[error("this node is shutting down")]
    Draining,
    /// The node belongs to no cluster.
    #[error("this node belongs to no cluster yet: run `hsmctl cluster init` or `hsmctl cluster join`")]
    Uninitialised,
    /// The disk is nearly full.
    #[error("the data directory's file system is below its reserve; free some space")]
    NoSpace,
    /// This node leads itself with a log that is older than its cluster's; see [`Gate::OlderCopy`].
    #[error(
        "another node of this cluster has raft id {node}, which this node's log does not know: this data directory \
         is an older copy; stop this node, and never put a data directory back"
    )]
    OlderCopy {
        /// The node that its log does not know.
        node: RaftId,
    },
    /// The quorum was recovered without this node; see [`Gate::EpochEnded`].
    #[error(
        "the epoch of this node has ended: its cluster goes on in epoch {epoch}, in which this node has no part; stop it, \
         empty its data directory, and join it again (docs/operations.md, \"When the quorum is gone for good\")"
    )]
    EpochEnded {
        /// The epoch of the cluster.
        epoch: u64,
    },
    /// A member runs a release that does not know this kind of change.
    #[error(
        "{operation} needs feature level {level}, and {node} understands {understands}: upgrade that node first; nothing \
         was changed"
    )]
    NotUnderstood {
        /// The kind of change.
        operation: String,
        /// What it needs.
        level: u32,
        /// A member that is below that.
        node: String,
        /// What that one has reported.
        understands: u32,
    },
    /// Raft or the store has stopped.
    #[error("consensus has stopped: {0}")]
    Fatal(String),
}

/// The handle to consensus. Cheap to clone; usable from any runtime.
#[derive(Clone)]
pub struct Consensus {
    shared: Arc<Shared>,
}

impl Consensus {
    /// State, applied id and membership: one load, no lock.
    pub fn published(&self) -> Arc<Published> {
        self.shared.published.load_full()
    }

    /// The applied index, for waiting.
    pub fn applied(&self) -> watch::Receiver<u64> {
        self.shared.applied.clone()
    }

    /// Identity and figures of the store.
    pub fn control(&self) -> ControlHandle {
        self.shared.control.clone()
    }

    /// This node's configured name.
    pub fn node_name(&self) -> &NodeName {
        &self.shared.options.node_name
    }

    /// This node's raft id; `None` until it founded or joined a cluster.
    pub fn raft_id(&self) -> Option<RaftId> {
        self.shared.raft.get().map(|raft| raft.id)
    }

    /// This run of the process.
    pub fn boot(&self) -> Boot {
        self.shared.run.boot
    }

    /// Whether this node leads, as far as it knows.
    pub fn is_leader(&self) -> bool {
        self.shared.is_leader()
    }

    /// Age of the newest quorum-backed contact; `None`: none since the start. Two atomic loads.
    pub fn staleness(&self) -> Option<Duration> {
        self.shared.staleness(clock::now())
    }

    /// The nodes that have answered this leader within a few heartbeats and keep up with it, and itself. Nobody elsewhere.
    pub fn heard(&self) -> BTreeSet<RaftId> {
        if !self.is_leader() {
            return BTreeSet::new();
        }
        self.shared.heard()
    }

    /// Why this node was removed from its cluster, once it was. It has to stop then; whoever asks here sees to that.
    pub fn removed(&self) -> watch::Receiver<Option<String>> {
        self.shared.removed.subscribe()
    }

    /// Where the start gate stands.
    pub fn start_gate(&self) -> Gate {
        self.shared.gate.stand()
    }

    /// Where this node stands.
    pub fn view(&self) -> View {
        self.shared.view(clock::now())
    }

    /// Registers what the leader does for administrators. Once.
    pub fn serve_leader_calls(&self, calls: Arc<dyn LeaderCalls>) {
        let _ = self.shared.calls.set(calls);
    }
}
