//! Commands of an operator, or his script, who repeats them blindly: until they succeed, and once more after that.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result};
use cluster_tests::{Node, failpoints, until};
use hsm_api::Client;
use hsm_api::admin::{RekeyPhase, RekeyStatus, SlotRekey, TransportKeyState};
use hsm_api::client::Retry;
use tokio::time::{Instant, sleep};

use super::interruption::Death;
use super::probe::Quorum;
use super::{Done, one_of};
use crate::cluster::{Cluster, Missed};
use crate::history::{Operation, Pending, Recorder};
use crate::workload::{CONTEXTS, NEW, SHORT_LIVED};

/// Two elections, one of which may end in a split vote, on a busy machine.
const OVERTAKEN: Duration = Duration::from_secs(20);
/// Until a command is given up: a rekey is refused while any version is on its way, and four clients rotate.
const BLINDLY: Duration = Duration::from_secs(30);
/// Between two attempts.
const AGAIN: Duration = Duration::from_millis(500);
/// For a question: a leader may be elected meanwhile.
const PATIENCE: Duration = Duration::from_secs(30);
/// Until all members say the same: one of them may have been killed, and have a snapshot to load.
const AGREED: Duration = Duration::from_secs(120);
/// In a history, whoever asks here.
const PROCESS: u32 = 41;

/// Until it succeeds; else what it said last.
pub(super) async fn repeated(command: &[&str], cluster: &Cluster) -> Result<Result<(), String>> {
    let given_up = Instant::now() + BLINDLY;
    loop {
        let said = cluster.playground().hsmctl(command).await?;
        if said.code == Some(0) {
            return Ok(Ok(()));
        }
        if Instant::now() >= given_up {
            return Ok(Err(format!("{:?}: {}", said.code, said.stderr.trim())));
        }
        sleep(AGAIN).await;
    }
}

/// Of a command that has not succeeded in time. It may be refused for so long, and rightly: while versions are on their way, or
/// nobody else has caught up over bad lines. But if that is because nothing can be changed at all, the cluster has failed.
pub(super) async fn never(what: String, said: &str, cluster: &Cluster, recorder: &Recorder) -> Result<Done> {
    let done = Done::not_counted(what, format!("it never succeeded: {said}"));
    let all = Quorum::of(cluster.members(), cluster);
    Ok(all.change(cluster, recorder).await?.or(done))
}

/// Another node is to lead, a certain one or whoever is best. Whoever asks once more for a certain one changes nothing.
pub(super) async fn transfer(
    (named, pick): (bool, u32),
    cluster: &Cluster,
    recorder: &Recorder,
) -> Result<Done> {
    let Some(before) = cluster.leader_soon().await else {
        return Ok(Done::not_counted("nobody", "nobody led"));
    };
    let others: Vec<u32> = cluster
        .members()
        .into_iter()
        .filter(|one| *one != before.node)
        .collect();
    let to = one_of(&others, pick)
        .filter(|_| named)
        .map(|number| cluster.node(number).id());
    let mut command = vec!["cluster", "transfer-leader"];
    command.extend(to.as_deref());
    let what = format!("from {before:?} to {}", to.as_deref().unwrap_or("the best"));
    if let Err(said) = repeated(&command, cluster).await? {
        return never(what, &said, cluster, recorder).await;
    }
    let other = cluster
        .commits_above(before.term, &[before.node], OVERTAKEN)
        .await;
    let Some(other) = other else {
        // Over bad lines it may have had to give leadership back by then.
        let done = Done::not_counted(what, "no other node has committed in a higher term");
        let all = Quorum::of(cluster.members(), cluster);
        return Ok(all.change(cluster, recorder).await?.or(done));
    };
    let again = cluster.playground().hsmctl(&command).await?;
    let what = format!("{what}: {other:?}; asked once more: {:?}", again.code);
    if !named || again.code != Some(0) {
        return Ok(Done::counted(what));
    }
    let last = cluster.leader_soon().await;
    let stayed = last.is_some_and(|last| last.term == other.term);
    Ok(Done::counted_if(
        stayed,
        what,
        "there was another election by the time it was asked for once more",
    ))
}

