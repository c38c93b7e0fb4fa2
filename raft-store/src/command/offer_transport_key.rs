//! `OfferTransportKey`: the leader has made the transport key that a rekey asked for. Every member takes it and says so;
//! until then nothing is wrapped under it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{
    ApplyContext, Conflict, Done, Existing, Forbidden, Missing, Refusal, refuse_retired, require_leader,
};
use crate::names::{SlotName, TransportId};
use crate::state::ClusterState;
use crate::state::slot::{Grant, Grantee, Slot, TransportGeneration, TransportMode, TransportState};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OfferTransportKey {
    /// The slot.
    pub slot: SlotName,
    /// The new key's identity.
    pub id: TransportId,
    /// The generation the proposer saw as newest: compare and set.
    pub expected_generation: u32,
    /// Its protection.
    pub mode: TransportMode,
    /// A public constant wrapped under it.
    pub check: Vec<u8>,
    /// First grants.
    pub grants: BTreeMap<Grantee, Grant>,
}

impl OfferTransportKey {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_leader(state, cx, "offer_transport_key")?;
        let name = &self.slot;
        let mut slot = match state.slots.get(name) {
            Some(slot) => Slot::clone(slot),
            None => return Err(Missing::Slot(name.clone()).into()),
        };
        let newest = slot.newest_generation();
        if newest != self.expected_generation || !slot.awaits_transport() {
            let (slot, generation) = (name.clone(), newest);
            return Err(Conflict::TransportGeneration { slot, generation }.into());
        }
        if slot.transport(self.id).is_some() {
            return Err(Existing::TransportKey(self.id).into());
        }
        for (grantee, grant) in &self.grants {
            if !matches!(grantee, Grantee::Node(_)) {
                let (slot, id) = (name.clone(), self.id);
                return Err(Forbidden::Grantee { slot, id }.into());
            }
            refuse_retired(state, &grant.blob)?;
            grant.check(state.epoch())?;
        }
        slot.transport.push(TransportGeneration {
            id: self.id,
            generation: newest.saturating_add(1),
            mode: self.mode,
            check: self.check.clone(),
            state: TransportState::Offered,
            grants: self.grants.clone(),
            created_at: cx.at,
            rejected: BTreeMap::new(),
            acks: BTreeSet::new(),
            ended_at: None,
        });
        state.slots.put(name.clone(), slot)?;
        Ok(Done::Ok)
    }
}
