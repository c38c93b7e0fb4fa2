//! `hsmctl cluster rekey`: a slot's transport key, or the replication key, is replaced. The nodes do it by themselves
//! once it is begun; this waits and shows how far they are, and whoever stops waiting stops nothing.

use std::time::{Duration, Instant};

use anyhow::Result;
use clap::{Args, Subcommand};
use hsm_api::admin::{
    RekeyPhase, RekeyReplicationResponse, RekeyStatus, RekeyTransportRequest, ReplicationRekey, SlotRekey,
};
use hsm_api::client::Answer;
use hsm_api::{Client, ClientError, ErrorCode};

use super::preview::{self, Preview};
use super::{CHANGE, READ, Session, idempotency_key};
use crate::exit::{change_failed, usage, with_hint, would_be_refused};
use crate::output::{self, note, or_dash};
use crate::progress::Progress;
use crate::terminal::Destruction;

/// How long the nodes are watched: each rotation takes a moment, and one that fails is tried again.
const WATCH: Duration = Duration::from_secs(120);
const ASK_AGAIN: Duration = Duration::from_millis(300);
/// What stands for every slot.
const ALL: &str = "all";
/// What confirms the other one.
const REPLICATION: &str = "replication";

/// Replacing a transport key or the replication key.
#[derive(Debug, Subcommand)]
pub(crate) enum RekeyCommand {
    /// Give a slot another transport key, and every context of it a version under that; the old transport key is
    /// destroyed in every token with the last version that needs it.
    Transport(Transport),
    /// Make the new replication key, which every node has beside the present one, the cluster's, and have everything
    /// sealed under it.
    Replication(Replication),
    /// Show where both stand, and what to do next.
    Status,
}

/// Arguments of `cluster rekey transport`.
#[derive(Debug, Args)]
pub(crate) struct Transport {
    /// The slot.
    #[arg(
        long,
        value_name = "SLOT",
        required_unless_present = "all",
        conflicts_with = "all"
    )]
    slot: Option<String>,
    /// Every slot, one after the other; one that is refused does not keep the others. With --restart, every slot whose
    /// transport key is on its way.
    #[arg(long)]
    all: bool,
    /// Give up the transport key that is on its way, because it cannot come to every member, and make another one.
    #[arg(long)]
    restart: bool,
    /// The slot again, or all, instead of typing it.
    #[arg(long, value_name = "SLOT")]
    confirm: Option<String>,
    /// Under the same key a repeated command begins it once.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Say what would be done, and begin nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Arguments of `cluster rekey replication`.
#[derive(Debug, Args)]
pub(crate) struct Replication {
    /// The word replication, instead of typing it.
    #[arg(long, value_name = "replication")]
    confirm: Option<String>,
    /// Under the same key a repeated command replaces it once.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
}

pub(super) async fn run(session: &Session, command: RekeyCommand) -> Result<()> {
    match command {
        RekeyCommand::Transport(args) => transport(session, args).await,
        RekeyCommand::Replication(args) => replication(session, args).await,
        RekeyCommand::Status => {
            let client = session.client(READ)?;
            let status = ask(session, &client).await?;
            output::print(session.format(), &status, || text(&status))
        }
    }
}

async fn ask(session: &Session, client: &Client) -> Result<RekeyStatus> {
    let answer = session
        .ask(client, "cluster rekey status", client.rekey_status())
        .await?;
    Ok(answer.into_body())
}

