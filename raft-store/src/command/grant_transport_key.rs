//! `GrantTransportKey`: a transport key wrapped to one more node's slot key.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Done, Origin, Refusal};
use crate::names::{RaftId, SlotName, TransportId};
use crate::state::ClusterState;
use crate::state::node::NodeStatus;
use crate::state::slot::{Grantee, Slot};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GrantTransportKey {
    /// The slot.
    pub slot: SlotName,
    /// The transport key.
    pub id: TransportId,
    /// To whom.
    pub grantee: Grantee,
    /// The key wrapped to the grantee, sealed under the replication key.
    pub blob: Vec<u8>,
}

impl GrantTransportKey {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        let mut slot = match state.slots.get(&self.slot) {
            Some(slot) => Slot::clone(slot),
            None => return Err(Refusal::NotFound(format!("slot {}", self.slot))),
        };
        if let Grantee::Node(id) = self.grantee {
            let node = state
                .nodes
                .get(&id)
                .ok_or_else(|| Refusal::NotFound(format!("node {id}")))?;
            if matches!(node.status, NodeStatus::Removed { .. }) {
                return Err(Refusal::Forbidden(format!("node {} was removed", node.name)));
            }
            if !node.slot_keys.contains_key(&self.slot) {
                return Err(Refusal::Conflict(format!(
                    "node {} has no key for slot {}",
                    node.name, self.slot
                )));
            }
        }
        let Some(transport) = slot.transport.iter_mut().find(|t| t.id == self.id) else {
            return Err(Refusal::NotFound(format!(
                "transport key {} of slot {}",
                self.id, self.slot
            )));
        };
        // Whoever holds the key is a node that was granted it: no other can wrap it to anybody. Only a node
        // that began alone, without a cluster key to vouch with, has made one that it granted to nobody.
        let holds = |node: &RaftId| {
            transport.grants.is_empty() || transport.grants.contains_key(&Grantee::Node(*node))
        };
        if !matches!(cx.origin, Origin::Node(node) if holds(node)) {
            return Err(Refusal::Forbidden(format!(
                "transport key {} of slot {} may be granted only by a node that was granted it",
                self.id, self.slot
            )));
        }
        // The first grant stands: two granters at once must not make the grantee's view change.
        if !transport.grants.contains_key(&self.grantee) {
            transport.grants.insert(self.grantee.clone(), self.blob.clone());
            state.slots.put(self.slot.clone(), slot);
        }
        Ok(Done::Ok)
    }
}
