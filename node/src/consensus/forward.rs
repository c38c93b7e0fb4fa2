//! Calls that belong to the leader, made from any node. A call keeps its id while leadership moves, so
//! that repeating it is safe, until its deadline; then its outcome is unknown.

use std::time::{Duration, Instant};

use raft_store::command::{Done, Op};
use raft_store::names::RaftId;

use super::shared::Shared;
use super::wire::{Request, Response};
use super::{Consensus, ProposeError};
use crate::admin::call::{AdminCall, CallError};
use crate::clock;
use hsm_api::ErrorCode;

/// An administrator's call ends within this time.
const ADMIN_DEADLINE: Duration = Duration::from_secs(15);
/// One attempt at the leader; longer than a rotation takes.
const ADMIN_ATTEMPT: Duration = Duration::from_secs(12);
/// A node's own operation; its driver tries again.
const OWN_ATTEMPT: Duration = Duration::from_secs(6);
/// Between attempts while there is no leader.
const PAUSE: Duration = Duration::from_millis(50);

impl Consensus {
    /// Runs an administrator's call on the leader. The caller sets `origin.via_node` and `hop` 0.
    ///
    /// # Errors
    /// The leader's answer, or `no_quorum`, `not_leader`, `outcome_unknown` once the deadline has passed.
    pub async fn admin_call(&self, call: AdminCall) -> Result<serde_json::Value, CallError> {
        let deadline = Instant::now() + ADMIN_DEADLINE;
        let mut maybe_done = false;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let attempt = self.shared.admin_attempt(&call, left.min(ADMIN_ATTEMPT));
            let error = match tokio::time::timeout(left, attempt).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(Attempt::Final(error))) => return Err(error),
                Ok(Err(Attempt::Again { error, unknown })) => {
                    maybe_done |= unknown;
                    error
                }
                Err(_) => {
                    maybe_done = true;
                    CallError {
                        code: ErrorCode::OutcomeUnknown,
                        detail: ProposeError::Unknown.to_string(),
                    }
                }
            };
            if Instant::now() + PAUSE >= deadline {
                let unknown = CallError {
                    code: ErrorCode::OutcomeUnknown,
                    detail: ProposeError::Unknown.to_string(),
                };
                return Err(if maybe_done { unknown } else { error });
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Proposes as this node: here if it leads, else through the leader.
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub async fn propose_as_node(&self, op: Op) -> Result<Done, ProposeError> {
        let node = self.raft_id().ok_or(ProposeError::Uninitialised)?;
        let nonce = clock::random_id();
        if self.is_leader() {
            return self.shared.propose_for_member(node, nonce, op).await;
        }
        let (leader, address) = self
            .shared
            .leader_address()
            .ok_or(ProposeError::NotLeader { leader: None })?;
        let request = Request::Own {
            nonce,
            op: Box::new(op),
        };
        match self
            .shared
            .call_on_runtime(leader, address, request, OWN_ATTEMPT)
            .await
        {
            Some(Response::Own(answer)) => answer.map_err(Into::into),
            _ => Err(ProposeError::Unknown),
        }
    }

    /// The leader's commit index, confirmed by a quorum.
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub async fn read_index(&self) -> Result<u64, ProposeError> {
        if self.is_leader() {
            return self.shared.read_index_here().await;
        }
        let (leader, address) = self
            .shared
            .leader_address()
            .ok_or(ProposeError::NotLeader { leader: None })?;
        match self
            .shared
            .call_on_runtime(leader, address, Request::ReadIndex, Duration::from_secs(1))
            .await
        {
            Some(Response::ReadIndex(answer)) => answer.map_err(Into::into),
            _ => Err(ProposeError::NoQuorum),
        }
    }
}

/// How one attempt ended without success.
enum Attempt {
    Final(CallError),
    Again { error: CallError, unknown: bool },
}

fn again(code: ErrorCode, detail: impl ToString, unknown: bool) -> Attempt {
    Attempt::Again {
        error: CallError {
            code,
            detail: detail.to_string(),
        },
        unknown,
    }
}

