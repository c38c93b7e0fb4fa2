//! What runs have shown, added up over runs: a checked-in file that `make chaos-long` adds a line to, and the table that is made
//! of it for `docs/reliability.md`. Runs that were inconclusive show nothing and are not in it; those that found something are.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::failover::FailOvers;
use crate::options::Options;
use crate::run::Report;
use crate::schedule::FaultKind;
use crate::verdict::{Verdict, counted};

/// Where it lies in the repository.
pub const FILE: &str = "docs/chaos-record.json";
/// Kinds of faults in a run that counts as composed of them.
const COMPOSED: usize = 10;
/// Around the table in a document.
const BEGIN: &str = "<!-- chaos record: begin; written by `make chaos-long` -->";
const END: &str = "<!-- chaos record: end -->";

/// A run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Its seed.
    pub seed: u64,
    /// Of the repository; `+` behind it if files were changed.
    pub commit: String,
    /// Nodes at its beginning.
    pub nodes: u32,
    /// For how long faults went on, in seconds.
    pub seconds: u64,
    /// Faults that had their effect, by kind.
    pub faults: BTreeMap<FaultKind, u32>,
    /// How long changes waited after each leader kill among them, and what became of other requests meanwhile.
    pub failovers: FailOvers,
    /// Calls of clients whose outcome is known.
    pub operations: u64,
    /// What the oracles found wrong.
    pub violations: u64,
}

/// What a run leaves, in a line.
#[must_use]
pub fn summary(report: &Report) -> String {
    let faults: Vec<String> = counted(&report.fired)
        .iter()
        .map(|(kind, count)| format!("{count} {kind}"))
        .collect();
    format!(
        "{} faults in {:.1} minutes had their effect: {}; {} operations with a known outcome",
        counted(&report.fired).values().sum::<u32>(),
        report.faults_lasted.as_secs_f64() / 60.0,
        if faults.is_empty() {
            "none".to_owned()
        } else {
            faults.join(", ")
        },
        report.operations
    )
}

/// Adds a run to the file, which need not be there yet. One that was inconclusive is left out.
///
/// # Errors
/// A file that cannot be read or written; fail-overs that could not be read from the run's folder.
pub fn add(
    file: &Path,
    options: &Options,
    report: &Report,
    failovers: Result<FailOvers>,
    commit: String,
) -> Result<()> {
    if matches!(report.verdict, Verdict::Inconclusive(_)) || options.bug.is_some() {
        println!("{}: not added: the run shows nothing", file.display());
        return Ok(());
    }
    let mut entries = if file.exists() { read(file)? } else { Vec::new() };
    entries.push(Entry {
        seed: options.seed,
        commit,
        nodes: options.nodes,
        seconds: report.faults_lasted.as_secs(),
        faults: counted(&report.fired),
        failovers: failovers.context("how long changes waited after each leader kill")?,
        operations: report.operations,
        violations: report.verdict.violations(),
    });
    write(file, &entries)?;
    println!("{}: {} runs", file.display(), entries.len());
    Ok(())
}

/// All runs of a file.
///
/// # Errors
/// It cannot be read, or was written by another version of this program.
pub fn read(file: &Path) -> Result<Vec<Entry>> {
    let text = fs::read(file).with_context(|| file.display().to_string())?;
    serde_json::from_slice(&text).with_context(|| file.display().to_string())
}

/// A line for each run, so that a diff shows what was added.
fn write(file: &Path, entries: &[Entry]) -> Result<()> {
    let lines: Result<Vec<String>, _> = entries.iter().map(serde_json::to_string).collect();
    let text = format!("[\n{}\n]\n", lines?.join(",\n"));
    // Beside it first: what many hours have shown is not lost half-way.
    let beside = file.with_extension("new");
    fs::write(&beside, text).with_context(|| beside.display().to_string())?;
    fs::rename(&beside, file).with_context(|| file.display().to_string())
}

