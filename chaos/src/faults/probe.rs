//! A change that is asked for again and again until it is acknowledged. Clients change something now and then; how long no
//! change was possible is to be known better than that, and that none is although a quorum could make it is a finding.

use std::time::Duration;

use anyhow::Result;
use hsm_api::Client;
use hsm_api::admin::{RevocationMatch, RevokeRequest};
use tokio::time::{Instant, sleep};

use super::Done;
use crate::cluster::Cluster;
use crate::history::{Answer, Operation, Recorder};

/// In a history, whoever asks here.
pub(crate) const PROCESS: u32 = 40;
/// An election and its repetition after a split vote, a network on which hardly anything comes through for as long as that is
/// planned, and as much again for a machine that is busy. A quorum that takes no change for longer has failed.
pub(super) const OWED: Duration = Duration::from_secs(60);
/// Between two attempts.
const AGAIN: Duration = Duration::from_millis(20);

/// Revokes somebody who does not exist, through these nodes in turn, each attempt another one, so that what is acknowledged
/// can be looked for at the end like every other revocation. Whether it was acknowledged in time.
pub(super) async fn write(
    nodes: &[u32],
    within: Duration,
    cluster: &Cluster,
    recorder: &Recorder,
) -> Result<bool> {
    let clients: Vec<Client> = nodes
        .iter()
        .map(|number| cluster.playground().client_on("admin", *number))
        .collect::<Result<_>>()?;
    let deadline = Instant::now() + within;
    for client in clients.iter().cycle() {
        let cn = format!("probe-{}", recorder.number());
        let request = RevokeRequest {
            what: Some(RevocationMatch {
                cn: Some(cn.clone()),
                ..RevocationMatch::default()
            }),
            certificate: None,
            reason: "chaos".to_owned(),
        };
        let pending = recorder.invoke(PROCESS, Operation::Revoke { cn });
        match client.revoke(&request).await {
            Ok(answer) => {
                pending.answered(Answer::Done, &answer.meta);
                return Ok(true);
            }
            Err(error) => pending.failed(&error),
        }
        if Instant::now() >= deadline {
            break;
        }
        sleep(AGAIN).await;
    }
    Ok(false)
}

/// Nodes that are a quorum and reach each other: nothing is cut between them, and nobody ends one of them.
pub(super) struct Quorum {
    nodes: Vec<u32>,
    /// Their processes, as they were first.
    first: Vec<Option<i32>>,
}

/// What a quorum has made of a change that it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// It was acknowledged.
    Made,
    /// It was not, and they ran all the time.
    Stands,
    /// Not all of them ran all the time, or they were not asked: that it was not made shows nothing.
    Unsure,
}

impl Quorum {
    /// From now on.
    pub(super) fn of(nodes: Vec<u32>, cluster: &Cluster) -> Self {
        let first = processes(&nodes, cluster);
        Self { nodes, first }
    }

    /// Whether each of them has run all the time, as the same process.
    pub(super) fn has_run(&self, cluster: &Cluster) -> bool {
        same(&self.first, &processes(&self.nodes, cluster))
    }

    /// Asks for a change for as long as they may owe one.
    pub(super) async fn change(&self, cluster: &Cluster, recorder: &Recorder) -> Result<Progress> {
        let acknowledged = write(&self.nodes, OWED, cluster, recorder).await?;
        Ok(Progress::of(acknowledged, self.has_run(cluster)))
    }
}

fn processes(nodes: &[u32], cluster: &Cluster) -> Vec<Option<i32>> {
    nodes.iter().map(|number| cluster.node(*number).pid()).collect()
}

fn same(first: &[Option<i32>], now: &[Option<i32>]) -> bool {
    !first.is_empty() && first == now && first.iter().all(Option::is_some)
}

impl Progress {
    fn of(acknowledged: bool, ran: bool) -> Self {
        match (acknowledged, ran) {
            (true, _) => Self::Made,
            (false, true) => Self::Stands,
            (false, false) => Self::Unsure,
        }
    }

    /// What a fault has come to, unless a quorum that could go on has stood still meanwhile.
    pub(super) fn or(self, done: Done) -> Done {
        match self {
            Self::Made | Self::Unsure => done,
            Self::Stands => {
                let what = format!(
                    "no change was acknowledged within {OWED:?} by a quorum that ran and was connected all the time"
                );
                Done::cluster_failed(done.target, &what)
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::schedule::Effect;

    #[test]
    fn only_a_quorum_that_ran_all_the_time_and_stood_still_is_a_finding() {
        let effect = |acknowledged, ran| {
            let progress = Progress::of(acknowledged, ran);
            progress.or(Done::not_counted("nodes", "nobody led")).effect
        };
        let failed = effect(false, true);
        let failure = failed.failure().unwrap();
        assert!(failure.starts_with("no change was acknowledged"), "{failure}");
        for (acknowledged, ran) in [(true, true), (true, false), (false, false)] {
            let same = Effect::NotCounted("nobody led".to_owned());
            assert_eq!(effect(acknowledged, ran), same, "{acknowledged} {ran}");
        }
    }

    #[test]
    fn who_was_started_anew_or_has_ended_has_not_run_all_the_time() {
        let first = [Some(7), Some(8)];
        assert!(same(&first, &first));
        for now in [[Some(7), Some(9)], [Some(7), None]] {
            assert!(!same(&first, &now), "{now:?}");
        }
        assert!(!same(&[Some(7), None], &[Some(7), None]), "one never ran");
        assert!(!same(&[], &[]), "nobody was asked");
    }
}
