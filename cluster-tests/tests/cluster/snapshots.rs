//! A follower that has missed more than the log keeps is sent a snapshot, and is killed while it installs that:
//! wherever it was, it comes back by itself with everything. While it installs it is not taken for dead.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::failpoints::{arm, kill_at};
use cluster_tests::{Node, Playground, until};
use hsm_api::Client;
use hsm_api::admin::JoinTokenRequest;
use hsm_api::client::Retry;
use nix::sys::signal::Signal;

use crate::common::{CONTEXT, formed_with, open_everywhere, seal, seal_under, settled_everywhere};
use crate::members::join;

/// `cluster.raft.snapshot_every` and `keep_logs` of these nodes.
const SNAPSHOT_EVERY: u64 = 20;
const KEEP_LOGS: u64 = 20;
/// openraft purges so many entries at a time: `purge_batch_size` in `node/src/consensus/start.rs`.
const PURGED_AT_ONCE: u64 = 64;
/// Where a store is killed between the snapshot's arrival and the log's end.
static POINTS: [&str; 5] = [
    "store::before_install",
    "store::in_install",
    "store::before_pointer",
    "store::after_pointer",
    "store::between_purge_and_promise",
];
/// Before this one the node is held at the other for a while.
const HELD: (&str, &str) = ("store::before_pointer", "store::before_install");
/// From the heal until the leader has begun to send it the snapshot, or is about to.
const SENT_WITHIN: Duration = Duration::from_secs(120);
/// From the heal to the kill.
const KILLED_WITHIN: Duration = Duration::from_secs(60);
/// What the auto-pilot says of one that it has removed, and of one that it would have removed.
const REMOVES: &str = "the auto-pilot removes a voter that is dead";
const KEEPS: &str = "it is loading a snapshot";

/// A node's configuration, with logs that end soon.
pub(crate) fn with_short_logs(config: &str) -> String {
    let raft = format!(
        "cluster:\n  raft: {{snapshot_every: {SNAPSHOT_EVERY}, keep_logs: {KEEP_LOGS}}}\n  enabled: true\n"
    );
    config.replace("cluster:\n  enabled: true\n", &raft)
}

pub(crate) async fn index(node: &Node, name: &str) -> Result<u64> {
    let value = node.metrics().await?.sum(name);
    // An index, as the metrics give it.
    Ok(value.with_context(|| format!("{}: no {name}", node.id()))? as u64)
}

/// Appends entries until none of these nodes has the log any more that ends at `last`.
pub(crate) async fn leave_behind(admin: &Client, nodes: &[Node], last: u64) -> Result<()> {
    let behind = last + KEEP_LOGS + PURGED_AT_ONCE + 2;
    let request = JoinTokenRequest {
        // Open tokens are limited.
        ttl_seconds: Some(1),
        node_id: None,
    };
    let what = format!("snapshots beyond index {behind}");
    until(&what, Duration::from_secs(120), async || {
        for _ in 0..SNAPSHOT_EVERY {
            admin.create_join_token(&request).await.ok()?;
        }
        for node in nodes {
            let covered = index(node, "hsm_raft_snapshot_index").await.ok()?;
            if covered < behind {
                return None;
            }
        }
        Some(())
    })
    .await
}

pub(crate) async fn a_kill_inside_the_installation_of_a_snapshot_is_made_good() -> Result<()> {
    // Three clusters at a time: most of it is waiting for elections.
    let (early, rest) = POINTS.split_at(2);
    let (middle, late) = rest.split_at(2);
    tokio::try_join!(killed_at(early), killed_at(middle), killed_at(late)).map(drop)
}

async fn killed_at(points: &[&str]) -> Result<()> {
    let cluster = formed_with(Playground::builder().relayed(), with_short_logs).await?;
    let mut acknowledged = vec![seal(&cluster.client("trading-1")?, CONTEXT, b"before").await?];
    for &point in points {
        let leader = cluster.leader().await?;
        let others = cluster.others(leader.node);
        let follower = others[0].clone();
        let there = [cluster.node(leader.node), others[1].clone()];
        let trading = cluster.client_on("trading-1", leader.node)?;
        let admin = cluster
            .client_on("admin", leader.node)?
            .with_retry(Retry::Until(Duration::from_secs(40)));
        cluster.relays()?.isolate(follower.number);
        let last = index(&follower, "hsm_raft_last_log_index").await?;
        // It misses a key, too.
        let version = admin.rotate(CONTEXT, None).await?.version;
        acknowledged.push(seal_under(&trading, CONTEXT, point.as_bytes(), version).await?);
        leave_behind(&admin, &there, last)
            .await
            .with_context(|| point.to_owned())?;

        let said = follower.log().len();
        let (held_before, held_at) = HELD;
        if point == held_before {
            arm(&follower, held_at, "pause").await?;
        }
        kill_at(&follower, point).await?;
        cluster.relays()?.heal();
        if point == held_before {
            counts_as_failed(&cluster, &follower).await?;
            arm(&follower, held_at, "off").await?;
        }
        follower
            .wait_gone(KILLED_WITHIN)
            .await
            .with_context(|| format!("{point} not reached"))?;
        let log = follower.log();
        let last_words = log.get(said..).unwrap_or_default();
        ensure!(
            !last_words.contains("the node stops at once"),
            "{point}: it has ended by itself:\n{last_words}"
        );

        cluster.start_node(follower.number).await?;
        cluster.wait_ready(&cluster.nodes()).await?;
        let covered = index(&follower, "hsm_raft_snapshot_index").await?;
        ensure!(
            covered > last,
            "{point}: its snapshot ends at {covered}, its log ended at {last}: it was sent none"
        );
        settled_everywhere(&cluster, CONTEXT)
            .await
            .with_context(|| point.to_owned())?;
        acknowledged.push(
            seal(
                &cluster.client_on("trading-1", follower.number)?,
                CONTEXT,
                b"back",
            )
            .await?,
        );
        open_everywhere(&cluster, "trading-1", CONTEXT, &acknowledged)
            .await
            .with_context(|| point.to_owned())?;
    }
    cluster.passed();
    Ok(())
}

