//! What a thread does in the token: with a session and copies of the keys of its own, and with a return code
//! what the table says. A bad ciphertext must never cost more than its own answer.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use super::job::Term;
use super::queue::Desk;
use super::sessions::Sessions;
use super::shared::Shared;
use super::state::{LOGGED_OUT, TOKEN_ERROR};
use super::work::{Ciphertext, DataKeyJob, DecryptJob, DecryptV1Job, EncryptJob, Output, RewrapJob, Work};
use crate::envelope::{Binding, Header, IV_LEN, Purpose, aad_v2};
use crate::error::{CallError, HsmError, OpError};
use crate::gcm::{Cipher, GcmError};
use crate::kek::KekUse;
use crate::names::KeyUid;
use crate::return_codes::{Verdict, classify, may_be_the_token};
use crate::secrets::{Plaintext, random_bytes};

/// A thread and what it works with.
pub(crate) struct Worker<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) desk: &'a Desk,
    pub(crate) index: usize,
    pub(crate) sessions: &'a mut Sessions,
}

/// A plaintext and what it is to be encrypted under.
struct Seal<'a> {
    purpose: Purpose,
    key_uid: KeyUid,
    version: u32,
    context: &'a str,
    binding: Binding,
    binding_value: &'a str,
    aad: &'a [u8],
    plaintext: &'a Plaintext,
}

