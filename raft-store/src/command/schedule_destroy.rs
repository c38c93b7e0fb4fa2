//! `ScheduleDestroy`: a retired version is to be destroyed. It is of no use from now on, so that whoever still needs
//! it says so while it can be undone.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Conflict, Done, Invalid, Refusal, in_other_state, require_admin, retired_version};
use crate::names::{ContextName, UnixMillis};
use crate::state::ClusterState;
use crate::state::context::{Destruction, KeyVersion, VersionState};

/// The shortest wait, in milliseconds, unless the configuration names another.
pub const DEFAULT_MIN_WAIT_MS: u64 = 24 * 60 * 60 * 1000;
/// The shortest wait whatever the configuration names, in milliseconds: somebody has to be able to undo it.
pub const MIN_WAIT_FLOOR_MS: u64 = 60 * 1000;
/// The shortest wait where short ones are allowed, in milliseconds.
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
    /// The shortest wait that the proposer's configuration allows. The configuration has to see that it is at least
    /// `staleness.encrypt_ms` + `cluster.fence_after_ms`, so that a node that is cut off, and has heard nothing of all
    /// this, encrypts no more when the key is gone. The state knows neither; it sees to [`MIN_WAIT_FLOOR_MS`] only.
    pub min_wait_ms: u64,
    /// A use within so many milliseconds before this command is recent.
    pub recent_ms: u64,
    /// Whether a version that was used recently, or may have been, is destroyed all the same.
    pub override_recent_use: bool,
    /// Whether a wait may be as short as [`LEAST_WAIT_MS`]: of a leader whose configuration says `dev: true`, and of
    /// no other. It is part of the command because every node has to come to the same answer, whatever its own
    /// configuration says.
    pub short_wait_allowed: bool,
}

impl ScheduleDestroy {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_admin(cx, "schedule_destroy")?;
        let floor_ms = if self.short_wait_allowed {
            LEAST_WAIT_MS
        } else {
            MIN_WAIT_FLOOR_MS
        };
        let least_ms = self.min_wait_ms.max(floor_ms);
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
        if !self.override_recent_use {
            self.require_unused(state, &version, now(state, cx))?;
        }
        let destruction = Destruction {
            scheduled_by: cx.index,
            scheduled_at: cx.at,
            from: version.state,
            wait_ms: self.wait_ms,
            elapsed_ms: 0,
            begun_at: None,
            sealed_under: None,
            held_by: BTreeSet::new(),
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

    /// Refuses while it is used, and while nobody can know whether it is: a node that counts no uses reports none.
    fn require_unused(&self, state: &ClusterState, key: &KeyVersion, now: UnixMillis) -> Result<(), Refusal> {
        let (context, version) = (&self.context, self.version);
        let used = state.usage(context, version).map(|used| used.last_used);
        // Nobody counted what version 1 did with it until it was adopted.
        let adopted = key.ended_at.filter(|_| key.origin.is_adopted());
        if let Some(ago_ms) = used.max(adopted).and_then(|last| self.recently(last, now)) {
            return Err(Conflict::UsedRecently {
                context: context.clone(),
                version,
                ago_ms,
            }
            .into());
        }
        // What somebody used before he counted is not known any better once he was removed.
        for (id, node) in state.nodes.iter() {
            let counts = state.reports.get(id).is_some_and(|report| report.counts_uses());
            let counts = counts || !node.is_member();
            let gap = state.uncounted.get(id);
            let counted_ms = gap.and_then(|gap| self.recently(gap.until, now));
            if !counts || counted_ms.is_some() {
                return Err(Conflict::NotCountedYet {
                    context: context.clone(),
                    version,
                    node: node.name.clone(),
                    counted_ms: counted_ms.filter(|_| counts),
                }
                .into());
            }
        }
        Ok(())
    }

    /// How long ago that was, if it is recent. What lies ahead is: some clock is wrong, and nobody can know which.
    fn recently(&self, then: UnixMillis, now: UnixMillis) -> Option<u64> {
        let ago = u64::try_from(now.saturating_sub(then));
        match ago {
            Ok(ago) => (ago < self.recent_ms).then_some(ago),
            Err(_) => Some(0),
        }
    }
}

/// The time that uses are compared with. By a clock that is ahead every use was long ago, so the leader's alone does
/// not count: it is no later than the newest that any other node has reported, if any has.
fn now(state: &ClusterState, cx: &ApplyContext<'_>) -> UnixMillis {
    let others = state
        .nodes
        .iter()
        .filter(|(id, node)| **id != cx.leader && node.is_standing());
    let clocks = others.filter_map(|(id, _)| state.reports.get(id).map(|report| report.clock));
    clocks.max().map_or(cx.at, |newest| newest.min(cx.at))
}
