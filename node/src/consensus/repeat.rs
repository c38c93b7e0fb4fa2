//! Repeating a call that belongs to the leader until its outcome is known or its time is up. The call keeps
//! its id, so the state answers a repeat of what was done with what was done. Once the answer to an attempt
//! is lost, most errors of later ones prove nothing about it.

use std::time::Duration;

use hsm_api::ErrorCode;

use super::ProposeError;
use crate::admin::call::CallError;
use crate::clock;

/// How a call is repeated.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// The whole call.
    pub(super) within: Duration,
    /// One attempt.
    pub(super) attempt: Duration,
    /// Between attempts while a leader is looked for.
    pub(super) pause: Duration,
    /// After an answer of the leader's: it executes every repeat.
    pub(super) answered: Duration,
}

/// What the error of an attempt says about the whole call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Refused, whatever became of an attempt before.
    Refused,
    /// Not done by this attempt. An attempt before it may have been done, and may even be the reason.
    NotNow,
    /// Not done by this attempt; another leader, or the same one with its quorum, may do it.
    Elsewhere,
    /// This attempt may have been done.
    Unknown,
}

/// The verdict of a code.
///
/// A code is `Refused` only if no attempt can bring it about and, once one was done, no repeat can meet it:
/// it follows from the request, from the caller's rights, or from state that attempts only move away from
/// it (a context is never removed, and never loses its active version again). Everything else that is no
/// question of leadership is `NotNow`: passing states of a node, compare-and-set, and what the call itself
/// may have left behind.
fn verdict(code: ErrorCode) -> Verdict {
    match code {
        // The request, which every attempt repeats.
        ErrorCode::InvalidJson
        | ErrorCode::InvalidBase64Plaintext
        | ErrorCode::InvalidBase64Ciphertext
        | ErrorCode::InvalidBase64Aad
        | ErrorCode::CiphertextTooShort
        | ErrorCode::AuthenticationFailed
        | ErrorCode::UnknownKeyVersion
        | ErrorCode::KeyVersionDisabled
        | ErrorCode::KeyVersionDestroyed
        | ErrorCode::WrongContext
        | ErrorCode::KeyIdMismatch
        | ErrorCode::NotADataCiphertext
        | ErrorCode::NotADataKey
        | ErrorCode::InvalidArgument
        | ErrorCode::ForeignOrigin
        | ErrorCode::RequestHeaderMissing
        | ErrorCode::MethodNotAllowed
        | ErrorCode::BodyTooLarge
        | ErrorCode::BatchTooLarge
        | ErrorCode::UnsupportedMediaType
        // Its way, which is the same for every attempt.
        | ErrorCode::ClientCertNotTrusted
        | ErrorCode::ClientCertMissing
        | ErrorCode::ClientCertMalformed
        | ErrorCode::ClientCertRefused
        | ErrorCode::AdminThroughProxy
        // All attempts have one body: the key belongs to somebody else's request.
        | ErrorCode::IdempotencyKeyReused
        // The caller's rights. Who loses them meanwhile has no claim to know more.
        | ErrorCode::NoClientCertificate
        | ErrorCode::CertificateRevoked
        | ErrorCode::NoOrganizationalUnit
        | ErrorCode::UnknownOrganizationalUnit
        | ErrorCode::AccessDenied
        | ErrorCode::RoleRequired
        // State in which the call was never done.
        | ErrorCode::NotFound
        | ErrorCode::ContextHasNoKey => Verdict::Refused,
        // What an attempt changed can be in the way of its repeat: a chosen number that is used up by a
        // version that was abandoned, an answer that has left the window.
        ErrorCode::Conflict
        | ErrorCode::AlreadyExists
        | ErrorCode::AlreadyInitialised
        | ErrorCode::IdempotencyExpired
        | ErrorCode::KeyVersionNotReady
        // The node is gone because an attempt has removed it.
        | ErrorCode::NodeRemoved
        // Passing states of the node that answered.
        | ErrorCode::RateLimited
        | ErrorCode::Overloaded
        | ErrorCode::KeyNotOnThisNode
        | ErrorCode::SlotLocked
        | ErrorCode::SlotFailed
        | ErrorCode::Stale
        | ErrorCode::NotReady
        | ErrorCode::Uninitialised
        | ErrorCode::InvocationsExhausted
        | ErrorCode::TokenBusy
        | ErrorCode::TokenTimeout
        // Voters come back, and die.
        | ErrorCode::QuorumAtRisk
        | ErrorCode::TransferFailed
        // What the node that was asked says of its own state; no leader answers so.
        | ErrorCode::IndexEpochChanged
        | ErrorCode::MinIndexTooFar
        | ErrorCode::MinIndexNotReached
        | ErrorCode::Internal => Verdict::NotNow,
        ErrorCode::NoQuorum | ErrorCode::NotLeader | ErrorCode::NodeDraining => Verdict::Elsewhere,
        ErrorCode::OutcomeUnknown => Verdict::Unknown,
    }
}

