//! What a token holds, in one enumeration: a find per key costs as much as a find of all. It
//! reports foreign objects and never touches them; only torn ones are removed.

use std::collections::{BTreeSet, HashMap};

use cryptoki_sys::{self as sys, CK_ATTRIBUTE_TYPE};

use crate::adopt;
use crate::attribute::{as_bool, as_ulong};
use crate::error::HsmError;
use crate::ffi::{Obj, Read};
use crate::names::{KeyUid, TransportId};
use crate::softhsm_files::TokenFiles;
use crate::templates::{self, NODE_KEY_ID};
use crate::token::Token;

/// A key that encrypts or decrypts and has a 16-byte id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldKey {
    /// `CKA_ID`.
    pub key_uid: KeyUid,
    /// `CKA_LABEL`.
    pub label: String,
    /// Why it must not be used as a KEK: attributes that are not a KEK's (a key of v1), or more
    /// than one object with its id. `None` for a KEK of ours.
    pub problem: Option<String>,
    /// More than one object has this id.
    pub duplicate: bool,
}

/// An object this crate did not make, or whose purpose it cannot tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignObject {
    /// `CKA_LABEL`.
    pub label: String,
    /// `CKA_ID` in hex, perhaps empty.
    pub id: String,
    /// `CKA_CLASS`, if it has one.
    pub class: Option<u64>,
}

/// Everything in a token.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// KEKs, and other keys that could be taken for one.
    pub keks: Vec<HeldKey>,
    /// Transport keys.
    pub transport_keys: Vec<TransportId>,
    /// Whether the token has its node key.
    pub node_key: bool,
    /// The rest.
    pub foreign: Vec<ForeignObject>,
    /// Labels of AES keys that are not this crate's: version 1's are among them.
    pub labelled: BTreeSet<String>,
}

const KINDS: [CK_ATTRIBUTE_TYPE; 8] = [
    sys::CKA_CLASS,
    sys::CKA_KEY_TYPE,
    sys::CKA_ID,
    sys::CKA_LABEL,
    sys::CKA_ENCRYPT,
    sys::CKA_DECRYPT,
    sys::CKA_WRAP,
    sys::CKA_UNWRAP,
];

struct Seen {
    object: Obj,
    class: Option<u64>,
    aes: bool,
    id: Vec<u8>,
    label: String,
    ciphers: bool,
    wraps: bool,
}

impl Seen {
    fn new(object: Obj, read: &[Read]) -> Self {
        let raw = |index: usize| {
            read.get(index)
                .and_then(Option::as_ref)
                .map(|bytes| bytes.as_slice())
        };
        let set = |index| raw(index).and_then(as_bool) == Some(true);
        Self {
            object,
            class: raw(0).and_then(as_ulong),
            aes: raw(1).and_then(as_ulong) == Some(sys::CKK_AES),
            id: raw(2).unwrap_or_default().to_vec(),
            label: String::from_utf8_lossy(raw(3).unwrap_or_default()).into_owned(),
            ciphers: set(4) || set(5),
            wraps: set(6) || set(7),
        }
    }
}

