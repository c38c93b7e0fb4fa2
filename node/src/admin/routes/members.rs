//! Nodes that leave the cluster, and another leader: handed to whoever leads.

use axum::extract::{Path, State};
use axum::response::Response;
use hsm_api::ErrorCode;
use hsm_api::admin::{KeepNodeRequest, RemoveNodeRequest, TransferLeaderRequest};
use raft_store::names::NodeName;

use super::AdminState;
use super::caller::Caller;
use super::unread::Unread;
use crate::admin::authorise::Act;
use crate::admin::call::{AdminBody, CallError};
use crate::consensus::ProposeError;
use crate::http::ApiError;

fn node_name(name: &str) -> Result<NodeName, ApiError> {
    NodeName::new(name).map_err(|error| ApiError::new(ErrorCode::InvalidArgument).detail(error.to_string()))
}

pub(super) async fn remove(
    State(state): State<AdminState>,
    Path(name): Path<String>,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    let request: RemoveNodeRequest = state.receive(&caller, Act::RemoveNode, &name, unread).await?;
    let body = AdminBody::RemoveNode {
        node: node_name(&name)?,
        successor: request.successor.as_deref().map(node_name).transpose()?,
        lose_keys: request.lose_keys,
        dry_run: request.dry_run,
    };
    state.change(&caller, body, &request, &name).await
}

pub(super) async fn keep(
    State(state): State<AdminState>,
    Path(name): Path<String>,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    let request: KeepNodeRequest = state.receive(&caller, Act::KeepNode, &name, unread).await?;
    let body = AdminBody::KeepNode {
        node: node_name(&name)?,
    };
    state.change(&caller, body, &request, &name).await
}

pub(super) async fn transfer_leader(
    State(state): State<AdminState>,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    let act = Act::TransferLeader;
    let request: TransferLeaderRequest = state.receive(&caller, act, "", unread).await?;
    let to = request.to.as_deref().map(node_name).transpose()?;
    let leader = state.consensus.view().leader;
    let from = request.from.or(leader);
    let from = from.ok_or_else(|| CallError::from(ProposeError::NotLeader { leader: None }))?;
    let target = request.to.clone().unwrap_or_default();
    let body = AdminBody::TransferLeader { from, to };
    state.change(&caller, body, &request, &target).await
}
