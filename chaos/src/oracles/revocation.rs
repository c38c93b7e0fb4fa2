//! A revoked certificate is refused: at once by whoever says that its state has the revocation, and within a bound by
//! everybody else. A node that is reached hears of it within a second; one that is cut off cannot, and its bound is how long
//! it may call itself ready (`staleness.ready_ms`), or, marked as stale, encrypt (`staleness.encrypt_ms`).

use std::time::Duration;

use super::Found;
use crate::ending::FAULTS_BEGIN;
use crate::history::{History, LateAsk};

pub(super) const NAME: &str = "revocation";
/// `staleness.ready_ms`.
const READY: Duration = Duration::from_secs(5);
/// `staleness.encrypt_ms`.
const ENCRYPT: Duration = Duration::from_secs(60);
/// In a run of this length somebody is revoked and asks, again and again.
const LONG: Duration = Duration::from_secs(60);
/// For a node whose disk is slow on purpose, and whose machine stands still now and then.
const SLACK: Duration = Duration::from_secs(10);

pub(super) fn judge(history: &History, found: &mut Found) {
    found.checked(NAME, history.asked + history.turned_away);
    found.violations(NAME, &history.turned_away_early);
    for late in history.late.values() {
        if let Some(text) = too_late(late) {
            found.violation(NAME, text);
        }
    }
    let begun = history.notes.iter().find(|(_, what)| what == FAULTS_BEGIN);
    let lasted = begun.map(|(at, _)| Duration::from_nanos(history.ended.saturating_sub(*at)));
    if lasted.is_some_and(|lasted| lasted >= LONG) && history.turned_away == 0 {
        let text = "no revoked client was ever turned away: nothing was tested";
        found.undecided(NAME, text.to_owned());
    }
}

fn too_late(late: &LateAsk) -> Option<String> {
    let after = Duration::from_nanos(late.after_ns);
    let (cn, node) = (&late.cn, late.node);
    if late.knew {
        return Some(format!(
            "node {node} encrypted for {cn} from a state that has its revocation, by what it says itself"
        ));
    }
    let staleness = if late.stale { ENCRYPT } else { READY };
    let bound = staleness + SLACK;
    (after > bound).then(|| {
        let stale = if late.stale { " as a stale node" } else { "" };
        format!("node {node} encrypted for {cn}{stale} {after:?} after its revocation was acknowledged")
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::testing::{Script, told, undecided};
    use super::*;

    fn late(seconds: u64, knew: bool, stale: bool) -> LateAsk {
        LateAsk {
            cn: "victim".to_owned(),
            node: 2,
            after_ns: seconds * 1_000_000_000,
            knew,
            stale,
        }
    }

    #[test]
    fn the_bound_goes_by_what_a_node_can_know() {
        for (late, violations) in [
            (late(0, true, false), 1),
            (late(14, false, false), 0),
            (late(16, false, false), 1),
            (late(69, false, true), 0),
            (late(71, false, true), 1),
        ] {
            let mut history = Script::default().history();
            let kind = (late.node, late.knew, late.stale);
            history.late.insert(kind, late.clone());
            let said = told(|found| judge(&history, found));
            assert_eq!(said.len(), violations, "{late:?}: {said:?}");
        }
    }

    #[test]
    fn a_long_run_in_which_nobody_was_turned_away_shows_nothing() {
        for (seconds, turned_away, shows_nothing) in [(59, 0, 0), (60, 0, 1), (3600, 1, 0)] {
            let mut history = Script::default().history();
            history.notes = vec![(0, FAULTS_BEGIN.to_owned())];
            (history.ended, history.turned_away) = (seconds * 1_000_000_000, turned_away);
            let said = undecided(|found| judge(&history, found));
            assert_eq!(said.len(), shows_nothing, "{seconds} {turned_away}");
        }
    }

    #[test]
    fn nobody_else_is_turned_away() {
        let mut history = Script::default().history();
        history.turned_away_early.push("bystander".to_owned());
        assert_eq!(told(|found| judge(&history, found)), ["bystander"]);
    }
}
