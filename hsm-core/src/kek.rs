//! Key-encryption keys: made on the leader as a session object that is wrapped once and
//! destroyed, imported on every node through a session object that proves itself before it
//! becomes a token object. A KEK in a token is never extractable, never changed and never used
//! when there are two of it.

use cryptoki_sys as sys;
use zeroize::Zeroizing;

use crate::adopt;
use crate::check_record;
use crate::envelope::IV_LEN;
use crate::error::HsmError;
use crate::ffi::Obj;
use crate::gcm::{Cipher, GcmError};
use crate::kat::CheckRecord;
use crate::marshal::Mech;
use crate::names::{KeyUid, TransportId};
use crate::secrets::random_bytes;
use crate::templates;
use crate::token::{Found, Token, duplicates};
use crate::transport::{self, CHECK_LEN};

pub(crate) const WHAT: &str = "KEK";

/// What a loaded key version may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KekUse {
    /// The active version.
    EncryptDecrypt,
    /// Every other readable version: its session copies cannot encrypt.
    DecryptOnly,
}

/// A new key version.
#[derive(Debug, Clone)]
pub struct GenerateKek {
    /// Fresh and random.
    pub key_uid: KeyUid,
    /// Number of the version in its context.
    pub version: u32,
    /// Name of the context; part of the check record's associated data.
    pub context: String,
    /// The transport key to wrap under.
    pub transport_id: TransportId,
}

/// A generated key, which no longer exists outside these bytes.
pub struct GeneratedKek {
    /// The key wrapped under the transport key (RFC 3394, 40 bytes).
    pub wrapped: Zeroizing<Vec<u8>>,
    /// A check record under the key.
    pub check_record: Vec<u8>,
}

/// A key version to be imported.
pub struct ImportKek {
    /// Its id.
    pub key_uid: KeyUid,
    /// Number of the version in its context.
    pub version: u32,
    /// Name of the context.
    pub context: String,
    /// Label of the object, for people: `kek-<context>-v<N>`.
    pub label: String,
    /// The transport key it is wrapped under.
    pub transport_id: TransportId,
    /// The wrapped key.
    pub wrapped: Zeroizing<Vec<u8>>,
    /// The committed check record.
    pub check_record: Vec<u8>,
    /// Replace whatever is in the token under this id, once the wrapped key has proven itself.
    pub replace: bool,
}

/// Generates, encrypts the check record, wraps, destroys. Nothing of it stays in the token.
pub(crate) fn generate(token: &Token<'_>, kek: &GenerateKek) -> Result<GeneratedKek, HsmError> {
    let transport = transport::held(token, kek.transport_id)?;
    let key = token
        .raw
        .generate_key(token.session, Mech::AesKeyGen, &templates::kek_generated())?;
    let key = token.ephemeral(key);
    token.verify(key.object(), WHAT, &templates::kek_session(true))?;
    let check_record = seal_record(token, key.object(), kek.key_uid, kek.version, &kek.context)?;
    let wrapped = token
        .raw
        .wrap(token.session, Mech::AesKeyWrap, transport, key.object())?;
    check_wrapped_len(wrapped.len())?;
    // Proven before anything is committed: what was wrapped is what was encrypted with.
    let generated = GeneratedKek {
        wrapped,
        check_record,
    };
    let record = CheckRecord::parse(kek.key_uid, kek.version, &kek.context, &generated.check_record)?;
    record.prove(token, key.object())?;
    // It is extractable: a leader that cannot get rid of it must not commit it.
    key.destroy()?;
    Ok(generated)
}

