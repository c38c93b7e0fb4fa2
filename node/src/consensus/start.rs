//! Starting consensus: one thread with a runtime of its own holds store, Raft and cluster listener.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use openraft::{Raft, SnapshotPolicy};
use raft_store::command::RecoverQuorum;
use raft_store::names::{Boot, ClusterId, Incarnation, NodeName, RaftId};
use raft_store::storage::{
    BarrierHook, LogStore, OpenError, Opened, Published, StateMachine, Store, StoreOptions,
};
use raft_store::{MemberNode, TypeConfig};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{Semaphore, oneshot};

use super::admission::Peers;
use super::autopilot::{self, Autopilot};
use super::gate::StartGate;
use super::handshake::Run;
use super::link::Listener;
use super::loading::Loading;
use super::network::Network;
use super::pool::Pool;
use super::shared::{MAX_IN_FLIGHT, Running, Shared};
use super::{Consensus, membership, refusals, register, server};
use crate::clock;
use crate::http::ListenError;
use crate::identity::peer_identity;
use crate::tls::ClusterTls;

/// Raft's timing.
#[derive(Clone, Copy, Debug)]
pub struct RaftTiming {
    /// Between the leader's frames.
    pub heartbeat: Duration,
    /// Shortest silence that starts an election.
    pub election_min: Duration,
    /// Longest.
    pub election_max: Duration,
    /// Bound of readiness: a node that heard of no quorum for longer may have been left behind.
    pub ready: Duration,
    /// Log entries between snapshots.
    pub snapshot_every: u64,
    /// Log entries kept behind a snapshot.
    pub keep_logs: u64,
}

/// What consensus needs to know.
pub struct ConsensusOptions {
    /// This node's configured name.
    pub node_name: NodeName,
    /// The data directory.
    pub data_dir: PathBuf,
    /// Address of the cluster listener; `None`: no listener (a standalone node).
    pub listen: Option<SocketAddr>,
    /// `host:port` peers use to reach it.
    pub advertise: String,
    /// `host:port` of the API, for people and hints.
    pub api_advertise: String,
    /// Addresses to use for some peers instead of the advertised ones (split networks, tests).
    pub peer_addresses: BTreeMap<String, String>,
    /// The cluster's name in certificates.
    pub cluster_name: String,
    /// TLS between nodes; `None` on a standalone node, which has no peers.
    pub tls: Option<Arc<ClusterTls>>,
    /// Timing.
    pub timing: RaftTiming,
    /// For how long a node that leaves is sent the log once it votes no more: until balancers have seen that it is not
    /// ready, and it has stopped listening.
    pub notice: Duration,
    /// Whether, and when, a leader has dead voters removed.
    pub autopilot: Option<Autopilot>,
    /// The replication key's id for a cluster.
    pub trk_id: Arc<dyn Fn(ClusterId) -> [u8; 8] + Send + Sync>,
    /// Called around each disk barrier.
    pub on_barrier: Mutex<Option<BarrierHook>>,
    /// Ends the process: store or Raft have stopped, or the node's identity is refused.
    pub on_fatal: Arc<dyn Fn(String) + Send + Sync>,
}

impl ConsensusOptions {
    /// The node name in a verified peer certificate, if it is of this cluster.
    pub(super) fn peer_name(&self, certificate: &[u8]) -> Option<String> {
        let peer = peer_identity(certificate).ok()?;
        (peer.cluster == self.cluster_name).then_some(peer.name)
    }

    /// Where to reach a peer.
    pub(super) fn peer_address(&self, node: &MemberNode) -> String {
        self.peer_addresses
            .get(&node.name)
            .cloned()
            .unwrap_or_else(|| node.cluster_address.clone())
    }
}

/// Why consensus did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The store is refused.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// The cluster listener cannot be bound.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The thread cannot be started.
    #[error("consensus thread: {0}")]
    Thread(String),
    /// Raft refuses its configuration or its store.
    #[error("raft: {0}")]
    Raft(String),
}

/// A store that is open and a listener that is bound. Nothing runs yet and nobody is answered.
pub struct Prepared {
    published: Arc<Published>,
    go: oneshot::Sender<()>,
    started: Receiver<Result<Consensus, StartError>>,
}

impl Prepared {
    /// The state as it was stored.
    pub fn published(&self) -> &Published {
        &self.published
    }

    /// Starts the listener and, if the node has an identity, Raft. Blocks until then.
    pub fn start(self) -> Result<Consensus, StartError> {
        // If it is not heard the thread has ended, and has said why.
        let _ = self.go.send(());
        let started = self.started.recv();
        started.map_err(|e| StartError::Thread(e.to_string()))?
    }
}

