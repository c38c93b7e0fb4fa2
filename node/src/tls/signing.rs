//! Signatures with the key of a node's cluster certificate, outside of TLS: how a node vouches
//! for its slots' public keys. The signed bytes can never be a TLS handshake's.

use rustls::SignatureScheme;
use rustls::sign::SigningKey;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use super::{TlsError, provider};

/// A signature and how it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterSignature {
    /// TLS signature scheme (RFC 8446, section 4.2.3).
    pub scheme: u16,
    /// The signature.
    pub signature: Vec<u8>,
}

/// TLS signs 64 spaces and a context; this prefix begins otherwise.
const DOMAIN: &[u8] = b"hsm/node-signature/v1\0";

fn signed_bytes(purpose: &str, message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(purpose.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(DOMAIN.len() + 4 + purpose.len() + message.len());
    bytes.extend_from_slice(DOMAIN);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(purpose.as_bytes());
    bytes.extend_from_slice(message);
    bytes
}

pub(super) fn sign(
    key: &dyn SigningKey,
    purpose: &str,
    message: &[u8],
) -> Result<ClusterSignature, TlsError> {
    let schemes = provider().signature_verification_algorithms.supported_schemes();
    let signer = key
        .choose_scheme(&schemes)
        .ok_or_else(|| TlsError::Signature("the key fits no known scheme".to_owned()))?;
    let signature = signer
        .sign(&signed_bytes(purpose, message))
        .map_err(|error| TlsError::Signature(error.to_string()))?;
    Ok(ClusterSignature {
        scheme: signer.scheme().into(),
        signature,
    })
}

/// Verifies a signature by the key of a certificate. That the certificate itself belongs to the
/// cluster, the caller knows from the handshake it came in.
///
/// # Errors
/// [`TlsError::Signature`] if it does not hold.
pub fn verify_signature(
    certificate: &[u8],
    purpose: &str,
    message: &[u8],
    signature: &ClusterSignature,
) -> Result<(), TlsError> {
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(|error| TlsError::Signature(error.to_string()))?;
    let key: &[u8] = &parsed.public_key().subject_public_key.data;
    let scheme = SignatureScheme::from(signature.scheme);
    let provider = provider();
    let bytes = signed_bytes(purpose, message);
    let holds = provider
        .signature_verification_algorithms
        .mapping
        .iter()
        .filter(|(known, _)| *known == scheme)
        .flat_map(|(_, algorithms)| algorithms.iter())
        .any(|algorithm| {
            algorithm
                .verify_signature(key, &bytes, &signature.signature)
                .is_ok()
        });
    if holds {
        Ok(())
    } else {
        Err(TlsError::Signature(format!(
            "wrong key, message or scheme {:#06x}",
            signature.scheme
        )))
    }
}
