//! A cluster on its way from the last release to this one, with that release's own program (`scripts/previous.sh`): the
//! nodes of both rotate, encrypt and decrypt for each other and bring each other up to date, and what only this release
//! knows waits for the last node. Leaders of both die, and a node of either release takes over.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use cluster_tests::{Leader, Node, Playground, Stalls, binary, until};
use hsm_api::ErrorCode;
use hsm_api::admin::{RekeyPhase, RekeyTransportRequest, TransportKeyState};
use hsm_api::client::Retry;
use nix::sys::signal::Signal;
use tokio::task::JoinHandle;

use crate::common::{
    CONTEXT, Sealed, formed_with, open_everywhere_soon, seal, seal_under, settled_everywhere,
};
use crate::failover::{Acknowledged, first_change, rank};
use crate::rekey::rekey_status;
use crate::rolling::{previous, start_with};
use crate::snapshots::{index, leave_behind, with_short_logs};

/// A start, a stop, an election or a change, on a busy machine.
const SOON: Duration = Duration::from_secs(60);
/// The slot that [`CONTEXT`] is in.
const SLOT: &str = "exchange";
/// Leaders killed in each of the two mixed clusters, of either release in turn; `HSM_MIXED_KILLS` names another number.
const KILLS: usize = 6;
/// From the death of a leader to a change that another one has made, of the time in which the machine ran anybody.
const BACK_WITHIN: Duration = Duration::from_secs(10);

async fn stop(node: &Node) -> Result<()> {
    node.signal(Signal::SIGTERM)?;
    node.wait_gone(SOON).await
}

/// The last release's program.
fn last_release() -> Result<PathBuf> {
    previous()?.context(
        "HSM_PREVIOUS_NODE names no node of the last release: `make rolling` builds one and sets it, and so does \
         HSM_PREVIOUS_NODE=$(scripts/previous.sh)",
    )
}

/// Asks each node for another version, and for a ciphertext of it; whatever there is, all of them open.
async fn serves(cluster: &Playground, sealed: &mut Vec<Sealed>, what: &str) -> Result<()> {
    for node in cluster.nodes() {
        // A follower hands it to the leader, whatever release that is of.
        let admin = cluster.client_on("admin", node.number)?;
        let admin = admin.with_retry(Retry::Until(SOON));
        let version = admin.rotate(CONTEXT, None).await;
        let version = version
            .with_context(|| format!("{what}: rotation by {}", node.id()))?
            .version;
        let client = cluster.client_on("trading-1", node.number)?;
        sealed.push(seal_under(&client, CONTEXT, what.as_bytes(), version).await?);
    }
    settled_everywhere(cluster, CONTEXT).await?;
    open_everywhere_soon(cluster, "trading-1", CONTEXT, sealed)
        .await
        .with_context(|| what.to_owned())
}

/// Stops a node and has it miss more than the logs of the others keep. Returns an index that its log does not reach.
async fn leave_alone(cluster: &Playground, away: &Node) -> Result<u64> {
    stop(away).await?;
    let there = cluster.others(away.number);
    let leader = cluster.leader_among(&there).await?.node;
    let last = index(&cluster.node(leader), "hsm_raft_last_log_index").await?;
    let admin = cluster.client_on("admin", leader)?;
    leave_behind(&admin.with_retry(Retry::Until(SOON)), &there, last).await?;
    Ok(last)
}

/// It has become ready with a snapshot that one of these has made and sent: no log goes back so far.
async fn has_a_snapshot(cluster: &Playground, node: &Node, beyond: u64, senders: &[&Node]) -> Result<()> {
    let covered = index(node, "hsm_raft_snapshot_index").await?;
    ensure!(
        covered > beyond,
        "{}: its snapshot ends at {covered}, its log ended at {beyond} or before: it was sent none",
        node.id()
    );
    let leader = cluster.leader().await?.node;
    ensure!(
        senders.iter().any(|sender| sender.number == leader),
        "node {leader} leads, which is of the same release as {}: it shows nothing; run it again",
        node.id()
    );
    Ok(())
}

fn rekey() -> RekeyTransportRequest {
    RekeyTransportRequest {
        slot: SLOT.to_owned(),
        restart: false,
    }
}

/// The leader, which is of this release, refuses it by the name of one of these.
async fn is_refused(cluster: &Playground, leader: &Node, older: &[&Node]) -> Result<()> {
    let admin = cluster.client_on("admin", leader.number)?;
    // Just after a start it may have other reasons for a moment.
    until("a refusal by the name of an older node", SOON, async || {
        let Err(error) = admin.rekey_transport(&rekey(), None).await else {
            return Some(Err(anyhow!("older nodes were given what they do not know")));
        };
        let said = error.to_string();
        let named = |node: &&Node| said.contains(&format!("{} understands", node.id()));
        let is_named = older.iter().any(named);
        (error.code() == Some(ErrorCode::Conflict) && is_named).then_some(Ok(()))
    })
    .await?
}

