//! `DestroyTransportKey`: no version is wrapped under a superseded transport key any more. Its grants leave the state,
//! and every node removes it from its token; what old logs, snapshots and backups hold under it can be opened by nobody
//! once all have.

use serde::{Deserialize, Serialize};

use super::{
    ApplyContext, Conflict, Done, Missing, Refusal, destruction, require_leader, transport_in_state,
};
use crate::names::{SlotName, TransportId};
use crate::state::ClusterState;
use crate::state::slot::{Slot, TransportState};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DestroyTransportKey {
    /// The slot.
    pub slot: SlotName,
    /// The superseded key.
    pub id: TransportId,
}

impl DestroyTransportKey {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_leader(state, cx, "destroy_transport_key")?;
        let (name, id) = (&self.slot, self.id);
        let mut slot = match state.slots.get(name) {
            Some(slot) => Slot::clone(slot),
            None => return Err(Missing::Slot(name.clone()).into()),
        };
        if slot.transport(id).is_some_and(|known| known.state.is_ended()) {
            return Ok(Done::Ok);
        }
        let superseded = transport_in_state(&mut slot, name, id, TransportState::Superseded)?;
        if let Some((key, _)) = state.wrapped_under(name, id).next() {
            return Err(Conflict::TransportInUse {
                slot: name.clone(),
                id,
                context: key.context.clone(),
                version: key.version,
            }
            .into());
        }
        superseded.end();
        state.slots.put(name.clone(), slot)?;
        destruction::settle(state, cx.at)?;
        Ok(Done::Ok)
    }
}
