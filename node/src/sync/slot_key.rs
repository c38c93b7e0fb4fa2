//! A node vouches for its slots' public keys with the key of its cluster certificate. Whoever grants a
//! transport key verifies that first: RSA-OAEP says nothing about who a key belongs to.

use std::path::Path;
use std::sync::Arc;

use raft_store::names::{ClusterId, RaftId, SlotName};
use raft_store::state::ClusterMeta;
use raft_store::state::node::SlotKey;
use rustls::SignatureScheme;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::sign::{SigningKey, public_key_to_spki};
use rustls_pki_types::PrivateKeyDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

/// TLS signs 64 spaces and a context of its own: no handshake can be taken for this.
const DOMAIN: &[u8] = b"hsm/slotkey/v1\0";

/// A key that cannot be used or a signature that does not hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SlotKeyError(String);

fn error(why: impl Into<String>) -> SlotKeyError {
    SlotKeyError(why.into())
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms
}

/// What is vouched for. Everything in it is signed.
#[derive(Clone, Copy)]
pub struct SlotKeyContext<'a> {
    /// The cluster.
    pub cluster_id: ClusterId,
    /// Its epoch.
    pub epoch: u64,
    /// The node.
    pub raft_id: RaftId,
    /// The slot.
    pub slot: &'a SlotName,
}

impl<'a> SlotKeyContext<'a> {
    /// The context in a cluster as its state describes it.
    pub fn new(meta: &ClusterMeta, raft_id: RaftId, slot: &'a SlotName) -> Self {
        Self {
            cluster_id: meta.cluster_id,
            epoch: meta.epoch,
            raft_id,
            slot,
        }
    }

    /// ```text
    /// "hsm/slotkey/v1\0" ‖ lp(cluster id) ‖ epoch(u64 BE) ‖ raft id(u64 BE) ‖ lp(slot) ‖ lp(SPKI)
    /// ```
    fn message(&self, spki: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(128 + spki.len());
        out.extend_from_slice(DOMAIN);
        put_lp(&mut out, &self.cluster_id.0);
        out.extend_from_slice(&self.epoch.to_be_bytes());
        out.extend_from_slice(&self.raft_id.to_be_bytes());
        put_lp(&mut out, self.slot.as_str().as_bytes());
        put_lp(&mut out, spki);
        out
    }
}

/// 32-bit length prefix. Nothing here comes near 4 GiB.
fn put_lp(out: &mut Vec<u8>, bytes: &[u8]) {
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(bytes);
}

/// The key of this node's cluster certificate.
pub struct ClusterSigner {
    key: Arc<dyn SigningKey>,
    spki: Vec<u8>,
}

impl ClusterSigner {
    /// Takes a key that rustls has loaded already.
    ///
    /// # Errors
    /// When its public half cannot be told.
    pub fn new(key: Arc<dyn SigningKey>) -> Result<Self, SlotKeyError> {
        let spki = key.public_key().map(|spki| spki.as_ref().to_vec());
        let spki = spki.ok_or_else(|| error("cluster.tls.key_path: a key without a public half"))?;
        Ok(Self { key, spki })
    }

    /// Reads the key from `cluster.tls.key_path` (PEM).
    ///
    /// # Errors
    /// When the file is unreadable or holds no supported key.
    pub fn from_pem_file(path: &Path) -> Result<Self, SlotKeyError> {
        let at = |why: String| error(format!("cluster.tls.key_path: {}: {why}", path.display()));
        let der = PrivateKeyDer::from_pem_file(path).map_err(|why| at(why.to_string()))?;
        let der = zeroize::Zeroizing::new(der);
        let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&der);
        Self::new(key.map_err(|why| at(why.to_string()))?)
    }

    /// Vouches for a slot's public key.
    ///
    /// # Errors
    /// When the signature cannot be made.
    pub fn sign(&self, context: &SlotKeyContext<'_>, spki: &[u8]) -> Result<SlotKey, SlotKeyError> {
        let offered = algorithms().supported_schemes();
        let signer = self.key.choose_scheme(&offered);
        let signer = signer.ok_or_else(|| error("the cluster key fits no known signature scheme"))?;
        let signed = signer
            .sign(&context.message(spki))
            .map_err(|why| error(why.to_string()))?;
        // As in TLS, the scheme goes before the signature.
        let scheme = u16::from(signer.scheme());
        let signature = [scheme.to_be_bytes().as_slice(), &signed].concat();
        Ok(SlotKey {
            spki: spki.to_vec(),
            signature,
            signer_spki: self.spki.clone(),
        })
    }
}

