//! `AckTransportKey`: a node says that it holds a transport key that was offered, proven by its check, or that it has
//! removed one that is being destroyed.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Done, Refusal, destruction, require_self, standing_node};
use crate::names::{RaftId, SlotName, TransportId};
use crate::state::ClusterState;
use crate::state::slot::{Slot, TransportState};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AckTransportKey {
    /// The node.
    pub node: RaftId,
    /// The slot.
    pub slot: SlotName,
    /// The transport key.
    pub id: TransportId,
    /// Which of the two: what is said late must not be taken for the other.
    pub gone: bool,
}

impl AckTransportKey {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_self(cx, self.node)?;
        standing_node(state, self.node)?;
        // One that is over by now is no error: the node will see that itself.
        let Some(mut slot) = state.slots.get(&self.slot).map(|slot| Slot::clone(slot)) else {
            return Ok(Done::Ok);
        };
        let asked = |found: TransportState| match found {
            TransportState::Offered | TransportState::Current => !self.gone,
            TransportState::Destroying => self.gone,
            TransportState::Superseded | TransportState::Destroyed => false,
        };
        let found = slot.transport.iter_mut().find(|it| it.id == self.id);
        let Some(generation) = found.filter(|it| asked(it.state) && !it.acks.contains(&self.node)) else {
            return Ok(Done::Ok);
        };
        generation.acks.insert(self.node);
        state.slots.put(self.slot.clone(), slot)?;
        destruction::settle(state, cx.at)?;
        Ok(Done::Ok)
    }
}
