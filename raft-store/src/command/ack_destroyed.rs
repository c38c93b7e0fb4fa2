//! `AckDestroyed`: a node has removed versions from its tokens, session copies too, or never had them.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Done, Refusal, destruction, require_self, standing_node};
use crate::names::{ContextName, KeyUid, RaftId};
use crate::state::ClusterState;
use crate::state::context::{KeyVersion, VersionKey, VersionState};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AckDestroyed {
    /// The node.
    pub node: RaftId,
    /// What it does not hold any more: context, version, key_uid.
    pub versions: Vec<(ContextName, u32, KeyUid)>,
}

impl AckDestroyed {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_self(cx, self.node)?;
        standing_node(state, self.node)?;
        for (context, number, key_uid) in &self.versions {
            let key = VersionKey {
                context: context.clone(),
                version: *number,
            };
            // One that is over by now is no error: the node will see that itself.
            let Some(version) = state.versions.get(&key).cloned() else {
                continue;
            };
            if version.key_uid != *key_uid
                || version.state != VersionState::Destroying
                || version.acks.contains(&self.node)
            {
                continue;
            }
            let mut version = KeyVersion::clone(&version);
            version.acks.insert(self.node);
            state.versions.put(key, version)?;
        }
        destruction::settle(state, cx.at)?;
        Ok(Done::Ok)
    }
}
