//! What openraft 0.9.25 lacks in its elections: a candidate that cannot win must not be in the way of one that can, and must not be
//! slowed down for good because it could not win once (`docs/decisions/003-timings-of-raft.md`).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use openraft::raft::{VoteRequest, VoteResponse};
use raft_store::Vote;
use raft_store::names::RaftId;

use super::shared::Shared;

/// Takes note of what a voter answered this candidate.
pub(super) fn answered(shared: &Arc<Shared>, asked: &VoteRequest<RaftId>, answer: &VoteResponse<RaftId>) {
    if !answer.vote_granted && answer.last_log_id > asked.last_log_id {
        tokio::spawn(back_off(Arc::clone(shared), asked.vote));
    }
    if is_outranked(asked, answer) {
        tokio::spawn(stand_again(Arc::clone(shared), answer.vote));
    }
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
/// without changes were seen). What the note is for, that the longer log comes first, [`back_off`] does, and it ends.
pub(super) fn without_log(answer: VoteResponse<RaftId>) -> VoteResponse<RaftId> {
    VoteResponse {
        last_log_id: None,
        ..answer
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::AtomicBool;
    use std::time::{Duration, Instant};

    use openraft::CommittedLeaderId;
    use openraft::raft::AppendEntriesResponse::{HigherVote, Success};
    use raft_store::LogId;

    use super::super::test_world::{World, until};
    use super::super::wire::{Request, Response};
    use super::*;

    /// A term that no election has reached.
    const FAR: u64 = 1 << 30;

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
}
