//! A simulated cluster: its nodes, what disturbs them, and the steps in which both go on.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use raft_store::command::{AddTransportKey, CreateJoinToken, Done, Op};
use raft_store::names::TransportId;
use raft_store::state::access::{Role, RoleEntry};
use raft_store::state::frozen::AclV1;
use raft_store::state::slot::TransportMode;
use sha2::{Digest, Sha256};
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

use super::super::test_world::tls;
use super::super::{FoundSeed, JoinRequest, join_token_text};
use super::Bug;
use super::chance::Chance;
use super::faults::Faults;
use super::node::Node;
use super::oracle::{Oracle, Violations};
use super::panics;
use super::workload::{Client, create};
use crate::identity::test_certs::TestCa;
use crate::rotation::testing::{ISSUER, slot};
use crate::tls::ClusterTls;

/// Nodes at most.
pub(super) const MAX_NODES: usize = 5;
/// What one step of every node and of the network takes.
const TICK: Duration = Duration::from_millis(2);
/// Until a step of founding is done.
const SETTLES: Duration = Duration::from_secs(60);
/// Of the join token.
const SECRET: [u8; 32] = [3; 32];
const CONTEXTS: [&str; 2] = ["a", "b"];

/// Certificates of all nodes, made once for all runs.
fn certificates() -> &'static Vec<Arc<ClusterTls>> {
    static MADE: OnceLock<Vec<Arc<ClusterTls>>> = OnceLock::new();
    MADE.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let ca = TestCa::new("simulated cluster");
        std::fs::write(dir.path().join("ca.crt"), &ca.pem).unwrap();
        let issue = |number| {
            let name = name_of(number);
            let certificate = ca.server(&name, Some(&format!("hsm://test/{name}")));
            certificate.write(dir.path(), &name);
            tls(dir.path(), &name)
        };
        (0..MAX_NODES).map(issue).collect()
    })
}

fn name_of(number: usize) -> String {
    format!("n{}", number + 1)
}

/// See the module.
pub(super) struct Cluster {
    pub(super) sim: turmoil::Sim<'static>,
    pub(super) nodes: Vec<Arc<Node>>,
    pub(super) oracle: Oracle,
    pub(super) clients: Vec<Client>,
    pub(super) violations: Arc<Violations>,
    /// The nodes that do not run, and when each is started again.
    pub(super) down: BTreeMap<usize, Duration>,
    votes: Vec<Option<raft_store::Vote>>,
    /// Whether a step ended in an error, after which there is no other.
    over: bool,
}

impl Cluster {
    /// Nodes without a cluster.
    pub(super) fn new(seed: u64, count: usize, dir: &Path, bug: Bug) -> Self {
        let violations = Arc::<Violations>::default();
        let mut sim = turmoil::Builder::new()
            .tick_duration(TICK)
            .simulation_duration(Duration::from_secs(24 * 3600))
            .min_message_latency(Duration::from_millis(1))
            .max_message_latency(Duration::from_millis(20))
            .tcp_capacity(1024)
            // turmoil never gives back the port of a connection that did not come about.
            .ephemeral_ports(10_000..=65_535)
            .enable_random_order()
            .rng_seed(seed)
            .build();
        let mut nodes = Vec::new();
        for (number, tls) in certificates().iter().enumerate().take(count) {
            let name = name_of(number);
            let data = dir.join(&name);
            let node = Node::new(&name, data, Arc::clone(tls), bug, Arc::clone(&violations));
            nodes.push(Arc::clone(&node));
            sim.host(name, move || Arc::clone(&node).run());
        }
        Self {
            sim,
            oracle: Oracle::new(count, Arc::clone(&violations)),
            clients: Vec::new(),
            violations,
            down: BTreeMap::new(),
            votes: vec![None; count],
            nodes,
            over: false,
        }
    }

    pub(super) fn now(&self) -> Duration {
        self.sim.elapsed()
    }

