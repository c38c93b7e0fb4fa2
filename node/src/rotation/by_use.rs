//! Rotation by use: the leader replaces an active version once so many of its invocations are given out that some node
//! could not be given all that it asked for, or none is left. It looks at nothing but the state: no clock has a part in
//! it, and a request is named after the version that it replaces, so that no change of leaders does it twice. Contexts are
//! rotated independently of each other.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hsm_api::ErrorCode;
use raft_store::names::ContextName;
use raft_store::state::ClusterState;
use raft_store::state::context::{VersionKey, VersionState};
use tokio::task::{Id, JoinError, JoinSet};

use super::plan::Wish;
use super::progress::Made;
use super::schedule::{asked, is_passing};
use super::{Cluster, Rotator};
use crate::admin::call::CallError;

const OPERATION: &str = "rotate-by-use";
/// How long one rotation may take; what is prepared by then is finished by the rotation driver.
const ROTATE_WITHIN: Duration = Duration::from_secs(30);
/// Between looks while nothing is applied: somebody may begin to lead.
const LOOK: Duration = Duration::from_secs(1);
/// After a context's first failure; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
/// The longest pause after a failure, while nodes can still be given some.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);
/// The longest one once they cannot: whoever has used up his lease encrypts no more.
const URGENT_PAUSE: Duration = Duration::from_secs(15);
/// More rotations of a context within [`OFTEN_WITHIN`] than this are no use that its limit was made for.
const OFTEN: usize = 10;
/// See [`OFTEN`].
const OFTEN_WITHIN: Duration = Duration::from_secs(3600);
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
        let mut versions = state.versions_of(name);
        let is_pending = versions.any(|(_, version)| version.state == VersionState::Pending);
        if state.is_used_up(&key_of(name, version)) && !is_pending {
            due.push((name.clone(), version));
        }
    }
    due
}

fn key_of(context: &ContextName, version: u32) -> VersionKey {
    VersionKey {
        context: context.clone(),
        version,
    }
}

/// A version whose replacement has failed.
struct Failed {
    active: u32,
    since: Instant,
    pause: Duration,
}

