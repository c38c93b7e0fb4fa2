//! Looking again at an earlier run: its recorded history is judged once more, and its recorded schedule of faults is carried out
//! on a new cluster, with the seeds of its workload. The plan is the recorded one, whatever this version of the program would
//! plan from the same seed.

use anyhow::{Context, Result};

use crate::ending::{self, Ended};
use crate::failover;
use crate::folder::{self, Folder};
use crate::history::History;
use crate::options::Asked;
use crate::oracles::{self, Judgement, Observed};
use crate::run::{Report, carry_out};
use crate::schedule::{Fired, Plan, Stop};
use crate::verdict::Verdict;

/// Judges the recorded history of a run, by everything that its own verdict went by.
///
/// # Errors
/// A file of the folder is missing or cannot be read: a run that was broken off shows nothing.
pub fn check(recorded: &Folder) -> Result<Verdict> {
    let plan: Plan = recorded.read(folder::PLAN)?;
    let fired: Vec<Fired> = recorded.read(folder::FIRED)?;
    let ended: Ended = recorded
        .read(folder::ENDED)
        .context("the run was broken off before its end")?;
    let history = History::read(&recorded.file(folder::HISTORY))?;
    // Nodes that could not be asked at the end are among the trouble.
    let judgement = if recorded.has(folder::OBSERVED) {
        let observed: Observed = recorded.read(folder::OBSERVED)?;
        oracles::judge(&history, &observed, &fired)
    } else {
        Judgement::Pass
    };
    let findings = failover::findings(recorded, &plan, &fired)?;
    let judgement = findings.into_iter().fold(judgement, ending::with);
    Ok(ended.verdict(judgement, &plan, &fired))
}

/// Carries out the recorded plan on a new cluster, in a new folder, until its time is over or it is told to stop.
///
/// # Errors
/// The folder has no plan, or was written by another version of this program.
pub async fn again(recorded: &Folder, into: &Folder, stop: &Stop) -> Result<Report> {
    let asked: Asked = recorded.read(folder::OPTIONS)?;
    let plan: Plan = recorded.read(folder::PLAN)?;
    let options = asked.into_options(into.path().to_owned())?;
    Ok(carry_out(&options, &plan, into, stop).await)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::history::{Answer, Operation, Outcome, Recorder};
    use crate::schedule::{Effect, FaultKind, plan};

    /// The folder of a run of which nothing is wrong but what is said.
    fn kept(root: &tempfile::TempDir, ended: Option<&Ended>) -> Folder {
        let folder = Folder::at(root.path()).unwrap();
        let plan = plan(7, 1.0, &BTreeSet::from([FaultKind::KillLeader]), 3);
        let fired: Vec<Fired> = plan
            .steps
            .iter()
            .map(|step| Fired {
                step: step.number,
                kind: step.fault.kind(),
                at_ms: 1,
                target: "node 1".to_owned(),
                effect: Effect::Counted,
                healed_ms: 2,
            })
            .collect();
        folder.write(folder::PLAN, &plan).unwrap();
        folder.write(folder::FIRED, &fired).unwrap();
        Recorder::create(&folder.file(folder::HISTORY))
            .unwrap()
            .finish()
            .unwrap();
        if let Some(ended) = ended {
            folder.write(folder::ENDED, ended).unwrap();
        }
        folder
    }

    #[test]
    fn a_kept_run_is_judged_again_by_what_else_had_gone_wrong() {
        let judged = |ended: Ended| {
            let root = tempfile::tempdir().unwrap();
            check(&kept(&root, Some(&ended))).unwrap().to_string()
        };
        let troubled = judged(Ended {
            trouble: vec!["ask the nodes at the end: no answer".to_owned()],
            ..Ended::default()
        });
        assert_eq!(
            troubled,
            "verdict: inconclusive: ask the nodes at the end: no answer"
        );
        let unready = judged(Ended {
            unready: Some("hsm-node-1 is away".to_owned()),
            ..Ended::default()
        });
        assert_eq!(
            unready,
            "violation: readiness: hsm-node-1 is away\nverdict: violation"
        );
    }

    #[test]
    fn a_fail_over_that_clients_of_the_others_have_noticed_is_found_again() {
        let root = tempfile::tempdir().unwrap();
        let folder = kept(&root, Some(&Ended::default()));
        let recorder = Recorder::create(&folder.file(folder::HISTORY)).unwrap();
        recorder.note(&failover::mark(1, 1));
        let asked = Operation::Encrypt {
            context: "c".to_owned(),
            number: 1,
            node: 2,
        };
        recorder.invoke(1, asked).complete(Outcome::Refused {
            code: "not_ready".to_owned(),
        });
        let cn = "probe".to_owned();
        recorder
            .invoke(2, Operation::Revoke { cn })
            .complete(Outcome::Ok(Answer::Done));
        recorder.finish().unwrap();
        let said = check(&folder).unwrap();
        assert_eq!(said.exit_code(), 1, "{said}");
        let told = said.to_string();
        assert!(
            told.starts_with("violation: failover: 1 of 1 encryptions"),
            "{told}"
        );
    }

    #[test]
    fn a_run_that_was_broken_off_cannot_be_judged() {
        let root = tempfile::tempdir().unwrap();
        let said = format!("{:#}", check(&kept(&root, None)).unwrap_err());
        assert!(
            said.contains("broken off") && said.contains(folder::ENDED),
            "{said}"
        );
    }

    #[test]
    fn what_was_seen_is_judged_where_it_was_seen() {
        let root = tempfile::tempdir().unwrap();
        let folder = kept(&root, Some(&Ended::default()));
        folder.write(folder::OBSERVED, &Observed::default()).unwrap();
        let said = check(&folder).unwrap().to_string();
        assert!(said.contains("no node is left"), "{said}");
    }
}
