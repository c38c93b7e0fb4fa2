//! The rekey driver: carries out on the leader what [`decide`] decides, and does nothing anywhere else. It keeps nothing
//! that a new leader would miss: what it rotates is named after the version it replaces.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hsm_api::ErrorCode;
use raft_store::command::{ActivateTransportKey, DestroyTransportKey, Done, Op};
use raft_store::names::{ContextName, RaftId};
use raft_store::storage::Published;
use tokio::task::{Id, JoinError, JoinSet};

use super::decide::{Action, decide};
use super::reseal::{self, Keys};
use crate::admin::call::CallError;
use crate::consensus::ProposeError;
use crate::rotation::cluster::Leadership;
use crate::rotation::decide::{Sightings, names};
use crate::rotation::plan::Wish;
use crate::rotation::progress::Made;
use crate::rotation::schedule::{asked, is_passing};
use crate::rotation::{Cluster, Limits, Rotator, reach};
use crate::sync::Replication;

const OPERATION: &str = "rotate-by-rekey";
/// How long one rotation may take; what is prepared by then is finished by the rotation driver.
const ROTATE_WITHIN: Duration = Duration::from_secs(30);
/// Contexts that are rotated at a time.
const AT_ONCE: usize = 4;
/// Between looks while a transport key is offered: silence passes without an entry.
const OFFERED_LOOK: Duration = Duration::from_millis(200);
/// Between looks otherwise; changes of the state wake the driver at once.
const IDLE_LOOK: Duration = Duration::from_secs(1);
/// After a step that was not done: each attempt may be an entry in the log.
const AFTER_ERROR: Duration = Duration::from_secs(1);
/// After a context's first failure; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
/// The longest pause after a failure.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

/// A version whose replacement has failed.
struct Failed {
    active: u32,
    since: Instant,
    pause: Duration,
}

/// See the module.
pub struct Driver {
    cluster: Arc<dyn Cluster>,
    rotator: Arc<Rotator>,
    replication: Arc<Replication>,
    limits: Limits,
    sightings: Sightings,
    /// One task for each context that is being rotated.
    running: JoinSet<Result<Made, CallError>>,
    /// What each of them replaces.
    replaces: HashMap<Id, (ContextName, u32)>,
    failed: BTreeMap<ContextName, Failed>,
    /// What keeps records from being sealed anew, as it was last said.
    stuck: Vec<String>,
    /// Nothing is proposed before.
    rest_until: Option<Instant>,
}

impl Driver {
    /// Rotates with `rotator`, and seals with the keys of `replication`.
    #[must_use]
    pub fn new(
        cluster: Arc<dyn Cluster>,
        rotator: Arc<Rotator>,
        replication: Arc<Replication>,
        limits: Limits,
    ) -> Self {
        Self {
            cluster,
            rotator,
            replication,
            limits,
            sightings: Sightings::default(),
            running: JoinSet::new(),
            replaces: HashMap::new(),
            failed: BTreeMap::new(),
            stuck: Vec::new(),
            rest_until: None,
        }
    }

    /// Runs until the consensus of this node ends.
    pub async fn drive(mut self) {
        let mut applied = self.cluster.applied();
        loop {
            applied.borrow_and_update();
            let pause = self.look(Instant::now()).await;
            let next = tokio::time::sleep(pause);
            tokio::pin!(next);
            loop {
                tokio::select! {
                    changed = applied.changed() => {
                        if changed.is_err() {
                            return;
                        }
                        break;
                    }
                    Some(ended) = self.running.join_next_with_id() => self.end(ended, Instant::now()),
                    () = &mut next => break,
                }
            }
        }
    }

