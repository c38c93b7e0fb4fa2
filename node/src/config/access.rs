//! `acl` and `roles`: who may do what. They only seed `cluster init`; afterwards the replicated
//! policy rules, and a difference is reported, never applied.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use raft_store::names::ContextName;
use serde::Deserialize;
use serde_saphyr::Spanned;

use super::error::ConfigError;
use super::file::{AclSection, RoleEntry};
use super::server::millis;
use super::suggest::nearest;
use crate::policy::{ROLES, Role, role_name};

/// Organizational units and their contexts.
#[derive(Debug, Clone)]
pub struct Acl {
    /// OU → contexts it may use.
    pub mappings: BTreeMap<String, BTreeSet<ContextName>>,
    /// v1's list of revoked common names.
    pub revoked_file: Option<PathBuf>,
    /// Between looks at it.
    pub revoked_check: Duration,
}

/// One entry under `roles`, not yet bound to an issuer: that needs the CA's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoleSeed {
    /// Where it stands: `roles.admin[0]`.
    pub key: String,
    /// The role.
    pub role: Role,
    /// Issuer's name; `None` stands for the subject of the admin CA, or else of the client CA.
    pub issuer: Option<String>,
    /// Required first OU.
    pub ou: Option<String>,
    /// Required last CN.
    pub cn: Option<String>,
    /// Required key: SHA-256 of the SPKI.
    pub spki_sha256: Option<[u8; 32]>,
}

/// An entry of `revoked.yaml`: v1's, and `issuer`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct RevokedEntry {
    /// Common name; v1 matched by this alone.
    #[serde(default)]
    pub cn: String,
    /// Serial number in hex, as people wrote it.
    #[serde(default)]
    pub serial: Option<String>,
    /// Name of the CA that gave out the serial number, as people wrote it; v1 had no such field.
    #[serde(default)]
    pub issuer: Option<String>,
    /// Why.
    #[serde(default)]
    pub reason: Option<String>,
    /// When, as people wrote it.
    #[serde(default)]
    pub date: Option<String>,
    /// Where it begins in its file, from 1.
    #[serde(skip)]
    pub line: u64,
}

impl AclSection {
    pub(crate) fn resolve(self) -> Result<Acl, ConfigError> {
        let mut mappings = BTreeMap::new();
        for (ou, contexts) in self.mappings.unwrap_or_default() {
            let key = format!("acl.mappings.{ou}");
            let contexts = contexts
                .unwrap_or_default()
                .iter()
                .map(|name| ContextName::new(name).map_err(ConfigError::name(key.as_str())))
                .collect::<Result<BTreeSet<_>, _>>()?;
            mappings.insert(ou, contexts);
        }
        Ok(Acl {
            mappings,
            revoked_file: self.revoked_file,
            revoked_check: millis(
                "acl.revoked_check_interval_ms",
                self.revoked_check_interval_ms,
                30_000,
                100..=3_600_000,
            )?,
        })
    }
}

/// Without `roles`, certificates with the OU `Admin` are admins: somebody has to be.
pub(crate) fn roles(
    section: Option<BTreeMap<String, Option<Vec<RoleEntry>>>>,
) -> Result<Vec<RoleSeed>, ConfigError> {
    let Some(section) = section else {
        return Ok(vec![RoleSeed {
            key: "roles.admin".to_owned(),
            role: Role::Admin,
            issuer: None,
            ou: Some("Admin".to_owned()),
            cn: None,
            spki_sha256: None,
        }]);
    };
    let mut seeds = Vec::new();
    for (name, entries) in section {
        let role = ROLES
            .into_iter()
            .find(|role| role_name(*role) == name)
            .ok_or_else(|| unknown_role(&name))?;
        for (index, entry) in entries.unwrap_or_default().into_iter().enumerate() {
            seeds.push(entry.resolve(role, &format!("roles.{name}[{index}]"))?);
        }
    }
    if !seeds.iter().any(|seed| seed.role == Role::Admin) {
        return Err(ConfigError::missing(
            "roles.admin",
            "write at least one, such as `admin: [{ou: Admin}]`: without one nobody could \
             administer the cluster",
        ));
    }
    Ok(seeds)
}

