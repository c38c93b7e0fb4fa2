//! A token bucket that can go into debt: what is asked for at once may be more than a bucket ever holds. It is let
//! in when the bucket is full, and whoever comes next waits until it is paid for, so that the average is the rate
//! whatever the pieces are.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::config::RateLimit;

const SECOND: u64 = 1_000_000_000;

/// What the buckets of one limiter have in common.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rate {
    /// Nanoseconds until a bucket has one more.
    each: u64,
    /// What a full bucket holds.
    burst: u64,
}

impl Rate {
    pub(super) fn of(limit: RateLimit) -> Self {
        Self {
            // Rounded up: never more than the rate.
            each: SECOND.div_ceil(u64::from(limit.requests_per_second.get())),
            burst: u64::from(limit.burst.get()),
        }
    }

    pub(super) fn burst(self) -> u64 {
        self.burst
    }

    /// Nanoseconds in which so much comes.
    fn time(self, count: u64) -> u64 {
        self.each.saturating_mul(count)
    }
}

/// One bucket. All that has to be known of it is when it will be full: full is what a new one is. Times are
/// nanoseconds from any one moment.
#[derive(Debug, Default)]
pub(super) struct Bucket {
    full_at: AtomicU64,
}

impl Bucket {
    /// Takes `cost` if `need` of it are there, or as many as a full bucket holds; the rest is debt. Otherwise
    /// nothing is taken.
    pub(super) fn take(&self, rate: Rate, now: u64, cost: u64, need: u64) -> bool {
        let need = need.min(rate.burst);
        let taken = self
            .full_at
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |full_at| {
                (lacking(rate, full_at, now, need) == 0)
                    .then(|| full_at.max(now).saturating_add(rate.time(cost)))
            });
        taken.is_ok()
    }

    /// Nanoseconds until `need` of it are there, or as many as a full bucket holds.
    pub(super) fn wait(&self, rate: Rate, now: u64, need: u64) -> u64 {
        lacking(rate, self.load(), now, need.min(rate.burst))
    }

    /// What could be taken now.
    pub(super) fn remaining(&self, rate: Rate, now: u64) -> u64 {
        let missing = self.load().saturating_sub(now);
        rate.time(rate.burst).saturating_sub(missing) / rate.each
    }

    pub(super) fn is_full(&self, now: u64) -> bool {
        self.load() <= now
    }

    fn load(&self) -> u64 {
        self.full_at.load(Ordering::Relaxed)
    }
}

/// A bucket that is full in `t` has what a full one has less what comes in `t`.
fn lacking(rate: Rate, full_at: u64, now: u64, need: u64) -> u64 {
    let missing = full_at.saturating_sub(now);
    let may_miss = rate.time(rate.burst).saturating_sub(rate.time(need));
    missing.saturating_sub(may_miss)
}

/// In whole seconds, after which so much time has passed.
pub(super) fn seconds(nanos: u64) -> u64 {
    nanos.div_ceil(SECOND)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::num::NonZeroU32;

    use proptest::prelude::*;

    use super::*;

    fn rate(per_second: u32, burst: u32) -> Rate {
        Rate::of(RateLimit {
            requests_per_second: NonZeroU32::new(per_second).unwrap(),
            burst: NonZeroU32::new(burst).unwrap(),
        })
    }

    /// A bucket as one would draw it: a level that rises, and that debts push below zero. In nanoseconds' worth.
    struct Drawn {
        level: i128,
        at: u64,
    }

    impl Drawn {
        fn full(rate: Rate) -> Self {
            Self {
                level: i128::from(rate.time(rate.burst)),
                at: 0,
            }
        }

        fn rise(&mut self, rate: Rate, now: u64) {
            let full = i128::from(rate.time(rate.burst));
            self.level = full.min(self.level + i128::from(now - self.at));
            self.at = now;
        }

        fn take(&mut self, rate: Rate, cost: u64) -> bool {
            let taken = self.level >= i128::from(rate.time(cost.min(rate.burst)));
            if taken {
                self.level -= i128::from(rate.time(cost));
            }
            taken
        }
    }

    #[test]
    fn more_than_a_full_bucket_is_let_in_once_and_paid_for_afterwards() {
        let (rate, bucket) = (rate(1, 5), Bucket::default());
        assert!(bucket.take(rate, 0, 1000, 1000));
        assert_eq!(bucket.remaining(rate, 0), 0);
        assert_eq!(seconds(bucket.wait(rate, 0, 1)), 996);
        assert!(!bucket.take(rate, 996 * SECOND - 1, 1, 1));
        assert!(bucket.take(rate, 996 * SECOND, 1, 1));
        // The next one of the size waits for the whole burst, and not for what no bucket holds.
        assert_eq!(bucket.wait(rate, 996 * SECOND, 1000), 5 * SECOND);
        assert!(!bucket.is_full(1001 * SECOND - 1));
        assert!(bucket.is_full(1001 * SECOND));
    }

    #[test]
    fn a_refusal_takes_nothing_and_only_the_need_is_asked_for() {
        let (rate, bucket) = (rate(1, 5), Bucket::default());
        assert!(bucket.take(rate, 0, 4, 4));
        assert!(!bucket.take(rate, 0, 2, 2));
        assert_eq!(bucket.remaining(rate, 0), 1);
        assert!(bucket.take(rate, 0, 9, 1));
        assert_eq!(bucket.wait(rate, 0, 1), 9 * SECOND);
    }

    #[test]
    fn a_rate_that_does_not_divide_a_second_is_never_exceeded() {
        let (rate, bucket) = (rate(3, 1), Bucket::default());
        let took = (0..=10 * SECOND)
            .step_by(1_000_000)
            .filter(|now| bucket.take(rate, *now, 1, 1))
            .count();
        assert!((29..=31).contains(&took), "{took} in 10 s");
    }

    proptest! {
        #[test]
        fn it_is_the_bucket_that_one_would_draw_and_keeps_the_rate(
            per_second in 1_u32..=1_000_000,
            burst in 1_u32..=5_000,
            steps in prop::collection::vec((0_u64..20 * SECOND, 1_u64..=1_000), 1..200),
        ) {
            let rate = rate(per_second, burst);
            let (bucket, mut drawn) = (Bucket::default(), Drawn::full(rate));
            let (mut now, mut let_in) = (0, 0);
            for (pause, cost) in steps {
                now += pause;
                drawn.rise(rate, now);
                let wait = bucket.wait(rate, now, cost);
                let taken = bucket.take(rate, now, cost, cost);
                prop_assert_eq!(taken, drawn.take(rate, cost));
                prop_assert_eq!(taken, wait == 0);
                let level = u64::try_from(drawn.level).unwrap_or(0);
                prop_assert_eq!(bucket.remaining(rate, now), level / rate.each);
                if taken {
                    let_in += cost;
                } else {
                    // What it is told is the first moment at which it is let in.
                    let other = Bucket { full_at: AtomicU64::new(bucket.load()) };
                    prop_assert!(!other.take(rate, now + wait - 1, cost, cost));
                    prop_assert!(other.take(rate, now + wait, cost, cost));
                }
                let most = u64::from(burst).max(1_000) + now / rate.each;
                prop_assert!(let_in <= most, "{} in {} ns, of at most {}", let_in, now, most);
            }
        }
    }
}
