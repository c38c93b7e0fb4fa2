//! `GrantTransportKey`: a transport key wrapped to one more node's slot key.

use serde::{Deserialize, Serialize};

use super::{
    ApplyContext, Conflict, Done, Forbidden, Missing, Origin, Refusal, refuse_retired, standing_node,
};
use crate::names::{RaftId, SlotName, TransportId};
use crate::state::ClusterState;
use crate::state::slot::{Grant, Grantee, Slot};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GrantTransportKey {
    /// The slot.
    pub slot: SlotName,
    /// The transport key.
    pub id: TransportId,
    /// To whom.
    pub grantee: Grantee,
    /// The key wrapped to the grantee.
    pub grant: Grant,
}

impl GrantTransportKey {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        let (name, id) = (&self.slot, self.id);
        let mut slot = match state.slots.get(name) {
            Some(slot) => Slot::clone(slot),
            None => return Err(Missing::Slot(name.clone()).into()),
        };
        refuse_retired(state, &self.grant.blob)?;
        // Recovery and backup are for people to grant, and they cannot yet.
        let Grantee::Node(grantee) = self.grantee else {
            let slot = name.clone();
            return Err(Forbidden::Grantee { slot, id }.into());
        };
        let node = standing_node(state, grantee)?;
        if !node.slot_keys.contains_key(name) {
            let (node, slot) = (node.name.clone(), name.clone());
            return Err(Conflict::NoSlotKey { node, slot }.into());
        }
        let Some(transport) = slot.transport.iter_mut().find(|t| t.id == id) else {
            let slot = name.clone();
            return Err(Missing::TransportKey { slot, id }.into());
        };
        // A grant that was long under way must not keep the key alive. No log of an earlier release has such a state.
        if transport.state.is_ended() {
            let slot = name.clone();
            return Err(Conflict::TransportState {
                slot,
                id,
                state: transport.state,
            }
            .into());
        }
        // Whoever holds the key is a node that was granted it: no other can wrap it to anybody. Only a node
        // that began alone, without a cluster key to vouch with, has made one that it granted to nobody.
        let holds = |node: &RaftId| {
            transport.grants.is_empty() || transport.grants.contains_key(&Grantee::Node(*node))
        };
        let granter = match cx.origin {
            Origin::Node(node) if holds(node) => *node,
            _ => {
                let slot = name.clone();
                return Err(Forbidden::Grantor { slot, id }.into());
            }
        };
        standing_node(state, granter)?;
        // Kept of grantees only that have rejected one: no log of an earlier release has such.
        if let Some(rejected) = transport.rejected.get_mut(&grantee) {
            if rejected.granters.contains(&granter) {
                let slot = name.clone();
                return Err(Forbidden::RejectedGrantor { slot, id }.into());
            }
            if !transport.grants.contains_key(&self.grantee) {
                rejected.latest = Some(granter);
            }
        }
        self.grant.check(state.epoch())?;
        // The first grant stands: two granters at once must not make the grantee's view change.
        if !transport.grants.contains_key(&self.grantee) {
            transport.grants.insert(self.grantee.clone(), self.grant.clone());
            state.slots.put(name.clone(), slot)?;
        }
        Ok(Done::Ok)
    }
}
