//! A simulated node: the node's own consensus, store, rotation and administration, on a simulated disk and network. Only
//! its token is made up: a set of keys, durable at once.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use raft_store::command::{AckVersions, Op, ReportNode};
use raft_store::names::{ContextName, Incarnation, KeyUid, NodeName};
use raft_store::state::FEATURE_LEVEL;
use raft_store::state::context::RotationPolicy;
use raft_store::state::node::NodeReport;
use raft_store::storage::{Control, Lie, Published, SimulatedDisk, Store, StoreOptions};
use tokio::sync::{mpsc, oneshot};

use super::super::link::Listener;
use super::super::start::{Parts, assemble};
use super::super::{BoxFuture, Consensus, ConsensusOptions, LeaderCalls, RaftTiming};
use super::Bug;
use super::oracle::Violations;
use crate::admin::call::{AdminCall, CallError};
use crate::admin::{AdminService, Seed, ServiceParts};
use crate::clock;
use crate::config::{DAY, Destroy};
use crate::lock::lock;
use crate::rotation::clocks::Doubt;
use crate::rotation::schedule::watch_clocks;
use crate::rotation::testing::{FakeKeys, ISSUER, cluster_keys, replication_key};
use crate::rotation::{Clocks, Cluster, Limits, Rotator, drive};
use crate::sync::Replication;
use crate::tls::ClusterTls;

/// Of every node's cluster listener.
pub(super) const PORT: u16 = 8445;
/// As in production.
const HEARTBEAT: Duration = Duration::from_millis(200);
/// As `cluster.fence_after` is by default.
const FENCE_AFTER: Duration = Duration::from_secs(8);
/// Between looks at what is to be reported.
const REPORT: Duration = Duration::from_secs(1);
/// After an acknowledgement, until it is applied here or was in vain.
const ACK: Duration = Duration::from_millis(300);

/// Something to be done on a node, outside its own tasks.
type Order = Box<dyn FnOnce(Consensus) -> BoxFuture<'static, ()> + Send>;

/// What the node does for administrators as leader, until it is gone.
#[derive(Default)]
struct Calls(Mutex<Option<Arc<AdminService>>>);

impl LeaderCalls for Calls {
    fn execute(&self, call: AdminCall) -> BoxFuture<'_, Result<serde_json::Value, CallError>> {
        let service = lock(&self.0).clone();
        Box::pin(async move {
            match service {
                Some(service) => service.execute(call).await,
                None => Err(CallError::new(hsm_api::ErrorCode::NotReady, "the node is gone")),
            }
        })
    }

    fn judge_clock(&self) -> Result<(), Doubt> {
        let service = lock(&self.0).clone();
        service.map_or(Err(Doubt::NotLeader), |service| service.judge_clock())
    }
}

/// A node that runs.
struct Live {
    consensus: Consensus,
    calls: Arc<Calls>,
    orders: mpsc::UnboundedSender<Order>,
}

impl Drop for Live {
    fn drop(&mut self) {
        // The service holds the consensus that holds the service.
        lock(&self.calls.0).take();
    }
}

/// See the module. Outlives its crashes.
pub(super) struct Node {
    pub(super) name: String,
    pub(super) disk: SimulatedDisk,
    data_dir: PathBuf,
    tls: Arc<ClusterTls>,
    bug: Bug,
    /// The keys in its token.
    token: Mutex<BTreeSet<KeyUid>>,
    live: Mutex<Option<Live>>,
    /// What its store had acknowledged when it was last stopped.
    acknowledged: Mutex<Option<Control>>,
    violations: Arc<Violations>,
}

impl Node {
    pub(super) fn new(
        name: &str,
        data_dir: PathBuf,
        tls: Arc<ClusterTls>,
        bug: Bug,
        violations: Arc<Violations>,
    ) -> Arc<Self> {
        let lie = match bug {
            Bug::UnsyncedAcknowledged => Lie::Everything,
            Bug::VoteNotSynced => Lie::Votes,
            _ => Lie::None,
        };
        Arc::new(Self {
            name: name.to_owned(),
            disk: SimulatedDisk::new(lie),
            data_dir,
            tls,
            bug,
            token: Mutex::default(),
            live: Mutex::default(),
            acknowledged: Mutex::default(),
            violations,
        })
    }

    pub(super) fn address(&self) -> String {
        format!("{}:{PORT}", self.name)
    }

    /// What runs on its host.
    pub(super) async fn run(self: Arc<Self>) -> turmoil::Result {
        if let Err(why) = self.start().await
            && !self.disk.is_off()
        {
            self.violations
                .add("a node starts again", format!("{}: {why}", self.name));
        }
        std::future::pending().await
    }

