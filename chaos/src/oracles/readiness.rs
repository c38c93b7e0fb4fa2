//! The start gate: a node that was started is ready only once it has applied what was committed before. Besides, what a fault has
//! seen the cluster fail to do: a node that comes back, refuses with the remedy, joins or leaves.

use super::Found;
use crate::history::History;
use crate::schedule::Fired;

pub(super) const NAME: &str = "readiness";

pub(super) fn judge(history: &History, fired: &[Fired], found: &mut Found) {
    let watched = &history.watched;
    found.checked(NAME, watched.restarted);
    found.violations(NAME, &watched.early);
    for one in fired {
        if let Some(what) = one.effect.failure() {
            let text = format!("step {}, {} of {}: {what}", one.step, one.kind, one.target);
            found.violation(NAME, text);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::testing::{Script, fired, told};
    use super::*;
    use crate::schedule::{Effect, FaultKind};

    #[test]
    fn who_is_ready_too_early_is_told() {
        let mut history = Script::default().history();
        assert!(told(|found| judge(&history, &[], found)).is_empty());
        history.watched.early.push("early".to_owned());
        assert_eq!(told(|found| judge(&history, &[], found)), ["early"]);
    }

    #[test]
    fn what_the_cluster_did_not_do_about_a_fault_is_told() {
        let history = Script::default().history();
        let mut fault = fired(FaultKind::JoinRemove, 1, 2, "hsm-node-4");
        fault.effect = Effect::NotCounted("nobody led".to_owned());
        assert!(told(|found| judge(&history, std::slice::from_ref(&fault), found)).is_empty());
        fault.effect = Effect::Failed("it does not join".to_owned());
        let said = told(|found| judge(&history, std::slice::from_ref(&fault), found));
        assert_eq!(said, ["step 1, join-remove of hsm-node-4: it does not join"]);
    }
}
