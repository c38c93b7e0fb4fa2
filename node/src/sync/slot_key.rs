//! A node vouches for its slots' public keys with the key of its cluster certificate. Whoever grants a
//! transport key verifies that first: RSA-OAEP says nothing about who a key belongs to.

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use raft_store::names::{ClusterId, RaftId, SlotName};
use raft_store::state::ClusterMeta;
use raft_store::state::node::SlotKey;
use rustls::SignatureScheme;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::sign::{SigningKey, public_key_to_spki};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use crate::config::PeerTlsFiles;
use crate::identity::peer_identity;
use crate::tls::PeerVerifier;

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

/// This node's cluster certificate and its key, and what other nodes' are verified with.
pub struct ClusterSigner {
    key: Arc<dyn SigningKey>,
    chain: Vec<Vec<u8>>,
    trust: Arc<PeerVerifier>,
}

impl ClusterSigner {
    /// Reads certificate and key from `cluster.tls.cert_path` and `cluster.tls.key_path` (PEM).
    ///
    /// # Errors
    /// When a file is unreadable or holds nothing usable.
    pub fn from_files(files: &PeerTlsFiles, trust: Arc<PeerVerifier>) -> Result<Self, SlotKeyError> {
        let cert_at = |why: &dyn Display| {
            let path = files.cert_path.display();
            error(format!("cluster.tls.cert_path: {path}: {why}"))
        };
        let chain = CertificateDer::pem_file_iter(&files.cert_path).map_err(|why| cert_at(&why))?;
        let chain: Result<Vec<Vec<u8>>, _> = chain
            .map(|certificate| certificate.map(|der| der.to_vec()))
            .collect();
        let chain = chain.map_err(|why| cert_at(&why))?;
        if chain.is_empty() {
            return Err(cert_at(&"holds no certificate"));
        }
        let key_at = |why: &dyn Display| {
            let path = files.key_path.display();
            error(format!("cluster.tls.key_path: {path}: {why}"))
        };
        let der = PrivateKeyDer::from_pem_file(&files.key_path).map_err(|why| key_at(&why))?;
        let der = zeroize::Zeroizing::new(der);
        let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&der).map_err(|why| key_at(&why))?;
        Ok(Self { key, chain, trust })
    }

    /// What other nodes' certificates are verified with.
    #[must_use]
    pub fn trust(&self) -> &PeerVerifier {
        &self.trust
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
            epoch: context.epoch,
            signature,
            signer_chain: self.chain.clone(),
        })
    }
}

