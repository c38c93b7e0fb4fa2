//! The leader dies, again and again: changes are back within seconds, and on the survivors no application
//! notices anything.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::{Load, Node, Playground};
use hsm_api::admin::JoinTokenRequest;

/// How many kills in a run of all tests; `HSM_LEADER_KILLS` names another number.
const KILLS: usize = 15;
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaders_die_and_only_changes_wait_a_little() -> Result<()> {
    let kills = kills()?;
    let cluster = Playground::start(3).await?;
    let load = Load::start(&cluster)?;
    let mut times = Vec::with_capacity(kills);
    while times.len() < kills {
        let before = cluster.leader().await?;
        let survivors = cluster.others(before.node);
        // What was sent to the leader itself may fail with it; nothing else may.
        load.pause(before.node).await;
        let killed = Instant::now();
        cluster.node(before.node).kill().await?;
        let took = first_change(&cluster, &survivors, killed).await?;
        let after = cluster.leader_among(&survivors).await?;
        // A kill counts only if another node has committed in a higher term.
        if after.node != before.node && after.term > before.term {
            times.push(took);
        }
        cluster.start_node(before.node).await?;
        cluster.wait_ready(&[cluster.node(before.node)]).await?;
        load.resume(before.node).await;
        let so_far = load.so_far();
        ensure!(so_far.failed == 0, "kill {}: {:#?}", times.len(), so_far.failures);
    }
    let report = load.stop().await;
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
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() * percent).div_ceil(100).saturating_sub(1)];
    println!(
        "{} kills: p50 {:?}, p99 {:?}, longest {:?}; {} encryptions, {} decryptions",
        times.len(),
        at(50),
        at(99),
        at(100),
        report.encrypted,
        report.decrypted
    );
    ensure!(at(99) <= BACK_WITHIN, "p99 is {:?}: {times:?}", at(99));
    cluster.passed();
    Ok(())
}

/// A stopped leader is worse than a dead one: it holds its connections, and comes back with its old term.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_hangs_is_replaced_and_steps_down() -> Result<()> {
    use nix::sys::signal::Signal;

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
