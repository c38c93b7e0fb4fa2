//! What is done to the cluster, one file for each family. Every fault undoes itself, says what it has hit, and whether that
//! had the effect for which it is there: a pause that nobody noticed is not counted.

mod clock;
pub(crate) mod disk;
pub mod failpoint;
mod files;
mod interruption;
mod kill;
pub(crate) mod membership;
mod module;
mod operator;
mod partition;
mod pause;
mod power;
pub(crate) mod probe;
mod replication;
pub(crate) mod token;
pub mod unsynced;
mod weather;

use std::time::Duration;

use anyhow::{Context, Result};
use cluster_tests::Leader;

use crate::cluster::{Cluster, Missed};
use crate::history::Recorder;
use crate::schedule::{Effect, Fault, Fired, Step, Trouble};

/// The target of a fault that was broken off.
const NOT_SAID: &str = "unknown";

/// What a fault says of itself.
pub(crate) struct Done {
    /// What was hit.
    pub(crate) target: String,
    /// What came of it.
    pub(crate) effect: Effect,
}

impl Done {
    pub(crate) fn counted(target: impl Into<String>) -> Self {
        Self {
            target: target.into(),
            effect: Effect::Counted,
        }
    }

    pub(crate) fn not_counted(target: impl Into<String>, why: impl Into<String>) -> Self {
        Self {
            target: target.into(),
            effect: Effect::NotCounted(why.into()),
        }
    }

    /// It was carried out, and the cluster has done what it must not do: a finding.
    pub(crate) fn cluster_failed(target: impl Into<String>, what: &str) -> Self {
        Self {
            target: target.into(),
            effect: Effect::Failed(what.to_owned()),
        }
    }

    /// With what came of the cluster since: a node that does not start again is its failure, whatever the fault had come to.
    fn followed_by(self, back: &Result<()>) -> Self {
        match back {
            Err(error) if self.effect.failure().is_none() && is_of_start(error) => {
                Self::cluster_failed(self.target, &format!("{error:#}"))
            }
            _ => self,
        }
    }

    /// Counted if it is so.
    pub(crate) fn counted_if(so: bool, target: impl Into<String>, why_not: &str) -> Self {
        if so {
            Self::counted(target)
        } else {
            Self::not_counted(target, why_not)
        }
    }
}

fn is_of_start(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref::<Missed>(), Some(Missed::Start(_)))
}

/// What a fault has come to that was broken off by what nodes have not done; any other error is the harness's.
fn broken_off(error: anyhow::Error) -> Result<Done> {
    match error.downcast_ref::<Missed>() {
        Some(Missed::Start(_)) => Ok(Done::cluster_failed(NOT_SAID, &format!("{error:#}"))),
        Some(Missed::InTime) => Ok(Done::not_counted(NOT_SAID, format!("{error:#}"))),
        None => Err(error),
    }
}

/// One of these that `pick` chooses.
pub(crate) fn one_of(among: &[u32], pick: u32) -> Option<u32> {
    let index = pick as usize % among.len().max(1);
    among.get(index).copied()
}

/// The leader if it is asked for and there is one, else one of the others.
pub(crate) fn target(wants_leader: bool, pick: u32, members: &[u32], leader: Option<Leader>) -> Option<u32> {
    let leader = leader.map(|leader| leader.node);
    if wants_leader && leader.is_some() {
        return leader;
    }
    let others: Vec<u32> = members
        .iter()
        .copied()
        .filter(|member| Some(*member) != leader)
        .collect();
    one_of(if others.is_empty() { members } else { &others }, pick)
}

/// Carries one step out, undoes it, and waits until the cluster has come back from it.
///
/// # Errors
/// The harness could not do it. What nodes have not done is an effect, not an error.
pub(crate) async fn carry_out(
    step: &Step,
    cluster: &Cluster,
    recorder: &Recorder,
) -> Result<(Fired, Option<String>)> {
    let kind = step.fault.kind();
    let at_ms = recorder.elapsed_ms();
    recorder.note(&format!("fault {} begins: {kind}", step.number));
    let done = of_kind(step, cluster, recorder)
        .await
        .or_else(broken_off)
        .with_context(|| format!("step {}: {:?}", step.number, step.fault))?;
    // Those beside it may still have nodes down.
    let back = if kind.is_weather() {
        Ok(())
    } else {
        cluster.come_back().await
    };
    let healed_ms = recorder.elapsed_ms();
    let done = match (&step.fault, &back) {
        (Fault::Kill(victims, _), Ok(())) => {
            kill::once_all_are_back(*victims, done, cluster, recorder).await?
        }
        _ => done.followed_by(&back),
    };
    let stuck = back.err().map(|error| format!("{error:#}"));
    let came = match &stuck {
        None => "is over".to_owned(),
        Some(why) => format!("is over, and the cluster has not come back: {why}"),
    };
    recorder.note(&format!(
        "fault {} {came}: {kind} of {}: {:?}",
        step.number, done.target, done.effect
    ));
    let fired = Fired {
        step: step.number,
        kind,
        at_ms,
        target: done.target,
        effect: done.effect,
        healed_ms,
    };
    Ok((fired, stuck))
}

