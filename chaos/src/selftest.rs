//! The proof that oracles find what they are for. Each seeded bug (`bugs.rs`) has a scenario: a directed schedule, no luck, that
//! brings it out on real nodes, real tokens and real files. With the bug the oracle that is named for it has to find it, and to
//! say what it is for; without, the same scenario has to pass. Scenarios mostly wait: some are played at a time.

mod consensus;
mod membership;
mod outcome;
mod queue;
mod rotation;
mod scene;
mod storage;

use std::cell::RefCell;
use std::path::Path;
use std::pin::Pin;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cluster_tests::Stalls;

use crate::bugs::{BUGS, Bug};
use crate::ending::Patience;
use crate::folder::Folder;
use crate::schedule::FaultKind;
use outcome::{Outcome, Played, Row, Tried};
use queue::Queue;
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
    bug: &'static Bug,
    nodes: u32,
    /// What has to be in place.
    faults: &'static [FaultKind],
    armed: Armed,
    /// With the bug it is played once more if nothing was found: something else may have been quicker than the script.
    races: bool,
    script: Script,
}

/// At the end of a scenario: two looks of the watch.
const CALM: Duration = Duration::from_millis(600);

impl Case {
    /// On three nodes, with the bug once the cluster is formed.
    ///
    /// # Errors
    /// No bug has this name.
    fn new(bug: &str, script: Script) -> Result<Self> {
        Ok(Self {
            bug: Bug::named(bug)?,
            nodes: 3,
            faults: &[],
            armed: Armed::OnceFormed,
            races: false,
            script,
        })
    }

    const fn nodes(mut self, nodes: u32) -> Self {
        self.nodes = nodes;
        self
    }

    const fn with(mut self, faults: &'static [FaultKind]) -> Self {
        self.faults = faults;
        self
    }

