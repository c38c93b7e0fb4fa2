//! What came of a scenario: whether it is as it has to be, how long it took, what the oracle said.

use std::fmt;
use std::time::Duration;

use crate::bugs::Bug;
use crate::ending::{Ending, STOOD_STILL};
use crate::oracles::{Finding, Judgement};

/// Characters of one text that are told.
const TOLD: usize = 300;
/// Findings that are told where they are not what was wanted.
const FINDINGS: usize = 5;

/// What came of playing a scenario once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    /// As it has to be, and what the oracle said.
    Good(String),
    /// The bug was not found, or something was found without it.
    Failed(String),
    /// It was not carried out, or an oracle could not decide.
    Undecided(String),
}

impl Outcome {
    pub(super) fn is_good(&self) -> bool {
        matches!(self, Self::Good(_))
    }

    fn told(&self) -> &str {
        match self {
            Self::Good(told) | Self::Failed(told) | Self::Undecided(told) => told,
        }
    }
}

/// The oracle that is named for the bug finds it, and says what it is for, whatever else is found or fails.
pub(super) fn with_bug(bug: &Bug, ending: &Ending) -> Outcome {
    let findings: &[Finding] = match &ending.judgement {
        Judgement::Violations(findings) => findings,
        Judgement::Pass => &[],
        Judgement::Inconclusive(why) => {
            return Outcome::Undecided(format!("inconclusive: {why}{}", troubles(&ending.trouble)));
        }
    };
    let is_it = |finding: &&Finding| finding.oracle == bug.oracle && finding.text.contains(bug.says);
    if let Some(finding) = findings.iter().find(is_it) {
        return Outcome::Good(format!("{}: {}", finding.oracle, short(&finding.text)));
    }
    let why = format!(
        "the oracle {} has not said `{}`; found: {}{}",
        bug.oracle,
        bug.says,
        told(findings),
        troubles(&ending.trouble)
    );
    // Of a scenario that was not carried out to its end it is not known whether the oracle would have found it.
    if ending.trouble.is_empty() {
        Outcome::Failed(why)
    } else {
        Outcome::Undecided(why)
    }
}

/// Nothing is found or fails.
pub(super) fn without(bug: &Bug, ending: &Ending) -> Outcome {
    let troubles = troubles(&ending.trouble);
    match &ending.judgement {
        Judgement::Violations(findings) => {
            Outcome::Failed(format!("found without the bug: {}{troubles}", told(findings)))
        }
        Judgement::Inconclusive(why) => Outcome::Undecided(format!("inconclusive: {why}{troubles}")),
        Judgement::Pass if ending.trouble.is_empty() => Outcome::Good(checked(bug.oracle, &ending.checked)),
        Judgement::Pass => Outcome::Undecided(format!("nothing found{troubles}")),
    }
}

/// Oracles whose findings may come of a machine that stands still: they judge what happens in time. What the others find is wrong
/// however long it took.
const OF_TIME: [&str; 4] = ["keys_held", "readiness", "revocation", "throughput"];

/// Whether nothing was found without the bug that a machine which stood still would not explain.
pub(super) fn may_be_late(ending: &Ending) -> bool {
    match &ending.judgement {
        Judgement::Violations(findings) => findings.iter().all(|finding| OF_TIME.contains(&finding.oracle)),
        Judgement::Pass | Judgement::Inconclusive(_) => true,
    }
}

/// What the oracle has looked at, of the lines in which all say it. Some are too simple to count.
fn checked(oracle: &str, lines: &str) -> String {
    let mut lines = lines.lines();
    let line = lines.find(|line| line.split(':').next() == Some(oracle));
    line.map_or_else(|| format!("{oracle}: nothing found"), str::to_owned)
}

fn told(findings: &[Finding]) -> String {
    if findings.is_empty() {
        return "nothing".to_owned();
    }
    let told: Vec<String> = findings
        .iter()
        .take(FINDINGS)
        .map(|finding| format!("{}: {}", finding.oracle, short(&finding.text)))
        .collect();
    told.join("; ")
}

fn troubles(trouble: &[String]) -> String {
    if trouble.is_empty() {
        return String::new();
    }
    format!("; trouble: {}", trouble.join("; "))
}

