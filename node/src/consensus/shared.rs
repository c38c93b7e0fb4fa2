//! What the consensus thread and its handles share: the running Raft, the newest metrics and frame, and
//! how fresh this node is. All reads are loads; nothing here waits.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use openraft::{Raft, RaftMetrics, ServerState};
use raft_store::names::{ClusterId, RaftId};
use raft_store::storage::{ControlHandle, LogStore, Published, StateMachine};
use raft_store::{MemberNode, TypeConfig};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};

use super::admission::Peers;
use super::budget::Budget;
use super::gate::StartGate;
use super::handshake::{self, Run};
use super::loading::Loading;
use super::pool::Pool;
use super::start::ConsensusOptions;
use super::wire::{FrameSaid, Hello};
use super::{LeaderCalls, Peer, Role, View};
use crate::clock;
use crate::seeded::bug;

pub(super) type Metrics = RaftMetrics<RaftId, MemberNode>;

/// A running Raft under its id.
pub(super) struct Running {
    pub(super) id: RaftId,
    pub(super) raft: Raft<TypeConfig>,
}

/// Metrics with the moment they were seen: openraft gives ages as of then.
pub(super) struct Sample {
    pub(super) at: Instant,
    pub(super) metrics: Metrics,
}

/// See the module.
pub(super) struct Shared {
    pub(super) options: ConsensusOptions,
    pub(super) published: Arc<ArcSwap<Published>>,
    pub(super) applied: watch::Receiver<u64>,
    pub(super) control: ControlHandle,
    pub(super) raft: OnceLock<Running>,
    pub(super) sample: ArcSwapOption<Sample>,
    /// This run of the process.
    pub(super) run: Run,
    pub(super) peers_seen: Peers,
    pub(super) gate: StartGate,
    /// Members that the leader has not heard from lately, as it last said.
    pub(super) silent: ArcSwap<BTreeSet<RaftId>>,
    /// Highest commit index seen, own or named by a leader.
    pub(super) committed: AtomicU64,
    pub(super) peers: ArcSwap<BTreeMap<RaftId, Instant>>,
    /// When this node last began to lead.
    pub(super) leads_since: ArcSwapOption<Instant>,
    pub(super) in_flight: Arc<Semaphore>,
    pub(super) timed_out: AtomicU64,
    pub(super) leader_changes: AtomicU64,
    /// This node is going to stop: it takes over from nobody. It serves until it is `draining`.
    pub(super) stopping: AtomicBool,
    /// Nothing is appended any more.
    pub(super) draining: AtomicBool,
    /// Who is being sent a snapshot.
    pub(super) loading: Loading,
    /// Nothing is appended for a moment: leadership is being handed over.
    pub(super) paused: AtomicBool,
    /// Administrators' calls that this leader executes share it; whoever asks for all of it lets none begin.
    pub(super) calls_in_hand: tokio::sync::RwLock<()>,
    /// Held by whoever hands over.
    pub(super) handing_over: tokio::sync::Mutex<()>,
    /// Held while elections are left to others.
    pub(super) backing_off: tokio::sync::Mutex<()>,
    /// Held by whoever stands for election again, from the look at the vote on.
    pub(super) standing_again: tokio::sync::Mutex<()>,
    /// Why this node was removed from the cluster, once it was.
    pub(super) removed: watch::Sender<Option<String>>,
    pub(super) calls: OnceLock<Arc<dyn LeaderCalls>>,
    pub(super) pool: Pool,
    /// Lines of the audit that each peer may cause.
    pub(super) refusals: Budget,
    /// Attempts to join.
    pub(super) joins: Budget,
    /// Held by whoever founds or joins: a node gets one identity.
    pub(super) identity: tokio::sync::Mutex<()>,
    /// What Raft is started with, until it is.
    pub(super) parts: tokio::sync::Mutex<Option<(LogStore, StateMachine)>>,
    /// The consensus thread's runtime: tasks that outlive their callers run here.
    pub(super) runtime: Handle,
}

/// Proposals that may wait for openraft at a time.
pub(super) const MAX_IN_FLIGHT: usize = 64;

impl Shared {
    pub(super) fn metrics(&self) -> Option<Arc<Sample>> {
        self.sample.load_full()
    }

    /// How this node greets.
    pub(super) fn hello(&self) -> Hello {
        handshake::hello(&self.control.get(), self.run)
    }

    /// The greeting of one that belongs to no cluster yet. Members take requests to join from such only.
    pub(super) fn joiners_hello(&self) -> Hello {
        Hello {
            cluster_id: ClusterId::default(),
            epoch: 0,
            raft_id: 0,
            ..self.hello()
        }
    }

    pub(super) fn is_leader(&self) -> bool {
        self.sample
            .load()
            .as_ref()
            .is_some_and(|sample| sample.metrics.state == ServerState::Leader)
    }

    /// Leader only: age of the last contact with a quorum.
    pub(super) fn quorum_ack_age(&self, now: Instant) -> Option<Duration> {
        let sample = self.sample.load();
        let sample = sample.as_ref()?;
        if sample.metrics.state != ServerState::Leader {
            return None;
        }
        let age = Duration::from_millis(sample.metrics.millis_since_quorum_ack?);
        Some(age + now.saturating_duration_since(sample.at))
    }

    /// Age of the newest quorum-backed contact that counts, a leader's own or through its leader's frames.
    /// It is kept over changes of role: a new leader that has not heard from its quorum yet is as fresh as
    /// it was as a follower.
    pub(super) fn staleness(&self, now: Instant) -> Option<Duration> {
        self.gate.staleness(now)
    }

    fn applied_index(&self) -> u64 {
        *self.applied.borrow()
    }

