//! The cluster under test: a playground, with everything in place from the start that the faults of a run need: relays between
//! the nodes, disks of their own, a shim before their tokens, a wall clock that can be moved.

mod equip;
mod look;
mod start;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::wall_clock::{self, SharedMemory};
use cluster_tests::{Node, Playground, Program, failpoints, until};
use nix::sys::signal::Signal;

use crate::cluster::equip::Equipment;
use crate::faults;
use crate::faults::unsynced::Loss;
use crate::network::{Network, NetworkKind};
use crate::options::Options;
use crate::oracles::ends;
use crate::record;
use crate::schedule::FaultKind;

pub(crate) use equip::{Disk, copy};
pub use look::Committed;
pub(crate) use start::Missed;

/// The longest silence before an election, `cluster.raft.election_max_ms` as it is unless it is configured.
pub const ELECTION: Duration = Duration::from_millis(1200);
/// `cluster.raft.snapshot_every` of these nodes: logs that end soon.
pub(crate) const SNAPSHOT_EVERY: u64 = 100;
/// `cluster.raft.keep_logs` of these nodes.
pub(crate) const KEEP_LOGS: u64 = 50;
/// Nodes that a playground has ports for.
const MOST_NODES: u32 = 9;
/// For a process to end that waits for a disk which is slow on purpose.
const POWER_OFF: Duration = Duration::from_secs(30);

/// How many nodes can join a cluster of so many.
#[must_use]
pub fn spare(nodes: u32) -> u32 {
    MOST_NODES.saturating_sub(nodes).min(6)
}

/// See the module.
pub struct Cluster {
    playground: Playground,
    network: Network,
    kinds: BTreeSet<FaultKind>,
    config: Option<fn(&str) -> String>,
    equipment: Mutex<BTreeMap<u32, Equipment>>,
    /// The highest number that a node can get.
    most: u32,
    /// Numbers of the nodes that belong to the cluster.
    members: Mutex<BTreeSet<u32>>,
    /// They are not to run now, whoever looks after the others.
    down: Mutex<BTreeSet<u32>>,
    /// Whoever moves one, or needs them to be right.
    clocks: tokio::sync::Mutex<()>,
    keep: bool,
    _program: Program,
    _shared_memory: SharedMemory,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cluster {
    /// Makes it; returns once every node is ready.
    ///
    /// # Errors
    /// The playground cannot be made, or what a fault needs cannot be put in place here.
    pub async fn start(options: &Options) -> Result<Self> {
        ends::adopt_orphans()?;
        let kinds = options.faults.clone();
        let grows = kinds.contains(&FaultKind::JoinRemove);
        let more = if grows { spare(options.nodes) } else { 0 };
        let network = Network::make(options.network, options.nodes + more)?;
        let program = Program::new()?;
        let mut before = network.before_node();
        if kinds.contains(&FaultKind::ClockStep) {
            before.push_str(&wall_clock::before_node()?);
        }
        program.write(&before)?;
        let mut builder = Playground::builder()
            .nodes(options.nodes)
            .spare(more)
            .relayed()
            .prepared()
            .within(&options.dir)
            .env("HSM_NODE_BIN", program.path());
        if let Some(subnet) = network.subnet() {
            builder = builder.subnet(subnet);
        }
        if let Some(failpoints) = options.failpoints() {
            builder = builder.env("HSM_FAILPOINTS", failpoints);
        }
        let playground = builder.start().await?;
        let mut cluster = Self {
            playground,
            network,
            kinds,
            config: options.config,
            equipment: Mutex::default(),
            most: options.nodes + spare(options.nodes),
            members: Mutex::new((1..=options.nodes).collect()),
            down: Mutex::default(),
            clocks: tokio::sync::Mutex::default(),
            keep: false,
            _program: program,
            _shared_memory: SharedMemory,
        };
        for node in cluster.nodes() {
            cluster.equip(&node)?;
        }
        cluster.playground.up().await?;
        cluster.playground.wait_ready(&cluster.nodes()).await?;
        if cluster.kinds.contains(&FaultKind::TokenOlder) {
            faults::token::keep_copies(&cluster)?;
        }
        cluster.playground.be_quiet();
        Ok(cluster)
    }

    /// Clients, certificates, hsmctl.
    #[must_use]
    pub fn playground(&self) -> &Playground {
        &self.playground
    }

    /// What the network is, in one line.
    #[must_use]
    pub fn network(&self) -> String {
        self.network.to_string()
    }

    /// The same in a word.
    #[must_use]
    pub fn network_kind(&self) -> NetworkKind {
        self.network.kind()
    }

    /// How links are cut.
    #[must_use]
    pub fn links(&self) -> Links<'_> {
        Links(self)
    }

