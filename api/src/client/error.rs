//! What can go wrong with a call, so that a caller can tell a node's answer from no answer. Texts
//! name the endpoint and never a request's or an answer's content beyond a problem body.

use std::error::Error as StdError;
use std::io;
use std::time::Duration;

use super::answer::{Meta, RawResponse};
use crate::code::ErrorCode;
use crate::headers;
use crate::problem::{Problem, reason_phrase};

/// How much of an answer that is no problem body an error repeats.
const SHOWN: usize = 200;

/// A client that cannot be made of what it was given.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// No endpoint at all.
    #[error("no endpoint: give at least one address of a node, as https://host:port")]
    NoEndpoint,
    /// An endpoint that is none.
    #[error("endpoint {endpoint:?}: {reason}; expected https://host:port")]
    Endpoint {
        /// What was given.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A PEM file that holds not what it should.
    #[error("{what}: {reason}")]
    Pem {
        /// Which of the files.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// Certificate, key and TLS do not go together.
    #[error("TLS: {}", explained(.0))]
    Tls(#[from] rustls::Error),
}

/// A node's refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// The HTTP status.
    pub status: u16,
    /// The stable code, if this version knows it.
    pub code: Option<ErrorCode>,
    /// The code as it was sent; empty if the answer was no problem body.
    pub code_text: String,
    /// What happened and what to do about it.
    pub detail: String,
    /// Names the request in the nodes' logs.
    pub request_id: Option<String>,
    /// Whether the same request may succeed later or on another node.
    pub retryable: bool,
    /// How long the node asks to wait before a retry.
    pub retry_after: Option<Duration>,
    /// The node that refused.
    pub node: Option<String>,
    /// The endpoint that was asked.
    pub endpoint: String,
}

impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let who = self.node.as_deref().unwrap_or(&self.endpoint);
        let code = if self.code_text.is_empty() {
            reason_phrase(self.status)
        } else {
            self.code_text.as_str()
        };
        write!(f, "{who}: {} {code}", self.status)?;
        if !self.detail.is_empty() {
            write!(f, ": {}", self.detail)?;
        }
        if let Some(id) = &self.request_id {
            write!(f, " (request {id})")?;
        }
        Ok(())
    }
}

impl StdError for ApiError {}

impl ApiError {
    /// Reads an answer that is not a success, whoever made it: a balancer's is no problem body.
    pub(super) fn read(response: &RawResponse, meta: Meta) -> Self {
        let retry_after = response
            .header(headers::RETRY_AFTER)
            .and_then(|seconds| seconds.parse().ok())
            .map(Duration::from_secs);
        let mut error = Self {
            status: response.status,
            code: None,
            code_text: String::new(),
            detail: String::new(),
            request_id: meta.request_id,
            retryable: matches!(response.status, 429 | 502 | 503 | 504),
            retry_after,
            node: meta.node,
            endpoint: meta.endpoint,
        };
        match serde_json::from_slice::<Problem>(&response.body) {
            Ok(problem) => {
                error.code = problem.error_code();
                error.retryable = problem.retryable;
                if !problem.request_id.is_empty() {
                    error.request_id = Some(problem.request_id);
                }
                error.code_text = problem.code;
                error.detail = problem.detail;
            }
            Err(_) => {
                error.detail = String::from_utf8_lossy(&response.body)
                    .trim()
                    .chars()
                    .take(SHOWN)
                    .collect();
            }
        }
        error
    }
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// A node answered, and refused.
    #[error(transparent)]
    Api(Box<ApiError>),
    /// No connection: the request was certainly not carried out.
    #[error("{endpoint}: cannot connect: {reason}")]
    Connect {
        /// The endpoint that was asked.
        endpoint: String,
        /// Why.
        reason: String,
    },
    /// One side refused the other's certificate, or they share no protocol.
    #[error("{endpoint}: TLS: {reason}")]
    Tls {
        /// The endpoint that was asked.
        endpoint: String,
        /// Why.
        reason: String,
    },
    /// The connection broke: the request may or may not have been carried out.
    #[error("{endpoint}: no answer: {reason}")]
    Transport {
        /// The endpoint that was asked.
        endpoint: String,
        /// Why.
        reason: String,
    },
    /// No answer in time: the request may or may not have been carried out.
    #[error("{endpoint}: no answer within {after:?}")]
    Timeout {
        /// The endpoint that was asked.
        endpoint: String,
        /// How long was waited.
        after: Duration,
    },
    /// A success that cannot be read.
    #[error("{endpoint}: status {status}, but the answer cannot be read: {reason}")]
    Decode {
        /// The endpoint that answered.
        endpoint: String,
        /// The HTTP status.
        status: u16,
        /// Why.
        reason: String,
    },
    /// The request cannot be sent at all.
    #[error("request: {0}")]
    Request(String),
    /// A node refused at last; but a request before that one had no answer, and may have been carried out.
    #[error("{unanswered}; then {refusal}")]
    RefusedAfterSilence {
        /// What the request without an answer failed with.
        unanswered: Box<ClientError>,
        /// The refusal.
        refusal: Box<ApiError>,
    },
    /// Several nodes were asked, and none answered.
    #[error("none of {} nodes answered: {}", .failures.len(), texts(.failures))]
    NoneAnswered {
        /// What each failed with; none of them is [`ClientError::Api`].
        failures: Vec<ClientError>,
    },
}

