//! Names of the headers the API uses, in lower case as HTTP/2 wants them, and the one that has a
//! form of its own: the index of the replicated state.

use std::fmt;
use std::str::FromStr;

/// Request, admin routes: must be `1`. A browser cannot send it across origins unasked.
pub const X_HSM_REQUEST: &str = "x-hsm-request";
/// Request, mutations: the same value makes a repeated mutation happen once.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// Response: `<epoch>.<index>` of a state that the answer was made from at least; of a change, of one that has it.
pub const X_HSM_INDEX: &str = "x-hsm-index";
/// Request: answer only from a state at least this new.
pub const X_HSM_MIN_INDEX: &str = "x-hsm-min-index";
/// Response: `true` when a node answered that is out of readiness and still inside its staleness bound.
pub const X_HSM_STALE: &str = "x-hsm-stale";
/// Response: name of the node that answered.
pub const X_HSM_NODE: &str = "x-hsm-node";
/// Request and response: names one request in the logs of all nodes it touched.
pub const X_REQUEST_ID: &str = "x-request-id";
/// Request: the trace it belongs to, as the W3C defines it (`00-<trace>-<parent>-<flags>`). Named in the logs of
/// all nodes it touched.
pub const TRACEPARENT: &str = "traceparent";
/// Request, of a trusted proxy: the certificate of the client whose request it is (RFC 9440). From anybody else it is
/// refused.
pub const CLIENT_CERT: &str = "client-cert";
/// Request, of a trusted proxy: the certificates above that one (RFC 9440).
pub const CLIENT_CERT_CHAIN: &str = "client-cert-chain";
/// Response: seconds after which a retry may be worth it.
pub const RETRY_AFTER: &str = "retry-after";

// draft-ietf-httpapi-ratelimit-headers-06, the last that has four fields: later drafts put the first three into one.

/// Response: how many requests the caller can have at once at most.
pub const RATELIMIT_LIMIT: &str = "ratelimit-limit";
/// Response: how many it can have now.
pub const RATELIMIT_REMAINING: &str = "ratelimit-remaining";
/// Response: seconds until it can have as many as [`RATELIMIT_LIMIT`] again, or what [`RETRY_AFTER`] says beside 429.
pub const RATELIMIT_RESET: &str = "ratelimit-reset";
/// Response: `<requests per second>;w=1;burst=<at once>`.
pub const RATELIMIT_POLICY: &str = "ratelimit-policy";

/// How far a node's state is: `<epoch>.<index>`, as in [`X_HSM_INDEX`]. Indexes of different
/// epochs do not compare in time; the order here is only a total one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StateIndex {
    /// Raised by a restore or recovery.
    pub epoch: u64,
    /// Index of the last log entry applied.
    pub index: u64,
}

impl fmt::Display for StateIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.index)
    }
}

/// A text that is not `<epoch>.<index>`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected <epoch>.<index>, two decimal numbers")]
pub struct StateIndexError;

impl FromStr for StateIndex {
    type Err = StateIndexError;

    fn from_str(text: &str) -> Result<Self, StateIndexError> {
        let (epoch, index) = text.split_once('.').ok_or(StateIndexError)?;
        Ok(Self {
            epoch: number(epoch)?,
            index: number(index)?,
        })
    }
}

/// Digits only: `u64`'s own parser also takes a sign.
fn number(text: &str) -> Result<u64, StateIndexError> {
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(StateIndexError);
    }
    text.parse().map_err(|_| StateIndexError)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_two_plain_numbers_are_an_index() {
        for text in [
            "",
            ".",
            "1",
            "1.",
            ".1",
            "+1.2",
            "1.2.3",
            "1.-2",
            "a.b",
            "1.99999999999999999999",
        ] {
            assert_eq!(text.parse::<StateIndex>(), Err(StateIndexError), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn an_index_round_trips(epoch: u64, index: u64) {
            let value = StateIndex { epoch, index };
            prop_assert_eq!(value.to_string().parse::<StateIndex>().unwrap(), value);
        }
    }
}
