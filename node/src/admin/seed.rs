//! What a node's configuration brings into a new cluster. It rules until there is a state; later
//! differences are not applied from here.

use raft_store::command::{AddRevocations, Op};
use raft_store::state::access::{Acl, RevocationKey};

use super::call::CallError;
use crate::config::{Config, ConfigError, RevokedEntry, read_revoked};
use crate::consensus::{Consensus, FoundSeed, Founded};
use crate::policy::{Policy, seed_roles};

/// What the configuration brings into a new cluster, and rules until there is one.
#[derive(Clone, Debug, Default)]
pub struct Seed {
    /// First access control.
    pub acl: Acl,
    /// First revocations with their reasons.
    pub revocations: Vec<(RevocationKey, String)>,
}

/// Revocations that fit into the founding command with certainty; the rest follows in commands of
/// its own before the foundation is reported.
pub const FIRST_REVOCATIONS: usize = 100;

impl Seed {
    /// Reads the seed. `role_issuer_dn` is what roles without an issuer are bound to.
    ///
    /// # Errors
    /// When `acl.revoked_file` cannot be read: a list that vanished must not start as an empty one.
    pub fn of(config: &Config, role_issuer_dn: &str) -> Result<Self, ConfigError> {
        let revoked = match &config.acl.revoked_file {
            Some(path) => read_revoked(path)?,
            None => Vec::new(),
        };
        Ok(Self {
            acl: Acl {
                mappings: config.acl.mappings.clone(),
                roles: seed_roles(&config.roles, role_issuer_dn),
            },
            revocations: revoked
                .into_iter()
                .filter_map(|entry| revocation(entry, role_issuer_dn))
                .collect(),
        })
    }

    /// The policy before there is a cluster.
    #[must_use]
    pub fn policy(&self) -> Policy {
        Policy::new(&self.acl, self.revocations.iter().map(|(key, _)| key.clone()))
    }

    /// Founds a cluster with what the configuration brings in; the revocations that do not fit into
    /// the founding command are added before it is reported.
    ///
    /// # Errors
    /// As [`Consensus::found`], and what refuses the further revocations.
    pub async fn found(&self, consensus: &Consensus) -> Result<Founded, CallError> {
        let (seed, more) = self.split();
        let founded = consensus.found(seed).await?;
        for chunk in more.chunks(FIRST_REVOCATIONS) {
            let op = Op::AddRevocations(AddRevocations {
                revocations: chunk.to_vec(),
            });
            consensus.propose_as_leader(op).await?;
        }
        Ok(founded)
    }

    /// What founds a cluster, and the revocations to be added after.
    #[must_use]
    pub fn split(&self) -> (FoundSeed, Vec<(RevocationKey, String)>) {
        let (first, rest) = self
            .revocations
            .split_at(FIRST_REVOCATIONS.min(self.revocations.len()));
        let seed = FoundSeed {
            acl: self.acl.clone(),
            revocations: first.to_vec(),
        };
        (seed, rest.to_vec())
    }
}

/// v1 matched by CN alone; an entry with only a serial is taken for one of the client CA's.
fn revocation(entry: RevokedEntry, issuer: &str) -> Option<(RevocationKey, String)> {
    let mut reason = entry.reason.unwrap_or_default();
    if let Some(date) = entry.date {
        reason = format!("{reason} ({date})").trim_start().to_owned();
    }
    let reason: String = reason.chars().take(200).collect();
    if !entry.cn.is_empty() {
        return Some((RevocationKey::CommonName(entry.cn), reason));
    }
    let digits: String = entry.serial?.chars().filter(|c| c.is_ascii_hexdigit()).collect();
    let serial = digits.trim_start_matches('0').to_ascii_lowercase();
    let key = RevocationKey::Serial {
        issuer: issuer.to_owned(),
        serial,
    };
    Some((key, reason))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn v1s_revocations_match_by_name_as_in_v1() {
        let entry = |cn: &str, serial: Option<&str>| RevokedEntry {
            cn: cn.to_owned(),
            serial: serial.map(str::to_owned),
            reason: Some("lost".to_owned()),
            date: Some("2025-01-01".to_owned()),
        };
        let (key, reason) = revocation(entry("a", Some("12")), "CN=CA").unwrap();
        assert_eq!(key, RevocationKey::CommonName("a".to_owned()));
        assert_eq!(reason, "lost (2025-01-01)");
        let (key, _) = revocation(entry("", Some("00:AB:12")), "CN=CA").unwrap();
        let serial = RevocationKey::Serial {
            issuer: "CN=CA".to_owned(),
            serial: "ab12".to_owned(),
        };
        assert_eq!(key, serial);
        assert!(revocation(entry("", None), "CN=CA").is_none());
    }

    #[test]
    fn many_revocations_are_split() {
        let many = |n: usize| Seed {
            acl: Acl::default(),
            revocations: (0..n)
                .map(|i| (RevocationKey::CommonName(i.to_string()), String::new()))
                .collect(),
        };
        let (first, rest) = many(3).split();
        assert_eq!((first.revocations.len(), rest.len()), (3, 0));
        let (first, rest) = many(250).split();
        assert_eq!((first.revocations.len(), rest.len()), (FIRST_REVOCATIONS, 150));
    }
}