impl ClientError {
    /// The refusal, if a node answered and nothing is left open.
    #[must_use]
    pub fn api(&self) -> Option<&ApiError> {
        match self {
            Self::Api(error) => Some(error),
            _ => None,
        }
    }

    /// What a node refused with at last, whether or not an earlier request is unanswered.
    #[must_use]
    pub fn refusal(&self) -> Option<&ApiError> {
        match self {
            Self::RefusedAfterSilence { refusal, .. } => Some(refusal),
            _ => self.api(),
        }
    }

    /// The stable code, if a node answered with one this version knows. What it says of the last request is no
    /// word on those before it: see [`ClientError::outcome_unknown`].
    #[must_use]
    pub fn code(&self) -> Option<ErrorCode> {
        self.refusal().and_then(|error| error.code)
    }

    /// The HTTP status, if a node answered.
    #[must_use]
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Decode { status, .. } => Some(*status),
            _ => self.refusal().map(|error| error.status),
        }
    }

    /// Whether the request may have been carried out although the call failed.
    #[must_use]
    pub fn outcome_unknown(&self) -> bool {
        match self {
            Self::Transport { .. }
            | Self::Timeout { .. }
            | Self::Decode { .. }
            | Self::RefusedAfterSilence { .. } => true,
            Self::NoneAnswered { failures } => failures.iter().any(Self::outcome_unknown),
            Self::Api(error) => error.code == Some(ErrorCode::OutcomeUnknown),
            _ => false,
        }
    }

    /// Sorts a failure of the transport: what TLS refused is not worth repeating.
    pub(super) fn transport(
        endpoint: &str,
        connecting: bool,
        error: &(dyn StdError + Send + Sync + 'static),
    ) -> Self {
        let (reason, tls) = describe(error);
        let endpoint = endpoint.to_owned();
        if tls {
            Self::Tls { endpoint, reason }
        } else if connecting {
            Self::Connect { endpoint, reason }
        } else {
            Self::Transport { endpoint, reason }
        }
    }
}

fn texts(failures: &[ClientError]) -> String {
    let texts: Vec<String> = failures.iter().map(ToString::to_string).collect();
    texts.join("; ")
}

/// What the TLS errors mean that people meet, and what to do about them.
fn meaning(error: &rustls::Error) -> Option<&'static str> {
    use rustls::{AlertDescription, CertificateError, InconsistentKeys, InvalidMessage};
    Some(match error {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "the certificate of what listens there is not from the CA that was given: give the CA of the nodes' API \
             certificates, and the API's port, usually 8443"
        }
        rustls::Error::AlertReceived(AlertDescription::UnknownCA) => {
            "the node does not know the client certificate's CA: use a certificate from the CA of the node's \
             server.tls.ca_path"
        }
        rustls::Error::AlertReceived(AlertDescription::UnsupportedCertificate) => {
            "the node does not take the client certificate as a client's: use one that was issued for clients (extended \
             key usage clientAuth), not a server's"
        }
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            "the client key is not the one of the client certificate: give the key that the certificate was made for"
        }
        rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "what listens there does not speak TLS: give the API's port, usually 8443, not the health listener's"
        }
        _ => return None,
    })
}

/// A TLS error with its meaning, if it is a known one.
fn explained(error: &rustls::Error) -> String {
    match meaning(error) {
        Some(meaning) => format!("{meaning} ({error})"),
        None => error.to_string(),
    }
}

