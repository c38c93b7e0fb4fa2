//! Reading certificates: a client's, a CA's, a node's. Reads only; verifying is TLS's business.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use super::{Identity, IdentityError, dn, first_ou_last_cn, string_value};

/// What matters of a CA certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaCertificate {
    /// Subject in the form of [`dn::render`]; what role bindings are bound to.
    pub subject_dn: String,
    /// SHA-256 of the certificate.
    pub sha256: [u8; 32],
    /// SHA-256 of its key.
    pub spki_sha256: [u8; 32],
    /// Subject or issuer says DEV: made by a playground, not for production.
    pub dev: bool,
}

/// Who a node is: the SAN `URI:hsm://<cluster>/<name>` of its cluster certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeIdentity {
    /// `cluster.name`.
    pub cluster: String,
    /// `cluster.node_id`.
    pub name: String,
}

fn parse(der: &[u8]) -> Result<X509Certificate<'_>, IdentityError> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(IdentityError::Unreadable(
            "bytes follow the certificate".to_owned(),
        )),
        Err(error) => Err(IdentityError::Unreadable(error.to_string())),
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

pub(super) fn identity(der: &[u8]) -> Result<Identity, IdentityError> {
    let certificate = parse(der)?;
    let (ou, cn) = first_ou_last_cn(&certificate)?;
    Ok(Identity {
        cn,
        ou,
        sans: sans(&certificate),
        serial: serial(certificate.raw_serial()),
        issuer_dn: dn::render(certificate.issuer()),
        fingerprint: sha256(der),
        spki_sha256: sha256(certificate.public_key().raw),
        not_after: certificate.validity().not_after.timestamp(),
    })
}

impl CaCertificate {
    /// Reads a CA's certificate.
    ///
    /// # Errors
    /// When it is not a certificate.
    pub fn from_der(der: &[u8]) -> Result<Self, IdentityError> {
        let certificate = parse(der)?;
        let marked = |name: &x509_parser::x509::X509Name<'_>| {
            name.iter_attributes().any(|part| {
                matches!(part.attr_type().as_bytes(), [0x55, 4, 3 | 10])
                    && string_value(part).is_some_and(|text| says_dev(&text))
            })
        };
        Ok(Self {
            subject_dn: dn::render(certificate.subject()),
            sha256: sha256(der),
            spki_sha256: sha256(certificate.public_key().raw),
            dev: marked(certificate.subject()) || marked(certificate.issuer()),
        })
    }
}

/// A CA's certificate in the chain that a caller's hangs on: what a revocation names of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authority {
    /// Serial number, lower-case hex without leading zeros.
    pub serial: String,
    /// Its issuer's name in the form of [`dn::render`].
    pub issuer_dn: String,
    /// SHA-256 of the certificate.
    pub fingerprint: [u8; 32],
}

impl Authority {
    /// Reads a certificate of a chain that was verified.
    ///
    /// # Errors
    /// When it is not a certificate.
    pub fn from_der(der: &[u8]) -> Result<Self, IdentityError> {
        let certificate = parse(der)?;
        Ok(Self {
            serial: serial(certificate.raw_serial()),
            issuer_dn: dn::render(certificate.issuer()),
            fingerprint: sha256(der),
        })
    }
}

/// `DEV` as a word: `hsm-service DEV`, `DEV CA`; not `DEVICE` or `MEDEVAC`.
fn says_dev(text: &str) -> bool {
    text.split(|c: char| !c.is_alphanumeric())
        .any(|word| word == "DEV")
}

/// Reads the node a cluster certificate belongs to.
///
/// # Errors
/// When it is not a certificate, or names no node or more than one.
pub fn peer_identity(der: &[u8]) -> Result<NodeIdentity, IdentityError> {
    let certificate = parse(der)?;
    let sans = sans(&certificate);
    let mut nodes = sans.iter().filter_map(|san| {
        let (cluster, name) = san.strip_prefix("URI:hsm://")?.split_once('/')?;
        let plain = |text: &str| raft_store::names::NodeName::new(text).is_ok();
        (plain(cluster) && plain(name)).then(|| NodeIdentity {
            cluster: cluster.to_owned(),
            name: name.to_owned(),
        })
    });
    match (nodes.next(), nodes.next()) {
        (Some(node), None) => Ok(node),
        _ => Err(IdentityError::NoNode {
            found: sans.join(", "),
        }),
    }
}

fn sans(certificate: &X509Certificate<'_>) -> Vec<String> {
    let Ok(Some(extension)) = certificate.subject_alternative_name() else {
        return Vec::new();
    };
    extension
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::DNSName(text) => Some(format!("DNS:{text}")),
            GeneralName::URI(text) => Some(format!("URI:{text}")),
            GeneralName::RFC822Name(text) => Some(format!("email:{text}")),
            GeneralName::IPAddress(bytes) => ip(bytes).map(|ip| format!("IP:{ip}")),
            _ => None,
        })
        .collect()
}

fn ip(bytes: &[u8]) -> Option<std::net::IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(Into::into),
        16 => <[u8; 16]>::try_from(bytes).ok().map(Into::into),
        _ => None,
    }
}

/// When a certificate ends, in seconds since the Unix epoch.
pub(crate) fn not_after(der: &[u8]) -> Result<i64, IdentityError> {
    Ok(parse(der)?.validity().not_after.timestamp())
}

/// Lower-case hex without leading zeros: how revocations name it.
pub(crate) fn serial(raw: &[u8]) -> String {
    let digits = hex::encode(raw);
    let trimmed = digits.trim_start_matches('0');
    if trimmed.is_empty() {
        "0".to_owned()
    } else {
        trimmed.to_owned()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn dev_is_a_word_of_its_own() {
        for text in ["DEV", "hsm-service DEV", "DEV CA", "x/DEV"] {
            assert!(says_dev(text), "{text}");
        }
        for text in ["DEVICE CA", "dev", "MEDEV", ""] {
            assert!(!says_dev(text), "{text}");
        }
    }

    #[test]
    fn a_serial_has_no_leading_zeros() {
        assert_eq!(serial(&[0, 0x0a, 0xbc]), "abc");
        assert_eq!(serial(&[0]), "0");
    }
}
