//! `UndoDestroy`: a version whose destruction still waits is what it was before. After that there is no way back.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Done, Refusal, in_other_state, known_version, require_admin};
use crate::names::ContextName;
use crate::state::ClusterState;
use crate::state::context::{KeyVersion, VersionState};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UndoDestroy {
    /// The context.
    pub context: ContextName,
    /// The version.
    pub version: u32,
}

impl UndoDestroy {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_admin(cx, "undo_destroy")?;
        let (key, version) = known_version(state, &self.context, self.version)?;
        if version.state != VersionState::DestroyScheduled {
            return Err(in_other_state(&key, version.state));
        }
        // A row of the first form does not say what it was. Disabled, it does nothing until somebody enables it.
        let from = version.destruction.as_ref();
        let from = from.map_or(VersionState::Disabled, |destruction| destruction.from);
        let undone = KeyVersion {
            state: from,
            destruction: None,
            ..version
        };
        state.versions.put(key, undone)?;
        Ok(Done::Version {
            context: self.context.clone(),
            version: self.version,
        })
    }
}
