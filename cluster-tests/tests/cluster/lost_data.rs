//! Nodes that have lost what they had acknowledged: with an empty data directory under their old name, and with an older copy of it.
//! They are told so, take part in nothing, and disturb nobody.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::{Leader, Node, Playground, Stalls, until};
use hsm_api::ErrorCode;
use hsm_api::admin::JoinTokenRequest;
use hsm_api::client::Retry;
use nix::sys::wait::WaitStatus;

use crate::common::{CONTEXT, seal};
use crate::joining::{READY, check_refused, join};

/// Five heartbeats.
const HEARTBEATS: Duration = Duration::from_secs(1);
/// `cluster.raft.election_min_ms`.
const ELECTION: Duration = Duration::from_millis(800);
/// How a node ends whose store is refused, or that is refused by the others: `docs/operations.md`.
const EXIT_REFUSED: i32 = 70;
const POISON: &str = "its data directory is an older copy: it ends at log index ";

/// Until a node that belongs to no cluster any more has said, after the first so many bytes of its log, that it has turned
/// the leader away, whichever node that is.
async fn until_it_refused_the_leader(cluster: &Playground, node: &Node, after: usize) -> Result<Leader> {
    let others = cluster.others(node.number);
    let what = format!("the leader refused by {}", node.id());
    until(&what, READY, async || {
        let leader = cluster.leader_among(&others).await.ok()?;
        let named = format!("\"peer\":\"{}\"", cluster.node(leader.node).id());
        let log = node.log();
        let mut lines = log.get(after..).unwrap_or_default().lines();
        let refused = lines.any(|line| {
            line.contains("\"target\":\"audit\"")
                && line.contains(&named)
                && line.contains("this node belongs to no cluster")
        });
        refused.then_some(leader)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wiped_node_under_its_old_name_is_refused() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let stalls = Stalls::watch()?;
    let before = cluster.leader().await?;
    let others = cluster.others(before.node);
    let wiped = others.last().context("no other node")?;
    wiped.kill().await?;
    std::fs::remove_dir_all(wiped.dir.join("data"))?;
    let said = wiped.log().len();
    cluster.start_node(wiped.number).await?;
    let started = Instant::now();
    let outcome = join(&cluster, wiped, |_| ()).await?;
    check_refused(
        outcome,
        &[ErrorCode::Conflict, ErrorCode::InvalidArgument],
        &wiped.id(),
    )?;
    let leader = until_it_refused_the_leader(&cluster, wiped, said).await?;
    let on_leader = cluster.client_on("admin", leader.node)?;
    until(
        "a second of heartbeats that it does not answer",
        READY,
        async || {
            let since = started.elapsed();
            let members = on_leader.members().await.ok()?.into_body().members;
            let member = members.iter().find(|member| member.node_id == wiped.id())?;
            let silent = |millis| Duration::from_millis(millis) >= since;
            (since >= HEARTBEATS && member.last_seen_ms.is_none_or(silent)).then_some(())
        },
    )
    .await?;
    // Nothing of the log has come to it.
    let status = cluster.status(wiped.number).await.context("no status")?;
    ensure!(status.raft_id == 0, "a wiped node has an id: {status:?}");
    let last_log = wiped.metrics().await?.sum("hsm_raft_last_log_index");
    ensure!(
        last_log.is_none_or(|last| last == 0.0),
        "a wiped node's log ends at {last_log:?}"
    );
    ensure!(!wiped.is_ready().await, "a wiped node is ready");
    let refused = cluster.client_on("trading-1", wiped.number)?;
    ensure!(
        seal(&refused, CONTEXT, b"x").await.is_err(),
        "a wiped node encrypts"
    );
    // Nobody was disturbed: it stands for no election. Who stands still for longer than the others wait may be voted out
    // by them; of that a wiped node is not the cause.
    let leader = cluster.leader_among(&cluster.others(wiped.number)).await?;
    let stood_still = stalls.between(started, Instant::now());
    ensure!(
        leader == before || stood_still >= ELECTION / 2,
        "{leader:?} after {before:?}; the machine stood still for {stood_still:?}"
    );
    // And two of three still change things.
    let request = JoinTokenRequest {
        ttl_seconds: Some(60),
        node_id: None,
    };
    cluster
        .client_on("admin", leader.node)?
        .create_join_token(&request)
        .await?;
    cluster.passed();
    Ok(())
}

/// Starts a node that must not run; until it has ended, with the code for that. Returns what it has said.
async fn ends_refused(cluster: &Playground, node: &Node) -> Result<String> {
    let before = node.log().len();
    match cluster.start_node(node.number).await {
        // It has ended before it listened; then its starter knows how.
        Err(error) => {
            let told = format!("{error:#}");
            let code = format!("exit status: {EXIT_REFUSED}");
            ensure!(told.contains(&code), "{told}");
        }
        Ok(()) => {
            let status = node.wait_ended(READY).await?;
            ensure!(
                matches!(status, WaitStatus::Exited(_, EXIT_REFUSED)),
                "it ended with {status:?}"
            );
        }
    }
    let log = node.log();
    Ok(log.get(before..).unwrap_or_default().to_owned())
}

/// A whole data directory put back from an older copy has forgotten what it had acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_from_an_older_copy_is_not_let_in() -> Result<()> {
    // Nodes are children of a program that has ended: they become this process's, which may then ask how they
    // ended.
    nix::sys::prctl::set_child_subreaper(true)?;
    let cluster = Playground::start(3).await?;
    let (stalls, begins) = (Stalls::watch()?, Instant::now());
    let leader = cluster.leader().await?;
    let node = cluster.others(leader.node)[0].clone();
    let (data, copy) = (node.dir.join("data"), cluster.scratch().join("older"));
    node.kill().await?;
    let copied = std::process::Command::new("cp")
        .arg("-a")
        .args([&data, &copy])
        .status()?;
    ensure!(copied.success(), "cp: {copied}");
    cluster.start_node(node.number).await?;
    node.wait_ready(READY).await?;
    let begun = cluster
        .status(node.number)
        .await
        .context("no status")?
        .last_log_index;
    let admin = cluster.client("admin")?.with_retry(Retry::Until(READY));
    for _ in 0..5 {
        admin.rotate(CONTEXT, None).await?;
    }
    // Whoever leads has heard that the node has more on its disk than when the copy was made.
    until("what the node acknowledges", READY, async || {
        let leader = cluster.leader_among(&cluster.others(node.number)).await.ok()?;
        let on_leader = cluster.client_on("admin", leader.node).ok()?;
        let members = on_leader.members().await.ok()?.into_body().members;
        let member = members.iter().find(|member| member.node_id == node.id())?;
        (member.matched_index? > begun).then_some(())
    })
    .await?;
    node.kill().await?;
    std::fs::remove_dir_all(&data)?;
    std::fs::rename(&copy, &data)?;

    let said = ends_refused(&cluster, &node).await?;
    ensure!(
        said.contains(&format!(
            "this node may not run with this data directory: {POISON}"
        )),
        "{said}"
    );
    // It stays so, whoever starts it again.
    let said = ends_refused(&cluster, &node).await?;
    ensure!(
        said.contains(&format!("this node may not run again: {POISON}")),
        "{said}"
    );
    // Nobody else was disturbed, and two of three still change things.
    let now = cluster.leader_among(&cluster.others(node.number)).await?;
    let stood_still = stalls.between(begins, Instant::now());
    ensure!(
        now == leader || stood_still >= ELECTION / 2,
        "{now:?} after {leader:?}; the machine stood still for {stood_still:?}"
    );
    let request = JoinTokenRequest {
        ttl_seconds: Some(60),
        node_id: None,
    };
    let on_leader = cluster.client_on("admin", now.node)?;
    on_leader
        .with_retry(Retry::Until(READY))
        .create_join_token(&request)
        .await?;
    cluster.passed();
    Ok(())
}
