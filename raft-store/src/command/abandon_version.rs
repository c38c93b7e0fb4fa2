//! `AbandonVersion`: a pending version that cannot finish in its deadline is given up; its number is
//! never used again.

use serde::{Deserialize, Serialize};

use super::stamp::stamp;
use super::{ApplyContext, Conflict, Done, Missing, Refusal};
use crate::names::ContextName;
use crate::state::ClusterState;
use crate::state::context::{KeyVersion, VersionKey, VersionState};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AbandonVersion {
    /// The context.
    pub context: ContextName,
    /// The pending version.
    pub version: u32,
    /// Why, for people.
    pub reason: String,
}

impl AbandonVersion {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        let key = VersionKey {
            context: self.context.clone(),
            version: self.version,
        };
        let Some(version) = state.versions.get(&key) else {
            let (context, version) = (self.context.clone(), self.version);
            return Err(Missing::Version { context, version }.into());
        };
        let version = KeyVersion::clone(version);
        if version.state == VersionState::Abandoned {
            return Ok(Done::Ok);
        }
        if !version.state.may_become(VersionState::Abandoned) {
            return Err(Conflict::VersionState {
                context: self.context.clone(),
                version: self.version,
                state: version.state,
            }
            .into());
        }
        // Nothing was ever encrypted under it, so its key leaves state with it.
        let abandoned = KeyVersion {
            state: VersionState::Abandoned,
            ended_at: Some(stamp(state, cx)),
            material: None,
            note: self.reason.clone(),
            ..version
        };
        state.leases.remove(&key);
        state.versions.put(key, abandoned)?;
        Ok(Done::Ok)
    }
}
