//! What the leader does for administrators, whichever node they spoke to. It authorises each call
//! again with its own policy, after catching up with everything committed: the node that forwards is
//! trusted to say who asks, never whether that suffices.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use hsm_api::admin::{CreateKekResponse, JoinTokenResponse, KeyState, MoveKeyResponse, RotateResponse};
use hsm_api::{ErrorCode, SecretText};
use raft_store::command::{CreateContext, Op, Origin, Refusal, RequestId};
use raft_store::names::{ContextName, ContextUid, NodeName, SlotName};
use raft_store::state::ClusterState;
use raft_store::state::context::{BindingMode, RotationPolicy};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::access::turns::Turns;
use super::access::{self, AccessBody};
use super::arrival::principal_hash;
use super::audit::{Place, Subject, record};
use super::authorise::{authorise, rules};
use super::call::{AdminBody, AdminCall, CallError};
use super::cleanup::Cleanup;
use super::join_token;
use super::key_life::{Change, KeyLife};
use super::removal::{Leave, Removal};
use super::seed::Seed;
use super::views::rfc3339;
use crate::clock;
use crate::config::{Destroy, policy_of};
use crate::consensus::{BoxFuture, LeaderCalls, ProposeError};
use crate::identity::Principal;
use crate::rotation::clocks::Doubt;
use crate::rotation::cluster::catch_up;
use crate::rotation::plan::{Asked, Wish, check_first, check_label, is_begun, no_transport, unknown_context};
use crate::rotation::progress::Made;
use crate::rotation::{Clocks, Cluster, Rotator};
use crate::sync::Replication;

/// The leader answers within this time: less than the asking node waits for one attempt.
const EXECUTE_WITHIN: Duration = Duration::from_millis(11_500);
/// Calls in hand at a time.
const MAX_CALLS: usize = 64;

/// What the service is made from.
pub struct ServiceParts {
    /// Consensus.
    pub cluster: Arc<dyn Cluster>,
    /// Makes key versions.
    pub rotator: Arc<Rotator>,
    /// Whether this node's clock can be believed while it leads.
    pub clocks: Arc<Clocks>,
    /// The policy of new contexts, from this node's configuration.
    pub policy: RotationPolicy,
    /// Contexts with another limit of invocations than the policy's.
    pub max_invocations: BTreeMap<ContextName, u64>,
    /// What destroying a version takes, from this node's configuration.
    pub destroy: Destroy,
    /// How long a day of a policy is.
    pub day: Duration,
    /// Which issuers have roles on this node.
    pub seed: Seed,
    /// SHA-256 of the cluster CA's certificate; `None` on a standalone node.
    pub cluster_ca_sha256: Option<[u8; 32]>,
    /// This node's replication keys.
    pub replication: Arc<Replication>,
}

/// See the module.
pub struct AdminService {
    pub(super) parts: ServiceParts,
    calls: Semaphore,
    /// Of changes of who may do what.
    pub(super) turns: Turns,
    execute_within: Duration,
}

/// Where a context's keys are, if it has to be made.
struct Placement<'a> {
    slot: Option<&'a SlotName>,
    binding: BindingMode,
}

impl LeaderCalls for AdminService {
    fn execute(&self, call: AdminCall) -> BoxFuture<'_, Result<Value, CallError>> {
        Box::pin(async move {
            let result = self.run(&call).await;
            let principal = call.principal();
            let target = call.body.target();
            let subject = Subject {
                place: Place::Leader {
                    via: call.origin.via_node,
                },
                principal: &principal,
                source: &call.source,
                request_id: &call.request_id,
                trace_id: &call.trace_id,
                act: call.body.act(),
                target: &target,
            };
            record(&subject, result.as_ref().err());
            result
        })
    }

    fn judge_clock(&self) -> Result<(), Doubt> {
        let cluster = &*self.parts.cluster;
        self.parts
            .clocks
            .uncontradicted(cluster, std::time::Instant::now())
    }
}

impl AdminService {
    /// Takes the parts.
    #[must_use]
    pub fn new(parts: ServiceParts) -> Self {
        Self {
            parts,
            calls: Semaphore::new(MAX_CALLS),
            turns: Turns::default(),
            execute_within: EXECUTE_WITHIN,
        }
    }