async fn of_kind(step: &Step, cluster: &Cluster, recorder: &Recorder) -> Result<Done> {
    let lasts = Duration::from_millis(step.lasts_ms);
    match &step.fault {
        Fault::Kill(victims, pick) => {
            kill::carry_out((*victims, *pick), step.number, lasts, cluster, recorder).await
        }
        Fault::Pause { leader, pick, tenths } => {
            pause::carry_out((*leader, *pick, *tenths), cluster, recorder).await
        }
        Fault::Partition(shape, pick) => partition::carry_out((shape, *pick), lasts, cluster, recorder).await,
        Fault::IsolateUntilSnapshot(pick) => partition::until_snapshot(*pick, cluster).await,
        Fault::Delay { delay_ms, jitter_ms } => weather::delay(*delay_ms, *jitter_ms, lasts, cluster).await,
        Fault::Loss {
            lost_permille,
            reset_permille,
        } => weather::loss(*lost_permille, *reset_permille, lasts, cluster).await,
        Fault::ByteRate { bytes_per_second } => weather::rate(*bytes_per_second, lasts, cluster).await,
        Fault::DiskFull { leader, pick } => disk::full(*leader, *pick, lasts, cluster).await,
        Fault::SlowFsync { leader, pick, ms } => {
            let each = Duration::from_millis(u64::from(*ms));
            disk::slow(*leader, *pick, each, lasts, cluster).await
        }
        Fault::FailingFsync { leader, pick } => disk::failing(*leader, *pick, lasts, cluster).await,
        Fault::LostWrites { all, pick } => power::lost(*all, *pick, lasts, cluster).await,
        Fault::TornTail {
            on_stopped: false,
            pick,
            permille,
        } => power::torn(*pick, *permille, lasts, cluster).await,
        Fault::TornTail {
            on_stopped: true,
            pick,
            permille,
        } => files::cut(*pick, *permille, cluster).await,
        Fault::ClockStep { seconds } => clock::step(*seconds, lasts, cluster).await,
        Fault::Token(trouble, pick) => match trouble {
            Trouble::Deleted { running } => token::deleted(*running, *pick, lasts, cluster).await,
            Trouble::Older => token::older(*pick, cluster).await,
            Trouble::Unreadable => token::unreadable(*pick, lasts, cluster).await,
            Trouble::Slow { ms } => module::slow(*ms, *pick, lasts, cluster).await,
            Trouble::Hung => module::hung(*pick, lasts, cluster).await,
            Trouble::Errors { code } => module::errors(*code, *pick, lasts, cluster).await,
        },
        Fault::JoinRemove {
            meanwhile,
            rotate,
            pick,
        } => membership::carry_out((*meanwhile, *rotate), *pick, cluster, recorder).await,
        Fault::Transfer { named, pick } => operator::transfer((*named, *pick), cluster, recorder).await,
        Fault::Rekey { kill_leader, point } => {
            operator::rekey((*kill_leader, *point), cluster, recorder).await
        }
        Fault::RekeyReplication { kill_leader, point } => {
            replication::carry_out((*kill_leader, *point), cluster, recorder).await
        }
        Fault::Failpoint { point, pick } => failpoint::carry_out(*point, *pick, lasts, cluster).await,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    /// As [`Cluster::start_stopped`] says it, and whoever has called that.
    fn does_not_start() -> anyhow::Error {
        let error = anyhow::anyhow!("entries are missing");
        let error = error.context(Missed::Start("hsm-node-2".to_owned()));
        error.context("after the loss of power")
    }

    #[test]
    fn a_node_that_does_not_start_is_the_clusters_failure_and_not_the_harnesss() {
        let done = broken_off(does_not_start()).unwrap();
        // Nobody is named to whom alone the fault could be put down.
        assert_eq!(done.target, NOT_SAID);
        assert_eq!(
            done.effect.failure(),
            Some("after the loss of power: hsm-node-2 does not start: entries are missing")
        );
        let late = broken_off(anyhow::anyhow!("node 1 says nothing").context(Missed::InTime)).unwrap();
        assert!(matches!(late.effect, Effect::NotCounted(_)), "{:?}", late.effect);
        let harness = anyhow::anyhow!("no such file").context("after the kill");
        assert!(broken_off(harness).is_err());
    }

    #[test]
    fn whatever_a_fault_had_come_to_a_node_that_does_not_start_afterwards_is_a_finding() {
        let failure = |done: Done, back: &Result<()>| {
            let done = done.followed_by(back);
            done.effect.failure().map(str::to_owned)
        };
        let down = Err(does_not_start());
        for done in [Done::counted("node 2"), Done::not_counted("node 2", "nobody led")] {
            assert!(failure(done, &down).unwrap().contains("entries are missing"));
        }
        // What was found first is told.
        let first = Done::cluster_failed("node 2", "it runs on");
        assert_eq!(failure(first, &down).unwrap(), "it runs on");
        for back in [Ok(()), Err(anyhow::anyhow!("hsm-node-2 is not ready after 120s"))] {
            assert_eq!(failure(Done::counted("node 2"), &back), None);
        }
    }

    #[test]
    fn a_target_is_the_leader_or_somebody_else() {
        let leader = Some(Leader { node: 2, term: 7 });
        assert_eq!(target(true, 0, &[1, 2, 3], leader), Some(2));
        for pick in 0..10 {
            assert_ne!(target(false, pick, &[1, 2, 3], leader), Some(2));
        }
        assert!(target(true, 5, &[1, 2, 3], None).is_some());
        assert_eq!(target(false, 5, &[2], leader), Some(2));
        assert_eq!(target(false, 5, &[], None), None);
    }
}
