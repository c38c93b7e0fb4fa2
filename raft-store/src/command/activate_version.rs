//! `ActivateVersion`: a rotation's second phase. One entry retires the old version and activates the new.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::stamp::stamp;
use super::{ApplyContext, Conflict, Done, Missing, Refusal};
use crate::names::{ContextName, RaftId};
use crate::seeded::bug;
use crate::state::ClusterState;
use crate::state::context::{Context, KeyVersion, VersionKey, VersionState};
use crate::state::lease::VersionLease;

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ActivateVersion {
    /// The context.
    pub context: ContextName,
    /// The pending version.
    pub version: u32,
    /// Voters that have not acknowledged but were silent long enough to have taken themselves out of
    /// service; they come back only through the start gate.
    pub left_out: BTreeSet<RaftId>,
}

impl ActivateVersion {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        let key = VersionKey {
            context: self.context.clone(),
            version: self.version,
        };
        let done = Done::Version {
            context: self.context.clone(),
            version: self.version,
        };
        let (Some(context), Some(version)) = (state.contexts.get(&self.context), state.versions.get(&key))
        else {
            let (context, version) = (self.context.clone(), self.version);
            return Err(Missing::Version { context, version }.into());
        };
        let (context, version) = (Context::clone(context), KeyVersion::clone(version));
        if version.state == VersionState::Active {
            return Ok(done);
        }
        if !version.state.may_become(VersionState::Active) {
            return Err(Conflict::VersionState {
                context: self.context.clone(),
                version: self.version,
                state: version.state,
            }
            .into());
        }
        // The proposer chose whom to leave out; that a majority holds the key is not its choice.
        let holders = cx.voters.intersection(&version.acks).count();
        let accounted = |voter: &RaftId| version.acks.contains(voter) || self.left_out.contains(voter);
        // A member that does not vote yet counts too: it may be serving the moment after.
        let members = state
            .nodes
            .iter()
            .filter(|(_, node)| node.is_member())
            .map(|(id, _)| id);
        let held = holders * 2 > cx.voters.len() && cx.voters.iter().chain(members).all(accounted);
        if !held && !bug("bug::activate_before_import") {
            return Err(Conflict::Holders {
                context: self.context.clone(),
                version: self.version,
                holders: holders as u64,
                voters: cx.voters.len() as u64,
            }
            .into());
        }
        let at = stamp(state, cx);
        if let Some(old) = context.active_version {
            let old_key = VersionKey {
                context: self.context.clone(),
                version: old,
            };
            if let Some(retired) = state.versions.get(&old_key) {
                let retired = KeyVersion {
                    state: VersionState::DecryptOnly,
                    ended_at: Some(at),
                    ..KeyVersion::clone(retired)
                };
                state.versions.put(old_key.clone(), retired)?;
                // It is encrypted under no more: the sum stays, who had what is of no more use.
                if let Some(lease) = state.leases.get(&old_key).filter(|lease| !lease.nodes.is_empty()) {
                    let closed = VersionLease {
                        nodes: BTreeMap::new(),
                        ..VersionLease::clone(lease)
                    };
                    state.leases.put(old_key, closed)?;
                }
            }
        }
        state.versions.put(
            key,
            KeyVersion {
                state: VersionState::Active,
                activated_at: Some(at),
                ..version
            },
        )?;
        state.contexts.put(
            self.context.clone(),
            Context {
                active_version: Some(self.version),
                ..context
            },
        )?;
        Ok(done)
    }
}
