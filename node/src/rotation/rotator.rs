//! New key versions on the leader, from the wish to the active version: make, seal, propose, wait.
//! Outside Raft, before a version is proposed, nothing is promised to anybody; after it, every repeat
//! of the request finds it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hsm_api::ErrorCode;
use hsm_core::replication::{ClusterKey, SealedKeyContext};
use raft_store::command::{Conflict, Done, MoveContext, Op, PrepareVersion, Refusal};
use raft_store::names::{ContextName, KeyUid, SlotName};
use raft_store::state::context::{KeyMaterial, VersionState};
use raft_store::state::{ClusterMeta, ClusterState};
use raft_store::storage::Published;
use tokio::time::{Instant, timeout_at};

use super::clocks::Clocks;
use super::cluster::{Cluster, Waited, lost_lead, wait_leading};
use super::decide::{Limits, names, unable, unconfigured};
use super::keys::{KeyMaker, KeyOrder, NewKey};
use super::plan::{Asked, Draft, MOVE, Step, Wish, no_transport, plan};
use super::progress::{Made, outcome};
use super::reach;
use crate::admin::call::CallError;
use crate::clock;
use crate::consensus::ProposeError;

/// Rounds of one call. Each but the last met another request's version or a change of the state.
const MAX_ROUNDS: usize = 32;
/// After a conflict, before the state is read again.
const AFTER_CONFLICT: Duration = Duration::from_millis(20);

/// The keys derived from this node's replication key, or why it is not the cluster's.
pub type ClusterKeys = Arc<dyn Fn(&ClusterMeta) -> Result<Arc<ClusterKey>, String> + Send + Sync>;

type Lane = Arc<tokio::sync::Mutex<()>>;

/// See the module.
pub struct Rotator {
    cluster: Arc<dyn Cluster>,
    keys: Arc<dyn KeyMaker>,
    cluster_keys: ClusterKeys,
    clocks: Arc<Clocks>,
    limits: Limits,
    /// One key is made at a time for a context: a second one would only meet a conflict.
    lanes: Mutex<BTreeMap<ContextName, Lane>>,
}

impl Rotator {
    /// Makes versions of what `keys` makes, stamped once `clocks` says that they can be.
    #[must_use]
    pub fn new(
        cluster: Arc<dyn Cluster>,
        keys: Arc<dyn KeyMaker>,
        cluster_keys: ClusterKeys,
        clocks: Arc<Clocks>,
        limits: Limits,
    ) -> Self {
        Self {
            cluster,
            keys,
            cluster_keys,
            clocks,
            limits,
            lanes: Mutex::new(BTreeMap::new()),
        }
    }

    /// The tokens keys are made in.
    #[must_use]
    pub fn keys(&self) -> &dyn KeyMaker {
        &*self.keys
    }

    /// Refuses a new version that could only be abandoned, because a node that has to hold it cannot: its number
    /// would be used up, and the next attempt would go the same way.
    ///
    /// # Errors
    /// `slot_failed`, with the nodes and the remedy.
    pub fn check_holders(&self, published: &Published, slot: &SlotName) -> Result<(), CallError> {
        let heard = self.cluster.leadership().unwrap_or_default().silent_for;
        let voters = published.membership.voter_ids().collect();
        let silent_for = |id| heard.get(&id).copied();
        let mut unable = unable(&published.state, &voters, silent_for, slot, &self.limits);
        let lacking = unconfigured(&published.state, &voters, silent_for, slot, &self.limits);
        unable.extend(lacking.into_iter().map(|id| (id, "not configured")));
        if unable.is_empty() {
            return Ok(());
        }
        let nodes: Vec<String> = unable
            .iter()
            .map(|(id, state)| format!("{} ({state})", names(&published.state, &BTreeSet::from([*id]))))
            .collect();
        // Stopping must not cost the majority, without which nothing is rotated either.
        let left = voters.iter().filter(|id| {
            let silence = silent_for(**id);
            Some(**id) == self.cluster.raft_id()
                || (!unable.contains_key(*id)
                    && silence.is_some_and(|silence| silence < self.limits.fence_after))
        });
        let or_stop = if left.count() * 2 > voters.len() {
            let seconds = self.limits.fence_after.as_secs();
            format!(", or stop the node and ask again once it has been silent for {seconds} s")
        } else {
            String::new()
        };
        let detail = format!(
            "slot {slot} does not serve on {}, which would have to hold the new version: mend its token, \
             or write the slot under hsm.slots and restart, there{or_stop}; nothing was made",
            nodes.join(", ")
        );
        Err(CallError::new(ErrorCode::SlotFailed, detail))
    }

