//! What can go wrong with modules, slots and operations. Messages name the thing, the value and
//! the remedy; none may ever carry a PIN, key bytes or plaintext.

use std::path::Path;

use crate::return_codes::Ckr;
use crate::secrets::RandomError;
use crate::slot::SlotState;

/// A PKCS#11 call that returned something else than `CKR_OK`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{call} returned {code}")]
pub struct CallError {
    /// The C function, as the standard names it.
    pub call: &'static str,
    /// What it returned.
    pub code: Ckr,
}

/// Something a token, its module or its files did not do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HsmError {
    /// The library could not be loaded or initialised.
    #[error("PKCS#11 module {path}: {reason}")]
    Module {
        /// Path of the library.
        path: String,
        /// What failed, with the remedy.
        reason: String,
    },
    /// A token call failed.
    #[error("token call failed: {0}")]
    Call(#[from] CallError),
    /// An object that has to be in the token is not.
    #[error("{what} {id}: not in the token")]
    NotFound {
        /// KEK, transport key or node key.
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// The object may not be used: it is there twice, or it failed its check record.
    #[error("{what} {id} is quarantined: {reason}")]
    Quarantined {
        /// KEK, transport key or node key.
        what: &'static str,
        /// Its id.
        id: String,
        /// Why, with the remedy.
        reason: String,
    },
    /// The token made an object with other attributes than it was asked for.
    #[error("{object}: attribute {attribute} is {found}, must be {expected}")]
    Attribute {
        /// Which object.
        object: String,
        /// Name of the attribute.
        attribute: String,
        /// What the template said.
        expected: String,
        /// What reading back gave.
        found: String,
    },
    /// A transport key is not the one the cluster committed to.
    #[error(
        "transport key {id}: its check differs from the committed one; this is another key under the same id (a forged or stale grant): do not use it, register the slot again"
    )]
    TransportCheck {
        /// The transport id.
        id: String,
    },
    /// A key could not be proven with its check record.
    #[error("KEK {key_uid}: {reason}")]
    CheckRecord {
        /// The key uid.
        key_uid: String,
        /// What is wrong with record or key.
        reason: String,
    },
    /// An argument that cannot be right.
    #[error("{what}: {reason}")]
    Argument {
        /// Which argument.
        what: &'static str,
        /// Why not.
        reason: String,
    },
    /// Another control operation of the slot has not come back.
    #[error(
        "slot {slot}: {operation} waited {waited_ms} ms for the operation before it ({running}); try again, and if it stays so the token hangs"
    )]
    Busy {
        /// Configured name of the slot.
        slot: String,
        /// What wanted to run.
        operation: &'static str,
        /// What is running.
        running: &'static str,
        /// How long it waited.
        waited_ms: u64,
    },
    /// A file beside the token or in the state directory.
    #[error("{path}: {action}: {reason}")]
    File {
        /// Which file.
        path: String,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        reason: String,
    },
    /// The token belongs to another process.
    #[error(
        "token {serial} is owned by {holder} (lock {lock}); exactly one process may use a token: stop the other one first"
    )]
    Owned {
        /// Serial number of the token.
        serial: String,
        /// Who holds it, as far as the lock file says.
        holder: String,
        /// The lock file.
        lock: String,
    },
    /// `slot init` would have to erase a token.
    #[error(
        "token {label:?} (serial {serial}) is initialised already; initialising it again destroys every key in it: if that is meant, ask for it explicitly (--destroy-existing)"
    )]
    AlreadyInitialised {
        /// Label of the token.
        label: String,
        /// Its serial number.
        serial: String,
    },
    /// The module or token lacks something.
    #[error("{what} is not supported by {by}: {remedy}")]
    NotSupported {
        /// What is missing.
        what: String,
        /// Module or token.
        by: String,
        /// What to do.
        remedy: String,
    },
    /// The token forgot the login; if logging in again was tried, why that did not work.
    #[error("login: {0}")]
    Login(String),
    /// The operating system's random source failed.
    #[error("{0}")]
    Random(String),
}

impl HsmError {
    pub(crate) fn file(path: &Path, action: &'static str, error: &std::io::Error) -> Self {
        Self::File {
            path: path.display().to_string(),
            action,
            reason: error.to_string(),
        }
    }

    /// True if the error says something about the token rather than about what was asked of it.
    pub(crate) fn is_about_health(&self) -> bool {
        !matches!(self, Self::Argument { .. } | Self::Busy { .. } | Self::Random(_))
    }
}

impl From<RandomError> for HsmError {
    fn from(error: RandomError) -> Self {
        Self::Random(error.to_string())
    }
}

