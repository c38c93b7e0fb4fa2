//! The end of a run, and of each scenario of the selftest: everything healed, a while in which nothing is broken, every node in
//! step, every node asked for everything, and the oracles over it. What goes wrong on the way is kept beside what they find.

use std::time::{Duration, Instant};

use anyhow::Result;
use cluster_tests::{Stalls, until};
use serde::{Deserialize, Serialize};

use crate::cluster::{Cluster, Missed};
use crate::folder::{self, Folder};
use crate::history::{History, Recorder};
use crate::oracles::{self, Finding, Judgement, Observed, Watch, members};
use crate::schedule::{Early, Fired, Plan};
use crate::verdict::Verdict;
use crate::workload::Workload;

/// Phases that the oracles know, as they are noted.
pub(crate) const FAULTS_BEGIN: &str = "faults begin";
pub(crate) const FAULTS_END: &str = "faults end";
pub(crate) const CALM_BEGINS: &str = "calm begins";
pub(crate) const CALM_ENDS: &str = "calm ends";
/// The machine stood still.
pub(crate) const DISTURBED: &str = "calm disturbed";

/// Less than what followers wait for a leader, together with what they are late by themselves.
pub(crate) const STOOD_STILL: Duration = Duration::from_millis(400);

/// Calms at most. A leader that lets the others miss it does so in each of them; a busy machine does not.
const CALMS: u32 = 3;

/// How long the end may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// From the end of the last fault until every node is ready, and until all have applied the same.
    pub(crate) settled: Duration,
    /// In which clients go on while nothing is broken.
    pub(crate) calm: Duration,
}

/// What writes down what happens.
pub(crate) struct Witnesses {
    pub(crate) recorder: Recorder,
    pub(crate) watch: Watch,
    pub(crate) workload: Option<Workload>,
}

/// What came of it.
pub(crate) struct Ending {
    /// What was written down.
    pub(crate) history: History,
    /// What the oracles say of it, and of nodes that did not come back.
    pub(crate) judgement: Judgement,
    /// How much they have looked at, in lines for people.
    pub(crate) checked: String,
    /// Which nodes did not come back, where nothing but they can be to blame.
    pub(crate) unready: Option<String>,
    /// What went wrong with the run itself.
    pub(crate) trouble: Vec<String>,
}

/// What a verdict goes by besides the plan, what was fired, what was written down and what was seen: `ended.json`, so that a kept
/// run is judged again as it was.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ended {
    /// Why the plan has ended before its last step.
    pub(crate) early: Option<Early>,
    /// Nodes that did not come back: a finding.
    pub(crate) unready: Option<String>,
    /// What went wrong with the run itself.
    pub(crate) trouble: Vec<String>,
}

impl Ended {
    /// What a run comes to, with what its oracles say. One that was told to stop is asked only about what it has carried out.
    pub(crate) fn verdict(&self, judgement: Judgement, plan: &Plan, fired: &[Fired]) -> Verdict {
        let judgement = with_unready(judgement, self.unready.as_deref());
        let asked_about = plan.asked_about(self.early, fired);
        Verdict::of(judgement, &asked_about, fired, &self.trouble)
    }
}

/// Ends it, and writes what was seen into the folder.
pub(crate) async fn end(
    cluster: &Cluster,
    witnesses: Witnesses,
    fired: &[Fired],
    patience: Patience,
    folder: &Folder,
) -> Result<Ending> {
    let Witnesses {
        recorder,
        watch,
        workload,
    } = witnesses;
    let (mut trouble, mut unsettled) = (Vec::new(), None);
    if let Err(error) = cluster.heal().await {
        // A node that does not start says something of the node; anything else of what was to heal.
        if error.downcast_ref::<Missed>().is_some() {
            unsettled = Some(error);
        } else {
            trouble.push(format!("heal: {error:#}"));
        }
    }
    if unsettled.is_none() {
        unsettled = all_ready(cluster, patience.settled).await.err();
    }
    // What the oracles find is told all the same.
    if let Err(error) = calm(cluster, &recorder, patience.calm).await {
        trouble.push(format!("the calm: {error:#}"));
    }
    if let Some(workload) = workload
        && let Err(error) = workload.stop().await
    {
        trouble.push(format!("the workload: {error:#}"));
    }
    if unsettled.is_none() {
        unsettled = cluster.settle(patience.settled).await.err();
    }
    if let Err(error) = watch.stop().await {
        trouble.push(format!("the watch: {error:#}"));
    }
    let history = recorder.finish()?;
    let observed = look(cluster, &history, folder, &mut trouble).await;
    let (judgement, checked) = match &observed {
        Some(observed) => (
            oracles::judge(&history, observed, fired),
            oracles::summary(&history, observed, fired),
        ),
        None => (Judgement::Pass, String::new()),
    };
    let stays_away =
        unsettled.map(|error| format!("{:?} after everything was healed: {error:#}", patience.settled));
    let unready = to_blame(stays_away, fired, &mut trouble);
    Ok(Ending {
        history,
        judgement: with_unready(judgement, unready.as_deref()),
        checked,
        unready,
        trouble,
    })
}

