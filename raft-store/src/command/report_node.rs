//! `ReportNode`: a node's periodic report, idempotent by its sequence number.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Done, Forbidden, Refusal, require_self, standing_node};
use crate::names::RaftId;
use crate::state::ClusterState;
use crate::state::node::NodeReport;

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
        Ok(Done::Ok)
    }
}
