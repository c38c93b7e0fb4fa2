//! What the endpoints of one call have said so far, made into one error at its end: a node's refusal if there was
//! one, else the silence of them all.

use super::error::{ApiError, ClientError};
use crate::code::ErrorCode;

/// See the module.
pub(super) struct Failures {
    /// The newest refusal.
    refusal: Option<ClientError>,
    /// Of each endpoint, what it failed with last.
    silent: Vec<Option<ClientError>>,
}

impl Failures {
    pub(super) fn new(endpoints: usize) -> Self {
        Self {
            refusal: None,
            silent: (0..endpoints.max(1)).map(|_| None).collect(),
        }
    }

    /// Notes a failure of the endpoint with this index; any number names one, as they go round.
    pub(super) fn note(&mut self, at: usize, error: ClientError) {
        if let Some(refusal) = error.api() {
            // What may have been carried out stays possible until a node says for good what became of it.
            let possible = self.refusal.as_ref().is_some_and(ClientError::outcome_unknown);
            if !(possible && says_nothing_of_before(refusal)) {
                self.refusal = Some(error);
            }
            return;
        }
        let at = at % self.silent.len();
        let kept = &mut self.silent[at];
        // What may have been carried out stays possible, whatever fails after it.
        let possible = kept.as_ref().is_some_and(ClientError::outcome_unknown);
        if !possible || error.outcome_unknown() {
            *kept = Some(error);
        }
    }

    /// A node's refusal tells more than the silence of another one. But most say nothing of what an earlier request
    /// has done that had no answer.
    pub(super) fn into_error(mut self) -> ClientError {
        let refusal = match self.refusal.take() {
            Some(ClientError::Api(refusal)) if says_nothing_of_before(&refusal) => refusal,
            Some(refusal) => return refusal,
            None => return self.silence(),
        };
        let unknown = self
            .silent
            .into_iter()
            .flatten()
            .find(ClientError::outcome_unknown);
        match unknown {
            Some(unanswered) => ClientError::RefusedAfterSilence {
                unanswered: Box::new(unanswered),
                refusal,
            },
            None => ClientError::Api(refusal),
        }
    }

    fn silence(self) -> ClientError {
        let mut failures: Vec<ClientError> = self.silent.into_iter().flatten().collect();
        match failures.pop() {
            Some(only) if failures.is_empty() => only,
            last => {
                failures.extend(last);
                ClientError::NoneAnswered { failures }
            }
        }
    }
}

