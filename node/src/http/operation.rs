//! What the four operations of the data plane have in common: a request is one thing or a batch of many, within
//! its limits, and is read, decided, done and answered.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use hsm_api::ErrorCode;
use hsm_api::data::{BATCH_MAX_BYTES, BATCH_MAX_ITEMS};

use super::asking::{Asking, Operation};
use super::body::{Received, take_more, too_large};
use super::json::{self, Document, Member, NotJson, Text};
use super::problem::ApiError;
use super::service::ApiState;
use super::{batch, job, reply, respond};
use crate::identity::Principal;

/// What an item takes of memory besides its texts, and the answer to it.
const ITEM: usize = 1 << 10;

/// Answers a request of `O`.
pub(super) async fn handle<O: Operation<N>, const N: usize>(
    State(state): State<ApiState>,
    Extension(principal): Extension<Principal>,
    request: Request,
) -> Response {
    match answer::<O, N>(&state, &principal, request).await {
        Ok(response) => response,
        Err(error) => respond::data_error(error, O::OP, O::V1_FAILED).into_response(),
    }
}

async fn answer<O: Operation<N>, const N: usize>(
    state: &ApiState,
    principal: &Principal,
    request: Request,
) -> Result<Response, ApiError> {
    state.admit(principal, O::OP)?;
    let (head, body) = request.into_parts();
    let Received { bytes, mut part } = state.bodies().receive(principal, body).await?;
    // A body may take minutes to come, and the node may have lost its leader meanwhile.
    let freshness = state.data().freshness(O::OP)?;
    let document = Document::of(&bytes, |copy| take_more(&mut part, copy))?;
    let known = O::MEMBERS;
    let read = json::request(document.as_str(), &known);
    let is_batch = read.as_ref().is_ok_and(|request| request.batch.is_some());
    let limit = if is_batch {
        BATCH_MAX_BYTES
    } else {
        state.max_body_bytes()
    };
    if bytes.len() > limit {
        let error = too_large(limit);
        return Err(match read {
            Ok(_) => error,
            Err(NotJson) => error.detail(format!(
                "the body is no batch that can be read, and larger than the {limit} bytes that a single request may have"
            )),
        });
    }
    let json::Request { members, batch } = read.map_err(|NotJson| ApiError::new(ErrorCode::InvalidJson))?;
    let asking = Asking::new(state, principal, &head.extensions);
    let Some(items) = batch else {
        let step = O::prepare(&asking, &members)?;
        let success = job::run(&asking, O::OP, step, &part).await?;
        let json = success.json(false)?;
        return Ok(respond::data_answer(json, part, freshness, asking.index));
    };
    if items.too_many {
        let detail = format!("the batch has more than {BATCH_MAX_ITEMS} items");
        return Err(ApiError::new(ErrorCode::BatchTooLarge).detail(detail));
    }
    let context = beside(&known, &members)?;
    state.limit_batch(principal, items.list.len())?;
    take_more(&mut part, items.list.len() * ITEM)?;
    let answers = batch::answers::<O, N>(&asking, &items.list, context, &part).await;
    Ok(respond::data_answer(
        reply::batch(&answers),
        Arc::clone(&part),
        freshness,
        asking.index,
    ))
}

/// The context for a whole batch. No other member stands beside one: it would not be known which item it is of.
fn beside<'t>(known: &[Member], members: &'t [Text<'_>]) -> Result<&'t str, ApiError> {
    let mut all = known.iter().zip(members);
    let context = all.next().map_or("", |(_, text)| text.as_str());
    match all.find(|(_, text)| !text.as_str().is_empty()) {
        None => Ok(context),
        Some((member, _)) => {
            let detail = format!("{} stands beside batch; it belongs into the items", member.name());
            Err(ApiError::new(ErrorCode::InvalidArgument).detail(detail))
        }
    }
}
