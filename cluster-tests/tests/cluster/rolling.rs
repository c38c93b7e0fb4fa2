//! All nodes restarted one by one, each with another binary, behind real balancers and under load: no request fails. What
//! counts them repeats nothing ([`cluster_tests::once`]).

mod background;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::haproxy::BALANCER;
use cluster_tests::once::{Balancer, Report};
use cluster_tests::playground::Output;
use cluster_tests::{Edge, Haproxy, Nginx, Node, Once, Playground, Stalls, binary, until};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use tokio::net::TcpStream;

use self::background::Background;
use crate::common::{CONTEXT, handed_over_first, settled_among};

/// The examples' backend.
const BACKEND: &str = "hsm_nodes";
/// `server.drain.notice_ms`: longer than HAProxy takes to see that a node is not ready, 0.8 s.
const NOTICE: Duration = Duration::from_millis(1000);
/// By so much nodes keep connections longer than clients leave them idle. A machine that stands still for longer than this
/// within a closing has both times end at once, and a request may meet the end of its connection.
const BEYOND_IDLE: Duration = Duration::from_secs(6);
/// A start, an election, a balancer's look, on a busy machine.
const SOON: Duration = Duration::from_secs(60);
/// Of the second that each step of a hand-over has; on a machine that stood still for longer no leader may be blamed.
const STOOD_STILL: Duration = Duration::from_millis(400);
/// Names a node of an earlier release, with which a cluster begins.
const PREVIOUS: &str = "HSM_PREVIOUS_NODE";
/// How a node ends that was removed: `docs/operations.md`.
const REMOVED: i32 = 78;

/// What is to be done.
struct Plan {
    voters: u32,
    /// How often each node is restarted.
    rounds: u32,
    /// For how long clients keep a connection without a request.
    idle: Duration,
    /// Between two rotations, and two other changes.
    changes: Duration,
    /// Nodes that leave for good in the end, with their clients: followers, and last whoever leads.
    removals: u32,
}

/// Three voters, once, with short pauses.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_while_nodes_are_restarted_one_by_one_behind_balancers() -> Result<()> {
    roll(&Plan {
        voters: 3,
        rounds: 1,
        idle: Duration::from_secs(1),
        changes: Duration::from_millis(700),
        removals: 0,
    })
    .await
}

/// The leader leaves for good, which no balancer is told before; the removal of a follower is the next one's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_while_the_leader_of_four_voters_is_removed() -> Result<()> {
    roll(&Plan {
        voters: 4,
        rounds: 0,
        idle: Duration::from_secs(1),
        changes: Duration::from_millis(700),
        removals: 1,
    })
    .await
}

/// What `make rolling` runs first: hardly a restart, and short pauses.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes a minute: make rolling"]
async fn no_request_fails_while_two_of_five_voters_are_removed() -> Result<()> {
    roll(&Plan {
        voters: 5,
        rounds: 0,
        idle: Duration::from_secs(1),
        changes: Duration::from_millis(700),
        removals: 2,
    })
    .await
}

/// What `make rolling` runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes some twenty minutes: make rolling"]
async fn no_request_fails_while_three_and_five_voters_are_upgraded_and_back() -> Result<()> {
    for (voters, removals) in [(3, 0), (5, 2)] {
        roll(&Plan {
            voters,
            rounds: 2,
            idle: Duration::from_secs(30),
            changes: Duration::from_secs(2),
            removals,
        })
        .await?;
    }
    Ok(())
}

/// A cluster whose nodes know what stands before them, started with this binary.
async fn start(plan: &Plan, node: &Path) -> Result<(Playground, Edge)> {
    let builder = Playground::builder().nodes(plan.voters).unformed();
    let cluster = builder.env("HSM_NODE_BIN", node).start().await?;
    let edge = Edge::issue(&cluster.pki())?;
    let drain = format!(
        "drain: {{notice_ms: {}, timeout_ms: {}}}",
        NOTICE.as_millis(),
        (plan.idle + BEYOND_IDLE).as_millis()
    );
    for node in cluster.nodes() {
        node.kill().await?;
        let before = node.config()?;
        let after = before.replace("drain: {notice_ms: 500, timeout_ms: 3000}", &drain);
        ensure!(
            after != before,
            "the playground's configuration has changed:\n{before}"
        );
        let balancer = format!("  proxy_protocol_from: [{BALANCER}]\n");
        node.set_config(&edge.trusted(&after, &balancer)?)?;
    }
    cluster.up().await?;
    Ok((cluster, edge))
}

