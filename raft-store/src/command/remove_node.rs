//! `RemoveNode`: a member is to leave. It goes on as before until the leader has taken it out of Raft's membership
//! (`bury_node.rs`): before that its vote may be needed. Whoever leads meanwhile finds here what is to be done. A node that
//! has not joined yet is no part of any quorum, and is removed at once.

use serde::{Deserialize, Serialize};

use super::bury_node::bury;
use super::stamp::stamp;
use super::{ApplyContext, Conflict, Done, Missing, Origin, Refusal, require_leader};
use crate::names::{ContextName, NodeName, RaftId};
use crate::state::ClusterState;
use crate::state::context::KeyOrigin;
use crate::state::node::{Node, NodeStatus};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RemoveNode {
    /// The node.
    pub node: RaftId,
    /// The node that takes its place in the same change of the membership, once that has proven every key.
    pub successor: Option<NodeName>,
    /// Although an adopted key is in no other node's token.
    pub lose_keys: bool,
}

impl RemoveNode {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        // An administrator, or the leader of its own accord.
        if !matches!(cx.origin, Origin::Admin(_)) {
            require_leader(state, cx, "remove_node")?;
        }
        let Some(node) = state.nodes.get(&self.node).cloned() else {
            return Err(Missing::Node(self.node).into());
        };
        let name = node.name.clone();
        let at = match node.status {
            NodeStatus::Removed { .. } => return Err(Conflict::NodeRemoved { node: name }.into()),
            NodeStatus::Joining => {
                bury(state, self.node, cx)?;
                return Ok(Done::Node { raft_id: self.node });
            }
            NodeStatus::Leaving { at, .. } => at,
            NodeStatus::Member => stamp(state, cx),
        };
        // One after the other: that two of them leave a quorum nobody has checked.
        let leaving = state
            .nodes
            .iter()
            .find(|(id, other)| **id != self.node && other.is_leaving());
        if let Some((_, other)) = leaving {
            let node = other.name.clone();
            return Err(Conflict::NodeLeaves { node }.into());
        }
        match &self.successor {
            Some(successor) => self.check_successor(state, cx, &name, successor)?,
            None if cx.voters.iter().all(|voter| *voter == self.node) => {
                return Err(Conflict::LastVoter { node: name }.into());
            }
            None => {}
        }
        if let Some((context, version)) = self.lost_with_it(state).filter(|_| !self.lose_keys) {
            return Err(Conflict::LastHolder {
                node: name,
                context,
                version,
            }
            .into());
        }
        let leaving = Node {
            status: NodeStatus::Leaving {
                at,
                successor: self.successor.clone(),
            },
            ..Node::clone(&node)
        };
        state.nodes.put(self.node, leaving)?;
        Ok(Done::Node { raft_id: self.node })
    }

    /// Who takes the place has to be another node, and has no place of its own. It may yet have to join.
    fn check_successor(
        &self,
        state: &ClusterState,
        cx: &ApplyContext<'_>,
        name: &NodeName,
        successor: &NodeName,
    ) -> Result<(), Refusal> {
        let known = state.node_named(successor);
        let votes = known.is_some_and(|(id, _)| cx.voters.contains(&id));
        if successor == name || votes {
            let node = successor.clone();
            return Err(Conflict::SuccessorVotes { node }.into());
        }
        Ok(())
    }

    /// A version that is not over and that only this node's token has. Nobody can import it from anywhere.
    fn lost_with_it(&self, state: &ClusterState) -> Option<(ContextName, u32)> {
        let stays =
            |id: &RaftId| *id != self.node && state.nodes.get(id).is_some_and(|node| node.is_standing());
        let mut versions = state.versions.iter();
        let lost = versions.find(|(_, version)| match &version.origin {
            KeyOrigin::Adopted { holders, .. } => {
                !version.state.is_over() && holders.contains(&self.node) && !holders.iter().any(stays)
            }
            KeyOrigin::Generated => false,
        });
        lost.map(|(key, _)| (key.context.clone(), key.version))
    }
}
