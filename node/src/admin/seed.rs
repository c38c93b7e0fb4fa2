//! What a node's configuration brings into a new cluster. It rules until there is a state; later
//! differences are not applied from here, except that revocations are still added
//! ([`super::revoked_file`]).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use raft_store::state::access::{Acl, RevocationKey};
use raft_store::state::frozen::AclV1;

use super::call::CallError;
use super::differences::Configured;
use super::revoked_file::{Faults, Listed, RevokedFile};
use super::{Placements, seeding};
use crate::config::{Config, ConfigError, Mode, RevokedEntry, RoleSeed, check_issuers};
use crate::consensus::{Consensus, FoundSeed, Founded};
use crate::identity::dn;
use crate::policy::{Policy, seed_roles};
use crate::tls::ClientIssuers;

/// What the configuration brings into a new cluster, and rules until there is one.
#[derive(Clone, Debug, Default)]
pub struct Seed {
    /// First access control.
    pub acl: Acl,
    /// First revocations with their reasons; those of the file as it is now.
    pub revocations: Listed,
    /// The CAs that this node accepts clients' certificates from; on this node no other's have a role.
    pub issuers: Vec<String>,
    /// What new contexts are made of. Only compared with those that there are.
    pub contexts: Configured,
    /// `acl.revoked_file`, as it was read.
    pub file: Option<RevokedFile>,
    /// It is version 1's file, which need not have a list of revocations.
    pub of_version_1: bool,
    /// It is version 1's, of a node alone, and says nothing of roles: certificates of this issuer with the OU `Admin` are
    /// administrators.
    pub unwritten_admins: Option<String>,
}

impl Seed {
    /// Reads the seed. `issuers` are the CAs that client certificates are accepted from.
    ///
    /// # Errors
    /// When a role's issuer is none of them. Whether what is wrong with `acl.revoked_file` is an error
    /// [`Self::check_revoked`] says.
    pub fn of(config: &Config, issuers: &ClientIssuers) -> Result<(Self, Faults), ConfigError> {
        check_issuers(&config.roles, &issuers.all)?;
        let role_issuer = role_issuer(&config.roles, &issuers.of_roles);
        let open = |path: &PathBuf| RevokedFile::open(path, config.acl.revoked_check, &issuers.all);
        let (file, faults) = match config.acl.revoked_file.as_ref().map(open) {
            Some((file, faults)) => (Some(file), faults),
            None => (None, Faults::default()),
        };
        let seed = Self {
            acl: Acl {
                mappings: config.acl.mappings.clone(),
                roles: seed_roles(&config.roles, role_issuer),
                ..Acl::default()
            },
            revocations: file.as_ref().map(RevokedFile::listed).unwrap_or_default(),
            issuers: issuers.all.clone(),
            contexts: Configured {
                placements: Placements::of(&config.hsm),
                rotation: Some(config.rotation_policy()),
            },
            file,
            of_version_1: config.hsm.legacy,
            unwritten_admins: (config.hsm.legacy
                && config.roles_by_default
                && config.cluster.mode == Mode::Standalone)
                .then(|| role_issuer.to_owned()),
        };
        Ok((seed, faults))
    }

    /// Whether the node may start although its list of revocations is not there, or has `faults`. Where there is a cluster
    /// it may, with what can be used of it, as while it runs: the state keeps whatever any file has said, and a file must
    /// not cost a voter. Before that nothing else says who is revoked. Only version 1's users have no list until somebody
    /// is; anybody else has misspelt its name, and would found a cluster in which nobody is revoked.
    ///
    /// # Errors
    /// What of the list cannot be read, or used, or that it is not there.
    pub fn check_revoked(&self, founded: bool, faults: Faults) -> Result<(), ConfigError> {
        if founded {
            faults.warn();
        } else if let Some(error) = faults.into_first() {
            return Err(error);
        }
        self.check_missing(founded)
    }

    fn check_missing(&self, founded: bool) -> Result<(), ConfigError> {
        let Some(path) = self.file.as_ref().and_then(RevokedFile::missing) else {
            return Ok(());
        };
        let shown = path.display();
        if founded {
            tracing::warn!(
                "configuration: acl.revoked_file: {shown} is not there; what it has said before stays revoked, and the \
                 node goes on looking for it"
            );
        } else if self.of_version_1 {
            tracing::warn!(
                "configuration: acl.revoked_file: {shown} is not there; nobody is revoked, and the node goes on looking \
                 for it"
            );
        } else {
            return Err(ConfigError::invalid(
                "acl.revoked_file",
                shown,
                "is not there, and nothing else says yet who is revoked",
                "correct the name, or write such a file (`revoked: []` where nobody is)",
            ));
        }
        Ok(())
    }

