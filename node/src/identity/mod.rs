//! Who is calling: the identity in a client certificate, as Go's `crypto/x509` reads it, because
//! v1's ciphertexts are bound to it. A certificate is trusted here only because TLS has already
//! verified it, or its verifier has; nothing else may hand certificates in.

mod cert;
pub mod dn;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use raft_store::state::access::RevocationKey;
use serde::{Deserialize, Serialize};
use x509_parser::certificate::X509Certificate;
use x509_parser::x509::AttributeTypeAndValue;

pub use self::cert::{Authority, CaCertificate, NodeIdentity, peer_identity};
pub(crate) use self::cert::{not_after, serial};

/// A certificate that cannot be read as an identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Not a certificate at all, though TLS took it for one.
    #[error("the certificate cannot be read: {0}")]
    Unreadable(String),
    /// A name that identities are made of is in no encoding that is read here.
    #[error("the certificate's {what} is no text that can be read; issue it with a UTF8String")]
    NoText {
        /// `OU` or `CN`.
        what: &'static str,
    },
    /// The configured CA that it hangs on has ended.
    #[error("the configured CA that has issued it has ended: renew the CA's certificate in the node's files")]
    CaEnded,
    /// A cluster certificate names no node.
    #[error(
        "the certificate names no node: it needs exactly one SAN of the form \
         URI:hsm://<cluster>/<node_id>, and has [{found}]"
    )]
    NoNode {
        /// The SANs it has.
        found: String,
    },
}

/// What a certificate says about its holder. Made of public values only; travels with a
/// forwarded request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Last common name, or empty: what `mode: private` binds to.
    pub cn: String,
    /// First organizational unit: what the ACL and `mode: shared` go by.
    pub ou: Option<String>,
    /// Subject alternative names, each with its type: `DNS:…`, `URI:…`, `IP:…`, `email:…`.
    pub sans: Vec<String>,
    /// Serial number, lower-case hex without leading zeros.
    pub serial: String,
    /// Issuer's name in the form of [`dn::render`].
    pub issuer_dn: String,
    /// SHA-256 of the certificate.
    pub fingerprint: [u8; 32],
    /// SHA-256 of its SubjectPublicKeyInfo: the key, whatever certificate it is in.
    pub spki_sha256: [u8; 32],
    /// When it ends, in seconds since the Unix epoch.
    pub not_after: i64,
}

/// The caller of a request. Cheap to clone; an extension of every request.
#[derive(Clone, PartialEq, Eq)]
pub struct Principal(Arc<Caller>);

#[derive(PartialEq, Eq)]
struct Caller {
    identity: Identity,
    /// The certificates above the caller's own.
    authorities: Vec<Authority>,
    /// Made once: every request is compared with what is revoked.
    revoked_by: Vec<RevocationKey>,
    ends: i64,
}

