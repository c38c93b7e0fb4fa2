//! `POST /decrypt`: opens envelopes and, for ever, v1's ciphertexts. Whatever does not open is
//! the caller's fault unless the node knows better.

use std::sync::Arc;
use std::time::Instant;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use hsm_api::ErrorCode;
use hsm_core::secrets::Plaintext;
use hsm_core::{DecryptJob, DecryptV1Job};

use super::data_plane::AboveKnown;
use super::job::{answered, binding_value, slot_error, usable};
use super::problem::ApiError;
use super::resolve::{Resolution, resolve};
use super::service::ApiState;
use super::shares::Share;
use super::{json, respond};
use crate::config::ContextName;
use crate::identity::Principal;
use crate::keyring::{ContextKeys, Done};
use crate::metrics;
use crate::policy::Op;

const V1_FAILED: &str = "decryption failed";

pub(super) async fn handle(
    State(state): State<ApiState>,
    Extension(principal): Extension<Principal>,
    request: Request,
) -> Response {
    match decrypt(&state, &principal, request).await {
        Ok(response) => response,
        Err(error) => respond::data_error(error, Op::Decrypt, V1_FAILED).into_response(),
    }
}

/// What the caller has sent, decoded, and what it holds of the memory for bodies.
struct Asked {
    ciphertext: Vec<u8>,
    aad: Vec<u8>,
    part: Arc<Share>,
}

async fn decrypt(state: &ApiState, principal: &Principal, request: Request) -> Result<Response, ApiError> {
    let freshness = state.admit(principal, Op::Decrypt)?;
    let received = state.bodies().receive(principal, request.into_body()).await?;
    let [context, ciphertext, key_id, aad] =
        json::members(&received.bytes, ["context", "ciphertext", "key_id", "aad"])
            .map_err(|_| ApiError::new(ErrorCode::InvalidJson))?;
    let context = context.as_str();
    let policy = state.data().policy();
    policy.authorise(principal, context, Op::Decrypt)?;
    let asked = Asked {
        ciphertext: json::base64(ciphertext.as_str())
            .ok_or_else(|| ApiError::new(ErrorCode::InvalidBase64Ciphertext))?
            .to_vec(),
        aad: json::base64(aad.as_str())
            .ok_or_else(|| ApiError::new(ErrorCode::InvalidBase64Aad))?
            .to_vec(),
        part: Arc::clone(&received.part),
    };

    let ring = state.data().keyring();
    let (name, keys) = ring
        .context(context)
        .ok_or_else(|| ApiError::new(ErrorCode::ContextHasNoKey))?;
    let may_use = |owner: &ContextName| policy.authorise(principal, owner.as_str(), Op::Decrypt).is_ok();
    let resolution = resolve(&ring, keys, &asked.ciphertext, key_id.as_str(), may_use);
    let outcome = match resolution {
        Ok(Resolution::AboveKnown(version)) => Err(above_known(state, context, version).await),
        Ok(known) => open(state, principal, name, keys, asked, known).await,
        Err(error) => Err(error),
    };
    metrics::decryption(name.to_arc(), outcome.is_ok());
    let body = json::plaintext_body(outcome?.as_slice())
        .ok_or_else(|| ApiError::internal("the plaintext is too long to encode"))?;
    // Wiped once the answer has been written.
    Ok(respond::data_answer(body, Arc::clone(&received.part), freshness))
}

async fn open(
    state: &ApiState,
    principal: &Principal,
    name: &ContextName,
    keys: &ContextKeys,
    asked: Asked,
    resolution: Resolution,
) -> Result<Plaintext, ApiError> {
    usable(keys)?;
    let (done, answer) = tokio::sync::oneshot::channel();
    let part = asked.part;
    let done: Done<Plaintext> = Box::new(move |outcome| {
        let _ = done.send(outcome);
        // A job whose caller has gone is in memory until here.
        drop(part);
    });
    let began = Instant::now();
    let submitted = match resolution {
        // The header is authenticated: its own binding decides, whatever the context's is now.
        Resolution::V2(header) => keys.slot.decrypt_v2(
            DecryptJob {
                binding_value: binding_value(header.binding, principal),
                header,
                ciphertext: asked.ciphertext,
                context: name.to_arc(),
                aad: asked.aad,
            },
            done,
        ),
        // v1 had no associated data of the caller's; ignoring it would call it authenticated.
        Resolution::V1(_) if !asked.aad.is_empty() => {
            return Err(ApiError::new(ErrorCode::AuthenticationFailed)
                .detail("a v1 ciphertext carries no aad of the caller's"));
        }
        Resolution::V1(key_uid) => keys.slot.decrypt_v1(
            DecryptV1Job {
                key_uid,
                ciphertext: asked.ciphertext,
                context: name.to_arc(),
                binding_value: binding_value(keys.binding, principal),
            },
            done,
        ),
        Resolution::AboveKnown(version) => return Err(above_known(state, name.as_str(), version).await),
    };
    match submitted {
        Ok(()) => {
            let outcome = answered(answer, state.token_timeout()).await;
            metrics::slot_job(Arc::clone(&keys.slot_name), "decrypt", began.elapsed());
            outcome
        }
        Err(error) => Err(slot_error(error)),
    }
}

async fn above_known(state: &ApiState, context: &str, version: u32) -> ApiError {
    match state.data().version_above_known(context, version).await {
        AboveKnown::OnItsWay => ApiError::new(ErrorCode::KeyVersionNotReady)
            .detail(format!("version {version} is on its way to this node")),
        AboveKnown::Unknown => {
            ApiError::new(ErrorCode::UnknownKeyVersion).operator(format!("version {version}"))
        }
        AboveKnown::Busy => ApiError::new(ErrorCode::Overloaded)
            .operator("too many ciphertexts of unknown versions wait for the leader's word"),
        AboveKnown::NoQuorum => ApiError::new(ErrorCode::NoQuorum).detail(
            "the ciphertext names a version this node does not know, and no quorum can say \
             whether it exists",
        ),
    }
}
