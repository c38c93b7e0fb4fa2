//! No node is ready that lacks a key which another ready node has: that one has just encrypted under it. Nor does a version
//! become active before everybody who serves holds it.

use super::Found;
use crate::history::History;

const NAME: &str = "keys_held";

/// A node whose token somebody takes away, and one that is removed, leave readiness, as they should, and are waited for by nobody.
pub(super) fn judge(history: &History, nodes_leave: bool, found: &mut Found) {
    let watched = &history.watched;
    found.checked(NAME, watched.probed);
    found.violations(NAME, &watched.lacking);
    if !nodes_leave {
        found.violations(NAME, &watched.lost);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::testing::{Script, told};
    use super::*;

    #[test]
    fn a_missing_key_is_told_and_one_that_a_fault_took_is_not() {
        let mut history = Script::default().history();
        assert!(told(|found| judge(&history, false, found)).is_empty());
        history.watched.lost.push("lost".to_owned());
        assert_eq!(told(|found| judge(&history, false, found)), ["lost"]);
        history.watched.lacking.push("lacking".to_owned());
        assert_eq!(told(|found| judge(&history, true, found)), ["lacking"]);
    }
}
