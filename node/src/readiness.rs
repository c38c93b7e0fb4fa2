//! The node as its listeners see it: whether it may be sent requests, how fresh its answers are, under
//! which policy and with which keys. Everything here is judged at the moment it is asked; nothing is
//! remembered but what cannot change back.

mod following;
mod gauges;
mod health;
mod holding;
mod judge;
mod plane;
mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use arc_swap::ArcSwap;
use raft_store::names::{RaftId, SlotName};
use raft_store::state::ClusterState;
use raft_store::state::context::VersionKey;
use tokio::sync::Mutex;

pub use self::judge::{Local, Rules};
use crate::admin::seed::Seed;
use crate::consensus::{Consensus, Gate};
use crate::health::{Check, ReadyQuery};
use crate::http::DrainSignal;
use crate::keyring::KeyRing;
use crate::leases::Leases;
use crate::metrics::Metrics;
use crate::slots::{SlotEntry, SlotManager};
use crate::sync::SyncHandle;

/// What the view is made from.
pub struct NodeParts {
    /// Consensus.
    pub consensus: Consensus,
    /// Rules before there is a cluster.
    pub seed: Seed,
    /// The keys, as sync publishes them.
    pub ring: Arc<ArcSwap<KeyRing>>,
    /// Token sync.
    pub sync: SyncHandle,
    /// What this node may encrypt.
    pub leases: Arc<Leases>,
    /// The slots.
    pub slots: Arc<SlotManager>,
    /// What the configuration says.
    pub rules: Rules,
    /// Shutdown.
    pub drain: DrainSignal,
    /// The recorder.
    pub metrics: Arc<Metrics>,
}

/// See the module.
pub struct NodeView {
    parts: NodeParts,
    started: Instant,
    node_id: String,
    policies: rules::PolicyCache,
    counted: gauges::Counted,
    compared: gauges::Compared,
    holding: holding::Holding,
    waived: plane::Waived,
    /// When the leader's index was last asked for, and what it was.
    last_read: Mutex<Option<(Instant, u64)>>,
    is_listening: AtomicBool,
}

impl NodeView {
    /// Takes the parts; the node counts as started now.
    #[must_use]
    pub fn new(parts: NodeParts) -> Arc<Self> {
        Arc::new(Self {
            started: Instant::now(),
            node_id: parts.consensus.node_name().to_string(),
            policies: rules::PolicyCache::new(parts.seed.clone()),
            counted: gauges::Counted::default(),
            compared: gauges::Compared::default(),
            holding: holding::Holding::default(),
            waived: plane::Waived::default(),
            last_read: Mutex::new(None),
            is_listening: AtomicBool::new(false),
            parts,
        })
    }

    /// The API takes connections from now on; before that the node is not ready, whatever else holds.
    pub fn listens(&self) {
        self.is_listening.store(true, Ordering::Release);
    }

    /// Every slot of this node, as readiness sees it.
    #[must_use]
    pub fn slots(&self) -> BTreeMap<SlotName, Local> {
        // The state before the status: what this node has acknowledged it has shown before.
        let published = self.parts.consensus.published();
        let sync = self.parts.sync.status();
        let gate = self.gate_index();
        // Before a quorum is heard of nobody can be given any: such a node decrypts only.
        let is_open = matches!(self.parts.consensus.start_gate(), Gate::Open { .. });
        let me = self.parts.consensus.raft_id().unwrap_or_default();
        let nothing = BTreeSet::new();
        let local = |entry: &SlotEntry| {
            let (name, known) = (entry.name(), sync.slots.get(entry.name()));
            let complete_at = known.and_then(|slot| slot.complete_at);
            let serving = known.map_or(&nothing, |slot| &*slot.serving);
            let lacking = gate.map_or(0, |gate| {
                self.holding.lacking(&published.state, me, name, gate, serving)
            });
            let gone = known.map_or(&nothing, |slot| &*slot.gone);
            let owed = holding::owed(&published.state, me, name, gone);
            let pending = known.map_or(0, |slot| slot.destructions_pending);
            let owed = self.holding.owing(name, gate, owed.max(pending));
            Local {
                state: entry.state(),
                reason: entry
                    .reason()
                    .map(with_section)
                    .or_else(|| known.and_then(|slot| slot.obstacle.clone())),
                synced: known.is_some_and(|slot| slot.last_full_sync.is_some()),
                complete: gate.is_some() && complete_at >= gate && lacking == 0 && owed == 0,
                missing_keys: known.map_or(0, |slot| slot.missing_keys).max(lacking),
                untried: known.map_or(0, |slot| slot.untried),
                destructions: owed,
                leases: if is_open {
                    self.unleased(&published.state, me, name)
                } else {
                    0
                },
                starved: if is_open {
                    self.starved(&published.state, name)
                } else {
                    0
                },
            }
        };
        self.parts
            .slots
            .entries()
            .map(|entry| (entry.name().clone(), local(entry)))
            .collect()
    }

