//! The slots of the node that is asked. Nothing here concerns another node or the replicated state.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::response::Response;
use hsm_api::ErrorCode;
use hsm_api::admin::{SlotState, SlotStatus, UnlockSlotRequest};

use super::caller::Caller;
use super::unread::Unread;
use super::{AdminState, json};
use crate::admin::authorise::{Act, authorise};
use crate::admin::call::CallError;
use crate::http::ApiError;
use crate::slots::{OpenFailure, SlotEntry, Unlock};

/// Opens a closed slot now, once, from its configured PIN source: no PIN travels.
pub(super) async fn unlock(
    State(state): State<AdminState>,
    Path(slot): Path<String>,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    let request: UnlockSlotRequest = state.receive(&caller, Act::UnlockSlot, &slot, unread).await?;
    let work = open(state.clone(), caller.clone(), slot.clone(), request);
    json(&state.recorded(&caller, Act::UnlockSlot, &slot, work).await?)
}

async fn open(
    state: AdminState,
    caller: Caller,
    slot: String,
    request: UnlockSlotRequest,
) -> Result<SlotStatus, CallError> {
    authorise(&state.policy(), &caller.principal, Act::UnlockSlot)?;
    let Some(entry) = state.slots.get(&slot) else {
        let names: Vec<String> = state.slots.names().iter().map(ToString::to_string).collect();
        let detail = format!(
            "slot {slot:?}: this node has no such slot; it has {}",
            names.join(", ")
        );
        return Err(CallError::new(ErrorCode::NotFound, detail));
    };
    if !matches!(entry.state(), hsm_core::SlotState::Ready) {
        let (entry, how) = (Arc::clone(entry), Unlock { retry: request.retry });
        // The token takes as long as it takes.
        let opened = tokio::task::spawn_blocking(move || entry.try_unlock(how));
        match opened.await {
            Ok(Ok(())) => {}
            Ok(Err(failure @ OpenFailure::UnderWay)) => {
                return Err(CallError::new(ErrorCode::Overloaded, failure.to_string()));
            }
            Ok(Err(failure)) => {
                let code = match failure.state() {
                    hsm_core::SlotState::Locked => ErrorCode::SlotLocked,
                    _ => ErrorCode::SlotFailed,
                };
                return Err(CallError::new(code, failure.to_string()));
            }
            Err(error) => return Err(CallError::new(ErrorCode::Internal, error.to_string())),
        }
    }
    Ok(status(&state, entry))
}

/// What the node says of one of its slots.
pub(super) fn status(state: &AdminState, entry: &SlotEntry) -> SlotStatus {
    let known = state.view.slots();
    let local = known.get(entry.name());
    // As one picture has them: a reason that is over by now would stand beside a slot that is ready.
    let seen = local.map_or_else(|| entry.state(), |local| local.state.clone());
    SlotStatus {
        slot: entry.name().to_string(),
        label: entry.label().to_owned(),
        state: SlotState::from_word(seen.name()),
        reason: local.map_or_else(|| entry.reason(), |local| local.reason.clone()),
        missing_keys: local.map_or(0, |local| local.missing_keys),
    }
}
