//! What a slot is asked to do with one message, and what it gives. Lengths and headers are checked here, before a
//! token sees them.

use std::sync::Arc;

use crate::envelope::{Binding, HEADER_LEN, Header, Purpose, TAG_LEN, V1_NONCE_LEN};
use crate::error::{HsmError, OpError};
use crate::names::KeyUid;
use crate::secrets::Plaintext;

/// A plaintext to be encrypted into an envelope.
pub struct EncryptJob {
    /// What the envelope is for: never a check record, which only the cluster makes.
    pub purpose: Purpose,
    /// The key version.
    pub key_uid: KeyUid,
    /// Its number in the context.
    pub version: u32,
    /// Name of the context.
    pub context: Arc<str>,
    /// Whom the ciphertext is bound to.
    pub binding: Binding,
    /// First OU, CN or empty, by `binding`.
    pub binding_value: Arc<str>,
    /// The caller's associated data.
    pub aad: Vec<u8>,
    /// What to encrypt.
    pub plaintext: Plaintext,
}

/// An envelope to be opened.
pub struct DecryptJob {
    /// The envelope's own header, parsed and checked against the context's key versions.
    pub header: Header,
    /// The whole envelope.
    pub ciphertext: Vec<u8>,
    /// Name of the context.
    pub context: Arc<str>,
    /// First OU, CN or empty, by the header's binding.
    pub binding_value: Arc<str>,
    /// The caller's associated data.
    pub aad: Vec<u8>,
}

/// A v1 ciphertext to be opened: `nonce(12) ‖ ct ‖ tag(16)`.
pub struct DecryptV1Job {
    /// The key version whose stored label the caller named.
    pub key_uid: KeyUid,
    /// Nonce, ciphertext, tag.
    pub ciphertext: Vec<u8>,
    /// Name of the context.
    pub context: Arc<str>,
    /// First OU or CN, by the context's mode.
    pub binding_value: Arc<str>,
}

/// A ciphertext of either format.
pub enum Ciphertext {
    /// An envelope.
    V2(DecryptJob),
    /// One of v1, which is always data.
    V1(DecryptV1Job),
}

/// A ciphertext to be opened and encrypted again, in the same context, for the same purpose and with the same
/// associated data. The plaintext does not leave the slot; where the two keys are in different ones, see
/// [`RewrapJob::split`].
pub struct RewrapJob {
    /// What to open.
    pub from: Ciphertext,
    /// The key version to encrypt under.
    pub key_uid: KeyUid,
    /// Its number in the context.
    pub version: u32,
    /// Whom the new envelope is bound to.
    pub binding: Binding,
    /// First OU, CN or empty, by `binding`.
    pub binding_value: Arc<str>,
}

/// Length of a data key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataKeySize {
    /// 128 bits.
    Bits128,
    /// 256 bits.
    Bits256,
}

impl DataKeySize {
    /// In bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bits128 => 16,
            Self::Bits256 => 32,
        }
    }
}

/// A data key to be made and encrypted into an envelope.
pub struct DataKeyJob {
    /// The key version to encrypt it under.
    pub key_uid: KeyUid,
    /// Its number in the context.
    pub version: u32,
    /// Name of the context.
    pub context: Arc<str>,
    /// Whom the envelope is bound to.
    pub binding: Binding,
    /// First OU, CN or empty, by `binding`.
    pub binding_value: Arc<str>,
    /// The caller's associated data.
    pub aad: Vec<u8>,
    /// How long it is.
    pub size: DataKeySize,
    /// Whether the key itself is given too, besides its envelope.
    pub plaintext: bool,
}

/// One thing to do.
pub enum Work {
    /// Gives [`Output::Envelope`].
    Encrypt(EncryptJob),
    /// Gives [`Output::Plaintext`].
    DecryptV2(DecryptJob),
    /// Gives [`Output::Plaintext`].
    DecryptV1(DecryptV1Job),
    /// Gives [`Output::Envelope`].
    Rewrap(RewrapJob),
    /// Gives [`Output::DataKey`].
    DataKey(DataKeyJob),
}

/// What came of it.
pub enum Output {
    /// An envelope.
    Envelope(Vec<u8>),
    /// What was in a ciphertext.
    Plaintext(Plaintext),
    /// A new data key.
    DataKey {
        /// Encrypted.
        envelope: Vec<u8>,
        /// As it is, if it was asked for.
        plaintext: Option<Plaintext>,
    },
}

impl Output {
    /// The envelope of an encryption.
    pub(crate) fn envelope(self) -> Result<Vec<u8>, OpError> {
        match self {
            Self::Envelope(envelope) => Ok(envelope),
            _ => Err(other_output()),
        }
    }

    /// The plaintext of a decryption.
    pub(crate) fn plaintext(self) -> Result<Plaintext, OpError> {
        match self {
            Self::Plaintext(plaintext) => Ok(plaintext),
            _ => Err(other_output()),
        }
    }
}

/// Each kind of work has one kind of output.
fn other_output() -> OpError {
    OpError::Token(HsmError::Argument {
        what: "output",
        reason: "is of another kind than the work; this is a fault of this program".to_owned(),
    })
}