fn unknown_role(name: &str) -> ConfigError {
    let known = ROLES.map(role_name);
    let remedy = nearest(name, known).map_or_else(
        || format!("the roles are {}", known.join(", ")),
        |word| format!("did you mean {word}?"),
    );
    ConfigError::invalid(format!("roles.{name}"), name, "is not a known role", remedy)
}

impl RoleEntry {
    fn resolve(self, role: Role, key: &str) -> Result<RoleSeed, ConfigError> {
        let given = |text: Option<String>| text.filter(|text| !text.is_empty());
        let (ou, cn, issuer) = (given(self.ou), given(self.cn), given(self.issuer));
        let spki_sha256 = given(self.spki_sha256)
            .map(|hex| fingerprint(key, &hex))
            .transpose()?;
        if ou.is_none() && cn.is_none() && spki_sha256.is_none() {
            return Err(ConfigError::invalid(
                key,
                role_name(role),
                "names nobody, so every certificate of the issuer would have the role",
                "give ou, cn or spki_sha256",
            ));
        }
        Ok(RoleSeed {
            key: key.to_owned(),
            role,
            issuer: issuer.map(|dn| crate::identity::dn::normalise(&dn)),
            ou,
            cn,
            spki_sha256,
        })
    }
}

/// Refuses a role whose issuer is none of the CAs that certificates are accepted from, by name. In the
/// cluster's state it would lock its holders out, or wait for an intermediate CA that bears the name.
///
/// # Errors
/// The key, the name, and the one that may have been meant.
pub fn check_issuers(roles: &[RoleSeed], known: &[String]) -> Result<(), ConfigError> {
    for role in roles {
        let Some(issuer) = role.issuer.as_ref().filter(|issuer| !known.contains(issuer)) else {
            continue;
        };
        let meant = nearest(issuer, known.iter().map(String::as_str)).map_or_else(
            || format!("known are {}", known.join("; ")),
            |name| format!("did you mean {name}?"),
        );
        return Err(ConfigError::invalid(
            format!("{}.issuer", role.key),
            issuer,
            "is not the subject of a CA in server.tls.ca_path or server.tls.admin_client_ca_path",
            format!("add that CA's own certificate, an intermediate CA's too, or correct the name: {meant}"),
        ));
    }
    Ok(())
}

/// SHA-256 of a key, as people write it.
pub(super) fn fingerprint(key: &str, text: &str) -> Result<[u8; 32], ConfigError> {
    let digits: String = text.chars().filter(|c| *c != ':').collect();
    let mut bytes = [0_u8; 32];
    hex::decode_to_slice(&digits, &mut bytes).map_err(|_| {
        ConfigError::invalid(
            format!("{key}.spki_sha256"),
            text,
            "is not a SHA-256 fingerprint",
            "write 64 hex digits",
        )
    })?;
    Ok(bytes)
}

/// Bytes of a list of revocations: more than the 50,000 that a cluster keeps.
const MAX_LIST: u64 = 16 << 20;
/// Mappings, keys and values in it: 50,000 entries with every field.
const MAX_NODES: usize = 600_000;

/// Reads the text of v1's `revoked.yaml`.
///
/// # Errors
/// The operating system's, [`std::io::ErrorKind::NotFound`] among them, and what is no file, no text or too long.
pub fn read_revoked(path: &Path) -> std::io::Result<String> {
    // Whoever opens a pipe otherwise waits for its other end, for ever.
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::other("it is no regular file"));
    }
    let mut text = String::new();
    file.take(MAX_LIST + 1).read_to_string(&mut text)?;
    if text.len() as u64 <= MAX_LIST {
        return Ok(text);
    }
    let what = format!("it is larger than {} MiB", MAX_LIST >> 20);
    Err(std::io::Error::other(what))
}

