//! When a failed call is worth repeating, where and after how long. Pure: the clock and the
//! sleeping are the caller's.

use std::time::Duration;

use super::error::ClientError;
use crate::code::ErrorCode;

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A node may not put a client to sleep for longer.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(30);

/// Whether failed calls are repeated. What is repeated is safe to repeat: reads and encryption
/// have no effect, mutations carry the same `Idempotency-Key` in every attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// One attempt at one endpoint, always the same; not even a request that a closing
    /// connection had not taken is sent again. For tests that count failures.
    None,
    /// Repeated, and sent to other endpoints, until this long after the call began.
    Until(Duration),
}

impl Default for Retry {
    fn default() -> Self {
        Self::Until(Duration::from_secs(15))
    }
}

/// What one failure says about the next attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// No node will answer otherwise.
    Final,
    /// Another node may answer otherwise, this one will not.
    Elsewhere,
    /// Worth another attempt anywhere, after a pause if the node asked for one.
    Again(Option<Duration>),
    /// This node asks this client to slow down: another node is no way out.
    SlowDown(Duration),
}

fn verdict(error: &ClientError) -> Verdict {
    let api = match error {
        ClientError::Api(api) => api,
        ClientError::Connect { .. } | ClientError::Transport { .. } | ClientError::Timeout { .. } => {
            return Verdict::Again(None);
        }
        // A refused certificate is refused again; another node may have the right one.
        ClientError::Tls { .. } => return Verdict::Elsewhere,
        // The last is what a whole call ends with, never one attempt.
        ClientError::Decode { .. }
        | ClientError::Request(_)
        | ClientError::RefusedAfterSilence { .. }
        | ClientError::NoneAnswered { .. } => return Verdict::Final,
    };
    let after = api.retry_after.map(|after| after.min(LONGEST_RETRY_AFTER));
    match api.code {
        Some(ErrorCode::RateLimited) => Verdict::SlowDown(after.unwrap_or(LONGEST_PAUSE)),
        Some(
            ErrorCode::KeyNotOnThisNode
            | ErrorCode::SlotLocked
            | ErrorCode::SlotFailed
            | ErrorCode::Uninitialised
            // One that is further on may be asked; no node is waited for.
            | ErrorCode::MinIndexTooFar,
        ) => Verdict::Elsewhere,
        _ if api.retryable => Verdict::Again(after),
        _ => Verdict::Final,
    }
}

/// What to do after a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Give the failure to the caller.
    GiveUp,
    /// Ask the same endpoint after this pause.
    Same(Duration),
    /// Ask the next endpoint after this pause, which is zero within a round.
    Next(Duration),
}

/// The course of one call: rounds over all endpoints, pauses between rounds.
pub(super) struct Plan {
    endpoints: usize,
    tried: usize,
    pause: Duration,
    asked: Option<Duration>,
    worth_a_round: bool,
}

impl Plan {
    pub(super) fn new(endpoints: usize) -> Self {
        Self {
            endpoints,
            tried: 0,
            pause: FIRST_PAUSE,
            asked: None,
            worth_a_round: false,
        }
    }

    pub(super) fn after(&mut self, error: &ClientError) -> Step {
        match verdict(error) {
            Verdict::Final => return Step::GiveUp,
            Verdict::SlowDown(after) => return Step::Same(after),
            Verdict::Elsewhere => {}
            Verdict::Again(after) => {
                self.worth_a_round = true;
                // The soonest any of them asks for.
                self.asked = match (self.asked, after) {
                    (Some(one), Some(other)) => Some(one.min(other)),
                    (one, other) => one.or(other),
                };
            }
        }
        self.tried += 1;
        if self.tried < self.endpoints {
            return Step::Next(Duration::ZERO);
        }
        if !self.worth_a_round {
            return Step::GiveUp;
        }
        let pause = self.pause.max(self.asked.unwrap_or_default());
        self.tried = 0;
        self.asked = None;
        self.worth_a_round = false;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        Step::Next(pause)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::error::ApiError;
    use super::*;

    fn api(code: ErrorCode) -> ClientError {
        ClientError::Api(Box::new(ApiError {
            status: code.status(),
            code: Some(code),
            code_text: code.as_str().to_owned(),
            detail: String::new(),
            request_id: None,
            retryable: code.retryable(),
            retry_after: code
                .retry_after()
                .map(|seconds| Duration::from_secs(seconds.into())),
            node: None,
            endpoint: String::new(),
        }))
    }

    fn refused() -> ClientError {
        ClientError::Connect {
            endpoint: String::new(),
            reason: String::new(),
        }
    }

    const NOW: Step = Step::Next(Duration::ZERO);

    #[test]
    fn the_callers_own_fault_is_final() {
        for &code in ErrorCode::ALL {
            let elsewhere = code.status() == 412;
            if (code.status() < 429 && !elsewhere) || code.status() == 500 {
                assert_eq!(Plan::new(3).after(&api(code)), Step::GiveUp, "{code}");
            }
        }
        let decode = ClientError::Decode {
            endpoint: String::new(),
            status: 200,
            reason: String::new(),
        };
        assert_eq!(Plan::new(3).after(&decode), Step::GiveUp);
    }

    #[test]
    fn a_dead_node_is_left_at_once_and_pauses_grow_between_rounds() {
        let mut plan = Plan::new(2);
        for pause in [50, 100, 200, 400, 800, 1000, 1000] {
            assert_eq!(plan.after(&refused()), NOW);
            assert_eq!(plan.after(&refused()), Step::Next(Duration::from_millis(pause)));
        }
    }

    #[test]
    fn a_nodes_retry_after_is_kept() {
        let mut plan = Plan::new(2);
        assert_eq!(plan.after(&refused()), NOW);
        assert_eq!(
            plan.after(&api(ErrorCode::KeyVersionNotReady)),
            Step::Next(Duration::from_secs(1))
        );
        assert_eq!(
            plan.after(&refused()),
            NOW,
            "what was asked for in one round does not bind the next"
        );
        assert_eq!(plan.after(&refused()), Step::Next(Duration::from_millis(100)));
    }

    #[test]
    fn a_state_that_is_not_there_yet_may_be_on_another_node_and_one_of_another_epoch_is_nowhere() {
        let mut plan = Plan::new(2);
        assert_eq!(plan.after(&api(ErrorCode::MinIndexNotReached)), NOW);
        assert_eq!(
            plan.after(&api(ErrorCode::MinIndexNotReached)),
            Step::Next(Duration::from_secs(1))
        );
        let mut plan = Plan::new(2);
        assert_eq!(plan.after(&api(ErrorCode::MinIndexTooFar)), NOW);
        assert_eq!(plan.after(&api(ErrorCode::MinIndexTooFar)), Step::GiveUp);
        assert_eq!(
            Plan::new(2).after(&api(ErrorCode::IndexEpochChanged)),
            Step::GiveUp
        );
    }

    #[test]
    fn what_only_this_node_lacks_is_asked_of_each_other_node_once() {
        let mut plan = Plan::new(3);
        assert_eq!(plan.after(&api(ErrorCode::SlotFailed)), NOW);
        assert_eq!(plan.after(&api(ErrorCode::KeyNotOnThisNode)), NOW);
        assert_eq!(plan.after(&api(ErrorCode::SlotLocked)), Step::GiveUp);
    }

    #[test]
    fn a_rate_limit_is_waited_out_where_it_was_met() {
        let mut plan = Plan::new(3);
        assert_eq!(
            plan.after(&api(ErrorCode::RateLimited)),
            Step::Same(Duration::from_secs(1))
        );
    }
}
