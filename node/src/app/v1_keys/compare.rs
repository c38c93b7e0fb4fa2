//! Version 1's list and its token, one against the other: what is to be adopted, and what keeps a start from it.

use std::collections::BTreeSet;
use std::path::Path;

use hsm_api::v1::version_of_label;
use hsm_core::{HsmError, Slot};
use raft_store::command::MAX_ADOPTED;
use raft_store::state::ClusterState;
use raft_store::state::context::VersionState;

use super::list::{Wanted, WantedKey};
use super::{DEFAULT_LIST, known};
use crate::app::StartFailure;

/// Keys named one by one in a message.
const NAMED: usize = 20;
/// How to begin without the keys.
const WITHOUT_LIST: &str = "or write the token under hsm.slots in the place of hsm.slot_id, where no start adopts \
                            anything, and adopt its keys with hsmctl key adopt before their contexts' first versions";

/// Without the file nobody knows what was version 1's, unless its keys are there to see.
pub(super) fn absent(path: &Path, left: &[String]) -> Result<(), StartFailure> {
    let shown = path.display();
    if left.is_empty() {
        tracing::warn!(
            "configuration: hsm.metadata_file: {shown} is not there; no key of version 1 is adopted"
        );
        return Ok(());
    }
    Err(StartFailure::V1Keys(format!(
        "{shown} is not there, and the token holds keys that version 1 made ({}), which nothing could be decrypted \
         with: bring the file back; {WITHOUT_LIST}",
        some_of(left)
    )))
}

/// As [`absent`], where no list is named and there is none where version 1 would look for it.
pub(super) fn unlisted(left: &[String], founded: bool) -> Result<(), StartFailure> {
    if left.is_empty() {
        return Ok(());
    }
    let keys = some_of(left);
    if founded {
        tracing::warn!(
            keys,
            "the token holds keys that version 1 made and that nobody has adopted; they are of no use until then: \
             hsmctl key adopt --context CONTEXT --label LABEL"
        );
        return Ok(());
    }
    Err(StartFailure::V1Keys(format!(
        "is not written, there is no {DEFAULT_LIST} in the working directory, where version 1 looks for it then, and the \
         token holds keys that version 1 made ({keys}), which nothing could be decrypted with: write \
         hsm.metadata_file: PATH; {WITHOUT_LIST}"
    )))
}

/// Labels of AES keys in the token that are not ours.
pub(super) fn labels(token: &Slot) -> Result<BTreeSet<String>, StartFailure> {
    let objects = token
        .objects()
        .map_err(|error| StartFailure::Adopting(format!("the token cannot be looked into: {error}")))?;
    Ok(objects.labelled)
}

/// Labels in the token that look like version 1's and that no version has.
pub(super) fn unadopted(labelled: &BTreeSet<String>, state: &ClusterState) -> Vec<String> {
    let left = labelled
        .iter()
        .filter(|label| is_v1s(label) && !state.label_taken(label) && !was_released(state, label));
    left.cloned().collect()
}

/// Whether a version of this label was given back to version 1.
fn was_released(state: &ClusterState, label: &str) -> bool {
    let mut versions = state.versions().values();
    versions.any(|version| {
        version.label == label && version.state == VersionState::Abandoned && version.origin.is_adopted()
    })
}

/// `kek-<context>-v<N>`.
fn is_v1s(label: &str) -> bool {
    label
        .strip_prefix("kek-")
        .and_then(|rest| rest.rsplit_once("-v"))
        .is_some_and(|(context, digits)| {
            !context.is_empty() && !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
        })
}

fn some_of(labels: &[String]) -> String {
    let mut shown = labels.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    if labels.len() > NAMED {
        shown.push_str(&format!(" and {} more", labels.len() - NAMED));
    }
    shown
}

/// Finds every key that is still to be adopted.
pub(super) fn check(
    path: &Path,
    token_label: &str,
    token: &Slot,
    state: &ClusterState,
    contexts: Vec<Wanted>,
) -> Result<Vec<Wanted>, StartFailure> {
    let labelled = labels(token)?;
    let examine = |key: &WantedKey| token.examine_v1_key(&key.label, key.id.as_deref());
    let (contexts, wrong) = compare(state, &labelled, contexts, examine);
    if wrong.is_empty() {
        return Ok(contexts);
    }
    let (shown, count) = (path.display(), wrong.len());
    let list = wrong.into_iter().take(NAMED).collect::<Vec<_>>().join("; ");
    Err(StartFailure::V1Keys(format!(
        "{shown} and the token {token_label:?} do not agree in {count} keys, and what was encrypted under them could not be \
         decrypted: {list}. Nothing was changed. Put the token in place that version 1 used (hsm.slot_id, SOFTHSM2_CONF), \
         and its last list; or take those versions out of the list, and those keys out of the token, whose data nobody needs \
         any more"
    )))
}

