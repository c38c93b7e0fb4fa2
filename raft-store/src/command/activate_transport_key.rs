//! `ActivateTransportKey`: a rekey's second phase. From this entry on new versions are wrapped under the new key; the one
//! before stays for the versions that are wrapped under it.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Conflict, Done, Missing, Refusal, require_leader, transport_in_state};
use crate::names::{RaftId, SlotName, TransportId};
use crate::state::ClusterState;
use crate::state::slot::{Slot, TransportState};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ActivateTransportKey {
    /// The slot.
    pub slot: SlotName,
    /// The offered key.
    pub id: TransportId,
    /// Voters and members that have not said that they hold it but were silent long enough to have taken themselves out
    /// of service. They take it before they come back: from the state, or from a holder that grants it to them then.
    pub left_out: BTreeSet<RaftId>,
}

impl ActivateTransportKey {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_leader(state, cx, "activate_transport_key")?;
        let (name, id) = (&self.slot, self.id);
        let mut slot = match state.slots.get(name) {
            Some(slot) => Slot::clone(slot),
            None => return Err(Missing::Slot(name.clone()).into()),
        };
        if slot.current_transport().is_some_and(|current| current.id == id) {
            return Ok(Done::Ok);
        }
        let offered = transport_in_state(&mut slot, name, id, TransportState::Offered)?;
        let holders = cx.voters.intersection(&offered.acks).count();
        let accounted = |node: &RaftId| offered.acks.contains(node) || self.left_out.contains(node);
        let members = state
            .nodes
            .iter()
            .filter(|(_, node)| node.is_member())
            .map(|(id, _)| id);
        if holders * 2 <= cx.voters.len() || !cx.voters.iter().chain(members).all(accounted) {
            return Err(Conflict::TransportHolders {
                slot: name.clone(),
                id,
                holders: holders as u64,
                voters: cx.voters.len() as u64,
            }
            .into());
        }
        for generation in &mut slot.transport {
            if generation.state == TransportState::Current {
                generation.state = TransportState::Superseded;
            } else if generation.id == id {
                generation.state = TransportState::Current;
            }
        }
        state.slots.put(name.clone(), slot)?;
        Ok(Done::Ok)
    }
}