    /// Says, before it is so, who will administer though nobody has written it. Version 1 had no administrators: whoever
    /// was given a certificate with the OU `Admin` then was given it for something else.
    pub fn warn_of_unwritten_admins(&self, founded: bool) {
        let Some(issuer) = self.unwritten_admins.as_ref().filter(|_| !founded) else {
            return;
        };
        tracing::warn!(
            issuer,
            "configuration: roles: not written, as in version 1's file. With this first start every certificate of the \
             issuer with the OU Admin becomes an administrator's, and no other; if others are meant, write roles before \
             it (roles: {{admin: [{{cn: NAME}}]}}), or change them afterwards with hsmctl acl set"
        );
    }

    /// The policy before there is a cluster.
    #[must_use]
    pub fn policy(&self) -> Policy {
        let revocations = self.revocations.load();
        Policy::new(&self.acl, revocations.iter().map(|(key, _)| key.clone()))
    }

    /// Founds a cluster with what the configuration brings in; the revocations that do not fit into
    /// the founding command are added before it is reported. A founder that dies in between goes on
    /// as soon as it leads again.
    ///
    /// # Errors
    /// As [`Consensus::found`], and what refuses the further revocations.
    pub async fn found(&self, consensus: &Consensus) -> Result<Founded, CallError> {
        let founded = consensus.found(self.founding()).await?;
        seeding::add_missing(consensus, &self.revocations.load()).await?;
        Ok(founded)
    }

    /// What goes into the founding command.
    fn founding(&self) -> FoundSeed {
        let revocations = self.revocations.load();
        let first = seeding::fitting(&revocations);
        FoundSeed {
            acl: AclV1 {
                mappings: self.acl.mappings.clone(),
                roles: self.acl.roles.clone(),
            },
            revocations: revocations.iter().take(first).cloned().collect(),
        }
    }
}

/// What roles without an issuer are bound to.
fn role_issuer<'a>(roles: &[RoleSeed], of_file: &'a [String]) -> &'a str {
    let Some((first, further)) = of_file.split_first() else {
        return "";
    };
    if !further.is_empty() && roles.iter().any(|role| role.issuer.is_none()) {
        tracing::warn!(
            issuer = first,
            further = further.join("; "),
            "configuration: roles: an entry without issuer is bound to the first CA of its file, and certificates \
             of the further ones do not have the role; write an entry with issuer for each CA that is meant"
        );
    }
    first
}

/// What one entry of the file at `path` revokes.
///
/// # Errors
/// Why it cannot be used, with its line and what to write.
pub(super) fn revoked_by(
    path: &Path,
    entry: RevokedEntry,
    client_issuer_dns: &[String],
) -> Result<Vec<(RevocationKey, String)>, ConfigError> {
    let place = format!("{}, line {}", path.display(), entry.line);
    let reason = reason(&entry);
    let mut revocations = Vec::new();
    for key in keys(entry, &place, client_issuer_dns)? {
        let size = match &key {
            RevocationKey::CommonName(cn) => cn.len(),
            RevocationKey::Serial { issuer, serial } => issuer.len() + serial.len(),
            RevocationKey::Fingerprint(fingerprint) => fingerprint.len(),
        };
        // What the cluster would refuse must not be found out by its leader, with others beside it.
        if size > MAX_NAME {
            return Err(ConfigError::invalid(
                "acl.revoked_file",
                &place,
                format!("names a certificate with {size} bytes, and at most {MAX_NAME} are kept"),
                "revoke it by serial and issuer, or by another name of at most that length",
            ));
        }
        revocations.push((key, reason.clone()));
    }
    Ok(revocations)
}

/// Well below what a row's key may hold (`raft_store::state::table::MAX_KEY`); X.520 bounds a CN to 64.
pub(super) const MAX_NAME: usize = 1000;

