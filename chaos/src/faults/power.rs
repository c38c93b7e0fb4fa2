//! Machines that lose power: SIGKILL, and what was written and not synchronised is gone, or a part of it.

use std::time::Duration;

use anyhow::{Context, Result};
use cluster_tests::until;

use super::unsynced::Loss;
use super::{Done, one_of};
use crate::cluster::Cluster;

/// So long is each synchronisation held up before the power goes: what a write has left to do is then rarely nothing.
const HELD_UP: Duration = Duration::from_millis(250);
/// For something to be written. Clients write all the time.
const WRITTEN: Duration = Duration::from_secs(5);

/// Takes the power from these at a moment at which the first of them has something to lose. How many changes that cost.
async fn lose_power(numbers: &[u32], loss: &Loss, cluster: &Cluster) -> Result<usize> {
    let first = *numbers.first().context("no node is left")?;
    for number in numbers {
        cluster.with_layer(*number, |layer| layer.hold_up(HELD_UP))?;
    }
    // Where nothing is written there is nothing to lose, and it will be said.
    let _ = until("something that is not synchronised", WRITTEN, async || {
        let unsynced = cluster.with_layer(first, super::unsynced::Layer::unsynced).ok()?;
        (unsynced > 0).then_some(())
    })
    .await;
    for number in numbers {
        cluster.hold_down(*number, true);
    }
    let lost = cluster.power_off(numbers, loss).await?;
    for number in numbers {
        cluster.with_layer(*number, |layer| layer.hold_up(Duration::ZERO))?;
    }
    Ok(lost)
}

async fn start(numbers: &[u32], lasts: Duration, cluster: &Cluster) -> Result<()> {
    tokio::time::sleep(lasts).await;
    for number in numbers {
        cluster.hold_down(*number, false);
    }
    cluster.start_stopped().await
}

pub(super) async fn lost(all: bool, pick: u32, lasts: Duration, cluster: &Cluster) -> Result<Done> {
    let members = cluster.members();
    let numbers: Vec<u32> = if all {
        members
    } else {
        one_of(&members, pick).into_iter().collect()
    };
    let lost = lose_power(&numbers, &Loss::All, cluster).await?;
    start(&numbers, lasts, cluster)
        .await
        .context("after the loss of power")?;
    Ok(Done::counted_if(
        lost > 0,
        target(all, &numbers, lost),
        "everything was synchronised",
    ))
}

/// One node of several is named, as the oracles read it: it explains nothing of the others, and they go on.
fn target(all: bool, numbers: &[u32], lost: usize) -> String {
    match numbers {
        [number] if !all => format!("node {number}: {lost} changes lost"),
        _ => format!("nodes {numbers:?}: {lost} changes lost"),
    }
}

pub(super) async fn torn(pick: u32, permille: u32, lasts: Duration, cluster: &Cluster) -> Result<Done> {
    let number = one_of(&cluster.members(), pick).context("no node is left")?;
    let torn = lose_power(&[number], &Loss::LastWrite(permille), cluster).await?;
    start(&[number], lasts, cluster)
        .await
        .context("after a torn write")?;
    let what = format!("node {number}: {permille} ‰ of its last write");
    Ok(Done::counted_if(
        torn > 0,
        what,
        "its last write was synchronised",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_node_that_has_lost_power_is_named_and_all_of_them_are_not() {
        assert_eq!(target(false, &[2], 7), "node 2: 7 changes lost");
        assert_eq!(target(true, &[1, 2, 3], 7), "nodes [1, 2, 3]: 7 changes lost");
        // All of a cluster of one.
        assert_eq!(target(true, &[1], 7), "nodes [1]: 7 changes lost");
    }
}
