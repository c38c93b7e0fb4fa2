//! The leader dies, again and again: changes are back within seconds, nothing acknowledged is lost, and on the
//! survivors no application notices anything. A leader that is told to stop hands over first.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cluster_tests::{Load, Node, Playground, until};
use hsm_api::admin::{JoinTokenRequest, KeyState};
use hsm_api::client::Retry;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::common::{CONTEXT, Sealed, context_on, open, open_everywhere, seal, settled_on};

/// How many kills in a run of all tests; `HSM_LEADER_KILLS` names another number. A hundred take six minutes.
const KILLS: usize = 20;
/// At the 99th percentile.
const BACK_WITHIN: Duration = Duration::from_secs(4);
const GIVE_UP: Duration = Duration::from_secs(30);

/// A change that needs only Raft: answered once it is committed.
async fn first_change(cluster: &Playground, survivors: &[Node], since: Instant) -> Result<Duration> {
    let clients = survivors
        .iter()
        .map(|node| cluster.client_on("admin", node.number))
        .collect::<Result<Vec<_>>>()?;
    let request = JoinTokenRequest {
        ttl_seconds: Some(60),
        node_id: None,
    };
    let mut last = None;
    for client in clients.iter().cycle() {
        match client.create_join_token(&request).await {
            Ok(_) => return Ok(since.elapsed()),
            Err(error) => last = Some(error),
        }
        if since.elapsed() > GIVE_UP {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Err(anyhow::anyhow!("no change after {GIVE_UP:?}: {last:?}"))
}

fn kills() -> Result<usize> {
    match std::env::var("HSM_LEADER_KILLS") {
        Ok(text) => text.parse().context("HSM_LEADER_KILLS"),
        Err(_) => Ok(KILLS),
    }
}

/// What was acknowledged, and has to be there at the end.
#[derive(Default)]
struct Acknowledged {
    versions: Vec<u32>,
    sealed: Vec<Sealed>,
}

impl Acknowledged {
    fn count(&self) -> usize {
        self.versions.len() + self.sealed.len()
    }

    /// What one node does not have, or cannot open.
    async fn lost_on(&self, cluster: &Playground, number: u32) -> Result<Vec<String>> {
        let info = context_on(cluster, number, CONTEXT).await?;
        let holds = |version: &u32| {
            info.versions.iter().any(|held| {
                held.version == *version && matches!(held.state, KeyState::Active | KeyState::DecryptOnly)
            })
        };
        let missing = self.versions.iter().filter(|version| !holds(version));
        let mut lost: Vec<String> = missing
            .map(|version| format!("version {version} on node {number}"))
            .collect();
        let client = cluster.client_on("trading-1", number)?;
        for sealed in &self.sealed {
            if let Err(error) = open(&client, CONTEXT, sealed).await {
                lost.push(format!(
                    "a ciphertext of version {} on node {number}: {error:#}",
                    sealed.version
                ));
            }
        }
        Ok(lost)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaders_die_and_only_changes_wait_a_little() -> Result<()> {
    let kills = kills()?;
    let cluster = Playground::start(3).await?;
    let load = Load::start(&cluster)?;
    let mut times = Vec::with_capacity(kills);
    let mut acknowledged = Acknowledged::default();
    while times.len() < kills {
        let before = cluster.leader().await?;
        let survivors = cluster.others(before.node);
        // What was sent to the leader itself may fail with it; nothing else may.
        load.pause(before.node).await;
        let own = cluster.client_on("trading-1", before.node)?;
        acknowledged
            .sealed
            .push(seal(&own, CONTEXT, b"by the leader").await?);
        let killed = Instant::now();
        cluster.node(before.node).kill().await?;
        let took = first_change(&cluster, &survivors, killed).await?;
        let after = cluster.leader_among(&survivors).await?;
        // A kill counts only if another node has committed in a higher term.
        if after.node != before.node && after.term > before.term {
            times.push(took);
        }
        cluster.start_node(before.node).await?;
        // A rotation needs the node that comes back: both at once, and the next kill right after it.
        let admin = cluster
            .client_on("admin", after.node)?
            .with_retry(Retry::Until(GIVE_UP));
        let back = [cluster.node(before.node)];
        let (ready, rotated) = tokio::join!(cluster.wait_ready(&back), admin.rotate(CONTEXT, None));
        ready?;
        acknowledged.versions.push(rotated?.version);
        load.resume(before.node).await;
        let so_far = load.so_far();
        ensure!(so_far.failed == 0, "kill {}: {:#?}", times.len(), so_far.failures);
    }
    let report = load.stop().await;
    let mut lost = Vec::new();
    for node in cluster.nodes() {
        lost.extend(acknowledged.lost_on(&cluster, node.number).await?);
    }
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() * percent).div_ceil(100).saturating_sub(1)];
    println!(
        "{} leader kills: writes back p50 {:?}, p99 {:?}, max {:?}; {} acknowledged, {} lost; meanwhile {} \
         encryptions and {} decryptions, {} failed",
        times.len(),
        at(50),
        at(99),
        at(100),
        acknowledged.count(),
        lost.len(),
        report.encrypted,
        report.decrypted,
        report.failed
    );
    ensure!(lost.is_empty(), "acknowledged and lost: {lost:#?}");
    ensure!(
        report.failed == 0,
        "{} failures: {:#?}",
        report.failed,
        report.failures
    );
    ensure!(
        report.decrypted as usize > kills * 10,
        "hardly any load: {report:?}"
    );
    ensure!(at(99) <= BACK_WITHIN, "p99 is {:?}: {times:?}", at(99));
    cluster.passed();
    Ok(())
}

/// A stopped leader is worse than a dead one: it holds its connections, and comes back with its old term.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_hangs_is_replaced_and_steps_down() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let before = cluster.leader().await?;
    let survivors = cluster.others(before.node);
    let stopped = Instant::now();
    cluster.node(before.node).signal(Signal::SIGSTOP)?;
    let took = first_change(&cluster, &survivors, stopped).await?;
    // The call that was on its way to it ends by the deadline of forwarding.
    ensure!(took < Duration::from_secs(16), "took {took:?}");
    let after = cluster.leader_among(&survivors).await?;
    ensure!(
        after.node != before.node && after.term > before.term,
        "{after:?} after {before:?}"
    );
    cluster.node(before.node).signal(Signal::SIGCONT)?;
    cluster.wait_ready(&cluster.nodes()).await?;
    let now = cluster.leader().await?;
    ensure!(now.term >= after.term, "{now:?} after {after:?}");
    cluster.passed();
    Ok(())
}

/// `server.drain` of the playground: `notice_ms` and `timeout_ms`.
const NOTICE: Duration = Duration::from_millis(500);
const DRAIN: Duration = Duration::from_millis(500 + 3000);
/// What handing over and ending may add.
const SLACK: Duration = Duration::from_millis(2500);
/// Between the old leader's end and a new one; an election without a hand-over takes twice as long.
const HANDED_OVER_WITHIN: Duration = Duration::from_secs(1);

/// Until `/readyz` says no, which has to come before anything else ends.
async fn wait_notice(node: &Node, signalled: Instant) -> Result<()> {
    loop {
        let answer = node.health().get("/readyz").await;
        match answer
            .context("it went before it said that it was not ready")?
            .status
        {
            503 => return Ok(()),
            200 => ensure!(
                signalled.elapsed() < NOTICE,
                "ready {:?} after SIGTERM",
                signalled.elapsed()
            ),
            status => bail!("/readyz is {status}"),
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A balancer that looks at `/readyz`, and administrators who change things one after the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminated_leader_hands_over() -> Result<()> {
    // Nodes are children of a program that has ended: they become this process's, which may then ask how they
    // ended.
    nix::sys::prctl::set_child_subreaper(true)?;
    let cluster = Playground::start(3).await?;
    let before = cluster.leader().await?;
    let node = cluster.node(before.node);
    let survivors = cluster.others(before.node);
    let pid = Pid::from_raw(node.pid().context("the leader does not run")?);
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
    until("load", Duration::from_secs(20), async || {
        (load.so_far().decrypted > 100).then_some(())
    })
    .await?;

    let signalled = Instant::now();
    node.signal(Signal::SIGTERM)?;
    wait_notice(&node, signalled).await?;
    // The balancer sends nothing more, and whoever is not told yet is served.
    let late = seal(&cluster.client_on("trading-1", before.node)?, CONTEXT, b"late").await?;
    load.pause(before.node).await;
    going_on.store(false, Ordering::Relaxed);
    let ended = async {
        node.wait_gone(DRAIN + SLACK).await?;
        anyhow::Ok(Instant::now())
    };
    let led = async {
        let next = cluster.leader_among(&survivors).await?;
        anyhow::Ok((next, Instant::now()))
    };
    let (ended, led) = tokio::join!(ended, led);
    let (ended, (next, led)) = (ended?, led?);
    let without = led.saturating_duration_since(ended);
    println!(
        "gone {:?} after SIGTERM; without a leader for {without:?}",
        ended - signalled
    );
    ensure!(
        next.node != before.node && next.term > before.term,
        "{next:?} after {before:?}"
    );
    ensure!(
        without <= HANDED_OVER_WITHIN,
        "no leader for {without:?} after the old one"
    );
    let status = waitpid(pid, Some(WaitPidFlag::WNOHANG)).context("how the leader ended")?;
    ensure!(status == WaitStatus::Exited(pid, 0), "it ended with {status:?}");
    let took = first_change(&cluster, &survivors, Instant::now()).await?;
    ensure!(took < HANDED_OVER_WITHIN, "a change took {took:?}");

    // What was on its way was answered, every time, and stands.
    let versions = rotations.await?.context("a rotation on its way")?;
    let newest = versions
        .iter()
        .copied()
        .max()
        .context("no rotation was acknowledged")?;
    let info = settled_on(&cluster, next.node, CONTEXT, newest).await?;
    let known = |version: &u32| info.versions.iter().any(|held| held.version == *version);
    ensure!(
        !versions.is_empty() && versions.iter().all(known),
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
    node.wait_ready(Duration::from_secs(30)).await?;
    open_everywhere(&cluster, "trading-1", CONTEXT, &[late]).await?;
    cluster.passed();
    Ok(())
}
