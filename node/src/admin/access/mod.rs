//! Access control and revocations at run time: what administrators ask for, and what the leader does of it. The state
//! has the last word on each change; here is looked at what only a node can see: that the one who asks does not lock
//! himself out, and that no more is kept than can be.

pub mod document;
pub mod question;
pub mod revocations;
pub mod turns;

use hsm_api::ErrorCode;
use hsm_api::admin::SetAclResponse;
use raft_store::command::{AddRevocations, Conflict, Invalid, Op, Refusal, RemoveRevocations, SetAcl};
use raft_store::state::ClusterState;
use raft_store::state::access::{Acl, RevocationKey};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::authorise::Act;
use super::call::CallError;
use super::seed::Seed;
use super::seeding;
use crate::identity::Principal;
use crate::policy::{Policy, Revocations, Role};
use crate::rotation::Cluster;
use crate::rotation::plan::Asked;

/// Revocations that are kept. Each node holds all of them in memory, and looks each connection up among them.
pub const MAX_KEPT: usize = 50_000;

/// What is asked of access.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AccessBody {
    /// Other access control.
    SetAcl {
        /// Digest of what was read.
        expected: [u8; 32],
        /// What takes its place.
        acl: Acl,
    },
    /// Certificates that may do nothing any more.
    Revoke {
        /// What and why.
        revocations: Vec<(RevocationKey, String)>,
    },
    /// Certificates that may do again what they might.
    Unrevoke {
        /// What.
        revocations: Vec<RevocationKey>,
    },
}

/// How many revocations a call has changed.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// The others were as they should be already.
    pub changed: u64,
}

impl AccessBody {
    /// The operation an `Idempotency-Key` belongs to.
    #[must_use]
    pub fn operation(&self) -> &'static str {
        match self {
            Self::SetAcl { .. } => "acl",
            Self::Revoke { .. } => "revoke",
            Self::Unrevoke { .. } => "unrevoke",
        }
    }

    /// The act it is.
    #[must_use]
    pub fn act(&self) -> Act {
        match self {
            Self::SetAcl { .. } => Act::SetAcl,
            Self::Revoke { .. } => Act::Revoke,
            Self::Unrevoke { .. } => Act::Unrevoke,
        }
    }

    /// What it acts on, for the audit.
    #[must_use]
    pub fn target(&self) -> String {
        match self {
            Self::SetAcl { expected, acl } => {
                format!("{} becomes {}", brief(expected), brief(&acl.digest()))
            }
            Self::Revoke { revocations } => listed(revocations.iter().map(|(key, _)| key)),
            Self::Unrevoke { revocations } => listed(revocations.iter()),
        }
    }
}

/// Several, for the audit.
pub(crate) fn listed<'a>(mut keys: impl Iterator<Item = &'a RevocationKey>) -> String {
    let first = keys.next().map(revocations::text).unwrap_or_default();
    match keys.count() {
        0 => first,
        more => format!("{first} and {more} more"),
    }
}

/// Enough of a digest to find it again.
fn brief(digest: &[u8; 32]) -> String {
    hex::encode(&digest[..8])
}

