//! `ReportReplicationKeys`: a node says which replication keys it has, by their public ids. It does when it has another
//! one than the cluster's, and once it has not any more: a cluster in which nothing is replaced hears of none.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Bounded, Done, Missing, Refusal, require_self, standing_node};
use crate::names::RaftId;
use crate::state::ClusterState;
use crate::state::replication::{Replication, ReplicationKeyId};

/// Replication keys of one node: the cluster's, and the one before it or after it.
const MAX_HELD: usize = 2;

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReportReplicationKeys {
    /// The node.
    pub node: RaftId,
    /// What it holds.
    pub held: BTreeSet<ReplicationKeyId>,
}

impl ReportReplicationKeys {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_self(cx, self.node)?;
        standing_node(state, self.node)?;
        let trk_id = state.meta().ok_or(Missing::Cluster)?.trk_id;
        Bounded::ReplicationKeys.check(self.held.len(), MAX_HELD)?;
        let known = state.replication().cloned().unwrap_or_default();
        let mut held = known.held.clone();
        // Nobody speaks for whoever was removed: what it had it knows for as long as that is in use, or may come into use.
        held.retain(|node, keys| {
            standing_node(state, *node).is_ok() || keys.iter().any(|key| !known.is_retired(*key))
        });
        if self.held == BTreeSet::from([trk_id]) {
            held.remove(&self.node);
        } else {
            held.insert(self.node, self.held.clone());
        }
        if held != known.held {
            state.replication.put((), Replication { held, ..known })?;
        }
        Ok(Done::Ok)
    }
}
