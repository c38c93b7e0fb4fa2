//! One token, seen through the control session that currently has it to itself: finding,
//! checking, keeping and destroying objects. It never changes an attribute of a token object (a
//! kill inside `C_SetAttributeValue` zeroes the key).

use cryptoki::session::Session;
use cryptoki_sys::{self as sys, CK_ATTRIBUTE_TYPE, CK_OBJECT_CLASS};

use crate::attribute::{Attr, Value, as_bool, name};
use crate::error::{CallError, HsmError};
use crate::ffi::{Obj, Raw, Read};
use crate::profile::VendorProfile;
use crate::softhsm_files::TokenFiles;
use crate::templates;

/// What a control operation works with.
pub(crate) struct Token<'a> {
    pub(crate) raw: &'a Raw,
    pub(crate) session: &'a Session,
    pub(crate) profile: &'a VendorProfile,
    /// The token's files, if it has any.
    pub(crate) files: Option<&'a TokenFiles>,
}

/// A session object that must not outlive the operation that made it.
pub(crate) struct Ephemeral<'a> {
    token: &'a Token<'a>,
    object: Obj,
}

impl Ephemeral<'_> {
    pub(crate) fn object(&self) -> Obj {
        self.object
    }

    /// Destroys it now, for objects whose survival would be a fault: sessions are never closed, so
    /// nothing else would end it.
    pub(crate) fn destroy(self) -> Result<(), CallError> {
        let destroyed = self.token.raw.destroy(self.token.session, self.object);
        std::mem::forget(self);
        destroyed
    }
}

impl Drop for Ephemeral<'_> {
    fn drop(&mut self) {
        // One that cannot be destroyed stays until the process ends. It cannot be extracted, unless
        // it is the public check constant; a KEK that is being generated goes by `destroy`.
        let _ = self.token.raw.destroy(self.token.session, self.object);
    }
}

/// How often an id was found.
pub(crate) enum Found {
    None,
    One(Obj),
    Many(usize),
}

