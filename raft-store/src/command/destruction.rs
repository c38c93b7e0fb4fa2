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

/// Tombstones of transport keys that a slot's row keeps; the oldest go first. A token that comes back
/// after so many rekeys and still has such a key is said to hold one that nobody knows: it is not removed there by itself.
const MAX_ENDED_TRANSPORT_KEYS: usize = 256;

/// The same of transport keys; their tombstones stay in the slot's row, so many of them.
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
                // Who removed it nobody asks any more.
                generation.acks.clear();
            }
            drop_oldest_ended(&mut slot);
            (name.clone(), slot)
        })
        .collect();
    for (name, slot) in over {
        state.slots.put(name, slot)?;
    }
    Ok(())
}

/// A row that filled up with tombstones would take no grant any more, and nobody could join.
fn drop_oldest_ended(slot: &mut Slot) {
    let is_ended = |generation: &TransportGeneration| generation.state == TransportState::Destroyed;
    let ended = slot.transport.iter().filter(|it| is_ended(it)).count();
    let mut surplus = ended.saturating_sub(MAX_ENDED_TRANSPORT_KEYS);
    slot.transport.retain(|generation| {
        let goes = surplus > 0 && is_ended(generation);
        surplus -= usize::from(goes);
        !goes
    });
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::names::TransportId;
    use crate::state::slot::TransportMode;

    fn generation(number: u32, state: TransportState) -> TransportGeneration {
        TransportGeneration {
            id: TransportId(u128::from(number).to_be_bytes()),
            generation: number,
            mode: TransportMode::Standard,
            check: vec![1; 40],
            state,
            grants: BTreeMap::new(),
            created_at: 1,
            rejected: BTreeMap::new(),
            acks: BTreeSet::new(),
            ended_at: None,
        }
    }

    #[test]
    fn a_slot_keeps_so_many_tombstones_and_every_key_that_is_not_over() {
        let most = MAX_ENDED_TRANSPORT_KEYS as u32;
        let mut slot = Slot::default();
        slot.transport.push(generation(1, TransportState::Superseded));
        let ended = (2..=most + 3).map(|number| generation(number, TransportState::Destroyed));
        slot.transport.extend(ended);
        slot.transport.push(generation(most + 4, TransportState::Current));
        drop_oldest_ended(&mut slot);
        let kept: Vec<u32> = slot.transport.iter().map(|it| it.generation).collect();
        let expected: Vec<u32> = [1].into_iter().chain(4..=most + 4).collect();
        assert_eq!(kept, expected, "the two that ended first are gone");
        drop_oldest_ended(&mut slot);
        assert_eq!(slot.transport.len(), kept.len());
    }
}