    async fn run(&self, call: &AdminCall) -> Result<Value, CallError> {
        let _turn = self.calls.try_acquire().map_err(|_| {
            CallError::new(
                ErrorCode::Overloaded,
                format!("the leader has {MAX_CALLS} calls in hand"),
            )
        })?;
        let deadline = Instant::now() + self.execute_within;
        let asked = asked(call)?;
        let cluster = &*self.parts.cluster;
        // A new leader may not have applied a revocation, or this very request's first attempt.
        catch_up(cluster, deadline).await?;
        let published = cluster.published();
        if published.state.meta().is_none() {
            return Err(ProposeError::Uninitialised.into());
        }
        // This node's own rules: a CA that was taken out of its files has no roles here, whatever the entry has.
        let policy = rules(&published.state, &self.parts.seed);
        authorise(&policy, &call.principal(), call.body.act())?;
        match &call.body {
            AdminBody::Rotate { context } => {
                let made = self
                    .parts
                    .rotator
                    .make(context, &Wish::Rotate, &asked, deadline)
                    .await?;
                rotated(context, made)
            }
            AdminBody::MoveKey { context, to } => self.move_key(context, to, &asked, deadline).await,
            AdminBody::CreateKey {
                context,
                label,
                version,
                slot,
                binding,
            } => {
                let placement = Placement {
                    slot: slot.as_ref(),
                    binding: *binding,
                };
                let wish = Wish::Create {
                    label: label.clone(),
                    version: *version,
                };
                self.create(context, &wish, &placement, &asked, deadline).await
            }
            AdminBody::CreateJoinToken { ttl_seconds, node } => {
                self.join_token(*ttl_seconds, node.clone(), &asked).await
            }
            AdminBody::SetKeyUse {
                context,
                version,
                enable,
            } => {
                let change = if *enable { Change::Enable } else { Change::Disable };
                self.change_key(context, *version, change, &asked).await
            }
            AdminBody::DestroyKey {
                context,
                version,
                wait_ms,
                override_recent_use,
            } => {
                let change = Change::Destroy {
                    wait_ms: *wait_ms,
                    override_recent_use: *override_recent_use,
                };
                self.change_key(context, *version, change, &asked).await
            }
            AdminBody::UndoDestroy { context, version } => {
                self.change_key(context, *version, Change::Undo, &asked).await
            }
            AdminBody::Cleanup { context, dry_run } => {
                let cleanup = Cleanup {
                    cluster,
                    clocks: &self.parts.clocks,
                    day: self.parts.day,
                    deadline,
                };
                json(&cleanup.run(context.as_ref(), *dry_run, &asked).await?)
            }
            AdminBody::Access(body) => {
                self.change_access(&call.principal(), &asked, body, deadline)
                    .await
            }
            AdminBody::ReleaseKey { context, version } => {
                self.change_key(context, *version, Change::Release, &asked).await
            }
            AdminBody::RekeyTransport { slot, restart } => self.rekey_transport(slot, *restart, &asked).await,
            AdminBody::RekeyReplication => self.rekey_replication(&asked).await,
            AdminBody::AdoptKeys(order) => {
                json(&self.adopt(order, &asked, call.origin.via_node, deadline).await?)
            }
            AdminBody::RemoveNode {
                node,
                successor,
                lose_keys,
                dry_run,
            } => {
                let wish = Leave {
                    node,
                    successor: successor.as_ref(),
                    lose_keys: *lose_keys,
                    dry_run: *dry_run,
                };
                json(&Removal { cluster, deadline }.leave(&wish, &asked).await?)
            }
            AdminBody::KeepNode { node } => json(&Removal { cluster, deadline }.keep(node, &asked).await?),
            AdminBody::TransferLeader { from, to } => {
                json(&Removal { cluster, deadline }.transfer(*from, to.as_ref()).await?)
            }
        }
    }

    /// Who may do what, in its turn: those before may have taken the caller's role, certificate or CA away.
    async fn change_access(
        &self,
        caller: &Principal,
        asked: &Asked,
        body: &AccessBody,
        deadline: Instant,
    ) -> Result<Value, CallError> {
        let (cluster, seed) = (&*self.parts.cluster, &self.parts.seed);
        let mut turn = self.turns.take(cluster, asked, deadline).await?;
        authorise(&rules(&cluster.published().state, seed), caller, body.act())?;
        turn.begin(cluster, asked);
        let outcome = access::execute(cluster, seed, caller, asked, body).await;
        turn.end(cluster, &outcome);
        outcome
    }

