//! `SetVersionUse`: a retired version is disabled, or enabled again. Its key stays in every token and in state, so
//! that this costs nothing and can be taken back.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Done, Invalid, Refusal, in_other_state, require_admin, retired_version};
use crate::names::ContextName;
use crate::state::ClusterState;
use crate::state::context::{KeyVersion, VersionState};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SetVersionUse {
    /// The context.
    pub context: ContextName,
    /// The version.
    pub version: u32,
    /// The state the proposer saw it in: compare and set.
    pub expected: VersionState,
    /// `disabled`, or `decrypt_only` to enable it.
    pub to: VersionState,
}

impl SetVersionUse {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        // The leader's clean-up disables too, for the administrator who asked for it.
        require_admin(cx, "set_version_use")?;
        if !matches!(self.to, VersionState::DecryptOnly | VersionState::Disabled) {
            return Err(Invalid::Use { state: self.to }.into());
        }
        let (key, version) = retired_version(state, &self.context, self.version, self.expected)?;
        if !version.state.may_become(self.to) {
            return Err(in_other_state(&key, version.state));
        }
        let set = KeyVersion {
            state: self.to,
            ..version
        };
        state.versions.put(key, set)?;
        Ok(Done::Version {
            context: self.context.clone(),
            version: self.version,
        })
    }
}
