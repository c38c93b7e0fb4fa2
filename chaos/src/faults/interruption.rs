//! What breaks while an operator changes something: the leader through whom that goes, its links, or the node that it is about.
//! Whatever is interrupted is asked for again, as a person would.

use std::sync::atomic::{AtomicBool, Ordering};
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
    /// At a line if failpoints are among the faults of the run. To be called before the change begins. A node that `leaves` hands
    /// over instead, and ends by itself without coming by the line: that must not be taken for its death there.
    pub(super) async fn prepare(
        wanted: bool,
        line: &'static str,
        leaves: Option<u32>,
        cluster: &Cluster,
    ) -> Result<Self> {
        if !wanted {
            return Ok(Self::Spared);
        }
        if !cluster.tries(FaultKind::Failpoint) {
            return Ok(Self::Soon);
        }
        let Some(leader) = cluster.leader_soon().await else {
            return Ok(Self::Soon);
        };
        if leaves == Some(leader.node) {
            return Ok(Self::Soon);
        }
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
            Self::At(node, line) => match at_line(&node, line, cluster).await? {
                Some(died) => Ok(Some(died)),
                None => kill_leader(cluster).await,
            },
        }
    }
}

/// Waits for a node to die at the line that is armed on it, and starts it again; disarms it if it never comes there.
async fn at_line(node: &Node, line: &str, cluster: &Cluster) -> Result<Option<String>> {
    if node.wait_gone(REACHED).await.is_ok() {
        cluster.start_stopped().await?;
        return Ok(Some(format!("leader {} at {line}", node.number)));
    }
    // One that has died in this moment has nothing armed any more.
    if let Err(error) = arm(node, line, "off").await
        && node.pid().is_some()
    {
        return Err(error);
    }
    Ok(None)
}

async fn kill_leader(cluster: &Cluster) -> Result<Option<String>> {
    let Some(leader) = cluster.leader_soon().await else {
        return Ok(None);
    };
    let node = cluster.node(leader.node);
    if !node.signal(Signal::SIGKILL)? {
        return Ok(None);
    }
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
            Meanwhile::LeaderKilledAt(point) => {
                let leaves = (!comes).then_some(about.number);
                Death::prepare(true, line(point, comes), leaves, cluster).await?
            }
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

    /// What came of the change, and what has happened to it; none if that was nothing, though something was to.
    pub(super) async fn during<T>(
        self,
        change: impl Future<Output = T>,
        cluster: &Cluster,
    ) -> (T, Result<Option<String>>) {
        let over = AtomicBool::new(false);
        let change = async {
            let done = change.await;
            over.store(true, Ordering::Relaxed);
            done
        };
        tokio::join!(change, self.happens(&over, cluster))
    }

    /// Whatever would come once the change is `over` interrupts nothing, and does not happen.
    async fn happens(self, over: &AtomicBool, cluster: &Cluster) -> Result<Option<String>> {
        match (self.meanwhile, self.death) {
            (Meanwhile::Nothing, _) => return Ok(Some("nothing".to_owned())),
            (Meanwhile::LeaderKilledAt(_), Death::At(node, line)) => {
                if let Some(died) = at_line(&node, line, cluster).await? {
                    return Ok(Some(died));
                }
            }
            _ => sleep(into_it(self.comes, self.pick)).await,
        }
        if over.load(Ordering::Relaxed) {
            return Ok(None);
        }
        match self.meanwhile {
            Meanwhile::LeaderCutOff => cut_off(self.about, cluster).await,
            Meanwhile::LeaderPaused => pause(cluster).await,
            Meanwhile::NodeKilled => kill(self.about, self.comes, cluster).await,
            Meanwhile::LeaderKilled | Meanwhile::LeaderKilledAt(_) | Meanwhile::Nothing => {
                kill_leader(cluster).await
            }
        }
    }
}

/// From the beginning of a change of members to what interrupts it: a node takes some seconds to join, and leaves within one.
fn into_it(comes: bool, pick: u32) -> Duration {
    let (first, each) = if comes {
        (INTO_IT, 200)
    } else {
        (Duration::ZERO, 40)
    };
    first + Duration::from_millis(u64::from(pick % 10) * each)
}

fn was_cut_off(leader: u32) -> String {
    format!("leader {leader} cut off")
}

fn was_paused(leader: u32) -> String {
    format!("leader {leader} paused")
}

/// Whether what has happened is that this node led and could not be told of anything: for so long nobody can ask it to know.
pub(super) fn out_of_reach(node: u32, happened: Option<&str>) -> bool {
    happened.is_some_and(|happened| happened == was_cut_off(node) || happened == was_paused(node))
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
    Ok(Some(was_cut_off(leader.node)))
}

async fn pause(cluster: &Cluster) -> Result<Option<String>> {
    let Some(leader) = cluster.leader_soon().await else {
        return Ok(None);
    };
    let node = cluster.node(leader.node);
    let stopped = Stopped(&node);
    if !node.signal(Signal::SIGSTOP)? {
        return Ok(None);
    }
    sleep(PAUSED).await;
    drop(stopped);
    Ok(Some(was_paused(leader.node)))
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
    fn a_removal_is_interrupted_sooner_than_a_join() {
        let ms = |comes| [0, 9, 10].map(|pick| into_it(comes, pick).as_millis());
        assert_eq!(ms(true), [300, 2_100, 300]);
        // It may be over half a second after it has begun.
        assert_eq!(ms(false), [0, 360, 0]);
    }

    #[test]
    fn only_the_leader_that_was_cut_off_or_stopped_was_out_of_reach() {
        for happened in [was_cut_off(2), was_paused(2)] {
            assert!(out_of_reach(2, Some(&happened)), "{happened}");
            assert!(!out_of_reach(1, Some(&happened)), "{happened}");
        }
        for happened in [None, Some("leader 2"), Some("it was killed"), Some("nothing")] {
            assert!(!out_of_reach(2, happened), "{happened:?}");
        }
    }

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
