//! Looking again at an earlier run: its recorded history is judged once more, and its recorded schedule of faults is carried out
//! on a new cluster, with the seeds of its workload. The plan is the recorded one, whatever this version of the program would
//! plan from the same seed.

use anyhow::Result;

use crate::folder::{self, Folder};
use crate::history::History;
use crate::options::Asked;
use crate::oracles::{self, Observed};
use crate::run::{Report, carry_out};
use crate::schedule::{Fired, Plan};
use crate::verdict::Verdict;

/// Judges the recorded history of a run. What was wrong with the run itself, or that its nodes did not come back, is in no
/// file but its verdict.
///
/// # Errors
/// A file of the folder is missing or cannot be read: a run that was interrupted has no observations.
pub fn check(recorded: &Folder) -> Result<Verdict> {
    let plan: Plan = recorded.read(folder::PLAN)?;
    let fired: Vec<Fired> = recorded.read(folder::FIRED)?;
    let observed: Observed = recorded.read(folder::OBSERVED)?;
    let history = History::read(&recorded.file(folder::HISTORY))?;
    let judgement = oracles::judge(&history, &observed, &fired);
    Ok(Verdict::of(judgement, &plan, &fired, &[]))
}

/// Carries out the recorded plan on a new cluster, in a new folder.
///
/// # Errors
/// The folder has no plan, or was written by another version of this program.
pub async fn again(recorded: &Folder, into: &Folder) -> Result<Report> {
    let asked: Asked = recorded.read(folder::OPTIONS)?;
    let plan: Plan = recorded.read(folder::PLAN)?;
    let options = asked.into_options(into.path().to_owned())?;
    Ok(carry_out(&options, &plan, into).await)
}
