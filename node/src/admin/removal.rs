//! Nodes that leave, on the leader: an administrator's wish is judged, committed, and waited for. The membership driver
//! carries it out, on whichever leader: a request that is repeated finds what it began and waits on.

use std::collections::BTreeSet;

use hsm_api::ErrorCode;
use hsm_api::admin::{KeepNodeResponse, RemovalState, RemoveNodeResponse, TransferLeaderResponse};
use raft_store::command::{Conflict, Done, KeepNode, Op, Refusal, RemoveNode};
use raft_store::names::{NodeName, RaftId};
use raft_store::state::ClusterState;
use raft_store::state::node::{Node, NodeStatus};
use raft_store::storage::Published;
use tokio::time::Instant;

use super::call::CallError;
use super::views;
use crate::consensus::quorum::{self, majority};
use crate::rotation::Cluster;
use crate::rotation::cluster::{Waited, lost_lead, wait_leading};
use crate::rotation::plan::{Asked, Attempt};

/// What is wanted of a node.
#[derive(Clone, Debug)]
pub struct Leave<'a> {
    /// The node.
    pub node: &'a NodeName,
    /// Who takes its place.
    pub successor: Option<&'a NodeName>,
    /// Although an adopted key goes with it.
    pub lose_keys: bool,
    /// Only judge it.
    pub dry_run: bool,
}

/// What it works with.
pub struct Removal<'a> {
    /// Consensus.
    pub cluster: &'a dyn Cluster,
    /// Until when the caller waits.
    pub deadline: Instant,
}

