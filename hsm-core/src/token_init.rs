//! Initialising a token, the one thing an operator's tool does to a token itself. It never
//! touches an initialised token unless told to destroy it, never one that is in use, and enters
//! the security officer's PIN once.

use cryptoki_sys as sys;

use crate::error::{CallError, HsmError};
use crate::ffi::LABEL_LEN;
use crate::module::{Module, TokenInfo};
use crate::node_key;
use crate::pin::has_enough_entropy;
use crate::return_codes::Ckr;
use crate::secrets::Pin;
use crate::softhsm_files::TokenFiles;
use crate::token::Token;
use crate::token_lock::TokenLock;

/// What to initialise, and with which PINs.
pub struct InitToken<'a> {
    /// Label of the new token: 1 to 32 bytes.
    pub label: &'a str,
    /// The user PIN it gets.
    pub pin: &'a Pin,
    /// The security officer's PIN: the one it gets, or the one it has if it is initialised again.
    pub so_pin: &'a Pin,
    /// Erase the initialised token of this label, with every key in it.
    pub destroy_existing: bool,
}

/// A token that can be initialised as asked. Everything that can be refused without touching it was looked at,
/// and nothing was changed: no token has either PIN yet.
pub struct Prepared<'a> {
    module: &'a Module,
    init: InitToken<'a>,
    label: [u8; LABEL_LEN],
    token: TokenInfo,
    /// A token that is free has no serial number to lock by.
    lock: Option<TokenLock>,
}

/// A token that is empty and has its label and the security officer's PIN, and no user PIN yet.
pub struct Erased<'a> {
    module: &'a Module,
    init: InitToken<'a>,
    token: TokenInfo,
    lock: TokenLock,
}

/// Initialises a token and sets its user PIN: all the steps at once.
///
/// Refuses a token that a node owns, more than one token of the label, and, unless
/// `destroy_existing` is set, an initialised one.
pub fn init_token(module: &Module, init: InitToken<'_>) -> Result<TokenInfo, HsmError> {
    prepare(module, init)?.erase()?.set_pin()
}

/// Whether it could be done as far as it can be told without writing anything, not even a lock's file.
pub fn foresee(module: &Module, init: &InitToken<'_>) -> Result<(), HsmError> {
    padded(init.label)?;
    let look = |serial: &str| TokenLock::look(module.profile(), serial).map(|()| None);
    let (token, _) = find(module, init, look)?;
    check_pins(module, init, &token)?;
    check_pin_lengths(&token, init)
}

/// Finds the token and takes its lock. For what is refused see [`init_token`].
pub fn prepare<'a>(module: &'a Module, init: InitToken<'a>) -> Result<Prepared<'a>, HsmError> {
    let label = padded(init.label)?;
    let (token, lock) = find(module, &init, |serial| {
        TokenLock::acquire(module.profile(), serial).map(Some)
    })?;
    check_pins(module, &init, &token)?;
    check_pin_lengths(&token, &init)?;
    Ok(Prepared {
        module,
        init,
        label,
        token,
        lock,
    })
}

impl<'a> Prepared<'a> {
    /// Erases the token and gives it label and security officer's PIN. A token that refuses is as it was, but
    /// for the attempt.
    pub fn erase(self) -> Result<Erased<'a>, HsmError> {
        let Self {
            module,
            init,
            label,
            token,
            lock,
        } = self;
        let files = files(module, &token)?;
        // From here on the copy would bring back PINs of a token that no longer exists.
        files.as_ref().map_or(Ok(()), TokenFiles::set_backup_aside)?;
        let erased = module.raw().init_token(token.slot.into(), init.so_pin, &label);
        if let Err(error) = erased {
            // A copy that cannot be made now stays where it was put.
            let _ = files.as_ref().map_or(Ok(()), TokenFiles::back_up);
            return Err(so_error(&token, error));
        }
        files.as_ref().map_or(Ok(()), TokenFiles::forget_backup)?;
        module.forget_login(&token.serial);
        let made = module.token_info(token.slot)?;
        let lock = match lock {
            Some(lock) => lock,
            None => TokenLock::acquire(module.profile(), &made.serial)?,
        };
        Ok(Erased {
            module,
            init,
            token: made,
            lock,
        })
    }
}