/// Until the transport key of the slot has been replaced.
async fn is_done(cluster: &Playground) -> Result<()> {
    let admin = cluster.client("admin")?;
    let accepted = until("the new change to be taken", SOON, async || {
        admin.rekey_transport(&rekey(), None).await.ok()
    });
    let replaced = accepted.await?.generation;
    until("another transport key", SOON, async || {
        let slots = rekey_status(cluster, 1).await.ok()?.slots;
        let slot = slots.into_iter().find(|slot| slot.slot == SLOT)?;
        let mut keys = slot.transport_keys.iter();
        let current = keys.find(|key| key.state == TransportKeyState::Current)?;
        let done = matches!(slot.phase, RekeyPhase::Waiting | RekeyPhase::Settled);
        (done && current.generation > replaced).then_some(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a node of the last release, and a minute: make rolling"]
async fn nodes_of_two_releases_serve_together_until_the_last_one_is_upgraded() -> Result<()> {
    let before = last_release()?;
    let (before, own) = (before.as_path(), binary("hsm-node")?);
    let builder = Playground::builder().nodes(3).env("HSM_NODE_BIN", before);
    let cluster = formed_with(builder, with_short_logs).await?;
    let mut sealed = vec![seal(&cluster.client("trading-1")?, CONTEXT, b"at first").await?];
    serves(&cluster, &mut sealed, "by the last release").await?;

    let led = cluster.node(cluster.leader().await?.node);
    let others = cluster.others(led.number);
    let (follower, newer) = (&others[0], &others[1]);
    stop(newer).await?;
    start_with(&cluster, newer, &own).await?;
    serves(&cluster, &mut sealed, "with one node of this release").await?;

    // Stopped one after the other, those of the last release leave the lead to the newer node, which alone has everything.
    let missed = leave_alone(&cluster, follower).await?;
    stop(&led).await?;
    start_with(&cluster, follower, before).await?;
    has_a_snapshot(&cluster, follower, missed, &[newer]).await?;
    start_with(&cluster, &led, before).await?;
    is_refused(&cluster, newer, &[follower, &led]).await?;
    serves(&cluster, &mut sealed, "led by this release").await?;

    let missed = leave_alone(&cluster, newer).await?;
    start_with(&cluster, newer, &own).await?;
    has_a_snapshot(&cluster, newer, missed, &[follower, &led]).await?;
    serves(&cluster, &mut sealed, "led by the last release").await?;

    for node in [follower, &led] {
        stop(node).await?;
        start_with(&cluster, node, &own).await?;
    }
    is_done(&cluster).await?;
    serves(&cluster, &mut sealed, "upgraded").await?;
    cluster.passed();
    Ok(())
}

fn kills() -> Result<usize> {
    let kills = match std::env::var("HSM_MIXED_KILLS") {
        Ok(text) => text.parse().context("HSM_MIXED_KILLS")?,
        Err(_) => KILLS,
    };
    ensure!(
        kills >= 2,
        "HSM_MIXED_KILLS={kills}: a leader of either release has to die"
    );
    Ok(kills)
}

/// One version after the other, each asked for under a key of its own, until it is told to end.
struct Rotations {
    going_on: Arc<AtomicBool>,
    acknowledged: Arc<AtomicUsize>,
    task: JoinHandle<Result<Vec<u32>>>,
}

impl Rotations {
    /// Through these nodes, which repeat them.
    fn begin(cluster: &Playground, through: &[Node], name: &str) -> Result<Self> {
        let pki = cluster.pki();
        let endpoints: Vec<String> = through.iter().map(Node::endpoint).collect();
        let admin = pki.client(Some(&pki.identity("admin")?), &endpoints)?;
        let admin = admin.with_retry(Retry::Until(SOON));
        let (going_on, acknowledged) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)));
        let (goes_on, counted, name) = (Arc::clone(&going_on), Arc::clone(&acknowledged), name.to_owned());
        let task = tokio::spawn(async move {
            let mut versions = Vec::new();
            while goes_on.load(Ordering::Relaxed) {
                let key = format!("{name}-{}", versions.len());
                let rotated = admin.rotate(CONTEXT, Some(&key)).await;
                let rotated = rotated.with_context(|| format!("the rotation under {key}"))?;
                versions.push(rotated.version);
                counted.store(versions.len(), Ordering::Relaxed);
            }
            Ok(versions)
        });
        Ok(Self {
            going_on,
            acknowledged,
            task,
        })
    }

    /// Until the next one is on its way, or something has gone wrong, which their end says.
    async fn are_going_on(&self) -> Result<()> {
        until("rotations", SOON, async || {
            (self.acknowledged.load(Ordering::Relaxed) > 0 || self.task.is_finished()).then_some(())
        })
        .await
    }

    /// The versions that were acknowledged, the last one included.
    async fn end(self) -> Result<Vec<u32>> {
        self.going_on.store(false, Ordering::Relaxed);
        self.task.await?
    }
}

/// A cluster of nodes of two releases.
struct Mixed<'a> {
    cluster: &'a Playground,
    before: &'a Path,
    own: &'a Path,
    /// Numbers of those that run this build.
    newer: Vec<u32>,
}

