//! `cleanup-old-versions`: retired versions that nobody needs any more are disabled, which can be taken back; nothing
//! is ever destroyed. Version 1 counted from when a version was made, and so deleted the one just retired; here it
//! counts from its retirement, and from its last use.

use std::time::{Duration, Instant};

use hsm_api::ErrorCode;
use hsm_api::admin::{CleanupResponse, CleanupVersion};
use raft_store::command::{Op, Outcome, Refusal, SetVersionUse};
use raft_store::names::{ContextName, SlotName, UnixMillis};
use raft_store::state::ClusterState;
use raft_store::state::context::{KeyVersion, RotationPolicy, VersionState};
use raft_store::state::requests::Seen;

use super::call::CallError;
use crate::consensus::ProposeError;
use crate::rotation::plan::{Asked, unknown_context};
use crate::rotation::{Clocks, Cluster};

/// What a clean-up works with.
pub struct Cleanup<'a> {
    /// Consensus.
    pub cluster: &'a dyn Cluster,
    /// The clock that ages are told by.
    pub clocks: &'a Clocks,
    /// How long a day is.
    pub day: Duration,
    /// Until then.
    pub deadline: tokio::time::Instant,
}

/// A retired version, and why it stays as it is.
struct Found {
    context: ContextName,
    version: u32,
    key_id: String,
    slot: SlotName,
    kept_because: Option<String>,
    deleted_by_v1: bool,
}

