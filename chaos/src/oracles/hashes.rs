//! Nodes that have applied the same have the same state: the digest of all rows at an index is one.

use std::collections::BTreeMap;

use super::Found;
use super::observed::Observed;
use crate::history::History;

const NAME: &str = "hashes";

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
    let silent = observed
        .nodes
        .iter()
        .filter(|node| node.ready && node.digests.is_empty());
    for node in silent {
        found.undecided(
            NAME,
            format!("node {} has not said its state's digest", node.node),
        );
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::testing::{Script, judged, nodes_with};
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
    fn what_was_seen_during_the_run_is_told() {
        let mut history = Script::default().history();
        history.watched.unlike.push("unlike".to_owned());
        assert_eq!(judged(&history, &nodes_with(Vec::new()), judge), ["unlike"]);
    }
}