/// What a node needs before a balancer that does not look at `/readyz`.
fn waits_until_ready(config: &str) -> String {
    if config.contains("wait_ready_ms") {
        return config.to_owned();
    }
    config.replacen("server:\n", "server:\n  wait_ready_ms: 30000\n", 1)
}

/// What [`PREVIOUS`] names, if it names any.
pub(crate) fn previous() -> Result<Option<PathBuf>> {
    let path = std::env::var_os(PREVIOUS).filter(|path| !path.is_empty());
    path.map(|path| Path::new(&path).canonicalize().context(PREVIOUS))
        .transpose()
}

/// This build under another name, as an upgrade brings it.
fn copied(cluster: &Playground) -> Result<PathBuf> {
    let (from, to) = (binary("hsm-node")?, cluster.scratch().join("hsm-node-next"));
    std::fs::copy(&from, &to).with_context(|| to.display().to_string())?;
    Ok(to)
}

/// Balancers of all kinds before a cluster.
struct Balancers {
    passing: Haproxy,
    ending: Haproxy,
    nginx: Nginx,
}

impl Balancers {
    async fn start(cluster: &Playground, edge: &Edge) -> Result<Self> {
        edge.write_files(&cluster.pki(), &Haproxy::files(cluster))?;
        Ok(Self {
            passing: Haproxy::start(cluster, "haproxy-pass-through.cfg").await?,
            ending: Haproxy::start(cluster, "haproxy-client-cert.cfg").await?,
            nginx: Nginx::start(cluster, "nginx-pass-through.conf").await?,
        })
    }

    /// Without nginx, if nodes of an earlier release stop behind it: it sends them connections until they refuse one, and
    /// they reset those that are on their way then (`docs/decisions/013-how-a-node-stops-listening.md`).
    fn for_clients(&self, earlier_release: bool) -> Vec<Balancer> {
        let before = |name, port, passes_through| Balancer {
            name,
            port,
            passes_through,
        };
        let mut all = vec![
            before("HAProxy, TLS passed through", self.passing.port(), true),
            before("HAProxy, TLS ended", self.ending.port(), false),
        ];
        if !earlier_release {
            all.push(before("nginx, TLS passed through", self.nginx.port(), true));
        }
        all
    }

    /// Until these are up, and no others.
    async fn wait_up(&self, nodes: &[Node]) -> Result<()> {
        let all: Vec<u32> = nodes.iter().map(|node| node.number).collect();
        for haproxy in [&self.passing, &self.ending] {
            haproxy.wait_up(BACKEND, &all, SOON).await?;
        }
        Ok(())
    }
}

/// Starts a node with this binary, until it is ready.
pub(crate) async fn start_with(cluster: &Playground, node: &Node, with: &Path) -> Result<()> {
    let variables = [("HSM_NODE_BIN", with.as_os_str())];
    cluster.start_node_with(node.number, &variables).await?;
    node.wait_ready(SOON).await?;
    let pid = node.pid().context("it does not run")?;
    let runs = std::fs::read_link(format!("/proc/{pid}/exe"))?;
    ensure!(
        runs == with.canonicalize()?,
        "{} runs {}",
        node.id(),
        runs.display()
    );
    // Whoever is ready takes connections, also with `server.wait_ready_ms`.
    let connected = TcpStream::connect((node.host, node.api_port)).await;
    connected.with_context(|| format!("{} is ready and does not listen", node.id()))?;
    Ok(())
}

/// A cluster that is upgraded, and what happens to its clients.
struct Scene<'a> {
    cluster: &'a Playground,
    balancers: &'a Balancers,
    clients: &'a Once,
    stalls: &'a Stalls,
    began: Instant,
    restarts: u32,
    /// Of them, of nodes that led and handed over.
    handed_over: u32,
}

