//! The admin routes. Each handler asks whether the caller may, reads the request, and either answers
//! from this node's state or hands the call to the leader.

mod access;
mod adopt;
mod caller;
mod changes;
mod cluster;
mod key_life;
mod keys;
mod members;
mod placements;
mod rekey;
mod revocations;
mod slots;
mod unread;

use std::sync::Arc;

use arc_swap::ArcSwap;
use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use hsm_api::admin::WhoAmI;
use hsm_api::{ErrorCode, StateIndex, paths};
use raft_store::names::ContextName;
use raft_store::storage::Published;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::task::JoinError;

use self::caller::Caller;
pub use self::changes::Changes;
pub use self::placements::Placements;
use self::unread::Unread;
use super::audit::{Place, Subject, record};
use super::authorise::{Act, authorise};
use super::call::{AdminBody, AdminCall, CallError, Executed};
use super::seed::Seed;
use crate::consensus::{Consensus, ProposeError};
use crate::http::{ApiError, BodyLimits, DataPlane, Routes, ServedFrom};
use crate::policy::{Policy, role_name};
use crate::readiness::NodeView;
use crate::slots::SlotManager;
use crate::tls::ApiTls;

/// What the routes are made from.
pub struct AdminParts {
    /// Consensus.
    pub consensus: Consensus,
    /// Founds a cluster.
    pub seed: Seed,
    /// Which context belongs to which slot.
    pub placements: Placements,
    /// The slots.
    pub slots: Arc<SlotManager>,
    /// The rules in force; readiness and slots, for `cluster status`.
    pub view: Arc<NodeView>,
    /// For requests' bodies; [`BodyLimits::admin`].
    pub bodies: BodyLimits,
    /// For files; [`BodyLimits::uploads`].
    pub uploads: BodyLimits,
    /// The CAs that clients' certificates are accepted from, the newest.
    pub tls: Arc<ArcSwap<ApiTls>>,
    /// `cluster.name`.
    pub cluster_name: String,
    /// What is being changed; a shutdown waits for it.
    pub changes: Changes,
}

#[derive(Clone)]
struct AdminState(Arc<AdminParts>);

impl std::ops::Deref for AdminState {
    type Target = AdminParts;

    fn deref(&self) -> &AdminParts {
        &self.0
    }
}

/// All admin routes, to be merged into the API's; guards, request ids and error bodies come from there.
pub fn router(parts: AdminParts) -> Router {
    routes().into_router().with_state(AdminState(Arc::new(parts)))
}

fn routes() -> Routes<AdminState> {
    Routes::default()
        .post(paths::CLUSTER_INIT, cluster::init)
        .post(paths::CLUSTER_TOKENS, cluster::tokens)
        .post(paths::CLUSTER_JOIN, cluster::join)
        .get(paths::CLUSTER_SLOT_KEYS, cluster::slot_keys)
        .get(paths::CLUSTER_STATUS, cluster::status)
        .get(paths::CLUSTER_MEMBERS, cluster::members)
        .post(paths::CLUSTER_REMOVE_PATTERN, members::remove)
        .post(paths::CLUSTER_KEEP_PATTERN, members::keep)
        .post(paths::CLUSTER_TRANSFER_LEADER, members::transfer_leader)
        .get(paths::CLUSTER_REKEY, rekey::status)
        .post(paths::CLUSTER_REKEY_TRANSPORT, rekey::transport)
        .post(paths::CLUSTER_REKEY_REPLICATION, rekey::replication)
        .get(paths::KEYS, keys::list)
        .post(paths::KEYS, keys::create)
        .post(paths::KEYS_ROTATE_PATTERN, keys::rotate)
        .post(paths::KEYS_MOVE_PATTERN, keys::relocate)
        .get(paths::KEYS_USAGE, key_life::usage)
        .post(paths::KEYS_CLEANUP, key_life::clean_up)
        .post(paths::KEYS_ADOPT, adopt::adopt)
        .post(paths::KEY_DISABLE_PATTERN, key_life::disable)
        .post(paths::KEY_ENABLE_PATTERN, key_life::enable)
        .post(paths::KEY_DESTROY_PATTERN, key_life::destroy)
        .post(paths::KEY_UNDO_DESTROY_PATTERN, key_life::undo_destroy)
        .post(paths::KEY_RELEASE_PATTERN, key_life::release)
        .get(paths::ROTATION_STATUS, keys::rotation_status)
        .post(paths::SLOT_UNLOCK_PATTERN, slots::unlock)
        .get(paths::WHOAMI, whoami)
        .get(paths::ACL, access::show)
        .post(paths::ACL, access::set)
        .get(paths::ACL_TEST, access::test)
        .get(paths::REVOCATIONS, revocations::list)
        .post(paths::REVOCATIONS, revocations::revoke)
        .post(paths::REVOCATIONS_CRL, revocations::crl)
        .post(paths::REVOCATIONS_REMOVE, revocations::unrevoke)
}