/// Labels that a version which was made here and another key in the token both have.
fn twice(state: &ClusterState, labelled: &BTreeSet<String>) -> Vec<String> {
    let own = state
        .versions()
        .iter()
        .filter(|(_, version)| !version.origin.is_adopted() && !version.state.is_over());
    own.filter(|(_, version)| labelled.contains(&version.label))
        .map(|(key, version)| {
            format!(
                "{}: version {} of {} was made here under this label, and the token has another key of it, perhaps of a \
                 return to version 1; which ciphertexts are whose, only you can know: give version 1's another label with \
                 the vendor's tool, in a copy of the token's folder first, or take it out if it encrypted nothing",
                version.label, key.version, key.context
            )
        })
        .collect()
}

/// After the keys were adopted, and the list has changed since: version 1 may have been gone back to, and have given a
/// label that was given here.
pub(super) fn check_again(
    path: &Path,
    labelled: &BTreeSet<String>,
    state: &ClusterState,
) -> Result<(), StartFailure> {
    let wrong = twice(state, labelled);
    if wrong.is_empty() {
        return Ok(());
    }
    let list = wrong.into_iter().take(NAMED).collect::<Vec<_>>().join("; ");
    let path = path.display();
    Err(StartFailure::V1Keys(format!(
        "{path} has changed since its keys were adopted: {list}"
    )))
}

/// What is to be adopted, without what version 1 did not have any more either; and everything that keeps the node from
/// it.
fn compare(
    state: &ClusterState,
    labelled: &BTreeSet<String>,
    mut contexts: Vec<Wanted>,
    examine: impl Fn(&WantedKey) -> Result<(), HsmError>,
) -> (Vec<Wanted>, Vec<String>) {
    let mut wrong = twice(state, labelled);
    let listed: BTreeSet<&String> = contexts
        .iter()
        .flat_map(|context| &context.versions)
        .map(|key| &key.label)
        .collect();
    let unlisted = unadopted(labelled, state).into_iter();
    wrong.extend(unlisted.filter(|label| !listed.contains(label)).map(|label| {
        format!("{label}: it is in the token and not in the list; add it there with its number")
    }));
    for context in &mut contexts {
        let name = context.name.clone();
        let in_token = labelled
            .iter()
            .filter_map(|label| version_of_label(name.as_str(), label))
            .filter(|number| *number <= MAX_ADOPTED);
        context.floor = in_token.max().unwrap_or(0).max(context.floor);
        context.versions.retain(|key| {
            let WantedKey { number, label, .. } = key;
            if let Some(version) = known(state, &name, label) {
                if !version.origin.is_adopted() {
                    tracing::warn!(context = %name, label, "hsm.metadata_file: the key was made here, not by version 1");
                }
                return true;
            }
            if was_released(state, label) {
                // Somebody has decided so, and may decide otherwise once the node runs.
                tracing::warn!(
                    target: "audit", epoch = crate::logging::epoch(), context = %name, version = *number,
                    label = label.as_str(),
                    "a key that version 1 lists was released here, and is not adopted again: hsmctl key adopt does that"
                );
                return false;
            }
            let taken = state.version(&name, *number).map(|version| version.label.clone());
            let problem = match taken {
                Some(other) => Some(format!("version {number} of {name} is {other} already")),
                None if state.label_taken(label) => Some("its label is another version's already".to_owned()),
                None => match examine(key) {
                    Ok(()) => None,
                    // Version 1 starts so: its operators are told to delete what is old, and its list keeps naming it.
                    Err(HsmError::NotFound { .. }) if !key.is_current && !labelled.contains(label) => {
                        tracing::warn!(
                            target: "audit", epoch = crate::logging::epoch(), context = %name, version = *number,
                            label = label.as_str(),
                            "a key that version 1 lists is not in the token: what was encrypted under it cannot be \
                             decrypted, by version 1 neither; its number is not used again"
                        );
                        return false;
                    }
                    Err(error) => Some(error.to_string()),
                },
            };
            wrong.extend(problem.map(|why| format!("{label} (version {number} of {name}): {why}")));
            true
        });
    }
    (contexts, wrong)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "compare_tests.rs"]
mod tests;