    async fn start(self: &Arc<Self>) -> Result<(), String> {
        let bound = turmoil::net::TcpListener::bind(("0.0.0.0", PORT)).await;
        let listener = bound.map_err(|error| error.to_string())?;
        let on_fatal = self.on_fatal();
        let store = StoreOptions {
            dir: self.data_dir.clone(),
            node_name: self.name.clone(),
            incarnation: Incarnation(clock::random_id()),
            cache_bytes: 0,
            on_barrier: None,
            on_fatal: Box::new(move |why| on_fatal(why)),
        };
        let opened = Store::open_simulated(store, &self.disk).map_err(|error| error.to_string())?;
        self.check_kept(&opened.control.get());
        let parts = Parts {
            options: self.options(),
            opened,
            listener: Some(Listener::Simulated(listener)),
        };
        let consensus = assemble(parts).await.map_err(|error| error.to_string())?;
        let cluster: Arc<dyn Cluster> = Arc::new(consensus.clone());
        let clocks = Arc::<Clocks>::default();
        let mut limits = Limits::new(FENCE_AFTER);
        if self.bug == Bug::BareMajority {
            limits.fence_after = Duration::ZERO;
        }
        let calls = Arc::new(Calls::default());
        *lock(&calls.0) = Some(Arc::new(service(&cluster, &clocks, limits)));
        consensus.serve_leader_calls(Arc::clone(&calls) as Arc<dyn LeaderCalls>);
        tokio::spawn(drive(Arc::clone(&cluster), Arc::clone(&clocks), limits));
        tokio::spawn(watch_clocks(cluster, clocks));
        tokio::spawn(Arc::clone(self).hold_keys(consensus.clone()));
        tokio::spawn(Arc::clone(self).report(consensus.clone()));
        let (orders, taken) = mpsc::unbounded_channel();
        tokio::spawn(obey(consensus.clone(), taken));
        *lock(&self.live) = Some(Live {
            consensus,
            calls,
            orders,
        });
        Ok(())
    }

    /// A node ends by itself only when its disk fails, or when it is refused by the others; neither has a reason here.
    fn on_fatal(self: &Arc<Self>) -> Arc<dyn Fn(String) + Send + Sync> {
        let (disk, violations, name) = (self.disk.clone(), Arc::clone(&self.violations), self.name.clone());
        Arc::new(move |why| {
            if !disk.is_off() {
                violations.add("no node ends by itself", format!("{name}: {why}"));
            }
        })
    }

    fn options(self: &Arc<Self>) -> ConsensusOptions {
        ConsensusOptions {
            node_name: NodeName::new(&self.name).unwrap(),
            data_dir: self.data_dir.clone(),
            listen: None,
            advertise: self.address(),
            api_advertise: self.address(),
            peer_addresses: BTreeMap::new(),
            cluster_name: "test".to_owned(),
            tls: Some(Arc::clone(&self.tls)),
            timing: RaftTiming {
                // As in production, but for the snapshots: there are few entries.
                heartbeat: HEARTBEAT,
                election_min: Duration::from_millis(800),
                election_max: Duration::from_millis(1200),
                ready: Duration::from_secs(5),
                snapshot_every: 60,
                keep_logs: 20,
            },
            notice: HEARTBEAT * 2,
            autopilot: None,
            trk_id: Arc::new(|_| [5; 8]),
            on_barrier: Mutex::new(None),
            on_fatal: self.on_fatal(),
        }
    }

    /// What was acknowledged before the power went is there.
    fn check_kept(&self, found: &Control) {
        let Some(before) = lock(&self.acknowledged).clone() else {
            return;
        };
        let name = &self.name;
        let older = |found: Option<std::cmp::Ordering>| found.is_none_or(std::cmp::Ordering::is_lt);
        if before.vote.is_some() && older(found.vote.partial_cmp(&before.vote)) {
            let what = format!(
                "{name}: {:?} was acknowledged, {:?} found",
                before.vote, found.vote
            );
            self.violations.add("a vote never goes back", what);
        }
        // A snapshot that was received replaces a log that it does not continue. Nothing takes a purge back.
        if found.last_purged <= before.last_purged && found.last_log < before.last_log {
            let what = format!(
                "{name}: {:?} was acknowledged, {:?} found",
                before.last_log, found.last_log
            );
            self.violations.add("the log keeps what was acknowledged", what);
        }
        if (found.cluster_id, found.raft_id) != (before.cluster_id, before.raft_id) {
            let what = format!("{name}: raft id {}, was {}", found.raft_id, before.raft_id);
            self.violations.add("an identity is for good", what);
        }
    }

    /// Lets go of what runs. Its host has to be stopped right after.
    pub(super) fn stop(&self) {
        let live = lock(&self.live).take();
        if let Some(live) = live {
            *lock(&self.acknowledged) = Some(live.consensus.control().get());
        }
    }

    /// The vote that its store has acknowledged.
    pub(super) fn vote(&self) -> Option<raft_store::Vote> {
        let live = lock(&self.live);
        live.as_ref()?.consensus.control().get().vote
    }

    /// Its state, while it runs.
    pub(super) fn published(&self) -> Option<Arc<Published>> {
        lock(&self.live).as_ref().map(|live| live.consensus.published())
    }

    /// Whether it runs and has caught up.
    pub(super) fn has_caught_up(&self) -> bool {
        let live = lock(&self.live);
        live.as_ref()
            .is_some_and(|live| matches!(live.consensus.start_gate(), super::super::Gate::Open { .. }))
    }

