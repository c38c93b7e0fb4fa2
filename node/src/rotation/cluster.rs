//! What rotation and administration need of consensus, as a trait: the node's own [`Consensus`], or in
//! tests a state without Raft. Waiting is always bounded, and ends when this node stops leading.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hsm_api::ErrorCode;
use raft_store::command::{Done, Op, Origin, RequestId};
use raft_store::names::RaftId;
use raft_store::storage::Published;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::admin::call::CallError;
use crate::consensus::{Consensus, ProposeError, Role};

/// How often leadership is looked at while nothing is applied.
const LOOK: Duration = Duration::from_millis(100);

/// What a leader knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leadership {
    /// The term it leads in.
    pub term: u64,
    /// Since the last answer of each peer that ever answered.
    pub silent_for: BTreeMap<RaftId, Duration>,
    /// Since a quorum last acknowledged it; `None`: not yet.
    pub quorum_age: Option<Duration>,
}

/// See the module.
#[async_trait]
pub trait Cluster: Send + Sync + 'static {
    /// State and membership, as applied here.
    fn published(&self) -> Arc<Published>;

    /// The applied index, for waiting.
    fn applied(&self) -> watch::Receiver<u64>;

    /// `None` unless this node leads, as far as it knows.
    fn leadership(&self) -> Option<Leadership>;

    /// This node's id, once it has one.
    fn raft_id(&self) -> Option<RaftId>;

    /// The nodes that have answered this leader lately, and itself; nobody unless it leads.
    fn heard(&self) -> BTreeSet<RaftId>;

    /// Hands leadership over, to this node or to the best; see [`Consensus::transfer`].
    async fn transfer(&self, to: Option<RaftId>) -> Result<RaftId, CallError>;

    /// Proposes on behalf of `origin`; on the leader only.
    async fn propose(
        &self,
        id: RequestId,
        body_hash: [u8; 32],
        origin: Origin,
        op: Op,
    ) -> Result<Done, ProposeError>;

    /// Proposes for the leader's own drivers.
    async fn propose_as_leader(&self, op: Op) -> Result<Done, ProposeError>;

    /// Proposes as this node, wherever the leader is.
    async fn propose_as_node(&self, op: Op) -> Result<Done, ProposeError>;

    /// The commit index, confirmed by a quorum.
    async fn read_index(&self) -> Result<u64, ProposeError>;
}

#[async_trait]
impl Cluster for Consensus {
    fn published(&self) -> Arc<Published> {
        Consensus::published(self)
    }

    fn applied(&self) -> watch::Receiver<u64> {
        Consensus::applied(self)
    }

    fn leadership(&self) -> Option<Leadership> {
        let view = self.view();
        let heard = view
            .peers
            .iter()
            .filter_map(|(id, peer)| Some((*id, peer.silent_for?)));
        let silent_for = heard.collect();
        (view.role == Role::Leader).then_some(Leadership {
            term: view.term,
            silent_for,
            quorum_age: view.quorum_ack_age,
        })
    }

    fn raft_id(&self) -> Option<RaftId> {
        Consensus::raft_id(self)
    }

    fn heard(&self) -> BTreeSet<RaftId> {
        Consensus::heard(self)
    }

    async fn transfer(&self, to: Option<RaftId>) -> Result<RaftId, CallError> {
        Consensus::transfer(self, to).await
    }

    async fn propose(
        &self,
        id: RequestId,
        body_hash: [u8; 32],
        origin: Origin,
        op: Op,
    ) -> Result<Done, ProposeError> {
        Consensus::propose(self, id, body_hash, origin, op).await
    }

    async fn propose_as_leader(&self, op: Op) -> Result<Done, ProposeError> {
        Consensus::propose_as_leader(self, op).await
    }

    async fn propose_as_node(&self, op: Op) -> Result<Done, ProposeError> {
        Consensus::propose_as_node(self, op).await
    }

    async fn read_index(&self) -> Result<u64, ProposeError> {
        Consensus::read_index(self).await
    }
}

/// How a wait ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Waited<T> {
    /// What was waited for.
    Met(T),
    /// The deadline came first.
    Late,
    /// This node leads no more: somebody else has to go on.
    LostLead,
}

/// Waits on the leader until `check` finds what it looks for.
pub async fn wait_leading<T: Send>(
    cluster: &dyn Cluster,
    deadline: Instant,
    mut check: impl FnMut(&Published) -> Option<T> + Send,
) -> Waited<T> {
    let mut applied = cluster.applied();
    loop {
        applied.borrow_and_update();
        if let Some(found) = check(&cluster.published()) {
            return Waited::Met(found);
        }
        if cluster.leadership().is_none() {
            return Waited::LostLead;
        }
        let now = Instant::now();
        if now >= deadline {
            return Waited::Late;
        }
        let pause = deadline.min(now + LOOK);
        tokio::select! {
            changed = applied.changed() => {
                if changed.is_err() {
                    return Waited::LostLead;
                }
            }
            () = tokio::time::sleep_until(pause) => {}
        }
    }
}

/// Makes sure that this leader's state holds everything committed before: a new leader's may not.
///
/// # Errors
/// `not_leader`, `no_quorum`, or `not_ready` when it does not get there in time.
pub async fn catch_up(cluster: &dyn Cluster, deadline: Instant) -> Result<(), CallError> {
    let index = match cluster.read_index().await {
        Ok(index) => index,
        // It still takes itself for the leader: what it lacks is a quorum that agrees.
        Err(ProposeError::NotLeader { .. }) if cluster.leadership().is_some() => {
            return Err(ProposeError::NoQuorum.into());
        }
        Err(error) => return Err(error.into()),
    };
    let reached = |published: &Published| {
        let applied = published.applied.map_or(0, |id| id.index);
        (applied >= index).then_some(())
    };
    match wait_leading(cluster, deadline, reached).await {
        Waited::Met(()) => Ok(()),
        Waited::Late => Err(CallError::new(
            ErrorCode::NotReady,
            format!("the leader has not applied index {index} in time"),
        )),
        Waited::LostLead => Err(lost_lead()),
    }
}

/// The answer of a node that stopped leading while it worked.
#[must_use]
pub fn lost_lead() -> CallError {
    CallError::new(
        ErrorCode::NotLeader,
        "this node stopped leading; the new leader goes on",
    )
}