impl Scene<'_> {
    fn check(&self) -> Result<Report> {
        let report = self.clients.so_far();
        ensure!(
            report.failed == 0,
            "{} of {} requests failed (the machine stood still for {:.1?} of {:.1?}): {:#?}",
            report.failed,
            report.requests,
            self.stalls.between(self.began, Instant::now()),
            self.began.elapsed(),
            report.failures
        );
        Ok(report)
    }

    /// Until each client has had so many more turns, or something has failed.
    async fn goes_on(&self, turns: u64, limit: Duration) -> Result<()> {
        let before = self.clients.so_far().fewest;
        let what = format!("{turns} more turns of each client");
        until(&what, limit, async || {
            let now = self.clients.so_far();
            (now.failed > 0 || now.fewest >= before + turns).then_some(())
        })
        .await
    }

    /// Stops a node, and starts it with another binary and configuration.
    async fn replace(&mut self, node: &Node, with: &Path) -> Result<()> {
        let leads = self.cluster.leader().await?.node == node.number;
        let began = Instant::now();
        node.set_config(&waits_until_ready(&node.config()?))?;
        let logged = node.log().len();
        node.signal(Signal::SIGTERM)?;
        // With the longest time for which a connection may be kept; nothing that is asked here takes long.
        let status = node.wait_ended(2 * SOON).await?;
        ensure!(
            matches!(status, WaitStatus::Exited(_, 0)),
            "{} ended with {status:?}",
            node.id()
        );
        let stopped = began.elapsed();
        let stood_still = self.stalls.between(began, Instant::now());
        let log = node.log();
        let said = log.get(logged..).unwrap_or_default();
        let handed_over = handed_over_first(said);
        ensure!(
            handed_over || !leads || stood_still > STOOD_STILL,
            "{} led and did not hand over before it drained:\n{said}",
            node.id()
        );
        start_with(self.cluster, node, with).await?;
        self.restarts += 1;
        self.handed_over += u32::from(handed_over);
        println!(
            "  {}{}: stopped in {stopped:.1?}, ready after {:.1?}; the machine stood still for {stood_still:.1?}",
            node.id(),
            if handed_over { ", which handed over" } else { "" },
            began.elapsed()
        );
        self.balancers.wait_up(&self.cluster.nodes()).await?;
        let checked = self.check();
        checked.with_context(|| format!("after {} was restarted", node.id()))?;
        Ok(())
    }

    /// Takes a node out of the cluster for good, by the command and by nothing else: no balancer was told before.
    async fn remove(&self, node: &Node) -> Result<()> {
        let (id, began, logged) = (node.id(), Instant::now(), node.log().len());
        // Under one key: asked again it goes on.
        let key = format!("remove-{id}");
        let args = [
            "cluster",
            "remove",
            &id,
            "--confirm",
            &id,
            "--idempotency-key",
            &key,
        ];
        let mut last = String::new();
        // A leader whose machine has just stood still has heard nobody for a second; nothing was changed then.
        let what = format!("the removal of {id}");
        let removed = until(&what, SOON, async || {
            match self.cluster.hsmctl(&args).await.and_then(Output::ok) {
                Ok(_) => Some(()),
                Err(error) => {
                    last = format!("{error:#}");
                    None
                }
            }
        })
        .await;
        removed.with_context(|| last.clone())?;
        let status = node.wait_ended(2 * SOON).await?;
        let log = node.log();
        let said = log.get(logged..).unwrap_or_default();
        ensure!(
            matches!(status, WaitStatus::Exited(_, REMOVED)) && said.contains("draining connections"),
            "{id} ended with {status:?}:\n{said}"
        );
        println!("  {id}: removed and gone in {:.1?}", began.elapsed());
        Ok(())
    }

    /// In the first round the leader last, as `docs/operations.md` says, and by their numbers afterwards.
    async fn order(&self, round: u32) -> Result<Vec<Node>> {
        let mut nodes = self.cluster.nodes();
        if round == 0 {
            let leader = self.cluster.leader().await?.node;
            nodes.sort_by_key(|node| node.number == leader);
        }
        Ok(nodes)
    }
}

