//! Cut links: an isolated leader changes nothing, whoever hears no quorum leaves readiness within its bound,
//! and nobody becomes ready alone.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::{Node, Playground, until};
use hsm_api::ErrorCode;

use crate::common::{CONTEXT, check_settled, context_on, open_everywhere, seal};

/// `staleness.ready_ms`, and what noticing may add on a busy machine.
const STALE_WITHIN: Duration = Duration::from_millis(5000 + 1500);

async fn last_log(node: &Node) -> Result<f64> {
    node.metrics()
        .await?
        .sum("hsm_raft_last_log_index")
        .context("no last log index")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_isolated_leader_appends_next_to_nothing() -> Result<()> {
    let cluster = Playground::builder().relayed().start().await?;
    let leader = cluster.leader().await?;
    let node = cluster.node(leader.node);
    let before = last_log(&node).await?;
    cluster.relays()?.isolate(leader.node);

    // Retried rotates for a minute, four at a time.
    let until_then = Instant::now() + Duration::from_secs(60);
    let workers: Vec<_> = (0..4)
        .map(|_| {
            let client = cluster.client_on("admin", leader.node);
            tokio::spawn(async move {
                let client = client?;
                let mut codes = Vec::new();
                while Instant::now() < until_then {
                    match client.rotate(CONTEXT, None).await {
                        Ok(answer) => {
                            anyhow::bail!("an isolated leader activated version {}", answer.version)
                        }
                        Err(error) => codes.push(error.code()),
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Ok(codes)
            })
        })
        .collect();
    // Meanwhile the others have a leader of their own, and can change things.
    let others = cluster.others(leader.node);
    let next = cluster.leader_among(&others).await?;
    ensure!(
        next.node != leader.node && next.term > leader.term,
        "{next:?} after {leader:?}"
    );
    let mut codes = Vec::new();
    for worker in workers {
        codes.extend(worker.await??);
    }
    ensure!(
        codes.contains(&Some(ErrorCode::NoQuorum)),
        "never no_quorum: {codes:?}"
    );
    let grown = last_log(&node).await? - before;
    ensure!(
        grown < 100.0,
        "the log of an isolated leader grew by {grown} entries"
    );
    ensure!(!node.is_ready().await, "an isolated leader is ready");

    cluster.relays()?.heal();
    cluster.wait_ready(&cluster.nodes()).await?;
    let settled = until("one active version", Duration::from_secs(20), async || {
        check_settled(&context_on(&cluster, leader.node, CONTEXT).await.ok()?).ok()
    });
    settled.await?;
    let sealed = seal(&cluster.client("trading-1")?, CONTEXT, b"healed").await?;
    open_everywhere(&cluster, "trading-1", CONTEXT, &[sealed]).await?;
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_restarted_in_isolation_is_never_ready() -> Result<()> {
    let cluster = Playground::builder().relayed().start().await?;
    let leader = cluster.leader().await?;
    let node = cluster.others(leader.node)[0].clone();
    cluster.relays()?.isolate(node.number);
    node.kill().await?;
    cluster.start_node(node.number).await?;
    let until_then = Instant::now() + Duration::from_secs(15);
    let client = cluster.client_on("trading-1", node.number)?;
    while Instant::now() < until_then {
        for path in ["/readyz", "/readyz?stale=ok", "/readyz?slot=exchange"] {
            let answer = node.health().get(path).await?;
            ensure!(answer.status == 503, "{path} is {} in isolation", answer.status);
        }
        ensure!(
            seal(&client, CONTEXT, b"x").await.is_err(),
            "it encrypts in isolation"
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    // A version it cannot know of, and then the way back: through the start gate, with every key.
    let version = cluster
        .client_on("admin", leader.node)?
        .rotate(CONTEXT, None)
        .await?
        .version;
    cluster.relays()?.heal();
    node.wait_ready(Duration::from_secs(30)).await?;
    let sealed = seal(&client, CONTEXT, b"back").await?;
    ensure!(
        sealed.version == version,
        "it encrypts under version {}",
        sealed.version
    );
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_minority_of_five_is_stale_in_time_and_still_answers() -> Result<()> {
    let cluster = Playground::builder().nodes(5).relayed().start().await?;
    let leader = cluster.leader().await?;
    let follower = cluster.others(leader.node)[0].number;
    let minority = [cluster.node(leader.node), cluster.node(follower)];
    let sealed = seal(&cluster.client("trading-1")?, CONTEXT, b"before").await?;

    let cut = Instant::now();
    cluster.relays()?.separate(&[leader.node, follower]);
    // The two still hear each other: a leader's frames alone make nobody fresh.
    for node in &minority {
        until("it leaves readiness", STALE_WITHIN, async || {
            (!node.is_ready().await).then_some(())
        })
        .await
        .with_context(|| node.id())?;
        ensure!(
            cut.elapsed() <= STALE_WITHIN,
            "{} left readiness after {:?}",
            node.id(),
            cut.elapsed()
        );
    }
    for node in &minority {
        // Out of the balancer, and yet the application that reaches it is served.
        assert_eq!(
            node.health().get("/readyz?stale=ok").await?.status,
            200,
            "{}",
            node.checks().await
        );
        let client = cluster.client_on("trading-1", node.number)?;
        crate::common::open(&client, CONTEXT, &sealed)
            .await
            .with_context(|| node.id())?;
        seal(&client, CONTEXT, b"while stale")
            .await
            .with_context(|| node.id())?;
    }
    let majority: Vec<Node> = cluster
        .nodes()
        .into_iter()
        .filter(|node| minority.iter().all(|other| other.number != node.number))
        .collect();
    let next = cluster.leader_among(&majority).await?;
    ensure!(next.term > leader.term, "{next:?} after {leader:?}");
    cluster.wait_ready(&majority).await?;
    cluster.relays()?.heal();
    cluster.wait_ready(&cluster.nodes()).await?;
    cluster.passed();
    Ok(())
}
