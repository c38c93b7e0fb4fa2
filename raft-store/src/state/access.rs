//! Who may do what: contexts by organizational unit, roles by certificate, revocations.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::frozen::AclV1;
use super::table::{LoadError, Row, RowKey, RowKind, unknown_version};
use crate::codec;
use crate::names::{ContextName, UnixMillis};

/// A role of people and machines that administer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Role {
    /// Everything.
    Admin,
    /// Daily operation: rotate, status.
    Operator,
    /// Reads.
    Auditor,
    /// Holds ceremony shares.
    Officer,
    /// Makes backups.
    Backup,
    /// Reads metrics on the API listener.
    Metrics,
}

/// Which certificates have a role: every part given must match, the issuer always.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoleEntry {
    /// The role.
    pub role: Role,
    /// Issuer's distinguished name, as printed in RFC 4514 order by the certificate parser.
    pub issuer: String,
    /// First OU.
    pub ou: Option<String>,
    /// Last CN.
    pub cn: Option<String>,
    /// SHA-256 of the SubjectPublicKeyInfo.
    pub spki_sha256: Option<[u8; 32]>,
}

/// What a principal may do with a context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Operation {
    /// Encrypt under its active version.
    Encrypt,
    /// Decrypt under any version.
    Decrypt,
    /// Encrypt anew what is encrypted.
    Rewrap,
    /// Get a fresh data key; to open one is to decrypt.
    DataKey,
}

/// Whom a rule is about: every part given must match, and at least one is given.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Who {
    /// Issuer's distinguished name, as in [`RoleEntry::issuer`].
    pub issuer: Option<String>,
    /// First OU.
    pub ou: Option<String>,
    /// Last CN.
    pub cn: Option<String>,
}

/// A rule beside the mappings. It grants, and takes nothing away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AclRule {
    /// To whom.
    pub who: Who,
    /// Which contexts.
    pub contexts: BTreeSet<ContextName>,
    /// What may be done with each of them.
    pub operations: BTreeSet<Operation>,
}

/// Access control; one row. A principal may do what its OU's mapping or any rule allows, and nothing else.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acl {
    /// First OU → contexts it may use.
    pub mappings: BTreeMap<String, BTreeSet<ContextName>>,
    /// Role assignments.
    pub roles: Vec<RoleEntry>,
    /// First OU of a mapping → what it may do with the mapping's contexts. An OU that is not here may do
    /// everything, what later releases add too.
    pub operations: BTreeMap<String, BTreeSet<Operation>>,
    /// Further rules.
    pub rules: Vec<AclRule>,
}

impl Acl {
    /// Whether any certificate could have a role.
    pub fn assigns(&self, role: Role) -> bool {
        self.roles.iter().any(|entry| entry.role == role)
    }

    /// Names these rules, so that whoever changes them can say which ones he has read: SHA-256 in a form of its own.
    /// A log that names them has to mean the same rules when a later release stores them otherwise; a part that such
    /// a release adds must leave the digest alone where it is empty.
    ///
    /// ```text
    /// "hsm/acl/v1\0"
    ///   ‖ n ‖ (text(OU) ‖ n ‖ text(context)…)…            mappings
    ///   ‖ n ‖ (u8(role) ‖ text(issuer) ‖ opt(OU) ‖ opt(CN) ‖ opt(SPKI hash))…
    ///   ‖ n ‖ (text(OU) ‖ n ‖ u8(operation)…)…            operations
    ///   ‖ n ‖ (opt(issuer) ‖ opt(OU) ‖ opt(CN) ‖ n ‖ text(context)… ‖ n ‖ u8(operation)…)…
    /// n = u64 BE, text(t) = n(bytes) ‖ t, opt(t) = 0 | 1 ‖ text(t)
    /// ```
    pub fn digest(&self) -> [u8; 32] {
        let mut hash = Canonical(Sha256::new());
        hash.0.update(b"hsm/acl/v1\0");
        hash.count(self.mappings.len());
        for (ou, contexts) in &self.mappings {
            hash.text(ou.as_bytes());
            hash.contexts(contexts);
        }
        hash.count(self.roles.len());
        for entry in &self.roles {
            hash.byte(entry.role as u8);
            hash.text(entry.issuer.as_bytes());
            hash.optional(entry.ou.as_ref());
            hash.optional(entry.cn.as_ref());
            hash.optional(entry.spki_sha256.as_ref());
        }
        hash.count(self.operations.len());
        for (ou, operations) in &self.operations {
            hash.text(ou.as_bytes());
            hash.operations(operations);
        }
        hash.count(self.rules.len());
        for rule in &self.rules {
            hash.optional(rule.who.issuer.as_ref());
            hash.optional(rule.who.ou.as_ref());
            hash.optional(rule.who.cn.as_ref());
            hash.contexts(&rule.contexts);
            hash.operations(&rule.operations);
        }
        hash.0.finalize().into()
    }
}

