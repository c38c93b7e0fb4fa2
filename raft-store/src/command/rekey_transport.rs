//! `RekeyTransport`: a slot is to get its next transport key. This entry makes none: the leader does, in its token, and
//! whoever leads after it finds here what is to be done.

use serde::{Deserialize, Serialize};

use super::{
    ApplyContext, Bounded, Conflict, Done, Missing, Refusal, require_admin, require_nobody_leaves,
    require_slot_keys, transport_in_state,
};
use crate::codec;
use crate::names::{SlotName, TransportId};
use crate::state::ClusterState;
use crate::state::slot::{Slot, SlotRekey, TransportState};
use crate::state::table::RowKind;

/// Transport keys of one slot that are not destroyed. Each has a grant for every node, and all of them lie in one row.
pub const MAX_LIVE_TRANSPORT_KEYS: usize = 8;

/// Bytes that a grant takes besides what was wrapped and sealed: to whom it is, its epoch, an acknowledgement.
const AROUND_A_GRANT: usize = 48;

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RekeyTransport {
    /// The slot.
    pub slot: SlotName,
    /// The generation the proposer saw as newest: compare and set.
    pub expected_generation: u32,
    /// A key that was made for a rekey and never came to all members: it is given up, and another one is made.
    pub give_up: Option<TransportId>,
}

impl RekeyTransport {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_admin(cx, "rekey_transport")?;
        let name = &self.slot;
        let mut slot = match state.slots.get(name) {
            Some(slot) if slot.current_transport().is_some() => Slot::clone(slot),
            _ => return Err(Missing::Slot(name.clone()).into()),
        };
        let newest = slot.newest_generation();
        if newest != self.expected_generation {
            let (slot, generation) = (name.clone(), newest);
            return Err(Conflict::TransportGeneration { slot, generation }.into());
        }
        if let Some(id) = self.give_up {
            let offered = transport_in_state(&mut slot, name, id, TransportState::Offered)?;
            offered.end();
        }
        if slot.awaits_transport() || slot.offered_transport().is_some() {
            return Err(Conflict::RekeyOpen { slot: name.clone() }.into());
        }
        // Who makes it wraps it under the key that is current now: both would have to be waited for.
        if let Some((key, _)) = state.pending().find(|(_, version)| version.slot == *name) {
            let (context, version) = (key.context.clone(), key.version);
            return Err(Conflict::Pending { context, version }.into());
        }
        let live = slot
            .transport
            .iter()
            .filter(|it| it.state != TransportState::Destroyed);
        let live = live.count();
        if live >= MAX_LIVE_TRANSPORT_KEYS {
            let (slot, live) = (name.clone(), live as u64);
            return Err(Conflict::LiveTransportKeys { slot, live }.into());
        }
        require_nobody_leaves(state)?;
        require_slot_keys(state, name)?;
        check_room(state, &slot)?;
        slot.rekey = Some(SlotRekey {
            after: newest,
            requested_at: cx.at,
        });
        state.slots.put(name.clone(), slot)?;
        // What was given up may be nobody's to remove.
        super::destruction::settle(state, cx.at)?;
        Ok(Done::TransportRekey { generation: newest })
    }
}

/// Refuses what would fill the slot's row: the next key is granted to every node, and whoever joins is granted every key.
/// Here there is somebody to be told; when the key is offered, or a joiner waits for its grants, there is nobody.
fn check_room(state: &ClusterState, slot: &Slot) -> Result<(), Refusal> {
    let grants = slot.transport.iter().flat_map(|it| it.grants.values());
    let largest = grants.map(|grant| grant.blob.len()).max().unwrap_or_default();
    let nodes = state.nodes.values().filter(|node| node.is_standing()).count();
    let more = (nodes + MAX_LIVE_TRANSPORT_KEYS) * (largest + AROUND_A_GRANT);
    let size = usize::try_from(codec::size(slot)).unwrap_or(usize::MAX);
    Bounded::Row(RowKind::Slot).check(size.saturating_add(more), RowKind::Slot.limit())
}
