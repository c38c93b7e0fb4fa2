//! The one error of the HTTP side. What the caller may read and what only the operator may read
//! are kept apart: the second goes to the log, never into an answer.

use std::fmt;

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hsm_api::{ErrorCode, Problem};

use super::request_id::RequestId;
use crate::policy::Denial;

/// Why a request was not carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    code: ErrorCode,
    /// For the caller.
    detail: String,
    /// For the log.
    operator: Option<String>,
    v1_text: Option<&'static str>,
    retry_after: Option<u32>,
    /// What was asked for, for the audit.
    resource: Option<Box<str>>,
    has_its_line: bool,
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.detail)?;
        match &self.operator {
            Some(text) => write!(f, " ({text})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for ApiError {}

impl ApiError {
    /// With the code's own one-line explanation.
    #[must_use]
    pub fn new(code: ErrorCode) -> Self {
        Self {
            code,
            detail: code.summary().to_owned(),
            operator: None,
            v1_text: None,
            retry_after: code.retry_after(),
            resource: None,
            has_its_line: false,
        }
    }

    /// A fault of the service: the caller learns the request id, the operator the reason.
    #[must_use]
    pub fn internal(operator: impl Into<String>) -> Self {
        Self::new(ErrorCode::Internal).operator(operator)
    }

    /// Says more to the caller. Never what tells a foreign context from an unknown one.
    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = detail.into();
        self
    }

    /// Says more to the operator. Never a secret.
    #[must_use]
    pub fn operator(mut self, operator: impl Into<String>) -> Self {
        self.operator = Some(operator.into());
        self
    }

    /// Another text for v1's clients.
    #[must_use]
    pub fn v1_text(mut self, text: &'static str) -> Self {
        self.v1_text = Some(text);
        self
    }

    /// Names what was asked for, to the audit. Nothing that a caller can make up.
    #[must_use]
    pub fn about(mut self, resource: &str) -> Self {
        self.resource = Some(resource.into());
        self
    }

    /// It is in the audit already, with more than its request says.
    #[must_use]
    pub fn with_its_line(mut self) -> Self {
        self.has_its_line = true;
        self
    }

    /// Seconds after which a retry may be worth it.
    #[must_use]
    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    /// The stable code.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        self.code
    }

    /// What the caller reads.
    #[must_use]
    pub fn caller_detail(&self) -> &str {
        &self.detail
    }

    /// What v1's clients read.
    #[must_use]
    pub fn v1(&self) -> &str {
        self.v1_text.unwrap_or(self.code.v1_text())
    }

    /// What the operator reads besides.
    #[must_use]
    pub fn operator_detail(&self) -> Option<&str> {
        self.operator.as_deref()
    }

    /// What was asked for, if that is known to be there.
    #[must_use]
    pub fn resource(&self) -> Option<&str> {
        self.resource.as_deref()
    }

    /// Whether somebody else has told the audit of it.
    #[must_use]
    pub fn has_its_line(&self) -> bool {
        self.has_its_line
    }

    /// The HTTP status.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// The whole answer.
    #[must_use]
    pub fn render(&self, request_id: &RequestId) -> Response {
        let mut problem = Problem::new(self.code, self.detail.as_str(), request_id.as_str());
        if let Some(text) = self.v1_text {
            problem = problem.with_v1_text(text);
        }
        // A struct of texts and numbers always serialises.
        let body = serde_json::to_vec(&problem).unwrap_or_default();
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static(hsm_api::problem::CONTENT_TYPE),
        );
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// Handlers return the error; the outermost layer, which knows the request's id, makes the body.
impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = self.status();
        response.extensions_mut().insert(self);
        response
    }
}

/// An unknown and a foreign context give one answer, byte for byte; the log knows the difference.
impl From<Denial> for ApiError {
    fn from(denial: Denial) -> Self {
        Self::new(denial.code()).operator(denial.to_string())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    async fn body(error: &ApiError) -> (Response<()>, Problem) {
        let (parts, body) = error.render(&RequestId::from_text("r-1")).into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        (
            Response::from_parts(parts, ()),
            serde_json::from_slice(&bytes).unwrap(),
        )
    }

    #[tokio::test]
    async fn the_caller_never_reads_what_the_operator_does() {
        let error = ApiError::internal("token slot-a: CKR_DEVICE_ERROR").v1_text("encryption failed");
        let (response, problem) = body(&error).await;
        assert_eq!(response.status(), 500);
        assert_eq!(response.headers()["content-type"], "application/problem+json");
        assert_eq!(
            (problem.error.as_str(), problem.request_id.as_str()),
            ("encryption failed", "r-1")
        );
        assert!(!format!("{problem:?}").contains("CKR_DEVICE_ERROR"));
        assert!(error.to_string().contains("CKR_DEVICE_ERROR"));
    }

    #[tokio::test]
    async fn retryable_answers_say_when() {
        let (response, problem) = body(&ApiError::new(ErrorCode::RateLimited)).await;
        assert_eq!((response.status().as_u16(), problem.retryable), (429, true));
        assert_eq!(response.headers()["retry-after"], "1");
        let (response, _) = body(&ApiError::new(ErrorCode::Stale)).await;
        assert!(!response.headers().contains_key("retry-after"));
    }

    #[tokio::test]
    async fn an_unknown_context_and_a_foreign_one_get_the_same_bytes() {
        let denial = |context: &str| Denial::Context {
            ou: "Trading".to_owned(),
            context: context.to_owned(),
            op: "encrypt",
        };
        let (_, foreign) = body(&denial("2fa").into()).await;
        let (_, unknown) = body(&denial("no-such").into()).await;
        assert_eq!(foreign, unknown);
    }
}
