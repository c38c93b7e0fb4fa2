//! `AddRevocations`: certificates that may do nothing any more. Adding one that is there changes nothing.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Done, Refusal, require_cluster};
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
