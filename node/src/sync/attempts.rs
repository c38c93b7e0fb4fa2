//! When a step is tried, and tried again: at once, then with a growing pause; and what was said of its
//! failures, so that each is said once.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::plan::Action;

/// First pause after a failure; it doubles up to the bound.
const FIRST: Duration = Duration::from_millis(100);
/// A proposal fails while there is no leader, and a rotation waits for it.
const MOST_PROPOSAL: Duration = Duration::from_secs(1);
/// A token that refuses is not helped by asking it all the time.
const MOST_TOKEN: Duration = Duration::from_secs(30);
/// The state shows a step's effect a little after the step has succeeded.
const SETTLE: Duration = Duration::from_millis(500);

struct Attempt {
    due: Instant,
    failures: u32,
    reason: String,
}

/// See the module.
#[derive(Default)]
pub(super) struct Attempts {
    known: BTreeMap<Action, Attempt>,
}

fn most(action: &Action) -> Duration {
    match action {
        Action::RegisterSlotKey
        | Action::Ack(_)
        | Action::AckDestroyed(_)
        | Action::AckTransport(_)
        | Action::AckTransportGone(_) => MOST_PROPOSAL,
        _ => MOST_TOKEN,
    }
}

impl Attempts {
    /// Which of the wanted steps are to be taken now, at most `limit`, in the order given. What is not
    /// wanted any more is forgotten. `delay` says how long a new step waits first.
    pub(super) fn due(
        &mut self,
        wanted: &[Action],
        now: Instant,
        limit: usize,
        delay: impl Fn(&Action) -> Duration,
    ) -> Vec<Action> {
        let mut before = std::mem::take(&mut self.known);
        for action in wanted {
            let attempt = before.remove(action).unwrap_or_else(|| Attempt {
                due: now + delay(action),
                failures: 0,
                reason: String::new(),
            });
            self.known.insert(action.clone(), attempt);
        }
        let is_due = |action: &&Action| self.known.get(*action).is_some_and(|attempt| attempt.due <= now);
        wanted.iter().filter(is_due).take(limit).cloned().collect()
    }

    /// The step failed. True if it had not failed for this reason before.
    pub(super) fn failed(&mut self, action: &Action, now: Instant, reason: &str) -> bool {
        let Some(attempt) = self.known.get_mut(action) else {
            return true;
        };
        let pause = FIRST.saturating_mul(2_u32.saturating_pow(attempt.failures.min(16)));
        attempt.due = now + pause.min(most(action));
        attempt.failures += 1;
        let new = attempt.reason != reason;
        attempt.reason = reason.to_owned();
        new
    }

    /// The step succeeded. True if it had failed before.
    pub(super) fn succeeded(&mut self, action: &Action, now: Instant) -> bool {
        let Some(attempt) = self.known.get_mut(action) else {
            return false;
        };
        let failed = attempt.failures > 0;
        *attempt = Attempt {
            due: now + SETTLE,
            failures: 0,
            reason: String::new(),
        };
        failed
    }

    /// How often the step has failed in a row.
    pub(super) fn failures(&self, action: &Action) -> u32 {
        self.known.get(action).map_or(0, |attempt| attempt.failures)
    }

    /// What the step has failed with, if it did when it was last tried.
    pub(super) fn reason(&self, action: &Action) -> Option<&str> {
        let attempt = self.known.get(action)?;
        (attempt.failures > 0).then_some(attempt.reason.as_str())
    }

    /// When the next step is due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.known.values().map(|attempt| attempt.due).min()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use raft_store::names::{KeyUid, TransportId};

    use super::*;

    const NONE: fn(&Action) -> Duration = |_| Duration::ZERO;

    #[test]
    fn a_failed_step_waits_longer_each_time_up_to_its_bound() {
        let step = [Action::Load(KeyUid([1; 16]), true)];
        let mut attempts = Attempts::default();
        let start = Instant::now();
        let mut now = start;
        let mut pauses = Vec::new();
        for _ in 0..12 {
            assert_eq!(attempts.due(&step, now, 9, NONE), step);
            attempts.failed(&step[0], now, "x");
            assert!(attempts.due(&step, now, 9, NONE).is_empty());
            let next = attempts.next_due().unwrap();
            pauses.push(next - now);
            now = next;
        }
        assert_eq!(pauses[0], FIRST);
        assert_eq!(pauses[1], FIRST * 2);
        assert_eq!(pauses[11], MOST_TOKEN);
        let ack = [Action::Ack(Vec::new())];
        let mut attempts = Attempts::default();
        for _ in 0..20 {
            attempts.due(&ack, now, 9, NONE);
            attempts.failed(&ack[0], now, "x");
            assert!(attempts.next_due().unwrap() <= now + MOST_PROPOSAL);
            now = attempts.next_due().unwrap();
        }
    }

    #[test]
    fn a_reason_is_new_once() {
        let step = [Action::CreateTransport];
        let mut attempts = Attempts::default();
        let now = Instant::now();
        attempts.due(&step, now, 9, NONE);
        assert_eq!(attempts.reason(&step[0]), None);
        assert!(attempts.failed(&step[0], now, "a"));
        assert!(!attempts.failed(&step[0], now, "a"));
        assert!(attempts.failed(&step[0], now, "b"));
        assert_eq!(
            (attempts.failures(&step[0]), attempts.reason(&step[0])),
            (3, Some("b"))
        );
        assert!(attempts.succeeded(&step[0], now));
        assert_eq!(
            (attempts.failures(&step[0]), attempts.reason(&step[0])),
            (0, None)
        );
        assert!(!attempts.succeeded(&step[0], now));
    }

    #[test]
    fn a_step_that_is_not_wanted_any_more_starts_afresh_when_it_is() {
        let step = [Action::CreateTransport];
        let mut attempts = Attempts::default();
        let now = Instant::now();
        attempts.due(&step, now, 9, NONE);
        attempts.failed(&step[0], now, "a");
        attempts.due(&[], now, 9, NONE);
        assert_eq!(attempts.next_due(), None);
        assert_eq!(attempts.due(&step, now, 9, NONE), step);
    }

    #[test]
    fn a_new_step_waits_its_delay_and_a_batch_is_bounded_in_order() {
        let grant = Action::Grant(TransportId([1; 16]), 4);
        let steps = [Action::CreateTransport, grant.clone(), Action::RegisterSlotKey];
        let mut attempts = Attempts::default();
        let now = Instant::now();
        let wait = Duration::from_secs(2);
        let delay = |action: &Action| if *action == grant { wait } else { Duration::ZERO };
        assert_eq!(
            attempts.due(&steps, now, 9, delay),
            [steps[0].clone(), steps[2].clone()]
        );
        assert_eq!(
            attempts.due(&steps, now + wait, 1, delay),
            [Action::CreateTransport]
        );
        assert_eq!(attempts.due(&steps, now + wait, 9, delay), steps);
    }

    #[test]
    fn what_succeeded_settles_before_it_is_done_again() {
        let step = [Action::RegisterSlotKey];
        let mut attempts = Attempts::default();
        let now = Instant::now();
        attempts.due(&step, now, 9, NONE);
        attempts.succeeded(&step[0], now);
        assert!(attempts.due(&step, now, 9, NONE).is_empty());
        assert_eq!(attempts.due(&step, now + SETTLE, 9, NONE), step);
    }
}
