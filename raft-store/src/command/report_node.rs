//! `ReportNode`: a node's periodic report, idempotent by its sequence number. What it counted is added up with it.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Bounded, Done, Forbidden, Refusal, require_self, standing_node};
use crate::names::RaftId;
use crate::state::ClusterState;
use crate::state::frozen::NodeReportV1;
use crate::state::node::{MAX_USES, NodeReport};
use crate::state::usage::VersionUse;

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
        Bounded::Uses.check(self.report.uses.len(), MAX_USES)?;
        let known = state.reports.get(&self.node);
        if known.is_some_and(|known| known.seq >= self.report.seq) {
            return Ok(Done::Ok);
        }
        // Whoever was rolled back is known by what it had, so no report of its own takes that back.
        let seen = known.map_or(0, |known| known.durable_index);
        let report = NodeReport {
            durable_index: self.report.durable_index.max(seen),
            ..self.report.clone()
        };
        state.reports.put(self.node, report)?;
        self.count(state)?;
        Ok(Done::Ok)
    }

    /// Adds up what it counted.
    fn count(&self, state: &mut ClusterState) -> Result<(), Refusal> {
        for (key, count) in &self.report.uses {
            // Nobody asks for the uses of what there never was.
            if !state.versions.contains(key) {
                continue;
            }
            let mut used = state
                .uses
                .get(key)
                .map_or_else(VersionUse::default, |used| VersionUse::clone(used));
            used.add(self.node, self.report.seq, *count);
            // Whoever was removed reports nothing twice; the row does not grow with all that ever were.
            used.nodes
                .retain(|id, _| state.nodes.get(id).is_some_and(|node| node.is_standing()));
            state.uses.put(key.clone(), used)?;
        }
        Ok(())
    }
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
