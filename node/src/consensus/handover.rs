//! Handing leadership over: before a leader stops, so that the others need not first miss it, or because somebody wants
//! another one to lead. openraft 0.9
//! has no transfer of its own: the node that has the whole log is asked to stand for election.
//!
//! A leader that stops does it first of all, and lets the calls end that it has in hand before: their callers would hear that
//! the outcome is unknown. Those that come meanwhile wait at the node that they were sent to (`forward`).
//!
//! Voters refuse a candidate while they hear from a leader. Of three voters the old leader's own vote and
//! the candidate's are enough; with more, heartbeats stop first, until the others no longer wait for them.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hsm_api::ErrorCode;
use openraft::ServerState;
use raft_store::names::RaftId;
use tokio::sync::MutexGuard;

use super::Consensus;
use super::shared::{MAX_IN_FLIGHT, Metrics, Sample, Shared};
use super::wire::{Request, Response};
use crate::admin::call::CallError;
use crate::clock;
use crate::seeded::bug;

/// Until the calls that a leader has in hand have ended, once it stops. Those that wait meanwhile are given up after 15 s
/// (`forward`), and the next leader needs some of that.
const CALLS_END: Duration = Duration::from_secs(5);
/// Between two attempts of a leader that stops: changes wait during each.
const AGAIN: Duration = Duration::from_secs(5);
/// Until what is being appended has been answered.
const SETTLE: Duration = Duration::from_secs(1);
/// Until a follower has the whole log; nothing is appended meanwhile.
const CATCH_UP: Duration = Duration::from_secs(1);
/// Until one of the voters that are asked has said that it stands for election.
const STANDS: Duration = Duration::from_millis(2500);
/// Until one voter has answered, and until the candidate leads.
const TAKE_OVER: Duration = Duration::from_secs(1);
/// Largest number of voters of which two are a majority.
const SMALL: usize = 3;

