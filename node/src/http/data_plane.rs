//! What encrypting and decrypting need from the rest of the node. Implemented where consensus and
//! tokens are known; everything here is one load of a snapshot, except the one question that has
//! to ask the leader.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use hsm_api::StateIndex;
use tokio::sync::watch;

use super::problem::ApiError;
use crate::keyring::KeyRing;
use crate::policy::{Op, Policy};

/// The node, as the data plane sees it. Calls must not block.
pub trait DataPlane: Send + Sync + 'static {
    /// The policy of the replicated state.
    fn policy(&self) -> Arc<Policy>;

    /// Whether this node may answer now.
    ///
    /// # Errors
    /// `uninitialised`, `not_ready` before the start gate, `stale` beyond the bound of `op`.
    fn freshness(&self, op: Op) -> Result<Freshness, ApiError>;

    /// The keys this node holds.
    fn keyring(&self) -> Arc<KeyRing>;

    /// How far the replicated state is in what this node answers from: a policy and a key ring that are loaded after
    /// it are at least as new.
    fn index(&self) -> StateIndex;

    /// The same, for waiting.
    fn reached(&self) -> watch::Receiver<StateIndex>;

    /// `cluster.node_id`.
    fn node_id(&self) -> &str;

    /// A ciphertext names a version above the highest this node knows: reads the leader's index
    /// once for all who ask at the time, and says whether such a version exists by now.
    fn version_above_known<'a>(
        &'a self,
        context: &'a str,
        version: u32,
    ) -> Pin<Box<dyn Future<Output = AboveKnown> + Send + 'a>>;
}

/// How well this node may answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Freshness {
    /// Out of readiness and still inside the bound: the answer is marked.
    pub degraded: bool,
}

/// What the leader's state says about a version this node does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AboveKnown {
    /// It exists; this node will have it soon.
    OnItsWay,
    /// There is no such version.
    Unknown,
    /// No quorum could be asked.
    NoQuorum,
    /// Too many wait for such an answer already; nobody was asked.
    Busy,
}
