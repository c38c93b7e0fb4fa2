//! Between a request and a slot's threads: whether the slot may be asked, waiting for its answer
//! within a bound, and what its failures mean to a caller.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hsm_api::ErrorCode;
use hsm_core::error::CallError;
use hsm_core::return_codes::{Verdict, classify, may_be_the_token};
use hsm_core::{HsmError, OpError, Output, SHARED_BY, SlotState, Work, batch_time};
use tokio::sync::oneshot;

use super::asking::{Asking, Onward, Step, Task};
use super::opening::above_known;
use super::problem::ApiError;
use super::reply::Success;
use super::shares::Share;
use crate::keyring::KeySlot;
use crate::metrics;
use crate::policy::Op;

/// The time that one request has for all that it asks of tokens: a rewrap from one slot to another waits no longer than
/// any other request.
pub(super) struct Patience {
    began: Instant,
    whole: Duration,
    /// What one call may take.
    call: Duration,
}

impl Patience {
    /// It begins now. `one` is the time of a request without a batch.
    pub(super) fn new(one: Duration, items: usize) -> Self {
        Self {
            began: Instant::now(),
            whole: batch_time(one, items),
            call: one / SHARED_BY,
        }
    }

    pub(super) fn left(&self) -> Duration {
        self.whole.saturating_sub(self.began.elapsed())
    }

    /// When nobody waits any more: the same for every slot that is asked.
    pub(super) fn until(&self) -> Instant {
        self.began + self.whole
    }

    /// Whether another slot is still to be asked for so many items: what it begins would otherwise be done for nobody,
    /// and cost invocations.
    pub(super) fn is_enough(&self, items: usize) -> Result<(), ApiError> {
        let left = self.left();
        if left >= batch_time(self.call, items) {
            return Ok(());
        }
        Err(ApiError::new(ErrorCode::TokenTimeout).operator(format!(
            "the first slot left {} ms of {} for the second, which was not asked",
            left.as_millis(),
            self.whole.as_millis()
        )))
    }
}

/// Does what a request of its own has come to.
pub(super) async fn run(
    asking: &Asking<'_>,
    op: Op,
    step: Step,
    part: &Arc<Share>,
) -> Result<Success, ApiError> {
    let task = match step {
        Step::Run(task) => task,
        Step::Ask {
            context,
            version,
            ending,
        } => {
            let answer = asking.look_up(context.as_str(), version).await;
            return ending.close(asking, op, Err(above_known(answer, version)));
        }
    };
    let Task {
        slot,
        work,
        onward,
        ending,
    } = task;
    let patience = Patience::new(asking.state.token_timeout(), 1);
    let outcome = match onward {
        None => ask(&patience, op, &slot, work, part).await,
        Some(onward) => ask_both(&patience, op, (&slot, work), onward, part).await,
    };
    let outcome = outcome.unwrap_or_else(|not_taken| {
        ending.not_encrypted();
        Err(not_taken)
    });
    ending.close(asking, op, outcome)
}

/// What a slot answers within a bound; the outer error says that nothing was encrypted: it did not take the job, or had no
/// time to begin it.
type Answer = Result<Result<Output, ApiError>, ApiError>;

/// Asks a slot.
async fn ask(patience: &Patience, op: Op, slot: &KeySlot, work: Work, part: &Arc<Share>) -> Answer {
    let (done, answer) = oneshot::channel();
    let (held, began) = (Arc::clone(part), Instant::now());
    let submitted = slot.ops.run(
        work,
        patience.until(),
        Box::new(move |outcome| {
            let _ = done.send(Ok(outcome));
            // A job whose caller has gone is in memory until here.
            drop(held);
        }),
    );
    submitted.map_err(slot_error)?;
    let outcome = answered(answer, patience.left()).await;
    metrics::slot_job(Arc::clone(&slot.name), op.as_str(), began.elapsed());
    match outcome {
        Ok(Err(error @ OpError::NotBegun)) => Err(slot_error(error)),
        Ok(outcome) => Ok(outcome.map_err(slot_error)),
        Err(error) => Ok(Err(error)),
    }
}

/// Asks the slot of the old key, and with what it gives the slot of the new one. The plaintext is no longer than the
/// ciphertext, which the request has paid for.
async fn ask_both(
    patience: &Patience,
    op: Op,
    (slot, work): (&KeySlot, Work),
    onward: Onward,
    part: &Arc<Share>,
) -> Answer {
    let opened = ask(patience, op, slot, work, part).await?;
    let (slot, work) = onward.with(opened?)?;
    patience.is_enough(1)?;
    ask(patience, op, &slot, work, part).await
}

/// Refuses early, with the slot's own reason.
pub(super) fn usable(slot: &KeySlot) -> Result<(), ApiError> {
    match slot.ops.state() {
        SlotState::Ready => Ok(()),
        state => Err(slot_error(OpError::SlotNotReady(state))),
    }
}

