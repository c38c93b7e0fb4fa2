//! Rotation by use: the leader replaces an active version once so many of its invocations are given out that some node
//! could not be given all that it asked for, or none is left. It looks at nothing but the state: no clock has a part in
//! it, and a request is named after the version that it replaces, so that no change of leaders does it twice.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use raft_store::command::Origin;
use raft_store::names::{ContextName, RaftId};
use raft_store::state::ClusterState;
use raft_store::state::context::{VersionKey, VersionState};
use sha2::{Digest, Sha256};

use super::plan::{Asked, Wish};
use super::schedule::is_passing;
use super::{Cluster, Rotator};
use crate::admin::call::CallError;

/// How long one rotation may take; what is prepared by then is finished by the rotation driver.
const ROTATE_WITHIN: Duration = Duration::from_secs(30);
/// Between looks while nothing is applied: somebody may begin to lead.
const LOOK: Duration = Duration::from_secs(1);
/// After a context's first failure; it doubles with each further one. Nobody encrypts any more in the end.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
/// The longest pause after a failure.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);
/// Parts of the limit, in hundredths, at which it is said how much is given out.
const WARN_AT: [u64; 2] = [50, 80];

/// What is rotated by use: the contexts whose active version is used up, with its number.
#[must_use]
pub fn due(state: &ClusterState) -> Vec<(ContextName, u32)> {
    let mut due = Vec::new();
    for (name, context) in state.contexts().iter() {
        let Some(version) = context.active_version else {
            continue;
        };
        let key = VersionKey {
            context: name.clone(),
            version,
        };
        let mut versions = state.versions_of(name);
        let is_pending = versions.any(|(_, version)| version.state == VersionState::Pending);
        if state.leases().contains(&key)
            && state.lease(&key).is_due(context.policy.max_invocations)
            && !is_pending
        {
            due.push((name.clone(), version));
        }
    }
    due
}

/// See the module.
pub struct ByUse {
    cluster: Arc<dyn Cluster>,
    rotator: Arc<Rotator>,
    /// Contexts whose rotation failed: how long to wait from when.
    failed: BTreeMap<ContextName, (Instant, Duration)>,
    /// What was said of which version.
    warned: BTreeMap<ContextName, (u32, u64)>,
}

impl ByUse {
    /// Rotates with `rotator`.
    #[must_use]
    pub fn new(cluster: Arc<dyn Cluster>, rotator: Arc<Rotator>) -> Self {
        Self {
            cluster,
            rotator,
            failed: BTreeMap::new(),
            warned: BTreeMap::new(),
        }
    }

    /// Looks whenever something is applied, until the consensus of this node ends.
    pub async fn drive(mut self) {
        let mut applied = self.cluster.applied();
        loop {
            applied.borrow_and_update();
            self.check(Instant::now()).await;
            if let Ok(Err(_)) = tokio::time::timeout(LOOK, applied.changed()).await {
                return;
            }
        }
    }

    /// Looks once, and rotates what is due.
    async fn check(&mut self, now: Instant) {
        let leads = self.cluster.leadership().is_some();
        let Some(me) = self.cluster.raft_id().filter(|_| leads) else {
            // Whoever leads next says it in its place.
            self.warned.clear();
            return;
        };
        let published = self.cluster.published();
        self.warn(&published.state);
        let due = due(&published.state);
        self.failed
            .retain(|context, _| due.iter().any(|(name, _)| name == context));
        for (context, active) in due {
            let waits = self.failed.get(&context);
            if waits.is_some_and(|(since, pause)| now.saturating_duration_since(*since) < *pause) {
                continue;
            }
            let deadline = tokio::time::Instant::now() + ROTATE_WITHIN;
            let known = published.state.contexts().get(&context);
            let highest = known.map_or(active, |known| known.highest_version);
            let (wish, asked) = (Wish::Replace { active }, asked(&context, (active, highest), me));
            match self.rotator.make(&context, &wish, &asked, deadline).await {
                Ok(made) => {
                    let (epoch, version) = (crate::logging::epoch(), made.version);
                    tracing::info!(
                        target: "audit", epoch, action = "key.rotate_by_use", %context, version, previous = active,
                        "rotated by use"
                    );
                }
                Err(error) => self.fail(context, &error, now),
            }
        }
    }

    fn fail(&mut self, context: ContextName, error: &CallError, now: Instant) {
        if is_passing(error) {
            tracing::debug!(%context, %error, "rotation by use was not finished here");
            return;
        }
        let before = self.failed.get(&context).map(|(_, pause)| *pause);
        let pause = before.map_or(FIRST_PAUSE, |pause| (pause * 2).min(LONGEST_PAUSE));
        tracing::error!(
            %context, %error, again_in_s = pause.as_secs(),
            "rotation by use failed; when nothing is left, nobody encrypts in this context any more"
        );
        self.failed.insert(context, (now, pause));
    }

    /// Says once of each active version that half of its limit is given out, and that four fifths are.
    fn warn(&mut self, state: &ClusterState) {
        for (name, context) in state.contexts().iter() {
            let Some(version) = context.active_version else {
                continue;
            };
            let key = VersionKey {
                context: name.clone(),
                version,
            };
            let Some(lease) = state.leases().get(&key) else {
                continue;
            };
            let (leased, limit) = (lease.leased, context.policy.max_invocations);
            let percent = leased.saturating_mul(100).checked_div(limit).unwrap_or(100);
            let Some(reached) = WARN_AT.into_iter().rfind(|at| percent >= *at) else {
                continue;
            };
            let known = self.warned.get(name);
            if known.is_some_and(|(of, said)| *of == version && *said >= reached) {
                continue;
            }
            self.warned.insert(name.clone(), (version, reached));
            tracing::warn!(
                context = %name, version, leased, limit, reached_percent = reached,
                "many of the invocations of a key version are given out; it is rotated before nine tenths are"
            );
        }
    }
}

/// The request that replaces one version, the same on every leader. No certificate has this principal: theirs is the
/// hash of another text. With every number that was given up it is another one: one request has only so many attempts.
fn asked(context: &ContextName, (active, highest): (u32, u32), me: RaftId) -> Asked {
    let operation = format!("rotate-by-use {context}");
    Asked {
        principal: Sha256::digest(b"hsm/schedule/v1").into(),
        body_hash: Sha256::digest(operation.as_bytes()).into(),
        operation,
        key: format!("v{active}.{highest}"),
        origin: Origin::Node(me),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "by_use_tests.rs"]
mod tests;