    /// The context first, then its first version in the new slot. One that is not made leaves the context moved: what
    /// encrypted goes on, and the next rotation, or this call again, makes it.
    async fn move_key(
        &self,
        context: &ContextName,
        to: &SlotName,
        asked: &Asked,
        deadline: Instant,
    ) -> Result<Value, CallError> {
        let wish = Wish::Move { to: to.clone() };
        let before = slot_of(&self.parts.cluster.published().state, context);
        let made = self.parts.rotator.make(context, &wish, asked, deadline).await;
        let made = made.map_err(|error| {
            let published = self.parts.cluster.published();
            let state = &published.state;
            let is_there = slot_of(state, context).as_ref() == Some(to);
            // A move that was half done before this call is told like one that is since.
            if !is_there || (before.as_ref() == Some(to) && is_begun(state, context, to)) {
                return error;
            }
            let encrypts = encrypting_slot(state, context);
            let mut back = encrypts.clone().into_iter().chain(before.clone());
            let back = back
                .find(|slot| slot != to)
                .map(|slot| format!(", or take the move back with: hsmctl key move {context} --to {slot}"));
            let goes_on = match encrypts {
                Some(_) => "encrypts where it did",
                None => "has no version that encrypts",
            };
            let done = format!("context {context} is moved to slot {to} and {goes_on}");
            after_part(&done, &back.unwrap_or_default(), error)
        })?;
        let published = self.parts.cluster.published();
        let version = published.state.version(context, made.version);
        json(&MoveKeyResponse {
            context: context.to_string(),
            slot: version.map_or_else(|| to.to_string(), |version| version.slot.to_string()),
            version: made.version,
            key_id: made.key_id,
            previous_version: made.previous,
        })
    }

    async fn change_key(
        &self,
        context: &ContextName,
        version: u32,
        change: Change,
        asked: &Asked,
    ) -> Result<Value, CallError> {
        let life = KeyLife {
            cluster: &*self.parts.cluster,
            clocks: &self.parts.clocks,
            destroy: self.parts.destroy,
        };
        json(&life.change(context, version, change, asked).await?)
    }

    async fn create(
        &self,
        context: &ContextName,
        wish: &Wish,
        placement: &Placement<'_>,
        asked: &Asked,
        deadline: Instant,
    ) -> Result<Value, CallError> {
        if let Wish::Create {
            label: Some(label), ..
        } = wish
        {
            check_label(label)?;
        }
        let known = self.parts.cluster.published().state.contexts().contains(context);
        let is_new = !known && self.create_context(context, wish, placement, asked).await?;
        let made = match self.parts.rotator.make(context, wish, asked, deadline).await {
            Err(error) if is_new => {
                let done = format!("context {context} is made and has no key yet");
                let remedy = format!(", or: hsmctl create-kek --context {context}");
                return Err(after_part(&done, &remedy, error));
            }
            made => made?,
        };
        let state = KeyState::from_word(made.state.as_str());
        json(&CreateKekResponse {
            context: context.to_string(),
            version: made.version,
            key_id: made.key_id,
            state,
        })
    }

    /// A context cannot be taken back, so everything its first key needs is looked at before. False if another
    /// call was quicker: what is wanted is its key.
    async fn create_context(
        &self,
        context: &ContextName,
        wish: &Wish,
        placement: &Placement<'_>,
        asked: &Asked,
    ) -> Result<bool, CallError> {
        let Some(slot) = placement.slot else {
            let mut error = unknown_context(context);
            error.detail.push_str(
                ", and no slot in the configuration of the node that was asked lists it \
                 (hsm.slots.<name>.contexts)",
            );
            return Err(error);
        };
        check_first(&self.parts.cluster.published().state, context, wish)?;
        self.place_context(context, slot, placement.binding, asked).await
    }

