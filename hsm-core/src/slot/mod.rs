//! A slot: one token, opened for as long as the process lives, with threads of its own. A
//! failure stays inside it; other slots never wait for it and never learn of it.

mod adopt;
mod control;
mod executor;
mod health;
mod job;
mod open;
mod perform;
mod queue;
mod reseal;
mod retired;
mod sessions;
mod shared;
mod state;
mod watchdog;
mod work;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use job::{OnBatchDone, OnDone, SHARED_BY, batch_time, batch_wait};
pub use reseal::Reseal;
pub use state::{SlotState, TOKEN_REPLACED};
pub use work::{
    Ciphertext, DataKeyJob, DataKeySize, DecryptJob, DecryptV1Job, EncryptJob, Output, RewrapJob, Work,
};

use crate::error::{HsmError, OpError, SlotError};
use crate::inventory::{self, ForeignObject, HeldKey, Inventory};
use crate::kek::{self, GenerateKek, GeneratedKek, ImportKek, KekUse};
use crate::module::{Module, TokenInfo};
use crate::names::{KeyUid, TransportId};
use crate::secrets::{Pin, Plaintext};
use crate::seeded::bug;
use crate::transport::{CHECK_LEN, OfferedTransportKey};
use crate::{node_key, transport};
use job::Job;
use shared::Shared;

