//! The sessions of one thread: one that works, one in reserve, and those that are of no more use.

use std::time::Instant;

use cryptoki::session::Session;

use super::retired::Retired;
use super::shared::Shared;
use super::state::TOKEN_ERROR;
use crate::error::{HsmError, OpError};

pub(crate) struct Sessions {
    current: Session,
    spare: Option<Session>,
    /// Carry an operation that cannot be cancelled.
    retired: Retired<Session>,
}

impl Sessions {
    pub(crate) fn open(shared: &Shared) -> Result<Self, HsmError> {
        let current = shared.module.session(&shared.token)?;
        let spare = shared.module.session(&shared.token)?;
        Ok(Self {
            current,
            spare: Some(spare),
            retired: Retired::default(),
        })
    }

    /// The one to work with.
    pub(crate) fn current(&self) -> &Session {
        &self.current
    }

    /// Takes another one to work with.
    pub(crate) fn retire(&mut self, shared: &Shared) -> Result<(), OpError> {
        let now = Instant::now();
        if !self.retired.has_room(now) {
            let reason = if self.retired.is_full() {
                "a thread has given up as many sessions as it may: restart the node"
            } else {
                "a thread had to give up one session after the other"
            };
            shared.state.fail(TOKEN_ERROR, reason);
            return Err(OpError::SlotNotReady(shared.state.get()));
        }
        let fresh = match self.spare.take() {
            Some(spare) => spare,
            None => shared.module.session(&shared.token)?,
        };
        let given_up = std::mem::replace(&mut self.current, fresh);
        self.retired.keep(given_up, now);
        self.spare = shared.module.session(&shared.token).ok();
        Ok(())
    }

    pub(crate) fn give_back(self, shared: &Shared) {
        let serial = &shared.token.serial;
        shared.module.give_back(serial, self.current);
        if let Some(spare) = self.spare {
            shared.module.give_back(serial, spare);
        }
    }
}
