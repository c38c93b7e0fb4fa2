//! `AdmitNode`: the leader found a learner to hold and have proven every key, and makes it a member
//! before it becomes a voter.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Conflict, Done, Missing, Refusal};
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
            return Err(Missing::Node(self.node).into());
        };
        let name = node.name.clone();
        match node.status {
            NodeStatus::Member | NodeStatus::Leaving { .. } => return Ok(Done::Ok),
            NodeStatus::Removed { .. } => return Err(Conflict::NodeRemoved { node: name }.into()),
            NodeStatus::Joining => {}
        }
        // Its report is of some moment before this entry: a version prepared since then, activated even, is not
        // in it, and a member that cannot decrypt with the active version would be asked to.
        if let Some((key, _)) = state
            .held_by_members()
            .find(|(_, version)| !version.acks.contains(&self.node))
        {
            return Err(Conflict::NotAcknowledged {
                node: name,
                context: key.context.clone(),
                version: key.version,
            }
            .into());
        }
        // A member that holds what is destroyed would have to be waited for, whatever becomes of it.
        if let Some((key, _)) = state.owed_by(self.node).next() {
            return Err(Conflict::OwesDestruction {
                node: name,
                context: key.context.clone(),
                version: key.version,
            }
            .into());
        }
        if state
            .reports
            .get(&self.node)
            .is_none_or(|report| report.proven_at.is_none())
        {
            return Err(Conflict::NotProven { node: name }.into());
        }
        // Its report may be from before a context moved to a slot that it does not have.
        if let Some(slot) = state.slot_without_key(self.node) {
            return Err(Conflict::NoSlotKey { node: name, slot }.into());
        }
        state.nodes.put(
            self.node,
            Node {
                status: NodeStatus::Member,
                ..Node::clone(&node)
            },
        )?;
        Ok(Done::Ok)
    }
}
