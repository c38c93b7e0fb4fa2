//! What must hold, whatever was done to the cluster: one file for each promise, each a pure function of what clients wrote
//! down ([`History`]) and of what every node said at the end ([`Observed`]). An oracle that finds nothing says how much it
//! has looked at.

mod canary;
mod ciphertexts;
mod destruction;
mod durability;
mod hashes;
mod keys_held;
pub(crate) mod members;
mod observe;
mod observed;
mod readiness;
mod register;
mod revocation;
mod terms;
#[cfg(test)]
mod testing;
mod throughput;
mod tokens;
mod versions;
mod watch;
mod wgl;

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::history::History;
use crate::schedule::Fired;

pub use observe::observe;
pub use observed::{ContextState, NodeView, Observed, Opened, TokenView, VersionView};
pub(crate) use watch::watch_first;
pub use watch::{Watch, watch};

/// Findings of one oracle that are told one by one; beyond it the first tell enough.
const TOLD: u64 = 20;

/// A promise that was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Which oracle says so.
    pub oracle: &'static str,
    /// What is wrong.
    pub text: String,
}

/// What the oracles say together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Judgement {
    /// Everything that was looked at is as it must be.
    Pass,
    /// It is not.
    Violations(Vec<Finding>),
    /// Nothing is wrong, and something was not decided, or never looked at.
    Inconclusive(String),
}

/// What oracles find, and how much they look at.
#[derive(Default)]
struct Found {
    findings: Vec<Finding>,
    told: BTreeMap<&'static str, u64>,
    undecided: Vec<String>,
    checked: BTreeMap<&'static str, u64>,
}

impl Found {
    fn violation(&mut self, oracle: &'static str, text: String) {
        let told = self.told.entry(oracle).or_default();
        *told += 1;
        if *told <= TOLD {
            self.findings.push(Finding { oracle, text });
        }
    }

    /// What was told elsewhere, and how many there were in all.
    fn violations(&mut self, oracle: &'static str, few: &crate::history::Few<String>) {
        for text in &few.first {
            self.violation(oracle, text.clone());
        }
        *self.told.entry(oracle).or_default() += few.total - few.first.len() as u64;
    }

    fn undecided(&mut self, oracle: &'static str, text: String) {
        self.undecided.push(format!("{oracle}: {text}"));
    }

    fn checked(&mut self, oracle: &'static str, more: u64) {
        *self.checked.entry(oracle).or_default() += more;
    }

    fn judgement(mut self) -> Judgement {
        for (&oracle, told) in &self.told {
            if let Some(more) = told.checked_sub(TOLD).filter(|more| *more > 0) {
                let text = format!("and {more} more of this kind");
                self.findings.push(Finding { oracle, text });
            }
        }
        for needed in [ciphertexts::NAME, versions::NAME] {
            if self.checked.get(needed).copied().unwrap_or_default() == 0 {
                let text = "there was nothing to look at: nothing was tested";
                self.undecided.push(format!("{needed}: {text}"));
            }
        }
        if !self.findings.is_empty() {
            Judgement::Violations(self.findings)
        } else if self.undecided.is_empty() {
            Judgement::Pass
        } else {
            Judgement::Inconclusive(self.undecided.join("; "))
        }
    }
}

fn look(history: &History, observed: &Observed, fired: &[Fired]) -> Found {
    // What a token answers while somebody takes it away is its own affair.
    let any = |of: fn(&str) -> bool| fired.iter().any(|fired| of(fired.kind.name()));
    let tokens_fail = any(|name| name.starts_with("token"));
    let nodes_leave = any(|name| name == "join-remove");
    let mut found = Found::default();
    register::judge(history, observed, &mut found);
    ciphertexts::judge(history, observed, tokens_fail, &mut found);
    versions::judge(history, observed, &mut found);
    keys_held::judge(history, tokens_fail || nodes_leave, &mut found);
    readiness::judge(history, &mut found);
    revocation::judge(history, &mut found);
    hashes::judge(history, observed, &mut found);
    canary::judge(observed, &mut found);
    throughput::judge(history, fired, &mut found);
    durability::judge(history, observed, &mut found);
    destruction::judge(history, observed, &mut found);
    for finding in terms::check(history).into_iter().chain(members::check(history)) {
        found.violation(finding.oracle, finding.text);
    }
    found
}

/// What all of them say of a run. Pure: a kept run is judged again as it was.
#[must_use]
pub fn judge(history: &History, observed: &Observed, fired: &[Fired]) -> Judgement {
    look(history, observed, fired).judgement()
}

/// How much each of them has looked at, for people.
#[must_use]
pub fn summary(history: &History, observed: &Observed, fired: &[Fired]) -> String {
    let counts = history.counts;
    let mut out = format!(
        "{} operations done, {} refused, {} with an unknown outcome; {} ciphertexts handed out under {} versions\n",
        counts.ok,
        counts.refused,
        counts.unknown,
        history.encryptions(),
        history.versions.len(),
    );
    for (oracle, checked) in look(history, observed, fired).checked {
        // A String takes whatever is written.
        let _ = writeln!(out, "{oracle}: {checked} checks");
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::testing::{Script, node_with};
    use super::*;

    fn finding(number: usize) -> String {
        format!("finding {number}")
    }

    #[test]
    fn the_first_of_many_findings_are_told_and_the_others_are_counted() {
        let mut found = Found::default();
        for number in 0..50 {
            found.violation("hashes", finding(number));
        }
        found.violation("canary", finding(0));
        let Judgement::Violations(findings) = found.judgement() else {
            panic!("no violation");
        };
        assert_eq!(findings.len(), 22);
        assert_eq!(findings[21].text, "and 30 more of this kind");
        assert_eq!(findings[21].oracle, "hashes");
    }

    #[test]
    fn a_run_in_which_nothing_happened_passes_nothing() {
        let judgement = judge(&Script::default().history(), &node_with(&[]), &[]);
        let Judgement::Inconclusive(why) = judgement else {
            panic!("{judgement:?}");
        };
        assert!(why.contains("ciphertexts") && why.contains("versions"), "{why}");
    }
}