    const fn races(mut self) -> Self {
        self.races = true;
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
fn cases() -> Result<Vec<Case>> {
    use FaultKind::{JoinRemove, LostWrites};
    Ok(vec![
        Case::new("skip_vote_flush", script!(storage::a_vote_is_lost_with_the_power))?
            .with(&[LostWrites])
            .always(),
        // sled's own thread synchronises ten times a second, and may come between an acknowledgement and the loss of power.
        Case::new("skip_sync_data", script!(storage::all_lose_power_after_a_change))?
            .with(&[LostWrites])
            .races(),
        Case::new("ignore_control_file", script!(storage::an_older_store_comes_back))?.always(),
        Case::new(
            "keep_restarted_leaders_term",
            script!(consensus::a_killed_leader_comes_back_alone),
        )?
        .always(),
        Case::new(
            "no_deduplication",
            script!(rotation::a_rotation_is_asked_for_twice_under_one_key),
        )?,
        Case::new(
            "reads_without_read_index",
            script!(consensus::an_isolated_leader_is_asked),
        )?,
        Case::new(
            "reuse_node_id",
            script!(membership::a_node_goes_and_another_comes),
        )?
        .with(&[JoinRemove])
        .always(),
        Case::new(
            "activate_before_import",
            script!(rotation::two_of_three_tokens_are_slow),
        )?,
        Case::new(
            "activate_on_majority",
            script!(rotation::one_of_three_tokens_is_slow),
        )?,
        Case::new(
            "ready_before_gate",
            script!(consensus::a_node_that_missed_a_revocation_comes_back),
        )?
        .always(),
        Case::new("drop_tombstones", script!(rotation::a_version_is_destroyed))?,
        Case::new("forget_session_copies", script!(rotation::a_version_is_destroyed))?,
        Case::new(
            "heartbeats_stay_off",
            script!(consensus::hand_overs_fail_and_succeed),
        )?
        .nodes(5),
        Case::new(
            "end_when_deposed",
            script!(consensus::a_leader_is_replaced_and_heard_again),
        )?,
        Case::new(
            "go_away_without_tombstone",
            script!(membership::a_new_voter_meets_members_that_lag),
        )?
        .with(&[JoinRemove])
        .nodes(5),
    ])
}

/// How long the end of a scenario may take. What a bug has broken for good is waited for no longer.
fn patience(seeded: bool) -> Patience {
    Patience {
        settled: Duration::from_secs(if seeded { 40 } else { 90 }),
        calm: CALM,
    }
}

/// The bugs with their oracles, for people.
#[must_use]
pub fn list() -> String {
    let line = |bug: &Bug| format!("{:<28} {:<12} {}\n", bug.name, bug.oracle, bug.what);
    BUGS.iter().map(line).collect()
}

/// Plays the scenarios of these bugs, each with its bug and without, so many at a time; says what came of each as soon as it is
/// over. Folders of scenarios that went as they should are removed; one that is forgiven, because the machine stood still, is not.
///
/// The exit code: 0 if everything was as it has to be; 1 if a bug was not found, or something was found without it; 2 if a
/// scenario was not carried out, which shows nothing.
///
/// # Errors
/// A scenario of a bug that is not in the table.
pub async fn run(bugs: &[&'static Bug], jobs: usize, folder: &Folder) -> Result<u8> {
    let begun = Instant::now();
    let mut chosen = cases()?;
    chosen.retain(|case| bugs.contains(&case.bug));
    let (queue, rows) = (RefCell::new(Queue::new(chosen)), RefCell::new(Vec::new()));
    let players = (0..jobs.max(1)).map(|_| {
        let player: Pin<Box<dyn Future<Output = ()> + '_>> = Box::pin(play_on(&queue, &rows, folder));
        player
    });
    queue::side_by_side(players.collect()).await;
    let mut rows = rows.into_inner();
    rows.sort_by_key(|row: &Row| BUGS.iter().position(|bug| bug == row.bug));
    let good = rows.iter().filter(|row| row.is_good()).count();
    println!("\n{}", outcome::table(&rows));
    for row in rows.iter().filter(|row| !row.is_good()) {
        println!("REPRODUCE WITH: make chaos-selftest BUG={}", row.bug.name);
    }
    println!(
        "selftest: {good} of {} seeded bugs found by their oracles and passed without, in {} s",
        rows.len(),
        begun.elapsed().as_secs()
    );
    Ok(outcome::exit_code(&rows))
}

/// One scenario after the other, until none is left.
async fn play_on(queue: &RefCell<Queue>, rows: &RefCell<Vec<Row>>, folder: &Folder) {
    loop {
        let Some(case) = queue.borrow_mut().begin() else {
            return;
        };
        let row = Row {
            bug: case.bug,
            found: tried(&case, true, folder).await,
            clean: tried(&case, false, folder).await,
        };
        queue.borrow_mut().end(&case);
        // In one piece: others are played meanwhile.
        println!("{row}");
        rows.borrow_mut().push(row);
    }
}

/// Plays a scenario, and once more if something may have been quicker than it, or if it went wrong while the machine stood still, and in a way that this explains: its nodes were
/// deaf and late then, whatever is built into them.
async fn tried(case: &Case, seeded: bool, folder: &Folder) -> Tried {
    let name = format!("{}-{}", case.bug.name, if seeded { "with" } else { "without" });
    let first = played(case, seeded, &folder.file(&name)).await;
    let again = first.is_forgiven() || (seeded && case.races);
    if first.outcome.is_good() || !again {
        return Tried {
            disturbed: None,
            counts: first,
        };
    }
    let again = played(case, seeded, &folder.file(&format!("{name}-again"))).await;
    Tried {
        disturbed: Some(first),
        counts: again,
    }
}

async fn played(case: &Case, seeded: bool, place: &Path) -> Played {
    let begun = Instant::now();
    let stalls = Stalls::watch();
    let (outcome, may_be_late) = match play(case, seeded, place).await {
        Ok(played) => played,
        Err(error) => (Outcome::Undecided(format!("{error:#}")), true),
    };
    let ended = Instant::now();
    Played {
        outcome,
        may_be_late,
        took: ended.saturating_duration_since(begun),
        // Where nobody can look, it is not known to have stood still.
        stood_still: stalls.map_or(Duration::ZERO, |stalls| stalls.between(begun, ended)),
    }
}

/// Plays a scenario once, on a cluster of its own, and says whether what came of it may be for nothing but want of time. Its folder is
/// removed if it went as it should.
async fn play(case: &Case, seeded: bool, place: &Path) -> Result<(Outcome, bool)> {
    let folder = Folder::create(Some(place))?;
    let mut scene = Scene::start(case, seeded, &folder)
        .await
        .context("start the scenario's cluster")?;
    let script = (case.script)(&mut scene).await;
    let mut ending = scene.conclude(patience(seeded), &folder).await?;
    // With a bug, a step of the scenario may well fail: what counts is what the oracles saw.
    if let Err(error) = script {
        ending.trouble.push(format!("the scenario: {error:#}"));
    }
    let (outcome, may_be_late) = if seeded {
        (outcome::with_bug(case.bug, &ending), true)
    } else {
        (outcome::without(case.bug, &ending), outcome::may_be_late(&ending))
    };
    if outcome.is_good() {
        // It waits for processes, and others are played meanwhile.
        let removed = tokio::task::spawn_blocking(move || folder.remove()).await;
        removed.context("remove the scenario's folder")?;
    }
    Ok((outcome, may_be_late))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn every_seeded_bug_has_one_scenario() {
        let cases = cases().unwrap();
        let of_cases: Vec<&str> = cases.iter().map(|case| case.bug.name).collect();
        let bugs: Vec<&str> = BUGS.iter().map(|bug| bug.name).collect();
        assert_eq!(of_cases, bugs);
        for bug in bugs {
            assert!(list().contains(bug));
        }
        assert!(Case::new("no_such_bug", cases[0].script).is_err());
    }

    #[test]
    fn no_two_large_clusters_are_played_at_once_while_there_are_small_ones() {
        let mut queue = Queue::new(cases().unwrap());
        let (first, second) = (queue.begin().unwrap(), queue.begin().unwrap());
        assert!(first.nodes > 3 && second.nodes == 3);
        assert_eq!(queue.begin().unwrap().nodes, 3);
        queue.end(&first);
        let third = queue.begin().unwrap();
        assert!(third.nodes > 3);
        // In the end nothing is left, whoever is still at it.
        let left = std::iter::from_fn(|| queue.begin()).count();
        assert_eq!(left, BUGS.len() - 4);
    }
}
