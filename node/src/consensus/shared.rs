//! What the consensus thread and its handles share: the running Raft, the newest metrics and frame, and
//! how fresh this node is. All reads are loads; nothing here waits.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use openraft::{Raft, RaftMetrics, ServerState};
use raft_store::names::RaftId;
use raft_store::storage::{ControlHandle, LogStore, Published, StateMachine};
use raft_store::{MemberNode, TypeConfig};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};

use super::pool::Pool;
use super::start::ConsensusOptions;
use super::{Gate, LeaderCalls, Peer, Role, View};

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
    /// The process's own zero of time.
    pub(super) begun: Instant,
    /// The newest moment at which a quorum backed what this node knows, in milliseconds since `begun`
    /// plus one; 0 = never since the start.
    pub(super) contact: AtomicU64,
    /// Index that must be applied before this start of the node may serve; 0 = not known yet.
    pub(super) gate_target: AtomicU64,
    pub(super) gate_open: AtomicBool,
    /// Highest commit index seen, own or named by a leader.
    pub(super) committed: AtomicU64,
    pub(super) peers: ArcSwap<BTreeMap<RaftId, Instant>>,
    pub(super) in_flight: Arc<Semaphore>,
    pub(super) timed_out: AtomicU64,
    pub(super) leader_changes: AtomicU64,
    pub(super) draining: AtomicBool,
    pub(super) calls: OnceLock<Arc<dyn LeaderCalls>>,
    pub(super) pool: Pool,
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

    /// Age of the newest quorum-backed contact, a leader's own or through its leader's frames. It is kept
    /// over changes of role: a new leader that has not heard from its quorum yet is as fresh as it was as a
    /// follower.
    pub(super) fn staleness(&self, now: Instant) -> Option<Duration> {
        let contact = self.contact.load(Ordering::Acquire).checked_sub(1)?;
        Some(now.saturating_duration_since(self.begun + Duration::from_millis(contact)))
    }

    fn note_contact(&self, seen: Instant, age: Duration) {
        // Whoever claims a contact from before this process began claims none that counts here.
        let Some(at) = seen
            .checked_sub(age)
            .and_then(|at| at.checked_duration_since(self.begun))
        else {
            return;
        };
        self.contact.fetch_max(
            u64::try_from(at.as_millis()).unwrap_or(u64::MAX - 1) + 1,
            Ordering::AcqRel,
        );
    }

    /// Notes an accepted frame and the commit index it named.
    pub(super) fn note_frame(&self, received: Instant, age: Option<Duration>, commit: u64) {
        self.committed.fetch_max(commit, Ordering::AcqRel);
        // A leader that has not heard from a quorum in its term backs nothing.
        let Some(age) = age else { return };
        self.note_contact(received, age);
        self.note_gate(commit);
    }

    /// The first quorum-backed contact of this start fixes what must be applied.
    pub(super) fn note_gate(&self, commit: u64) {
        let _ = self
            .gate_target
            .compare_exchange(0, commit.max(1), Ordering::AcqRel, Ordering::Acquire);
        self.try_open_gate();
    }

    pub(super) fn try_open_gate(&self) {
        let target = self.gate_target.load(Ordering::Acquire);
        if target > 0 && *self.applied.borrow() >= target {
            self.gate_open.store(true, Ordering::Release);
        }
    }

    fn gate(&self) -> Gate {
        self.try_open_gate();
        if self.gate_open.load(Ordering::Acquire) {
            return Gate::Open;
        }
        match self.gate_target.load(Ordering::Acquire) {
            0 => Gate::NoLeaderSeen,
            target => Gate::CatchingUp { target },
        }
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
        if metrics.state == ServerState::Leader {
            if let Some(age) = metrics.millis_since_quorum_ack {
                self.note_contact(Instant::now(), Duration::from_millis(age));
            }
            // A new leader has caught up once an entry of its own term is applied: all before it is
            // committed then.
            let own_term = metrics
                .last_applied
                .is_some_and(|id| id.leader_id.term == metrics.current_term);
            if own_term && metrics.millis_since_quorum_ack.is_some() {
                self.note_gate(applied);
            }
        }
        self.sample.store(Some(Arc::new(Sample {
            at: Instant::now(),
            metrics,
        })));
    }

    /// Notes an answer of a peer.
    pub(super) fn note_peer(&self, id: RaftId) {
        let now = Instant::now();
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
            start_gate: self.gate(),
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