/// The texts of an error and its causes, and whether TLS is among them.
fn describe(error: &(dyn StdError + Send + Sync + 'static)) -> (String, bool) {
    let first: &(dyn StdError + 'static) = error;
    let mut next = Some(first);
    let mut text = String::new();
    let mut tls = false;
    let mut known = None;
    while let Some(current) = next {
        let this = current.to_string();
        // Wrappers often show what they wrap.
        if !text.ends_with(&this) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&this);
        }
        if let Some(error) = current.downcast_ref::<rustls::Error>() {
            tls = true;
            known = known.or_else(|| meaning(error));
        }
        next = cause(current);
    }
    match known {
        Some(meaning) => (format!("{meaning} ({text})"), tls),
        None => (text, tls),
    }
}

/// `io::Error` skips the error it wraps when asked for its source.
fn cause<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a (dyn StdError + 'static)> {
    if let Some(inner) = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        let inner: &'a (dyn StdError + 'static) = inner;
        return Some(inner);
    }
    error.source()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use http::{HeaderMap, HeaderValue};

    use super::*;

    fn read(status: u16, body: &str) -> ApiError {
        let mut header_map = HeaderMap::new();
        header_map.insert("retry-after", HeaderValue::from_static("1"));
        header_map.insert("x-hsm-node", HeaderValue::from_static("hsm-node-2"));
        header_map.insert("x-request-id", HeaderValue::from_static("01J"));
        let response = RawResponse::new(
            status,
            header_map,
            body.as_bytes().to_vec(),
            "https://a:1".to_owned(),
        );
        let meta = response.meta(1);
        ApiError::read(&response, meta)
    }

    #[test]
    fn a_problem_body_is_read_whole() {
        let body = serde_json::to_string(&Problem::new(ErrorCode::NoQuorum, "2 of 3 silent", "01J")).unwrap();
        let error = read(503, &body);
        assert_eq!(error.code, Some(ErrorCode::NoQuorum));
        assert!(error.retryable);
        assert_eq!(error.retry_after, Some(Duration::from_secs(1)));
        assert_eq!(
            error.to_string(),
            "hsm-node-2: 503 no_quorum: 2 of 3 silent (request 01J)"
        );
    }

    #[test]
    fn a_balancers_page_is_no_problem_body() {
        let error = read(502, &"<html>".repeat(1000));
        assert_eq!((error.code, error.retryable, error.status), (None, true, 502));
        assert_eq!(error.detail.len(), SHOWN);
        assert!(!read(404, "no").retryable);
    }

    #[test]
    fn a_tls_error_that_people_meet_says_what_to_do() {
        use rustls::{AlertDescription, CertificateError, InconsistentKeys, InvalidMessage};
        for (error, remedy) in [
            (
                rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer),
                "give the CA of the nodes' API certificates",
            ),
            (
                rustls::Error::AlertReceived(AlertDescription::UnknownCA),
                "server.tls.ca_path",
            ),
            (
                rustls::Error::AlertReceived(AlertDescription::UnsupportedCertificate),
                "use one that was issued for clients",
            ),
            (
                rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch),
                "give the key that the certificate was made for",
            ),
            (
                rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType),
                "give the API's port",
            ),
        ] {
            let text = error.to_string();
            let wrapped = io::Error::new(io::ErrorKind::InvalidData, error.clone());
            let failed = ClientError::transport("https://a:1", true, &wrapped);
            assert!(matches!(failed, ClientError::Tls { .. }), "{failed}");
            let said = failed.to_string();
            assert!(said.contains(remedy) && said.contains(&text), "{said}");
            assert!(BuildError::Tls(error).to_string().contains(remedy));
        }
    }

    #[test]
    fn tls_is_found_below_wrapping_errors() {
        let tls = io::Error::new(io::ErrorKind::InvalidData, rustls::Error::DecryptError);
        let wrapped = io::Error::other(io::Error::other(tls));
        assert!(matches!(
            ClientError::transport("e", true, &wrapped),
            ClientError::Tls { .. }
        ));
        let plain = io::Error::new(io::ErrorKind::ConnectionRefused, "refused");
        assert!(matches!(
            ClientError::transport("e", true, &plain),
            ClientError::Connect { .. }
        ));
        let error = ClientError::transport("e", false, &plain);
        assert!(
            error.outcome_unknown() && error.to_string() == "e: no answer: refused",
            "{error}"
        );
    }
}
