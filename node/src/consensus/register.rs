//! The other side of a join: a leader registers the node that shows it a good token. Whoever has none leaves no
//! entry in the log.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hsm_api::ErrorCode;
use raft_store::command::{
    ApplyContext, Command, Done, Forbidden, Op, Origin, Outcome, Refusal, RegisterNode, RequestId, apply,
};
use raft_store::names::{NodeName, RaftId};
use raft_store::storage::Published;
use sha2::{Digest, Sha256};

use super::ProposeError;
use super::budget::Budget;
use super::join::{JoinAccepted, JoinDetails};
use super::shared::Shared;
use super::wire::{Hello, JoinDeclined};
use crate::admin::call::CallError;
use crate::clock;
use crate::rotation::clocks::Doubt;

/// Attempts of one node to join that a leader looks at: more than an honest one makes while it waits.
pub(super) fn attempts() -> Budget {
    Budget::new(100, Duration::from_secs(10))
}

impl Shared {
    /// The other side: a node asks to be registered.
    pub(super) async fn accept_join(
        self: &Arc<Self>,
        peer: &Hello,
        details: JoinDetails,
    ) -> Result<JoinAccepted, JoinDeclined> {
        let refused = |code, detail: String| {
            self.refuse(&peer.name, peer.raft_id, "join", &detail);
            JoinDeclined::Refused(CallError::new(code, detail))
        };
        if !self.is_leader() {
            return Err(JoinDeclined::NotLeader(
                self.leader_address().map(|(_, address)| address),
            ));
        }
        if self.joins.take(&peer.name, Instant::now()).is_none() {
            let why = "too many attempts of this node; wait a little";
            self.refuse(&peer.name, peer.raft_id, "join", why);
            return Err(JoinDeclined::TryAgain(why.into()));
        }
        let published = self.published.load_full();
        let Some(meta) = published.state.meta() else {
            return Err(JoinDeclined::TryAgain("the cluster is being founded".into()));
        };
        let name =
            NodeName::new(&peer.name).map_err(|e| refused(ErrorCode::InvalidArgument, e.to_string()))?;
        if details.trk_id != meta.trk_id {
            let what =
                "TOKEN_REPLICATION_KEY: the joining node's key is not the cluster's; give it the same key";
            return Err(refused(ErrorCode::InvalidArgument, what.into()));
        }
        let mut needed = published.state.slots_needed_by(None).into_iter();
        if let Some(slot) = needed.find(|slot| !details.slots.contains(slot)) {
            let what =
                format!("hsm.slots.{slot}: the cluster uses this slot and the joining node does not have it");
            return Err(refused(ErrorCode::InvalidArgument, what));
        }
        let op = Op::RegisterNode(RegisterNode {
            token: details.number,
            secret_hash: Sha256::digest(details.secret).into(),
            name,
            incarnation: peer.incarnation,
            api_address: details.api_address,
            cluster_address: details.cluster_address,
        });
        let own = self.raft.get().map_or(0, |running| running.id);
        let nonce = clock::random_id();
        let command = Command {
            id: RequestId::Node { node: own, nonce },
            body_hash: [0; 32],
            origin: Origin::Node(own),
            approvals: Vec::new(),
            at: clock::unix_millis(),
            op,
        };
        let code = |refusal: &Refusal| match refusal {
            Refusal::Exists(_) | Refusal::Conflict(_) => ErrorCode::Conflict,
            Refusal::Forbidden(_) => ErrorCode::AccessDenied,
            _ => ErrorCode::InvalidArgument,
        };
        // What has expired goes by this clock, in the entry too.
        match self.calls.get().map_or(Ok(()), |calls| calls.judge_clock()) {
            Ok(()) => {}
            Err(doubt @ Doubt::Apart { .. }) => {
                let error = CallError::from(doubt);
                return Err(refused(error.code, error.detail));
            }
            // That passes by itself.
            Err(doubt @ (Doubt::Unheard { .. } | Doubt::NotLeader)) => {
                return Err(JoinDeclined::TryAgain(doubt.to_string()));
            }
        }
        // Whoever has no good token must not make the log grow. That a token is unknown is certain only once
        // everything from before this leader's term is applied.
        if !self.has_caught_up(&published) {
            return Err(JoinDeclined::TryAgain("the leader is catching up".into()));
        }
        if let Outcome::Refused(refusal) = rehearse(&published, &command, own) {
            return Err(refused(code(&refusal), refusal.to_string()));
        }
        match self
            .propose(command.id, command.body_hash, command.origin, command.op)
            .await
        {
            Ok(Done::Registered { raft_id }) => {
                tracing::info!(target: "audit", epoch = crate::logging::epoch(), peer = peer.name, raft_id, "node registered");
                Ok(JoinAccepted {
                    raft_id,
                    cluster_id: meta.cluster_id,
                    epoch: meta.epoch,
                })
            }
            Ok(_) => Err(JoinDeclined::TryAgain("unexpected outcome".into())),
            Err(ProposeError::Refused(refusal)) => Err(refused(code(&refusal), refusal.to_string())),
            Err(error) => Err(JoinDeclined::TryAgain(error.to_string())),
        }
    }

    /// Whether the state forbids this to its origin. Only a leader that has applied everything from before its term
    /// can tell.
    pub(super) fn forbidden(&self, id: &RequestId, origin: &Origin, op: &Op) -> Option<Forbidden> {
        let published = self.published.load();
        if !self.is_leader() || !self.has_caught_up(&published) {
            return None;
        }
        let command = Command {
            id: id.clone(),
            body_hash: [0; 32],
            origin: origin.clone(),
            approvals: Vec::new(),
            at: clock::unix_millis(),
            op: op.clone(),
        };
        let own = self.raft.get().map_or(0, |running| running.id);
        match rehearse(&published, &command, own) {
            Outcome::Refused(Refusal::Forbidden(forbidden)) => Some(forbidden),
            _ => None,
        }
    }

    /// Whether an entry of this leader's own term is applied: all that was acknowledged before it is, then.
    fn has_caught_up(&self, published: &Published) -> bool {
        let applied = published.applied.map(|id| id.leader_id.term);
        let term = self.metrics().map(|sample| sample.metrics.current_term);
        applied.is_some() && applied == term
    }
}

/// What the state would answer to a command of this leader without an entry in the log. The entry decides all the
/// same.
fn rehearse(published: &Published, command: &Command, leader: RaftId) -> Outcome {
    let voters = published.membership.voter_ids().collect();
    let cx = ApplyContext {
        index: published.applied.map_or(0, |id| id.index).saturating_add(1),
        at: command.at,
        origin: &command.origin,
        leader,
        voters: &voters,
    };
    apply(&mut published.state.clone(), command, &cx)
}
