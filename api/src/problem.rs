//! The body of every error: RFC 9457 `application/problem+json`, with the member `error` that
//! v1's clients read. `detail` is for the caller: it must never carry what only the operator may
//! know, nor any secret.

use serde::{Deserialize, Serialize};

use crate::code::ErrorCode;

/// `Content-Type` of every error.
pub const CONTENT_TYPE: &str = "application/problem+json";

/// An error as it goes over the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Always `about:blank`: `code` says which problem it is.
    #[serde(rename = "type", default = "about_blank")]
    pub kind: String,
    /// The status in words, as RFC 9457 wants it for `about:blank`.
    #[serde(default)]
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened and what to do about it.
    #[serde(default)]
    pub detail: String,
    /// The stable code. A text, because a newer node may send one this version does not know.
    pub code: String,
    /// Names this request in the nodes' logs.
    #[serde(default)]
    pub request_id: String,
    /// Whether the same request may succeed later or on another node.
    #[serde(default)]
    pub retryable: bool,
    /// v1's text.
    #[serde(default)]
    pub error: String,
}

fn about_blank() -> String {
    "about:blank".to_owned()
}

impl Problem {
    /// The body for a code.
    #[must_use]
    pub fn new(code: ErrorCode, detail: impl Into<String>, request_id: impl Into<String>) -> Self {
        Self {
            kind: about_blank(),
            title: reason_phrase(code.status()).to_owned(),
            status: code.status(),
            detail: detail.into(),
            code: code.as_str().to_owned(),
            request_id: request_id.into(),
            retryable: code.retryable(),
            error: code.v1_text().to_owned(),
        }
    }

    /// With another v1 text: `internal` is `encryption failed` on one route of v1 and
    /// `decryption failed` on the other.
    #[must_use]
    pub fn with_v1_text(mut self, text: &str) -> Self {
        text.clone_into(&mut self.error);
        self
    }

    /// The code, if this version knows it.
    #[must_use]
    pub fn error_code(&self) -> Option<ErrorCode> {
        self.code.parse().ok()
    }
}

/// The phrase RFC 9110 gives a status the API uses.
#[must_use]
pub const fn reason_phrase(status: u16) -> &'static str {
    match status {
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        413 => "Content Too Large",
        415 => "Unsupported Media Type",
        422 => "Unprocessable Content",
        429 => "Too Many Requests",
        500 => "Internal Server Error",
        503 => "Service Unavailable",
        412 => "Precondition Failed",
        _ => "Error",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn the_body_has_rfc_9457_members_ours_and_v1s() {
        let problem = Problem::new(
            ErrorCode::KeyVersionNotReady,
            "exchange-key: version 7 is being imported",
            "01J",
        );
        assert_eq!(
            serde_json::to_value(&problem).unwrap(),
            json!({
                "type": "about:blank",
                "title": "Service Unavailable",
                "status": 503,
                "detail": "exchange-key: version 7 is being imported",
                "code": "key_version_not_ready",
                "request_id": "01J",
                "retryable": true,
                "error": "key version not ready",
            })
        );
    }

    #[test]
    fn a_v1_client_finds_its_text() {
        #[derive(Deserialize)]
        struct V1Error {
            error: String,
        }
        let problem = Problem::new(ErrorCode::Internal, "", "01J").with_v1_text("encryption failed");
        let body = serde_json::to_string(&problem).unwrap();
        assert_eq!(
            serde_json::from_str::<V1Error>(&body).unwrap().error,
            "encryption failed"
        );
    }

    #[test]
    fn every_code_has_a_title_and_round_trips() {
        for &code in ErrorCode::ALL {
            let problem = Problem::new(code, "d", "r");
            assert_ne!(problem.title, "Error", "{code}");
            let body = serde_json::to_vec(&problem).unwrap();
            let read: Problem = serde_json::from_slice(&body).unwrap();
            assert_eq!(read, problem);
            assert_eq!(read.error_code(), Some(code));
        }
    }

    #[test]
    fn a_problem_of_a_later_version_is_still_read() {
        let body: Value = json!({"status": 503, "code": "moon_phase", "retryable": true, "new_member": [1]});
        let problem: Problem = serde_json::from_value(body).unwrap();
        assert_eq!(
            (problem.error_code(), problem.retryable, problem.status),
            (None, true, 503)
        );
    }
}
