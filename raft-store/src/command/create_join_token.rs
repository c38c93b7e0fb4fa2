//! `CreateJoinToken`: a one-time token. Its secret is known to its maker only; state keeps the hash.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Conflict, Done, Invalid, Refusal, require_cluster};
use crate::names::{NodeName, UnixMillis};
use crate::state::ClusterState;
use crate::state::node::JoinToken;

/// Unused tokens kept at a time.
const MAX_TOKENS: usize = 256;

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CreateJoinToken {
    /// SHA-256 of the secret.
    pub secret_hash: [u8; 32],
    /// Good until then.
    pub expires_at: UnixMillis,
    /// If set, only for a node of this name.
    pub node: Option<NodeName>,
}

impl CreateJoinToken {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_cluster(state)?;
        if self.expires_at <= cx.at {
            return Err(Invalid::JoinTokenExpired.into());
        }
        // An expired token is of no use; a used one tells its node its id again until it expires.
        let expired: Vec<u64> = state
            .join_tokens
            .iter()
            .filter(|(_, t)| t.expires_at < cx.at)
            .map(|(number, _)| *number)
            .collect();
        for number in expired {
            state.join_tokens.remove(&number);
        }
        if state.join_tokens.len() >= MAX_TOKENS {
            let open = state.join_tokens.len() as u64;
            return Err(Conflict::OpenJoinTokens { open }.into());
        }
        state.join_tokens.put(
            cx.index,
            JoinToken {
                secret_hash: self.secret_hash,
                expires_at: self.expires_at,
                node: self.node.clone(),
                used_by: None,
            },
        )?;
        Ok(Done::JoinToken { number: cx.index })
    }
}
