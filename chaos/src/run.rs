//! One run, from nothing to a verdict: a cluster, clients and faults at once, and the end (`ending.rs`). Whatever goes wrong with
//! the run itself makes it inconclusive, but only once what was written down until then is judged.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;

use crate::cluster::Cluster;
use crate::ending::{self, Ended, Ending, Patience, Witnesses};
use crate::failover;
use crate::folder::{self, Folder};
use crate::history::Recorder;
use crate::network::NetworkKind;
use crate::options::Options;
use crate::oracles;
use crate::schedule::{self, Early, FaultKind, Fired, Limit, Plan, Stop};
use crate::verdict::{Verdict, effects};
use crate::workload::Workload;

/// A node that was away may need a snapshot, and every key that it has missed.
const PATIENCE: Patience = Patience {
    settled: Duration::from_secs(180),
    calm: Duration::from_secs(3),
};

/// What a run leaves for its record.
#[derive(Debug, Clone)]
pub struct Report {
    /// What came of it.
    pub verdict: Verdict,
    /// Every fault that was carried out.
    pub fired: Vec<Fired>,
    /// Calls of clients whose outcome is known.
    pub operations: u64,
    /// What the oracles looked at, and how much, in lines for people.
    pub checked: String,
    /// How long faults went on.
    pub faults_lasted: Duration,
    /// Steps of the plan.
    pub planned: u32,
    /// Why not all of them were carried out, if nothing has failed.
    pub early: Option<Early>,
    /// Those that were left out for that.
    pub left_out: u32,
    /// Where its nodes found each other, if it came so far.
    pub network: Option<NetworkKind>,
}

impl Report {
    fn inconclusive(error: &anyhow::Error) -> Self {
        Self {
            verdict: Verdict::Inconclusive(format!("{error:#}")),
            fired: Vec::new(),
            operations: 0,
            checked: String::new(),
            faults_lasted: Duration::ZERO,
            planned: 0,
            early: None,
            left_out: 0,
            network: None,
        }
    }

    /// As the run's folder keeps it.
    fn to_json(&self) -> serde_json::Value {
        let mut verdict = self.verdict.to_json();
        if let Some(early) = self.early {
            verdict["ended_early"] = json!(early);
            verdict["left_out"] = json!(self.left_out);
        }
        verdict
    }
}

/// Plans a run and carries it out, until its time is over or it is told to stop.
pub async fn run(options: &Options, folder: &Folder, stop: &Stop) -> Report {
    let plan = schedule::plan_with_pauses(
        options.seed,
        options.minutes,
        &options.faults,
        options.nodes,
        options.pause_ms,
    );
    carry_out(options, &plan, folder, stop).await
}

/// Carries out a plan, and leaves everything about it in the folder.
pub async fn carry_out(options: &Options, plan: &Plan, folder: &Folder, stop: &Stop) -> Report {
    let report = match attempt(options, plan, folder, stop).await {
        Ok(report) => report,
        Err(error) => Report::inconclusive(&error),
    };
    if let Err(error) = folder.write(folder::VERDICT, &report.to_json()) {
        eprintln!("{error:#}");
    }
    report
}

async fn attempt(options: &Options, plan: &Plan, folder: &Folder, stop: &Stop) -> Result<Report> {
    folder.write(folder::OPTIONS, &options.asked())?;
    folder.write(folder::PLAN, plan)?;
    let mut cluster = Cluster::start(options).await.context("start the cluster")?;
    // Whatever ends this: what is on the disk says why. The folder of a run that passes goes as a whole.
    cluster.keep();
    println!(
        "seed {}: {} nodes, {}, in {}; {} faults in about {} minutes{}",
        plan.seed,
        options.nodes,
        cluster.network(),
        folder.path().display(),
        plan.steps.len(),
        options.minutes,
        if plan.more.is_empty() {
            ""
        } else {
            ", and more until those are over"
        }
    );
    let recorder = Recorder::create(&folder.file(folder::HISTORY))?;
    let witnesses = Witnesses {
        watch: oracles::watch(&cluster, &recorder),
        workload: Some(Workload::start(&cluster, plan.seed, &recorder).await?),
        recorder: recorder.clone(),
    };
    let mut trouble = Vec::from_iter(unplanned(options, plan));
    let begun = Instant::now();
    recorder.note(ending::FAULTS_BEGIN);
    let limit = Limit::begin(stop, plan, options.minutes);
    let (fired, failed) = schedule::carry_out(plan, &cluster, &recorder, &limit).await;
    trouble.extend(
        failed
            .iter()
            .map(|error| format!("carry out the faults: {error:#}")),
    );
    recorder.note(ending::FAULTS_END);
    let faults_lasted = begun.elapsed();
    folder.write(folder::FIRED, &fired)?;
    let early = limit.early(plan, &fired);
    let Ending {
        history,
        judgement,
        checked,
        unready,
        trouble: more,
    } = ending::end(&cluster, witnesses, &fired, PATIENCE, folder).await?;
    trouble.extend(more);
    let judgement = match failover::findings(folder, plan, &fired) {
        Ok(findings) => findings.into_iter().fold(judgement, ending::with),
        Err(error) => {
            trouble.push(format!("the fail-overs: {error:#}"));
            judgement
        }
    };
    let ended = Ended {
        early,
        unready,
        trouble,
    };
    folder.write(folder::ENDED, &ended)?;
    let count = |steps: usize| u32::try_from(steps).unwrap_or(u32::MAX);
    let planned = plan.due(&fired).steps.len();
    let left_out = planned - plan.carried_out(&fired).steps.len();
    Ok(Report {
        verdict: ended.verdict(judgement, plan, &fired),
        operations: history.operations(),
        checked: checked + &effects(&fired),
        fired,
        faults_lasted,
        planned: count(planned),
        early,
        left_out: early.map_or(0, |_| count(left_out)),
        network: Some(cluster.network_kind()),
    })
}

/// What was asked for and is not in the plan: a cluster may be too small for it.
fn unplanned(options: &Options, plan: &Plan) -> Option<String> {
    let planned: BTreeSet<FaultKind> = plan.steps.iter().map(|step| step.fault.kind()).collect();
    let left_out: Vec<&str> = options
        .faults
        .difference(&planned)
        .map(|kind| kind.name())
        .collect();
    (!left_out.is_empty()).then(|| {
        format!(
            "asked for and not possible with {} nodes: {}",
            options.nodes,
            left_out.join(" ")
        )
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn what_was_left_out_of_a_plan_is_in_the_verdict() {
        let mut report = Report {
            planned: 9,
            early: Some(Early::Time),
            left_out: 7,
            ..Report::inconclusive(&anyhow::anyhow!("no"))
        };
        report.verdict = Verdict::Pass;
        assert_eq!(
            report.to_json(),
            json!({"verdict": "pass", "ended_early": "time", "left_out": 7})
        );
        report.early = None;
        assert_eq!(report.to_json(), json!({"verdict": "pass"}));
    }
}
