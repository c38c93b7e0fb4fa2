//! Nodes that come and go: a raft id that is given twice, and members that tell a node to go that they do not know yet.

use anyhow::{Context, Result, ensure};
use cluster_tests::until;
use nix::sys::signal::Signal;

use super::scene::{SOON, Scene};
use crate::faults::membership;
use crate::oracles::{ends, members};

/// A fourth node joins and is removed, and a fifth joins.
pub(super) async fn a_node_goes_and_another_comes(scene: &mut Scene) -> Result<()> {
    let fourth = join(scene).await?;
    members::note(&scene.cluster, &scene.recorder).await;
    let leaving = scene.cluster.node(fourth);
    // Once it is told.
    scene.recorder.note(&ends::may_end(fourth));
    membership::remove(&leaving, &scene.cluster).await?;
    scene.cluster.dismiss(fourth);
    leaving.kill().await?;
    join(scene).await?;
    members::note(&scene.cluster, &scene.recorder).await;
    scene.rotate("with-the-newcomer").await.map(drop)
}

/// Two of five members apply nothing, and so do not know the sixth when it joins. The leader dies, the other two are stopped, and
/// the sixth, which alone can, asks the two for their votes. They may refuse it, and must not tell it to go for good.
pub(super) async fn a_new_voter_meets_members_that_lag(scene: &mut Scene) -> Result<()> {
    let leader = scene.leader().await?;
    let [lag, lags_too, stops, stops_too] = scene.others(&[leader])[..] else {
        anyhow::bail!("not five nodes");
    };
    scene
        .arm(&[lag, lags_too], "store::before_append", "pause")
        .await?;
    let sixth = join(scene).await?;
    for number in [stops, stops_too] {
        scene.cluster.node(number).signal(Signal::SIGSTOP)?;
    }
    scene.kill(&[leader]).await?;
    let stood = scene.status(sixth).await?.term;
    // Told by two to go, it ends; otherwise it stands for election for as long as it is let.
    let _ = until("an election", SOON, async || {
        if scene.cluster.node(sixth).pid().is_none() {
            return Some(());
        }
        let term = scene.cluster.status(sixth).await?.term;
        (term > stood + 2).then_some(())
    })
    .await;
    for number in [stops, stops_too] {
        scene.cluster.node(number).signal(Signal::SIGCONT)?;
    }
    scene.arm(&[lag, lags_too], "store::before_append", "off").await?;
    scene.start_node(leader).await?;
    // One that is to go does what it has begun before it does.
    let all = scene.cluster.members();
    let stays = until(
        "members that are ready, or one that has ended",
        SOON,
        async || {
            if scene.cluster.node(sixth).pid().is_none() {
                return Some(false);
            }
            scene.all_ready(&all).await.then_some(true)
        },
    )
    .await?;
    ensure!(stays, "node {sixth} has ended");
    Ok(())
}

/// One node more, as operators do it; returns its number once it is ready. It counts as one that should run as soon as it
/// may have been let in.
async fn join(scene: &Scene) -> Result<u32> {
    let node = scene.cluster.prepare_node().await?;
    scene.cluster.start_node(node.number).await?;
    let joined = tokio::time::timeout(SOON, membership::join(&node, &scene.cluster)).await;
    scene.cluster.admit(node.number);
    joined.with_context(|| format!("{} joins", node.id()))??;
    scene.ready(&[node.number]).await?;
    Ok(node.number)
}