    /// Looks once; says when to look again, if nothing changes before.
    async fn look(&mut self, now: Instant) -> Duration {
        let Some(leadership) = self.cluster.leadership() else {
            self.sightings.forget();
            self.stuck.clear();
            return IDLE_LOOK;
        };
        if let Some(until) = self.rest_until.filter(|until| *until > now) {
            return until.saturating_duration_since(now);
        }
        let published = self.cluster.published();
        self.sightings.look(leadership.term, &published.state, now);
        let mut failed = false;
        for action in self.actions(&published, &leadership, now) {
            failed |= !self.carry_out(&published, action, now).await;
        }
        self.rest_until = failed.then(|| now + AFTER_ERROR);
        let mut slots = published.state.slots().values();
        if failed {
            AFTER_ERROR
        } else if slots.any(|slot| slot.offered_transport().is_some()) {
            OFFERED_LOOK
        } else {
            IDLE_LOOK
        }
    }

    fn actions(&self, published: &Published, leadership: &Leadership, now: Instant) -> Vec<Action> {
        let voters: BTreeSet<RaftId> = published.membership.voter_ids().collect();
        let own = self.cluster.raft_id();
        let silent_for = |id: RaftId| {
            if Some(id) == own {
                return Duration::ZERO;
            }
            let heard = leadership.silent_for.get(&id).copied();
            self.sightings.silent_for(heard, now)
        };
        decide(&published.state, &voters, silent_for, &self.limits)
    }

    /// Whether it was done, or begun.
    async fn carry_out(&mut self, published: &Published, action: Action, now: Instant) -> bool {
        match action {
            Action::Activate { slot, id, left_out } => {
                reach("rekey::before_activate_commit").await;
                let left = names(&published.state, &left_out);
                let op = ActivateTransportKey {
                    slot: slot.clone(),
                    id,
                    left_out,
                };
                let proposed = self.cluster.propose_as_leader(Op::ActivateTransportKey(op)).await;
                if proposed.is_ok() {
                    reach("rekey::after_activate_commit").await;
                    let epoch = crate::logging::epoch();
                    tracing::info!(
                        target: "audit", epoch, action = "rekey.transport.activate", %slot, transport = %id,
                        left_out = left, "every member holds the new transport key: it is the slot's"
                    );
                }
                report("activate_transport_key", slot.as_str(), proposed)
            }
            Action::Destroy { slot, id } => {
                reach("rekey::before_destroy_commit").await;
                let op = DestroyTransportKey {
                    slot: slot.clone(),
                    id,
                };
                let proposed = self.cluster.propose_as_leader(Op::DestroyTransportKey(op)).await;
                if proposed.is_ok() {
                    reach("rekey::after_destroy_commit").await;
                    let epoch = crate::logging::epoch();
                    tracing::warn!(
                        target: "audit", epoch, action = "rekey.transport.destroy", %slot, transport = %id,
                        "no version needs the transport key: it is being removed from every token"
                    );
                }
                report("destroy_transport_key", slot.as_str(), proposed)
            }
            Action::Reseal => self.reseal(published).await,
            Action::Rotate { context, active } => {
                self.rotate(published, context, active, now);
                true
            }
        }
    }

    /// Seals the next records anew. False if that was not done, and is to be tried again later.
    async fn reseal(&mut self, published: &Published) -> bool {
        let state = &published.state;
        let Some(meta) = state.meta() else { return true };
        let former = state.replication().and_then(|row| row.former.as_ref());
        let Some(former) = former else { return true };
        let present = self
            .replication
            .for_cluster(meta)
            .map_err(|wrong| wrong.to_string());
        let other = self.replication.other(meta);
        let other = other.filter(|key| key.trk_id() == former.id);
        let other = other.ok_or_else(|| {
            format!(
                "the leader has not the replication key {} that the records are sealed under: give it that key \
                 beside the present one (cluster.token_replication.previous_encryption_key_env) and restart it, or \
                 stop it, so that another node leads",
                hex::encode(former.id)
            )
        });
        let (present, other) = match (present, other) {
            (Ok(present), Ok(other)) => (present, other),
            (Err(why), _) | (_, Err(why)) => return self.stuck(vec![why]),
        };
        let keys = Keys {
            present: &present,
            former: &other,
        };
        let reseal::Batch { op, problems } = reseal::batch(state, meta, keys);
        let (versions, grants) = (op.keys.len(), op.grants.len());
        if versions + grants == 0 && !problems.is_empty() {
            return self.stuck(problems);
        }
        reach("rekey::before_reseal_commit").await;
        let proposed = self.cluster.propose_as_leader(Op::ResealKeys(op)).await;
        if proposed.is_ok() {
            reach("rekey::after_reseal_commit").await;
            tracing::info!(
                versions,
                grants,
                "records are sealed under the new replication key"
            );
        }
        report("reseal_keys", "", proposed)
    }

