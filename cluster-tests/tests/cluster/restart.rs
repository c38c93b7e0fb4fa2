//! The whole cluster dies and comes back; a single node comes back to what it missed.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::{Playground, until};
use hsm_api::ClientError;
use hsm_api::admin::{ContextInfo, CreateKekRequest, KeyState};
use hsm_api::data::EncryptRequest;
use nix::sys::signal::Signal;

use crate::common::{
    CONTEXT, Sealed, context_on, formed_with, made, open_everywhere, seal, settled_everywhere,
};

/// How often the whole cluster dies.
const ROUNDS: u32 = 5;
/// Acknowledgements before each kill: in all, and of each kind.
const ACKNOWLEDGED: usize = 20;
const OF_EACH: usize = 3;
/// For those, and for a start and an end.
const ACKNOWLEDGED_WITHIN: Duration = Duration::from_secs(60);
/// Between two encryptions; they are many times as quick as changes.
const PACE: Duration = Duration::from_millis(15);
/// A context that the playground has no key of.
const OTHER: &str = "order-key";

/// What one caller was told until its first failure.
struct Told<T> {
    acknowledged: Vec<T>,
    failure: ClientError,
    failed: Instant,
}

/// Makes calls, each once and one after the other, until one fails.
async fn until_it_fails<T>(
    count: &AtomicUsize,
    mut call: impl AsyncFnMut(usize) -> Result<T, ClientError>,
) -> Told<T> {
    let mut acknowledged = Vec::new();
    loop {
        match call(acknowledged.len()).await {
            Ok(answer) => acknowledged.push(answer),
            Err(failure) => {
                return Told {
                    acknowledged,
                    failure,
                    failed: Instant::now(),
                };
            }
        }
        count.store(acknowledged.len(), Ordering::SeqCst);
    }
}

/// Kills all nodes once enough was acknowledged; when it began to. They die in any case, or nobody who calls them
/// would ever stop.
async fn kill_all(cluster: &Playground, counts: [&AtomicUsize; 3]) -> Result<Instant> {
    let enough = until("acknowledgements", ACKNOWLEDGED_WITHIN, async || {
        let counts = counts.map(|count| count.load(Ordering::SeqCst));
        let all_kinds = counts.iter().all(|count| *count >= OF_EACH);
        (all_kinds && counts.iter().sum::<usize>() >= ACKNOWLEDGED).then_some(())
    })
    .await;
    let began = Instant::now();
    // All signals before any of them is looked at again.
    let nodes = cluster.nodes();
    let sent: Vec<Result<bool>> = nodes.iter().map(|node| node.signal(Signal::SIGKILL)).collect();
    enough?;
    for (node, sent) in nodes.iter().zip(sent) {
        ensure!(sent?, "{} had ended before the kill", node.id());
    }
    Ok(began)
}

/// Every acknowledged version is there.
fn check_kept(info: &ContextInfo, acknowledged: &[(String, u32)]) -> Result<()> {
    for (key, version) in acknowledged {
        let kept = info.versions.iter().any(|held| {
            held.version == *version && matches!(held.state, KeyState::Active | KeyState::DecryptOnly)
        });
        ensure!(kept, "version {version}, acknowledged under {key}: {info:?}");
    }
    Ok(())
}

/// What was answered before the kill is answered again, and not done again; what was cut short is done once.
async fn check_repeats(
    cluster: &Playground,
    context: &str,
    before: usize,
    acknowledged: &[(String, u32)],
    cut_short: &str,
    repeat: impl AsyncFn(&str) -> Result<u32, ClientError>,
) -> Result<()> {
    for (key, version) in acknowledged {
        let again = repeat(key.as_str())
            .await
            .with_context(|| format!("{key} repeated"))?;
        ensure!(again == *version, "{key}: version {again} instead of {version}");
    }
    let late = repeat(cut_short)
        .await
        .with_context(|| format!("{cut_short} repeated"))?;
    let again = repeat(cut_short)
        .await
        .with_context(|| format!("{cut_short} repeated"))?;
    ensure!(again == late, "{cut_short}: versions {late} and {again}");
    let info = settled_everywhere(cluster, context).await?;
    let (now, expected) = (made(&info), before + acknowledged.len() + 1);
    ensure!(
        now == expected,
        "{context} has {now} versions instead of {expected}: {info:?}"
    );
    Ok(())
}

