//! What the token has of the keys that are to be adopted. Everything here blocks on it, so it is done on threads of its
//! own; nothing is changed in it.

use std::collections::BTreeSet;

use hsm_api::ErrorCode;
use hsm_api::admin::{AdoptKey, SkippedKey};
use hsm_core::{HsmError, Slot};
use raft_store::names::{ContextName, SlotName};
use raft_store::state::ClusterState;

use super::{NAMED, Numbered, id_of, said};
use crate::admin::adopt::{FoundKey, adopted};
use crate::admin::call::CallError;

async fn on_token<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CallError> + Send + 'static,
) -> Result<T, CallError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(CallError::new(ErrorCode::Internal, error.to_string())))
}

/// Every label in the token that is not a key of ours.
pub(super) async fn labels(token: Slot) -> Result<BTreeSet<String>, CallError> {
    let objects = move || {
        token
            .objects()
            .map_err(|error| CallError::new(ErrorCode::SlotFailed, format!("the token: {error}")))
    };
    Ok(on_token(objects).await?.labelled)
}

/// The keys, of those that were asked for and not adopted before, that the token has not: no key of any kind has the
/// label. One of the label that cannot be adopted is another matter, and never left out in silence.
pub(super) async fn missing(
    token: Slot,
    state: &ClusterState,
    context: &ContextName,
    keys: &[AdoptKey],
    labelled: &BTreeSet<String>,
) -> Result<Vec<SkippedKey>, CallError> {
    let unseen = keys
        .iter()
        .filter(|key| !labelled.contains(&key.label) && adopted(state, context, &key.label).is_none());
    let mut asked = Vec::new();
    for key in unseen {
        let skipped = SkippedKey {
            key_id: key.label.clone(),
            version: said(context, key),
        };
        asked.push((skipped, id_of(key)?));
    }
    on_token(move || {
        let mut missing = Vec::new();
        for (key, id) in asked {
            match token.examine_v1_key(&key.key_id, id.as_deref()) {
                Ok(()) => {}
                Err(HsmError::NotFound { .. }) => missing.push(key),
                Err(error) => return Err(refusal(&key.key_id, &error)),
            }
        }
        Ok(missing)
    })
    .await
}

/// The first labels of keys that are missing, with their numbers.
fn named(missing: &[SkippedKey]) -> String {
    let name = |key: &SkippedKey| match key.version {
        Some(version) => format!("{:?} (version {version})", key.key_id),
        None => format!("{:?}", key.key_id),
    };
    let mut shown = missing
        .iter()
        .take(NAMED)
        .map(name)
        .collect::<Vec<_>>()
        .join(", ");
    if missing.len() > NAMED {
        shown.push_str(&format!(" and {} more", missing.len() - NAMED));
    }
    shown
}

/// The refusal while a key is missing that nobody has said may be left out.
pub(super) fn not_there(slot: &SlotName, context: &ContextName, missing: &[SkippedKey]) -> CallError {
    let shown = named(missing);
    CallError::new(
        ErrorCode::NotFound,
        format!(
            "keys of {context} that are not in the token of slot {slot} on this node: {shown}; nothing was adopted of this \
             context. Put the token in place that has them. What was encrypted under a key that nobody has can be decrypted \
             by nobody: to leave it out, adopt the rest with --skip-missing (skip_missing); with --dry-run it says what it \
             would leave out"
        ),
    )
}

/// The refusal where no key is left, and there is no context either that would keep the numbers of those left out.
pub(super) fn nothing_there(slot: &SlotName, context: &ContextName, missing: &[SkippedKey]) -> CallError {
    let shown = named(missing);
    CallError::new(
        ErrorCode::Conflict,
        format!(
            "none of the keys of {context} is in the token of slot {slot} on this node: {shown}; there is nothing to adopt, \
             and context {context} does not exist, so that nothing would keep the numbers of those left out. Put the token \
             in place that has them, or name the right slot; if nobody has them, leave {context} out (--context adopts \
             another one of the file)"
        ),
    )
}

/// Finds each new key in the token.
pub(super) async fn look(
    token: Slot,
    keys: Vec<Numbered>,
    find: impl Fn(&Slot, &Numbered) -> Result<Vec<u8>, HsmError> + Send + 'static,
) -> Result<Vec<FoundKey>, CallError> {
    on_token(move || {
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
                created_at: key.created_at,
            })
        };
        keys.into_iter()
            .map(one)
            .collect::<Result<Vec<FoundKey>, CallError>>()
    })
    .await
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

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::rotation::testing::{context, slot};

    #[test]
    fn what_is_missing_is_named_with_the_way_out() {
        let missing = |count: u32| -> Vec<SkippedKey> {
            let key = |number: u32| SkippedKey {
                key_id: format!("old-{number}"),
                version: (number != 2).then_some(number),
            };
            (1..=count).map(key).collect()
        };
        let error = not_there(&slot("s"), &context("c"), &missing(2));
        assert_eq!(error.code, ErrorCode::NotFound);
        for part in [
            "of c ",
            "slot s ",
            "\"old-1\" (version 1), \"old-2\";",
            "--skip-missing",
        ] {
            assert!(error.detail.contains(part), "{error}");
        }
        let error = not_there(&slot("s"), &context("c"), &missing(23));
        assert!(error.detail.contains(" and 3 more;"), "{error}");
        assert!(!error.detail.contains("old-21"), "{error}");

        let error = nothing_there(&slot("s"), &context("c"), &missing(2));
        assert_eq!(error.code, ErrorCode::Conflict);
        for part in [
            "none of the keys of c ",
            "slot s ",
            "\"old-2\";",
            "leave c out (--context",
        ] {
            assert!(error.detail.contains(part), "{error}");
        }
    }
}
