//! Where the replacement of transport keys and of the replication key stands, for people: read from the state, so that
//! every node says the same, with what happens next and what there is to do.

use std::collections::BTreeSet;

use hsm_api::admin::{
    KnownToRemoved, NodeReplicationKeys, RekeyPhase, RekeyStatus, ReplicationRekey, SlotRekey,
    TransportKeyInfo, TransportKeyState,
};
use raft_store::names::{RaftId, SlotName, UnixMillis};
use raft_store::state::ClusterState;
use raft_store::state::node::NodeStatus;
use raft_store::state::slot::{Slot, TransportGeneration, TransportState};

use super::views::{held_actively, rfc3339};
use crate::rekey::decide::outdated;

/// What every node answers.
#[must_use]
pub fn status(state: &ClusterState) -> RekeyStatus {
    // Until the next version encrypts, also while that is on its way.
    let outdated = outdated(state);
    let slots = state.slots().iter().map(|(name, slot)| {
        let here = outdated.iter().filter(|(context, active)| {
            let active = state.version(context, *active);
            active.is_some_and(|active| active.slot == *name)
        });
        let contexts = here.map(|(context, _)| context.to_string()).collect();
        of_slot(state, name, slot, contexts)
    });
    RekeyStatus {
        slots: slots.collect(),
        replication: of_replication(state),
    }
}

/// How much of what is in use removed nodes know: what somebody has to replace, or to have replaced.
#[must_use]
pub fn known_to_removed(state: &ClusterState) -> KnownToRemoved {
    let nodes = state.nodes().iter();
    let removed = nodes.filter(|(_, node)| matches!(node.status, NodeStatus::Removed { .. }));
    let held: BTreeSet<String> = removed.flat_map(|(id, _)| held_actively(state, *id)).collect();
    let slots = state.slots().iter();
    let slots = slots.filter(|(_, slot)| !with_transport_key(state, slot).is_empty());
    KnownToRemoved {
        versions: u32::try_from(held.len()).unwrap_or(u32::MAX),
        transport_keys: u32::try_from(slots.count()).unwrap_or(u32::MAX),
        replication_key: !with_replication_key(state).is_empty(),
    }
}

fn of_slot(state: &ClusterState, name: &SlotName, slot: &Slot, contexts: Vec<String>) -> SlotRekey {
    let phase = phase(slot, &contexts);
    let keys: Vec<TransportKeyInfo> = slot
        .transport
        .iter()
        .map(|generation| of_key(state, name, generation))
        .collect();
    let known_to_removed = with_transport_key(state, slot);
    let next = next(name, phase, &keys, &contexts, &known_to_removed);
    SlotRekey {
        slot: name.to_string(),
        phase,
        transport_keys: keys,
        contexts_to_rotate: contexts,
        known_to_removed,
        next,
    }
}

/// Removed nodes that may have a slot's current transport key: it was made before they left. Whether one had it is not
/// kept, so that one is named too that never used it.
fn with_transport_key(state: &ClusterState, slot: &Slot) -> Vec<String> {
    match slot.current_transport() {
        Some(current) => removed(state, |_, left| left >= current.created_at),
        None => Vec::new(),
    }
}

/// Removed nodes that have the cluster's replication key: it was the cluster's before they left, or they had said that they
/// have it.
fn with_replication_key(state: &ClusterState) -> Vec<String> {
    let key = state.meta().map(|meta| meta.trk_id).unwrap_or_default();
    let row = state.replication();
    let since = row.and_then(|row| row.since);
    let said = |id: RaftId| {
        row.and_then(|row| row.held.get(&id))
            .is_some_and(|keys| keys.contains(&key))
    };
    removed(state, |id, left| {
        since.is_none_or(|since| left >= since) || said(id)
    })
}