/// For the test that compares them with the description of the API.
#[cfg(test)]
pub(crate) fn registered() -> Vec<(axum::http::Method, &'static str)> {
    routes().list().to_vec()
}

impl AdminState {
    fn policy(&self) -> Arc<Policy> {
        self.view.policy()
    }

    /// A call's body, for a caller that may make the call; a refusal is recorded. Whatever is done then asks
    /// again: the body may have been long on its way.
    async fn receive<T: DeserializeOwned>(
        &self,
        caller: &Caller,
        act: Act,
        target: &str,
        unread: Unread,
    ) -> Result<T, ApiError> {
        let allowed = authorise(&self.policy(), &caller.principal, act);
        if let Err(refusal) = &allowed {
            self.record(caller, act, target, Some(refusal));
        }
        unread.read(allowed, &self.bodies, &caller.principal).await
    }

    /// A read: authorised, answered from this node's state, recorded.
    fn read<T: Serialize>(
        &self,
        caller: &Caller,
        act: Act,
        answer: impl FnOnce(&Published) -> T,
    ) -> Result<Response, ApiError> {
        self.read_where(|_| Ok(()), caller, act, answer)
    }

    /// As [`AdminState::read`], of what only a cluster has.
    fn read_of_cluster<T: Serialize>(
        &self,
        caller: &Caller,
        act: Act,
        answer: impl FnOnce(&Published) -> T,
    ) -> Result<Response, ApiError> {
        self.read_where(founded, caller, act, answer)
    }

    /// What `there` refuses is not there to be read; only who may read hears of it.
    fn read_where<T: Serialize>(
        &self,
        there: impl FnOnce(&Published) -> Result<(), CallError>,
        caller: &Caller,
        act: Act,
        answer: impl FnOnce(&Published) -> T,
    ) -> Result<Response, ApiError> {
        let published = self.consensus.published();
        let result = authorise(&self.policy(), &caller.principal, act).and_then(|()| there(&published));
        self.record(caller, act, "", result.as_ref().err());
        result?;
        json(&answer(&published))
    }

    /// A change of the cluster: authorised here, so that what is refused never travels, then by the
    /// leader, which carries it out.
    async fn change(
        &self,
        caller: &Caller,
        body: AdminBody,
        asked: &(impl Serialize + Sync),
        target: &str,
    ) -> Result<Response, ApiError> {
        let act = body.act();
        let call = self.call(caller, body, asked);
        let consensus = self.consensus.clone();
        let work = async move { consensus.admin_call(call?).await };
        let Executed { answer, index } = self.recorded(caller, act, target, work).await?;
        self.changed(&answer, index)
    }

    /// The answer to a change that is in every state from `index` on. A client that names it to any node reads what it
    /// has written, also from one that is not there yet.
    fn changed<T: Serialize>(&self, answer: &T, index: u64) -> Result<Response, ApiError> {
        let mut response = json(answer)?;
        let epoch = self.consensus.published().state.epoch();
        let from = ServedFrom(StateIndex { epoch, index });
        response.extensions_mut().insert(from);
        Ok(response)
    }

    /// The applied index of this node.
    fn applied(&self) -> u64 {
        self.consensus.published().applied.map_or(0, |id| id.index)
    }

