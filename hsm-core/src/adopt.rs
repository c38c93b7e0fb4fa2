//! Keys that version 1 made. They cannot be extracted, so they are of use only where they lie: such a key gets a copy
//! in the same token that is found by `CKA_ID` and only decrypts, and from then on it is a KEK like the others. The
//! object itself stays as it is, and is of use to version 1, until the key is destroyed.

use cryptoki_sys::{self as sys, CK_ATTRIBUTE_TYPE};

use crate::attribute::{Attr, as_bool, as_ulong, flag};
use crate::error::HsmError;
use crate::ffi::Obj;
use crate::kat::CheckRecord;
use crate::kek::{self, WHAT};
use crate::names::KeyUid;
use crate::return_codes::{Verdict, classify};
use crate::templates;
use crate::token::{Ephemeral, Found, Token, duplicates};

const ORIGINAL: &str = "key of version 1";
/// What the labels of our copies begin with.
const COPY: &str = "adopted:";

/// A key of version 1, and the version it is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdoptKek {
    /// `CKA_ID` of its copies in every token, fresh and random.
    pub key_uid: KeyUid,
    /// Number of the version in its context.
    pub version: u32,
    /// Name of the context.
    pub context: String,
    /// `CKA_LABEL` of version 1's object, whatever it is.
    pub label: String,
}

/// What was destroyed of an adopted key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DestroyedAdopted {
    /// Token objects of its id: the copy that adoption made.
    pub copies: usize,
    /// Version 1's objects, proven to be this key.
    pub originals: usize,
    /// Objects of the same label that are not this key. They are left alone.
    pub others: usize,
}

/// What an object says of itself.
struct Facts {
    aes: bool,
    bytes: Option<usize>,
    private: bool,
    sensitive: bool,
    extractable: bool,
    decrypts: bool,
}

const KINDS: [CK_ATTRIBUTE_TYPE; 6] = [
    sys::CKA_KEY_TYPE,
    sys::CKA_VALUE_LEN,
    sys::CKA_PRIVATE,
    sys::CKA_SENSITIVE,
    sys::CKA_EXTRACTABLE,
    sys::CKA_DECRYPT,
];

impl Facts {
    fn of(token: &Token<'_>, object: Obj) -> Result<Self, HsmError> {
        let read = token.read(object, &KINDS)?;
        let raw = |index: usize| {
            read.get(index)
                .and_then(Option::as_ref)
                .map(|bytes| bytes.as_slice())
        };
        let set = |index| raw(index).and_then(as_bool) == Some(true);
        // Not every token knows the length of every key; the check record is what proves one.
        let bytes = raw(1)
            .and_then(as_ulong)
            .and_then(|length| usize::try_from(length).ok())
            .filter(|length| *length > 0);
        Ok(Self {
            aes: raw(0).and_then(as_ulong) == Some(sys::CKK_AES),
            bytes,
            private: set(2),
            sensitive: set(3),
            extractable: set(4),
            decrypts: set(5),
        })
    }

    /// Whether it can have been one of version 1's keys.
    fn check(&self, label: &str) -> Result<(), HsmError> {
        let refuse = |reason: String| {
            Err(HsmError::Argument {
                what: "label",
                reason: format!(
                    "the key {label:?} {reason}; name the label of a key that version 1 encrypted with"
                ),
            })
        };
        match self.bytes {
            _ if !self.aes => refuse("is no AES key".to_owned()),
            Some(bytes) if ![16, 24, 32].contains(&bytes) => {
                refuse(format!("has {bytes} bytes, which no AES key has"))
            }
            _ if !self.decrypts => refuse("may not decrypt (CKA_DECRYPT is false)".to_owned()),
            _ => Ok(()),
        }
    }
}

fn labelled(token: &Token<'_>, label: &str) -> Result<Vec<Obj>, HsmError> {
    Ok(token
        .raw
        .find(token.session, &templates::secret_by_label(label))?)
}

fn not_there(label: &str, id: Option<&[u8]>) -> HsmError {
    let with_id = id.map(|id| format!(" with CKA_ID {}", hex::encode(id)));
    HsmError::NotFound {
        what: ORIGINAL,
        id: format!("{label:?}{}", with_id.unwrap_or_default()),
    }
}

/// `CKA_ID`, perhaps empty.
fn id_of(token: &Token<'_>, object: Obj) -> Result<Vec<u8>, HsmError> {
    let read = token.read(object, &[sys::CKA_ID])?;
    let id = read.first().and_then(Option::as_ref);
    Ok(id.map(|bytes| bytes.as_slice().to_vec()).unwrap_or_default())
}