    /// Those that are members, in the order of their numbers.
    #[must_use]
    pub fn nodes(&self) -> Vec<Node> {
        self.members()
            .into_iter()
            .map(|number| self.playground.node(number))
            .collect()
    }

    /// Their numbers.
    #[must_use]
    pub fn members(&self) -> Vec<u32> {
        lock(&self.members).iter().copied().collect()
    }

    /// The highest number that a node can get: who follows all of them follows those that join later, too.
    #[must_use]
    pub fn most(&self) -> u32 {
        self.most
    }

    /// Whether a kind was asked for.
    pub(crate) fn tries(&self, kind: FaultKind) -> bool {
        self.kinds.contains(&kind)
    }

    /// How many may fail while the others have a quorum.
    #[must_use]
    pub fn tolerated(&self) -> usize {
        (self.members().len().saturating_sub(1)) / 2
    }

    /// A node that a member number names now.
    #[must_use]
    pub fn node(&self, number: u32) -> Node {
        self.playground.node(number)
    }

    pub(crate) fn admit(&self, number: u32) {
        lock(&self.members).insert(number);
    }

    pub(crate) fn dismiss(&self, number: u32) {
        lock(&self.members).remove(&number);
    }

    /// Keeps a node from being started by whoever brings the others back.
    pub(crate) fn hold_down(&self, number: u32, down: bool) {
        let mut held = lock(&self.down);
        if down {
            held.insert(number);
        } else {
            held.remove(&number);
        }
    }

    /// Starts a node; returns once it listens.
    ///
    /// # Errors
    /// It does not start.
    pub async fn start_node(&self, number: u32) -> Result<()> {
        self.playground.start_node(number).await
    }

    /// Where a node's data really lies.
    pub(crate) fn data_below(&self, number: u32) -> std::path::PathBuf {
        self.with_layer(number, |layer| layer.below().to_owned())
            .unwrap_or_else(|_| self.node(number).dir.join("data"))
    }

    /// These nodes' machines lose power at once: SIGKILL, and of what they have written and not synchronised so much is gone.
    /// How many changes that were.
    ///
    /// # Errors
    /// The layer under a node's data is not there, or a node does not end.
    pub async fn power_off(&self, numbers: &[u32], loss: &Loss) -> Result<usize> {
        for number in numbers {
            self.node(*number).signal(Signal::SIGKILL)?;
        }
        let mut lost = 0;
        for number in numbers {
            // Now: a process that waits for its disk ends only once that has answered, and then nothing would be left to lose.
            lost += self.with_layer(*number, |layer| layer.lose(loss))??;
        }
        for number in numbers {
            self.node(*number).wait_gone(POWER_OFF).await?;
            // What its threads wrote meanwhile.
            self.with_layer(*number, |layer| layer.lose(&Loss::All))??;
        }
        Ok(lost)
    }

    /// What is done with the layer under a node's data.
    pub(crate) fn with_layer<T>(
        &self,
        number: u32,
        act: impl FnOnce(&faults::unsynced::Layer) -> T,
    ) -> Result<T> {
        let equipment = lock(&self.equipment);
        let layer = equipment.get(&number).and_then(|equipment| equipment.layer());
        layer.map(act).with_context(|| {
            format!(
                "node {number}: no layer is under its data; none of the faults that were asked for needs one, or it could not \
                 be mounted"
            )
        })
    }

    pub(crate) fn with_equipment<T>(&self, number: u32, act: impl FnOnce(&Equipment) -> T) -> Result<T> {
        let equipment = lock(&self.equipment);
        let equipment = equipment.get(&number);
        Ok(act(
            equipment.with_context(|| format!("node {number}: not equipped"))?
        ))
    }