impl Cleanup<'_> {
    /// Disables what is to be disabled in `only`, or everywhere.
    ///
    /// # Errors
    /// `not_found`, `not_ready` while the clock cannot be believed, `outcome_unknown` when the time is over in the
    /// middle, and consensus.
    pub async fn run(
        &self,
        only: Option<&ContextName>,
        dry_run: bool,
        asked: &Asked,
    ) -> Result<CleanupResponse, CallError> {
        let wall = self.clocks.trusted(self.cluster, Instant::now())?;
        let published = self.cluster.published();
        let mut versions = Vec::new();
        let mut changed = false;
        for mut found in self.look(&published.state, only, wall, asked)? {
            if found.kept_because.is_none() && !dry_run {
                let disabled = self.disable(&found, asked).await;
                found.kept_because = disabled.map_err(|error| after_some(changed, error))?;
                changed = true;
            }
            versions.push(CleanupVersion {
                context: found.context.to_string(),
                version: found.version,
                key_id: found.key_id,
                slot: found.slot.to_string(),
                disabled: found.kept_because.is_none(),
                kept_because: found.kept_because.unwrap_or_default(),
                deleted_by_v1: found.deleted_by_v1,
            });
        }
        Ok(CleanupResponse { dry_run, versions })
    }

    /// Every retired version that decrypts, and those that this very request has disabled before.
    fn look(
        &self,
        state: &ClusterState,
        only: Option<&ContextName>,
        wall: UnixMillis,
        asked: &Asked,
    ) -> Result<Vec<Found>, CallError> {
        if let Some(context) = only.filter(|context| !state.contexts().contains(*context)) {
            return Err(unknown_context(context));
        }
        let mut all = Vec::new();
        for (name, context) in state.contexts().iter() {
            if only.is_some_and(|only| only != name) {
                continue;
            }
            let newest = newest(state, name, context.policy.max_versions);
            for (number, version) in state.versions_of(name) {
                let found = |kept_because| Found {
                    context: name.clone(),
                    version: number,
                    key_id: version.label.clone(),
                    slot: version.slot.clone(),
                    kept_because,
                    deleted_by_v1: wall.saturating_sub(version.created_at) > self.window(&context.policy),
                };
                match version.state {
                    VersionState::DecryptOnly => {
                        let most = context.policy.max_versions;
                        all.push(found(if newest.contains(&number) {
                            Some(format!("one of the newest {most}, which are kept"))
                        } else {
                            self.kept_because(state, (name, number, version), &context.policy, wall)
                        }));
                    }
                    VersionState::Disabled if self.was_disabled(state, name, number, asked) => {
                        all.push(found(None));
                    }
                    _ => {}
                }
            }
        }
        Ok(all)
    }

    fn window(&self, policy: &RotationPolicy) -> i64 {
        let window = self.day.saturating_mul(policy.cleanup_after_days);
        i64::try_from(window.as_millis()).unwrap_or(i64::MAX)
    }

    /// Why a version that is not among the newest stays.
    fn kept_because(
        &self,
        state: &ClusterState,
        (name, number, version): (&ContextName, u32, &KeyVersion),
        policy: &RotationPolicy,
        wall: UnixMillis,
    ) -> Option<String> {
        let window = self.window(policy);
        // What lies ahead is not long ago either: some clock was wrong.
        let within = |at: UnixMillis| wall.saturating_sub(at) <= window;
        let days = policy.cleanup_after_days;
        let Some(retired) = version.ended_at else {
            return Some("nobody knows when it was retired".to_owned());
        };
        if within(retired) {
            return Some(format!("retired within the last {days} d"));
        }
        let used = state.usage(name, number).map(|used| used.last_used);
        if used.is_some_and(within) {
            return Some(format!("used within the last {days} d"));
        }
        // That nobody has reported a use says something only of those who count them.
        let (_, node) = state.nodes().iter().find(|(id, node)| {
            let counts = state
                .reports()
                .get(*id)
                .is_some_and(|report| report.counts_uses());
            let gap = state.uncounted().get(*id).is_some_and(|gap| within(gap.until));
            node.is_member() && !counts || gap
        })?;
        Some(format!("{} has not counted uses for {days} d yet", node.name))
    }

    fn was_disabled(&self, state: &ClusterState, name: &ContextName, number: u32, asked: &Asked) -> bool {
        let seen = state
            .requests()
            .look_up(&asked.side_id(&step(name, number)), &asked.body_hash);
        matches!(seen, Seen::Repeat(Outcome::Done(_)))
    }

    /// Disables a version; says why it is not, if it is not.
    async fn disable(&self, found: &Found, asked: &Asked) -> Result<Option<String>, CallError> {
        if tokio::time::Instant::now() >= self.deadline {
            let detail = "not everything was looked at in time; ask again with the same Idempotency-Key";
            return Err(CallError::new(ErrorCode::OutcomeUnknown, detail));
        }
        let (context, version) = (found.context.clone(), found.version);
        let op = Op::SetVersionUse(SetVersionUse {
            context: context.clone(),
            version,
            expected: VersionState::DecryptOnly,
            to: VersionState::Disabled,
        });
        let id = asked.side_id(&step(&context, version));
        let proposed = self
            .cluster
            .propose(id, asked.body_hash, asked.origin.clone(), op)
            .await;
        match proposed {
            Ok(_) => {}
            Err(ProposeError::Refused(Refusal::Conflict(why))) => return Ok(Some(why.to_string())),
            Err(error) => return Err(error.into()),
        }
        let published = self.cluster.published();
        let now = published.state.version(&context, version);
        // A repeat does nothing a second time.
        let enabled = now.is_some_and(|now| now.state == VersionState::DecryptOnly);
        if enabled {
            return Ok(Some(
                "enabled again since this request had disabled it".to_owned(),
            ));
        }
        tracing::info!(%context, version, "key version disabled by clean-up");
        Ok(None)
    }
}

/// The answer of a clean-up that has changed something before it failed, where the error would say that nothing was.
fn after_some(changed: bool, error: CallError) -> CallError {
    match error.code {
        ErrorCode::NoQuorum | ErrorCode::NotLeader | ErrorCode::NodeDraining if changed => CallError::new(
            ErrorCode::OutcomeUnknown,
            format!("some versions are disabled, not all ({error}); ask again with the same Idempotency-Key"),
        ),
        _ => error,
    }
}

fn step(context: &ContextName, version: u32) -> String {
    format!("{context}/v{version}")
}

/// The numbers of the newest versions that decrypt.
fn newest(state: &ClusterState, name: &ContextName, most: u32) -> Vec<u32> {
    let serve = |state| matches!(state, VersionState::Active | VersionState::DecryptOnly);
    let mut numbers: Vec<u32> = state
        .versions_of(name)
        .filter(|(_, version)| serve(version.state))
        .map(|(number, _)| number)
        .collect();
    numbers.sort_unstable_by(|a, b| b.cmp(a));
    numbers.truncate(usize::try_from(most).unwrap_or(usize::MAX));
    numbers
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "cleanup_tests.rs"]
mod tests;
