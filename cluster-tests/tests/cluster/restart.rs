//! The whole cluster dies and comes back; a single node comes back to what it missed.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::Playground;
use nix::sys::signal::Signal;

use crate::common::{CONTEXT, check_settled, context_on, open_everywhere, seal, settled_on};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_cluster_killed_at_once_has_lost_nothing() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let mut acknowledged = Vec::new();
    for round in 0..3_u32 {
        for node in cluster.nodes() {
            let client = cluster.client_on("trading-1", node.number)?;
            for _ in 0..5 {
                acknowledged.push(seal(&client, CONTEXT, format!("round {round}").as_bytes()).await?);
            }
        }
        let version = cluster
            .client("admin")?
            .rotate(CONTEXT, Some(&format!("round-{round}")))
            .await?
            .version;
        let before = settled_on(&cluster, 1, CONTEXT, version).await?;
        // All signals before any of them is looked at again.
        for node in cluster.nodes() {
            ensure!(node.signal(Signal::SIGKILL)?, "{} did not run", node.id());
        }
        for node in cluster.nodes() {
            node.wait_gone(Duration::from_secs(10)).await?;
        }
        cluster.up().await?;
        for node in cluster.nodes() {
            let after = context_on(&cluster, node.number, CONTEXT).await?;
            ensure!(
                check_settled(&after)? == version,
                "{} has version {:?} active",
                node.id(),
                after.active_version
            );
            let versions = |info: &hsm_api::admin::ContextInfo| {
                info.versions
                    .iter()
                    .map(|v| (v.version, v.key_uid.clone(), v.state))
                    .collect::<Vec<_>>()
            };
            ensure!(
                versions(&after) == versions(&before),
                "{}: {after:?} instead of {before:?}",
                node.id()
            );
        }
        open_everywhere(&cluster, "trading-1", CONTEXT, &acknowledged).await?;
        // What was answered before the kill is answered again, and not done again.
        let again = cluster
            .client("admin")?
            .rotate(CONTEXT, Some(&format!("round-{round}")))
            .await?;
        ensure!(
            again.version == version,
            "a repeated rotate made version {}",
            again.version
        );
    }
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_away_serves_only_with_every_key() -> Result<()> {
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
    away.wait_ready(Duration::from_secs(30)).await?;
    let client = cluster.client_on("trading-1", away.number)?;
    for sealed in &acknowledged {
        crate::common::open(&client, CONTEXT, sealed)
            .await
            .with_context(|| format!("version {}", sealed.version))?;
    }
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_polite_stop_finishes_what_it_has_begun() -> Result<()> {
    let cluster = Playground::start(3).await?;
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
    node.wait_gone(Duration::from_secs(20)).await?;
    cluster.start_node(node.number).await?;
    node.wait_ready(Duration::from_secs(30)).await?;
    cluster.passed();
    Ok(())
}