    /// Makes the version `asked` wishes for, or finds the one it made, and waits until it is active.
    ///
    /// # Errors
    /// `outcome_unknown` when the deadline comes, or leadership goes, while the version is pending,
    /// `key_version_not_ready` when it was abandoned (ask again), `conflict` when another request's
    /// version does not end, and what state, token or consensus refuse.
    pub async fn make(
        &self,
        context: &ContextName,
        wish: &Wish,
        asked: &Asked,
        deadline: Instant,
    ) -> Result<Made, CallError> {
        for _ in 0..MAX_ROUNDS {
            let published = self.cluster.published();
            match plan(&published.state, context, wish, asked)? {
                Step::Await(version) => return self.active(context, version, deadline).await,
                Step::Hold(version) => self.hold(context, version, deadline).await?,
                Step::Move { .. } => self.relocate(context, wish, asked, deadline).await?,
                Step::Prepare(_) => {
                    if let Some(version) = self.prepare(context, wish, asked, deadline).await? {
                        return self.active(context, version, deadline).await;
                    }
                }
            }
        }
        let detail = format!("context {context} changes faster than this request can follow");
        Err(CallError::new(ErrorCode::Conflict, detail))
    }

    /// Makes and proposes a version; `None` when the state was another by then.
    async fn prepare(
        &self,
        context: &ContextName,
        wish: &Wish,
        asked: &Asked,
        deadline: Instant,
    ) -> Result<Option<u32>, CallError> {
        let late = |_| CallError::new(ErrorCode::Overloaded, format!("context {context} is busy"));
        let lane = self.lane(context);
        let _turn = timeout_at(deadline, lane.lock()).await.map_err(late)?;
        self.membership_settled(deadline).await?;
        self.clocks.before_stamp(&*self.cluster, Some(deadline)).await;
        // What was planned before the wait may be done by now.
        let published = self.cluster.published();
        let Step::Prepare(draft) = plan(&published.state, context, wish, asked)? else {
            return Ok(None);
        };
        self.check_holders(&published, &draft.slot)?;
        let op = self.seal(&published.state, context, &draft, deadline).await?;
        reach("rotation::before_prepare_commit").await;
        let (id, origin) = (asked.id(draft.attempt), asked.origin.clone());
        match self
            .cluster
            .propose(id, asked.body_hash, origin, Op::PrepareVersion(op))
            .await
        {
            Ok(Done::Version { version, .. }) => {
                reach("rotation::after_prepare_commit").await;
                tracing::info!(%context, version, "key version prepared");
                Ok(Some(version))
            }
            Ok(_) => Err(CallError::new(
                ErrorCode::Internal,
                "unexpected outcome of a rotation",
            )),
            Err(ProposeError::Refused(Refusal::Conflict(why))) => {
                tracing::info!(%context, %why, "rotation met a conflict; looking again");
                tokio::time::sleep(AFTER_CONFLICT).await;
                Ok(None)
            }
            Err(ProposeError::Refused(refusal)) if wish.outlives(&refusal) => {
                tracing::info!(%context, %refusal, "rotation met another version's label; looking again");
                tokio::time::sleep(AFTER_CONFLICT).await;
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Proposes that the next versions of a context are made in another slot. Everything that the first one there needs
    /// is looked at before: until it is active the context encrypts where it did.
    async fn relocate(
        &self,
        context: &ContextName,
        wish: &Wish,
        asked: &Asked,
        deadline: Instant,
    ) -> Result<(), CallError> {
        let late = |_| CallError::new(ErrorCode::Overloaded, format!("context {context} is busy"));
        let lane = self.lane(context);
        let _turn = timeout_at(deadline, lane.lock()).await.map_err(late)?;
        let published = self.cluster.published();
        let (Step::Move { attempt, from }, Wish::Move { to }) =
            (plan(&published.state, context, wish, asked)?, wish)
        else {
            return Ok(());
        };
        self.check_slot(&published, to)?;
        let op = Op::MoveContext(MoveContext {
            context: context.clone(),
            from: from.clone(),
            to: to.clone(),
        });
        let (id, origin) = (asked.side(MOVE).id(attempt), asked.origin.clone());
        match self.cluster.propose(id, asked.body_hash, origin, op).await {
            Ok(_) => {
                tracing::info!(%context, %from, %to, "new versions of the context are made in another slot");
                reach("rotation::after_move_commit").await;
                Ok(())
            }
            // Looking again does not give a node a key.
            Err(ProposeError::Refused(Refusal::Conflict(why)))
                if !matches!(why, Conflict::NoSlotKey { .. }) =>
            {
                tracing::info!(%context, %why, "a move met a conflict; looking again");
                tokio::time::sleep(AFTER_CONFLICT).await;
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Refuses a slot in which no version could become active: it is open here and has a transport key, and every node
    /// that answers has it open.
    fn check_slot(&self, published: &Published, slot: &SlotName) -> Result<(), CallError> {
        self.keys.check(slot)?;
        let known = published.state.slots().get(slot);
        if known.and_then(|slot| slot.current_transport()).is_none() {
            return Err(no_transport(slot));
        }
        self.check_holders(published, slot)
    }

    fn lane(&self, context: &ContextName) -> Lane {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(lanes.entry(context.clone()).or_default())
    }

    /// Makes the key in the token and seals it.
    async fn seal(
        &self,
        state: &ClusterState,
        context: &ContextName,
        draft: &Draft,
        deadline: Instant,
    ) -> Result<PrepareVersion, CallError> {
        let key_uid = clock::random_id();
        let order = KeyOrder {
            slot: draft.slot.clone(),
            context: context.clone(),
            version: draft.version,
            key_uid: hsm_core::names::KeyUid::from_bytes(key_uid),
            transport_id: hsm_core::names::TransportId::from_bytes(draft.transport_id.0),
        };
        let internal = |why: String| CallError::new(ErrorCode::Internal, why);
        let meta = state.meta().ok_or(ProposeError::Uninitialised)?;
        // Before the token is asked: a key that cannot be sealed must not be made.
        let cluster_key = (self.cluster_keys)(meta).map_err(internal)?;
        let key = self.make_key(order.clone(), deadline).await?;
        let sealed = SealedKeyContext {
            cluster_id: meta.cluster_id.0,
            slot: draft.slot.as_str(),
            context: context.as_str(),
            version: draft.version,
            key_uid: order.key_uid,
            transport_id: order.transport_id,
            check_record: &key.check_record,
        };
        let sealed_key = cluster_key
            .seal_key(&sealed, &key.wrapped)
            .map_err(|error| internal(error.to_string()))?;
        Ok(PrepareVersion {
            context: context.clone(),
            expected_highest: draft.expected_highest,
            version: draft.version,
            key_uid: KeyUid(key_uid),
            label: draft.label.clone(),
            material: KeyMaterial {
                transport_id: draft.transport_id,
                sealed_key,
                check_record: key.check_record,
            },
        })
    }

    async fn make_key(&self, order: KeyOrder, deadline: Instant) -> Result<NewKey, CallError> {
        let keys = Arc::clone(&self.keys);
        let slot = order.slot.clone();
        let made = tokio::task::spawn_blocking(move || {
            fail::fail_point!("rotation::before_wrap");
            let key = keys.make(&order)?;
            fail::fail_point!("rotation::after_wrap");
            Ok::<_, CallError>(key)
        });
        match timeout_at(deadline, made).await {
            Ok(Ok(made)) => made,
            Ok(Err(error)) => Err(CallError::new(
                ErrorCode::Internal,
                format!("slot {slot}: {error}"),
            )),
            Err(_) => Err(CallError::new(
                ErrorCode::TokenTimeout,
                format!("slot {slot} on the leader did not make a key in time"),
            )),
        }
    }

    /// No version is prepared inside a change of the membership: who has to prove it is open then.
    async fn membership_settled(&self, deadline: Instant) -> Result<(), CallError> {
        let settled = |published: &Published| {
            (published.membership.membership().get_joint_config().len() <= 1).then_some(())
        };
        match wait_leading(&*self.cluster, deadline, settled).await {
            Waited::Met(()) => Ok(()),
            Waited::LostLead => Err(lost_lead()),
            Waited::Late => Err(CallError::new(
                ErrorCode::NotReady,
                "a change of the membership is in progress; try again",
            )),
        }
    }

    /// Waits until another request's version is pending no more.
    async fn hold(&self, context: &ContextName, version: u32, deadline: Instant) -> Result<(), CallError> {
        let ended = |published: &Published| {
            let pending = published.state.version(context, version)?.state == VersionState::Pending;
            (!pending).then_some(())
        };
        match wait_leading(&*self.cluster, deadline, ended).await {
            Waited::Met(()) => Ok(()),
            Waited::LostLead => Err(lost_lead()),
            Waited::Late => Err(CallError::new(
                ErrorCode::Conflict,
                format!("version {version} of {context} is still being rotated in; nothing was changed"),
            )),
        }
    }

    /// Waits until a version is active, or is given up.
    async fn active(
        &self,
        context: &ContextName,
        version: u32,
        deadline: Instant,
    ) -> Result<Made, CallError> {
        let ended = |published: &Published| outcome(&published.state, context, version);
        match wait_leading(&*self.cluster, deadline, ended).await {
            Waited::Met(outcome) => outcome,
            // Whoever leads next goes on with the version: to say `not_leader` would say it was not made.
            Waited::LostLead | Waited::Late => Err(CallError::new(
                ErrorCode::OutcomeUnknown,
                format!(
                    "version {version} of {context} is prepared and not active yet; ask again with \
                     the same Idempotency-Key"
                ),
            )),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "rotator_tests.rs"]
mod tests;
