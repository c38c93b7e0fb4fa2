//! `TOKEN_REPLICATION_KEY` and what is sealed under it before it enters the replicated state:
//! wrapped KEKs and transport-key grants. Neither key nor derived keys are ever printed; what
//! is public of them is `trk_id`.

mod grant;
mod sealed;

use aes_gcm::aead::{Aead, Payload};
use aes_gcm::{Aes256Gcm, KeyInit};
use base64::Engine;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::{Zeroize, Zeroizing};

use crate::names::TransportId;
use crate::secrets::{RandomError, SecretBytes32, random_bytes};

pub use grant::GrantContext;
pub use sealed::{SealedKeyContext, SealedKeyInfo, WRAP_AES_KEY_WRAP};

/// Public id of a replication key within one cluster.
pub type TrkId = [u8; 8];

/// HKDF `info` of each derived key: one key per purpose, so that a sealed key can never be
/// taken for a grant, whatever its associated data.
const INFO_SEALED_KEY: &[u8] = b"hsm/sealed-key/v1";
const INFO_GRANT: &[u8] = b"hsm/grant/v1";
const INFO_TRK_ID: &[u8] = b"hsm/trk-id/v1";

const NONCE_LEN: usize = 12;
const TAG_LEN: usize = 16;

/// Padding may be missing: shells and YAML editors like to lose a trailing `=`.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A text that is no replication key. Says how it is wrong and never what it says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplicationKeyError {
    /// Nothing there at all: an unset variable or an empty file.
    #[error("the replication key is empty: expected 32 bytes as 64 hex digits or base64")]
    Empty,
    /// Neither form can have this length.
    #[error(
        "the replication key has {0} characters: expected 32 bytes as 64 hex digits or 44 base64 characters (make one with: openssl rand -hex 32)"
    )]
    Length(usize),
    /// The right length, but a character of neither alphabet.
    #[error(
        "the replication key is neither valid hex nor valid base64: expected 32 bytes as 64 hex digits or 44 base64 characters"
    )]
    Encoding,
}

/// Why something could not be sealed or opened.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// No nonce could be drawn.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// More than AES-GCM takes.
    #[error("{what}: too long to be sealed")]
    TooLong {
        /// What was to be sealed.
        what: &'static str,
    },
    /// Not a record of this kind: short, or with another magic.
    #[error("{what}: not a record of this format ({len} bytes)")]
    Format {
        /// What was expected.
        what: &'static str,
        /// How long the record is.
        len: usize,
    },
    /// Sealed under another replication key.
    #[error(
        "{what}: sealed under replication key {found}, this node has {expected}: give every node the same TOKEN_REPLICATION_KEY"
    )]
    OtherReplicationKey {
        /// What was to be opened.
        what: &'static str,
        /// `trk_id` in the record, hex.
        found: String,
        /// `trk_id` of this key, hex.
        expected: String,
    },
    /// Made with another transport key than the caller means to use.
    #[error("{what}: made with transport key {found}, expected {expected}")]
    OtherTransportKey {
        /// What was to be opened.
        what: &'static str,
        /// Transport id in the record.
        found: TransportId,
        /// Transport id the caller named.
        expected: TransportId,
    },
    /// A wrapping mechanism this version does not know.
    #[error("sealed key: unknown wrapping mechanism {0:#06x}: upgrade this node")]
    UnknownMechanism(u16),
    /// The tag is wrong.
    #[error(
        "{what}: does not authenticate: it was altered, or sealed for another cluster, slot, context, key or node"
    )]
    Altered {
        /// What was to be opened.
        what: &'static str,
    },
}

/// `TOKEN_REPLICATION_KEY`: 32 bytes shared by all nodes. Used only to derive a [`ClusterKey`].
pub struct ReplicationKey(SecretBytes32);

