//! Claims invocations whenever half of what this node has of a version is gone, and the first ones of a version that it
//! holds and has none of. A cluster in which nothing is encrypted is asked for nothing. A node that cannot reach the
//! leader goes on with what it has.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use hsm_core::SlotState;
use raft_store::command::{Claim, Done, LeaseInvocations, MAX_CLAIMS, Op};
use raft_store::names::RaftId;
use raft_store::state::context::{KeyVersion, VersionKey};
use raft_store::storage::Published;
use tokio::sync::watch;

use super::Leases;
use crate::consensus::{Consensus, ProposeError};
use crate::keyring::KeyRing;
use crate::sync::convert::to_token_key;

/// Between looks at how fast this node encrypts, whatever else wakes the driver.
const SAMPLE: Duration = Duration::from_secs(1);
/// Before a claim is repeated that has changed nothing that this node has seen. It may still be under way here.
const AGAIN: Duration = Duration::from_millis(250);

/// What the driver needs of consensus, as a trait: the node's own, or in tests a state without Raft.
#[async_trait]
pub trait Proposer: Send + Sync + 'static {
    /// The state, as applied here.
    fn published(&self) -> Arc<Published>;
    /// The applied index, for waiting.
    fn applied(&self) -> watch::Receiver<u64>;
    /// This node's id, once it has one.
    fn raft_id(&self) -> Option<RaftId>;
    /// Proposes as this node, wherever the leader is.
    async fn propose_as_node(&self, op: Op) -> Result<Done, ProposeError>;
}

#[async_trait]
impl Proposer for Consensus {
    fn published(&self) -> Arc<Published> {
        Consensus::published(self)
    }

    fn applied(&self) -> watch::Receiver<u64> {
        Consensus::applied(self)
    }

    fn raft_id(&self) -> Option<RaftId> {
        Consensus::raft_id(self)
    }

    async fn propose_as_node(&self, op: Op) -> Result<Done, ProposeError> {
        Consensus::propose_as_node(self, op).await
    }
}

/// Claims until `shutdown`.
pub async fn drive(
    proposer: Arc<dyn Proposer>,
    leases: Arc<Leases>,
    ring: Arc<ArcSwap<KeyRing>>,
    mut shutdown: watch::Receiver<bool>,
) {
    let mut applied = proposer.applied();
    let mut driver = Driver {
        proposer,
        leases,
        asked: BTreeMap::new(),
        sampled: None,
        trouble: None,
    };
    loop {
        // Before looking: what is applied from here on wakes it again.
        applied.mark_unchanged();
        let pause = driver.pass(&ring, Instant::now()).await;
        tokio::select! {
            changed = applied.changed() => if changed.is_err() { return },
            () = driver.leases.low.notified() => {}
            () = tokio::time::sleep(pause) => {}
            _ = shutdown.changed() => return,
        }
    }
}

struct Driver {
    proposer: Arc<dyn Proposer>,
    leases: Arc<Leases>,
    /// What a version was last asked for with, and when.
    asked: BTreeMap<VersionKey, (u64, Instant)>,
    sampled: Option<Instant>,
    trouble: Option<String>,
}

impl Driver {
    /// Looks once, and claims what is wanting. Says how long nothing is to be done by itself.
    async fn pass(&mut self, ring: &ArcSwap<KeyRing>, now: Instant) -> Duration {
        let published = self.proposer.published();
        let (Some(me), state) = (self.proposer.raft_id(), &published.state) else {
            return SAMPLE;
        };
        self.leases.look(state, me);
        let due = |at: Instant| now.saturating_duration_since(at) >= SAMPLE;
        if self.sampled.is_none_or(due) {
            self.leases.sample(state, now);
            self.sampled = Some(now);
        }
        let is_member = state.nodes().get(&me).is_some_and(|node| node.is_member());
        if !is_member {
            return SAMPLE;
        }
        let keys = ring.load_full();
        let wanting = self
            .leases
            .wanting(state, me, |key, version| can_use(&keys, key, version));
        self.asked
            .retain(|key, _| wanting.iter().any(|claim| of(claim) == *key));
        let claims: Vec<Claim> = wanting
            .into_iter()
            .filter(|claim| self.is_new(claim, now))
            .collect();
        for claims in claims.chunks(MAX_CLAIMS) {
            for claim in claims {
                self.asked.insert(of(claim), (claim.seen, now));
            }
            self.propose(me, claims.to_vec()).await;
        }
        if self.asked.is_empty() { SAMPLE } else { AGAIN }
    }

    fn is_new(&self, claim: &Claim, now: Instant) -> bool {
        let before = self.asked.get(&of(claim));
        before.is_none_or(|(seen, at)| *seen != claim.seen || now.saturating_duration_since(*at) >= AGAIN)
    }

    /// What became of it is in the state; what is not, is claimed again.
    async fn propose(&mut self, node: RaftId, claims: Vec<Claim>) {
        let boot = self.leases.boot();
        let op = Op::LeaseInvocations(LeaseInvocations { node, boot, claims });
        let failure = self.proposer.propose_as_node(op).await.err();
        self.leases
            .note_drought(failure.as_ref().is_some_and(is_everybodys));
        let failure = failure.map(|error| error.to_string());
        if let Some(why) = failure.as_ref().filter(|_| failure != self.trouble) {
            tracing::info!(
                why,
                "invocations were not claimed; this node goes on with those it has"
            );
        }
        self.trouble = failure;
    }
}

/// Whether the leader answers its own claims like that as well: then no node is given any, and most likely the leader is
/// about to leave the balancer itself, or has left it.
fn is_everybodys(failure: &ProposeError) -> bool {
    match failure {
        ProposeError::NoSpace
        | ProposeError::NoQuorum
        | ProposeError::Busy
        | ProposeError::Draining
        | ProposeError::OlderCopy { .. }
        | ProposeError::EpochEnded { .. }
        | ProposeError::NotUnderstood { .. } => true,
        // Said of this node, or of this claim, or by nobody.
        ProposeError::NotLeader { .. }
        | ProposeError::Unknown
        | ProposeError::Refused(_)
        | ProposeError::TooLarge { .. }
        | ProposeError::Uninitialised
        | ProposeError::Fatal(_) => false,
    }
}

fn of(claim: &Claim) -> VersionKey {
    VersionKey {
        context: claim.context.clone(),
        version: claim.version,
    }
}

/// Whether this node encrypts under the version, or will once it is active: its slot is open, and holds the key.
fn can_use(ring: &KeyRing, key: &VersionKey, version: &KeyVersion) -> bool {
    let context = ring.context(key.context.as_str());
    let held = context.and_then(|(_, keys)| keys.readable.get(&to_token_key(version.key_uid)));
    held.is_some_and(|held| held.slot.ops.state() == SlotState::Ready)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "driver_tests.rs"]
mod tests;
