//! Terms and leaders: a node never goes back in its term, whatever is taken from it with its power; a leader that was started
//! again leads only in a term that it has won since; and a cluster in which nothing is broken keeps its leader.

use std::collections::BTreeMap;

use super::Finding;
use crate::ending::{CALM_BEGINS, CALM_ENDS, DISTURBED};
use crate::history::{History, TermSeen};

pub(super) const NAME: &str = "terms";
/// Nanoseconds until the watch has seen what was so when the calm began.
const SEEN: u64 = 1_000_000_000;

/// What is wrong with the terms that the watch saw.
pub(super) fn check(history: &History) -> Vec<Finding> {
    let mut findings = gone_back(&history.terms);
    findings.extend(resumed(&history.terms));
    findings.extend(elections_in_calm(history));
    findings
}

/// A node promises its vote for the term that it says it is in.
fn gone_back(seen: &[TermSeen]) -> Vec<Finding> {
    let mut highest: BTreeMap<u32, u64> = BTreeMap::new();
    let mut findings = Vec::new();
    // A node that belongs to no cluster yet is in no term.
    for one in seen.iter().filter(|one| one.term > 0) {
        let highest = highest.entry(one.node).or_insert(one.term);
        if one.term < *highest {
            findings.push(Finding {
                oracle: "durability",
                text: format!(
                    "node {} was in term {highest} and is in term {} after that: it may vote in a term once more",
                    one.node, one.term
                ),
            });
        }
        *highest = (*highest).max(one.term);
    }
    findings
}

/// Whoever leads in a term has won it in one process.
fn resumed(seen: &[TermSeen]) -> Vec<Finding> {
    let mut led: BTreeMap<(u32, u64), Option<i32>> = BTreeMap::new();
    let mut findings = Vec::new();
    for one in seen.iter().filter(|one| one.leads && one.pid.is_some()) {
        let pid = led.entry((one.node, one.term)).or_insert(one.pid);
        if *pid != one.pid {
            findings.push(Finding {
                oracle: "durability",
                text: format!(
                    "node {} leads in term {} as process {:?} and led in it as process {pid:?}: nobody has elected it since",
                    one.node, one.term, one.pid
                ),
            });
        }
    }
    findings
}

/// The cluster was settled when each calm began.
fn elections_in_calm(history: &History) -> Vec<Finding> {
    let mut findings = Vec::new();
    let (mut began, mut disturbed) = (None, false);
    for (at, note) in &history.notes {
        match note.as_str() {
            CALM_BEGINS => (began, disturbed) = (Some(*at), false),
            DISTURBED => disturbed = true,
            CALM_ENDS => {
                if let Some(began) = began.take().filter(|_| !disturbed) {
                    findings.extend(election_between(&history.terms, began, *at));
                }
            }
            _ => {}
        }
    }
    findings
}

fn election_between(terms: &[TermSeen], begins: u64, ends: u64) -> Option<Finding> {
    let begins = begins + SEEN;
    let before = terms.iter().filter(|one| one.at <= begins);
    let before = before.map(|one| one.term).max()?;
    let elected = terms
        .iter()
        .find(|one| one.at > begins && one.at <= ends && one.term > before)?;
    Some(Finding {
        oracle: "throughput",
        text: format!(
            "node {} is in term {} although nothing was broken: until then the term was {before}, and whoever led in it has \
             let the others miss it",
            elected.node, elected.term
        ),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn seen(at: u64, node: u32, pid: i32, term: u64, leads: bool) -> TermSeen {
        TermSeen {
            at,
            node,
            pid: Some(pid),
            term,
            leads,
        }
    }

    fn calm(terms: Vec<TermSeen>, notes: &[(u64, &str)]) -> History {
        History {
            terms,
            notes: notes.iter().map(|(at, what)| (*at, (*what).to_owned())).collect(),
            ..History::default()
        }
    }

    #[test]
    fn a_term_that_goes_back_is_found_over_a_restart_too() {
        let ahead = [
            seen(1, 1, 10, 4, false),
            seen(2, 2, 20, 3, false),
            seen(3, 1, 11, 5, false),
        ];
        assert!(gone_back(&ahead).is_empty());
        let back = [
            seen(1, 1, 10, 4, false),
            seen(2, 1, 11, 0, false),
            seen(3, 1, 11, 3, false),
        ];
        let findings = gone_back(&back);
        assert_eq!(findings.len(), 1, "no term is none: {findings:?}");
        assert_eq!(findings[0].oracle, "durability");
    }

    #[test]
    fn a_leader_of_a_term_is_one_process() {
        let fine = [
            seen(1, 1, 10, 2, true),
            seen(2, 1, 11, 2, false),
            seen(3, 1, 11, 3, true),
        ];
        assert!(resumed(&fine).is_empty());
        let resumed_it = [seen(1, 1, 10, 2, true), seen(2, 1, 11, 2, true)];
        assert_eq!(resumed(&resumed_it).len(), 1);
    }

    #[test]
    fn an_election_counts_only_while_nothing_is_broken() {
        let terms = || vec![seen(SEEN, 1, 10, 2, true), seen(5 * SEEN, 2, 20, 3, true)];
        let count = |notes: &[(u64, &str)]| {
            let notes: Vec<(u64, &str)> = notes.iter().map(|(at, what)| (at * SEEN, *what)).collect();
            elections_in_calm(&calm(terms(), &notes)).len()
        };
        let phase = |begins, ends| [(begins, CALM_BEGINS), (ends, CALM_ENDS)];
        assert_eq!(count(&phase(3, 9)), 1);
        // Before the watch had looked.
        assert_eq!(count(&phase(4, 9)), 0);
        assert_eq!(count(&phase(6, 9)), 0);
        assert_eq!(count(&phase(3, 4)), 0);
        assert_eq!(count(&[phase(1, 2), phase(3, 9)].concat()), 1, "each calm counts");
        let disturbed = [(3, CALM_BEGINS), (8, DISTURBED), (9, CALM_ENDS)];
        assert_eq!(count(&disturbed), 0);
        assert_eq!(count(&[]), 0);
    }
}
