//! What administrators read, made from one snapshot of the state. Pure: every node with the same state
//! gives the same answer.

use std::collections::BTreeSet;

use hsm_api::admin::{
    BindingMode as ApiBinding, ContextInfo, DestructionInfo, Invocations, KeyOrigin as ApiOrigin, KeyState,
    KeyUsage, KeyUsageResponse, KeyVersionInfo, Leaving, ListKeksResponse, Member, MemberRole, MemberSlot,
    MemberState, MembersResponse, NodeUsage, RemovedMember, RotationStatus, RotationStatusResponse,
    SlotFingerprint, SlotState,
};
use raft_store::names::{ContextName, RaftId, SlotName, UnixMillis};
use raft_store::state::ClusterState;
use raft_store::state::context::{
    BindingMode, Context, Destruction, KeyOrigin, KeyVersion, VersionKey, VersionState,
};
use raft_store::state::node::{Node, NodeStatus, SlotReport};
use raft_store::state::slot::TransportState;
use raft_store::storage::Published;
use sha2::{Digest, Sha256};

use crate::consensus::{Role, View, held_back_by};

const DAY_MS: i64 = 24 * 3600 * 1000;

/// RFC 3339 in UTC.
#[must_use]
pub fn rfc3339(at: UnixMillis) -> String {
    jiff::Timestamp::from_millisecond(at)
        .map(|at| at.to_string())
        .unwrap_or_default()
}

/// Whom ciphertexts are bound to.
#[must_use]
pub fn binding(binding: BindingMode) -> ApiBinding {
    match binding {
        BindingMode::None => ApiBinding::None,
        BindingMode::Shared => ApiBinding::Shared,
        BindingMode::Private => ApiBinding::Private,
    }
}

/// A node's name.
#[must_use]
pub fn node_name(state: &ClusterState, id: RaftId) -> String {
    state
        .nodes()
        .get(&id)
        .map_or_else(|| format!("raft-id-{id}"), |node| node.name.to_string())
}

pub(super) fn node_names<'a>(state: &ClusterState, ids: impl IntoIterator<Item = &'a RaftId>) -> Vec<String> {
    ids.into_iter().map(|id| node_name(state, *id)).collect()
}

/// Contexts and their key versions.
#[must_use]
pub fn keys(state: &ClusterState) -> ListKeksResponse {
    let context = |name: &ContextName, context: &Context| ContextInfo {
        context: name.to_string(),
        slot: context.slot.to_string(),
        binding: binding(context.binding),
        active_version: context.active_version,
        versions: state
            .versions_of(name)
            .map(|(number, key)| version(state, name, number, key))
            .collect(),
    };
    ListKeksResponse {
        contexts: state
            .contexts()
            .iter()
            .map(|(name, known)| context(name, known))
            .collect(),
    }
}

/// One version, as it is listed.
#[must_use]
pub fn version(state: &ClusterState, context: &ContextName, number: u32, key: &KeyVersion) -> KeyVersionInfo {
    KeyVersionInfo {
        version: number,
        key_id: key.label.clone(),
        key_uid: key.key_uid.to_string(),
        slot: key.slot.to_string(),
        state: KeyState::from_word(key.state.as_str()),
        created_at: rfc3339(key.created_at),
        activated_at: key.activated_at.map(rfc3339),
        retired_at: key.ended_at.map(rfc3339),
        acks: node_names(state, &key.acks),
        origin: match &key.origin {
            KeyOrigin::Generated => ApiOrigin::Generated,
            KeyOrigin::Adopted { .. } => ApiOrigin::Adopted,
        },
        holders: match &key.origin {
            KeyOrigin::Generated => Vec::new(),
            KeyOrigin::Adopted { holders, .. } => node_names(state, holders),
        },
        destruction: key.destruction.as_ref().map(|way| destruction(state, key, way)),
        invocations: invocations(
            state,
            &VersionKey {
                context: context.clone(),
                version: number,
            },
            key,
        ),
    }
}

/// What was given out of a version that encrypts, or did.
fn invocations(state: &ClusterState, key: &VersionKey, version: &KeyVersion) -> Option<Invocations> {
    let encrypts = matches!(version.state, VersionState::Pending | VersionState::Active);
    (encrypts || state.leases().contains(key)).then(|| Invocations {
        leased: state.lease(key).leased,
        limit: state.max_invocations(&key.context),
    })
}

fn destruction(state: &ClusterState, key: &KeyVersion, way: &Destruction) -> DestructionInfo {
    let slot = state.slots().get(&key.slot);
    // Whoever has the transport key opens what old logs and backups hold.
    let opens = |id| {
        let generation = slot.and_then(|slot| slot.transport(id));
        generation.is_some_and(|generation| generation.state != TransportState::Destroyed)
    };
    DestructionInfo {
        scheduled_at: rfc3339(way.scheduled_at),
        undone: KeyState::from_word(way.from.as_str()),
        wait_seconds: way.wait_ms / 1000,
        elapsed_seconds: way.elapsed_ms / 1000,
        begun_at: way.begun_at.map(rfc3339),
        ended_at: way.ended_at.map(rfc3339),
        owing: state.owing(key).map(|(_, node)| node.name.to_string()).collect(),
        joining: joining(state, key),
        remnants_sealed: way.sealed_under.is_some_and(opens),
    }
}

