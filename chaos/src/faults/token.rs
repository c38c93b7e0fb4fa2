//! What happens to the folder of a node's tokens: it is gone, it is an older one, it cannot be read.
//!
//! Whatever it is, the node has to live: it votes, says which slot does not serve, and fills an older token again from what the
//! cluster has. One that ends over its tokens has cost the cluster a voter, and that is found.

use std::collections::BTreeSet;
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
/// For a node to fill an older token again, key by key, while the weather may make each of them slow.
const FILLED: Duration = Duration::from_secs(180);
/// For a copy of tokens in which nothing has gone meanwhile.
const COPIED: Duration = Duration::from_secs(10);
/// Of a start that ends at once: it may have met something else, such as a port that is not free yet.
const STARTS: u32 = 3;

fn tokens(node: &Node) -> PathBuf {
    node.dir.join("tokens")
}

/// Keeps a copy of every node's tokens, to come back to later.
pub(crate) fn keep_copies(cluster: &Cluster) -> Result<()> {
    cluster.nodes().iter().try_for_each(keep_copy)
}

fn keep_copy(node: &Node) -> Result<()> {
    let first = node.dir.join(FIRST);
    // Into one that was broken off the next one would be copied.
    remove(&first)?;
    copy(&tokens(node), &first)
}

/// The same while its tokens are written to: a file that goes meanwhile breaks a copy off.
pub(crate) async fn keep_copy_of_running(node: &Node) -> Result<()> {
    let mut last = String::new();
    let copied = until("a copy of its tokens", COPIED, async || match keep_copy(node) {
        Ok(()) => Some(()),
        Err(error) => {
            last = format!("{error:#}");
            None
        }
    })
    .await;
    copied.with_context(|| last)
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

/// Whether the node says that something is wrong with a slot.
async fn is_noticed(node: &Node, cluster: &Cluster) -> bool {
    match cluster.status(node.number).await {
        Some(status) => {
            let mut slots = status.slots.iter();
            slots.any(|slot| !matches!(slot.state, SlotState::Ready) || slot.missing_keys > 0)
        }
        None => false,
    }
}

/// False as soon as it has ended, too: then it says nothing any more.
async fn noticed_within(node: &Node, within: Duration, cluster: &Cluster) -> bool {
    let noticed = until("a word of the token", within, async || {
        if node.pid().is_none() {
            return Some(false);
        }
        is_noticed(node, cluster).await.then_some(true)
    });
    noticed.await.unwrap_or(false)
}

/// What came of tokens that were not there: to be asked before anybody ends the node.
fn came(node: &Node, what: String, noticed: bool) -> Done {
    judged(what, noticed, node.pid().is_none(), &node.log())
}

fn judged(what: String, noticed: bool, ended: bool, log: &str) -> Done {
    if !ended {
        return Done::counted_if(noticed, what, "the node has not noticed it");
    }
    let last = log.lines().last().unwrap_or_default();
    let failure = format!("the node has ended over its tokens, and a voter with it; its last words: {last}");
    Done::cluster_failed(what, &failure)
}

fn victim(pick: u32, cluster: &Cluster) -> Result<Node> {
    let number = one_of(&cluster.members(), pick).context("no node is left")?;
    Ok(cluster.node(number))
}

/// Starts it without its tokens. Whether it lives then is for [`came`] to say.
async fn start_without(node: &Node, cluster: &Cluster) {
    for _ in 0..STARTS {
        if let Err(error) = cluster.start_node(node.number).await {
            eprintln!("{} without its tokens: {error:#}", node.id());
        }
        if node.pid().is_some() {
            return;
        }
    }
}

pub(super) async fn deleted(running: bool, pick: u32, lasts: Duration, cluster: &Cluster) -> Result<Done> {
    let node = victim(pick, cluster)?;
    let what = format!("node {}, running: {running}", node.number);
    // A node that starts by a wrong clock may end over its certificates.
    let _right = cluster.right_clocks().await;
    if node.pid().is_none() {
        return Ok(Done::not_counted(what, "it did not run"));
    }
    cluster.hold_down(node.number, true);
    let (mut noticed, mut lives) = (false, true);
    if running {
        set_aside(&node)?;
        let (seen, ()) = tokio::join!(noticed_within(&node, lasts, cluster), tokio::time::sleep(lasts));
        noticed = seen;
        lives = node.pid().is_some();
    }
    if !noticed && lives {
        // What a token has in memory outlives its folder; a start needs the folder.
        node.kill().await?;
        if !running {
            set_aside(&node)?;
        }
        start_without(&node, cluster).await;
        noticed = noticed_within(&node, NOTICED, cluster).await;
    }
    let done = came(&node, what, noticed);
    put_back(&node).await?;
    cluster.hold_down(node.number, false);
    Ok(done)
}

pub(super) async fn unreadable(pick: u32, lasts: Duration, cluster: &Cluster) -> Result<Done> {
    let node = victim(pick, cluster)?;
    let _right = cluster.right_clocks().await;
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
    let done = came(&node, format!("node {}", node.number), noticed);
    put_back(&node).await?;
    cluster.hold_down(node.number, false);
    Ok(done)
}

/// Files of objects in all tokens of a folder, by their places in it. As many may have gone as have come.
fn objects(tokens: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut objects = BTreeSet::new();
    for entry in fs::read_dir(tokens).with_context(|| tokens.display().to_string())? {
        let folder = entry?.path();
        if folder.is_dir() {
            for file in fs::read_dir(&folder)? {
                let file = file?.path();
                if file.extension().is_some_and(|ext| ext == "object") {
                    objects.insert(file.strip_prefix(tokens)?.to_owned());
                }
            }
        }
    }
    Ok(objects)
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
    let right = cluster.right_clocks().await;
    cluster.hold_down(node.number, true);
    node.kill().await?;
    let (now, then) = (objects(&tokens(&node))?, objects(&first)?);
    set_aside(&node)?;
    copy(&first, &tokens(&node))?;
    start_without(&node, cluster).await;
    drop(right);
    let filled = node.wait_ready(FILLED).await;
    let what = format!(
        "node {}: {} objects instead of {}",
        node.number,
        then.len(),
        now.len()
    );
    let done = match &filled {
        // It has what it needs; the newer ones are not needed any more.
        Ok(()) => {
            remove(&node.dir.join(ASIDE))?;
            Done::counted_if(
                now != then,
                format!("{what}; it has come back by itself"),
                "the older copy has the same objects",
            )
        }
        Err(error) => {
            let failure = format!("it does not fill an older token again: {error:#}");
            put_back(&node).await?;
            Done::cluster_failed(format!("{what}; it was given back the newer ones"), &failure)
        }
    };
    cluster.hold_down(node.number, false);
    Ok(done)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::schedule::Effect;

    #[test]
    fn a_node_that_ends_over_its_tokens_is_a_finding() {
        let effect = |noticed, ended| judged("node 2".to_owned(), noticed, ended, "one\nno token\n").effect;
        assert_eq!(effect(true, false), Effect::Counted);
        let not = effect(false, false);
        assert!(
            not != Effect::Counted && not.failure().is_none(),
            "it may be asked too late"
        );
        for noticed in [true, false] {
            let failure = effect(noticed, true);
            assert!(failure.failure().unwrap().ends_with("no token"), "{failure:?}");
        }
    }

    #[test]
    fn objects_are_known_by_their_places_in_all_tokens() {
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
        let before = objects(dir.path()).unwrap();
        assert_eq!(before.len(), 3, "{before:?}");
        let older = tempfile::tempdir().unwrap();
        copy(&dir.path().join("."), older.path()).unwrap();
        assert_eq!(objects(older.path()).unwrap(), before, "wherever they lie");
        // One was destroyed, and another made.
        fs::rename(dir.path().join("a/1.object"), dir.path().join("a/3.object")).unwrap();
        let after = objects(dir.path()).unwrap();
        assert!(after.len() == 3 && after != before, "{after:?}");
    }
}