/// The one object of this label, and of this `CKA_ID` if one is named, with what it says of itself.
fn original(token: &Token<'_>, label: &str, id: Option<&[u8]>) -> Result<(Obj, Facts), HsmError> {
    kek::check_label(label)?;
    if label.starts_with(COPY) {
        return Err(HsmError::Argument {
            what: "label",
            reason: format!(
                "{label:?} is the label of a copy that adoption makes; name the key that it was made of, whose label \
                 comes after {COPY:?}"
            ),
        });
    }
    let mut found = Vec::new();
    for object in labelled(token, label)? {
        let own = id_of(token, object)?;
        if id.is_none_or(|id| id == own) {
            found.push((object, own));
        }
    }
    match found.as_slice() {
        [] => Err(not_there(label, id)),
        [(one, _)] => {
            let facts = Facts::of(token, *one)?;
            facts.check(label)?;
            Ok((*one, facts))
        }
        // Version 1 takes whichever the token finds first, so that nobody knows which one it encrypted with.
        many => {
            let ids: Vec<String> = many.iter().map(|(_, id)| shown(id)).collect();
            Err(HsmError::Argument {
                what: "label",
                reason: format!(
                    "{} keys in the token have the label {label:?} (CKA_ID {}), and nobody knows which of them version 1 \
                     encrypted with; it may be each of them at its time. Delete none. To find out, let version 1 decrypt \
                     something that was encrypted under this label in copies of the token that have one of them each; then \
                     name that one's CKA_ID (--id HEX, or `id: HEX` beside the label in metadata.yaml)",
                    many.len(),
                    ids.join(", ")
                ),
            })
        }
    }
}

fn shown(id: &[u8]) -> String {
    if id.is_empty() {
        "none".to_owned()
    } else {
        hex::encode(id)
    }
}

/// A session copy with every usage dropped that is not needed. Never straight into the token: SoftHSM would write
/// the original's label and usages there first, and a kill would leave a second object that looks like it.
fn session_copy<'t>(
    token: &'t Token<'_>,
    label: &str,
    (object, facts): (Obj, Facts),
    encrypts: bool,
) -> Result<Ephemeral<'t>, HsmError> {
    let mut changes = templates::adopted_copy_changes(encrypts);
    // SoftHSM refuses to be told again what the object already is.
    changes.extend(
        [
            (!facts.private, flag(sys::CKA_PRIVATE, true)),
            (!facts.sensitive, flag(sys::CKA_SENSITIVE, true)),
            (facts.extractable, flag(sys::CKA_EXTRACTABLE, false)),
        ]
        .into_iter()
        .filter_map(|(wanted, change)| wanted.then_some(change)),
    );
    let copied = token.raw.copy(token.session, object, &changes);
    let copy = token.ephemeral(copied.map_err(|error| match classify(&error) {
        Verdict::Refused => HsmError::NotSupported {
            what: format!("a copy of the key {label:?} that only decrypts ({error})"),
            by: "the token".to_owned(),
            remedy: "a key that cannot be copied cannot be adopted: decrypt with version 1 what was encrypted under it, \
                     and encrypt it here"
                .to_owned(),
        },
        _ => error.into(),
    })?);
    token.verify(
        copy.object(),
        &format!("session copy of the key {label:?}"),
        &templates::adopted_session(encrypts),
    )?;
    Ok(copy)
}

/// Finds the key, sees that it can be adopted, and makes its check record. Nothing is left in the token.
pub(crate) fn record(token: &Token<'_>, kek: &AdoptKek, id: Option<&[u8]>) -> Result<Vec<u8>, HsmError> {
    let copy = session_copy(token, &kek.label, original(token, &kek.label, id)?, true)?;
    let made = kek::seal_record(token, copy.object(), kek.key_uid, kek.version, &kek.context)?;
    CheckRecord::parse(kek.key_uid, kek.version, &kek.context, &made)?.prove(token, copy.object())?;
    copy.destroy()?;
    Ok(made)
}

/// As [`record`], without an encryption: whether the key could be adopted.
pub(crate) fn examine(token: &Token<'_>, label: &str, id: Option<&[u8]>) -> Result<(), HsmError> {
    session_copy(token, label, original(token, label, id)?, false)?.destroy()?;
    Ok(())
}

/// Proves the copy that is there. What is not there is not made.
pub(crate) fn prove(token: &Token<'_>, kek: &AdoptKek, check_record: &[u8]) -> Result<(), HsmError> {
    let id = kek.key_uid.as_bytes();
    let record = CheckRecord::parse(kek.key_uid, kek.version, &kek.context, check_record)?;
    match token.find(sys::CKO_SECRET_KEY, id)? {
        Found::None => Err(HsmError::NotFound {
            what: WHAT,
            id: kek.key_uid.to_string(),
        }),
        Found::Many(count) => Err(duplicates(WHAT, id, count)),
        Found::One(held) => prove_held(token, kek, &record, held),
    }
}

fn prove_held(
    token: &Token<'_>,
    kek: &AdoptKek,
    record: &CheckRecord<'_>,
    held: Obj,
) -> Result<(), HsmError> {
    token.verify(
        held,
        &format!("{WHAT} {}", kek.key_uid),
        &templates::adopted_held(kek.key_uid.as_bytes()),
    )?;
    record.prove(token, held).map_err(|error| match error {
        HsmError::CheckRecord { key_uid, reason } => HsmError::Quarantined {
            what: WHAT,
            id: key_uid,
            reason: format!("the object in the token is another key ({reason})"),
        },
        other => other,
    })
}

