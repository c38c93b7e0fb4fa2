//! What runs have shown, added up over runs: a checked-in file that `make chaos-long` adds a line to, and the table that is made
//! of it for `docs/reliability.md`. Runs that were inconclusive show nothing and are not in it; those that found something are,
//! and those that were told to stop are with what they had carried out until then.

mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use cluster_tests::failpoints;
use serde::{Deserialize, Serialize};

use crate::failover::FailOvers;
use crate::faults::disk::MET_ITS_END;
use crate::faults::failpoint::points;
use crate::network::NetworkKind;
use crate::options::Options;
use crate::run::Report;
use crate::schedule::{Early, Effect, FaultKind, Fired};
use crate::verdict::{Verdict, counted};

pub use table::table;

/// Where it lies in the repository.
pub const FILE: &str = "docs/chaos-record.json";
/// Around the table in a document.
const BEGIN: &str = "<!-- chaos record: begin; written by `make chaos-long` -->";
const END: &str = "<!-- chaos record: end -->";

/// A run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Its seed.
    pub seed: u64,
    /// That the programs were built from; `-dirty` behind it if files were changed.
    pub commit: String,
    /// Nodes at its beginning.
    pub nodes: u32,
    /// Where they found each other. The first lines do not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkKind>,
    /// For how long faults went on, in seconds.
    pub seconds: u64,
    /// Kinds that were asked for.
    #[serde(default)]
    pub asked: BTreeSet<FaultKind>,
    /// Steps of the plan.
    #[serde(default)]
    pub planned: u32,
    /// Those of them that were left out because the plan has ended early.
    #[serde(default)]
    pub left_out: u32,
    /// Why it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub early: Option<Early>,
    /// Faults that had their effect, by kind.
    pub faults: BTreeMap<FaultKind, u32>,
    /// How often a node has died at each failpoint.
    #[serde(default)]
    pub points: BTreeMap<String, u32>,
    /// How many of the disks that were full were so for their node to the last byte: of the others it took no change any more.
    #[serde(default)]
    pub to_the_last_byte: u32,
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
    let left_out = report.early.map(|early| {
        let (left_out, planned) = (report.left_out, report.planned);
        format!(
            "; {left_out} of {planned} planned faults were left out: {}",
            early.why()
        )
    });
    format!(
        "{} faults in {:.1} minutes had their effect: {}; {} operations with a known outcome{}",
        counted(&report.fired).values().sum::<u32>(),
        report.faults_lasted.as_secs_f64() / 60.0,
        if faults.is_empty() {
            "none".to_owned()
        } else {
            faults.join(", ")
        },
        report.operations,
        left_out.unwrap_or_default()
    )
}

/// Every line of the product at which a fault has a node die, by itself or while an operator changes something.
pub(crate) fn lines() -> BTreeSet<&'static str> {
    let alone = points().into_iter().map(|(name, _)| name);
    let meanwhile = failpoints::MEMBERSHIP
        .iter()
        .chain(&failpoints::BURY)
        .chain(&failpoints::REKEY)
        .chain(&failpoints::RESEAL);
    alone.chain(meanwhile.copied()).collect()
}

/// At which of them nodes have died, and how often.
fn hits(fired: &[Fired]) -> BTreeMap<String, u32> {
    let (all, mut hits) = (lines(), BTreeMap::new());
    for one in fired.iter().filter(|one| one.effect == Effect::Counted) {
        // `node 2 at store::after_vote, leader …`; of a change of members there may be two.
        let words = one
            .target
            .split(|letter: char| !letter.is_alphanumeric() && !matches!(letter, '_' | ':'));
        for name in words.filter(|word| all.contains(word)) {
            *hits.entry(name.to_owned()).or_default() += 1;
        }
    }
    hits
}

