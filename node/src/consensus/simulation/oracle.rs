//! What has to hold, whatever fails. Asked after every step, of every node that runs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use raft_store::LogId;
use raft_store::names::{ContextName, RaftId};
use raft_store::state::ClusterState;
use raft_store::state::context::{KeyVersion, VersionState};
use raft_store::storage::Published;

use super::node::Node;
use crate::lock::lock;

/// Of one run. More say nothing new.
const MAX_VIOLATIONS: usize = 20;
/// A node that was disturbed may still be silent towards the leader for so long: a dial that hangs, and another.
const RECONNECTS: Duration = Duration::from_secs(6);
/// Acknowledged rotations that are looked for at every step; all of them at the end, and when a node has started.
const RECENT: usize = 8;
/// Versions of a context whose holders are looked at, of which the last ones change.
const NEWEST: usize = 6;

/// What did not hold: which rule, and how it was seen. Kept by rule, first ones first.
#[derive(Default)]
pub(super) struct Violations(Mutex<Vec<(&'static str, String)>>);

impl Violations {
    pub(super) fn add(&self, rule: &'static str, what: String) {
        let mut all = lock(&self.0);
        if all.len() < MAX_VIOLATIONS {
            all.push((rule, what));
        }
    }

    pub(super) fn all(&self) -> Vec<(&'static str, String)> {
        lock(&self.0).clone()
    }

    pub(super) fn is_empty(&self) -> bool {
        lock(&self.0).is_empty()
    }
}

/// A rotation that a client was told of.
#[derive(Clone, Debug)]
pub(super) struct Acknowledged {
    pub(super) context: ContextName,
    pub(super) version: u32,
    pub(super) label: String,
    /// The state from which on it has to be there.
    pub(super) index: u64,
}

/// What is known of a context over all nodes.
#[derive(Default)]
struct Line {
    /// The highest index at which it was seen, and the active version by then.
    active: (u64, u32),
    /// Versions that were seen to be active.
    activated: BTreeSet<u32>,
}

/// See the module.
pub(super) struct Oracle {
    violations: Arc<Violations>,
    /// Log id and digest of the state at each index that was seen.
    states: BTreeMap<u64, (LogId, u128)>,
    /// The index at which each node was seen last.
    seen: Vec<u64>,
    lines: BTreeMap<ContextName, Line>,
    pub(super) acknowledged: Vec<Acknowledged>,
    /// When each node was last down, cut off or slowed.
    pub(super) disturbed: Vec<Duration>,
}

impl Oracle {
    pub(super) fn new(nodes: usize, violations: Arc<Violations>) -> Self {
        Self {
            violations,
            states: BTreeMap::new(),
            seen: vec![0; nodes],
            lines: BTreeMap::new(),
            acknowledged: Vec::new(),
            disturbed: vec![Duration::ZERO; nodes],
        }
    }

    /// The highest index that any node was seen at.
    pub(super) fn highest(&self) -> u64 {
        self.states.keys().next_back().copied().unwrap_or(0)
    }

    /// Looks at a node's state, unless it is the one that it had.
    pub(super) fn look(&mut self, nodes: &[Arc<Node>], number: usize, published: &Published, now: Duration) {
        let Some(applied) = published.applied else { return };
        if self.seen[number] == applied.index {
            return;
        }
        // After a start the state may be older: what was applied is applied again.
        let started = applied.index < self.seen[number];
        self.seen[number] = applied.index;
        let name = &nodes[number].name;
        let known = self
            .states
            .entry(applied.index)
            .or_insert((applied, published.digest));
        if known.0 != applied {
            let what = format!("{name} has {applied}, another {}", known.0);
            self.violations.add("a committed entry is never rewritten", what);
        } else if known.1 != published.digest {
            let what = format!("{name} at {applied}");
            self.violations.add("equal state at equal index", what);
        }
        let contexts = published.state.contexts().iter();
        let contexts: Vec<(ContextName, u32, Option<u32>)> = contexts
            .map(|(name, context)| (name.clone(), context.highest_version, context.active_version))
            .collect();
        for (context, highest, active) in contexts {
            self.look_at_context(nodes, published, &context, (highest, active), now);
        }
        let recent = self.acknowledged.len().saturating_sub(RECENT);
        let from = if started { 0 } else { recent };
        self.look_for(name, published, from);
    }

    fn look_at_context(
        &mut self,
        nodes: &[Arc<Node>],
        published: &Published,
        context: &ContextName,
        (highest, active): (u32, Option<u32>),
        now: Duration,
    ) {
        let index = published.applied.map_or(0, |id| id.index);
        let versions: Vec<(u32, &KeyVersion)> = published.state.versions_of(context).collect();
        let numbers = versions.iter().map(|(number, _)| *number);
        if !numbers.eq(1..=highest) {
            let what = format!(
                "{context} at {index}: {} versions, the highest is {highest}",
                versions.len()
            );
            self.violations
                .add("numbers have gaps only at abandoned versions", what);
        }
        let actives: Vec<u32> = versions
            .iter()
            .filter(|(_, version)| version.state == VersionState::Active)
            .map(|(number, _)| *number)
            .collect();
        if actives.len() > 1 || active != actives.first().copied() {
            let what = format!("{context} at {index}: {actives:?}, by the context {active:?}");
            self.violations
                .add("at most one active version per context", what);
        }
        let newest = versions.len().saturating_sub(NEWEST);
        for (number, version) in &versions[newest..] {
            self.look_at_acks(nodes, &published.state, (context, *number), version);
        }
        let Some(active) = active else { return };
        let line = self.lines.entry(context.clone()).or_default();
        if index > line.active.0 {
            if active < line.active.1 {
                let what = format!("{context} at {index}: {active} after {}", line.active.1);
                self.violations.add("active versions strictly increase", what);
            }
            line.active = (index, active);
        }
        if line.activated.insert(active)
            && let Some((_, version)) = versions.iter().find(|(number, _)| *number == active)
        {
            self.look_at_activation(nodes, published, (context, active), version, now);
        }
    }

    /// Whoever has acknowledged a version holds it.
    fn look_at_acks(
        &self,
        nodes: &[Arc<Node>],
        state: &ClusterState,
        (context, number): (&ContextName, u32),
        version: &KeyVersion,
    ) {
        if !version.state.is_readable() {
            return;
        }
        for id in &version.acks {
            let holder = node_of(nodes, state, *id);
            if holder.is_none_or(|holder| !nodes[holder].holds(&version.key_uid)) {
                let what = format!("raft id {id} has acknowledged version {number} of {context}");
                self.violations.add("who acknowledges a version holds it", what);
            }
        }
    }

    /// Who has not acknowledged a version when it becomes active was out of service.
    fn look_at_activation(
        &self,
        nodes: &[Arc<Node>],
        published: &Published,
        (context, number): (&ContextName, u32),
        version: &KeyVersion,
        now: Duration,
    ) {
        let voters: BTreeSet<RaftId> = published.membership.voter_ids().collect();
        if voters.intersection(&version.acks).count() * 2 <= voters.len() {
            let what = format!("version {number} of {context}: {:?} of {voters:?}", version.acks);
            self.violations.add("a majority holds what is active", what);
        }
        for id in voters.difference(&version.acks) {
            let Some(node) = node_of(nodes, &published.state, *id) else {
                continue;
            };
            if now.saturating_sub(self.disturbed[node]) > RECONNECTS {
                let what = format!(
                    "version {number} of {context} without {}, which nothing has disturbed since {:?} (it is {now:?})",
                    nodes[node].name, self.disturbed[node]
                );
                self.violations
                    .add("nothing is activated without the nodes that serve", what);
            }
        }
    }

    /// Looks for rotations that were acknowledged.
    fn look_for(&self, name: &str, published: &Published, from: usize) {
        let index = published.applied.map_or(0, |id| id.index);
        for known in &self.acknowledged[from..] {
            if known.index > index {
                continue;
            }
            let found = published.state.version(&known.context, known.version);
            if !found.is_some_and(|found| found.label == known.label && found.activated_at.is_some()) {
                let what = format!("{name} at {index}: {known:?}");
                self.violations
                    .add("an acknowledged rotation is never lost", what);
            }
        }
    }

    /// At the end: everything that was acknowledged is on every node.
    pub(super) fn look_for_all(&self, name: &str, published: &Published) {
        self.look_for(name, published, 0);
    }
}

/// The node with this raft id.
pub(super) fn node_of(nodes: &[Arc<Node>], state: &ClusterState, id: RaftId) -> Option<usize> {
    let known = state.nodes().get(&id)?;
    nodes.iter().position(|node| node.name == known.name.as_str())
}