/// That of this repository; `+` behind it if files of the program were changed.
///
/// # Errors
/// There is none.
pub fn commit() -> Result<String> {
    let git = |arguments: &[&str]| -> Result<String> {
        let output = Command::new("git")
            .args(arguments)
            .output()
            .context("start git")?;
        ensure!(
            output.status.success(),
            "git {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let head = git(&["rev-parse", "--short=7", "HEAD"])?;
    let own = format!(":(exclude){FILE}");
    let changed = git(&[
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        ":/",
        &own,
        ":(exclude)docs/reliability.md",
    ])?;
    Ok(if changed.is_empty() {
        head
    } else {
        format!("{head}+")
    })
}

/// The sums as a table.
#[must_use]
pub fn table(entries: &[Entry]) -> String {
    let count = |kind: FaultKind| -> u64 {
        let counts = entries.iter().filter_map(|entry| entry.faults.get(&kind));
        counts.map(|count| u64::from(*count)).sum()
    };
    let sum = |of: fn(&Entry) -> u64| entries.iter().map(of).sum::<u64>();
    let mut failovers = FailOvers::default();
    entries.iter().for_each(|entry| failovers.add(&entry.failovers));
    let commits: BTreeSet<&str> = entries.iter().map(|entry| entry.commit.as_str()).collect();
    let mut out = String::from("| what | in all recorded runs |\n|---|---|\n");
    let mut row = |what: &str, figure: String| out.push_str(&format!("| {what} | {figure} |\n"));
    row(
        "runs, each a history that every oracle has checked",
        thousands(entries.len() as u64),
    );
    row("minutes under faults", thousands(sum(|entry| entry.seconds) / 60));
    row(
        "of these, in runs in which ten kinds of faults or more have had their effect",
        thousands(sum(|entry| if is_composed(entry) { entry.seconds } else { 0 }) / 60),
    );
    row(
        "leaders killed, each counted only once another node had committed in a higher term",
        thousands(count(FaultKind::KillLeader)),
    );
    row(
        "from the last change acknowledged before such a kill to the first one asked for after it and acknowledged",
        waited(&failovers),
    );
    row(
        "encryptions and decryptions meanwhile on the nodes that were not killed, and how many of them failed",
        format!("{}, {}", thousands(failovers.asked), thousands(failovers.failed)),
    );
    row("whole clusters killed", thousands(count(FaultKind::KillAll)));
    row(
        "partitions with the leader in the minority",
        thousands(count(FaultKind::LeaderInMinority)),
    );
    row(
        "partitions with the leader in the majority",
        thousands(count(FaultKind::LeaderInMajority)),
    );
    let named = [
        FaultKind::KillLeader,
        FaultKind::KillAll,
        FaultKind::LeaderInMinority,
        FaultKind::LeaderInMajority,
    ];
    let others: Vec<String> = FaultKind::ALL
        .iter()
        .filter(|kind| !named.contains(kind))
        .map(|kind| format!("{kind} {}", thousands(count(*kind))))
        .collect();
    row("other faults that had their effect", others.join(", "));
    row(
        "operations with a known outcome",
        thousands(sum(|entry| entry.operations)),
    );
    row(
        "**acknowledged and lost, answered wrongly, or another promise broken**",
        format!("**{}**", thousands(sum(|entry| entry.violations))),
    );
    row(
        "commits; seed and duration of each run are in the file",
        or_none(&commits),
    );
    out
}

/// Kills alone, however many, are not faults of every kind at once.
fn is_composed(entry: &Entry) -> bool {
    entry.faults.len() >= COMPOSED
}

fn waited(failovers: &FailOvers) -> String {
    let seconds = |percent| {
        let ms = failovers.percentile(percent)?;
        Some(format!("{:.2} s", ms as f64 / 1000.0))
    };
    match (seconds(50), seconds(99), seconds(100)) {
        (Some(half), Some(nearly_all), Some(all)) => {
            format!(
                "p50 {half}, p99 {nearly_all}, at most {all}, of {}",
                thousands(failovers.ms.len() as u64)
            )
        }
        _ => "none measured".to_owned(),
    }
}

fn or_none(commits: &BTreeSet<&str>) -> String {
    if commits.is_empty() {
        return "none".to_owned();
    }
    let commits: Vec<&str> = commits.iter().copied().collect();
    commits.join(", ")
}

/// `12,345`.
fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Writes the table into a document, between its marks.
///
/// # Errors
/// The marks are not there.
pub fn write_into(document: &Path, table: &str) -> Result<()> {
    let text = fs::read_to_string(document).with_context(|| document.display().to_string())?;
    let (before, _, after) = parts(&text).with_context(|| document.display().to_string())?;
    fs::write(document, format!("{before}{BEGIN}\n{table}{END}{after}"))
        .with_context(|| document.display().to_string())
}

/// What stands before the marks, between them and behind them.
fn parts(text: &str) -> Result<(&str, &str, &str)> {
    let (before, rest) = text.split_once(BEGIN).with_context(|| format!("no `{BEGIN}`"))?;
    let (between, after) = rest.split_once(END).with_context(|| format!("no `{END}`"))?;
    Ok((before, between.trim_start_matches('\n'), after))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use super::*;
    use crate::schedule::{Effect, Fired};

    fn root() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
    }

    fn report(verdict: Verdict) -> Report {
        let fired = |kind, effect| Fired {
            step: 1,
            kind,
            at_ms: 0,
            target: String::new(),
            effect,
            healed_ms: 1,
        };
        Report {
            verdict,
            fired: vec![
                fired(FaultKind::KillLeader, Effect::Counted),
                fired(FaultKind::KillLeader, Effect::Counted),
                fired(FaultKind::KillLeader, Effect::NotCounted("nobody led".to_owned())),
                fired(FaultKind::Pause, Effect::Counted),
            ],
            operations: 12_345,
            checked: String::new(),
            faults_lasted: Duration::from_secs(600),
        }
    }

    fn options() -> Options {
        Options {
            seed: 7,
            minutes: 10.0,
            nodes: 3,
            faults: crate::options::faults("all").unwrap(),
            pause_ms: crate::schedule::PAUSE_MS,
            network: crate::options::NetworkChoice::Auto,
            bug: None,
            config: None,
            dir: PathBuf::new(),
        }
    }

    #[test]
    fn runs_add_up_and_only_faults_with_an_effect_count() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("record.json");
        let measured = |ms: &[u64]| {
            Ok(FailOvers {
                ms: ms.to_vec(),
                unended: 0,
                asked: 1_000,
                failed: 1,
            })
        };
        let (first, second) = (measured(&[2_400, 1_900]), measured(&[3_000, 2_500]));
        let pass = report(Verdict::Pass);
        add(&file, &options(), &pass, first, "abcdef0".to_owned()).unwrap();
        add(&file, &options(), &pass, second, "abcdef1+".to_owned()).unwrap();
        let nothing = report(Verdict::Inconclusive("no".to_owned()));
        let unread = || Err(anyhow::anyhow!("no history"));
        add(&file, &options(), &nothing, unread(), "abcdef0".to_owned()).unwrap();
        let refused = add(&file, &options(), &pass, unread(), "abcdef0".to_owned());
        assert!(refused.is_err(), "a figure that is missing is no zero");
        let entries = read(&file).unwrap();
        assert_eq!(entries.len(), 2, "what was inconclusive shows nothing");
        assert_eq!(entries[0].faults[&FaultKind::KillLeader], 2);
        let table = table(&entries);
        for said in [
            "checked | 2 |",
            "minutes under faults | 20 |",
            "have had their effect | 0 |",
            "higher term | 4 |",
            "| p50 2.40 s, p99 3.00 s, at most 3.00 s, of 4 |",
            "| 2,000, 2 |",
            "| abcdef0, abcdef1+ |",
            "outcome | 24,690 |",
            "pause 2",
            "| **0** |",
        ] {
            assert!(table.contains(said), "{said}: {table}");
        }
    }

    #[test]
    fn minutes_are_of_composed_faults_where_many_kinds_came() {
        let entry = |kinds: usize, seconds| Entry {
            seed: 1,
            commit: "abcdef0".to_owned(),
            nodes: 3,
            seconds,
            faults: FaultKind::ALL.iter().take(kinds).map(|kind| (*kind, 1)).collect(),
            failovers: FailOvers::default(),
            operations: 1,
            violations: 0,
        };
        let table = table(&[entry(COMPOSED - 1, 600), entry(COMPOSED, 1_200)]);
        assert!(table.contains("minutes under faults | 30 |"), "{table}");
        assert!(table.contains("have had their effect | 20 |"), "{table}");
        assert!(table.contains("| none measured |"), "{table}");
    }

    #[test]
    fn a_table_takes_the_place_of_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let document = dir.path().join("doc.md");
        fs::write(&document, format!("before\n{BEGIN}\nold\n{END}\nafter\n")).unwrap();
        write_into(&document, "| new |\n").unwrap();
        let text = fs::read_to_string(&document).unwrap();
        assert_eq!(text, format!("before\n{BEGIN}\n| new |\n{END}\nafter\n"));
        fs::write(&document, "no marks").unwrap();
        assert!(write_into(&document, "x").is_err());
    }

    /// No figure stands there that no run has made.
    #[test]
    fn the_table_in_the_document_is_that_of_the_recorded_runs() {
        let entries = read(&root().join(FILE)).unwrap();
        let text = fs::read_to_string(root().join("docs/reliability.md")).unwrap();
        let (_, between, _) = parts(&text).unwrap();
        assert_eq!(
            between,
            table(&entries),
            "run: cargo run -p chaos -- record --into docs/reliability.md"
        );
    }

    #[test]
    fn thousands_are_set_apart() {
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(thousands),
            ["0", "999", "1,000", "1,234,567"]
        );
    }
}
