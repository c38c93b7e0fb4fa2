//! Answers: the body together with what the headers say about where it came from.

use std::fmt;
use std::ops::Deref;

use http::HeaderMap;
use serde::de::DeserializeOwned;
use zeroize::Zeroizing;

use super::error::ClientError;
use crate::headers::{self, StateIndex};
use crate::problem::Problem;

/// A successful answer. It dereferences to its body.
#[derive(Debug, Clone)]
pub struct Answer<T> {
    /// What was asked for.
    pub body: T,
    /// Where it came from.
    pub meta: Meta,
}

impl<T> Answer<T> {
    /// The body alone.
    pub fn into_body(self) -> T {
        self.body
    }
}

impl<T> Deref for Answer<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.body
    }
}

/// What an answer's headers say, and how it was come by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    /// The HTTP status.
    pub status: u16,
    /// `X-HSM-Index`: the state it was made from, at least; of a change, a state that has it. With
    /// [`Client::with_min_index`](super::Client::with_min_index) no node answers from an older one.
    pub index: Option<StateIndex>,
    /// `X-HSM-Stale`: the node has lost contact to a quorum, and still may answer.
    pub stale: bool,
    /// `X-HSM-Node`: who answered.
    pub node: Option<String>,
    /// `X-Request-Id`: names it in the nodes' logs.
    pub request_id: Option<String>,
    /// The endpoint that answered.
    pub endpoint: String,
    /// Attempts it took, this one included.
    pub attempts: u32,
}

/// An answer as it came, whatever its status.
#[derive(Clone)]
pub struct RawResponse {
    /// The HTTP status.
    pub status: u16,
    /// All headers.
    pub headers: HeaderMap,
    /// The whole body, wiped when dropped: it may hold a plaintext.
    pub body: Zeroizing<Vec<u8>>,
    /// The endpoint that answered.
    pub endpoint: String,
}

/// Without the body, which may hold a plaintext.
impl fmt::Debug for RawResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawResponse")
            .field("status", &self.status)
            .field("headers", &self.headers)
            .field("body_bytes", &self.body.len())
            .field("endpoint", &self.endpoint)
            .finish()
    }
}

impl RawResponse {
    pub(super) fn new(
        status: u16,
        headers: HeaderMap,
        body: impl Into<Zeroizing<Vec<u8>>>,
        endpoint: String,
    ) -> Self {
        Self {
            status,
            headers,
            body: body.into(),
            endpoint,
        }
    }

    /// The first value of a header, if it is text.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// Whether the status is 2xx.
    #[must_use]
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// The body as text; bytes that are not UTF-8 are replaced.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as a problem, if it is one.
    #[must_use]
    pub fn problem(&self) -> Option<Problem> {
        serde_json::from_slice(&self.body).ok()
    }

    /// The body as JSON of this type.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, ClientError> {
        serde_json::from_slice(&self.body).map_err(|error| self.unreadable(error.to_string()))
    }

    /// As [`RawResponse::json`] for a body that holds a plaintext: serde's messages may repeat
    /// what they could not read.
    pub(super) fn secret_json<T: DeserializeOwned>(&self) -> Result<T, ClientError> {
        serde_json::from_slice(&self.body).map_err(|_| self.unreadable("not the expected JSON".to_owned()))
    }

    fn unreadable(&self, reason: String) -> ClientError {
        ClientError::Decode {
            endpoint: self.endpoint.clone(),
            status: self.status,
            reason,
        }
    }

    /// What the headers say.
    pub(super) fn meta(&self, attempts: u32) -> Meta {
        let owned = |name| self.header(name).map(str::to_owned);
        Meta {
            status: self.status,
            index: self
                .header(headers::X_HSM_INDEX)
                .and_then(|index| index.parse().ok()),
            stale: self.header(headers::X_HSM_STALE) == Some("true"),
            node: owned(headers::X_HSM_NODE),
            request_id: owned(headers::X_REQUEST_ID),
            endpoint: self.endpoint.clone(),
            attempts,
        }
    }
}
