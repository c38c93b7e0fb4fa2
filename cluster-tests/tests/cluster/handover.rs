//! A leader that is told to stop: it says so first, ends what it has in hand, hands over, serves whoever still comes, and ends
//! well.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
#[cfg(feature = "failpoints")]
use cluster_tests::failpoints::{PREPARED, arm};
use cluster_tests::{Load, Node, Playground, Stalls, http1, until};
use nix::sys::wait::WaitStatus;

use crate::common::{CONTEXT, formed_with, handed_over_first, open_everywhere, seal, settled_on};
#[cfg(feature = "failpoints")]
use crate::common::{context_on, made};
use crate::failover::first_change;

/// `server.drain.notice_ms` of these nodes, which begins again when leadership is handed over: it outlasts a change that is made
/// through the node then, and a moment in which the machine stands still.
const NOTICE: Duration = Duration::from_millis(4000);
/// With the playground's `timeout_ms`.
const DRAIN: Duration = Duration::from_millis(4000 + 3000);
/// What handing over takes where nothing goes wrong, and nobody has to be silent before.
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
/// By itself no voter stands for election sooner after it has last heard from its leader: the lease, `election_max`, and an
/// election time-out, at least `election_min`, have to pass, and the last frame is at most a heartbeat older.
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
/// without handing over first, as it may if the machine stands still; everything else holds all the same.
async fn is_handed_over(voters: u32) -> Result<bool> {
    // Nodes are children of a program that has ended: they become this process's, which may then ask how they
    // ended. For good, and for every other test of it: nextest gives each a process of its own.
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
    let acknowledged = Arc::new(AtomicUsize::new(0));
    let rotations = {
        let client = cluster.client_on("admin", before.node)?;
        let (going_on, acknowledged) = (Arc::clone(&going_on), Arc::clone(&acknowledged));
        tokio::spawn(async move {
            let mut versions = Vec::new();
            while going_on.load(Ordering::Relaxed) {
                versions.push(client.rotate(CONTEXT, None).await?.version);
                acknowledged.fetch_add(1, Ordering::Relaxed);
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
    let next = cluster.leader_among(&survivors).await?;
    println!(
        "{} leads {:?} after SIGTERM",
        cluster.node(next.node).id(),
        signalled.elapsed()
    );
    // It tries again, and has begun to drain by then.
    if node.log().contains("leadership not handed over yet") {
        ensure!(
            stalls.between(signalled, Instant::now()) > STOOD_STILL,
            "it did not hand over at once"
        );
        return Ok(false);
    }
    // The balancer sends nothing more, and whoever is not told yet is served: two further changes, of which one began
    // after it, and a request on a new connection.
    let by_then = acknowledged.load(Ordering::Relaxed);
    until("changes through the node that led", NOTICE, async || {
        let ended = rotations.is_finished();
        (ended || acknowledged.load(Ordering::Relaxed) >= by_then + 2).then_some(())
    })
    .await?;
    let late = seal(&cluster.client_on("trading-1", before.node)?, CONTEXT, b"late").await?;
    load.pause(before.node).await;
    going_on.store(false, Ordering::Relaxed);
    let silence = if voters > 3 { SILENCE } else { Duration::ZERO };
    let status = node.wait_ended(HANDING_OVER + silence + DRAIN + SLACK).await?;
    let ended = Instant::now();
    println!("gone {:?} after SIGTERM", ended - signalled);
    ensure!(
        matches!(status, WaitStatus::Exited(_, 0)),
        "it ended with {status:?}"
    );
    let handed_over = handed_over_first(&node.log());
    ensure!(
        handed_over || stalls.between(signalled, ended) > STOOD_STILL,
        "it did not hand over before it drained"
    );
    ensure!(
        next.node != before.node && next.term > before.term,
        "{next:?} after {before:?}"
    );
    let asked = Instant::now();
    first_change(&cluster, &survivors, asked).await?;
    let took = stalls.running_since(asked);
    ensure!(!handed_over || took < UNASKED, "a change took {took:?}");

    // What was on its way was answered, every time, and stands. Where nothing was handed over they went on until their
    // connection ended.
    if let Some(versions) = handed_over.then_some(rotations.await?) {
        let versions = versions.context("a rotation on its way")?;
        let newest = versions.iter().copied().max();
        let newest = newest.context("no rotation was acknowledged")?;
        let info = settled_on(&cluster, next.node, CONTEXT, newest).await?;
        let known = |version: &u32| info.versions.iter().any(|held| held.version == *version);
        ensure!(
            versions.iter().all(known),
            "acknowledged: {versions:?}, there: {info:?}"
        );
    }
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

/// For so long a rotation is in hand that a leader which stops waits for (`node/src/consensus/handover.rs`).
#[cfg(feature = "failpoints")]
const IN_HAND: Duration = Duration::from_millis(3200);
/// For so long it waits.
#[cfg(feature = "failpoints")]
const CALLS_END: Duration = Duration::from_secs(5);
/// For so long one is in hand that it does not wait for.
#[cfg(feature = "failpoints")]
const TOO_LONG: Duration = Duration::from_secs(9);
/// For an answer to a call that is sent once: longer than a node looks for a leader.
#[cfg(feature = "failpoints")]
const ANSWERED: Duration = Duration::from_secs(20);
/// Another context.
#[cfg(feature = "failpoints")]
const OTHER: &str = "2fa";

/// A rotation that is sent once.
#[cfg(feature = "failpoints")]
type Rotating = tokio::task::JoinHandle<Result<u32>>;

/// A cluster whose leader has been told to stop while it has a rotation in hand, by a caller who spoke to another node.
#[cfg(feature = "failpoints")]
struct InHand {
    cluster: Playground,
    /// The leader.
    node: Node,
    survivors: Vec<Node>,
    /// Versions of the context before.
    versions: usize,
    begun: Rotating,
    signalled: Instant,
}

#[cfg(feature = "failpoints")]
impl InHand {
    async fn of(time: Duration) -> Result<Self> {
        let cluster = Playground::start(3).await?;
        let before = cluster.leader().await?;
        let (node, survivors) = (cluster.node(before.node), cluster.others(before.node));
        let versions = made(&context_on(&cluster, before.node, CONTEXT).await?);
        arm(&node, PREPARED, &format!("1*sleep({})", time.as_millis())).await?;
        let begun = Self::rotate(&cluster, &survivors[0], CONTEXT)?;
        until("a rotation that has begun", SLACK, async || {
            let info = context_on(&cluster, before.node, CONTEXT).await.ok()?;
            (made(&info) > versions).then_some(())
        })
        .await?;
        let stalls = Stalls::watch()?;
        let signalled = Instant::now();
        node.signal(nix::sys::signal::Signal::SIGTERM)?;
        wait_notice(&node, signalled, &stalls).await?;
        ensure!(
            !node.log().contains("leadership handed over"),
            "it handed over before it said that it is not ready"
        );
        Ok(Self {
            cluster,
            node,
            survivors,
            versions,
            begun,
            signalled,
        })
    }

    fn rotate(cluster: &Playground, node: &Node, context: &'static str) -> Result<Rotating> {
        let pki = cluster.pki();
        let who = pki.identity("admin")?;
        let client = pki.client_waiting(ANSWERED, true, Some(&who), &[node.endpoint()])?;
        Ok(tokio::spawn(async move {
            Ok(client.rotate(context, None).await?.version)
        }))
    }
}

/// What a leader has begun before it is told to stop it ends, and only then another one leads; what comes meanwhile is the
/// next one's. Each caller asks once.
#[cfg(feature = "failpoints")]
pub(crate) async fn a_leader_that_stops_ends_the_calls_that_it_has_in_hand_before_another_leads() -> Result<()>
{
    let scene = InHand::of(IN_HAND).await?;
    let (cluster, node) = (&scene.cluster, &scene.node);
    let meanwhile = InHand::rotate(cluster, node, OTHER)?;
    let next = cluster.leader_among(&scene.survivors).await?;
    let led = scene.signalled.elapsed();
    let (begun, meanwhile) = (scene.begun.await??, meanwhile.await??);
    node.wait_gone(HANDING_OVER + DRAIN + SLACK).await?;
    println!("another led {led:?} after SIGTERM: {CONTEXT} has version {begun}, {OTHER} {meanwhile}");
    // Each was executed once, by whose turn it was.
    let said = node.log();
    ensure!(handed_over_first(&said), "it did not hand over before it drained");
    let (in_hand, _) = said.split_once("leadership handed over").unwrap_or_default();
    ensure!(rotations_led(in_hand, CONTEXT) == [true], "in hand:\n{in_hand}");
    ensure!(rotations_led(&said, OTHER).is_empty(), "held back:\n{said}");
    let took_over = cluster.node(next.node).log();
    ensure!(
        rotations_led(&took_over, CONTEXT).is_empty(),
        "repeated:\n{took_over}"
    );
    ensure!(
        rotations_led(&took_over, OTHER) == [true],
        "the next one's:\n{took_over}"
    );
    scene.cluster.passed();
    Ok(())
}

/// What takes longer than it waits is the next leader's to end: whoever asked once hears that it was done, and it was done once.
#[cfg(feature = "failpoints")]
pub(crate) async fn a_call_that_a_stopping_leader_does_not_wait_for_is_ended_by_the_next_one() -> Result<()> {
    let scene = InHand::of(TOO_LONG).await?;
    let (cluster, node) = (&scene.cluster, &scene.node);
    let next = cluster.leader_among(&scene.survivors).await?;
    let led = scene.signalled.elapsed();
    let begun = scene.begun.await??;
    let answered = scene.signalled.elapsed();
    node.wait_gone(HANDING_OVER + DRAIN + SLACK).await?;
    println!("another led {led:?} after SIGTERM, and answered with version {begun} after {answered:?}");
    ensure!(led >= CALLS_END, "it did not wait");
    ensure!(led < TOO_LONG - Duration::from_secs(1), "it waited for all of it");
    ensure!(
        handed_over_first(&node.log()),
        "it did not hand over before it drained"
    );
    let info = settled_on(cluster, next.node, CONTEXT, begun).await?;
    ensure!(made(&info) == scene.versions + 1, "{begun}: {info:?}");
    scene.cluster.passed();
    Ok(())
}

/// A node that stops takes over from nobody: the third one leads.
pub(crate) async fn a_leader_that_stops_together_with_a_follower_hands_over_to_the_third() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let before = cluster.leader().await?;
    let node = cluster.node(before.node);
    let mut others = cluster.others(before.node).into_iter();
    let (stops, third) = others.next().zip(others.next()).context("not three nodes")?;
    // Which keeps it until its time to drain is over.
    let who = cluster.pki().identity("trading-1")?;
    let idle = http1::Connection::open(&cluster.pki(), stops.api_port, &who).await?;
    let stalls = Stalls::watch()?;
    stops.signal(nix::sys::signal::Signal::SIGTERM)?;
    wait_notice(&stops, Instant::now(), &stalls).await?;
    let signalled = Instant::now();
    node.signal(nix::sys::signal::Signal::SIGTERM)?;
    let next = cluster.leader_among(std::slice::from_ref(&third)).await?;
    println!("{} leads {:?} after SIGTERM", third.id(), signalled.elapsed());
    ensure!(next.term > before.term, "{next:?} after {before:?}");
    node.wait_gone(HANDING_OVER + DRAIN + SLACK).await?;
    ensure!(
        handed_over_first(&node.log()) || stalls.between(signalled, Instant::now()) > STOOD_STILL,
        "it did not hand over before it drained"
    );
    drop(idle);
    stops.wait_gone(DRAIN + SLACK).await?;
    ensure!(
        !stops.log().contains("leadership handed over"),
        "it took over while it stopped"
    );
    for stopped in [&node, &stops] {
        cluster.start_node(stopped.number).await?;
    }
    cluster.wait_ready(&cluster.nodes()).await?;
    cluster.passed();
    Ok(())
}

/// Nobody takes over at first, and the leader drains meanwhile.
#[cfg(feature = "failpoints")]
pub(crate) async fn a_leader_that_could_not_hand_over_tries_again_while_it_drains() -> Result<()> {
    let cluster = formed_with(Playground::builder(), |config| {
        config.replace("timeout_ms: 3000", "timeout_ms: 120000")
    })
    .await?;
    let before = cluster.leader().await?;
    let (node, survivors) = (cluster.node(before.node), cluster.others(before.node));
    for other in &survivors {
        arm(other, "handover::stand", "return").await?;
    }
    // Which keeps it.
    let who = cluster.pki().identity("trading-1")?;
    let idle = http1::Connection::open(&cluster.pki(), node.api_port, &who).await?;
    node.signal(nix::sys::signal::Signal::SIGTERM)?;
    until("a hand-over that fails", SLACK, async || {
        node.log()
            .contains("leadership not handed over yet")
            .then_some(())
    })
    .await?;
    // It leads on.
    cluster
        .client_on("admin", survivors[0].number)?
        .rotate(CONTEXT, None)
        .await?;
    for other in &survivors {
        arm(other, "handover::stand", "off").await?;
    }
    let next = cluster.leader_among(&survivors).await?;
    ensure!(next.term > before.term, "{next:?} after {before:?}");
    until("a hand-over", SLACK, async || {
        node.log().contains("leadership handed over").then_some(())
    })
    .await?;
    let said = node.log();
    let drained = said
        .find("\"draining connections\"")
        .context("it does not drain")?;
    let handed_over = said
        .find("leadership handed over")
        .context("it did not hand over")?;
    ensure!(
        drained < handed_over && !said.contains("\"stopped\""),
        "not while it drained:\n{said}"
    );
    drop(idle);
    node.wait_gone(DRAIN + SLACK).await?;
    cluster.passed();
    Ok(())
}

/// Whether each rotation of a context that this node has executed as the leader was done, by its audit.
#[cfg(feature = "failpoints")]
fn rotations_led(log: &str, context: &str) -> Vec<bool> {
    let lines = log
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    lines
        .filter(|line| {
            line["place"] == "leader" && line["action"] == "key.rotate" && line["resource"] == context
        })
        .map(|line| line["outcome"] == "done")
        .collect()
}
