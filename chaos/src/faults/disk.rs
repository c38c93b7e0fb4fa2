//! A disk without space, and synchronisations that are slow or fail.

use std::time::Duration;

use anyhow::{Context, Result};
use cluster_tests::{Node, until};

use super::{Done, target};
use crate::cluster::{Cluster, Disk};

/// From the end of the fault until the node has said or done something about it.
const NOTICED: Duration = Duration::from_secs(10);

async fn victim(leader: bool, pick: u32, cluster: &Cluster) -> Result<Node> {
    let before = cluster.leader_soon().await;
    let number = target(leader, pick, &cluster.members(), before).context("no node is left")?;
    Ok(cluster.node(number))
}

/// What the kernel says of a full disk, as the standard library prints it.
fn speaks_of_space(log: &str) -> bool {
    log.contains("os error 28") || log.contains("No space left")
}

pub(super) async fn full(leader: bool, pick: u32, lasts: Duration, cluster: &Cluster) -> Result<Done> {
    let node = victim(leader, pick, cluster).await?;
    let said = node.log().len();
    let filled = cluster.with_equipment(node.number, |equipment| equipment.disk().map(Disk::fill))?;
    let bytes = filled.context("the node has no disk of its own")??;
    let what = format!("node {}, {bytes} bytes of ballast", node.number);
    let noticed = until("a word of the full disk", lasts + NOTICED, async || {
        let log = node.log();
        let spoken = speaks_of_space(log.get(said..).unwrap_or_default());
        (spoken || node.pid().is_none()).then_some(())
    });
    let (noticed, ()) = tokio::join!(noticed, tokio::time::sleep(lasts));
    cluster
        .with_equipment(node.number, |equipment| equipment.disk().map(Disk::make_room))?
        .context("the node has no disk of its own")??;
    Ok(Done::counted_if(
        noticed.is_ok(),
        what,
        "the node has not met the end of its disk",
    ))
}

pub(super) async fn slow(
    leader: bool,
    pick: u32,
    each: Duration,
    lasts: Duration,
    cluster: &Cluster,
) -> Result<Done> {
    let number = victim(leader, pick, cluster).await?.number;
    let before = cluster.with_layer(number, |layer| {
        layer.delay(each);
        layer.delayed()
    })?;
    tokio::time::sleep(lasts).await;
    let after = cluster.with_layer(number, |layer| {
        layer.delay(Duration::ZERO);
        layer.delayed()
    })?;
    let count = after - before;
    let what = format!("node {number}: {count} synchronisations took {each:?} longer");
    Ok(Done::counted_if(count > 0, what, "nothing was synchronised"))
}

pub(super) async fn failing(leader: bool, pick: u32, lasts: Duration, cluster: &Cluster) -> Result<Done> {
    let node = victim(leader, pick, cluster).await?;
    let before = cluster.with_layer(node.number, |layer| {
        layer.fail(true);
        layer.failed()
    })?;
    tokio::time::sleep(lasts).await;
    let after = cluster.with_layer(node.number, |layer| {
        layer.fail(false);
        layer.failed()
    })?;
    let count = after - before;
    let ended = node.pid().is_none();
    let what = format!(
        "node {}: {count} synchronisations failed, it has ended: {ended}",
        node.number
    );
    Ok(Done::counted_if(count > 0, what, "nothing was synchronised"))
}

#[cfg(test)]
mod tests {
    use super::speaks_of_space;

    #[test]
    fn a_full_disk_is_known_by_its_words() {
        let error = std::io::Error::from_raw_os_error(28).to_string();
        assert!(speaks_of_space(&error), "{error}");
        assert!(!speaks_of_space("all is well"));
    }
}
