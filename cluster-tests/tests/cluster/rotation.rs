//! Rotation: one version a rotation, and never a ciphertext that a serving node cannot open.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::{Node, Playground, until};
use hsm_api::Client;
use hsm_api::data::{DecryptRequest, EncryptRequest};
use serde_json::Value;
use tokio::task::JoinSet;

use crate::common::{
    CONTEXT, check_settled, context_on, json, made, open_everywhere, open_everywhere_soon, seal, settled_on,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retried_rotate_makes_one_version() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let mut versions = Vec::new();
    for node in cluster.nodes() {
        let answer = cluster
            .client_on("admin", node.number)?
            .rotate(CONTEXT, Some("retried-key"))
            .await?;
        versions.push((answer.version, answer.previous_version));
    }
    assert_eq!(versions, [(2, 1), (2, 1), (2, 1)]);
    // The same key for another request is a mistake of the caller's.
    let create = hsm_api::admin::CreateKekRequest::new("order-key");
    let admin = cluster.client("admin")?;
    admin.create_kek(&create, Some("create-key")).await?;
    let other = hsm_api::admin::CreateKekRequest {
        version: Some(9),
        ..create
    };
    let refused = admin
        .create_kek(&other, Some("create-key"))
        .await
        .err()
        .and_then(|error| error.code());
    assert_eq!(refused, Some(hsm_api::ErrorCode::IdempotencyKeyReused));
    settled_on(&cluster, 1, CONTEXT, 2).await?;
    every_context_is_rotated_once(&cluster).await?;
    cluster.passed();
    Ok(())
}

/// By one command, whatever it is called and however often it is sent under its key.
async fn every_context_is_rotated_once(cluster: &Playground) -> Result<()> {
    // Whichever node is asked knows of the last one's first key.
    for node in cluster.nodes() {
        settled_on(cluster, node.number, "order-key", 1).await?;
    }
    let rotated = async |args: &[&str]| -> Result<Vec<String>> {
        let args = [args, &["--idempotency-key", "all-of-them", "-o", "json"]].concat();
        let answer = json(&cluster.hsmctl(&args).await?.ok()?)?;
        let turns = answer["contexts"].as_array().context("no contexts")?;
        ensure!(answer["index"].is_string(), "{answer}");
        let shown = |turn: &Value| {
            let word = |name: &str| turn[name].as_str().unwrap_or_default().to_owned();
            format!("{} {} {}", word("context"), word("outcome"), turn["version"])
        };
        Ok(turns.iter().map(shown).collect())
    };
    let expected = ["2fa rotated 2", "exchange-key rotated 3", "order-key rotated 2"];
    let names = [&["rotate", "--all"][..], &["cluster", "rotate", "--all"]];
    for args in names {
        assert_eq!(rotated(args).await?, expected);
    }
    // Of one slot, in the same requests.
    let slot = ["cluster", "rotate", "--slot", "exchange"];
    assert_eq!(rotated(&slot).await?, expected[1..]);
    settled_on(cluster, 2, CONTEXT, 3).await?;
    let nobody = cluster.hsmctl(&["rotate", "--slot", "no-such"]).await?;
    ensure!(
        nobody.code == Some(4) && nobody.stderr.contains("no context of slot no-such"),
        "{nobody:?}"
    );
    let may_not = cluster.hsmctl_as("auditor", &["rotate", "--all"], &[]).await?;
    let text = String::from_utf8_lossy(&may_not.stdout).into_owned();
    ensure!(
        may_not.code == Some(3) && text.matches("role_required").count() == expected.len(),
        "{may_not:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_rotates_at_once_never_share_a_number() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let mut before = check_settled(&context_on(&cluster, 1, CONTEXT).await?)?;
    for round in 0..5_u32 {
        let (one, two) = (cluster.client_on("admin", 1)?, cluster.client_on("admin", 2)?);
        let (one, two) = tokio::join!(one.rotate(CONTEXT, None), two.rotate(CONTEXT, None));
        let mut versions: Vec<u32> = [&one, &two]
            .into_iter()
            .filter_map(|outcome| outcome.as_ref().ok().map(|answer| answer.version))
            .collect();
        versions.sort_unstable();
        let one_won = versions == [before + 1];
        let both_won = versions == [before + 1, before + 2];
        ensure!(
            one_won || both_won,
            "round {round}: from {before} to {versions:?} ({one:?}, {two:?})"
        );
        before = versions.last().copied().unwrap_or(before);
        settled_on(&cluster, 3, CONTEXT, before).await?;
    }
    cluster.passed();
    Ok(())
}

/// Pairs at a time.
const AT_ONCE: usize = 16;
/// Pairs that count, after each rotation.
const PAIRS: usize = 1000;
/// For all of them.
const PAIRED_WITHIN: Duration = Duration::from_secs(120);
/// `cluster.fence_after_ms`: a member that has been silent for longer holds up no rotation.
const FENCE_AFTER: Duration = Duration::from_secs(8);

/// Workers that encrypt here and decrypt there, over some nodes, each request sent once.
struct Pairs {
    shared: Arc<Shared>,
    workers: JoinSet<Result<()>>,
}

struct Shared {
    clients: Vec<(u32, Client)>,
    /// Whether a pair that is begun now counts.
    rotated: AtomicBool,
    made: AtomicUsize,
    counted: AtomicUsize,
}

impl Pairs {
    /// Starts them; returns once pairs are made.
    async fn start(cluster: &Playground, nodes: &[Node]) -> Result<Self> {
        let clients = nodes
            .iter()
            .map(|node| Ok((node.number, cluster.client_on("trading-1", node.number)?)))
            .collect::<Result<Vec<_>>>()?;
        let shared = Arc::new(Shared {
            clients,
            rotated: AtomicBool::new(false),
            made: AtomicUsize::new(0),
            counted: AtomicUsize::new(0),
        });
        let mut workers = JoinSet::new();
        for worker in 0..AT_ONCE {
            workers.spawn(work(Arc::clone(&shared), worker));
        }
        let pairs = Self { shared, workers };
        until("pairs on their way", Duration::from_secs(60), async || {
            (pairs.shared.made.load(Ordering::SeqCst) >= AT_ONCE).then_some(())
        })
        .await?;
        Ok(pairs)
    }

    /// The rotation has returned: from here on pairs count. Until enough have been made.
    async fn count(mut self) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        shared.rotated.store(true, Ordering::SeqCst);
        let all = async {
            while let Some(ended) = self.workers.join_next().await {
                ended??;
            }
            anyhow::Ok(())
        };
        let outcome = tokio::time::timeout(PAIRED_WITHIN, all).await;
        let counted = shared.counted.load(Ordering::SeqCst);
        outcome.with_context(|| format!("{counted} pairs in {PAIRED_WITHIN:?}"))??;
        ensure!(counted >= PAIRS, "only {counted} pairs");
        Ok(())
    }
}