impl Consensus {
    /// Hands leadership over, if this node leads others, because it is going to stop: it serves on meanwhile, and as a
    /// follower afterwards. Calls that it has in hand end first, for some seconds at most. From here on it does not stand for
    /// election when a leader asks it to.
    pub async fn hand_over_first(&self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        if !self.shared.leads_others() {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let handed = self.shared.runtime.spawn(async move {
            // Whoever waits for this keeps further calls from beginning, and so does whoever has it.
            let mut nothing_in_hand = pin!(shared.calls_in_hand.write());
            let ended = tokio::time::timeout(CALLS_END, nothing_in_hand.as_mut()).await;
            if ended.is_err() {
                tracing::warn!(
                    seconds = CALLS_END.as_secs(),
                    "calls are still in hand: their outcome is left to whoever leads next"
                );
            }
            // Another hand-over ends first, whatever comes of it.
            let turn = shared.handing_over.lock().await;
            shared.transfer_in_turn(None, &turn).await
        });
        let why = match tokio::time::timeout(CALLS_END + most(&self.shared), handed).await {
            Ok(Ok(Ok(_))) => return,
            Ok(Ok(Err(why))) => why,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "consensus does not answer".to_owned(),
        };
        if self.shared.is_leader() {
            tracing::warn!(
                why,
                "leadership not handed over yet: tried again while connections end"
            );
        }
    }

    /// Tries it again as often as this node leads: because it could not hand over, or was elected since. Never ends.
    pub async fn go_on_handing_over(&self) {
        loop {
            tokio::time::sleep(AGAIN).await;
            self.hand_over_first().await;
        }
    }

    /// Stops proposing, for good, and hands leadership over if this node leads still. Tried once: a node that is
    /// stopping does not wait for a cluster that cannot agree. The process has to end after it, whatever came of
    /// it: a leader that proposes nothing keeps another from being elected.
    pub async fn step_down(&self) {
        self.shared.draining.store(true, Ordering::SeqCst);
        let shared = Arc::clone(&self.shared);
        let handed = self.shared.runtime.spawn(async move {
            // One that an administrator asked for, or an attempt of its own before, ends first, whatever comes of it.
            let _turn = shared.handing_over.lock().await;
            shared.hand_over(None).await
        });
        // A disk that hangs holds the consensus thread, and must not hold the process.
        let why = match tokio::time::timeout(most(&self.shared), handed).await {
            Ok(Ok(Ok(None))) => return,
            Ok(Ok(Ok(Some(to)))) => return tracing::info!(to, "leadership handed over"),
            Ok(Ok(Err(why))) => why,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "consensus does not answer".to_owned(),
        };
        tracing::warn!(
            why,
            "leadership not handed over: the others elect after a time-out"
        );
    }

    /// Hands leadership over without stopping: to `to`, or to the voter that is best. This node follows then; if it comes
    /// to nothing, it goes on leading.
    ///
    /// # Errors
    /// `not_leader`, `node_draining`, or `transfer_failed`: nobody else leads, or it is not known yet who does.
    pub async fn transfer(&self, to: Option<RaftId>) -> Result<RaftId, CallError> {
        let shared = Arc::clone(&self.shared);
        if shared.draining.load(Ordering::SeqCst) {
            return Err(super::ProposeError::Draining.into());
        }
        // In a task of its own: half of it must not be left undone when the caller goes away.
        let handed = self
            .shared
            .runtime
            .spawn(async move { shared.transfer(to).await });
        let failed = |why: String| CallError::new(ErrorCode::TransferFailed, why);
        match tokio::time::timeout(most(&self.shared), handed).await {
            Ok(Ok(Ok(Some(leader)))) => Ok(leader),
            Ok(Ok(Ok(None))) => Err(super::ProposeError::NotLeader {
                leader: self.shared.known_leader(),
            }
            .into()),
            Ok(Ok(Err(why))) => Err(failed(format!(
                "leadership was not handed over: {why}; this node goes on leading unless another was elected"
            ))),
            Ok(Err(error)) => Err(CallError::new(ErrorCode::Internal, error.to_string())),
            Err(_) => Err(failed("consensus does not answer; look who leads".to_owned())),
        }
    }
}

/// The longest that a hand-over takes.
fn most(shared: &Shared) -> Duration {
    SETTLE + CATCH_UP + STANDS + TAKE_OVER + 3 * lease_and_tick(shared)
}

/// While this is there, nothing is appended. Heartbeats are sent again when it goes, whatever came of the hand-over: a
/// node that led without them later would be deposed at once.
struct Paused(Arc<Shared>);

impl Paused {
    fn begin(shared: &Arc<Shared>) -> Self {
        shared.paused.store(true, Ordering::SeqCst);
        Self(Arc::clone(shared))
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        if let Some(running) = self.0.raft.get()
            && !bug("bug::heartbeats_stay_off")
        {
            running.raft.runtime_config().heartbeat(true);
        }
        self.0.paused.store(false, Ordering::SeqCst);
    }
}

/// The lease that voters give a leader, and one tick.
fn lease_and_tick(shared: &Shared) -> Duration {
    let timing = shared.options.timing;
    timing.election_max + timing.heartbeat * 3 / 2
}

/// The followers that vote and have the log up to `last`.
fn up_to_date(own: RaftId, metrics: &Metrics, last: u64) -> BTreeSet<RaftId> {
    let voters: BTreeSet<RaftId> = metrics.membership_config.voter_ids().collect();
    let Some(replication) = &metrics.replication else {
        return BTreeSet::new();
    };
    let matched = |id: &RaftId| replication.get(id).copied().flatten().map(|at| at.index);
    let whole = |id: &RaftId| matched(id) >= Some(last);
    voters.into_iter().filter(|id| *id != own && whole(id)).collect()
}

impl Shared {
    /// Hands over and goes on, as a follower or as the leader that it was. Nobody, if this node does not lead.
    pub(super) async fn transfer(self: &Arc<Self>, to: Option<RaftId>) -> Result<Option<RaftId>, String> {
        let Ok(turn) = self.handing_over.try_lock() else {
            return Err("it is being handed over already".to_owned());
        };
        self.transfer_in_turn(to, &turn).await
    }

