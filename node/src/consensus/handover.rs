//! Handing leadership over before a leader stops, so that the others need not first miss it. openraft 0.9
//! has no transfer of its own: the node that has the whole log is asked to stand for election.
//!
//! Voters refuse a candidate while they hear from a leader. Of three voters the old leader's own vote and
//! the candidate's are enough; with more, heartbeats stop first, until the others no longer wait for them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use openraft::ServerState;
use raft_store::names::RaftId;

use super::Consensus;
use super::shared::{MAX_IN_FLIGHT, Metrics, Shared};
use super::wire::{Request, Response};
use crate::seeded::bug;

/// Until what is being appended has been answered.
const SETTLE: Duration = Duration::from_secs(1);
/// Until a follower has the whole log; nothing is appended meanwhile.
const CATCH_UP: Duration = Duration::from_secs(1);
/// Until the candidate leads.
const TAKE_OVER: Duration = Duration::from_secs(1);
/// Largest number of voters of which two are a majority.
const SMALL: usize = 3;

impl Consensus {
    /// Stops proposing, for good, and hands leadership over if this node leads. Tried once: a node that is
    /// stopping does not wait for a cluster that cannot agree. The process has to end after it, whatever came of
    /// it: a leader that proposes nothing keeps another from being elected.
    pub async fn step_down(&self) {
        self.shared.draining.store(true, Ordering::SeqCst);
        let shared = Arc::clone(&self.shared);
        let handed = self.shared.runtime.spawn(async move { shared.hand_over().await });
        // A disk that hangs holds the consensus thread, and must not hold the process.
        let most = SETTLE + CATCH_UP + 3 * TAKE_OVER + lease_and_tick(&self.shared);
        let why = match tokio::time::timeout(most, handed).await {
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
    /// The new leader, or nobody if there was nothing to hand over.
    async fn hand_over(self: &Arc<Self>) -> Result<Option<RaftId>, String> {
        let Some(running) = self.raft.get().filter(|_| self.is_leader()) else {
            return Ok(None);
        };
        let mut metrics = running.raft.metrics();
        if metrics.borrow().membership_config.voter_ids().count() < 2 {
            return Ok(None);
        }
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
            now.state != ServerState::Leader || !up_to_date(running.id, now, last).is_empty()
        });
        let (targets, voters) = match tokio::time::timeout(CATCH_UP, caught_up).await {
            Ok(Ok(now)) => (
                up_to_date(running.id, &now, last),
                now.membership_config.voter_ids().count(),
            ),
            Ok(Err(_)) => return Err("raft has stopped".to_owned()),
            Err(_) => return Err("no voter has the whole log".to_owned()),
        };
        // The one that answered last is the likeliest to answer again.
        let heard = self.peers.load_full();
        let Some(target) = targets.into_iter().max_by_key(|id| heard.get(id).copied()) else {
            return Ok(None);
        };
        let small = voters <= SMALL;
        if !small {
            running.raft.runtime_config().heartbeat(false);
            tokio::time::sleep(lease_and_tick(self)).await;
        }
        let taken = self.ask_to_stand(target).await;
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
                Err(taken
                    .err()
                    .unwrap_or_else(|| format!("raft id {target} was not elected in time")))
            }
        }
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
        if self.draining.load(Ordering::SeqCst) {
            return Response::Failed("this node is shutting down too".into());
        }
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
