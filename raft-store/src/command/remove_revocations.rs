//! `RemoveRevocations`: certificates that may do again what they might before. Removing one that is not there changes
//! nothing.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Done, Refusal, require_admin, require_cluster};
use crate::state::ClusterState;
use crate::state::access::RevocationKey;

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RemoveRevocations {
    /// Which, exactly as they were added.
    pub revocations: Vec<RevocationKey>,
}

impl RemoveRevocations {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_cluster(state)?;
        require_admin(cx, "remove_revocations")?;
        for key in &self.revocations {
            state.revocations.remove(key);
        }
        Ok(Done::Ok)
    }
}
