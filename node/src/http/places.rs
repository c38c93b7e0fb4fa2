//! The places that connections take. A few are for those that have shown no certificate yet: while they are
//! taken, further ones wait in the kernel, and only slow ones have to end. The rest are for clients, and what is
//! left of them is not for a principal that has its part (`docs/decisions/007-connection-places.md`).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::sleep;

use super::brief::{BriefPlaces, Room};
use super::shares::{Full, Share, Shares};
use crate::identity::Principal;

/// Connections in handshake at once. They come on top of `server.limits.max_connections`.
pub const HANDSHAKES: usize = 256;
/// One principal gets this part of all places in any case, and [`PRINCIPALS_LEAST`]. It gets more while at least
/// this part of all is free.
const PRINCIPALS_PART: usize = 4;
const PRINCIPALS_LEAST: usize = 64;

/// Open connections and the places they have. Clones are the same.
#[derive(Clone)]
pub struct OpenConnections {
    handshakes: BriefPlaces,
    places: Arc<Semaphore>,
    max: usize,
    each: usize,
    shares: Arc<Shares>,
    // Not what the semaphores say: one place is always held by the accept loop that waits.
    open: Arc<AtomicUsize>,
    listeners: Arc<AtomicUsize>,
}

/// Counts one connection, or listener, until it is dropped.
#[must_use]
pub struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        // With `none_left`: a listener that is gone has let in, for whoever sees that, all that it ever did.
        self.0.fetch_sub(1, Ordering::Release);
    }
}

/// A client's right to a place. Given back when dropped.
pub(super) struct Claim {
    share: Share,
    places: Arc<Semaphore>,
}

impl Claim {
    /// Waits for the place.
    pub(super) async fn place(self) -> Option<Place> {
        // Never closed.
        let permit = self.places.acquire_owned().await.ok()?;
        Some(Place {
            _share: self.share,
            _permit: permit,
        })
    }
}

/// A client's place, and its part of what its principal may have. Given back when dropped.
pub(super) struct Place {
    _share: Share,
    _permit: OwnedSemaphorePermit,
}

impl OpenConnections {
    /// With room for `max` clients.
    #[must_use]
    pub fn new(max: usize) -> Self {
        Self::with(max, (max / PRINCIPALS_PART).max(PRINCIPALS_LEAST), HANDSHAKES)
    }

    /// With room for `max` clients, of which one principal has `each` in any case.
    pub(super) fn with(max: usize, each: usize, handshakes: usize) -> Self {
        let max = max.min(Semaphore::MAX_PERMITS);
        Self {
            handshakes: BriefPlaces::new(handshakes),
            places: Arc::new(Semaphore::new(max)),
            max,
            each,
            // The semaphore bounds the sum: for it a client may wait.
            shares: Shares::new(usize::MAX, each),
            open: Arc::default(),
            listeners: Arc::default(),
        }
    }

    /// How many are open, those in handshake included.
    #[must_use]
    pub fn count(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// How many one principal may have in any case.
    pub(super) fn each(&self) -> usize {
        self.each
    }

    pub(super) fn enter(&self) -> Counted {
        self.open.fetch_add(1, Ordering::Relaxed);
        Counted(Arc::clone(&self.open))
    }

    /// A listener that goes on letting connections in: until it ends none of them is the last.
    pub fn listen(&self) -> Counted {
        self.listeners.fetch_add(1, Ordering::Relaxed);
        Counted(Arc::clone(&self.listeners))
    }

    /// Waits until another connection may be accepted, and has a place for its handshake.
    pub(super) async fn room(&self) -> Option<Room> {
        self.handshakes.room().await
    }

    /// For a client that has shown who it is. Refused if its principal has its part, and little is left for the
    /// others.
    pub(super) fn claim(&self, principal: &Principal) -> Result<Claim, Full> {
        let mut share = self.shares.open(principal);
        match share.take(1) {
            Err(Full::Principal) if self.is_roomy() => share.take_beyond(1),
            taken => taken?,
        }
        Ok(Claim {
            share,
            places: Arc::clone(&self.places),
        })
    }

    fn is_roomy(&self) -> bool {
        let free = self.places.available_permits();
        free > 0 && free.saturating_mul(PRINCIPALS_PART) >= self.max
    }

    /// Waits until none is left, and none is let in any more. Looks now and then: this is the last thing a process does.
    pub async fn none_left(&self) {
        // The listeners first: none of them may let anybody in after the others were counted.
        while self.listeners.load(Ordering::Acquire) > 0 || self.open.load(Ordering::Acquire) > 0 {
            sleep(Duration::from_millis(20)).await;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::http::tests::fake::principal;

    async fn place(open: &OpenConnections, principal: &Principal) -> Result<Place, Full> {
        Ok(open.claim(principal)?.place().await.unwrap())
    }

    #[tokio::test]
    async fn a_principal_cannot_take_the_others_places() {
        let open = OpenConnections::with(8, 2, 1);
        let (a, b, c) = (principal("a", None), principal("b", None), principal("c", None));
        let mut of_a = Vec::new();
        // More than its part, as long as a quarter is free.
        while let Ok(place) = place(&open, &a).await {
            of_a.push(place);
        }
        assert_eq!(of_a.len(), 7);
        let _of_b = place(&open, &b).await.unwrap();
        // None is left: a client within its part waits for its place.
        let mut waiting = Box::pin(place(&open, &c));
        assert!(waiting.as_mut().now_or_never().is_none());
        assert_eq!(place(&open, &a).await.err(), Some(Full::Principal));
        drop(of_a.pop());
        let _of_c = waiting.await.unwrap();
        assert_eq!(place(&open, &a).await.err(), Some(Full::Principal));
        of_a.truncate(1);
        assert!(place(&open, &a).await.is_ok());
    }

    #[tokio::test]
    async fn a_claim_that_is_given_up_takes_nothing() {
        let open = OpenConnections::with(1, 2, 1);
        let a = principal("a", None);
        let _first = place(&open, &a).await.unwrap();
        for _ in 0..3 {
            let waiting = open.claim(&a).unwrap().place();
            assert!(waiting.now_or_never().is_none());
        }
    }

    /// How many places one principal gets of a node that nobody else uses, and of one that is nearly full.
    async fn alone(max: usize) -> (usize, usize) {
        let (a, b) = (principal("a", None), principal("b", None));
        let most = async |open: &OpenConnections, enough: usize| {
            let mut places = Vec::new();
            while places.len() < enough {
                let Ok(place) = place(open, &a).await else { break };
                places.push(place);
            }
            places.len()
        };
        let empty = most(&OpenConnections::new(max), max).await;
        let open = OpenConnections::new(max);
        let mut of_b = Vec::new();
        for _ in 0..max * 3 / 4 {
            let Ok(place) = place(&open, &b).await else { break };
            of_b.push(place);
        }
        let free = open.places.available_permits();
        // Within its part it would wait for more.
        (empty, most(&open, free).await)
    }

    #[tokio::test]
    async fn one_principal_gets_a_quarter_in_any_case_and_leaves_one_free() {
        assert_eq!(alone(400).await, (301, 100));
        assert_eq!(alone(100).await, (76, 25));
    }
}
