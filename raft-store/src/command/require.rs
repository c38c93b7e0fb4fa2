//! What commands ask for before they change anything: from whom they have to come, and that what they name is there.

use super::{ApplyContext, Conflict, Forbidden, Missing, Origin, Refusal};
use crate::names::{ContextName, RaftId, SlotName, TransportId};
use crate::state::ClusterState;
use crate::state::access::RevocationKey;
use crate::state::context::{KeyVersion, VersionKey, VersionState};
use crate::state::node::Node;
use crate::state::replication::named_by;
use crate::state::slot::{Slot, TransportGeneration, TransportState};

/// Refuses unless the command comes from `node` itself.
pub(super) fn require_self(cx: &ApplyContext<'_>, node: RaftId) -> Result<(), Refusal> {
    if *cx.origin == Origin::Node(node) {
        return Ok(());
    }
    Err(Forbidden::NotItself { node }.into())
}

/// Refuses unless an administrator asks for it.
pub(super) fn require_admin(cx: &ApplyContext<'_>, operation: &str) -> Result<(), Refusal> {
    if matches!(cx.origin, Origin::Admin(_)) {
        return Ok(());
    }
    let operation = operation.to_owned();
    Err(Forbidden::Operation { operation }.into())
}

/// Refuses what an administrator asks for whose certificate is revoked by now. The leader has looked before it proposed;
/// of two who revoke each other at the same moment, only the first one's command counts.
pub(super) fn require_unrevoked(state: &ClusterState, cx: &ApplyContext<'_>) -> Result<(), Refusal> {
    let Origin::Admin(admin) = cx.origin else {
        return Ok(());
    };
    let names = [
        RevocationKey::Fingerprint(admin.fingerprint),
        RevocationKey::Serial {
            issuer: admin.issuer.clone(),
            serial: admin.serial.clone(),
        },
        RevocationKey::CommonName(admin.cn.clone()),
    ];
    if names.iter().any(|name| state.revocations.contains(name)) {
        return Err(Forbidden::Revoked.into());
    }
    Ok(())
}

/// Refuses unless the command comes from a driver of the leader that appended it, which was not removed.
pub(super) fn require_leader(
    state: &ClusterState,
    cx: &ApplyContext<'_>,
    operation: &str,
) -> Result<(), Refusal> {
    if *cx.origin != Origin::Node(cx.leader) {
        let operation = operation.to_owned();
        return Err(Forbidden::Driver { operation }.into());
    }
    standing_node(state, cx.leader)?;
    Ok(())
}

/// Refuses before there is a cluster.
pub(super) fn require_cluster(state: &ClusterState) -> Result<(), Refusal> {
    state
        .meta()
        .map(|_| ())
        .ok_or(Refusal::NotFound(Missing::Cluster))
}

/// A node that has not been removed.
pub(super) fn standing_node(state: &ClusterState, id: RaftId) -> Result<&Node, Refusal> {
    let node = state.nodes.get(&id).ok_or(Missing::Node(id))?;
    if !node.is_standing() {
        let node = node.name.clone();
        return Err(Forbidden::Removed { node }.into());
    }
    Ok(node)
}

/// Refuses unless every member has a key for the slot. Whoever has none can be granted nothing of it, and would never
/// prove a version there. A node that is alone registers none, because nobody grants it anything.
pub(super) fn require_slot_keys(state: &ClusterState, slot: &SlotName) -> Result<(), Refusal> {
    if state.members() <= 1 {
        return Ok(());
    }
    let mut members = state.nodes.values().filter(|node| node.is_member());
    match members.find(|node| !node.slot_keys.contains_key(slot)) {
        None => Ok(()),
        Some(node) => {
            let (node, slot) = (node.name.clone(), slot.clone());
            Err(Conflict::NoSlotKey { node, slot }.into())
        }
    }
}

/// Refuses while a node is asked to leave: it takes part until it has left, and would get what is made to be kept from it.
pub(super) fn require_nobody_leaves(state: &ClusterState) -> Result<(), Refusal> {
    match state.nodes.values().find(|node| node.is_leaving()) {
        None => Ok(()),
        Some(node) => {
            let node = node.name.clone();
            Err(Conflict::NodeLeaves { node }.into())
        }
    }
}

/// A slot's transport key, in the state that the command is about.
pub(super) fn transport_in_state<'a>(
    slot: &'a mut Slot,
    name: &SlotName,
    id: TransportId,
    expected: TransportState,
) -> Result<&'a mut TransportGeneration, Refusal> {
    let slot_name = name.clone();
    let Some(found) = slot.transport.iter_mut().find(|it| it.id == id) else {
        return Err(Missing::TransportKey { slot: slot_name, id }.into());
    };
    if found.state != expected {
        let state = found.state;
        return Err(Conflict::TransportState {
            slot: slot_name,
            id,
            state,
        }
        .into());
    }
    Ok(found)
}

/// Refuses a record that is sealed under a replication key that was replaced: whoever proposes it has not heard of that
/// yet. In a cluster in which none was there is nothing to refuse, and no log of an earlier release is read otherwise.
pub(super) fn refuse_retired(state: &ClusterState, record: &[u8]) -> Result<(), Refusal> {
    let Some((meta, replication)) = state.meta().zip(state.replication()) else {
        return Ok(());
    };
    match named_by(record) {
        Some(id) if replication.is_retired(id) => {
            let current = meta.trk_id;
            Err(Conflict::ReplicationKey { current }.into())
        }
        _ => Ok(()),
    }
}

/// A version with its key.
pub(super) fn known_version(
    state: &ClusterState,
    context: &ContextName,
    number: u32,
) -> Result<(VersionKey, KeyVersion), Refusal> {
    let key = VersionKey {
        context: context.clone(),
        version: number,
    };
    if let Some(version) = state.versions.get(&key) {
        let version = KeyVersion::clone(version);
        return Ok((key, version));
    }
    let (context, version) = (key.context, number);
    Err(Missing::Version { context, version }.into())
}

/// A version that nothing is encrypted under any more, in the state that the proposer saw.
pub(super) fn retired_version(
    state: &ClusterState,
    context: &ContextName,
    number: u32,
    expected: VersionState,
) -> Result<(VersionKey, KeyVersion), Refusal> {
    let (key, version) = known_version(state, context, number)?;
    let retired = matches!(version.state, VersionState::DecryptOnly | VersionState::Disabled);
    if !retired || version.state != expected {
        return Err(in_other_state(&key, version.state));
    }
    Ok((key, version))
}

/// The refusal of what a version in this state is not to be asked for.
pub(super) fn in_other_state(key: &VersionKey, state: VersionState) -> Refusal {
    let (context, version) = (key.context.clone(), key.version);
    let why = match state {
        VersionState::Pending => Conflict::Pending { context, version },
        VersionState::Active => Conflict::Active { context, version },
        state => Conflict::VersionState {
            context,
            version,
            state,
        },
    };
    why.into()
}
