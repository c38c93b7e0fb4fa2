//! The header of an envelope, byte by byte. Parsing never panics and accepts only what
//! `encode` can have written; whether the key exists is for the caller to find out.

use crate::names::KeyUid;

/// First bytes of every envelope and check record. `0xF5` never occurs in UTF-8, so no text is
/// mistaken for one. A v1 ciphertext starts with a random nonce and *may* start with these
/// bytes: only magic *and* a key version known for the context make it v2.
pub const MAGIC: [u8; 4] = [0xF5, b'H', b'S', b'2'];

/// AES-256-GCM, 128-bit tag. The only suite so far.
const SUITE_AES_256_GCM: u8 = 1;

/// Bytes of the header that are authenticated as associated data: all before the IV.
pub const SIGNED_HEADER_LEN: usize = 28;

/// Bytes of the IV: 96 bits, the only length for which NIST SP 800-38D (8.2) spares a hash.
pub const IV_LEN: usize = 12;

/// Bytes of the whole header, IV included.
pub const HEADER_LEN: usize = SIGNED_HEADER_LEN + IV_LEN;

/// Bytes of the GCM tag, the last ones of every ciphertext.
pub const TAG_LEN: usize = 16;

/// What was encrypted. A data key or check record never comes out where data is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Purpose {
    /// A caller's plaintext.
    Data = 1,
    /// A data key made by the service.
    DataKey = 2,
    /// A check record: the fixed text of `check_record`.
    Check = 3,
}

impl Purpose {
    fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Data),
            2 => Some(Self::DataKey),
            3 => Some(Self::Check),
            _ => None,
        }
    }
}

/// Whom a ciphertext is bound to, through its associated data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Binding {
    /// Nobody: every principal allowed to use the context.
    None = 0,
    /// The first OU of the certificate that encrypted (v1's `mode: shared`).
    Shared = 1,
    /// The CN of the certificate that encrypted (v1's `mode: private`).
    Private = 2,
}

impl Binding {
    fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::None),
            1 => Some(Self::Shared),
            2 => Some(Self::Private),
            _ => None,
        }
    }
}

/// The header of an envelope. On the wire and at rest:
///
/// ```text
/// offset  bytes  field
///      0      4  magic       F5 48 53 32
///      4      1  suite       1 = AES-256-GCM with a 128-bit tag
///      5      1  purpose     1 = data, 2 = data key, 3 = check record
///      6      1  binding     0 = none, 1 = shared (OU), 2 = private (CN)
///      7      1  iv_len      12
///      8     16  key_uid     CKA_ID of the key version
///     24      4  version     u32, big-endian
///     28     12  iv
///     40      n  ciphertext  as long as the plaintext
///   40+n     16  tag
/// ```
///
/// The associated data holds bytes 0 to 27. The IV is left out, because a token that makes its
/// own IV (`iv_source = token_*`) takes the associated data before the IV exists; GCM
/// authenticates the IV anyway, so no bit of the envelope can be changed unnoticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What was encrypted.
    pub purpose: Purpose,
    /// Whom it is bound to.
    pub binding: Binding,
    /// Which key version encrypted it, as the token knows it.
    pub key_uid: KeyUid,
    /// Which version of the context that is, for people and for error messages.
    pub version: u32,
    /// The GCM nonce, never used twice with one key.
    pub iv: [u8; IV_LEN],
}

impl Header {
    /// The 40 bytes that precede the ciphertext.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_LEN);
        self.encode_into(&mut out);
        out
    }

    /// As [`Header::encode`], appended to a buffer that will also take ciphertext and tag.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[
            SUITE_AES_256_GCM,
            self.purpose as u8,
            self.binding as u8,
            IV_LEN as u8,
        ]);
        out.extend_from_slice(self.key_uid.as_bytes());
        out.extend_from_slice(&self.version.to_be_bytes());
        out.extend_from_slice(&self.iv);
    }

    /// Reads the header a ciphertext opens with, and says where the ciphertext proper begins.
    ///
    /// `None` is not an error: it is what a v1 ciphertext looks like. Nor does `Some` promise
    /// that a tag follows: the caller checks that [`TAG_LEN`] bytes are left.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<(Self, usize)> {
        let (magic, rest) = bytes.split_first_chunk::<4>()?;
        let ([suite, purpose, binding, iv_len], rest) = rest.split_first_chunk::<4>()?;
        let (key_uid, rest) = rest.split_first_chunk::<16>()?;
        let (version, rest) = rest.split_first_chunk::<4>()?;
        let (iv, _) = rest.split_first_chunk::<IV_LEN>()?;
        if *magic != MAGIC || *suite != SUITE_AES_256_GCM || usize::from(*iv_len) != IV_LEN {
            return None;
        }
        let header = Self {
            purpose: Purpose::from_byte(*purpose)?,
            binding: Binding::from_byte(*binding)?,
            key_uid: KeyUid::from_bytes(*key_uid),
            version: u32::from_be_bytes(*version),
            iv: *iv,
        };
        Some((header, HEADER_LEN))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Header {
        Header {
            purpose: Purpose::Data,
            binding: Binding::Private,
            key_uid: KeyUid::from_bytes(*b"0123456789abcdef"),
            version: 7,
            iv: *b"nonce-123456",
        }
    }

    /// Changing this test means that ciphertexts already stored by callers no longer open.
    #[test]
    fn the_golden_header_bytes_stand() {
        assert_eq!(
            hex::encode(sample().encode()),
            "f54853320101020c30313233343536373839616263646566000000076e6f6e63652d313233343536"
        );
        assert_eq!((SIGNED_HEADER_LEN, HEADER_LEN, TAG_LEN), (28, 40, 16));
    }

    #[test]
    fn every_purpose_and_binding_round_trips() {
        for purpose in [Purpose::Data, Purpose::DataKey, Purpose::Check] {
            for binding in [Binding::None, Binding::Shared, Binding::Private] {
                let header = Header {
                    purpose,
                    binding,
                    ..sample()
                };
                assert_eq!(Header::parse(&header.encode()), Some((header, HEADER_LEN)));
            }
        }
    }

    #[test]
    fn a_truncated_header_is_none_at_every_length() {
        let bytes = sample().encode();
        for length in 0..bytes.len() {
            assert_eq!(Header::parse(&bytes[..length]), None, "length {length}");
        }
    }

    #[test]
    fn unknown_magic_suite_purpose_binding_and_iv_length_are_refused() {
        for (offset, value) in [(0, 0), (3, b'1'), (4, 2), (5, 0), (5, 4), (6, 3), (7, 16)] {
            let mut bytes = sample().encode();
            bytes[offset] = value;
            assert_eq!(Header::parse(&bytes), None, "offset {offset}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = Header::parse(&bytes);
        }

        #[test]
        fn what_parses_encodes_to_the_same_bytes(
            purpose in 0_u8..5, binding in 0_u8..4, tail in proptest::collection::vec(any::<u8>(), 32..64),
        ) {
            let mut bytes = MAGIC.to_vec();
            bytes.extend_from_slice(&[SUITE_AES_256_GCM, purpose, binding, 12]);
            bytes.extend_from_slice(&tail);
            if let Some((header, offset)) = Header::parse(&bytes) {
                let encoded = header.encode();
                prop_assert_eq!(encoded.as_slice(), &bytes[..offset]);
            } else {
                prop_assert!(!(1..=3).contains(&purpose) || binding > 2);
            }
        }
    }
}
