//! Joining: a node with a one-time token is registered, becomes a learner, receives state, imports and
//! proves every key, and only then votes. Every step can be repeated; a failed join never harms the cluster.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hsm_api::ErrorCode;
use raft_store::command::{Done, Op, Refusal, RegisterNode};
use raft_store::names::{ClusterId, NodeName, RaftId, SlotName};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::connection::Connection;
use super::shared::Shared;
use super::wire::{Hello, JoinDeclined, Request, Response};
use super::{Consensus, ProposeError, Role};
use crate::admin::call::CallError;

/// From the first call until this node votes.
const JOIN_WITHIN: Duration = Duration::from_secs(60);
/// Of that, finding a leader that answers.
const ASK_WITHIN: Duration = Duration::from_secs(15);
const ATTEMPT: Duration = Duration::from_secs(8);
const PAUSE: Duration = Duration::from_millis(200);
const TOKEN_PREFIX: &str = "hsm-join-1";

/// What an operator gives a node that shall join.
pub struct JoinRequest {
    /// The token's text.
    pub token: String,
    /// SHA-256 of the cluster CA's certificate, as `cluster token` printed it.
    pub cluster_ca_sha256: [u8; 32],
    /// Cluster addresses of members; any will do.
    pub addresses: Vec<String>,
    /// The slots this node is configured for.
    pub slots: Vec<SlotName>,
}

/// A finished join.
#[derive(Debug, Clone)]
pub struct Joined {
    /// This node's id.
    pub raft_id: RaftId,
    /// The cluster.
    pub cluster_id: ClusterId,
    /// Its part now.
    pub role: Role,
}

/// What a joining node says of itself to the leader.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct JoinDetails {
    number: u64,
    secret: [u8; 32],
    api_address: String,
    cluster_address: String,
    slots: Vec<SlotName>,
    /// Identifies its replication key; must be the cluster's.
    trk_id: [u8; 8],
}

/// The identity a joining node gets.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct JoinAccepted {
    raft_id: RaftId,
    cluster_id: ClusterId,
    epoch: u64,
}

/// The text of a join token: number and secret.
pub fn join_token_text(number: u64, secret: &[u8; 32]) -> String {
    format!("{TOKEN_PREFIX}.{number}.{}", hex::encode(secret))
}

fn parse_token(text: &str) -> Option<(u64, [u8; 32])> {
    let mut parts = text.trim().split('.');
    let (prefix, number, secret) = (parts.next()?, parts.next()?, parts.next()?);
    let secret = hex::decode(secret).ok()?.try_into().ok()?;
    (prefix == TOKEN_PREFIX && parts.next().is_none()).then_some((number.parse().ok()?, secret))
}

fn refuse(code: ErrorCode, detail: impl Into<String>) -> CallError {
    CallError {
        code,
        detail: detail.into(),
    }
}

impl Consensus {
    /// Joins the cluster the addresses belong to; returns once this node votes.
    ///
    /// # Errors
    /// `already_initialised`, `invalid_argument` (token, CA, slots, replication key), `conflict` (name
    /// taken), `outcome_unknown` (not a voter in time; the join goes on, ask again).
    pub async fn join(&self, request: JoinRequest) -> Result<Joined, CallError> {
        let deadline = Instant::now() + JOIN_WITHIN;
        let control = self.control().get();
        if control.raft_id == 0 {
            let accepted = self.ask_to_join(&request, Instant::now() + ASK_WITHIN).await?;
            let handle = self.control();
            let identity = accepted.clone();
            tokio::task::spawn_blocking(move || {
                handle.join_cluster(identity.cluster_id, identity.epoch, identity.raft_id)
            })
            .await
            .map_err(|e| refuse(ErrorCode::Internal, e.to_string()))?
            .map_err(|e| refuse(ErrorCode::Internal, e.to_string()))?;
        } else if self.view().role != Role::Learner && self.published().state.meta().is_some() {
            let detail = format!("this node belongs to cluster {} already", control.cluster_id);
            return Err(refuse(ErrorCode::AlreadyInitialised, detail));
        }
        let control = self.control().get();
        self.shared
            .start_raft(control.raft_id)
            .await
            .map_err(|e| refuse(ErrorCode::Internal, e))?;
        while Instant::now() < deadline {
            let role = self.view().role;
            let voter = self
                .published()
                .membership
                .voter_ids()
                .any(|id| id == control.raft_id);
            if voter && matches!(role, Role::Follower | Role::Leader) {
                return Ok(Joined {
                    raft_id: control.raft_id,
                    cluster_id: control.cluster_id,
                    role,
                });
            }
            tokio::time::sleep(PAUSE).await;
        }
        Err(refuse(
            ErrorCode::OutcomeUnknown,
            "registered as a learner, but not a voter yet: it has to receive the state and prove every key; see \
             /readyz?verbose on this node, and ask again",
        ))
    }

