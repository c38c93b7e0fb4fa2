//! Certificates and keys from PEM files, with errors that name the configuration key, and the
//! checks that hold for both listeners' CAs.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustls::RootCertStore;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use zeroize::Zeroizing;

use super::TlsError;
use crate::identity::{self, CaCertificate};

/// A CA file and what is in it.
pub(super) struct CaFile {
    pub(super) key: &'static str,
    pub(super) ders: Vec<CertificateDer<'static>>,
    pub(super) cas: Vec<CaCertificate>,
}

fn read(key: &'static str, path: &Path) -> Result<Zeroizing<Vec<u8>>, TlsError> {
    std::fs::read(path)
        .map(Zeroizing::new)
        .map_err(|reason| TlsError::Unreadable {
            key,
            path: path.to_owned(),
            reason,
        })
}

fn content(key: &'static str, path: &Path, problem: impl ToString) -> TlsError {
    TlsError::Content {
        key,
        path: path.to_owned(),
        problem: problem.to_string(),
    }
}

/// All certificates of a file; at least one.
pub(super) fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = read(key, path)?;
    let ders = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| content(key, path, format!("is not PEM: {error}; give a PEM file")))?;
    if ders.is_empty() {
        return Err(content(
            key,
            path,
            "holds no certificate (BEGIN CERTIFICATE); give a PEM file with one",
        ));
    }
    Ok(ders)
}

/// When the first certificate of a chain ends, in seconds since the Unix epoch.
pub(super) fn first_end(chain: &[CertificateDer<'_>]) -> Option<i64> {
    chain.iter().filter_map(|der| identity::not_after(der).ok()).min()
}

/// The private key of a file. One that others can read is used, with a warning: v1 did not ask
/// for more, and some platforms mount secrets so.
pub(super) fn private_key(key: &'static str, path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let pem = read(key, path)?;
    if let Ok(metadata) = std::fs::metadata(path)
        && metadata.mode() & 0o007 != 0
    {
        tracing::warn!(
            key,
            path = %path.display(),
            mode = format!("{:04o}", metadata.mode() & 0o7777),
            "everybody on this machine can read this private key; chmod 600 it"
        );
    }
    PrivateKeyDer::from_pem_slice(&pem).map_err(|_| {
        content(
            key,
            path,
            "holds no unencrypted private key (PKCS#8, SEC1 or PKCS#1); give a PEM file with one",
        )
    })
}

impl CaFile {
    pub(super) fn load(key: &'static str, path: &Path, dev: bool) -> Result<Self, TlsError> {
        let ders = certificates(key, path)?;
        let mut cas = Vec::with_capacity(ders.len());
        for der in &ders {
            cas.push(not_of_a_playground(key, path, der, dev)?);
        }
        Ok(Self { key, ders, cas })
    }

    /// Its certificates as trust anchors.
    pub(super) fn roots(&self, path: &Path) -> Result<RootCertStore, TlsError> {
        let mut roots = RootCertStore::empty();
        self.add_to(&mut roots, path)?;
        Ok(roots)
    }

    pub(super) fn add_to(&self, roots: &mut RootCertStore, path: &Path) -> Result<(), TlsError> {
        for der in &self.ders {
            roots.add(der.clone()).map_err(|reason| TlsError::Rejected {
                key: self.key,
                path: path.to_owned(),
                reason,
            })?;
        }
        Ok(())
    }

    /// Refuses two files that name one CA, whatever certificate it stands in.
    pub(super) fn must_differ(&self, other: &Self) -> Result<(), TlsError> {
        for ca in &self.cas {
            if other
                .cas
                .iter()
                .any(|theirs| theirs.spki_sha256 == ca.spki_sha256)
            {
                return Err(TlsError::SharedCa {
                    first: self.key,
                    second: other.key,
                    subject: ca.subject_dn.clone(),
                });
            }
        }
        Ok(())
    }

    /// The names of its CAs in their order, each once.
    pub(super) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for ca in &self.cas {
            if !names.contains(&ca.subject_dn) {
                names.push(ca.subject_dn.clone());
            }
        }
        names
    }

    /// Refuses two files with different CAs of one name, in whatever encoding.
    pub(super) fn names_must_differ(&self, other: &Self) -> Result<(), TlsError> {
        for ca in &self.cas {
            let clash = |theirs: &CaCertificate| {
                theirs.subject_dn == ca.subject_dn && theirs.spki_sha256 != ca.spki_sha256
            };
            if other.cas.iter().any(clash) {
                return Err(TlsError::SameName {
                    first: self.key,
                    second: other.key,
                    subject: ca.subject_dn.clone(),
                });
            }
        }
        Ok(())
    }
}

/// A certificate of one's own that a playground's CA has signed.
pub(super) fn refuse_dev(
    key: &'static str,
    path: &Path,
    leaf: &CertificateDer<'_>,
    dev: bool,
) -> Result<(), TlsError> {
    not_of_a_playground(key, path, leaf, dev).map(drop)
}

/// A certificate of this file, refused if it is a playground's, unless `dev` allows that.
fn not_of_a_playground(
    key: &'static str,
    path: &Path,
    der: &CertificateDer<'_>,
    dev: bool,
) -> Result<CaCertificate, TlsError> {
    let certificate = CaCertificate::from_der(der).map_err(|reason| TlsError::Identity {
        key,
        path: path.to_owned(),
        reason,
    })?;
    if certificate.dev && !dev {
        return Err(TlsError::DevCertificate {
            key,
            path: path.to_owned(),
            subject: certificate.subject_dn,
        });
    }
    Ok(certificate)
}
