//! The rotation driver's decision: which pending versions can be activated, which must be given up.
//! Pure, so that a new leader goes on at whatever step the old one died in. A version is never
//! activated while a node that may serve lacks it, and never with fewer than a majority holding it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use raft_store::names::{ContextName, RaftId, SlotName};
use raft_store::state::ClusterState;
use raft_store::state::context::VersionKey;

use crate::seeded::bug;

/// A pending version is given up after this time, counted from when this leader first saw it.
pub const PENDING_DEADLINE: Duration = Duration::from_secs(10);
/// A silent node must have had the time to be left out before its silence gives a version up.
const AFTER_FENCE: Duration = Duration::from_secs(2);
/// Nodes named in the reason of an abandoned version.
const NAMED: usize = 5;

/// How long the driver waits for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Silence towards this leader after which a node has left service by itself.
    pub fence_after: Duration,
    /// See [`PENDING_DEADLINE`].
    pub pending: Duration,
}

impl Limits {
    /// The limits for a configured `cluster.fence_after_ms`.
    #[must_use]
    pub fn new(fence_after: Duration) -> Self {
        Self {
            fence_after,
            pending: PENDING_DEADLINE.max(fence_after + AFTER_FENCE),
        }
    }
}

/// What to propose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Every node that may serve holds it.
    Activate {
        /// The context.
        context: ContextName,
        /// The pending version.
        version: u32,
        /// Voters and members that lack it and have been silent long enough to be out of service.
        left_out: BTreeSet<RaftId>,
    },
    /// It cannot finish in its time.
    Abandon {
        /// The context.
        context: ContextName,
        /// The pending version.
        version: u32,
        /// Why, for people.
        reason: String,
    },
}

/// Decides on every pending version.
pub fn decide(
    state: &ClusterState,
    voters: &BTreeSet<RaftId>,
    silent_for: impl Fn(RaftId) -> Duration,
    pending_for: impl Fn(&VersionKey) -> Duration,
    limits: &Limits,
) -> Vec<Action> {
    if voters.is_empty() {
        return Vec::new();
    }
    let required = required(state, voters);
    let decide_one = |key: &VersionKey, acks: &BTreeSet<RaftId>| {
        let (context, version) = (key.context.clone(), key.version);
        let missing: BTreeSet<RaftId> = required.difference(acks).copied().collect();
        let all_silent = missing.iter().all(|id| silent_for(*id) >= limits.fence_after);
        let holders = voters.intersection(acks).count();
        let held = holders * 2 > voters.len();
        let early = bug("bug::activate_before_import") || held && bug("bug::activate_on_majority");
        if all_silent && held || early {
            return Some(Action::Activate {
                context,
                version,
                left_out: missing,
            });
        }
        if pending_for(key) < limits.pending {
            return None;
        }
        let reason = format!(
            "not proven within {} s by {}",
            limits.pending.as_secs(),
            names(state, &missing)
        );
        Some(Action::Abandon {
            context,
            version,
            reason,
        })
    };
    state
        .pending()
        .filter_map(|(key, version)| decide_one(key, &version.acks))
        .collect()
}

/// Every voter, and every member that is about to vote: both may serve.
#[must_use]
pub fn required(state: &ClusterState, voters: &BTreeSet<RaftId>) -> BTreeSet<RaftId> {
    let members = state.nodes().iter().filter(|(_, node)| node.is_member());
    voters.iter().copied().chain(members.map(|(id, _)| *id)).collect()
}

/// Nodes that would have to hold a new version of this slot and whose slot does not serve: they answer the leader,
/// so they are not left out, and would prove nothing. With each, what its slot last said of itself.
pub fn unable<'s>(
    state: &'s ClusterState,
    voters: &BTreeSet<RaftId>,
    silent_for: impl Fn(RaftId) -> Option<Duration>,
    slot: &SlotName,
    limits: &Limits,
) -> BTreeMap<RaftId, &'s str> {
    // A node that this leader has never heard may be gone; its report says nothing about now.
    let answers = |id: &RaftId| silent_for(*id).is_some_and(|silence| silence < limits.fence_after);
    let slot_of = |id: RaftId| {
        let report = state.reports().get(&id)?.slots.get(slot)?;
        (report.state != "ready").then_some((id, report.state.as_str()))
    };
    let required = required(state, voters);
    required.into_iter().filter(answers).filter_map(slot_of).collect()
}