    pub(super) fn leads(&self) -> bool {
        lock(&self.live)
            .as_ref()
            .is_some_and(|live| live.consensus.is_leader())
    }

    pub(super) fn holds(&self, key: &KeyUid) -> bool {
        lock(&self.token).contains(key)
    }

    /// Does something on the node. `None` if it does not run; no answer will come if it stops meanwhile.
    pub(super) fn ask<T, F>(
        &self,
        work: impl FnOnce(Consensus) -> F + Send + 'static,
    ) -> Option<oneshot::Receiver<T>>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let order: Order = Box::new(move |consensus| {
            let work = work(consensus);
            Box::pin(async move {
                // Who asked may have given up.
                let _ = reply.send(work.await);
            })
        });
        let sent = lock(&self.live)
            .as_ref()
            .is_some_and(|live| live.orders.send(order).is_ok());
        sent.then_some(answer)
    }

    /// Imports what the state names, and acknowledges it.
    async fn hold_keys(self: Arc<Self>, consensus: Consensus) {
        let mut applied = consensus.applied();
        loop {
            applied.borrow_and_update();
            let mut wait = Duration::from_secs(1);
            if let Some(node) = consensus.raft_id() {
                let published = consensus.published();
                let versions = self.missing(&published, node);
                if !versions.is_empty() && published.state.nodes().contains(&node) {
                    let keys: Vec<KeyUid> = versions.iter().map(|(_, _, key)| *key).collect();
                    if self.bug != Bug::AckBeforeImport {
                        lock(&self.token).extend(keys.iter().copied());
                    }
                    let op = Op::AckVersions(AckVersions { node, versions });
                    let acknowledged = consensus.propose_as_node(op).await.is_ok();
                    if acknowledged && self.bug == Bug::AckBeforeImport {
                        tokio::time::sleep(ACK).await;
                        lock(&self.token).extend(keys);
                    }
                    wait = ACK;
                }
            }
            if let Ok(Err(_)) = tokio::time::timeout(wait, applied.changed()).await {
                return;
            }
        }
    }

    /// What it has to hold and has not acknowledged, or does not hold.
    fn missing(&self, published: &Published, node: u64) -> Vec<(ContextName, u32, KeyUid)> {
        let readable = published
            .state
            .versions()
            .iter()
            .filter(|(_, version)| version.state.is_readable());
        readable
            .filter(|(_, version)| !version.acks.contains(&node) || !self.holds(&version.key_uid))
            .map(|(key, version)| (key.context.clone(), key.version, version.key_uid))
            .collect()
    }

    /// Reports what the node's own reporter would.
    async fn report(self: Arc<Self>, consensus: Consensus) {
        loop {
            tokio::time::sleep(REPORT).await;
            let (Some(node), published) = (consensus.raft_id(), consensus.published()) else {
                continue;
            };
            if !published.state.nodes().contains(&node) {
                continue;
            }
            let (control, boot) = (consensus.control().get(), consensus.boot());
            let known = published.state.reports().get(&node);
            let applied = published.applied.map_or(0, |id| id.index);
            let durable_index = control.last_log.map_or(0, |id| id.index).min(applied);
            let is_news = known.is_none_or(|known| {
                known.boot != boot
                    || (published.changed > known.durable_index && durable_index > known.durable_index)
            });
            if !is_news {
                continue;
            }
            let report = NodeReport {
                seq: known.map_or(1, |known| known.seq + 1),
                boot,
                incarnation: control.incarnation,
                clock: clock::unix_millis(),
                durable_index,
                proven_at: self.missing(&published, node).is_empty().then_some(applied),
                feature_level: FEATURE_LEVEL,
                slots: BTreeMap::new(),
                uses: BTreeMap::new(),
            };
            // The next look says it again.
            let _ = consensus
                .propose_as_node(Op::ReportNode(ReportNode { node, report }))
                .await;
        }
    }
}

async fn obey(consensus: Consensus, mut orders: mpsc::UnboundedReceiver<Order>) {
    while let Some(order) = orders.recv().await {
        tokio::spawn(order(consensus.clone()));
    }
}

fn service(cluster: &Arc<dyn Cluster>, clocks: &Arc<Clocks>, limits: Limits) -> AdminService {
    let rotator = Rotator::new(
        Arc::clone(cluster),
        Arc::new(FakeKeys::default()),
        cluster_keys(),
        Arc::clone(clocks),
        limits,
    );
    AdminService::new(ServiceParts {
        cluster: Arc::clone(cluster),
        rotator: Arc::new(rotator),
        clocks: Arc::clone(clocks),
        policy: RotationPolicy::default(),
        max_invocations: BTreeMap::new(),
        destroy: Destroy {
            default_wait: DAY * 7,
            min_wait: DAY,
            recent_use: DAY * 7,
        },
        day: DAY,
        seed: Seed {
            issuers: vec![ISSUER.to_owned()],
            ..Seed::default()
        },
        cluster_ca_sha256: None,
        replication: Arc::new(Replication::new(replication_key(), "the simulation")),
    })
}
