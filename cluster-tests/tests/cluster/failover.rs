//! The leader dies, again and again: changes are back within seconds, nothing acknowledged is lost, and on the
//! survivors no application notices anything.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::lanes::lanes;
use cluster_tests::load::Report;
use cluster_tests::{Load, Node, Playground, Stalls, scenario};
use hsm_api::admin::{JoinTokenRequest, KeyState};
use hsm_api::client::Retry;
use nix::sys::signal::Signal;

use crate::common::{CONTEXT, Sealed, context_on, open, seal};

/// Kills that count; `HSM_LEADER_KILLS` names another number. A hundred take two minutes.
const KILLS: usize = 100;
/// So often they are all killed, unless changes are back in time before: elections wait for nothing else each time, and a
/// machine that does something else does not do so each time.
const ROUNDS: usize = 2;
/// More kills than this that do not count are a finding of their own.
const SPARE: usize = 10;
/// At the 99th percentile, of the time in which the machine ran anybody.
const BACK_WITHIN: Duration = Duration::from_secs(4);
const GIVE_UP: Duration = Duration::from_secs(60);

/// A change that needs only Raft: answered once it is committed.
pub(crate) async fn first_change(
    cluster: &Playground,
    survivors: &[Node],
    since: Instant,
) -> Result<Duration> {
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
pub(crate) struct Acknowledged {
    pub(crate) versions: Vec<u32>,
    pub(crate) sealed: Vec<Sealed>,
}

impl Acknowledged {
    pub(crate) fn count(&self) -> usize {
        self.versions.len() + self.sealed.len()
    }

    /// What one node does not have, or cannot open.
    pub(crate) async fn lost_on(&self, cluster: &Playground, number: u32) -> Result<Vec<String>> {
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

/// What a cluster went through.
struct Killed {
    times: Vec<Duration>,
    /// The same by the clock, with the time in which the machine stood still.
    by_the_clock: Vec<Duration>,
    acknowledged: usize,
    lost: Vec<String>,
    report: Report,
}

/// Kills leaders of one cluster under load, one after the other.
async fn kill_leaders(cluster: &Playground, kills: usize, stalls: &Stalls) -> Result<Killed> {
    let load = Load::start(cluster)?;
    let (mut times, mut by_the_clock) = (Vec::with_capacity(kills), Vec::with_capacity(kills));
    let mut acknowledged = Acknowledged::default();
    let mut attempts = 0;
    while times.len() < kills {
        attempts += 1;
        ensure!(
            attempts <= kills + SPARE,
            "of {} kills only {} count: {times:?}",
            attempts - 1,
            times.len()
        );
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
        let clock = first_change(cluster, &survivors, killed).await?;
        let took = clock.saturating_sub(stalls.between(killed, killed + clock));
        let after = cluster.leader_among(&survivors).await?;
        // A kill counts only if another node has committed in a higher term.
        if after.node != before.node && after.term > before.term {
            times.push(took);
            by_the_clock.push(clock);
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
        lost.extend(acknowledged.lost_on(cluster, node.number).await?);
    }
    Ok(Killed {
        times,
        by_the_clock,
        acknowledged: acknowledged.count(),
        lost,
        report,
    })
}

#[test]
fn without_its_leader_a_cluster_waits_a_little_for_changes_and_for_nothing_else() -> Result<()> {
    lanes([
        vec![scenario!(leaders_die_and_only_changes_wait_a_little)],
        vec![scenario!(a_leader_that_hangs_is_replaced_and_steps_down)],
    ])
}

async fn leaders_die_and_only_changes_wait_a_little() -> Result<()> {
    let kills = kills()?;
    // A killed leader's cluster mostly waits for its election: four of them do so at once.
    let clusters = [
        Playground::start(3).await?,
        Playground::start(3).await?,
        Playground::start(3).await?,
        Playground::start(3).await?,
    ];
    let mut seen = Vec::new();
    loop {
        let times = kill_some(&clusters, kills).await?;
        let p99 = times[rank(times.len(), 99)];
        if p99 <= BACK_WITHIN {
            break;
        }
        seen.push(p99);
        ensure!(seen.len() < ROUNDS, "p99 is {seen:?}, the last time of {times:?}");
    }
    for cluster in clusters {
        cluster.passed();
    }
    Ok(())
}

/// The place of a percentile among so many.
pub(crate) fn rank(count: usize, percent: usize) -> usize {
    (count * percent).div_ceil(100).saturating_sub(1)
}

/// How long each of so many kills kept changes waiting, in order. Nothing is lost and nothing fails, however long.
async fn kill_some(clusters: &[Playground; 4], kills: usize) -> Result<Vec<Duration>> {
    let (stalls, began) = (Stalls::watch()?, Instant::now());
    let killed = tokio::try_join!(
        kill_leaders(&clusters[0], kills.div_ceil(4), &stalls),
        kill_leaders(&clusters[1], (kills + 2) / 4, &stalls),
        kill_leaders(&clusters[2], (kills + 1) / 4, &stalls),
        kill_leaders(&clusters[3], kills / 4, &stalls)
    )?;
    let few = stalls.fewer_since(began);
    let killed: [Killed; 4] = killed.into();
    let mut times: Vec<Duration> = killed.iter().flat_map(|one| one.times.clone()).collect();
    let mut by_the_clock: Vec<Duration> = killed.iter().flat_map(|one| one.by_the_clock.clone()).collect();
    let deducted = by_the_clock.iter().sum::<Duration>() - times.iter().sum::<Duration>();
    let lost: Vec<String> = killed.iter().flat_map(|one| one.lost.clone()).collect();
    let sum = |of: fn(&Report) -> u64| killed.iter().map(|one| of(&one.report)).sum::<u64>();
    let (decrypted, failed) = (sum(|report| report.decrypted), sum(|report| report.failed));
    times.sort_unstable();
    by_the_clock.sort_unstable();
    let rank = |percent: usize| rank(times.len(), percent);
    let at = |percent: usize| times[rank(percent)];
    println!(
        "{} leader kills: writes back p50 {:?}, p99 {:?}, max {:?}; by the clock p99 {:?}, of all times {deducted:?} \
         deducted; {} acknowledged, {} lost; meanwhile {} encryptions and {decrypted} decryptions, {failed} failed",
        times.len(),
        at(50),
        at(99),
        at(100),
        by_the_clock[rank(99)],
        killed.iter().map(|one| one.acknowledged).sum::<usize>(),
        lost.len(),
        sum(|report| report.encrypted),
    );
    ensure!(lost.is_empty(), "acknowledged and lost: {lost:#?}");
    ensure!(
        failed == 0,
        "{failed} failures: {:#?}",
        killed.map(|one| one.report.failures)
    );
    ensure!(decrypted as usize > kills * 10, "hardly any load: {decrypted}");
    few?;
    Ok(times)
}

/// A stopped leader is worse than a dead one: it holds its connections, and comes back with its old term.
async fn a_leader_that_hangs_is_replaced_and_steps_down() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let before = cluster.leader().await?;
    let survivors = cluster.others(before.node);
    let stopped = Instant::now();
    cluster.node(before.node).signal(Signal::SIGSTOP)?;
    let took = first_change(&cluster, &survivors, stopped).await?;
    // The call that was on its way to it ends by the deadline of forwarding, a few seconds.
    ensure!(took < GIVE_UP / 2, "took {took:?}");
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
