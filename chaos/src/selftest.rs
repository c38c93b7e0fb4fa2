//! The proof that oracles find what they are for. Each seeded bug (`bugs.rs`) has a scenario: a directed schedule, no luck, that
//! brings it out on real nodes, real tokens and real files. With the bug the oracle that is named for it has to find it; without,
//! the same scenario has to pass.

mod consensus;
mod membership;
mod rotation;
mod scene;
mod storage;

use std::pin::Pin;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::bugs::{BUGS, Bug};
use crate::ending::Patience;
use crate::folder::Folder;
use crate::oracles::{Finding, Judgement};
use crate::schedule::FaultKind;
use scene::Scene;

/// When the bug is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Armed {
    /// From every start of every node.
    Always,
    /// In the nodes that run once the cluster is formed; not in one that is started again.
    OnceFormed,
}

/// What brings a bug out.
type Script = for<'s> fn(&'s mut Scene) -> Pin<Box<dyn Future<Output = Result<()>> + 's>>;

/// A scenario.
struct Case {
    bug: &'static str,
    nodes: u32,
    /// What has to be in place.
    faults: &'static [FaultKind],
    armed: Armed,
    script: Script,
}

/// At the end of a scenario: two looks of the watch.
const CALM: Duration = Duration::from_millis(600);

impl Case {
    /// On three nodes, with the bug once the cluster is formed.
    const fn new(bug: &'static str, script: Script) -> Self {
        Self {
            bug,
            nodes: 3,
            faults: &[],
            armed: Armed::OnceFormed,
            script,
        }
    }

    const fn nodes(mut self, nodes: u32) -> Self {
        self.nodes = nodes;
        self
    }

    const fn with(mut self, faults: &'static [FaultKind]) -> Self {
        self.faults = faults;
        self
    }

    const fn always(mut self) -> Self {
        self.armed = Armed::Always;
        self
    }
}

/// A function as a [`Script`].
macro_rules! script {
    ($script:path) => {
        |scene| Box::pin($script(scene))
    };
}

/// One for each bug, in their order.
fn cases() -> Vec<Case> {
    use FaultKind::{JoinRemove, LostWrites};
    vec![
        Case::new("skip_vote_flush", script!(storage::a_vote_is_lost_with_the_power))
            .with(&[LostWrites])
            .always(),
        Case::new(
            "skip_sync_data",
            script!(storage::all_lose_power_after_a_rotation),
        )
        .with(&[LostWrites]),
        Case::new("ignore_control_file", script!(storage::an_older_store_comes_back)).always(),
        Case::new(
            "keep_restarted_leaders_term",
            script!(consensus::a_killed_leader_comes_back_alone),
        )
        .always(),
        Case::new(
            "no_deduplication",
            script!(rotation::a_rotation_is_asked_for_twice_under_one_key),
        ),
        Case::new(
            "reads_without_read_index",
            script!(consensus::an_isolated_leader_is_asked),
        ),
        Case::new(
            "reuse_node_id",
            script!(membership::a_node_goes_and_another_comes),
        )
        .with(&[JoinRemove])
        .always(),
        Case::new(
            "activate_before_import",
            script!(rotation::two_of_three_tokens_are_slow),
        ),
        Case::new(
            "activate_on_majority",
            script!(rotation::one_of_three_tokens_is_slow),
        ),
        Case::new(
            "ready_before_gate",
            script!(consensus::a_node_that_missed_a_revocation_comes_back),
        )
        .always(),
        Case::new("drop_tombstones", script!(rotation::a_version_is_destroyed)),
        Case::new("forget_session_copies", script!(rotation::a_version_is_destroyed)),
        Case::new(
            "heartbeats_stay_off",
            script!(consensus::a_hand_over_fails_and_another_succeeds),
        )
        .nodes(5),
        Case::new(
            "go_away_without_tombstone",
            script!(membership::a_new_voter_meets_members_that_lag),
        )
        .with(&[JoinRemove])
        .nodes(5),
    ]
}

/// What came of a scenario, with the bug and without.
struct Row {
    bug: &'static Bug,
    /// After how long the oracle had found it.
    found: Result<Duration, String>,
    /// How long the same took without the bug.
    clean: Result<Duration, String>,
}

impl Row {
    fn is_good(&self) -> bool {
        self.found.is_ok() && self.clean.is_ok()
    }
}

/// The bugs with their oracles, for people.
#[must_use]
pub fn list() -> String {
    let line = |bug: &Bug| format!("{:<28} {:<12} {}\n", bug.name, bug.oracle, bug.what);
    BUGS.iter().map(line).collect()
}

