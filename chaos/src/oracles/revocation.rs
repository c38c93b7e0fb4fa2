//! A revoked certificate is refused: at once by whoever says that its state has the revocation, and within a bound by
//! everybody else. A node that is reached hears of it within a second, and has two more here, for a busy machine; one that is cut
//! off cannot, and its bound is how long it may call itself ready (`staleness.ready_ms`), or, marked as stale, encrypt
//! (`staleness.encrypt_ms`). Who is reached goes by what was broken when, and whom it hit: see [`out_of_reach`].

use std::time::Duration;

use super::Found;
use super::excused::Excused;
use crate::ending::{CALM_BEGINS, DISTURBED, FAULTS_BEGIN};
use crate::history::{History, LateAsk};
use crate::schedule::{FaultKind, Fired};

pub(super) const NAME: &str = "revocation";
/// `staleness.ready_ms`.
const READY: Duration = Duration::from_secs(5);
/// `staleness.encrypt_ms`.
const ENCRYPT: Duration = Duration::from_secs(60);
/// In a run of this length somebody is revoked and asks, again and again.
const LONG: Duration = Duration::from_secs(60);
/// From a leader's end until everybody has heard of the next one.
const ELECTION_MS: u64 = 5_000;
/// For a node whose disk is slow on purpose, and whose machine stands still now and then.
const SLACK: Duration = Duration::from_secs(10);

pub(super) fn judge(history: &History, fired: &[Fired], found: &mut Found) {
    found.checked(NAME, history.asked + history.turned_away);
    found.unexplained(NAME, &history.lingering, &out_of_reach(history, fired));
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

/// When which nodes may have heard of nothing: the one that is broken, until it has recovered; everybody while links, disks or
/// members are not as they should be, and around any change of the leader, since nobody says what is committed then. Once the last calm
/// has begun every node was seen ready, and only an election may keep it from hearing of something.
fn out_of_reach(history: &History, fired: &[Fired]) -> Excused {
    let mut unreached = Excused::by(fired, |_| true);
    for one in fired {
        if keeps_all_waiting(one.kind) {
            unreached.everybody(one.at_ms, one.healed_ms.saturating_add(2 * ELECTION_MS));
        }
        for at in [one.at_ms, one.healed_ms] {
            unreached.everybody(at, at.saturating_add(ELECTION_MS));
        }
    }
    let mut notes = history.notes.iter();
    if let Some((at, _)) = notes.find(|(_, what)| what == CALM_BEGINS)
        && fired.iter().all(Fired::was_undone)
    {
        unreached.until(at / 1_000_000);
    }
    // The machine stood still in this calm.
    let mut calm_from = 0;
    for (at, what) in &history.notes {
        match what.as_str() {
            CALM_BEGINS => calm_from = at / 1_000_000,
            DISTURBED => unreached.everybody(calm_from, at / 1_000_000),
            _ => {}
        }
    }
    let mut highest = 0;
    for seen in &history.terms {
        if seen.term > highest {
            highest = seen.term;
            let at = seen.at / 1_000_000;
            unreached.everybody(at.saturating_sub(ELECTION_MS), at.saturating_add(ELECTION_MS));
        }
    }
    unreached
}

/// Whether it may keep any node from hearing of what is committed, as long as it lasts.
fn keeps_all_waiting(kind: FaultKind) -> bool {
    kind.is_of_network()
        || matches!(
            kind,
            FaultKind::SlowFsync
                | FaultKind::FailingFsync
                | FaultKind::LostWrites
                | FaultKind::KillAll
                | FaultKind::JoinRemove
                | FaultKind::Failpoint
        )
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
    use super::super::testing::{Script, fired, told, undecided};
    use super::*;
    use crate::history::{Moment, TermSeen};

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
            let said = told(|found| judge(&history, &[], found));
            assert_eq!(said.len(), violations, "{late:?}: {said:?}");
        }
    }

    /// Node 3 lets somebody in for too long, in this second.
    fn lingering(second: u64) -> History {
        let mut history = Script::default().history();
        let text = "let in".to_owned();
        history.lingering.push(Moment {
            at: second * 1_000_000_000,
            node: 3,
            text,
        });
        history
    }

    #[test]
    fn who_is_reached_has_a_second_and_who_is_broken_has_longer() {
        for (kind, target, second, excused) in [
            (FaultKind::TokenDeleted, "node 3", 9, false),
            (FaultKind::TokenDeleted, "node 3", 25, true),
            (FaultKind::TokenDeleted, "node 3", 49, true),
            (FaultKind::TokenDeleted, "node 3", 51, false),
            // Another node: everybody may wait for a new leader, and for no longer.
            (FaultKind::KillFollower, "node 1", 14, true),
            (FaultKind::KillFollower, "node 1", 16, false),
            (FaultKind::KillFollower, "node 1", 44, true),
            (FaultKind::KillFollower, "node 1", 46, false),
            (FaultKind::OneWay, "from node 1 to node 2", 30, true),
            (FaultKind::SlowFsync, "everybody", 49, true),
            (FaultKind::SlowFsync, "everybody", 51, false),
        ] {
            let fired = [fired(kind, 10_000, 40_000, target)];
            let said = told(|found| judge(&lingering(second), &fired, found));
            assert_eq!(said.is_empty(), excused, "{kind} {target} {second}: {said:?}");
        }
    }

    #[test]
    fn around_an_election_nobody_is_reached_and_in_the_calm_all_are() {
        let one = [fired(FaultKind::SlowFsync, 10_000, 40_000, "everybody")];
        for (second, elected, excused) in [
            (42, None, true),
            // It had begun by then.
            (44, None, false),
            (44, Some(46), true),
            (52, Some(46), false),
        ] {
            let mut history = lingering(second);
            history.notes = vec![(43_000_000_000, CALM_BEGINS.to_owned())];
            history.terms.extend(elected.map(|second| TermSeen {
                at: second * 1_000_000_000,
                node: 1,
                pid: None,
                term: 7,
                leads: true,
            }));
            let said = told(|found| judge(&history, &one, found));
            assert_eq!(said.is_empty(), excused, "{second} {elected:?}: {said:?}");
        }
        let mut history = lingering(50);
        history.notes = vec![
            (43_000_000_000, CALM_BEGINS.to_owned()),
            (53_000_000_000, DISTURBED.to_owned()),
        ];
        assert!(
            told(|found| judge(&history, &one, found)).is_empty(),
            "it stood still"
        );
        // What was never undone is an excuse for ever.
        let open = [fired(FaultKind::SlowFsync, 10_000, u64::MAX, "everybody")];
        let mut history = lingering(50);
        history.notes = vec![(43_000_000_000, CALM_BEGINS.to_owned())];
        assert!(told(|found| judge(&history, &open, found)).is_empty());
    }

    #[test]
    fn a_long_run_in_which_nobody_was_turned_away_shows_nothing() {
        for (seconds, turned_away, shows_nothing) in [(59, 0, 0), (60, 0, 1), (3600, 1, 0)] {
            let mut history = Script::default().history();
            history.notes = vec![(0, FAULTS_BEGIN.to_owned())];
            (history.ended, history.turned_away) = (seconds * 1_000_000_000, turned_away);
            let said = undecided(|found| judge(&history, &[], found));
            assert_eq!(said.len(), shows_nothing, "{seconds} {turned_away}");
        }
    }

    #[test]
    fn nobody_else_is_turned_away() {
        let mut history = Script::default().history();
        history.turned_away_early.push("bystander".to_owned());
        assert_eq!(told(|found| judge(&history, &[], found)), ["bystander"]);
    }
}
