//! `RekeyReplication`: from now on everything is sealed under another replication key, which every node holds. What is
//! sealed under the one before is sealed anew by the leader (`ResealKeys`); until that is done, nodes need both.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Conflict, Done, Missing, Refusal, require_admin, require_nobody_leaves};
use crate::state::replication::{FormerKey, Replication, ReplicationKeyId};
use crate::state::{ClusterMeta, ClusterState};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RekeyReplication {
    /// The key that the proposer saw as the cluster's: compare and set.
    pub from: ReplicationKeyId,
    /// The key to take in its place.
    pub to: ReplicationKeyId,
}

impl RekeyReplication {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_admin(cx, "rekey_replication")?;
        let meta = state.meta().ok_or(Missing::Cluster)?.clone();
        if meta.trk_id != self.from || meta.trk_id == self.to {
            let current = meta.trk_id;
            return Err(Conflict::ReplicationKey { current }.into());
        }
        let known = state.replication().cloned().unwrap_or_default();
        if known.former.is_some() {
            return Err(Conflict::ResealOpen.into());
        }
        // Whoever has kept an old log could open what is sealed under it again.
        if known.is_retired(self.to) {
            return Err(Conflict::RetiredReplicationKey { id: self.to }.into());
        }
        if let Some((key, _)) = state.pending().next() {
            let (context, version) = (key.context.clone(), key.version);
            return Err(Conflict::Pending { context, version }.into());
        }
        require_nobody_leaves(state)?;
        // All of them, those that are away too: they could not start any more, or import nothing.
        let mut standing = state.nodes.iter().filter(|(_, node)| node.is_standing());
        if let Some((_, node)) = standing.find(|(id, _)| !state.replication_keys_of(**id).contains(&self.to))
        {
            let (node, id) = (node.name.clone(), self.to);
            return Err(Conflict::LacksReplicationKey { node, id }.into());
        }
        let former = FormerKey {
            id: self.from,
            since: cx.at,
        };
        let trk_id = self.to;
        state.meta.put((), ClusterMeta { trk_id, ..meta })?;
        let replaced = Replication {
            former: Some(former),
            since: Some(cx.at),
            ..known
        };
        state.replication.put((), replaced)?;
        Ok(Done::ReplicationRekey {
            key: self.to,
            former: self.from,
        })
    }
}
