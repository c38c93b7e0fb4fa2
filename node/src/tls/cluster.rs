//! TLS between nodes: one certificate for both directions, from the cluster's own CA.

use std::path::Path;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use sha2::{Digest, Sha256};

use super::api::{CLUSTER_CA, forget_sessions};
use super::files::{CaFile, certificates, first_end, private_key, refuse_dev};
use super::peer_verifier::PeerVerifier;
use super::{TlsError, provider};
use crate::config::PeerTlsFiles;
use crate::identity::{NodeIdentity, peer_identity};

const CERT: &str = "cluster.tls.cert_path";
const KEY: &str = "cluster.tls.key_path";

/// What the cluster listener and the connections to peers need, as one immutable snapshot.
pub struct ClusterTls {
    /// For connections from peers. After the handshake the caller reads the peer's identity with
    /// [`peer_identity`] and compares it with the state.
    pub server: Arc<ServerConfig>,
    /// For connections to peers; any server name will do, the identity is checked instead.
    pub client: Arc<ClientConfig>,
    /// Verifies any node's certificate, outside a handshake.
    pub verifier: Arc<PeerVerifier>,
    /// Who this node is.
    pub identity: NodeIdentity,
    /// SHA-256 of the CA's certificate (the first in its file): what a joiner pins.
    pub ca_sha256: [u8; 32],
    /// This node's certificate.
    pub certificate: CertificateDer<'static>,
    /// Its SHA-256: information, not identity, so that a renewed one works.
    pub fingerprint: [u8; 32],
    /// When the first certificate of its chain ends, in seconds since the Unix epoch.
    pub ends: Option<i64>,
}

/// Loads the cluster's certificates; `alpn` is what both sides speak.
///
/// # Errors
/// What is unreadable or unusable, with its configuration key; a certificate of another node.
pub fn load_cluster(
    files: &PeerTlsFiles,
    cluster: &str,
    node_id: &str,
    alpn: &[&[u8]],
    dev: bool,
) -> Result<ClusterTls, TlsError> {
    let ca = CaFile::load(CLUSTER_CA, &files.ca_path, dev)?;
    let roots = Arc::new(ca.roots(&files.ca_path)?);
    let chain = certificates(CERT, &files.cert_path)?;
    let key = private_key(KEY, &files.key_path)?;
    let Some((leaf, intermediates)) = chain.split_first() else {
        return Err(TlsError::Content {
            key: CERT,
            path: files.cert_path.clone(),
            problem: "holds no certificate".to_owned(),
        });
    };
    refuse_dev(CERT, &files.cert_path, leaf, dev)?;
    let identity = own_identity(&files.cert_path, leaf, cluster, node_id)?;
    let verifier = Arc::new(PeerVerifier {
        roots: Arc::clone(&roots),
        cluster: cluster.to_owned(),
        provider: provider(),
    });
    let rejected = |reason| TlsError::Rejected {
        key: CERT,
        path: files.cert_path.clone(),
        reason,
    };
    // Found here, not by every peer at its first handshake.
    verifier
        .verify(leaf, intermediates, UnixTime::now())
        .map_err(rejected)?;

    let client_verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
        .build()
        .map_err(setup)?;
    let mut server = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(setup)?
        .with_client_cert_verifier(client_verifier)
        .with_single_cert(chain.clone(), key.clone_key())
        .map_err(|reason| TlsError::of_pair((CERT, &files.cert_path), (KEY, &files.key_path), reason))?;
    forget_sessions(&mut server);
    server.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok(ClusterTls {
        server: Arc::new(server),
        client: Arc::new(client(Arc::clone(&verifier), &chain, key, alpn)?),
        verifier,
        identity,
        ca_sha256: ca.cas.first().map(|ca| ca.sha256).unwrap_or_default(),
        fingerprint: Sha256::digest(leaf).into(),
        certificate: leaf.clone(),
        ends: first_end(&chain),
    })
}

fn setup(error: impl std::fmt::Display) -> TlsError {
    TlsError::Setup(error.to_string())
}

fn client(
    verifier: Arc<PeerVerifier>,
    chain: &[CertificateDer<'static>],
    key: PrivateKeyDer<'static>,
    alpn: &[&[u8]],
) -> Result<ClientConfig, TlsError> {
    let mut client = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(setup)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(chain.to_vec(), key)
        .map_err(setup)?;
    client.resumption = Resumption::disabled();
    client.enable_early_data = false;
    client.enable_sni = false;
    client.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok(client)
}

fn own_identity(
    path: &Path,
    leaf: &CertificateDer<'_>,
    cluster: &str,
    node_id: &str,
) -> Result<NodeIdentity, TlsError> {
    let identity = peer_identity(leaf).map_err(|reason| TlsError::Identity {
        key: CERT,
        path: path.to_owned(),
        reason,
    })?;
    if identity.cluster == cluster && identity.name == node_id {
        return Ok(identity);
    }
    Err(TlsError::OtherNode {
        path: path.to_owned(),
        found: format!("{}/{}", identity.cluster, identity.name),
        expected: format!("{cluster}/{node_id}"),
    })
}
