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
use super::elections;
use super::shared::Shared;
use super::wire::{AppendFrame, Request, Response, SNAPSHOT_CHUNK};
use crate::clock;

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
        // That one has waited already.
        CallFailure::TimedOut { .. } => RPCError::Network(NetworkError::new(&failure)),
    }
}

/// What a replication task hears instead of a higher vote.
#[derive(Debug, thiserror::Error)]
#[error("the peer has seen a higher vote, {0}")]
struct HigherVoteSeen(Vote);

/// A peer that answers, but not as it should, is left alone for a moment too: its disk may be full.
fn unexpected(what: &str) -> Unreachable {
    Unreachable::new(&std::io::Error::other(what.to_string()))
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

    /// Tells openraft's core of a higher vote that the peer has answered with, so that this node steps down. That
    /// of a node without a say in who leads is ignored, and so is an absurd one.
    ///
    /// openraft 0.9.25 ends a replication task whose peer answers with a higher vote. If the core, which hears of
    /// the vote by a queue, first wants to send that task a snapshot, it takes the closed channel for a fault and
    /// stops the whole node ("replication channel closed", `raft_core.rs`): a leader under load whose partition
    /// heals. So no replication task ever gets to see a higher vote. The core is told as by a candidate: an
    /// AppendEntries without entries does to the vote what the task's own message would have done, and, having no
    /// previous log id and nothing committed, nothing to the log. It is told as uncommitted, which is all that the
    /// peer can vouch for: a node neither follows somebody because a third one says that he leads, nor takes the
    /// word for a sign of its leader's life. openraft asserts against an uncommitted vote there, in builds with
    /// its debug assertions only; ours has none (`Cargo.toml`).
    async fn tell_the_core(&self, vote: Vote) {
        let Some(running) = self.shared.raft.get() else {
            return;
        };
        // Its own later candidacy it knows.
        if vote.leader_id.voted_for() == Some(running.id) || !self.shared.has_a_say(self.target) {
            return;
        }
        if let Err(why) = self.shared.check_term(&vote) {
            let name = self.shared.name_of(self.target).unwrap_or_default();
            self.shared.refuse(&name, self.target, "higher vote", why);
            return;
        }
        let told = AppendEntriesRequest {
            vote: Vote {
                committed: false,
                ..vote
            },
            prev_log_id: None,
            entries: Vec::new(),
            leader_commit: None,
        };
        if let Err(error) = running.raft.append_entries(told).await {
            tracing::warn!(%error, %vote, "raft did not take note of a higher vote");
        }
    }

    /// Whatever it fails of, the next attempt has to wait: after any other error openraft begins a snapshot again at once,
    /// sends no heartbeats meanwhile, and so dials a peer that is down thousands of times a second.
    async fn send_snapshot(
        &self,
        vote: Vote,
        snapshot: Snapshot,
    ) -> Result<SnapshotResponse<RaftId>, Unreachable> {
        let io = |e: std::io::Error| Unreachable::new(&e);
        let net = |e: CallFailure| Unreachable::new(&e);
        let mut file = tokio::fs::File::open(&snapshot.snapshot.path).await.map_err(io)?;
        let mut connection = self
            .shared
            .connect(self.target, &self.address)
            .await
            .map_err(net)?;
        let loading = self.shared.loading.begin(self.target);
        let mut request = Request::SnapshotBegin {
            vote,
            meta: snapshot.meta,
        };
        loop {
            match connection.call(&request, SNAPSHOT_PROGRESS).await.map_err(net)? {
                Response::More => {}
                Response::Snapshot(answer) if answer.vote > vote => {
                    self.tell_the_core(answer.vote).await;
                    return Err(Unreachable::new(&HigherVoteSeen(answer.vote)));
                }
                Response::Snapshot(answer) => {
                    loading.taken();
                    return Ok(answer);
                }
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
        let now = clock::now();
        // One that is shut for good makes nobody fresh: who follows it would serve on.
        let shut = self.shared.gate.shut_by().is_some();
        let age = self.shared.quorum_ack_age(now).filter(|_| !shut);
        let quorum_ack_age_ms = age.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
        // A heartbeat says nothing of what the peer has.
        let has_entries = !rpc.entries.is_empty();
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
            Response::Append(AppendEntriesResponse::HigherVote(vote)) => {
                self.tell_the_core(vote).await;
                Err(RPCError::Unreachable(Unreachable::new(&HigherVoteSeen(vote))))
            }
            Response::Append(answer) => {
                if has_entries && matches!(answer, AppendEntriesResponse::Success) {
                    self.shared.loading.acknowledged(self.target);
                }
                Ok(answer)
            }
            Response::Failed(why) => Err(unexpected(&why).into()),
            _ => Err(unexpected("unexpected answer to AppendEntries").into()),
        }
    }

    async fn vote(&mut self, rpc: VoteRequest<RaftId>, option: RPCOption) -> RpcResult<VoteResponse<RaftId>> {
        let asked = rpc.clone();
        match self.call(&Request::Vote(rpc), &option).await.map_err(rpc_error)? {
            Response::Vote(answer) => {
                self.shared
                    .check_term(&answer.vote)
                    .map_err(|why| unexpected(&why))?;
                elections::answered(&self.shared, &asked, &answer);
                Ok(elections::without_log(answer))
            }
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
            sent = self.send_snapshot(vote, snapshot) => sent.map_err(StreamingError::Unreachable),
        }
    }

    fn backoff(&self) -> openraft::network::Backoff {
        openraft::network::Backoff::new(std::iter::repeat(Duration::from_millis(200)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use openraft::CommittedLeaderId;
    use openraft::raft::AppendEntriesResponse::{Conflict, HigherVote, Success};
    use raft_store::LogId;

    use super::super::Role;
    use super::super::test_world::{World, until};
    use super::*;

    /// A term that no election has reached.
    const FAR: u64 = 1 << 30;

    /// What a peer in a later term answers.
    fn later(term: u64, id: RaftId) -> impl Fn(Request) -> Response + Clone {
        let vote = Vote::new(term, id);
        move |request| match request {
            Request::Append(_) => Response::Append(HigherVote(vote)),
            Request::SnapshotEnd => Response::Snapshot(SnapshotResponse::new(vote)),
            Request::SnapshotBegin { .. } | Request::SnapshotChunk(_) => Response::More,
            _ => Response::Failed("no part of this test".into()),
        }
    }

    /// A client of a node in a later term, which is registered.
    async fn client(world: &World, term: u64) -> (RaftId, PeerClient) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let id = world.register(&address).await;
        world.answering(listener, id, later(term, id));
        let shared = Arc::clone(&world.node.shared);
        let member = MemberNode {
            name: world.hello(id).name,
            cluster_address: address,
        };
        (id, Network { shared }.new_client(id, &member).await)
    }

    async fn append(client: &mut PeerClient) {
        let rpc = AppendEntriesRequest {
            vote: Vote::new_committed(1, 1),
            prev_log_id: None,
            entries: vec![],
            leader_commit: None,
        };
        let option = RPCOption::new(Duration::from_secs(10));
        let answer = client.append_entries(rpc, option).await;
        assert!(matches!(answer, Err(RPCError::Unreachable(_))), "{answer:?}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_members_higher_vote_reaches_the_core_and_no_replication_task() {
        let world = World::new("deposer").await;
        let (id, mut client) = client(&world, FAR).await;
        // Nobody with a say yet: it may learn, and deposes nobody.
        for _ in 0..3 {
            append(&mut client).await;
        }
        assert_eq!(world.node.view().term, 1);
        world.admitted(id).await;
        append(&mut client).await;
        // It steps down, and stands again, as the only voter that it is.
        let leads_later = || world.node.view().term > FAR && world.node.view().role == Role::Leader;
        until("a later term", leads_later).await;
        assert!(!world.is_ended());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn so_does_one_that_answers_a_snapshot() {
        let world = World::new("snapper").await;
        let (id, mut client) = client(&world, FAR).await;
        let file = world.dir.path().join("snapshot");
        std::fs::write(&file, b"bytes").unwrap();
        let snapshot = || Snapshot {
            meta: raft_store::SnapshotMeta::default(),
            snapshot: Box::new(raft_store::SnapshotFile { path: file.clone() }),
        };
        for admit in [false, true] {
            if admit {
                world.admitted(id).await;
            }
            let option = RPCOption::new(Duration::from_secs(10));
            let never = std::future::pending::<ReplicationClosed>();
            let sent = client
                .full_snapshot(Vote::new_committed(1, 1), snapshot(), never, option)
                .await;
            assert!(matches!(sent, Err(StreamingError::Unreachable(_))), "{sent:?}");
            if !admit {
                assert_eq!(world.node.view().term, 1);
            }
        }
        until("a later term", || world.node.view().term > FAR).await;
        assert!(!world.is_ended());
    }

    /// Whatever it fails of, it is not begun again at once.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_peer_that_cannot_be_dialled_for_a_snapshot_is_unreachable() {
        let world = World::new("closed").await;
        // Nobody listens there.
        let address = "127.0.0.1:1".to_owned();
        let id = world.register(&address).await;
        let shared = Arc::clone(&world.node.shared);
        let member = MemberNode {
            name: world.hello(id).name,
            cluster_address: address,
        };
        let mut client = Network { shared }.new_client(id, &member).await;
        let (kept, gone) = (world.dir.path().join("snapshot"), world.dir.path().join("gone"));
        std::fs::write(&kept, b"bytes").unwrap();
        for path in [kept, gone] {
            let snapshot = Snapshot {
                meta: raft_store::SnapshotMeta::default(),
                snapshot: Box::new(raft_store::SnapshotFile { path }),
            };
            let option = RPCOption::new(Duration::from_secs(10));
            let never = std::future::pending::<ReplicationClosed>();
            let sent = client
                .full_snapshot(Vote::new_committed(1, 1), snapshot, never, option)
                .await;
            assert!(matches!(sent, Err(StreamingError::Unreachable(_))), "{sent:?}");
        }
    }

    /// openraft begins a snapshot again at once after any error but one.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_snapshot_that_is_not_taken_is_sent_again_after_a_pause() {
        const WATCHED: Duration = Duration::from_secs(2);
        let world = World::new("full").await;
        let raft = world.node.shared.raft.get().unwrap().raft.clone();
        raft.trigger().snapshot().await.unwrap();
        until("a snapshot", || raft.metrics().borrow().snapshot.is_some()).await;
        raft.trigger().purge_log(u64::MAX).await.unwrap();
        until("a purged log", || raft.metrics().borrow().purged.is_some()).await;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        // The membership driver makes it a learner.
        let id = world.register(&listener.local_addr().unwrap().to_string()).await;
        let begun = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&begun);
        world.answering(listener, id, move |request| match request {
            // What continues nothing cannot conflict.
            Request::Append(frame) if frame.rpc.prev_log_id.is_none() => Response::Append(Success),
            Request::Append(_) => Response::Append(Conflict),
            Request::SnapshotBegin { .. } => {
                count.fetch_add(1, Ordering::SeqCst);
                Response::Failed("no space left".into())
            }
            _ => Response::Failed("no part of this test".into()),
        });
        let times = || begun.load(Ordering::SeqCst);
        until("a snapshot that is refused", || times() > 0).await;
        let before = times();
        tokio::time::sleep(WATCHED).await;
        let more = times() - before;
        // One for each pause of 200 ms; fewer on a busy machine.
        assert!(more <= 15, "{more} attempts in {WATCHED:?}");
        let before = times();
        until("another attempt", || times() > before).await;
    }

    /// The note that a log was longer stays until the next candidacy by the timer, which then comes 2 × `election_max` later.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_refused_candidate_hears_nothing_of_the_longer_log_that_would_slow_all_its_elections_down() {
        let world = World::new("refused").await;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let id = world.register(&address).await;
        let last = Some(LogId::new(CommittedLeaderId::new(4, 1), 8));
        world.answering(listener, id, move |_| {
            Response::Vote(VoteResponse::new(Vote::new_committed(4, 1), last, false))
        });
        let shared = Arc::clone(&world.node.shared);
        let member = MemberNode {
            name: world.hello(id).name,
            cluster_address: address,
        };
        let mut client = Network { shared }.new_client(id, &member).await;
        let asked = VoteRequest::new(Vote::new(5, 1), None);
        let option = RPCOption::new(Duration::from_secs(10));
        let answer = client.vote(asked, option).await.unwrap();
        assert!(!answer.vote_granted);
        assert_eq!(
            (answer.vote, answer.last_log_id),
            (Vote::new_committed(4, 1), None)
        );
    }

    /// The last terms there are would end every election after them.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_absurd_term_is_not_believed_of_a_member_either() {
        let world = World::new("absurd").await;
        let (id, mut client) = client(&world, u64::MAX).await;
        world.admitted(id).await;
        append(&mut client).await;
        world.assert_audited(id, "higher vote", "is absurd");
        assert_eq!(world.node.view().term, 1);
        assert!(!world.is_ended());
    }
}
