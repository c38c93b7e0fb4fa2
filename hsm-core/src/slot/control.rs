//! The one mutex around create, destroy and find, with the one session that does them. SoftHSM
//! races in find against create; and the session owns every session copy, so it is never closed.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cryptoki::session::Session;

use super::retired::Retired;
use super::watchdog::CallClock;
use crate::error::HsmError;
use crate::module::lock;

struct Desk<S> {
    /// `None` while an operation has it.
    session: Option<S>,
    /// Unusable but open: session copies may belong to them.
    retired: Retired<S>,
    running: &'static str,
    /// What that may take.
    limit: Duration,
}

/// An operation that takes longer than it may.
pub(crate) struct Overdue {
    pub(crate) operation: &'static str,
    pub(crate) running: Duration,
}

/// Generic so that it can be tested without a token.
pub(crate) struct Control<S = Session> {
    slot: String,
    desk: Mutex<Desk<S>>,
    freed: Condvar,
    clock: CallClock,
}

/// The control session, for the length of one operation.
pub(crate) struct Turn<'a, S = Session> {
    control: &'a Control<S>,
    session: Option<S>,
}

impl<S> Control<S> {
    pub(crate) fn new(slot: &str, session: S) -> Self {
        Self {
            slot: slot.to_owned(),
            desk: Mutex::new(Desk {
                session: Some(session),
                retired: Retired::default(),
                running: "",
                limit: Duration::MAX,
            }),
            freed: Condvar::new(),
            clock: CallClock::default(),
        }
    }

    /// Waits for the operations before this one, but no longer than `patience`. From then on the operation may take
    /// `limit` before the slot is said to hang.
    pub(crate) fn enter(
        &self,
        operation: &'static str,
        patience: Duration,
        limit: Duration,
    ) -> Result<Turn<'_, S>, HsmError> {
        let began = Instant::now();
        let mut desk = lock(&self.desk);
        loop {
            if let Some(session) = desk.session.take() {
                desk.running = operation;
                desk.limit = limit;
                // Under the lock, so that nobody measures this operation by another one's limit.
                self.clock.begin();
                drop(desk);
                return Ok(Turn {
                    control: self,
                    session: Some(session),
                });
            }
            let waited = began.elapsed();
            let Some(left) = patience.checked_sub(waited).filter(|left| !left.is_zero()) else {
                return Err(HsmError::Busy {
                    slot: self.slot.clone(),
                    operation,
                    running: desk.running,
                    waited_ms: u64::try_from(waited.as_millis()).unwrap_or(u64::MAX),
                });
            };
            desk = self
                .freed
                .wait_timeout(desk, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// For the operation that is running, if it does one thing after the other: it goes on to the next one, which may take
    /// its limit anew. A token that does many things does not hang.
    pub(crate) fn next_step(&self) {
        let desk = lock(&self.desk);
        if !desk.running.is_empty() {
            self.clock.begin();
        }
    }

    /// The operation that is running, if it takes longer than it may.
    pub(crate) fn overdue(&self) -> Option<Overdue> {
        let desk = lock(&self.desk);
        let running = self.clock.running().filter(|running| *running > desk.limit)?;
        Some(Overdue {
            operation: desk.running,
            running,
        })
    }

    /// The session, if no operation has it: the slot is being closed.
    pub(crate) fn take_session(&self) -> Option<S> {
        lock(&self.desk).session.take()
    }
}

impl<S> Turn<'_, S> {
    /// The session. Present until the turn ends.
    pub(crate) fn session(&self) -> Option<&S> {
        self.session.as_ref()
    }

    /// Takes another session in place of this one, which stays open. False if that has happened
    /// too often.
    pub(crate) fn retire(&mut self, fresh: S) -> bool {
        let (mut desk, now) = (lock(&self.control.desk), Instant::now());
        if !desk.retired.has_room(now) {
            return false;
        }
        if let Some(given_up) = self.session.replace(fresh) {
            desk.retired.keep(given_up, now);
        }
        true
    }
}

impl<S> Drop for Turn<'_, S> {
    fn drop(&mut self) {
        let mut desk = lock(&self.control.desk);
        self.control.clock.end();
        desk.session = self.session.take();
        desk.running = "";
        drop(desk);
        self.control.freed.notify_one();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    const AT_ONCE: Duration = Duration::ZERO;
    const SOON: Duration = Duration::from_secs(20);

    /// Waits until the running operation has run for longer than this.
    fn runs_for(control: &Control<()>, time: Duration) {
        let began = Instant::now();
        while control.clock.running().is_none_or(|running| running <= time) {
            assert!(began.elapsed() < SOON, "nothing runs");
            std::thread::yield_now();
        }
    }

    #[test]
    fn each_operation_is_measured_by_its_own_limit() {
        let control = Control::new("a", ());
        assert!(control.overdue().is_none());
        let turn = control.enter("node_key", AT_ONCE, Duration::MAX).unwrap();
        runs_for(&control, Duration::from_millis(5));
        assert!(control.overdue().is_none());
        drop(turn);
        let limit = Duration::from_millis(5);
        let turn = control.enter("known_answer_test", AT_ONCE, limit).unwrap();
        runs_for(&control, limit);
        let late = control.overdue().unwrap();
        assert_eq!(late.operation, "known_answer_test");
        assert!(late.running > limit);
        drop(turn);
        assert!(control.overdue().is_none() && control.clock.running().is_none());
    }

    #[test]
    fn an_operation_of_many_steps_has_its_limit_for_each() {
        let control = Control::new("a", ());
        control.next_step();
        assert!(control.clock.running().is_none(), "nothing runs");
        let turn = control
            .enter("known_answer_test", AT_ONCE, Duration::MAX)
            .unwrap();
        runs_for(&control, Duration::from_millis(20));
        let step = Instant::now();
        control.next_step();
        assert!(control.clock.running().unwrap() <= step.elapsed());
        drop(turn);
    }

    #[test]
    fn whoever_waits_has_the_turn_of_whoever_ends_or_is_told_who_has_it() {
        let control = Control::new("a", ());
        let turn = control.enter("inventory", AT_ONCE, SOON).unwrap();
        let busy = control.enter("load_kek", Duration::from_millis(1), SOON).err();
        assert!(
            matches!(
                busy,
                Some(HsmError::Busy {
                    running: "inventory",
                    ..
                })
            ),
            "{busy:?}"
        );
        std::thread::scope(|threads| {
            let waiting = threads.spawn(|| control.enter("load_kek", SOON, SOON).is_ok());
            drop(turn);
            assert!(waiting.join().unwrap());
        });
    }
}
