//! A node that is told to stop while a call hangs in one of its tokens: nothing makes that call come back, and the
//! node ends all the same.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use cluster_tests::{Playground, Stalls, until};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

use crate::common::{CONTEXT, handed_over_first, open, seal};
use crate::failover::first_change;
use crate::hung_token::hold;
use crate::pkcs11::token_folder;

/// A known-answer test meets the hang after seconds, and is given up after six more.
const GIVEN_UP_WITHIN: Duration = Duration::from_secs(60);
/// `server.drain` of the playground: `notice_ms` and `timeout_ms`.
const DRAIN: Duration = Duration::from_millis(500 + 3000);
/// A step of a hand-over has a second: a machine that stood still for longer than this has no leader hand over.
const STOOD_STILL: Duration = Duration::from_millis(400);
/// Handing over, what threads that still work get, and a busy machine.
const SLACK: Duration = Duration::from_secs(15);

pub(crate) async fn a_hanging_token_keeps_no_leader_from_ending() -> Result<()> {
    // Nodes become this process's children, which may then ask how they ended.
    nix::sys::prctl::set_child_subreaper(true)?;
    let cluster = Playground::start(3).await?;
    let leader = cluster.leader().await?;
    let (node, survivors) = (cluster.node(leader.node), cluster.others(leader.node));
    let sealed = seal(&cluster.client_on("trading-1", leader.node)?, CONTEXT, b"before").await?;
    let generation = token_folder(&node.dir.join("tokens"), "slot-exchange")?.join("generation");
    let held = until("the token's lock", GIVEN_UP_WITHIN, async || {
        hold(&generation).transpose()
    })
    .await??;
    until("the hang to be noticed", GIVEN_UP_WITHIN, async || {
        (!node.is_ready().await).then_some(())
    })
    .await?;

    let stalls = Stalls::watch()?;
    let signalled = Instant::now();
    node.signal(Signal::SIGTERM)?;
    let status = node.wait_ended(DRAIN + SLACK).await?;
    let stood_still = stalls.between(signalled, Instant::now());
    println!(
        "gone {:?} after SIGTERM, of which the machine stood still for {stood_still:?}",
        signalled.elapsed()
    );
    ensure!(
        matches!(status, WaitStatus::Exited(_, 0)),
        "it ended with {status:?}"
    );
    ensure!(
        handed_over_first(&node.log()) || stood_still > STOOD_STILL,
        "it did not hand over before it drained"
    );
    first_change(&cluster, &survivors, Instant::now()).await?;
    for other in &survivors {
        open(&cluster.client_on("trading-1", other.number)?, CONTEXT, &sealed).await?;
    }
    drop(held);
    cluster.start_node(leader.node).await?;
    node.wait_ready(Duration::from_secs(60)).await?;
    cluster.passed();
    Ok(())
}
