//! A node that joins, in the eyes of whoever asks it meanwhile: it refuses, with documented codes, until it holds
//! every key, and is ready only then. And in the leader's, when it stops answering just before it would be let in.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cluster_tests::failpoints::arm;
use cluster_tests::{Node, Playground, until};
use hsm_api::admin::{Member, MemberRole, SlotState};
use hsm_api::data::{DecryptRequest, EncryptRequest};
use hsm_api::{Client, ClientError, ErrorCode};
use nix::sys::signal::Signal;

use crate::common::{CONTEXT, Sealed, open, open_everywhere, seal, seal_under};
use crate::joining::join;

/// Key versions to import, and how much longer each import takes: enough time to be watched in.
const VERSIONS: u32 = 8;
const LONGER: &str = "sleep(300)";
/// From the start of the watch to readiness.
const JOINED_WITHIN: Duration = Duration::from_secs(90);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(5);
/// The watch must have seen it while it imported, and once before it belonged to the cluster.
const REFUSALS: [(ErrorCode, u32); 2] = [(ErrorCode::Uninitialised, 1), (ErrorCode::NotReady, 10)];
/// What `docs/errors.md` has for a node that may not answer yet. A joiner that has a part of the keys is none that
/// lacks some: it serves nothing of any slot.
const NOT_YET: [ErrorCode; 2] = [ErrorCode::Uninitialised, ErrorCode::NotReady];

/// Where the leader is held: it has made a node a learner, and it has let one in.
const HELD: [&str; 2] = ["membership::after_change", "membership::after_admit"];
/// What it says of the next step after each.
const STEPS: [&str; 2] = ["Admit(", "Promote("];
/// Whoever has said nothing for so long is not heard: twice what `HEARTBEATS` in `node/src/consensus/membership.rs` allows.
const UNHEARD_MS: u64 = 2000;
/// For how long nothing is appended once all has been reported: a node reports what is new within a second.
const REPORTED: Duration = Duration::from_secs(3);
/// For how long one that answers nobody is watched: many times as long as a step takes.
const SILENT: Duration = Duration::from_secs(3);
/// Nodes that are tried while leaders are overtaken.
const NODES: u32 = 3;

/// A ciphertext, whose it is, and who may open it.
struct Theirs {
    client: Client,
    context: &'static str,
    sealed: Sealed,
}

fn documented(error: &ClientError) -> Result<ErrorCode> {
    let code = error.code().filter(|code| NOT_YET.contains(code));
    ensure!(error.status() == Some(503), "{error}");
    code.with_context(|| error.to_string())
}