    async fn transfer_in_turn(
        self: &Arc<Self>,
        to: Option<RaftId>,
        _turn: &MutexGuard<'_, ()>,
    ) -> Result<Option<RaftId>, String> {
        if !self.is_leader() {
            return Ok(None);
        }
        self.outlast_own_lease().await;
        let _paused = Paused::begin(self);
        match self.hand_over(to).await? {
            Some(leader) => {
                tracing::info!(to = leader, "leadership handed over");
                Ok(Some(leader))
            }
            None if self.is_leader() => Err("there is no other voter".to_owned()),
            None => Ok(None),
        }
    }

    /// Whether this node leads, and somebody else votes.
    fn leads_others(&self) -> bool {
        let voters = |sample: &Sample| sample.metrics.membership_config.voter_ids().count();
        self.is_leader() && self.metrics().is_some_and(|sample| voters(&sample) > 1)
    }

    /// Who may be asked to stand: the voters that have the whole log. One that leaves is asked only by its name.
    fn candidates(&self, own: RaftId, now: &Metrics, last: u64, to: Option<RaftId>) -> BTreeSet<RaftId> {
        let published = self.published.load();
        let leaves = |id: &RaftId| {
            published
                .state
                .nodes()
                .get(id)
                .is_some_and(|node| node.is_leaving())
        };
        let wanted = |id: &RaftId| to.map_or_else(|| !leaves(id), |to| to == *id);
        up_to_date(own, now, last).into_iter().filter(wanted).collect()
    }

    /// The new leader, or nobody if there was nothing to hand over.
    async fn hand_over(self: &Arc<Self>, to: Option<RaftId>) -> Result<Option<RaftId>, String> {
        let Some(running) = self.raft.get().filter(|_| self.is_leader()) else {
            return Ok(None);
        };
        let mut metrics = running.raft.metrics();
        if metrics.borrow().membership_config.voter_ids().count() < 2 {
            return Ok(None);
        }
        self.outlast_own_lease().await;
        // Every place among those who append, for good: from here on the log does not grow, and a follower that
        // has all of it now has all of it when it stands.
        let all = Arc::clone(&self.in_flight).acquire_many_owned(MAX_IN_FLIGHT as u32);
        let _all = match tokio::time::timeout(SETTLE, all).await {
            Ok(Ok(all)) => all,
            _ => return Err("changes are still under way".to_owned()),
        };
        // By the store: the metrics may be older than the last answer.
        let last = self.control.get().last_log.map_or(0, |id| id.index);
        let caught_up = metrics.wait_for(|now| {
            now.state != ServerState::Leader || !self.candidates(running.id, now, last, to).is_empty()
        });
        let (targets, voters) = match tokio::time::timeout(CATCH_UP, caught_up).await {
            Ok(Ok(now)) => (
                self.candidates(running.id, &now, last, to),
                now.membership_config.voter_ids().count(),
            ),
            Ok(Err(_)) => return Err("raft has stopped".to_owned()),
            Err(_) => {
                return Err(match to {
                    Some(to) => format!("{} does not have the whole log", self.name_or_id(to)),
                    None => "no voter has the whole log".to_owned(),
                });
            }
        };
        if targets.is_empty() {
            return Ok(None);
        }
        let small = voters <= SMALL;
        if !small {
            // With a last heartbeat everybody hears that all of the log is committed: what it has was acknowledged, and
            // clients ask others for it.
            tokio::time::sleep(self.options.timing.heartbeat * 3 / 2).await;
            running.raft.runtime_config().heartbeat(false);
            tokio::time::sleep(lease_and_tick(self)).await;
        }
        let taken = self.one_stands(targets).await;
        // That this node leads no more is not enough: the candidate has its vote then, and may still lose.
        let over = metrics.wait_for(|now| now.current_leader.is_some_and(|leader| leader != running.id));
        let over = match tokio::time::timeout(TAKE_OVER, over).await {
            Ok(Ok(now)) => now.current_leader,
            _ => None,
        };
        match (over, taken) {
            (Some(leader), _) => Ok(Some(leader)),
            (None, taken) => {
                if !small && !bug("bug::heartbeats_stay_off") {
                    running.raft.runtime_config().heartbeat(true);
                }
                let told = |asked: RaftId| format!("{} was not elected in time", self.name_or_id(asked));
                Err(taken.map_or_else(|why| why, told))
            }
        }
    }

