//! `POST /encrypt`: v1's request and answer, encrypted inside the token.

use std::sync::Arc;
use std::time::Instant;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use hsm_api::ErrorCode;
use hsm_api::data::EncryptResponse;
use hsm_core::EncryptJob;
use hsm_core::secrets::Plaintext;

use super::job::{answered, binding_value, slot_error, usable};
use super::problem::ApiError;
use super::resolve::held;
use super::service::ApiState;
use super::{json, respond};
use crate::identity::Principal;
use crate::metrics;
use crate::policy::Op;

const V1_FAILED: &str = "encryption failed";

pub(super) async fn handle(
    State(state): State<ApiState>,
    Extension(principal): Extension<Principal>,
    request: Request,
) -> Response {
    match encrypt(&state, &principal, request).await {
        Ok(response) => response,
        Err(error) => respond::data_error(error, Op::Encrypt, V1_FAILED).into_response(),
    }
}

async fn encrypt(state: &ApiState, principal: &Principal, request: Request) -> Result<Response, ApiError> {
    let freshness = state.admit(principal, Op::Encrypt)?;
    let received = state.bodies().receive(principal, request.into_body()).await?;
    let [context, plaintext, aad] = json::members(&received.bytes, ["context", "plaintext", "aad"])
        .map_err(|_| ApiError::new(ErrorCode::InvalidJson))?;
    let context = context.as_str();
    state.data().policy().authorise(principal, context, Op::Encrypt)?;
    let plaintext =
        json::base64(plaintext.as_str()).ok_or_else(|| ApiError::new(ErrorCode::InvalidBase64Plaintext))?;
    let aad = json::base64(aad.as_str()).ok_or_else(|| ApiError::new(ErrorCode::InvalidBase64Aad))?;

    let ring = state.data().keyring();
    let no_key = || ApiError::new(ErrorCode::ContextHasNoKey);
    let (name, keys) = ring.context(context).ok_or_else(no_key)?;
    let active = keys.active.as_ref().ok_or_else(no_key)?;
    usable(keys)
        .and_then(|()| held(keys, &active.key_uid))
        .inspect_err(|_| metrics::encryption(name.to_arc(), false))?;

    let (done, answer) = tokio::sync::oneshot::channel();
    let job = EncryptJob {
        key_uid: active.key_uid,
        version: active.version,
        context: name.to_arc(),
        binding: keys.binding,
        binding_value: binding_value(keys.binding, principal),
        aad: aad.to_vec(),
        plaintext: Plaintext::from(plaintext),
    };
    let began = Instant::now();
    let part = Arc::clone(&received.part);
    let submitted = keys.slot.encrypt(
        job,
        Box::new(move |outcome| {
            let _ = done.send(outcome);
            // A job whose caller has gone is in memory until here.
            drop(part);
        }),
    );
    let outcome = match submitted {
        Ok(()) => {
            let outcome = answered(answer, state.token_timeout()).await;
            metrics::slot_job(Arc::clone(&keys.slot_name), "encrypt", began.elapsed());
            outcome
        }
        Err(error) => Err(slot_error(error)),
    };
    metrics::encryption(name.to_arc(), outcome.is_ok());
    let body = EncryptResponse {
        ciphertext: outcome?.into(),
        key_id: active.key_id.clone(),
        key_version: active.version,
    };
    let body = serde_json::to_vec(&body).map_err(|error| ApiError::internal(format!("answer: {error}")))?;
    Ok(respond::data_answer(body, Arc::clone(&received.part), freshness))
}