fn judge(error: CallError) -> Attempt {
    match error.code {
        ErrorCode::NotLeader | ErrorCode::NoQuorum | ErrorCode::NodeDraining => Attempt::Again {
            error,
            unknown: false,
        },
        ErrorCode::OutcomeUnknown => Attempt::Again { error, unknown: true },
        _ => Attempt::Final(error),
    }
}

impl Shared {
    async fn admin_attempt(
        self: &std::sync::Arc<Self>,
        call: &AdminCall,
        within: Duration,
    ) -> Result<serde_json::Value, Attempt> {
        if self.raft.get().is_none() {
            let detail = ProposeError::Uninitialised.to_string();
            return Err(Attempt::Final(CallError {
                code: ErrorCode::Uninitialised,
                detail,
            }));
        }
        if self.is_leader() {
            return self.execute_here(call.clone()).await.map_err(judge);
        }
        let Some((leader, address)) = self.leader_address() else {
            return Err(again(
                ErrorCode::NoQuorum,
                "no leader is known; the cluster may have lost its quorum",
                false,
            ));
        };
        let request = Request::Admin(Box::new(AdminCall {
            hop: 1,
            ..call.clone()
        }));
        match self.call_on_runtime(leader, address, request, within).await {
            Some(Response::Admin(Ok(text))) => serde_json::from_str(&text).map_err(|e| {
                again(
                    ErrorCode::OutcomeUnknown,
                    format!("the leader's answer does not parse: {e}"),
                    true,
                )
            }),
            Some(Response::Admin(Err(error))) => Err(judge(error)),
            _ => Err(again(ErrorCode::NoQuorum, "the leader does not answer", true)),
        }
    }

    /// Executes an administrator's call on this node, which should lead.
    pub(super) async fn execute_here(&self, call: AdminCall) -> Result<serde_json::Value, CallError> {
        if !self.is_leader() {
            let detail = "this node is not the leader".to_string();
            return Err(CallError {
                code: ErrorCode::NotLeader,
                detail,
            });
        }
        // Asking a quorum that is not there would only use up the caller's time.
        if self
            .quorum_ack_age(Instant::now())
            .is_none_or(|age| age > self.options.timing.election_max)
        {
            return Err(CallError {
                code: ErrorCode::NoQuorum,
                detail: ProposeError::NoQuorum.to_string(),
            });
        }
        match self.calls.get() {
            Some(calls) => calls.execute(call).await,
            None => Err(CallError {
                code: ErrorCode::NotReady,
                detail: "the node is starting".into(),
            }),
        }
    }

    pub(super) async fn read_index_here(&self) -> Result<u64, ProposeError> {
        let running = self.raft.get().ok_or(ProposeError::Uninitialised)?;
        match tokio::time::timeout(self.options.timing.election_max, running.raft.get_read_log_id()).await {
            Ok(Ok((read, _))) => Ok(read.map_or(0, |id| id.index)),
            Ok(Err(_)) => Err(ProposeError::NotLeader {
                leader: self.known_leader(),
            }),
            Err(_) => Err(ProposeError::NoQuorum),
        }
    }

    /// The leader's id and cluster address, unless it is this node or unknown.
    pub(super) fn leader_address(&self) -> Option<(RaftId, String)> {
        let sample = self.metrics()?;
        let leader = sample.metrics.current_leader?;
        if self.raft.get().map(|running| running.id) == Some(leader) {
            return None;
        }
        let node = sample
            .metrics
            .membership_config
            .membership()
            .get_node(&leader)?
            .clone();
        Some((leader, self.options.peer_address(&node)))
    }

    /// A call to a member on the consensus runtime: connections belong to it.
    async fn call_on_runtime(
        self: &std::sync::Arc<Self>,
        target: RaftId,
        address: String,
        request: Request,
        within: Duration,
    ) -> Option<Response> {
        let shared = std::sync::Arc::clone(self);
        let task = self
            .runtime
            .spawn(async move { shared.call(target, &address, &request, within).await });
        match task.await {
            Ok(Ok(response)) => Some(response),
            Ok(Err(error)) => {
                tracing::debug!(%error, "call to the leader failed");
                None
            }
            Err(_) => None,
        }
    }
}
