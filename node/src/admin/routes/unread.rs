//! A request's body that has not been read yet. It is read for those only who may do what they ask for, within
//! the limits of administrators' calls, into memory that is wiped: it may hold a join token.

use std::convert::Infallible;

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use hsm_api::ErrorCode;
use serde::de::DeserializeOwned;

use crate::admin::call::CallError;
use crate::http::{ApiError, BodyLimits};
use crate::identity::Principal;

/// See the module.
pub(super) struct Unread {
    body: Body,
}

impl<S: Send + Sync> FromRequest<S> for Unread {
    type Rejection = Infallible;

    async fn from_request(request: Request, _: &S) -> Result<Self, Infallible> {
        let body = request.into_body();
        Ok(Self { body })
    }
}

impl Unread {
    /// Reads it if the caller is `allowed` to.
    pub(super) async fn read<T: DeserializeOwned>(
        self,
        allowed: Result<(), CallError>,
        limits: &BodyLimits,
        principal: &Principal,
    ) -> Result<T, ApiError> {
        allowed?;
        let received = limits.receive(principal, self.body).await?;
        parse(&received.bytes)
    }
}

/// An empty body is an empty object. What was sent is not repeated: it may hold a join token.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let bytes: &[u8] = if body.is_empty() { b"{}" } else { body };
    serde_json::from_slice(bytes).map_err(|error| {
        let what = match error.classify() {
            serde_json::error::Category::Data => "a member is missing or of the wrong type",
            _ => "not JSON",
        };
        let detail = format!("{what}, at line {} column {}", error.line(), error.column());
        ApiError::new(ErrorCode::InvalidJson).detail(detail)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::time::Duration;

    use axum::body::Bytes;
    use futures_util::stream;
    use hsm_api::admin::{CreateKekRequest, JoinRequest, RotateRequest};

    use super::*;
    use crate::identity::Identity;

    async fn read<T: DeserializeOwned>(allowed: Result<(), CallError>, body: Body) -> Result<T, ErrorCode> {
        let caller = Principal::new(Identity {
            cn: "root".to_owned(),
            ou: Some("Admin".to_owned()),
            sans: Vec::new(),
            serial: "1".to_owned(),
            issuer_dn: "CN=CA".to_owned(),
            fingerprint: [1; 32],
            spki_sha256: [2; 32],
            not_after: i64::MAX,
        });
        let unread = <Unread as FromRequest<()>>::from_request(Request::new(body), &())
            .await
            .unwrap();
        let read = unread.read(allowed, &BodyLimits::admin(), &caller).await;
        read.map_err(|error| error.code())
    }

    #[tokio::test]
    async fn whoever_may_not_is_answered_before_the_body_has_come() {
        let refused = Err(CallError::new(
            ErrorCode::RoleRequired,
            "needs one of the roles admin",
        ));
        let never = Body::from_stream(stream::pending::<Result<Bytes, std::io::Error>>());
        let answer = tokio::time::timeout(Duration::from_secs(5), read::<RotateRequest>(refused, never));
        assert_eq!(answer.await.unwrap().err(), Some(ErrorCode::RoleRequired));
    }

    #[tokio::test]
    async fn whoever_may_is_read_within_64_kib() {
        let request: CreateKekRequest = read(Ok(()), Body::from(r#"{"context":"c"}"#)).await.unwrap();
        assert_eq!(request.context, "c");
        let padded = |length: usize| Body::from(format!("{{{}}}", " ".repeat(length - 2)));
        assert!(read::<RotateRequest>(Ok(()), padded(64 << 10)).await.is_ok());
        let refused = read::<RotateRequest>(Ok(()), padded((64 << 10) + 1)).await;
        assert_eq!(refused.err(), Some(ErrorCode::BodyTooLarge));
    }

    #[test]
    fn an_empty_body_is_an_empty_object() {
        assert!(parse::<RotateRequest>(b"").is_ok());
        assert!(parse::<RotateRequest>(b"{}").is_ok());
        let error = parse::<RotateRequest>(b"{").unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidJson);
    }

    #[test]
    fn a_body_that_does_not_fit_is_not_repeated() {
        let body = br#"{"token": {"planted": "canary"}, "cluster_ca_sha256": 1}"#;
        let error = parse::<JoinRequest>(body).unwrap_err();
        assert!(!error.to_string().contains("canary"), "{error}");
        assert!(error.caller_detail().contains("line 1"), "{error}");
    }
}
