//! SIGSTOP: a node that neither answers nor ends, and goes on later as if no time had passed.
//!
//! A pause counts if the process was seen to stand still at its end: one that is shorter than an election, or of a follower, is there
//! to be passed over by the others, and what they and the clients made of it the oracles judge. Only that of a leader which
//! outlasts every election time-out has to have left a trace: a commit in a higher term.

use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use super::probe::Quorum;
use super::{Done, target};
use crate::cluster::{Cluster, ELECTION};
use crate::history::Recorder;

/// For the cluster to find another leader, if there is to be one.
const OVERTAKEN: Duration = Duration::from_secs(15);

/// Who hears no leader waits for as long as a leader may have a quorum without being heard, and for his own time-out after that.
const OUTLASTED: Duration = ELECTION.saturating_mul(2);

/// Goes on when this is dropped, however the step ends.
pub(super) struct Stopped<'a>(pub(super) &'a cluster_tests::Node);

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        // One that has died meanwhile needs nothing.
        let _ = self.0.signal(Signal::SIGCONT);
    }
}

/// Whether the kernel says that the process is stopped.
fn is_stopped(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().next());
    state == Some("T")
}

pub(super) async fn carry_out(
    (leader, pick, tenths): (bool, u32, u32),
    cluster: &Cluster,
    recorder: &Recorder,
) -> Result<Done> {
    let before = cluster.leader_soon().await;
    let number = target(leader, pick, &cluster.members(), before).context("no node is left")?;
    let node = cluster.node(number);
    let time = ELECTION * tenths / 10;
    let what = format!("node {number} for {time:?}, leader {before:?}");
    let Some(pid) = node.pid() else {
        return Ok(Done::not_counted(what, "it did not run"));
    };
    let stopped = Stopped(&node);
    node.signal(Signal::SIGSTOP)?;
    tokio::time::sleep(time).await;
    let stood = is_stopped(pid);
    drop(stopped);
    if !stood {
        return Ok(Done::not_counted(what, "it was not seen to stand still"));
    }
    match before.filter(|leader| leader.node == number && time > OUTLASTED) {
        // It outlasted every election time-out: somebody else leads, or it would have to be explained.
        Some(leader) => {
            let all = Quorum::of(cluster.members(), cluster);
            let (other, progress) = tokio::join!(
                cluster.commits_above(leader.term, &[], OVERTAKEN),
                all.change(cluster, recorder)
            );
            let why_not = "the pause outlasted an election, and nothing was committed in a higher term";
            // A vote that was split, or lost on a bad line, may have left them without a leader until this one went on, which is
            // a few seconds: that alone is no failure. That all of them together take no change then would be.
            let done = Done::counted_if(other.is_some(), format!("{what}, then {other:?}"), why_not);
            Ok(progress?.or(done))
        }
        None => Ok(Done::counted(what)),
    }
}
