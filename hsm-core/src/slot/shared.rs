//! What a slot's threads, its control operations and its watchdog share: the token, the state,
//! the queue and the table of session copies.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use cryptoki::session::Session;

use super::OnCall;
use super::control::{Control, Turn};
use super::queue::{Desk, Queue};
use super::state::{LOGGED_OUT, StateCell, TOKEN_ERROR};
use crate::error::{CallError, HsmError};
use crate::ffi::Obj;
use crate::gcm::Cipher;
use crate::kat::Known;
use crate::kek::{self, KekUse};
use crate::module::{Module, TokenInfo, lock};
use crate::names::KeyUid;
use crate::return_codes::{Verdict, classify};
use crate::secrets::Pin;
use crate::softhsm_files::TokenFiles;
use crate::token::Token;
use crate::token_lock::TokenLock;

/// Deadlines of a job that a test of the token may take, or one step of it: it has several calls.
const PROBE_DEADLINES: u32 = 3;

/// The session copies of a key version, one for each thread.
#[derive(Clone)]
struct Loaded {
    kek_use: KekUse,
    copies: Vec<Obj>,
}

#[derive(Default)]
struct Running {
    stop: bool,
    threads: usize,
}

pub(crate) struct Shared {
    pub(crate) name: String,
    pub(crate) token: TokenInfo,
    pub(crate) module: Arc<Module>,
    pub(crate) files: Option<TokenFiles>,
    /// Kept because a token may forget the login.
    pub(crate) pin: Pin,
    pub(crate) state_dir: PathBuf,
    pub(crate) insecure_pin: bool,
    pub(crate) deadline: Duration,
    pub(crate) control_deadline: Duration,
    pub(crate) on_call: Option<OnCall>,
    pub(crate) state: StateCell,
    pub(crate) queue: Queue,
    pub(crate) desks: Vec<Desk>,
    pub(crate) control: Control,
    keys: RwLock<HashMap<KeyUid, Loaded>>,
    /// What the node asked for, so that lost copies can be made again.
    wanted: Mutex<BTreeMap<KeyUid, KekUse>>,
    quarantined: Mutex<BTreeMap<KeyUid, String>>,
    /// What each key has opened here, until it is destroyed.
    known: RwLock<HashMap<KeyUid, Arc<Known>>>,
    running: Mutex<Running>,
    changed: Condvar,
    lock: Mutex<Option<TokenLock>>,
}

/// The parts of [`Shared`] that opening a slot finds out.
pub(crate) struct Parts {
    pub(crate) name: String,
    pub(crate) token: TokenInfo,
    pub(crate) module: Arc<Module>,
    pub(crate) files: Option<TokenFiles>,
    pub(crate) pin: Pin,
    pub(crate) state_dir: PathBuf,
    pub(crate) insecure_pin: bool,
    pub(crate) deadline: Duration,
    pub(crate) control_deadline: Duration,
    pub(crate) on_call: Option<OnCall>,
    pub(crate) threads: usize,
    pub(crate) queue: usize,
    pub(crate) session: Session,
    pub(crate) lock: TokenLock,
}

impl Shared {
    pub(crate) fn new(parts: Parts) -> Self {
        Self {
            control: Control::new(&parts.name, parts.session),
            name: parts.name,
            token: parts.token,
            module: parts.module,
            files: parts.files,
            pin: parts.pin,
            state_dir: parts.state_dir,
            insecure_pin: parts.insecure_pin,
            deadline: parts.deadline,
            control_deadline: parts.control_deadline,
            on_call: parts.on_call,
            state: StateCell::ready(),
            queue: Queue::new(parts.queue, parts.threads),
            desks: (0..parts.threads).map(|_| Desk::default()).collect(),
            keys: RwLock::default(),
            wanted: Mutex::default(),
            quarantined: Mutex::default(),
            known: RwLock::default(),
            running: Mutex::default(),
            changed: Condvar::new(),
            lock: Mutex::new(Some(parts.lock)),
        }
    }