impl Worker<'_> {
    /// Does one thing, whose form has been checked, and begins nothing of it that might end after its caller has gone.
    pub(crate) fn item(&mut self, work: &Work, term: Term) -> Result<Output, OpError> {
        match work {
            Work::Encrypt(job) => self.encrypt(job).map(Output::Envelope),
            Work::DecryptV2(job) => self.open_v2(job).map(Output::Plaintext),
            Work::DecryptV1(job) => self.open_v1(job).map(Output::Plaintext),
            Work::Rewrap(job) => self.rewrap(job, term).map(Output::Envelope),
            Work::DataKey(job) => self.data_key(job),
        }
    }

    fn encrypt(&mut self, job: &EncryptJob) -> Result<Vec<u8>, OpError> {
        self.seal(&Seal {
            purpose: job.purpose,
            key_uid: job.key_uid,
            version: job.version,
            context: &job.context,
            binding: job.binding,
            binding_value: &job.binding_value,
            aad: &job.aad,
            plaintext: &job.plaintext,
        })
    }

    fn rewrap(&mut self, job: &RewrapJob, term: Term) -> Result<Vec<u8>, OpError> {
        // v1 had no purposes and no associated data of the caller's.
        let (purpose, plaintext, context, aad) = match &job.from {
            Ciphertext::V2(from) => {
                let aad = from.aad.as_slice();
                (from.header.purpose, self.open_v2(from)?, &from.context, aad)
            }
            Ciphertext::V1(from) => {
                let aad = b"".as_slice();
                (Purpose::Data, self.open_v1(from)?, &from.context, aad)
            }
        };
        // The second call has a deadline of its own, and a new ciphertext that nobody waits for costs an invocation.
        if term.is_too_short(self.shared.deadline) {
            return Err(OpError::NotBegun);
        }
        if !self.desk.next_call() {
            return Err(OpError::Deadline);
        }
        self.seal(&Seal {
            purpose,
            key_uid: job.key_uid,
            version: job.version,
            context,
            binding: job.binding,
            binding_value: &job.binding_value,
            aad,
            plaintext: &plaintext,
        })
    }

    fn data_key(&mut self, job: &DataKeyJob) -> Result<Output, OpError> {
        let plaintext = Plaintext::random(job.size.bytes()).map_err(HsmError::from)?;
        let envelope = self.seal(&Seal {
            purpose: Purpose::DataKey,
            key_uid: job.key_uid,
            version: job.version,
            context: &job.context,
            binding: job.binding,
            binding_value: &job.binding_value,
            aad: &job.aad,
            plaintext: &plaintext,
        })?;
        Ok(Output::DataKey {
            envelope,
            plaintext: job.plaintext.then_some(plaintext),
        })
    }

    fn seal(&mut self, seal: &Seal<'_>) -> Result<Vec<u8>, OpError> {
        let shared = self.shared;
        self.call("encrypt", seal.key_uid, false, |cipher| {
            encrypt(shared, cipher, seal)
        })
    }

    fn open_v2(&mut self, job: &DecryptJob) -> Result<Plaintext, OpError> {
        self.call("decrypt", job.header.key_uid, true, |cipher| {
            cipher.open_v2(
                &job.header,
                &job.ciphertext,
                &job.context,
                &job.binding_value,
                &job.aad,
            )
        })
    }

    fn open_v1(&mut self, job: &DecryptV1Job) -> Result<Plaintext, OpError> {
        self.call("decrypt_v1", job.key_uid, true, |cipher| {
            cipher.open_v1(&job.ciphertext, &job.context, &job.binding_value)
        })
    }

    /// One call of the token, timed and reported. `opens` says that a wrong ciphertext may be its fault.
    fn call<T>(
        &mut self,
        name: &'static str,
        key_uid: KeyUid,
        opens: bool,
        attempt: impl Fn(&Cipher<'_>) -> Result<T, GcmError>,
    ) -> Result<T, OpError> {
        let (shared, began) = (self.shared, Instant::now());
        let outcome = catch_unwind(AssertUnwindSafe(|| self.perform(key_uid, opens, attempt)));
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
        shared.observe(name, began.elapsed(), ok);
        outcome
    }

    /// Makes the call, a second time if the table says that it can help.
    fn perform<T>(
        &mut self,
        key_uid: KeyUid,
        opens: bool,
        attempt: impl Fn(&Cipher<'_>) -> Result<T, GcmError>,
    ) -> Result<T, OpError> {
        let shared = self.shared;
        let (mut second, mut sound) = (false, false);
        loop {
            let Some((kek_use, copy)) = shared.copy_for(key_uid, self.index) else {
                return Err(OpError::KeyNotLoaded);
            };
            // Retired while the job waited: whoever asks again gets the version that is active now.
            if !opens && kek_use != KekUse::EncryptDecrypt {
                return Err(OpError::KeyNotLoaded);
            }
            let cipher = Cipher {
                raw: shared.module.raw(),
                session: self.sessions.current(),
                key: copy,
            };
            let error = match attempt(&cipher) {
                Ok(output) => return Ok(output),
                Err(GcmError::TooShort) => return Err(OpError::TooShort),
                Err(GcmError::Other(error)) => return Err(OpError::Token(error)),
                Err(GcmError::Call(error)) => error,
            };
            match classify(&error) {
                // Whoever is told that a ciphertext is wrong may throw it away: it has to be refused before and after the
                // key has opened something else, so that no trouble that ends meanwhile is taken for it.
                Verdict::CallersFault if opens && may_be_the_token(&error) => {
                    if sound {
                        return Err(OpError::AuthenticationFailed);
                    }
                    if !self.desk.next_call() {
                        return Err(OpError::Deadline);
                    }
                    sound = shared.opens_known(key_uid, &cipher);
                    if !self.desk.next_call() {
                        return Err(OpError::Deadline);
                    }
                    if sound {
                        continue;
                    }
                }
                Verdict::CallersFault if opens => return Err(OpError::AuthenticationFailed),
                Verdict::CallersFault => return Err(token_error(error)),
                Verdict::LoginAgain | Verdict::SlotFailed | Verdict::Refused => {
                    return Err(token_error(error));
                }
                // Also the second time: the session is of no more use.
                Verdict::RetireSession => self.sessions.retire(shared)?,
                Verdict::Retry | Verdict::FindHandleAgain if second => return Err(token_error(error)),
                Verdict::Retry => {}
                Verdict::FindHandleAgain => match shared.reload(key_uid, self.index, copy) {
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
            // What the key has opened before this trouble says nothing of what comes after it.
            (second, sound) = (true, false);
        }
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

fn token_error(error: CallError) -> OpError {
    OpError::Token(HsmError::Call(error))
}

fn encrypt(shared: &Shared, cipher: &Cipher<'_>, seal: &Seal<'_>) -> Result<Vec<u8>, GcmError> {
    // A fresh one for every attempt: whether a failed call has used the last one is unknown.
    let iv: [u8; IV_LEN] = random_bytes().map_err(|error| GcmError::Other(error.into()))?;
    let header = Header {
        purpose: seal.purpose,
        binding: seal.binding,
        key_uid: seal.key_uid,
        version: seal.version,
        iv,
    };
    let aad = aad_v2(&header.encode(), seal.context, seal.binding_value, seal.aad);
    cipher.seal(
        shared.module.profile().iv_source,
        &header,
        &aad,
        seal.plaintext.as_slice(),
    )
}