/// The names of the removed nodes that this holds for, each once; `had` is told when each left.
fn removed(state: &ClusterState, had: impl Fn(RaftId, UnixMillis) -> bool) -> Vec<String> {
    let names = state.nodes().iter().filter_map(|(id, node)| match node.status {
        NodeStatus::Removed { at } if had(*id, at) => Some(node.name.to_string()),
        _ => None,
    });
    let names: BTreeSet<String> = names.collect();
    names.into_iter().collect()
}

fn phase(slot: &Slot, contexts: &[String]) -> RekeyPhase {
    let has = |wanted: TransportState| slot.transport.iter().any(|it| it.state == wanted);
    if slot.awaits_transport() {
        RekeyPhase::Making
    } else if has(TransportState::Offered) {
        RekeyPhase::Granting
    } else if !contexts.is_empty() {
        RekeyPhase::Rotating
    } else if has(TransportState::Superseded) {
        RekeyPhase::Waiting
    } else if has(TransportState::Destroying) {
        RekeyPhase::Destroying
    } else {
        RekeyPhase::Settled
    }
}

fn of_key(state: &ClusterState, slot: &SlotName, generation: &TransportGeneration) -> TransportKeyInfo {
    let lacking = || -> Vec<String> {
        let members = state.nodes().iter();
        let members = members.filter(|(_, node)| node.is_member());
        let lacking = members.filter(|(id, _)| !generation.acks.contains(*id));
        lacking.map(|(_, node)| node.name.to_string()).collect()
    };
    let waiting_for: Vec<String> = match generation.state {
        TransportState::Offered => lacking(),
        // Of a key that was there before anybody could replace it nobody was asked.
        TransportState::Current if !generation.acks.is_empty() => lacking(),
        TransportState::Destroying => {
            let owing = state.owing_transport(generation);
            owing.map(|(_, node)| node.name.to_string()).collect()
        }
        TransportState::Current | TransportState::Superseded | TransportState::Destroyed => Vec::new(),
    };
    TransportKeyInfo {
        id: generation.id.to_string(),
        generation: generation.generation,
        state: TransportKeyState::from_word(generation.state.as_str()),
        created_at: rfc3339(generation.created_at),
        versions: state.wrapped_under(slot, generation.id).count() as u64,
        waiting_for,
    }
}

fn next(
    slot: &SlotName,
    phase: RekeyPhase,
    keys: &[TransportKeyInfo],
    contexts: &[String],
    known_to_removed: &[String],
) -> String {
    // While another one is on its way, or contexts are being rotated to it, that comes first.
    let begins = matches!(
        phase,
        RekeyPhase::Settled | RekeyPhase::Waiting | RekeyPhase::Destroying
    );
    if begins && !known_to_removed.is_empty() {
        return format!(
            "removed since the transport key was made, and may have it: {}; hsmctl cluster rekey transport --slot {slot}",
            known_to_removed.join(", ")
        );
    }
    let waiting = |state: TransportKeyState| {
        let of = keys.iter().filter(|key| key.state == state);
        let nodes: Vec<&str> = of.flat_map(|key| &key.waiting_for).map(String::as_str).collect();
        nodes.join(", ")
    };
    match phase {
        RekeyPhase::Making => "the leader makes the new transport key".to_owned(),
        RekeyPhase::Granting => format!(
            "every member has to take the new transport key; waiting for: {}. A node that stays away is left out by \
             itself; one whose slot does not serve has to be mended. To begin again with another key: hsmctl cluster \
             rekey transport --slot {slot} --restart",
            waiting(TransportKeyState::Offered)
        ),
        RekeyPhase::Rotating => format!(
            "contexts are being rotated to versions under the new transport key: {}",
            contexts.join(", ")
        ),
        RekeyPhase::Waiting => {
            let old = keys
                .iter()
                .filter(|key| key.state == TransportKeyState::Superseded);
            let versions: u64 = old.map(|key| key.versions).sum();
            if versions == 0 {
                "the old transport key is about to be destroyed".to_owned()
            } else {
                format!(
                    "{versions} older versions need the old transport key; it is destroyed by itself with the last of \
                     them: re-wrap what is encrypted under them (hsmctl key usage), then hsmctl key destroy"
                )
            }
        }
        RekeyPhase::Destroying => format!(
            "the old transport key is being removed from every token; waiting for: {}",
            waiting(TransportKeyState::Destroying)
        ),
        RekeyPhase::Settled | RekeyPhase::Unknown => "nothing to do".to_owned(),
    }
}

