//! `AdvanceWaits`: a leader reports monotonic time that has passed for the waits before destructions. It is the only
//! clock that brings one nearer: a wall clock that jumps destroys nothing, and without a leader nothing passes.

use serde::{Deserialize, Serialize};

use super::{
    ApplyContext, Bounded, Conflict, Done, Invalid, Refusal, in_other_state, known_version, require_leader,
};
use crate::names::ContextName;
use crate::state::ClusterState;
use crate::state::context::{Destruction, KeyVersion, VersionState};

/// The most that one command advances, in milliseconds: a leader that was suspended, or lies, is no further ahead
/// than that before others see it.
pub const MAX_ADVANCE_MS: u64 = 120_000;

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdvanceWaits {
    /// Milliseconds that have passed for each of the waits, by the leader's monotonic clock.
    pub elapsed_ms: u64,
    /// The waits: of every version in `destroy_scheduled`, in several commands if one does not hold them. Ascending by
    /// context and version, each once: named as often as it likes, one would be over within a single command.
    pub expected: Vec<SeenWait>,
}

/// A wait as the leader saw it: compare and set, so that no time counts twice, and none for a wait that was begun
/// anew meanwhile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenWait {
    /// The context.
    pub context: ContextName,
    /// The version.
    pub version: u32,
    /// The entry that scheduled it.
    pub scheduled_by: u64,
    /// What had passed.
    pub elapsed_ms: u64,
}

impl AdvanceWaits {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_leader(state, cx, "advance_waits")?;
        Bounded::Advance.check_number(self.elapsed_ms, MAX_ADVANCE_MS)?;
        self.require_ascending()?;
        for seen in &self.expected {
            self.advance(state, seen)?;
        }
        Ok(Done::Ok)
    }

    fn require_ascending(&self) -> Result<(), Refusal> {
        let mut before: Option<(&ContextName, u32)> = None;
        for seen in &self.expected {
            let this = (&seen.context, seen.version);
            if before.is_some_and(|before| before >= this) {
                let (context, version) = (seen.context.clone(), seen.version);
                return Err(Invalid::WaitOrder { context, version }.into());
            }
            before = Some(this);
        }
        Ok(())
    }

    fn advance(&self, state: &mut ClusterState, seen: &SeenWait) -> Result<(), Refusal> {
        let (key, version) = known_version(state, &seen.context, seen.version)?;
        let Some(destruction) = version
            .destruction
            .clone()
            .filter(|_| version.state == VersionState::DestroyScheduled)
        else {
            return Err(in_other_state(&key, version.state));
        };
        let (scheduled_by, elapsed_ms) = (destruction.scheduled_by, destruction.elapsed_ms);
        if (scheduled_by, elapsed_ms) != (seen.scheduled_by, seen.elapsed_ms) {
            return Err(Conflict::OtherWait {
                context: seen.context.clone(),
                version: seen.version,
                scheduled_by,
                elapsed_ms,
            }
            .into());
        }
        let advanced = Destruction {
            elapsed_ms: elapsed_ms.saturating_add(self.elapsed_ms),
            ..destruction
        };
        let waiting = KeyVersion {
            destruction: Some(advanced),
            ..version
        };
        state.versions.put(key, waiting)
    }
}
