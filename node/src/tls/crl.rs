//! Certificate revocation lists (RFC 5280 section 5) of the CAs that clients' certificates are accepted from. What is
//! read is only ever added to the revocations, so an old list does no harm; one that would be misread is refused whole.

use rustls::sign::public_key_to_spki;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::FromDer;
use x509_parser::revocation_list::{CertificateRevocationList, RevokedCertificate};

use super::provider;
use crate::identity::{dn, serial};

/// A list whose signature holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Crl {
    /// The CA, in the form in which identities have it.
    pub issuer: String,
    /// Serial numbers of its certificates that are revoked, in the form in which identities have them.
    pub serials: Vec<String>,
    /// When the CA wanted to publish the next one, in seconds since the Unix epoch.
    pub next_update: Option<i64>,
}

/// Why a list is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CrlError {
    /// Not a list at all.
    #[error("is no certificate revocation list: {0}; give DER, or PEM (BEGIN X509 CRL)")]
    Unreadable(String),
    /// Of a CA that this node accepts nobody from.
    #[error(
        "the list is of {issuer}, which is no CA of this node: known are {known}; the certificate of an intermediate \
         CA has to stand in server.tls.ca_path for its lists to be checked"
    )]
    UnknownIssuer {
        /// Who signed it, as it says.
        issuer: String,
        /// Whose would be taken.
        known: String,
    },
    /// Altered, or signed by somebody else.
    #[error(
        "the signature of the list of {issuer} does not hold: it was altered, or another CA of that name made it"
    )]
    Signature {
        /// Who signed it, as it says.
        issuer: String,
    },
    /// Signed by a CA whose certificate does not allow it.
    #[error("the certificate of {issuer} does not allow it to sign lists (key usage cRLSign)")]
    Usage {
        /// The CA.
        issuer: String,
    },
    /// Something that changes what its entries mean.
    #[error(
        "the list of {issuer} holds an extension that is not understood ({oid}) and changes what its entries mean; \
         give a complete list of the CA's own certificates"
    )]
    Extension {
        /// The CA.
        issuer: String,
        /// The extension.
        oid: String,
    },
}

/// 2.5.29.29: the entry is about a certificate of another issuer.
const CERTIFICATE_ISSUER: &[u8] = &[0x55, 0x1d, 0x1d];
/// removeFromCRL, in lists that only say what has changed.
const REMOVED: u8 = 8;

/// Reads a file with one list (DER) or several (PEM), all signed by one of `cas`.
///
/// # Errors
/// The first list that is not taken; then none is.
pub(super) fn read(file: &[u8], cas: &[CertificateDer<'static>]) -> Result<Vec<Crl>, CrlError> {
    let cas: Vec<X509Certificate<'_>> = cas
        .iter()
        .filter_map(|der| X509Certificate::from_der(der).ok())
        .map(|(_, ca)| ca)
        .collect();
    // A sequence with a length of several bytes: no text begins so.
    if matches!(file, [0x30, 0x80..=0x84, ..]) {
        return Ok(vec![one(file, &cas)?]);
    }
    let ders = CertificateRevocationListDer::pem_slice_iter(file)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| CrlError::Unreadable(error.to_string()))?;
    if ders.is_empty() {
        return Err(CrlError::Unreadable("the file holds none".to_owned()));
    }
    ders.iter().map(|der| one(der, &cas)).collect()
}