fn transport<'a>(slot: &'a str, key: &'a str) -> [&'a str; 9] {
    [
        "cluster",
        "rekey",
        "transport",
        "--slot",
        slot,
        "--confirm",
        slot,
        "--idempotency-key",
        key,
    ]
}

fn newest(slot: &SlotRekey) -> u32 {
    let generations = slot.transport_keys.iter().map(|key| key.generation);
    generations.max().unwrap_or_default()
}

/// Of its transport keys, those that some version needs still.
fn live(slot: &SlotRekey) -> usize {
    let keys = slot.transport_keys.iter();
    keys.filter(|key| key.state != TransportKeyState::Destroyed)
        .count()
}

pub(super) fn admin(cluster: &Cluster) -> Result<Client> {
    let endpoints: Vec<String> = cluster.nodes().iter().map(Node::endpoint).collect();
    let pki = cluster.playground().pki();
    let client = pki.client(Some(&pki.identity("admin")?), &endpoints)?;
    Ok(client.with_retry(Retry::Until(PATIENCE)))
}

async fn status_of(number: u32, cluster: &Cluster) -> Option<RekeyStatus> {
    let client = cluster.playground().client_on("admin", number).ok()?;
    Some(client.rekey_status().await.ok()?.into_body())
}

/// What all members say of the rekeys, once they say the same: each tells what it has applied, and one that lags, or has
/// just come back, tells what was. Else [`Missed::InTime`].
pub(super) async fn agreed(cluster: &Cluster) -> Result<RekeyStatus> {
    let mut last = Vec::new();
    let agreed = until("one word of all members on the rekeys", AGREED, async || {
        last.clear();
        for number in cluster.members() {
            last.push((number, status_of(number, cluster).await));
        }
        one_word(&last)
    })
    .await;
    // A member that was just killed may still load what it lacks over bad lines: that is waited for after the step, too.
    agreed.with_context(|| words(&last)).context(Missed::InTime)
}

/// What all of them say, if that is the same.
fn one_word(said: &[(u32, Option<RekeyStatus>)]) -> Option<RekeyStatus> {
    let all: Vec<&RekeyStatus> = said.iter().filter_map(|(_, said)| said.as_ref()).collect();
    let first = *all.first()?;
    let same = all.len() == said.len() && all.iter().all(|other| made(other) == made(first));
    same.then(|| first.clone())
}

/// For people, where it is not.
fn words(said: &[(u32, Option<RekeyStatus>)]) -> String {
    let each = said.iter().map(|(number, said)| match said {
        Some(said) => format!("node {number} says {:?}", made(said)),
        None => format!("node {number} says nothing"),
    });
    each.collect::<Vec<String>>().join("; ")
}

/// What they all say once it is so; none if it is not within a time.
pub(super) async fn agreed_once(
    what: &str,
    within: Duration,
    is_so: impl Fn(&RekeyStatus) -> bool,
    cluster: &Cluster,
) -> Result<Option<RekeyStatus>> {
    let found = until(what, within, async || match agreed(cluster).await {
        Ok(status) if is_so(&status) => Some(Ok(status)),
        Ok(_) => {
            sleep(AGAIN).await;
            None
        }
        Err(error) => Some(Err(error)),
    });
    found.await.ok().transpose()
}

/// Whether no slot has a transport key that is still on its way.
fn are_there(status: &RekeyStatus) -> bool {
    let mut slots = status.slots.iter();
    slots.all(|slot| !matches!(slot.phase, RekeyPhase::Making | RekeyPhase::Granting))
}

/// Whether a slot has got as far as this generation.
fn has(status: &RekeyStatus, slot: &str, generation: u32) -> bool {
    let mut slots = status.slots.iter().filter(|known| known.slot == slot);
    slots.any(|known| newest(known) >= generation)
}