/// See [`Acl::digest`].
struct Canonical(Sha256);

impl Canonical {
    fn byte(&mut self, byte: u8) {
        self.0.update([byte]);
    }

    fn count(&mut self, count: usize) {
        self.0.update((count as u64).to_be_bytes());
    }

    fn text(&mut self, text: &[u8]) {
        self.count(text.len());
        self.0.update(text);
    }

    fn optional<T: AsRef<[u8]>>(&mut self, text: Option<&T>) {
        self.byte(u8::from(text.is_some()));
        if let Some(text) = text {
            self.text(text.as_ref());
        }
    }

    fn contexts(&mut self, contexts: &BTreeSet<ContextName>) {
        self.count(contexts.len());
        for context in contexts {
            self.text(context.as_str().as_bytes());
        }
    }

    fn operations(&mut self, operations: &BTreeSet<Operation>) {
        self.count(operations.len());
        for operation in operations {
            self.byte(*operation as u8);
        }
    }
}

impl Row for Acl {
    const KIND: RowKind = RowKind::Acl;

    fn decode(version: u8, bytes: &[u8]) -> Result<Self, LoadError> {
        match version {
            1 => Ok(codec::decode::<AclV1>(bytes)?.into()),
            2 => Ok(codec::decode(bytes)?),
            other => Err(unknown_version(Self::KIND, other)),
        }
    }
}

/// What a revocation matches.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum RevocationKey {
    /// One certificate by issuer and serial (lower-case hex).
    Serial {
        /// Issuer's distinguished name.
        issuer: String,
        /// Serial number, lower-case hex without leading zeros.
        serial: String,
    },
    /// One certificate by SHA-256 of its DER.
    Fingerprint([u8; 32]),
    /// Every certificate of a CN (v1).
    CommonName(String),
}

impl RowKey for RevocationKey {
    fn encode(&self) -> Vec<u8> {
        match self {
            RevocationKey::Serial { issuer, serial } => {
                [b"s", serial.as_bytes(), &[0], issuer.as_bytes()].concat()
            }
            RevocationKey::Fingerprint(hash) => [b"f", hash.as_slice()].concat(),
            RevocationKey::CommonName(cn) => [b"c", cn.as_bytes()].concat(),
        }
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (kind, rest) = bytes.split_first()?;
        let text = |b: &[u8]| Some(std::str::from_utf8(b).ok()?.to_string());
        match kind {
            b's' => {
                let zero = rest.iter().position(|b| *b == 0)?;
                Some(Self::Serial {
                    serial: text(&rest[..zero])?,
                    issuer: text(&rest[zero + 1..])?,
                })
            }
            b'f' => Some(Self::Fingerprint(rest.try_into().ok()?)),
            b'c' => Some(Self::CommonName(text(rest)?)),
            _ => None,
        }
    }
}

/// A revocation. Added by files and by commands; lifting one is a command of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    /// Why, for people.
    pub reason: String,
    /// When.
    pub revoked_at: UnixMillis,
}

impl Row for Revocation {
    const KIND: RowKind = RowKind::Revocation;
}
