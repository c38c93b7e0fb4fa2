//! `ScheduleDestroy`: a retired version is to be destroyed. It is of no use from now on, so that whoever still needs
//! it says so while it can be undone.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Conflict, Done, Invalid, Refusal, in_other_state, retired_version};
use crate::names::{ContextName, UnixMillis};
use crate::state::ClusterState;
use crate::state::context::{Destruction, KeyVersion, VersionState};

/// The shortest wait, in milliseconds, unless the configuration names another.
pub const DEFAULT_MIN_WAIT_MS: u64 = 24 * 60 * 60 * 1000;
/// The shortest wait whatever the configuration names, in milliseconds.
pub const LEAST_WAIT_MS: u64 = 1000;
/// The longest wait, in milliseconds.
pub const MAX_WAIT_MS: u64 = 365 * 24 * 60 * 60 * 1000;

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScheduleDestroy {
    /// The context.
    pub context: ContextName,
    /// The version.
    pub version: u32,
    /// The state the proposer saw it in: compare and set.
    pub expected: VersionState,
    /// How long it can be undone, in milliseconds of the leaders' monotonic time.
    pub wait_ms: u64,
    /// The shortest wait that the proposer's configuration allows; never less than [`LEAST_WAIT_MS`] counts.
    pub min_wait_ms: u64,
    /// A use within so many milliseconds before this command is recent.
    pub recent_ms: u64,
    /// Whether a version that was used recently is destroyed all the same.
    pub override_recent_use: bool,
}

impl ScheduleDestroy {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        let least_ms = self.min_wait_ms.max(LEAST_WAIT_MS);
        if self.wait_ms < least_ms || self.wait_ms > MAX_WAIT_MS {
            return Err(Invalid::Wait {
                wait_ms: self.wait_ms,
                least_ms,
                most_ms: MAX_WAIT_MS,
            }
            .into());
        }
        let (key, version) = retired_version(state, &self.context, self.version, self.expected)?;
        if !version.state.may_become(VersionState::DestroyScheduled) {
            return Err(in_other_state(&key, version.state));
        }
        let used = state.usage(&self.context, self.version);
        if let Some(ago_ms) = used.and_then(|used| self.recently(used.last_used, cx.at))
            && !self.override_recent_use
        {
            return Err(Conflict::UsedRecently {
                context: self.context.clone(),
                version: self.version,
                ago_ms,
            }
            .into());
        }
        let destruction = Destruction {
            scheduled_by: cx.index,
            scheduled_at: cx.at,
            from: version.state,
            wait_ms: self.wait_ms,
            elapsed_ms: 0,
            begun_at: None,
            sealed_under: None,
            ended_at: None,
        };
        let scheduled = KeyVersion {
            state: VersionState::DestroyScheduled,
            destruction: Some(destruction),
            ..version
        };
        state.versions.put(key, scheduled)?;
        Ok(Done::Version {
            context: self.context.clone(),
            version: self.version,
        })
    }

    /// How long ago the last use was, if that is recent. One that lies ahead is: some clock is wrong, and nobody can
    /// know which.
    fn recently(&self, last_used: UnixMillis, at: UnixMillis) -> Option<u64> {
        let ago = u64::try_from(at.saturating_sub(last_used));
        match ago {
            Ok(ago) => (ago < self.recent_ms).then_some(ago),
            Err(_) => Some(0),
        }
    }
}
