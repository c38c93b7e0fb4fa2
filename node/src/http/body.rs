//! Reading a request's body into memory that is wiped, within the limits of one request, of its principal and
//! of all requests together. Memory is taken as bytes arrive, never for what was only announced.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::http::request::Parts;
use axum::http::{Version, header};
use hsm_api::ErrorCode;
use http_body_util::BodyExt;
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::problem::ApiError;
use super::shares::{Full, Share, Shares};
use crate::identity::Principal;

/// Bodies in memory at once, over all connections.
const BUDGET: usize = 512 << 20;
/// One principal gets this part of it at most, and one whole body in any case.
const PRINCIPALS_PART: usize = 8;
/// A body that has not arrived by then is given up: it holds part of the budget.
const ARRIVAL: Duration = Duration::from_secs(30);
/// The calls of administrators are small, and have a budget that applications cannot fill.
const ADMIN_MAX: usize = 64 << 10;
const ADMIN_BUDGET: usize = 8 << 20;
const ADMIN_ARRIVAL: Duration = Duration::from_secs(10);
/// A client that is answered while it still sends may never read the answer. So what is too
/// long is read and thrown away, within reason.
const DISCARD: usize = 16 * 1024 * 1024;
const DISCARD_TIME: Duration = Duration::from_secs(5);

/// The limits of bodies.
#[derive(Clone)]
pub struct BodyLimits {
    max: usize,
    arrival: Duration,
    /// Bytes.
    budget: Arc<Shares>,
}

/// A body.
pub(crate) struct Received {
    pub(crate) bytes: Zeroizing<Vec<u8>>,
    /// Its part of the budget, to be held for as long as anything that was made of the body is in memory.
    pub(super) part: Arc<Share>,
}

impl BodyLimits {
    /// Of the data plane, with bodies of `max` bytes.
    pub(crate) fn new(max: usize) -> Self {
        Self::with(max, ARRIVAL, BUDGET)
    }

    /// Of administrators' calls.
    #[must_use]
    pub fn admin() -> Self {
        Self::with(ADMIN_MAX, ADMIN_ARRIVAL, ADMIN_BUDGET)
    }

    fn with(max: usize, arrival: Duration, budget: usize) -> Self {
        Self {
            max,
            arrival,
            budget: Shares::new(budget, (budget / PRINCIPALS_PART).max(max)),
        }
    }

    pub(crate) async fn receive(
        &self,
        principal: &Principal,
        head: &Parts,
        mut body: Body,
    ) -> Result<Received, ApiError> {
        let announced = body
            .size_hint()
            .exact()
            .and_then(|length| usize::try_from(length).ok());
        let received = match announced {
            Some(length) if length > self.max => Err(self.too_large()),
            _ => self.arrive(principal, announced, &mut body).await,
        };
        let refused = received.as_ref().err().map(ApiError::code);
        if matches!(refused, Some(ErrorCode::BodyTooLarge | ErrorCode::Overloaded)) {
            discard(head, &mut body).await;
        }
        received
    }

    async fn arrive(
        &self,
        principal: &Principal,
        announced: Option<usize>,
        body: &mut Body,
    ) -> Result<Received, ApiError> {
        let mut bytes = Zeroizing::new(Vec::new());
        let mut share = self.budget.open(principal);
        let whole = timeout(self.arrival, async {
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|error| {
                    ApiError::new(ErrorCode::InvalidArgument)
                        .detail("the request body ended before it was complete")
                        .operator(error.to_string())
                })?;
                let Ok(data) = frame.into_data() else { continue };
                if bytes.len() + data.len() > self.max {
                    return Err(self.too_large());
                }
                append(&mut bytes, &mut share, &data, announced.unwrap_or(self.max))?;
            }
            Ok::<(), ApiError>(())
        })
        .await;
        match whole {
            Ok(Ok(())) => Ok(Received {
                bytes,
                part: Arc::new(share),
            }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(ApiError::new(ErrorCode::InvalidArgument).detail(format!(
                "the request body did not arrive within {} seconds",
                self.arrival.as_secs()
            ))),
        }
    }

    fn too_large(&self) -> ApiError {
        ApiError::new(ErrorCode::BodyTooLarge).detail(format!("the body is larger than {} bytes", self.max))
    }
}

/// Grows by taking memory from the budget first, and without leaving an unwiped copy behind, as `Vec` would.
/// `most` is the length that the body may come to.
fn append(
    bytes: &mut Zeroizing<Vec<u8>>,
    share: &mut Share,
    data: &[u8],
    most: usize,
) -> Result<(), ApiError> {
    let needed = bytes.len() + data.len();
    if needed > bytes.capacity() {
        let capacity = (bytes.capacity() * 2).min(most).max(needed);
        share.take(capacity - bytes.capacity()).map_err(overloaded)?;
        let mut larger = Zeroizing::new(Vec::<u8>::with_capacity(capacity));
        larger.extend_from_slice(bytes.as_slice());
        *bytes = larger;
    }
    bytes.extend_from_slice(data);
    Ok(())
}

fn overloaded(full: Full) -> ApiError {
    let error = ApiError::new(ErrorCode::Overloaded);
    match full {
        Full::Everybody => error.operator("too many request bodies in memory"),
        Full::Principal => error
            .detail("this client's requests in hand fill its part of the memory for bodies")
            .operator("one principal's requests fill its part of the memory for bodies"),
    }
}