    pub(super) fn name(&self, node: usize) -> String {
        self.nodes[node].name.clone()
    }

    /// One step of everything. False if there is none any more.
    pub(super) fn step(&mut self) -> bool {
        if self.over {
            return false;
        }
        let stepped = self.sim.step();
        for panic in panics::said() {
            self.violations.add("no node panics", panic);
        }
        if let Err(error) = stepped {
            self.violations.add("no node panics", error.to_string());
            self.over = true;
            return false;
        }
        let now = self.now();
        let due: Vec<usize> = self
            .down
            .iter()
            .filter(|(_, at)| **at <= now)
            .map(|(node, _)| *node)
            .collect();
        for node in due {
            self.down.remove(&node);
            self.sim.bounce(self.name(node));
        }
        for node in 0..self.nodes.len() {
            if self.down.contains_key(&node) {
                continue;
            }
            if let Some(published) = self.nodes[node].published() {
                self.oracle.look(&self.nodes, node, &published, now);
            }
            if let Some(vote) = self.nodes[node].vote() {
                let before = self.votes[node].replace(vote);
                if before
                    .is_some_and(|before| vote.partial_cmp(&before).is_none_or(std::cmp::Ordering::is_lt))
                {
                    let what = format!("{}: {vote} after {before:?}", self.nodes[node].name);
                    self.violations.add("a vote never goes back", what);
                }
            }
        }
        true
    }

    /// Lets the clients go on.
    pub(super) fn serve(&mut self, chance: &mut Chance) {
        let now = self.now();
        for client in &mut self.clients {
            client.step(&self.nodes, &mut self.oracle, chance, now);
        }
    }

    /// The power of a node goes, and comes back. Of what it wrote and did not sync a beginning is left.
    pub(super) fn crash(&mut self, node: usize, back_at: Duration, chance: &mut Chance) {
        self.nodes[node].stop();
        self.sim.crash(self.name(node));
        self.nodes[node].disk.crash(|count| chance.index(count + 1));
        self.down.insert(node, back_at);
    }

    /// Steps until `holds`; false if that does not come to pass in this time.
    pub(super) fn until(&mut self, within: Duration, mut holds: impl FnMut(&mut Self) -> bool) -> bool {
        let deadline = self.now() + within;
        while !holds(self) {
            if self.now() >= deadline || !self.step() {
                return false;
            }
        }
        true
    }

    /// Waits for the answer of a node.
    fn answer<T>(&mut self, answer: Option<oneshot::Receiver<T>>) -> Result<T, String> {
        let mut answer = answer.ok_or("the node does not run")?;
        let mut heard = None;
        self.until(SETTLES, |_| match answer.try_recv() {
            Err(TryRecvError::Empty) => false,
            told => {
                heard = told.ok();
                true
            }
        });
        heard.ok_or_else(|| "no answer".to_owned())
    }

    fn leader(&self) -> Option<&Arc<Node>> {
        self.nodes.iter().find(|node| node.leads())
    }

    fn propose(&mut self, op: Op) -> Result<Done, String> {
        let leader = self.leader().cloned().ok_or("nobody leads")?;
        let asked = leader.ask(move |consensus| async move { consensus.propose_as_leader(op).await });
        self.answer(asked)?.map_err(|error| error.to_string())
    }

