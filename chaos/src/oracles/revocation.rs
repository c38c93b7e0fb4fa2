//! A revoked certificate is refused: at once by whoever says that its state has the revocation, and within a bound by
//! everybody else. A node that is reached hears of it within a second; one that is cut off cannot, and its bound is how long
//! it may call itself ready (`staleness.ready_ms`), or, marked as stale, encrypt (`staleness.encrypt_ms`).

use std::time::Duration;

use super::Found;
use crate::history::{History, LateAsk};

const NAME: &str = "revocation";
/// `staleness.ready_ms`.
const READY: Duration = Duration::from_secs(5);
/// `staleness.encrypt_ms`.
const ENCRYPT: Duration = Duration::from_secs(60);
/// For a node whose disk is slow on purpose, and whose machine stands still now and then.
const SLACK: Duration = Duration::from_secs(10);

pub(super) fn judge(history: &History, found: &mut Found) {
    found.checked(NAME, history.asked + history.turned_away);
    found.violations(NAME, &history.turned_away_early);
    for late in &history.late.first {
        if let Some(text) = too_late(late) {
            found.violation(NAME, text);
        }
    }
    let kept = history.late.first.len() as u64;
    if history.late.total > kept {
        let text = format!(
            "{} requests of revoked clients were carried out, and only {kept} of them were looked at",
            history.late.total
        );
        found.undecided(NAME, text);
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
    use super::super::testing::{Script, told};
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
            history.late.push(late.clone());
            let said = told(|found| judge(&history, found));
            assert_eq!(said.len(), violations, "{late:?}: {said:?}");
        }
    }

    #[test]
    fn nobody_else_is_turned_away() {
        let mut history = Script::default().history();
        history.turned_away_early.push("bystander".to_owned());
        assert_eq!(told(|found| judge(&history, found)), ["bystander"]);
    }
}
