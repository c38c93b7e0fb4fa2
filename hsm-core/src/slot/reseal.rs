//! A rewrap whose old key is in another slot than its new one: opened in the one, encrypted in the other. Between the
//! two calls the plaintext is in this process, in a buffer that is wiped, and nowhere else.

use std::sync::Arc;

use super::work::{Ciphertext, EncryptJob, RewrapJob, Work};
use crate::envelope::{Binding, Purpose};
use crate::error::OpError;
use crate::names::KeyUid;
use crate::secrets::Plaintext;

/// What is left of a rewrap once its ciphertext is to be opened elsewhere: all but the plaintext.
pub struct Reseal {
    purpose: Purpose,
    key_uid: KeyUid,
    version: u32,
    context: Arc<str>,
    binding: Binding,
    binding_value: Arc<str>,
    aad: Vec<u8>,
}

impl RewrapJob {
    /// The same in two parts: what gives [`Output::Plaintext`](super::Output::Plaintext) in the old key's slot, and what
    /// encrypts that in the new one's.
    ///
    /// # Errors
    /// As [`Slot::run`](super::Slot::run), of what can be seen to be wrong without a token.
    pub fn split(self) -> Result<(Work, Reseal), OpError> {
        self.check()?;
        // v1 had no purposes and no associated data of the caller's.
        let (purpose, context, aad) = match &self.from {
            Ciphertext::V2(from) => (from.header.purpose, Arc::clone(&from.context), from.aad.clone()),
            Ciphertext::V1(from) => (Purpose::Data, Arc::clone(&from.context), Vec::new()),
        };
        let reseal = Reseal {
            purpose,
            key_uid: self.key_uid,
            version: self.version,
            context,
            binding: self.binding,
            binding_value: self.binding_value,
            aad,
        };
        let open = match self.from {
            Ciphertext::V2(from) => Work::DecryptV2(from),
            Ciphertext::V1(from) => Work::DecryptV1(from),
        };
        Ok((open, reseal))
    }
}

impl Reseal {
    /// The second part, of what the first has given. For the same purpose as before: a data key stays one.
    #[must_use]
    pub fn seal(self, plaintext: Plaintext) -> Work {
        Work::Encrypt(EncryptJob {
            purpose: self.purpose,
            key_uid: self.key_uid,
            version: self.version,
            context: self.context,
            binding: self.binding,
            binding_value: self.binding_value,
            aad: self.aad,
            plaintext,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::work::{DecryptJob, DecryptV1Job};
    use super::*;
    use crate::envelope::{HEADER_LEN, Header, TAG_LEN};

    const OLD: KeyUid = KeyUid::from_bytes([1; 16]);
    const NEW: KeyUid = KeyUid::from_bytes([2; 16]);

    fn rewrap(from: Ciphertext) -> RewrapJob {
        RewrapJob {
            from,
            key_uid: NEW,
            version: 2,
            binding: Binding::Shared,
            binding_value: "new".into(),
        }
    }

    fn envelope(purpose: Purpose, length: usize) -> Ciphertext {
        let header = Header {
            purpose,
            binding: Binding::Private,
            key_uid: OLD,
            version: 1,
            iv: [0; 12],
        };
        let mut ciphertext = header.encode();
        ciphertext.resize(length, 0);
        Ciphertext::V2(DecryptJob {
            header,
            ciphertext,
            context: "c".into(),
            binding_value: "old".into(),
            aad: b"aad".to_vec(),
        })
    }

    /// The two parts' keys, and what the second encrypts.
    fn parts(from: Ciphertext) -> (Vec<KeyUid>, EncryptJob) {
        let (open, reseal) = rewrap(from).split().map_err(|error| error.to_string()).unwrap();
        let Work::Encrypt(job) = reseal.seal(Plaintext::new(b"secret".to_vec())) else {
            panic!("it encrypts")
        };
        (open.keys().collect(), job)
    }

    #[test]
    fn the_old_key_opens_and_the_new_one_seals_for_the_same_purpose_with_the_same_associated_data() {
        for purpose in [Purpose::Data, Purpose::DataKey] {
            let (opens, seals) = parts(envelope(purpose, HEADER_LEN + TAG_LEN));
            assert_eq!(
                (opens.as_slice(), seals.key_uid, seals.version),
                (&[OLD][..], NEW, 2)
            );
            assert_eq!(
                (seals.purpose, &*seals.context, seals.aad.as_slice()),
                (purpose, "c", &b"aad"[..])
            );
            // Whom the old one was bound to does not matter to the new one.
            assert_eq!((seals.binding, &*seals.binding_value), (Binding::Shared, "new"));
            assert_eq!(seals.plaintext.as_slice(), b"secret");
        }
        let v1 = DecryptV1Job {
            key_uid: OLD,
            ciphertext: vec![0; 40],
            context: "c".into(),
            binding_value: "old".into(),
        };
        let (opens, seals) = parts(Ciphertext::V1(v1));
        assert_eq!((opens.as_slice(), seals.key_uid), (&[OLD][..], NEW));
        assert_eq!((seals.purpose, seals.aad.len()), (Purpose::Data, 0));
    }

    #[test]
    fn what_one_slot_would_refuse_is_not_split() {
        let refused = |from| rewrap(from).split().map(|_| ()).unwrap_err();
        assert!(matches!(
            refused(envelope(Purpose::Check, HEADER_LEN + TAG_LEN)),
            OpError::Token(_)
        ));
        assert_eq!(
            refused(envelope(Purpose::Data, HEADER_LEN + TAG_LEN - 1)),
            OpError::TooShort
        );
    }
}
