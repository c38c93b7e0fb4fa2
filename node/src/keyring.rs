//! What this node can encrypt and decrypt with right now, as one immutable snapshot: replicated
//! state joined with what the tokens really hold. Derived elsewhere, replaced as a whole, read
//! through one load; it never learns anything by itself.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use hsm_core::envelope::Binding;
use hsm_core::names::KeyUid;
use hsm_core::{OnBatchDone, OnDone, OpError, Slot, SlotState, Work};

use crate::config::ContextName;
use crate::leases::Meter;

/// The data side of a slot. A trait, so that a slot that could not be opened answers too, and
/// requests can be tested without a token.
pub trait TokenOps: Send + Sync {
    /// Whether it serves.
    fn state(&self) -> SlotState;
    /// Queues one thing to do. Whoever asks waits no longer than `until`: what could not be done by then is not begun.
    ///
    /// # Errors
    /// When the job is not taken; `done` is then not called.
    fn run(&self, work: Work, until: Instant, done: OnDone) -> Result<(), OpError>;
    /// Queues many things to do, in their order and on one session; others have turns between them. `until` as in
    /// [`TokenOps::run`], for each of them.
    ///
    /// # Errors
    /// As [`TokenOps::run`]. What is wrong with one of them is its own answer.
    fn run_batch(&self, works: Vec<Work>, until: Instant, done: OnBatchDone) -> Result<(), OpError>;
}

impl TokenOps for Slot {
    fn state(&self) -> SlotState {
        Slot::state(self)
    }

    fn run(&self, work: Work, until: Instant, done: OnDone) -> Result<(), OpError> {
        Slot::run(self, work, Some(until), done)
    }

    fn run_batch(&self, works: Vec<Work>, until: Instant, done: OnBatchDone) -> Result<(), OpError> {
        Slot::run_batch(self, works, Some(until), done)
    }
}

/// A slot that could not be opened: refuses every job with its state.
pub struct ClosedSlot(pub SlotState);

impl TokenOps for ClosedSlot {
    fn state(&self) -> SlotState {
        self.0.clone()
    }

    fn run(&self, _work: Work, _until: Instant, _done: OnDone) -> Result<(), OpError> {
        Err(OpError::SlotNotReady(self.state()))
    }

    fn run_batch(&self, _works: Vec<Work>, _until: Instant, _done: OnBatchDone) -> Result<(), OpError> {
        Err(OpError::SlotNotReady(self.state()))
    }
}

/// The slot that a key is in. The keys of one context may be in several.
#[derive(Clone)]
pub struct KeySlot {
    /// Its name, for logs and metrics.
    pub name: Arc<str>,
    /// What it can be asked for.
    pub ops: Arc<dyn TokenOps>,
}

impl fmt::Debug for KeySlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("KeySlot").field(&self.name).finish()
    }
}

/// The version that encrypts.
#[derive(Debug, Clone)]
pub struct ActiveKey {
    /// Where it is.
    pub slot: KeySlot,
    /// Which key.
    pub key_uid: KeyUid,
    /// Its number.
    pub version: u32,
    /// Its stored label, the API's `key_id`.
    pub key_id: String,
    /// What this node may still encrypt with it: one is taken before each call of the token.
    pub meter: Arc<Meter>,
}

/// A version this node decrypts with: pending and proven, active, or decrypt-only.
#[derive(Debug, Clone)]
pub struct ReadableKey {
    /// Where it is.
    pub slot: KeySlot,
    /// Its number.
    pub version: u32,
    /// Its stored label.
    pub key_id: String,
}

/// A readable version of the state whose key is not in this node's token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MissingKey {
    /// Its number.
    pub version: u32,
    /// Its stored label.
    pub key_id: String,
    /// Why.
    pub why: MissingWhy,
}

/// Why a key is not in this node's token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MissingWhy {
    /// Its import is still to come: a retry will find it.
    NotImportedYet,
    /// Adopted from v1 on another node; it cannot be replicated.
    NotReplicable,
}

/// A version that decrypts nothing, although the state still has its row. Whoever asks for it is told why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetiredKey {
    /// Its number.
    pub version: u32,
    /// Its stored label.
    pub key_id: String,
    /// Why.
    pub why: RetiredWhy,
}

/// Why a version decrypts nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetiredWhy {
    /// Disabled, or waiting for its destruction: both can be taken back.
    Disabled,
    /// Being destroyed, or destroyed.
    Destroyed,
}

/// The keys of one context.
#[derive(Clone)]
pub struct ContextKeys {
    /// Whom new ciphertexts are bound to, and old v1 ones are.
    pub binding: Binding,
    /// What encrypts, by the replicated state; it may be among `missing`.
    pub active: Option<ActiveKey>,
    /// What decrypts.
    pub readable: HashMap<KeyUid, ReadableKey>,
    /// Stored label → key, readable, missing or retired.
    pub by_key_id: HashMap<String, KeyUid>,
    /// Highest version of any state this node has applied.
    pub highest_known: u32,
    /// What the state names and the token lacks.
    pub missing: HashMap<KeyUid, MissingKey>,
    /// What was readable once, and decrypts nothing now.
    pub retired: HashMap<KeyUid, RetiredKey>,
}

/// The keys of all contexts.
#[derive(Clone, Default)]
pub struct KeyRing {
    contexts: HashMap<ContextName, ContextKeys>,
    owners: HashMap<KeyUid, ContextName>,
}

impl KeyRing {
    /// Makes a snapshot.
    #[must_use]
    pub fn new(contexts: HashMap<ContextName, ContextKeys>) -> Self {
        let owners = contexts
            .iter()
            .flat_map(|(name, keys)| {
                keys.readable
                    .keys()
                    .chain(keys.missing.keys())
                    .chain(keys.retired.keys())
                    .map(|uid| (*uid, name.clone()))
            })
            .collect();
        Self { contexts, owners }
    }

    /// The keys of a context, with its name to share.
    #[must_use]
    pub fn context(&self, name: &str) -> Option<(&ContextName, &ContextKeys)> {
        self.contexts.get_key_value(name)
    }

    /// The context a key belongs to.
    #[must_use]
    pub fn owner(&self, key_uid: &KeyUid) -> Option<&ContextName> {
        self.owners.get(key_uid)
    }

    /// The contexts in which some key has this label.
    pub fn contexts_with_key_id<'a>(&'a self, key_id: &'a str) -> impl Iterator<Item = &'a ContextName> {
        let with_it = move |(_, keys): &(&ContextName, &ContextKeys)| keys.by_key_id.contains_key(key_id);
        self.contexts.iter().filter(with_it).map(|(name, _)| name)
    }

    /// All contexts.
    pub fn iter(&self) -> impl Iterator<Item = (&ContextName, &ContextKeys)> {
        self.contexts.iter()
    }
}
