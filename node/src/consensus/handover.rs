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
use super::shared::{Metrics, Shared};
use super::wire::{Request, Response};

/// Until a follower has the whole log; nothing is appended meanwhile.
const CATCH_UP: Duration = Duration::from_secs(1);
/// Until the candidate leads.
const TAKE_OVER: Duration = Duration::from_secs(1);
/// Largest number of voters of which two are a majority.
const SMALL: usize = 3;

impl Consensus {
    /// Stops proposing, for good, and hands leadership over if this node leads. Tried once: a node that is
    /// stopping does not wait for a cluster that cannot agree.
    pub async fn step_down(&self) {
        self.shared.draining.store(true, Ordering::SeqCst);
        let shared = Arc::clone(&self.shared);
        let handed = self.shared.runtime.spawn(async move { shared.hand_over().await });
        match handed.await {
            Ok(Ok(None)) => {}
            Ok(Ok(Some(to))) => tracing::info!(to, "leadership handed over"),
            Ok(Err(why)) => tracing::warn!(
                why,
                "leadership not handed over: the others elect after a time-out"
            ),
            Err(error) => tracing::warn!(%error, "leadership not handed over"),
        }
    }
}

/// The followers that vote and have the whole log, of a leader that appends nothing any more.
fn up_to_date(own: RaftId, metrics: &Metrics) -> BTreeSet<RaftId> {
    let voters: BTreeSet<RaftId> = metrics.membership_config.voter_ids().collect();
    let Some(replication) = &metrics.replication else {
        return BTreeSet::new();
    };
    let whole =
        |id: &RaftId| replication.get(id).copied().flatten().map(|at| at.index) >= metrics.last_log_index;
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
        let caught_up = metrics
            .wait_for(|now| now.state != ServerState::Leader || !up_to_date(running.id, now).is_empty());
        let (targets, voters) = match tokio::time::timeout(CATCH_UP, caught_up).await {
            Ok(Ok(now)) => (
                up_to_date(running.id, &now),
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
        let timing = self.options.timing;
        let small = voters <= SMALL;
        if !small {
            running.raft.runtime_config().heartbeat(false);
            // The lease that voters give a leader, and one tick.
            tokio::time::sleep(timing.election_max + timing.heartbeat * 3 / 2).await;
        }
        let taken = self.ask_to_stand(target).await;
        let over = metrics.wait_for(|now| now.state != ServerState::Leader);
        let over = tokio::time::timeout(TAKE_OVER, over).await;
        match (taken, over) {
            (Ok(()), Ok(Ok(_))) => Ok(Some(target)),
            (taken, _) => {
                if !small {
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
        if self.known_leader() != Some(asked_by) {
            return Response::Failed(format!("raft id {asked_by} does not lead"));
        }
        match running.raft.trigger().elect().await {
            Ok(()) => Response::More,
            Err(error) => Response::Failed(error.to_string()),
        }
    }
}
