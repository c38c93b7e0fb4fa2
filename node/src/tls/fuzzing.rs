//! See [`crate::fuzzing`].
#![allow(clippy::unwrap_used, clippy::expect_used)] // They are tests.

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use super::crl::read;

/// The CA that has signed the lists of the corpus. Nobody has its key any more.
const CA: &str = "\
-----BEGIN CERTIFICATE-----
MIIBbjCCARSgAwIBAgIUdlCN5K7WmnW7ktOqIwYouXrjaB8wCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJRnV6emVkIENBMCAXDTI2MTEyNjE4MjAxNFoYDzIxMjYxMTAy
MTgyMDE0WjAUMRIwEAYDVQQDDAlGdXp6ZWQgQ0EwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATR0K9MP5KLl5pg0ILsCDFouD+w/Oc91csU5W/svwUTAjyIZ/P/6/sj
J60QkZPMjnTJNx8OCYwCyV8uZu+8HMSjo0IwQDAPBgNVHRMBAf8EBTADAQH/MA4G
A1UdDwEB/wQEAwIBBjAdBgNVHQ4EFgQUm7kECYni4Ga+ZQvOXEYEIKQbzbkwCgYI
KoZIzj0EAwIDSAAwRQIhAI7euimZXa0xQgrtdHXAUvztXu3CUyZLXBfn+DSI5qiS
AiAJ/YoabC+3conutdEJ8PqMHSw+IuK7MtAc11VVgSYwvw==
-----END CERTIFICATE-----
";

/// A file of revocation lists: only what the CA has signed is taken, serial numbers are in the form of identities, and
/// without the CA there is nothing to be taken.
pub fn crl(data: &[u8]) -> bool {
    let ca = CertificateDer::from_pem_slice(CA.as_bytes()).unwrap();
    let Ok(lists) = read(data, std::slice::from_ref(&ca)) else {
        return false;
    };
    assert!(!lists.is_empty());
    assert!(read(data, &[]).is_err());
    for list in &lists {
        assert_eq!(list.issuer, "CN=Fuzzed CA");
        for serial in &list.serials {
            assert!(
                serial
                    .bytes()
                    .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
            );
            assert!(serial == "0" || !serial.starts_with('0'));
        }
    }
    // A file that is no text holds one.
    if matches!(data, [0x30, 0x80..=0x84, ..]) {
        assert_eq!(lists.len(), 1);
        assert!(read(&[data, &[0]].concat(), &[ca]).is_err());
    }
    true
}
