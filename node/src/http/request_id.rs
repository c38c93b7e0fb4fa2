//! A name for each request, the caller's own where it gave one, so that one request can be found
//! in the logs of every node it touched.

use std::fmt;
use std::sync::Arc;

use axum::http::{HeaderMap, HeaderValue};
use ulid::Ulid;

/// Longest id taken from a caller.
const MAX: usize = 64;

/// Names one request. An extension of every request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestId(Arc<str>);

impl RequestId {
    /// The caller's `X-Request-Id` if it is harmless in a log, else a new one.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Self {
        headers
            .get(hsm_api::headers::X_REQUEST_ID)
            .and_then(|value| value.to_str().ok())
            .filter(|text| harmless(text))
            .map_or_else(Self::new, Self::from_text)
    }

    /// A new one.
    #[must_use]
    #[allow(clippy::new_without_default)] // Two calls give different values.
    pub fn new() -> Self {
        Self(Arc::from(Ulid::new().to_string()))
    }

    pub(crate) fn from_text(text: &str) -> Self {
        Self(Arc::from(text))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(crate) fn header_value(&self) -> Option<HeaderValue> {
        HeaderValue::from_str(&self.0).ok()
    }
}

fn harmless(text: &str) -> bool {
    (1..=MAX).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn of(value: &[u8]) -> RequestId {
        let mut headers = HeaderMap::new();
        headers.insert("x-request-id", HeaderValue::from_bytes(value).unwrap());
        RequestId::of(&headers)
    }

    #[test]
    fn a_callers_id_is_kept() {
        assert_eq!(of(b"3f2c-a.b_C").as_str(), "3f2c-a.b_C");
    }

    #[test]
    fn an_id_that_could_forge_a_log_line_is_replaced() {
        let long = "x".repeat(65);
        for value in [
            &b""[..],
            b"a b",
            b"a\"b",
            b"a\tb",
            "ü".as_bytes(),
            long.as_bytes(),
        ] {
            let id = of(value);
            assert_ne!(id.as_str().as_bytes(), value);
            assert_eq!(id.as_str().len(), 26);
        }
    }

    #[test]
    fn two_new_ids_differ() {
        assert_ne!(RequestId::new(), RequestId::new());
    }
}
