//! The places that connections take. A few are for those that have shown no certificate yet; there the oldest
//! makes room, because an honest handshake takes milliseconds, and so strangers cannot keep clients out. The
//! rest are for clients, and no principal gets all of them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::sleep;

use super::shares::{Full, Share, Shares};
use crate::identity::Principal;

/// Connections in handshake at once. They come on top of `server.limits.max_connections`.
pub const HANDSHAKES: usize = 256;
/// One principal gets this part of all places at most, but [`PRINCIPALS_LEAST`] in any case.
const PRINCIPALS_PART: usize = 4;
const PRINCIPALS_LEAST: usize = 64;

/// Open connections and the places they have. Clones are the same.
#[derive(Clone)]
pub struct OpenConnections {
    handshakes: Arc<Handshakes>,
    places: Arc<Semaphore>,
    shares: Arc<Shares>,
    // Not what the semaphores say: one place is always held by the accept loop that waits.
    open: Arc<AtomicUsize>,
}

/// Counts one connection until it is dropped.
pub(super) struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
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

    /// With room for `max` clients, of which one principal has `each` at most.
    pub(super) fn with(max: usize, each: usize, handshakes: usize) -> Self {
        Self {
            handshakes: Arc::new(Handshakes {
                places: Arc::new(Semaphore::new(handshakes)),
                going: Mutex::default(),
            }),
            places: Arc::new(Semaphore::new(max.min(Semaphore::MAX_PERMITS))),
            // The semaphore bounds the sum: for it a client may wait.
            shares: Shares::new(usize::MAX, each),
            open: Arc::default(),
        }
    }

    /// How many are open, those in handshake included.
    #[must_use]
    pub fn count(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    pub(super) fn enter(&self) -> Counted {
        self.open.fetch_add(1, Ordering::Relaxed);
        Counted(Arc::clone(&self.open))
    }

    /// A place for a handshake; the oldest one ends if there is none left.
    pub(super) async fn arrive(&self) -> Option<Handshake> {
        let handshakes = &self.handshakes;
        let permit = match Arc::clone(&handshakes.places).try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => {
                handshakes.end_oldest();
                Arc::clone(&handshakes.places).acquire_owned().await.ok()?
            }
        };
        Some(handshakes.begin(permit))
    }

    /// A place for a client that has shown who it is. Waits for one, unless its principal has all it may have.
    pub(super) async fn place(&self, principal: &Principal) -> Result<Place, Full> {
        let mut share = self.shares.open(principal);
        share.take(1)?;
        let permit = Arc::clone(&self.places).acquire_owned().await;
        Ok(Place {
            _share: share,
            // Never closed.
            _permit: permit.map_err(|_| Full::Everybody)?,
        })
    }

    /// Waits until none is left. Looks now and then: this is the last thing a process does.
    pub async fn none_left(&self) {
        while self.count() > 0 {
            sleep(Duration::from_millis(20)).await;
        }
    }
}

/// The connections in handshake.
struct Handshakes {
    places: Arc<Semaphore>,
    going: Mutex<Going>,
}

#[derive(Default)]
struct Going {
    next: u64,
    /// By arrival. Whoever's sender is dropped has to end.
    ends: BTreeMap<u64, oneshot::Sender<()>>,
}

impl Handshakes {
    fn begin(self: &Arc<Self>, permit: OwnedSemaphorePermit) -> Handshake {
        let (sender, end) = oneshot::channel();
        let mut going = self.going();
        let number = going.next;
        going.next += 1;
        going.ends.insert(number, sender);
        Handshake {
            of: Arc::clone(self),
            number,
            end,
            _permit: permit,
        }
    }

    fn end_oldest(&self) {
        self.going().ends.pop_first();
    }

    fn going(&self) -> MutexGuard<'_, Going> {
        self.going.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place of a connection that has shown no certificate yet. Given back when dropped.
pub(super) struct Handshake {
    of: Arc<Handshakes>,
    number: u64,
    end: oneshot::Receiver<()>,
    _permit: OwnedSemaphorePermit,
}

impl Handshake {
    /// Ends when it has to make room for a newer one.
    pub(super) async fn evicted(&mut self) {
        // Nothing is ever sent.
        let _ = (&mut self.end).await;
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.of.going().ends.remove(&self.number);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::http::tests::fake::principal;

    #[tokio::test]
    async fn the_oldest_handshake_makes_room() {
        let open = OpenConnections::with(1, 1, 2);
        let mut first = open.arrive().await.unwrap();
        let mut second = open.arrive().await.unwrap();
        let mut third = Box::pin(open.arrive());
        assert!(third.as_mut().now_or_never().is_none());
        first.evicted().await;
        assert!(second.evicted().now_or_never().is_none());
        drop(first);
        let third = third.await.unwrap();
        assert_eq!(open.handshakes.going().ends.len(), 2);
        drop((second, third));
        assert!(open.handshakes.going().ends.is_empty());
        assert_eq!(open.handshakes.places.available_permits(), 2);
    }

    #[tokio::test]
    async fn a_principal_cannot_take_the_others_places() {
        let open = OpenConnections::with(3, 2, 1);
        let (a, b) = (principal("a", None), principal("b", None));
        let first = open.place(&a).await.unwrap();
        let _second = open.place(&a).await.unwrap();
        assert_eq!(open.place(&a).await.err(), Some(Full::Principal));
        let _of_b = open.place(&b).await.unwrap();
        // None is left: another client waits for its place, and keeps its part of the principal's.
        let mut waiting = Box::pin(open.place(&b));
        assert!(waiting.as_mut().now_or_never().is_none());
        assert_eq!(open.place(&b).await.err(), Some(Full::Principal));
        drop(first);
        drop(waiting.await.unwrap());
        assert!(open.place(&a).await.is_ok());
    }

    /// How many places one principal gets.
    async fn alone(max: usize) -> usize {
        let (open, who) = (OpenConnections::new(max), principal("a", None));
        let mut places = Vec::new();
        while let Ok(place) = open.place(&who).await {
            places.push(place);
        }
        places.len()
    }

    #[tokio::test]
    async fn one_principal_gets_a_quarter_and_64_in_any_case() {
        assert_eq!(alone(400).await, 100);
        assert_eq!(alone(100).await, 64);
    }
}
