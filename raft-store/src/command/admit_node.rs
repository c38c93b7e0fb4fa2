//! `AdmitNode`: the leader found a learner to hold and have proven every key, and makes it a member
//! before it becomes a voter.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Done, Refusal};
use crate::names::RaftId;
use crate::state::ClusterState;
use crate::state::node::{Node, NodeStatus};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdmitNode {
    /// The learner.
    pub node: RaftId,
}

impl AdmitNode {
    pub(super) fn apply(&self, state: &mut ClusterState, _: &ApplyContext<'_>) -> Result<Done, Refusal> {
        let Some(node) = state.nodes.get(&self.node).cloned() else {
            return Err(Refusal::NotFound(format!("node {}", self.node)));
        };
        match node.status {
            NodeStatus::Member => return Ok(Done::Ok),
            NodeStatus::Removed { .. } => {
                return Err(Refusal::Conflict(format!("node {} was removed", node.name)));
            }
            NodeStatus::Joining => {}
        }
        // Checked here as well as by the proposer: a version prepared meanwhile has not been acknowledged.
        if let Some((key, _)) = state
            .pending()
            .find(|(_, version)| !version.acks.contains(&self.node))
        {
            return Err(Refusal::Conflict(format!(
                "{} version {} is pending",
                key.context, key.version
            )));
        }
        if state
            .reports
            .get(&self.node)
            .is_none_or(|report| report.proven_at.is_none())
        {
            return Err(Refusal::Conflict(format!(
                "node {} has not proven every key",
                node.name
            )));
        }
        state.nodes.put(
            self.node,
            Node {
                status: NodeStatus::Member,
                ..Node::clone(&node)
            },
        );
        Ok(Done::Ok)
    }
}