    /// Founds a cluster of all nodes, with two contexts that have a key, and as many clients of each.
    pub(super) fn found(&mut self, chance: &mut Chance) -> Result<(), String> {
        if !self.until(SETTLES, |this| {
            this.nodes.iter().all(|node| node.published().is_some())
        }) {
            return Err("a node does not start".to_owned());
        }
        let seed = FoundSeed {
            acl: acl(),
            revocations: vec![],
        };
        let asked = self.nodes[0].ask(move |consensus| async move { consensus.found(seed).await });
        self.answer(asked)?.map_err(|error| error.to_string())?;
        for number in 1..self.nodes.len() {
            self.join(number)?;
        }
        self.propose(Op::AddTransportKey(AddTransportKey {
            slot: slot("s"),
            id: TransportId([1; 16]),
            expected_generation: 0,
            mode: TransportMode::Standard,
            check: vec![7; 40],
            grants: BTreeMap::new(),
        }))?;
        for context in CONTEXTS {
            let deadline = self.now() + SETTLES;
            loop {
                let Some(leader) = self.leader().cloned() else {
                    return Err("nobody leads".to_owned());
                };
                let asked = create(&leader, context);
                match self.answer(asked)? {
                    Ok(_) => break,
                    // A node has not reported yet what it understands.
                    Err(error) if self.now() >= deadline => return Err(error.to_string()),
                    Err(_) => {
                        let pause = chance.millis(100, 200);
                        self.until(pause, |_| false);
                    }
                }
            }
            for _ in 0..2 {
                let number = self.clients.len();
                self.clients
                    .push(Client::new(number, context, Arc::clone(&self.violations)));
            }
        }
        Ok(())
    }

    fn join(&mut self, number: usize) -> Result<(), String> {
        let made = self.propose(Op::CreateJoinToken(CreateJoinToken {
            secret_hash: Sha256::digest(SECRET).into(),
            expires_at: i64::MAX,
            node: None,
        }))?;
        let Done::JoinToken { number: token } = made else {
            return Err(format!("{made:?}"));
        };
        let request = JoinRequest {
            token: join_token_text(token, &SECRET),
            cluster_ca_sha256: certificates()[0].ca_sha256,
            addresses: vec![self.nodes[0].address()],
            slots: vec![],
        };
        let asked = self.nodes[number].ask(move |consensus| async move { consensus.join(request).await });
        self.answer(asked)?.map(|_| ()).map_err(|error| error.to_string())
    }

    /// Everything is mended, and after a while everything goes on: every node has caught up with the others, and every
    /// context is rotated a few times.
    pub(super) fn settle(&mut self, faults: &mut Faults, chance: &mut Chance) {
        const WITHIN: Duration = Duration::from_secs(60);
        const ROTATIONS: u64 = 2;
        faults.mend(self);
        // What was begun is over, and nobody is silent from before. Nothing is asked meanwhile: on a cluster that is well
        // it would take most of a run's time, and try nothing.
        self.until(Duration::from_secs(8), |_| false);
        let before: Vec<u64> = self.clients.iter().map(Client::served).collect();
        let went_on = self.until(WITHIN, |this| {
            this.serve(chance);
            let served = |(client, before): (&Client, &u64)| client.served() >= before + ROTATIONS;
            this.clients.iter().zip(&before).all(served)
        });
        let target = self.oracle.highest();
        let caught_up = went_on
            && self.until(WITHIN, |this| {
                this.nodes.iter().all(|node| {
                    let applied = node.published().and_then(|published| published.applied);
                    node.has_caught_up() && applied.is_some_and(|applied| applied.index >= target)
                })
            });
        if !caught_up && !self.over {
            let stand = |node: &Arc<Node>| {
                let published = node.published();
                let applied = published.and_then(|published| published.applied);
                let applied = applied.map_or_else(|| "down".to_owned(), |applied| applied.to_string());
                format!("{} {applied} leads: {}", node.name, node.leads())
            };
            let stands: Vec<String> = self.nodes.iter().map(stand).collect();
            self.violations
                .add("everything goes on once it is mended", stands.join(", "));
        }
        for node in &self.nodes {
            if let Some(published) = node.published() {
                self.oracle.look_for_all(&node.name, &published);
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in &self.nodes {
            node.stop();
        }
    }
}

fn acl() -> AclV1 {
    AclV1 {
        mappings: BTreeMap::new(),
        roles: vec![RoleEntry {
            role: Role::Admin,
            issuer: ISSUER.to_owned(),
            ou: Some("Admin".to_owned()),
            cn: None,
            spki_sha256: None,
        }],
    }
}
