//! Adoption, where it has to be asked for: on the node whose token holds the keys. It looks into the token, makes the
//! check records, and hands the rest to the leader.

use std::collections::BTreeSet;

use axum::extract::State;
use axum::response::Response;
use hsm_api::ErrorCode;
use hsm_api::admin::{ADOPT_MAX_KEYS, AdoptKey, AdoptKeysRequest, AdoptKeysResponse, AdoptedVersion};
use hsm_api::v1::version_of_label;
use hsm_core::{AdoptKek, HsmError, Slot, SlotState};
use raft_store::command::MAX_ADOPTED;
use raft_store::names::{ContextName, KeyUid, SlotName};
use raft_store::state::ClusterState;
use serde_json::Value;

use super::caller::Caller;
use super::unread::Unread;
use super::{AdminState, context_name, founded};
use crate::admin::adopt::{AdoptOrder, FoundKey, adopted, check_alive, check_free, other_slot};
use crate::admin::authorise::{Act, authorise};
use crate::admin::call::{AdminBody, CallError, Executed};
use crate::clock;
use crate::http::ApiError;
use crate::sync::convert::to_token_key;

/// Longest label: what a token keeps.
const MAX_LABEL: usize = 255;

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
    for AdoptKey { label, version } in &request.keys {
        if label.is_empty() || label.len() > MAX_LABEL || label.chars().any(char::is_control) {
            return refuse(format!(
                "keys: label {label:?}: a label has 1 to {MAX_LABEL} bytes and no control characters"
            ));
        }
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
    let keys = numbered(&published.state, &context, &request.keys)?;
    if request.dry_run {
        let found = look(token, keys, |token, key| {
            token.examine_v1_key(&key.kek.label).map(|()| Vec::new())
        });
        found.await?;
        return Ok(Executed {
            answer: value(&foreseen(&published.state, &context, &slot, &request.keys)?)?,
            index: state.applied(),
        });
    }
    let found = look(token, keys, |token, key| token.v1_check_record(&key.kek)).await?;
    let body = AdminBody::AdoptKeys(AdoptOrder {
        binding: state.placements.binding(&context),
        context,
        slot,
        keys: found,
    });
    let call = state.call(&caller, body, &request)?;
    state.consensus.admin_call(call).await
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
        (Some(own), Some(named)) if own != named => Err(other_slot(context, &own, &named)),
        (Some(own), _) => Ok(own),
        (None, Some(named)) => Ok(named),
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
    is_new: bool,
}

/// Gives each key its number: the one that was asked for, the one in its label, or the next one.
fn numbered(
    state: &ClusterState,
    context: &ContextName,
    keys: &[AdoptKey],
) -> Result<Vec<Numbered>, CallError> {
    let highest = state
        .contexts()
        .get(context)
        .map_or(0, |known| known.highest_version);
    let said = |key: &AdoptKey| {
        let by_label = version_of_label(context.as_str(), &key.label);
        key.version.or(by_label.filter(|number| *number <= MAX_ADOPTED))
    };
    let mut next = keys.iter().filter_map(said).max().unwrap_or(0).max(highest);
    let mut taken = BTreeSet::new();
    let mut numbered = Vec::with_capacity(keys.len());
    for key in keys {
        let known = adopted(state, context, &key.label);
        if let Some((number, version)) = known {
            check_alive(context, number, version)?;
        }
        let version = match (known, said(key)) {
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
            is_new: known.is_none(),
        });
    }
    Ok(numbered)
}

/// Finds each new key in the token. Blocks on it, so on a thread of its own.
async fn look(
    token: Slot,
    keys: Vec<Numbered>,
    find: impl Fn(&Slot, &Numbered) -> Result<Vec<u8>, HsmError> + Send + 'static,
) -> Result<Vec<FoundKey>, CallError> {
    let found = tokio::task::spawn_blocking(move || {
        let one = |key: Numbered| -> Result<FoundKey, CallError> {
            let check_record = if key.is_new {
                find(&token, &key).map_err(|error| refusal(&key.kek.label, &error))?
            } else {
                Vec::new()
            };
            Ok(FoundKey {
                label: key.kek.label,
                version: key.kek.version,
                key_uid: key.key_uid,
                check_record,
            })
        };
        keys.into_iter()
            .map(one)
            .collect::<Result<Vec<FoundKey>, CallError>>()
    });
    found
        .await
        .unwrap_or_else(|error| Err(CallError::new(ErrorCode::Internal, error.to_string())))
}

