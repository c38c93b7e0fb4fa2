//! Surgery on the files of a node that does not run: the end of its store is cut off, as by a file system that has lost what it
//! had promised. The node has to refuse, or to have lost nothing; it is given back what it had. Its links are cut until it has said
//! how far its log goes: what it gets from the others afterwards would hide what it had lost.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use cluster_tests::{Node, until};
use tokio::time::timeout;

use super::unsynced::Loss;
use super::{Done, one_of};
use crate::cluster::{Cluster, copy};
use crate::schedule::Effect;

const DB: &str = "sled/db";
/// In a node's folder: its data as it was.
const ASIDE: &str = "data.aside";
/// From a start to readiness or to the refusal: as long as any node has to come back from a fault.
const DECIDED: Duration = Duration::from_secs(120);
/// For a leader to say how far it knows a member's log.
const ANSWER: Duration = Duration::from_secs(5);
/// From a start until a node says how far its log goes.
const SHOWN: Duration = Duration::from_secs(30);
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

/// Up to where the node has acknowledged its log, by what the leader knows. Nobody says that of a leader itself.
async fn acknowledged(node: &Node, cluster: &Cluster) -> Option<u64> {
    let leader = cluster.leader_soon().await;
    let leader = leader.filter(|leader| leader.node != node.number)?;
    let client = cluster.playground().client_on("admin", leader.node).ok()?;
    let members = timeout(ANSWER, client.members()).await.ok()?.ok()?;
    let mut members = members.into_body().members.into_iter();
    members.find(|member| member.node_id == node.id())?.matched_index
}

/// Up to where it says that its log goes, if it says so before it ends. Before it has a term it says what it had promised.
async fn shown(node: &Node, cluster: &Cluster) -> Option<u64> {
    let shown = until("how far its log goes", SHOWN, async || {
        if node.pid().is_none() {
            return Some(None);
        }
        let status = cluster.status(node.number).await?;
        (status.term > 0).then_some(Some(status.last_log_index))
    });
    shown.await.ok().flatten()
}

/// What a log lacks of what was acknowledged: where it ends, and how far it had gone.
fn lacks(acknowledged: Option<u64>, shown: Option<u64>) -> Option<(u64, u64)> {
    let (was, is) = (acknowledged?, shown?);
    (is < was).then_some((is, was))
}

pub(super) async fn cut(pick: u32, permille: u32, cluster: &Cluster) -> Result<Done> {
    let number = one_of(&cluster.members(), pick).context("no node is left")?;
    let node = cluster.node(number);
    // A node that starts by a wrong clock may end over its certificates, and that says nothing of its store.
    let right = cluster.right_clocks().await;
    cluster.hold_down(number, true);
    // What it acknowledges from here on nobody hears.
    cluster.links().separate(&[number])?;
    let before = acknowledged(&node, cluster).await;
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
    let shown = shown(&node, cluster).await;
    let what = format!("{what}; acknowledged {before:?}, shown {shown:?}");
    let lacks = lacks(before, shown);
    drop(right);
    cluster.links().heal()?;
    let outcome = until("a refusal, or readiness", DECIDED, async || match node.pid() {
        None => Some(Came::Refused),
        Some(_) => node.is_ready().await.then_some(Came::Back),
    })
    .await;
    let done = match outcome {
        Ok(came) => {
            let log = node.log();
            judged(came, lacks, log.get(said..).unwrap_or(&log), what)
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
    /// It is ready: nothing was lost that it had promised, or it does not know that.
    Back,
}

/// A refusal has to say what to do, and who does not refuse has to have everything that was acknowledged.
fn judged(came: Came, lacks: Option<(u64, u64)>, log: &str, what: String) -> Done {
    if let (Came::Back, Some((is, was))) = (came, lacks) {
        let failure = format!(
            "a node whose log ends at {is} is ready; before its store was cut it had acknowledged {was}"
        );
        return Done::cluster_failed(what, &failure);
    }
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

async fn give_back(node: &Node, data: &Path, aside: &Path) -> Result<()> {
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
            let done = judged(came, None, log, "node 1".to_owned());
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
    fn a_node_that_is_ready_without_what_it_had_acknowledged_is_a_finding() {
        let effect = |came, before, shown| {
            let done = judged(came, lacks(before, shown), REMEDY, "node 1".to_owned());
            done.effect
        };
        let lost = effect(Came::Back, Some(8), Some(7));
        assert_eq!(
            lost.failure(),
            Some("a node whose log ends at 7 is ready; before its store was cut it had acknowledged 8")
        );
        assert_eq!(effect(Came::Refused, Some(8), Some(7)), Effect::Counted);
        // It may have had more than the leader has heard of; and of some nobody knows.
        for (before, shown) in [
            (Some(8), Some(8)),
            (Some(8), Some(9)),
            (None, Some(7)),
            (Some(8), None),
        ] {
            assert_eq!(
                effect(Came::Back, before, shown),
                Effect::Counted,
                "{before:?} {shown:?}"
            );
        }
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
