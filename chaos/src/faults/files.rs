//! Surgery on the files of a node that does not run: the end of its store is cut off, as by a file system that has lost what it
//! had promised. The node has to refuse, or to have lost nothing; it is given back what it had.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use cluster_tests::until;

use super::unsynced::Loss;
use super::{Done, one_of};
use crate::cluster::{Cluster, copy};
use crate::schedule::Effect;

const DB: &str = "sled/db";
/// In a node's folder: its data as it was.
const ASIDE: &str = "data.aside";
/// From a start to readiness or to the refusal: as long as any node has to come back from a fault.
const DECIDED: Duration = Duration::from_secs(120);
/// Every refusal of a store says what to do, and where that is described.
const REMEDY: &str = "docs/operations.md";
/// Of what a node said last, for people.
const LAST_WORDS: usize = 400;

/// Where what was written ends: sled makes its file longer than that.
fn written(path: &Path) -> Result<u64> {
    let mut bytes = Vec::new();
    File::open(path)
        .with_context(|| path.display().to_string())?
        .read_to_end(&mut bytes)?;
    let last = bytes.iter().rposition(|byte| *byte != 0);
    Ok(last.map_or(0, |last| last as u64 + 1))
}

/// What is left of so many bytes.
fn left(written: u64, permille: u32) -> u64 {
    // Something is always cut off.
    (written - written * u64::from(permille.min(999)) / 1000).saturating_sub(1)
}

pub(super) async fn cut(pick: u32, permille: u32, cluster: &Cluster) -> Result<Done> {
    let number = one_of(&cluster.members(), pick).context("no node is left")?;
    let node = cluster.node(number);
    cluster.hold_down(number, true);
    node.kill().await?;
    // What it had not synchronised has reached the disk this time.
    cluster.with_layer(number, |layer| layer.lose(&Loss::LastWrite(1000)))??;
    let (data, aside) = (cluster.data_below(number), node.dir.join(ASIDE));
    copy(&data, &aside)?;
    let db = data.join(DB);
    let was = written(&db)?;
    let is = left(was, permille);
    File::options().write(true).open(&db)?.set_len(is)?;
    let what = format!("node {number}: {DB} cut from {was} to {is} bytes");
    let said = node.log().len();
    // Fails if the node ends before it listens.
    let started = cluster.start_node(number).await;
    let outcome = until("a refusal, or readiness", DECIDED, async || match node.pid() {
        None => Some(Came::Refused),
        Some(_) => node.is_ready().await.then_some(Came::Back),
    })
    .await;
    let done = match outcome {
        Ok(came) => {
            let log = node.log();
            judged(came, log.get(said..).unwrap_or(&log), what)
        }
        // The silent difference is near: it may answer from what it has not lost.
        Err(_) => Done {
            target: format!("{what}; {started:?}"),
            effect: Effect::Failed(format!(
                "a node whose store was cut neither refuses nor comes back within {DECIDED:?}: {}",
                node.checks().await
            )),
        },
    };
    if !node.is_ready().await {
        give_back(&node, &data, &aside).await?;
    }
    fs::remove_dir_all(&aside).with_context(|| aside.display().to_string())?;
    cluster.hold_down(number, false);
    Ok(done)
}

/// What a node makes of a store that was cut.
#[derive(Debug, Clone, Copy)]
enum Came {
    /// It has ended.
    Refused,
    /// It is ready: nothing was lost that it had promised.
    Back,
}

/// A refusal has to say what to do.
fn judged(came: Came, log: &str, what: String) -> Done {
    match came {
        Came::Back => Done::counted(format!("{what}; it has come back whole")),
        Came::Refused if log.contains(REMEDY) => Done::counted(format!("{what}; it has refused")),
        Came::Refused => {
            let last = log.trim_end().chars().rev().take(LAST_WORDS);
            let last: String = last.collect::<Vec<char>>().into_iter().rev().collect();
            Done {
                target: what,
                effect: Effect::Failed(format!(
                    "a node whose store was cut has ended without the remedy ({REMEDY}): {last}"
                )),
            }
        }
    }
}

async fn give_back(node: &cluster_tests::Node, data: &Path, aside: &Path) -> Result<()> {
    node.kill().await?;
    for entry in fs::read_dir(data).with_context(|| data.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            fs::remove_dir_all(&path)?;
        } else {
            fs::remove_file(&path)?;
        }
    }
    copy(&aside.join("."), data)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_ends_without_the_remedy_is_a_finding() {
        let failure = |came, log: &str| {
            let done = judged(came, log, "node 1".to_owned());
            done.effect.failure().map(str::to_owned)
        };
        let refused =
            "data_dir /d: entries are missing; keep it (docs/operations.md, \"A store that is refused\")\n";
        assert_eq!(failure(Came::Refused, refused), None);
        assert_eq!(failure(Came::Back, ""), None);
        let said = failure(Came::Refused, "thread 'main' panicked\n").unwrap();
        assert!(
            said.contains("without the remedy") && said.ends_with("panicked"),
            "{said}"
        );
    }

    #[test]
    fn something_is_cut_off_and_something_is_left_of_most() {
        assert_eq!(left(1000, 0), 999);
        assert_eq!(left(1000, 500), 499);
        assert_eq!(left(100_000, 999), 99);
        assert_eq!(left(0, 10), 0);
    }

    #[test]
    fn what_a_file_was_made_longer_by_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        fs::write(&path, [1, 0, 2, 0, 0, 0]).unwrap();
        assert_eq!(written(&path).unwrap(), 3);
        fs::write(&path, [0; 4]).unwrap();
        assert_eq!(written(&path).unwrap(), 0);
    }
}
