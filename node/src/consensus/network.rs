//! openraft's view of the network. Making a client awaits nothing: openraft does it in its core loop.

use std::sync::Arc;
use std::sync::atomic::Ordering;
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

/// Whether a candidate was refused because of another's candidacy, by a voter whose log is shorter than its own.
fn is_outranked(asked: &VoteRequest<RaftId>, answer: &VoteResponse<RaftId>) -> bool {
    !answer.vote_granted
        && !answer.vote.committed
        && answer.vote > asked.vote
        && answer.last_log_id < asked.last_log_id
}

/// So many times `election_max` a candidate that was refused for its shorter log does not stand by its timer: until whoever has the
/// longer one has let the lease run out, waited for its own timer, and done so once more if this candidacy was in its way.
const BACK_OFF: u32 = 3;

/// Keeps this node from standing for election by its timer, until it is dropped.
struct Unwilling(Arc<Shared>);

impl Unwilling {
    fn set(shared: &Shared, willing: bool) {
        if let Some(running) = shared.raft.get() {
            running.raft.runtime_config().elect(willing);
        }
    }

    fn begin(shared: &Arc<Shared>) -> Self {
        Self::set(shared, false);
        Self(Arc::clone(shared))
    }
}

impl Drop for Unwilling {
    fn drop(&mut self) {
        Self::set(&self.0, true);
    }
}

