//! TLS of both listeners: TLS 1.3 only, certificates on both sides, every handshake a full one.
//! A resumed session would skip the certificate checks, so nothing here may ever resume one.

mod api;
mod cluster;
mod crl;
mod files;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod peer_verifier;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;

pub use self::api::{ApiTls, ClientIssuers, VouchedError, load_api};
pub use self::cluster::{ClusterTls, load_cluster};
pub use self::crl::{Crl, CrlError};
pub use self::peer_verifier::PeerVerifier;
use crate::identity::IdentityError;

/// Why certificates cannot be used. Each message names the configuration key.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{key}: {path}: {reason}; give a readable PEM file")]
    Unreadable {
        /// The configuration key.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        reason: std::io::Error,
    },
    /// A file holds nothing usable.
    #[error("{key}: {path}: {problem}")]
    Content {
        /// The configuration key.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A playground's certificates without `dev: true`.
    #[error(
        "{key}: {path}: {subject} is marked DEV, and whoever made it may hold its key; use \
         certificates of your own CA, or set dev: true"
    )]
    DevCertificate {
        /// The configuration key.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// The CA.
        subject: String,
    },
    /// Clients and nodes have one CA, so that a client could pretend to be a node.
    #[error(
        "{first} and {second} name the same CA ({subject}): a client's certificate would open \
         the cluster listener; give the cluster a CA of its own"
    )]
    SharedCa {
        /// The one key.
        first: &'static str,
        /// The other key.
        second: &'static str,
        /// The CA.
        subject: String,
    },
    /// Two CAs with one name: roles are bound to names.
    #[error(
        "{first} and {second} name different CAs of one name ({subject}): roles are bound to the \
         issuer's name and could not tell them apart; rename one of them"
    )]
    SameName {
        /// The one key.
        first: &'static str,
        /// The other key.
        second: &'static str,
        /// The name.
        subject: String,
    },
    /// The key is another certificate's.
    #[error(
        "{key}: {path}: is not the key of the certificate in {certificate_key} ({certificate}); give the key that the \
         certificate was issued for"
    )]
    OtherKey {
        /// The configuration key of the private key.
        key: &'static str,
        /// Its file.
        path: PathBuf,
        /// The configuration key of the certificate.
        certificate_key: &'static str,
        /// Its file.
        certificate: PathBuf,
    },
    /// rustls does not like them.
    #[error("{key}: {path}: {reason}")]
    Rejected {
        /// The configuration key.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        reason: rustls::Error,
    },
    /// The node's certificate is another node's.
    #[error(
        "cluster.tls.cert_path: {path}: belongs to hsm://{found}, but cluster.name and \
         cluster.node_id make this node hsm://{expected}; use the certificate of this node"
    )]
    OtherNode {
        /// The file.
        path: PathBuf,
        /// Cluster and node in the certificate.
        found: String,
        /// Cluster and node of the configuration.
        expected: String,
    },
    /// A certificate that cannot be read as an identity.
    #[error("{key}: {path}: {reason}")]
    Identity {
        /// The configuration key.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        reason: IdentityError,
    },
    /// The TLS library refused its own defaults.
    #[error("TLS could not be set up: {0}")]
    Setup(String),
}

impl TlsError {
    /// What rustls has against a certificate and its key, each with its configuration key.
    fn of_pair(
        certificate: (&'static str, &Path),
        key: (&'static str, &Path),
        reason: rustls::Error,
    ) -> Self {
        let (certificate_key, path) = certificate;
        match reason {
            rustls::Error::InconsistentKeys(_) => Self::OtherKey {
                key: key.0,
                path: key.1.to_owned(),
                certificate_key,
                certificate: path.to_owned(),
            },
            reason => Self::Rejected {
                key: certificate_key,
                path: path.to_owned(),
                reason,
            },
        }
    }
}

/// The one cryptographic provider, always passed explicitly.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests;
