//! `LeaseInvocations`: a node asks for AES-GCM invocations, and may acknowledge the versions that it asks for with the
//! same entry: whoever has acknowledged a version can encrypt under it from the moment it is active. What it was given
//! is in the state, and nowhere else: no answer that is lost loses anything.

use serde::{Deserialize, Serialize};

use super::ack_versions::AckVersions;
use super::{ApplyContext, Bounded, Done, Refusal, require_self, standing_node};
use crate::names::{Boot, ContextName, KeyUid, RaftId};
use crate::state::ClusterState;
use crate::state::context::{VersionKey, VersionState};
use crate::state::lease::Ask;

/// Versions in one command: with names of any length less than a command may be.
pub const MAX_CLAIMS: usize = 400;

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LeaseInvocations {
    /// The node.
    pub node: RaftId,
    /// The run of its process. Another run has nothing of what this one is given.
    pub boot: Boot,
    /// The versions, at most [`MAX_CLAIMS`].
    pub claims: Vec<Claim>,
}

/// What a node says and asks of one version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The context.
    pub context: ContextName,
    /// The version.
    pub version: u32,
    /// Its key.
    pub key_uid: KeyUid,
    /// Whether this acknowledges that the node has imported and proven it, as [`AckVersions`] does.
    pub held: bool,
    /// What this run was given, as far as the node has seen. Compare and set: however often a request arrives, it is
    /// met once.
    pub seen: u64,
    /// How many invocations it asks for; none, to say no more than that it holds the version.
    pub count: u64,
}

impl LeaseInvocations {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_self(cx, self.node)?;
        let is_member = standing_node(state, self.node)?.is_member();
        Bounded::Claims.check(self.claims.len(), MAX_CLAIMS)?;
        let held = self.claims.iter().filter(|claim| claim.held);
        let ack = AckVersions {
            node: self.node,
            versions: held
                .map(|claim| (claim.context.clone(), claim.version, claim.key_uid))
                .collect(),
        };
        ack.apply(state, cx)?;
        // Who joins serves nobody yet.
        if is_member {
            for claim in &self.claims {
                self.lease(state, claim)?;
            }
        }
        Ok(Done::Ok)
    }

    fn lease(&self, state: &mut ClusterState, claim: &Claim) -> Result<(), Refusal> {
        let key = VersionKey {
            context: claim.context.clone(),
            version: claim.version,
        };
        // One that was retired, abandoned or replaced meanwhile is no error: the node will see that itself.
        let encrypts = state.versions.get(&key).is_some_and(|version| {
            version.key_uid == claim.key_uid
                && matches!(version.state, VersionState::Pending | VersionState::Active)
        });
        if !encrypts {
            return Ok(());
        }
        let before = state.lease(&key);
        let mut lease = before.clone();
        let ask = Ask {
            node: self.node,
            boot: self.boot,
            seen: claim.seen,
            count: claim.count,
        };
        lease.give(ask, state.max_invocations(&claim.context), state.members());
        if lease != before {
            state.leases.put(key, lease)?;
        }
        Ok(())
    }
}