    /// Undoes every fault, and starts every node that should run.
    ///
    /// # Errors
    /// Something cannot be undone, or a node does not start.
    pub async fn heal(&self) -> Result<()> {
        self.links().heal()?;
        self.playground.relays()?.calm();
        lock(&self.down).clear();
        for node in self.nodes() {
            node.signal(Signal::SIGCONT)?;
            if self.tries(FaultKind::Failpoint) && node.pid().is_some() {
                disarm(&node).await;
            }
            if self.kinds.contains(&FaultKind::ClockStep) {
                wall_clock::set(&node, "+0d")?;
            }
            self.with_equipment(node.number, Equipment::heal)??;
            faults::token::put_back(&node).await?;
        }
        self.start_stopped().await
    }

    /// Until every node is ready and all have applied the same.
    ///
    /// # Errors
    /// What they say at the end of the time.
    pub async fn settle(&self, within: Duration) -> Result<()> {
        let nodes = self.nodes();
        ensure!(!nodes.is_empty(), "no node is left");
        let mut seen = Vec::new();
        let settled = until("equal applied indexes on ready nodes", within, async || {
            seen.clear();
            for node in &nodes {
                let status = self.playground.status(node.number).await;
                seen.push(status.map(|status| (node.number, status.ready, status.applied_index)));
            }
            let first = seen.first()?.as_ref()?.2;
            let same =
                |one: &Option<(u32, bool, u64)>| one.is_some_and(|(_, ready, index)| ready && index == first);
            seen.iter().all(same).then_some(())
        })
        .await;
        settled.with_context(|| format!("node, ready, applied index: {seen:?}"))
    }

    /// Leaves the folder when this is dropped.
    pub fn keep(&mut self) {
        self.keep = true;
        self.playground.keep();
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Nodes first: what they hold open could not be unmounted.
        let numbers: Vec<u32> = lock(&self.equipment).keys().copied().collect();
        for number in &numbers {
            // A stopped process dies of SIGKILL too.
            let _ = self.node(*number).signal(Signal::SIGKILL);
        }
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(10)
            && numbers.iter().any(|number| self.node(*number).pid().is_some())
        {
            std::thread::sleep(Duration::from_millis(20));
        }
        for (number, equipment) in std::mem::take(&mut *lock(&self.equipment)) {
            if let Err(error) = equipment.take_away(self.keep) {
                eprintln!("node {number}: {error:#}");
            }
        }
    }
}

/// Takes back whatever line a step that has failed has left armed: nobody is to die there while the end is judged. What is built
/// into the nodes on purpose stays.
async fn disarm(node: &Node) {
    for name in record::lines() {
        if let Err(error) = failpoints::arm(node, name, "off").await {
            // One that has ended in this moment has nothing armed any more.
            if node.pid().is_some() {
                eprintln!("{}: {name} may still be armed: {error:#}", node.id());
            }
            return;
        }
    }
}

/// The links between the nodes: cut by routes where the nodes have a network of their own, else by relays.
pub struct Links<'a>(&'a Cluster);

impl Links<'_> {
    /// Nothing of `from` reaches `to` any more.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn cut_one_way(&self, from: u32, to: u32) -> Result<()> {
        if self.0.network.subnet().is_some() {
            return self.0.network.cut_one_way(from, to);
        }
        self.0.playground.relays()?.cut_one_way(from, to);
        Ok(())
    }

    /// Both directions.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn cut(&self, a: u32, b: u32) -> Result<()> {
        self.cut_one_way(a, b)?;
        self.cut_one_way(b, a)
    }

    /// Every link between these and all other members.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn separate(&self, group: &[u32]) -> Result<()> {
        let members = self.0.members();
        for inside in group {
            for outside in members.iter().filter(|member| !group.contains(member)) {
                self.cut(*inside, *outside)?;
            }
        }
        Ok(())
    }

    /// Mends all.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn heal(&self) -> Result<()> {
        self.0.playground.relays()?.heal();
        self.0.network.heal()
    }
}
