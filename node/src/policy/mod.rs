//! Who may do what, decided against one immutable snapshot of the replicated policy. Deciding
//! never waits, never asks another node and never changes anything; an unknown context and a
//! foreign one get the same answer.

mod grants;
mod revocations;

use std::collections::BTreeSet;
use std::sync::Arc;

use hsm_api::ErrorCode;
use raft_store::state::access::Operation;
pub use raft_store::state::access::{Acl, RevocationKey, Role, RoleEntry};

pub use self::grants::Grant;
use self::grants::Grants;
pub use self::revocations::Revocations;
use crate::config::{ContextName, RoleSeed};
use crate::identity::Principal;

/// All roles, the most powerful first.
pub const ROLES: [Role; 6] = [
    Role::Admin,
    Role::Operator,
    Role::Auditor,
    Role::Officer,
    Role::Backup,
    Role::Metrics,
];

/// A role's name in configuration, API and logs.
#[must_use]
pub const fn role_name(role: Role) -> &'static str {
    match role {
        Role::Admin => "admin",
        Role::Operator => "operator",
        Role::Auditor => "auditor",
        Role::Officer => "officer",
        Role::Backup => "backup",
        Role::Metrics => "metrics",
    }
}

/// Everything that can be done with a context.
pub const OPS: [Op; 4] = [Op::Encrypt, Op::Decrypt, Op::Rewrap, Op::DataKey];

/// What a client wants to do with a context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    /// `POST /encrypt`.
    Encrypt,
    /// `POST /decrypt`.
    Decrypt,
    /// `POST /rewrap`.
    Rewrap,
    /// `POST /datakey`.
    DataKey,
}

impl Op {
    /// The operation's name in logs and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Encrypt => "encrypt",
            Self::Decrypt => "decrypt",
            Self::Rewrap => "rewrap",
            Self::DataKey => "datakey",
        }
    }

    /// Its name in the replicated rules.
    #[must_use]
    pub const fn operation(self) -> Operation {
        match self {
            Self::Encrypt => Operation::Encrypt,
            Self::Decrypt => Operation::Decrypt,
            Self::Rewrap => Operation::Rewrap,
            Self::DataKey => Operation::DataKey,
        }
    }
}

/// Why something is refused. The text is for the operator; callers get what
/// [`crate::http::problem`] makes of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    /// The certificate is revoked.
    #[error("the certificate is revoked")]
    Revoked,
    /// The certificate has no organizational unit, so nothing can be allowed to it.
    #[error("the certificate has no organizational unit")]
    NoOu,
    /// No mapping names the unit, and no rule is about the certificate.
    #[error("organizational unit {0:?} is in no mapping")]
    UnknownOu(String),
    /// Neither the unit's mapping nor a rule allows the operation, or there is no such context.
    #[error("organizational unit {ou:?} may not {op} under context {context:?}")]
    Context {
        /// The caller's unit.
        ou: String,
        /// The context asked for, cut to a sensible length.
        context: String,
        /// The operation.
        op: &'static str,
    },
    /// None of the caller's roles suffices.
    #[error("needs one of the roles {required}; the caller has [{held}]")]
    Role {
        /// The roles that would do.
        required: String,
        /// The roles the caller has.
        held: String,
    },
}

impl Denial {
    /// The code of the answer.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Revoked => ErrorCode::CertificateRevoked,
            Self::NoOu => ErrorCode::NoOrganizationalUnit,
            Self::UnknownOu(_) => ErrorCode::UnknownOrganizationalUnit,
            Self::Context { .. } => ErrorCode::AccessDenied,
            Self::Role { .. } => ErrorCode::RoleRequired,
        }
    }
}

/// An immutable snapshot of the policy. Replaced as a whole, read through one load.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    rules: Arc<Rules>,
    /// Certificates that have nothing any more.
    pub revocations: Revocations,
}

/// What is made of the document of access control, once per change of it.
#[derive(Debug, Clone, Default)]
struct Rules {
    grants: Grants,
    /// Which certificates have a role.
    roles: Vec<RoleEntry>,
    /// Somebody has the role metrics, if only on another node.
    names_are_kept: bool,
}

/// How much of a context from a request is repeated in a log.
const SHOWN: usize = 80;

impl Policy {
    /// Takes a snapshot of access control and revocations.
    #[must_use]
    pub fn new(acl: &Acl, revocations: impl IntoIterator<Item = RevocationKey>) -> Self {
        Self::of(acl, revocations.into_iter().collect())
    }

    /// As [`Policy::new`], with revocations that are there already.
    #[must_use]
    pub fn of(acl: &Acl, revocations: Revocations) -> Self {
        let rules = Rules {
            grants: Grants::new(acl),
            roles: acl.roles.clone(),
            names_are_kept: acl.assigns(Role::Metrics),
        };
        Self {
            rules: Arc::new(rules),
            revocations,
        }
    }

    /// The same access control, with other revocations. Costs nothing.
    #[must_use]
    pub fn with_revocations(&self, revocations: Revocations) -> Self {
        Self {
            rules: Arc::clone(&self.rules),
            revocations,
        }
    }

    /// Leaves out the roles and rules that are bound to other issuers than these.
    pub fn keep_issuers(&mut self, known: &[String]) {
        let rules = Arc::make_mut(&mut self.rules);
        rules.roles.retain(|entry| known.contains(&entry.issuer));
        rules.grants.keep_issuers(known);
    }