/// A refusal without the end of the refuser's log.
///
/// openraft 0.9.25 notes that somebody's log is longer than its own, and keeps the note until it stands for election by its own
/// timer: each election timeout of this node is longer by twice `election_max` until then, for hours and through the terms of other
/// leaders, even when the longest log is its own. With two such nodes left of three, nobody stands for 4.4 s and more (4.7 to 6.6 s
/// without changes were seen). What the note is for, that the longer log comes first, [`PeerClient::back_off`] does, and it ends.
fn without_log(answer: VoteResponse<RaftId>) -> VoteResponse<RaftId> {
    VoteResponse {
        last_log_id: None,
        ..answer
    }
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

    /// Leaves the next elections to those with longer logs, after this candidate was refused by one: it would raise the term under
    /// them again and again, and with a greater id outrank them each time. Over when somebody has been elected after `asked`.
    async fn back_off(shared: Arc<Shared>, asked: Vote) {
        // A further refusal of the same candidacy.
        let Ok(_turn) = shared.backing_off.try_lock() else {
            return;
        };
        let Some(running) = shared.raft.get() else {
            return;
        };
        let _unwilling = Unwilling::begin(&shared);
        let mut metrics = running.raft.metrics();
        let led = metrics.wait_for(|now| now.vote.committed && now.vote > asked);
        let _ = tokio::time::timeout(shared.options.timing.election_max * BACK_OFF, led).await;
    }

    /// Stands for election once more, a heartbeat after this candidate was refused because of one that could not win.
    ///
    /// Votes of one term are ordered by the candidate's id in openraft 0.9.25, and a candidate that is refused because its log is
    /// shorter keeps the vote that it gave itself. If its id is the greater one, it refuses the candidate with the longer log in
    /// turn, which takes over that vote and waits for a whole election timeout: the two that are left of three voters when their
    /// leader dies in the middle of a change. A term later the longer log wins. Where a third voter has elected somebody, he
    /// says so within a heartbeat, and nothing is done. It stands once, however many have refused.
    async fn stand_again(shared: Arc<Shared>, outranked_by: Vote) {
        tokio::time::sleep(shared.options.timing.heartbeat).await;
        let Some(running) = shared.raft.get() else {
            return;
        };
        let _turn = shared.standing_again.lock().await;
        // By the core: metrics come later, after the disk has taken a vote.
        let vote = running.raft.with_raft_state(|state| *state.vote_ref()).await;
        if !vote.is_ok_and(|vote| vote == outranked_by) || shared.draining.load(Ordering::SeqCst) {
            return;
        }
        tracing::info!(%outranked_by, "standing for election again: a candidate with a shorter log is in the way");
        if let Err(error) = running.raft.trigger().elect().await {
            tracing::warn!(%error, "raft has not stood for election again");
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
                if !answer.vote_granted && answer.last_log_id > asked.last_log_id {
                    tokio::spawn(Self::back_off(Arc::clone(&self.shared), asked.vote));
                }
                if is_outranked(&asked, &answer) {
                    tokio::spawn(Self::stand_again(Arc::clone(&self.shared), answer.vote));
                }
                Ok(without_log(answer))
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
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, AtomicUsize};
    use std::time::Instant;

    use openraft::raft::AppendEntriesResponse::{Conflict, HigherVote, Success};

    use openraft::CommittedLeaderId;
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

    #[test]
    fn a_candidate_is_outranked_by_another_candidacy_of_a_voter_with_a_shorter_log_only() {
        let at = |index| Some(LogId::new(CommittedLeaderId::new(4, 1), index));
        let asked = VoteRequest::new(Vote::new(5, 1), at(8));
        let refused = |vote, last| VoteResponse::new(vote, last, false);
        assert!(is_outranked(&asked, &refused(Vote::new(5, 2), at(7))));
        assert!(is_outranked(&asked, &refused(Vote::new(9, 2), None)));
        // That one wins, or has won.
        assert!(!is_outranked(&asked, &refused(Vote::new(5, 2), at(8))));
        assert!(!is_outranked(&asked, &refused(Vote::new(5, 2), at(9))));
        assert!(!is_outranked(&asked, &refused(Vote::new_committed(5, 2), at(7))));
        // It keeps to a leader that it had until now.
        assert!(!is_outranked(&asked, &refused(Vote::new_committed(4, 1), at(7))));
        assert!(!is_outranked(
            &asked,
            &VoteResponse::new(Vote::new(5, 1), at(7), true)
        ));
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

    /// A node that has led another voter, and was deposed by it; how that one answers votes is asked of `answer`, and what it was
    /// asked for is kept, with when.
    async fn deposed(
        world: &World,
        answer: impl Fn(&VoteRequest<RaftId>, RaftId) -> VoteResponse<RaftId> + Clone + Send + 'static,
    ) -> (RaftId, Arc<Mutex<Vec<(Vote, Instant)>>>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let id = world.register(&address).await;
        let asked: Arc<Mutex<Vec<(Vote, Instant)>>> = Arc::default();
        let deposed = Arc::new(AtomicBool::new(false));
        let (votes, later) = (Arc::clone(&asked), Arc::clone(&deposed));
        world.answering(listener, id, move |request| match request {
            Request::Append(_) if !later.load(Ordering::SeqCst) => Response::Append(Success),
            Request::Append(_) => Response::Append(HigherVote(Vote::new(FAR, id))),
            Request::Vote(rpc) => {
                votes.lock().unwrap().push((rpc.vote, Instant::now()));
                Response::Vote(answer(&rpc, id))
            }
            _ => Response::Failed("no part of this test".into()),
        });
        let raft = world.node.shared.raft.get().unwrap().raft.clone();
        // The membership driver makes it a learner, and then a voter.
        world.admitted(id).await;
        until("another voter", || {
            raft.metrics().borrow().membership_config.voter_ids().count() == 2
        })
        .await;
        deposed.store(true, Ordering::SeqCst);
        until("the higher vote", || {
            raft.metrics().borrow().vote.leader_id.term >= FAR
        })
        .await;
        (id, asked)
    }

    /// The other voter has stood for election first, with a shorter log and a greater id.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_longer_log_stands_again_long_before_its_election_timeout() {
        let world = World::with_timing("outranked", |timing| {
            timing.election_min = Duration::from_secs(60);
            timing.election_max = Duration::from_secs(61);
        })
        .await;
        let (id, asked) = deposed(&world, |rpc, id| {
            let own = Vote::new(rpc.vote.leader_id.term.max(FAR + 1), id);
            VoteResponse::new(own, None, false)
        })
        .await;
        let raft = world.node.shared.raft.get().unwrap().raft.clone();
        raft.trigger().elect().await.unwrap();
        until("a second candidacy", || asked.lock().unwrap().len() > 1).await;
        let asked = asked.lock().unwrap().clone();
        assert_eq!(asked[0].0.leader_id.term, FAR + 1);
        assert!(asked[1].0 > Vote::new(FAR + 1, id), "{asked:?}");
    }

    /// Else it would raise the term under the longer one for ever.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_shorter_log_leaves_the_next_elections_to_the_longer_one_for_a_while() {
        let world = World::new("shorter").await;
        let longer = LogId::new(CommittedLeaderId::new(FAR, 1), u64::MAX);
        let (_, asked) = deposed(&world, move |_, id| {
            VoteResponse::new(Vote::new(FAR, id), Some(longer), false)
        })
        .await;
        until("three candidacies", || asked.lock().unwrap().len() > 2).await;
        let asked = asked.lock().unwrap().clone();
        let least = world.node.shared.options.timing.election_max * 2;
        for pair in asked.windows(2) {
            let passed = pair[1].1.duration_since(pair[0].1);
            assert!(passed >= least, "it stood again after {passed:?}");
        }
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