/// Why a slot could not be opened. [`SlotError::state`] is the slot's state from then on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// No token of this label.
    #[error(
        "slot {slot}: no initialised token has the label {label:?} (the module shows: {found}); check the label and the module's configuration, or make the token with: hsmctl slot init"
    )]
    TokenNotFound {
        /// Configured name of the slot.
        slot: String,
        /// The label looked for.
        label: String,
        /// Labels that are there.
        found: String,
    },
    /// A label names no single token.
    #[error(
        "slot {slot}: {count} tokens have the label {label:?} (serials {serials}); a label must name one token"
    )]
    DuplicateLabel {
        /// Configured name of the slot.
        slot: String,
        /// The label.
        label: String,
        /// How many there are.
        count: usize,
        /// Their serial numbers.
        serials: String,
    },
    /// A PIN that could be guessed.
    #[error(
        "slot {slot}: the PIN carries fewer than 128 random bits, and a software token's files are only as safe as its PIN; make one with hsmctl slot init, or set insecure_pin: true for this slot if the keys are worth nothing"
    )]
    WeakPin {
        /// Configured name of the slot.
        slot: String,
    },
    /// The token said no just now.
    #[error(
        "slot {slot}: token {serial} refused the PIN ({code}), and it is not tried again; set the right one"
    )]
    PinRefused {
        /// Configured name of the slot.
        slot: String,
        /// Serial number of the token.
        serial: String,
        /// What `C_Login` returned.
        code: Ckr,
    },
    /// The token said no to the same PIN earlier.
    #[error(
        "slot {slot}: token {serial} has refused this very PIN before, so it is not tried again; set the right one (or remove {marker} if the token's PIN was changed to this one)"
    )]
    PinRefusedBefore {
        /// Configured name of the slot.
        slot: String,
        /// Serial number of the token.
        serial: String,
        /// The marker file.
        marker: String,
    },
    /// Somebody entered a wrong PIN.
    #[error(
        "slot {slot}: token {serial} reports wrong PINs since the last right one; find out who tried, then allow one more attempt with: hsmctl slot unlock --slot {slot} --retry (a node that does not start because of this: log in to the token once with the vendor's own tool)"
    )]
    PinCountLow {
        /// Configured name of the slot.
        slot: String,
        /// Serial number of the token.
        serial: String,
    },
    /// One attempt is left; this program never takes it.
    #[error(
        "slot {slot}: token {serial} allows one last PIN attempt, which is not taken automatically; log in with the vendor's own tool first"
    )]
    PinFinalTry {
        /// Configured name of the slot.
        slot: String,
        /// Serial number of the token.
        serial: String,
    },
    /// The token takes no PIN any more.
    #[error("slot {slot}: the user PIN of token {serial} is locked; the security officer has to reset it")]
    PinLocked {
        /// Configured name of the slot.
        slot: String,
        /// Serial number of the token.
        serial: String,
    },
    /// The token has no user PIN yet.
    #[error("slot {slot}: token {serial} has no user PIN; finish its initialisation with: hsmctl slot init")]
    PinNotSet {
        /// Configured name of the slot.
        slot: String,
        /// Serial number of the token.
        serial: String,
    },
    /// `CKR_USER_ALREADY_LOGGED_IN` proves no PIN.
    #[error(
        "slot {slot}: this process is logged in to token {serial} already, so the PIN cannot be checked; restart the process to use another PIN"
    )]
    PinUnproven {
        /// Configured name of the slot.
        slot: String,
        /// Serial number of the token.
        serial: String,
    },
    /// Anything else, with the slot's name before it.
    #[error("slot {slot}: {error}")]
    Hsm {
        /// Configured name of the slot.
        slot: String,
        /// What happened.
        error: HsmError,
    },
}

impl SlotError {
    /// The state to report for a slot that could not be opened.
    #[must_use]
    pub fn state(&self) -> SlotState {
        match self {
            Self::TokenNotFound { .. } => SlotState::Absent,
            _ if self.is_about_pin() => SlotState::Locked,
            Self::DuplicateLabel { .. } => SlotState::failed("duplicate_label", self.to_string()),
            Self::Hsm {
                error: HsmError::Owned { .. },
                ..
            } => SlotState::failed("token_owned", self.to_string()),
            _ => SlotState::failed("open_failed", self.to_string()),
        }
    }

    /// True if opening again can only help once the PIN, or the token's opinion of it, changed:
    /// a supervisor must not restart the process in a loop.
    #[must_use]
    pub fn is_about_pin(&self) -> bool {
        matches!(
            self,
            Self::WeakPin { .. }
                | Self::PinRefused { .. }
                | Self::PinRefusedBefore { .. }
                | Self::PinCountLow { .. }
                | Self::PinFinalTry { .. }
                | Self::PinLocked { .. }
                | Self::PinNotSet { .. }
                | Self::PinUnproven { .. }
        )
    }
}

/// The outcome of an encryption or decryption that did not succeed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpError {
    /// The slot has as many jobs waiting as it may; try again later.
    #[error("the slot's queue is full")]
    QueueFull,
    /// The slot cannot serve.
    #[error("the slot is not ready ({0})")]
    SlotNotReady(SlotState),
    /// No session copy of the key: it was never loaded, or was unloaded meanwhile.
    #[error("the key is not loaded")]
    KeyNotLoaded,
    /// Tag, associated data or key do not fit the ciphertext. The caller's fault, never the
    /// token's.
    #[error("authentication failed")]
    AuthenticationFailed,
    /// Shorter than nonce and tag. The caller's fault.
    #[error("the ciphertext is too short")]
    TooShort,
    /// Not answered in time.
    #[error("the token did not answer in time")]
    Deadline,
    /// Its time was over before the token was called for it, or, of a rewrap, called to encrypt: nothing was encrypted, and
    /// nothing is given.
    #[error("the time was over before the token was asked")]
    NotBegun,
    /// The token's fault.
    #[error(transparent)]
    Token(#[from] HsmError),
}
