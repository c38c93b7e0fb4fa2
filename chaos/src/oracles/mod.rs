//! What must hold, whatever was done to the cluster: one file for each promise, each a pure function of what clients wrote
//! down ([`History`]) and of what every node said at the end ([`Observed`]). An oracle that finds nothing says how much it
//! has looked at.

mod canary;
mod ciphertexts;
mod destruction;
mod durability;
pub(crate) mod ends;
mod excused;
mod hashes;
pub(crate) mod keys_held;
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

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use self::excused::Excused;
use crate::ending::FAULTS_BEGIN;
use crate::history::{History, Moments};
use crate::schedule::{Effect, Fired};

pub use observe::observe;
pub use observed::{ContextState, NodeView, Observed, Opened, TokenView, VersionView};
pub(crate) use watch::watch_first;
pub use watch::{Watch, watch};

/// In the place of an oracle: nodes that were asked at the end.
const OBSERVED: &str = "observed";
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

/// Around the number of those that are not told one by one.
const MORE: (&str, &str) = ("and ", " more of this kind");

impl Finding {
    /// How many things were found wrong: one, but for the last of many, which stands for those that are not told.
    #[must_use]
    pub fn stands_for(&self) -> u64 {
        let more = self.text.strip_prefix(MORE.0);
        let more = more.and_then(|text| text.strip_suffix(MORE.1));
        more.and_then(|number| number.parse().ok()).unwrap_or(1)
    }
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
    /// Without a check of these nothing was tested.
    needed: BTreeSet<&'static str>,
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

    /// Those that no fault explains.
    fn unexplained(&mut self, oracle: &'static str, moments: &Moments, excused: &Excused) {
        for moment in moments.kept.iter().filter(|moment| !excused.explains(moment)) {
            self.violation(oracle, moment.text.clone());
        }
        if moments.more > 0 {
            let text = format!(
                "{} more that a fault may explain, or not, were not looked at",
                moments.more
            );
            self.undecided(oracle, text);
        }
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
                let text = format!("{}{more}{}", MORE.0, MORE.1);
                self.findings.push(Finding { oracle, text });
            }
        }
        for needed in &self.needed {
            if self.checked.get(*needed).copied().unwrap_or_default() == 0 {
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
    // What a token answers while somebody takes it away is its own affair; whoever has none, or is removed, is waited for by
    // nobody.
    let is_of_token = |name: &str| name.starts_with("token");
    let tokens_fail = Excused::by(fired, is_of_token);
    let nodes_leave = Excused::by(fired, |name| is_of_token(name) || name == "join-remove");
    let mut found = Found {
        needed: needed(history, observed, fired),
        ..Found::default()
    };
    unseen(observed, &mut found);
    register::judge(history, observed, &mut found);
    ciphertexts::judge(history, observed, &tokens_fail, &mut found);
    versions::judge(history, observed, &mut found);
    keys_held::judge(history, &nodes_leave, &mut found);
    readiness::judge(history, fired, &mut found);
    revocation::judge(history, fired, &mut found);
    ends::judge(history, fired, &mut found);
    hashes::judge(history, observed, &mut found);
    canary::judge(observed, &mut found);
    throughput::judge(history, fired, observed.nodes.len(), &mut found);
    durability::judge(history, observed, &mut found);
    destruction::judge(history, observed, &mut found);
    found.checked(terms::NAME, history.terms.len() as u64);
    found.checked(members::NAME, members::noted(history));
    for finding in terms::check(history).into_iter().chain(members::check(history)) {
        found.violation(finding.oracle, finding.text);
    }
    found
}

/// What has to have been looked at, in every run or in this one: an oracle that has seen nothing has not found that all is well.
fn needed(history: &History, observed: &Observed, fired: &[Fired]) -> BTreeSet<&'static str> {
    let mut needed = BTreeSet::from([
        canary::NAME,
        ciphertexts::NAME,
        destruction::TOKENS,
        durability::NAME,
        ends::NAME,
        members::NAME,
        register::NAME,
        terms::NAME,
        versions::NAME,
    ]);
    // One node has nobody to be compared with.
    if observed.nodes.len() > 1 {
        needed.extend([hashes::NAME, keys_held::NAME]);
    }
    // The selftest's scenarios have no faults and no workload.
    if history.notes.iter().any(|(_, what)| what == FAULTS_BEGIN) {
        needed.extend([revocation::NAME, throughput::NAME]);
    }
    let killed = |one: &Fired| one.kind.name().starts_with("kill") && one.effect == Effect::Counted;
    if fired.iter().any(killed) {
        needed.insert(readiness::NAME);
    }
    needed
}

