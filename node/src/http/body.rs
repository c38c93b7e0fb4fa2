//! Reading a request's body into memory that is wiped, within the limits of one request and of
//! all requests together.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::http::{HeaderMap, header};
use hsm_api::ErrorCode;
use http_body_util::BodyExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::problem::ApiError;

/// Bodies in memory at once, over all connections.
const BUDGET_KIB: usize = 512 * 1024;
/// A body that has not arrived by then is given up: it holds part of the budget.
const ARRIVAL: Duration = Duration::from_secs(30);
/// A client that is answered while it still sends may never read the answer. So what is too
/// long is read and thrown away, within reason.
const DISCARD: usize = 16 * 1024 * 1024;
const DISCARD_TIME: Duration = Duration::from_secs(5);

/// The limits of bodies.
#[derive(Clone)]
pub(crate) struct BodyLimits {
    max: usize,
    budget: Arc<Semaphore>,
}

/// A body, and its part of the budget for as long as it lives.
pub(crate) struct Received {
    pub(crate) bytes: Zeroizing<Vec<u8>>,
    _part: OwnedSemaphorePermit,
}

impl BodyLimits {
    pub(crate) fn new(max: usize) -> Self {
        Self {
            max,
            budget: Arc::new(Semaphore::new(BUDGET_KIB)),
        }
    }

    pub(crate) async fn receive(&self, headers: &HeaderMap, mut body: Body) -> Result<Received, ApiError> {
        let announced = body
            .size_hint()
            .exact()
            .and_then(|length| usize::try_from(length).ok());
        if announced.is_some_and(|length| length > self.max) {
            discard(headers, &mut body).await;
            return Err(self.too_large());
        }
        let expected = announced.unwrap_or(self.max);
        let kib = u32::try_from(expected.div_ceil(1024)).unwrap_or(u32::MAX);
        let part = Arc::clone(&self.budget)
            .try_acquire_many_owned(kib)
            .map_err(|_| {
                ApiError::new(ErrorCode::Overloaded).operator("too many request bodies in memory")
            })?;
        // Its full size at once where it is known, so that growing leaves no copies behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(announced.unwrap_or(4096)));
        let whole = timeout(ARRIVAL, async {
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|error| {
                    ApiError::new(ErrorCode::InvalidArgument)
                        .detail("the request body ended before it was complete")
                        .operator(error.to_string())
                })?;
                let Ok(data) = frame.into_data() else { continue };
                if bytes.len() + data.len() > self.max {
                    return Ok(false);
                }
                bytes.extend_from_slice(&data);
            }
            Ok::<_, ApiError>(true)
        })
        .await;
        match whole {
            Ok(Ok(true)) => Ok(Received { bytes, _part: part }),
            Ok(Ok(false)) => {
                discard(headers, &mut body).await;
                Err(self.too_large())
            }
            Ok(Err(error)) => Err(error),
            Err(_) => Err(ApiError::new(ErrorCode::InvalidArgument).detail(format!(
                "the request body did not arrive within {} seconds",
                ARRIVAL.as_secs()
            ))),
        }
    }

    fn too_large(&self) -> ApiError {
        ApiError::new(ErrorCode::BodyTooLarge).detail(format!("the body is larger than {} bytes", self.max))
    }
}

async fn discard(headers: &HeaderMap, body: &mut Body) {
    if headers.contains_key(header::EXPECT) {
        // The client waits for a word before it sends; the answer is that word.
        return;
    }
    let _ = timeout(DISCARD_TIME, async {
        let mut left = DISCARD;
        while let Some(Ok(frame)) = body.frame().await {
            let length = frame.data_ref().map_or(0, |data| data.len());
            match left.checked_sub(length) {
                Some(rest) => left = rest,
                None => break,
            }
        }
    })
    .await;
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    async fn receive(limits: &BodyLimits, body: Body) -> Result<Vec<u8>, ErrorCode> {
        let received = limits.receive(&HeaderMap::new(), body).await;
        received
            .map(|received| received.bytes.to_vec())
            .map_err(|error| error.code())
    }

    fn unannounced(chunks: Vec<&'static str>) -> Body {
        Body::from_stream(futures_util::stream::iter(
            chunks.into_iter().map(Ok::<_, std::io::Error>),
        ))
    }

    #[tokio::test]
    async fn a_body_within_the_limit_is_read_whole() {
        let limits = BodyLimits::new(8);
        assert_eq!(
            receive(&limits, Body::from("12345678")).await.unwrap(),
            b"12345678"
        );
        assert_eq!(
            receive(&limits, unannounced(vec!["1234", "5678"])).await.unwrap(),
            b"12345678"
        );
        assert_eq!(receive(&limits, Body::empty()).await.unwrap(), b"");
    }

    #[tokio::test]
    async fn a_longer_one_is_refused_announced_or_not() {
        let limits = BodyLimits::new(8);
        let refused = Err(ErrorCode::BodyTooLarge);
        assert_eq!(receive(&limits, Body::from("123456789")).await, refused);
        assert_eq!(
            receive(&limits, unannounced(vec!["12345678", "9"])).await,
            refused
        );
    }

    #[tokio::test]
    async fn the_budget_is_given_back() {
        let limits = BodyLimits::new(1024);
        let held = limits
            .receive(&HeaderMap::new(), Body::from(vec![0_u8; 1024]))
            .await
            .unwrap();
        assert_eq!(limits.budget.available_permits(), BUDGET_KIB - 1);
        drop(held);
        assert_eq!(limits.budget.available_permits(), BUDGET_KIB);
    }

    #[tokio::test]
    async fn a_spent_budget_sheds_load() {
        let limits = BodyLimits {
            max: 1024,
            budget: Arc::new(Semaphore::new(0)),
        };
        assert_eq!(
            receive(&limits, Body::from("x")).await,
            Err(ErrorCode::Overloaded)
        );
    }
}
