//! `AckVersions`: a node has imported versions into its token, durably, and proven each with its
//! check record.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Done, Refusal, require_self, standing_node};
use crate::names::ContextName;
use crate::names::{KeyUid, RaftId};
use crate::state::ClusterState;
use crate::state::context::{KeyOrigin, KeyVersion, VersionKey};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AckVersions {
    /// The node.
    pub node: RaftId,
    /// What it holds: context, version, key_uid.
    pub versions: Vec<(ContextName, u32, KeyUid)>,
}

impl AckVersions {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_self(cx, self.node)?;
        standing_node(state, self.node)?;
        for (context, number, key_uid) in &self.versions {
            let key = VersionKey {
                context: context.clone(),
                version: *number,
            };
            // Versions abandoned or destroyed meanwhile are no error: the node will see that itself.
            let Some(version) = state.versions.get(&key).cloned() else {
                continue;
            };
            if version.key_uid != *key_uid
                || !version.state.is_readable()
                || version.acks.contains(&self.node)
            {
                continue;
            }
            let mut version = KeyVersion::clone(&version);
            version.acks.insert(self.node);
            // From now on it has to hold what it has proven to hold, and owes its destruction.
            if let KeyOrigin::Adopted { holders, .. } = &mut version.origin {
                holders.insert(self.node);
            }
            state.versions.put(key, version)?;
        }
        Ok(Done::Ok)
    }
}
