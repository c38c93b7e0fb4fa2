//! The known-answer test: decrypting a key version's check record and comparing the text. It is
//! the only judge of a slot's health, so it must never pass without a decryption in the token.

use crate::check_record;
use crate::envelope::{HEADER_LEN, Header};
use crate::error::HsmError;
use crate::ffi::Obj;
use crate::gcm::{Cipher, GcmError};
use crate::kek;
use crate::marshal::Mech;
use crate::names::KeyUid;
use crate::return_codes::{Verdict, classify, may_be_the_token};
use crate::templates;
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

    /// Whether it decrypts to the text.
    fn opens(&self, cipher: &Cipher<'_>) -> Result<bool, GcmError> {
        let head = self.record.get(..HEADER_LEN).unwrap_or_default();
        let body = self.record.get(HEADER_LEN..).unwrap_or_default();
        let aad = check_record::aad(head, self.context);
        let text = cipher.open(&self.header.iv, &aad, body)?;
        Ok(check_record::matches(text.as_slice()))
    }

    /// Decrypts it with the key behind this handle.
    pub(crate) fn prove(&self, token: &Token<'_>, key: Obj) -> Result<(), HsmError> {
        let mut opened = self.opens(&cipher(token, key));
        if let Err(GcmError::Call(error)) = opened
            && may_be_the_token(&error)
        {
            if !decrypts(token)? {
                return Err(error.into());
            }
            // Refused before and after the token has opened something else: trouble that has passed meanwhile was not the key's.
            opened = self.opens(&cipher(token, key));
        }
        match opened {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.failed("its check record decrypts to another text")),
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

fn cipher<'a>(token: &Token<'a>, key: Obj) -> Cipher<'a> {
    Cipher {
        raw: token.raw,
        session: token.session,
        key,
    }
}

/// Whether the token decrypts what it has just encrypted under a key that is made for that alone. If not, a key that does not open
/// its check record is not to blame.
fn decrypts(token: &Token<'_>) -> Result<bool, HsmError> {
    const CONTEXT: &str = "control";
    let key_uid = KeyUid::random()?;
    let key = token
        .raw
        .generate_key(token.session, Mech::AesKeyGen, &templates::control_key())?;
    let key = token.ephemeral(key);
    let record = kek::seal_record(token, key.object(), key_uid, 1, CONTEXT)?;
    let record = CheckRecord::parse(key_uid, 1, CONTEXT, &record)?;
    let opened = record.opens(&cipher(token, key.object()));
    key.destroy()?;
    match opened {
        Ok(opened) => Ok(opened),
        Err(GcmError::TooShort) => Ok(false),
        Err(GcmError::Call(error)) => Err(error.into()),
        Err(GcmError::Other(error)) => Err(error),
    }
}

/// What a key version is known to open, for those who have to tell a wrong ciphertext from a token in trouble.
pub(crate) struct Known {
    version: u32,
    context: String,
    record: Vec<u8>,
}

impl Known {
    pub(crate) fn new(version: u32, context: &str, record: &[u8]) -> Self {
        Self {
            version,
            context: context.to_owned(),
            record: record.to_vec(),
        }
    }

    /// Whether the cipher's key opens it.
    pub(crate) fn opens(&self, key_uid: KeyUid, cipher: &Cipher<'_>) -> bool {
        CheckRecord::parse(key_uid, self.version, &self.context, &self.record)
            .is_ok_and(|record| matches!(record.opens(cipher), Ok(true)))
    }
}