    /// Which certificates have a role.
    #[must_use]
    pub fn roles(&self) -> &[RoleEntry] {
        &self.rules.roles
    }

    /// Whether a certificate may do anything at all.
    ///
    /// # Errors
    /// [`Denial::Revoked`].
    pub fn check_certificate(&self, principal: &Principal) -> Result<(), Denial> {
        if self.revocations.contains(principal) {
            Err(Denial::Revoked)
        } else {
            Ok(())
        }
    }

    /// Whether a caller could be allowed anything; known before a request is read.
    ///
    /// # Errors
    /// [`Denial::NoOu`] or [`Denial::UnknownOu`].
    pub fn unit(&self, principal: &Principal) -> Result<(), Denial> {
        let ou = principal.ou.as_deref().ok_or(Denial::NoOu)?;
        if self.rules.grants.knows(ou, principal) {
            return Ok(());
        }
        Err(Denial::UnknownOu(ou.to_owned()))
    }

    /// Whether a caller may do something with a context. Checks in v1's order, so that each refusal is the one
    /// v1 gave.
    ///
    /// # Errors
    /// The first thing that is missing.
    pub fn authorise(&self, principal: &Principal, context: &str, op: Op) -> Result<(), Denial> {
        self.grant(principal, context, op).map(drop)
    }

    /// As [`Policy::authorise`], and what allows it.
    ///
    /// # Errors
    /// The first thing that is missing.
    pub fn grant<'a>(&self, principal: &'a Principal, context: &str, op: Op) -> Result<Grant<'a>, Denial> {
        self.check_certificate(principal)?;
        let ou = principal.ou.as_deref().ok_or(Denial::NoOu)?;
        if let Some(grant) = self.rules.grants.find(ou, principal, context, op) {
            return Ok(grant);
        }
        self.unit(principal)?;
        Err(Denial::Context {
            ou: ou.to_owned(),
            context: context.chars().take(SHOWN).collect(),
            op: op.as_str(),
        })
    }

    /// The contexts a caller may do anything with; empty for a revoked or unknown one.
    #[must_use]
    pub fn contexts_of(&self, principal: &Principal) -> Vec<ContextName> {
        match &principal.ou {
            Some(ou) if !self.revocations.contains(principal) => {
                self.rules.grants.contexts(ou, principal).into_iter().collect()
            }
            _ => Vec::new(),
        }
    }

    /// The roles of a caller; empty for a revoked one.
    #[must_use]
    pub fn roles_of(&self, principal: &Principal) -> BTreeSet<Role> {
        if self.revocations.contains(principal) {
            return BTreeSet::new();
        }
        self.rules
            .roles
            .iter()
            .filter(|entry| matches(entry, principal))
            .map(|entry| entry.role)
            .collect()
    }

    /// Whether names of contexts and keys in `/metrics` and `/health` are for those who have a role.
    #[must_use]
    pub fn names_are_kept(&self) -> bool {
        self.rules.names_are_kept
    }

    /// Whether a caller reads names of contexts and keys in `/metrics` and `/health`. Everybody does, as in version 1,
    /// until somebody has the role metrics, which is for that; then it, and whoever may list the keys.
    #[must_use]
    pub fn reads_names(&self, principal: &Principal) -> bool {
        let readers = [Role::Metrics, Role::Operator, Role::Auditor];
        !self.rules.names_are_kept || self.require_role(principal, &readers).is_ok()
    }

    /// Whether a caller has one of some roles. An admin always does.
    ///
    /// # Errors
    /// [`Denial::Revoked`] or [`Denial::Role`].
    pub fn require_role(&self, principal: &Principal, required: &[Role]) -> Result<(), Denial> {
        self.check_certificate(principal)?;
        let held = self.roles_of(principal);
        if held.contains(&Role::Admin) || required.iter().any(|role| held.contains(role)) {
            return Ok(());
        }
        let names =
            |roles: &mut dyn Iterator<Item = Role>| roles.map(role_name).collect::<Vec<_>>().join(", ");
        Err(Denial::Role {
            required: names(&mut required.iter().copied()),
            held: names(&mut held.iter().copied()),
        })
    }
}

/// The issuer always, and every other part that the entry names.
fn matches(entry: &RoleEntry, principal: &Principal) -> bool {
    entry.issuer == principal.issuer_dn
        && entry
            .ou
            .as_ref()
            .is_none_or(|ou| principal.ou.as_ref() == Some(ou))
        && entry.cn.as_ref().is_none_or(|cn| *cn == principal.cn)
        && entry
            .spki_sha256
            .as_ref()
            .is_none_or(|spki| *spki == principal.spki_sha256)
}

/// Binds configured roles to an issuer, for `cluster init`.
#[must_use]
pub fn seed_roles(seeds: &[RoleSeed], default_issuer: &str) -> Vec<RoleEntry> {
    seeds
        .iter()
        .map(|seed| RoleEntry {
            role: seed.role,
            issuer: seed.issuer.clone().unwrap_or_else(|| default_issuer.to_owned()),
            ou: seed.ou.clone(),
            cn: seed.cn.clone(),
            spki_sha256: seed.spki_sha256,
        })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests;
