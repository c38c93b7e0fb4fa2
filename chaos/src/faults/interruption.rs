//! What breaks while an operator changes something: the leader through whom that goes, its links, or the node that it is about.
//! Whatever is interrupted is asked for again, as a person would.

use std::time::Duration;

use anyhow::Result;
use cluster_tests::failpoints::{self, arm, kill_at};
use cluster_tests::{Node, until};
use nix::sys::signal::Signal;
use tokio::time::sleep;

use super::pause::Stopped;
use crate::cluster::{Cluster, ELECTION};
use crate::schedule::{FaultKind, Meanwhile};

/// For a process to end, or to begin.
const SOON: Duration = Duration::from_secs(30);
/// From when a line is armed until the leader has come by there.
const REACHED: Duration = Duration::from_secs(30);
/// From the beginning of a change to what interrupts it, and from an end to the next start.
const INTO_IT: Duration = Duration::from_millis(300);
/// Who hears no leader waits for as long as a leader may have a quorum without being heard, for his own time-out after that, and
/// for another one after a split vote.
const CUT_OFF: Duration = ELECTION.saturating_mul(3);
/// Some of these end before another one leads, some after.
const PAUSED: Duration = ELECTION.saturating_mul(2);

/// How the leader is to die.
pub(super) enum Death {
    /// It is not.
    Spared,
    /// A moment later, wherever it is then.
    Soon,
    /// This node, once it comes by this line; if it never does, whoever leads then.
    At(Node, &'static str),
}

impl Death {
    /// At a line if failpoints are among the faults of the run. To be called before the change begins.
    pub(super) async fn prepare(wanted: bool, line: &'static str, cluster: &Cluster) -> Result<Self> {
        if !wanted {
            return Ok(Self::Spared);
        }
        if !cluster.tries(FaultKind::Failpoint) {
            return Ok(Self::Soon);
        }
        let Some(leader) = cluster.leader_soon().await else {
            return Ok(Self::Soon);
        };
        let node = cluster.node(leader.node);
        match kill_at(&node, line).await {
            Ok(()) => Ok(Self::At(node, line)),
            Err(error) if node.pid().is_some() => Err(error),
            // It has just died of something else.
            Err(_) => Ok(Self::Soon),
        }
    }

    /// Waits for it and starts the node again. Who died and where; none if nobody did.
    pub(super) async fn comes(self, cluster: &Cluster) -> Result<Option<String>> {
        match self {
            Self::Spared => Ok(None),
            Self::Soon => {
                sleep(INTO_IT).await;
                kill_leader(cluster).await
            }
            Self::At(node, line) => {
                if node.wait_gone(REACHED).await.is_ok() {
                    cluster.start_stopped().await?;
                    return Ok(Some(format!("leader {} at {line}", node.number)));
                }
                // One that has died in this moment has nothing armed any more.
                if let Err(error) = arm(&node, line, "off").await
                    && node.pid().is_some()
                {
                    return Err(error);
                }
                kill_leader(cluster).await
            }
        }
    }
}

async fn kill_leader(cluster: &Cluster) -> Result<Option<String>> {
    let Some(leader) = cluster.leader_soon().await else {
        return Ok(None);
    };
    let node = cluster.node(leader.node);
    node.signal(Signal::SIGKILL)?;
    node.wait_gone(SOON).await?;
    sleep(INTO_IT).await;
    cluster.start_stopped().await?;
    Ok(Some(format!("leader {}", leader.node)))
}

/// Interrupts a change of members while it goes on.
pub(super) struct Interruption<'a> {
    meanwhile: Meanwhile,
    /// Which draws when.
    pick: u32,
    /// Who comes or goes.
    about: &'a Node,
    comes: bool,
    death: Death,
}

