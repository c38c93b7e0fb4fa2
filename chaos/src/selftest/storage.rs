//! What was promised before it was on the disk, and what was promised and is not looked for. On real files: the nodes' data lies
//! on a layer that forgets with the power what was not synchronised, or an older copy of the store comes back.

use std::path::Path;

use anyhow::{Context, Result};
use cluster_tests::until;

use super::scene::{HARDLY, SOON, Scene, WATCHED, copy_folder, replace_folder};

/// Lost elections after which the watch cannot miss that a node has forgotten them.
const TERMS: u64 = 6;

/// A node that reaches nobody stands for election again and again, and votes for itself each time. It loses power, and says in
/// which term it is before it hears of anybody.
pub(super) async fn a_vote_is_lost_with_the_power(scene: &mut Scene) -> Result<()> {
    let leader = scene.leader().await?;
    let node = scene.others(&[leader])[0];
    scene.cluster.links().separate(&[node])?;
    let before = scene.status(node).await?.term;
    until("lost elections", SOON, async || {
        let term = scene.cluster.status(node).await?.term;
        (term >= before + TERMS).then_some(())
    })
    .await?;
    tokio::time::sleep(WATCHED).await;
    scene.cluster.hold_down(node, true);
    scene.cluster.kill_losing_writes(node).await?;
    scene.start_node(node).await?;
    scene.status(node).await?;
    tokio::time::sleep(WATCHED).await;
    scene.cluster.links().heal()?;
    scene.ready(&[node]).await
}

/// Two rotations are acknowledged, and the whole cluster loses power.
pub(super) async fn all_lose_power_after_a_rotation(scene: &mut Scene) -> Result<()> {
    let mut sealed = Vec::new();
    for key in ["before the power goes", "and again"] {
        scene.rotate(key).await?;
        sealed.push(scene.seal(1).await?);
    }
    let all = scene.cluster.members();
    scene.kill(&all).await?;
    for node in &all {
        scene.cluster.kill_losing_writes(*node).await?;
    }
    for node in &all {
        scene.start_node(*node).await?;
    }
    scene.ready(&all).await?;
    scene.open_everywhere(&sealed.iter().collect::<Vec<_>>()).await;
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

    scene.rotate("while the third is away").await?;
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
