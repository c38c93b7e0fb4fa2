//! `ReportNode`: a node's periodic report, idempotent by its sequence number.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Done, Refusal, require_self};
use crate::names::RaftId;
use crate::state::ClusterState;
use crate::state::node::{NodeReport, NodeStatus};

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
        let Some(node) = state.nodes.get(&self.node) else {
            return Err(Refusal::NotFound(format!("node {}", self.node)));
        };
        if matches!(node.status, NodeStatus::Removed { .. }) || node.incarnation != self.report.incarnation {
            return Err(Refusal::Forbidden(format!(
                "node {} is not this incarnation",
                node.name
            )));
        }
        if state
            .reports
            .get(&self.node)
            .is_none_or(|known| known.seq < self.report.seq)
        {
            state.reports.put(self.node, self.report.clone());
        }
        Ok(Done::Ok)
    }
}