async fn transport(session: &Session, args: Transport) -> Result<()> {
    let client = session.client(CHANGE)?;
    let status = ask(session, &client).await?;
    let slots = slots(&status, args.slot.as_deref())?;
    let slots = if args.restart { restartable(slots) } else { slots };
    if args.dry_run {
        preview::check_role(session, &client, preview::ADMINISTER).await?;
        preview::check_leader(session, &client).await?;
        return foresee_transport(&slots, args.restart)?.print(session);
    }
    let name = args.slot.as_deref().unwrap_or(ALL);
    let warning = format!(
        "every context of {} gets a new key version, and the old transport key will be destroyed on every node once no \
         version needs it: what only it opens, in old logs and backups too, is lost then.",
        called(&slots)
    );
    let confirmation = Destruction {
        warning: &warning,
        name,
        option: "--confirm",
        answered: args.confirm.as_deref(),
    };
    confirmation.confirm(session.questions())?;
    let key = idempotency_key(args.idempotency_key);
    let (mut newest, mut names, mut failed) = (None, Vec::new(), Vec::new());
    for slot in &slots {
        let request = RekeyTransportRequest {
            slot: slot.slot.clone(),
            restart: args.restart,
        };
        let what = format!("cluster rekey transport --slot {}", slot.slot);
        let call = client.rekey_transport(&request, Some(&key));
        // All of them, whatever becomes of one: the others' old keys are in the same hands.
        match session.ask(&client, &what, call).await {
            Ok(answer) => {
                newest = answer.meta.index.or(newest);
                names.push(slot.slot.clone());
            }
            Err(error) => failed.push((slot.slot.clone(), error)),
        }
    }
    let failure = not_begun(failed, &names, &key);
    if names.is_empty()
        && let Some(failure) = failure
    {
        return Err(failure);
    }
    // What answers has to know of it: before, everything was settled.
    let client = newest.map_or_else(|| client.clone(), |index| client.with_min_index(index));
    let status = watch(&client, &names).await?.into_body();
    let mut meant = status.slots.iter().filter(|slot| names.contains(&slot.slot));
    if meant.any(|slot| is_busy(slot.phase)) {
        note("it goes on by itself; look how far it is with: hsmctl cluster rekey status");
    }
    output::print(session.format(), &status, || text(&status))?;
    failure.map_or(Ok(()), Err)
}

/// The slots where there is something to begin again; all, if there is none: the node says so then.
fn restartable(slots: Vec<SlotRekey>) -> Vec<SlotRekey> {
    let is_offered = |slot: &SlotRekey| slot.phase == RekeyPhase::Granting;
    if slots.iter().any(is_offered) {
        slots.into_iter().filter(is_offered).collect()
    } else {
        slots
    }
}

/// The failure of those slots that were refused, or did not answer; each with its reason.
fn not_begun(failed: Vec<(String, ClientError)>, begun: &[String], key: &str) -> Option<anyhow::Error> {
    let names: Vec<&str> = failed.iter().map(|(slot, _)| slot.as_str()).collect();
    let hint = format!(
        "not begun: slot {}; begun: {}; ask again, and each is begun once, with: --idempotency-key {key}",
        names.join(", "),
        or_dash(Some(begun.join(", ")).filter(|names| !names.is_empty()))
    );
    let is_alone = failed.len() == 1 && begun.is_empty();
    if !is_alone {
        for (slot, error) in &failed {
            note(&format!("slot {slot}: {error}"));
        }
    }
    let (_, first) = failed.into_iter().next()?;
    let first = change_failed(first, key);
    Some(if is_alone { first } else { with_hint(first, hint) })
}

/// The slots that are meant.
fn slots(status: &RekeyStatus, slot: Option<&str>) -> Result<Vec<SlotRekey>> {
    let Some(slot) = slot else {
        if status.slots.is_empty() {
            return Err(usage(
                "no slot has a transport key yet: make a context's first key first",
            ));
        }
        return Ok(status.slots.clone());
    };
    let found = status.slots.iter().find(|known| known.slot == slot);
    let found = found.ok_or_else(|| {
        let detail = format!(
            "slot {slot} has no transport key yet; there are {}",
            called(&status.slots)
        );
        would_be_refused(ErrorCode::NotFound, detail)
    })?;
    Ok(vec![found.clone()])
}

fn called(slots: &[SlotRekey]) -> String {
    let names: Vec<&str> = slots.iter().map(|slot| slot.slot.as_str()).collect();
    format!("slot {}", names.join(", "))
}