impl Removal<'_> {
    /// Has a node leave, or finds that it does, and waits until it has. One that waits for its successor is not waited for:
    /// somebody has to make that join first.
    ///
    /// # Errors
    /// `not_found`, `node_removed`, `quorum_at_risk`, `conflict` (another one leaves, a successor that votes, an adopted key
    /// that would be lost), `outcome_unknown` while it has not left in time, and consensus.
    pub async fn leave(&self, wish: &Leave<'_>, asked: &Asked) -> Result<RemoveNodeResponse, CallError> {
        let published = self.cluster.published();
        let begun = |done: Done| match done {
            Done::Node { raft_id } => Some(raft_id),
            _ => None,
        };
        let attempt = match asked.attempt(&published.state, begun)? {
            Attempt::Settled(raft_id) => return self.gone(raft_id).await,
            Attempt::New(attempt) => attempt,
        };
        let (id, node) = find(&published.state, wish.node)?;
        self.judge(&published, id, node, wish)?;
        if wish.dry_run {
            return Ok(self.answer(&published, id, node, RemovalState::Possible));
        }
        let op = Op::RemoveNode(RemoveNode {
            node: id,
            successor: wish.successor.cloned(),
            lose_keys: wish.lose_keys,
        });
        let (request, origin) = (asked.id(attempt), asked.origin.clone());
        self.cluster.propose(request, asked.body_hash, origin, op).await?;
        tracing::info!(node = %wish.node, raft_id = id, "the node leaves the cluster");
        self.gone(id).await
    }

    /// Refuses what would leave no quorum, with the numbers. The state refuses the rest; a dry run asks it nothing, so that is
    /// found out here too.
    fn judge(
        &self,
        published: &Published,
        id: RaftId,
        node: &Node,
        wish: &Leave<'_>,
    ) -> Result<(), CallError> {
        let state = &published.state;
        let voters: BTreeSet<RaftId> = published.membership.voter_ids().collect();
        let other = state
            .nodes()
            .iter()
            .find(|(other, node)| **other != id && node.is_leaving());
        if let Some((_, other)) = other {
            let node = other.name.clone();
            return Err(Refusal::from(Conflict::NodeLeaves { node }).into());
        }
        let place = match wish.successor {
            None => None,
            Some(name) => {
                let known = state.node_named(name);
                let votes = known.is_some_and(|(id, _)| voters.contains(&id));
                if name == wish.node || votes {
                    let node = name.clone();
                    return Err(Refusal::from(Conflict::SuccessorVotes { node }).into());
                }
                match known {
                    Some((new, known)) if known.status == NodeStatus::Member => Some(new),
                    // It changes nothing before the successor is there; the driver judges then.
                    _ => return Ok(()),
                }
            }
        };
        if !voters.contains(&id) {
            return Ok(());
        }
        if place.is_none() && voters.len() == 1 {
            let node = node.name.clone();
            return Err(Refusal::from(Conflict::LastVoter { node }).into());
        }
        let heard = self.cluster.heard();
        if heard.is_empty() {
            // Only a leader hears anybody.
            return Err(lost_lead());
        }
        quorum::without(&voters, &heard, id, place).map_err(|why| {
            let mut silent: BTreeSet<RaftId> = voters.difference(&heard).copied().collect();
            silent.remove(&id);
            let names: Vec<String> = silent.iter().map(|id| views::node_name(state, *id)).collect();
            let remedy = if names.is_empty() {
                "let another node join first".to_owned()
            } else {
                format!(
                    "wait until {} answers and has caught up, or remove it instead",
                    names.join(", ")
                )
            };
            let detail = format!(
                "{} cannot leave now without breaking the quorum: {why}; {remedy}; nothing was changed",
                node.name
            );
            CallError::new(ErrorCode::QuorumAtRisk, detail)
        })
    }

    /// Waits until the node is a tombstone.
    async fn gone(&self, id: RaftId) -> Result<RemoveNodeResponse, CallError> {
        let ended = |published: &Published| {
            let node = published.state.nodes().get(&id)?;
            match &node.status {
                NodeStatus::Removed { .. } => Some(RemovalState::Removed),
                NodeStatus::Leaving {
                    successor: Some(name),
                    ..
                } => {
                    let known = published.state.node_named(name);
                    let joins = known.is_none_or(|(_, node)| node.status == NodeStatus::Joining);
                    joins.then_some(RemovalState::Waiting)
                }
                NodeStatus::Leaving { .. } => None,
                // Somebody has had it stay meanwhile.
                NodeStatus::Member | NodeStatus::Joining => Some(RemovalState::Kept),
            }
        };
        match wait_leading(self.cluster, self.deadline, ended).await {
            Waited::Met(RemovalState::Kept) => {
                let published = self.cluster.published();
                let name = views::node_name(&published.state, id);
                let detail =
                    format!("{name} was to leave, and was then kept (hsmctl cluster remove {name} --cancel)");
                Err(CallError::new(ErrorCode::Conflict, detail))
            }
            Waited::Met(state) => {
                let published = self.cluster.published();
                let node = published.state.nodes().get(&id).cloned();
                let node =
                    node.ok_or_else(|| CallError::new(ErrorCode::Internal, "a node without its row"))?;
                Ok(self.answer(&published, id, &node, state))
            }
            Waited::LostLead => Err(lost_lead()),
            Waited::Late => {
                let published = self.cluster.published();
                let name = views::node_name(&published.state, id);
                let voters: BTreeSet<RaftId> = published.membership.voter_ids().collect();
                let why = quorum::without(&voters, &self.cluster.heard(), id, None)
                    .err()
                    .filter(|_| voters.contains(&id))
                    .map(|why| format!(": {why}"))
                    .unwrap_or_default();
                Err(CallError::new(
                    ErrorCode::OutcomeUnknown,
                    format!(
                        "{name} is leaving and has not left yet{why}; it goes on by itself; ask again with the same \
                         Idempotency-Key, or keep it with: hsmctl cluster remove {name} --cancel"
                    ),
                ))
            }
        }
    }

    fn answer(
        &self,
        published: &Published,
        id: RaftId,
        node: &Node,
        state: RemovalState,
    ) -> RemoveNodeResponse {
        let voters: BTreeSet<RaftId> = published
            .membership
            .voter_ids()
            .filter(|voter| *voter != id)
            .collect();
        let heard = self.cluster.heard();
        let silent = voters.difference(&heard).count();
        let successor = match &node.status {
            NodeStatus::Leaving { successor, .. } => successor.as_ref().map(ToString::to_string),
            _ => None,
        };
        RemoveNodeResponse {
            node_id: node.name.to_string(),
            raft_id: id,
            state,
            successor,
            held: views::held_actively(&published.state, id),
            voters: u32::try_from(voters.len()).unwrap_or(u32::MAX),
            majority: u32::try_from(majority(voters.len())).unwrap_or(u32::MAX),
            failure_tolerance: views::failure_tolerance(voters.len(), silent),
        }
    }

    /// Has a node stay that was to leave.
    ///
    /// # Errors
    /// `not_found`, `node_removed`, `conflict` if it only joins, and consensus.
    pub async fn keep(&self, name: &NodeName, asked: &Asked) -> Result<KeepNodeResponse, CallError> {
        let published = self.cluster.published();
        let attempt = match asked.attempt(&published.state, |_| Some(()))? {
            Attempt::Settled(()) => None,
            Attempt::New(attempt) => Some(attempt),
        };
        let (id, _) = find(&published.state, name)?;
        if let Some(attempt) = attempt {
            let op = Op::KeepNode(KeepNode { node: id });
            let (request, origin) = (asked.id(attempt), asked.origin.clone());
            self.cluster.propose(request, asked.body_hash, origin, op).await?;
        }
        Ok(KeepNodeResponse {
            node_id: name.to_string(),
            raft_id: id,
        })
    }

    /// Has another node lead.
    ///
    /// # Errors
    /// `not_found`, `node_removed`, `conflict` (it does not vote, it is leaving, or the membership is being changed),
    /// `transfer_failed`.
    pub async fn transfer(
        &self,
        from: RaftId,
        to: Option<&NodeName>,
    ) -> Result<TransferLeaderResponse, CallError> {
        let published = self.cluster.published();
        let state = &published.state;
        let own = self.cluster.raft_id();
        let told = |leader: RaftId| TransferLeaderResponse {
            leader: views::node_name(state, leader),
            raft_id: leader,
            before: views::node_name(state, from),
        };
        let target = match to {
            None => None,
            Some(name) => {
                let (id, node) = find(state, name)?;
                if own == Some(id) {
                    return Ok(told(id));
                }
                // It would hand over again at once.
                if node.is_leaving() {
                    let detail = format!(
                        "{name} is leaving, and whoever leads has to stay: name another voter, or keep it with: hsmctl \
                         cluster remove {name} --cancel"
                    );
                    return Err(CallError::new(ErrorCode::Conflict, detail));
                }
                if !published.membership.voter_ids().any(|voter| voter == id) {
                    let detail = format!("{name} does not vote: only a voter can lead");
                    return Err(CallError::new(ErrorCode::Conflict, detail));
                }
                Some(id)
            }
        };
        // An answer that was lost: it has been done.
        if let (None, Some(own)) = (target, own.filter(|own| *own != from)) {
            return Ok(told(own));
        }
        if published.membership.voter_ids().count() < 2 {
            let detail = "the leader is the only voter: there is nobody to hand over to";
            return Err(CallError::new(ErrorCode::Conflict, detail));
        }
        if published.membership.membership().get_joint_config().len() > 1 {
            let detail = "a change of the membership is in progress; try again in a moment";
            return Err(CallError::new(ErrorCode::Conflict, detail));
        }
        let leader = self.cluster.transfer(target).await?;
        if target.is_some_and(|target| target != leader) {
            let leader = views::node_name(state, leader);
            let detail = format!("{leader} was elected instead; ask again for another");
            return Err(CallError::new(ErrorCode::TransferFailed, detail));
        }
        Ok(told(leader))
    }
}

/// The node of this name that belongs to the cluster.
fn find<'s>(state: &'s ClusterState, name: &NodeName) -> Result<(RaftId, &'s Node), CallError> {
    if let Some(found) = state.node_named(name) {
        return Ok(found);
    }
    // The newest of that name.
    let tombstones = state.nodes().iter().filter(|(_, node)| node.name == *name);
    let Some((id, _)) = tombstones.last() else {
        let detail = format!("no node is named {name}; hsmctl cluster members lists them");
        return Err(CallError::new(ErrorCode::NotFound, detail));
    };
    let held = views::held_actively(state, *id);
    let rotate = if held.is_empty() {
        String::new()
    } else {
        format!(
            "; it still holds the active versions of {}: rotate them",
            held.join(", ")
        )
    };
    let detail = format!("{name} (raft id {id}) was removed already{rotate}");
    Err(CallError::new(ErrorCode::NodeRemoved, detail))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "removal_tests.rs"]
mod tests;
