//! Every error a node can answer with. Codes and statuses are stable: clients branch on them, so a
//! code is never renamed, never given another status, and never removed.
//!
//! `docs/errors.md` has the table for people: meaning and remedy of each, in the same order.

use std::fmt;
use std::str::FromStr;

/// A code this version does not know: the node is newer than this client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown error code {0:?}")]
pub struct UnknownCode(String);

macro_rules! codes {
    ($(
        $(#[doc = $doc:literal])+
        $variant:ident = $code:literal $status:literal $(retry $( ($after:literal) )? )?, $v1:literal;
    )+) => {
        /// Why a request was not carried out: the `code` of a problem body.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum ErrorCode {
            $( $(#[doc = $doc])+ $variant, )+
        }

        impl ErrorCode {
            /// Every code, in the order of the documentation.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The code on the wire, in snake case.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $code,)+ }
            }

            /// The HTTP status it is answered with.
            #[must_use]
            pub const fn status(self) -> u16 {
                match self { $(Self::$variant => $status,)+ }
            }

            /// Whether the same request may succeed later or on another node. A mutation is
            /// repeated with the same `Idempotency-Key`.
            #[must_use]
            pub const fn retryable(self) -> bool {
                match self { $(Self::$variant => codes!(@retryable $(retry $($after)?)?),)+ }
            }

            /// Seconds for the `Retry-After` header, for those codes that carry one.
            #[must_use]
            pub const fn retry_after(self) -> Option<u32> {
                match self { $(Self::$variant => codes!(@after $(retry $($after)?)?),)+ }
            }

            /// The `error` member that v1's clients read.
            #[must_use]
            pub const fn v1_text(self) -> &'static str {
                match self { $(Self::$variant => $v1,)+ }
            }

            /// One line for documentation and `--help`.
            #[must_use]
            pub const fn summary(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),+).trim_ascii(),)+ }
            }
        }

        impl FromStr for ErrorCode {
            type Err = UnknownCode;

            fn from_str(code: &str) -> Result<Self, UnknownCode> {
                match code {
                    $($code => Ok(Self::$variant),)+
                    _ => Err(UnknownCode(code.chars().take(64).collect())),
                }
            }
        }
    };
    (@retryable) => { false };
    (@retryable retry $($after:literal)?) => { true };
    (@after) => { None };
    (@after retry) => { None };
    (@after retry $after:literal) => { Some($after) };
}

