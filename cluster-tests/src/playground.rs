//! A cluster for one test: made by `hsmctl dev` as a child process, in a folder and on ports of its own. When
//! it is dropped every node is killed by its pid; when the test itself is killed, a small guard does it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hsm_api::Client;
use hsm_api::admin::{ClusterStatus, NodeRole};
use nix::sys::signal::Signal;
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;

use crate::client::Pki;
use crate::guard::Guard;
use crate::node::Node;
use crate::ports::{free_base_port, is_free};
use crate::relay::{Place, Relays};
use crate::token_pool;
use crate::wait::until;

/// From a node's cluster port to its relay's.
const RELAY_OFFSET: u16 = 5;
/// From a node's first port to that of a balancer before all of them.
const BALANCER_OFFSET: u16 = 9;
/// More nodes than any test has.
const MAX_NODES: u32 = 16;
/// Forming a cluster of five on a slow machine.
const DEV_LIMIT: Duration = Duration::from_secs(300);
/// Readiness after a start.
const READY_LIMIT: Duration = Duration::from_secs(60);
const LEADER_LIMIT: Duration = Duration::from_secs(60);
/// A leader whose quorum is older than this is none any more.
const QUORUM_MS: u64 = 1200;
/// Words of a node of when it has last heard of a quorum.
const WORDS: u32 = 3;
/// Lines of each log that a failed test shows.
const TAIL: usize = 25;

/// How a program ended.
#[derive(Debug)]
pub struct Output {
    /// Exit code; `None` after a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// Standard output, if the program succeeded; otherwise what it said.
    pub fn ok(self) -> Result<Vec<u8>> {
        if self.code == Some(0) {
            return Ok(self.stdout);
        }
        bail!("exit code {:?}:\n{}", self.code, self.stderr)
    }
}

/// Who leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leader {
    /// Number of the node.
    pub node: u32,
    /// Its term.
    pub term: u64,
}

/// What a test wants of its cluster.
#[derive(Debug, Clone)]
pub struct Builder {
    nodes: u32,
    relayed: bool,
    form: bool,
    env: Vec<(String, OsString)>,
}

impl Builder {
    /// How many nodes; three unless it is said.
    #[must_use]
    pub fn nodes(mut self, nodes: u32) -> Self {
        self.nodes = nodes;
        self
    }

    /// With relays between the nodes, see [`Playground::relays`].
    #[must_use]
    pub fn relayed(mut self) -> Self {
        self.relayed = true;
        self
    }

    /// Only start the nodes; make no cluster of them.
    #[must_use]
    pub fn unformed(mut self) -> Self {
        self.form = false;
        self
    }

    /// A variable for `hsmctl dev` and, where it lets it through, the nodes.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.env.push((name.to_owned(), value.into()));
        self
    }

    /// Makes the cluster; returns once every node is ready.
    pub async fn start(self) -> Result<Playground> {
        let root = tempfile::Builder::new().prefix("hsm-cluster-").tempdir()?;
        let base_port = free_base_port(self.nodes)?;
        let dir = root.path().join("playground");
        let hsmctl = crate::binary("hsmctl")?;
        crate::binary("hsm-node")?;
        let guard = Guard::start(&hsmctl, root.path(), &dir)?;
        let mut playground = Playground {
            root,
            dir,
            hsmctl,
            base_port,
            nodes: self.nodes,
            relays: None,
            env: self.env,
            guard,
            passed: false,
        };
        if self.relayed {
            let places = playground.nodes().iter().map(place).collect();
            playground.relays = Some(Relays::start(playground.pki().dir(), places).await?);
        }
        let (nodes, port, offset) = (
            self.nodes.to_string(),
            base_port.to_string(),
            RELAY_OFFSET.to_string(),
        );
        let pool = token_pool::ready(&playground.hsmctl).await?;
        let pool = pool.to_str().context("the path of the token pool")?;
        let mut args = vec!["--nodes", &nodes, "--base-port", &port, "--tokens-from", pool];
        if self.relayed {
            args.extend(["--relay-offset", &offset]);
        }
        if !self.form {
            args.push("--no-form");
        }
        playground.dev("up", &args).await?;
        Ok(playground)
    }
}

fn place(node: &Node) -> Place {
    Place {
        number: node.number,
        relay_port: node.cluster_port + RELAY_OFFSET,
        cluster_port: node.cluster_port,
    }
}

