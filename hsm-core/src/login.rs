//! When a PIN may be tried, and when not: once per process and PIN, never against a token that
//! counts, never again after it was refused. `C_Login` rewrites SoftHSM's `token.object`, so a
//! copy is made first.

use std::path::{Path, PathBuf};

use cryptoki::session::Session;
use cryptoki_sys as sys;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::durable;
use crate::error::{HsmError, SlotError};
use crate::module::{Module, TokenInfo};
use crate::pin::has_enough_entropy;
use crate::return_codes::Ckr;
use crate::secrets::{Pin, random_bytes};
use crate::softhsm_files::TokenFiles;
use crate::token_lock::file_name;

/// What a login needs to know.
pub(crate) struct Login<'a> {
    pub(crate) slot: &'a str,
    pub(crate) module: &'a Module,
    pub(crate) token: &'a TokenInfo,
    pub(crate) files: Option<&'a TokenFiles>,
    pub(crate) pin: &'a Pin,
    pub(crate) state_dir: &'a Path,
    /// The operator accepts the risk of a guessable PIN.
    pub(crate) insecure_pin: bool,
    /// The operator has seen that the token reports wrong PINs, and wants one more attempt.
    pub(crate) retry: bool,
}

impl Login<'_> {
    /// Logs the process in to the token, if the rules allow it.
    pub(crate) fn run(&self, session: &Session) -> Result<(), SlotError> {
        if self.module.profile().is_software() && !self.insecure_pin && !has_enough_entropy(self.pin) {
            return Err(SlotError::WeakPin { slot: self.slot() });
        }
        match self.module.logged_in_with(&self.token.serial, self.pin) {
            Some(true) => return Ok(()),
            Some(false) => return Err(self.unproven()),
            None => {}
        }
        // Flags change without us: read them now, not when the token was found.
        let token = self
            .module
            .token_info(self.token.slot)
            .map_err(|error| self.failed(error))?;
        let marker = Marker::at(self.state_dir, &self.token.serial);
        let refused = marker.read().map_err(|error| self.failed(error))?;
        self.may_try(&token, &marker, refused.as_ref())?;
        self.files
            .map_or(Ok(()), TokenFiles::back_up)
            .map_err(|error| self.failed(error))?;
        match self.module.raw().login(session, sys::CKU_USER, self.pin) {
            Ok(()) => {}
            Err(error) => return Err(self.refused(error.code, &marker, error.into())),
        }
        self.module.remember_login(&self.token.serial, self.pin);
        // The login wrote the token's flags and synced nothing.
        self.files
            .map_or(Ok(()), TokenFiles::sync_all)
            .map_err(|error| self.failed(error))?;
        marker.remove().map_err(|error| self.failed(error))
    }

    fn may_try(
        &self,
        token: &TokenInfo,
        marker: &Marker,
        refused: Option<&RefusedPin>,
    ) -> Result<(), SlotError> {
        let (slot, serial) = (self.slot(), token.serial.clone());
        if !token.user_pin_set {
            return Err(SlotError::PinNotSet { slot, serial });
        }
        if token.user.locked {
            return Err(SlotError::PinLocked { slot, serial });
        }
        if token.user.final_try {
            return Err(SlotError::PinFinalTry { slot, serial });
        }
        if refused.is_some_and(|refused| refused.is(&serial, self.pin)) {
            return Err(SlotError::PinRefusedBefore {
                slot,
                serial,
                marker: marker.path.display().to_string(),
            });
        }
        // SoftHSM never locks, and raises this flag at the first wrong PIN: if that was ours, and
        // the PIN has changed since, the operator has answered already.
        let answered = self.module.profile().is_software() && refused.is_some();
        if token.user.count_low && !self.retry && !answered {
            return Err(SlotError::PinCountLow { slot, serial });
        }
        Ok(())
    }

    fn refused(&self, code: Ckr, marker: &Marker, error: HsmError) -> SlotError {
        let (slot, serial) = (self.slot(), self.token.serial.clone());
        let about_pin = [
            sys::CKR_PIN_INCORRECT,
            sys::CKR_PIN_INVALID,
            sys::CKR_PIN_LEN_RANGE,
            sys::CKR_PIN_EXPIRED,
            sys::CKR_PIN_LOCKED,
        ];
        match code.0 {
            // Proves no PIN: somebody in this process is logged in, perhaps with another one.
            sys::CKR_USER_ALREADY_LOGGED_IN | sys::CKR_USER_ANOTHER_ALREADY_LOGGED_IN => self.unproven(),
            sys::CKR_USER_PIN_NOT_INITIALIZED => SlotError::PinNotSet { slot, serial },
            // Hardware may have codes of its own for a bad PIN, and counts it all the same.
            code_value if about_pin.contains(&code_value) || code_value >= sys::CKR_VENDOR_DEFINED => {
                // Without the marker the next start would try again: that is worse to report than
                // the refusal itself.
                match marker.write(&serial, self.pin) {
                    Ok(()) => SlotError::PinRefused { slot, serial, code },
                    Err(error) => self.failed(error),
                }
            }
            _ => self.failed(error),
        }
    }

    fn slot(&self) -> String {
        self.slot.to_owned()
    }

    fn unproven(&self) -> SlotError {
        SlotError::PinUnproven {
            slot: self.slot(),
            serial: self.token.serial.clone(),
        }
    }

    fn failed(&self, error: HsmError) -> SlotError {
        SlotError::Hsm {
            slot: self.slot(),
            error,
        }
    }
}

