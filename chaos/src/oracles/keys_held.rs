//! No node is ready that lacks a key which another ready node has: that one has just encrypted under it. Nor does a version
//! become active before everybody who serves holds it.

use super::Found;
use super::excused::Excused;
use crate::history::History;

pub(super) const NAME: &str = "keys_held";

/// A node whose token somebody takes away, and one that is removed, leave readiness, as they should, and are waited for by nobody.
pub(super) fn judge(history: &History, nodes_leave: &Excused, found: &mut Found) {
    let watched = &history.watched;
    found.checked(NAME, watched.probed);
    found.violations(NAME, &watched.lacking);
    found.unexplained(NAME, &watched.lost, nodes_leave);
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::testing::{Script, fired, told};
    use super::*;
    use crate::history::{Moment, Moments};
    use crate::schedule::FaultKind;

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
            history.watched.lost.push(Moment {
                at: second * 1_000_000_000,
                node,
                text: format!("{second} {node}"),
            });
        }
        // The same run, another node or another time: that is no excuse.
        let said = told(|found| judge(&history, &excused, found));
        assert_eq!(said, ["15 1", "50 2"]);
        history.watched.lost = Moments::default();
        history.watched.lacking.push("lacking".to_owned());
        assert_eq!(told(|found| judge(&history, &excused, found)), ["lacking"]);
    }
}