/// Called after every operation with its name, how long it took, and whether the token did what
/// it should. Called on the slot's threads: it must be quick and must not call the slot.
pub type OnCall = Arc<dyn Fn(&'static str, Duration, bool) + Send + Sync>;

/// How to open a slot.
pub struct SlotOptions {
    /// Configured name of the slot, for messages and thread names.
    pub name: String,
    /// Label of its token.
    pub label: String,
    /// The user PIN.
    pub pin: Pin,
    /// Directory for the markers of refused PINs.
    pub state_dir: PathBuf,
    /// Accept a PIN that could be guessed.
    pub insecure_pin: bool,
    /// Log in although the token reports wrong PINs. Never applies to a PIN that was refused, to a last
    /// attempt or to a locked PIN.
    pub retry_pin: bool,
    /// Threads that encrypt and decrypt. One is best for SoftHSM.
    pub threads: usize,
    /// Jobs that may wait; of a batch every item is one.
    pub queue: usize,
    /// How long a job may wait before it is answered `NotBegun`, and then its call may take before that is `Deadline`.
    pub deadline: Duration,
    /// How long a control operation may take: making an RSA key takes seconds. A test of the token has three times
    /// `deadline` instead, and as much again for each key that it has to load anew.
    pub control_deadline: Duration,
    /// For metrics.
    pub on_call: Option<OnCall>,
}

impl SlotOptions {
    /// One thread, 1,024 waiting jobs, 2 s for a job and 30 s for a control operation.
    #[must_use]
    pub fn new(name: &str, label: &str, pin: Pin, state_dir: PathBuf) -> Self {
        Self {
            name: name.to_owned(),
            label: label.to_owned(),
            pin,
            state_dir,
            insecure_pin: false,
            retry_pin: false,
            threads: 1,
            queue: 1024,
            deadline: Duration::from_secs(2),
            control_deadline: Duration::from_secs(30),
            on_call: None,
        }
    }
}

/// An open slot. Clones are the same slot; it is closed when the last one is dropped.
#[derive(Clone)]
pub struct Slot(Arc<Inner>);

struct Inner {
    shared: Arc<Shared>,
    /// What was torn when the slot was opened.
    torn: Vec<String>,
}

impl Slot {
    /// Opens the token: exclusive lock, login by the PIN rules, removal of torn objects, threads.
    /// Blocks for as long as the token takes, without a deadline.
    pub fn open(module: &Arc<Module>, options: SlotOptions) -> Result<Self, SlotError> {
        open::open(module, options)
    }

    /// Configured name of the slot.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.shared.name
    }

    /// Label of the token.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.0.shared.token.label
    }

    /// Serial number of the token.
    #[must_use]
    pub fn serial(&self) -> &str {
        &self.0.shared.token.serial
    }

    /// What the module says about the token.
    #[must_use]
    pub fn token(&self) -> &TokenInfo {
        &self.0.shared.token
    }

    /// The module the token is in.
    #[must_use]
    pub fn module(&self) -> &Arc<Module> {
        &self.0.shared.module
    }

    /// Whether it serves.
    #[must_use]
    pub fn state(&self) -> SlotState {
        self.0.shared.state.get()
    }

    /// Fails the slot for as long as it is open: its token turned out to be another one than the slot's.
    /// Its session copies go; the token itself is left as it is.
    pub fn disown(&self, reason: &str) -> Result<(), HsmError> {
        let shared = &self.0.shared;
        shared.state.fail(state::TOKEN_REPLACED, reason);
        shared.control("disown", |token| {
            shared.want_nothing();
            shared.drop_all_copies(token);
            Ok(())
        })
    }

    /// Jobs waiting for a thread.
    #[must_use]
    pub fn queue_depth(&self) -> usize {
        self.0.shared.queue.depth()
    }

    // Control operations. They block, one at a time.

    /// Public key of the token's own pair as SubjectPublicKeyInfo (DER); `None` if it has none.
    pub fn find_node_key(&self) -> Result<Option<Vec<u8>>, HsmError> {
        let shared = &self.0.shared;
        shared.control("find_node_key", |token| {
            health::require_login(shared, token)?;
            node_key::find(token)
        })
    }

    /// As [`Slot::find_node_key`]; makes the pair if there is none. Only for a token that is known to
    /// be this slot's, or to be nobody's yet.
    pub fn node_key(&self) -> Result<Vec<u8>, HsmError> {
        self.0.shared.control("node_key", node_key::ensure)
    }

    /// Makes a transport key and returns its check; one that is there already is left as it is.
    pub fn create_transport_key(&self, id: TransportId) -> Result<[u8; CHECK_LEN], HsmError> {
        self.0
            .shared
            .control("create_transport_key", |token| transport::create(token, id))
    }

    /// Makes a transport key and wraps it to each of these node keys; nothing of it stays in the token. The caller answers
    /// for whose they are.
    pub fn offer_transport_key(&self, recipient_spkis: &[Vec<u8>]) -> Result<OfferedTransportKey, HsmError> {
        self.0.shared.control("offer_transport_key", |token| {
            transport::offer(token, recipient_spkis)
        })
    }

    /// Check of a transport key, to be compared with the committed one; `None` if it is not here.
    pub fn transport_check(&self, id: TransportId) -> Result<Option<[u8; CHECK_LEN]>, HsmError> {
        self.0
            .shared
            .control("transport_check", |token| transport::check(token, id))
    }

    /// Wraps a transport key to another token's node key. The caller answers for whose it is.
    pub fn grant_transport_key(&self, id: TransportId, recipient_spki: &[u8]) -> Result<Vec<u8>, HsmError> {
        self.0.shared.control("grant_transport_key", |token| {
            transport::grant(token, id, recipient_spki, false)
        })
    }

    /// As [`Self::grant_transport_key`], for a token that could not use what it was granted before: with the hash that
    /// every module knows, if this one allows it.
    pub fn grant_transport_key_anew(
        &self,
        id: TransportId,
        recipient_spki: &[u8],
    ) -> Result<Vec<u8>, HsmError> {
        self.0.shared.control("grant_transport_key", |token| {
            transport::grant(token, id, recipient_spki, true)
        })
    }

    /// Takes a granted transport key, if it is the committed one. On disk when this returns.
    pub fn accept_transport_key(
        &self,
        id: TransportId,
        blob: &[u8],
        expected_check: &[u8; CHECK_LEN],
    ) -> Result<(), HsmError> {
        self.0.shared.control("accept_transport_key", |token| {
            transport::accept(token, id, blob, expected_check)
        })
    }

    /// Destroys a transport key whose generation has ended. Returns how many objects there were; none is fine. It is not
    /// found by its id when this returns. An error if the token is not there, or has forgotten the login: it cannot be
    /// searched then.
    pub fn destroy_transport_key(&self, id: TransportId) -> Result<usize, HsmError> {
        let shared = &self.0.shared;
        shared.control("destroy_transport_key", |token| {
            // As for a KEK: without either nothing is found, and what is not found would be taken for destroyed.
            health::is_there(shared)?;
            health::require_login(shared, token)?;
            transport::destroy(token, id)
        })
    }

    /// Generates a key, wraps it, makes its check record. Nothing of it stays in the token.
    pub fn generate_kek(&self, kek: &GenerateKek) -> Result<GeneratedKek, HsmError> {
        self.0
            .shared
            .control("generate_kek", |token| kek::generate(token, kek))
    }

    /// Imports a key. Proven and on disk when this returns; importing it again changes nothing. With
    /// [`ImportKek::replace`] it takes the place of a quarantined object, whose quarantine ends.
    pub fn import_kek(&self, kek: &ImportKek) -> Result<(), HsmError> {
        let shared = &self.0.shared;
        shared.control("import_kek", |token| {
            if kek.replace {
                shared.drop_copies(token, kek.key_uid);
            } else {
                shared.usable(kek.key_uid)?;
            }
            let outcome = kek::import(token, kek);
            shared.note_quarantine(token, kek.key_uid, &outcome);
            if outcome.is_ok() {
                shared.note_known(kek.key_uid, kek.version, &kek.context, &kek.check_record);
                if kek.replace {
                    shared.end_quarantine(kek.key_uid);
                }
            }
            outcome
        })
    }

    /// Every KEK in the token, and every other key that could be taken for one. A KEK that is
    /// there twice is quarantined from here on.
    pub fn inventory(&self) -> Result<Vec<HeldKey>, HsmError> {
        self.objects().map(|inventory| inventory.keks)
    }

    /// Objects that this crate did not make; never touched.
    pub fn foreign_objects(&self) -> Result<Vec<ForeignObject>, HsmError> {
        self.objects().map(|inventory| inventory.foreign)
    }

    /// Everything in the token, in one enumeration.
    pub fn objects(&self) -> Result<Inventory, HsmError> {
        let shared = &self.0.shared;
        shared.control("inventory", |token| {
            health::require_login(shared, token)?;
            let mut inventory = inventory::take(token)?;
            for key in inventory.keks.iter().filter(|key| key.duplicate) {
                shared.quarantine(
                    key.key_uid,
                    "more than one object has this id; destroy the id and import the key again",
                );
                shared.drop_copies(token, key.key_uid);
            }
            // What failed its check record looks like any other key.
            for key in inventory.keks.iter_mut().filter(|key| key.problem.is_none()) {
                key.problem = shared.quarantined(key.key_uid);
            }
            Ok(inventory)
        })
    }

    /// Makes the session copies that serve encryption and decryption. Loading with another use
    /// replaces them.
    pub fn load_kek(&self, key_uid: KeyUid, kek_use: KekUse) -> Result<(), HsmError> {
        let shared = &self.0.shared;
        shared.control("load_kek", |token| {
            shared.usable(key_uid)?;
            if shared.loaded_use(key_uid) != Some(kek_use) {
                let outcome = shared.load(token, key_uid, kek_use);
                shared.note_quarantine(token, key_uid, &outcome);
                outcome?;
            }
            shared.want(key_uid, Some(kek_use));
            Ok(())
        })
    }

    /// Destroys the session copies; the token object stays.
    pub fn unload_kek(&self, key_uid: KeyUid) -> Result<(), HsmError> {
        let shared = &self.0.shared;
        shared.control("unload_kek", |token| {
            shared.want(key_uid, None);
            shared.drop_copies(token, key_uid);
            Ok(())
        })
    }

    /// Destroys a key, session copies first, and ends its quarantine. Returns how many token
    /// objects there were; none is fine. Neither object nor copy is found by its id when this returns. An error if the
    /// token is not there, or has forgotten the login: it cannot be searched then.
    pub fn destroy_kek(&self, key_uid: KeyUid) -> Result<usize, HsmError> {
        let shared = &self.0.shared;
        shared.control("destroy_kek", |token| {
            // Without either nothing is found, and what is not found would be taken for destroyed.
            health::is_there(shared)?;
            health::require_login(shared, token)?;
            if !bug("bug::forget_session_copies") {
                shared.want(key_uid, None);
                shared.drop_copies(token, key_uid);
                kek::destroy_copies(token, key_uid)?;
            }
            let destroyed = kek::destroy(token, key_uid)?;
            shared.end_quarantine(key_uid);
            shared.forget_known(key_uid);
            Ok(destroyed)
        })
    }

    /// Judges the slot's health: finds the token object again and decrypts the check record
    /// through it and through every session copy. Failure fails the slot; success makes a failed
    /// slot ready. A key that fails its own check record is quarantined besides, so that no success of
    /// another key brings it back.
    pub fn known_answer_test(
        &self,
        key_uid: KeyUid,
        version: u32,
        context: &str,
        check_record: &[u8],
    ) -> Result<(), HsmError> {
        health::known_answer_test(&self.0.shared, key_uid, version, context, check_record)
    }

    /// Judges the health of a slot that has no key to be judged by: the token answers, and knows the
    /// login. Success makes a failed slot ready.
    pub fn check_session(&self) -> Result<(), HsmError> {
        health::check_session(&self.0.shared)
    }

    /// Logs in again if the token has forgotten the login, by the rules for PINs. `retry` as in
    /// [`SlotOptions::retry_pin`]. The slot serves again once a test has passed.
    pub fn log_in(&self, retry: bool) -> Result<(), HsmError> {
        health::log_in(&self.0.shared, retry)
    }

    /// Removes what a kill left behind, and says what that was; includes what opening the slot
    /// removed. The keys are to be imported again.
    pub fn remove_torn_objects(&self) -> Result<Vec<String>, HsmError> {
        let mut torn = self.0.torn.clone();
        torn.extend(self.0.shared.control("remove_torn_objects", |token| {
            inventory::remove_torn(token, false)
        })?);
        Ok(torn)
    }

    // Data operations. They return at once; `done` is called on one of the slot's threads, or
    // not at all if an error is returned here. `until` is when whoever asks waits no longer, if that may be before the
    // slot's own bounds: no call is begun that might end after it.

    /// Does one thing.
    pub fn run(&self, work: Work, until: Option<Instant>, done: OnDone) -> Result<(), OpError> {
        work.check()?;
        self.check_ready()?;
        let shared = &self.0.shared;
        if work.keys().any(|key| shared.loaded_use(key).is_none()) {
            return Err(OpError::KeyNotLoaded);
        }
        shared.queue.push(Job::one(work, until, done), &shared.desks)
    }

    /// Does many things on one thread with its session, in their order. While other jobs wait the batch gives way
    /// to them every few calls. Each item takes a place in the queue, until the batch is done; its own turns have
    /// [`batch_time`] of the slot's deadline, all of it [`batch_wait`], and every call in it the deadline of a call. What is wrong with one
    /// item is that item's answer and no other's; of those that there is no time for it is [`OpError::NotBegun`].
    pub fn run_batch(
        &self,
        works: Vec<Work>,
        until: Option<Instant>,
        done: OnBatchDone,
    ) -> Result<(), OpError> {
        self.check_ready()?;
        let shared = &self.0.shared;
        shared.queue.push(Job::batch(works, until, done), &shared.desks)
    }

    /// Encrypts into an envelope.
    pub fn encrypt(
        &self,
        job: EncryptJob,
        done: impl FnOnce(Result<Vec<u8>, OpError>) + Send + 'static,
    ) -> Result<(), OpError> {
        let done = move |outcome: Result<Output, OpError>| done(outcome.and_then(Output::envelope));
        self.run(Work::Encrypt(job), None, Box::new(done))
    }

    /// Opens an envelope.
    pub fn decrypt_v2(
        &self,
        job: DecryptJob,
        done: impl FnOnce(Result<Plaintext, OpError>) + Send + 'static,
    ) -> Result<(), OpError> {
        let done = move |outcome: Result<Output, OpError>| done(outcome.and_then(Output::plaintext));
        self.run(Work::DecryptV2(job), None, Box::new(done))
    }

    /// Opens a v1 ciphertext.
    pub fn decrypt_v1(
        &self,
        job: DecryptV1Job,
        done: impl FnOnce(Result<Plaintext, OpError>) + Send + 'static,
    ) -> Result<(), OpError> {
        let done = move |outcome: Result<Output, OpError>| done(outcome.and_then(Output::plaintext));
        self.run(Work::DecryptV1(job), None, Box::new(done))
    }

    fn check_ready(&self) -> Result<(), OpError> {
        let state = &self.0.shared.state;
        if state.is_ready() {
            Ok(())
        } else {
            Err(OpError::SlotNotReady(state.get()))
        }
    }

    #[cfg(feature = "test-support")]
    pub(crate) fn test_control<T>(
        &self,
        work: impl FnOnce(&crate::token::Token<'_>) -> Result<T, HsmError>,
    ) -> Result<T, HsmError> {
        self.0.shared.control("test", work)
    }
}

/// How long closing a slot waits for calls that are running.
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);

impl Drop for Inner {
    /// Answers what waits, destroys the copies and lets go of the token. If a call hangs, its
    /// thread keeps the token locked: it may still write.
    fn drop(&mut self) {
        let shared = &self.shared;
        shared.state.fail(state::CLOSED, "the slot has been closed");
        let ended = shared.stop(CLOSE_PATIENCE);
        watchdog::refuse_waiting(shared);
        let cleared = shared.control_within(CLOSE_PATIENCE, shared.control_deadline, "close", |token| {
            shared.drop_all_copies(token);
            Ok(())
        });
        if let Some(session) = shared.control.take_session() {
            shared.module.give_back(&shared.token.serial, session);
        }
        if ended && cleared.is_ok() {
            shared.release();
        }
    }
}
