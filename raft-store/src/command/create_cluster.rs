//! `CreateCluster`: identity, founder and policy of a new cluster, seeded from the founder's configuration.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Bounded, Done, Existing, Refusal};
use crate::names::{ClusterId, Incarnation, NodeName, RaftId};
use crate::state::access::{Revocation, RevocationKey};
use crate::state::frozen::AclV1;
use crate::state::node::{MAX_ADDRESS, Node, NodeStatus};
use crate::state::{ClusterMeta, ClusterState, FIRST_FEATURE_LEVEL};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CreateCluster {
    /// Random identity.
    pub cluster_id: ClusterId,
    /// Name in the SANs of cluster certificates.
    pub name: String,
    /// Identifies the replication key.
    pub trk_id: [u8; 8],
    /// The founder's raft id.
    pub founder: RaftId,
    /// The founder's name.
    pub founder_name: NodeName,
    /// The founder's incarnation.
    pub incarnation: Incarnation,
    /// The founder's API address.
    pub api_address: String,
    /// The founder's cluster address.
    pub cluster_address: String,
    /// First access control.
    pub acl: AclV1,
    /// First revocations.
    pub revocations: Vec<(RevocationKey, String)>,
}

impl CreateCluster {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        if let Some(meta) = state.meta() {
            return Err(Existing::Cluster(meta.cluster_id).into());
        }
        for address in [&self.api_address, &self.cluster_address] {
            Bounded::Address.check(address.len(), MAX_ADDRESS)?;
        }
        state.meta.put(
            (),
            ClusterMeta {
                cluster_id: self.cluster_id,
                name: self.name.clone(),
                epoch: 1,
                feature_level: FIRST_FEATURE_LEVEL,
                trk_id: self.trk_id,
                created_at: cx.at,
            },
        )?;
        state.nodes.put(
            self.founder,
            Node {
                name: self.founder_name.clone(),
                incarnation: self.incarnation,
                api_address: self.api_address.clone(),
                cluster_address: self.cluster_address.clone(),
                status: NodeStatus::Member,
                slot_keys: BTreeMap::new(),
                registered_at: cx.at,
            },
        )?;
        state.acl.put((), self.acl.clone().into())?;
        for (key, reason) in &self.revocations {
            state.revocations.put(
                key.clone(),
                Revocation {
                    reason: reason.clone(),
                    revoked_at: cx.at,
                },
            )?;
        }
        Ok(Done::Ok)
    }
}
