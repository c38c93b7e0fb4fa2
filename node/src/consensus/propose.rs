//! Proposing changes. Nothing is appended without a recent quorum, at most 64 proposals are in flight, and
//! a proposal without an answer in time is *unknown*, never failed.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use openraft::error::{ClientWriteError, RaftError};
use raft_store::codec::{self, MAX_COMMAND_BYTES};
use raft_store::command::{Command, Done, Forbidden, Op, Origin, Outcome, RequestId};
use raft_store::names::RaftId;
use raft_store::storage::StoreFigures;
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::shared::{Metrics, Shared};
use super::{Consensus, ProposeError, levels};
use crate::clock;

/// An answer from Raft takes milliseconds; past this the outcome is unknown.
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// What openraft still gets to answer once this node leads no more as it did. Callers are gone by then.
pub(super) const LAST_ANSWER: Duration = Duration::from_secs(5);
/// After a caller has heard no more than that the outcome is unknown: nothing of the proposal is on its way any more. What
/// is in the log by then a leader that has caught up has in its state, and the rest was truncated.
pub(crate) const SETTLED_AFTER: Duration = PROPOSE_TIMEOUT.saturating_add(LAST_ANSWER);

/// openraft's answer to what a leader appends; `None` if there will be none. openraft answers when the entry is
/// applied or truncated; one that a received snapshot covers is neither, and would keep its place for ever.
pub(super) async fn answer_of<T>(
    mut metrics: watch::Receiver<Metrics>,
    grace: Duration,
    answer: impl Future<Output = T>,
) -> Option<T> {
    let led = metrics.borrow().vote.leader_id;
    let lost = async move {
        let ended = metrics.wait_for(|now| now.vote.leader_id != led).await.is_err();
        if ended {
            // Raft has stopped, which answers everybody.
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(grace).await;
    };
    tokio::select! {
        biased;
        answer = answer => Some(answer),
        () = lost => None,
    }
}

/// Whether there is room on the disk for this operation; `None`: a change of the membership. Below the reserve only
/// invocations are given out any more, down to its last quarter: a claim is small, and without it the whole cluster
/// would stop encrypting while this leader goes on leading.
fn has_room(figures: &StoreFigures, op: Option<&Op>) -> bool {
    match op {
        Some(Op::LeaseInvocations(_)) => !figures.below_last,
        _ => !figures.below_reserve,
    }
}

impl Consensus {
    /// Proposes on behalf of `origin`; on the leader only.
    ///
    /// # Errors
    /// See [`ProposeError`]; `Unknown` means it may have been done.
    pub async fn propose(
        &self,
        id: RequestId,
        body_hash: [u8; 32],
        origin: Origin,
        op: Op,
    ) -> Result<Done, ProposeError> {
        self.shared.propose(id, body_hash, origin, op).await
    }

    /// Proposes for the leader's own drivers, under a fresh id.
    pub async fn propose_as_leader(&self, op: Op) -> Result<Done, ProposeError> {
        let node = self.raft_id().ok_or(ProposeError::Uninitialised)?;
        let nonce = clock::random_id();
        self.shared
            .propose(RequestId::Node { node, nonce }, [0; 32], Origin::Node(node), op)
            .await
    }
}

impl Shared {
    pub(super) async fn propose(
        self: &Arc<Self>,
        id: RequestId,
        body_hash: [u8; 32],
        origin: Origin,
        op: Op,
    ) -> Result<Done, ProposeError> {
        let name = op.name();
        let command = Command {
            id,
            body_hash,
            origin,
            approvals: Vec::new(),
            at: clock::unix_millis(),
            op,
        };
        match self.write(command).await {
            Ok(Outcome::Done(done)) => Ok(done),
            Ok(Outcome::Refused(refusal)) => Err(ProposeError::Refused(refusal)),
            Ok(Outcome::Nothing) => Err(ProposeError::Fatal(format!("{name} had no outcome"))),
            Err(error) => Err(error),
        }
    }

    /// A member's own operation, sent to this leader. `node` is the TLS peer: nobody speaks for another.
    pub(super) async fn propose_for_member(
        self: &Arc<Self>,
        node: RaftId,
        nonce: [u8; 16],
        op: Op,
    ) -> Result<Done, ProposeError> {
        let asked = op.name();
        let (id, origin) = (RequestId::Node { node, nonce }, Origin::Node(node));
        let proposed = if op.forwardable_from_node() {
            // What a peer may never do must not make the log grow, however often it tries.
            match (self.forbidden(&id, &origin, &op), op) {
                (Some(forbidden), _) => Err(ProposeError::Refused(forbidden.into())),
                (None, Op::AddRevocations(asked)) => self.revoke_for_member(id, node, asked).await,
                (None, op) => self.propose(id, [0; 32], origin, op).await,
            }
        } else {
            let operation = asked.to_owned();
            Err(ProposeError::Refused(Forbidden::Operation { operation }.into()))
        };
        // Nodes ask for what their own state allows: whatever is refused them is worth a look.
        if let Err(ProposeError::Refused(refusal)) = &proposed {
            self.refuse(&self.name_of(node).unwrap_or_default(), node, asked, refusal);
        }
        proposed
    }

    /// Whether this node may append an operation, or a change of the membership, now, and its place among those who
    /// do. Held until openraft has answered: a leader hands over only once all are back.
    pub(super) fn may_append(&self, op: Option<&Op>) -> Result<OwnedSemaphorePermit, ProposeError> {
        if self.draining.load(Ordering::SeqCst) {
            return Err(ProposeError::Draining);
        }
        if let Some(shut) = self.gate.shut_by() {
            return Err(shut.into());
        }
        // Whoever leads in a moment takes it; if it is this node again, so much the better.
        if self.paused.load(Ordering::SeqCst) {
            return Err(ProposeError::NotLeader { leader: None });
        }
        if !self.is_leader() {
            return Err(ProposeError::NotLeader {
                leader: self.known_leader(),
            });
        }
        // An isolated leader goes on accepting otherwise, and its log grows with every retry.
        if self
            .quorum_ack_age(clock::now())
            .is_none_or(|age| age > self.options.timing.election_max)
        {
            return Err(ProposeError::NoQuorum);
        }
        if !has_room(&self.control.figures(), op) {
            return Err(ProposeError::NoSpace);
        }
        let permit = Arc::clone(&self.in_flight).try_acquire_owned();
        permit.map_err(|_| {
            // The last look was before the hand-over took every place.
            if self.draining.load(Ordering::SeqCst) {
                ProposeError::Draining
            } else if self.paused.load(Ordering::SeqCst) {
                ProposeError::NotLeader { leader: None }
            } else {
                ProposeError::Busy
            }
        })
    }

    async fn write(self: &Arc<Self>, command: Command) -> Result<Outcome, ProposeError> {
        let running = self.raft.get().ok_or(ProposeError::Uninitialised)?;
        let bytes = codec::encode(&command).map_or(usize::MAX, |encoded| encoded.len());
        if bytes > MAX_COMMAND_BYTES {
            return Err(ProposeError::TooLarge { bytes });
        }
        levels::check(&self.published.load().state, &command.op, || {
            self.silent_peers(clock::now())
        })?;
        let permit = self.may_append(Some(&command.op))?;
        let raft = running.raft.clone();
        let metrics = raft.metrics();
        // The permit is held until openraft answers, however long the caller waits.
        let written = self.runtime.spawn(async move {
            let _permit = permit;
            answer_of(metrics, LAST_ANSWER, raft.client_write(command)).await
        });
        let answer = match tokio::time::timeout(PROPOSE_TIMEOUT, written).await {
            Ok(Ok(Some(answer))) => answer,
            Ok(Ok(None)) => return Err(ProposeError::Unknown),
            Ok(Err(join)) => return Err(ProposeError::Fatal(join.to_string())),
            Err(_) => {
                self.timed_out.fetch_add(1, Ordering::Relaxed);
                return Err(ProposeError::Unknown);
            }
        };
        match answer {
            Ok(written) => Ok(written.data),
            // Also raised for an entry that was appended and then taken back by a new leader. Another node may
            // still have it, and bring it through as the next leader.
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => Err(ProposeError::Unknown),
            Err(RaftError::APIError(error)) => Err(ProposeError::Fatal(error.to_string())),
            // openraft drops its answer channel when it stops: the entry may be in the log.
            Err(RaftError::Fatal(_)) => Err(ProposeError::Unknown),
        }
    }

    pub(super) fn known_leader(&self) -> Option<RaftId> {
        self.metrics().and_then(|sample| sample.metrics.current_leader)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::future::{pending, ready};

    use raft_store::command::LeaseInvocations;
    use raft_store::names::Boot;

    use super::*;
    use crate::rotation::testing::prepare;

    #[test]
    fn below_the_reserve_invocations_are_given_until_its_last_quarter_and_nothing_else_is_appended() {
        let claim = Op::LeaseInvocations(LeaseInvocations {
            node: 1,
            boot: Boot([1; 16]),
            claims: vec![],
        });
        let version = prepare("c", 0, 1);
        for (below_reserve, below_last, room) in [
            (false, false, [true, true, true]),
            (true, false, [true, false, false]),
            (true, true, [false, false, false]),
        ] {
            let figures = StoreFigures {
                below_reserve,
                below_last,
                ..StoreFigures::default()
            };
            let ops = [Some(&claim), Some(&version), None];
            assert_eq!(ops.map(|op| has_room(&figures, op)), room, "{figures:?}");
        }
    }

    #[tokio::test]
    async fn an_entry_that_openraft_will_not_answer_gives_its_place_back_after_the_leadership() {
        let grace = Duration::from_millis(50);
        let (sender, metrics) = watch::channel(Metrics::new_initial(1));
        // As long as the node leads it waits.
        let waits = answer_of(metrics.clone(), grace, pending::<()>());
        assert!(tokio::time::timeout(4 * grace, waits).await.is_err());
        let lost = tokio::spawn(answer_of(metrics.clone(), grace, pending::<()>()));
        let late = tokio::spawn(answer_of(metrics, Duration::from_secs(600), async move {
            tokio::time::sleep(2 * grace).await;
            7
        }));
        tokio::task::yield_now().await;
        sender.send_modify(|now| now.vote = raft_store::Vote::new_committed(2, 2));
        let within = Duration::from_secs(30);
        assert_eq!(tokio::time::timeout(within, lost).await.unwrap().unwrap(), None);
        // The real answer may still come.
        assert_eq!(late.await.unwrap(), Some(7));
    }

    #[tokio::test]
    async fn an_answer_is_given_whoever_leads_and_when_raft_has_stopped() {
        let (sender, metrics) = watch::channel(Metrics::new_initial(1));
        drop(sender);
        assert_eq!(answer_of(metrics, Duration::ZERO, ready(7)).await, Some(7));
    }
}
