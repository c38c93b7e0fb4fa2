//! Reading a request's body into memory that is wiped, within the limits of one request, of its principal and
//! of all requests together. Memory is taken as bytes arrive, never for what was only announced.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody};
use hsm_api::ErrorCode;
use http_body_util::BodyExt;
use tokio::time::{Instant, timeout_at};
use zeroize::Zeroizing;

use super::problem::ApiError;
use super::shares::{Full, Share, Shares};
use crate::identity::Principal;

/// Bodies in memory at once, over all connections.
const BUDGET: usize = 512 << 20;
/// One principal gets this part of it at most, and one whole body in any case.
const PRINCIPALS_PART: usize = 8;
/// A body that does not go on, or that has not arrived at last, is given up: it holds part of the budget.
const PATIENCE: Patience = Patience {
    silence: Duration::from_secs(30),
    whole: Duration::from_secs(300),
};
/// The calls of administrators are small, and have a budget that applications cannot fill.
const ADMIN_MAX: usize = 64 << 10;
const ADMIN_BUDGET: usize = 8 << 20;
/// Except files: lists of revoked certificates.
const UPLOAD_MAX: usize = 8 << 20;
const UPLOAD_BUDGET: usize = 32 << 20;
const ADMIN_PATIENCE: Patience = Patience {
    silence: Duration::from_secs(10),
    whole: Duration::from_secs(10),
};

/// How long a body may take.
#[derive(Debug, Clone, Copy)]
struct Patience {
    /// Without a byte.
    silence: Duration,
    /// In all.
    whole: Duration,
}

/// The limits of bodies.
#[derive(Clone)]
pub struct BodyLimits {
    max: usize,
    /// What a body may have that is no batch, where some are.
    single: Option<usize>,
    patience: Patience,
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
    /// Of the data plane. Which of the two limits is a body's own is known when it has been read.
    pub(crate) fn data(single: usize, batch: usize) -> Self {
        Self {
            single: Some(single),
            ..Self::with(single.max(batch), PATIENCE, BUDGET)
        }
    }

    /// Of administrators' calls.
    #[must_use]
    pub fn admin() -> Self {
        Self::with(ADMIN_MAX, ADMIN_PATIENCE, ADMIN_BUDGET)
    }

    /// Of files that administrators send.
    #[must_use]
    pub fn uploads() -> Self {
        Self::with(UPLOAD_MAX, PATIENCE, UPLOAD_BUDGET)
    }

    fn with(max: usize, patience: Patience, budget: usize) -> Self {
        Self {
            max,
            single: None,
            patience,
            budget: Shares::new(budget, (budget / PRINCIPALS_PART).max(max)),
        }
    }

    pub(crate) async fn receive(&self, principal: &Principal, mut body: Body) -> Result<Received, ApiError> {
        let announced = body
            .size_hint()
            .exact()
            .and_then(|length| usize::try_from(length).ok());
        match announced {
            Some(length) if length > self.max => Err(self.too_large()),
            _ => self.arrive(principal, announced, &mut body).await,
        }
    }

    /// Refuses a body that was not read to its end: nobody knows whether it would have been a batch.
    fn too_large(&self) -> ApiError {
        match self.single {
            Some(single) if single < self.max => ApiError::new(ErrorCode::BodyTooLarge).detail(format!(
                "the body is larger than {} bytes, which a batch may have; a single request may have {single}",
                self.max
            )),
            _ => too_large(self.max),
        }
    }

    async fn arrive(
        &self,
        principal: &Principal,
        announced: Option<usize>,
        body: &mut Body,
    ) -> Result<Received, ApiError> {
        let mut bytes = Zeroizing::new(Vec::new());
        let mut share = self.budget.open(principal);
        let Patience { silence, whole } = self.patience;
        let (mut heard, end) = (Instant::now(), Instant::now() + whole);
        loop {
            let next = timeout_at(end.min(heard + silence), body.frame());
            let Ok(frame) = next.await else {
                let now = Instant::now();
                return Err(if now >= end { late(whole) } else { silent(silence) });
            };
            let Some(frame) = frame else { break };
            let frame = frame.map_err(|error| {
                ApiError::new(ErrorCode::InvalidArgument)
                    .detail("the request body ended before it was complete")
                    .operator(error.to_string())
            })?;
            let Ok(data) = frame.into_data() else { continue };
            if bytes.len() + data.len() > self.max {
                return Err(self.too_large());
            }
            if !data.is_empty() {
                heard = Instant::now();
            }
            append(&mut bytes, &mut share, &data, announced.unwrap_or(self.max))?;
        }
        Ok(Received {
            bytes,
            part: Arc::new(share),
        })
    }
}

/// A body that has arrived may still be larger than what it asks for allows.
pub(super) fn too_large(max: usize) -> ApiError {
    ApiError::new(ErrorCode::BodyTooLarge).detail(format!("the body is larger than {max} bytes"))
}

