//! `RegisterNode`: a node that presents a valid join token gets its raft id: this entry's index.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Bounded, Done, Existing, Forbidden, Refusal, require_cluster};
use crate::names::{Incarnation, NodeName, RaftId};
use crate::seeded::bug;
use crate::state::ClusterState;
use crate::state::node::{JoinToken, MAX_ADDRESS, Node, NodeStatus};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RegisterNode {
    /// The token's number.
    pub token: u64,
    /// SHA-256 of the token's secret.
    pub secret_hash: [u8; 32],
    /// The node's configured name.
    pub name: NodeName,
    /// Its data directory's incarnation.
    pub incarnation: Incarnation,
    /// Its API address.
    pub api_address: String,
    /// Its cluster address.
    pub cluster_address: String,
}

impl RegisterNode {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_cluster(state)?;
        let token = state.join_tokens.get(&self.token).cloned();
        let token = token.ok_or(Forbidden::JoinToken)?;
        if token.secret_hash != self.secret_hash {
            return Err(Forbidden::JoinToken.into());
        }
        let known = state
            .node_named(&self.name)
            .map(|(raft_id, node)| (raft_id, node.clone()));
        for address in [&self.api_address, &self.cluster_address] {
            Bounded::Address.check(address.len(), MAX_ADDRESS)?;
        }
        if let Some((_, node)) = &known
            && node.incarnation != self.incarnation
        {
            return Err(Existing::Node(self.name.clone()).into());
        }
        let used = token.used_by.is_some() || token.expires_at < cx.at;
        if token.node.as_ref().is_some_and(|only| *only != self.name) {
            let node = self.name.clone();
            return Err(Forbidden::JoinTokenOfAnother { node }.into());
        }
        // The same filling of the same node asks again, because it never heard the answer: it has its id
        // already, and learns it again for the token it got it with, or for a new one.
        if let Some((raft_id, node)) = known {
            if used && token.used_by != Some(raft_id) {
                return Err(Forbidden::JoinToken.into());
            }
            let told = JoinToken {
                used_by: Some(raft_id),
                ..JoinToken::clone(&token)
            };
            state.join_tokens.put(self.token, told)?;
            // A join with a wrong address never comes to its end, so it may be begun again with the right one. A
            // member has its addresses for good.
            if node.status == NodeStatus::Joining {
                let corrected = Node {
                    api_address: self.api_address.clone(),
                    cluster_address: self.cluster_address.clone(),
                    ..node
                };
                state.nodes.put(raft_id, corrected)?;
            }
            return Ok(Done::Registered { raft_id });
        }
        if used {
            return Err(Forbidden::JoinToken.into());
        }
        let raft_id = id_of_removed(state).unwrap_or(cx.index);
        state.join_tokens.put(
            self.token,
            JoinToken {
                used_by: Some(raft_id),
                ..JoinToken::clone(&token)
            },
        )?;
        state.nodes.put(
            raft_id,
            Node {
                name: self.name.clone(),
                incarnation: self.incarnation,
                api_address: self.api_address.clone(),
                cluster_address: self.cluster_address.clone(),
                status: NodeStatus::Joining,
                slot_keys: BTreeMap::new(),
                registered_at: cx.at,
            },
        )?;
        Ok(Done::Registered { raft_id })
    }
}

/// The seeded bug of a raft id that is given twice.
fn id_of_removed(state: &ClusterState) -> Option<RaftId> {
    if !bug("bug::reuse_node_id") {
        return None;
    }
    let mut nodes = state.nodes.iter();
    let removed = nodes.find(|(_, node)| matches!(node.status, NodeStatus::Removed { .. }));
    removed.map(|(id, _)| *id)
}
