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

const DB: &str = "sled/db";
/// In a node's folder: its data as it was.
const ASIDE: &str = "data.aside";
/// From a start to readiness or to the refusal.
const DECIDED: Duration = Duration::from_secs(60);

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
    // Fails if the node ends before it listens.
    let started = cluster.start_node(number).await;
    let outcome = until("a refusal, or readiness", DECIDED, async || match node.pid() {
        None => Some("it has refused"),
        Some(_) => node.is_ready().await.then_some("it has come back whole"),
    })
    .await;
    let done = match outcome {
        Ok(came) => Done::counted(format!("{what}; {came}")),
        Err(_) => Done::not_counted(
            format!("{what}; {started:?}"),
            format!("it neither refuses nor comes back: {}", node.checks().await),
        ),
    };
    if !node.is_ready().await {
        give_back(&node, &data, &aside).await?;
    }
    fs::remove_dir_all(&aside).with_context(|| aside.display().to_string())?;
    cluster.hold_down(number, false);
    Ok(done)
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
