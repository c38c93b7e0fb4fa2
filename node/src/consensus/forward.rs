//! Calls that belong to the leader, made from any node. A call keeps its id while leadership moves, so
//! that repeating it is safe, until its deadline; then its outcome is unknown.

use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use raft_store::command::{Done, Op};
use raft_store::names::RaftId;
use raft_store::state::ClusterState;
use raft_store::state::node::NodeStatus;
use tokio::task::JoinError;

use super::ask::Unanswered;
use super::connection::CallFailure;
use super::repeat::{Pace, repeat};
use super::shared::Shared;
use super::wire::{Answered, Request, Response};
use super::{Consensus, ProposeError};
use crate::admin::call::{AdminCall, CallError, Executed};
use crate::clock;
use crate::seeded::bug;
use hsm_api::ErrorCode;

/// An administrator's call. An attempt takes longer than a rotation does.
const ADMIN_PACE: Pace = Pace {
    within: Duration::from_secs(15),
    attempt: Duration::from_secs(12),
    pause: Duration::from_millis(50),
    answered: Duration::from_millis(500),
};
/// A node's own operation; its driver tries again.
const OWN_ATTEMPT: Duration = Duration::from_secs(6);

impl Consensus {
    /// Runs an administrator's call on the leader. The caller sets `origin.via_node` and `hop` 0.
    ///
    /// # Errors
    /// The leader's answer, or `no_quorum`, `not_leader` once the deadline has passed; `outcome_unknown` if an
    /// attempt may have been done by then.
    pub async fn admin_call(&self, call: AdminCall) -> Result<Executed, CallError> {
        let answer = repeat(ADMIN_PACE, |within| self.shared.admin_attempt(&call, within)).await;
        answer.map_err(|error| match self.shared.leader_hint() {
            Some(leader) if error.code == ErrorCode::NotLeader => {
                CallError::new(error.code, format!("{}; {leader}", error.detail))
            }
            _ => error,
        })
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
            Ok(Response::Own(answer)) => answer.map_err(Into::into),
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
            Ok(Response::ReadIndex(answer)) => answer.map_err(Into::into),
            _ => Err(ProposeError::NoQuorum),
        }
    }
}

impl Shared {
    /// One attempt at an administrator's call, here or at the leader.
    async fn admin_attempt(
        self: &std::sync::Arc<Self>,
        call: &AdminCall,
        within: Duration,
    ) -> Result<Executed, CallError> {
        if self.raft.get().is_none() {
            return Err(ProposeError::Uninitialised.into());
        }
        if self.is_leader() {
            let (shared, call) = (std::sync::Arc::clone(self), call.clone());
            // In a task of its own: when the caller's time is up, what was proposed still has to get the leader's
            // line of the audit.
            let executed = tokio::spawn(async move { shared.execute_here(call).await });
            let ended = |error: JoinError| Err(CallError::new(ErrorCode::Internal, error.to_string()));
            return executed.await.unwrap_or_else(ended);
        }
        // The leader takes a call in somebody's name from a member only.
        if self.is_joining() {
            return Err(CallError::new(
                ErrorCode::NotReady,
                "this node has not joined yet: it has to prove every key first; ask a member",
            ));
        }
        let Some((leader, address)) = self.leader_address() else {
            return Err(CallError::new(
                ErrorCode::NoQuorum,
                "no leader is known; the cluster may have lost its quorum",
            ));
        };
        let request = Request::Admin(Box::new(AdminCall {
            hop: 1,
            ..call.clone()
        }));
        let unknown = |what: String| {
            CallError::new(
                ErrorCode::OutcomeUnknown,
                format!("{what}; {}", ProposeError::Unknown),
            )
        };
        match self.call_on_runtime(leader, address, request, within).await {
            Ok(Response::Admin(Ok(Answered { json, index }))) => serde_json::from_str(&json)
                .map(|answer| Executed { answer, index })
                .map_err(|error| unknown(format!("the leader's answer does not parse ({error})"))),
            Ok(Response::Admin(Err(error))) => Err(error),
            Err(Unanswered { sent: false, .. }) => Err(CallError::new(
                ErrorCode::NoQuorum,
                "the leader cannot be reached; the cluster may have lost its quorum",
            )),
            Ok(_) | Err(_) => Err(unknown("the leader did not answer".to_owned())),
        }
    }