/// Waits for a job's answer.
pub(super) async fn answered<T>(
    answer: oneshot::Receiver<Result<T, OpError>>,
    patience: Duration,
) -> Result<T, ApiError> {
    match tokio::time::timeout(patience, answer).await {
        Ok(Ok(outcome)) => outcome.map_err(slot_error),
        Ok(Err(_)) => {
            Err(ApiError::new(ErrorCode::SlotFailed)
                .operator("the slot's thread went away without an answer"))
        }
        Err(_) => Err(ApiError::new(ErrorCode::TokenTimeout)
            .operator(format!("no answer within {} ms", patience.as_millis()))),
    }
}

/// What a slot's failure is to a caller.
pub(super) fn slot_error(error: OpError) -> ApiError {
    match error {
        OpError::QueueFull => ApiError::new(ErrorCode::Overloaded).operator("the slot's queue is full"),
        OpError::SlotNotReady(SlotState::Locked) => ApiError::new(ErrorCode::SlotLocked),
        OpError::SlotNotReady(state) => ApiError::new(ErrorCode::SlotFailed).operator(state.to_string()),
        // The ring said it was here; it has been unloaded since, or is being loaded.
        OpError::KeyNotLoaded => ApiError::new(ErrorCode::KeyVersionNotReady),
        OpError::AuthenticationFailed => ApiError::new(ErrorCode::AuthenticationFailed),
        OpError::TooShort => ApiError::new(ErrorCode::CiphertextTooShort),
        OpError::Deadline => ApiError::new(ErrorCode::TokenTimeout),
        error @ OpError::NotBegun => ApiError::new(ErrorCode::TokenTimeout).operator(error.to_string()),
        OpError::Token(HsmError::Call(error)) if may_pass(&error) => {
            ApiError::new(ErrorCode::TokenBusy).operator(error.to_string())
        }
        OpError::Token(error) => ApiError::internal(error.to_string()),
    }
}

/// Whether a token's code, met twice, is one that the table has for passing troubles: no memory, no session, an
/// operation that was in the way. Neither the request is wrong nor, by its own test, the slot.
fn may_pass(error: &CallError) -> bool {
    matches!(
        classify(error),
        Verdict::Retry | Verdict::RetireSession | Verdict::FindHandleAgain
    ) || may_be_the_token(error)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use hsm_core::return_codes::Ckr;

    use super::*;

    #[tokio::test]
    async fn every_way_of_not_answering_has_its_code() {
        let brief = Duration::from_millis(20);
        let (sender, answer) = oneshot::channel::<Result<(), OpError>>();
        drop(sender);
        assert_eq!(
            answered(answer, brief).await.unwrap_err().code(),
            ErrorCode::SlotFailed
        );
        let (_sender, answer) = oneshot::channel::<Result<(), OpError>>();
        assert_eq!(
            answered(answer, brief).await.unwrap_err().code(),
            ErrorCode::TokenTimeout
        );
        for (error, code) in [
            (OpError::QueueFull, ErrorCode::Overloaded),
            (OpError::SlotNotReady(SlotState::Locked), ErrorCode::SlotLocked),
            (OpError::SlotNotReady(SlotState::Absent), ErrorCode::SlotFailed),
            (OpError::KeyNotLoaded, ErrorCode::KeyVersionNotReady),
            (OpError::AuthenticationFailed, ErrorCode::AuthenticationFailed),
            (OpError::TooShort, ErrorCode::CiphertextTooShort),
            (OpError::Deadline, ErrorCode::TokenTimeout),
            (OpError::NotBegun, ErrorCode::TokenTimeout),
        ] {
            assert_eq!(slot_error(error).code(), code);
        }
    }

    #[test]
    fn what_passes_by_itself_is_no_fault_of_the_service() {
        let call = |code| {
            let error = CallError {
                call: "C_Encrypt",
                code: Ckr(code),
            };
            slot_error(OpError::Token(HsmError::Call(error))).code()
        };
        // PKCS#11 2.40: DEVICE_MEMORY, SESSION_COUNT, OPERATION_ACTIVE; KEY_FUNCTION_NOT_PERMITTED stays.
        for code in [0x31, 0xb1, 0x90] {
            assert_eq!(call(code), ErrorCode::TokenBusy, "{code:#x}");
        }
        assert_eq!(call(0x68), ErrorCode::Internal);
        // The same code of C_Decrypt, when it is not the ciphertext's fault.
        let error = CallError {
            call: "C_Decrypt",
            code: Ckr(5),
        };
        let refused = slot_error(OpError::Token(HsmError::Call(error)));
        assert_eq!(refused.code(), ErrorCode::TokenBusy);
    }
}
