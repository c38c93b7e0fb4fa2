//! Founding a cluster: this node becomes its only voter. Safe to repeat after a crash at any step.

use std::collections::BTreeMap;
use std::time::Duration;

use hsm_api::ErrorCode;
use raft_store::MemberNode;
use raft_store::command::{CreateCluster, Op};
use raft_store::names::{ClusterId, RaftId};
use raft_store::state::access::RevocationKey;
use raft_store::state::frozen::AclV1;

use super::Consensus;
use crate::admin::call::CallError;
use crate::clock;

/// The founder's raft id. Others get the index of the entry that registers them, which is higher.
const FOUNDER: RaftId = 1;
/// An election of one takes a second at most.
const LEAD_WITHIN: Duration = Duration::from_secs(10);

/// What the founder's configuration brings in.
pub struct FoundSeed {
    /// First access control.
    pub acl: AclV1,
    /// First revocations with their reasons.
    pub revocations: Vec<(RevocationKey, String)>,
}

/// A founded cluster.
#[derive(Debug, Clone)]
pub struct Founded {
    /// Its identity.
    pub cluster_id: ClusterId,
    /// Its epoch.
    pub epoch: u64,
    /// This node's id in it.
    pub raft_id: RaftId,
}

fn internal(what: impl ToString) -> CallError {
    CallError {
        code: ErrorCode::Internal,
        detail: what.to_string(),
    }
}

impl Consensus {
    /// Founds a cluster with this node as its only voter.
    ///
    /// # Errors
    /// `already_initialised` if the node belongs to a cluster.
    pub async fn found(&self, seed: FoundSeed) -> Result<Founded, CallError> {
        let already = |what: String| CallError {
            code: ErrorCode::AlreadyInitialised,
            detail: what,
        };
        // Whoever joins or founds meanwhile waits, and then finds out.
        let _identity = self.shared.identity.lock().await;
        if let Some(meta) = self.published().state.meta() {
            return Err(already(format!(
                "this node belongs to cluster {} already",
                meta.cluster_id
            )));
        }
        let control = self.control().get();
        if control.raft_id != 0 && control.raft_id != FOUNDER {
            return Err(already(format!(
                "this node is joining cluster {}",
                control.cluster_id
            )));
        }
        let fresh = control.cluster_id == ClusterId::default();
        let cluster_id = if fresh {
            ClusterId(clock::random_id())
        } else {
            control.cluster_id
        };
        self.take_identity(cluster_id, 1, FOUNDER).await?;
        let running = self.shared.start_raft(FOUNDER).await.map_err(internal)?;
        if !running.raft.is_initialized().await.map_err(internal)? {
            let options = &self.shared.options;
            let member = MemberNode {
                name: options.node_name.to_string(),
                cluster_address: options.advertise.clone(),
            };
            running
                .raft
                .initialize(BTreeMap::from([(FOUNDER, member)]))
                .await
                .map_err(internal)?;
        }
        let lead = running
            .raft
            .wait(Some(LEAD_WITHIN))
            .state(openraft::ServerState::Leader, "founder leads")
            .await;
        lead.map_err(internal)?;
        self.propose_first(seed, cluster_id).await?;
        Ok(Founded {
            cluster_id,
            epoch: 1,
            raft_id: FOUNDER,
        })
    }

    async fn propose_first(&self, seed: FoundSeed, cluster_id: ClusterId) -> Result<(), CallError> {
        let options = &self.shared.options;
        let create = CreateCluster {
            cluster_id,
            name: options.cluster_name.clone(),
            trk_id: (options.trk_id)(cluster_id),
            founder: FOUNDER,
            founder_name: options.node_name.clone(),
            incarnation: self.control().get().incarnation,
            api_address: options.api_advertise.clone(),
            cluster_address: options.advertise.clone(),
            acl: seed.acl,
            revocations: seed.revocations,
        };
        let deadline = clock::now() + LEAD_WITHIN;
        loop {
            match self.propose_as_leader(Op::CreateCluster(create.clone())).await {
                Ok(_) => return Ok(()),
                // The metrics this node judges by lag its election by a moment.
                Err(super::ProposeError::NotLeader { .. } | super::ProposeError::NoQuorum)
                    if clock::now() < deadline =>
                {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(error) => return Err(internal(error)),
            }
        }
    }
}