impl ReplicationKey {
    /// Reads exactly 32 bytes from 64 hex digits or from base64 (padding optional). White space
    /// around it, as a file's last newline, is ignored.
    pub fn parse(text: &str) -> Result<Self, ReplicationKeyError> {
        let text = text.trim();
        let mut key = SecretBytes32::zeroed();
        match text.len() {
            0 => return Err(ReplicationKeyError::Empty),
            64 => hex::decode_to_slice(text, key.expose_mut()).map_err(|_| ReplicationKeyError::Encoding)?,
            43 | 44 => {
                // Larger than the 33 bytes such a text can stand for: the decoder estimates.
                let mut decoded = Zeroizing::new([0_u8; 48]);
                let length = BASE64
                    .decode_slice(text, decoded.as_mut_slice())
                    .map_err(|_| ReplicationKeyError::Encoding)?;
                if length != key.expose().len() {
                    return Err(ReplicationKeyError::Encoding);
                }
                key.expose_mut().copy_from_slice(&decoded[..length]);
            }
            _ => return Err(ReplicationKeyError::Length(text.chars().count())),
        }
        Ok(Self(key))
    }

    /// A new key from the operating system's random source.
    pub fn generate() -> Result<Self, RandomError> {
        SecretBytes32::random().map(Self)
    }

    /// The form to be written into a file of mode 0600: 64 hex digits, no newline.
    #[must_use]
    pub fn to_hex(&self) -> Zeroizing<String> {
        Zeroizing::new(hex::encode(self.0.expose()))
    }

    /// The keys of one cluster: HKDF-SHA256 (RFC 5869) with the cluster id as salt and the
    /// purpose as info. The same replication key in two clusters gives unrelated keys.
    #[must_use]
    pub fn for_cluster(&self, cluster_id: &[u8; 16]) -> ClusterKey {
        let (mut prk, hkdf) = Hkdf::<Sha256>::extract(Some(cluster_id.as_slice()), self.0.expose());
        prk.as_mut_slice().zeroize();
        let mut key = ClusterKey {
            sealed_key: SecretBytes32::zeroed(),
            grant: SecretBytes32::zeroed(),
            trk_id: [0; 8],
        };
        expand(&hkdf, INFO_SEALED_KEY, key.sealed_key.expose_mut());
        expand(&hkdf, INFO_GRANT, key.grant.expose_mut());
        expand(&hkdf, INFO_TRK_ID, &mut key.trk_id);
        key
    }
}

fn expand(hkdf: &Hkdf<Sha256>, info: &[u8], out: &mut [u8]) {
    if hkdf.expand(info, out).is_err() {
        unreachable!("HKDF-SHA256 gives up to 8160 bytes, {} were asked for", out.len());
    }
}

/// The keys derived from a [`ReplicationKey`] for one cluster.
pub struct ClusterKey {
    sealed_key: SecretBytes32,
    grant: SecretBytes32,
    trk_id: TrkId,
}

impl ClusterKey {
    /// Public id of the replication key in this cluster: committed to state and compared when a
    /// node starts, so that a wrong key is named then and not found in a failing import.
    #[must_use]
    pub fn trk_id(&self) -> TrkId {
        self.trk_id
    }

    fn check_trk_id(&self, what: &'static str, found: TrkId) -> Result<(), SealError> {
        if found == self.trk_id {
            return Ok(());
        }
        Err(SealError::OtherReplicationKey {
            what,
            found: hex::encode(found),
            expected: hex::encode(self.trk_id),
        })
    }
}

/// `prefix ‖ nonce ‖ AES-256-GCM(message)` under a fresh random nonce.
fn seal(
    what: &'static str,
    key: &SecretBytes32,
    prefix: Vec<u8>,
    message: &[u8],
    aad: &[u8],
) -> Result<Vec<u8>, SealError> {
    seal_with(what, key, prefix, random_bytes()?, message, aad)
}