/// What a node did not say at the end is no word for it.
fn unseen(observed: &Observed, found: &mut Found) {
    if observed.nodes.is_empty() {
        found.undecided(OBSERVED, "no node is left".to_owned());
    }
    for node in &observed.nodes {
        if !node.ready {
            found.undecided(OBSERVED, format!("node {} is not ready", node.node));
        }
        for what in &node.silent {
            found.undecided(OBSERVED, format!("node {}: {what}", node.node));
        }
    }
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
    let opened_during: u64 = history.versions.values().map(|version| version.opened).sum();
    let opened_at_the_end: Vec<String> = observed
        .nodes
        .iter()
        .map(|node| {
            let each = node.opened.iter();
            let opened: u64 = each
                .map(|opened| opened.right + opened.wrong + opened.refused.values().sum::<u64>())
                .sum();
            format!("{opened} by node {}", node.node)
        })
        .collect();
    let _ = writeln!(
        out,
        "ciphertexts: {opened_during} decrypted during the run; at the end a sample of each version was asked for: {}",
        opened_at_the_end.join(", ")
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
        let all: u64 = findings.iter().map(Finding::stands_for).sum();
        assert_eq!(all, 51, "all of them count");
    }

    #[test]
    fn a_run_in_which_nothing_happened_passes_nothing() {
        let judgement = judge(&Script::default().history(), &node_with(&[]), &[]);
        let Judgement::Inconclusive(why) = judgement else {
            panic!("{judgement:?}");
        };
        for oracle in [
            "canary",
            "ciphertexts",
            "durability",
            "members",
            "register",
            "terms",
            "tokens",
            "versions",
        ] {
            assert!(
                why.contains(&format!("{oracle}: there was nothing")),
                "{oracle}: {why}"
            );
        }
        // They need others, or faults.
        for oracle in ["hashes", "keys_held", "revocation", "throughput", "readiness"] {
            assert!(
                !why.contains(&format!("{oracle}: there was nothing")),
                "{oracle}: {why}"
            );
        }
        let mut history = Script::default().history();
        history.notes = vec![(0, FAULTS_BEGIN.to_owned())];
        let kill = testing::fired(crate::schedule::FaultKind::KillLeader, 0, 1, "nodes [1]");
        let Judgement::Inconclusive(why) = judge(&history, &testing::nodes_with(Vec::new()), &[kill]) else {
            panic!("it is judged");
        };
        for oracle in ["hashes", "keys_held", "revocation", "throughput", "readiness"] {
            assert!(
                why.contains(&format!("{oracle}: there was nothing")),
                "{oracle}: {why}"
            );
        }
    }

    #[test]
    fn what_a_node_has_not_said_is_undecided() {
        let mut observed = testing::nodes_with(Vec::new());
        observed.nodes[0].silent = vec!["list keys: no answer".to_owned()];
        observed.nodes[1].ready = false;
        let said = testing::undecided(|found| unseen(&observed, found));
        assert_eq!(
            said,
            [
                "observed: node 1: list keys: no answer",
                "observed: node 2 is not ready"
            ]
        );
        assert_eq!(
            testing::undecided(|found| unseen(&Observed::default(), found)).len(),
            1
        );
    }

    #[test]
    fn only_what_no_fault_explains_is_told() {
        let mut moments = Moments::default();
        for second in [5, 50] {
            moments.push(crate::history::Moment {
                at: second * 1_000_000_000,
                node: 2,
                text: format!("at {second}"),
            });
        }
        let token = testing::fired(crate::schedule::FaultKind::TokenHung, 1_000, 6_000, "node 2");
        let excused = Excused::by(&[token], |_| true);
        let said = testing::told(|found| found.unexplained("keys_held", &moments, &excused));
        assert_eq!(said, ["at 50"]);
        moments.more = 1;
        assert_eq!(
            testing::undecided(|found| found.unexplained("keys_held", &moments, &excused)).len(),
            1
        );
    }
}
