//! PKCS#11 libraries, each loaded and initialised once per process and never finalised: other
//! slots go on using a module whatever happens to one of its tokens.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::{Error as CryptokiError, RvError};
use cryptoki::mechanism::MechanismType;
use cryptoki::session::{Session, SessionState};
use cryptoki::slot::Slot as SlotId;
use cryptoki_sys as sys;
use sha2::{Digest, Sha256};

use crate::error::{CallError, HsmError};
use crate::ffi::Raw;
use crate::profile::VendorProfile;
use crate::return_codes::Ckr;
use crate::secrets::{Pin, random_bytes};
use crate::softhsm_files;

/// A library that is loaded, or being loaded. Under a lock of its own: one that hangs while it is initialised keeps
/// no other from being loaded.
type Place = Arc<Mutex<Option<Arc<Module>>>>;

static LOADED: Mutex<BTreeMap<PathBuf, Place>> = Mutex::new(BTreeMap::new());

/// A PKCS#11 library.
pub struct Module {
    path: PathBuf,
    pkcs11: Pkcs11,
    raw: Raw,
    profile: VendorProfile,
    restored: Vec<String>,
    set_aside: Mutex<Vec<String>>,
    logins: Mutex<HashMap<String, [u8; 32]>>,
    login_salt: [u8; 16],
    /// Sessions of slots that were closed. SoftHSM 2.6.1 crashes when sessions are closed while
    /// others work, so they are kept for the next slot on the same token.
    idle: Mutex<HashMap<String, Vec<Session>>>,
}

/// A token as its module describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenInfo {
    /// Label, without padding.
    pub label: String,
    /// Serial number, without padding: what a token is recognised by.
    pub serial: String,
    /// Who made it.
    pub manufacturer: String,
    /// Model.
    pub model: String,
    /// False for a free slot of a software token.
    pub initialised: bool,
    /// Whether `C_InitPIN` has set a user PIN.
    pub user_pin_set: bool,
    /// Slot number in the module; changes between starts.
    pub slot_id: u64,
    pub(crate) user: PinFlags,
    pub(crate) security_officer: PinFlags,
    pub(crate) pin_len: (usize, usize),
    pub(crate) slot: SlotId,
}

/// What a token says about the attempts left for a PIN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PinFlags {
    pub(crate) count_low: bool,
    pub(crate) final_try: bool,
    pub(crate) locked: bool,
}

impl Module {
    /// Loads a library and calls `C_Initialize` with OS locking, or gives the one that was
    /// loaded from this path before.
    ///
    /// For SoftHSM this also restores a `token.object` that a kill inside `C_Login` left empty, and sets object files aside over
    /// which it would end the process: both have to happen before the module looks for its tokens.
    pub fn load(path: &Path) -> Result<Arc<Self>, HsmError> {
        let fail = |reason: String| HsmError::Module {
            path: path.display().to_string(),
            reason,
        };
        let canonical = path.canonicalize().map_err(|error| {
            fail(format!(
                "{error}; install the module, or set pkcs11_lib to its full path"
            ))
        })?;
        let place = Arc::clone(lock(&LOADED).entry(canonical.clone()).or_default());
        let mut loaded = lock(&place);
        if let Some(module) = &*loaded {
            return Ok(Arc::clone(module));
        }
        let module = Arc::new(Self::initialise(canonical)?);
        *loaded = Some(Arc::clone(&module));
        Ok(module)
    }

