//! A cluster on its way from the last release to this one, with that release's own program (`scripts/previous.sh`): the
//! nodes of both rotate, encrypt and decrypt for each other and bring each other up to date, and what only this release
//! knows waits for the last node.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use cluster_tests::{Node, Playground, binary, until};
use hsm_api::ErrorCode;
use hsm_api::admin::{RekeyPhase, RekeyTransportRequest, TransportKeyState};
use hsm_api::client::Retry;
use nix::sys::signal::Signal;

use crate::common::{
    CONTEXT, Sealed, formed_with, open_everywhere_soon, seal, seal_under, settled_everywhere,
};
use crate::rekey::rekey_status;
use crate::rolling::{previous, start_with};
use crate::snapshots::{index, leave_behind, with_short_logs};

/// A start, a stop, an election or a change, on a busy machine.
const SOON: Duration = Duration::from_secs(60);
/// The slot that [`CONTEXT`] is in.
const SLOT: &str = "exchange";

async fn stop(node: &Node) -> Result<()> {
    node.signal(Signal::SIGTERM)?;
    node.wait_gone(SOON).await
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
    let before = previous()?.context(
        "HSM_PREVIOUS_NODE names no node of the last release: `make rolling` builds one and sets it, and so does \
         HSM_PREVIOUS_NODE=$(scripts/previous.sh)",
    )?;
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