    /// Executes an administrator's call on this node, which should lead.
    pub(super) async fn execute_here(&self, call: AdminCall) -> Result<Executed, CallError> {
        let not_leader = |detail: &str| Err(CallError::new(ErrorCode::NotLeader, detail));
        if !self.is_leader() {
            return not_leader("this node is not the leader");
        }
        // Asked again it is known who leads.
        let Ok(_in_hand) = self.calls_in_hand.try_read() else {
            return not_leader("this node is going to stop, and hands leadership over");
        };
        // Asking a quorum that is not there would only use up the caller's time.
        let lost = self
            .quorum_ack_age(clock::now())
            .is_none_or(|age| age > self.options.timing.election_max);
        if lost && !bug("bug::reads_without_read_index") {
            return Err(CallError {
                code: ErrorCode::NoQuorum,
                detail: ProposeError::NoQuorum.to_string(),
            });
        }
        let Some(calls) = self.calls.get() else {
            return Err(CallError {
                code: ErrorCode::NotReady,
                detail: "the node is starting".into(),
            });
        };
        let answer = calls.execute(call).await?;
        // openraft answers a proposal when it is applied here.
        let applied = self.published.load().applied;
        Ok(Executed {
            answer,
            index: applied.map_or(0, |id| id.index),
        })
    }

    pub(super) async fn read_index_here(&self) -> Result<u64, ProposeError> {
        // The question is sent as AppendEntries, which would tell the voters once more that they have a leader.
        if self.draining.load(Ordering::SeqCst) {
            return Err(ProposeError::Draining);
        }
        if self.paused.load(Ordering::SeqCst) {
            return Err(ProposeError::NotLeader { leader: None });
        }
        if let Some(shut) = self.gate.shut_by() {
            return Err(shut.into());
        }
        if bug("bug::reads_without_read_index") {
            return Ok(self.published.load().applied.map_or(0, |id| id.index));
        }
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

    /// Who leads and where its API is, for people; unless it is this node or unknown.
    fn leader_hint(&self) -> Option<String> {
        let leader = self.known_leader()?;
        let own = self.raft.get().map(|running| running.id);
        if own == Some(leader) {
            return None;
        }
        hint(&self.published.load().state, leader, own)
    }

    /// Whether the state has this node as one that has not proven its keys yet.
    fn is_joining(&self) -> bool {
        fail::fail_point!("forward::as_member", |_| false);
        let Some(running) = self.raft.get() else {
            return false;
        };
        let published = self.published.load();
        let node = published.state.nodes().get(&running.id);
        node.is_some_and(|node| node.status == NodeStatus::Joining)
    }

    /// A call to a member on the consensus runtime: connections belong to it.
    async fn call_on_runtime(
        self: &std::sync::Arc<Self>,
        target: RaftId,
        address: String,
        request: Request,
        within: Duration,
    ) -> Result<Response, Unanswered> {
        let shared = std::sync::Arc::clone(self);
        let called = address.clone();
        let task = self
            .runtime
            .spawn(async move { shared.ask(target, &address, &request, within).await });
        let answer = task.await.unwrap_or_else(|error| {
            // The task ended somewhere in the middle.
            Err(Unanswered {
                failure: CallFailure::Io {
                    address: called,
                    source: std::io::Error::other(error),
                },
                sent: true,
            })
        });
        if let Err(Unanswered { failure, .. }) = &answer {
            tracing::debug!(error = %failure, "call to the leader failed");
        }
        answer
    }
}

/// Who leads, for a client of `own`.
fn hint(state: &ClusterState, leader: RaftId, own: Option<RaftId>) -> Option<String> {
    let node = state.nodes().get(&leader)?;
    let own = own.and_then(|own| state.nodes().get(&own));
    let own = own.map(|own| own.api_address.as_str());
    Some(told(node.name.as_str(), &node.api_address, own))
}

/// A node that was founded alone keeps the address that it had then, which may be of no use on another machine. It is told
/// where this node's own is such a one too, as on a machine with all of them.
fn told(name: &str, address: &str, own: Option<&str>) -> String {
    if is_local(address) && !own.is_some_and(is_local) {
        return format!("{name} leads");
    }
    format!("{name} leads, its API is at {address}")
}

/// Whether an address (`host:port`) says nothing to whoever is on another machine.
fn is_local(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let is_own = |ip: IpAddr| ip.is_loopback() || ip.is_unspecified();
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(is_own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rotation::testing::World;

    #[test]
    fn a_leader_is_named_with_the_address_that_clients_use() {
        let world = World::new(1);
        let told = hint(&world.state, 1, None);
        assert_eq!(told.as_deref(), Some("n1 leads, its API is at a1"));
        assert_eq!(hint(&world.state, 9, None), None);
    }

    #[test]
    fn an_address_of_the_leaders_own_machine_is_for_those_on_it() {
        let local = "127.0.0.1:8443";
        for (own, expected) in [
            (None, "n leads"),
            (Some("node2.internal:8443"), "n leads"),
            (Some("127.0.0.1:8444"), "n leads, its API is at 127.0.0.1:8443"),
        ] {
            assert_eq!(told("n", local, own), expected);
        }
        for local in [
            "127.0.0.1:8443",
            "[::1]:8443",
            "localhost:8443",
            "0.0.0.0:8443",
            "[::]:8443",
        ] {
            assert!(is_local(local), "{local}");
        }
        for other in [
            "10.0.0.1:8443",
            "[2001:db8::1]:8443",
            "node1.internal:8443",
            "a1",
            "",
        ] {
            assert!(!is_local(other), "{other}");
        }
    }
}