/// Full disks at which a node was told that there is no space left.
fn to_the_last_byte(fired: &[Fired]) -> u32 {
    let met = |one: &&Fired| {
        one.kind == FaultKind::DiskFull && one.effect == Effect::Counted && one.target.ends_with(MET_ITS_END)
    };
    u32::try_from(fired.iter().filter(met).count()).unwrap_or(u32::MAX)
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
        network: report.network,
        seconds: report.faults_lasted.as_secs(),
        asked: options.faults.clone(),
        planned: report.planned,
        left_out: report.left_out,
        early: report.early,
        faults: counted(&report.fired),
        points: hits(&report.fired),
        to_the_last_byte: to_the_last_byte(&report.fired),
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

/// The commit that the nodes were built from, as `hsm-node --version` says it; `own` is that of this program.
///
/// # Errors
/// The nodes do not say it, or this program, whose oracles judge them, is of another one.
pub fn commit(own: Option<&str>) -> Result<String> {
    let node = cluster_tests::binary("hsm-node")?;
    let output = Command::new(&node)
        .arg("--version")
        .output()
        .with_context(|| format!("start {}", node.display()))?;
    ensure!(
        output.status.success(),
        "{} --version: {}: {}",
        node.display(),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let said = String::from_utf8_lossy(&output.stdout);
    let commit = commit_in(&said, own).with_context(|| node.display().to_string())?;
    Ok(commit.to_owned())
}

/// Of what `hsm-node --version` says.
fn commit_in<'a>(said: &'a str, own: Option<&str>) -> Result<&'a str> {
    let commit = said
        .lines()
        .find_map(|line| line.strip_prefix("commit: "))
        .map(str::trim)
        .filter(|commit| !commit.is_empty());
    let commit = commit.context(
        "it does not say which commit it was built from, so nothing can be recorded of it; build it by scripts/chaos.sh, or with \
         HSM_BUILD_COMMIT",
    )?;
    let own = own.unwrap_or_default();
    ensure!(
        commit == own,
        "it was built from commit {commit}, and chaos from `{own}`; build both together, by scripts/chaos.sh"
    );
    Ok(commit)
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
            planned: 4,
            early: None,
            left_out: 0,
            network: Some(NetworkKind::Namespaces),
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
        let measured = |ms: [u64; 2]| {
            let all = serde_json::json!({"ms": ms, "asked": 1_000, "failed": 1});
            serde_json::from_value::<FailOvers>(all).context("fail-overs")
        };
        let (first, second) = (measured([2_400, 1_900]), measured([3_000, 2_500]));
        let pass = report(Verdict::Pass);
        add(&file, &options(), &pass, first, "abcdef0".to_owned()).unwrap();
        add(&file, &options(), &pass, second, "abcdef1-dirty".to_owned()).unwrap();
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
            "namespace of its own | 2 |",
            "minutes under faults | 20 |",
            "have had their effect | 0 |",
            "higher term | 4 |",
            "| p50 2.40 s, p99 3.00 s, at most 3.00 s, of 4 |",
            "| 2,000, 2 |",
            "| abcdef0, abcdef1-dirty |",
            "or the run was told to stop | 0 of 8 |",
            "at each failpoint | none |",
            "outcome | 24,690 |",
            "pause 2",
            "| **0** |",
        ] {
            assert!(table.contains(said), "{said}: {table}");
        }
    }

    #[test]
    fn a_disk_that_was_full_to_the_last_byte_is_told_from_one_below_its_reserve() {
        let full = |kind, met: &str, effect| Fired {
            step: 1,
            kind,
            at_ms: 0,
            target: format!("node 2, 4096 bytes of ballast; it {met}"),
            effect,
            healed_ms: 1,
        };
        let not = Effect::NotCounted("it was not seen".to_owned());
        let fired = [
            full(FaultKind::DiskFull, MET_ITS_END, Effect::Counted),
            full(FaultKind::DiskFull, "was below its reserve", Effect::Counted),
            full(FaultKind::DiskFull, MET_ITS_END, not),
            full(FaultKind::SlowFsync, MET_ITS_END, Effect::Counted),
        ];
        assert_eq!(to_the_last_byte(&fired), 1);
    }

    #[test]
    fn deaths_at_failpoints_are_counted_for_each() {
        let at = |kind, target: &str, effect| Fired {
            step: 1,
            kind,
            at_ms: 0,
            target: target.to_owned(),
            effect,
            healed_ms: 1,
        };
        let vote = "node 2 at store::after_vote, leader Some(Leader { node: 1, term: 3 })";
        let purge = "node 1 at store::after_purge, leader None";
        let joined = "meanwhile: Some(\"leader 1 at membership::after_change\"), Some(\"leader 2 at membership::after_bury\")";
        let hits = hits(&[
            at(FaultKind::Failpoint, vote, Effect::Counted),
            at(FaultKind::Failpoint, vote, Effect::Counted),
            at(
                FaultKind::Failpoint,
                purge,
                Effect::NotCounted("nobody".to_owned()),
            ),
            at(FaultKind::JoinRemove, joined, Effect::Counted),
            at(FaultKind::Pause, "node 1", Effect::Counted),
        ]);
        let wanted = [
            ("membership::after_bury", 1),
            ("membership::after_change", 1),
            ("store::after_vote", 2),
        ];
        let wanted = wanted.map(|(name, count)| (name.to_owned(), count));
        assert_eq!(hits, BTreeMap::from(wanted));
    }

    #[test]
    fn a_run_that_has_ended_early_is_recorded_with_what_it_has_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("record.json");
        let mut stopped = report(Verdict::Pass);
        stopped.planned = 90;
        stopped.early = Some(Early::Signal);
        stopped.left_out = 86;
        assert!(
            summary(&stopped).ends_with("86 of 90 planned faults were left out: the run was told to stop"),
            "{}",
            summary(&stopped)
        );
        let failovers = Ok(FailOvers::default());
        add(&file, &options(), &stopped, failovers, "abcdef0".to_owned()).unwrap();
        let entries = read(&file).unwrap();
        assert_eq!((entries[0].left_out, entries[0].early), (86, Some(Early::Signal)));
        assert!(table(&entries).contains("| 86 of 90 |"));
    }

    #[test]
    fn the_commit_is_that_of_the_nodes_and_of_this_program() {
        let said = "hsm-node 2.0.0\nfeatures: none\ncommit: abcdef0-dirty\n";
        assert_eq!(commit_in(said, Some("abcdef0-dirty")).unwrap(), "abcdef0-dirty");
        let other = commit_in(said, Some("abcdef0")).unwrap_err().to_string();
        assert!(
            other.contains("abcdef0-dirty, and chaos from `abcdef0`"),
            "{other}"
        );
        assert!(commit_in(said, None).is_err());
        let silent = commit_in("hsm-node 2.0.0\nfeatures: none\n", None).unwrap_err();
        assert!(silent.to_string().contains("scripts/chaos.sh"), "{silent}");
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
}
