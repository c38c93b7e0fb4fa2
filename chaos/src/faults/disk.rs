//! A disk without space, and synchronisations that are slow or fail.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use cluster_tests::{Node, until};

use super::unsynced::Loss;
use super::{Done, target};
use crate::cluster::{Cluster, Disk};

/// From the end of the fault until the node has said or done something about it.
const NOTICED: Duration = Duration::from_secs(10);
/// Of a node to which the kernel has said that there is no space left; else it was below its reserve, and had nothing to write.
pub(crate) const MET_ITS_END: &str = "met its end";
/// What `/readyz` says of a disk that is nearly full.
const BELOW_RESERVE: &str = "below its reserve";
/// For a node to end that could not synchronise what it wrote, on a machine that is busy.
const ENDED: Duration = Duration::from_secs(30);

async fn victim(leader: bool, pick: u32, cluster: &Cluster) -> Result<Node> {
    let before = cluster.leader_soon().await;
    let number = target(leader, pick, &cluster.members(), before).context("no node is left")?;
    Ok(cluster.node(number))
}

/// What the kernel says of a full disk, as the standard library prints it.
fn speaks_of_space(log: &str) -> bool {
    log.contains("os error 28") || log.contains("No space left")
}

fn log(node: &Node) -> Vec<u8> {
    fs::read(node.dir.join("log")).unwrap_or_default()
}

/// What has come to a log: of bytes, because a place in a text may be in the middle of a letter.
fn since(log: &[u8], said: usize) -> String {
    String::from_utf8_lossy(log.get(said..).unwrap_or_default()).into_owned()
}

pub(super) async fn full(leader: bool, pick: u32, lasts: Duration, cluster: &Cluster) -> Result<Done> {
    let node = victim(leader, pick, cluster).await?;
    let said = log(&node).len();
    let filled = cluster.with_equipment(node.number, |equipment| equipment.disk().map(Disk::fill))?;
    let bytes = filled.context("the node has no disk of its own")??;
    let what = format!("node {}, {bytes} bytes of ballast", node.number);
    let spoken = || speaks_of_space(&since(&log(&node), said));
    // Who leads takes no changes below its reserve, and has nothing to write then.
    let mut refused = false;
    let noticed = until("a word of the full disk", lasts + NOTICED, async || {
        refused = refused || node.checks().await.contains(BELOW_RESERVE);
        (refused || spoken() || node.pid().is_none()).then_some(())
    });
    let (_, ()) = tokio::join!(noticed, tokio::time::sleep(lasts));
    // In this order: what has ended writes nothing more.
    let ended = node.pid().is_none();
    let spoken = spoken();
    cluster
        .with_equipment(node.number, |equipment| equipment.disk().map(Disk::make_room))?
        .context("the node has no disk of its own")??;
    Ok(after_full(what, spoken, refused, ended))
}

fn after_full(what: String, spoken: bool, refused: bool, ended: bool) -> Done {
    if ended && !spoken {
        return Done::cluster_failed(what, "the node has ended on a full disk without a word of that");
    }
    let met = if spoken {
        MET_ITS_END
    } else {
        "was below its reserve"
    };
    let what = format!("{what}; it {met}");
    Done::counted_if(
        spoken || refused,
        what,
        "the node has not met the end of its disk",
    )
}

pub(super) async fn slow(
    leader: bool,
    pick: u32,
    each: Duration,
    lasts: Duration,
    cluster: &Cluster,
) -> Result<Done> {
    let number = victim(leader, pick, cluster).await?.number;
    let before = cluster.with_layer(number, |layer| {
        layer.delay(each);
        layer.delayed()
    })?;
    tokio::time::sleep(lasts).await;
    let after = cluster.with_layer(number, |layer| {
        layer.delay(Duration::ZERO);
        layer.delayed()
    })?;
    let count = after - before;
    let what = format!("node {number}: {count} synchronisations took {each:?} longer");
    Ok(Done::counted_if(count > 0, what, "nothing was synchronised"))
}

pub(super) async fn failing(leader: bool, pick: u32, lasts: Duration, cluster: &Cluster) -> Result<Done> {
    let node = victim(leader, pick, cluster).await?;
    let before = cluster.with_layer(node.number, |layer| {
        layer.fail(true);
        layer.failed()
    })?;
    tokio::time::sleep(lasts).await;
    // They go on failing meanwhile: one that succeeds after one that did not would hide that this was passed over.
    let ended = node.wait_gone(ENDED).await.is_ok();
    let after = cluster.with_layer(node.number, |layer| {
        layer.fail(false);
        layer.failed()
    })?;
    if ended {
        // A disk that has failed to take something does not remember it: what was promised all the same is missed now.
        cluster.with_layer(node.number, |layer| layer.lose(&Loss::All))??;
    }
    Ok(after_failures(node.number, after - before, ended))
}

/// What a disk has not taken may be gone, whatever it says next: a node that goes on after that would promise what it lacks.
fn after_failures(node: u32, count: u64, ended: bool) -> Done {
    let what = format!("node {node}: {count} synchronisations failed, it has ended: {ended}");
    match (count, ended) {
        (0, _) => Done::not_counted(what, "nothing was synchronised"),
        (_, true) => Done::counted(what),
        (_, false) => Done::cluster_failed(what, "the node runs on after synchronisations that have failed"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::schedule::Effect;

    #[test]
    fn who_ends_on_a_full_disk_says_why() {
        let effect = |spoken, refused, ended| after_full("node 1".to_owned(), spoken, refused, ended).effect;
        assert_eq!(effect(true, false, false), Effect::Counted);
        assert_eq!(effect(true, true, true), Effect::Counted);
        assert_eq!(effect(false, true, false), Effect::Counted);
        let met = |spoken| after_full("node 1".to_owned(), spoken, true, false).target;
        assert!(met(true).ends_with(MET_ITS_END) && !met(false).ends_with(MET_ITS_END));
        let not = effect(false, false, false);
        assert!(not != Effect::Counted && not.failure().is_none(), "{not:?}");
        let ended = effect(false, true, true);
        assert!(ended.failure().unwrap().contains("without a word"));
    }

    #[test]
    fn who_goes_on_after_a_failed_synchronisation_is_a_finding() {
        assert_eq!(after_failures(1, 3, true).effect, Effect::Counted);
        assert!(
            after_failures(1, 3, false)
                .effect
                .failure()
                .unwrap()
                .contains("runs on")
        );
        for ended in [false, true] {
            let not = after_failures(1, 0, ended).effect;
            assert!(not != Effect::Counted && not.failure().is_none(), "{not:?}");
        }
    }

    #[test]
    fn a_full_disk_is_known_by_its_words() {
        let error = std::io::Error::from_raw_os_error(28).to_string();
        assert!(speaks_of_space(&error), "{error}");
        assert!(!speaks_of_space("all is well"));
    }

    #[test]
    fn what_a_log_said_of_an_earlier_disk_is_not_said_again() {
        let mut log = "No space left \u{e4}\n".as_bytes().to_vec();
        let said = log.len();
        log.extend(b"all is well\n");
        // In the middle of the letter, too.
        for place in [said, said - 2] {
            let since = since(&log, place);
            assert!(
                since.ends_with("all is well\n") && !speaks_of_space(&since),
                "{since:?}"
            );
        }
        assert_eq!(since(&log, log.len() + 1), "");
    }
}
