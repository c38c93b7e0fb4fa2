//! Access control: read, replaced, asked about.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::Response;
use hsm_api::ErrorCode;
use hsm_api::admin::{AclDocument, AclQuestion, SetAclResponse};
use raft_store::state::access::Acl;
use serde::Deserialize;
use serde_json::Value;

use super::caller::Caller;
use super::unread::Unread;
use super::{AdminState, founded, json};
use crate::admin::access::{AccessBody, document, is_as_read, keeps_admin, question};
use crate::admin::authorise::{Act, authorise};
use crate::admin::call::{AdminBody, CallError};
use crate::http::ApiError;

pub(super) async fn show(State(state): State<AdminState>, caller: Caller) -> Result<Response, ApiError> {
    state.read_of_cluster(&caller, Act::GetAcl, |published| {
        published
            .state
            .acl()
            .map_or_else(AclDocument::default, document::show)
    })
}

/// As it comes: the document is read apart, so that an error can name its place in it.
#[derive(Deserialize)]
struct SetAcl {
    acl: Value,
    #[serde(default)]
    dry_run: bool,
}

pub(super) async fn set(
    State(state): State<AdminState>,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    let SetAcl { acl, dry_run } = state.receive(&caller, Act::SetAcl, "", unread).await?;
    let written = document::parse(acl)?;
    let expected = document::digest(&written)?;
    let acl = document::resolve(&written, &state.seed.issuers)?;
    if dry_run {
        return state.try_acl(&caller, &expected, &acl);
    }
    let body = AccessBody::SetAcl { expected, acl };
    let target = body.target();
    state
        .change(&caller, AdminBody::Access(body), &written, &target)
        .await
}

impl AdminState {
    /// What replacing access control would be answered, by this node's state. It is no change, and is recorded as
    /// the question that it is.
    fn try_acl(&self, caller: &Caller, expected: &[u8; 32], acl: &Acl) -> Result<Response, ApiError> {
        let result = self.foresee_acl(caller, expected, acl);
        self.record(caller, Act::TestAcl, "acl.set", result.as_ref().err());
        result?;
        json(&SetAclResponse {
            digest: hex::encode(acl.digest()),
        })
    }

    fn foresee_acl(&self, caller: &Caller, expected: &[u8; 32], acl: &Acl) -> Result<(), CallError> {
        authorise(&self.policy(), &caller.principal, Act::SetAcl)?;
        let published = self.consensus.published();
        founded(&published)?;
        is_as_read(&published.state, expected)?;
        keeps_admin(acl, &caller.principal, &self.seed)
    }
}

pub(super) async fn test(
    State(state): State<AdminState>,
    caller: Caller,
    asked: Result<Query<AclQuestion>, QueryRejection>,
) -> Result<Response, ApiError> {
    let result = may(&state, &caller, asked);
    state.record(&caller, Act::TestAcl, "", result.as_ref().err());
    json(&result?)
}

fn may(
    state: &AdminState,
    caller: &Caller,
    asked: Result<Query<AclQuestion>, QueryRejection>,
) -> Result<hsm_api::admin::AclAnswer, CallError> {
    let policy = state.policy();
    authorise(&policy, &caller.principal, Act::TestAcl)?;
    founded(&state.consensus.published())?;
    let Query(asked) = asked.map_err(misread)?;
    question::answer(&policy, &asked, &state.seed.issuers)
}

/// A query that does not say what it has to.
pub(super) fn misread(error: QueryRejection) -> CallError {
    CallError::new(ErrorCode::InvalidArgument, error.body_text())
}