/// Whether a refusal leaves open what an earlier attempt has done. Only what follows from the bytes of the request,
/// which every attempt repeats, says something of them all. Everything else may be a passing state of the node
/// that answers, its own configuration (whose roles it knows, which routes it has), what a balancer says, or what
/// the earlier attempt has itself brought about.
fn says_nothing_of_before(refusal: &ApiError) -> bool {
    let Some(code) = refusal.code else {
        return true;
    };
    !matches!(
        code,
        ErrorCode::InvalidJson
            | ErrorCode::InvalidBase64Plaintext
            | ErrorCode::InvalidBase64Ciphertext
            | ErrorCode::InvalidBase64Aad
            | ErrorCode::CiphertextTooShort
            | ErrorCode::RequestHeaderMissing
            | ErrorCode::ForeignOrigin
            | ErrorCode::BodyTooLarge
            | ErrorCode::UnsupportedMediaType
            | ErrorCode::IdempotencyKeyReused
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn refused(endpoint: &str) -> ClientError {
        ClientError::Connect {
            endpoint: endpoint.to_owned(),
            reason: "refused".to_owned(),
        }
    }

    fn broken(endpoint: &str) -> ClientError {
        ClientError::Transport {
            endpoint: endpoint.to_owned(),
            reason: "reset".to_owned(),
        }
    }

    fn no_quorum() -> ClientError {
        refusal(ErrorCode::NoQuorum, true)
    }

    fn refusal(code: ErrorCode, retryable: bool) -> ClientError {
        ClientError::Api(Box::new(ApiError {
            status: code.status(),
            code: Some(code),
            code_text: code.as_str().to_owned(),
            detail: String::new(),
            request_id: None,
            retryable,
            retry_after: None,
            node: None,
            endpoint: "https://b:2".to_owned(),
        }))
    }

    fn outcome(endpoints: usize, noted: Vec<(usize, ClientError)>) -> ClientError {
        let mut failures = Failures::new(endpoints);
        for (at, error) in noted {
            failures.note(at, error);
        }
        failures.into_error()
    }

    #[test]
    fn every_endpoint_that_did_not_answer_is_named() {
        let error = outcome(
            3,
            vec![
                (4, refused("https://b:2")),
                (5, refused("https://c:3")),
                (6, refused("https://a:1")),
            ],
        );
        let text = error.to_string();
        assert!(
            text.starts_with("none of 3 nodes answered: https://a:1: "),
            "{text}"
        );
        assert!(
            text.contains("https://b:2") && text.contains("https://c:3"),
            "{text}"
        );
        assert!(!error.outcome_unknown());
    }

    #[test]
    fn one_endpoint_speaks_for_itself() {
        let error = outcome(1, vec![(0, refused("https://a:1")), (0, refused("https://a:1"))]);
        assert!(matches!(error, ClientError::Connect { .. }), "{error}");
    }

    #[test]
    fn only_what_follows_from_the_request_takes_a_possible_change_back() {
        let of_the_request = [
            ErrorCode::InvalidJson,
            ErrorCode::InvalidBase64Plaintext,
            ErrorCode::InvalidBase64Ciphertext,
            ErrorCode::InvalidBase64Aad,
            ErrorCode::CiphertextTooShort,
            ErrorCode::RequestHeaderMissing,
            ErrorCode::ForeignOrigin,
            ErrorCode::BodyTooLarge,
            ErrorCode::UnsupportedMediaType,
            ErrorCode::IdempotencyKeyReused,
        ];
        for &code in ErrorCode::ALL {
            let refusal = refusal(code, code.retryable());
            let error = outcome(2, vec![(0, broken("https://a:1")), (1, refusal)]);
            assert_eq!(
                error.outcome_unknown(),
                !of_the_request.contains(&code),
                "{code}: {error}"
            );
            // What was refused at last is told in any case.
            assert_eq!((error.code(), error.status()), (Some(code), Some(code.status())));
        }
    }

    /// A balancer's page, or a newer node's code.
    #[test]
    fn a_refusal_without_a_known_code_takes_nothing_back() {
        let ClientError::Api(mut page) = refusal(ErrorCode::NotFound, false) else {
            panic!("another error")
        };
        (page.code, page.code_text) = (None, String::new());
        let error = outcome(2, vec![(0, broken("https://a:1")), (1, ClientError::Api(page))]);
        assert!(error.outcome_unknown(), "{error}");
        assert_eq!((error.code(), error.status()), (None, Some(404)));
    }

    #[test]
    fn a_refusal_tells_more_than_silence_after_it() {
        let error = outcome(2, vec![(0, no_quorum()), (1, refused("https://b:2"))]);
        assert_eq!(error.code(), Some(ErrorCode::NoQuorum));
    }

    #[test]
    fn a_refusal_for_now_does_not_hide_what_may_have_been_done() {
        let error = outcome(2, vec![(0, broken("https://a:1")), (1, no_quorum())]);
        assert!(error.outcome_unknown() && error.api().is_none(), "{error}");
        let text = error.to_string();
        assert!(text.contains("reset; then https://b:2: 503 no_quorum"), "{text}");
    }

    #[test]
    fn a_refusal_for_good_is_the_answer() {
        let refusal = refusal(ErrorCode::IdempotencyKeyReused, false);
        let error = outcome(2, vec![(0, broken("https://a:1")), (1, refusal)]);
        assert!(error.api().is_some() && !error.outcome_unknown(), "{error}");
    }

    #[test]
    fn what_may_have_been_done_is_not_forgotten() {
        let error = outcome(
            2,
            vec![
                (0, broken("https://a:1")),
                (1, refused("https://b:2")),
                (2, refused("https://a:1")),
            ],
        );
        assert!(error.outcome_unknown(), "{error}");
        assert!(error.to_string().contains("reset"), "{error}");
    }
}
