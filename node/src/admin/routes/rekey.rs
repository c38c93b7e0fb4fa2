//! Transport keys and the replication key are replaced: asked for here, carried on by the leader, and looked at on any
//! node.

use axum::extract::State;
use axum::response::Response;
use hsm_api::ErrorCode;
use hsm_api::admin::{RekeyReplicationRequest, RekeyTransportRequest};
use raft_store::names::SlotName;

use super::AdminState;
use super::caller::Caller;
use super::unread::Unread;
use crate::admin::authorise::Act;
use crate::admin::call::AdminBody;
use crate::admin::rekey_status;
use crate::http::ApiError;

pub(super) async fn transport(
    State(state): State<AdminState>,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    let request: RekeyTransportRequest = state.receive(&caller, Act::RekeyTransport, "", unread).await?;
    let slot = SlotName::new(&request.slot)
        .map_err(|error| ApiError::new(ErrorCode::InvalidArgument).detail(error.to_string()))?;
    let (restart, target) = (request.restart, slot.to_string());
    let body = AdminBody::RekeyTransport { slot, restart };
    state.change(&caller, body, &request, &target).await
}

pub(super) async fn replication(
    State(state): State<AdminState>,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    let request: RekeyReplicationRequest = state.receive(&caller, Act::RekeyReplication, "", unread).await?;
    state
        .change(&caller, AdminBody::RekeyReplication, &request, "")
        .await
}

pub(super) async fn status(State(state): State<AdminState>, caller: Caller) -> Result<Response, ApiError> {
    state.read_of_cluster(&caller, Act::RekeyStatus, |published| {
        rekey_status::status(&published.state)
    })
}