async fn work(shared: Arc<Shared>, worker: usize) -> Result<()> {
    let nodes = shared.clients.len();
    let mut newest = vec![0_u32; nodes];
    for turn in worker.. {
        if shared.counted.load(Ordering::SeqCst) >= PAIRS {
            break;
        }
        let counts = shared.rotated.load(Ordering::SeqCst);
        let here = turn % nodes;
        let there = (here + 1 + turn / nodes % (nodes - 1)) % nodes;
        let (number, client) = &shared.clients[here];
        let sealed = client
            .encrypt(&EncryptRequest::new(CONTEXT, b"pair"))
            .await
            .with_context(|| format!("encrypt on node {number}"))?;
        // A follower hears of the activation a moment later; no node ever goes back.
        ensure!(
            sealed.key_version >= newest[here],
            "node {number} encrypts under {} after {}",
            sealed.key_version,
            newest[here]
        );
        newest[here] = sealed.key_version;
        let (number, client) = &shared.clients[there];
        let opened = client
            .decrypt(&DecryptRequest::new(CONTEXT, sealed.ciphertext.clone()))
            .await
            .with_context(|| format!("decrypt version {} on node {number}", sealed.key_version))?;
        ensure!(
            opened.plaintext.as_slice() == b"pair",
            "node {number} decrypted to something else"
        );
        shared.made.fetch_add(1, Ordering::SeqCst);
        if counts {
            shared.counted.fetch_add(1, Ordering::SeqCst);
        }
    }
    Ok(())
}

/// Pairs are on their way when the rotation begins; those that are begun after it has returned are counted, and
/// none is refused.
async fn rotate_among_pairs(cluster: &Playground, ready: &[Node]) -> Result<()> {
    let pairs = Pairs::start(cluster, ready).await?;
    let admin = cluster.client_on("admin", ready[0].number)?;
    let version = admin.rotate(CONTEXT, None).await?.version;
    pairs
        .count()
        .await
        .with_context(|| format!("around version {version}"))?;
    for node in ready {
        let client = cluster.client_on("trading-1", node.number)?;
        let sealed = seal(&client, CONTEXT, b"after all pairs").await?;
        ensure!(
            sealed.version == version,
            "{} encrypts under {} instead of {version}",
            node.id(),
            sealed.version
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_rotation_a_thousand_pairs_meet_no_refusal() -> Result<()> {
    let cluster = Playground::start(3).await?;
    for round in 0..3 {
        rotate_among_pairs(&cluster, &cluster.nodes())
            .await
            .with_context(|| format!("round {round}"))?;
    }
    // With a node out for so long that nobody waits for it, the others are the ready ones.
    let leader = cluster.leader().await?;
    let out = cluster.others(leader.node)[0].clone();
    out.kill().await?;
    let on_leader = cluster.client_on("admin", leader.node)?;
    until("silence beyond the fence", FENCE_AFTER * 6, async || {
        let members = on_leader.members().await.ok()?.into_body().members;
        let member = members.iter().find(|member| member.node_id == out.id())?;
        (Duration::from_millis(member.last_seen_ms?) > FENCE_AFTER).then_some(())
    })
    .await?;
    rotate_among_pairs(&cluster, &cluster.others(out.number))
        .await
        .context("with a node out")?;
    let missed = seal(&cluster.client_on("trading-1", leader.node)?, CONTEXT, b"missed").await?;
    cluster.start_node(out.number).await?;
    cluster.wait_ready(&cluster.nodes()).await?;
    open_everywhere(&cluster, "trading-1", CONTEXT, &[missed]).await?;
    cluster.passed();
    Ok(())
}

/// Load goes on while versions come and go: not one request fails.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rotations_under_load_fail_no_request() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let load = cluster_tests::Load::start(&cluster)?;
    let begun = Instant::now();
    let mut rotations = 0_u32;
    while rotations < 15 || begun.elapsed() < Duration::from_secs(5) {
        cluster.client("admin")?.rotate(CONTEXT, None).await?;
        rotations += 1;
    }
    let report = load.stop().await;
    ensure!(
        report.failed == 0,
        "{} failures: {:#?}",
        report.failed,
        report.failures
    );
    ensure!(report.decrypted > 50, "hardly any load: {report:?}");
    let sealed = seal(&cluster.client("trading-1")?, CONTEXT, b"after").await?;
    open_everywhere_soon(&cluster, "trading-1", CONTEXT, &[sealed]).await?;
    let info = settled_on(&cluster, 1, CONTEXT, rotations + 1).await?;
    ensure!(made(&info) == info.versions.len(), "some were given up: {info:?}");
    cluster.passed();
    Ok(())
}
