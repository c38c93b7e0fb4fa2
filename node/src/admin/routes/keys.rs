//! Keys: create, list, rotate, move to another slot, and where rotations stand.

use axum::extract::{Path, State};
use axum::response::Response;
use hsm_api::ErrorCode;
use hsm_api::admin::{CreateKekRequest, MoveKeyRequest, RotateRequest};
use raft_store::names::SlotName;

use super::caller::Caller;
use super::unread::Unread;
use super::{AdminState, context_name};
use crate::admin::authorise::Act;
use crate::admin::call::AdminBody;
use crate::admin::views;
use crate::http::ApiError;
use crate::rotation::plan::check_label;

/// The only size of a KEK.
const KEK_BITS: u32 = 256;

pub(super) async fn list(State(state): State<AdminState>, caller: Caller) -> Result<Response, ApiError> {
    state.read_of_cluster(&caller, Act::ListKeys, |published| views::keys(&published.state))
}

pub(super) async fn rotation_status(
    State(state): State<AdminState>,
    caller: Caller,
) -> Result<Response, ApiError> {
    state.read_of_cluster(&caller, Act::RotationStatus, |published| {
        views::rotation_status(&published.state)
    })
}

pub(super) async fn rotate(
    State(state): State<AdminState>,
    Path(context): Path<String>,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    let request: RotateRequest = state.receive(&caller, Act::Rotate, &context, unread).await?;
    let context = context_name(&context)?;
    let target = context.to_string();
    state
        .change(&caller, AdminBody::Rotate { context }, &request, &target)
        .await
}

pub(super) async fn relocate(
    State(state): State<AdminState>,
    Path(context): Path<String>,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    let request: MoveKeyRequest = state.receive(&caller, Act::KeyMove, &context, unread).await?;
    let context = context_name(&context)?;
    let to = SlotName::new(&request.slot)
        .map_err(|error| ApiError::new(ErrorCode::InvalidArgument).detail(format!("slot: {error}")))?;
    let target = format!("{context} to {to}");
    let body = AdminBody::MoveKey { context, to };
    state.change(&caller, body, &request, &target).await
}

pub(super) async fn create(
    State(state): State<AdminState>,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    let mut request: CreateKekRequest = state.receive(&caller, Act::CreateKey, "", unread).await?;
    let context = context_name(&request.context)?;
    let size = request.size.get_or_insert(KEK_BITS);
    if *size != KEK_BITS {
        let detail = format!("size: {size}: a KEK has {KEK_BITS} bits");
        return Err(ApiError::new(ErrorCode::InvalidArgument).detail(detail));
    }
    if let Some(label) = &request.label {
        check_label(label)?;
    }
    let body = AdminBody::CreateKey {
        label: request.label.clone(),
        version: request.version,
        slot: state.placements.slot(&context),
        binding: state.placements.binding(&context),
        context,
    };
    let target = request.context.clone();
    state.change(&caller, body, &request, &target).await
}
