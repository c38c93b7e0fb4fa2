//! openraft's view of the network. Making a client awaits nothing: openraft does it in its core loop.

use std::sync::Arc;
use std::time::Duration;

use openraft::error::{
    Fatal, NetworkError, RPCError, RaftError, ReplicationClosed, StreamingError, Unreachable,
};
use openraft::network::{RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
};
use raft_store::names::RaftId;
use raft_store::{MemberNode, Snapshot, TypeConfig, Vote};
use tokio::io::AsyncReadExt;

use super::connection::CallFailure;
use super::shared::Shared;
use super::wire::{AppendFrame, Request, Response, SNAPSHOT_CHUNK};

/// Longest time a snapshot transfer may go without a byte being taken.
const SNAPSHOT_PROGRESS: Duration = Duration::from_secs(10);

/// Makes clients.
pub(super) struct Network {
    pub(super) shared: Arc<Shared>,
}

/// A client of one peer.
pub(super) struct PeerClient {
    shared: Arc<Shared>,
    target: RaftId,
    address: String,
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = PeerClient;

    async fn new_client(&mut self, target: RaftId, node: &MemberNode) -> PeerClient {
        let address = self.shared.options.peer_address(node);
        PeerClient {
            shared: Arc::clone(&self.shared),
            target,
            address,
        }
    }
}

type RpcResult<T> = Result<T, RPCError<RaftId, MemberNode, RaftError<RaftId>>>;

fn rpc_error(failure: CallFailure) -> RPCError<RaftId, MemberNode, RaftError<RaftId>> {
    match failure {
        // openraft waits before it tries an unreachable peer again; after any other error it tries at once,
        // which against a closed port is thousands of times a second.
        CallFailure::Away { .. } | CallFailure::Io { .. } => {
            RPCError::Unreachable(Unreachable::new(&failure))
        }
        CallFailure::TimedOut { .. } => RPCError::Network(NetworkError::new(&failure)),
    }
}

fn unexpected(what: &str) -> NetworkError {
    NetworkError::new(&std::io::Error::other(what.to_string()))
}

impl PeerClient {
    async fn call(&self, request: &Request, option: &RPCOption) -> Result<Response, CallFailure> {
        let answer = self
            .shared
            .call(self.target, &self.address, request, option.hard_ttl())
            .await?;
        self.shared.note_peer(self.target);
        Ok(answer)
    }

    /// Waits until openraft's core has heard what was said before.
    ///
    /// openraft 0.9.25 ends a replication task when a peer answers with a higher vote; if the core, still busy
    /// with what that task had reported earlier, then wants to send it a snapshot, it takes the closed channel
    /// for a fault and stops the whole node ("replication channel closed", `raft_core.rs`). That is a leader
    /// under load whose partition heals. So the higher vote is held back for some rounds of the core's loop,
    /// in each of which it hears everything that has been reported; openraft's own time-out bounds it.
    async fn let_the_core_catch_up(&self) {
        const ROUNDS: usize = 3;
        for _ in 0..ROUNDS {
            let Some(running) = self.shared.raft.get() else {
                return;
            };
            if running.raft.with_raft_state(|_| ()).await.is_err() {
                return;
            }
        }
    }

    async fn send_snapshot(
        &self,
        vote: Vote,
        snapshot: Snapshot,
    ) -> Result<SnapshotResponse<RaftId>, NetworkError> {
        let io = |e: std::io::Error| NetworkError::new(&e);
        let net = |e: CallFailure| NetworkError::new(&e);
        let mut file = tokio::fs::File::open(&snapshot.snapshot.path).await.map_err(io)?;
        let mut connection = self
            .shared
            .connect(self.target, &self.address)
            .await
            .map_err(net)?;
        let mut request = Request::SnapshotBegin {
            vote,
            meta: snapshot.meta,
        };
        loop {
            match connection.call(&request, SNAPSHOT_PROGRESS).await.map_err(net)? {
                Response::More => {}
                Response::Snapshot(answer) => return Ok(answer),
                Response::Failed(why) => return Err(unexpected(&why)),
                _ => return Err(unexpected("unexpected answer to a snapshot")),
            }
            self.shared.note_peer(self.target);
            let mut chunk = Vec::with_capacity(SNAPSHOT_CHUNK);
            let read = (&mut file)
                .take(SNAPSHOT_CHUNK as u64)
                .read_to_end(&mut chunk)
                .await
                .map_err(io)?;
            request = if read == 0 {
                Request::SnapshotEnd
            } else {
                Request::SnapshotChunk(chunk)
            };
        }
    }
}

impl RaftNetwork<TypeConfig> for PeerClient {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<AppendEntriesResponse<RaftId>> {
        let now = std::time::Instant::now();
        let age = self.shared.quorum_ack_age(now);
        let quorum_ack_age_ms = age.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
        let frame = AppendFrame {
            rpc,
            quorum_ack_age_ms,
            silent: self.shared.silent_peers(now),
        };
        match self
            .call(&Request::Append(frame), &option)
            .await
            .map_err(rpc_error)?
        {
            Response::Append(answer @ AppendEntriesResponse::HigherVote(_)) => {
                self.let_the_core_catch_up().await;
                Ok(answer)
            }
            Response::Append(answer) => Ok(answer),
            Response::Failed(why) => Err(unexpected(&why).into()),
            _ => Err(unexpected("unexpected answer to AppendEntries").into()),
        }
    }

    async fn vote(&mut self, rpc: VoteRequest<RaftId>, option: RPCOption) -> RpcResult<VoteResponse<RaftId>> {
        match self.call(&Request::Vote(rpc), &option).await.map_err(rpc_error)? {
            Response::Vote(answer) => Ok(answer),
            Response::Failed(why) => Err(unexpected(&why).into()),
            _ => Err(unexpected("unexpected answer to a vote request").into()),
        }
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        _: RPCOption,
    ) -> Result<SnapshotResponse<RaftId>, StreamingError<TypeConfig, Fatal<RaftId>>> {
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            sent = self.send_snapshot(vote, snapshot) => sent.map_err(StreamingError::Network),
        }
    }

    fn backoff(&self) -> openraft::network::Backoff {
        openraft::network::Backoff::new(std::iter::repeat(Duration::from_millis(200)))
    }
}
