//! The check record: a fixed text encrypted under a key version and kept beside it, so that
//! every node can prove its copy of the key by decrypting. It must never become `AES(K, 0)` or
//! `CKA_CHECK_VALUE`: those are GCM's hash key.

use subtle::ConstantTimeEq;

use crate::envelope::{Binding, HEADER_LEN, Header, IV_LEN, Purpose, TAG_LEN, aad_v2};
use crate::names::KeyUid;

/// The text inside every check record.
pub const TEXT: [u8; 64] = *b"hsm-service check record: this key decrypts what it encrypted. 1";

/// Bytes of a whole check record. At rest it is an envelope:
///
/// ```text
/// offset  bytes  field
///      0     40  header      purpose 3 (check), binding 0 (none); see `envelope::Header`
///     40     64  ciphertext  of TEXT
///    104     16  tag
/// ```
pub const RECORD_LEN: usize = HEADER_LEN + TEXT.len() + TAG_LEN;

/// The header of a new check record. `iv` is random and stored with it.
#[must_use]
pub fn header(key_uid: KeyUid, version: u32, iv: [u8; IV_LEN]) -> Header {
    Header {
        purpose: Purpose::Check,
        binding: Binding::None,
        key_uid,
        version,
        iv,
    }
}

/// Associated data of a check record: that of an envelope of this context, bound to nobody.
#[must_use]
pub fn aad(header_bytes: &[u8], context: &str) -> Vec<u8> {
    aad_v2(header_bytes, context, "", b"")
}

/// Reads a stored record's header; the ciphertext and tag begin at [`HEADER_LEN`].
///
/// `None` if it is no check record, or one of another key version: decrypting it would then
/// prove nothing about this one.
#[must_use]
pub fn parse(record: &[u8], key_uid: KeyUid, version: u32) -> Option<Header> {
    let (found, _) = Header::parse(record)?;
    let expected = header(key_uid, version, found.iv);
    (record.len() == RECORD_LEN && found == expected).then_some(found)
}

/// Whether a decrypted record holds [`TEXT`].
#[must_use]
pub fn matches(decrypted: &[u8]) -> bool {
    bool::from(decrypted.ct_eq(TEXT.as_slice()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UID: KeyUid = KeyUid::from_bytes(*b"0123456789abcdef");

    fn record() -> Vec<u8> {
        let mut record = header(UID, 3, [9; 12]).encode();
        record.resize(RECORD_LEN, 0);
        record
    }

    /// AES-256-GCM under the key `00 01 … 1f`, by another library.
    #[test]
    fn a_golden_record_opens() {
        use aes_gcm::aead::{Aead, Payload};
        use aes_gcm::{Aes256Gcm, KeyInit};

        let record = hex::decode(concat!(
            "f54853320103000c30313233343536373839616263646566000000036e6f6e63652d3132",
            "33343536ee906baceff9ad2ddbfc6e297f7380bec24f5a32566730337d88316a15680cee",
            "831f5a4da0e123556cb3bdee905fa267d73c1041379dcdb9589cbc47437f5e7744d154ae",
            "f6474af2ec18d11c614142a7",
        ))
        .unwrap();
        let header = parse(&record, UID, 3).unwrap();
        let key: [u8; 32] = std::array::from_fn(|i| i as u8);
        let aad = aad(&record[..HEADER_LEN], "exchange-key");
        let text = Aes256Gcm::new_from_slice(&key)
            .unwrap()
            .decrypt(
                (&header.iv).into(),
                Payload {
                    msg: &record[HEADER_LEN..],
                    aad: &aad,
                },
            )
            .unwrap();
        assert!(matches(&text));
    }

    #[test]
    fn a_record_of_another_version_key_length_or_purpose_is_none() {
        assert!(parse(&record(), UID, 3).is_some());
        assert!(parse(&record(), UID, 4).is_none());
        assert!(parse(&record(), KeyUid::from_bytes([0; 16]), 3).is_none());
        assert!(parse(&record()[..RECORD_LEN - 1], UID, 3).is_none());
        assert!(parse(&[record(), vec![0]].concat(), UID, 3).is_none());
        let mut data = record();
        data[5] = Purpose::Data as u8;
        assert!(parse(&data, UID, 3).is_none());
    }

    #[test]
    fn only_the_whole_text_matches() {
        assert!(matches(&TEXT));
        assert!(!matches(&TEXT[..63]));
        assert!(!matches(&[0; 64]));
        assert!(!matches(b""));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(parse(&bytes, UID, 3).is_none());
        }
    }
}
