//! TLS between nodes: mutual, TLS 1.3, one CA of its own, no resumption. A node is known by the SAN
//! `URI:hsm://<cluster>/<name>` of its certificate; names of hosts play no part.

use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// What the cluster's TLS needs.
#[derive(Clone)]
pub struct ClusterTls {
    /// For connections to peers.
    pub client: Arc<ClientConfig>,
    /// For connections from peers.
    pub server: Arc<ServerConfig>,
    /// SHA-256 of the CA certificate, which join tokens are bound to.
    pub ca_sha256: [u8; 32],
    /// Name of the cluster in certificates.
    pub cluster_name: String,
}

/// Why the cluster's certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ClusterTlsError {
    /// A file cannot be read or holds no PEM.
    #[error("{key}: {path}: {why}")]
    File {
        /// The configuration key.
        key: &'static str,
        /// The file.
        path: String,
        /// What is wrong.
        why: String,
    },
    /// The certificate names another node.
    #[error(
        "cluster.tls.cert_path: the certificate's SAN URI is {found:?}; this node needs {expected:?}: issue it \
         a certificate with that SAN, or correct cluster.name and cluster.node_id"
    )]
    WrongName {
        /// What it needs.
        expected: String,
        /// What it has.
        found: Option<String>,
    },
    /// rustls refuses.
    #[error("cluster.tls: {0}")]
    Rustls(#[from] rustls::Error),
    /// The CA cannot be used to verify peers.
    #[error("cluster.tls.ca_path: {0}")]
    Ca(String),
}

impl ClusterTls {
    /// Loads certificates and checks that they name this node.
    pub fn load(
        ca: &Path,
        cert: &Path,
        key: &Path,
        cluster: &str,
        node: &str,
    ) -> Result<Self, ClusterTlsError> {
        let cas = certificates("cluster.tls.ca_path", ca)?;
        let chain = certificates("cluster.tls.cert_path", cert)?;
        let key = PrivateKeyDer::from_pem_file(key).map_err(|e| file("cluster.tls.key_path", key, &e))?;
        let expected = san(cluster, node);
        let found = chain.first().and_then(|cert| san_uri(cert));
        if found.as_ref() != Some(&expected) {
            return Err(ClusterTlsError::WrongName { expected, found });
        }
        let ca_sha256 = cas
            .first()
            .map(|ca| Sha256::digest(ca).into())
            .unwrap_or_default();
        let mut roots = RootCertStore::empty();
        for ca in cas {
            roots.add(ca)?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .map_err(|e| ClusterTlsError::Ca(e.to_string()))?;
        let versions = &[&rustls::version::TLS13];
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)?
            .with_client_cert_verifier(Arc::clone(&verifier))
            .with_single_cert(chain.clone(), key.clone_key())?;
        // A resumed session skips certificate checks.
        server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(PeerVerifier(verifier)))
            .with_client_auth_cert(chain, key)?;
        client.resumption = rustls::client::Resumption::disabled();
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
            ca_sha256,
            cluster_name: cluster.to_string(),
        })
    }

    /// The node name in a verified peer certificate, if it is of this cluster.
    pub(super) fn peer_name(&self, certificate: &CertificateDer<'_>) -> Option<String> {
        let uri = san_uri(certificate)?;
        let (cluster, name) = uri.strip_prefix("hsm://")?.split_once('/')?;
        (cluster == self.cluster_name && !name.is_empty()).then(|| name.to_string())
    }
}

/// The SAN a node of this name needs.
fn san(cluster: &str, node: &str) -> String {
    format!("hsm://{cluster}/{node}")
}

fn file(key: &'static str, path: &Path, why: &dyn std::fmt::Display) -> ClusterTlsError {
    ClusterTlsError::File {
        key,
        path: path.display().to_string(),
        why: why.to_string(),
    }
}

fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, ClusterTlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    match found {
        Ok(found) if found.is_empty() => Err(file(key, path, &"it holds no certificate in PEM")),
        Ok(found) => Ok(found),
        Err(error) => Err(file(key, path, &error)),
    }
}

/// The one SAN URI of a certificate; `None` if there is none or more than one.
fn san_uri(certificate: &[u8]) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    let mut uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some((*uri).to_string()),
        _ => None,
    });
    let first = uris.next()?;
    uris.next().is_none().then_some(first)
}

/// Verifies a listening peer as it would verify a connecting one: chain, dates and key usage, but no
/// host name. Who it is, is read from its SAN and checked in the handshake above TLS.
#[derive(Debug)]
struct PeerVerifier(Arc<dyn ClientCertVerifier>);

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.0.verify_client_cert(end_entity, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
