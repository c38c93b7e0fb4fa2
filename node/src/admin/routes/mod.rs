//! The admin routes. Each handler reads the request, asks whether the caller may, and either answers
//! from this node's state or hands the call to the leader.

mod caller;
mod cluster;
mod keys;
mod placements;
mod slots;

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use axum::routing::{get, post};
use hsm_api::admin::WhoAmI;
use hsm_api::{ErrorCode, paths};
use raft_store::names::ContextName;
use raft_store::storage::Published;
use serde::Serialize;
use serde::de::DeserializeOwned;

use self::caller::Caller;
pub use self::placements::Placements;
use super::audit::{Place, Subject, record};
use super::authorise::{Act, authorise, rules};
use super::call::{AdminBody, AdminCall, CallError};
use super::seed::Seed;
use crate::consensus::{Consensus, ProposeError};
use crate::http::ApiError;
use crate::policy::{Policy, role_name};
use crate::readiness::NodeView;
use crate::slots::SlotManager;

/// What the routes are made from.
pub struct AdminParts {
    /// Consensus.
    pub consensus: Consensus,
    /// Founds a cluster, and rules until there is one.
    pub seed: Seed,
    /// Which context belongs to which slot.
    pub placements: Placements,
    /// The slots.
    pub slots: Arc<SlotManager>,
    /// Readiness and slots, for `cluster status`.
    pub view: Arc<NodeView>,
    /// `cluster.name`.
    pub cluster_name: String,
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
    Router::new()
        .route(paths::CLUSTER_INIT, post(cluster::init))
        .route(paths::CLUSTER_TOKENS, post(cluster::tokens))
        .route(paths::CLUSTER_JOIN, post(cluster::join))
        .route(paths::CLUSTER_STATUS, get(cluster::status))
        .route(paths::CLUSTER_MEMBERS, get(cluster::members))
        .route(paths::KEYS, get(keys::list).post(keys::create))
        .route(paths::KEYS_ROTATE_PATTERN, post(keys::rotate))
        .route(paths::ROTATION_STATUS, get(keys::rotation_status))
        .route(paths::SLOT_UNLOCK_PATTERN, post(slots::unlock))
        .route(paths::WHOAMI, get(whoami))
        .with_state(AdminState(Arc::new(parts)))
}

impl AdminState {
    fn policy(&self, published: &Published) -> Policy {
        rules(&published.state, &self.seed)
    }

    /// A read: authorised, answered from this node's state, recorded.
    fn read<T: Serialize>(
        &self,
        caller: &Caller,
        act: Act,
        answer: impl FnOnce(&Published) -> T,
    ) -> Result<Response, ApiError> {
        let published = self.consensus.published();
        let result = authorise(&self.policy(&published), &caller.principal, act);
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
        let result = self.forward(caller, body, asked).await;
        self.record(caller, act, target, result.as_ref().err());
        json(&result?)
    }

    async fn forward(
        &self,
        caller: &Caller,
        body: AdminBody,
        asked: &(impl Serialize + Sync),
    ) -> Result<serde_json::Value, CallError> {
        let published = self.consensus.published();
        // First, so that the audit's lines of who may not are known as refusals.
        authorise(&self.policy(&published), &caller.principal, body.act())?;
        let member = self
            .consensus
            .raft_id()
            .filter(|_| published.state.meta().is_some());
        let via_node = member.ok_or(ProposeError::Uninitialised)?;
        let call = AdminCall::new(caller.arrival(via_node)?, body, asked);
        self.consensus.admin_call(call).await
    }

    fn record(&self, caller: &Caller, act: Act, target: &str, error: Option<&CallError>) {
        let subject = Subject {
            place: Place::Entry,
            principal: &caller.principal,
            source: &caller.source,
            request_id: caller.request_id.as_str(),
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
            code => ApiError::new(code).detail(error.detail),
        }
    }
}

/// The context a caller named.
fn context_name(name: &str) -> Result<ContextName, ApiError> {
    ContextName::new(name)
        .map_err(|error| ApiError::new(ErrorCode::InvalidArgument).detail(error.to_string()))
}

/// A request's body; an empty one is an empty object. What was sent is not repeated: it may hold a
/// join token.
fn parse<T: DeserializeOwned>(body: &Bytes) -> Result<T, ApiError> {
    let bytes: &[u8] = if body.is_empty() { b"{}" } else { body };
    serde_json::from_slice(bytes).map_err(|error| {
        let what = match error.classify() {
            serde_json::error::Category::Data => "a member is missing or of the wrong type",
            _ => "not JSON",
        };
        let detail = format!("{what}, at line {} column {}", error.line(), error.column());
        ApiError::new(ErrorCode::InvalidJson).detail(detail)
    })
}

fn json<T: Serialize>(answer: &T) -> Result<Response, ApiError> {
    let body = serde_json::to_vec(answer).map_err(|error| ApiError::internal(error.to_string()))?;
    let mut response = Response::new(Body::from(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

async fn whoami(State(state): State<AdminState>, caller: Caller) -> Result<Response, ApiError> {
    state.read(&caller, Act::WhoAmI, |published| {
        who(&state.policy(published), &caller)
    })
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
    use hsm_api::admin::{JoinRequest, RotateRequest};

    use super::*;

    #[test]
    fn an_empty_body_is_an_empty_object() {
        assert!(parse::<RotateRequest>(&Bytes::new()).is_ok());
        assert!(parse::<RotateRequest>(&Bytes::from_static(b"{}")).is_ok());
        let error = parse::<RotateRequest>(&Bytes::from_static(b"{")).unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidJson);
    }

    #[test]
    fn a_body_that_does_not_fit_is_not_repeated() {
        let body = Bytes::from_static(br#"{"token": {"planted": "canary"}, "cluster_ca_sha256": 1}"#);
        let error = parse::<JoinRequest>(&body).unwrap_err();
        assert!(!error.to_string().contains("canary"), "{error}");
        assert!(error.caller_detail().contains("line 1"), "{error}");
    }

    #[test]
    fn a_fault_of_the_service_is_told_to_the_operator_only() {
        let error = ApiError::from(CallError::new(ErrorCode::Internal, "sled: disk on fire"));
        assert!(!error.caller_detail().contains("sled"));
        let error = ApiError::from(CallError::new(ErrorCode::Conflict, "version 3 is pending"));
        assert_eq!(error.caller_detail(), "version 3 is pending");
    }

    #[test]
    fn a_name_outside_the_rule_is_refused_with_the_rule() {
        let error = context_name("../x").unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidArgument);
        assert!(error.caller_detail().contains("A-Z"), "{error}");
    }
}