/// Nodes that will hold up, or do hold up, the end of a version although they are no members: a join that has failed
/// after it had acknowledged the version leaves somebody behind who may have it and never speaks again.
fn joining(state: &ClusterState, key: &KeyVersion) -> Vec<String> {
    let waited_for: BTreeSet<RaftId> = match key.state {
        VersionState::DestroyScheduled => key.acks.clone(),
        VersionState::Destroying => state.owing(key).map(|(id, _)| id).collect(),
        _ => BTreeSet::new(),
    };
    let nodes = waited_for.iter().filter_map(|id| state.nodes().get(id));
    let joining = nodes.filter(|node| node.status == NodeStatus::Joining);
    joining.map(|node| node.name.to_string()).collect()
}

/// How often each version was used.
#[must_use]
pub fn usage(state: &ClusterState) -> KeyUsageResponse {
    let one = |key: &VersionKey, version: &KeyVersion| {
        let used = state.usage(&key.context, key.version);
        let nodes = used.into_iter().flat_map(|used| &used.nodes);
        KeyUsage {
            context: key.context.to_string(),
            version: key.version,
            key_id: version.label.clone(),
            state: KeyState::from_word(version.state.as_str()),
            encryptions: used.map_or(0, |used| used.encryptions),
            decryptions: used.map_or(0, |used| used.decryptions),
            last_used: used.map(|used| rfc3339(used.last_used)),
            nodes: nodes
                .map(|(id, last)| NodeUsage {
                    node_id: node_name(state, *id),
                    last_used: rfc3339(last.count.last_used),
                })
                .collect(),
            invocations: invocations(state, key, version),
        }
    };
    KeyUsageResponse {
        versions: state
            .versions()
            .iter()
            .map(|(key, version)| one(key, version))
            .collect(),
    }
}

/// Where each context stands in its rotation.
#[must_use]
pub fn rotation_status(state: &ClusterState) -> RotationStatusResponse {
    let contexts = state.contexts().iter();
    RotationStatusResponse {
        contexts: contexts
            .map(|(name, context)| rotation(state, name, context))
            .collect(),
    }
}

fn rotation(state: &ClusterState, name: &ContextName, context: &Context) -> RotationStatus {
    let active = context
        .active_version
        .and_then(|number| state.version(name, number));
    let pending = state
        .versions_of(name)
        .find(|(_, version)| version.state == VersionState::Pending);
    let watched = pending.map(|(_, version)| version).or(active);
    let acks = watched.map(|version| version.acks.clone()).unwrap_or_default();
    let members: BTreeSet<RaftId> = state
        .nodes()
        .iter()
        .filter(|(_, node)| node.is_member())
        .map(|(id, _)| *id)
        .collect();
    let missing = watched.map(|_| members.difference(&acks).copied().collect::<BTreeSet<_>>());
    let since = active.and_then(|version| version.activated_at);
    let days = context.policy.interval_days;
    let due = since.filter(|_| days > 0);
    RotationStatus {
        context: name.to_string(),
        active_version: context.active_version,
        active_since: since.map(rfc3339),
        pending_version: pending.map(|(number, _)| number),
        pending_since: pending.map(|(_, version)| rfc3339(version.created_at)),
        acks: node_names(state, &acks),
        missing: node_names(state, &missing.unwrap_or_default()),
        rotation_interval_days: days,
        next_rotation_due: due.map(|since| rfc3339(since.saturating_add(i64::from(days) * DAY_MS))),
    }
}

/// Members that are not heard: by the leader, as far as this node knows. A node that hears no leader (it is
/// not `fresh`) knows of nobody but itself.
#[must_use]
pub fn silent(published: &Published, view: &View, own: Option<RaftId>, fresh: bool) -> BTreeSet<RaftId> {
    if fresh || view.role == Role::Leader {
        return view.silent.clone();
    }
    let nodes = published.state.nodes().iter();
    nodes.map(|(id, _)| *id).filter(|id| Some(*id) != own).collect()
}

