//! Who may do what: contexts by organizational unit, roles by certificate, revocations.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::table::{Row, RowKey, RowKind};
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

/// Access control; one row.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acl {
    /// First OU → contexts it may use.
    pub mappings: BTreeMap<String, BTreeSet<ContextName>>,
    /// Role assignments.
    pub roles: Vec<RoleEntry>,
}

impl Row for Acl {
    const KIND: RowKind = RowKind::Acl;
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

/// A revocation. Only ever added; lifting one is a command of its own.
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
