//! `ReleaseVersion`: an adopted version is given back to version 1. The nodes remove their copies of the key; the object
//! that they were made of stays where it is, and its label can be adopted again. The number is not used again.

use serde::{Deserialize, Serialize};

use super::stamp::stamp;
use super::{ApplyContext, Done, Refusal, in_other_state, require_admin, retired_version};
use crate::names::ContextName;
use crate::state::ClusterState;
use crate::state::context::{KeyVersion, VersionState};

/// What the tombstone says.
const NOTE: &str = "released: the key is version 1's alone again";

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReleaseVersion {
    /// The context.
    pub context: ContextName,
    /// The version.
    pub version: u32,
    /// The state the proposer saw it in: compare and set.
    pub expected: VersionState,
}

impl ReleaseVersion {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_admin(cx, "release_version")?;
        let (key, version) = retired_version(state, &self.context, self.version, self.expected)?;
        // A key that was made here is nowhere else: that one is destroyed, after a wait.
        if !version.origin.is_adopted() {
            return Err(in_other_state(&key, version.state));
        }
        let released = KeyVersion {
            state: VersionState::Abandoned,
            ended_at: Some(stamp(state, cx)),
            note: NOTE.to_owned(),
            ..version
        };
        state.versions.put(key, released)?;
        Ok(Done::Version {
            context: self.context.clone(),
            version: self.version,
        })
    }
}