/// Opens the store and binds the listener, on the thread that both belong to. Blocks until then. What is not
/// started is given up when it is dropped.
pub fn prepare(options: ConsensusOptions) -> Result<Prepared, StartError> {
    let (prepared, wait_prepared) = channel();
    let (running, started) = channel();
    let (go, may_go) = oneshot::channel();
    std::thread::Builder::new()
        .name("consensus".into())
        .spawn(move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => {
                    let _ = prepared.send(Err(StartError::Thread(error.to_string())));
                    return;
                }
            };
            runtime.block_on(async {
                let parts = match open(options).await {
                    Ok(parts) => parts,
                    Err(error) => {
                        let _ = prepared.send(Err(error));
                        return;
                    }
                };
                let _ = prepared.send(Ok(parts.opened.machine.published().load_full()));
                if may_go.await.is_err() {
                    return;
                }
                let assembled = assemble(parts).await;
                let failed = assembled.is_err();
                let _ = running.send(assembled);
                if !failed {
                    // The thread serves until the process ends.
                    std::future::pending::<()>().await;
                }
            });
        })
        .map_err(|e| StartError::Thread(e.to_string()))?;
    let published = wait_prepared
        .recv()
        .map_err(|e| StartError::Thread(e.to_string()))??;
    Ok(Prepared {
        published,
        go,
        started,
    })
}

/// Opens the store, starts the listener and, if the node has an identity, Raft. Blocks until then.
pub fn start(options: ConsensusOptions) -> Result<Consensus, StartError> {
    prepare(options)?.start()
}

/// What can fail because of somebody else: another process with the directory or the port.
pub(super) struct Parts {
    pub(super) options: ConsensusOptions,
    pub(super) opened: Opened,
    pub(super) listener: Option<Listener>,
}

/// As `TcpListener::bind`, with a short queue: what waits in a long one is past its sender's patience.
fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(server::BACKLOG)
}

async fn open(options: ConsensusOptions) -> Result<Parts, StartError> {
    const KEY: &str = "cluster.listen";
    let listener = match options.listen {
        Some(address) => {
            let bound = bind(address);
            let bound = bound.map_err(|reason| ListenError::of(KEY, address, reason))?;
            Some(Listener::Tcp(bound))
        }
        None => None,
    };
    let on_fatal = Arc::clone(&options.on_fatal);
    let on_barrier = options
        .on_barrier
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .take();
    let opened = Store::open(StoreOptions {
        dir: options.data_dir.clone(),
        node_name: options.node_name.to_string(),
        incarnation: Incarnation(clock::random_id()),
        cache_bytes: 32 << 20,
        on_barrier,
        on_fatal: Box::new(move |why| on_fatal(why)),
    })?;
    crate::logging::note_epoch(opened.control.get().epoch);
    if let Some(recovery) = &opened.recovering {
        note_recovery(recovery, &opened.machine.published().load());
    }
    Ok(Parts {
        options,
        opened,
        listener,
    })
}

/// Writes what was done to this directory while the node was stopped: at its first start since, and at every further one
/// until it is in the state. The state keeps it.
fn note_recovery(recovery: &RecoverQuorum, before: &Published) {
    let standing = before.state.nodes().iter().filter(|(_, node)| node.is_standing());
    let left_out = standing.filter(|(id, _)| **id != recovery.survivor);
    let left_out: Vec<&str> = left_out.map(|(_, node)| node.name.as_str()).collect();
    tracing::warn!(
        target: "audit",
        epoch = recovery.epoch, survivor = recovery.survivor, last_term = recovery.last_term,
        last_index = recovery.last_index, applied_index = recovery.applied_index, left_out = left_out.join(" "),
        "the quorum was recovered by this node alone: what was committed behind its log is lost"
    );
}

