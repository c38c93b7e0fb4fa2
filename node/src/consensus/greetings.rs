//! The places of connections that were not greeted yet. When all are taken the oldest makes room: an honest
//! greeting takes milliseconds, so that who connects and says nothing cannot keep members out.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

/// See the module.
pub(super) struct Greetings {
    places: Arc<Semaphore>,
    /// None ends sooner to make room.
    least: Duration,
    going: Mutex<Going>,
}

#[derive(Default)]
struct Going {
    next: u64,
    /// By arrival. Whoever's sender is dropped has to end.
    ends: BTreeMap<u64, (Instant, oneshot::Sender<()>)>,
}

impl Greetings {
    pub(super) fn new(most: usize, least: Duration) -> Arc<Self> {
        Arc::new(Self {
            places: Arc::new(Semaphore::new(most)),
            least,
            going: Mutex::default(),
        })
    }

    /// Waits for a place; nobody is accepted meanwhile.
    pub(super) async fn room(&self) -> Option<OwnedSemaphorePermit> {
        if let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
            return Some(place);
        }
        loop {
            let wait = self.end_oldest();
            let place = Arc::clone(&self.places).acquire_owned();
            if let Ok(place) = tokio::time::timeout(wait, place).await {
                return place.ok();
            }
        }
    }

    /// Ends the oldest if it has had its time. Says when to look again unless there is room before.
    fn end_oldest(&self) -> Duration {
        let mut going = self.going();
        let Some(oldest) = going.ends.first_entry() else {
            return self.least;
        };
        let left = self.least.saturating_sub(oldest.get().0.elapsed());
        if left.is_zero() {
            oldest.remove();
            return self.least;
        }
        left
    }

    /// A connection takes the place.
    pub(super) fn begin(self: &Arc<Self>, place: OwnedSemaphorePermit) -> Greeting {
        let (sender, end) = oneshot::channel();
        let mut going = self.going();
        let number = going.next;
        going.next += 1;
        going.ends.insert(number, (Instant::now(), sender));
        Greeting {
            of: Arc::clone(self),
            number,
            end,
            _place: place,
        }
    }

    fn going(&self) -> MutexGuard<'_, Going> {
        self.going.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place of a connection that was not greeted yet. Given back when dropped.
pub(super) struct Greeting {
    of: Arc<Greetings>,
    number: u64,
    end: oneshot::Receiver<()>,
    _place: OwnedSemaphorePermit,
}

impl Greeting {
    /// Ends when it has to make room for a newer one.
    pub(super) async fn ended(&mut self) {
        // Nothing is ever sent.
        let _ = (&mut self.end).await;
    }
}

impl Drop for Greeting {
    fn drop(&mut self) {
        self.of.going().ends.remove(&self.number);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn the_oldest_makes_room_once_it_has_had_its_time() {
        let least = Duration::from_millis(100);
        let greetings = Greetings::new(2, least);
        let began = Instant::now();
        let mut first = greetings.begin(greetings.room().await.unwrap());
        let mut second = greetings.begin(greetings.room().await.unwrap());
        let waiting = tokio::spawn({
            let greetings = Arc::clone(&greetings);
            async move { greetings.room().await }
        });
        first.ended().await;
        assert!(began.elapsed() >= least);
        assert!(second.ended().now_or_never().is_none());
        drop(first);
        let third = greetings.begin(waiting.await.unwrap().unwrap());
        drop((second, third));
        assert!(greetings.going().ends.is_empty());
        assert_eq!(greetings.places.available_permits(), 2);
    }

    #[tokio::test]
    async fn where_there_is_room_nobody_has_to_end() {
        let greetings = Greetings::new(2, Duration::ZERO);
        let mut first = greetings.begin(greetings.room().await.unwrap());
        let _second = greetings.room().await.unwrap();
        assert!(first.ended().now_or_never().is_none());
    }
}