/// A session copy of the one object of the label that the record proves to be the key: there may be others.
fn proven_copy<'t>(
    token: &'t Token<'_>,
    kek: &AdoptKek,
    record: &CheckRecord<'_>,
) -> Result<Ephemeral<'t>, HsmError> {
    kek::check_label(&kek.label)?;
    let mut refused = not_there(&kek.label, None);
    for object in labelled(token, &kek.label)? {
        let facts = Facts::of(token, object)?;
        if let Err(error) = facts.check(&kek.label) {
            refused = error;
            continue;
        }
        let copy = match session_copy(token, &kek.label, (object, facts), false) {
            Ok(copy) => copy,
            Err(error @ HsmError::NotSupported { .. }) => {
                refused = error;
                continue;
            }
            Err(error) => return Err(error),
        };
        match record.prove(token, copy.object()) {
            Ok(()) => return Ok(copy),
            Err(HsmError::CheckRecord { key_uid, reason }) => {
                copy.destroy()?;
                refused = HsmError::CheckRecord {
                    key_uid,
                    reason: format!(
                        "the key {:?} in this token is not the one that was adopted ({reason})",
                        kek.label
                    ),
                };
            }
            Err(error) => return Err(error),
        }
    }
    Err(refused)
}

/// Whether version 1's own object is in the token: one of the label that the check record proves to be the key. One that
/// cannot be proven counts for nothing.
pub(crate) fn has_original(token: &Token<'_>, kek: &AdoptKek, check_record: &[u8]) -> Result<bool, HsmError> {
    let record = CheckRecord::parse(kek.key_uid, kek.version, &kek.context, check_record)?;
    match proven_copy(token, kek, &record) {
        Ok(copy) => {
            copy.destroy()?;
            Ok(true)
        }
        Err(
            HsmError::NotFound { .. }
            | HsmError::CheckRecord { .. }
            | HsmError::Argument { .. }
            | HsmError::NotSupported { .. },
        ) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Copies the key under its id, once it has proven to be the one that was adopted. On disk and proven when this
/// returns; doing it again changes nothing. With `replace`, whatever has the id goes first.
pub(crate) fn adopt(
    token: &Token<'_>,
    kek: &AdoptKek,
    check_record: &[u8],
    replace: bool,
) -> Result<(), HsmError> {
    let id = kek.key_uid.as_bytes();
    let record = CheckRecord::parse(kek.key_uid, kek.version, &kek.context, check_record)?;
    match token.find(sys::CKO_SECRET_KEY, id)? {
        Found::None => {}
        _ if replace => {}
        Found::Many(count) => return Err(duplicates(WHAT, id, count)),
        Found::One(held) => return prove_held(token, kek, &record, held),
    }
    let copy = proven_copy(token, kek, &record)?;
    if replace {
        kek::destroy(token, kek.key_uid)?;
    }
    let label = copy_label(&kek.label);
    let expected = templates::adopted_held(id);
    token
        .keep(copy.object(), WHAT, sys::CKO_SECRET_KEY, id, &label, &expected)
        .map(|_| ())
}

/// The label of the copy. Another one than the original's: version 1, if it is gone back to, must not find two.
fn copy_label(label: &str) -> String {
    format!("{COPY}{label}")
}

/// Destroys version 1's objects of this label that the check record proves to be the key. Returns how many those
/// were, and how many others there are.
pub(crate) fn destroy_originals(
    token: &Token<'_>,
    kek: &AdoptKek,
    check_record: &[u8],
) -> Result<(usize, usize), HsmError> {
    let record = CheckRecord::parse(kek.key_uid, kek.version, &kek.context, check_record)?;
    let (mut proven, mut others) = (Vec::new(), 0);
    for object in labelled(token, &kek.label)? {
        if Facts::of(token, object)?.check(&kek.label).is_err() {
            others += 1;
            continue;
        }
        match record.prove(token, object) {
            Ok(()) => proven.push(object),
            Err(HsmError::CheckRecord { .. }) => others += 1,
            Err(error) => return Err(error),
        }
    }
    token.destroy_all(&proven)?;
    let left = labelled(token, &kek.label)?.len();
    if left > others {
        return Err(HsmError::Quarantined {
            what: ORIGINAL,
            id: format!("{:?}", kek.label),
            reason: "the token says it destroyed the object and still finds it".to_owned(),
        });
    }
    Ok((proven.len(), others))
}

/// Whether a token object is a copy that adoption made.
pub(crate) fn is_copy(token: &Token<'_>, object: Obj, id: &[u8; 16]) -> Result<bool, HsmError> {
    match token.verify(object, "object", &templates::adopted_held(id)) {
        Ok(()) => Ok(true),
        Err(HsmError::Attribute { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// What makes a session copy of an adopted KEK: it can do no more than what it is made of.
pub(crate) fn loaded_changes() -> Vec<Attr> {
    vec![flag(sys::CKA_TOKEN, false)]
}