impl Mixed<'_> {
    fn is_newer(&self, node: &Node) -> bool {
        self.newer.contains(&node.number)
    }

    /// Starts it with the release that it had.
    async fn start(&self, node: &Node) -> Result<()> {
        let with = if self.is_newer(node) {
            self.own
        } else {
            self.before
        };
        start_with(self.cluster, node, with).await
    }

    async fn upgrade(&mut self, node: &Node) -> Result<()> {
        stop(node).await?;
        self.newer.push(node.number);
        self.start(node).await
    }

    /// Has a node of this release lead. The last release knows no command for that: the one that is to lead alone keeps what
    /// the present leader has written, so that it alone can be elected while that one is away.
    async fn led_by(&self, newer: bool) -> Result<Leader> {
        let leader = self.cluster.leader().await?;
        let led = self.cluster.node(leader.node);
        if self.is_newer(&led) == newer {
            return Ok(leader);
        }
        let mut others = self.cluster.others(led.number);
        let place = others.iter().position(|node| self.is_newer(node) == newer);
        let next = others.remove(place.context("no node of that release")?);
        let away = others.pop().context("not three nodes")?;
        stop(&away).await?;
        first_change(self.cluster, &[led.clone(), next.clone()], Instant::now()).await?;
        stop(&led).await?;
        self.start(&away).await?;
        let leader = self.cluster.leader_among(&[next.clone(), away]).await?;
        self.start(&led).await?;
        ensure!(
            leader.node == next.number,
            "{leader:?}, and {} alone had everything",
            next.id()
        );
        Ok(leader)
    }

    /// Kills the leader, of this release, in the middle of rotations. How long no change was possible.
    async fn leader_dies(
        &self,
        newer: bool,
        name: &str,
        stalls: &Stalls,
        acknowledged: &mut Acknowledged,
    ) -> Result<Duration> {
        let cluster = self.cluster;
        let before = self.led_by(newer).await?;
        let (dies, survivors) = (cluster.node(before.node), cluster.others(before.node));
        let own = cluster.client_on("trading-1", before.node)?;
        acknowledged
            .sealed
            .push(seal(&own, CONTEXT, name.as_bytes()).await?);
        let rotations = Rotations::begin(cluster, &survivors, name)?;
        rotations.are_going_on().await?;
        let killed = Instant::now();
        dies.kill().await?;
        let clock = first_change(cluster, &survivors, killed).await?;
        let took = clock.saturating_sub(stalls.between(killed, killed + clock));
        let after = cluster.leader_among(&survivors).await?;
        ensure!(
            after.node != before.node && after.term > before.term,
            "{after:?} after {before:?}"
        );
        ensure!(
            took <= BACK_WITHIN,
            "{after:?} after {before:?}: no change for {took:?}, by the clock {clock:?}"
        );
        // The rotation that is on its way may wait for it.
        self.start(&dies).await?;
        acknowledged.versions.extend(rotations.end().await?);
        serves(cluster, &mut acknowledged.sealed, name).await?;
        println!("{name}: {after:?} after {before:?}: writes back after {took:?}, by the clock {clock:?}");
        Ok(took)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a node of the last release, and some minutes: make rolling"]
async fn leaders_of_two_releases_die_and_others_change_things_in_time() -> Result<()> {
    let (kills, before) = (kills()?, last_release()?);
    let (before, own) = (before.as_path(), binary("hsm-node")?);
    let builder = Playground::builder().nodes(3).env("HSM_NODE_BIN", before);
    let cluster = builder.start().await?;
    let mut mixed = Mixed {
        cluster: &cluster,
        before,
        own: &own,
        newer: Vec::new(),
    };
    let (stalls, mut acknowledged, mut times) = (Stalls::watch()?, Acknowledged::default(), Vec::new());
    for newer in 1..=2 {
        // Of a follower, so that no change of releases needs an election.
        let leader = cluster.leader().await?.node;
        let mut older = cluster.others(leader).into_iter();
        let older = older.find(|node| !mixed.is_newer(node));
        mixed
            .upgrade(&older.context("no node of the last release follows")?)
            .await?;
        for kill in 0..kills {
            let of_newer = kill % 2 == 0;
            let release = if of_newer { "this" } else { "the-last" };
            let name = format!("{newer}-of-3-upgraded-kill-{kill}-of-{release}-release");
            let took = mixed
                .leader_dies(of_newer, &name, &stalls, &mut acknowledged)
                .await;
            times.push(took.with_context(|| name.clone())?);
        }
    }
    let mut lost = Vec::new();
    for node in cluster.nodes() {
        lost.extend(acknowledged.lost_on(&cluster, node.number).await?);
    }
    times.sort_unstable();
    println!(
        "{} leaders killed in clusters of two releases: writes back p50 {:?}, max {:?}; {} acknowledged, {} lost",
        times.len(),
        times[rank(times.len(), 50)],
        times[rank(times.len(), 100)],
        acknowledged.count(),
        lost.len()
    );
    ensure!(lost.is_empty(), "acknowledged and lost: {lost:#?}");
    cluster.passed();
    Ok(())
}