impl Ciphertext {
    fn key_uid(&self) -> KeyUid {
        match self {
            Self::V2(job) => job.header.key_uid,
            Self::V1(job) => job.key_uid,
        }
    }

    fn check(&self) -> Result<(), OpError> {
        match self {
            Self::V2(job) => job.check(),
            Self::V1(job) => job.check(),
        }
    }
}

impl DecryptJob {
    fn check(&self) -> Result<(), OpError> {
        if self.ciphertext.len() < HEADER_LEN + TAG_LEN {
            return Err(OpError::TooShort);
        }
        // The associated data is taken from the ciphertext, the key from the header.
        if Header::parse(&self.ciphertext).map(|(header, _)| header) != Some(self.header) {
            return Err(OpError::AuthenticationFailed);
        }
        Ok(())
    }
}

impl DecryptV1Job {
    fn check(&self) -> Result<(), OpError> {
        if self.ciphertext.len() < V1_NONCE_LEN + TAG_LEN {
            return Err(OpError::TooShort);
        }
        Ok(())
    }
}

impl RewrapJob {
    pub(super) fn check(&self) -> Result<(), OpError> {
        self.from.check()?;
        match &self.from {
            Ciphertext::V2(job) => not_a_check(job.header.purpose),
            Ciphertext::V1(_) => Ok(()),
        }
    }
}

/// A second check record would be one that nobody committed.
fn not_a_check(purpose: Purpose) -> Result<(), OpError> {
    if purpose == Purpose::Check {
        return Err(OpError::Token(HsmError::Argument {
            what: "ciphertext",
            reason: "is a check record".to_owned(),
        }));
    }
    Ok(())
}

impl Work {
    /// What is wrong with it without a token's word.
    pub(crate) fn check(&self) -> Result<(), OpError> {
        match self {
            Self::Encrypt(job) => not_a_check(job.purpose),
            Self::DataKey(_) => Ok(()),
            Self::DecryptV2(job) => job.check(),
            Self::DecryptV1(job) => job.check(),
            Self::Rewrap(job) => job.check(),
        }
    }

    /// The keys it needs.
    pub(crate) fn keys(&self) -> impl Iterator<Item = KeyUid> {
        let (first, second) = match self {
            Self::Encrypt(job) => (job.key_uid, None),
            Self::DecryptV2(job) => (job.header.key_uid, None),
            Self::DecryptV1(job) => (job.key_uid, None),
            Self::Rewrap(job) => (job.from.key_uid(), Some(job.key_uid)),
            Self::DataKey(job) => (job.key_uid, None),
        };
        std::iter::once(first).chain(second)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn rewrap(purpose: Purpose, cut: usize) -> Work {
        let header = Header {
            purpose,
            binding: Binding::None,
            key_uid: KeyUid::from_bytes([1; 16]),
            version: 1,
            iv: [0; 12],
        };
        let mut ciphertext = header.encode();
        ciphertext.resize(HEADER_LEN + TAG_LEN - cut, 0);
        let from = DecryptJob {
            header,
            ciphertext,
            context: "c".into(),
            binding_value: "".into(),
            aad: Vec::new(),
        };
        Work::Rewrap(RewrapJob {
            from: Ciphertext::V2(from),
            key_uid: KeyUid::from_bytes([2; 16]),
            version: 2,
            binding: Binding::None,
            binding_value: "".into(),
        })
    }

    #[test]
    fn what_can_be_seen_to_be_wrong_reaches_no_token() {
        for purpose in [Purpose::Data, Purpose::DataKey] {
            assert_eq!(rewrap(purpose, 0).check(), Ok(()));
            assert_eq!(rewrap(purpose, 1).check(), Err(OpError::TooShort));
        }
        assert!(matches!(
            rewrap(Purpose::Check, 0).check(),
            Err(OpError::Token(_))
        ));
        let short = DecryptV1Job {
            key_uid: KeyUid::from_bytes([1; 16]),
            ciphertext: vec![0; V1_NONCE_LEN + TAG_LEN - 1],
            context: "c".into(),
            binding_value: "".into(),
        };
        assert_eq!(Work::DecryptV1(short).check(), Err(OpError::TooShort));
    }

    #[test]
    fn nobody_encrypts_a_check_record() {
        for (purpose, fine) in [
            (Purpose::Data, true),
            (Purpose::DataKey, true),
            (Purpose::Check, false),
        ] {
            let job = EncryptJob {
                purpose,
                key_uid: KeyUid::from_bytes([1; 16]),
                version: 1,
                context: "c".into(),
                binding: Binding::None,
                binding_value: "".into(),
                aad: Vec::new(),
                plaintext: Plaintext::new(Vec::new()),
            };
            assert_eq!(Work::Encrypt(job).check().is_ok(), fine, "{purpose:?}");
        }
    }

    #[test]
    fn a_rewrap_needs_the_old_key_and_the_new_one() {
        let keys: Vec<KeyUid> = rewrap(Purpose::Data, 0).keys().collect();
        assert_eq!(keys, [KeyUid::from_bytes([1; 16]), KeyUid::from_bytes([2; 16])]);
    }
}