/// Verifies what a node says of its slot's key. That `signer_spki` is the node's own key, the leader
/// knows from the connection the registration came in; a signature under it cannot be moved to
/// another cluster, epoch, node or slot.
///
/// # Errors
/// Says what does not hold.
pub fn verify(context: &SlotKeyContext<'_>, key: &SlotKey) -> Result<(), SlotKeyError> {
    let Some((scheme, signature)) = key.signature.split_first_chunk::<2>() else {
        return Err(error("its signature is too short"));
    };
    let scheme = SignatureScheme::from(u16::from_be_bytes(*scheme));
    let signer = match SubjectPublicKeyInfo::from_der(&key.signer_spki) {
        Ok(([], signer)) => signer,
        _ => return Err(error("the signer's public key does not parse")),
    };
    let bits: &[u8] = &signer.subject_public_key.data;
    let message = context.message(&key.spki);
    let holds = algorithms()
        .mapping
        .iter()
        .filter(|(known, _)| *known == scheme)
        .flat_map(|(_, algorithms)| algorithms.iter())
        // The algorithm has to be the key's own, and the key in its one canonical encoding.
        .filter(|algorithm| {
            public_key_to_spki(&algorithm.public_key_alg_id(), bits).as_ref() == key.signer_spki.as_slice()
        })
        .any(|algorithm| algorithm.verify_signature(bits, &message, signature).is_ok());
    if holds {
        return Ok(());
    }
    Err(error(
        "its signature does not hold for this cluster, epoch, node and slot: the key was substituted or \
         registered elsewhere",
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
pub(super) mod tests {
    use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, SignatureAlgorithm};
    use rustls_pki_types::PrivatePkcs8KeyDer;

    use super::*;

    pub(in super::super) fn signer(algorithm: &'static SignatureAlgorithm) -> ClusterSigner {
        let pair = KeyPair::generate_for(algorithm).unwrap();
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pair.serialize_der()));
        ClusterSigner::new(rustls::crypto::aws_lc_rs::sign::any_supported_type(&der).unwrap()).unwrap()
    }

    fn context(slot: &SlotName) -> SlotKeyContext<'_> {
        SlotKeyContext {
            cluster_id: ClusterId([1; 16]),
            epoch: 1,
            raft_id: 7,
            slot,
        }
    }

    #[test]
    fn keys_of_every_kind_vouch() {
        let slot = SlotName::new("exchange").unwrap();
        for algorithm in [&PKCS_ECDSA_P256_SHA256, &PKCS_ECDSA_P384_SHA384, &PKCS_ED25519] {
            let key = signer(algorithm).sign(&context(&slot), b"spki").unwrap();
            verify(&context(&slot), &key).unwrap();
        }
    }

    #[test]
    fn a_key_file_that_is_none_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.pem");
        let pem = KeyPair::generate().unwrap().serialize_pem();
        std::fs::write(&path, pem).unwrap();
        assert!(ClusterSigner::from_pem_file(&path).is_ok());
        std::fs::write(&path, "no key").unwrap();
        let error = ClusterSigner::from_pem_file(&path).err().unwrap().to_string();
        assert!(
            error.starts_with("cluster.tls.key_path: ") && error.contains("key.pem"),
            "{error}"
        );
    }

    #[test]
    fn a_signature_holds_for_nothing_else() {
        let (slot, other) = (SlotName::new("a").unwrap(), SlotName::new("b").unwrap());
        let right = context(&slot);
        let key = signer(&PKCS_ECDSA_P256_SHA256).sign(&right, b"spki").unwrap();
        for wrong in [
            SlotKeyContext {
                cluster_id: ClusterId([2; 16]),
                ..right
            },
            SlotKeyContext { epoch: 2, ..right },
            SlotKeyContext { raft_id: 8, ..right },
            SlotKeyContext {
                slot: &other,
                ..right
            },
        ] {
            assert!(verify(&wrong, &key).is_err());
        }
        assert!(
            verify(
                &right,
                &SlotKey {
                    spki: b"spkj".to_vec(),
                    ..key.clone()
                }
            )
            .is_err()
        );
    }

    #[test]
    fn another_signer_or_an_altered_signature_is_refused() {
        let slot = SlotName::new("a").unwrap();
        let context = context(&slot);
        let key = signer(&PKCS_ECDSA_P256_SHA256).sign(&context, b"spki").unwrap();
        let stranger = signer(&PKCS_ECDSA_P256_SHA256);
        assert!(
            verify(
                &context,
                &SlotKey {
                    signer_spki: stranger.spki,
                    ..key.clone()
                }
            )
            .is_err()
        );
        for index in [0, 1, 10, key.signature.len() - 1] {
            let mut altered = key.clone();
            altered.signature[index] ^= 1;
            assert!(verify(&context, &altered).is_err(), "byte {index}");
        }
        for length in [0, 1, 2] {
            let cut = SlotKey {
                signature: key.signature[..length].to_vec(),
                ..key.clone()
            };
            assert!(verify(&context, &cut).is_err());
        }
        let mut longer = key.clone();
        longer.signer_spki.push(0);
        assert!(verify(&context, &longer).is_err());
        assert!(
            verify(
                &context,
                &SlotKey {
                    signer_spki: Vec::new(),
                    ..key
                }
            )
            .is_err()
        );
    }
}