fn one(der: &[u8], cas: &[X509Certificate<'_>]) -> Result<Crl, CrlError> {
    let list = match CertificateRevocationList::from_der(der) {
        Ok(([], list)) => list,
        Ok(_) => return Err(CrlError::Unreadable("bytes follow the list".to_owned())),
        Err(error) => return Err(CrlError::Unreadable(error.to_string())),
    };
    let issuer = dn::render(list.issuer());
    let signer = signer(&list, &issuer, cas)?;
    // RFC 5280 section 4.2.1.3: a CA that says what its key is for has to say that it is for this.
    let usage = signer.key_usage();
    if !matches!(&usage, Ok(None)) && !matches!(&usage, Ok(Some(usage)) if usage.value.crl_sign()) {
        return Err(CrlError::Usage { issuer });
    }
    check_list(&list, &issuer)?;
    let mut serials = Vec::new();
    for entry in list.iter_revoked_certificates() {
        check_entry(entry, &issuer)?;
        if entry.reason_code().is_none_or(|(_, reason)| reason.0 != REMOVED) {
            serials.push(serial(entry.raw_serial()));
        }
    }
    Ok(Crl {
        issuer,
        serials,
        next_update: list.next_update().map(|at| at.timestamp()),
    })
}

/// The CA whose key has signed the list; several may bear its name.
fn signer<'a, 'c>(
    list: &CertificateRevocationList<'_>,
    issuer: &str,
    cas: &'a [X509Certificate<'c>],
) -> Result<&'a X509Certificate<'c>, CrlError> {
    let mut named = cas
        .iter()
        .filter(|ca| dn::render(ca.subject()) == issuer)
        .peekable();
    if named.peek().is_none() {
        let mut known: Vec<String> = cas.iter().map(|ca| dn::render(ca.subject())).collect();
        known.sort();
        known.dedup();
        return Err(CrlError::UnknownIssuer {
            issuer: issuer.to_owned(),
            known: known.join("; "),
        });
    }
    named
        .find(|ca| holds(list, ca))
        .ok_or_else(|| CrlError::Signature {
            issuer: issuer.to_owned(),
        })
}

fn holds(list: &CertificateRevocationList<'_>, ca: &X509Certificate<'_>) -> bool {
    // What is signed says by which algorithm, and so does what is around it (RFC 5280 section 5.1.1.2).
    if list.tbs_cert_list.signature != list.signature_algorithm || list.signature_value.unused_bits != 0 {
        return false;
    }
    let oid = list.signature_algorithm.algorithm.as_bytes();
    let spki = ca.public_key();
    let key: &[u8] = &spki.subject_public_key.data;
    let signature: &[u8] = &list.signature_value.data;
    provider()
        .signature_verification_algorithms
        .all
        .iter()
        .filter(|algorithm| begins_with(&algorithm.signature_alg_id(), oid))
        // The algorithm has to be the key's own.
        .filter(|algorithm| public_key_to_spki(&algorithm.public_key_alg_id(), key).as_ref() == spki.raw)
        .any(|algorithm| {
            algorithm
                .verify_signature(key, list.tbs_cert_list.as_ref(), signature)
                .is_ok()
        })
}

/// Whether a DER `AlgorithmIdentifier`, without its outer sequence, is of this object identifier. Its parameters are
/// left to who verifies.
fn begins_with(algorithm: &[u8], oid: &[u8]) -> bool {
    match algorithm.split_first_chunk::<2>() {
        Some(([6, length], rest)) => usize::from(*length) == oid.len() && rest.starts_with(oid),
        _ => false,
    }
}

/// RFC 5280 section 5.2: nothing critical may be passed over. That a list is of some certificates of the CA only, or of
/// some reasons, takes nothing away from those that are in it.
fn check_list(list: &CertificateRevocationList<'_>, issuer: &str) -> Result<(), CrlError> {
    for extension in list.extensions() {
        let understood = match extension.parsed_extension() {
            ParsedExtension::IssuingDistributionPoint(point) => !point.indirect_crl,
            _ => !extension.critical,
        };
        if !understood {
            return Err(CrlError::Extension {
                issuer: issuer.to_owned(),
                oid: extension.oid.to_id_string(),
            });
        }
    }
    Ok(())
}

