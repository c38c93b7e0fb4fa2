//! A leader that is told to stop: it says so first, serves whoever comes, hands over, and ends well.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cluster_tests::{Load, Node, Playground, Stalls, until};
use nix::sys::wait::WaitStatus;

use crate::common::{CONTEXT, formed_with, open_everywhere, seal, settled_on};
use crate::failover::first_change;

/// `server.drain.notice_ms` of these nodes: it outlasts a moment in which the machine stands still.
const NOTICE: Duration = Duration::from_millis(2000);
/// With the playground's `timeout_ms`.
const DRAIN: Duration = Duration::from_millis(2000 + 3000);
/// What handing over may take, `docs/operations.md`.
const HANDING_OVER: Duration = Duration::from_secs(3);
/// And more of it with more than three voters: `election_max` and one tick of 1.5 heartbeats.
const SILENCE: Duration = Duration::from_millis(1200 + 300);
/// Noticing all that, on a busy machine.
const SLACK: Duration = Duration::from_secs(10);
/// A step of a hand-over has a second (`node/src/consensus/handover.rs`): a machine that stood still for longer than this
/// has no leader hand over.
const STOOD_STILL: Duration = Duration::from_millis(400);
/// Stops that are tried until the machine lets one be.
const ROUNDS: usize = 3;
/// By itself no voter stands for election sooner after the old leader's end: its last frame is at most a heartbeat
/// older, and its lease, `election_max`, and an election time-out, at least `election_min`, have to pass.
const UNASKED: Duration = Duration::from_millis(1200 + 800 - 200);

/// Until `/readyz` says no, which has to come before anything else ends.
async fn wait_notice(node: &Node, signalled: Instant, stalls: &Stalls) -> Result<()> {
    loop {
        let answer = node.patient().get("/readyz").await;
        match answer
            .context("it went before it said that it was not ready")?
            .status
        {
            503 => return Ok(()),
            200 => {
                let took = stalls.running_since(signalled);
                ensure!(took < NOTICE, "ready {took:?} after SIGTERM");
            }
            status => bail!("/readyz is {status}"),
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

async fn hands_over(voters: u32) -> Result<()> {
    for _ in 0..ROUNDS {
        if is_handed_over(voters).await? {
            return Ok(());
        }
        println!("not handed over by a machine that stood still");
    }
    bail!("the machine stood still in each of {ROUNDS} hand-overs: run it again where less else runs")
}

/// A balancer that looks at `/readyz`, and administrators who change things one after the other. False if the leader went
/// without handing over, as it may if the machine stands still; everything else holds all the same.
async fn is_handed_over(voters: u32) -> Result<bool> {
    // Nodes are children of a program that has ended: they become this process's, which may then ask how they
    // ended.
    nix::sys::prctl::set_child_subreaper(true)?;
    let cluster = formed_with(Playground::builder().nodes(voters), |config| {
        config.replace("notice_ms: 500", &format!("notice_ms: {}", NOTICE.as_millis()))
    })
    .await?;
    let stalls = Stalls::watch()?;
    let before = cluster.leader().await?;
    let node = cluster.node(before.node);
    let survivors = cluster.others(before.node);
    let load = Load::start(&cluster)?;
    let going_on = Arc::new(AtomicBool::new(true));
    let rotations = {
        let (going_on, client) = (Arc::clone(&going_on), cluster.client_on("admin", before.node)?);
        tokio::spawn(async move {
            let mut versions = Vec::new();
            while going_on.load(Ordering::Relaxed) {
                versions.push(client.rotate(CONTEXT, None).await?.version);
            }
            anyhow::Ok(versions)
        })
    };
    until("load", Duration::from_secs(60), async || {
        (load.so_far().decrypted > 100).then_some(())
    })
    .await?;

    let signalled = Instant::now();
    node.signal(nix::sys::signal::Signal::SIGTERM)?;
    wait_notice(&node, signalled, &stalls).await?;
    // The balancer sends nothing more, and whoever is not told yet is served.
    let late = seal(&cluster.client_on("trading-1", before.node)?, CONTEXT, b"late").await?;
    load.pause(before.node).await;
    going_on.store(false, Ordering::Relaxed);
    let silence = if voters > 3 { SILENCE } else { Duration::ZERO };
    let ended = async {
        let status = node.wait_ended(DRAIN + HANDING_OVER + silence + SLACK).await?;
        anyhow::Ok((status, Instant::now()))
    };
    let led = async {
        let next = cluster.leader_among(&survivors).await?;
        anyhow::Ok((next, Instant::now()))
    };
    let (ended, led) = tokio::join!(ended, led);
    let ((status, ended), (next, led)) = (ended?, led?);
    let without = led
        .saturating_duration_since(ended)
        .saturating_sub(stalls.between(ended, led));
    println!(
        "gone {:?} after SIGTERM; without a leader for {without:?}",
        ended - signalled
    );
    ensure!(
        matches!(status, WaitStatus::Exited(_, 0)),
        "it ended with {status:?}"
    );
    let handed_over = node.log().contains("leadership handed over");
    ensure!(
        handed_over || stalls.between(signalled, ended) > STOOD_STILL,
        "it did not hand over"
    );
    ensure!(
        next.node != before.node && next.term > before.term,
        "{next:?} after {before:?}"
    );
    let asked = Instant::now();
    first_change(&cluster, &survivors, asked).await?;
    let took = stalls.running_since(asked);
    if handed_over {
        ensure!(without < UNASKED, "no leader for {without:?} after the old one");
        ensure!(took < UNASKED, "a change took {took:?}");
    }

    // What was on its way was answered, every time, and stands.
    let versions = rotations.await?.context("a rotation on its way")?;
    let newest = versions.iter().copied().max();
    let newest = newest.context("no rotation was acknowledged")?;
    let info = settled_on(&cluster, next.node, CONTEXT, newest).await?;
    let known = |version: &u32| info.versions.iter().any(|held| held.version == *version);
    ensure!(
        versions.iter().all(known),
        "acknowledged: {versions:?}, there: {info:?}"
    );
    let report = load.stop().await;
    ensure!(
        report.failed == 0,
        "{} failures: {:#?}",
        report.failed,
        report.failures
    );
    cluster.start_node(before.node).await?;
    node.wait_ready(Duration::from_secs(60)).await?;
    open_everywhere(&cluster, "trading-1", CONTEXT, &[late]).await?;
    cluster.passed();
    Ok(handed_over)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminated_leader_hands_over() -> Result<()> {
    hands_over(3).await
}

/// Here the candidate needs votes of nodes that still wait for their leader: it has to be silent first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminated_leader_of_five_hands_over() -> Result<()> {
    hands_over(5).await
}
