//! The start gate: a node that was started is ready only once it has applied what was committed before.

use super::Found;
use crate::history::History;

const NAME: &str = "readiness";

pub(super) fn judge(history: &History, found: &mut Found) {
    let watched = &history.watched;
    found.checked(NAME, watched.restarted);
    found.violations(NAME, &watched.early);
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::testing::{Script, told};
    use super::*;

    #[test]
    fn who_is_ready_too_early_is_told() {
        let mut history = Script::default().history();
        assert!(told(|found| judge(&history, found)).is_empty());
        history.watched.early.push("early".to_owned());
        assert_eq!(told(|found| judge(&history, found)), ["early"]);
    }
}