codes! {
    /// The body is not JSON, or not the JSON this route takes.
    InvalidJson = "invalid_json" 400, "invalid JSON";
    /// `plaintext` is not standard base64.
    InvalidBase64Plaintext = "invalid_base64_plaintext" 400, "invalid base64 plaintext";
    /// `ciphertext` is not standard base64.
    InvalidBase64Ciphertext = "invalid_base64_ciphertext" 400, "invalid base64 ciphertext";
    /// `aad` is not standard base64.
    InvalidBase64Aad = "invalid_base64_aad" 400, "invalid base64 aad";
    /// The ciphertext is shorter than a nonce and a tag.
    CiphertextTooShort = "ciphertext_too_short" 400, "decryption failed";
    /// The tag is wrong: altered, or encrypted by another principal, context, aad or key.
    AuthenticationFailed = "authentication_failed" 400, "decryption failed";
    /// No such key version in this context, and none is on its way.
    UnknownKeyVersion = "unknown_key_version" 400, "decryption failed";
    /// The key version is disabled, or is to be destroyed; an operator can enable it again.
    KeyVersionDisabled = "key_version_disabled" 400, "decryption failed";
    /// The key version is destroyed: nobody can open this ciphertext any more.
    KeyVersionDestroyed = "key_version_destroyed" 400, "decryption failed";
    /// The ciphertext was made under a key of another context.
    WrongContext = "wrong_context" 400, "decryption failed";
    /// `key_id` names another key version than the ciphertext itself.
    KeyIdMismatch = "key_id_mismatch" 400, "decryption failed";
    /// A data key or check record, which does not come out where data is asked for.
    NotADataCiphertext = "not_a_data_ciphertext" 400, "decryption failed";
    /// Not a data key, which is what was asked for.
    NotADataKey = "not_a_data_key" 400, "decryption failed";
    /// An argument is missing or out of range; the detail names it.
    InvalidArgument = "invalid_argument" 400, "invalid argument";
    /// `Client-Cert` or `Client-Cert-Chain` from somebody who is no trusted proxy.
    ClientCertNotTrusted = "client_cert_not_trusted" 400, "Client-Cert header not allowed";

    /// No client certificate reached the node.
    NoClientCertificate = "no_client_certificate" 401, "no client certificate";
    /// The proxy does not say whose request it is: `Client-Cert` is missing.
    ClientCertMissing = "client_cert_missing" 401, "no client certificate";
    /// `Client-Cert` or `Client-Cert-Chain` is not what RFC 9440 wants, or is there more than once.
    ClientCertMalformed = "client_cert_malformed" 401, "invalid client certificate";
    /// The certificate in `Client-Cert` would be refused in a handshake: its chain, its dates, or its use.
    ClientCertRefused = "client_cert_refused" 401, "invalid client certificate";
    /// The client certificate is revoked.
    CertificateRevoked = "certificate_revoked" 403, "certificate revoked";
    /// The client certificate has no organizational unit.
    NoOrganizationalUnit = "no_organizational_unit" 403, "certificate has no OU";
    /// The client certificate's first organizational unit is in no mapping.
    UnknownOrganizationalUnit = "unknown_organizational_unit" 403, "access denied: unknown organizational unit";
    /// The context is not one of this principal's, or does not exist: the answer is the same.
    AccessDenied = "access_denied" 403, "access denied: insufficient permissions";
    /// The call needs a role this principal does not have.
    RoleRequired = "role_required" 403, "access denied: insufficient permissions";
    /// The request comes from a page of another origin.
    ForeignOrigin = "foreign_origin" 403, "cross-origin request refused";
    /// Admin routes need the header `X-HSM-Request: 1`.
    RequestHeaderMissing = "request_header_missing" 403, "X-HSM-Request header required";
    /// What administrators do is not done through a proxy.
    AdminThroughProxy = "admin_through_proxy" 403, "not allowed through a proxy";

    /// No such path.
    NotFound = "not_found" 404, "not found";
    /// The path exists, but not with this method.
    MethodNotAllowed = "method_not_allowed" 405, "only POST allowed";
    /// The body is larger than the limit.
    BodyTooLarge = "body_too_large" 413, "request body too large";
    /// The batch has more items than one may have.
    BatchTooLarge = "batch_too_large" 413, "batch too large";
    /// Admin routes take `Content-Type: application/json` only.
    UnsupportedMediaType = "unsupported_media_type" 415, "application/json required";

    /// The state has changed, or forbids this; the detail says how.
    Conflict = "conflict" 409, "conflict";
    /// What was to be created exists.
    AlreadyExists = "already_exists" 409, "already exists";
    /// The node was removed from the cluster.
    NodeRemoved = "node_removed" 409, "node was removed";
    /// The cluster would have no quorum for it, or none afterwards; the detail has the numbers.
    QuorumAtRisk = "quorum_at_risk" 409, "quorum at risk";
    /// This node belongs to a cluster already.
    AlreadyInitialised = "already_initialised" 409, "already initialised";
    /// The `Idempotency-Key` is older than what the cluster remembers.
    IdempotencyExpired = "idempotency_expired" 409, "idempotency key expired";
    /// The `Idempotency-Key` was used for another request.
    IdempotencyKeyReused = "idempotency_key_reused" 422, "idempotency key reused";

    /// `X-HSM-Min-Index` is of another epoch than this node's state: it means nothing here.
    IndexEpochChanged = "index_epoch_changed" 412, "index epoch changed";
    /// `X-HSM-Min-Index` is further ahead of this node's state than any node is behind.
    MinIndexTooFar = "min_index_too_far" 412, "minimum index too far";
    /// This node's state has not come to `X-HSM-Min-Index` in time, or too many wait for theirs.
    MinIndexNotReached = "min_index_not_reached" 412 retry(1), "minimum index not reached";

    /// This principal sends more than its rate.
    RateLimited = "rate_limited" 429 retry(1), "rate limit exceeded";

    /// The node has more work queued than it may.
    Overloaded = "overloaded" 503 retry(1), "overloaded";
    /// The key version is newer than what this node has imported.
    KeyVersionNotReady = "key_version_not_ready" 503 retry(1), "key version not ready";
    /// This node may encrypt under the version no more until it is given more invocations, or the key is rotated.
    InvocationsExhausted = "invocations_exhausted" 503 retry(1), "invocations exhausted";
    /// This node's token does not hold the key version, and it cannot be replicated.
    KeyNotOnThisNode = "key_not_on_this_node" 503 retry(1), "key not on this node";
    /// The slot of this context waits for its PIN.
    SlotLocked = "slot_locked" 503, "slot locked";
    /// The slot of this context has failed on this node.
    SlotFailed = "slot_failed" 503, "slot failed";
    /// The context has no active key version.
    ContextHasNoKey = "context_has_no_key" 503, "context has no key";
    /// The node has been without the leader for longer than its staleness bound.
    Stale = "stale" 503 retry, "node is stale";
    /// The node has not passed its start gate.
    NotReady = "not_ready" 503 retry, "node is not ready";
    /// No majority of the cluster answers; nothing was written.
    NoQuorum = "no_quorum" 503 retry, "no quorum";
    /// This node does not lead and could not reach the leader.
    NotLeader = "not_leader" 503 retry, "not the leader";
    /// No other node was elected in time: who led goes on leading.
    TransferFailed = "transfer_failed" 503, "leadership not handed over";
    /// Written, but not known to be committed in time: repeat with the same `Idempotency-Key`.
    OutcomeUnknown = "outcome_unknown" 503 retry, "outcome unknown";
    /// This node belongs to no cluster yet.
    Uninitialised = "uninitialised" 503, "not initialised";
    /// The node is shutting down.
    NodeDraining = "node_draining" 503 retry, "node is shutting down";
    /// The token could not do it now, and says nothing worse of itself.
    TokenBusy = "token_busy" 503 retry(1), "token busy";
    /// The token did not answer in time.
    TokenTimeout = "token_timeout" 503 retry(1), "token timeout";

    /// A fault of the service; the log has the request id.
    Internal = "internal" 500, "internal error";
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn codes_are_unique_snake_case_and_parse_back() {
        let mut seen = BTreeSet::new();
        for &code in ErrorCode::ALL {
            let text = code.as_str();
            assert!(seen.insert(text), "{text} twice");
            assert!(
                text.bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_'),
                "{text}"
            );
            assert_eq!(text.parse::<ErrorCode>().unwrap(), code);
            assert!(!code.summary().is_empty() && !code.v1_text().is_empty(), "{text}");
        }
        assert!("teapot".parse::<ErrorCode>().is_err());
    }

    #[test]
    fn only_412_429_and_503_are_retryable_and_only_they_carry_retry_after() {
        for &code in ErrorCode::ALL {
            if code.retryable() {
                assert!(matches!(code.status(), 412 | 429 | 503), "{code}");
            }
            assert!(code.retry_after().is_none() || code.retryable(), "{code}");
        }
        let with_header: Vec<_> = ErrorCode::ALL
            .iter()
            .filter(|code| code.retry_after() == Some(1))
            .map(|code| code.as_str())
            .collect();
        assert_eq!(
            with_header,
            [
                "min_index_not_reached",
                "rate_limited",
                "overloaded",
                "key_version_not_ready",
                "invocations_exhausted",
                "key_not_on_this_node",
                "token_busy",
                "token_timeout"
            ]
        );
    }

    /// What v1's clients match on; taken from the v1 service, not from the table above.
    #[test]
    fn v1_clients_read_the_texts_they_know() {
        for (code, status, text) in [
            ("invalid_json", 400, "invalid JSON"),
            ("invalid_base64_plaintext", 400, "invalid base64 plaintext"),
            ("invalid_base64_ciphertext", 400, "invalid base64 ciphertext"),
            ("no_client_certificate", 401, "no client certificate"),
            ("certificate_revoked", 403, "certificate revoked"),
            ("no_organizational_unit", 403, "certificate has no OU"),
            (
                "unknown_organizational_unit",
                403,
                "access denied: unknown organizational unit",
            ),
            ("access_denied", 403, "access denied: insufficient permissions"),
            ("method_not_allowed", 405, "only POST allowed"),
            ("rate_limited", 429, "rate limit exceeded"),
            ("authentication_failed", 400, "decryption failed"),
        ] {
            let code: ErrorCode = code.parse().unwrap();
            assert_eq!((code.status(), code.v1_text()), (status, text), "{code}");
        }
    }

    #[test]
    fn the_documentation_has_every_code_once_with_its_status_and_retry() {
        let documented: Vec<String> = include_str!("../../docs/errors.md")
            .lines()
            .filter(|line| line.starts_with("| `"))
            .map(|row| {
                let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
                assert!(
                    cells.len() == 5 && cells.iter().all(|cell| !cell.is_empty()),
                    "code, status, retry, meaning, what to do: {row}"
                );
                cells[..3].join(" ")
            })
            .collect();
        let expected: Vec<String> = ErrorCode::ALL
            .iter()
            .map(|code| {
                let retry = match (code.retryable(), code.retry_after()) {
                    (false, _) => "no".to_owned(),
                    (true, None) => "yes".to_owned(),
                    (true, Some(seconds)) => format!("after {seconds} s"),
                };
                format!("`{code}` {} {retry}", code.status())
            })
            .collect();
        assert_eq!(documented, expected);
    }

    /// The whole table, so that a change of a stable code, status or flag shows in review.
    #[test]
    fn the_table_stands() {
        let table: Vec<String> = ErrorCode::ALL
            .iter()
            .map(|code| {
                format!(
                    "{} {}{}",
                    code.as_str(),
                    code.status(),
                    if code.retryable() { " r" } else { "" }
                )
            })
            .collect();
        assert_eq!(table.len(), 61);
        for line in [
            "ciphertext_too_short 400",
            "unknown_key_version 400",
            "key_version_disabled 400",
            "key_version_destroyed 400",
            "wrong_context 400",
            "key_id_mismatch 400",
            "not_a_data_ciphertext 400",
            "not_a_data_key 400",
            "role_required 403",
            "foreign_origin 403",
            "request_header_missing 403",
            "client_cert_not_trusted 400",
            "client_cert_missing 401",
            "client_cert_malformed 401",
            "client_cert_refused 401",
            "admin_through_proxy 403",
            "unsupported_media_type 415",
            "not_found 404",
            "body_too_large 413",
            "batch_too_large 413",
            "invalid_argument 400",
            "conflict 409",
            "already_exists 409",
            "node_removed 409",
            "quorum_at_risk 409",
            "transfer_failed 503",
            "idempotency_key_reused 422",
            "idempotency_expired 409",
            "index_epoch_changed 412",
            "min_index_too_far 412",
            "min_index_not_reached 412 r",
            "overloaded 503 r",
            "key_version_not_ready 503 r",
            "invocations_exhausted 503 r",
            "key_not_on_this_node 503 r",
            "slot_locked 503",
            "slot_failed 503",
            "context_has_no_key 503",
            "stale 503 r",
            "not_ready 503 r",
            "no_quorum 503 r",
            "not_leader 503 r",
            "outcome_unknown 503 r",
            "uninitialised 503",
            "already_initialised 409",
            "node_draining 503 r",
            "token_busy 503 r",
            "token_timeout 503 r",
            "internal 500",
        ] {
            assert!(table.iter().any(|row| row == line), "{line} is missing");
        }
    }
}
