//! What a removed node knew is replaced: transport keys, the versions that it holds, and the replication key where the nodes
//! that stay have another one.

use std::time::{Duration, Instant};

use hsm_api::admin::{
    ContextInfo, RekeyReplicationResponse, RekeyTransportRequest, RemoveNodeResponse, ReplicationRekey,
};
use hsm_api::client::Answer;
use hsm_api::{Client, ClientError, ErrorCode, StateIndex};
use serde::Serialize;

use crate::commands::cluster_rekey;
use crate::output::note;
use crate::progress::Progress;

/// For versions that are on their way, and between two looks.
const VERSIONS_COME: Duration = Duration::from_secs(15);
const AGAIN: Duration = Duration::from_millis(500);

/// A new version in the place of one that the node has.
#[derive(Debug, Serialize)]
pub(super) struct Rotated {
    pub(super) context: String,
    pub(super) version: u32,
    pub(super) key_id: String,
}

/// What could not be done.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) what: String,
    pub(super) error: String,
}

/// What was put in the place of what the node knew.
#[derive(Debug, Default)]
pub(super) struct Renewal {
    /// Slots that get another transport key.
    pub(super) rekeyed: Vec<String>,
    pub(super) rotated: Vec<Rotated>,
    /// Contexts whose active version the node has still.
    pub(super) to_rotate: Vec<String>,
    /// The cluster's replication key, if it was replaced.
    pub(super) replication_key: Option<String>,
    /// The node knows the one in use.
    pub(super) knows_replication_key: bool,
    pub(super) failed: Vec<Failure>,
}

impl Renewal {
    pub(super) fn nothing_of(left: &RemoveNodeResponse) -> Self {
        Self {
            to_rotate: left.held.clone(),
            knows_replication_key: true,
            ..Self::default()
        }
    }

    pub(super) fn fail(&mut self, what: String, error: &dyn std::fmt::Display) {
        let error = error.to_string();
        self.failed.push(Failure { what, error });
    }
}

/// Another transport key for every slot of which the node may have the present one, and by that another version of every
/// context there, which is wrapped under a key that the node never had. Where that is refused, contexts are rotated under
/// the old one: better than nothing. Each step is done whatever becomes of another, and all of them under the key of the
/// removal: it belongs to another operation each time.
pub(super) async fn renew(
    client: &Client,
    left: &RemoveNodeResponse,
    index: Option<StateIndex>,
    key: &str,
) -> Renewal {
    let mut renewal = Renewal {
        knows_replication_key: true,
        ..Renewal::default()
    };
    let after = |index: Option<StateIndex>| {
        index.map_or_else(|| client.clone(), |index| client.with_min_index(index))
    };
    let slots = match after(index).rekey_status().await {
        Ok(answer) => answer.into_body().slots,
        Err(error) => {
            let what = "whose transport key it has is not known, and none was replaced";
            renewal.fail(what.to_owned(), &error);
            Vec::new()
        }
    };
    let mut newest = index;
    for slot in slots
        .iter()
        .filter(|slot| slot.known_to_removed.contains(&left.node_id))
    {
        let request = RekeyTransportRequest {
            slot: slot.slot.clone(),
            restart: false,
        };
        match client.rekey_transport(&request, Some(key)).await {
            Ok(answer) => {
                newest = answer.meta.index.or(newest);
                renewal.rekeyed.push(slot.slot.clone());
            }
            Err(error) => {
                let what = format!("the transport key of slot {} was not replaced", slot.slot);
                renewal.fail(what, &error);
            }
        }
    }
    if !renewal.rekeyed.is_empty() {
        match cluster_rekey::watch(&after(newest), &renewal.rekeyed).await {
            // Whoever is asked next has to know what this one knows.
            Ok(answer) => newest = answer.meta.index.or(newest),
            Err(error) => note(&format!("how far the nodes are is not known: {error:#}")),
        }
    }
    rotate_rest(&after(newest), left, key, &mut renewal).await;
    replace_replication_key(&after(newest), left, key, &mut renewal).await;
    renewal
}