/// RFC 5280 section 5.3, likewise.
fn check_entry(entry: &RevokedCertificate<'_>, issuer: &str) -> Result<(), CrlError> {
    let foreign = entry
        .extensions()
        .iter()
        .find(|extension| extension.critical || extension.oid.as_bytes() == CERTIFICATE_ISSUER);
    match foreign {
        None => Ok(()),
        Some(extension) => Err(CrlError::Extension {
            issuer: issuer.to_owned(),
            oid: extension.oid.to_id_string(),
        }),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::identity::Principal;
    use crate::identity::test_certs::TestCa;

    fn cas(cas: &[&TestCa]) -> Vec<CertificateDer<'static>> {
        let der = |ca: &&TestCa| CertificateDer::from(ca.der.clone());
        cas.iter().map(der).collect()
    }

    #[test]
    fn a_list_names_certificates_as_identities_do() {
        let ca = TestCa::new("Clients");
        let gone = Principal::from_der(&ca.client("gone", "Trading").der).unwrap();
        let (der, pem) = ca.crl(&[&gone.serial, "00ab"]);
        let expected = Crl {
            issuer: gone.issuer_dn.clone(),
            serials: vec![gone.serial.clone(), "ab".to_owned()],
            next_update: Some(1_735_689_600),
        };
        assert_eq!(read(&der, &cas(&[&ca])), Ok(vec![expected.clone()]));
        let twice = format!("Made by hand\n{pem}{pem}");
        assert_eq!(
            read(twice.as_bytes(), &cas(&[&ca])),
            Ok(vec![expected.clone(), expected])
        );
    }

    #[test]
    fn an_empty_list_revokes_nothing() {
        let ca = TestCa::new("Clients");
        let (der, _) = ca.crl(&[]);
        assert!(read(&der, &cas(&[&ca])).unwrap()[0].serials.is_empty());
    }

    #[test]
    fn a_list_of_another_ca_is_refused_whatever_its_name() {
        let (ca, same_name, other) = (
            TestCa::new("Clients"),
            TestCa::new("Clients"),
            TestCa::new("Others"),
        );
        let (der, _) = same_name.crl(&["ab"]);
        let issuer = "CN=Clients".to_owned();
        assert_eq!(
            read(&der, &cas(&[&ca, &other])),
            Err(CrlError::Signature { issuer })
        );
        let (der, _) = other.crl(&["ab"]);
        let error = read(&der, &cas(&[&ca])).unwrap_err();
        assert!(matches!(error, CrlError::UnknownIssuer { .. }), "{error}");
        assert!(error.to_string().contains("known are CN=Clients"), "{error}");
        // Two keys of one name, as while a CA's key is renewed.
        let (der, _) = same_name.crl(&["ab"]);
        assert!(read(&der, &cas(&[&ca, &same_name])).is_ok());
    }

    #[test]
    fn an_altered_byte_is_found_or_changes_nothing() {
        let ca = TestCa::new("Clients");
        let (der, _) = ca.crl(&["abcdef"]);
        let whole = read(&der, &cas(&[&ca])).unwrap();
        for at in 0..der.len() {
            let mut altered = der.clone();
            altered[at] ^= 1;
            // A form around what is signed may be read in two ways; the list stays the same.
            let found = read(&altered, &cas(&[&ca]));
            assert!(
                found.is_err() || found.as_ref() == Ok(&whole),
                "byte {at}: {found:?}"
            );
        }
        assert!(read(&der[..der.len() - 1], &cas(&[&ca])).is_err());
        assert!(read(&[&der[..], &[0]].concat(), &cas(&[&ca])).is_err());
    }

    #[test]
    fn a_good_list_beside_a_bad_one_is_not_taken() {
        let (ca, other) = (TestCa::new("Clients"), TestCa::new("Others"));
        let both = format!("{}{}", ca.crl(&["ab"]).1, other.crl(&["cd"]).1);
        assert!(read(both.as_bytes(), &cas(&[&ca])).is_err());
    }

    #[test]
    fn what_is_no_list_says_so() {
        let ca = TestCa::new("Clients");
        for file in [
            &b""[..],
            b"x",
            &[0x30, 0x82, 0xff, 0xff],
            ca.pem.as_bytes(),
            &ca.der,
        ] {
            let error = read(file, &cas(&[&ca])).unwrap_err();
            assert!(matches!(error, CrlError::Unreadable(_)), "{error}");
        }
    }

    #[test]
    fn a_ca_that_may_not_sign_lists_has_none() {
        let ca = TestCa::without_crl_sign("Clients");
        let (der, _) = ca.crl(&["ab"]);
        let issuer = "CN=Clients".to_owned();
        assert_eq!(read(&der, &cas(&[&ca])), Err(CrlError::Usage { issuer }));
    }

    #[test]
    fn only_the_algorithm_of_the_same_number_is_tried() {
        let algorithm = [6, 2, 0x2a, 3, 5, 0];
        assert!(begins_with(&algorithm, &[0x2a, 3]));
        for oid in [&[0x2a][..], &[0x2a, 3, 5], &[0x2a, 4], &[]] {
            assert!(!begins_with(&algorithm, oid), "{oid:?}");
        }
        assert!(!begins_with(&[], &[]));
    }
}
