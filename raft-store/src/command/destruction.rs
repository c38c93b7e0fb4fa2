//! The end of a destruction: no node that belongs to the cluster owes it any more.

use super::Refusal;
use crate::names::UnixMillis;
use crate::seeded::bug;
use crate::state::ClusterState;
use crate::state::context::{Destruction, KeyVersion, VersionKey, VersionState};

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
    Ok(())
}