    /// Makes a context whose first key this leader can make. False if another call was quicker.
    pub(super) async fn place_context(
        &self,
        context: &ContextName,
        slot: &SlotName,
        binding: BindingMode,
        asked: &Asked,
    ) -> Result<bool, CallError> {
        self.parts.rotator.keys().check(slot)?;
        let published = self.parts.cluster.published();
        let known = published.state.slots().get(slot);
        if known.and_then(|slot| slot.current_transport()).is_none() {
            return Err(no_transport(slot));
        }
        self.parts.rotator.check_holders(&published, slot)?;
        let op = Op::CreateContext(CreateContext {
            name: context.clone(),
            uid: ContextUid(clock::random_id()),
            slot: slot.clone(),
            binding,
            policy: self.policy(context),
        });
        let (id, origin) = (asked.side_id("context"), asked.origin.clone());
        match self.parts.cluster.propose(id, asked.body_hash, origin, op).await {
            Ok(_) => {
                tracing::info!(%context, %slot, "context created");
                Ok(true)
            }
            Err(ProposeError::Refused(Refusal::Exists(_))) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn policy(&self, context: &ContextName) -> RotationPolicy {
        policy_of(&self.parts.policy, &self.parts.max_invocations, context)
    }

    async fn join_token(
        &self,
        ttl_seconds: u64,
        node: Option<NodeName>,
        asked: &Asked,
    ) -> Result<Value, CallError> {
        let Some(ca) = self.parts.cluster_ca_sha256 else {
            return Err(CallError::new(
                ErrorCode::Conflict,
                "the leader is a standalone node without cluster.tls: nothing can join it",
            ));
        };
        let (cluster, clocks) = (&*self.parts.cluster, &*self.parts.clocks);
        let issued = join_token::issue(cluster, clocks, asked, ttl_seconds, node).await?;
        json(&JoinTokenResponse {
            token: SecretText::from(issued.text.as_str()),
            cluster_ca_sha256: hex::encode(ca),
            expires_at: rfc3339(issued.expires_at),
        })
    }
}

impl AdminBody {
    /// What it acts on, for the audit.
    fn target(&self) -> String {
        match self {
            Self::Rotate { context } | Self::CreateKey { context, .. } => context.to_string(),
            Self::MoveKey { context, to } => format!("{context} to {to}"),
            Self::CreateJoinToken { node, .. } => node.as_ref().map(ToString::to_string).unwrap_or_default(),
            Self::SetKeyUse { context, version, .. }
            | Self::DestroyKey { context, version, .. }
            | Self::UndoDestroy { context, version }
            | Self::ReleaseKey { context, version } => format!("{context}/v{version}"),
            Self::Cleanup { context, .. } => context.as_ref().map(ToString::to_string).unwrap_or_default(),
            Self::Access(body) => body.target(),
            Self::AdoptKeys(order) => order.target(),
            Self::RemoveNode {
                node,
                successor: Some(successor),
                ..
            } => format!("{node}, with {successor} in its place"),
            Self::RemoveNode { node, .. } | Self::KeepNode { node } => node.to_string(),
            Self::TransferLeader { to, .. } => to.as_ref().map(ToString::to_string).unwrap_or_default(),
            Self::RekeyTransport { slot, .. } => slot.to_string(),
            Self::RekeyReplication => String::new(),
        }
    }
}

/// The request behind a call. Identity and origin must say the same: a repeat is found under the one
/// and authorised under the other.
fn asked(call: &AdminCall) -> Result<Asked, CallError> {
    let contradiction = || {
        CallError::new(
            ErrorCode::InvalidArgument,
            "the forwarded call contradicts itself",
        )
    };
    let RequestId::Client {
        principal,
        operation,
        key,
    } = &call.id
    else {
        return Err(contradiction());
    };
    if *principal != principal_hash(&call.origin) || *operation != call.body.operation() {
        return Err(contradiction());
    }
    Ok(Asked {
        principal: *principal,
        operation: operation.clone(),
        key: key.clone(),
        body_hash: call.body_hash,
        origin: Origin::Admin(call.origin.clone()),
    })
}

/// The answer of a call that has made or moved its context and then not its key: what is done comes first, because the
/// error may say that nothing was, and its code must not.
fn after_part(done: &str, or_else: &str, error: CallError) -> CallError {
    let code = match error.code {
        ErrorCode::NoQuorum | ErrorCode::NotLeader | ErrorCode::NodeDraining => ErrorCode::OutcomeUnknown,
        code => code,
    };
    let detail = format!(
        "{done}, and its key was not made ({}: {}); ask again with the same Idempotency-Key{or_else}",
        error.code, error.detail
    );
    CallError::new(code, detail)
}

/// The slot in which the next versions of a context are made.
fn slot_of(state: &ClusterState, context: &ContextName) -> Option<SlotName> {
    let known = state.contexts().get(context)?;
    Some(known.slot.clone())
}

/// The slot of a context's active version.
fn encrypting_slot(state: &ClusterState, context: &ContextName) -> Option<SlotName> {
    let active = state.contexts().get(context)?.active_version?;
    state.version(context, active).map(|version| version.slot.clone())
}

fn rotated(context: &ContextName, made: Made) -> Result<Value, CallError> {
    json(&RotateResponse {
        context: context.to_string(),
        version: made.version,
        key_id: made.key_id,
        previous_version: made.previous.unwrap_or_default(),
    })
}

pub(super) fn json<T: Serialize>(answer: &T) -> Result<Value, CallError> {
    serde_json::to_value(answer).map_err(|error| CallError::new(ErrorCode::Internal, error.to_string()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "service_tests.rs"]
pub(super) mod tests;
