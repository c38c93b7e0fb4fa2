//! Adoption, where it has to be asked for: on the node whose token holds the keys. It looks into the token, makes the
//! check records, and hands the rest to the leader.

mod look;

use std::collections::BTreeSet;

use axum::extract::State;
use axum::response::Response;
use hsm_api::ErrorCode;
use hsm_api::admin::{
    ADOPT_MAX_KEYS, AdoptKey, AdoptKeysRequest, AdoptKeysResponse, AdoptedVersion, BindingMode as ApiBinding,
    SkippedKey,
};
use hsm_api::v1::version_of_label;
use hsm_core::{AdoptKek, Slot, SlotState};
use raft_store::command::MAX_ADOPTED;
use raft_store::names::{ContextName, KeyUid, SlotName, UnixMillis};
use raft_store::state::ClusterState;
use raft_store::state::context::BindingMode;
use serde::Serialize;
use serde_json::Value;

use self::look::{labels, look, missing, not_there, nothing_there};
use super::caller::Caller;
use super::unread::Unread;
use super::{AdminState, Placements, context_name, founded};
use crate::admin::adopt::{AdoptOrder, adopted, check_alive, check_free, other_binding};
use crate::admin::authorise::{Act, authorise};
use crate::admin::call::{AdminBody, CallError, Executed};
use crate::admin::views;
use crate::clock;
use crate::http::ApiError;
use crate::sync::convert::to_token_key;

/// Longest label: what a token keeps.
const MAX_LABEL: usize = 255;
/// Longest `CKA_ID`, in bytes.
const MAX_ID: usize = 255;
/// Labels named one by one in a message.
const NAMED: usize = 20;

pub(super) async fn adopt(
    State(state): State<AdminState>,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    let request: AdoptKeysRequest = state.receive(&caller, Act::KeyAdopt, "", unread).await?;
    let context = context_name(&request.context)?;
    check(&request)?;
    let target = context.to_string();
    let work = carry_out(state.clone(), caller.clone(), context, request);
    let Executed { answer, index } = state.recorded(&caller, Act::KeyAdopt, &target, work).await?;
    state.changed(&answer, index)
}

