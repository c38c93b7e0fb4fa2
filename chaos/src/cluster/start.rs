//! Starting nodes that have ended, and waiting until all are back. What a node does not do is told apart from what the harness
//! cannot do: the one is found of the cluster, the other says nothing of it.

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use cluster_tests::{Node, until, wall_clock};

use super::{Cluster, lock};

/// From a start to readiness: a token may have to be filled again, and a snapshot be loaded.
const READY: Duration = Duration::from_secs(120);
/// Between two starts, and between two looks at who is ready.
const LOOK: Duration = Duration::from_millis(200);
/// Starts that a node may fail at, one after the other: one that meets another fault may die of it.
const STARTS: u32 = 3;
/// The same with those that met a wrong clock.
const STARTS_IN_ALL: u32 = 6;
/// For a clock to be right again: longer than any is wrong.
const CLOCK: Duration = Duration::from_secs(30);

/// What nodes have not done although the harness has done its part, as the context of an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Missed {
    /// This one has begun and has ended again and again.
    Start(String),
    /// Members run, and have not come to say the same. Bad lines or disks may be why: whoever waits for the cluster next, and
    /// at the end of a run without any fault, finds whether they ever do.
    InTime,
}

impl fmt::Display for Missed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start(node) => write!(f, "{node} does not start"),
            Self::InTime => write!(f, "the members are not in step in time"),
        }
    }
}

/// Which process was last begun for a node: it writes that itself, before it becomes the node.
fn process(folder: &Path) -> Option<Vec<u8>> {
    std::fs::read(folder.join("pid")).ok()
}

/// Why a node could not be started. It is the node's own fault if it had begun; a program that cannot be run or a port that
/// somebody has taken comes before that.
fn not_started(node: &str, error: anyhow::Error, has_begun: bool) -> anyhow::Error {
    if has_begun {
        error.context(Missed::Start(node.to_owned()))
    } else {
        error.context(format!("{node} cannot be started"))
    }
}

impl Cluster {
    /// Starts members that do not run and are not held down.
    ///
    /// # Errors
    /// One does not start ([`Missed::Start`]), or the harness cannot start it.
    pub(crate) async fn start_stopped(&self) -> Result<()> {
        for node in self.nodes() {
            let held = lock(&self.down).contains(&node.number);
            if !held && node.pid().is_none() {
                self.start_again(&node).await?;
            }
        }
        Ok(())
    }

    /// Tries it more than once. A node that starts by a wrong clock may rightly refuse its certificates: that is no attempt.
    async fn start_again(&self, node: &Node) -> Result<()> {
        let mut failed = 0;
        let mut last = None;
        for _ in 0..STARTS_IN_ALL {
            let before = process(&node.dir);
            let right = wall_clock::is_right(node);
            let Err(error) = self.start_node(node.number).await else {
                return Ok(());
            };
            last = Some((error, process(&node.dir) != before));
            if right && wall_clock::is_right(node) {
                failed += 1;
            } else {
                // If it never is, that many starts have shown nothing.
                let _ = until("the right time", CLOCK, async || {
                    wall_clock::is_right(node).then_some(())
                })
                .await;
            }
            if failed == STARTS {
                break;
            }
            tokio::time::sleep(LOOK).await;
        }
        match last {
            Some((error, has_begun)) => Err(not_started(&node.id(), error, has_begun && failed == STARTS)),
            None => bail!("{}: not started", node.id()),
        }
    }

    /// Until all members run and are ready. A node may end a moment after what it ends of.
    ///
    /// One that is not ready in time has not failed yet: bad lines and disks go on beside this. At the end of the run, when
    /// nothing is broken any more, it has.
    ///
    /// # Errors
    /// Which is not, and what it says; [`Missed::Start`] where it does not even start.
    pub(crate) async fn come_back(&self) -> Result<()> {
        let begun = Instant::now();
        loop {
            self.start_stopped().await?;
            let held = lock(&self.down).clone();
            let mut waiting = None;
            for node in self.nodes() {
                if !held.contains(&node.number) && !node.is_ready().await {
                    waiting = Some(node);
                    break;
                }
            }
            let Some(node) = waiting else { return Ok(()) };
            if begun.elapsed() > READY {
                bail!(
                    "{} is not ready after {READY:?}: {}",
                    node.id(),
                    node.checks().await
                );
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_has_begun_and_ended_is_told_from_one_that_was_never_begun() {
        let folder = tempfile::tempdir().unwrap();
        let before = process(folder.path());
        let error = || anyhow::anyhow!("no answer");
        let missed = |error: &anyhow::Error| error.downcast_ref::<Missed>().cloned();
        // hsmctl has ended before it began one.
        let none = not_started("hsm-node-2", error(), process(folder.path()) != before);
        assert_eq!(missed(&none), None);
        assert_eq!(format!("{none:#}"), "hsm-node-2 cannot be started: no answer");
        std::fs::write(folder.path().join("pid"), "7 4711 boot\n").unwrap();
        let some = not_started("hsm-node-2", error(), process(folder.path()) != before);
        let some = some.context("after the kill");
        assert_eq!(missed(&some), Some(Missed::Start("hsm-node-2".to_owned())));
        assert_eq!(
            format!("{some:#}"),
            "after the kill: hsm-node-2 does not start: no answer"
        );
    }
}