    /// Notes a frame that was accepted as the leader's, and that continued this node's log.
    pub(super) fn note_frame(&self, received: Instant, said: &FrameSaid) {
        self.committed.fetch_max(said.commit, Ordering::AcqRel);
        if **self.silent.load() != said.silent {
            self.silent.store(Arc::new(said.silent.clone()));
        }
        // A leader that has not heard from a quorum in its term backs nothing.
        if let Some(age) = said.quorum_ack_age {
            self.gate
                .contact(received, age, said.commit, self.applied_index());
        }
    }

    /// Members that this leader has not heard from for longer than readiness allows; with this, followers
    /// know whose reports are old news.
    pub(super) fn silent_peers(&self, now: Instant) -> BTreeSet<RaftId> {
        let bound = self.options.timing.ready;
        let heard = self.peers.load();
        let own = self.raft.get().map(|running| running.id);
        let published = self.published.load();
        // Nobody is silent towards a leader that has only just begun to ask.
        let asked_since = self.leads_since.load();
        let silent = |id: &RaftId| {
            let last = heard.get(id).copied().max(asked_since.as_deref().copied());
            last.is_none_or(|at| now.saturating_duration_since(at) > bound)
        };
        published
            .state
            .nodes()
            .iter()
            .filter(|(_, node)| node.is_standing())
            .map(|(id, _)| *id)
            .filter(|id| Some(*id) != own && silent(id))
            .collect()
    }

    /// Takes over new metrics.
    pub(super) fn note_metrics(&self, metrics: Metrics) {
        let before = self.sample.load();
        let leader_before = before.as_ref().and_then(|sample| sample.metrics.current_leader);
        if metrics.current_leader.is_some() && metrics.current_leader != leader_before {
            self.leader_changes.fetch_add(1, Ordering::Relaxed);
        }
        let applied = metrics.last_applied.map_or(0, |id| id.index);
        self.committed.fetch_max(applied, Ordering::AcqRel);
        let led = before
            .as_ref()
            .is_some_and(|sample| sample.metrics.state == ServerState::Leader);
        if led && metrics.state != ServerState::Leader && bug("bug::end_when_deposed") {
            std::process::abort();
        }
        if metrics.state == ServerState::Leader {
            if !led {
                self.leads_since.store(Some(Arc::new(clock::now())));
            }
            // A new leader has caught up once an entry of its own term is applied: all before it is
            // committed then.
            let own_term = metrics
                .last_applied
                .is_some_and(|id| id.leader_id.term == metrics.current_term);
            if let Some(age) = metrics.millis_since_quorum_ack.filter(|_| own_term) {
                let age = Duration::from_millis(age);
                self.gate
                    .contact(clock::now(), age, applied, self.applied_index());
            }
        }
        self.sample.store(Some(Arc::new(Sample {
            at: clock::now(),
            metrics,
        })));
    }

    /// The peers that have answered this node within `within`.
    pub(super) fn heard_within(&self, within: Duration, now: Instant) -> BTreeSet<RaftId> {
        let heard = self.peers.load();
        let lately = heard
            .iter()
            .filter(|(_, at)| now.saturating_duration_since(**at) <= within);
        lately.map(|(id, _)| *id).collect()
    }

    /// Notes an answer of a peer.
    pub(super) fn note_peer(&self, id: RaftId) {
        let now = clock::now();
        self.peers.rcu(|peers| {
            let mut peers = BTreeMap::clone(peers);
            peers.insert(id, now);
            peers
        });
    }

    pub(super) fn view(&self, now: Instant) -> View {
        let applied = self.published.load().applied.map_or(0, |id| id.index);
        let sample = self.sample.load();
        let mut view = View {
            role: Role::Uninitialised,
            term: 0,
            leader: None,
            last_log: self.control.get().last_log.map_or(0, |id| id.index),
            committed: self.committed.load(Ordering::Acquire),
            applied,
            snapshot: 0,
            quorum_ack_age: self.quorum_ack_age(now),
            staleness: self.staleness(now),
            start_gate: self.gate.stand(),
            silent: BTreeSet::clone(&self.silent.load()),
            heard: BTreeSet::new(),
            peers: BTreeMap::new(),
            proposals_pending: MAX_IN_FLIGHT.saturating_sub(self.in_flight.available_permits()),
            proposals_timed_out: self.timed_out.load(Ordering::Relaxed),
            leader_changes: self.leader_changes.load(Ordering::Relaxed),
            stopped: None,
        };
        let Some(sample) = sample.as_ref() else {
            return view;
        };
        let metrics = &sample.metrics;
        view.role = match metrics.state {
            ServerState::Leader => Role::Leader,
            ServerState::Follower => Role::Follower,
            ServerState::Candidate => Role::Candidate,
            ServerState::Learner | ServerState::Shutdown => Role::Learner,
        };
        view.term = metrics.current_term;
        view.leader = metrics.current_leader;
        view.last_log = metrics.last_log_index.unwrap_or(0);
        view.snapshot = metrics.snapshot.map_or(0, |id| id.index);
        view.stopped = metrics.running_state.as_ref().err().map(ToString::to_string);
        if view.role == Role::Leader {
            view.silent = self.silent_peers(now);
            view.heard = self.heard();
        }
        if let Some(replication) = &metrics.replication {
            let heard = self.peers.load();
            let own = self.raft.get().map(|raft| raft.id);
            for (id, matched) in replication.iter().filter(|(id, _)| Some(**id) != own) {
                let silent_for = heard.get(id).map(|at| now.saturating_duration_since(*at));
                view.peers.insert(
                    *id,
                    Peer {
                        matched: matched.map(|id| id.index),
                        silent_for,
                    },
                );
            }
        }
        view
    }
}