    /// Runs one control operation on the token, alone.
    pub(crate) fn control<T>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&Token<'_>) -> Result<T, HsmError>,
    ) -> Result<T, HsmError> {
        self.control_within(self.control_deadline, self.control_deadline, operation, work)
    }

    /// As [`Shared::control`], for a test of the token: no more than what jobs do, so a token that takes so much
    /// longer hangs, and nobody should wait for a key generation's time to know it.
    pub(crate) fn probe(
        &self,
        operation: &'static str,
        work: impl FnOnce(&Token<'_>) -> Result<(), HsmError>,
    ) -> Result<(), HsmError> {
        let limit = self.control_deadline.min(self.deadline * PROBE_DEADLINES);
        self.control_within(self.control_deadline, limit, operation, work)
    }

    /// As [`Shared::control`], waiting at most `patience` for the operation before it; overdue after `limit`.
    pub(crate) fn control_within<T>(
        &self,
        patience: Duration,
        limit: Duration,
        operation: &'static str,
        work: impl FnOnce(&Token<'_>) -> Result<T, HsmError>,
    ) -> Result<T, HsmError> {
        let mut turn = self.control.enter(operation, patience, limit)?;
        let began = Instant::now();
        let outcome = match turn.session() {
            Some(session) => work(&Token {
                raw: self.module.raw(),
                session,
                profile: self.module.profile(),
                files: self.files.as_ref(),
            }),
            None => Err(HsmError::Argument {
                what: "slot",
                reason: "has been closed".to_owned(),
            }),
        };
        self.observe(operation, began.elapsed(), outcome.is_ok());
        if let Err(HsmError::Call(error)) = &outcome {
            self.after_error(error, &mut turn);
        }
        outcome
    }

    fn after_error(&self, error: &CallError, turn: &mut Turn<'_>) {
        match classify(error) {
            Verdict::RetireSession => {
                let replaced = self
                    .module
                    .session(&self.token)
                    .is_ok_and(|fresh| turn.retire(fresh));
                if !replaced {
                    self.state.fail(
                        TOKEN_ERROR,
                        format!("{error}, and no other session could be used"),
                    );
                }
            }
            Verdict::LoginAgain => self.state.fail(LOGGED_OUT, error.to_string()),
            Verdict::SlotFailed => self.state.fail(TOKEN_ERROR, error.to_string()),
            Verdict::Retry | Verdict::FindHandleAgain | Verdict::CallersFault | Verdict::Refused => {}
        }
    }

    pub(crate) fn observe(&self, operation: &'static str, took: Duration, ok: bool) {
        if let Some(on_call) = &self.on_call {
            on_call(operation, took, ok);
        }
    }

    /// The copy that thread `index` uses.
    pub(crate) fn copy_for(&self, key_uid: KeyUid, index: usize) -> Option<(KekUse, Obj)> {
        let keys = self.keys();
        let loaded = keys.get(&key_uid)?;
        loaded.copies.get(index).map(|copy| (loaded.kek_use, *copy))
    }

    /// How a loaded key may be used; `None` if it is not loaded.
    pub(crate) fn loaded_use(&self, key_uid: KeyUid) -> Option<KekUse> {
        self.keys().get(&key_uid).map(|loaded| loaded.kek_use)
    }

    pub(crate) fn copies(&self, key_uid: KeyUid) -> Vec<Obj> {
        self.keys()
            .get(&key_uid)
            .map(|loaded| loaded.copies.clone())
            .unwrap_or_default()
    }

    /// Makes session copies in place of those there are.
    pub(crate) fn load(&self, token: &Token<'_>, key_uid: KeyUid, kek_use: KekUse) -> Result<(), HsmError> {
        let held = kek::held(token, key_uid)?;
        let mut copies = Vec::with_capacity(self.desks.len());
        for _ in &self.desks {
            match kek::copy(token, key_uid, held, kek_use) {
                Ok(copy) => copies.push(copy),
                Err(error) => {
                    destroy_copies(token, &copies);
                    return Err(error);
                }
            }
        }
        let old = self.keys_mut().insert(key_uid, Loaded { kek_use, copies });
        if let Some(old) = old {
            destroy_copies(token, &old.copies);
        }
        Ok(())
    }

    /// Makes the copies again that the node wants and the slot has lost, each key a step of the operation that is running:
    /// all of thousands take longer than a test may. A key that cannot be loaded is left out: its jobs are answered with
    /// `KeyNotLoaded`.
    pub(crate) fn load_missing(&self, token: &Token<'_>) {
        let wanted = lock(&self.wanted).clone();
        for (key_uid, kek_use) in wanted {
            if self.loaded_use(key_uid).is_none() && self.usable(key_uid).is_ok() {
                self.control.next_step();
                let _ = self.load(token, key_uid, kek_use);
            }
        }
    }

    /// Makes the copies of one key again after a handle died in thread `index`; unless another thread has
    /// done so meanwhile, whose new copies must not be taken away from it.
    pub(crate) fn reload(&self, key_uid: KeyUid, index: usize, dead: Obj) -> Result<(), HsmError> {
        let Some(kek_use) = lock(&self.wanted).get(&key_uid).copied() else {
            return Err(HsmError::NotFound {
                what: "session copy of KEK",
                id: key_uid.to_string(),
            });
        };
        // The caller is a call of its own, and its deadline runs.
        self.control_within(self.deadline / 2, self.control_deadline, "reload_kek", |token| {
            self.usable(key_uid)?;
            if self
                .copy_for(key_uid, index)
                .is_some_and(|(_, copy)| copy != dead)
            {
                return Ok(());
            }
            self.load(token, key_uid, kek_use)
        })
    }

    pub(crate) fn drop_copies(&self, token: &Token<'_>, key_uid: KeyUid) {
        let old = self.keys_mut().remove(&key_uid);
        if let Some(old) = old {
            destroy_copies(token, &old.copies);
        }
    }

    pub(crate) fn drop_all_copies(&self, token: &Token<'_>) {
        let old = std::mem::take(&mut *self.keys_mut());
        for loaded in old.values() {
            destroy_copies(token, &loaded.copies);
        }
    }

    pub(crate) fn want(&self, key_uid: KeyUid, kek_use: Option<KekUse>) {
        let mut wanted = lock(&self.wanted);
        match kek_use {
            Some(kek_use) => wanted.insert(key_uid, kek_use),
            None => wanted.remove(&key_uid),
        };
    }

    pub(crate) fn want_nothing(&self) {
        lock(&self.wanted).clear();
    }

    /// Remembers that a key has opened its check record.
    pub(crate) fn note_known(&self, key_uid: KeyUid, version: u32, context: &str, record: &[u8]) {
        let known = Arc::new(Known::new(version, context, record));
        let mut all = self.known.write().unwrap_or_else(PoisonError::into_inner);
        all.insert(key_uid, known);
    }

    pub(crate) fn forget_known(&self, key_uid: KeyUid) {
        let mut all = self.known.write().unwrap_or_else(PoisonError::into_inner);
        all.remove(&key_uid);
    }

    /// Whether the cipher's key opens what it is known to open; also where nothing is known, and a return code has to be taken at
    /// its word.
    pub(crate) fn opens_known(&self, key_uid: KeyUid, cipher: &Cipher<'_>) -> bool {
        let all = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let known = all.get(&key_uid).cloned();
        drop(all);
        known.is_none_or(|known| known.opens(key_uid, cipher))
    }

    /// Why a key is quarantined, if it is.
    pub(crate) fn quarantined(&self, key_uid: KeyUid) -> Option<String> {
        lock(&self.quarantined).get(&key_uid).cloned()
    }

    /// An error if the key is quarantined.
    pub(crate) fn usable(&self, key_uid: KeyUid) -> Result<(), HsmError> {
        match self.quarantined(key_uid) {
            Some(reason) => Err(HsmError::Quarantined {
                what: kek::WHAT,
                id: key_uid.to_string(),
                reason,
            }),
            None => Ok(()),
        }
    }

    /// Remembers a verdict on this key, and takes its copies out of use.
    pub(crate) fn note_quarantine<T>(
        &self,
        token: &Token<'_>,
        key_uid: KeyUid,
        outcome: &Result<T, HsmError>,
    ) {
        let reason = match outcome {
            Err(HsmError::Quarantined { what, reason, .. }) if *what == kek::WHAT => reason,
            _ => return,
        };
        lock(&self.quarantined).insert(key_uid, reason.clone());
        self.drop_copies(token, key_uid);
    }

    pub(crate) fn quarantine(&self, key_uid: KeyUid, reason: &str) {
        lock(&self.quarantined)
            .entry(key_uid)
            .or_insert_with(|| reason.to_owned());
    }

    pub(crate) fn end_quarantine(&self, key_uid: KeyUid) {
        lock(&self.quarantined).remove(&key_uid);
    }

    /// A thread of the slot has started.
    pub(crate) fn thread_started(&self) {
        lock(&self.running).threads += 1;
    }

    /// A thread of the slot ends.
    pub(crate) fn thread_ended(&self) {
        lock(&self.running).threads -= 1;
        self.changed.notify_all();
    }

    /// Sleeps for `time`, or less if the slot is closed meanwhile: true then.
    pub(crate) fn wait_for_stop(&self, time: Duration) -> bool {
        let running = lock(&self.running);
        let (running, _) = self
            .changed
            .wait_timeout_while(running, time, |running| !running.stop)
            .unwrap_or_else(PoisonError::into_inner);
        running.stop
    }

    /// Ends the slot's threads. True once all have ended; a thread that hangs does not.
    pub(crate) fn stop(&self, patience: Duration) -> bool {
        lock(&self.running).stop = true;
        self.changed.notify_all();
        self.queue.close();
        let running = lock(&self.running);
        let (running, _) = self
            .changed
            .wait_timeout_while(running, patience, |running| running.threads > 0)
            .unwrap_or_else(PoisonError::into_inner);
        running.threads == 0
    }

    /// Lets another owner have the token.
    pub(crate) fn release(&self) {
        lock(&self.lock).take();
    }

    fn keys(&self) -> RwLockReadGuard<'_, HashMap<KeyUid, Loaded>> {
        self.keys.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn keys_mut(&self) -> RwLockWriteGuard<'_, HashMap<KeyUid, Loaded>> {
        self.keys.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A copy that cannot be destroyed dies with the process; nothing finds it any more.
fn destroy_copies(token: &Token<'_>, copies: &[Obj]) {
    for copy in copies {
        let _ = token.raw.destroy(token.session, *copy);
    }
}