/// A running cluster.
pub struct Playground {
    root: TempDir,
    dir: PathBuf,
    hsmctl: PathBuf,
    base_port: u16,
    nodes: u32,
    relays: Option<Relays>,
    env: Vec<(String, OsString)>,
    guard: Guard,
    passed: bool,
}

impl Playground {
    /// Three nodes unless the builder is told otherwise.
    #[must_use]
    pub fn builder() -> Builder {
        Builder {
            nodes: 3,
            relayed: false,
            form: true,
            env: Vec::new(),
        }
    }

    /// A formed cluster of `nodes` nodes, all ready.
    pub async fn start(nodes: u32) -> Result<Self> {
        Self::builder().nodes(nodes).start().await
    }

    /// The playground's folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A folder beside it, for a test's own files; removed with it.
    #[must_use]
    pub fn scratch(&self) -> &Path {
        self.root.path()
    }

    /// Its certificates.
    #[must_use]
    pub fn pki(&self) -> Pki {
        Pki::new(self.dir.join("pki"))
    }

    /// A node by number, from 1.
    #[must_use]
    pub fn node(&self, number: u32) -> Node {
        Node::new(&self.dir, self.base_port, number)
    }

    /// All nodes.
    #[must_use]
    pub fn nodes(&self) -> Vec<Node> {
        (1..=self.nodes).map(|number| self.node(number)).collect()
    }

    /// All nodes but one.
    #[must_use]
    pub fn others(&self, number: u32) -> Vec<Node> {
        self.nodes()
            .into_iter()
            .filter(|node| node.number != number)
            .collect()
    }

    /// The relays, if the builder was asked for them.
    pub fn relays(&self) -> Result<&Relays> {
        self.relays
            .as_ref()
            .context("this playground was started without relays")
    }

    /// A port for a balancer, one for each node.
    pub(crate) fn balancer_port(&self) -> Result<u16> {
        let nodes = self.nodes();
        let mut ports = nodes.iter().map(|node| node.api_port + BALANCER_OFFSET);
        ports
            .find(|port| is_free(*port))
            .context("as many balancers as nodes run already")
    }

    /// A client of all nodes that sends each request once.
    pub fn client(&self, profile: &str) -> Result<Client> {
        let endpoints: Vec<String> = self.nodes().iter().map(Node::endpoint).collect();
        self.pki()
            .client(Some(&self.pki().identity(profile)?), &endpoints)
    }

    /// A client of one node that sends each request once.
    pub fn client_on(&self, profile: &str, number: u32) -> Result<Client> {
        self.pki().client(
            Some(&self.pki().identity(profile)?),
            &[self.node(number).endpoint()],
        )
    }

