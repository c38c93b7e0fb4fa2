//! Deadlines of token calls, kept from outside: a PKCS#11 call cannot be interrupted, so a call
//! that hangs costs its thread until it comes back, and must cost nobody else more than that.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::shared::Shared;
use super::state::HUNG;
use crate::error::OpError;
use crate::module::lock;

/// When the call that is running began; written by the calling thread, read by the watchdog.
#[derive(Default)]
pub(crate) struct CallClock {
    /// Nanoseconds since the first call of the process, plus one; zero for "idle".
    began: AtomicU64,
}

fn now() -> u64 {
    static EPOCH: OnceLock<Instant> = OnceLock::new();
    let elapsed = EPOCH.get_or_init(Instant::now).elapsed();
    u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX - 1)
}

impl CallClock {
    pub(crate) fn begin(&self) {
        self.began.store(now() + 1, Ordering::Release);
    }

    pub(crate) fn end(&self) {
        self.began.store(0, Ordering::Release);
    }

    /// How long the call has been running.
    pub(crate) fn running(&self) -> Option<Duration> {
        match self.began.load(Ordering::Acquire) {
            0 => None,
            began => Some(Duration::from_nanos((now() + 1).saturating_sub(began))),
        }
    }
}

/// Often enough to be late by a quarter of the deadline at most, seldom enough to cost nothing.
fn interval(deadline: Duration) -> Duration {
    (deadline / 4).clamp(Duration::from_millis(5), Duration::from_millis(250))
}

/// The watchdog's thread.
pub(crate) fn run(shared: &Arc<Shared>) {
    let interval = interval(shared.deadline);
    while !shared.wait_for_stop(interval) {
        look(shared);
    }
}

/// One look at every thread. Fails the slot if a call is overdue, and ends that failure once
/// none is.
fn look(shared: &Shared) {
    let mut overdue = None;
    for (index, desk) in shared.desks.iter().enumerate() {
        // Call and callback change together under this lock, so that no later job is answered
        // for the one that hangs.
        let mut current = lock(&desk.current);
        let Some(running) = desk.clock.running().filter(|running| *running > shared.deadline) else {
            continue;
        };
        overdue = Some(format!(
            "a call in thread {index} has been running for {running:.1?}"
        ));
        let done = current.take();
        drop(current);
        // The caller has waited long enough. If the call still gives a result, nobody takes it.
        if let Some(done) = done {
            done.answer(Err(OpError::Deadline));
        }
    }
    if let Some(late) = shared.control.overdue() {
        overdue = Some(format!(
            "{} has been running for {:.1?}",
            late.operation, late.running
        ));
    }
    match overdue {
        None => shared.state.hang_ended(),
        Some(reason) => {
            shared.state.fail(
                HUNG,
                format!("{reason}; the slot serves again when it comes back"),
            );
            refuse_waiting(shared);
        }
    }
}

/// Answers everything that waits, also what a hanging thread had taken already.
pub(crate) fn refuse_waiting(shared: &Shared) {
    let mut waiting = shared.queue.take_all();
    for desk in &shared.desks {
        waiting.extend(desk.take_all());
    }
    for job in waiting {
        job.refuse(OpError::SlotNotReady(shared.state.get()));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_runs_only_during_a_call() {
        let clock = CallClock::default();
        assert!(clock.running().is_none());
        clock.begin();
        let first = clock.running().unwrap();
        assert!(clock.running().unwrap() >= first);
        clock.end();
        assert!(clock.running().is_none());
    }

    #[test]
    fn the_watchdog_looks_within_the_deadline() {
        assert_eq!(interval(Duration::from_millis(8)), Duration::from_millis(5));
        assert_eq!(interval(Duration::from_millis(400)), Duration::from_millis(100));
        assert_eq!(interval(Duration::from_secs(60)), Duration::from_millis(250));
    }
}
