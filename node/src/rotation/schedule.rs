//! Rotation by age: the leader replaces every active version whose context's interval has passed since it became
//! active. A request for that is named after the version it replaces, so that a new leader finds what the old one began
//! and nobody does it twice. A leader whose clock cannot be believed rotates nothing, and says so.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hsm_api::ErrorCode;
use raft_store::command::Origin;
use raft_store::names::{ContextName, RaftId, UnixMillis};
use raft_store::state::ClusterState;
use raft_store::state::context::{Context, VersionState};
use sha2::{Digest, Sha256};

use super::clocks::{Clocks, Doubt};
use super::plan::{Asked, Wish};
use super::{Cluster, Rotator};
use crate::admin::call::CallError;
use crate::{config, metrics};

const OPERATION: &str = "rotate-by-age";
/// How long one rotation may take; what is prepared by then is finished by the rotation driver.
const ROTATE_WITHIN: Duration = Duration::from_secs(30);
/// After a context's first failure; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(60);
/// The longest pause after a failure.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);
/// Between looks at the clocks that are reported, while nothing is applied.
const LOOK: Duration = Duration::from_secs(1);

/// Takes note of what the nodes report of their clocks, until the consensus of this node ends.
pub async fn watch_clocks(cluster: Arc<dyn Cluster>, clocks: Arc<Clocks>) {
    let mut applied = cluster.applied();
    loop {
        applied.borrow_and_update();
        clocks.look(&*cluster, Instant::now());
        if let Ok(Err(_)) = tokio::time::timeout(LOOK, applied.changed()).await {
            return;
        }
    }
}

/// What is rotated by age: the contexts whose active version is too old, with its number.
#[must_use]
pub fn due(state: &ClusterState, wall: UnixMillis, day: Duration) -> Vec<(ContextName, u32)> {
    let mut due = Vec::new();
    for (name, context) in state.contexts().iter() {
        let Some(active) = context.active_version else {
            continue;
        };
        let mut versions = state.versions_of(name);
        let is_pending = versions.any(|(_, version)| version.state == VersionState::Pending);
        if is_too_old(state, (name, context), wall, day) && !is_pending {
            due.push((name.clone(), active));
        }
    }
    due
}

/// Whether the active version of a context is older than the context's interval, whatever is done about it.
#[must_use]
pub fn is_too_old(
    state: &ClusterState,
    (name, context): (&ContextName, &Context),
    wall: UnixMillis,
    day: Duration,
) -> bool {
    let days = context.policy.interval_days;
    let active = context
        .active_version
        .and_then(|active| state.version(name, active));
    let since = active.and_then(|version| version.activated_at);
    let interval = i64::try_from(day.saturating_mul(days).as_millis()).unwrap_or(i64::MAX);
    days > 0 && since.is_some_and(|since| wall.saturating_sub(since) >= interval)
}

/// See the module.
pub struct Schedule {
    cluster: Arc<dyn Cluster>,
    rotator: Arc<Rotator>,
    clocks: Arc<Clocks>,
    rules: config::Rotation,
    /// Contexts whose rotation failed: how long to wait from when.
    failed: BTreeMap<ContextName, (Instant, Duration)>,
    /// Contexts that were rotated here, and when: once a day at most, whatever their stamps say.
    rotated: BTreeMap<ContextName, Instant>,
    doubt: Option<Doubt>,
}

impl Schedule {
    /// Rotates with `rotator` what is due by `clocks`.
    #[must_use]
    pub fn new(
        cluster: Arc<dyn Cluster>,
        rotator: Arc<Rotator>,
        clocks: Arc<Clocks>,
        rules: config::Rotation,
    ) -> Self {
        Self {
            cluster,
            rotator,
            clocks,
            rules,
            failed: BTreeMap::new(),
            rotated: BTreeMap::new(),
            doubt: None,
        }
    }

    /// Looks at every interval of the configuration, until the consensus of this node ends.
    pub async fn drive(mut self) {
        if !self.rules.enabled {
            tracing::info!("this node rotates nothing by age while it leads (rotation.enabled: false)");
            return;
        }
        let mut applied = self.cluster.applied();
        loop {
            self.check(Instant::now()).await;
            let next = tokio::time::sleep(self.rules.check_interval);
            tokio::pin!(next);
            loop {
                tokio::select! {
                    () = &mut next => break,
                    changed = applied.changed() => if changed.is_err() { return },
                }
            }
        }
    }

