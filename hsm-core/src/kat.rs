//! The known-answer test: decrypting a key version's check record and comparing the text. It is
//! the only judge of a slot's health, so it must never pass without a decryption in the token.

use crate::check_record;
use crate::envelope::{HEADER_LEN, Header};
use crate::error::HsmError;
use crate::ffi::Obj;
use crate::gcm::{Cipher, GcmError};
use crate::names::KeyUid;
use crate::return_codes::{Verdict, classify};
use crate::token::Token;

/// A check record with what it belongs to, its form checked.
pub(crate) struct CheckRecord<'a> {
    key_uid: KeyUid,
    context: &'a str,
    header: Header,
    record: &'a [u8],
}

impl<'a> CheckRecord<'a> {
    /// An error means that record and key version do not belong together; no token was asked.
    pub(crate) fn parse(
        key_uid: KeyUid,
        version: u32,
        context: &'a str,
        record: &'a [u8],
    ) -> Result<Self, HsmError> {
        match check_record::parse(record, key_uid, version) {
            Some(header) => Ok(Self {
                key_uid,
                context,
                header,
                record,
            }),
            None => Err(HsmError::Argument {
                what: "check record",
                reason: format!("not the check record of KEK {key_uid}, version {version} of {context}"),
            }),
        }
    }

    /// Decrypts it with the key behind this handle.
    pub(crate) fn prove(&self, token: &Token<'_>, key: Obj) -> Result<(), HsmError> {
        let cipher = Cipher {
            raw: token.raw,
            session: token.session,
            key,
        };
        let head = self.record.get(..HEADER_LEN).unwrap_or_default();
        let body = self.record.get(HEADER_LEN..).unwrap_or_default();
        let aad = check_record::aad(head, self.context);
        match cipher.open(&self.header.iv, &aad, body) {
            Ok(text) if check_record::matches(text.as_slice()) => Ok(()),
            Ok(_) => Err(self.failed("its check record decrypts to another text")),
            Err(GcmError::TooShort) => Err(self.failed("its check record is too short")),
            // Only what the table calls a wrong tag speaks of the key; a token in trouble, or a session
            // that is of no more use, must never cost a good key its object.
            Err(GcmError::Call(error)) if classify(&error) == Verdict::CallersFault => {
                Err(self.failed(&format!("its check record does not decrypt ({error})")))
            }
            Err(GcmError::Call(error)) => Err(error.into()),
            Err(GcmError::Other(error)) => Err(error),
        }
    }

    fn failed(&self, reason: &str) -> HsmError {
        HsmError::CheckRecord {
            key_uid: self.key_uid.to_string(),
            reason: reason.to_owned(),
        }
    }
}
