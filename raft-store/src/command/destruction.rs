//! The end of a destruction, of a version or of a transport key: no node that belongs to the cluster owes it any more.

use super::Refusal;
use crate::names::{SlotName, UnixMillis};
use crate::seeded::bug;
use crate::state::ClusterState;
use crate::state::context::{Destruction, KeyVersion, VersionKey, VersionState};
use crate::state::slot::{Slot, TransportGeneration, TransportState};

/// Ends every destruction that nobody owes any more; the rows stay as tombstones. Whatever makes somebody owe less
/// calls it: an acknowledgement, and the removal of a node, which may have been the last that others waited for.
pub(super) fn settle(state: &mut ClusterState, at: UnixMillis) -> Result<(), Refusal> {
    let now = &*state;
    let over: Vec<(VersionKey, KeyVersion)> = now
        .destroying()
        .filter(|(_, version)| now.owing(version).next().is_none())
        .map(|(key, version)| (key.clone(), version.clone()))
        .collect();
    for (key, version) in over {
        if bug("bug::drop_tombstones") {
            state.versions.remove(&key);
            continue;
        }
        let destruction = version.destruction.clone().map(|destruction| Destruction {
            ended_at: Some(at),
            ..destruction
        });
        let destroyed = KeyVersion {
            state: VersionState::Destroyed,
            destruction,
            ..version
        };
        state.versions.put(key, destroyed)?;
    }
    settle_transport(state, at)
}

/// The same of transport keys; their tombstones stay in the slot's row.
fn settle_transport(state: &mut ClusterState, at: UnixMillis) -> Result<(), Refusal> {
    let now = &*state;
    let is_over = |generation: &TransportGeneration| {
        generation.state == TransportState::Destroying && now.owing_transport(generation).next().is_none()
    };
    let over: Vec<(SlotName, Slot)> = now
        .slots
        .iter()
        .filter(|(_, slot)| slot.transport.iter().any(is_over))
        .map(|(name, slot)| {
            let mut slot = Slot::clone(slot);
            for generation in slot.transport.iter_mut().filter(|it| is_over(it)) {
                generation.state = TransportState::Destroyed;
                generation.ended_at = Some(at);
            }
            (name.clone(), slot)
        })
        .collect();
    for (name, slot) in over {
        state.slots.put(name, slot)?;
    }
    Ok(())
}