/// Encrypts the text of the check record under a key that may encrypt.
pub(crate) fn seal_record(
    token: &Token<'_>,
    key: Obj,
    key_uid: KeyUid,
    version: u32,
    context: &str,
) -> Result<Vec<u8>, HsmError> {
    let iv: [u8; IV_LEN] = random_bytes()?;
    let header = check_record::header(key_uid, version, iv);
    let aad = check_record::aad(&header.encode(), context);
    let cipher = Cipher {
        raw: token.raw,
        session: token.session,
        key,
    };
    cipher
        .seal(token.profile.iv_source, &header, &aad, &check_record::TEXT)
        .map_err(|error| match error {
            GcmError::Call(error) => error.into(),
            GcmError::Other(error) => error,
            GcmError::TooShort => HsmError::CheckRecord {
                key_uid: key_uid.to_string(),
                reason: "could not be made".to_owned(),
            },
        })
}

/// Imports a key version. On disk and proven when this returns; doing it again changes nothing.
pub(crate) fn import(token: &Token<'_>, kek: &ImportKek) -> Result<(), HsmError> {
    check_label(&kek.label)?;
    let record = CheckRecord::parse(kek.key_uid, kek.version, &kek.context, &kek.check_record)?;
    match token.find(sys::CKO_SECRET_KEY, kek.key_uid.as_bytes())? {
        Found::None => {}
        _ if kek.replace => {}
        Found::Many(count) => return Err(duplicates(WHAT, kek.key_uid.as_bytes(), count)),
        Found::One(held) => {
            // Durable too: what was there when the slot was opened was synced then, and `keep` leaves
            // nothing behind that it could not sync.
            check_held(token, kek.key_uid, held)?;
            return record.prove(token, held).map_err(|error| match error {
                HsmError::CheckRecord { key_uid, reason } => HsmError::Quarantined {
                    what: WHAT,
                    id: key_uid,
                    reason: format!(
                        "the object in the token is another key ({reason}); destroy the id and import the key again"
                    ),
                },
                other => other,
            });
        }
    }
    let unwrapped = unwrap(token, kek)?;
    let unwrapped = token.ephemeral(unwrapped);
    token.verify(unwrapped.object(), WHAT, &templates::kek_session(false))?;
    record.prove(token, unwrapped.object())?;
    if kek.replace {
        destroy(token, kek.key_uid)?;
    }
    keep(token, kek.key_uid, &kek.label, unwrapped.object()).map(|_| ())
}

fn unwrap(token: &Token<'_>, kek: &ImportKek) -> Result<Obj, HsmError> {
    check_wrapped_len(kek.wrapped.len())?;
    let transport = transport::held(token, kek.transport_id)?;
    // The check of a transport key is public, and it is a wrapped key with publicly known
    // bytes: unwrapping it would make a KEK that everyone has.
    if transport::check_of(token, transport)?.as_slice() == kek.wrapped.as_slice() {
        return Err(HsmError::Argument {
            what: "wrapped key",
            reason: format!(
                "the sealed key of KEK {} is the check of its transport key: a forged record",
                kek.key_uid
            ),
        });
    }
    token
        .raw
        .unwrap(token.session, Mech::AesKeyWrap, transport, &kek.wrapped, &templates::kek_unwrapped())
        .map_err(|error| {
            let reason = format!(
                "transport key {} does not unwrap KEK {}; compare the transport key's check with the committed one",
                kek.transport_id, kek.key_uid
            );
            transport::not_opened(error, "wrapped key", &reason)
        })
}

/// Makes a KEK session object a token object.
pub(crate) fn keep(token: &Token<'_>, key_uid: KeyUid, label: &str, object: Obj) -> Result<Obj, HsmError> {
    let expected = templates::kek_held(key_uid.as_bytes(), label);
    token.keep(
        object,
        WHAT,
        sys::CKO_SECRET_KEY,
        key_uid.as_bytes(),
        label,
        &expected,
    )
}

/// The token object of a KEK.
#[derive(Clone, Copy)]
pub(crate) struct Held {
    pub(crate) object: Obj,
    /// Made of a key of version 1: it only decrypts.
    pub(crate) adopted: bool,
}

