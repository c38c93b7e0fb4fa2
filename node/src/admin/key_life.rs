//! What administrators do with versions that are retired, on the leader: disable, enable, destroy, undo. A request
//! finds what it did before by its id, like every other; that a version is active, or was used recently, is its answer
//! for good, so that a late repeat destroys nothing that was spared before.

use std::time::{Duration, Instant};

use hsm_api::ErrorCode;
use hsm_api::admin::KeyVersionResponse;
use raft_store::command::{
    MIN_WAIT_FLOOR_MS, Op, Refusal, ReleaseVersion, ScheduleDestroy, SetVersionUse, UndoDestroy,
};
use raft_store::names::ContextName;
use raft_store::state::ClusterState;
use raft_store::state::context::{KeyVersion, VersionState};

use super::call::CallError;
use super::views;
use crate::config::Destroy;
use crate::consensus::ProposeError;
use crate::rotation::plan::{Asked, Attempt, is_final, unknown_context};
use crate::rotation::{Clocks, Cluster};

/// Rounds of one call. Each but the last met another change of the version.
const MAX_ROUNDS: usize = 16;

/// What is wanted of a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// That it decrypts again.
    Enable,
    /// That it does not.
    Disable,
    /// Its end.
    Destroy {
        /// How long it can be undone; absent: as configured.
        wait_ms: Option<u64>,
        /// Although it was used recently.
        override_recent_use: bool,
    },
    /// That it is not destroyed.
    Undo,
    /// That it is version 1's alone again, if it was adopted.
    Release,
}

/// What changes of keys work with.
pub struct KeyLife<'a> {
    /// Consensus.
    pub cluster: &'a dyn Cluster,
    /// The clock that says what is recent.
    pub clocks: &'a Clocks,
    /// What destroying takes.
    pub destroy: Destroy,
}

impl KeyLife<'_> {
    /// Carries a change out, or finds it done.
    ///
    /// # Errors
    /// `not_found`, `conflict` when the version's state does not allow it, `invalid_argument` for a wait that is
    /// too short, `not_ready` while it cannot be known what is recent, and consensus.
    pub async fn change(
        &self,
        context: &ContextName,
        version: u32,
        change: Change,
        asked: &Asked,
    ) -> Result<KeyVersionResponse, CallError> {
        for _ in 0..MAX_ROUNDS {
            let published = self.cluster.published();
            let state = &published.state;
            let attempt = match asked.attempt(state, |_| Some(()))? {
                Attempt::Settled(()) => return answer(state, context, version),
                Attempt::New(attempt) => attempt,
            };
            let known = known(state, context, version)?;
            let Some(op) = self.step(state, context, version, known, change)? else {
                return answer(state, context, version);
            };
            let (id, origin) = (asked.id(attempt), asked.origin.clone());
            match self.cluster.propose(id, asked.body_hash, origin, op).await {
                Ok(_) => return answer(&self.cluster.published().state, context, version),
                Err(ProposeError::Refused(Refusal::Conflict(why))) if !is_final(&why) => {
                    tracing::info!(%context, version, %why, "a change of a key met another; looking again");
                }
                Err(error) => return Err(error.into()),
            }
        }
        let detail = format!("version {version} of {context} changes faster than this request can follow");
        Err(CallError::new(ErrorCode::Conflict, detail))
    }

    /// What to propose; `None` if it is so already.
    fn step(
        &self,
        state: &ClusterState,
        context: &ContextName,
        version: u32,
        known: &KeyVersion,
        change: Change,
    ) -> Result<Option<Op>, CallError> {
        use VersionState::{
            Abandoned, Active, DecryptOnly, DestroyScheduled, Destroyed, Destroying, Disabled,
        };
        // An active version is refused by the state, which remembers it.
        let asks = matches!(known.state, Active | DecryptOnly | Disabled);
        let cannot = |remedy: &str| {
            let detail = format!(
                "version {version} of {context} is {}{remedy}",
                known.state.as_str()
            );
            Err(CallError::new(ErrorCode::Conflict, detail))
        };
        let (context, expected) = (context.clone(), known.state);
        match change {
            Change::Enable | Change::Disable => {
                let to = if change == Change::Enable {
                    DecryptOnly
                } else {
                    Disabled
                };
                match known.state {
                    same if same == to => Ok(None),
                    DestroyScheduled => cannot(" and does nothing already; undo its destruction first"),
                    _ if !asks => cannot(""),
                    _ => Ok(Some(Op::SetVersionUse(SetVersionUse {
                        context,
                        version,
                        expected,
                        to,
                    }))),
                }
            }
            Change::Undo => match known.state {
                DestroyScheduled => Ok(Some(Op::UndoDestroy(UndoDestroy { context, version }))),
                Destroying | Destroyed => cannot(": its wait is over, and there is no way back"),
                _ => cannot(": no destruction of it waits"),
            },
            Change::Release if !known.origin.is_adopted() => {
                cannot(": it was made here and not adopted, so there is nobody to give it back to")
            }
            Change::Release => match known.state {
                Abandoned => Ok(None),
                DecryptOnly | Disabled => Ok(Some(Op::ReleaseVersion(ReleaseVersion {
                    context,
                    version,
                    expected,
                }))),
                DestroyScheduled => cannot("; undo its destruction first"),
                _ => cannot(""),
            },
            Change::Destroy { .. } if known.state == DestroyScheduled => {
                cannot(" already; to have it wait for another time, undo that first")
            }
            Change::Destroy { .. } if !asks => cannot(""),
            Change::Destroy {
                wait_ms,
                override_recent_use,
            } => {
                let dated = state.usage(&context, version).is_some() || known.origin.is_adopted();
                if !override_recent_use && dated {
                    // A clock that is ahead would find every use long ago.
                    self.clocks.trusted(self.cluster, Instant::now())?;
                }
                Ok(Some(Op::ScheduleDestroy(ScheduleDestroy {
                    context,
                    version,
                    expected,
                    wait_ms: wait_ms.unwrap_or_else(|| ms(self.destroy.default_wait)),
                    min_wait_ms: ms(self.destroy.min_wait),
                    recent_ms: ms(self.destroy.recent_use),
                    override_recent_use,
                    // The configuration takes such a minimum with dev: true only.
                    short_wait_allowed: ms(self.destroy.min_wait) < MIN_WAIT_FLOOR_MS,
                })))
            }
        }
    }
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn known<'s>(
    state: &'s ClusterState,
    context: &ContextName,
    version: u32,
) -> Result<&'s KeyVersion, CallError> {
    if !state.contexts().contains(context) {
        return Err(unknown_context(context));
    }
    state.version(context, version).ok_or_else(|| {
        let detail = format!("version {version} of {context} does not exist");
        CallError::new(ErrorCode::NotFound, detail)
    })
}

fn answer(
    state: &ClusterState,
    context: &ContextName,
    version: u32,
) -> Result<KeyVersionResponse, CallError> {
    let key = known(state, context, version)?;
    Ok(KeyVersionResponse {
        context: context.to_string(),
        info: views::version(state, context, version, key),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "key_life_tests.rs"]
mod tests;
