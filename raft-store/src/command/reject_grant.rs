//! `RejectGrant`: a node cannot open the transport key that it was granted. The grant goes, so that another holder
//! grants again; whoever made it grants nothing more of this key to that node. OAEP proves nothing about a sender,
//! and a grant that is junk must not keep a node out for good.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Conflict, Done, Missing, Refusal, require_self, standing_node};
use crate::names::{RaftId, SlotName, TransportId};
use crate::state::ClusterState;
use crate::state::slot::{Grant, Grantee, Slot};

/// See the module. A node says this of itself only, and of each holder once: that bounds how often it can.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RejectGrant {
    /// The node.
    pub node: RaftId,
    /// The slot.
    pub slot: SlotName,
    /// The transport key.
    pub id: TransportId,
    /// What it cannot open: compare and set, so that a later grant is not taken for this one.
    pub grant: Grant,
}

impl RejectGrant {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_self(cx, self.node)?;
        let node = standing_node(state, self.node)?.name.clone();
        let (name, id) = (&self.slot, self.id);
        let mut slot = match state.slots.get(name) {
            Some(slot) => Slot::clone(slot),
            None => return Err(Missing::Slot(name.clone()).into()),
        };
        let Some(transport) = slot.transport.iter_mut().find(|t| t.id == id) else {
            let slot = name.clone();
            return Err(Missing::TransportKey { slot, id }.into());
        };
        let own = Grantee::Node(self.node);
        if transport.grants.get(&own) != Some(&self.grant) {
            return Ok(Done::Ok);
        }
        let rejected = transport.rejected.entry(self.node).or_default();
        let latest = rejected.latest.take();
        rejected.granters.extend(latest);
        let may_grant = |holder: &Grantee| match holder {
            Grantee::Node(holder) => {
                *holder != self.node
                    && !rejected.granters.contains(holder)
                    && standing_node(state, *holder).is_ok()
            }
            Grantee::Recovery(_) | Grantee::Backup(_) => false,
        };
        // Without another holder nothing would take its place; and a key that is granted to nobody counts as one
        // that anybody may grant.
        if !transport.grants.keys().any(may_grant) {
            let slot = name.clone();
            return Err(Conflict::NoOtherGranter { node, slot }.into());
        }
        transport.grants.remove(&own);
        state.slots.put(name.clone(), slot)?;
        Ok(Done::Ok)
    }
}
