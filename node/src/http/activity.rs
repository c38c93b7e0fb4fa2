//! What goes on on a connection: requests in hand, and answers that have not left yet. One on which nobody asks
//! any more, or whose client does not read, holds a place and memory for nothing and is ended. Pings, settings
//! and window updates are no activity.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Buf, Frame, SizeHint};
use tokio::time::{Instant, sleep_until};

/// How long a connection may do nothing.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// Without a request.
    pub(super) idle: Duration,
    /// Without taking a byte of any one answer that waits.
    pub(super) stalled: Duration,
}

/// Why a connection is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// No request for too long.
    Idle,
    /// The client does not read its answers.
    Stalled,
}

/// See the module.
pub(super) struct Activity {
    state: Mutex<State>,
}

struct State {
    /// Requests without an answer.
    asked: usize,
    /// Answers that have not left yet, by number.
    waiting: HashMap<u64, Waiting>,
    next_answer: u64,
    /// When a request last came, or the last of its answer left.
    used: Instant,
}

/// An answer. Each is judged by itself: a client must not keep many by reading one.
struct Waiting {
    /// Its body, and pieces of it.
    parts: usize,
    /// When a byte of it last left, or it began to wait.
    moved: Instant,
}

impl State {
    /// Why the connection is over, or when to look again.
    fn judge(&self, patience: Patience, now: Instant) -> Result<Instant, Ending> {
        // Whatever begins after this look ends no earlier than this.
        let next = now + patience.idle.min(patience.stalled);
        let oldest = self.waiting.values().map(|answer| answer.moved).min();
        let (end, ending) = if let Some(moved) = oldest {
            (moved + patience.stalled, Ending::Stalled)
        } else if self.asked > 0 {
            return Ok(next);
        } else {
            (self.used + patience.idle, Ending::Idle)
        };
        if end <= now {
            Err(ending)
        } else {
            Ok(end.min(next))
        }
    }
}

impl Activity {
    /// A connection begins, and waits for its first request.
    pub(super) fn begin() -> Arc<Self> {
        let now = Instant::now();
        Arc::new(Self {
            state: Mutex::new(State {
                asked: 0,
                waiting: HashMap::new(),
                next_answer: 0,
                used: now,
            }),
        })
    }

    /// A request has come.
    pub(super) fn ask(self: &Arc<Self>) -> Asked {
        let mut state = self.state();
        state.asked += 1;
        state.used = Instant::now();
        Asked(Arc::clone(self))
    }