/// The token object of a KEK, its attributes checked: those of a KEK that was made here, or of an adopted one.
pub(crate) fn held(token: &Token<'_>, key_uid: KeyUid) -> Result<Held, HsmError> {
    let object = token.find_one(sys::CKO_SECRET_KEY, key_uid.as_bytes(), WHAT)?;
    match check_held(token, key_uid, object) {
        Ok(()) => Ok(Held {
            object,
            adopted: false,
        }),
        Err(HsmError::Attribute { .. }) if adopt::is_copy(token, object, key_uid.as_bytes())? => Ok(Held {
            object,
            adopted: true,
        }),
        Err(error) => Err(error),
    }
}

fn check_held(token: &Token<'_>, key_uid: KeyUid, held: Obj) -> Result<(), HsmError> {
    let expected = templates::kek_held_any_label(key_uid.as_bytes());
    token.verify(held, &format!("{WHAT} {key_uid}"), &expected)
}

/// A session copy: 2.5 times faster than the token object, and it dies with its session.
pub(crate) fn copy(token: &Token<'_>, key_uid: KeyUid, held: Held, kek_use: KekUse) -> Result<Obj, HsmError> {
    let (changes, expected) = match (held.adopted, kek_use) {
        (false, _) => (
            templates::kek_copy_changes(kek_use),
            templates::kek_copy(key_uid.as_bytes(), kek_use),
        ),
        (true, KekUse::DecryptOnly) => (
            adopt::loaded_changes(),
            templates::adopted_loaded(key_uid.as_bytes()),
        ),
        // How often version 1 encrypted under it, nobody knows.
        (true, KekUse::EncryptDecrypt) => {
            return Err(HsmError::Argument {
                what: "use",
                reason: format!("KEK {key_uid} was adopted from version 1 and never encrypts"),
            });
        }
    };
    let copy = token.raw.copy(token.session, held.object, &changes)?;
    if let Err(error) = token.verify(copy, &format!("session copy of {WHAT} {key_uid}"), &expected) {
        let _ = token.raw.destroy(token.session, copy);
        return Err(error);
    }
    Ok(copy)
}

/// Destroys every token object with this id. Returns how many there were.
pub(crate) fn destroy(token: &Token<'_>, key_uid: KeyUid) -> Result<usize, HsmError> {
    let found = token.find_all(sys::CKO_SECRET_KEY, key_uid.as_bytes())?;
    token.destroy_all(&found)?;
    if !token
        .find_all(sys::CKO_SECRET_KEY, key_uid.as_bytes())?
        .is_empty()
    {
        return Err(HsmError::Quarantined {
            what: WHAT,
            id: key_uid.to_string(),
            reason: "the token says it destroyed the object and still finds it".to_owned(),
        });
    }
    Ok(found.len())
}

/// Destroys every session copy with this id, one that could not be destroyed before too.
pub(crate) fn destroy_copies(token: &Token<'_>, key_uid: KeyUid) -> Result<(), HsmError> {
    let template = templates::session_by_id(sys::CKO_SECRET_KEY, key_uid.as_bytes());
    for copy in token.raw.find(token.session, &template)? {
        token.raw.destroy(token.session, copy)?;
    }
    if token.raw.find(token.session, &template)?.is_empty() {
        return Ok(());
    }
    Err(HsmError::Quarantined {
        what: WHAT,
        id: key_uid.to_string(),
        reason: "the token says it destroyed the session copies and still finds one".to_owned(),
    })
}

fn check_wrapped_len(length: usize) -> Result<(), HsmError> {
    // SoftHSM does not keep the length of an unwrapped key, so this is where it is checked.
    if length == CHECK_LEN {
        return Ok(());
    }
    Err(HsmError::Argument {
        what: "wrapped key",
        reason: format!("{length} bytes; a wrapped AES-256 key has {CHECK_LEN}"),
    })
}

pub(crate) fn check_label(label: &str) -> Result<(), HsmError> {
    if label.is_empty() || label.len() > 255 || label.chars().any(char::is_control) {
        return Err(HsmError::Argument {
            what: "label",
            reason: format!("{label:?} must have 1 to 255 bytes and no control characters"),
        });
    }
    Ok(())
}