    /// How many versions of a slot this node cannot encrypt under for want of a first lease.
    fn unleased(&self, state: &ClusterState, me: RaftId, slot: &SlotName) -> u32 {
        let leases = &self.parts.leases;
        // What the state has given counts once requests can draw on it, and the driver may not have looked yet.
        leases.look(state, me);
        leases.lacking(state, me, in_slot(state, slot))
    }

    /// How many versions of a slot it cannot encrypt under for want of another one. Whoever hears no leader is out of
    /// service for that, except for those who say that stale is well enough.
    fn starved(&self, state: &ClusterState, slot: &SlotName) -> u32 {
        if self.is_fresh() {
            let leases = &self.parts.leases;
            leases.starved(state, Instant::now(), in_slot(state, slot))
        } else {
            0
        }
    }

    /// The applied index that tokens must be in step with before they are served from; `None` while the
    /// gate is shut.
    fn gate_index(&self) -> Option<u64> {
        let view = self.parts.consensus.view();
        match view.start_gate {
            Gate::Open { since } => Some(since),
            // Waived by configuration before any quorum was heard of; a shut gate after a silence is not.
            Gate::NoLeaderSeen if self.parts.rules.without_quorum => Some(view.applied.max(1)),
            Gate::NoLeaderSeen
            | Gate::CatchingUp { .. }
            | Gate::OlderCopy { .. }
            | Gate::EpochEnded { .. } => None,
        }
    }

    /// Whether a quorum was heard of as lately as readiness asks for.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        let bound = self.parts.rules.staleness.ready;
        self.parts.consensus.staleness().is_some_and(|age| age <= bound)
    }

    /// What `/readyz` says.
    #[must_use]
    pub fn checks(&self, query: &ReadyQuery) -> Vec<Check> {
        let published = self.parts.consensus.published();
        let view = self.parts.consensus.view();
        let voters: BTreeSet<RaftId> = published.membership.voter_ids().collect();
        let sync = self.parts.sync.status();
        let slots = self.slots();
        let picture = judge::Picture {
            state: &published.state,
            voters: &voters,
            view: &view,
            own: self.parts.consensus.raft_id(),
            slots: &slots,
            uptime: self.started.elapsed(),
            draining: self.parts.drain.is_draining(),
            below_reserve: self.parts.consensus.control().figures().below_reserve,
            wrong_replication_key: sync.wrong_replication_key.as_deref(),
        };
        judge::checks(&self.parts.rules, &picture, query)
    }
}

/// A reason for which a slot does not serve, with where the remedy stands, unless it says so itself.
fn with_section(reason: String) -> String {
    if reason.contains("docs/operations.md") {
        return reason;
    }
    format!("{reason} (docs/operations.md, \"A slot does not serve\")")
}

/// Whether a version is in this slot.
fn in_slot(state: &ClusterState, slot: &SlotName) -> impl Fn(&VersionKey) -> bool {
    move |key| {
        let version = state.versions().get(key);
        version.is_some_and(|version| version.slot == *slot)
    }
}
