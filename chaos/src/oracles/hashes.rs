//! Nodes that have applied the same have the same state: the digest of all rows at an index is one.

use std::collections::{BTreeMap, BTreeSet};

use super::Found;
use super::observed::{NodeView, Observed};
use crate::history::History;

pub(super) const NAME: &str = "hashes";

pub(super) fn judge(history: &History, observed: &Observed, found: &mut Found) {
    found.checked(NAME, history.watched.compared);
    found.violations(NAME, &history.watched.unlike);
    let mut known: BTreeMap<u64, (u32, &str)> = BTreeMap::new();
    for node in &observed.nodes {
        for (index, digest) in &node.digests {
            let (first, other) = *known.entry(*index).or_insert((node.node, digest.as_str()));
            if first != node.node {
                found.checked(NAME, 1);
            }
            if other != digest {
                let text = format!(
                    "at the end, at index {index}, the state of node {} has the digest {digest}, that of node {first} {other}",
                    node.node
                );
                found.violation(NAME, text);
            }
        }
    }
    for node in observed.nodes.iter().filter(|node| node.ready) {
        if node.digests.is_empty() {
            let text = format!("node {} has not said its state's digest", node.node);
            found.undecided(NAME, text);
        } else if observed.nodes.len() > 1 && !is_compared(node, observed) {
            let text = format!(
                "node {} has said no digest of an index of which another one has",
                node.node
            );
            found.undecided(NAME, text);
        }
    }
}

fn is_compared(node: &NodeView, observed: &Observed) -> bool {
    let own: BTreeSet<u64> = node.digests.iter().map(|(index, _)| *index).collect();
    let others = observed.nodes.iter().filter(|other| other.node != node.node);
    let mut said = others.flat_map(|other| &other.digests);
    said.any(|(index, _)| own.contains(index))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::testing::{Script, judged, nodes_with, undecided};
    use super::*;

    #[test]
    fn one_index_has_one_digest() {
        for (second, violations) in [((6, "b"), 0), ((5, "a"), 0), ((5, "b"), 1)] {
            let mut observed = nodes_with(Vec::new());
            observed.nodes[0].digests = vec![(5, "a".to_owned())];
            observed.nodes[1].digests = vec![(second.0, second.1.to_owned())];
            let said = judged(&Script::default().history(), &observed, judge);
            assert_eq!(said.len(), violations, "{second:?}");
        }
    }

    #[test]
    fn a_node_that_nobody_can_be_compared_with_is_undecided() {
        let history = Script::default().history();
        for (second, shows_nothing) in [(vec![(5, "a"), (6, "b")], 0), (vec![(6, "b")], 2), (vec![], 2)] {
            let mut observed = nodes_with(Vec::new());
            observed.nodes[0].digests = vec![(5, "a".to_owned())];
            let digests = second
                .iter()
                .map(|(index, digest)| (*index, (*digest).to_owned()));
            observed.nodes[1].digests = digests.collect();
            let said = undecided(|found| judge(&history, &observed, found));
            assert_eq!(said.len(), shows_nothing, "{second:?}: {said:?}");
            // Alone it has nobody.
            observed.nodes.truncate(1);
            assert!(undecided(|found| judge(&history, &observed, found)).is_empty());
        }
    }

    #[test]
    fn what_was_seen_during_the_run_is_told() {
        let mut history = Script::default().history();
        history.watched.unlike.push("unlike".to_owned());
        assert_eq!(judged(&history, &nodes_with(Vec::new()), judge), ["unlike"]);
    }
}