    fn initialise(path: PathBuf) -> Result<Self, HsmError> {
        let fail = |reason: String| HsmError::Module {
            path: path.display().to_string(),
            reason,
        };
        let (mut restored, mut set_aside) = (Vec::new(), Vec::new());
        if let Some(root) = VendorProfile::token_root_by_name(&path) {
            if root.is_dir() {
                restored = softhsm_files::restore_torn_tokens(&root)?;
            }
            // A restored file may say a serial number that another folder has too.
            softhsm_files::refuse_same_serial(&root)?;
            set_aside = softhsm_files::set_absurd_aside(&root)?;
        }
        let pkcs11 = Pkcs11::new(&path).map_err(|error| fail(error.to_string()))?;
        let raw = Raw::load(&path).map_err(fail)?;
        let start = || {
            pkcs11.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)).map_err(|error| {
                fail(format!(
                    "C_Initialize failed ({error}); for SoftHSM, check that SOFTHSM2_CONF names a readable file whose directories.tokendir exists"
                ))
            })
        };
        start()?;
        let info = pkcs11
            .get_library_info()
            .map_err(|error| cryptoki_error("C_GetInfo", error))?;
        let profile = VendorProfile::detect(&info);
        // The same of a module whose name did not say whose it is.
        let restored_late = match &profile.token_root {
            Some(root) => softhsm_files::restore_torn_tokens(root)?,
            None => Vec::new(),
        };
        if !restored_late.is_empty() {
            // A restored file may say a serial number that another folder has too.
            if let Some(root) = &profile.token_root {
                softhsm_files::refuse_same_serial(root)?;
            }
            // No session exists yet; only a fresh start makes the module see these tokens.
            pkcs11
                .clone()
                .finalize()
                .map_err(|error| cryptoki_error("C_Finalize", error))?;
            start()?;
        }
        restored.extend(restored_late);
        Ok(Self {
            path,
            pkcs11,
            raw,
            profile,
            restored,
            set_aside: Mutex::new(set_aside),
            logins: Mutex::default(),
            login_salt: random_bytes()?,
            idle: Mutex::default(),
        })
    }

    /// Where it was loaded from.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How it has to be treated.
    #[must_use]
    pub fn profile(&self) -> &VendorProfile {
        &self.profile
    }

    /// Serial numbers of the tokens whose `token.object` was restored when it was loaded, to be
    /// logged.
    #[must_use]
    pub fn restored_tokens(&self) -> &[String] {
        &self.restored
    }

    /// Object files that lie aside in the tokens' folders because the module would end the process over them, to be logged. Told once.
    #[must_use]
    pub fn take_set_aside(&self) -> Vec<String> {
        std::mem::take(&mut *lock(&self.set_aside))
    }

    /// Every token, free slots of software tokens included.
    pub fn tokens(&self) -> Result<Vec<TokenInfo>, HsmError> {
        let slots = self
            .pkcs11
            .get_slots_with_token()
            .map_err(|error| cryptoki_error("C_GetSlotList", error))?;
        let mut tokens = Vec::with_capacity(slots.len());
        for slot in slots {
            match self.token_info(slot) {
                Ok(token) => tokens.push(token),
                // A token that is lost or was pulled out (SoftHSM then says GENERAL_ERROR) must not
                // keep the others from being found.
                Err(HsmError::Call(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(tokens)
    }

    pub(crate) fn token_info(&self, slot: SlotId) -> Result<TokenInfo, HsmError> {
        let info = self
            .pkcs11
            .get_token_info(slot)
            .map_err(|error| cryptoki_error("C_GetTokenInfo", error))?;
        Ok(TokenInfo {
            label: info.label().trim_end().to_owned(),
            serial: info.serial_number().trim().to_owned(),
            manufacturer: info.manufacturer_id().trim().to_owned(),
            model: info.model().trim().to_owned(),
            initialised: info.token_initialized(),
            user_pin_set: info.user_pin_initialized(),
            slot_id: slot.id(),
            user: PinFlags {
                count_low: info.user_pin_count_low(),
                final_try: info.user_pin_final_try(),
                locked: info.user_pin_locked(),
            },
            security_officer: PinFlags {
                count_low: info.so_pin_count_low(),
                final_try: info.so_pin_final_try(),
                locked: info.so_pin_locked(),
            },
            pin_len: (info.min_pin_length(), info.max_pin_length()),
            slot,
        })
    }

    /// Names of the mechanisms this crate needs and the token lacks.
    pub(crate) fn missing_mechanisms(&self, slot: SlotId) -> Result<Vec<&'static str>, HsmError> {
        let offered = self
            .pkcs11
            .get_mechanism_list(slot)
            .map_err(|error| cryptoki_error("C_GetMechanismList", error))?;
        let needed = [
            (MechanismType::AES_KEY_GEN, "CKM_AES_KEY_GEN"),
            (MechanismType::AES_GCM, "CKM_AES_GCM"),
            (MechanismType::AES_KEY_WRAP, "CKM_AES_KEY_WRAP"),
            (MechanismType::RSA_PKCS_KEY_PAIR_GEN, "CKM_RSA_PKCS_KEY_PAIR_GEN"),
            (MechanismType::RSA_PKCS_OAEP, "CKM_RSA_PKCS_OAEP"),
        ];
        Ok(needed
            .into_iter()
            .filter(|(mechanism, _)| !offered.contains(mechanism))
            .map(|(_, name)| name)
            .collect())
    }

    pub(crate) fn raw(&self) -> &Raw {
        &self.raw
    }

    /// A read-write session that is never closed by being dropped.
    pub(crate) fn session(&self, token: &TokenInfo) -> Result<Session, HsmError> {
        if let Some(session) = lock(&self.idle).get_mut(&token.serial).and_then(Vec::pop) {
            return Ok(session);
        }
        self.pkcs11
            .open_rw_session_no_drop(token.slot)
            .map_err(|error| cryptoki_error("C_OpenSession", error))
    }

    /// Keeps a session in working order for the next slot on its token.
    pub(crate) fn give_back(&self, serial: &str, session: Session) {
        lock(&self.idle)
            .entry(serial.to_owned())
            .or_default()
            .push(session);
    }

    /// A session for `slot init`, which closes it: there is no other one on that token.
    pub(crate) fn init_session(&self, slot: SlotId) -> Result<Session, HsmError> {
        self.pkcs11
            .open_rw_session(slot)
            .map_err(|error| cryptoki_error("C_OpenSession", error))
    }

    /// Whether this process is logged in to the token: `None` if it is not, else whether with
    /// this PIN.
    pub(crate) fn logged_in_with(&self, serial: &str, pin: &Pin) -> Option<bool> {
        lock(&self.logins)
            .get(serial)
            .map(|mark| *mark == self.pin_mark(pin))
    }

    pub(crate) fn remember_login(&self, serial: &str, pin: &Pin) {
        let mark = self.pin_mark(pin);
        lock(&self.logins).insert(serial.to_owned(), mark);
    }

    pub(crate) fn forget_login(&self, serial: &str) {
        lock(&self.logins).remove(serial);
    }

    fn pin_mark(&self, pin: &Pin) -> [u8; 32] {
        Sha256::new()
            .chain_update(self.login_salt)
            .chain_update(pin.expose().as_bytes())
            .finalize()
            .into()
    }
}

/// Takes a mutex whose data is valid between any two statements, so that a panic elsewhere is
/// no reason to stop.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who a session is logged in as.
pub(crate) fn session_state(session: &Session) -> Result<SessionState, HsmError> {
    session
        .get_session_info()
        .map(|info| info.session_state())
        .map_err(|error| cryptoki_error("C_GetSessionInfo", error))
}

fn cryptoki_error(call: &'static str, error: CryptokiError) -> HsmError {
    let code = match error {
        CryptokiError::Pkcs11(code, _) => code,
        other => {
            return HsmError::NotSupported {
                what: format!("{call} ({other})"),
                by: "the module".to_owned(),
                remedy: "check that it is a PKCS#11 module of version 2.40 or later".to_owned(),
            };
        }
    };
    let code = match code {
        RvError::HostMemory => sys::CKR_HOST_MEMORY,
        RvError::SlotIdInvalid => sys::CKR_SLOT_ID_INVALID,
        RvError::FunctionFailed => sys::CKR_FUNCTION_FAILED,
        RvError::ArgumentsBad => sys::CKR_ARGUMENTS_BAD,
        RvError::DeviceError => sys::CKR_DEVICE_ERROR,
        RvError::DeviceMemory => sys::CKR_DEVICE_MEMORY,
        RvError::DeviceRemoved => sys::CKR_DEVICE_REMOVED,
        RvError::SessionCount => sys::CKR_SESSION_COUNT,
        RvError::SessionExists => sys::CKR_SESSION_EXISTS,
        RvError::TokenNotPresent => sys::CKR_TOKEN_NOT_PRESENT,
        RvError::TokenNotRecognized => sys::CKR_TOKEN_NOT_RECOGNIZED,
        RvError::TokenWriteProtected => sys::CKR_TOKEN_WRITE_PROTECTED,
        RvError::CryptokiNotInitialized => sys::CKR_CRYPTOKI_NOT_INITIALIZED,
        RvError::VendorDefined(code) | RvError::UnknownErrorCode(code) => code,
        // The remaining ones do not come from the few calls made through cryptoki.
        _ => sys::CKR_GENERAL_ERROR,
    };
    HsmError::Call(CallError {
        call,
        code: Ckr(code),
    })
}
