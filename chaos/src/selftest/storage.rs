//! What was promised before it was on the disk, and what was promised and is not looked for. On real files: the nodes' data lies
//! on a layer that forgets with the power what was not synchronised, or an older copy of the store comes back.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::until;

use super::scene::{HARDLY, PROCESS, SOON, Scene, WATCHED, copy_folder, replace_folder};
use crate::faults::unsynced::Loss;

/// So much longer does a disk take to synchronise before the power goes. Besides the node's own thread, which has to wait for
/// that, sled's synchronises ten times a second: only a slow disk leaves anything to lose.
const SLOW_DISK: Duration = Duration::from_millis(400);
/// The same, until the power goes.
const SLOWER_DISK: Duration = Duration::from_secs(2);
/// Who is revoked then, one after the other.
const LAST_CHANGES: [&str; 2] = ["chaos-lost-1", "chaos-lost-2"];
/// So long for a disk that has to have forgotten several elections.
const VERY_SLOW_DISK: Duration = Duration::from_secs(6);
/// For some elections. Less than [`VERY_SLOW_DISK`], so that none of their votes was synchronised by anybody else.
const ELECTIONS: Duration = Duration::from_secs(5);

/// A node that reaches nobody stands for election again and again, and votes for itself each time. It loses power, and says in
/// which term it is before it hears of anybody.
pub(super) async fn a_vote_is_lost_with_the_power(scene: &mut Scene) -> Result<()> {
    let leader = scene.leader().await?;
    let node = scene.others(&[leader])[0];
    scene.cluster.links().separate(&[node])?;
    let before = scene.status(node).await?.term;
    until("a lost election", SOON, async || {
        let term = scene.cluster.status(node).await?.term;
        (term > before).then_some(())
    })
    .await?;
    // With the bug some elections more, which the watch sees; without it hardly one vote is on the disk by then.
    scene.slow_disks(&[node], VERY_SLOW_DISK)?;
    tokio::time::sleep(ELECTIONS).await;
    scene.cluster.hold_down(node, true);
    scene.cluster.power_off(&[node], &Loss::All).await?;
    scene.slow_disks(&[node], Duration::ZERO)?;
    scene.start_node(node).await?;
    scene.status(node).await?;
    tokio::time::sleep(WATCHED).await;
    scene.cluster.links().heal()?;
    scene.ready(&[node]).await
}

/// Changes are acknowledged, and the whole cluster loses power. Revocations: a rotation that loses its end is carried through by
/// the next leader. The leader, whose disk is quick, has the change and comes back last; without it the others have a
/// majority, and at least one of them has acknowledged it.
pub(super) async fn all_lose_power_after_a_change(scene: &mut Scene) -> Result<()> {
    scene.rotate("before-the-power-goes").await?;
    let sealed = scene.seal(1).await?;
    let leader = scene.leader().await?;
    let others = scene.others(&[leader]);
    scene.slow_disks(&others, SLOW_DISK)?;
    for cn in LAST_CHANGES {
        let acknowledged = scene.clients.set_revoked(PROCESS, cn, true, None).await;
        ensure!(acknowledged, "the revocation of {cn} was not acknowledged");
    }
    // What was acknowledged is on the disk now, or will not be for as long as that takes.
    scene.slow_disks(&others, SLOWER_DISK)?;
    let all = scene.cluster.members();
    for node in &all {
        scene.cluster.hold_down(*node, true);
    }
    scene.cluster.power_off(&all, &Loss::All).await?;
    scene.slow_disks(&others, Duration::ZERO)?;
    for node in &others {
        scene.start_node(*node).await?;
    }
    scene.ready(&others).await?;
    scene.start_node(leader).await?;
    scene.ready(&all).await?;
    scene.open_everywhere(&[&sealed]).await;
    Ok(())
}

/// One of two nodes that have acknowledged a rotation comes back with an older store, and the third has never heard of it:
/// together they are a majority.
pub(super) async fn an_older_store_comes_back(scene: &mut Scene) -> Result<()> {
    let leader = scene.leader().await?;
    let [forgets, away] = scene.others(&[leader])[..] else {
        anyhow::bail!("not three nodes");
    };
    let data = scene.cluster.node(forgets).dir.join("data");
    let beside = |name: &str| scene.cluster.playground().scratch().join(name);
    let (older, newest) = (beside("older"), beside("newest"));
    scene.kill(&[forgets]).await?;
    copy_store(&data, &older)?;
    // It must not hear of the other's next run: what that reports would have the older copy refused by its peers.
    scene.kill(&[away]).await?;
    scene.start_node(forgets).await?;
    scene.ready(&[forgets]).await?;

    scene.rotate("while-the-third-is-away").await?;
    let sealed = scene.seal(leader).await?;
    scene.kill(&[leader, forgets]).await?;
    copy_store(&data, &newest)?;
    put_store(&data, &older)?;
    scene.start_node(away).await?;
    // It has to refuse to start. If it does not, its store is not mended: the two agree on what is not there before the third
    // comes, who would know better and lead.
    if scene.start_node(forgets).await.is_ok() {
        scene.leader_but(&[leader]).await?;
        scene.ready_within(&[forgets, away], HARDLY).await;
        scene.open_on(&[forgets, away], &sealed).await;
        return Ok(());
    }
    scene.kill(&[forgets]).await?;
    put_store(&data, &newest).context("put the store back")?;
    for node in [forgets, leader] {
        scene.start_node(node).await?;
    }
    scene.ready(&[leader, forgets, away]).await?;
    scene.open_everywhere(&[&sealed]).await;
    Ok(())
}

/// What is in a node's store beside `control`: that one stays where it is, and knows what was promised.
const STORE: [&str; 2] = ["sled", "snapshots"];

fn copy_store(data: &Path, to: &Path) -> Result<()> {
    STORE
        .iter()
        .try_for_each(|part| copy_folder(&data.join(part), &to.join(part)))
}

fn put_store(data: &Path, from: &Path) -> Result<()> {
    STORE
        .iter()
        .try_for_each(|part| replace_folder(&data.join(part), &from.join(part)))
}
