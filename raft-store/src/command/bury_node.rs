//! `BuryNode`: the leader has taken a leaving node out of Raft's membership, and its row becomes a tombstone. From here on
//! every node refuses it, and whatever waited for it goes on.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::report_node::drop_uses;
use super::stamp::stamp;
use super::{ApplyContext, Conflict, Done, Missing, Refusal, destruction, require_leader};
use crate::names::{RaftId, SlotName};
use crate::state::ClusterState;
use crate::state::context::VersionKey;
use crate::state::lease::VersionLease;
use crate::state::node::{Node, NodeStatus};
use crate::state::slot::{Grantee, Slot};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BuryNode {
    /// The node.
    pub node: RaftId,
}

impl BuryNode {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_leader(state, cx, "bury_node")?;
        let Some(node) = state.nodes.get(&self.node) else {
            return Err(Missing::Node(self.node).into());
        };
        let name = node.name.clone();
        match node.status {
            NodeStatus::Removed { .. } => return Ok(Done::Ok),
            NodeStatus::Leaving { .. } => {}
            NodeStatus::Joining | NodeStatus::Member => {
                return Err(Conflict::NotLeaving { node: name }.into());
            }
        }
        // A node that counts for a majority and is refused by everybody would be a dead voter.
        if cx.voters.contains(&self.node) {
            return Err(Conflict::StillVotes { node: name }.into());
        }
        bury(state, self.node, cx)?;
        Ok(Done::Ok)
    }
}

/// Makes a node's row its tombstone, and takes what is kept for it out of all others. That a version was acknowledged by it
/// stays: it says what the node holds that is to be replaced.
pub(super) fn bury(state: &mut ClusterState, id: RaftId, cx: &ApplyContext<'_>) -> Result<(), Refusal> {
    let Some(node) = state.nodes.get(&id).cloned() else {
        return Err(Missing::Node(id).into());
    };
    let at = stamp(state, cx);
    let tombstone = Node {
        status: NodeStatus::Removed { at },
        // Nothing is granted to it any more.
        slot_keys: BTreeMap::new(),
        ..Node::clone(&node)
    };
    state.nodes.put(id, tombstone)?;
    state.reports.remove(&id);
    drop_uses(state, id, at)?;
    drop_grants(state, id)?;
    drop_leases(state, id)?;
    destruction::settle(state, cx.at)
}

/// The transport keys as they were wrapped for it.
fn drop_grants(state: &mut ClusterState, id: RaftId) -> Result<(), Refusal> {
    let grantee = Grantee::Node(id);
    let concerned = |slot: &Slot| {
        let mut generations = slot.transport.iter();
        generations.any(|t| t.grants.contains_key(&grantee) || t.rejected.contains_key(&id))
    };
    let slots: Vec<(SlotName, Slot)> = state
        .slots
        .iter()
        .filter(|(_, slot)| concerned(slot))
        .map(|(name, slot)| (name.clone(), Slot::clone(slot)))
        .collect();
    for (name, mut slot) in slots {
        for generation in &mut slot.transport {
            generation.grants.remove(&grantee);
            generation.rejected.remove(&id);
        }
        state.slots.put(name, slot)?;
    }
    Ok(())
}

/// What it was given counts as used in the sum; its part of the row goes, so that rows do not grow with all nodes that ever
/// were.
fn drop_leases(state: &mut ClusterState, id: RaftId) -> Result<(), Refusal> {
    let leases: Vec<(VersionKey, VersionLease)> = state
        .leases
        .iter()
        .filter(|(_, lease)| lease.nodes.contains_key(&id))
        .map(|(key, lease)| (key.clone(), VersionLease::clone(lease)))
        .collect();
    for (key, mut lease) in leases {
        lease.nodes.remove(&id);
        state.leases.put(key, lease)?;
    }
    Ok(())
}