/// Carries a call out, on the leader.
///
/// # Errors
/// What would lock the caller out, what is too much, what the state refuses, and consensus.
pub(super) async fn execute(
    cluster: &dyn Cluster,
    seed: &Seed,
    caller: &Principal,
    asked: &Asked,
    body: &AccessBody,
) -> Result<Value, CallError> {
    let published = cluster.published();
    let (op, answer) = match body {
        AccessBody::SetAcl { expected, acl } => {
            keeps_admin(acl, caller, seed)?;
            let op = SetAcl {
                expected_digest: *expected,
                acl: acl.clone(),
            };
            let digest = hex::encode(acl.digest());
            (Some(Op::SetAcl(op)), json(&SetAclResponse { digest })?)
        }
        AccessBody::Revoke { revocations } => {
            spares_caller(revocations.iter().map(|(key, _)| key), caller)?;
            let missing = seeding::missing(revocations, &published.state);
            has_room(&published.state, missing.len())?;
            let changed = missing.len() as u64;
            let op = (changed > 0).then_some(Op::AddRevocations(AddRevocations { revocations: missing }));
            (op, json(&Changed { changed })?)
        }
        AccessBody::Unrevoke { revocations } => {
            let known = published.state.revocations();
            let there: Vec<_> = revocations
                .iter()
                .filter(|key| known.contains(*key))
                .cloned()
                .collect();
            let changed = there.len() as u64;
            let op = (changed > 0).then_some(Op::RemoveRevocations(RemoveRevocations { revocations: there }));
            (op, json(&Changed { changed })?)
        }
    };
    if let Some(op) = op {
        let (id, origin) = (asked.id(0), asked.origin.clone());
        cluster.propose(id, asked.body_hash, origin, op).await?;
    }
    Ok(answer)
}

/// Refuses access control under which the caller would not be an administrator any more. Of nobody else is it known
/// that a certificate exists: whoever hands over lets the next one take the role away.
///
/// # Errors
/// `invalid_argument` if it has no administrator at all, `conflict` if the caller would be none.
pub fn keeps_admin(acl: &Acl, caller: &Principal, seed: &Seed) -> Result<(), CallError> {
    if !acl.assigns(Role::Admin) {
        return Err(Refusal::from(Invalid::NoAdmin).into());
    }
    let mut policy = Policy::new(acl, []);
    policy.keep_issuers(&seed.issuers);
    if policy.roles_of(caller).contains(&Role::Admin) {
        return Ok(());
    }
    let detail = format!(
        "roles.admin: your own certificate ({caller}, issuer {}) would not have the role admin any more, and of no \
         other one is it known that it exists; let the next administrator take it from you",
        caller.issuer_dn
    );
    Err(CallError::new(ErrorCode::Conflict, detail))
}

/// Refuses access control that somebody has changed since it was read, as the state would.
///
/// # Errors
/// `conflict`.
pub fn is_as_read(state: &ClusterState, expected: &[u8; 32]) -> Result<(), CallError> {
    let digest = state.acl().map_or_else(|| Acl::default().digest(), Acl::digest);
    if digest == *expected {
        return Ok(());
    }
    Err(Refusal::from(Conflict::OtherAcl { digest }).into())
}

/// Refuses to revoke the certificate that asks for it, or a CA that it hangs on: it could not take that back.
///
/// # Errors
/// `conflict`.
pub fn spares_caller<'a>(
    keys: impl Iterator<Item = &'a RevocationKey>,
    caller: &Principal,
) -> Result<(), CallError> {
    let revocations: Revocations = keys.cloned().collect();
    if !revocations.contains(caller) {
        return Ok(());
    }
    let detail = format!(
        "this would revoke the certificate that asks for it ({caller}), which could not take it back; ask with \
         another administrator's"
    );
    Err(CallError::new(ErrorCode::Conflict, detail))
}

fn has_room(state: &ClusterState, more: usize) -> Result<(), CallError> {
    let kept = state.revocations().len();
    if more == 0 || kept + more <= MAX_KEPT {
        return Ok(());
    }
    let detail = format!(
        "{kept} certificates are revoked, and {more} more would be over {MAX_KEPT}, which are kept; take those back \
         whose certificates have expired (hsmctl unrevoke)"
    );
    Err(CallError::new(ErrorCode::InvalidArgument, detail))
}

/// Refuses an argument, under its name.
pub(super) fn invalid(at: &str, problem: impl std::fmt::Display) -> CallError {
    CallError::new(ErrorCode::InvalidArgument, format!("{at}: {problem}"))
}

fn json<T: Serialize>(answer: &T) -> Result<Value, CallError> {
    serde_json::to_value(answer).map_err(|error| CallError::new(ErrorCode::Internal, error.to_string()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests;
