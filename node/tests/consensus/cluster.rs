//! The parent's side: certificates, children, relays between them.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use sha2::{Digest, Sha256};

use crate::child::{CONFIG, Config};
use crate::relay::Relay;

/// Certificates of one cluster.
pub(crate) struct Pki {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    pub(crate) ca_sha256: String,
}

impl Pki {
    pub(crate) fn new(dir: &Path) -> Self {
        std::fs::create_dir_all(dir).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "test cluster CA");
        let ca = params.self_signed(&key).unwrap();
        std::fs::write(dir.join("ca.crt"), ca.pem()).unwrap();
        let ca_sha256 = hex::encode(Sha256::digest(ca.der()));
        Self {
            dir: dir.into(),
            issuer: Issuer::new(params, key),
            ca_sha256,
        }
    }

    /// Issues a certificate for `name`; a later one replaces it.
    pub(crate) fn issue(&self, name: &str) {
        use rcgen::ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names.push(SanType::URI(
            format!("hsm://test/{name}").as_str().try_into().unwrap(),
        ));
        params.extended_key_usages = vec![ServerAuth, ClientAuth];
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(self.dir.join(format!("{name}.crt")), cert.pem()).unwrap();
        std::fs::write(self.dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
}

/// A running child.
pub(crate) struct Node {
    process: Child,
    input: ChildStdin,
    lines: Mutex<Receiver<String>>,
    answers: Mutex<BTreeMap<u64, String>>,
    next: u64,
    pub(crate) said: Arc<Mutex<Vec<String>>>,
}

impl Node {
    fn start(config: &Config) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args([
                "child::child_that_is_a_node_until_it_is_killed",
                "--exact",
                "--nocapture",
                "--test-threads=1",
            ])
            .env(CONFIG, serde_json::to_string(config).unwrap())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        let said = Arc::new(Mutex::new(Vec::new()));
        let (output, heard) = (process.stdout.take().unwrap(), Arc::clone(&said));
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                heard.lock().unwrap().push(line.clone());
                let _ = sender.send(line);
            }
        });
        let input = process.stdin.take().unwrap();
        let node = Self {
            process,
            input,
            lines: Mutex::new(lines),
            answers: Mutex::default(),
            next: 0,
            said,
        };
        node.wait_for_line(|line| line.ends_with("started") || line.contains("refused "));
        node
    }

    fn wait_for_line(&self, wanted: impl Fn(&str) -> bool) {
        let deadline = Instant::now() + LONG;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self
                .lines
                .lock()
                .unwrap()
                .recv_timeout(left)
                .expect("the child says it has started");
            if wanted(&line) {
                return;
            }
        }
    }

    /// Sends a command and waits for its answer.
    pub(crate) fn ask(&mut self, command: &str, within: Duration) -> Result<String, String> {
        self.next += 1;
        let number = self.next;
        writeln!(self.input, "{number} {command}").map_err(|e| format!("gone: {e}"))?;
        let deadline = Instant::now() + within;
        loop {
            if let Some(answer) = self.answers.lock().unwrap().remove(&number) {
                return match answer.split_once(' ') {
                    Some(("ok", text)) => Ok(text.to_string()),
                    _ => Err(answer.trim_start_matches("err ").to_string()),
                };
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self
                .lines
                .lock()
                .unwrap()
                .recv_timeout(left)
                .map_err(|e| format!("no answer: {e}"))?;
            if let Some((id, answer)) = line.split_once(' ')
                && let Ok(id) = id.parse()
            {
                self.answers.lock().unwrap().insert(id, answer.to_string());
            }
        }
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Waits until the process has ended by itself.
    pub(crate) fn wait_until_ended(&mut self, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        while Instant::now() < deadline {
            if self.process.try_wait().unwrap().is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    pub(crate) fn has_said(&self, what: &str) -> bool {
        self.said.lock().unwrap().iter().any(|line| line.contains(what))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Where a node stands, as it says.
#[derive(Debug, Clone)]
pub(crate) struct Stand {
    pub(crate) role: String,
    pub(crate) term: u64,
    pub(crate) last_log: u64,
    pub(crate) applied: u64,
    pub(crate) staleness_ms: i64,
    pub(crate) gate_open: bool,
}

/// Children, certificates and relays of one cluster.
pub(crate) struct Cluster {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) pki: Pki,
    pub(crate) nodes: BTreeMap<usize, Node>,
    ports: Vec<u16>,
    relays: BTreeMap<(usize, usize), Relay>,
    size: usize,
}

/// For what takes milliseconds, on a machine that stands still now and then.
pub(crate) const SHORT: Duration = Duration::from_secs(10);
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// Ports that nobody listens on, below those that the kernel gives to outgoing connections: a node that was killed
/// has to get its own back.
fn free_ports(count: usize) -> Vec<u16> {
    const PORTS: u32 = 12_000;
    /// Of clusters beside each other.
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut given = GIVEN.lock().unwrap();
    let nanos = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.subsec_nanos());
    let first = (nanos ^ std::process::id().rotate_left(16)) % PORTS;
    let ports: Vec<u16> = (0..PORTS)
        .map(|step| 20_000 + u16::try_from((first + step) % PORTS).unwrap())
        .filter(|port| !given.contains(port) && TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .take(count)
        .collect();
    assert_eq!(ports.len(), count, "too few ports are free below 32000");
    given.extend(&ports);
    ports
}

impl Cluster {
    /// `size` nodes, all voters; `spare` more may be started later.
    pub(crate) fn new(size: usize, spare: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::new(&dir.path().join("pki"));
        let all = size + spare;
        let ports = free_ports(all);
        let mut relays = BTreeMap::new();
        for (from, to) in (0..all).flat_map(|from| (0..all).map(move |to| (from, to))) {
            if from != to {
                relays.insert((from, to), Relay::new(ports[to]));
            }
        }
        let mut cluster = Self {
            dir,
            pki,
            nodes: BTreeMap::new(),
            ports,
            relays,
            size,
        };
        for node in 0..all {
            cluster.pki.issue(&Self::name(node));
        }
        cluster.start(0);
        cluster.node(0).ask("found", LONG).unwrap();
        for node in 1..size {
            cluster.start(node);
            cluster.join(node).unwrap();
        }
        cluster
    }

    pub(crate) fn name(node: usize) -> String {
        format!("n{node}")
    }

    pub(crate) fn data(&self, node: usize) -> PathBuf {
        self.dir.path().join(Self::name(node))
    }

    pub(crate) fn address(&self, node: usize) -> String {
        format!("127.0.0.1:{}", self.ports[node])
    }

    pub(crate) fn config(&self, node: usize) -> Config {
        let pki = self.dir.path().join("pki");
        let peers = self.relays.iter().filter(|((from, _), _)| *from == node);
        Config {
            name: Self::name(node),
            dir: self.data(node),
            listen: self.address(node),
            advertise: self.address(node),
            peers: peers
                .map(|((_, to), relay)| (Self::name(*to), format!("127.0.0.1:{}", relay.port)))
                .collect(),
            ca: pki.join("ca.crt"),
            cert: pki.join(format!("{}.crt", Self::name(node))),
            key: pki.join(format!("{}.key", Self::name(node))),
            trk: 5,
        }
    }

    pub(crate) fn start(&mut self, node: usize) {
        let config = self.config(node);
        self.start_as(node, &config);
    }

    pub(crate) fn start_as(&mut self, node: usize, config: &Config) {
        self.nodes.remove(&node);
        self.nodes.insert(node, Node::start(config));
    }

    pub(crate) fn node(&mut self, node: usize) -> &mut Node {
        self.nodes.get_mut(&node).expect("started")
    }

    pub(crate) fn token(&mut self) -> String {
        let leader = self.leader();
        self.node(leader).ask("token", SHORT).unwrap()
    }

    pub(crate) fn join(&mut self, node: usize) -> Result<String, String> {
        let (token, ca) = (self.token(), self.pki.ca_sha256.clone());
        let addresses: Vec<String> = (0..self.size)
            .filter(|n| *n != node)
            .map(|n| self.address(n))
            .collect();
        let command = format!("join {token} {ca} {}", addresses.join(" "));
        self.node(node).ask(&command, LONG)
    }

    pub(crate) fn kill(&mut self, node: usize) {
        self.node(node).kill();
        self.nodes.remove(&node);
    }

    /// Kills every node: all are signalled before any of them is waited for.
    pub(crate) fn kill_all(&mut self) {
        for node in self.nodes.values_mut() {
            let _ = node.process.kill();
        }
        self.nodes.clear();
    }

    pub(crate) fn stand(&mut self, node: usize) -> Option<Stand> {
        let text = self.nodes.get_mut(&node)?.ask("view", SHORT).ok()?;
        let words: Vec<&str> = text.split(' ').collect();
        Some(Stand {
            role: words[0].into(),
            term: words[1].parse().ok()?,
            last_log: words[3].parse().ok()?,
            applied: words[4].parse().ok()?,
            staleness_ms: words[5].parse().ok()?,
            gate_open: words[6].starts_with("Open"),
        })
    }

    /// The node that leads in the highest term, once there is one.
    pub(crate) fn leader(&mut self) -> usize {
        let mut found = None;
        self.wait("a leader", LONG, |cluster| {
            let ids: Vec<usize> = cluster.nodes.keys().copied().collect();
            let leaders = ids.into_iter().filter_map(|id| {
                let stand = cluster.stand(id)?;
                (stand.role == "leader" && stand.staleness_ms >= 0).then_some((stand.term, id))
            });
            found = leaders.max().map(|(_, id)| id);
            found.is_some()
        });
        found.unwrap()
    }

    pub(crate) fn wait(&mut self, what: &str, within: Duration, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + within;
        while !done(self) {
            assert!(Instant::now() < deadline, "waited {within:?} in vain for {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Has a key put by whoever leads: another one may have been elected since somebody looked.
    pub(crate) fn put(&mut self, key: &str) {
        self.wait(&format!("put {key}"), LONG, |cluster| {
            let leader = cluster.leader();
            cluster.node(leader).ask(&format!("put {key}"), SHORT).is_ok()
        });
    }

    /// Cuts or heals all links between `one` and the rest.
    pub(crate) fn isolate(&self, some: &[usize], cut: bool) {
        for ((from, to), relay) in &self.relays {
            if some.contains(from) != some.contains(to) {
                relay.set(cut);
            }
        }
    }

    /// Waits until all running nodes have the same state, and returns it.
    pub(crate) fn converge(&mut self) -> Vec<String> {
        self.wait("equal states at equal index", LONG, |cluster| {
            let ids: Vec<usize> = cluster.nodes.keys().copied().collect();
            let digests: Vec<_> = ids
                .into_iter()
                .map(|id| cluster.node(id).ask("digest", SHORT).ok())
                .collect();
            digests
                .iter()
                .all(|digest| digest.is_some() && *digest == digests[0])
        });
        let any = *self.nodes.keys().next().unwrap();
        self.node(any)
            .ask("all", SHORT)
            .unwrap()
            .split(' ')
            .map(String::from)
            .collect()
    }
}