fn short(text: &str) -> String {
    match text.char_indices().nth(TOLD) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// A scenario, played once.
#[derive(Debug, Clone)]
pub(super) struct Played {
    pub(super) outcome: Outcome,
    /// Whether what is wrong with it may be for want of time alone.
    pub(super) may_be_late: bool,
    pub(super) took: Duration,
    /// How long nobody on this machine was run meanwhile.
    pub(super) stood_still: Duration,
}

impl Played {
    /// Whether the machine may be to blame.
    pub(super) fn is_disturbed(&self) -> bool {
        self.stood_still > STOOD_STILL
    }

    /// Whether it is: it counts no more, if another run goes as it should.
    pub(super) fn is_forgiven(&self) -> bool {
        self.is_disturbed() && self.may_be_late
    }
}

/// A scenario with its bug, or without: the run that counts, and the one before it that the machine has spoilt.
#[derive(Debug, Clone)]
pub(super) struct Tried {
    pub(super) disturbed: Option<Played>,
    pub(super) counts: Played,
}

/// A bug and its scenario.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) bug: &'static Bug,
    pub(super) found: Tried,
    pub(super) clean: Tried,
}

impl Row {
    pub(super) fn is_good(&self) -> bool {
        self.found.counts.outcome.is_good() && self.clean.counts.outcome.is_good()
    }
}

impl fmt::Display for Row {
    /// Lines for people, each with how long it took.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.bug.name, self.bug.what)?;
        half(f, "with the bug", "found", "NOT FOUND", &self.found)?;
        half(f, "without it", "passed", "FAILED", &self.clean)
    }
}

fn half(f: &mut fmt::Formatter<'_>, which: &str, good: &str, bad: &str, tried: &Tried) -> fmt::Result {
    for run in tried.disturbed.iter().chain([&tried.counts]) {
        let word = match run.outcome {
            Outcome::Good(_) => good,
            Outcome::Failed(_) => bad,
            Outcome::Undecided(_) => "NOT DECIDED",
        };
        let seconds = run.took.as_secs_f64();
        write!(
            f,
            "\n  {which:<12}  {word} in {seconds:.0} s: {}",
            run.outcome.told()
        )?;
        if run.is_disturbed() {
            let still = run.stood_still.as_secs_f64();
            write!(
                f,
                "\n                (the machine stood still for {still:.1} s of it)"
            )?;
        }
    }
    if tried.disturbed.is_some() {
        write!(f, "\n                (the second run counts)")?;
    }
    Ok(())
}