impl Erased<'_> {
    /// Sets the user PIN and puts everything on disk.
    pub fn set_pin(self) -> Result<TokenInfo, HsmError> {
        self.finish().map(|(made, _)| made)
    }

    /// As [`Self::set_pin`], and makes the token's node key pair, which takes a second or so that a node then has not to
    /// spend while it joins. A token that does not make it now is none the worse: the node tries again. The reason
    /// stands beside the token.
    pub fn set_pin_and_make_node_key(self) -> Result<(TokenInfo, Result<(), HsmError>), HsmError> {
        let (module, pin) = (self.module, self.init.pin);
        let (made, lock) = self.finish()?;
        let node_key = make_node_key(module, &made, pin);
        drop(lock);
        Ok((made, node_key))
    }

    fn finish(self) -> Result<(TokenInfo, TokenLock), HsmError> {
        set_user_pin(self.module, &self.token, &self.init)?;
        if let Some(files) = files(self.module, &self.token)? {
            files.sync_all()?;
            files.back_up()?;
        }
        Ok((self.module.token_info(self.token.slot)?, self.lock))
    }
}

/// The token to initialise: the one of this label, or a free one. `own` is asked for the lock of one that may be
/// somebody's.
fn find(
    module: &Module,
    init: &InitToken<'_>,
    own: impl Fn(&str) -> Result<Option<TokenLock>, HsmError>,
) -> Result<(TokenInfo, Option<TokenLock>), HsmError> {
    let tokens = module.tokens()?;
    let same_label: Vec<&TokenInfo> = tokens
        .iter()
        .filter(|token| token.initialised && token.label == init.label)
        .collect();
    match same_label.as_slice() {
        [] => Ok((free_slot(module, &tokens)?.clone(), None)),
        [existing] if init.destroy_existing => {
            let lock = own(&existing.serial)?;
            may_try_so_pin(existing)?;
            Ok(((*existing).clone(), lock))
        }
        [existing] => Err(HsmError::AlreadyInitialised {
            label: existing.label.clone(),
            serial: existing.serial.clone(),
        }),
        several => {
            let serials: Vec<&str> = several.iter().map(|token| token.serial.as_str()).collect();
            Err(HsmError::Argument {
                what: "label",
                reason: format!(
                    "{} tokens are called {:?} (serials {}); remove all but one with the vendor's tool first",
                    several.len(),
                    init.label,
                    serials.join(", ")
                ),
            })
        }
    }
}

fn set_user_pin(module: &Module, token: &TokenInfo, init: &InitToken<'_>) -> Result<(), HsmError> {
    let raw = module.raw();
    let session = module.init_session(token.slot)?;
    let outcome = raw.login(&session, sys::CKU_SO, init.so_pin).and_then(|()| {
        let set = raw.init_pin(&session, init.pin);
        raw.logout(&session).and(set)
    });
    // Nothing else runs in this token: closing is safe here.
    let _ = session.close();
    outcome.map_err(|error| match error.code.0 {
        sys::CKR_PIN_LEN_RANGE | sys::CKR_PIN_INVALID => HsmError::Argument {
            what: "user PIN",
            reason: format!(
                "the token does not take it ({error}); it is initialised but has no user PIN: run again with --destroy-existing and another PIN"
            ),
        },
        _ => error.into(),
    })
}

fn make_node_key(module: &Module, made: &TokenInfo, pin: &Pin) -> Result<(), HsmError> {
    let (raw, files) = (module.raw(), files(module, made)?);
    let session = module.init_session(made.slot)?;
    let outcome = raw
        .login(&session, sys::CKU_USER, pin)
        .map_err(HsmError::from)
        .and_then(|()| {
            let token = Token {
                raw,
                session: &session,
                profile: module.profile(),
                files: files.as_ref(),
            };
            let key = node_key::ensure(&token).map(drop);
            raw.logout(&session).map_err(HsmError::from).and(key)
        });
    // Nothing else runs in this token: closing is safe here.
    let _ = session.close();
    outcome?;
    // The login has rewritten the token's own file.
    files.map_or(Ok(()), |files| files.sync_all().and_then(|()| files.back_up()))
}

