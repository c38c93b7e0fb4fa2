//! `ReportNode`: a node's periodic report, idempotent by its sequence number. What it counted is added up with it.

use serde::{Deserialize, Serialize};

use super::stamp::stamp;
use super::{ApplyContext, Bounded, Done, Forbidden, Refusal, require_self, standing_node};
use crate::names::{RaftId, UnixMillis};
use crate::state::ClusterState;
use crate::state::context::VersionKey;
use crate::state::frozen::NodeReportV1;
use crate::state::node::{MAX_COUNT, MAX_USES, NodeReport};
use crate::state::usage::{Uncounted, VersionUse};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReportNode {
    /// The node.
    pub node: RaftId,
    /// What it reports.
    pub report: NodeReport,
}

impl ReportNode {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_self(cx, self.node)?;
        let node = standing_node(state, self.node)?;
        if node.incarnation != self.report.incarnation {
            let node = node.name.clone();
            return Err(Forbidden::Incarnation { node }.into());
        }
        let is_member = node.is_member();
        Bounded::Uses.check(self.report.uses.len(), MAX_USES)?;
        for count in self.report.uses.values() {
            Bounded::UseCount.check_number(count.encryptions.max(count.decryptions), MAX_COUNT)?;
        }
        let known = state.reports.get(&self.node);
        if known.is_some_and(|known| known.seq >= self.report.seq) {
            return Ok(Done::Ok);
        }
        // Whoever was rolled back is known by what it had, so no report of its own takes that back.
        let seen = known.map_or(0, |known| known.durable_index);
        let counted_before = known.is_none_or(|known| known.counts_uses());
        let report = NodeReport {
            durable_index: self.report.durable_index.max(seen),
            ..self.report.clone()
        };
        state.reports.put(self.node, report)?;
        // Who joins serves nobody, so there is nothing for it to count.
        if is_member {
            // As late as its own report says, if the leader's clock is behind.
            let at = stamp(state, cx);
            self.note_gap(state, counted_before, at)?;
            self.count(state, at)?;
        }
        Ok(Done::Ok)
    }

    /// Notes until when it did not count. What lies ahead by two clocks of today is corrected: some clock was wrong.
    fn note_gap(
        &self,
        state: &mut ClusterState,
        counted_before: bool,
        at: UnixMillis,
    ) -> Result<(), Refusal> {
        let until = self.report.clock.max(at);
        let begins = self.report.counts_uses() && !counted_before;
        let known = state.uncounted.get(&self.node);
        if begins || known.is_some_and(|gap| gap.until > until) {
            state.uncounted.put(self.node, Uncounted { until })?;
        }
        Ok(())
    }

    /// Adds up what it counted.
    fn count(&self, state: &mut ClusterState, at: UnixMillis) -> Result<(), Refusal> {
        for (key, count) in &self.report.uses {
            // Nobody asks for the uses of what there never was.
            if count.is_none() || !state.versions.contains(key) {
                continue;
            }
            let mut used = state
                .uses
                .get(key)
                .map_or_else(VersionUse::default, |used| VersionUse::clone(used));
            used.add(self.node, self.report.seq, *count, at);
            state.uses.put(key.clone(), used)?;
        }
        Ok(())
    }
}

/// Takes a node that is removed at `at` out of the uses of every version: what it counted is in no sum any more, and
/// the rows do not grow with all nodes that ever were. Only when it last used one stays, no later than `at`
/// ([`VersionUse::last_by_removed`]). `bury_node` calls it in the entry in which the node's row becomes a
/// tombstone, as it calls `destruction::settle`.
pub(super) fn drop_uses(state: &mut ClusterState, node: RaftId, at: UnixMillis) -> Result<(), Refusal> {
    let counted: Vec<(VersionKey, VersionUse)> = state
        .uses
        .iter()
        .filter(|(_, used)| used.nodes.contains_key(&node))
        .map(|(key, used)| (key.clone(), VersionUse::clone(used)))
        .collect();
    for (key, mut used) in counted {
        used.drop_node(node, at);
        state.uses.put(key, used)?;
    }
    Ok(())
}

/// `ReportNode` before reports counted uses. Nobody proposes it any more, but logs hold it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReportNodeV1 {
    /// The node.
    pub node: RaftId,
    /// What it reports.
    pub report: NodeReportV1,
}

impl ReportNodeV1 {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        let now = ReportNode {
            node: self.node,
            report: self.report.clone().into(),
        };
        now.apply(state, cx)
    }
}