    /// Says once what people have to put right.
    fn stuck(&mut self, why: Vec<String>) -> bool {
        if self.stuck != why {
            for problem in &why {
                tracing::error!(
                    target: "audit", epoch = crate::logging::epoch(), %problem,
                    "a record is not sealed under the new replication key; the former one is needed until it is"
                );
            }
            self.stuck = why;
        }
        false
    }

    fn rotate(&mut self, published: &Published, context: ContextName, active: u32, now: Instant) {
        let Some(me) = self.cluster.raft_id() else { return };
        let state = &published.state;
        let active_of = |name: &ContextName| state.contexts().get(name).and_then(|it| it.active_version);
        self.failed
            .retain(|name, failed| active_of(name) == Some(failed.active));
        let waits = self.failed.get(&context);
        let waits = waits.is_some_and(|it| now.saturating_duration_since(it.since) < it.pause);
        let runs = self.replaces.values().any(|(name, _)| *name == context);
        if waits || runs || self.replaces.len() >= AT_ONCE {
            return;
        }
        let known = state.contexts().get(&context);
        let highest = known.map_or(active, |known| known.highest_version);
        let asked = asked(OPERATION, &context, (active, highest), me);
        let deadline = tokio::time::Instant::now() + ROTATE_WITHIN;
        let (rotator, name) = (Arc::clone(&self.rotator), context.clone());
        let task = self.running.spawn(async move {
            let wish = Wish::Replace { active };
            rotator.make(&name, &wish, &asked, deadline).await
        });
        self.replaces.insert(task.id(), (context, active));
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
        let error = match made {
            Ok(made) => {
                let (epoch, version) = (crate::logging::epoch(), made.version);
                tracing::info!(
                    target: "audit", epoch, action = "key.rotate_by_rekey", %context, version, previous = active,
                    "rotated: its version is wrapped under the slot's new transport key"
                );
                return;
            }
            Err(error) => error,
        };
        if is_passing(&error, &self.cluster.published().state, (&context, active)) {
            tracing::debug!(%context, %error, "rotation for a rekey was not finished here");
            return;
        }
        let before = self.failed.get(&context).map(|failed| failed.pause);
        let pause = before.map_or(FIRST_PAUSE, |pause| (pause * 2).min(LONGEST_PAUSE));
        tracing::warn!(%context, %error, again_in_s = pause.as_secs(), "rotation for a rekey failed");
        let failed = Failed {
            active,
            since: now,
            pause,
        };
        self.failed.insert(context, failed);
    }
}

fn report(step: &str, of: &str, proposed: Result<Done, ProposeError>) -> bool {
    match proposed {
        Ok(_) => return true,
        // All end by themselves, or another leader goes on.
        Err(
            error @ (ProposeError::NotLeader { .. }
            | ProposeError::NoQuorum
            | ProposeError::Draining
            | ProposeError::Unknown
            | ProposeError::Refused(_)),
        ) => tracing::debug!(step, of, %error, "rekey waits"),
        Err(error) => tracing::warn!(step, of, %error, "rekey step not done; looking again"),
    }
    false
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "driver_tests.rs"]
mod tests;