/// What the token's refusal means to an administrator.
fn refusal(label: &str, error: &HsmError) -> CallError {
    let code = match error {
        HsmError::NotFound { .. } => ErrorCode::NotFound,
        HsmError::Argument { .. } => ErrorCode::InvalidArgument,
        HsmError::NotSupported { .. } => ErrorCode::Conflict,
        HsmError::Busy { .. } => ErrorCode::TokenTimeout,
        _ => ErrorCode::SlotFailed,
    };
    CallError::new(code, format!("key {label:?}: {error}"))
}

/// What would be done, the keys having been looked at.
fn foreseen(
    state: &ClusterState,
    context: &ContextName,
    slot: &SlotName,
    keys: &[AdoptKey],
) -> Result<AdoptKeysResponse, CallError> {
    let one = |key: Numbered| AdoptedVersion {
        version: key.kek.version,
        new: key.is_new,
        proven: false,
        key_id: key.kek.label,
    };
    Ok(AdoptKeysResponse {
        context: context.to_string(),
        slot: slot.to_string(),
        dry_run: true,
        versions: numbered(state, context, keys)?.into_iter().map(one).collect(),
        active_version: state
            .contexts()
            .get(context)
            .and_then(|known| known.active_version),
    })
}

fn value(answer: &AdoptKeysResponse) -> Result<Value, CallError> {
    serde_json::to_value(answer).map_err(|error| CallError::new(ErrorCode::Internal, error.to_string()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::rotation::testing::{World, context};

    fn key(label: &str, version: Option<u32>) -> AdoptKey {
        AdoptKey {
            label: label.to_owned(),
            version,
        }
    }

    fn request(keys: Vec<AdoptKey>) -> AdoptKeysRequest {
        AdoptKeysRequest {
            context: "c".to_owned(),
            keys,
            slot: None,
            dry_run: false,
        }
    }

    #[test]
    fn a_request_names_each_label_and_number_once() {
        check(&request(vec![key("a", None), key("b c", Some(7))])).unwrap();
        for keys in [
            vec![],
            vec![key("x", None); 65],
            vec![key("a", None), key("a", Some(2))],
            vec![key("a", Some(2)), key("b", Some(2))],
            vec![key("", None)],
            vec![key("a\n", None)],
            vec![key(&"x".repeat(256), None)],
            vec![key("a", Some(0))],
            vec![key("a", Some(MAX_ADOPTED + 1))],
        ] {
            let error = check(&request(keys.clone())).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidArgument, "{keys:?}");
        }
    }

    #[test]
    fn a_key_gets_the_number_that_is_asked_for_or_its_labels_or_the_next() {
        let mut world = World::new(1);
        world.prepare("c");
        world.activate("c", 1);
        let numbers = |keys: &[AdoptKey]| {
            let numbered = numbered(&world.state, &context("c"), keys);
            numbered.map(|keys| keys.iter().map(|key| key.kek.version).collect::<Vec<_>>())
        };
        let keys = [
            key("plain", None),
            key("kek-c-v5", None),
            key("kek-c-v9", Some(3)),
        ];
        assert_eq!(numbers(&keys).unwrap(), [6, 5, 3]);
        assert_eq!(numbers(&[key("plain", None)]).unwrap(), [2]);
        let error = numbers(&[key("old", Some(1))]).unwrap_err();
        assert_eq!(error.code, ErrorCode::AlreadyExists);
        assert!(error.detail.contains("another number"), "{error}");
        let error = numbers(&[key("a", Some(5)), key("kek-c-v5", None)]).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument);
    }
}