/// What the node holds still: in slots with another transport key the nodes rotate it by themselves.
async fn rotate_rest(client: &Client, left: &RemoveNodeResponse, key: &str, renewal: &mut Renewal) {
    let held = match client.members().await {
        Ok(answer) => {
            let mut removed = answer.into_body().removed.into_iter();
            let of_it = removed.find(|one| one.raft_id == left.raft_id);
            of_it.map(|one| one.held).unwrap_or_default()
        }
        Err(error) => {
            renewal.fail("what it still holds is not known".to_owned(), &error);
            left.held.clone()
        }
    };
    let contexts = match client.list_keks().await {
        Ok(answer) => answer.into_body().contexts,
        Err(error) => {
            renewal.fail("what was rotated is not known".to_owned(), &error);
            Vec::new()
        }
    };
    let (waits, rest) = by_whom(&held, &contexts, &renewal.rekeyed);
    renewal.rotated = contexts
        .iter()
        .filter(|known| left.held.contains(&known.context) && !held.contains(&known.context))
        .filter_map(active)
        .collect();
    renewal.to_rotate = waits;
    let progress = Progress::of_steps("rotating what the node held", rest.len());
    for context in rest {
        match client.rotate(&context, Some(key)).await {
            Ok(answer) => renewal.rotated.push(Rotated {
                context,
                version: answer.version,
                key_id: answer.key_id.clone(),
            }),
            Err(error) => {
                renewal.fail(format!("{context} was not rotated"), &error);
                renewal.to_rotate.push(context);
            }
        }
        progress.step();
    }
}

/// No node can make another one: it is done if each that stays has one beside the present one that no removed node has said
/// it has.
async fn replace_replication_key(
    client: &Client,
    left: &RemoveNodeResponse,
    key: &str,
    renewal: &mut Renewal,
) {
    let status = match client.rekey_status().await {
        Ok(answer) => answer.into_body().replication,
        Err(error) => {
            let what = "whether it has the replication key is not known, and that was not replaced";
            return renewal.fail(what.to_owned(), &error);
        }
    };
    let knows = |status: &ReplicationRekey| status.known_to_removed.contains(&left.node_id);
    renewal.knows_replication_key = knows(&status);
    if !renewal.knows_replication_key || status.next_key.is_none() {
        return;
    }
    let answer = match rekeyed(client, key).await {
        Ok(answer) => answer,
        Err(error) => return renewal.fail("the replication key was not replaced".to_owned(), &error),
    };
    renewal.replication_key = Some(answer.body.key.clone());
    let index = answer.meta.index;
    let asked = index.map_or_else(|| client.clone(), |index| client.with_min_index(index));
    let far = match cluster_rekey::watch_reseal(&asked).await {
        Ok(status) => {
            renewal.knows_replication_key = knows(&status);
            if status.former.is_none() {
                return;
            }
            status.next
        }
        Err(error) => format!("{error:#}"),
    };
    note(&format!(
        "how far the replication key is replaced: hsmctl cluster rekey status ({far})"
    ));
}

/// Tried again where it is refused because a version is on its way, as after a transport key was replaced.
async fn rekeyed(client: &Client, key: &str) -> Result<Answer<RekeyReplicationResponse>, ClientError> {
    let until = Instant::now() + VERSIONS_COME;
    loop {
        match client.rekey_replication(Some(key)).await {
            Err(error) if error.code() == Some(ErrorCode::Conflict) && Instant::now() < until => {
                tokio::time::sleep(AGAIN).await;
            }
            answer => return answer,
        }
    }
}

/// Of the contexts that the node holds still, those that the nodes rotate, and those that have to be rotated here.
fn by_whom(held: &[String], contexts: &[ContextInfo], rekeyed: &[String]) -> (Vec<String>, Vec<String>) {
    let by_nodes = |context: &String| {
        let mut known = contexts.iter().filter(|known| known.context == *context);
        known.any(|known| rekeyed.contains(&known.slot))
    };
    held.iter().cloned().partition(by_nodes)
}

/// The version that encrypts.
fn active(context: &ContextInfo) -> Option<Rotated> {
    let mut versions = context.versions.iter();
    let active = versions.find(|version| Some(version.version) == context.active_version)?;
    Some(Rotated {
        context: context.context.clone(),
        version: active.version,
        key_id: active.key_id.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_of_slots_that_get_no_other_transport_key_are_rotated_here() {
        let context = |name: &str, slot: &str, active: u32| -> ContextInfo {
            serde_json::from_value(serde_json::json!({
                "context": name, "slot": slot, "binding": "shared", "active_version": active,
                "versions": [
                    {"version": active, "key_id": format!("kek-{name}-v{active}"), "key_uid": "00",
                     "slot": slot, "state": "active", "created_at": "2030-01-01T00:00:00Z", "acks": [],
                     "origin": "generated"}
                ]
            }))
            .unwrap()
        };
        let contexts = [context("a", "s", 2), context("b", "t", 1)];
        let held = ["a".to_owned(), "b".to_owned(), "gone".to_owned()];
        let (by_nodes, here) = by_whom(&held, &contexts, &["s".to_owned()]);
        assert_eq!(by_nodes, ["a"]);
        assert_eq!(here, ["b", "gone"]);
        let rotated = active(&contexts[0]).unwrap();
        assert_eq!((rotated.version, rotated.key_id.as_str()), (2, "kek-a-v2"));
    }
}