/// Rounds of the marker's hash. The refused PIN may be the right one of another token.
const ROUNDS: u32 = 20_000;
const MAGIC: &str = "hsm refused pin v2";
/// Of an earlier release, which wrote no check.
const MAGIC_V1: &str = "hsm refused pin v1";

/// The file that remembers a refused PIN, without saying it:
///
/// ```text
/// hsm refused pin v2
/// <salt, 32 hex digits>
/// <hash, 64 hex digits>
/// <SHA-256 of salt and hash, 64 hex digits>
/// ```
///
/// Without the check one flipped bit would make the refused PIN one that was never tried.
struct Marker {
    path: PathBuf,
}

struct RefusedPin {
    salt: [u8; 16],
    hash: [u8; 32],
}

impl Marker {
    fn at(state_dir: &Path, serial: &str) -> Self {
        Self {
            path: state_dir.join(format!("refused-pin-{}", file_name(serial))),
        }
    }

    /// A marker that cannot be read counts as an error: deleting it has to be somebody's choice.
    fn read(&self) -> Result<Option<RefusedPin>, HsmError> {
        let Some(contents) = durable::read(&self.path)? else {
            return Ok(None);
        };
        let text = String::from_utf8_lossy(&contents).into_owned();
        let mut lines = text.lines();
        let mut refused = RefusedPin {
            salt: [0; 16],
            hash: [0; 32],
        };
        let magic = lines.next();
        let salt = hex::decode_to_slice(lines.next().unwrap_or_default(), &mut refused.salt);
        let hash = hex::decode_to_slice(lines.next().unwrap_or_default(), &mut refused.hash);
        let checked = match magic {
            Some(MAGIC) => {
                let mut check = [0; 32];
                hex::decode_to_slice(lines.next().unwrap_or_default(), &mut check).is_ok()
                    && check == refused.check()
            }
            magic => magic == Some(MAGIC_V1),
        };
        if !checked || salt.is_err() || hash.is_err() {
            return Err(HsmError::File {
                path: self.path.display().to_string(),
                action: "read marker of a refused PIN",
                reason: "not in the expected form; remove it if you know that the PIN is right".to_owned(),
            });
        }
        Ok(Some(refused))
    }

    fn write(&self, serial: &str, pin: &Pin) -> Result<(), HsmError> {
        let salt = random_bytes()?;
        let hash = hash(&salt, serial, pin);
        let refused = RefusedPin { salt, hash };
        let text = format!(
            "{MAGIC}\n{}\n{}\n{}\n",
            hex::encode(salt),
            hex::encode(hash),
            hex::encode(refused.check())
        );
        if let Some(dir) = self.path.parent() {
            durable::private_dir(dir)?;
        }
        durable::write(&self.path, text.as_bytes())
    }

    fn remove(&self) -> Result<(), HsmError> {
        durable::remove(&self.path)
    }
}