/// How many versions of a context were made; none of one that does not exist yet.
async fn made_of(cluster: &Playground, context: &str) -> usize {
    let info = context_on(cluster, 1, context).await;
    info.map_or(0, |info| made(&info))
}
pub(crate) async fn a_whole_cluster_killed_at_once_loses_nothing_acknowledged() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let mut all: Vec<Sealed> = Vec::new();
    for round in 0..ROUNDS {
        // Three callers on three nodes; each of the nodes is everybody's in turn.
        let at = |place: u32| (round + place) % 3 + 1;
        let rotates = cluster.client_on("admin", at(0))?;
        let creates = cluster.client_on("admin", at(1))?;
        let encrypts = cluster.client_on("trading-1", at(2))?;
        let before = [made_of(&cluster, CONTEXT).await, made_of(&cluster, OTHER).await];
        let counts = <[AtomicUsize; 3]>::default();
        let key = |what: &str, number: usize| format!("{what}-{round}-{number}");
        let create = CreateKekRequest::new(OTHER);
        let (rotated, created, sealed, killed) = tokio::join!(
            until_it_fails(
                &counts[0],
                async |number: usize| -> Result<(String, u32), ClientError> {
                    let key = key("rotate", number);
                    let version = rotates.rotate(CONTEXT, Some(&key)).await?.version;
                    Ok((key, version))
                }
            ),
            until_it_fails(
                &counts[1],
                async |number: usize| -> Result<(String, u32), ClientError> {
                    let key = key("create", number);
                    let version = creates.create_kek(&create, Some(&key)).await?.version;
                    Ok((key, version))
                }
            ),
            until_it_fails(&counts[2], async |number: usize| -> Result<Sealed, ClientError> {
                tokio::time::sleep(PACE).await;
                let plaintext = key("plaintext", number).into_bytes();
                let request = EncryptRequest::new(CONTEXT, plaintext.clone());
                let answer = encrypts.encrypt(&request).await?.into_body();
                Ok(Sealed {
                    plaintext,
                    ciphertext: answer.ciphertext,
                    key_id: answer.key_id,
                    version: answer.key_version,
                })
            }),
            kill_all(&cluster, counts.each_ref()),
        );
        let ends = [
            (&rotated.failure, rotated.failed),
            (&created.failure, created.failed),
            (&sealed.failure, sealed.failed),
        ];
        let killed = killed.with_context(|| format!("round {round}: {ends:?}"))?;
        for (failure, failed) in ends {
            ensure!(failed >= killed, "round {round}: before the kill: {failure}");
        }
        // The kill has to have met a call that was on its way.
        let cut_short = ends.iter().any(|(failure, _)| failure.outcome_unknown());
        ensure!(cut_short, "round {round}: no call was cut short: {ends:?}");
        println!(
            "round {round}: {} rotations, {} keys, {} ciphertexts acknowledged",
            rotated.acknowledged.len(),
            created.acknowledged.len(),
            sealed.acknowledged.len()
        );
        for node in cluster.nodes() {
            node.wait_gone(ACKNOWLEDGED_WITHIN).await?;
        }

        cluster.up().await?;
        let info = settled_everywhere(&cluster, CONTEXT).await?;
        check_kept(&info, &rotated.acknowledged).with_context(|| format!("round {round}"))?;
        let info = settled_everywhere(&cluster, OTHER).await?;
        check_kept(&info, &created.acknowledged).with_context(|| format!("round {round}"))?;
        open_everywhere(&cluster, "trading-1", CONTEXT, &sealed.acknowledged)
            .await
            .with_context(|| format!("round {round}"))?;
        // Repeats go through another node than the first attempts.
        let admin = cluster.client_on("admin", at(2))?;
        check_repeats(
            &cluster,
            CONTEXT,
            before[0],
            &rotated.acknowledged,
            &key("rotate", rotated.acknowledged.len()),
            async |key: &str| -> Result<u32, ClientError> {
                Ok(admin.rotate(CONTEXT, Some(key)).await?.version)
            },
        )
        .await?;
        check_repeats(
            &cluster,
            OTHER,
            before[1],
            &created.acknowledged,
            &key("create", created.acknowledged.len()),
            async |key: &str| -> Result<u32, ClientError> {
                Ok(admin.create_kek(&create, Some(key)).await?.version)
            },
        )
        .await?;
        all.extend(sealed.acknowledged);
    }
    open_everywhere(&cluster, "trading-1", CONTEXT, &all).await?;
    cluster.passed();
    Ok(())
}

pub(crate) async fn a_node_that_was_away_serves_only_with_every_key() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let leader = cluster.leader().await?;
    let away = cluster.others(leader.node)[0].clone();
    away.kill().await?;
    // The first rotation waits until the silent member may be left out.
    let mut acknowledged = Vec::new();
    for _ in 0..2 {
        let client = cluster
            .client_on("admin", leader.node)?
            .with_retry(hsm_api::client::Retry::Until(Duration::from_secs(40)));
        client.rotate(CONTEXT, None).await?;
        acknowledged.push(seal(&cluster.client_on("trading-1", leader.node)?, CONTEXT, b"missed").await?);
    }
    cluster.start_node(away.number).await?;
    // From the moment it says that it is ready, it opens everything.
    away.wait_ready(ACKNOWLEDGED_WITHIN).await?;
    let client = cluster.client_on("trading-1", away.number)?;
    for sealed in &acknowledged {
        crate::common::open(&client, CONTEXT, sealed)
            .await
            .with_context(|| format!("version {}", sealed.version))?;
    }
    cluster.passed();
    Ok(())
}

pub(crate) async fn a_polite_stop_finishes_what_it_has_begun() -> Result<()> {
    // A notice that outlasts a moment in which the machine stands still.
    let cluster = formed_with(Playground::builder(), |config| {
        config.replace("notice_ms: 500", "notice_ms: 3000")
    })
    .await?;
    let leader = cluster.leader().await?;
    let node = cluster.others(leader.node)[0].clone();
    let client = cluster.client_on("trading-1", node.number)?;
    seal(&client, CONTEXT, b"before").await?;
    node.signal(Signal::SIGTERM)?;
    // While it says no to the balancer, it still says yes to whoever comes.
    let mut served = 0;
    while node.is_ready().await {
        seal(&client, CONTEXT, b"meanwhile").await?;
    }
    while node.health().get("/livez").await.is_ok() && served < 3 {
        seal(&client, CONTEXT, b"draining")
            .await
            .context("in the notice")?;
        served += 1;
    }
    ensure!(served > 0, "nothing was served after readiness had ended");
    node.wait_gone(ACKNOWLEDGED_WITHIN).await?;
    cluster.start_node(node.number).await?;
    node.wait_ready(ACKNOWLEDGED_WITHIN).await?;
    cluster.passed();
    Ok(())
}