/// Reads the text of such a list at `path`. Its entries are only ever added to the cluster's revocations.
///
/// # Errors
/// What is wrong with it, and where.
pub fn parse_revoked(text: &str, path: &Path) -> Result<Vec<RevokedEntry>, ConfigError> {
    // A misspelt key must not read as an empty list.
    #[derive(Default, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Revoked {
        revoked: Option<Vec<Spanned<RevokedEntry>>>,
    }
    let mut options = super::yaml_options();
    options.budget = serde_saphyr::budget! { max_nodes: MAX_NODES };
    let parsed: Revoked =
        serde_saphyr::from_str_with_options(text, options).map_err(|error| ConfigError::Syntax {
            path: path.to_owned(),
            problem: error.to_string(),
        })?;
    let entries = parsed.revoked.unwrap_or_default().into_iter();
    let placed = entries.map(|entry| RevokedEntry {
        line: entry.referenced.line(),
        ..entry.value
    });
    Ok(placed.collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn entry(ou: Option<&str>) -> RoleEntry {
        RoleEntry {
            ou: ou.map(str::to_owned),
            ..RoleEntry::default()
        }
    }

    #[test]
    fn without_roles_the_ou_admin_is_admin() {
        let seeds = roles(None).unwrap();
        assert_eq!(
            (seeds[0].role, seeds[0].ou.clone()),
            (Role::Admin, Some("Admin".to_owned()))
        );
    }

    #[test]
    fn a_misspelt_role_is_refused_with_a_suggestion() {
        let section = BTreeMap::from([("auditer".to_owned(), Some(vec![entry(Some("A"))]))]);
        let error = roles(Some(section)).unwrap_err().to_string();
        assert!(error.contains("did you mean auditor?"), "{error}");
    }

    #[test]
    fn a_role_for_everybody_is_refused() {
        let section = BTreeMap::from([("admin".to_owned(), Some(vec![entry(None)]))]);
        let error = roles(Some(section)).unwrap_err().to_string();
        assert!(
            error.starts_with("config: roles.admin[0]: admin: names nobody"),
            "{error}"
        );
    }

    #[test]
    fn roles_without_an_admin_are_refused() {
        let section = BTreeMap::from([("auditor".to_owned(), Some(vec![entry(Some("A"))]))]);
        assert!(
            roles(Some(section))
                .unwrap_err()
                .to_string()
                .starts_with("config: roles.admin")
        );
    }

    #[test]
    fn an_issuer_that_is_no_accepted_ca_is_refused_with_the_nearest_one() {
        let known = ["CN=Admin CA,O=Example".to_owned(), "CN=Clients".to_owned()];
        let section = |issuer: &str| {
            let entry = RoleEntry {
                issuer: Some(issuer.to_owned()),
                ..entry(Some("Admin"))
            };
            let seeds = roles(Some(BTreeMap::from([("admin".to_owned(), Some(vec![entry]))])));
            check_issuers(&seeds.unwrap(), &known).map_err(|error| error.to_string())
        };
        assert_eq!(section("cn = Admin CA, o=Example"), Ok(()));
        assert_eq!(check_issuers(&roles(None).unwrap(), &known).ok(), Some(()));
        let misspelt = section("CN=Admim CA,O=Example").unwrap_err();
        assert!(
            misspelt.starts_with("config: roles.admin[0].issuer: CN=Admim CA,O=Example: is not the subject"),
            "{misspelt}"
        );
        assert!(
            misspelt.ends_with("did you mean CN=Admin CA,O=Example?"),
            "{misspelt}"
        );
        let foreign = section("CN=Some Team's Intermediate").unwrap_err();
        assert!(
            foreign.ends_with("known are CN=Admin CA,O=Example; CN=Clients"),
            "{foreign}"
        );
    }

    #[test]
    fn v1s_revocations_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("revoked.yaml");
        std::fs::write(
            &path,
            "revoked:\n  - cn: old-client\n    serial: \"1234\"\n    reason: compromised\n    \
             date: 2025-01-01\n    by: someone\n",
        )
        .unwrap();
        let entries = parse_revoked(&read_revoked(&path).unwrap(), &path).unwrap();
        assert_eq!(entries.len(), 1);
        assert_eq!((entries[0].cn.as_str(), entries[0].line), ("old-client", 2));
        assert_eq!(entries[0].date.as_deref(), Some("2025-01-01"));
    }

    #[test]
    fn each_entry_knows_its_line_however_it_is_written() {
        let text = "# lost\nrevoked:\n  - cn: a\n    reason: x\n\n  - {cn: b}\n  -\n    serial: \"0a\"\n";
        let entries = parse_revoked(text, Path::new("r.yaml")).unwrap();
        let lines: Vec<u64> = entries.iter().map(|entry| entry.line).collect();
        assert_eq!(lines, [3, 6, 8]);
    }

    #[test]
    fn what_is_no_list_is_refused_with_its_line() {
        for text in ["revoked: [", "revoked:\n  - cn: a\nrevokd: []\n"] {
            let error = parse_revoked(text, Path::new("pki/revoked.yaml"))
                .unwrap_err()
                .to_string();
            assert!(
                error.starts_with("config: pki/revoked.yaml: ") && error.contains("line "),
                "{error}"
            );
        }
    }

    #[test]
    fn a_vanished_list_is_told_from_one_that_is_too_long() {
        let missing = read_revoked(Path::new("/nonexistent/revoked.yaml")).unwrap_err();
        assert_eq!(missing.kind(), std::io::ErrorKind::NotFound);
        let long = tempfile::NamedTempFile::new().unwrap();
        long.as_file().set_len(MAX_LIST + 1).unwrap();
        let error = read_revoked(long.path()).unwrap_err();
        assert_eq!(error.to_string(), "it is larger than 16 MiB");
    }

    #[test]
    fn a_pipe_or_a_folder_in_the_place_of_a_list_keeps_nobody_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for no_file in [&*pipe, folder.path()] {
            let error = read_revoked(no_file).unwrap_err();
            assert_eq!(error.to_string(), "it is no regular file");
        }
    }

    #[test]
    fn as_many_entries_as_a_cluster_keeps_are_read_and_what_only_grows_when_it_is_read_is_not() {
        const KEPT: usize = crate::admin::access::MAX_KEPT;
        let entry = "- {cn: a, serial: '1', issuer: 'CN=A', reason: lost, date: '2025-01-01'}\n";
        let parse = |text: &str| parse_revoked(text, Path::new("r.yaml"));
        let most = format!("revoked:\n{}", entry.repeat(KEPT));
        assert!((most.len() as u64) < MAX_LIST);
        assert_eq!(parse(&most).unwrap().len(), KEPT);
        let bomb = format!("revoked:\n- &a {{cn: a}}\n{}", "- *a\n".repeat(2 * KEPT));
        assert!(parse(&bomb).is_err());
    }

    #[test]
    fn the_list_is_looked_at_every_half_minute_unless_it_is_said_otherwise() {
        let interval = |given: Option<u64>| {
            let section = AclSection {
                revoked_check_interval_ms: given,
                ..AclSection::default()
            };
            section.resolve().map(|acl| acl.revoked_check.as_millis())
        };
        assert_eq!(interval(None).unwrap(), 30_000);
        assert_eq!(interval(Some(100)).unwrap(), 100);
        let error = interval(Some(0)).unwrap_err().to_string();
        assert!(
            error.starts_with("config: acl.revoked_check_interval_ms: 0: "),
            "{error}"
        );
    }
}
