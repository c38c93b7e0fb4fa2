//! A node kills itself at a chosen line of the product: at every step of votes, appends, snapshots and their installation,
//! rotations, imports and destructions. Only builds with failpoints have them. Lines that only a command of an operator comes by
//! are tried with that (`interruption.rs`).

use std::time::Duration;

use anyhow::{Context, Result};
use cluster_tests::failpoints::{self, arm, kill_at};
use cluster_tests::{Node, until};
use nix::sys::signal::Signal;

use super::{Done, partition, target};
use crate::cluster::Cluster;

/// Whom a point is armed on, and what has to be done for it to be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Where {
    /// Whoever leads; clients rotate and destroy.
    Leader,
    /// Somebody else.
    Follower,
    /// Somebody else, and the leader is killed so that there is an election.
    Voter,
    /// Somebody else, while entries are written until a snapshot is due.
    Snapshot,
    /// Somebody else, cut off until only a snapshot can bring it back.
    Install,
}

/// From when a point is armed until somebody has come by there. Clients rotate every few seconds; a destruction waits for half a
/// minute after an election, and a snapshot for as many entries as a slow disk takes a while for.
const REACHED: Duration = Duration::from_secs(60);
/// For a process to be gone.
const SOON: Duration = Duration::from_secs(15);

/// Every point that kills, in a fixed order: a plan names them by their place.
#[must_use]
pub fn points() -> Vec<(&'static str, Where)> {
    let rotation = failpoints::ROTATION.iter().map(|point| {
        let follows = ["import", "ack"].iter().any(|step| point.ends_with(step));
        (*point, if follows { Where::Follower } else { Where::Leader })
    });
    let store = failpoints::STORE.iter().map(|point| {
        let vote = point.ends_with("vote");
        (*point, if vote { Where::Voter } else { Where::Follower })
    });
    let snapshot = failpoints::SNAPSHOT.iter().map(|point| (*point, Where::Snapshot));
    let install = failpoints::INSTALL.iter().map(|point| (*point, Where::Install));
    let begin = failpoints::BEGIN_DESTROY.iter();
    let begin = begin.map(|point| (*point, Where::Leader));
    let destroy = failpoints::DESTROY.iter().map(|point| (*point, Where::Follower));
    let rest = snapshot.chain(install).chain(begin).chain(destroy);
    rotation.chain(store).chain(rest).collect()
}

/// Those that somebody comes by in a cluster of which so many may fail: where nobody may, nobody can be elected or left behind
/// while another one goes on.
fn reachable(tolerated: usize) -> Vec<(&'static str, Where)> {
    let mut points = points();
    points.retain(|(_, place)| tolerated > 0 || !matches!(place, Where::Voter | Where::Install));
    points
}

/// Arms it once the node has to be sent a snapshot, and lets it be reached again; else why not.
async fn arm_behind(node: &Node, name: &str, cluster: &Cluster) -> Result<Option<&'static str>> {
    let left = partition::leave_behind(node.number, cluster).await;
    let armed = match &left {
        Ok(Ok(_)) => kill_at(node, name).await,
        _ => Ok(()),
    };
    cluster.links().heal()?;
    armed?;
    Ok(left?.err())
}

pub(super) async fn carry_out(point: u32, pick: u32, lasts: Duration, cluster: &Cluster) -> Result<Done> {
    let all = reachable(cluster.tolerated());
    let (name, place) = all[point as usize % all.len()];
    let leader = cluster.leader_soon().await;
    let number =
        target(place == Where::Leader, pick, &cluster.members(), leader).context("no node is left")?;
    let node = cluster.node(number);
    let what = format!("node {number} at {name}, leader {leader:?}");
    cluster.hold_down(number, true);
    let armed = match place {
        Where::Install => arm_behind(&node, name, cluster).await,
        _ => kill_at(&node, name).await.map(|()| None),
    };
    match armed {
        Ok(None) => {}
        Ok(Some(why)) => {
            cluster.hold_down(number, false);
            return Ok(Done::not_counted(what, why));
        }
        Err(error) => {
            cluster.hold_down(number, false);
            // It may still have died of the fault before this one.
            return match node.pid() {
                Some(_) => Err(error),
                None => Ok(Done::not_counted(what, "it did not run")),
            };
        }
    }
    if let (Where::Voter, Some(leader)) = (place, leader.filter(|leader| leader.node != number)) {
        let other = cluster.node(leader.node);
        other.signal(Signal::SIGKILL)?;
        other.wait_gone(SOON).await?;
        cluster.start_stopped().await?;
    }
    let reached = dies(&node, place, REACHED.max(lasts), cluster).await;
    if !reached && let Err(error) = arm(&node, name, "off").await {
        // One that has died in this moment has nothing armed any more.
        if node.pid().is_some() {
            return Err(error);
        }
    }
    cluster.hold_down(number, false);
    Ok(came(reached, name, what))
}

/// Whoever dies at another point than the one that was drawn shows nothing about that one.
fn came(reached: bool, name: &str, what: String) -> Done {
    let why_not = format!("nobody has come by {name} within {REACHED:?}");
    Done::counted_if(reached, what, &why_not)
}

async fn dies(node: &Node, place: Where, within: Duration, cluster: &Cluster) -> bool {
    let writes = place == Where::Snapshot;
    let _clocks = if writes {
        Some(cluster.right_clocks().await)
    } else {
        None
    };
    let died = until("the node's end", within, async || {
        if node.pid().is_none() {
            return Some(());
        }
        if writes && let Some(leader) = cluster.leader_now().await {
            // Refused while there is another leader to be found; there will be another try.
            let _ = cluster.write_on(leader.node).await;
        }
        None
    });
    died.await.is_ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::schedule::Effect;

    #[test]
    fn a_point_that_nobody_has_reached_does_not_count() {
        let done = |reached| came(reached, "store::after_purge", "node 1".to_owned()).effect;
        assert_eq!(done(true), Effect::Counted);
        let not = done(false);
        assert!(
            matches!(&not, Effect::NotCounted(why) if why.contains("store::after_purge")),
            "{not:?}"
        );
        assert_eq!(not.failure(), None, "which is nobody's fault");
    }

    #[test]
    fn every_step_has_its_points() {
        let all = points();
        let names: BTreeSet<&str> = all.iter().map(|(name, _)| *name).collect();
        assert_eq!(names.len(), all.len());
        for part in [
            "vote", "append", "apply", "snapshot", "install", "pointer", "wrap", "prepare", "import", "ack",
            "activate", "begin", "remove", "purge",
        ] {
            assert!(names.iter().any(|name| name.contains(part)), "{part}");
        }
        assert!(all.contains(&("rotation::before_import", Where::Follower)));
        assert!(all.contains(&("store::after_vote", Where::Voter)));
        assert!(all.contains(&("destruction::after_begin_commit", Where::Leader)));
        assert!(all.contains(&("store::in_install", Where::Install)));
    }

    #[test]
    fn where_nobody_may_fail_only_what_is_reached_there_is_tried() {
        assert_eq!(reachable(1), points());
        let alone = reachable(0);
        assert!(
            alone
                .iter()
                .all(|(name, _)| !name.ends_with("vote") && !name.ends_with("install"))
        );
        assert!(alone.contains(&("destruction::before_begin_commit", Where::Leader)));
    }
}