fn seal_with(
    what: &'static str,
    key: &SecretBytes32,
    prefix: Vec<u8>,
    nonce: [u8; NONCE_LEN],
    message: &[u8],
    aad: &[u8],
) -> Result<Vec<u8>, SealError> {
    let sealed = Aes256Gcm::new(key.expose().into())
        .encrypt((&nonce).into(), Payload { msg: message, aad })
        .map_err(|_| SealError::TooLong { what })?;
    let mut out = prefix;
    out.extend_from_slice(&nonce);
    out.extend_from_slice(&sealed);
    Ok(out)
}

fn open(
    what: &'static str,
    key: &SecretBytes32,
    nonce: &[u8; NONCE_LEN],
    sealed: &[u8],
    aad: &[u8],
) -> Result<Zeroizing<Vec<u8>>, SealError> {
    Aes256Gcm::new(key.expose().into())
        .decrypt(nonce.into(), Payload { msg: sealed, aad })
        .map(Zeroizing::new)
        .map_err(|_| SealError::Altered { what })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The bytes `00 01 … 1f`.
    pub(super) const HEX: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

    pub(super) fn cluster_key() -> ClusterKey {
        ReplicationKey::parse(HEX)
            .unwrap()
            .for_cluster(b"cluster-id-16-by")
    }

    /// Made with Python's hmac module after RFC 5869. A change here makes every sealed key in
    /// every cluster unreadable.
    #[test]
    fn the_golden_derived_keys_stand() {
        let key = cluster_key();
        assert_eq!(
            hex::encode(key.sealed_key.expose()),
            "c057bb607c4fb63a4e8661d23d6066923ea6fb28557df52620112ad325caa75c"
        );
        assert_eq!(
            hex::encode(key.grant.expose()),
            "c83255cb9cb6f4db7280e28e0fb141e017f17d3e9fe47e5e991de6cb16000bcb"
        );
        assert_eq!(hex::encode(key.trk_id()), "dba57fde4a94a7da");
    }

    #[test]
    fn another_cluster_or_another_key_has_another_id() {
        let other_cluster = ReplicationKey::parse(HEX)
            .unwrap()
            .for_cluster(b"another-cluster!");
        let other_key = ReplicationKey::generate()
            .unwrap()
            .for_cluster(b"cluster-id-16-by");
        assert_ne!(other_cluster.trk_id(), cluster_key().trk_id());
        assert_ne!(other_key.trk_id(), cluster_key().trk_id());
    }

    #[test]
    fn hex_and_base64_of_the_same_bytes_are_the_same_key() {
        for text in [
            HEX.to_owned(),
            HEX.to_uppercase(),
            format!("{HEX}\n"),
            "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=".to_owned(),
            "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8".to_owned(),
        ] {
            let key = ReplicationKey::parse(&text).unwrap();
            assert_eq!(key.to_hex().as_str(), HEX, "{text:?}");
        }
    }

    #[test]
    fn a_wrong_key_is_refused_without_being_shown() {
        for (text, expected) in [
            (String::new(), ReplicationKeyError::Empty),
            (" \n".to_owned(), ReplicationKeyError::Empty),
            (HEX[..62].to_owned(), ReplicationKeyError::Length(62)),
            ("swordfish".to_owned(), ReplicationKeyError::Length(9)),
            ("z".repeat(64), ReplicationKeyError::Encoding),
            ("=".repeat(44), ReplicationKeyError::Encoding),
            // 33 bytes and 31 bytes, in the length of 32.
            ("A".repeat(44), ReplicationKeyError::Encoding),
            (format!("{}==", "A".repeat(42)), ReplicationKeyError::Encoding),
        ] {
            let error = ReplicationKey::parse(&text).err().unwrap();
            assert_eq!(error, expected);
            assert!(text.trim().is_empty() || !error.to_string().contains(text.trim()));
        }
    }

    #[test]
    fn a_generated_key_survives_its_file() {
        let key = ReplicationKey::generate().unwrap();
        let read = ReplicationKey::parse(&key.to_hex()).unwrap();
        assert!(read.0.expose() == key.0.expose());
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,80}") {
            let _ = ReplicationKey::parse(&text);
        }
    }
}