    /// Runs hsmctl as somebody, with this on its standard input.
    pub async fn hsmctl_as(&self, profile: &str, args: &[&str], input: &[u8]) -> Result<Output> {
        let endpoints: Vec<String> = self.nodes().iter().map(Node::endpoint).collect();
        let pki = self.dir.join("pki");
        let mut command = tokio::process::Command::new(&self.hsmctl);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("HSM") {
                command.env_remove(name);
            }
        }
        command
            .args(args)
            .env("HSMCTL_ENDPOINTS", endpoints.join(","))
            .env("HSMCTL_CA", pki.join("ca.crt"))
            .env("HSMCTL_PKI", pki)
            .env("HSMCTL_PROFILE", profile)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command
            .spawn()
            .with_context(|| self.hsmctl.display().to_string())?;
        if let Some(mut stdin) = child.stdin.take() {
            // A program that does not read its input may end before it is written.
            let _ = stdin.write_all(input).await;
        }
        let output = tokio::time::timeout(DEV_LIMIT, child.wait_with_output())
            .await
            .with_context(|| format!("hsmctl {}: still running after {DEV_LIMIT:?}", args.join(" ")))??;
        Ok(Output {
            code: output.status.code(),
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs hsmctl as the administrator.
    pub async fn hsmctl(&self, args: &[&str]) -> Result<Output> {
        self.hsmctl_as("admin", args, &[]).await
    }

    /// Runs `hsmctl dev COMMAND --dir DIR …`, which has to succeed.
    pub async fn dev(&self, command: &str, args: &[&str]) -> Result<Vec<u8>> {
        let dir = self.dir.to_str().context("folder is not UTF-8")?;
        let mut all = vec!["dev", command, "--dir", dir];
        all.extend_from_slice(args);
        let output = self.hsmctl(&all).await?;
        output
            .ok()
            .with_context(|| format!("hsmctl dev {command} {}", args.join(" ")))
    }

    /// Starts a node that does not run; returns once it listens.
    pub async fn start_node(&self, number: u32) -> Result<()> {
        self.dev("start", &["--node", &number.to_string()])
            .await
            .map(drop)
    }

    /// Starts all nodes again and waits until they are ready, forming what is not formed.
    pub async fn up(&self) -> Result<()> {
        self.dev("up", &[]).await.map(drop)
    }

    /// One more node. With `join` false it only listens.
    pub async fn add_node(&mut self, join: bool) -> Result<Node> {
        let nodes = (self.nodes + 1).to_string();
        let pool = token_pool::ready(&self.hsmctl).await?;
        let pool = pool.to_str().context("the path of the token pool")?;
        let mut args = vec!["--nodes", nodes.as_str(), "--tokens-from", pool];
        if !join {
            args.push("--no-form");
        }
        self.dev("up", &args).await?;
        self.nodes += 1;
        Ok(self.node(self.nodes))
    }

    /// Until all of these are ready.
    pub async fn wait_ready(&self, nodes: &[Node]) -> Result<()> {
        for node in nodes {
            node.wait_ready(READY_LIMIT).await?;
        }
        Ok(())
    }

    /// One node's view, or nothing if it does not answer.
    pub async fn status(&self, number: u32) -> Option<ClusterStatus> {
        let client = self.client_on("admin", number).ok()?;
        client
            .cluster_status()
            .await
            .ok()
            .map(hsm_api::client::Answer::into_body)
    }

    /// When a node has last heard of a quorum, by what it says itself: not earlier than this. Of several words the latest,
    /// because what comes late says a time that is too early by as much.
    pub async fn last_heard(&self, number: u32) -> Result<Instant> {
        let mut latest: Option<Instant> = None;
        for _ in 0..WORDS {
            let asked = Instant::now();
            let status = self.status(number).await;
            let age = status.context("no status")?.staleness_ms;
            let age = Duration::from_millis(age.context("it has heard of nobody")?);
            latest = latest.max(asked.checked_sub(age));
        }
        latest.context("longer ago than the clock goes back")
    }

    /// The leader among all nodes that run.
    pub async fn leader(&self) -> Result<Leader> {
        self.leader_among(&self.nodes()).await
    }

    /// The leader among these.
    pub async fn leader_among(&self, nodes: &[Node]) -> Result<Leader> {
        until("a leader with a quorum", LEADER_LIMIT, async || {
            let mut best: Option<Leader> = None;
            for node in nodes.iter().filter(|node| node.pid().is_some()) {
                let Some(status) = self.status(node.number).await else {
                    continue;
                };
                let fresh = status.quorum_ack_age_ms.is_none_or(|age| age < QUORUM_MS);
                let newer = best.is_none_or(|best| best.term < status.term);
                if status.role == NodeRole::Leader && fresh && newer {
                    best = Some(Leader {
                        node: node.number,
                        term: status.term,
                    });
                }
            }
            best
        })
        .await
    }

    /// The end of a test that succeeded: no logs are shown.
    pub fn passed(mut self) {
        self.passed = true;
    }

    fn show_logs(&self) {
        for node in self.nodes() {
            let log = node.log();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("--- end of the log of {}", node.id());
            for line in &lines[lines.len().saturating_sub(TAIL)..] {
                eprintln!("{line}");
            }
        }
    }
}

impl Drop for Playground {
    fn drop(&mut self) {
        if !self.passed {
            self.show_logs();
        }
        for number in 1..=MAX_NODES {
            // Nothing can be done about one that cannot be killed.
            let _ = self.node(number).signal(Signal::SIGKILL);
        }
        if keep() {
            self.root.disable_cleanup(true);
            eprintln!("kept: {}", self.root.path().display());
        }
        self.guard.end();
    }
}

/// `HSM_TEST_KEEP=1` keeps the folders of tests.
fn keep() -> bool {
    std::env::var_os("HSM_TEST_KEEP").is_some_and(|value| !value.is_empty())
}
