//! What happens to the folder of a node's tokens: it is gone, it is an older one, it cannot be read.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use cluster_tests::{Node, until};
use hsm_api::admin::SlotState;

use super::{Done, one_of};
use crate::cluster::{Cluster, copy};

/// Where the real ones are meanwhile.
const ASIDE: &str = "tokens.aside";
/// A copy from the beginning of the run.
const FIRST: &str = "tokens.first";
/// From a start until a node says what is wrong with its slots.
const NOTICED: Duration = Duration::from_secs(20);
/// For a node to fill an older token again.
const FILLED: Duration = Duration::from_secs(60);

fn tokens(node: &Node) -> PathBuf {
    node.dir.join("tokens")
}

/// Keeps a copy of every node's tokens, to come back to later.
pub(crate) fn keep_copies(cluster: &Cluster) -> Result<()> {
    cluster.nodes().iter().try_for_each(keep_copy)
}

pub(crate) fn keep_copy(node: &Node) -> Result<()> {
    copy(&tokens(node), &node.dir.join(FIRST))
}

/// Gives a node its tokens back, if something stands in their place. It must not run while that is done.
pub(crate) async fn put_back(node: &Node) -> Result<()> {
    let aside = node.dir.join(ASIDE);
    if !aside.exists() {
        return Ok(());
    }
    node.kill().await?;
    remove(&tokens(node))?;
    fs::rename(&aside, tokens(node)).with_context(|| aside.display().to_string())
}

fn remove(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(there) if there.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => Ok(()),
    };
    removed.with_context(|| path.display().to_string())
}

fn set_aside(node: &Node) -> Result<()> {
    let from = tokens(node);
    fs::rename(&from, node.dir.join(ASIDE)).with_context(|| from.display().to_string())
}

/// Whether the node says that something is wrong with a slot, does not answer as a ready one, or has ended.
async fn is_noticed(node: &Node, cluster: &Cluster) -> bool {
    if node.pid().is_none() {
        return true;
    }
    match cluster.status(node.number).await {
        Some(status) => {
            let mut slots = status.slots.iter();
            slots.any(|slot| !matches!(slot.state, SlotState::Ready) || slot.missing_keys > 0)
        }
        None => false,
    }
}

async fn noticed_within(node: &Node, within: Duration, cluster: &Cluster) -> bool {
    let noticed = until("a word of the token", within, async || {
        is_noticed(node, cluster).await.then_some(())
    });
    noticed.await.is_ok()
}

fn victim(pick: u32, cluster: &Cluster) -> Result<Node> {
    let number = one_of(&cluster.members(), pick).context("no node is left")?;
    Ok(cluster.node(number))
}

/// Starts it without its tokens. It may refuse to.
async fn start_without(node: &Node, cluster: &Cluster) {
    if let Err(error) = cluster.start_node(node.number).await {
        eprintln!("{} without its tokens: {error:#}", node.id());
    }
}

pub(super) async fn deleted(running: bool, pick: u32, lasts: Duration, cluster: &Cluster) -> Result<Done> {
    let node = victim(pick, cluster)?;
    let what = format!("node {}, running: {running}", node.number);
    cluster.hold_down(node.number, true);
    let mut noticed = false;
    if running {
        set_aside(&node)?;
        let (seen, ()) = tokio::join!(noticed_within(&node, lasts, cluster), tokio::time::sleep(lasts));
        noticed = seen;
    }
    if !noticed {
        // What a token has in memory outlives its folder; a start needs the folder.
        node.kill().await?;
        if !running {
            set_aside(&node)?;
        }
        start_without(&node, cluster).await;
        noticed = noticed_within(&node, NOTICED, cluster).await;
    }
    put_back(&node).await?;
    cluster.hold_down(node.number, false);
    Ok(Done::counted_if(noticed, what, "the node has not noticed it"))
}

pub(super) async fn unreadable(pick: u32, lasts: Duration, cluster: &Cluster) -> Result<Done> {
    let node = victim(pick, cluster)?;
    cluster.hold_down(node.number, true);
    node.kill().await?;
    set_aside(&node)?;
    // Permissions mean nothing to root; that nothing can be opened below it holds for everybody.
    fs::write(tokens(&node), b"")?;
    start_without(&node, cluster).await;
    let (noticed, ()) = tokio::join!(
        noticed_within(&node, NOTICED.max(lasts), cluster),
        tokio::time::sleep(lasts)
    );
    put_back(&node).await?;
    cluster.hold_down(node.number, false);
    let what = format!("node {}", node.number);
    Ok(Done::counted_if(noticed, what, "the node has not noticed it"))
}

/// Files of objects in all tokens of a folder.
fn objects(tokens: &Path) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(tokens).with_context(|| tokens.display().to_string())? {
        let folder = entry?.path();
        if folder.is_dir() {
            for file in fs::read_dir(&folder)? {
                count += usize::from(file?.path().extension().is_some_and(|ext| ext == "object"));
            }
        }
    }
    Ok(count)
}

pub(super) async fn older(pick: u32, cluster: &Cluster) -> Result<Done> {
    let node = victim(pick, cluster)?;
    let first = node.dir.join(FIRST);
    if !first.exists() {
        return Ok(Done::not_counted(
            format!("node {}", node.number),
            "there is no older copy of its tokens",
        ));
    }
    cluster.hold_down(node.number, true);
    node.kill().await?;
    let (now, then) = (objects(&tokens(&node))?, objects(&first)?);
    set_aside(&node)?;
    copy(&first, &tokens(&node))?;
    let started = cluster.start_node(node.number).await;
    let filled = node.wait_ready(FILLED).await;
    let what = format!("node {}: {then} objects instead of {now}", node.number);
    let what = match (&started, &filled) {
        (Ok(()), Ok(())) => {
            // It has what it needs; the newer ones are not needed any more.
            remove(&node.dir.join(ASIDE))?;
            format!("{what}; it has come back by itself")
        }
        _ => {
            put_back(&node).await?;
            format!("{what}; it was given back the newer ones")
        }
    };
    cluster.hold_down(node.number, false);
    Ok(Done::counted_if(
        now != then,
        what,
        "the older copy has the same objects",
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_counted_over_all_tokens() {
        let dir = tempfile::tempdir().unwrap();
        for (token, file) in [
            ("a", "token.object"),
            ("a", "1.object"),
            ("a", "1.lock"),
            ("b", "2.object"),
        ] {
            fs::create_dir_all(dir.path().join(token)).unwrap();
            fs::write(dir.path().join(token).join(file), b"").unwrap();
        }
        fs::write(dir.path().join("stray.object"), b"").unwrap();
        assert_eq!(objects(dir.path()).unwrap(), 3);
    }
}