/// Makes attempts, each with the time it may take, until one ends the call.
///
/// # Errors
/// The error of an attempt if it is certain that nothing was done, else `outcome_unknown` once the time is
/// up.
pub(super) async fn repeat<T, F>(pace: Pace, mut attempt: impl FnMut(Duration) -> F) -> Result<T, CallError>
where
    F: Future<Output = Result<T, CallError>>,
{
    let deadline = clock::now() + pace.within;
    let mut maybe_done = false;
    loop {
        let left = deadline.saturating_duration_since(clock::now());
        let error = match tokio::time::timeout(left, attempt(left.min(pace.attempt))).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => error,
            Err(_) => ProposeError::Unknown.into(),
        };
        let pause = match verdict(error.code) {
            Verdict::Refused => return Err(error),
            Verdict::NotNow if !maybe_done => return Err(error),
            Verdict::NotNow => pace.answered,
            Verdict::Elsewhere => pace.pause,
            Verdict::Unknown => {
                maybe_done = true;
                pace.pause
            }
        };
        if clock::now() + pause >= deadline {
            return Err(if maybe_done { unknown(error) } else { error });
        }
        tokio::time::sleep(pause).await;
    }
}

/// The answer when the time is up and an attempt may have been done.
fn unknown(last: CallError) -> CallError {
    if last.code == ErrorCode::OutcomeUnknown {
        return last;
    }
    let detail = format!("{}; the last attempt ended with {last}", ProposeError::Unknown);
    CallError::new(ErrorCode::OutcomeUnknown, detail)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::cell::Cell;
    use std::future::{pending, ready};

    use super::*;

    /// Time enough for every script, however slow the machine.
    const PATIENT: Pace = Pace {
        within: Duration::from_secs(60),
        attempt: Duration::from_secs(12),
        pause: Duration::from_millis(1),
        answered: Duration::from_millis(1),
    };
    const BRIEF: Pace = Pace {
        within: Duration::from_millis(40),
        ..PATIENT
    };

    fn failed(code: ErrorCode) -> Result<u32, CallError> {
        Err(CallError::new(code, "why"))
    }

    /// Plays a script, whose last line is repeated; says how many attempts were made.
    async fn play(pace: Pace, script: &[Result<u32, CallError>]) -> (Result<u32, ErrorCode>, usize) {
        let made = Cell::new(0);
        let answer = repeat(pace, |_| {
            let line = made.get().min(script.len() - 1);
            made.set(made.get() + 1);
            ready(script[line].clone())
        })
        .await;
        (answer.map_err(|error| error.code), made.get())
    }

    fn with(wanted: Verdict) -> impl Iterator<Item = ErrorCode> {
        let codes = ErrorCode::ALL.iter().copied();
        codes.filter(move |code| verdict(*code) == wanted)
    }

    #[test]
    fn a_code_that_may_be_retried_refuses_nothing() {
        for code in ErrorCode::ALL.iter().filter(|code| code.retryable()) {
            assert_ne!(verdict(*code), Verdict::Refused, "{code}");
        }
        // Nor does a fault, nor what a compare-and-set or a used-up number answers.
        for code in with(Verdict::Refused) {
            assert!(
                code.status() < 500 || code == ErrorCode::ContextHasNoKey,
                "{code}"
            );
            assert_ne!(code.status(), 409, "{code}");
        }
        let unknown: Vec<_> = with(Verdict::Unknown).collect();
        assert_eq!(unknown, [ErrorCode::OutcomeUnknown]);
    }

    #[tokio::test]
    async fn without_an_attempt_that_may_be_done_a_refusal_is_definite() {
        for code in with(Verdict::Refused).chain(with(Verdict::NotNow)) {
            let script = [failed(ErrorCode::NotLeader), failed(code)];
            assert_eq!(play(PATIENT, &script).await, (Err(code), 2));
        }
    }

    #[tokio::test]
    async fn after_an_attempt_that_may_be_done_only_what_it_cannot_cause_is_definite() {
        for code in with(Verdict::Refused) {
            let script = [failed(ErrorCode::OutcomeUnknown), failed(code)];
            assert_eq!(play(PATIENT, &script).await, (Err(code), 2));
        }
        for code in with(Verdict::NotNow) {
            let script = [failed(ErrorCode::OutcomeUnknown), failed(code), Ok(7)];
            assert_eq!(play(PATIENT, &script).await, (Ok(7), 3), "{code}");
            let (answer, _) = play(BRIEF, &script[..2]).await;
            assert_eq!(answer, Err(ErrorCode::OutcomeUnknown), "{code}");
        }
    }

    #[tokio::test]
    async fn a_call_that_met_no_leader_has_done_nothing() {
        for code in with(Verdict::Elsewhere) {
            assert_eq!(play(PATIENT, &[failed(code), Ok(7)]).await, (Ok(7), 2));
            assert_eq!(play(BRIEF, &[failed(code)]).await.0, Err(code));
            let script = [failed(ErrorCode::OutcomeUnknown), failed(code)];
            assert_eq!(play(BRIEF, &script).await.0, Err(ErrorCode::OutcomeUnknown));
        }
    }

    #[tokio::test]
    async fn an_attempt_gets_no_more_than_its_share_and_ends_with_the_call() {
        let given = Cell::new(Duration::MAX);
        let pace = Pace {
            attempt: Duration::from_millis(10),
            ..BRIEF
        };
        let answer: Result<u32, _> = repeat(pace, |within| {
            given.set(within);
            pending()
        })
        .await;
        assert_eq!(answer.unwrap_err().code, ErrorCode::OutcomeUnknown);
        assert!(given.get() <= pace.attempt, "{given:?}");
    }

    #[test]
    fn the_last_answer_is_told() {
        let told = unknown(CallError::new(ErrorCode::Overloaded, "busy"));
        assert_eq!(told.code, ErrorCode::OutcomeUnknown);
        assert!(told.detail.contains("Idempotency-Key") && told.detail.ends_with("overloaded: busy"));
        let own = CallError::new(ErrorCode::OutcomeUnknown, "version 3 is prepared");
        assert_eq!(unknown(own.clone()), own);
    }
}