impl Token<'_> {
    /// Makes sure that `object` is destroyed at the end of the operation.
    pub(crate) fn ephemeral(&self, object: Obj) -> Ephemeral<'_> {
        Ephemeral { token: self, object }
    }

    /// The token object of this class and id.
    pub(crate) fn find(&self, class: CK_OBJECT_CLASS, id: &[u8; 16]) -> Result<Found, CallError> {
        let found = self.find_all(class, id)?;
        Ok(match found.as_slice() {
            [] => Found::None,
            [one] => Found::One(*one),
            many => Found::Many(many.len()),
        })
    }

    /// Every token object of this class and id; there should never be more than one.
    pub(crate) fn find_all(&self, class: CK_OBJECT_CLASS, id: &[u8; 16]) -> Result<Vec<Obj>, CallError> {
        self.raw.find(self.session, &templates::by_id(class, id))
    }

    /// The one token object of this class and id; nothing else will do.
    pub(crate) fn find_one(
        &self,
        class: CK_OBJECT_CLASS,
        id: &[u8; 16],
        what: &'static str,
    ) -> Result<Obj, HsmError> {
        match self.find(class, id)? {
            Found::One(object) => Ok(object),
            Found::None => Err(HsmError::NotFound {
                what,
                id: hex::encode(id),
            }),
            Found::Many(count) => Err(duplicates(what, id, count)),
        }
    }

    pub(crate) fn read(&self, object: Obj, kinds: &[CK_ATTRIBUTE_TYPE]) -> Result<Vec<Read>, CallError> {
        self.raw.read(self.session, object, kinds)
    }

    /// Reads every attribute of `expected` back and compares it.
    pub(crate) fn verify(&self, object: Obj, what: &str, expected: &[Attr]) -> Result<(), HsmError> {
        let (nested, flat): (Vec<&Attr>, Vec<&Attr>) = expected
            .iter()
            .partition(|attr| matches!(attr.value, Value::Template(_)));
        // Lengths and moduli are not kept by every way of making a key.
        let flat: Vec<&Attr> = flat.into_iter().filter(|attr| is_kept(attr.kind)).collect();
        let kinds: Vec<CK_ATTRIBUTE_TYPE> = flat.iter().map(|attr| attr.kind).collect();
        for (attr, found) in flat.into_iter().zip(self.read(object, &kinds)?) {
            let found = found.as_ref().map(|bytes| bytes.as_slice());
            if !matches(&attr.value, found) {
                return Err(mismatch(what, attr, found));
            }
        }
        for attr in nested {
            let Value::Template(flags) = &attr.value else {
                continue;
            };
            let found = self.raw.read_template(self.session, object, attr.kind)?;
            let complete = flags.len() == found.len()
                && flags
                    .iter()
                    .all(|(kind, value)| found.contains(&(*kind, Some(*value))));
            if !complete {
                return Err(HsmError::Attribute {
                    object: what.to_owned(),
                    attribute: name(attr.kind),
                    expected: show_flags(flags.iter().map(|(kind, value)| (*kind, Some(*value)))),
                    found: show_flags(found.iter().copied()),
                });
            }
        }
        Ok(())
    }

    /// Makes a token object of a session object: copy, find again by id, compare, sync. An
    /// object that is not as expected, or does not reach the disk, is destroyed again. On disk when
    /// this returns.
    ///
    /// A copy is written to disk twice, an unwrapping straight into the token 34 times; in
    /// between, a killed copy still says that it is no token object, and is removed at start.
    pub(crate) fn keep(
        &self,
        object: Obj,
        what: &'static str,
        class: CK_OBJECT_CLASS,
        id: &[u8; 16],
        label: &str,
        expected: &[Attr],
    ) -> Result<Obj, HsmError> {
        let before = self.files.map(TokenFiles::objects).transpose()?;
        let made = self
            .raw
            .copy(self.session, object, &templates::to_token(id, label))?;
        let kept = self.find_one(class, id, what).and_then(|kept| {
            self.verify(kept, &format!("{what} {}", hex::encode(id)), expected)?;
            if let (Some(files), Some(before)) = (self.files, before) {
                files.sync_since(&before)?;
            }
            Ok(kept)
        });
        // What is not certainly on disk must not be found later and taken for an import: after a
        // failed fsync a second one says nothing.
        kept.map_err(|error| match self.raw.destroy(self.session, made) {
            Ok(()) => error,
            Err(left) => HsmError::Quarantined {
                what,
                id: hex::encode(id),
                reason: format!("{error}; and the object could not be taken back ({left})"),
            },
        })
    }

    /// Destroys token objects for good: gone from disk too when this returns.
    pub(crate) fn destroy_all(&self, objects: &[Obj]) -> Result<(), HsmError> {
        for object in objects {
            self.raw.destroy(self.session, *object)?;
        }
        match self.files {
            Some(files) if !objects.is_empty() => files.sync_dir(),
            _ => Ok(()),
        }
    }

    /// True for the module whose objects can be torn.
    pub(crate) fn is_softhsm(&self) -> bool {
        self.profile.is_software()
    }
}

pub(crate) fn duplicates(what: &'static str, id: &[u8; 16], count: usize) -> HsmError {
    HsmError::Quarantined {
        what,
        id: hex::encode(id),
        reason: format!("{count} objects have this id; destroy the id and import the key again"),
    }
}

fn is_kept(kind: CK_ATTRIBUTE_TYPE) -> bool {
    ![sys::CKA_VALUE, sys::CKA_VALUE_LEN, sys::CKA_MODULUS_BITS].contains(&kind)
}

fn matches(expected: &Value, found: Option<&[u8]>) -> bool {
    match (expected, found) {
        (Value::Bool(expected), Some(found)) => as_bool(found) == Some(*expected),
        (expected, Some(found)) => expected.encoded().as_deref() == Some(found),
        (_, None) => false,
    }
}

fn mismatch(what: &str, attr: &Attr, found: Option<&[u8]>) -> HsmError {
    let show = |bytes: Option<&[u8]>| match (&attr.value, bytes) {
        (_, None) => "missing".to_owned(),
        (Value::Bool(_), Some(bytes)) => format!("{:?}", as_bool(bytes).unwrap_or_default()),
        (_, Some(bytes)) => hex::encode(bytes),
    };
    HsmError::Attribute {
        object: what.to_owned(),
        attribute: name(attr.kind),
        expected: show(attr.value.encoded().as_deref()),
        found: show(found),
    }
}

fn show_flags(flags: impl Iterator<Item = (CK_ATTRIBUTE_TYPE, Option<bool>)>) -> String {
    let shown: Vec<String> = flags
        .map(|(kind, value)| match value {
            Some(value) => format!("{}={value}", name(kind)),
            None => format!("{}=?", name(kind)),
        })
        .collect();
    format!("{{{}}}", shown.join(", "))
}