    async fn ask_to_join(&self, request: &JoinRequest, deadline: Instant) -> Result<JoinAccepted, CallError> {
        let Some((number, secret)) = parse_token(&request.token) else {
            return Err(refuse(
                ErrorCode::InvalidArgument,
                "the join token is malformed; copy it whole",
            ));
        };
        let options = &self.shared.options;
        let Some(tls) = &options.tls else {
            let detail =
                "cluster.listen: a standalone node cannot join; configure cluster.listen and cluster.tls";
            return Err(refuse(ErrorCode::InvalidArgument, detail));
        };
        if request.cluster_ca_sha256 != tls.ca_sha256 {
            let detail = format!(
                "cluster.tls.ca_path: its CA has SHA-256 {}, the token's cluster {}: install the cluster's CA here",
                hex::encode(tls.ca_sha256),
                hex::encode(request.cluster_ca_sha256)
            );
            return Err(refuse(ErrorCode::InvalidArgument, detail));
        }
        let mut addresses = request.addresses.clone();
        let mut last = refuse(ErrorCode::InvalidArgument, "no address of a member was given");
        loop {
            for address in addresses.clone() {
                let details = JoinDetails {
                    number,
                    secret,
                    api_address: options.api_advertise.clone(),
                    cluster_address: options.advertise.clone(),
                    slots: request.slots.clone(),
                    trk_id: [0; 8],
                };
                match self.ask_one(&address, details).await {
                    Ok(Ok(accepted)) => return Ok(accepted),
                    Ok(Err(JoinDeclined::Refused(error))) => return Err(error),
                    Ok(Err(JoinDeclined::NotLeader(Some(leader)))) if !addresses.contains(&leader) => {
                        addresses.insert(0, leader);
                        break;
                    }
                    Ok(Err(JoinDeclined::NotLeader(_))) => {
                        last = refuse(ErrorCode::NotLeader, format!("{address} does not lead"));
                    }
                    Ok(Err(JoinDeclined::TryAgain(why))) => last = refuse(ErrorCode::NoQuorum, why),
                    Err(why) => last = refuse(ErrorCode::NoQuorum, why),
                }
            }
            if Instant::now() + PAUSE > deadline || addresses.is_empty() {
                return Err(last);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// One attempt at one address, on the consensus runtime.
    async fn ask_one(
        &self,
        address: &str,
        mut details: JoinDetails,
    ) -> Result<Result<JoinAccepted, JoinDeclined>, String> {
        let shared = Arc::clone(&self.shared);
        let address = address.to_string();
        let asked = self.shared.runtime.spawn(async move {
            let mut connection = Connection::to_join(&shared.options, &address, &shared.hello())
                .await
                .map_err(|e| e.to_string())?;
            if connection.peer.cluster_id == ClusterId::default() {
                return Err(format!("{address} belongs to no cluster itself"));
            }
            details.trk_id = (shared.options.trk_id)(connection.peer.cluster_id);
            match connection.call(&Request::Join(Box::new(details)), ATTEMPT).await {
                Ok(Response::Join(answer)) => Ok(answer),
                Ok(_) => Err(format!("{address}: unexpected answer")),
                Err(error) => Err(error.to_string()),
            }
        });
        asked.await.map_err(|e| e.to_string())?
    }
}

impl Shared {
    /// The other side: a node asks to be registered.
    pub(super) async fn accept_join(
        self: &Arc<Self>,
        peer: &Hello,
        details: JoinDetails,
    ) -> Result<JoinAccepted, JoinDeclined> {
        let refused = |code, detail: String| {
            tracing::warn!(target: "audit", peer = peer.name, detail, "join refused");
            JoinDeclined::Refused(refuse(code, detail))
        };
        if !self.is_leader() {
            return Err(JoinDeclined::NotLeader(
                self.leader_address().map(|(_, address)| address),
            ));
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
        let needed = published.state.contexts().values().map(|context| &context.slot);
        let mut lacking = needed.filter(|slot| !details.slots.contains(slot));
        if let Some(slot) = lacking.next() {
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
        let id = raft_store::command::RequestId::Node {
            node: own,
            nonce: crate::clock::random_id(),
        };
        let origin = raft_store::command::Origin::Node(own);
        match self.propose(id, [0; 32], origin, op).await {
            Ok(Done::Registered { raft_id }) => {
                tracing::info!(target: "audit", peer = peer.name, raft_id, "node registered");
                Ok(JoinAccepted {
                    raft_id,
                    cluster_id: meta.cluster_id,
                    epoch: meta.epoch,
                })
            }
            Ok(_) => Err(JoinDeclined::TryAgain("unexpected outcome".into())),
            Err(ProposeError::Refused(refusal)) => {
                let code = match refusal {
                    Refusal::Exists(_) | Refusal::Conflict(_) => ErrorCode::Conflict,
                    Refusal::Forbidden(_) => ErrorCode::AccessDenied,
                    _ => ErrorCode::InvalidArgument,
                };
                Err(refused(code, refusal.to_string()))
            }
            Err(error) => Err(JoinDeclined::TryAgain(error.to_string())),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_its_text_and_a_cut_one_does_not_parse() {
        let text = join_token_text(7, &[9; 32]);
        assert_eq!(parse_token(&format!(" {text}\n")), Some((7, [9; 32])));
        for bad in [
            "",
            "hsm-join-1.7",
            &text[..text.len() - 2],
            &format!("{text}.x"),
            &text.replace("join-1", "join-2"),
        ] {
            assert_eq!(parse_token(bad), None, "{bad}");
        }
    }
}