/// What is wrong with a request as it stands.
fn check(request: &AdoptKeysRequest) -> Result<(), CallError> {
    let refuse = |detail: String| Err(CallError::new(ErrorCode::InvalidArgument, detail));
    if request.keys.is_empty() || request.keys.len() > ADOPT_MAX_KEYS {
        return refuse(format!("keys: name 1 to {ADOPT_MAX_KEYS} of them"));
    }
    let (mut labels, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    for key in &request.keys {
        let AdoptKey { label, version, .. } = key;
        if label.is_empty() || label.len() > MAX_LABEL || label.chars().any(char::is_control) {
            return refuse(format!(
                "keys: label {label:?}: a label has 1 to {MAX_LABEL} bytes and no control characters"
            ));
        }
        id_of(key)?;
        if version.is_some_and(|version| !(1..=MAX_ADOPTED).contains(&version)) {
            return refuse(format!(
                "keys: {label:?}: version: write a number from 1 to {MAX_ADOPTED}"
            ));
        }
        if !labels.insert(label) || version.is_some_and(|version| !numbers.insert(version)) {
            return refuse(format!(
                "keys: {label:?}: no label and no number may be named twice"
            ));
        }
    }
    Ok(())
}

/// The `CKA_ID` that tells it from others of its label.
fn id_of(key: &AdoptKey) -> Result<Option<Vec<u8>>, CallError> {
    let Some(text) = &key.id else {
        return Ok(None);
    };
    match hex::decode(text) {
        Ok(id) if (1..=MAX_ID).contains(&id.len()) => Ok(Some(id)),
        _ => {
            let detail = format!(
                "keys: {:?}: id {text:?}: write its CKA_ID, 1 to {MAX_ID} bytes in hex digits",
                key.label
            );
            Err(CallError::new(ErrorCode::InvalidArgument, detail))
        }
    }
}

/// Whom the context's ciphertexts are bound to: version 1's are of no use in one that is bound otherwise, and a binding
/// is for good, so that none is guessed.
fn binding_of(
    placements: &Placements,
    state: &ClusterState,
    context: &ContextName,
    asked: Option<ApiBinding>,
) -> Result<BindingMode, CallError> {
    let invalid = |detail: String| Err(CallError::new(ErrorCode::InvalidArgument, detail));
    let asked = match asked {
        None => None,
        Some(ApiBinding::None) => Some(BindingMode::None),
        Some(ApiBinding::Shared) => Some(BindingMode::Shared),
        Some(ApiBinding::Private) => Some(BindingMode::Private),
        Some(ApiBinding::Unknown) => {
            return invalid("binding: write shared, private or none".to_owned());
        }
    };
    let known = state.contexts().get(context).map(|known| known.binding);
    match (known, asked) {
        (Some(is), Some(asked)) if is != asked => Err(other_binding(context, is, asked)),
        (Some(is), _) => Ok(is),
        (None, Some(asked)) => Ok(asked),
        (None, None) => placements.written_binding(context).map_or_else(
            || {
                invalid(format!(
                    "binding: context {context} does not exist, and stands in no hsm.keys of this node's configuration; say \
                     to whom version 1 bound its ciphertexts, as its hsm.keys.{context}.mode did (--mode shared, private or \
                     none; version 1's default is private)"
                ))
            },
            Ok,
        ),
    }
}

/// What the token's labels say about a context: the highest number that version 1 gave, and the keys that nobody has
/// adopted and this request does not either.
fn survey(
    state: &ClusterState,
    context: &ContextName,
    asked: &[AdoptKey],
    labelled: &BTreeSet<String>,
) -> (u32, Vec<String>) {
    let numbered = labelled.iter().filter_map(|label| {
        let number = version_of_label(context.as_str(), label)?;
        (number <= MAX_ADOPTED).then_some((number, label))
    });
    let (mut floor, mut left) = (0, Vec::new());
    for (number, label) in numbered {
        floor = floor.max(number);
        if !state.label_taken(label) && !asked.iter().any(|key| key.label == *label) {
            left.push((number, label.clone()));
        }
    }
    left.sort();
    (floor, left.into_iter().map(|(_, label)| label).collect())
}

/// The refusal while the token has more of the context than what is asked for.
fn further(context: &ContextName, left: &[String]) -> CallError {
    let mut shown = left.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    if left.len() > NAMED {
        shown.push_str(&format!(" and {} more", left.len() - NAMED));
    }
    CallError::new(
        ErrorCode::Conflict,
        format!(
            "the token has further keys of version 1 for {context} that nobody has adopted: {shown}; name them too (all at \
             once with --metadata-file), or say --only if what was encrypted under them is not needed now: they can be \
             adopted later"
        ),
    )
}

async fn carry_out(
    state: AdminState,
    caller: Caller,
    context: ContextName,
    request: AdoptKeysRequest,
) -> Result<Executed, CallError> {
    // The token is not even looked into for somebody who may not.
    authorise(&state.policy(), &caller.principal, Act::KeyAdopt)?;
    let published = state.consensus.published();
    founded(&published)?;
    let slot = slot_of(&state, &published.state, &context, request.slot.as_deref())?;
    let token = open_token(&state, &slot)?;
    let binding = binding_of(&state.placements, &published.state, &context, request.binding)?;
    let labelled = labels(token.clone()).await?;
    let (floor, left) = survey(&published.state, &context, &request.keys, &labelled);
    if !left.is_empty() && !request.only {
        return Err(further(&context, &left));
    }
    let skipped = missing(
        token.clone(),
        &published.state,
        &context,
        &request.keys,
        &labelled,
    )
    .await?;
    if !skipped.is_empty() && !request.skip_missing {
        return Err(not_there(&slot, &context, &skipped));
    }
    let there = without(&request.keys, &skipped);
    check_left(&published.state, &slot, &context, &there, &skipped)?;
    let floor = reserved(floor, &skipped);
    let keys = numbered(&published.state, &context, &there, floor)?;
    // With nothing left to adopt the context is not made either.
    if request.dry_run || keys.is_empty() {
        let seen = keys.iter().map(Numbered::foreseen).collect();
        let found = look(token, keys, |token, key| {
            let id = key.id.as_deref();
            token.examine_v1_key(&key.kek.label, id).map(|()| Vec::new())
        });
        found.await?;
        if !request.dry_run {
            record_skipped(&state, &caller, &context, &skipped);
        }
        return Ok(Executed {
            answer: value(&AdoptKeysResponse {
                context: context.to_string(),
                slot: slot.to_string(),
                binding: views::binding(binding),
                dry_run: request.dry_run,
                versions: seen,
                skipped,
                active_version: published
                    .state
                    .contexts()
                    .get(&context)
                    .and_then(|known| known.active_version),
            })?,
            index: state.applied(),
        });
    }
    let found = look(token, keys, |token, key| {
        token.v1_check_record(&key.kek, key.id.as_deref())
    });
    let found = found.await?;
    let body = AdminBody::AdoptKeys(AdoptOrder {
        binding,
        context: context.clone(),
        slot,
        floor,
        keys: found,
    });
    let call = state.call(&caller, body, &request)?;
    let mut executed = state.consensus.admin_call(call).await?;
    record_skipped(&state, &caller, &context, &skipped);
    with_skipped(&mut executed.answer, &skipped)?;
    Ok(executed)
}

/// The keys that the token has.
fn without(keys: &[AdoptKey], skipped: &[SkippedKey]) -> Vec<AdoptKey> {
    let is_there = |key: &&AdoptKey| !skipped.iter().any(|skipped| skipped.key_id == key.label);
    keys.iter().filter(is_there).cloned().collect()
}

/// Whether something is left that keeps the numbers of what is left out.
fn check_left(
    state: &ClusterState,
    slot: &SlotName,
    context: &ContextName,
    there: &[AdoptKey],
    skipped: &[SkippedKey],
) -> Result<(), CallError> {
    if there.is_empty() && !state.contexts().contains(context) {
        return Err(nothing_there(slot, context, skipped));
    }
    Ok(())
}

/// A number that version 1 gave is given to no other key, whether its key is there or not: with the first new key the
/// state keeps it.
fn reserved(floor: u32, skipped: &[SkippedKey]) -> u32 {
    let numbers = skipped.iter().filter_map(|key| key.version);
    numbers.fold(floor, u32::max)
}

/// One line of the audit for each: many labels do not fit into one.
fn record_skipped(state: &AdminState, caller: &Caller, context: &ContextName, skipped: &[SkippedKey]) {
    for key in skipped {
        state.record(caller, Act::KeyAdopt, &skip(context, key), None);
    }
}

fn skip(context: &ContextName, key: &SkippedKey) -> String {
    let number = key
        .version
        .map(|version| format!("/v{version}"))
        .unwrap_or_default();
    format!("{context}{number} skipped, not in the token: {}", key.key_id)
}

/// The leader does not know of keys that were left out here.
fn with_skipped(answer: &mut Value, skipped: &[SkippedKey]) -> Result<(), CallError> {
    if let Some(members) = answer.as_object_mut().filter(|_| !skipped.is_empty()) {
        members.insert("skipped".to_owned(), value(&skipped)?);
    }
    Ok(())
}

/// The slot whose token is meant.
fn slot_of(
    state: &AdminState,
    known: &ClusterState,
    context: &ContextName,
    named: Option<&str>,
) -> Result<SlotName, CallError> {
    let named = named
        .map(|name| {
            SlotName::new(name).map_err(|error| CallError::new(ErrorCode::InvalidArgument, error.to_string()))
        })
        .transpose()?;
    let own = known.contexts().get(context).map(|context| context.slot.clone());
    match (own, named) {
        // A context that has moved has keys of version 1 in its old slot still.
        (_, Some(named)) => Ok(named),
        (Some(own), None) => Ok(own),
        (None, None) => state.placements.slot(context).ok_or_else(|| {
            let detail = format!(
                "slot: context {context} does not exist, and no slot in this node's configuration lists it \
                 (hsm.slots.<name>.contexts); name the slot whose token holds its keys"
            );
            CallError::new(ErrorCode::InvalidArgument, detail)
        }),
    }
}

fn open_token(state: &AdminState, name: &SlotName) -> Result<Slot, CallError> {
    let Some(entry) = state.slots.get(name.as_str()) else {
        let names: Vec<String> = state.slots.names().iter().map(ToString::to_string).collect();
        let detail = format!(
            "slot {name}: this node has no such slot; it has {}",
            names.join(", ")
        );
        return Err(CallError::new(ErrorCode::NotFound, detail));
    };
    match (entry.handle(), entry.state()) {
        (Some(token), SlotState::Ready) => Ok(token),
        (_, state) => {
            let code = match state {
                SlotState::Locked => ErrorCode::SlotLocked,
                _ => ErrorCode::SlotFailed,
            };
            Err(CallError::new(
                code,
                format!("slot {name} is {state} on this node"),
            ))
        }
    }
}

/// A key with its number, and whether it has to be found in the token.
struct Numbered {
    kek: AdoptKek,
    key_uid: KeyUid,
    id: Option<Vec<u8>>,
    created_at: Option<UnixMillis>,
    is_new: bool,
}

impl Numbered {
    /// What would become of it.
    fn foreseen(&self) -> AdoptedVersion {
        AdoptedVersion {
            version: self.kek.version,
            key_id: self.kek.label.clone(),
            new: self.is_new,
            proven: false,
        }
    }
}

/// The number that a key is to have: the one that was asked for, or the one in its label.
fn said(context: &ContextName, key: &AdoptKey) -> Option<u32> {
    let by_label = version_of_label(context.as_str(), &key.label);
    key.version.or(by_label.filter(|number| *number <= MAX_ADOPTED))
}

/// Gives each key its number: the one that was asked for, the one in its label, or the next one, above `floor`: those up
/// to there are in labels of version 1's.
fn numbered(
    state: &ClusterState,
    context: &ContextName,
    keys: &[AdoptKey],
    floor: u32,
) -> Result<Vec<Numbered>, CallError> {
    let highest = state
        .contexts()
        .get(context)
        .map_or(0, |known| known.highest_version);
    let mut next = keys
        .iter()
        .filter_map(|key| said(context, key))
        .max()
        .unwrap_or(0)
        .max(highest)
        .max(floor);
    let mut taken = BTreeSet::new();
    let mut numbered = Vec::with_capacity(keys.len());
    for key in keys {
        let known = adopted(state, context, &key.label);
        if let Some((number, version)) = known {
            check_alive(context, number, version)?;
        }
        let version = match (known, said(context, key)) {
            (Some((number, _)), _) | (None, Some(number)) => number,
            (None, None) => {
                next = next.saturating_add(1);
                next
            }
        };
        if known.is_none() {
            check_free(state, context, version, &key.label)?;
        }
        if !taken.insert(version) {
            let detail = format!(
                "keys: {:?}: version {version} is another key's; give each a number",
                key.label
            );
            return Err(CallError::new(ErrorCode::InvalidArgument, detail));
        }
        let key_uid = KeyUid(clock::random_id());
        numbered.push(Numbered {
            kek: AdoptKek {
                key_uid: to_token_key(key_uid),
                version,
                context: context.to_string(),
                label: key.label.clone(),
            },
            key_uid,
            id: id_of(key)?,
            created_at: key.created_at.as_deref().and_then(clock::past),
            is_new: known.is_none(),
        });
    }
    Ok(numbered)
}

fn value(answer: &impl Serialize) -> Result<Value, CallError> {
    serde_json::to_value(answer).map_err(|error| CallError::new(ErrorCode::Internal, error.to_string()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "adopt_tests.rs"]
mod tests;