    /// Waits until there has been nothing for too long.
    pub(super) async fn over(&self, patience: Patience) -> Ending {
        loop {
            let judged = self.state().judge(patience, Instant::now());
            match judged {
                Ok(when) => sleep_until(when).await,
                Err(ending) => return ending,
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request in hand, until it is dropped.
pub(super) struct Asked(Arc<Activity>);

impl Drop for Asked {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.asked = state.asked.saturating_sub(1);
        state.used = Instant::now();
    }
}

/// Something of an answer that waits to be sent, until it is dropped.
struct Unsent {
    activity: Arc<Activity>,
    answer: u64,
}

impl Unsent {
    /// A new answer.
    fn new(activity: &Arc<Activity>) -> Self {
        let mut state = activity.state();
        let answer = state.next_answer;
        state.next_answer += 1;
        let moved = Instant::now();
        state.waiting.insert(answer, Waiting { parts: 1, moved });
        Self {
            activity: Arc::clone(activity),
            answer,
        }
    }

    /// A further part of the same answer.
    fn part(&self) -> Self {
        if let Some(waiting) = self.activity.state().waiting.get_mut(&self.answer) {
            waiting.parts += 1;
        }
        Self {
            activity: Arc::clone(&self.activity),
            answer: self.answer,
        }
    }

    fn moved(&self) {
        if let Some(waiting) = self.activity.state().waiting.get_mut(&self.answer) {
            waiting.moved = Instant::now();
        }
    }
}

impl Drop for Unsent {
    fn drop(&mut self) {
        let mut state = self.activity.state();
        let now = Instant::now();
        state.used = now;
        let Some(waiting) = state.waiting.get_mut(&self.answer) else {
            return;
        };
        waiting.parts = waiting.parts.saturating_sub(1);
        waiting.moved = now;
        if waiting.parts == 0 {
            state.waiting.remove(&self.answer);
        }
    }
}

/// An answer's body on its way out.
pub(super) struct Outgoing {
    body: Body,
    unsent: Unsent,
}

impl Outgoing {
    pub(super) fn new(body: Body, activity: &Arc<Activity>) -> Self {
        Self {
            body,
            unsent: Unsent::new(activity),
        }
    }
}

impl HttpBody for Outgoing {
    type Data = Piece;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Piece>, axum::Error>>> {
        let this = self.get_mut();
        let unsent = &this.unsent;
        Pin::new(&mut this.body).poll_frame(cx).map_ok(|frame| {
            frame.map_data(|bytes| Piece {
                bytes,
                unsent: unsent.part(),
            })
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A piece of an answer. HTTP/2 keeps it after the body is gone, until the client's windows let it out.
pub(super) struct Piece {
    bytes: Bytes,
    unsent: Unsent,
}

impl Buf for Piece {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    /// Bytes have gone to the connection's TLS, which takes no more than 64 KiB that are not on the wire.
    fn advance(&mut self, count: usize) {
        if count > 0 {
            self.unsent.moved();
        }
        self.bytes.advance(count);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    const PATIENCE: Patience = Patience {
        idle: Duration::from_secs(120),
        stalled: Duration::from_secs(30),
    };

    /// What a look would say some seconds from now: `Ok` with the seconds until the next look.
    fn after(activity: &Activity, seconds: u64) -> Result<u64, Ending> {
        let now = Instant::now() + Duration::from_secs(seconds);
        let judged = activity.state().judge(PATIENCE, now);
        judged.map(|when| when.duration_since(now).as_secs_f64().round() as u64)
    }

    #[tokio::test]
    async fn a_connection_is_idle_from_its_beginning_and_between_requests() {
        let activity = Activity::begin();
        assert_eq!(after(&activity, 0), Ok(30));
        assert_eq!(after(&activity, 100), Ok(20));
        assert_eq!(after(&activity, 121), Err(Ending::Idle));
        let asked = activity.ask();
        assert_eq!(after(&activity, 1000), Ok(30), "a request in hand is no idleness");
        drop(asked);
        assert_eq!(after(&activity, 121), Err(Ending::Idle));
    }

    #[tokio::test]
    async fn an_answer_that_nobody_reads_stalls_its_connection() {
        let activity = Activity::begin();
        let mut body = Outgoing::new(Body::from("answer"), &activity);
        assert_eq!(after(&activity, 29), Ok(1));
        assert_eq!(after(&activity, 31), Err(Ending::Stalled));
        // The piece lives on when the body is gone, as in HTTP/2.
        let mut piece = body.frame().await.unwrap().unwrap().into_data().ok().unwrap();
        drop(body);
        assert_eq!(after(&activity, 31), Err(Ending::Stalled));
        piece.advance(2);
        assert_eq!((piece.remaining(), piece.chunk()), (4, &b"swer"[..]));
        assert_eq!(after(&activity, 29), Ok(1));
        drop(piece);
        assert_eq!(after(&activity, 31), Ok(30), "there is nothing to read");
        assert_eq!(after(&activity, 121), Err(Ending::Idle));
    }

    #[tokio::test]
    async fn only_bytes_of_an_answer_are_its_progress() {
        let activity = Activity::begin();
        let mut body = Outgoing::new(Body::from("answer"), &activity);
        let mut piece = body.frame().await.unwrap().unwrap().into_data().ok().unwrap();
        let moved = || activity.state().waiting.values().map(|answer| answer.moved).min();
        let before = moved();
        piece.advance(0);
        let asked = activity.ask();
        drop(asked);
        // Nor do those of another answer.
        let mut other = Outgoing::new(Body::from("another"), &activity);
        let mut read = other.frame().await.unwrap().unwrap().into_data().ok().unwrap();
        read.advance(7);
        drop((other, read));
        assert_eq!(moved(), before);
        assert_eq!(after(&activity, 31), Err(Ending::Stalled));
    }

    #[tokio::test]
    async fn the_wait_ends_with_the_connection_at_rest() {
        let activity = Activity::begin();
        let patience = Patience {
            idle: Duration::from_millis(20),
            stalled: Duration::from_secs(30),
        };
        let asked = activity.ask();
        let over = activity.over(patience);
        tokio::pin!(over);
        let early = tokio::time::timeout(Duration::from_millis(100), over.as_mut()).await;
        assert!(early.is_err(), "a request was in hand");
        drop(asked);
        assert_eq!(over.await, Ending::Idle);
    }
}