/// Takes memory for what is made of a body besides its own bytes. To be called before a job holds the share too.
pub(super) fn take_more(part: &mut Arc<Share>, more: usize) -> Result<(), ApiError> {
    match Arc::get_mut(part) {
        Some(share) => share.take(more).map_err(overloaded),
        None => Ok(()),
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

fn late(after: Duration) -> ApiError {
    ApiError::new(ErrorCode::InvalidArgument).detail(format!(
        "the request body did not arrive within {} seconds",
        after.as_secs()
    ))
}

fn silent(after: Duration) -> ApiError {
    ApiError::new(ErrorCode::InvalidArgument).detail(format!(
        "nothing of the request body arrived for {} seconds",
        after.as_secs()
    ))
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
    use futures_util::stream::{self, StreamExt};
    use tokio::time::{sleep, timeout};

    use super::*;
    use crate::http::tests::fake::principal;

    /// Milliseconds.
    fn brief(whole: u64, silence: u64) -> Patience {
        Patience {
            silence: Duration::from_millis(silence),
            whole: Duration::from_millis(whole),
        }
    }

    async fn of(limits: &BodyLimits, cn: &str, body: Body) -> Result<Received, ErrorCode> {
        let received = limits.receive(&principal(cn, None), body).await;
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
        let limits = BodyLimits::with(8, PATIENCE, BUDGET);
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
        let limits = BodyLimits::with(8, PATIENCE, BUDGET);
        let refused = Err(ErrorCode::BodyTooLarge);
        assert_eq!(receive(&limits, Body::from("123456789")).await, refused);
        assert_eq!(
            receive(&limits, unannounced(vec!["12345678", "9"])).await,
            refused
        );
    }

    #[tokio::test]
    async fn a_refusal_names_the_limit_that_was_met() {
        let refused = async |limits: BodyLimits, length: usize| {
            let body = Body::from(vec![b'x'; length]);
            let received = limits.receive(&principal("a", None), body).await;
            received.err().unwrap().caller_detail().to_owned()
        };
        assert_eq!(
            refused(BodyLimits::data(8, 32), 33).await,
            "the body is larger than 32 bytes, which a batch may have; a single request may have 8"
        );
        // A single request may have more than a batch, and an administrator sends no batches.
        for limits in [BodyLimits::data(64, 32), BodyLimits::with(64, PATIENCE, BUDGET)] {
            assert_eq!(refused(limits, 65).await, "the body is larger than 64 bytes");
        }
    }

    #[tokio::test]
    async fn a_body_that_does_not_arrive_is_given_up() {
        for patience in [brief(20, 10_000), brief(10_000, 20)] {
            let limits = BodyLimits::with(8, patience, 100);
            assert_eq!(
                receive(&limits, endless("1234")).await,
                Err(ErrorCode::InvalidArgument)
            );
            assert_eq!(limits.budget.taken(), (0, 0));
        }
    }

    /// A piece every 50 ms.
    fn steady(pieces: usize) -> Body {
        let pieces = stream::iter(0..pieces).then(|_| async {
            sleep(Duration::from_millis(50)).await;
            Ok::<_, std::io::Error>("x")
        });
        Body::from_stream(pieces)
    }

    #[tokio::test]
    async fn a_slow_body_is_waited_for_while_it_goes_on_but_not_without_end() {
        // Silent for less than three seconds at a time, also on a machine that stands still for one of them.
        let limits = BodyLimits::with(1000, brief(60_000, 3_000), 10_000);
        assert_eq!(receive(&limits, steady(75)).await.unwrap().len(), 75);
        let limits = BodyLimits::with(1000, brief(200, 3_000), 10_000);
        assert_eq!(
            receive(&limits, steady(75)).await,
            Err(ErrorCode::InvalidArgument)
        );
    }

    #[tokio::test]
    async fn the_budget_is_given_back_with_the_last_holder() {
        let limits = BodyLimits::with(1024, PATIENCE, BUDGET);
        let Received { bytes, part } = of(&limits, "a", Body::from(vec![0_u8; 1024])).await.unwrap();
        assert_eq!(limits.budget.taken(), (1024, 1));
        let answer = Arc::clone(&part);
        drop((bytes, part));
        assert_eq!(limits.budget.taken(), (1024, 1));
        drop(answer);
        assert_eq!(limits.budget.taken(), (0, 0));
    }

    #[tokio::test]
    async fn what_is_made_of_a_body_is_taken_from_the_same_budget() {
        let limits = BodyLimits::with(100, PATIENCE, 800);
        let mut received = of(&limits, "a", Body::from(vec![0_u8; 60])).await.unwrap();
        take_more(&mut received.part, 40).unwrap();
        assert_eq!(limits.budget.taken(), (100, 1));
        let refused = take_more(&mut received.part, 1).unwrap_err();
        assert_eq!(refused.code(), ErrorCode::Overloaded);
        drop(received);
        assert_eq!(limits.budget.taken(), (0, 0));
    }

    #[tokio::test]
    async fn memory_is_taken_for_what_has_come() {
        let limits = BodyLimits::with(1 << 20, PATIENCE, BUDGET);
        let caller = principal("a", None);
        let arriving = limits.receive(&caller, endless("0123456789"));
        tokio::pin!(arriving);
        let early = timeout(Duration::from_millis(50), arriving.as_mut()).await;
        assert!(early.is_err());
        assert_eq!(limits.budget.taken(), (10, 1));
    }

    #[tokio::test]
    async fn a_spent_budget_sheds_load() {
        let limits = BodyLimits::with(1024, PATIENCE, 2048);
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
        let limits = BodyLimits::with(100, PATIENCE, 1600);
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
}