impl RefusedPin {
    fn check(&self) -> [u8; 32] {
        Sha256::new()
            .chain_update(self.salt)
            .chain_update(self.hash)
            .finalize()
            .into()
    }

    fn is(&self, serial: &str, pin: &Pin) -> bool {
        hash(&self.salt, serial, pin) == self.hash
    }
}

fn hash(salt: &[u8; 16], serial: &str, pin: &Pin) -> [u8; 32] {
    let mut state: Zeroizing<[u8; 32]> = Zeroizing::new([0; 32]);
    for _ in 0..ROUNDS {
        let round = Sha256::new()
            .chain_update(state.as_slice())
            .chain_update(salt)
            .chain_update(serial.as_bytes())
            .chain_update([0])
            .chain_update(pin.expose().as_bytes())
            .finalize();
        *state = round.into();
    }
    *state
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_knows_its_pin_and_token_and_says_neither() {
        let dir = tempfile::tempdir().unwrap();
        let marker = Marker::at(&dir.path().join("state"), "104c30e7");
        assert!(marker.read().unwrap().is_none());
        let pin = Pin::new("hunter2".to_owned());
        marker.write("104c30e7", &pin).unwrap();
        let refused = marker.read().unwrap().unwrap();
        assert!(refused.is("104c30e7", &pin));
        assert!(!refused.is("other", &pin));
        assert!(!refused.is("104c30e7", &Pin::new("hunter3".to_owned())));
        assert!(!std::fs::read_to_string(&marker.path).unwrap().contains("hunter2"));
        marker.remove().unwrap();
        assert!(marker.read().unwrap().is_none());
    }

    #[test]
    fn a_damaged_marker_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let marker = Marker::at(dir.path(), "104c30e7");
        std::fs::write(&marker.path, "hsm refused pin v1\n12\n").unwrap();
        let error = marker.read().err().unwrap();
        assert!(error.to_string().contains("refused-pin-104c30e7"), "{error}");
    }
    /// It still knows its PIN, or is an error: never one that forgot it.
    #[test]
    fn no_damage_makes_a_marker_forget_its_pin() {
        let dir = tempfile::tempdir().unwrap();
        let marker = Marker::at(dir.path(), "104c30e7");
        let pin = Pin::new("hunter2".to_owned());
        marker.write("104c30e7", &pin).unwrap();
        let whole = std::fs::read(&marker.path).unwrap();
        let written = marker.read().unwrap().unwrap();
        let flips = (0..whole.len() * 8).map(|bit| {
            let mut contents = whole.clone();
            contents[bit / 8] ^= 1 << (bit % 8);
            contents
        });
        let cuts = (0..whole.len()).map(|length| whole[..length].to_vec());
        let (mut known, mut refused) = (0, 0);
        for (number, contents) in flips.chain(cuts).enumerate() {
            std::fs::write(&marker.path, contents).unwrap();
            match marker.read() {
                // That one is the PIN's costs thousands of hashes; it is if salt and hash are those.
                Ok(found) => {
                    let found = found.unwrap();
                    assert!(
                        (found.salt, found.hash) == (written.salt, written.hash),
                        "damage {number}"
                    );
                    known += 1;
                }
                Err(error) => {
                    assert!(
                        error.to_string().contains("remove it if you know"),
                        "damage {number}: {error}"
                    );
                    refused += 1;
                }
            }
        }
        // Case and the last line's end say nothing.
        assert!(known > 0 && refused > known, "{known} {refused}");
    }

    #[test]
    fn a_marker_of_an_earlier_release_is_understood() {
        let dir = tempfile::tempdir().unwrap();
        let marker = Marker::at(dir.path(), "104c30e7");
        let pin = Pin::new("hunter2".to_owned());
        let (salt, hash) = ([7_u8; 16], hash(&[7; 16], "104c30e7", &pin));
        let text = format!(
            "hsm refused pin v1\n{}\n{}\n",
            hex::encode(salt),
            hex::encode(hash)
        );
        std::fs::write(&marker.path, text).unwrap();
        assert!(marker.read().unwrap().unwrap().is("104c30e7", &pin));
    }
}