fn free_slot<'a>(module: &Module, tokens: &'a [TokenInfo]) -> Result<&'a TokenInfo, HsmError> {
    tokens
        .iter()
        .find(|token| !token.initialised)
        .ok_or_else(|| HsmError::NotSupported {
            what: "a free slot".to_owned(),
            by: module.profile().library.clone(),
            remedy:
                "insert or create an uninitialised token, or name an existing one with --destroy-existing"
                    .to_owned(),
        })
}

fn files(module: &Module, token: &TokenInfo) -> Result<Option<TokenFiles>, HsmError> {
    match &module.profile().token_root {
        Some(root) if !token.serial.is_empty() => TokenFiles::locate(root, &token.serial),
        _ => Ok(None),
    }
}

fn padded(label: &str) -> Result<[u8; LABEL_LEN], HsmError> {
    let ends_in_blank = label.trim() != label;
    if label.is_empty() || label.len() > LABEL_LEN || ends_in_blank || label.chars().any(char::is_control) {
        return Err(HsmError::Argument {
            what: "label",
            reason: format!(
                "{label:?} must have 1 to {LABEL_LEN} bytes, no control characters and no blanks around it"
            ),
        });
    }
    let mut padded = [b' '; LABEL_LEN];
    for (place, byte) in padded.iter_mut().zip(label.bytes()) {
        *place = byte;
    }
    Ok(padded)
}

/// Only a PIN that is set here can be chosen better: that of the security officer of a token that is initialised
/// already is the one it has.
fn check_pins(module: &Module, init: &InitToken<'_>, token: &TokenInfo) -> Result<(), HsmError> {
    if init.pin.expose() == init.so_pin.expose() {
        return Err(HsmError::Argument {
            what: "user PIN",
            reason: "must differ from the security officer's PIN".to_owned(),
        });
    }
    let set = [
        ("user PIN", init.pin, true),
        ("security officer's PIN", init.so_pin, !token.initialised),
    ];
    for (what, pin, is_set) in set {
        if is_set && module.profile().is_software() && !has_enough_entropy(pin) {
            return Err(HsmError::Argument {
                what,
                reason: "carries fewer than 128 random bits, and a software token's files are only as safe as its PINs; have it generated".to_owned(),
            });
        }
    }
    Ok(())
}

fn check_pin_lengths(token: &TokenInfo, init: &InitToken<'_>) -> Result<(), HsmError> {
    let (min, max) = token.pin_len;
    for (what, pin) in [("user PIN", init.pin), ("security officer's PIN", init.so_pin)] {
        let length = pin.expose().len();
        // Zero means that the token does not say.
        if length < min || (max > 0 && length > max) {
            return Err(HsmError::Argument {
                what,
                reason: format!("{length} bytes; this token takes {min} to {max}"),
            });
        }
    }
    Ok(())
}

fn may_try_so_pin(token: &TokenInfo) -> Result<(), HsmError> {
    let flags = token.security_officer;
    let state = if flags.locked {
        "is locked"
    } else if flags.final_try {
        "has one last attempt, which is not taken here"
    } else {
        return Ok(());
    };
    Err(HsmError::Argument {
        what: "security officer's PIN",
        reason: format!("of token {} {state}; use the vendor's own tool", token.serial),
    })
}

fn so_error(token: &TokenInfo, error: CallError) -> HsmError {
    let reason = match error.code {
        Ckr(sys::CKR_PIN_INCORRECT | sys::CKR_PIN_LOCKED) if token.initialised => format!(
            "token {} refused it ({error}); it was entered once and is not tried again",
            token.serial
        ),
        Ckr(sys::CKR_SESSION_EXISTS) => {
            return HsmError::Owned {
                serial: token.serial.clone(),
                holder: "this process, which has sessions open".to_owned(),
                lock: "none".to_owned(),
            };
        }
        _ => return error.into(),
    };
    HsmError::Argument {
        what: "security officer's PIN",
        reason,
    }
}