/// Asks a joiner for everything again and again until its first ready moment, in which it has to open all of it.
/// Returns what it refused before, by code.
async fn watch(node: Node, all: Vec<Theirs>) -> Result<BTreeMap<ErrorCode, u32>> {
    let begun = Instant::now();
    let mut refused = BTreeMap::new();
    // Whoever opens one version opens them all from then on.
    let mut opens = false;
    loop {
        match node.patient().get("/readyz").await?.status {
            200 => break,
            503 => {}
            status => bail!("/readyz is {status}"),
        }
        for Theirs {
            client,
            context,
            sealed,
        } in &all
        {
            let request = DecryptRequest::new(*context, sealed.ciphertext.clone());
            let what = || format!("version {} of {context}", sealed.version);
            let error = match client.decrypt(&request).await {
                Ok(opened) => {
                    ensure!(
                        opened.plaintext.as_slice() == sealed.plaintext,
                        "{} decrypted to something else",
                        what()
                    );
                    opens = true;
                    continue;
                }
                Err(error) => error,
            };
            ensure!(!opens, "{} refused although others open: {error}", what());
            *refused.entry(documented(&error).with_context(what)?).or_insert(0) += 1;
            let encrypted = client.encrypt(&EncryptRequest::new(*context, b"x")).await;
            match encrypted {
                // It became a member between the two, and decrypts. It encrypts, and is ready, once it was given
                // invocations.
                Ok(_) => opens = true,
                Err(error) if error.code() == Some(ErrorCode::InvocationsExhausted) => opens = true,
                Err(error) => {
                    documented(&error).with_context(|| format!("encrypt for {context}"))?;
                }
            }
        }
        if begun.elapsed() > JOINED_WITHIN {
            let checks = node.checks().await;
            bail!("not ready after {JOINED_WITHIN:?}: {checks}");
        }
        tokio::time::sleep(PAUSE).await;
    }
    for theirs in &all {
        open(&theirs.client, theirs.context, &theirs.sealed)
            .await
            .with_context(|| format!("ready, and version {} does not open", theirs.sealed.version))?;
    }
    let missing = node.metrics().await?.sum("hsm_keys_missing");
    ensure!(
        missing == Some(0.0),
        "{missing:?} keys are missing on a ready node"
    );
    Ok(refused)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_joiner_serves_only_after_holding_every_key() -> Result<()> {
    let mut cluster = Playground::start(3).await?;
    let trading = cluster.client("trading-1")?;
    let mut all = vec![seal(&trading, CONTEXT, b"version 1").await?];
    for version in 2..=VERSIONS {
        let made = cluster.client("admin")?.rotate(CONTEXT, None).await?.version;
        ensure!(made == version, "version {made} instead of {version}");
        let plaintext = format!("version {version}");
        all.push(seal_under(&trading, CONTEXT, plaintext.as_bytes(), version).await?);
    }
    let own = seal(&cluster.client("2fa-1")?, "2fa", b"2fa").await?;

    let fourth = cluster.add_node(false).await?;
    arm(&fourth, "rotation::before_import", LONGER).await?;
    let client = cluster.client_on("trading-1", fourth.number)?;
    let of_exchange = all.iter().map(|sealed| Theirs {
        client: client.clone(),
        context: CONTEXT,
        sealed: sealed.clone(),
    });
    // One slot's only key is there long before the other slot's eight.
    let of_2fa = Theirs {
        client: cluster.client_on("2fa-1", fourth.number)?,
        context: "2fa",
        sealed: own.clone(),
    };
    let asked = of_exchange.chain([of_2fa]).collect();
    let watched = tokio::spawn(watch(fourth.clone(), asked));
    cluster.up().await?;
    let refused = watched.await??;
    println!("refused before it was ready: {refused:?}");
    for (code, least) in REFUSALS {
        let times = refused.get(&code).copied().unwrap_or(0);
        ensure!(times >= least, "{code} only {times} times: {refused:?}");
    }
    arm(&fourth, "rotation::before_import", "off").await?;
    open(&cluster.client_on("2fa-1", fourth.number)?, "2fa", &own).await?;
    open_everywhere(&cluster, "trading-1", CONTEXT, &all).await?;
    cluster.passed();
    Ok(())
}

/// A node as this one has it.
async fn seen(cluster: &Playground, by: &Node, of: &Node) -> Option<Member> {
    let client = cluster.client_on("admin", by.number).ok()?;
    let members = client.members().await.ok()?.into_body().members;
    members.into_iter().find(|member| member.node_id == of.id())
}

/// Until nothing is left that keeps a learner from being let in, as the leader has it, and all reports are made.
async fn proven(cluster: &Playground, leader: &Node, new: &Node) -> Result<()> {
    let mut still: Option<(u64, Instant)> = None;
    until("a learner that has proven every key", JOINED_WITHIN, async || {
        let learner = seen(cluster, leader, new).await?;
        let last = cluster.status(leader.number).await?.last_log_index;
        let mut slots = learner.slots.iter();
        let serves = !learner.slots.is_empty() && slots.all(|slot| slot.state == SlotState::Ready);
        let has_all = serves && learner.held_back.is_empty() && learner.lag == Some(0);
        let since = match still {
            Some((index, since)) if has_all && index == last => since,
            _ => Instant::now(),
        };
        still = Some((last, since));
        (since.elapsed() > REPORTED).then_some(())
    })
    .await
}

/// The learner is stopped where nothing but the next step is left to do, twice. The leader is let go once it does not hear the
/// learner any more.
async fn stopped_twice(cluster: &Playground, leader: &Node, new: &Node, said: usize) -> Result<()> {
    let has_said = |what: &str| leader.log().get(said..).is_some_and(|log| log.contains(what));
    proven(cluster, leader, new).await?;
    for (held, step) in HELD.into_iter().zip(STEPS) {
        new.signal(Signal::SIGSTOP)?;
        until("a learner that is not heard", JOINED_WITHIN, async || {
            let learner = seen(cluster, leader, new).await?;
            (learner.last_seen_ms? > UNHEARD_MS).then_some(())
        })
        .await?;
        ensure!(!has_said(step), "{step}: the leader was not held at {held}");
        arm(leader, held, "off").await?;
        let watched = Instant::now();
        let silent = until("a learner that stays one", JOINED_WITHIN, async || {
            let learner = seen(cluster, leader, new).await?;
            let moved = has_said(step) || learner.role != MemberRole::Learner;
            (moved || watched.elapsed() > SILENT).then_some(learner)
        })
        .await?;
        ensure!(
            !has_said(step) && silent.role == MemberRole::Learner,
            "{step} although it does not answer: {silent:?}"
        );
        new.signal(Signal::SIGCONT)?;
        until(step, JOINED_WITHIN, async || has_said(step).then_some(())).await?;
    }
    Ok(())
}

/// Let in, or given a vote, it would only make the majority larger.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_learner_that_stops_answering_is_neither_let_in_nor_given_a_vote_until_it_answers() -> Result<()> {
    let mut cluster = Playground::start(3).await?;
    for _ in 0..NODES {
        let new = cluster.add_node(false).await?;
        let members = cluster.others(new.number);
        let leads = cluster.leader_among(&members).await?;
        let leader = cluster.node(leads.node);
        for held in HELD {
            arm(&leader, held, "pause").await?;
        }
        let said = leader.log().len();
        let watching = async {
            let shown = stopped_twice(&cluster, &leader, &new, said).await;
            // Whatever came of it, it joins.
            new.signal(Signal::SIGCONT)?;
            for held in HELD {
                arm(&leader, held, "off").await?;
            }
            shown
        };
        // Whoever asked it to join may wait in vain: it was stopped meanwhile.
        let (joined, shown) = tokio::join!(join(&cluster, &new, |_| ()), watching);
        // The next leader is held nowhere.
        if cluster.leader_among(&members).await? == leads {
            shown.with_context(|| format!("its join: {joined:?}"))?;
            new.wait_ready(JOINED_WITHIN).await?;
            until("its vote", JOINED_WITHIN, async || {
                let member = seen(&cluster, &leader, &new).await?;
                (member.role == MemberRole::Voter).then_some(())
            })
            .await?;
            cluster.passed();
            return Ok(());
        }
        println!("once more, {} was overtaken: {shown:?}", leader.id());
        new.wait_ready(JOINED_WITHIN).await?;
    }
    bail!("{NODES} elections in a row: no leader stays for a join")
}