/// For documents.
pub(super) fn table(rows: &[Row]) -> String {
    let cell = |tried: &Tried, good: &str| {
        if tried.counts.outcome.is_good() {
            let again = if tried.disturbed.is_some() {
                ", the second time"
            } else {
                ""
            };
            format!("{good} in {:.0} s{again}", tried.counts.took.as_secs_f64())
        } else {
            "**failed**".to_owned()
        }
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

/// What is wrong goes before what shows nothing, and nothing at all shows nothing.
pub(super) fn exit_code(rows: &[Row]) -> u8 {
    let mut outcomes = rows
        .iter()
        .flat_map(|row| [&row.found.counts.outcome, &row.clean.counts.outcome]);
    if outcomes
        .clone()
        .any(|outcome| matches!(outcome, Outcome::Failed(_)))
    {
        1
    } else if rows.is_empty() || !outcomes.all(Outcome::is_good) {
        2
    } else {
        0
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::bugs::BUGS;
    use crate::history::History;

    fn ending(judgement: Judgement, trouble: &[&str]) -> Ending {
        Ending {
            history: History::default(),
            judgement,
            checked: "7 operations done\ndurability: 12 checks\nversions: 3 checks\n".to_owned(),
            unready: None,
            trouble: trouble.iter().map(|text| (*text).to_owned()).collect(),
        }
    }

    fn found(oracle: &'static str, text: &str) -> Judgement {
        Judgement::Violations(vec![Finding {
            oracle,
            text: text.to_owned(),
        }])
    }

    fn tried(outcome: Outcome, stood_still_ms: u64) -> Tried {
        Tried {
            disturbed: None,
            counts: Played {
                outcome,
                may_be_late: true,
                took: Duration::from_secs(3),
                stood_still: Duration::from_millis(stood_still_ms),
            },
        }
    }

    fn row(found: Outcome, clean: Outcome) -> Row {
        Row {
            bug: &BUGS[0],
            found: tried(found, 0),
            clean: tried(clean, 0),
        }
    }

    fn good() -> Outcome {
        Outcome::Good("durability: 12 checks".to_owned())
    }

    #[test]
    fn a_bug_is_found_by_its_oracle_that_says_what_it_is_for() {
        for bug in &BUGS {
            let text = format!("node 1: {}, and more", bug.says);
            let said = with_bug(
                bug,
                &ending(found(bug.oracle, &text), &["the scenario: a step has failed"]),
            );
            assert!(said.is_good() && said.told().contains(bug.says), "{said:?}");
            // The right oracle with another finding, another oracle with the right words, nothing.
            for judgement in [
                found(bug.oracle, "a node is slow"),
                found("another", &text),
                Judgement::Pass,
            ] {
                let said = with_bug(bug, &ending(judgement, &[]));
                assert!(matches!(said, Outcome::Failed(_)), "{said:?}");
            }
        }
        let bug = &BUGS[0];
        for ending in [
            ending(Judgement::Inconclusive("too many steps".to_owned()), &[]),
            ending(Judgement::Pass, &["the scenario: nobody leads"]),
        ] {
            let said = with_bug(bug, &ending);
            assert!(matches!(said, Outcome::Undecided(_)), "{said:?}");
        }
    }

    #[test]
    fn without_the_bug_nothing_is_found_and_nothing_fails() {
        let bug = &BUGS[0];
        assert_eq!(without(bug, &ending(Judgement::Pass, &[])), good());
        let said = without(bug, &ending(found("canary", "a secret"), &["a node is away"]));
        assert!(matches!(&said, Outcome::Failed(why) if why.contains("a secret") && why.contains("away")));
        let said = without(bug, &ending(Judgement::Pass, &["a node is away"]));
        assert!(matches!(said, Outcome::Undecided(_)), "{said:?}");
        assert_eq!(
            checked("members", "7 operations done\n"),
            "members: nothing found"
        );
    }

    #[test]
    fn a_bug_that_was_not_found_fails_the_selftest_and_says_why() {
        let failed = || Outcome::Failed("the oracle durability has not said it".to_owned());
        let undecided = || Outcome::Undecided("nobody leads".to_owned());
        let bad = row(failed(), good());
        let told = bad.to_string();
        assert!(told.contains("NOT FOUND in 3 s: the oracle"), "{told}");
        assert!(told.contains("passed in 3 s: durability: 12 checks"), "{told}");
        assert!(!bad.is_good() && table(&[bad]).contains("**failed**"));

        assert_eq!(exit_code(&[row(good(), good())]), 0);
        assert_eq!(exit_code(&[row(good(), undecided()), row(failed(), good())]), 1);
        assert_eq!(exit_code(&[row(good(), failed())]), 1);
        assert_eq!(exit_code(&[row(good(), good()), row(undecided(), good())]), 2);
        assert_eq!(exit_code(&[]), 2);
    }

    #[test]
    fn what_no_lateness_explains_is_not_forgiven() {
        for oracle in OF_TIME {
            assert!(may_be_late(&ending(found(oracle, "late"), &[])), "{oracle}");
        }
        for oracle in ["durability", "register", "ciphertexts", "versions", "canary"] {
            assert!(!may_be_late(&ending(found(oracle, "wrong"), &[])), "{oracle}");
        }
        let both = Judgement::Violations(
            ["readiness", "versions"]
                .map(|oracle| Finding {
                    oracle,
                    text: String::new(),
                })
                .to_vec(),
        );
        assert!(!may_be_late(&ending(both, &[])));
        assert!(may_be_late(&ending(
            Judgement::Pass,
            &["the scenario: nobody leads"]
        )));
        let mut played = tried(Outcome::Failed(String::new()), 1_500).counts;
        assert!(played.is_forgiven());
        played.may_be_late = false;
        assert!(played.is_disturbed() && !played.is_forgiven());
        assert!(!tried(Outcome::Failed(String::new()), 100).counts.is_forgiven());
    }

    #[test]
    fn a_run_that_is_repeated_is_told_too() {
        let spoilt = tried(Outcome::Failed("nothing found".to_owned()), 1_500).counts;
        assert!(spoilt.is_disturbed() && !tried(good(), 100).counts.is_disturbed());
        let mut row = row(good(), good());
        row.found.disturbed = Some(spoilt);
        let told = row.to_string();
        for part in [
            "NOT FOUND",
            "stood still for 1.5 s",
            "found in 3 s",
            "the second run counts",
        ] {
            assert!(told.contains(part), "{part}: {told}");
        }
        assert!(row.is_good() && table(&[row]).contains("the second time"));
    }
}