fn reason(entry: &RevokedEntry) -> String {
    let given = entry.reason.as_deref().unwrap_or_default();
    let text = match &entry.date {
        Some(date) => format!("{given} ({date})"),
        None => given.to_owned(),
    };
    // One line, as administrators have to write it: it is shown to people.
    let line = text.trim().chars().take(200);
    line.map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// What an entry revokes; never nothing. v1 matched by CN alone, and so does an entry with a CN, unless
/// it is one of this version, with an issuer. A serial number without either stands for that of every
/// known CA: which of them gave it out is not known, and a revocation must not miss.
fn keys(
    entry: RevokedEntry,
    place: &str,
    client_issuer_dns: &[String],
) -> Result<Vec<RevocationKey>, ConfigError> {
    let refuse =
        |problem: String, remedy: &str| ConfigError::invalid("acl.revoked_file", place, problem, remedy);
    let given = |text: Option<String>| text.filter(|text| !text.trim().is_empty());
    let (cn, written, issuer) = (given(Some(entry.cn)), given(entry.serial), given(entry.issuer));
    let by_cn = cn.map(RevocationKey::CommonName);
    if by_cn.is_some() && issuer.is_none() {
        return Ok(by_cn.into_iter().collect());
    }
    let Some(written) = written else {
        return Err(match issuer {
            Some(issuer) => refuse(
                format!("names the issuer {issuer} and no serial number, and a CN counts for every issuer"),
                "give serial, or take issuer out",
            ),
            None => refuse(
                "revokes nothing: it has neither a CN nor a serial number".to_owned(),
                "give cn or serial, or take the entry out",
            ),
        });
    };
    let serial = serial(&written).ok_or_else(|| {
        refuse(
            format!("revokes nothing: {written:?} is not a serial number in hex digits"),
            "write it as `openssl x509 -noout -serial` prints it after `serial=`",
        )
    })?;
    let issuers = match issuer {
        Some(issuer) => vec![named_issuer(&issuer, place)?],
        None => client_issuer_dns.to_vec(),
    };
    let by_serial = issuers.into_iter().map(|issuer| RevocationKey::Serial {
        issuer,
        serial: serial.clone(),
    });
    Ok(by_cn.into_iter().chain(by_serial).collect())
}

/// An issuer in the form in which identities have it.
fn named_issuer(written: &str, place: &str) -> Result<String, ConfigError> {
    let issuer = dn::normalise(written);
    if !issuer.contains('=') {
        return Err(ConfigError::invalid(
            "acl.revoked_file",
            place,
            format!("{written:?} is not an issuer's name"),
            "write it as `openssl x509 -noout -issuer -nameopt RFC2253` prints it after `issuer=`",
        ));
    }
    Ok(issuer)
}

/// Issuers that are none of the configured CAs, each once. No error: clients may bring intermediate CAs that stand in no
/// file.
pub(super) fn foreign_issuers<'a>(
    revocations: &'a [(RevocationKey, String)],
    known: &[String],
) -> BTreeSet<&'a str> {
    let named = revocations.iter().filter_map(|(key, _)| match key {
        RevocationKey::Serial { issuer, .. } => Some(issuer.as_str()),
        RevocationKey::CommonName(_) | RevocationKey::Fingerprint(_) => None,
    });
    named
        .filter(|issuer| !known.iter().any(|it| it == issuer))
        .collect()
}

