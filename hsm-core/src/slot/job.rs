//! Jobs of the data path and the callbacks that answer them. Every accepted job is answered
//! exactly once, by whoever takes its callback first.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use crate::envelope::{Binding, Header};
use crate::error::OpError;
use crate::names::KeyUid;
use crate::secrets::Plaintext;

/// A plaintext to be encrypted into an envelope.
pub struct EncryptJob {
    /// The key version.
    pub key_uid: KeyUid,
    /// Its number in the context.
    pub version: u32,
    /// Name of the context.
    pub context: Arc<str>,
    /// Whom the ciphertext is bound to.
    pub binding: Binding,
    /// First OU, CN or empty, by `binding`.
    pub binding_value: Arc<str>,
    /// The caller's associated data.
    pub aad: Vec<u8>,
    /// What to encrypt.
    pub plaintext: Plaintext,
}

/// An envelope to be opened.
pub struct DecryptJob {
    /// The envelope's own header, parsed and checked against the context's key versions.
    pub header: Header,
    /// The whole envelope.
    pub ciphertext: Vec<u8>,
    /// Name of the context.
    pub context: Arc<str>,
    /// First OU, CN or empty, by the header's binding.
    pub binding_value: Arc<str>,
    /// The caller's associated data.
    pub aad: Vec<u8>,
}

/// A v1 ciphertext to be opened: `nonce(12) ‖ ct ‖ tag(16)`.
pub struct DecryptV1Job {
    /// The key version whose stored label the caller named.
    pub key_uid: KeyUid,
    /// Nonce, ciphertext, tag.
    pub ciphertext: Vec<u8>,
    /// Name of the context.
    pub context: Arc<str>,
    /// First OU or CN, by the context's mode.
    pub binding_value: Arc<str>,
}

pub(crate) enum Work {
    Encrypt(EncryptJob),
    DecryptV2(DecryptJob),
    DecryptV1(DecryptV1Job),
}

impl Work {
    pub(crate) fn key_uid(&self) -> KeyUid {
        match self {
            Self::Encrypt(job) => job.key_uid,
            Self::DecryptV2(job) => job.header.key_uid,
            Self::DecryptV1(job) => job.key_uid,
        }
    }

    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Encrypt(_) => "encrypt",
            Self::DecryptV2(_) => "decrypt",
            Self::DecryptV1(_) => "decrypt_v1",
        }
    }
}

type Callback<T> = Box<dyn FnOnce(Result<T, OpError>) + Send>;

pub(crate) enum Done {
    Envelope(Callback<Vec<u8>>),
    Plaintext(Callback<Plaintext>),
}

/// What a call gave.
pub(crate) enum Output {
    Envelope(Vec<u8>),
    Plaintext(Plaintext),
}

impl Done {
    /// Answers. A panic in the callback is the caller's own and must not end the slot's thread.
    pub(crate) fn answer(self, outcome: Result<Output, OpError>) {
        let answer = || match (self, outcome) {
            (Self::Envelope(done), Ok(Output::Envelope(envelope))) => done(Ok(envelope)),
            (Self::Plaintext(done), Ok(Output::Plaintext(plaintext))) => done(Ok(plaintext)),
            (Self::Envelope(done), Err(error)) => done(Err(error)),
            (Self::Plaintext(done), Err(error)) => done(Err(error)),
            // Each kind of work has one kind of output and of callback.
            (Self::Envelope(done), Ok(_)) => done(Err(OpError::KeyNotLoaded)),
            (Self::Plaintext(done), Ok(_)) => done(Err(OpError::KeyNotLoaded)),
        };
        let _ = catch_unwind(AssertUnwindSafe(answer));
    }
}

pub(crate) struct Job {
    pub(crate) work: Work,
    pub(crate) done: Done,
    pub(crate) queued: Instant,
}

impl Job {
    pub(crate) fn new(work: Work, done: Done) -> Self {
        Self {
            work,
            done,
            queued: Instant::now(),
        }
    }

    pub(crate) fn refuse(self, error: OpError) {
        self.done.answer(Err(error));
    }
}