fn of_replication(state: &ClusterState) -> ReplicationRekey {
    let key = state.meta().map(|meta| meta.trk_id).unwrap_or_default();
    let former = state.replication().and_then(|row| row.former.as_ref());
    let former = former.map(|former| former.id);
    let records_left = former.map_or(0, |id| {
        state.keys_sealed_under(id).count() + state.grants_sealed_under(id).len()
    });
    let standing = state.nodes().iter().filter(|(_, node)| node.is_standing());
    let standing: Vec<_> = standing
        .map(|(id, node)| (node.name.to_string(), state.replication_keys_of(*id)))
        .collect();
    // A key besides the cluster's that was the cluster's before is on its way out, any other one on its way in.
    let is_retired = |id: &[u8; 8]| state.replication().is_some_and(|row| row.is_retired(*id));
    let all = standing.iter().flat_map(|(_, keys)| keys);
    let new = all.filter(|id| **id != key && !is_retired(id)).min().copied();
    let without = |wanted: [u8; 8]| {
        let lacking = standing.iter().filter(|(_, keys)| !keys.contains(&wanted));
        lacking.map(|(name, _)| name.clone()).collect::<Vec<_>>()
    };
    let with_old: Vec<String> = standing
        .iter()
        .filter(|(_, keys)| keys.iter().any(is_retired))
        .map(|(name, _)| name.clone())
        .collect();
    let known_to_removed = with_replication_key(state);
    let removed_with_new = new.map_or_else(Vec::new, |new| {
        let held = state.replication().map(|row| &row.held);
        removed(state, |id, _| {
            let said = held.and_then(|held| held.get(&id));
            said.is_some_and(|keys| keys.contains(&new))
        })
    });
    let can_come = |new: &[u8; 8]| former.is_none() && without(*new).is_empty();
    let next_key = new.filter(|new| can_come(new) && removed_with_new.is_empty());
    let next = match (former, new) {
        (Some(_), _) => format!(
            "{records_left} records are being sealed under the new key; until that is done, every node keeps both"
        ),
        (None, Some(new)) => match without(new) {
            lacking if lacking.is_empty() && !removed_with_new.is_empty() => format!(
                "every node has the new key, and so has {}, which was removed: give every node another one in its place; \
                 hsmctl cluster rekey replication makes this one the cluster's all the same",
                removed_with_new.join(", ")
            ),
            lacking if lacking.is_empty() => {
                "every node has the new key: hsmctl cluster rekey replication makes it the cluster's"
                    .to_owned()
            }
            lacking => format!(
                "give the new key beside the present one to: {}; restart them one by one",
                lacking.join(", ")
            ),
        },
        (None, None) if with_old.is_empty() && !known_to_removed.is_empty() => format!(
            "removed, and have the replication key: {}; give every node another one beside the present one, as its \
             configuration alone can, restart them one by one, then: hsmctl cluster rekey replication",
            known_to_removed.join(", ")
        ),
        (None, None) if with_old.is_empty() => "nothing to do".to_owned(),
        (None, None) => format!(
            "everything is sealed under the new key: take the old one out of the configuration of: {}; restart them \
             one by one, each once it has been up with both keys since the new one is the cluster's",
            with_old.join(", ")
        ),
    };
    ReplicationRekey {
        key: hex::encode(key),
        former: former.map(hex::encode),
        records_left: records_left as u64,
        nodes: standing
            .into_iter()
            .map(|(node_id, keys)| NodeReplicationKeys {
                node_id,
                keys: keys.iter().map(hex::encode).collect(),
            })
            .collect(),
        known_to_removed,
        next_key: next_key.map(hex::encode),
        next,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "rekey_status_tests.rs"]
mod tests;
