//! `KeepNode`: a member that was to leave stays. If Raft's membership has lost it already, the leader adds it again: it is
//! as good as one that joined.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Conflict, Done, Missing, Refusal, require_admin};
use crate::names::RaftId;
use crate::state::ClusterState;
use crate::state::node::{Node, NodeStatus};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KeepNode {
    /// The node.
    pub node: RaftId,
}

impl KeepNode {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_admin(cx, "keep_node")?;
        let Some(node) = state.nodes.get(&self.node).cloned() else {
            return Err(Missing::Node(self.node).into());
        };
        match node.status {
            NodeStatus::Member => return Ok(Done::Ok),
            NodeStatus::Leaving { .. } => {}
            NodeStatus::Joining => {
                let node = node.name.clone();
                return Err(Conflict::NotLeaving { node }.into());
            }
            NodeStatus::Removed { .. } => {
                let node = node.name.clone();
                return Err(Conflict::NodeRemoved { node }.into());
            }
        }
        let kept = Node {
            status: NodeStatus::Member,
            ..Node::clone(&node)
        };
        state.nodes.put(self.node, kept)?;
        Ok(Done::Ok)
    }
}