async fn discard(head: &Parts, body: &mut Body) {
    // HTTP/2 has a stream for each request: the answer is read whatever is still being sent. And with Expect
    // the client waits for a word before it sends; the answer is that word.
    if head.version >= Version::HTTP_2 || head.headers.contains_key(header::EXPECT) {
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
impl BodyLimits {
    /// Bytes that are taken from the budget.
    pub(super) fn taken(&self) -> usize {
        self.budget.taken().0
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use axum::body::Bytes;
    use axum::http::Request;
    use futures_util::stream::{self, StreamExt};

    use super::*;
    use crate::http::tests::fake::principal;

    fn head() -> Parts {
        Request::new(()).into_parts().0
    }

    async fn of(limits: &BodyLimits, cn: &str, body: Body) -> Result<Received, ErrorCode> {
        let received = limits.receive(&principal(cn, None), &head(), body).await;
        received.map_err(|error| error.code())
    }

    async fn receive(limits: &BodyLimits, body: Body) -> Result<Vec<u8>, ErrorCode> {
        let received = of(limits, "a", body).await;
        received.map(|received| received.bytes.to_vec())
    }

    fn unannounced(chunks: Vec<&'static str>) -> Body {
        Body::from_stream(stream::iter(chunks.into_iter().map(Ok::<_, std::io::Error>)))
    }

    /// Begins, and never ends.
    fn endless(beginning: &'static str) -> Body {
        let beginning = stream::iter([Ok::<_, std::io::Error>(beginning)]);
        Body::from_stream(beginning.chain(stream::pending()))
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
    async fn a_body_that_does_not_arrive_is_given_up() {
        let limits = BodyLimits::with(8, Duration::from_millis(20), 100);
        assert_eq!(
            receive(&limits, endless("1234")).await,
            Err(ErrorCode::InvalidArgument)
        );
        assert_eq!(limits.budget.taken(), (0, 0));
    }

    #[tokio::test]
    async fn the_budget_is_given_back_with_the_last_holder() {
        let limits = BodyLimits::new(1024);
        let Received { bytes, part } = of(&limits, "a", Body::from(vec![0_u8; 1024])).await.unwrap();
        assert_eq!(limits.budget.taken(), (1024, 1));
        let answer = Arc::clone(&part);
        drop((bytes, part));
        assert_eq!(limits.budget.taken(), (1024, 1));
        drop(answer);
        assert_eq!(limits.budget.taken(), (0, 0));
    }

    #[tokio::test]
    async fn memory_is_taken_for_what_has_come() {
        let limits = BodyLimits::new(1 << 20);
        let caller = principal("a", None);
        let (head, slow) = (head(), endless("0123456789"));
        let arriving = limits.receive(&caller, &head, slow);
        tokio::pin!(arriving);
        let early = timeout(Duration::from_millis(50), arriving.as_mut()).await;
        assert!(early.is_err());
        assert_eq!(limits.budget.taken(), (10, 1));
    }

    #[tokio::test]
    async fn a_spent_budget_sheds_load() {
        let limits = BodyLimits::with(1024, ARRIVAL, 2048);
        // Nobody's part is smaller than a body.
        let _a = of(&limits, "a", Body::from(vec![0_u8; 1024])).await.unwrap();
        let _b = of(&limits, "b", Body::from(vec![0_u8; 1024])).await.unwrap();
        assert_eq!(
            of(&limits, "c", Body::from("x")).await.err(),
            Some(ErrorCode::Overloaded)
        );
    }

    #[tokio::test]
    async fn a_principal_that_fills_its_part_leaves_the_others_theirs() {
        let limits = BodyLimits::with(100, ARRIVAL, 1600);
        let body = || Body::from(vec![0_u8; 100]);
        let held = [
            of(&limits, "a", body()).await.unwrap(),
            of(&limits, "a", body()).await.unwrap(),
        ];
        assert_eq!(of(&limits, "a", body()).await.err(), Some(ErrorCode::Overloaded));
        assert!(of(&limits, "b", body()).await.is_ok());
        drop(held);
        assert!(of(&limits, "a", body()).await.is_ok());
    }

    #[test]
    fn a_growing_body_is_moved_into_larger_buffers_and_counted_by_them() {
        let shares = Shares::new(1000, 1000);
        let mut share = shares.open(&principal("a", None));
        let mut bytes = Zeroizing::new(Vec::new());
        for (data, capacity) in [("12", 2), ("3", 4), ("4", 4), ("5", 8), ("6789", 10), ("0", 10)] {
            append(&mut bytes, &mut share, data.as_bytes(), 10).unwrap();
            assert_eq!((bytes.capacity(), shares.taken().0), (capacity, capacity));
        }
        assert_eq!(bytes.as_slice(), b"1234567890");
    }

    #[tokio::test]
    async fn what_is_too_long_is_read_away_in_http1_and_answered_at_once_in_http2() {
        let limits = BodyLimits::new(2);
        let caller = principal("a", None);
        let ask = async |version: Version| {
            let (mut head, body) = (head(), endless("too long"));
            head.version = version;
            let answer = limits.receive(&caller, &head, body);
            timeout(Duration::from_millis(100), answer).await.is_ok()
        };
        assert!(!ask(Version::HTTP_11).await);
        assert!(ask(Version::HTTP_2).await);
        let announced = Body::from(Bytes::from_static(b"too long"));
        assert_eq!(receive(&limits, announced).await, Err(ErrorCode::BodyTooLarge));
    }
}
