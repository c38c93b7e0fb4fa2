//! `SetAcl`: other access control in the place of the one that was read. Who reads what somebody else has changed
//! meanwhile has to look again, and nobody can be left without an administrator.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Conflict, Done, Invalid, Refusal, require_admin, require_cluster};
use crate::state::ClusterState;
use crate::state::access::{Acl, Role};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SetAcl {
    /// [`Acl::digest`] of what was read.
    pub expected_digest: [u8; 32],
    /// What takes its place, whole.
    pub acl: Acl,
}

impl SetAcl {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_cluster(state)?;
        require_admin(cx, "set_acl")?;
        let digest = state.acl().map_or_else(|| Acl::default().digest(), Acl::digest);
        if digest != self.expected_digest {
            return Err(Conflict::OtherAcl { digest }.into());
        }
        if !self.acl.assigns(Role::Admin) {
            return Err(Invalid::NoAdmin.into());
        }
        state.acl.put((), self.acl.clone())?;
        Ok(Done::Ok)
    }
}
