//! No node is ready that lacks a key which another ready node has: that one has just encrypted under it. Nor does a version
//! become active before everybody who serves holds it.

use super::Found;
use super::excused::Excused;
use crate::history::History;

pub(super) const NAME: &str = "keys_held";
/// Before the number of a node and a time.
const MARK: &str = "removed out of reach: node ";

/// What is noted once a node has ended that led and was cut off or stood still while it was removed, which began at this time.
pub(crate) fn out_of_reach(node: u32, since_ms: u64) -> String {
    format!("{MARK}{node} since {since_ms} ms")
}

fn marked(note: &str) -> Option<(u32, u64)> {
    let (node, since) = note.strip_prefix(MARK)?.split_once(" since ")?;
    Some((node.parse().ok()?, since.strip_suffix(" ms")?.parse().ok()?))
}

/// Nobody could tell it that it was removed, and the others wait for it no more: until it has heard nothing for long enough it
/// is ready without what they have made. Nothing else excuses that.
fn removed_out_of_reach(history: &History) -> Excused {
    let notes = history.notes.iter();
    Excused::of(notes.filter_map(|(at, note)| {
        let (node, since_ms) = marked(note)?;
        Some((node, since_ms, at / 1_000_000))
    }))
}

/// A node whose token somebody takes away, and one that is removed, leave readiness, as they should, and are waited for by nobody.
pub(super) fn judge(history: &History, nodes_leave: &Excused, found: &mut Found) {
    let watched = &history.watched;
    found.checked(NAME, watched.probed);
    found.unexplained(NAME, &watched.lacking, &removed_out_of_reach(history));
    found.unexplained(NAME, &watched.lost, nodes_leave);
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::testing::{Script, fired, told};
    use super::*;
    use crate::history::{Moment, Moments};
    use crate::schedule::FaultKind;

    fn moment(second: u64, node: u32) -> Moment {
        Moment {
            at: second * 1_000_000_000,
            node,
            text: format!("{second} {node}"),
        }
    }

    #[test]
    fn a_missing_key_is_told_and_one_that_a_fault_took_is_not() {
        let faults = [fired(
            FaultKind::TokenDeleted,
            10_000,
            20_000,
            "node 2, running: true",
        )];
        let excused = Excused::by(&faults, |_| true);
        let mut history = Script::default().history();
        assert!(told(|found| judge(&history, &excused, found)).is_empty());
        for (second, node) in [(15, 2), (15, 1), (50, 2)] {
            history.watched.lost.push(moment(second, node));
        }
        // The same run, another node or another time: that is no excuse.
        let said = told(|found| judge(&history, &excused, found));
        assert_eq!(said, ["15 1", "50 2"]);
        history.watched.lost = Moments::default();
        // What explains a loss does not explain that a node is ready all the same.
        history.watched.lacking.push(moment(15, 2));
        assert_eq!(told(|found| judge(&history, &excused, found)), ["15 2"]);
    }

    #[test]
    fn a_node_that_could_not_be_told_of_its_removal_may_lack_a_key_until_it_has_ended() {
        assert_eq!(marked(&out_of_reach(3, 12_345)), Some((3, 12_345)));
        assert_eq!(marked("faults end"), None);
        let leaves = [fired(
            FaultKind::JoinRemove,
            10_000,
            60_000,
            "hsm-node-4 joined, hsm-node-2 was removed",
        )];
        let excused = Excused::by(&leaves, |_| true);
        let mut history = Script::default().history();
        for (second, node) in [(29, 2), (31, 2), (31, 4), (51, 2)] {
            history.watched.lacking.push(moment(second, node));
        }
        // That it is removed is no excuse.
        let said = told(|found| judge(&history, &excused, found));
        assert_eq!(said, ["29 2", "31 2", "31 4", "51 2"]);
        history.notes.push((40_000_000_000, out_of_reach(2, 30_000)));
        let said = told(|found| judge(&history, &excused, found));
        assert_eq!(said, ["29 2", "31 4", "51 2"]);
    }
}
