//! One run, from nothing to a verdict: a cluster, clients and faults at once, everything healed, a while of calm, every node asked
//! for everything, and the oracles over it. Whatever goes wrong with the run itself makes it inconclusive, but only once what
//! was written down until then is judged.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cluster_tests::until;

use crate::cluster::Cluster;
use crate::folder::{self, Folder};
use crate::history::{History, Recorder};
use crate::options::Options;
use crate::oracles::{self, Finding, Judgement, Observed};
use crate::schedule::{self, Fired, Plan};
use crate::verdict::Verdict;
use crate::workload::Workload;

/// From the end of the last fault until every node is ready and all have applied the same: a node that was away may need a
/// snapshot, and every key that it has missed.
const SETTLED: Duration = Duration::from_secs(180);
/// In which clients go on while nothing is broken.
const CALM: Duration = Duration::from_secs(3);

/// What a run leaves for its record.
#[derive(Debug, Clone)]
pub struct Report {
    /// What came of it.
    pub verdict: Verdict,
    /// Every fault that was carried out.
    pub fired: Vec<Fired>,
    /// Calls of clients whose outcome is known.
    pub operations: u64,
    /// How long faults went on.
    pub faults_lasted: Duration,
}

impl Report {
    fn inconclusive(error: &anyhow::Error) -> Self {
        Self {
            verdict: Verdict::Inconclusive(format!("{error:#}")),
            fired: Vec::new(),
            operations: 0,
            faults_lasted: Duration::ZERO,
        }
    }
}

/// Plans a run and carries it out.
pub async fn run(options: &Options, folder: &Folder) -> Report {
    let plan = schedule::plan(options.seed, options.minutes, &options.faults, options.nodes);
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
        "seed {}: {} nodes, {}, in {}; {} faults in {} minutes",
        plan.seed,
        options.nodes,
        cluster.network(),
        folder.path().display(),
        plan.steps.len(),
        options.minutes
    );
    let part = faults_and_calm(plan, &cluster, folder).await?;
    folder.write(folder::FIRED, &part.fired)?;
    let (observed, unseen) = look(&cluster, &part.history, folder).await;
    let mut trouble = part.trouble;
    trouble.extend(unseen);
    let judgement = match &observed {
        Some(observed) => oracles::judge(&part.history, observed, &part.fired),
        None => Judgement::Pass,
    };
    let judgement = with(judgement, part.unsettled);
    let verdict = Verdict::of(judgement, plan, &part.fired, &trouble);
    if !verdict.is_pass() {
        cluster.keep();
    }
    Ok(Report {
        verdict,
        operations: part.history.operations(),
        fired: part.fired,
        faults_lasted: part.faults_lasted,
    })
}

/// What the busy part of a run leaves.
struct Busy {
    history: History,
    fired: Vec<Fired>,
    faults_lasted: Duration,
    /// The cluster did not come back.
    unsettled: Option<Finding>,
    /// What went wrong with the run itself.
    trouble: Vec<String>,
}

async fn faults_and_calm(plan: &Plan, cluster: &Cluster, folder: &Folder) -> Result<Busy> {
    let recorder = Recorder::create(&folder.file(folder::HISTORY))?;
    let watch = oracles::watch(cluster, &recorder);
    let workload = Workload::start(cluster, plan.seed, &recorder).await?;
    let mut trouble = Vec::new();
    let begun = Instant::now();
    recorder.note("faults begin");
    let fired = match schedule::carry_out(plan, cluster, &recorder).await {
        Ok(fired) => fired,
        Err(error) => {
            trouble.push(format!("carry out the faults: {error:#}"));
            Vec::new()
        }
    };
    recorder.note("faults end");
    let faults_lasted = begun.elapsed();
    if let Err(error) = cluster.heal().await {
        trouble.push(format!("heal: {error:#}"));
    }
    let healed = trouble.is_empty();
    let mut unsettled = all_ready(cluster).await.err();
    recorder.note("calm begins");
    tokio::time::sleep(CALM).await;
    recorder.note("calm ends");
    if let Err(error) = workload.stop().await {
        trouble.push(format!("the workload: {error:#}"));
    }
    if unsettled.is_none() {
        unsettled = cluster.settle(SETTLED).await.err();
    }
    if let Err(error) = watch.stop().await {
        trouble.push(format!("the watch of readiness: {error:#}"));
    }
    let unsettled = match unsettled {
        Some(error) if healed => Some(Finding {
            oracle: "readiness",
            text: format!("{SETTLED:?} after everything was healed: {error:#}"),
        }),
        Some(error) => {
            trouble.push(format!("after a harness that failed: {error:#}"));
            None
        }
        None => None,
    };
    Ok(Busy {
        history: recorder.finish()?,
        fired,
        faults_lasted,
        unsettled,
        trouble,
    })
}

async fn all_ready(cluster: &Cluster) -> Result<()> {
    let deadline = Instant::now() + SETTLED;
    for node in cluster.nodes() {
        let left = deadline.saturating_duration_since(Instant::now());
        let ready = until("/readyz", left, async || node.is_ready().await.then_some(())).await;
        if let Err(error) = ready {
            return Err(error.context(format!("{}: {}", node.id(), node.checks().await)));
        }
    }
    Ok(())
}

/// Asks every node for everything. What cannot be seen is trouble, not a finding.
async fn look(cluster: &Cluster, history: &History, folder: &Folder) -> (Option<Observed>, Vec<String>) {
    match oracles::observe(cluster, history).await {
        Ok(observed) => {
            let written = folder.write(folder::OBSERVED, &observed);
            let trouble = written.err().map(|error| format!("{error:#}"));
            (Some(observed), trouble.into_iter().collect())
        }
        Err(error) => (None, vec![format!("ask the nodes at the end: {error:#}")]),
    }
}

fn with(judgement: Judgement, more: Option<Finding>) -> Judgement {
    match (judgement, more) {
        (judgement, None) => judgement,
        (Judgement::Violations(mut findings), Some(more)) => {
            findings.push(more);
            Judgement::Violations(findings)
        }
        (Judgement::Pass | Judgement::Inconclusive(_), Some(more)) => Judgement::Violations(vec![more]),
    }
}
