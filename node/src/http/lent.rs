//! A body of an HTTP/1 request that its handler is lent: whatever of it is unread when the request is refused is
//! read away first, within reason. A client that is answered while it still sends may never read the answer.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::{Version, header};
use http_body_util::BodyExt;
use hyper::body::{Frame, SizeHint};
use tokio::time::timeout;

const DISCARD: usize = 16 * 1024 * 1024;
const DISCARD_TIME: Duration = Duration::from_secs(5);

/// See the module. Clones are the same body.
#[derive(Clone)]
pub(super) struct Lent(Arc<Mutex<Inner>>);

struct Inner {
    body: Body,
    /// With Expect the client waits for a word before it sends: asking for the body is that word, and so is an
    /// answer.
    awaited: bool,
}

impl Lent {
    /// Puts itself in the place of the request's body. HTTP/2 has a stream for each request: there the answer is
    /// read whatever is still being sent.
    pub(super) fn of(request: &mut Request) -> Option<Self> {
        if request.version() >= Version::HTTP_2 || request.body().is_end_stream() {
            return None;
        }
        let awaited = request.headers().contains_key(header::EXPECT);
        let body = std::mem::take(request.body_mut());
        let lent = Self(Arc::new(Mutex::new(Inner { body, awaited })));
        *request.body_mut() = Body::new(lent.clone());
        Some(lent)
    }

    /// Reads away what is left of it.
    pub(super) async fn discard(mut self) {
        if self.inner().awaited {
            return;
        }
        let _ = timeout(DISCARD_TIME, async {
            let mut left = DISCARD;
            while let Some(Ok(frame)) = self.frame().await {
                let length = frame.data_ref().map_or(0, Bytes::len);
                match left.checked_sub(length) {
                    Some(rest) => left = rest,
                    None => break,
                }
            }
        })
        .await;
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HttpBody for Lent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let mut inner = self.inner();
        inner.awaited = false;
        Pin::new(&mut inner.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner().body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner().body.size_hint()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::stream::{self, StreamExt};

    use super::*;

    /// A request with pieces of a body that count themselves when they are read.
    fn request(read: &Arc<AtomicUsize>, version: Version, expect: bool) -> Request {
        let read = Arc::clone(read);
        let pieces = stream::iter(0..3).map(move |_| {
            read.fetch_add(1, Ordering::Relaxed);
            Ok::<_, Infallible>(Bytes::from_static(b"piece"))
        });
        let mut request = Request::new(Body::from_stream(pieces));
        *request.version_mut() = version;
        if expect {
            let word = header::HeaderValue::from_static("100-continue");
            request.headers_mut().insert(header::EXPECT, word);
        }
        request
    }

    #[tokio::test]
    async fn what_a_handler_left_is_read_away() {
        let read = Arc::new(AtomicUsize::new(0));
        let mut request = request(&read, Version::HTTP_11, false);
        let lent = Lent::of(&mut request).unwrap();
        let mut body = request.into_body();
        assert!(body.frame().await.unwrap().is_ok());
        drop(body);
        lent.discard().await;
        assert_eq!(read.load(Ordering::Relaxed), 3);
    }

    #[tokio::test]
    async fn a_client_that_waits_for_a_word_is_answered_at_once() {
        let read = Arc::new(AtomicUsize::new(0));
        let mut waits = request(&read, Version::HTTP_11, true);
        Lent::of(&mut waits).unwrap().discard().await;
        assert_eq!(read.load(Ordering::Relaxed), 0);
        // Once it was told to send, it does.
        let mut told = request(&read, Version::HTTP_11, true);
        let lent = Lent::of(&mut told).unwrap();
        assert!(told.body_mut().frame().await.unwrap().is_ok());
        lent.discard().await;
        assert_eq!(read.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn neither_http2_nor_an_empty_body_is_lent() {
        let read = Arc::default();
        assert!(Lent::of(&mut request(&read, Version::HTTP_2, false)).is_none());
        assert!(Lent::of(&mut Request::new(Body::empty())).is_none());
    }
}
