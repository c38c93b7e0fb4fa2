//! Who belongs to the cluster, as it says itself now and then during a run: a raft id is one node's for ever. Whatever was said
//! to a removed node, or granted to it, would otherwise be said to another one.

use std::collections::BTreeMap;

use cluster_tests::until;

use super::Finding;
use crate::cluster::{Cluster, ELECTION};
use crate::history::{History, Recorder};

pub(super) const NAME: &str = "members";
/// In front of a name and a raft id.
const MARK: &str = "member ";

/// Notes every member with its raft id, as the first node says that answers.
pub(crate) async fn note(cluster: &Cluster, recorder: &Recorder) {
    let playground = cluster.playground();
    let asked = until("a list of members", 10 * ELECTION, async || {
        for node in cluster.nodes() {
            let client = playground.client_on("admin", node.number).ok()?;
            if let Ok(answer) = client.members().await {
                return Some(answer.into_body().members);
            }
        }
        None
    });
    // Nobody answers: the oracles have more to say of that.
    for member in asked.await.unwrap_or_default() {
        recorder.note(&format!("{MARK}{} {}", member.node_id, member.raft_id));
    }
}

/// How often a member was noted.
pub(super) fn noted(history: &History) -> u64 {
    let notes = history.notes.iter();
    notes.filter(|(_, note)| note.starts_with(MARK)).count() as u64
}

/// Raft ids that two nodes have had.
pub(super) fn check(history: &History) -> Vec<Finding> {
    let mut names: BTreeMap<&str, &str> = BTreeMap::new();
    let mut findings = Vec::new();
    for (_, note) in &history.notes {
        let Some((name, id)) = note.strip_prefix(MARK).and_then(|words| words.split_once(' ')) else {
            continue;
        };
        let first = names.entry(id).or_insert(name);
        if *first != name {
            findings.push(Finding {
                oracle: NAME,
                text: format!("raft id {id} was {first}'s and is {name}'s"),
            });
            *first = name;
        }
    }
    findings
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_raft_id_is_one_nodes_for_ever() {
        let told = |notes: &[&str]| {
            let history = History {
                notes: notes.iter().map(|note| (0, (*note).to_owned())).collect(),
                ..History::default()
            };
            check(&history).len()
        };
        let first = ["member hsm-node-1 1", "calm begins", "member hsm-node-4 17"];
        assert_eq!(told(&first), 0);
        // A node that comes again gets another id.
        assert_eq!(
            told(&[&first[..], &["member hsm-node-4 40", "member hsm-node-1 1"]].concat()),
            0
        );
        assert_eq!(
            told(&[&first[..], &["member hsm-node-5 17", "member hsm-node-5 17"]].concat()),
            1
        );
    }
}