/// Verifies what a node says of its slot's key: the signature holds for this cluster, epoch, node and slot
/// and no other, and is by a certificate that the cluster's CA issued for the node of this name. Nobody's
/// word is taken for it, the leader's included.
///
/// # Errors
/// Says what does not hold.
pub fn verify(
    context: &SlotKeyContext<'_>,
    name: &str,
    key: &SlotKey,
    trust: &PeerVerifier,
) -> Result<(), SlotKeyError> {
    // The epoch it was signed in: a later one takes nothing away from whose key it is.
    let context = SlotKeyContext {
        epoch: key.epoch,
        ..*context
    };
    let chain: Vec<CertificateDer<'_>> = key
        .signer_chain
        .iter()
        .map(|der| CertificateDer::from(der.as_slice()))
        .collect();
    let Some((leaf, intermediates)) = chain.split_first() else {
        return Err(error("no certificate of its signer was registered"));
    };
    let signer = match X509Certificate::from_der(leaf) {
        Ok(([], signer)) => signer,
        _ => return Err(error("the signer's certificate does not parse")),
    };
    // Registered once and for all: it stays good after the certificate was renewed.
    let validity = signer.validity();
    let now = i64::try_from(UnixTime::now().as_secs()).unwrap_or(i64::MAX);
    let when = now
        .min(validity.not_after.timestamp())
        .max(validity.not_before.timestamp());
    let when = UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(when).unwrap_or(0)));
    trust
        .verify(leaf, intermediates, when)
        .map_err(|why| error(format!("the signer's certificate is not of this cluster: {why}")))?;
    match peer_identity(leaf) {
        Ok(signed_by) if signed_by.name == name => {}
        _ => return Err(error("the signer's certificate is another node's")),
    }
    let Some((scheme, signature)) = key.signature.split_first_chunk::<2>() else {
        return Err(error("its signature is too short"));
    };
    let scheme = SignatureScheme::from(u16::from_be_bytes(*scheme));
    let spki = signer.public_key();
    let bits: &[u8] = &spki.subject_public_key.data;
    let message = context.message(&key.spki);
    let holds = algorithms()
        .mapping
        .iter()
        .filter(|(known, _)| *known == scheme)
        .flat_map(|(_, algorithms)| algorithms.iter())
        // The algorithm has to be the key's own.
        .filter(|algorithm| public_key_to_spki(&algorithm.public_key_alg_id(), bits).as_ref() == spki.raw)
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
    use std::sync::OnceLock;

    use crate::identity::test_certs::{TestCa, TestCert};

    use super::*;

    /// The CA of the cluster `test`.
    fn ca() -> &'static TestCa {
        static CA: OnceLock<TestCa> = OnceLock::new();
        CA.get_or_init(|| TestCa::new("cluster"))
    }

    fn trusting(ca: &TestCa) -> PeerVerifier {
        PeerVerifier::for_tests("test", &ca.der)
    }

    /// Trusts the nodes of the cluster `test`.
    pub(in super::super) fn trust() -> PeerVerifier {
        trusting(ca())
    }

    fn signer_of(cert: &TestCert) -> ClusterSigner {
        let dir = tempfile::tempdir().unwrap();
        cert.write(dir.path(), "node");
        ClusterSigner::from_files(&files(dir.path()), Arc::new(trust())).unwrap()
    }

    fn files(dir: &std::path::Path) -> PeerTlsFiles {
        PeerTlsFiles {
            ca_path: dir.join("none.crt"),
            cert_path: dir.join("node.crt"),
            key_path: dir.join("node.key"),
        }
    }

    /// The node of this name in the cluster `test`.
    pub(in super::super) fn signer(name: &str) -> ClusterSigner {
        signer_of(&ca().server(name, Some(&format!("hsm://test/{name}"))))
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
    fn a_file_that_cannot_be_used_is_named() {
        let dir = tempfile::tempdir().unwrap();
        ca().server("n", None).write(dir.path(), "node");
        let said = || {
            let refused = ClusterSigner::from_files(&files(dir.path()), Arc::new(trust()));
            refused.err().unwrap().to_string()
        };
        std::fs::write(dir.path().join("node.key"), "no key").unwrap();
        assert!(said().starts_with("cluster.tls.key_path: ") && said().contains("node.key"));
        std::fs::write(dir.path().join("node.crt"), "no certificate").unwrap();
        assert!(said().starts_with("cluster.tls.cert_path: ") && said().contains("node.crt"));
    }

    #[test]
    fn a_signature_holds_for_nothing_else() {
        let (slot, other) = (SlotName::new("a").unwrap(), SlotName::new("b").unwrap());
        let right = context(&slot);
        let key = signer("n").sign(&right, b"spki").unwrap();
        verify(&right, "n", &key, &trust()).unwrap();
        for wrong in [
            SlotKeyContext {
                cluster_id: ClusterId([2; 16]),
                ..right
            },
            SlotKeyContext { raft_id: 8, ..right },
            SlotKeyContext {
                slot: &other,
                ..right
            },
        ] {
            assert!(verify(&wrong, "n", &key, &trust()).is_err());
        }
        // A later epoch of the cluster takes nothing away; a key that claims another one was not signed.
        verify(&SlotKeyContext { epoch: 2, ..right }, "n", &key, &trust()).unwrap();
        let postdated = SlotKey {
            epoch: 2,
            ..key.clone()
        };
        assert!(verify(&right, "n", &postdated, &trust()).is_err());
        let substituted = SlotKey {
            spki: b"spkj".to_vec(),
            ..key
        };
        assert!(verify(&right, "n", &substituted, &trust()).is_err());
    }

    #[test]
    fn only_the_nodes_own_certificate_by_the_clusters_ca_vouches() {
        let slot = SlotName::new("a").unwrap();
        let context = context(&slot);
        let key = signer("n").sign(&context, b"spki").unwrap();
        let refused = |key: &SlotKey| verify(&context, "n", key, &trust()).unwrap_err().to_string();
        let by = |signer: ClusterSigner| signer.sign(&context, b"spki").unwrap();
        assert!(refused(&by(signer("m"))).contains("another node's"));
        let elsewhere = TestCa::new("elsewhere").server("n", Some("hsm://test/n"));
        assert!(refused(&by(signer_of(&elsewhere))).contains("not of this cluster"));
        let other_cluster = ca().server("n", Some("hsm://other/n"));
        assert!(refused(&by(signer_of(&other_cluster))).contains("not of this cluster"));
        let moved = SlotKey {
            signer_chain: signer("n").chain,
            ..key.clone()
        };
        assert!(
            refused(&moved).contains("signature"),
            "another key of the same node"
        );
        for chain in [vec![], vec![vec![]], vec![b"junk".to_vec()]] {
            let signer_chain = chain;
            refused(&SlotKey {
                signer_chain,
                ..key.clone()
            });
        }
    }

    #[test]
    fn a_renewed_certificate_takes_nothing_back() {
        let slot = SlotName::new("a").unwrap();
        let sans = [rcgen::SanType::URI("hsm://test/n".try_into().unwrap())];
        let ended = signer_of(&ca().issue("n", None, &sans, 2001));
        let key = ended.sign(&context(&slot), b"spki").unwrap();
        verify(&context(&slot), "n", &key, &trust()).unwrap();
    }

    #[test]
    fn an_altered_signature_is_refused() {
        let slot = SlotName::new("a").unwrap();
        let context = context(&slot);
        let key = signer("n").sign(&context, b"spki").unwrap();
        for index in [0, 1, 10, key.signature.len() - 1] {
            let mut altered = key.clone();
            altered.signature[index] ^= 1;
            assert!(verify(&context, "n", &altered, &trust()).is_err(), "byte {index}");
        }
        for length in [0, 1, 2] {
            let cut = SlotKey {
                signature: key.signature[..length].to_vec(),
                ..key.clone()
            };
            assert!(verify(&context, "n", &cut, &trust()).is_err());
        }
    }
}
