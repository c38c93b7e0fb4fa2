//! The threads that encrypt and decrypt: each has its own session and its own copy of every
//! loaded key, takes small batches from the queue, and does with a return code what the table
//! says. A bad ciphertext must never cost more than its own answer.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use cryptoki::session::Session;

use super::job::{EncryptJob, Output, Work};
use super::queue::Desk;
use super::retired::Retired;
use super::shared::Shared;
use super::state::{LOGGED_OUT, TOKEN_ERROR};
use crate::envelope::{Header, IV_LEN, Purpose, aad_v2};
use crate::error::{HsmError, OpError};
use crate::ffi::Obj;
use crate::gcm::{Cipher, GcmError};
use crate::kek::KekUse;
use crate::return_codes::{Verdict, classify};
use crate::secrets::random_bytes;

/// The sessions of one thread.
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

    fn retire(&mut self, shared: &Shared) -> Result<(), OpError> {
        let now = Instant::now();
        if !self.retired.has_room(now) {
            let reason = "a thread had to give up one session after the other";
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

    fn give_back(self, shared: &Shared) {
        let serial = &shared.token.serial;
        shared.module.give_back(serial, self.current);
        if let Some(spare) = self.spare {
            shared.module.give_back(serial, spare);
        }
    }
}

/// Thread `index` of a slot.
pub(crate) fn run(shared: &Arc<Shared>, index: usize, mut sessions: Sessions) {
    if let Some(desk) = shared.desks.get(index) {
        while shared.queue.fill(desk) {
            while let Some(job) = desk.next() {
                if job.queued.elapsed() > shared.deadline {
                    job.refuse(OpError::Deadline);
                } else if !shared.state.is_ready() {
                    job.refuse(OpError::SlotNotReady(shared.state.get()));
                } else {
                    desk.begin(job.done);
                    call(shared, desk, index, &mut sessions, &job.work);
                }
            }
        }
    }
    sessions.give_back(shared);
}

/// One call, timed and answered.
fn call(shared: &Shared, desk: &Desk, index: usize, sessions: &mut Sessions, work: &Work) {
    let began = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| perform(shared, index, sessions, work)));
    let outcome = outcome.unwrap_or_else(|_| {
        Err(OpError::Token(HsmError::Argument {
            what: "call",
            reason: "panicked; this is a fault of this program".to_owned(),
        }))
    });
    let outcome = outcome.map_err(|error| judged(shared, error));
    let ok = matches!(
        &outcome,
        Ok(_) | Err(OpError::AuthenticationFailed | OpError::TooShort)
    );
    shared.observe(work.name(), began.elapsed(), ok);
    if let Some(done) = desk.end() {
        done.answer(outcome);
    }
}

/// Also a call on the way, to open a session or to find a handle again, may tell that the token is in trouble.
fn judged(shared: &Shared, error: OpError) -> OpError {
    let OpError::Token(HsmError::Call(call)) = &error else {
        return error;
    };
    match classify(call) {
        Verdict::SlotFailed => shared.state.fail(TOKEN_ERROR, call.to_string()),
        Verdict::LoginAgain => shared.state.fail(LOGGED_OUT, call.to_string()),
        _ => return error,
    }
    OpError::SlotNotReady(shared.state.get())
}

/// Does the work, a second time if the table says that it can help.
fn perform(shared: &Shared, index: usize, sessions: &mut Sessions, work: &Work) -> Result<Output, OpError> {
    let mut second = false;
    loop {
        let Some((kek_use, copy)) = shared.copy_for(work.key_uid(), index) else {
            return Err(OpError::KeyNotLoaded);
        };
        let error = match attempt(shared, &sessions.current, copy, kek_use, work) {
            Ok(output) => return Ok(output),
            Err(GcmError::TooShort) => return Err(OpError::TooShort),
            Err(GcmError::Other(error)) => return Err(OpError::Token(error)),
            Err(GcmError::Call(error)) => error,
        };
        let verdict = classify(&error);
        match verdict {
            Verdict::CallersFault if matches!(work, Work::Encrypt(_)) => return Err(token_error(error)),
            Verdict::CallersFault => return Err(OpError::AuthenticationFailed),
            Verdict::LoginAgain | Verdict::SlotFailed | Verdict::Refused => return Err(token_error(error)),
            // Also the second time: the session is of no more use.
            Verdict::RetireSession => sessions.retire(shared)?,
            Verdict::Retry | Verdict::FindHandleAgain if second => return Err(token_error(error)),
            Verdict::Retry => {}
            Verdict::FindHandleAgain => match shared.reload(work.key_uid(), index, copy) {
                Ok(()) => {}
                // The token has lost the key: the node has to bring it back, which is no fault of the call.
                Err(HsmError::NotFound { .. } | HsmError::Quarantined { .. }) => {
                    return Err(OpError::KeyNotLoaded);
                }
                Err(error) => return Err(error.into()),
            },
        }
        if second {
            return Err(token_error(error));
        }
        second = true;
    }
}

fn token_error(error: crate::error::CallError) -> OpError {
    OpError::Token(HsmError::Call(error))
}

fn attempt(
    shared: &Shared,
    session: &Session,
    copy: Obj,
    kek_use: KekUse,
    work: &Work,
) -> Result<Output, GcmError> {
    let cipher = Cipher {
        raw: shared.module.raw(),
        session,
        key: copy,
    };
    match work {
        Work::Encrypt(job) => encrypt(shared, &cipher, kek_use, job).map(Output::Envelope),
        Work::DecryptV2(job) => cipher
            .open_v2(
                &job.header,
                &job.ciphertext,
                &job.context,
                &job.binding_value,
                &job.aad,
            )
            .map(Output::Plaintext),
        Work::DecryptV1(job) => cipher
            .open_v1(&job.ciphertext, &job.context, &job.binding_value)
            .map(Output::Plaintext),
    }
}

fn encrypt(
    shared: &Shared,
    cipher: &Cipher<'_>,
    kek_use: KekUse,
    job: &EncryptJob,
) -> Result<Vec<u8>, GcmError> {
    if kek_use != KekUse::EncryptDecrypt {
        return Err(GcmError::Other(HsmError::Argument {
            what: "key version",
            reason: format!("KEK {} is loaded for decryption only", job.key_uid),
        }));
    }
    // A fresh one for every attempt: whether a failed call has used the last one is unknown.
    let iv: [u8; IV_LEN] = random_bytes().map_err(|error| GcmError::Other(error.into()))?;
    let header = Header {
        purpose: Purpose::Data,
        binding: job.binding,
        key_uid: job.key_uid,
        version: job.version,
        iv,
    };
    let aad = aad_v2(&header.encode(), &job.context, &job.binding_value, &job.aad);
    cipher.seal(
        shared.module.profile().iv_source,
        &header,
        &aad,
        job.plaintext.as_slice(),
    )
}