    /// openraft's leader votes for nobody for as long after its election as voters keep to a leader (`handle_vote_req` in
    /// openraft 0.9.25), and of three voters its vote is needed.
    async fn outlast_own_lease(&self) {
        let Some(since) = self.leads_since.load_full() else {
            return;
        };
        let until = *since + lease_and_tick(self);
        tokio::time::sleep(until.saturating_duration_since(clock::now())).await;
    }

    fn name_or_id(&self, id: RaftId) -> String {
        self.name_of(id).unwrap_or_else(|| format!("raft id {id}"))
    }

    /// The voter that stands for election. Another one is asked where one refuses, which it does while it is stopped too.
    async fn one_stands(self: &Arc<Self>, targets: BTreeSet<RaftId>) -> Result<RaftId, String> {
        // The one that answered last is the likeliest to answer again.
        let heard = self.peers.load_full();
        let mut targets: Vec<RaftId> = targets.into_iter().collect();
        targets.sort_by_key(|id| heard.get(id).copied());
        let mut refused = Vec::new();
        let until = clock::now() + STANDS;
        while let Some(target) = targets.pop() {
            match self.ask_to_stand(target).await {
                Ok(()) => return Ok(target),
                Err(why) => refused.push(format!("{}: {why}", self.name_or_id(target))),
            }
            if clock::now() + TAKE_OVER > until {
                break;
            }
        }
        Err(refused.join("; "))
    }

    async fn ask_to_stand(self: &Arc<Self>, target: RaftId) -> Result<(), String> {
        let address = {
            let sample = self.metrics().ok_or("raft has no metrics yet")?;
            let membership = sample.metrics.membership_config.membership();
            let node = membership.get_node(&target).ok_or("the target is no member")?;
            self.options.peer_address(node)
        };
        match self.call(target, &address, &Request::Stand, TAKE_OVER).await {
            Ok(Response::More) => Ok(()),
            Ok(Response::Failed(why)) => Err(why),
            Ok(_) => Err("unexpected answer".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// The other side: the leader asks this node to stand for election. From anybody else it would only
    /// disturb.
    pub(super) async fn stand(&self, asked_by: RaftId) -> Response {
        let Some(running) = self.raft.get() else {
            return Response::Failed("raft is not running".into());
        };
        if self.stopping.load(Ordering::SeqCst) || self.draining.load(Ordering::SeqCst) {
            return Response::Failed("this node is shutting down too".into());
        }
        fail::fail_point!("handover::stand", |_| Response::Failed(
            "a failpoint refuses it".into()
        ));
        if self.known_leader() != Some(asked_by) {
            return Response::Failed(format!("raft id {asked_by} does not lead"));
        }
        match running.raft.trigger().elect().await {
            Ok(()) => Response::More,
            Err(error) => Response::Failed(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use openraft::{CommittedLeaderId, Membership};
    use raft_store::{LogId, StoredMembership};

    use super::*;

    #[test]
    fn only_a_voter_that_has_the_whole_log_is_asked_to_stand() {
        let at = |index| Some(LogId::new(CommittedLeaderId::new(1, 1), index));
        let membership = Membership::new(vec![BTreeSet::from([1, 2, 3])], ());
        let mut metrics = Metrics::new_initial(1);
        metrics.membership_config = Arc::new(StoredMembership::new(None, membership));
        assert!(up_to_date(1, &metrics, 7).is_empty());
        // Metrics from before the last entry was appended: both have what they name, one has all of it.
        metrics.last_log_index = Some(6);
        let replication = [(1, at(7)), (2, at(6)), (3, at(7)), (4, at(7))];
        metrics.replication = Some(BTreeMap::from(replication));
        assert_eq!(up_to_date(1, &metrics, 7), BTreeSet::from([3]));
    }
}
