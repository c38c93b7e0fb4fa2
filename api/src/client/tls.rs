//! TLS of the client: 1.3 only, aws-lc-rs passed explicitly, no resumption, so that every
//! connection proves the client's certificate anew.

use std::sync::Arc;

use rustls::client::Resumption;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use super::error::BuildError;

const CA: &str = "CA certificates";
const CERT: &str = "client certificate";
const KEY: &str = "client key";

/// A client certificate with its chain, and its key.
pub(super) struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    pub(super) fn from_pem(cert: &[u8], key: &[u8]) -> Result<Self, BuildError> {
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| BuildError::Pem {
            what: KEY,
            reason: error.to_string(),
        })?;
        Ok(Self {
            chain: certificates(CERT, cert)?,
            key,
        })
    }
}

fn certificates(what: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, BuildError> {
    let list = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| BuildError::Pem {
            what,
            reason: error.to_string(),
        })?;
    if list.is_empty() {
        return Err(BuildError::Pem {
            what,
            reason: "no CERTIFICATE section in the PEM".to_owned(),
        });
    }
    Ok(list)
}

/// Without an identity the node refuses the connection: that is for tests of just this.
pub(super) fn config(ca_pem: &[u8], identity: Option<Identity>) -> Result<ClientConfig, BuildError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(CA, ca_pem)? {
        roots.add(certificate)?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots);
    let mut config = match identity {
        Some(Identity { chain, key }) => builder.with_client_auth_cert(chain, key)?,
        None => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled();
    Ok(config)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn issue() -> (String, String) {
        let issued = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        (issued.cert.pem(), issued.signing_key.serialize_pem())
    }

    #[test]
    fn an_identity_makes_a_configuration_without_resumption() {
        let (cert, key) = issue();
        let identity = Identity::from_pem(cert.as_bytes(), key.as_bytes()).unwrap();
        let config = config(cert.as_bytes(), Some(identity)).unwrap();
        assert!(config.client_auth_cert_resolver.has_certs());
        assert!(config.alpn_protocols.is_empty() && !config.enable_early_data);
    }

    #[test]
    fn a_wrong_file_is_named() {
        let (cert, key) = issue();
        let (_, other_key) = issue();
        assert!(
            config(b"nothing", None)
                .unwrap_err()
                .to_string()
                .starts_with("CA certificates: no CERT")
        );
        let error = Identity::from_pem(cert.as_bytes(), cert.as_bytes())
            .err()
            .unwrap();
        assert!(error.to_string().starts_with("client key: "), "{error}");
        let error = Identity::from_pem(key.as_bytes(), key.as_bytes()).err().unwrap();
        assert!(error.to_string().starts_with("client certificate: "), "{error}");
        let mixed = Identity::from_pem(cert.as_bytes(), other_key.as_bytes()).unwrap();
        assert!(matches!(
            config(cert.as_bytes(), Some(mixed)),
            Err(BuildError::Tls(_))
        ));
    }
}
