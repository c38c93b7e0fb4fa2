//! The invocations that this node has left under one key. Whoever encrypts takes one first; what was taken stays
//! taken, whatever the token answers.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

/// See the module.
pub struct Meter {
    left: AtomicU64,
    /// All that this run was given.
    given: AtomicU64,
    /// What was given last.
    last: AtomicU64,
    /// Whoever takes the last but so many wakes the driver.
    wake_at: AtomicU64,
    low: Arc<Notify>,
}

impl fmt::Debug for Meter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Meter")
            .field("left", &self.left)
            .finish_non_exhaustive()
    }
}

impl Meter {
    /// An empty one.
    pub(super) fn new(low: Arc<Notify>) -> Self {
        Self {
            left: AtomicU64::new(0),
            given: AtomicU64::new(0),
            last: AtomicU64::new(0),
            wake_at: AtomicU64::new(0),
            low,
        }
    }

    /// One with so many invocations, that nobody fills.
    #[cfg(test)]
    pub(crate) fn holding(count: u64) -> Arc<Self> {
        let meter = Self::new(Arc::default());
        meter.raise(count);
        Arc::new(meter)
    }

    /// Takes one, if there is one.
    #[must_use]
    pub fn take(&self) -> bool {
        let less = |left: u64| left.checked_sub(1);
        let taken = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        if taken.is_ok_and(|left| left == self.wake_at.load(Ordering::Relaxed)) {
            self.low.notify_one();
        }
        taken.is_ok()
    }

    /// Gives one back that no token was called for.
    pub fn give_back(&self) {
        self.left.fetch_add(1, Ordering::Relaxed);
    }

    /// Adds what was given since, if the sum is larger than any before.
    pub(super) fn raise(&self, given: u64) {
        let before = self.given.fetch_max(given, Ordering::Relaxed);
        let more = given.saturating_sub(before);
        if more > 0 {
            self.last.store(more, Ordering::Relaxed);
            self.left.fetch_add(more, Ordering::Relaxed);
        }
    }

    /// All that this run was given, as far as this meter knows.
    pub(super) fn given(&self) -> u64 {
        self.given.load(Ordering::Relaxed)
    }

    /// The lease that was given last.
    pub(super) fn last(&self) -> u64 {
        self.last.load(Ordering::Relaxed)
    }

    /// What is left.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.left.load(Ordering::Relaxed)
    }

    /// What was taken. Exact while nothing is given.
    pub(super) fn taken(&self) -> u64 {
        self.given().saturating_sub(self.left())
    }

    pub(super) fn wake_at(&self, left: u64) {
        self.wake_at.store(left, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_take_what_was_given_and_not_one_more_while_more_is_given() {
        let meter = Meter::new(Arc::default());
        let taken = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for turn in 0..20_000_u32 {
                        if meter.take() {
                            taken.fetch_add(1, Ordering::Relaxed);
                            // A slot that does not take the job.
                            if turn % 7 == 0 {
                                meter.give_back();
                                taken.fetch_sub(1, Ordering::Relaxed);
                            }
                        }
                    }
                });
            }
            // The state is seen from two sides, and never from behind.
            for _ in 0..2 {
                scope.spawn(|| (1..=500).for_each(|step| meter.raise(step * 100)));
            }
        });
        assert_eq!(meter.taken(), taken.load(Ordering::Relaxed));
        assert_eq!(meter.left() + meter.taken(), 50_000);
        while meter.take() {
            taken.fetch_add(1, Ordering::Relaxed);
        }
        assert_eq!(taken.load(Ordering::Relaxed), 50_000);
        assert!(!meter.take());
    }

    #[test]
    fn an_older_sum_gives_nothing() {
        let meter = Meter::new(Arc::default());
        for (given, left, last) in [(5, 5, 5), (3, 5, 5), (5, 5, 5), (9, 9, 4)] {
            meter.raise(given);
            assert_eq!((meter.left(), meter.last()), (left, last));
        }
        assert_eq!(meter.given(), 9);
    }

    #[tokio::test]
    async fn whoever_crosses_the_mark_wakes_the_driver_once() {
        let low = Arc::<Notify>::default();
        let meter = Meter::new(Arc::clone(&low));
        meter.raise(4);
        meter.wake_at(2);
        let woken = async || {
            let soon = std::time::Duration::from_millis(20);
            tokio::time::timeout(soon, low.notified()).await.is_ok()
        };
        assert!(meter.take() && meter.take());
        assert!(!woken().await);
        assert!(meter.take());
        assert!(woken().await);
        assert!(meter.take() && !meter.take());
        assert!(!woken().await, "nobody is woken for what he has been told");
    }
}