/// See the module.
pub struct ByUse {
    cluster: Arc<dyn Cluster>,
    rotator: Arc<Rotator>,
    /// One task for each context that is being rotated: a slot that hangs delays nobody else's.
    running: JoinSet<Result<Made, CallError>>,
    /// What each of them replaces.
    replaces: HashMap<Id, (ContextName, u32)>,
    failed: BTreeMap<ContextName, Failed>,
    /// When this leader has rotated each context lately, the oldest first; one more than [`OFTEN`] at most.
    rotated: BTreeMap<ContextName, VecDeque<Instant>>,
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
            running: JoinSet::new(),
            replaces: HashMap::new(),
            failed: BTreeMap::new(),
            rotated: BTreeMap::new(),
            warned: BTreeMap::new(),
        }
    }

    /// Looks whenever something is applied, until the consensus of this node ends.
    pub async fn drive(mut self) {
        let mut applied = self.cluster.applied();
        loop {
            applied.borrow_and_update();
            self.begin(Instant::now());
            let look = tokio::time::sleep(LOOK);
            tokio::pin!(look);
            loop {
                tokio::select! {
                    changed = applied.changed() => {
                        if changed.is_err() {
                            return;
                        }
                        break;
                    }
                    // Not begun anew for that: what fails at once would fail again and again.
                    Some(ended) = self.running.join_next_with_id() => self.end(ended, Instant::now()),
                    () = &mut look => break,
                }
            }
        }
    }

    /// Looks once, and begins to rotate what is due.
    fn begin(&mut self, now: Instant) {
        let leads = self.cluster.leadership().is_some();
        let Some(me) = self.cluster.raft_id().filter(|_| leads) else {
            // Whoever leads next says it in its place, and counts for itself.
            self.warned.clear();
            self.rotated.clear();
            return;
        };
        let published = self.cluster.published();
        let state = &published.state;
        self.warn(state);
        let active = |name: &ContextName| state.contexts().get(name).and_then(|known| known.active_version);
        self.failed
            .retain(|name, failed| active(name) == Some(failed.active));
        for (context, active) in due(state) {
            let runs = self.replaces.values().any(|(name, _)| *name == context);
            if runs || self.waits(state, &context, now) {
                continue;
            }
            let deadline = tokio::time::Instant::now() + ROTATE_WITHIN;
            let known = state.contexts().get(&context);
            let highest = known.map_or(active, |known| known.highest_version);
            let (wish, asked) = (
                Wish::Replace { active },
                asked(OPERATION, &context, (active, highest), me),
            );
            let (rotator, name) = (Arc::clone(&self.rotator), context.clone());
            let task = self
                .running
                .spawn(async move { rotator.make(&name, &wish, &asked, deadline).await });
            self.replaces.insert(task.id(), (context, active));
        }
    }

    /// Whether the pause after a failure is not over.
    fn waits(&self, state: &ClusterState, context: &ContextName, now: Instant) -> bool {
        self.failed.get(context).is_some_and(|failed| {
            let is_urgent = state.lease_part(&key_of(context, failed.active)) == 0;
            let most = if is_urgent { URGENT_PAUSE } else { LONGEST_PAUSE };
            now.saturating_duration_since(failed.since) < failed.pause.min(most)
        })
    }

    /// Takes note of how a rotation has ended.
    fn end(&mut self, ended: Result<(Id, Result<Made, CallError>), JoinError>, now: Instant) {
        let (id, made) = match ended {
            Ok(ended) => ended,
            Err(error) => {
                let why = CallError::new(ErrorCode::Internal, error.to_string());
                (error.id(), Err(why))
            }
        };
        let Some((context, active)) = self.replaces.remove(&id) else {
            return;
        };
        match made {
            Ok(made) => {
                let (epoch, version) = (crate::logging::epoch(), made.version);
                tracing::info!(
                    target: "audit", epoch, action = "key.rotate_by_use", %context, version, previous = active,
                    "rotated by use"
                );
                self.count(&context, now);
            }
            Err(error) => self.fail(context, active, &error, now),
        }
    }

    /// Says of a context that is rotated all the time that this is so. It goes on: the alternative is that nobody
    /// encrypts.
    fn count(&mut self, context: &ContextName, now: Instant) {
        let times = self.rotated.entry(context.clone()).or_default();
        times.push_back(now);
        while let Some(first) = times.front()
            && (times.len() > OFTEN + 1 || now.saturating_duration_since(*first) > OFTEN_WITHIN)
        {
            times.pop_front();
        }
        if times.len() > OFTEN {
            tracing::error!(
                %context, more_than = OFTEN, within_s = OFTEN_WITHIN.as_secs(),
                "rotated by use again and again: the context's max_invocations is too small for what is encrypted in it"
            );
        }
    }

    fn fail(&mut self, context: ContextName, active: u32, error: &CallError, now: Instant) {
        let published = self.cluster.published();
        if is_passing(error, &published.state, (&context, active)) {
            tracing::debug!(%context, %error, "rotation by use was not finished here");
            return;
        }
        let before = self.failed.get(&context).map(|failed| failed.pause);
        let pause = before.map_or(FIRST_PAUSE, |pause| (pause * 2).min(LONGEST_PAUSE));
        tracing::error!(
            %context, %error, again_in_s = pause.as_secs(), urgent_in_s = pause.min(URGENT_PAUSE).as_secs(),
            "rotation by use failed; when nothing is left, nobody encrypts in this context any more"
        );
        let failed = Failed {
            active,
            since: now,
            pause,
        };
        self.failed.insert(context, failed);
    }

    /// Says once of each active version that half of its limit is given out, and that four fifths are.
    fn warn(&mut self, state: &ClusterState) {
        for (name, context) in state.contexts().iter() {
            let Some(version) = context.active_version else {
                continue;
            };
            let Some(lease) = state.leases().get(&key_of(name, version)) else {
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

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "by_use_tests.rs"]
mod tests;