async fn roll(plan: &Plan) -> Result<()> {
    // Nodes become this process's children, which may then ask how they ended. For good, and for every other test of it:
    // nextest gives each a process of its own.
    nix::sys::prctl::set_child_subreaper(true)?;
    let own = binary("hsm-node")?;
    let earlier = previous()?;
    let first = earlier.as_deref().unwrap_or(&own);
    let (cluster, edge) = start(plan, first).await?;
    let next = copied(&cluster)?;
    let balancers = Balancers::start(&cluster, &edge).await?;
    balancers.wait_up(&cluster.nodes()).await?;
    println!(
        "{} voters, connections idle for up to {:?}, from {}",
        plan.voters,
        plan.idle,
        first.display()
    );
    let before = balancers.for_clients(earlier.is_some());
    let clients = Once::start(&cluster.pki(), &before, plan.idle)?;
    let background = Background::start(&cluster, &before, earlier.is_some(), plan.changes).await?;
    let stalls = Stalls::watch()?;
    let mut scene = Scene {
        cluster: &cluster,
        balancers: &balancers,
        clients: &clients,
        stalls: &stalls,
        began: Instant::now(),
        restarts: 0,
        handed_over: 0,
    };
    // Each has encrypted, been idle, and gone on with what it has encrypted.
    scene.goes_on(2, 2 * plan.idle + SOON).await?;
    scene.check()?;

    for round in 0..plan.rounds {
        let with = if round % 2 == 0 { &next } else { &own };
        for node in scene.order(round).await? {
            scene.replace(&node, with).await?;
        }
    }
    // Elections on a slow machine may have led past every restart.
    while scene.handed_over == 0 {
        ensure!(
            scene.restarts < plan.voters * (plan.rounds + 1),
            "no leader has handed over in {} restarts",
            scene.restarts
        );
        let leader = cluster.leader().await?.node;
        scene.replace(&cluster.node(leader), &own).await?;
    }
    scene.goes_on(2, 2 * plan.idle + SOON).await?;
    let report = scene.check()?;
    // Each had a connection when the first round began, and whatever node it led to was restarted in it. In a later one a client may
    // be between two connections, and come back to a node that was restarted already. Without rounds only one was restarted, to
    // which no client with HTTP/2 needs to have been connected.
    ensure!(
        report.fewest_ended >= u64::from(plan.rounds.min(1)) && (report.goaways > 0 || plan.rounds == 0),
        "a client has kept its connection over the restart of each node: {report:?}"
    );
    // A version that is made while a node leaves is one that this node may never hear of.
    if plan.removals > 0 {
        background.nodes_leave();
    }
    let mut left = cluster.nodes();
    for removal in 0..plan.removals {
        let leader = cluster.leader_among(&left).await?.node;
        let leads = removal + 1 == plan.removals;
        let place = left.iter().position(|node| (node.number == leader) == leads);
        let node = left.remove(place.context("nobody to remove")?);
        scene.remove(&node).await?;
        balancers.wait_up(&left).await?;
        scene.goes_on(2, 2 * plan.idle + SOON).await?;
        let checked = scene.check();
        checked.with_context(|| format!("after {} was removed", node.id()))?;
    }
    let changes = background.stop().await?;
    settled_among(&cluster, &left, CONTEXT).await?;
    let report = scene.check()?;
    println!(
        "  {} requests on {} connections, of which the other side ended {} ({} by GOAWAY); {changes} administrative \
         calls; {} restarts, {} of them of a leader; {} removals; {} failed",
        report.requests,
        report.connections,
        report.ended,
        report.goaways,
        scene.restarts,
        scene.handed_over,
        plan.removals,
        report.failed
    );
    // What does fail is counted, whichever node the clients are on.
    for node in &left {
        node.kill().await?;
    }
    until("the failures of nodes that were killed", SOON, async || {
        (clients.so_far().failed > 0).then_some(())
    })
    .await?;
    clients.stop().await;
    drop(balancers);
    cluster.passed();
    Ok(())
}