/// A while in which nothing is broken. If the machine stood still in it, what happened to leaders says nothing; with an
/// election in it there is another one, and only the last is judged.
async fn calm(cluster: &Cluster, recorder: &Recorder, lasts: Duration) -> Result<()> {
    members::note(cluster, recorder).await;
    for left in (0..CALMS).rev() {
        let stalls = Stalls::watch()?;
        let before = term(cluster).await;
        let begun = Instant::now();
        recorder.note(CALM_BEGINS);
        tokio::time::sleep(lasts).await;
        let stood_still = stalls.between(begun, Instant::now()) > STOOD_STILL;
        let elected = term(cluster).await != before;
        if stood_still || (elected && left > 0) {
            recorder.note(DISTURBED);
        }
        recorder.note(CALM_ENDS);
        if !elected {
            break;
        }
    }
    Ok(())
}

/// Of the leader, if there is one.
async fn term(cluster: &Cluster) -> Option<u64> {
    cluster.leader_soon().await.map(|leader| leader.term)
}

async fn all_ready(cluster: &Cluster, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
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
async fn look(
    cluster: &Cluster,
    history: &History,
    folder: &Folder,
    trouble: &mut Vec<String>,
) -> Option<Observed> {
    match oracles::observe(cluster, history).await {
        Ok(observed) => {
            if let Err(error) = folder.write(folder::OBSERVED, &observed) {
                trouble.push(format!("{error:#}"));
            }
            Some(observed)
        }
        Err(error) => {
            trouble.push(format!("ask the nodes at the end: {error:#}"));
            None
        }
    }
}

/// What is wrong with nodes that do not come back. Where the harness has failed, that one is away may be its fault: then it is
/// trouble and no finding.
fn to_blame(stays_away: Option<String>, fired: &[Fired], trouble: &mut Vec<String>) -> Option<String> {
    let text = stays_away?;
    if trouble.is_empty() && fired.iter().all(Fired::was_undone) {
        return Some(text);
    }
    trouble.push(text);
    None
}

fn with_unready(judgement: Judgement, unready: Option<&str>) -> Judgement {
    let Some(text) = unready else {
        return judgement;
    };
    let finding = Finding {
        oracle: "readiness",
        text: text.to_owned(),
    };
    if matches!(&judgement, Judgement::Violations(findings) if findings.contains(&finding)) {
        return judgement;
    }
    with(judgement, finding)
}

pub(crate) fn with(judgement: Judgement, more: Finding) -> Judgement {
    match judgement {
        Judgement::Violations(mut findings) => {
            findings.push(more);
            Judgement::Violations(findings)
        }
        Judgement::Pass | Judgement::Inconclusive(_) => Judgement::Violations(vec![more]),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::schedule::{Effect, FaultKind, plan};

    #[test]
    fn a_node_that_stays_away_is_a_finding_unless_the_harness_has_failed() {
        let judged = |healed_ms, trouble: &[&str]| {
            let fired = Fired {
                step: 1,
                kind: FaultKind::TornTail,
                at_ms: 1,
                target: String::new(),
                effect: Effect::Counted,
                healed_ms,
            };
            let mut trouble: Vec<String> = trouble.iter().map(|text| (*text).to_owned()).collect();
            let away = Some("hsm-node-1 is away".to_owned());
            let unready = to_blame(away, &[fired], &mut trouble);
            (with_unready(Judgement::Pass, unready.as_deref()), trouble.len())
        };
        let (found, trouble) = judged(2, &[]);
        assert!(matches!(found, Judgement::Violations(all) if all[0].oracle == "readiness"));
        assert_eq!(trouble, 0);
        assert_eq!(judged(2, &["heal: no such file"]), (Judgement::Pass, 2));
        // A step that was broken off may have left its store cut.
        assert_eq!(judged(u64::MAX, &[]), (Judgement::Pass, 1));
    }
    #[test]
    fn only_a_run_that_was_told_to_stop_may_have_left_out_a_planned_fault() {
        let kinds = [FaultKind::KillLeader, FaultKind::Pause].into_iter().collect();
        let plan = plan(7, 5.0, &kinds, 3);
        let fired: Vec<Fired> = plan.steps[..4]
            .iter()
            .map(|step| Fired {
                step: step.number,
                kind: step.fault.kind(),
                at_ms: 1,
                target: String::new(),
                effect: Effect::Counted,
                healed_ms: 2,
            })
            .collect();
        let ended = |early| Ended {
            early,
            ..Ended::default()
        };
        let verdict =
            |ended: &Ended, fired: &[Fired]| ended.verdict(Judgement::Pass, &plan, fired).exit_code();
        assert_eq!(verdict(&ended(None), &fired), 2, "steps are missing");
        assert_eq!(verdict(&ended(Some(Early::Time)), &fired), 2, "they are missing");
        assert_eq!(verdict(&ended(Some(Early::Signal)), &fired), 0);
        assert_eq!(verdict(&ended(Some(Early::Signal)), &[]), 2, "nothing was tried");
        let mut unready = ended(Some(Early::Signal));
        unready.unready = Some("hsm-node-1 is away".to_owned());
        assert_eq!(verdict(&unready, &fired), 1);
        // The run itself has it among its findings already: it counts once.
        let found = with_unready(Judgement::Pass, unready.unready.as_deref());
        assert_eq!(unready.verdict(found, &plan, &fired).violations(), 1);
        let text = serde_json::to_string(&unready).unwrap();
        assert_eq!(serde_json::from_str::<Ended>(&text).unwrap(), unready);
    }
}
