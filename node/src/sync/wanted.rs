//! Which key versions the state wants a node to hold.

use raft_store::names::{KeyUid, RaftId, SlotName};
use raft_store::state::ClusterState;
use raft_store::state::context::{KeyVersion, VersionKey, VersionState};

/// The versions that are in this slot, those in use first: pending ones make a rotation wait, active
/// ones make callers wait.
pub fn versions<'a>(state: &'a ClusterState, slot: &SlotName) -> Vec<(VersionKey, &'a KeyVersion)> {
    let here = state
        .versions()
        .iter()
        .filter(|(_, version)| version.slot == *slot);
    let mut versions: Vec<_> = here.map(|(key, version)| (key.clone(), &**version)).collect();
    versions.sort_by_key(|(_, version)| match version.state {
        VersionState::Pending => 0,
        VersionState::Active => 1,
        VersionState::DecryptOnly => 2,
        _ => 3,
    });
    versions
}

/// Whether a key that is in the token is kept at hand there, proven and loaded: it is readable, or can be made so again
/// at any moment, by every node at once.
pub fn is_at_hand(state: VersionState) -> bool {
    let out_of_use = matches!(state, VersionState::Disabled | VersionState::DestroyScheduled);
    state.is_readable() || out_of_use
}

/// Whether this node has to hold a version: adopted keys are only where they were found.
pub fn concerns(version: &KeyVersion, me: RaftId) -> bool {
    version.origin.concerns(me)
}

/// Whether a node that lacks it is not complete. What is pending is asked for by acknowledgements.
pub fn is_served(version: &KeyVersion, me: RaftId) -> bool {
    version.state.is_readable() && version.state != VersionState::Pending && concerns(version, me)
}

/// The keys this node has to serve, by slot: what is proven is measured against this.
pub fn required(state: &ClusterState, me: RaftId) -> Vec<(SlotName, KeyUid)> {
    let versions = state.versions().values();
    let served = versions.filter(|version| is_served(version, me));
    served
        .map(|version| (version.slot.clone(), version.key_uid))
        .collect()
}