impl Principal {
    /// The holder of an identity that was verified elsewhere (a forwarded request's origin).
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        Self::below(identity, Vec::new())
    }

    /// The holder of an identity whose certificate hangs on these CAs.
    #[must_use]
    pub fn below(identity: Identity, authorities: Vec<Authority>) -> Self {
        let ends = identity.not_after;
        Self::until(identity, authorities, ends)
    }

    /// The same, of which something may end earlier than its own certificate: in seconds since the Unix epoch.
    #[must_use]
    pub fn until(identity: Identity, authorities: Vec<Authority>, ends: i64) -> Self {
        let named = |fingerprint: [u8; 32], issuer: &str, serial: &str| {
            let (issuer, serial) = (issuer.to_owned(), serial.to_owned());
            [
                RevocationKey::Fingerprint(fingerprint),
                RevocationKey::Serial { issuer, serial },
            ]
        };
        let mut revoked_by = vec![RevocationKey::CommonName(identity.cn.clone())];
        revoked_by.extend(named(identity.fingerprint, &identity.issuer_dn, &identity.serial));
        for ca in &authorities {
            revoked_by.extend(named(ca.fingerprint, &ca.issuer_dn, &ca.serial));
        }
        Self(Arc::new(Caller {
            identity,
            authorities,
            revoked_by,
            ends,
        }))
    }

    /// The CAs whose certificates its own hangs on, each of which may be revoked.
    #[must_use]
    pub fn authorities(&self) -> &[Authority] {
        &self.0.authorities
    }

    /// When the first of the certificates that it goes by ends, in seconds since the Unix epoch.
    #[must_use]
    pub fn ends(&self) -> i64 {
        self.0.ends
    }

    /// Every revocation that would be of its certificate, or of one of those CAs. A common name is a caller's: CAs are
    /// named by serial number and issuer, or by fingerprint.
    #[must_use]
    pub fn revoked_by(&self) -> &[RevocationKey] {
        &self.0.revoked_by
    }

    /// Reads a client certificate that TLS has verified.
    ///
    /// # Errors
    /// When it is not a certificate, or an OU or CN cannot be read. One without OU or CN is an identity all
    /// the same: what it may do is decided elsewhere.
    pub fn from_der(der: &[u8]) -> Result<Self, IdentityError> {
        cert::identity(der).map(Self::new)
    }

    /// Whose limits and budgets it is: a name of an issuer (issuer, OU, CN), whatever certificate carries it,
    /// so that a renewed certificate is no second allowance.
    #[must_use]
    pub fn account(&self) -> (&str, Option<&str>, &str) {
        (self.issuer_dn.as_str(), self.ou.as_deref(), self.cn.as_str())
    }

    /// SHA-256 of the certificate, lower-case hex, for logs.
    #[must_use]
    pub fn fingerprint_hex(&self) -> String {
        hex::encode(self.fingerprint)
    }
}

impl Deref for Principal {
    type Target = Identity;

    fn deref(&self) -> &Identity {
        &self.0.identity
    }
}

impl fmt::Debug for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0.identity, f)
    }
}

/// For logs: common name, unit and serial.
impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ou = self.ou.as_deref().unwrap_or("-");
        write!(f, "CN={} OU={ou} serial={}", self.cn, self.serial)
    }
}

/// The text of an attribute in any of the string types Go accepts; `None` for anything else.
pub(crate) fn string_value(part: &AttributeTypeAndValue<'_>) -> Option<String> {
    use x509_parser::asn1_rs::Tag;
    let bytes = part.as_slice();
    match part.attr_value().tag() {
        Tag::Utf8String => std::str::from_utf8(bytes).ok().map(str::to_owned),
        Tag::PrintableString | Tag::NumericString | Tag::Ia5String => bytes
            .is_ascii()
            .then(|| String::from_utf8_lossy(bytes).into_owned()),
        // Latin-1, as everybody reads it.
        Tag::TeletexString => Some(bytes.iter().map(|byte| char::from(*byte)).collect()),
        Tag::BmpString => {
            let units: Vec<u16> = bytes
                .chunks_exact(2)
                .map(|pair| u16::from_be_bytes([pair[0], pair[1]]))
                .collect();
            bytes
                .len()
                .is_multiple_of(2)
                .then(|| String::from_utf16(&units).ok())
                .flatten()
        }
        _ => None,
    }
}

/// First OU and last CN of a subject, as Go's `pkix.Name` has them. One that cannot be read is refused, as Go
/// refuses it: passed over, it would make the second OU the first.
pub(crate) fn first_ou_last_cn(
    certificate: &X509Certificate<'_>,
) -> Result<(Option<String>, String), IdentityError> {
    let (mut ou, mut cn) = (None, String::new());
    for part in certificate.subject().iter_attributes() {
        let read = |what| string_value(part).ok_or(IdentityError::NoText { what });
        match part.attr_type().as_bytes() {
            [0x55, 4, 11] => {
                let value = read("OU")?;
                ou.get_or_insert(value);
            }
            [0x55, 4, 3] => cn = read("CN")?,
            _ => {}
        }
    }
    Ok((ou, cn))
}

#[cfg(test)]
pub(crate) mod test_certs;

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests;
