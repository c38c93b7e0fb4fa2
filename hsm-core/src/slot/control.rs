//! The one mutex around create, destroy and find, with the one session that does them. SoftHSM
//! races in find against create; and the session owns every session copy, so it is never closed.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cryptoki::session::Session;

use super::retired::Retired;
use super::watchdog::CallClock;
use crate::error::HsmError;
use crate::module::lock;

struct Desk {
    /// `None` while an operation has it.
    session: Option<Session>,
    /// Unusable but open: session copies may belong to them.
    retired: Retired<Session>,
    running: &'static str,
    /// What that may take.
    limit: Duration,
}

/// An operation that takes longer than it may.
pub(crate) struct Overdue {
    pub(crate) operation: &'static str,
    pub(crate) running: Duration,
}

pub(crate) struct Control {
    slot: String,
    desk: Mutex<Desk>,
    freed: Condvar,
    clock: CallClock,
}

/// The control session, for the length of one operation.
pub(crate) struct Turn<'a> {
    control: &'a Control,
    session: Option<Session>,
}

impl Control {
    pub(crate) fn new(slot: &str, session: Session) -> Self {
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
    ) -> Result<Turn<'_>, HsmError> {
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
    pub(crate) fn take_session(&self) -> Option<Session> {
        lock(&self.desk).session.take()
    }
}

impl Turn<'_> {
    /// The session. Present until the turn ends.
    pub(crate) fn session(&self) -> Option<&Session> {
        self.session.as_ref()
    }

    /// Takes another session in place of this one, which stays open. False if that has happened
    /// too often.
    pub(crate) fn retire(&mut self, fresh: Session) -> bool {
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

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut desk = lock(&self.control.desk);
        self.control.clock.end();
        desk.session = self.session.take();
        desk.running = "";
        drop(desk);
        self.control.freed.notify_one();
    }
}
