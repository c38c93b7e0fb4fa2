//! Revoked certificates, arranged for one look each by fingerprint, serial and common name.
//! Only the replicated state fills it; a file that disappears takes nothing out.

use std::collections::{HashMap, HashSet};

use super::RevocationKey;
use crate::identity::Principal;

/// A set of revocations. Built once per change of the state, then only read.
#[derive(Debug, Clone, Default)]
pub struct Revocations {
    fingerprints: HashSet<[u8; 32]>,
    /// Serial → issuers that gave it out to somebody now revoked.
    serials: HashMap<String, HashSet<String>>,
    common_names: HashSet<String>,
}

impl Revocations {
    /// Whether any revocation matches the certificate.
    #[must_use]
    pub fn contains(&self, principal: &Principal) -> bool {
        self.fingerprints.contains(&principal.fingerprint)
            || self
                .serials
                .get(&principal.serial)
                .is_some_and(|issuers| issuers.contains(&principal.issuer_dn))
            || self.common_names.contains(&principal.cn)
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        let serials: usize = self.serials.values().map(HashSet::len).sum();
        self.fingerprints.len() + serials + self.common_names.len()
    }

    /// True if nothing is revoked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl FromIterator<RevocationKey> for Revocations {
    fn from_iter<I: IntoIterator<Item = RevocationKey>>(keys: I) -> Self {
        let mut out = Self::default();
        for key in keys {
            match key {
                RevocationKey::Fingerprint(hash) => {
                    out.fingerprints.insert(hash);
                }
                RevocationKey::Serial { issuer, serial } => {
                    out.serials.entry(serial).or_default().insert(issuer);
                }
                RevocationKey::CommonName(cn) => {
                    out.common_names.insert(cn);
                }
            }
        }
        out
    }
}