/// Enumerates the token.
pub(crate) fn take(token: &Token<'_>) -> Result<Inventory, HsmError> {
    let mut inventory = Inventory::default();
    let mut places: HashMap<KeyUid, usize> = HashMap::new();
    for object in token.raw.find(token.session, &templates::any_token_object())? {
        let seen = Seen::new(object, &token.read(object, &KINDS)?);
        let secret = seen.class == Some(sys::CKO_SECRET_KEY) && seen.aes;
        match <[u8; 16]>::try_from(seen.id.as_slice()) {
            Ok(id) if secret && seen.ciphers => {
                let key_uid = KeyUid::from_bytes(id);
                if let Some(first) = places
                    .get(&key_uid)
                    .and_then(|place| inventory.keks.get_mut(*place))
                {
                    first.problem = Some("more than one object has this id".to_owned());
                    first.duplicate = true;
                    if check_kek(token, seen.object, &id)?.is_err() {
                        inventory.labelled.insert(seen.label);
                    }
                } else {
                    let checked = check_kek(token, seen.object, &id)?;
                    if checked.is_err() {
                        inventory.labelled.insert(seen.label.clone());
                    }
                    places.insert(key_uid, inventory.keks.len());
                    inventory.keks.push(HeldKey {
                        key_uid,
                        label: seen.label,
                        problem: checked.err().map(|error| error.to_string()),
                        duplicate: false,
                    });
                }
            }
            Ok(id) if secret && seen.wraps => inventory.transport_keys.push(TransportId::from_bytes(id)),
            Ok(id) if seen.class == Some(sys::CKO_PRIVATE_KEY) && id == NODE_KEY_ID => {
                inventory.node_key = true;
            }
            _ => {
                if secret {
                    inventory.labelled.insert(seen.label.clone());
                }
                inventory.foreign.push(ForeignObject {
                    label: seen.label,
                    id: hex::encode(&seen.id),
                    class: seen.class,
                });
            }
        }
    }
    Ok(inventory)
}

/// Whether an object is one of our KEKs, or a copy that adoption made; why not, if it is not.
fn check_kek(token: &Token<'_>, object: Obj, id: &[u8; 16]) -> Result<Result<(), HsmError>, HsmError> {
    let expected = templates::kek_held_any_label(id);
    Ok(match token.verify(object, "object", &expected) {
        Err(HsmError::Attribute { .. }) if adopt::is_copy(token, object, id)? => Ok(()),
        checked => checked,
    })
}

/// Removes what a kill left behind in SoftHSM: files cut off in the middle, objects without
/// class, keys without id and label, and copies that had not yet become token objects. The
/// last ones look like session objects, so they are removed only `at_open`, when there are none.
pub(crate) fn remove_torn(token: &Token<'_>, at_open: bool) -> Result<Vec<String>, HsmError> {
    if !token.is_softhsm() {
        return Ok(Vec::new());
    }
    let mut torn = Vec::new();
    let mut removed = Vec::new();
    for object in token.raw.find(token.session, &[])? {
        if let Some(reason) = torn_because(token, object, at_open)? {
            removed.push(reason);
            torn.push(object);
        }
    }
    token.destroy_all(&torn)?;
    removed.extend(
        token
            .files
            .map(TokenFiles::remove_unreadable)
            .transpose()?
            .unwrap_or_default(),
    );
    Ok(removed)
}

fn torn_because(token: &Token<'_>, object: Obj, at_open: bool) -> Result<Option<String>, HsmError> {
    let kinds = [sys::CKA_CLASS, sys::CKA_TOKEN, sys::CKA_ID, sys::CKA_LABEL];
    let read = match token.read(object, &kinds) {
        Ok(read) => read,
        // How SoftHSM 2.6.1 answers for an object without class or key type.
        Err(error) if error.code.0 == sys::CKR_ATTRIBUTE_VALUE_INVALID => {
            return Ok(Some("object without class or key type".to_owned()));
        }
        Err(error) => return Err(error.into()),
    };
    let raw = |index: usize| {
        read.get(index)
            .and_then(Option::as_ref)
            .map(|bytes| bytes.as_slice())
    };
    let label = String::from_utf8_lossy(raw(3).unwrap_or_default()).into_owned();
    let on_token = raw(1).and_then(as_bool) == Some(true);
    let Some(class) = raw(0)
        .and_then(as_ulong)
        .filter(|class| *class != sys::CKO_VENDOR_DEFINED)
    else {
        return Ok(Some(format!("object {label:?} without class")));
    };
    let is_key = class == sys::CKO_SECRET_KEY || class == sys::CKO_PRIVATE_KEY;
    Ok(match raw(2) {
        _ if !on_token => at_open.then(|| format!("copy {label:?} that had not become a token object")),
        // Certificates and data may well have no id, and a key of v1 may have only a label.
        None if is_key => Some(format!("key {label:?} without id")),
        Some([]) if is_key && label.is_empty() => Some("key without id and label".to_owned()),
        _ => None,
    })
}