    /// Does what changes something and records how it ended, in a task of its own: a caller that hangs up must
    /// not take the line with it, nor a shutdown.
    async fn recorded<T: Send + 'static>(
        &self,
        caller: &Caller,
        act: Act,
        target: &str,
        work: impl Future<Output = Result<T, CallError>> + Send + 'static,
    ) -> Result<T, CallError> {
        let (state, caller, target) = (self.clone(), caller.clone(), target.to_owned());
        // The work itself authorises again, or has the leader do it.
        let place = match self.changes.begin(&state.policy(), &caller.principal, act) {
            Ok(place) => place,
            Err(error) => {
                self.record(&caller, act, &target, Some(&error));
                return Err(error);
            }
        };
        let ended = |error: JoinError| CallError::new(ErrorCode::Internal, error.to_string());
        // One task for the work, so that its end is recorded too if it is a fault.
        let work = tokio::spawn(work);
        let recorded = tokio::spawn(async move {
            let _place = place;
            let result = work.await.unwrap_or_else(|error| Err(ended(error)));
            state.record(&caller, act, &target, result.as_ref().err());
            result
        });
        recorded.await.unwrap_or_else(|error| Err(ended(error)))
    }

    fn call(&self, caller: &Caller, body: AdminBody, asked: &impl Serialize) -> Result<AdminCall, CallError> {
        let published = self.consensus.published();
        // First, so that the audit's lines of who may not are known as refusals.
        authorise(&self.policy(), &caller.principal, body.act())?;
        let member = self
            .consensus
            .raft_id()
            .filter(|_| published.state.meta().is_some());
        let via_node = member.ok_or(ProposeError::Uninitialised)?;
        Ok(AdminCall::new(caller.arrival(via_node)?, body, asked))
    }

    fn record(&self, caller: &Caller, act: Act, target: &str, error: Option<&CallError>) {
        let subject = Subject {
            place: Place::Entry,
            principal: &caller.principal,
            source: &caller.source,
            request_id: caller.request_id.as_str(),
            trace_id: caller.trace_id.as_str(),
            act,
            target,
        };
        record(&subject, error);
    }
}

impl From<CallError> for ApiError {
    fn from(error: CallError) -> Self {
        match error.code {
            ErrorCode::Internal => ApiError::internal(error.detail),
            // Where it was refused it was recorded.
            code => ApiError::new(code).detail(error.detail).with_its_line(),
        }
    }
}

/// An empty list would say that a cluster has nothing, where there is none.
fn founded(published: &Published) -> Result<(), CallError> {
    match published.state.meta() {
        Some(_) => Ok(()),
        None => Err(ProposeError::Uninitialised.into()),
    }
}

/// The context a caller named.
fn context_name(name: &str) -> Result<ContextName, ApiError> {
    ContextName::new(name)
        .map_err(|error| ApiError::new(ErrorCode::InvalidArgument).detail(error.to_string()))
}

fn json<T: Serialize>(answer: &T) -> Result<Response, ApiError> {
    let body = serde_json::to_vec(answer).map_err(|error| ApiError::internal(error.to_string()))?;
    let mut response = Response::new(Body::from(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

async fn whoami(State(state): State<AdminState>, caller: Caller) -> Result<Response, ApiError> {
    state.read(&caller, Act::WhoAmI, |_| who(&state.policy(), &caller))
}

fn who(policy: &Policy, caller: &Caller) -> WhoAmI {
    let roles = policy.roles_of(&caller.principal);
    let contexts = policy.contexts_of(&caller.principal);
    WhoAmI {
        cn: caller.principal.cn.clone(),
        ou: caller.principal.ou.clone(),
        roles: roles.into_iter().map(|role| role_name(role).to_owned()).collect(),
        contexts: contexts.iter().map(ToString::to_string).collect(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_of_the_service_is_told_to_the_operator_only() {
        let error = ApiError::from(CallError::new(ErrorCode::Internal, "sled: disk on fire"));
        assert!(!error.caller_detail().contains("sled"));
        let error = ApiError::from(CallError::new(ErrorCode::Conflict, "version 3 is pending"));
        assert_eq!(error.caller_detail(), "version 3 is pending");
    }

    #[test]
    fn without_a_cluster_there_is_nothing_to_list() {
        let error = founded(&Published::default()).unwrap_err();
        assert_eq!(error.code, ErrorCode::Uninitialised);
        assert!(founded(&crate::rotation::testing::World::new(1).published()).is_ok());
    }

    #[test]
    fn a_name_outside_the_rule_is_refused_with_the_rule() {
        let error = context_name("../x").unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidArgument);
        assert!(error.caller_detail().contains("A-Z"), "{error}");
    }
}
