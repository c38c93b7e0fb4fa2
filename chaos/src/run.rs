//! One run, from nothing to a verdict: a cluster, clients and faults at once, and the end (`ending.rs`). Whatever goes wrong with
//! the run itself makes it inconclusive, but only once what was written down until then is judged.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::cluster::Cluster;
use crate::ending::{self, Ending, Patience, Witnesses};
use crate::folder::{self, Folder};
use crate::history::Recorder;
use crate::options::Options;
use crate::oracles;
use crate::schedule::{self, FaultKind, Fired, Plan};
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
}

impl Report {
    fn inconclusive(error: &anyhow::Error) -> Self {
        Self {
            verdict: Verdict::Inconclusive(format!("{error:#}")),
            fired: Vec::new(),
            operations: 0,
            checked: String::new(),
            faults_lasted: Duration::ZERO,
        }
    }
}

/// Plans a run and carries it out.
pub async fn run(options: &Options, folder: &Folder) -> Report {
    let plan = schedule::plan_with_pauses(
        options.seed,
        options.minutes,
        &options.faults,
        options.nodes,
        options.pause_ms,
    );
    carry_out(options, &plan, folder).await
}

/// Carries out a plan, and leaves everything about it in the folder.
pub async fn carry_out(options: &Options, plan: &Plan, folder: &Folder) -> Report {
    let report = match attempt(options, plan, folder).await {
        Ok(report) => report,
        Err(error) => Report::inconclusive(&error),
    };
    if let Err(error) = folder.write(folder::VERDICT, &report.verdict.to_json()) {
        eprintln!("{error:#}");
    }
    report
}

async fn attempt(options: &Options, plan: &Plan, folder: &Folder) -> Result<Report> {
    folder.write(folder::OPTIONS, &options.asked())?;
    folder.write(folder::PLAN, plan)?;
    let mut cluster = Cluster::start(options).await.context("start the cluster")?;
    println!(
        "seed {}: {} nodes, {}, in {}; {} faults in about {} minutes",
        plan.seed,
        options.nodes,
        cluster.network(),
        folder.path().display(),
        plan.steps.len(),
        options.minutes
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
    let (fired, failed) = schedule::carry_out(plan, &cluster, &recorder).await;
    trouble.extend(
        failed
            .iter()
            .map(|error| format!("carry out the faults: {error:#}")),
    );
    recorder.note(ending::FAULTS_END);
    let faults_lasted = begun.elapsed();
    folder.write(folder::FIRED, &fired)?;
    let Ending {
        history,
        judgement,
        checked,
        trouble: more,
    } = ending::end(&cluster, witnesses, &fired, PATIENCE, folder).await?;
    trouble.extend(more);
    let verdict = Verdict::of(judgement, plan, &fired, &trouble);
    if !verdict.is_pass() {
        cluster.keep();
    }
    Ok(Report {
        verdict,
        operations: history.operations(),
        checked: checked + &effects(&fired),
        fired,
        faults_lasted,
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