/// All members, joining ones too. `view` is this node's: a follower knows less than a leader. `silent` is what
/// [`silent`] gave.
#[must_use]
pub fn members(
    published: &Published,
    view: &View,
    own: Option<RaftId>,
    silent: &BTreeSet<RaftId>,
) -> MembersResponse {
    let voters: BTreeSet<RaftId> = published.membership.voter_ids().collect();
    let nodes = published.state.nodes().iter();
    let present = nodes.filter(|(_, node)| node.is_standing());
    let reached = published.membership.membership();
    let one = |id: RaftId, node: &Node| {
        let leads = view.leader == Some(id);
        // The leader has its own log whole, and hears itself.
        let itself = (leads && own == Some(id)).then_some(view.last_log);
        let peer = view.peers.get(&id);
        let matched_index = itself.or_else(|| peer.and_then(|peer| peer.matched));
        let silent_for = peer.and_then(|peer| peer.silent_for);
        let silent_ms = silent_for.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        let is_silent = silent.contains(&id);
        Member {
            node_id: node.name.to_string(),
            raft_id: id,
            role: if voters.contains(&id) {
                MemberRole::Voter
            } else {
                MemberRole::Learner
            },
            state: Some(if is_silent {
                MemberState::Silent
            } else {
                MemberState::Heard
            }),
            api_address: node.api_address.clone(),
            // What it was registered with may be of a time when it was alone.
            cluster_address: reached
                .get_node(&id)
                .map_or(&node.cluster_address, |known| &known.cluster_address)
                .clone(),
            is_leader: leads,
            matched_index,
            lag: matched_index.map(|matched| view.last_log.saturating_sub(matched)),
            last_seen_ms: itself.map(|_| 0).or(silent_ms),
            slots: member_slots(&published.state, id, is_silent),
            held_back: held_back_by(&published.state, id)
                .iter()
                .map(ToString::to_string)
                .collect(),
            leaving: match &node.status {
                NodeStatus::Leaving { at, successor } => Some(Leaving {
                    since: rfc3339(*at),
                    successor: successor.as_ref().map(ToString::to_string),
                }),
                _ => None,
            },
            joined_at: rfc3339(node.registered_at),
        }
    };
    MembersResponse {
        members: present.map(|(id, node)| one(*id, node)).collect(),
        removed: removed(&published.state),
    }
}

/// The tombstones.
fn removed(state: &ClusterState) -> Vec<RemovedMember> {
    let one = |id: RaftId, node: &Node| match node.status {
        NodeStatus::Removed { at } => Some(RemovedMember {
            node_id: node.name.to_string(),
            raft_id: id,
            removed_at: rfc3339(at),
            held: held_actively(state, id),
        }),
        _ => None,
    };
    let nodes = state.nodes().iter();
    nodes.filter_map(|(id, node)| one(*id, node)).collect()
}

/// The contexts whose active version a node has acknowledged to hold: what has to be rotated once the node is removed.
#[must_use]
pub fn held_actively(state: &ClusterState, node: RaftId) -> Vec<String> {
    let held = |name: &ContextName, context: &Context| {
        let active = context
            .active_version
            .and_then(|number| state.version(name, number));
        active.is_some_and(|active| active.acks.contains(&node))
    };
    let contexts = state.contexts().iter();
    let held = contexts.filter(|(name, context)| held(name, context));
    held.map(|(name, _)| name.to_string()).collect()
}

/// What a member last reported of its slots; of one that is silent nobody knows how they are now.
fn member_slots(state: &ClusterState, id: RaftId, silent: bool) -> Vec<MemberSlot> {
    let Some(report) = state.reports().get(&id) else {
        return Vec::new();
    };
    let slot = |name: &SlotName, slot: &SlotReport| MemberSlot {
        slot: name.to_string(),
        state: if silent {
            SlotState::Silent
        } else {
            SlotState::from_word(&slot.state)
        },
    };
    report
        .slots
        .iter()
        .map(|(name, known)| slot(name, known))
        .collect()
}

/// Fingerprints of a node's own keys, for people to compare.
#[must_use]
pub fn fingerprints(state: &ClusterState, node: RaftId) -> Vec<SlotFingerprint> {
    let Some(node) = state.nodes().get(&node) else {
        return Vec::new();
    };
    let keys = node.slot_keys.iter();
    keys.map(|(slot, key)| SlotFingerprint {
        slot: slot.to_string(),
        spki_sha256: hex::encode(Sha256::digest(&key.spki)),
    })
    .collect()
}

/// Names of the voters that are silent.
#[must_use]
pub fn silent_voters(published: &Published, silent: &BTreeSet<RaftId>) -> Vec<String> {
    let voters: BTreeSet<RaftId> = published.membership.voter_ids().collect();
    node_names(&published.state, voters.intersection(silent))
}

/// The voters that have failed already. To a leader those are all that no quorum can rest on, as it is for a removal and for
/// the auto-pilot: one that answers and loads a snapshot acknowledges nothing. Another node knows only who is silent, which is
/// what [`silent`] gave.
#[must_use]
pub fn failed_voters(view: &View, voters: &BTreeSet<RaftId>, silent: &BTreeSet<RaftId>) -> BTreeSet<RaftId> {
    if view.role == Role::Leader {
        return voters.difference(&view.heard).copied().collect();
    }
    voters.intersection(silent).copied().collect()
}

/// How many more of `voters` may fail before the quorum is lost, if `failed` of them have failed already.
#[must_use]
pub fn failure_tolerance(voters: usize, failed: usize) -> u32 {
    let quorum = voters / 2 + 1;
    u32::try_from(voters.saturating_sub(failed).saturating_sub(quorum)).unwrap_or(u32::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "views_tests.rs"]
mod tests;