impl<'a> Interruption<'a> {
    /// To be called before the change begins.
    pub(super) async fn prepare(
        meanwhile: Meanwhile,
        pick: u32,
        (about, comes): (&'a Node, bool),
        cluster: &Cluster,
    ) -> Result<Self> {
        let death = match meanwhile {
            Meanwhile::LeaderKilledAt(point) => Death::prepare(true, line(point, comes), cluster).await?,
            Meanwhile::LeaderKilled => Death::Soon,
            _ => Death::Spared,
        };
        Ok(Self {
            meanwhile,
            pick,
            about,
            comes,
            death,
        })
    }

    /// What has happened; none if that was nothing, though something was to.
    pub(super) async fn happens(self, cluster: &Cluster) -> Result<Option<String>> {
        let into_it = INTO_IT + Duration::from_millis(u64::from(self.pick % 10) * 200);
        match self.meanwhile {
            Meanwhile::Nothing => Ok(Some("nothing".to_owned())),
            Meanwhile::LeaderKilledAt(_) => self.death.comes(cluster).await,
            Meanwhile::LeaderKilled => {
                sleep(into_it).await;
                self.death.comes(cluster).await
            }
            Meanwhile::LeaderCutOff => {
                sleep(into_it).await;
                cut_off(self.about, cluster).await
            }
            Meanwhile::LeaderPaused => {
                sleep(into_it).await;
                pause(cluster).await
            }
            Meanwhile::NodeKilled => {
                sleep(into_it).await;
                kill(self.about, self.comes, cluster).await
            }
        }
    }
}

/// The line that a number stands for.
fn line(point: u32, comes: bool) -> &'static str {
    let mut lines = failpoints::MEMBERSHIP.to_vec();
    if !comes {
        lines.extend(failpoints::BURY);
    }
    lines[point as usize % lines.len()]
}

async fn cut_off(about: &Node, cluster: &Cluster) -> Result<Option<String>> {
    let Some(leader) = cluster.leader_soon().await else {
        return Ok(None);
    };
    let mut cut = cluster.links().separate(&[leader.node]);
    // Who joins is no member yet.
    if cut.is_ok() && about.number != leader.node {
        cut = cluster.links().cut(leader.node, about.number);
    }
    if cut.is_ok() {
        sleep(CUT_OFF).await;
    }
    cluster.links().heal()?;
    cut?;
    Ok(Some(format!("leader {} cut off", leader.node)))
}

async fn pause(cluster: &Cluster) -> Result<Option<String>> {
    let Some(leader) = cluster.leader_soon().await else {
        return Ok(None);
    };
    let node = cluster.node(leader.node);
    let stopped = Stopped(&node);
    node.signal(Signal::SIGSTOP)?;
    sleep(PAUSED).await;
    drop(stopped);
    Ok(Some(format!("leader {} paused", leader.node)))
}

/// Who goes may be removed by the time that it would be started: it stays dead.
async fn kill(node: &Node, comes: bool, cluster: &Cluster) -> Result<Option<String>> {
    if !node.signal(Signal::SIGKILL)? {
        return Ok(None);
    }
    node.wait_gone(SOON).await?;
    if comes {
        sleep(INTO_IT).await;
        let started = until("its start", SOON, async || {
            cluster.start_node(node.number).await.ok()
        });
        // The change that needs it says what is wrong, if it does not come through.
        if let Err(error) = started.await {
            eprintln!("{} was killed while it joined: {error:#}", node.id());
        }
    }
    Ok(Some("it was killed".to_owned()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_line_is_one_that_the_change_comes_by() {
        let lines = |comes| -> BTreeSet<&'static str> { (0..12).map(|point| line(point, comes)).collect() };
        assert_eq!(lines(true), BTreeSet::from(failpoints::MEMBERSHIP));
        assert_eq!(
            lines(false).len(),
            failpoints::MEMBERSHIP.len() + failpoints::BURY.len()
        );
        assert!(
            lines(false).is_superset(&BTreeSet::from(failpoints::BURY)),
            "a node is buried at the end"
        );
    }
}
