//! Time in which this machine, or one of its cores, ran nobody, as far as one can see from inside of it: machines that are
//! shared stand still for a second now and then. What a test measures by the clock has it in it, and no node can do anything
//! about it: a core that stands still takes the threads along that are on it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// How often somebody asks to be run.
const EVERY: Duration = Duration::from_millis(10);
/// Whoever is run no later than this is run in time: two busy cores make everybody wait a little.
const IN_TIME: Duration = Duration::from_millis(100);

/// Cores that are looked at.
const CORES: usize = 16;

/// Of a run in which a core stood still for longer than half of it, what was measured says nothing.
const HALF: u32 = 2;
/// Nor of one in which one core or another did for more than three quarters of it, where much was measured and little is left.
const QUARTER: u32 = 4;

/// From when it was due until it was run.
type Stall = (Instant, Instant);

/// What was seen of one core.
struct Core {
    stalls: Vec<Stall>,
    /// When whoever looks is to be run next.
    due: Instant,
}

impl Core {
    /// Those that count. It may stand still just now, and whoever asks was run first.
    fn stalls(&self, now: Instant) -> impl Iterator<Item = Stall> {
        let late = |(due, run): &Stall| run.saturating_duration_since(*due) > IN_TIME;
        self.stalls.iter().copied().chain([(self.due, now)]).filter(late)
    }
}

struct Seen(Vec<Core>);

impl Seen {
    /// In which any core stood still.
    fn between(&self, from: Instant, to: Instant) -> Duration {
        total(self.0.iter().flat_map(|core| core.stalls(to)), from, to)
    }

    /// In which the one stood still that did so for longest.
    fn of_one(&self, from: Instant, to: Instant) -> Duration {
        let each = self.0.iter().map(|core| total(core.stalls(to), from, to));
        each.max().unwrap_or_default()
    }
}

/// What two cores stood still for at once counts once.
fn total(stalls: impl Iterator<Item = Stall>, from: Instant, to: Instant) -> Duration {
    let mut stalls: Vec<Stall> = stalls.collect();
    stalls.sort_unstable();
    let (mut counted, mut sum) = (from, Duration::ZERO);
    for (due, run) in stalls {
        let end = run.min(to);
        sum += end.saturating_duration_since(due.max(counted));
        counted = counted.max(end);
    }
    sum
}

/// Looks until it is dropped.
pub struct Stalls(Arc<Mutex<Seen>>);

impl Stalls {
    /// Begins to look, on each core.
    pub fn watch() -> Result<Self> {
        let cores = cores();
        let due = Instant::now() + EVERY;
        let seen = cores.iter().map(|_| Core {
            stalls: Vec::new(),
            due,
        });
        let seen = Arc::new(Mutex::new(Seen(seen.collect())));
        for (place, core) in cores.into_iter().enumerate() {
            let looked = Arc::downgrade(&seen);
            std::thread::Builder::new()
                .name(format!("stalls-{place}"))
                .spawn(move || {
                    stay_on(core);
                    loop {
                        sleep(EVERY);
                        let Some(seen) = looked.upgrade() else { return };
                        let (mut seen, now) = (lock(&seen), Instant::now());
                        let own = &mut seen.0[place];
                        let due = std::mem::replace(&mut own.due, now + EVERY);
                        if now.saturating_duration_since(due) > IN_TIME {
                            own.stalls.push((due, now));
                        }
                    }
                })?;
        }
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

    /// How much of a run that began then any core stood still, and that no core did so for more than half of it: what is
    /// deducted from measurements must not be what they measure.
    pub fn few_since(&self, from: Instant) -> Result<Duration> {
        let now = Instant::now();
        let seen = lock(&self.0);
        let (of_one, of_any) = (seen.of_one(from, now), seen.between(from, now));
        drop(seen);
        check_few(of_one, now.saturating_duration_since(from))?;
        Ok(of_any)
    }

    /// [`Stalls::few_since`], and that cores did not stand still in turns for most of it either: from measurements all of
    /// that is deducted.
    pub fn fewer_since(&self, from: Instant) -> Result<Duration> {
        let of_any = self.few_since(from)?;
        check_fewer(of_any, from.elapsed())?;
        Ok(of_any)
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

fn check_fewer(of_any: Duration, run: Duration) -> Result<()> {
    ensure!(
        of_any <= run - run / QUARTER,
        "one core or another stood still for {of_any:?} of {run:?}, more than three quarters: what was measured says \
         nothing; run it again where less else runs"
    );
    Ok(())
}

/// The cores that this process may run on; one that is not known where nobody says.
fn cores() -> Vec<Option<usize>> {
    let Ok(allowed) = sched_getaffinity(Pid::from_raw(0)) else {
        return vec![None];
    };
    let all = (0..CpuSet::count()).filter(|core| allowed.is_set(*core).unwrap_or(false));
    let cores: Vec<Option<usize>> = all.take(CORES).map(Some).collect();
    if cores.is_empty() { vec![None] } else { cores }
}

/// Keeps this thread there. One that is moved about sees less, and nothing that is not so.
fn stay_on(core: Option<usize>) {
    let mut only = CpuSet::new();
    if let Some(core) = core
        && only.set(core).is_ok()
    {
        let _ = sched_setaffinity(Pid::from_raw(0), &only);
    }
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
        let seen = Seen(vec![Core {
            stalls: vec![(at(1000), at(1500)), (at(3000), at(4000)), (at(5000), at(5050))],
            due: at(9000),
        }]);
        let between = |from, to| seen.between(at(from), at(to)).as_millis();
        assert_eq!(between(0, 2000), 500);
        assert_eq!(between(1200, 3500), 300 + 500);
        assert_eq!(between(2000, 3000), 0);
        // Whoever is only a little late is in time; and who was due and was not run yet is late.
        assert_eq!(between(4500, 9050), 0);
        assert_eq!(between(4500, 9700), 700);
    }

    #[test]
    fn what_two_cores_stood_still_for_at_once_counts_once() {
        let began = Instant::now();
        let at = |millis: u64| began + Duration::from_millis(millis);
        let one = Core {
            stalls: vec![(at(1000), at(1500))],
            due: at(2500),
        };
        let other = Core {
            stalls: vec![(at(1200), at(1400)), (at(1410), at(2000))],
            due: at(2400),
        };
        let seen = Seen(vec![one, other]);
        let between = |from, to| seen.between(at(from), at(to)).as_millis();
        assert_eq!(between(0, 2100), 1000);
        assert_eq!(between(1100, 1350), 250);
        assert_eq!(between(0, 2700), 1000 + 300);
        assert_eq!(seen.of_one(began, at(2100)).as_millis(), 200 + 590);
    }

    #[test]
    fn a_run_in_which_it_stood_still_for_more_than_half_of_it_says_nothing() {
        let run = Duration::from_secs(100);
        check_few(Duration::from_secs(50), run).unwrap();
        let said = check_few(Duration::from_millis(50_001), run).unwrap_err();
        assert!(said.to_string().contains("says nothing"), "{said}");
        check_fewer(Duration::from_secs(75), run).unwrap();
        let said = check_fewer(Duration::from_millis(75_001), run).unwrap_err();
        assert!(said.to_string().contains("three quarters"), "{said}");
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
