//! Who calls, from where, under which request id, trace and idempotency key. The layers below have put each
//! into the request; without a certificate there is no caller.

use axum::extract::FromRequestParts;
use axum::http::HeaderMap;
use axum::http::request::Parts;
use hsm_api::ErrorCode;
use raft_store::names::RaftId;
use ulid::Ulid;

use crate::admin::arrival::Arrival;
use crate::admin::call::CallError;
use crate::http::{ApiError, PeerAddr, RequestId, TraceId};
use crate::identity::Principal;

/// Longest `Idempotency-Key`. It is stored with its request.
const MAX_KEY: usize = 128;

/// See the module.
#[derive(Clone)]
pub(super) struct Caller {
    pub(super) principal: Principal,
    pub(super) source: String,
    pub(super) request_id: RequestId,
    pub(super) trace_id: TraceId,
    key: Result<String, CallError>,
}

impl Caller {
    /// What an administrator's call needs to know of its arrival.
    pub(super) fn arrival(&self, via_node: RaftId) -> Result<Arrival<'_>, CallError> {
        Ok(Arrival {
            principal: &self.principal,
            via_node,
            source: self.source.clone(),
            request_id: self.request_id.as_str().to_owned(),
            trace_id: self.trace_id.as_str().to_owned(),
            key: self.key.clone()?,
        })
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let extensions = &parts.extensions;
        let principal = extensions
            .get::<Principal>()
            .cloned()
            .ok_or_else(|| ApiError::new(ErrorCode::NoClientCertificate))?;
        Ok(Self {
            principal,
            source: extensions
                .get::<PeerAddr>()
                .map(|peer| peer.0.to_string())
                .unwrap_or_default(),
            request_id: extensions
                .get::<RequestId>()
                .cloned()
                .unwrap_or_else(RequestId::new),
            trace_id: extensions.get::<TraceId>().cloned().unwrap_or_else(TraceId::new),
            key: idempotency_key(&parts.headers),
        })
    }
}

/// The client's key, or a fresh one: then a repeat is another request.
fn idempotency_key(headers: &HeaderMap) -> Result<String, CallError> {
    let mut given = headers.get_all(hsm_api::headers::IDEMPOTENCY_KEY).iter();
    let Some(value) = given.next() else {
        return Ok(Ulid::new().to_string());
    };
    let text = value.to_str().ok().filter(|_| given.next().is_none());
    let usable =
        |text: &&str| (1..=MAX_KEY).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
    text.filter(usable).map(str::to_owned).ok_or_else(|| {
        CallError::new(
            ErrorCode::InvalidArgument,
            format!("Idempotency-Key: send one, of 1 to {MAX_KEY} visible ASCII characters"),
        )
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn key(values: &[&str]) -> Result<String, ErrorCode> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append("idempotency-key", HeaderValue::from_str(value).unwrap());
        }
        idempotency_key(&headers).map_err(|error| error.code)
    }

    #[test]
    fn a_clients_key_is_kept_and_a_missing_one_is_made() {
        assert_eq!(key(&["01J-a.b"]).unwrap(), "01J-a.b");
        assert_eq!(key(&[]).unwrap().len(), 26);
        assert_ne!(key(&[]), key(&[]));
    }

    #[test]
    fn a_key_that_cannot_be_one_is_refused() {
        let long = "x".repeat(129);
        for values in [&[""][..], &["a b"], &[long.as_str()], &["a", "b"]] {
            assert_eq!(key(values), Err(ErrorCode::InvalidArgument), "{values:?}");
        }
    }
}
