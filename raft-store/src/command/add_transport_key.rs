//! `AddTransportKey`: a slot gets a new transport generation; the one before is superseded.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Conflict, Done, Existing, Forbidden, Refusal, refuse_retired, require_cluster};
use crate::names::{SlotName, TransportId};
use crate::state::ClusterState;
use crate::state::slot::{Grant, Grantee, Slot, TransportGeneration, TransportMode, TransportState};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AddTransportKey {
    /// The slot.
    pub slot: SlotName,
    /// The new key's identity.
    pub id: TransportId,
    /// The generation the proposer saw as highest (0 = none): compare and set.
    pub expected_generation: u32,
    /// Its protection.
    pub mode: TransportMode,
    /// A public constant wrapped under it.
    pub check: Vec<u8>,
    /// First grants.
    pub grants: BTreeMap<Grantee, Grant>,
}

impl AddTransportKey {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_cluster(state)?;
        let mut slot = state
            .slots
            .get(&self.slot)
            .map_or_else(Slot::default, |slot| Slot::clone(slot));
        let highest = slot.transport.last().map_or(0, |t| t.generation);
        if highest != self.expected_generation {
            let (slot, generation) = (self.slot.clone(), highest);
            return Err(Conflict::TransportGeneration { slot, generation }.into());
        }
        if slot.transport(self.id).is_some() {
            return Err(Existing::TransportKey(self.id).into());
        }
        for (grantee, grant) in &self.grants {
            if !matches!(grantee, Grantee::Node(_)) {
                let (slot, id) = (self.slot.clone(), self.id);
                return Err(Forbidden::Grantee { slot, id }.into());
            }
            refuse_retired(state, &grant.blob)?;
            grant.check(state.epoch())?;
        }
        for generation in &mut slot.transport {
            if generation.state == TransportState::Current {
                generation.state = TransportState::Superseded;
            }
        }
        slot.transport.push(TransportGeneration {
            id: self.id,
            generation: highest + 1,
            mode: self.mode,
            check: self.check.clone(),
            state: TransportState::Current,
            grants: self.grants.clone(),
            created_at: cx.at,
            rejected: BTreeMap::new(),
            acks: BTreeSet::new(),
            ended_at: None,
        });
        state.slots.put(self.slot.clone(), slot)?;
        Ok(Done::Ok)
    }
}