/// A voter that loads a snapshot answers, and nothing commits with it: of three not one more may fail.
async fn counts_as_failed(cluster: &Playground, loading: &Node) -> Result<()> {
    let others = cluster.others(loading.number);
    // Whoever leads: the term in which the loading one has stood all alone may have deposed the one before.
    until("a voter that answers and is behind", SENT_WITHIN, async || {
        let leader = cluster.leader_among(&others).await.ok()?.node;
        let status = cluster.status(leader).await?;
        let metrics = cluster.node(leader).metrics().await.ok()?;
        (status.silent_voters.is_empty()
            && status.behind_voters == [loading.id()]
            && status.failure_tolerance == 0
            && metrics.sum("hsm_raft_failure_tolerance") == Some(0.0))
        .then_some(())
    })
    .await
}

/// With an auto-pilot that takes whoever says nothing for ten seconds for dead, the least that can be configured.
fn with_autopilot(config: &str) -> String {
    with_short_logs(config).replace(
        "  coordination: {type: raft}\n",
        "  coordination: {type: raft}\n  autopilot: {remove_dead_after_seconds: 10}\n",
    )
}

/// Four voters, of which this one alone counts as failed.
async fn fails_alone(cluster: &Playground, loading: &Node) -> Result<()> {
    let others = cluster.others(loading.number);
    until("four voters, one of them behind", SENT_WITHIN, async || {
        let leader = cluster.leader_among(&others).await.ok()?.node;
        let status = cluster.status(leader).await?;
        let failed = status.silent_voters.into_iter().chain(status.behind_voters);
        (status.voters == 4 && failed.collect::<Vec<_>>() == [loading.id()]).then_some(())
    })
    .await
}

pub(crate) async fn a_voter_that_installs_a_snapshot_is_not_taken_for_dead() -> Result<()> {
    let cluster = formed_with(Playground::builder().relayed().spare(1), with_autopilot).await?;
    let leader = cluster.leader().await?;
    let others = cluster.others(leader.node);
    let follower = others[0].clone();
    let there = [cluster.node(leader.node), others[1].clone()];
    let admin = cluster
        .client_on("admin", leader.node)?
        .with_retry(Retry::Until(Duration::from_secs(40)));
    // However long it is away: of three voters none is removed, because too few would be left.
    cluster.relays()?.isolate(follower.number);
    let last = index(&follower, "hsm_raft_last_log_index").await?;
    leave_behind(&admin, &there, last).await?;
    let (_, held_at) = HELD;
    arm(&follower, held_at, "pause").await?;
    cluster.relays()?.heal();
    counts_as_failed(&cluster, &follower).await?;

    // With a fourth one enough would be left.
    let fourth = cluster.prepare_node().await?;
    fourth.set_config(&with_autopilot(&fourth.config()?))?;
    cluster.start_node(fourth.number).await?;
    join(&cluster, &there, &fourth).await?;
    fails_alone(&cluster, &follower).await?;
    let said = |words: &str| {
        let named = |line: &str| line.contains(words) && line.contains(&follower.id());
        let mut logs = cluster.nodes().into_iter().map(|node| node.log());
        logs.any(|log| log.lines().any(named))
    };
    // A store that takes long to write may keep it from answering at all, for longer than a dead voter may.
    follower.signal(Signal::SIGSTOP)?;
    until("a voter that is silent and is kept", SENT_WITHIN, async || {
        (said(KEEPS) || said(REMOVES)).then_some(())
    })
    .await?;
    follower.signal(Signal::SIGCONT)?;
    ensure!(!said(REMOVES), "removed while it installs a snapshot");
    arm(&follower, held_at, "off").await?;
    follower.wait_ready(KILLED_WITHIN).await?;
    let covered = index(&follower, "hsm_raft_snapshot_index").await?;
    ensure!(
        covered > last,
        "its snapshot ends at {covered}, its log ended at {last}: it was sent none"
    );

    // Nothing else has kept the auto-pilot from it.
    follower.kill().await?;
    until("the removal of one that is dead", SENT_WITHIN, async || {
        said(REMOVES).then_some(())
    })
    .await?;
    cluster.passed();
    Ok(())
}
