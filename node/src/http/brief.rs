//! Places for what takes milliseconds if it is honest: handshakes, probes. While all are taken the next one waits
//! in the kernel, and only what has been slow makes room for it: a crowd that comes at once is served in turn,
//! and those that hold places and do nothing keep nobody out for long.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{Instant, timeout, timeout_at};

/// Whoever holds a place for less than this is never ended.
pub(crate) const SLOW: Duration = Duration::from_secs(1);
/// What has been ended gives its place back within this time; otherwise the next one has to end too.
const MOMENT: Duration = Duration::from_millis(100);

/// See the module. Clones are the same.
#[derive(Clone)]
pub(crate) struct BriefPlaces(Arc<Inner>);

struct Inner {
    places: Arc<Semaphore>,
    going: Mutex<Going>,
}

#[derive(Default)]
struct Going {
    next: u64,
    /// By arrival, with its time. Whoever's sender is dropped has to end.
    ends: BTreeMap<u64, (Instant, oneshot::Sender<()>)>,
}

impl BriefPlaces {
    pub(crate) fn new(places: usize) -> Self {
        Self(Arc::new(Inner {
            places: Arc::new(Semaphore::new(places)),
            going: Mutex::default(),
        }))
    }

    /// Waits for a place, or until the oldest is slow and has been ended for it. May be given up at any time.
    pub(crate) async fn room(&self) -> Option<Room> {
        let inner = &self.0;
        let mut permit = pin!(Arc::clone(&inner.places).acquire_owned());
        loop {
            let waited = timeout_at(inner.slow_at(), permit.as_mut()).await;
            let taken = match waited {
                Ok(taken) => Some(taken),
                Err(_) if inner.end_slow() => timeout(MOMENT, permit.as_mut()).await.ok(),
                Err(_) => None,
            };
            if let Some(taken) = taken {
                return Some(Room {
                    of: Arc::clone(inner),
                    // Never closed.
                    permit: taken.ok()?,
                });
            }
        }
    }

    #[cfg(test)]
    pub(super) fn going(&self) -> usize {
        self.0.going().ends.len()
    }

    #[cfg(test)]
    pub(super) fn free(&self) -> usize {
        self.0.places.available_permits()
    }
}

impl Inner {
    /// When the oldest will have been slow. What comes later is slow later.
    fn slow_at(&self) -> Instant {
        let going = self.going();
        let oldest = going.ends.first_key_value().map(|(_, (since, _))| *since);
        oldest.unwrap_or_else(Instant::now) + SLOW
    }

    /// Ends the oldest if it is slow.
    fn end_slow(&self) -> bool {
        let mut going = self.going();
        match going.ends.first_entry() {
            Some(oldest) if oldest.get().0.elapsed() >= SLOW => {
                oldest.remove();
                true
            }
            _ => false,
        }
    }

    fn going(&self) -> MutexGuard<'_, Going> {
        self.going.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place for what has not come yet. Given back when dropped.
pub(crate) struct Room {
    of: Arc<Inner>,
    permit: OwnedSemaphorePermit,
}

impl Room {
    /// It has come: its time runs.
    pub(crate) fn begin(self) -> BriefPlace {
        let (sender, end) = oneshot::channel();
        let number = {
            let mut going = self.of.going();
            let number = going.next;
            going.next += 1;
            going.ends.insert(number, (Instant::now(), sender));
            number
        };
        BriefPlace {
            of: self.of,
            number,
            end,
            settled: false,
            _permit: self.permit,
        }
    }
}

/// A place in use. Given back when dropped.
pub(crate) struct BriefPlace {
    of: Arc<Inner>,
    number: u64,
    end: oneshot::Receiver<()>,
    settled: bool,
    _permit: OwnedSemaphorePermit,
}

impl BriefPlace {
    /// Ends when it has to make room for a newer one.
    pub(crate) async fn evicted(&mut self) {
        if self.settled {
            std::future::pending::<()>().await;
        }
        // Nothing is ever sent.
        let _ = (&mut self.end).await;
    }

    /// From now on it makes room for nobody: what it waits for is not its own doing.
    pub(crate) fn settle(&mut self) {
        self.settled = true;
        self.of.going().ends.remove(&self.number);
    }
}

impl Drop for BriefPlace {
    fn drop(&mut self) {
        self.of.going().ends.remove(&self.number);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use futures_util::FutureExt;
    use tokio::time::sleep;

    use super::*;

    async fn begin(places: &BriefPlaces) -> BriefPlace {
        places.room().await.unwrap().begin()
    }

    #[tokio::test]
    async fn only_a_slow_one_makes_room_and_the_oldest_first() {
        let places = BriefPlaces::new(2);
        let mut first = begin(&places).await;
        let mut second = begin(&places).await;
        let began = Instant::now();
        let third = tokio::spawn({
            let places = places.clone();
            async move { begin(&places).await }
        });
        first.evicted().await;
        assert!(began.elapsed() + Duration::from_millis(100) >= SLOW);
        drop(first);
        let third = third.await.unwrap();
        assert!(second.evicted().now_or_never().is_none());
        assert_eq!(places.going(), 2);
        drop((second, third));
        assert_eq!((places.going(), places.free()), (0, 2));
    }

    #[tokio::test]
    async fn a_place_that_becomes_free_ends_nobody() {
        let places = BriefPlaces::new(2);
        let (first, mut second) = (begin(&places).await, begin(&places).await);
        let mut third = Box::pin(begin(&places));
        assert!(third.as_mut().now_or_never().is_none());
        drop(first);
        let _third = third.await;
        assert!(second.evicted().now_or_never().is_none());
    }

    #[tokio::test]
    async fn one_that_waits_for_something_else_is_left_alone() {
        let places = BriefPlaces::new(1);
        let mut first = begin(&places).await;
        first.settle();
        let next = tokio::time::timeout(2 * SLOW, places.room()).await;
        assert!(next.is_err());
        assert!(first.evicted().now_or_never().is_none());
    }

    #[tokio::test]
    async fn the_time_of_a_place_begins_when_it_is_taken_up() {
        let places = BriefPlaces::new(1);
        let room = places.room().await.unwrap();
        sleep(SLOW).await;
        let mut late = room.begin();
        let next = tokio::time::timeout(SLOW / 2, places.room()).await;
        assert!(next.is_err());
        assert!(late.evicted().now_or_never().is_none());
    }
}
