//! `AddRevocations`: certificates that may do nothing any more. Adding one that is there changes nothing. An administrator
//! adds them, or a member what stands in its own files; a node that has only registered speaks for nobody yet.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Done, Forbidden, Origin, Refusal, require_cluster, standing_node};
use crate::state::ClusterState;
use crate::state::access::{Revocation, RevocationKey};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AddRevocations {
    /// What and why.
    pub revocations: Vec<(RevocationKey, String)>,
}

impl AddRevocations {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_cluster(state)?;
        if let Origin::Node(node) = cx.origin
            && !standing_node(state, *node)?.is_member()
        {
            let operation = "add_revocations".to_owned();
            return Err(Forbidden::Operation { operation }.into());
        }
        for (key, reason) in &self.revocations {
            if !state.revocations.contains(key) {
                state.revocations.put(
                    key.clone(),
                    Revocation {
                        reason: reason.clone(),
                        revoked_at: cx.at,
                    },
                )?;
            }
        }
        Ok(Done::Ok)
    }
}