pub(super) async fn assemble(parts: Parts) -> Result<Consensus, StartError> {
    let Parts {
        options,
        opened,
        listener,
    } = parts;
    let Opened {
        log,
        machine,
        control,
        recovering: _,
    } = opened;
    let identity = control.get();
    // A snapshot that was received whole stands for the log it covers, whether or not that was purged yet.
    let has = identity.last_log.max(machine.published().load().applied);
    let run = Run {
        boot: Boot(clock::random_id()),
        log_index: has.map_or(0, |id| id.index),
    };
    let gate = StartGate::new(options.timing.ready);
    let shared = Arc::new(Shared {
        options,
        published: machine.published(),
        applied: machine.applied(),
        control,
        raft: OnceLock::new(),
        sample: ArcSwapOption::empty(),
        run,
        peers_seen: Peers::default(),
        gate,
        silent: ArcSwap::from_pointee(BTreeSet::new()),
        committed: AtomicU64::new(0),
        peers: ArcSwap::from_pointee(BTreeMap::new()),
        leads_since: ArcSwapOption::empty(),
        in_flight: Arc::new(Semaphore::new(MAX_IN_FLIGHT)),
        timed_out: AtomicU64::new(0),
        leader_changes: AtomicU64::new(0),
        stopping: AtomicBool::new(false),
        draining: AtomicBool::new(false),
        loading: Loading::default(),
        paused: AtomicBool::new(false),
        calls_in_hand: tokio::sync::RwLock::new(()),
        handing_over: tokio::sync::Mutex::new(()),
        backing_off: tokio::sync::Mutex::new(()),
        standing_again: tokio::sync::Mutex::new(()),
        removed: tokio::sync::watch::Sender::new(None),
        calls: OnceLock::new(),
        pool: Pool::default(),
        refusals: refusals::lines(),
        joins: register::attempts(),
        identity: tokio::sync::Mutex::new(()),
        runtime: tokio::runtime::Handle::current(),
        parts: tokio::sync::Mutex::new(Some((log, machine))),
    });
    if identity.raft_id != 0 {
        shared
            .start_raft(identity.raft_id)
            .await
            .map_err(StartError::Raft)?;
    }
    if let (Some(listener), Some(tls)) = (listener, &shared.options.tls) {
        tokio::spawn(server::serve(
            Arc::clone(&shared),
            Arc::clone(&tls.server),
            listener,
        ));
    }
    tokio::spawn(follow_applied(Arc::clone(&shared)));
    tokio::spawn(membership::drive(Arc::clone(&shared)));
    if let Some(rules) = shared.options.autopilot {
        tokio::spawn(autopilot::drive(Arc::clone(&shared), rules));
    }
    Ok(Consensus { shared })
}

impl Shared {
    /// Starts Raft under `id`, once; later calls return the running one. In a task of its own on the
    /// consensus runtime: a caller that goes away half-way must not leave half a Raft behind.
    pub(super) async fn start_raft(self: &Arc<Self>, id: RaftId) -> Result<&Running, String> {
        let shared = Arc::clone(self);
        let started = self.runtime.spawn(async move {
            let mut parts = shared.parts.lock().await;
            if let Some((log, machine)) = parts.take() {
                let raft = build(&shared, id, log, machine).await?;
                tokio::spawn(watch(Arc::clone(&shared), raft.clone()));
                let _ = shared.raft.set(Running { id, raft });
            }
            Ok::<_, String>(())
        });
        started.await.map_err(|e| e.to_string())??;
        self.raft
            .get()
            .ok_or_else(|| "raft could not be started earlier; restart the node".to_string())
    }
}

async fn build(
    shared: &Arc<Shared>,
    id: RaftId,
    log: LogStore,
    machine: StateMachine,
) -> Result<Raft<TypeConfig>, String> {
    let timing = shared.options.timing;
    let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
    let config = openraft::Config {
        cluster_name: shared.options.cluster_name.clone(),
        heartbeat_interval: millis(timing.heartbeat),
        election_timeout_min: millis(timing.election_min),
        election_timeout_max: millis(timing.election_max),
        // Progress is watched by the sender; this only has to be longer.
        install_snapshot_timeout: 120_000,
        max_payload_entries: 64,
        replication_lag_threshold: timing.keep_logs.max(1),
        snapshot_policy: SnapshotPolicy::LogsSinceLast(timing.snapshot_every),
        max_in_snapshot_log_to_keep: timing.keep_logs,
        purge_batch_size: 64,
        ..openraft::Config::default()
    };
    let config = Arc::new(config.validate().map_err(|e| e.to_string())?);
    let network = Network {
        shared: Arc::clone(shared),
    };
    Raft::new(id, config, network, log, machine)
        .await
        .map_err(|e| e.to_string())
}

/// Opens the start gate once what it waits for is applied.
async fn follow_applied(shared: Arc<Shared>) {
    let mut applied = shared.applied.clone();
    loop {
        let index = *applied.borrow_and_update();
        shared.gate.applied(index);
        if applied.changed().await.is_err() {
            return;
        }
    }
}

/// Follows Raft's metrics; ends the process when Raft has stopped.
async fn watch(shared: Arc<Shared>, raft: Raft<TypeConfig>) {
    let mut metrics = raft.metrics();
    loop {
        let now = metrics.borrow_and_update().clone();
        let stopped = now.running_state.clone().err();
        shared.note_metrics(now);
        if let Some(why) = stopped {
            (shared.options.on_fatal)(format!("raft has stopped: {why}"));
            return;
        }
        if metrics.changed().await.is_err() {
            (shared.options.on_fatal)("raft has stopped".into());
            return;
        }
    }
}