    /// Looks once, and rotates what is due.
    async fn check(&mut self, now: Instant) {
        let believed = self.clocks.trusted(&*self.cluster, now);
        self.note(believed.clone().err());
        let Ok(wall) = believed else { return };
        let Some(me) = self.cluster.raft_id() else { return };
        let published = self.cluster.published();
        let due = due(&published.state, wall, self.rules.day);
        self.failed
            .retain(|context, _| due.iter().any(|(name, _)| name == context));
        let day = self.rules.day;
        self.rotated
            .retain(|_, at| now.saturating_duration_since(*at) < day);
        for (context, active) in due {
            if self.rotated.contains_key(&context) {
                continue;
            }
            let waits = self.failed.get(&context);
            if waits.is_some_and(|(since, pause)| now.saturating_duration_since(*since) < *pause) {
                continue;
            }
            let deadline = tokio::time::Instant::now() + ROTATE_WITHIN;
            let highest = published
                .state
                .contexts()
                .get(&context)
                .map_or(active, |known| known.highest_version);
            let (wish, asked) = (
                Wish::Replace { active },
                asked(OPERATION, &context, (active, highest), me),
            );
            match self.rotator.make(&context, &wish, &asked, deadline).await {
                Ok(made) => {
                    let (epoch, version) = (crate::logging::epoch(), made.version);
                    tracing::info!(
                        target: "audit", epoch, action = "key.rotate_by_age", %context, version, previous = active,
                        "rotated by age"
                    );
                    self.rotated.insert(context, now);
                }
                Err(error) => self.fail(context, active, &error, now),
            }
        }
    }

    fn fail(&mut self, context: ContextName, active: u32, error: &CallError, now: Instant) {
        let published = self.cluster.published();
        if is_passing(error, &published.state, (&context, active)) {
            tracing::debug!(%context, %error, "rotation by age was not finished here");
            return;
        }
        let before = self.failed.get(&context).map(|(_, pause)| *pause);
        let pause = before.map_or(FIRST_PAUSE, |pause| (pause * 2).min(LONGEST_PAUSE));
        tracing::warn!(%context, %error, again_in_s = pause.as_secs(), "rotation by age failed");
        self.failed.insert(context, (now, pause));
    }

    /// Says when the clock is in doubt, and when it is not any more.
    fn note(&mut self, doubt: Option<Doubt>) {
        let apart = |doubt: &Option<Doubt>| matches!(doubt, Some(Doubt::Apart { .. }));
        metrics::clock_alarm(apart(&doubt));
        match &doubt {
            Some(doubt @ Doubt::Apart { .. }) if !apart(&self.doubt) => {
                tracing::error!(%doubt, "nothing is rotated by age or cleaned up: the leader's clock is in doubt");
            }
            None if apart(&self.doubt) => {
                tracing::info!("the leader's clock agrees with the voters' again; rotation by age goes on");
            }
            _ => {}
        }
        self.doubt = doubt;
    }
}

/// Whether another leader, or the next look, goes on by itself. A conflict passes if somebody else has replaced the
/// version, or is about to; any other one stays, such as a member whose release does not understand what is proposed, and
/// nobody would hear of it.
pub(crate) fn is_passing(
    error: &CallError,
    state: &ClusterState,
    (context, active): (&ContextName, u32),
) -> bool {
    match error.code {
        ErrorCode::NotLeader | ErrorCode::NoQuorum | ErrorCode::NodeDraining | ErrorCode::OutcomeUnknown => {
            true
        }
        ErrorCode::Conflict => {
            let now = state
                .contexts()
                .get(context)
                .and_then(|known| known.active_version);
            let mut versions = state.versions_of(context);
            now != Some(active) || versions.any(|(_, version)| version.state == VersionState::Pending)
        }
        _ => false,
    }
}

/// The request that replaces one version, the same on every leader. No certificate has this principal: theirs is the
/// hash of another text.
/// With every number that was given up it is another one: one request has only so many attempts.
/// `operation` says why it is replaced.
pub(crate) fn asked(
    operation: &str,
    context: &ContextName,
    (active, highest): (u32, u32),
    me: RaftId,
) -> Asked {
    let operation = format!("{operation} {context}");
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
#[path = "schedule_tests.rs"]
mod tests;
