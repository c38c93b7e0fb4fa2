//! Time in which this machine ran nobody, as far as one can see from inside of it: machines that are shared stand still for
//! a second now and then. What a test measures by the clock has it in it, and no node can do anything about it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

/// How often somebody asks to be run.
const EVERY: Duration = Duration::from_millis(10);
/// Whoever is run no later than this is run in time: two busy cores make everybody wait a little.
const IN_TIME: Duration = Duration::from_millis(100);

/// Of a run in which the machine stood still for longer than half of it, what was measured says nothing.
const HALF: u32 = 2;

/// From when it was due until it was run.
type Stall = (Instant, Instant);

struct Seen {
    stalls: Vec<Stall>,
    /// When it is to be run next.
    due: Instant,
}

impl Seen {
    fn between(&self, from: Instant, to: Instant) -> Duration {
        // It may stand still just now, and whoever asks was run first.
        let now = (self.due, to);
        let late = |(due, run): &Stall| run.saturating_duration_since(*due) > IN_TIME;
        let stalls = self.stalls.iter().copied().chain([now]).filter(late);
        let within = |(due, run): Stall| run.min(to).saturating_duration_since(due.max(from));
        stalls.map(within).sum()
    }
}

/// Looks until it is dropped.
pub struct Stalls(Arc<Mutex<Seen>>);

impl Stalls {
    /// Begins to look.
    pub fn watch() -> Result<Self> {
        let seen = Arc::new(Mutex::new(Seen {
            stalls: Vec::new(),
            due: Instant::now() + EVERY,
        }));
        let looked = Arc::downgrade(&seen);
        std::thread::Builder::new()
            .name("stalls".to_owned())
            .spawn(move || {
                loop {
                    sleep(EVERY);
                    let Some(seen) = looked.upgrade() else { return };
                    let (mut seen, now) = (lock(&seen), Instant::now());
                    let stall = (seen.due, now);
                    if now.saturating_duration_since(seen.due) > IN_TIME {
                        seen.stalls.push(stall);
                    }
                    seen.due = now + EVERY;
                }
            })?;
        Ok(Self(seen))
    }

    /// How much of a time the machine stood still.
    #[must_use]
    pub fn between(&self, from: Instant, to: Instant) -> Duration {
        lock(&self.0).between(from, to)
    }

    /// What has passed since, without that.
    #[must_use]
    pub fn running_since(&self, from: Instant) -> Duration {
        let now = Instant::now();
        let passed = now.saturating_duration_since(from);
        passed.saturating_sub(self.between(from, now))
    }

    /// How much of a run that began then it stood still, and that this is little of it: what is deducted from
    /// measurements must not be what they measure.
    pub fn few_since(&self, from: Instant) -> Result<Duration> {
        let now = Instant::now();
        let stood_still = self.between(from, now);
        check_few(stood_still, now.saturating_duration_since(from))?;
        Ok(stood_still)
    }
}

fn check_few(stood_still: Duration, run: Duration) -> Result<()> {
    ensure!(
        stood_still <= run / HALF,
        "the machine stood still for {stood_still:?} of {run:?}, more than half: what was measured says nothing; run \
         it again where less else runs"
    );
    Ok(())
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_counts_as_far_as_it_is_within_the_time() {
        let began = Instant::now();
        let at = |millis: u64| began + Duration::from_millis(millis);
        let seen = Seen {
            stalls: vec![(at(1000), at(1500)), (at(3000), at(4000)), (at(5000), at(5050))],
            due: at(9000),
        };
        let between = |from, to| seen.between(at(from), at(to)).as_millis();
        assert_eq!(between(0, 2000), 500);
        assert_eq!(between(1200, 3500), 300 + 500);
        assert_eq!(between(2000, 3000), 0);
        // Whoever is only a little late is in time; and who was due and was not run yet is late.
        assert_eq!(between(4500, 9050), 0);
        assert_eq!(between(4500, 9700), 700);
    }

    #[test]
    fn a_run_in_which_it_stood_still_for_more_than_half_of_it_says_nothing() {
        let run = Duration::from_secs(100);
        check_few(Duration::from_secs(50), run).unwrap();
        let said = check_few(Duration::from_millis(50_001), run).unwrap_err();
        assert!(said.to_string().contains("says nothing"), "{said}");
    }

    #[test]
    fn what_is_awake_all_the_time_has_little_of_it() {
        let stalls = Stalls::watch().unwrap();
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(50) {
            std::thread::yield_now();
        }
        let passed = began.elapsed();
        assert!(stalls.running_since(began) <= began.elapsed());
        assert!(stalls.between(began, began + passed) <= passed);
    }
}