/// Runs the scenarios of these bugs, each with and without; says what came of each, and whether all of it is as it has to be.
/// Folders of scenarios that went as they should are removed.
pub async fn run(bugs: &[&'static Bug], folder: &Folder) -> bool {
    let begun = Instant::now();
    let mut rows = Vec::new();
    for case in cases()
        .iter()
        .filter(|case| bugs.iter().any(|bug| bug.name == case.bug))
    {
        let row = prove(case, folder).await;
        println!("{}", line(&row));
        rows.push(row);
    }
    let good = rows.iter().filter(|row| row.is_good()).count();
    println!("\n{}", table(&rows));
    println!(
        "selftest: {good} of {} seeded bugs found by their oracles and passed without, in {} s",
        rows.len(),
        begun.elapsed().as_secs()
    );
    good == rows.len() && !rows.is_empty()
}

async fn prove(case: &Case, folder: &Folder) -> Row {
    let bug = match Bug::named(case.bug) {
        Ok(bug) => bug,
        // The unit test below keeps the two tables together.
        Err(_) => &BUGS[0],
    };
    let found = with_bug(case, bug, folder)
        .await
        .map_err(|error| format!("{error:#}"));
    let clean = without(case, bug, folder)
        .await
        .map_err(|error| format!("{error:#}"));
    Row { bug, found, clean }
}

/// The oracle that is named for the bug finds it, whatever else is found or fails.
async fn with_bug(case: &Case, bug: &'static Bug, folder: &Folder) -> Result<Duration> {
    let begun = Instant::now();
    let patience = Patience {
        settled: Duration::from_secs(20),
        calm: CALM,
    };
    let (judgement, trouble) = play(case, bug, true, patience, folder).await?;
    let findings = match judgement {
        Judgement::Violations(findings) => findings,
        Judgement::Pass => Vec::new(),
        Judgement::Inconclusive(why) => anyhow::bail!("inconclusive: {why}; {}", trouble.join("; ")),
    };
    let by_it = findings.iter().any(|finding| finding.oracle == bug.oracle);
    anyhow::ensure!(
        by_it,
        "the oracle {} has not found it; found: {}; trouble: {}",
        bug.oracle,
        told(&findings),
        trouble.join("; ")
    );
    Ok(begun.elapsed())
}

/// The same, and nothing is found or fails.
async fn without(case: &Case, bug: &'static Bug, folder: &Folder) -> Result<Duration> {
    let begun = Instant::now();
    let patience = Patience {
        settled: Duration::from_secs(90),
        calm: CALM,
    };
    let (judgement, trouble) = play(case, bug, false, patience, folder).await?;
    match judgement {
        Judgement::Pass => {}
        Judgement::Violations(findings) => anyhow::bail!("without the bug: {}", told(&findings)),
        Judgement::Inconclusive(why) => anyhow::bail!("without the bug: inconclusive: {why}"),
    }
    anyhow::ensure!(trouble.is_empty(), "without the bug: {}", trouble.join("; "));
    Ok(begun.elapsed())
}

/// Plays a scenario on a cluster of its own.
async fn play(
    case: &Case,
    bug: &'static Bug,
    seeded: bool,
    patience: Patience,
    folder: &Folder,
) -> Result<(Judgement, Vec<String>)> {
    let name = format!("{}-{}", bug.name, if seeded { "with" } else { "without" });
    let folder = Folder::create(Some(&folder.file(&name)))?;
    let mut scene = Scene::start(case, seeded.then_some(bug), &folder)
        .await
        .context("start the scenario's cluster")?;
    let played = (case.script)(&mut scene).await;
    let (judgement, mut trouble) = scene.conclude(patience, &folder).await?;
    // With a bug, a step of the scenario may well fail: what counts is what the oracles saw.
    if let Err(error) = played {
        trouble.push(format!("the scenario: {error:#}"));
    }
    let as_expected = match &judgement {
        Judgement::Violations(findings) => seeded && findings.iter().any(|one| one.oracle == bug.oracle),
        Judgement::Pass => !seeded && trouble.is_empty(),
        Judgement::Inconclusive(_) => false,
    };
    if as_expected {
        folder.remove();
    }
    Ok((judgement, trouble))
}

fn told(findings: &[Finding]) -> String {
    const TOLD: usize = 5;
    if findings.is_empty() {
        return "nothing".to_owned();
    }
    let told: Vec<String> = findings
        .iter()
        .take(TOLD)
        .map(|finding| format!("{}: {}", finding.oracle, finding.text))
        .collect();
    told.join("; ")
}

fn line(row: &Row) -> String {
    let seconds = |outcome: &Result<Duration, String>| match outcome {
        Ok(took) => format!("{:.0} s", took.as_secs_f64()),
        Err(_) => "FAILED".to_owned(),
    };
    let mut line = format!(
        "{:<28} {:<12} found: {:<8} without: {}",
        row.bug.name,
        row.bug.oracle,
        seconds(&row.found),
        seconds(&row.clean)
    );
    for why in [&row.found, &row.clean]
        .into_iter()
        .filter_map(|outcome| outcome.as_ref().err())
    {
        line.push_str("\n    ");
        line.push_str(why);
    }
    line
}

/// For documents.
fn table(rows: &[Row]) -> String {
    let cell = |outcome: &Result<Duration, String>, good: &str| match outcome {
        Ok(took) => format!("{good} in {:.0} s", took.as_secs_f64()),
        Err(_) => "**failed**".to_owned(),
    };
    let mut out = String::from("| seeded bug | oracle | with it | without it |\n|---|---|---|---|\n");
    for row in rows {
        out.push_str(&format!(
            "| `{}`: {} | {} | {} | {} |\n",
            row.bug.name,
            row.bug.what,
            row.bug.oracle,
            cell(&row.found, "found"),
            cell(&row.clean, "passed")
        ));
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn every_seeded_bug_has_one_scenario() {
        let cases = cases();
        let of_cases: Vec<&str> = cases.iter().map(|case| case.bug).collect();
        let bugs: Vec<&str> = BUGS.iter().map(|bug| bug.name).collect();
        assert_eq!(of_cases, bugs);
        for bug in bugs {
            assert!(list().contains(bug));
        }
    }

    #[test]
    fn a_bug_that_was_not_found_fails_the_selftest_and_says_why() {
        let row = Row {
            bug: &BUGS[0],
            found: Err("the oracle durability has not found it".to_owned()),
            clean: Ok(Duration::from_secs(3)),
        };
        assert!(!row.is_good());
        assert!(line(&row).contains("FAILED"));
        assert!(line(&row).contains("has not found it"));
        assert!(table(&[row]).contains("**failed**"));
    }
}