/// A serial number as identities have it: lower-case hex without leading zeros. People write it with or
/// without `0x`, `:` and spaces.
pub(super) fn serial(written: &str) -> Option<String> {
    let written = written.trim();
    let digits = written
        .strip_prefix("0x")
        .or_else(|| written.strip_prefix("0X"))
        .unwrap_or(written);
    let digits: String = digits
        .chars()
        .filter(|c| *c != ':' && !c.is_whitespace())
        .collect();
    if digits.is_empty() || !digits.chars().all(|c| c.is_ascii_hexdigit()) {
        return None;
    }
    let trimmed = digits.trim_start_matches('0').to_ascii_lowercase();
    Some(if trimmed.is_empty() {
        "0".to_owned()
    } else {
        trimmed
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::identity::Principal;
    use crate::identity::test_certs::TestCa;

    fn entry(cn: &str, serial: Option<&str>, issuer: Option<&str>) -> RevokedEntry {
        RevokedEntry {
            cn: cn.to_owned(),
            serial: serial.map(str::to_owned),
            issuer: issuer.map(str::to_owned),
            reason: None,
            date: None,
            line: 2,
        }
    }

    fn known() -> Vec<String> {
        vec!["CN=A".to_owned(), "CN=B,O=Example".to_owned()]
    }

    fn revoked(entry: RevokedEntry) -> Vec<RevocationKey> {
        keys(entry, "r.yaml, line 1", &known()).unwrap()
    }

    fn by_cn(cn: &str) -> RevocationKey {
        RevocationKey::CommonName(cn.to_owned())
    }

    fn by_serial(issuer: &str, serial: &str) -> RevocationKey {
        RevocationKey::Serial {
            issuer: issuer.to_owned(),
            serial: serial.to_owned(),
        }
    }

    #[test]
    fn v1s_entries_match_by_name_as_in_v1() {
        assert_eq!(revoked(entry("a", Some("12"), None)), [by_cn("a")]);
        assert_eq!(revoked(entry("a", Some("unknown"), None)), [by_cn("a")]);
        assert_eq!(revoked(entry("a", None, None)), [by_cn("a")]);
    }

    #[test]
    fn a_serial_number_without_an_issuer_is_revoked_for_every_known_ca() {
        let expected = [by_serial("CN=A", "ab12"), by_serial("CN=B,O=Example", "ab12")];
        assert_eq!(revoked(entry("", Some("00:AB:12"), None)), expected);
        assert_eq!(revoked(entry(" ", Some("0xab12"), Some(""))), expected);
    }

    #[test]
    fn a_named_issuer_is_the_only_one() {
        let expected = [by_serial("CN=B,O=Example", "ab12")];
        assert_eq!(
            revoked(entry("", Some("ab12"), Some("cn = B, o = Example"))),
            expected
        );
        assert_eq!(
            revoked(entry("", Some("1"), Some("CN=Intermediate"))),
            [by_serial("CN=Intermediate", "1")]
        );
        assert_eq!(
            revoked(entry("a", Some("1"), Some("CN=A"))),
            [by_cn("a"), by_serial("CN=A", "1")]
        );
    }

    #[test]
    fn an_entry_that_revokes_nothing_is_refused_with_file_and_line() {
        let path = Path::new("pki/revoked.yaml");
        for (bad, problem) in [
            (
                entry("", None, None),
                "revokes nothing: it has neither a CN nor a serial number; give cn or serial",
            ),
            (entry(" ", Some(" "), None), "revokes nothing"),
            (entry("", Some("zebra"), None), "\"zebra\" is not a serial number"),
            (
                entry(&"x".repeat(1001), None, None),
                "names a certificate with 1001 bytes, and at most 1000 are kept",
            ),
            (entry("", Some("0x"), None), "\"0x\" is not a serial number"),
            (entry("", Some("-1"), None), "\"-1\" is not a serial number"),
            (
                entry("a", Some("zebra"), Some("CN=A")),
                "\"zebra\" is not a serial number",
            ),
            (
                entry("a", None, Some("CN=A")),
                "names the issuer CN=A and no serial number",
            ),
            (
                entry("", Some("1"), Some("Client CA")),
                "\"Client CA\" is not an issuer's name",
            ),
        ] {
            let error = revoked_by(path, bad, &known()).unwrap_err().to_string();
            assert!(
                error.starts_with("config: acl.revoked_file: pki/revoked.yaml, line 2: "),
                "{error}"
            );
            assert!(error.contains(problem), "{error}");
        }
    }

    #[test]
    fn a_certificate_revoked_by_serial_number_is_refused_whichever_ca_issued_it() {
        let cas = [TestCa::new("Clients"), TestCa::new("Admins, new")];
        let principals = cas.map(|ca| Principal::from_der(&ca.client("c", "Trading").der).unwrap());
        let issuers: Vec<String> = principals.iter().map(|p| p.issuer_dn.clone()).collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("revoked.yaml");
        for (caller, other) in [(0, 1), (1, 0)] {
            let (caller, other) = (&principals[caller], &principals[other]);
            let rule = |text: String| {
                std::fs::write(&path, text).unwrap();
                let (file, _) = RevokedFile::open(&path, Duration::ZERO, &issuers);
                let seed = Seed {
                    revocations: file.listed(),
                    ..Seed::default()
                };
                seed.policy()
            };
            let anywhere = rule(format!("revoked:\n  - serial: \"{}\"\n", caller.serial));
            assert!(anywhere.check_certificate(caller).is_err());
            assert!(anywhere.check_certificate(other).is_ok());
            let (serial, issuer) = (&caller.serial, &caller.issuer_dn);
            let here = rule(format!(
                "revoked:\n  - serial: \"{serial}\"\n    issuer: '{issuer}'\n"
            ));
            assert!(here.check_certificate(caller).is_err());
            let issuer = &other.issuer_dn;
            let elsewhere = rule(format!(
                "revoked:\n  - serial: \"{serial}\"\n    issuer: '{issuer}'\n"
            ));
            assert!(elsewhere.check_certificate(caller).is_ok());
        }
    }

    #[test]
    fn a_reason_keeps_the_date_and_has_an_end() {
        let dated = |given: Option<&str>| {
            reason(&RevokedEntry {
                reason: given.map(str::to_owned),
                date: Some("2025-01-01".to_owned()),
                ..entry("a", None, None)
            })
        };
        assert_eq!(dated(Some("lost")), "lost (2025-01-01)");
        assert_eq!(dated(None), "(2025-01-01)");
        assert_eq!(dated(Some(&"x".repeat(1000))).len(), 200);
        assert_eq!(dated(Some("lost\nby \u{1b}[2Jme")), "lost by  [2Jme (2025-01-01)");
    }

    #[test]
    fn the_founding_command_takes_what_fits() {
        let many = |n: usize| Seed {
            revocations: (0..n).map(|i| (by_cn(&i.to_string()), String::new())).collect(),
            ..Seed::default()
        };
        assert_eq!(many(3).founding().revocations.len(), 3);
        assert_eq!(many(250).founding().revocations.len(), seeding::MAX_REVOCATIONS);
    }
}