/// Which keys there are.
fn made(status: &RekeyStatus) -> (&str, Option<&str>, Vec<(&str, u32)>) {
    let slots = status.slots.iter().map(|slot| (slot.slot.as_str(), newest(slot)));
    let replication = &status.replication;
    (&replication.key, replication.former.as_deref(), slots.collect())
}

/// What a rekey makes by itself: a version of every context of the slot, at some time from now on, and of those that come
/// into it meanwhile. Nobody is told which, so nobody ends these.
async fn versions_of(slot: &str, client: &Client, recorder: &Recorder) -> Result<Vec<Pending>> {
    let listed = client
        .list_keks()
        .await
        .context("list the contexts")?
        .into_body()
        .contexts;
    let here = listed.into_iter().filter(|context| context.slot == slot);
    let mut contexts: BTreeSet<String> = here.map(|context| context.context).collect();
    if contexts.contains(CONTEXTS[0]) {
        contexts.extend(NEW.map(str::to_owned));
        contexts.insert(SHORT_LIVED.to_owned());
    }
    let rotation = |context| {
        let key = format!("rekey-{}", recorder.number());
        recorder.invoke(PROCESS, Operation::Rotate { context, key })
    };
    Ok(contexts.into_iter().map(rotation).collect())
}

/// The same of every slot, for a change that rekeys each of them once. Twice: where that is refused at first, the contexts rotate
/// under the present key, and again under the next.
pub(super) async fn versions_of_all(cluster: &Cluster, recorder: &Recorder) -> Result<Vec<Pending>> {
    let client = admin(cluster)?;
    let mut all = Vec::new();
    for slot in agreed(cluster).await?.slots {
        for _ in 0..2 {
            all.extend(versions_of(&slot.slot, &client, recorder).await?);
        }
    }
    Ok(all)
}

