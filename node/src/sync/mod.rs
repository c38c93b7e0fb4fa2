//! Token sync: the one place where replicated state and tokens meet. It brings every key the state
//! names into this node's tokens, proves it, tells the cluster, and publishes what can be used. It never
//! deletes metadata because a token lacks an object, and never destroys an object the state does not know.
//!
//! ```text
//!  state ─┐                        ┌─ token steps ──> token
//!         ├─> decide ──> plan ─────┤
//!  token ─┘                │       └─ proposals ────> leader
//!                          └─> board ──> key ring and its index, status, report
//!  state ─────────────────────────┘
//! ```

mod attempts;
mod board;
pub mod convert;
pub mod decide;
pub mod held;
mod ledger;
pub mod plan;
mod reached;
pub mod replication_key;
pub mod report;
mod ring;
mod showing;
pub mod slot_key;
pub mod status;
mod steps;
mod taking;
#[cfg(test)]
mod testing;
pub mod wanted;
mod worker;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use hsm_api::StateIndex;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use self::board::Board;
pub use self::replication_key::{Replication, WrongReplicationKey};
pub use self::slot_key::ClusterSigner;
pub use self::status::{SlotSync, SyncStatus};
#[cfg(test)]
pub(crate) use self::worker::RETIRE_AFTER;
use self::worker::{Known, Worker};
use crate::consensus::Consensus;
use crate::keyring::{KeyRing, TokenOps};
use crate::leases::Leases;
use crate::slots::{SlotEntry, SlotManager};

/// What token sync works with.
pub struct SyncOptions {
    /// The state, and the way to the leader.
    pub consensus: Consensus,
    /// The tokens.
    pub slots: Arc<SlotManager>,
    /// The replication key.
    pub replication: Arc<Replication>,
    /// This node's cluster certificate and key; `None` on a standalone node without one.
    pub signer: Option<Arc<ClusterSigner>>,
    /// Where the key ring is published.
    pub ring: Arc<ArcSwap<KeyRing>>,
    /// What this node may encrypt; claimed with each acknowledgement.
    pub leases: Arc<Leases>,
    /// `cluster.token_replication.interval_seconds`: between full comparisons.
    pub interval: Duration,
}

/// How far token sync is.
#[derive(Clone)]
pub struct SyncHandle {
    board: Arc<Board>,
}

impl SyncHandle {
    /// How far token and state agree.
    pub fn status(&self) -> Arc<SyncStatus> {
        self.board.status()
    }

    /// The same, for waiting.
    pub fn subscribe(&self) -> watch::Receiver<Arc<SyncStatus>> {
        self.board.subscribe()
    }

    /// The state that the published key ring contains. Two loads; the ring that is loaded after it is at least as new.
    pub fn index(&self) -> StateIndex {
        self.board.reached().now()
    }

    /// The same, for waiting.
    pub fn reached(&self) -> watch::Receiver<StateIndex> {
        self.board.reached().subscribe()
    }
}

/// Starts one worker per slot and the reporter on the current runtime. They end with `shutdown`.
pub fn start(options: SyncOptions, shutdown: &watch::Receiver<bool>) -> (SyncHandle, Vec<JoinHandle<()>>) {
    let slots = options.slots.entries().map(|entry| {
        let ops: Arc<dyn TokenOps> = Arc::<SlotEntry>::clone(entry);
        (entry.name().clone(), ops)
    });
    let board = Arc::new(Board::new(
        slots,
        Arc::clone(&options.ring),
        Arc::clone(&options.leases),
    ));
    // Before anybody is served.
    let me = options.consensus.raft_id().unwrap_or_default();
    board.refresh(me, || options.consensus.published());
    let handle = SyncHandle {
        board: Arc::clone(&board),
    };
    let mut tasks = Vec::new();
    for entry in options.slots.entries() {
        let worker = Worker {
            consensus: options.consensus.clone(),
            entry: Arc::clone(entry),
            replication: Arc::clone(&options.replication),
            signer: options.signer.clone(),
            board: Arc::clone(&board),
            leases: Arc::clone(&options.leases),
            interval: options.interval,
            known: Known::nothing(),
        };
        tasks.push(tokio::spawn(worker.run(shutdown.clone())));
    }
    let following = board::follow(Arc::clone(&board), options.consensus.clone(), shutdown.clone());
    tasks.push(tokio::spawn(following));
    let report = report::run(options.consensus, options.slots, handle.clone(), shutdown.clone());
    tasks.push(tokio::spawn(report));
    (handle, tasks)
}
