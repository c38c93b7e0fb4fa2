//! `BeginDestroy`: the wait is over. The sealed key leaves the state, every node removes its own copy, and there is
//! no way back. No clock is asked here: what has passed is in the state.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Conflict, Done, Refusal, in_other_state, known_version, require_leader};
use crate::names::ContextName;
use crate::state::ClusterState;
use crate::state::context::{Destruction, KeyVersion, VersionState};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BeginDestroy {
    /// The context.
    pub context: ContextName,
    /// The version.
    pub version: u32,
}

impl BeginDestroy {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_leader(state, cx, "begin_destroy")?;
        let done = Done::Version {
            context: self.context.clone(),
            version: self.version,
        };
        let (key, version) = known_version(state, &self.context, self.version)?;
        if matches!(version.state, VersionState::Destroying | VersionState::Destroyed) {
            return Ok(done);
        }
        let Some(destruction) = version
            .destruction
            .clone()
            .filter(|_| version.state.may_become(VersionState::Destroying))
        else {
            return Err(in_other_state(&key, version.state));
        };
        if !destruction.is_due() {
            return Err(Conflict::WaitNotOver {
                context: self.context.clone(),
                version: self.version,
                elapsed_ms: destruction.elapsed_ms,
                wait_ms: destruction.wait_ms,
            }
            .into());
        }
        let begun = Destruction {
            begun_at: Some(cx.at),
            sealed_under: version.material.as_ref().map(|material| material.transport_id),
            held_by: version.acks,
            ..destruction
        };
        // From now on the acknowledgements say who has removed it.
        let destroying = KeyVersion {
            state: VersionState::Destroying,
            material: None,
            acks: BTreeSet::new(),
            destruction: Some(begun),
            ..version
        };
        state.versions.put(key, destroying)?;
        Ok(done)
    }
}