/// Nodes that answer the leader and would have to hold versions of this slot, and that report other slots only: their
/// configuration lacks it.
pub fn unconfigured(
    state: &ClusterState,
    voters: &BTreeSet<RaftId>,
    silent_for: impl Fn(RaftId) -> Option<Duration>,
    slot: &SlotName,
    limits: &Limits,
) -> BTreeSet<RaftId> {
    let answers = |id: &RaftId| silent_for(*id).is_some_and(|silence| silence < limits.fence_after);
    let lacks = |id: &RaftId| {
        let slots = state.reports().get(id).map(|report| &report.slots);
        slots.is_some_and(|slots| !slots.is_empty() && !slots.contains_key(slot))
    };
    let required = required(state, voters).into_iter();
    required.filter(answers).filter(lacks).collect()
}

/// Names of nodes, for people.
#[must_use]
pub fn names(state: &ClusterState, nodes: &BTreeSet<RaftId>) -> String {
    let name = |id: &RaftId| {
        state
            .nodes()
            .get(id)
            .map_or_else(|| format!("raft id {id}"), |node| node.name.to_string())
    };
    let mut out: Vec<String> = nodes.iter().take(NAMED).map(name).collect();
    if nodes.len() > NAMED {
        out.push(format!("{} more", nodes.len() - NAMED));
    }
    out.join(", ")
}

/// What a leader has seen since when, by its own monotonic clock. Another term begins anew: what
/// happened under another leader says nothing about silence towards this one.
#[derive(Debug, Default)]
pub struct Sightings {
    leading: Option<(u64, Instant)>,
    pending: BTreeMap<VersionKey, Instant>,
    /// Pending versions before whose stamp the voters' clocks were waited for, in this term.
    waited: (u64, BTreeSet<VersionKey>),
}

impl Sightings {
    /// Takes note of the state under this leader's term.
    pub fn look(&mut self, term: u64, state: &ClusterState, now: Instant) {
        if self.leading.is_none_or(|(known, _)| known != term) {
            self.leading = Some((term, now));
            self.pending.clear();
        }
        let before = std::mem::take(&mut self.pending);
        let seen = |key: &VersionKey| before.get(key).copied().unwrap_or(now);
        self.pending = state.pending().map(|(key, _)| (key.clone(), seen(key))).collect();
    }

    /// Whether a version is pending for which nobody has waited in this term; from now on somebody has.
    pub fn is_news(&mut self, term: u64, state: &ClusterState) -> bool {
        if self.waited.0 != term {
            self.waited = (term, BTreeSet::new());
        }
        let known = std::mem::take(&mut self.waited.1);
        self.waited.1 = state.pending().map(|(key, _)| key.clone()).collect();
        !self.waited.1.is_subset(&known)
    }

    /// This node does not lead.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    /// How long a version has been pending under this leader.
    #[must_use]
    pub fn pending_for(&self, key: &VersionKey, now: Instant) -> Duration {
        self.pending
            .get(key)
            .map_or(Duration::ZERO, |seen| now.saturating_duration_since(*seen))
    }

    /// How long a peer has been silent towards this leader: never longer than it leads.
    #[must_use]
    pub fn silent_for(&self, heard: Option<Duration>, now: Instant) -> Duration {
        let leading = self
            .leading
            .map_or(Duration::ZERO, |(_, since)| now.saturating_duration_since(since));
        heard.map_or(leading, |heard| heard.min(leading))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "decide_tests.rs"]
mod tests;