/// The slot with the fewest transport keys gets another one, and another one after that; both are asked for again under the
/// key that they were asked for first, which makes none. More than these two would be versions that nobody has asked for, to
/// the oracle of the metadata register too.
pub(super) async fn rekey(
    (kill_leader, point): (bool, u32),
    cluster: &Cluster,
    recorder: &Recorder,
) -> Result<Done> {
    let client = admin(cluster)?;
    let Some(settled) = agreed_once("transport keys that are there", AGREED, are_there, cluster).await?
    else {
        let why = "the transport key of a step before is still on its way";
        return Ok(Done::not_counted("no slot", why));
    };
    let Some(before) = settled.slots.into_iter().min_by_key(live) else {
        return Ok(Done::not_counted("no slot", "no slot has a transport key"));
    };
    let slot = before.slot.as_str();
    let own = [
        versions_of(slot, &client, recorder).await?,
        versions_of(slot, &client, recorder).await?,
    ];
    let [once, anew] = [(); 2].map(|()| format!("rekey-{}", recorder.number()));
    let first = transport(slot, &once);
    let second = transport(slot, &anew);
    let line = failpoints::REKEY[point as usize % failpoints::REKEY.len()];
    let death = Death::prepare(kill_leader, line, None, cluster).await?;
    let (began, killed) = tokio::join!(repeated(&first, cluster), death.comes(cluster));
    let killed = killed?;
    let mut said = began?;
    for command in [&first, &second, &second, &first] {
        if said.is_ok() {
            said = repeated(command, cluster).await?;
        }
    }
    // What is still on its way is made or not by the time that anybody looks; those who look know of it.
    drop(own);
    let what = format!(
        "slot {slot} after generation {}, leader killed: {killed:?}",
        newest(&before)
    );
    if let Err(said) = said {
        return never(what, &said, cluster, recorder).await;
    }
    let both = newest(&before) + 2;
    let is_made = |status: &RekeyStatus| has(status, slot, both);
    let after = match agreed_once("the second transport key", AGREED, is_made, cluster).await? {
        Some(after) => after.slots,
        // What there is says why.
        None => agreed(cluster).await?.slots,
    };
    let after = after.iter().find(|known| known.slot == slot).map(newest);
    let made = after.map(|after| after.saturating_sub(newest(&before)));
    let what = format!("{what}: {after:?} now");
    Ok(match made {
        Some(2) => Done::counted(what),
        Some(more) if more > 2 => Done::cluster_failed(
            what,
            "two requests, each repeated, have made more than two transport keys",
        ),
        _ => Done::not_counted(what, "the second transport key is still to be made"),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn slot(name: &str, states: &[&str]) -> SlotRekey {
        let keys: Vec<serde_json::Value> = states
            .iter()
            .enumerate()
            .map(|(place, state)| {
                serde_json::json!({
                    "id": format!("{place:02x}"), "generation": place + 1, "state": state,
                    "created_at": "2030-01-01T00:00:00Z", "versions": 1, "waiting_for": []
                })
            })
            .collect();
        serde_json::from_value(serde_json::json!({
            "slot": name, "phase": "waiting", "contexts_to_rotate": [], "next": "", "transport_keys": keys
        }))
        .unwrap()
    }

    #[test]
    fn members_that_have_not_applied_the_same_keys_do_not_agree() {
        let status = |states: &[&str], key: &str| -> RekeyStatus {
            let mut status: RekeyStatus = serde_json::from_value(serde_json::json!({
                "slots": [], "replication":
                    {"key": key, "former": null, "records_left": 0, "nodes": [], "known_to_removed": [], "next": ""}
            }))
            .unwrap();
            status.slots.push(slot("exchange", states));
            status
        };
        let one = status(&["current"], "0a");
        assert_eq!(made(&one), ("0a", None, vec![("exchange", 1)]));
        assert_eq!(made(&one), made(&status(&["current"], "0a")));
        assert_ne!(made(&one), made(&status(&["superseded", "current"], "0a")));
        assert_ne!(made(&one), made(&status(&["current"], "0b")));
        let agree = |other: Option<RekeyStatus>| one_word(&[(1, Some(one.clone())), (2, other)]);
        assert_eq!(agree(Some(one.clone())), Some(one.clone()));
        let lags = status(&["superseded", "current"], "0a");
        for other in [None, Some(lags.clone())] {
            assert_eq!(agree(other), None);
        }
        assert_eq!(one_word(&[]), None);
        let said = words(&[(1, Some(lags)), (3, None)]);
        assert_eq!(
            said,
            r#"node 1 says ("0a", None, [("exchange", 2)]); node 3 says nothing"#
        );
    }

    #[test]
    fn a_slot_is_rekeyed_once_no_key_of_before_is_on_its_way() {
        let mut status: RekeyStatus = serde_json::from_value(serde_json::json!({
            "slots": [], "replication":
                {"key": "0a", "former": null, "records_left": 0, "nodes": [], "known_to_removed": [], "next": ""}
        }))
        .unwrap();
        status.slots = vec![
            slot("2fa", &["current"]),
            slot("exchange", &["superseded", "current"]),
        ];
        assert!(are_there(&status));
        for phase in [RekeyPhase::Making, RekeyPhase::Granting] {
            status.slots[1].phase = phase;
            assert!(!are_there(&status), "{phase:?}");
        }
        for (name, generation, so) in [("exchange", 2, true), ("exchange", 3, false), ("2fa", 2, false)] {
            assert_eq!(has(&status, name, generation), so, "{name} {generation}");
        }
    }

    #[test]
    fn the_slot_with_the_fewest_keys_is_rekeyed_and_its_newest_generation_known() {
        let many = slot("exchange", &["superseded", "superseded", "current"]);
        let few = slot("2fa", &["destroyed", "destroyed", "superseded", "current"]);
        assert_eq!([live(&many), live(&few)], [3, 2]);
        assert_eq!([newest(&many), newest(&few)], [3, 4]);
        let chosen = [many, few].into_iter().min_by_key(live).unwrap();
        assert_eq!(chosen.slot, "2fa");
    }
}