/// Whether the nodes are at it, and need nobody.
fn is_busy(phase: RekeyPhase) -> bool {
    matches!(
        phase,
        RekeyPhase::Making | RekeyPhase::Granting | RekeyPhase::Rotating
    )
}

/// Asks again and again until the nodes have rotated everything, or it takes too long. A node that does not answer for a
/// moment is no reason to stop: leaders change.
pub(super) async fn watch(client: &Client, slots: &[String]) -> Result<Answer<RekeyStatus>> {
    let progress = Progress::of_steps("contexts are rotated under the new transport key", slots.len());
    let until = Instant::now() + WATCH;
    let mut settled = 0;
    loop {
        let asked = client.rekey_status().await;
        let is_late = Instant::now() >= until;
        match asked {
            Ok(answer) => {
                let here = answer.body.slots.iter().filter(|slot| slots.contains(&slot.slot));
                let now = here.filter(|slot| !is_busy(slot.phase)).count();
                (settled..now).for_each(|_| progress.step());
                settled = settled.max(now);
                if now >= slots.len() || is_late {
                    return Ok(answer);
                }
            }
            Err(error) if is_late => return Err(error.into()),
            Err(_) => {}
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
}

fn foresee_transport(slots: &[SlotRekey], restart: bool) -> Result<Preview> {
    let on_its_way = |slot: &&SlotRekey| matches!(slot.phase, RekeyPhase::Making | RekeyPhase::Granting);
    let open = slots.iter().find(on_its_way);
    match (open, restart) {
        (Some(slot), false) => {
            let detail = format!(
                "the next transport key of slot {} is on its way already: {}",
                slot.slot, slot.next
            );
            return Err(would_be_refused(ErrorCode::Conflict, detail));
        }
        (None, true) => {
            let detail = format!("no transport key of {} is on its way", called(slots));
            return Err(would_be_refused(ErrorCode::Conflict, detail));
        }
        _ => {}
    }
    let again = if restart {
        ", in the place of the one that is on its way"
    } else {
        ""
    };
    Ok(Preview::new(format!(
        "make a new transport key for {}{again}, give it to every member, rotate every context there, and destroy the old \
         transport key with the last version that needs it",
        called(slots)
    ))
    .not_checked("whether the slot serves on every member: hsmctl slot status"))
}

async fn replication(session: &Session, args: Replication) -> Result<()> {
    let client = session.client(CHANGE)?;
    if args.dry_run {
        preview::check_role(session, &client, preview::ADMINISTER).await?;
        preview::check_leader(session, &client).await?;
        let status = ask(session, &client).await?;
        return foresee_replication(&status.replication)?.print(session);
    }
    let confirmation = Destruction {
        warning: "every node's other replication key becomes the cluster's, and the present one will open nothing in the \
                  cluster any more; until everything is sealed anew, every node needs both.",
        name: REPLICATION,
        option: "--confirm",
        answered: args.confirm.as_deref(),
    };
    confirmation.confirm(session.questions())?;
    let key = idempotency_key(args.idempotency_key);
    let call = client.rekey_replication(Some(&key));
    let answer = session
        .ask(&client, "cluster rekey replication", call)
        .await
        .map_err(|error| change_failed(error, &key))?;
    let asked = answer
        .meta
        .index
        .map_or_else(|| client.clone(), |index| client.with_min_index(index));
    let status = watch_reseal(&asked).await?;
    let RekeyReplicationResponse { key, former } = &answer.body;
    output::print_change(session.format(), &answer, || {
        let pairs = [
            ("replication key", key.clone()),
            ("before", former.clone()),
            ("records left", status.records_left.to_string()),
            ("next", status.next.clone()),
        ];
        output::pairs(pairs)
    })
}

/// As [`watch`], until everything is sealed under the new key.
pub(super) async fn watch_reseal(client: &Client) -> Result<ReplicationRekey> {
    let _progress = Progress::of("records are sealed under the new replication key");
    let until = Instant::now() + WATCH;
    loop {
        let asked = client.rekey_status().await;
        let is_late = Instant::now() >= until;
        match asked {
            Ok(answer) => {
                let status = answer.into_body().replication;
                if status.former.is_none() || is_late {
                    return Ok(status);
                }
            }
            Err(error) if is_late => return Err(error.into()),
            Err(_) => {}
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
}

fn foresee_replication(status: &ReplicationRekey) -> Result<Preview> {
    let refused = |detail: String| Err(would_be_refused(ErrorCode::Conflict, detail));
    if let Some(former) = &status.former {
        return refused(format!(
            "what is sealed under {former} is still being sealed anew: {}",
            status.next
        ));
    }
    let is_other = |key: &&String| **key != status.key;
    let others = status
        .nodes
        .iter()
        .flat_map(|node| node.keys.iter().filter(is_other));
    let mut others: Vec<&String> = others.collect();
    others.sort();
    others.dedup();
    let held_by_all = |key: &String| status.nodes.iter().all(|node| node.keys.contains(key));
    match others.into_iter().find(|key| held_by_all(key)) {
        Some(new) => Ok(Preview::new(format!(
            "make {new} the cluster's replication key in the place of {}, and have everything sealed under it",
            status.key
        ))),
        None => refused(format!("not every node has another key: {}", status.next)),
    }
}

fn text(status: &RekeyStatus) -> String {
    let mut text = String::new();
    let rows = status.slots.iter().flat_map(|slot| {
        slot.transport_keys.iter().map(|key| {
            [
                slot.slot.clone(),
                key.generation.to_string(),
                key.state.to_string(),
                key.versions.to_string(),
                key.created_at.clone(),
                or_dash(Some(key.waiting_for.join(" ")).filter(|names| !names.is_empty())),
            ]
        })
    });
    let header = ["SLOT", "GENERATION", "STATE", "VERSIONS", "MADE", "WAITS FOR"];
    text.push_str(&output::table(header, rows));
    text.push('\n');
    for slot in &status.slots {
        text.push_str(&format!("slot {}: {}: {}\n", slot.slot, slot.phase, slot.next));
    }
    let replication = &status.replication;
    text.push('\n');
    let nodes = replication
        .nodes
        .iter()
        .map(|node| [node.node_id.clone(), node.keys.join(" ")]);
    text.push_str(&output::table(["NODE", "REPLICATION KEYS"], nodes));
    text.push_str(&format!(
        "\nreplication key {}: {}\n",
        replication.key, replication.next
    ));
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use hsm_api::admin::TransportKeyState;

    use super::*;
    use crate::exit::Exit;

    fn status(phase: &str, keys: [&[&str]; 2], former: Option<&str>) -> RekeyStatus {
        serde_json::from_value(serde_json::json!({
            "slots": [{
                "slot": "exchange", "phase": phase, "contexts_to_rotate": [], "next": "what comes next",
                "transport_keys": [
                    {"id": "00", "generation": 1, "state": "superseded", "created_at": "2030-01-01T00:00:00Z",
                     "versions": 3, "waiting_for": []},
                    {"id": "01", "generation": 2, "state": "current", "created_at": "2030-01-01T00:00:00Z",
                     "versions": 1, "waiting_for": ["hsm-node-3"]},
                ]
            }],
            "replication": {
                "key": "aa", "former": former, "records_left": 2, "next": "and here too",
                "nodes": [{"node_id": "hsm-node-1", "keys": keys[0]}, {"node_id": "hsm-node-2", "keys": keys[1]}]
            }
        }))
        .unwrap()
    }

    const ALONE: [&[&str]; 2] = [&["aa"], &["aa"]];

    #[test]
    fn the_status_says_for_each_slot_and_for_the_replication_key_what_comes_next() {
        let text = text(&status("waiting", ALONE, None));
        for part in [
            "superseded",
            "hsm-node-3",
            "slot exchange: waiting: what comes next",
            "replication key aa: and here too",
            "hsm-node-2",
        ] {
            assert!(text.contains(part), "{text} does not say {part}");
        }
        let state = status("waiting", ALONE, None).slots[0].transport_keys[1].state;
        assert_eq!(state, TransportKeyState::Current);
    }

    #[test]
    fn a_slot_is_named_and_one_without_a_transport_key_refused() {
        let known = status("settled", ALONE, None);
        assert_eq!(slots(&known, None).unwrap().len(), 1);
        assert_eq!(slots(&known, Some("exchange")).unwrap().len(), 1);
        let missing = slots(&known, Some("2fa")).unwrap_err();
        assert_eq!(Exit::of(&missing), Exit::Conflict);
        assert!(missing.to_string().contains("slot exchange"), "{missing}");
    }

    #[test]
    fn of_all_slots_those_are_begun_again_where_a_key_is_on_its_way() {
        let mut known = status("granting", ALONE, None).slots;
        let mut other = status("settled", ALONE, None).slots;
        other[0].slot = "2fa".to_owned();
        known.append(&mut other);
        let again = restartable(known.clone());
        let names: Vec<&str> = again.iter().map(|slot| slot.slot.as_str()).collect();
        assert_eq!(names, ["exchange"]);
        known.remove(0);
        assert_eq!(restartable(known.clone()), known, "the node says why not");
    }

    #[test]
    fn slots_that_were_refused_are_named_beside_those_that_were_begun() {
        use crate::exit::tests::{api, silence};

        let begun = ["exchange".to_owned()];
        assert!(not_begun(Vec::new(), &begun, "k").is_none());
        let refused = vec![
            ("2fa".to_owned(), api(ErrorCode::Conflict)),
            ("third".to_owned(), silence()),
        ];
        let failure = not_begun(refused, &begun, "k").unwrap();
        assert_eq!(Exit::of(&failure), Exit::Conflict);
        let said = failure.to_string();
        for part in [
            "not begun: slot 2fa, third",
            "begun: exchange",
            "--idempotency-key k",
        ] {
            assert!(said.contains(part), "{said} does not say {part}");
        }
        let alone = not_begun(vec![("2fa".to_owned(), silence())], &[], "k").unwrap();
        assert_eq!(Exit::of(&alone), Exit::Unknown);
        assert!(!alone.to_string().contains("not begun"), "{alone}");
    }

    #[test]
    fn a_dry_run_is_refused_as_the_rekey_would_be() {
        let foreseen = |phase: &str, restart| {
            let known = status(phase, ALONE, None);
            foresee_transport(&known.slots, restart)
        };
        let preview = serde_json::to_value(foreseen("waiting", false).unwrap()).unwrap();
        assert!(preview["would"].as_str().unwrap().contains("slot exchange"));
        assert!(foreseen("granting", true).is_ok());
        for refused in [foreseen("granting", false), foreseen("settled", true)] {
            assert_eq!(Exit::of(&refused.unwrap_err()), Exit::Conflict);
        }
    }

    #[test]
    fn a_dry_run_finds_the_key_that_every_node_has() {
        let both: [&[&str]; 2] = [&["aa", "bb"], &["aa", "bb"]];
        let foreseen = |keys, former| foresee_replication(&status("settled", keys, former).replication);
        let preview = serde_json::to_value(foreseen(both, None).unwrap()).unwrap();
        assert!(
            preview["would"].as_str().unwrap().starts_with("make bb "),
            "{preview}"
        );
        for refused in [
            foreseen(ALONE, None),
            foreseen([&["aa", "bb"], &["aa"]], None),
            foreseen(both, Some("bb")),
        ] {
            let error = refused.unwrap_err();
            assert_eq!(Exit::of(&error), Exit::Conflict);
            assert!(error.to_string().contains("and here too"), "{error}");
        }
    }

    #[test]
    fn what_needs_nobody_is_waited_for_and_nothing_else() {
        for phase in [RekeyPhase::Making, RekeyPhase::Granting, RekeyPhase::Rotating] {
            assert!(is_busy(phase));
        }
        for phase in [RekeyPhase::Settled, RekeyPhase::Waiting, RekeyPhase::Destroying] {
            assert!(!is_busy(phase));
        }
    }
}
