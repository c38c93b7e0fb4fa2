//! The examples for HAProxy, with HAProxy before real nodes, and clients that send each request once and never again.
//! Where TLS passes through, what dies takes with it what was sent to it, which nobody but its client can send again: that
//! is counted apart. Nothing else may fail, and nothing at all where HAProxy ends TLS and repeats.

use std::collections::BTreeSet;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::{Edge, Haproxy, Leader, Node, Playground, until};
use hsm_api::client::Answer;
use hsm_api::data::{DecryptRequest, EncryptRequest};
use hsm_api::{Base64, Client, ClientError};
use nix::sys::signal::Signal;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::common::{CONTEXT, json};
use crate::tls_ending;

const BALANCED: &str = "fresh";
/// Between two operations of one worker.
const PAUSE: Duration = Duration::from_millis(10);
/// Workers with a connection for each request, and such that keep one.
const FRESH: usize = 4;
const KEPT: usize = 2;
/// Answers of each worker that show that it goes on.
const ANSWERS: u64 = 16;
/// Associated data of every other worker: 40 KB in base64, almost as much as HAProxy repeats, and none of it in the answer.
const LARGE: usize = 30_000;
/// Until a client that keeps its connection has seen that it was closed, on a machine that stalls.
const NOTICED: Duration = Duration::from_secs(2);
/// For one answer, of which a hang alone takes 3 s: what takes long is no failure on a machine that stalls.
const PATIENCE: Duration = Duration::from_secs(15);
/// `staleness.encrypt_ms` of the playground: for so long an isolated node encrypts.
const ENCRYPTS: Duration = Duration::from_secs(60);
/// A balancer's look at a node, an election, and all of that on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// A request that was not answered as it has to be.
#[derive(Debug)]
struct Failure {
    worker: usize,
    kept: bool,
    /// Who is at the other end of a kept connection, as far as it has answered on it.
    node: Option<String>,
    began: Instant,
    ended: Instant,
    error: anyhow::Error,
}

/// When a process was killed, and when it was gone.
#[derive(Debug, Clone)]
struct Kill {
    node: String,
    signalled: Instant,
    gone: Instant,
}

impl Kill {
    /// A request that was under way at that moment: begun before the process was gone and not ended before it was
    /// killed. On a connection that was kept, also one that crossed the news of its end, and none if it was to another
    /// node.
    fn cut(&self, failure: &Failure) -> bool {
        let late = if failure.kept { NOTICED } else { Duration::ZERO };
        let broken = matches!(
            failure.error.downcast_ref::<ClientError>(),
            Some(ClientError::Transport { .. } | ClientError::Tls { .. } | ClientError::Connect { .. })
        );
        let may_be_its = failure.node.as_ref().is_none_or(|node| *node == self.node);
        broken && may_be_its && failure.ended >= self.signalled && failure.began <= self.gone + late
    }
}

async fn kill(node: &Node) -> Result<Kill> {
    let signalled = Instant::now();
    node.signal(Signal::SIGKILL)?;
    while node.pid().is_some() {
        ensure!(signalled.elapsed() < SOON, "{} does not end", node.id());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(Kill {
        node: node.id(),
        signalled,
        gone: Instant::now(),
    })
}

#[derive(Default)]
struct Tally {
    /// Of each worker.
    answered: watch::Sender<[u64; FRESH + KEPT]>,
    failures: Mutex<Vec<Failure>>,
}

impl Tally {
    fn note(&self, failure: Failure) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.push(failure);
    }
}

/// Clients of the balancer, each request sent once.
struct Traffic {
    tally: Arc<Tally>,
    stop: watch::Sender<bool>,
    workers: Vec<JoinHandle<()>>,
}

impl Traffic {
    fn start(cluster: &Playground, haproxy: &Haproxy) -> Result<Self> {
        let tally = Arc::<Tally>::default();
        let (stop, stopped) = watch::channel(false);
        let pki = cluster.pki();
        let mut workers = Vec::new();
        for number in 0..FRESH + KEPT {
            let kept = number >= FRESH;
            let endpoint = [haproxy.endpoint()];
            // Whose request is repeated with another one's certificate is refused, or cannot decrypt: `2fa` is for one CN.
            let (identity, context) = match number % 2 {
                0 => (pki.identity("trading-1")?, CONTEXT),
                _ => (pki.issue(&format!("2fa-{number}"), Some("2FA"))?, "2fa"),
            };
            let client = pki.client_waiting(PATIENCE, kept, Some(&identity), &endpoint)?;
            let (tally, stopped) = (Arc::clone(&tally), stopped.clone());
            let worker = Worker {
                number,
                kept,
                client,
                context,
                node: None,
                tally,
            };
            workers.push(tokio::spawn(worker.work(stopped)));
        }
        Ok(Self { tally, stop, workers })
    }

    /// Until each worker was answered so often that nothing is left of what was under way.
    async fn goes_on(&self) -> Result<()> {
        let mut answered = self.tally.answered.subscribe();
        let before = *answered.borrow();
        let more = answered.wait_for(|answered| {
            let mut counts = answered.iter().zip(&before);
            counts.all(|(now, before)| *now >= before + ANSWERS)
        });
        tokio::time::timeout(SOON, more)
            .await
            .context("hardly any request is answered")??;
        Ok(())
    }

    /// No request failed so far but for those that these kills cut: of each worker one for each, as it has one at a time.
    fn check(&self, what: &str, kills: &[Kill]) -> Result<()> {
        let failures = self.tally.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let mut cut = BTreeSet::new();
        let is_cut = |failure: &&Failure| {
            let by = kills.iter().position(|kill| kill.cut(failure));
            by.is_some_and(|by| cut.insert((by, failure.worker)))
        };
        let (_, others): (Vec<&Failure>, Vec<&Failure>) = failures.iter().partition(is_cut);
        let answered: u64 = self.tally.answered.borrow().iter().sum();
        println!(
            "{what}: {answered} answered, {} cut by {} kills, {} failed",
            cut.len(),
            kills.len(),
            others.len()
        );
        ensure!(others.is_empty(), "{what}: {others:#?}; kills: {kills:#?}");
        Ok(())
    }

    async fn stop(mut self) {
        self.stop.send_replace(true);
        for worker in self.workers.drain(..) {
            let _ = worker.await;
        }
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

/// A client that asks one thing after the other.
struct Worker {
    number: usize,
    kept: bool,
    client: Client,
    context: &'static str,
    node: Option<String>,
    tally: Arc<Tally>,
}

impl Worker {
    async fn work(mut self, stopped: watch::Receiver<bool>) {
        let mut count = 0_u64;
        let aad = (self.number % 2 == 1).then(|| Base64::from(vec![7_u8; LARGE]));
        while !*stopped.borrow() {
            count += 1;
            let plaintext = format!("through the balancer {count}");
            let mut encrypt = EncryptRequest::new(self.context, plaintext.as_bytes());
            encrypt.aad.clone_from(&aad);
            let (began, sealed) = (Instant::now(), self.client.encrypt(&encrypt).await);
            if let Some(sealed) = self.take(began, sealed.map_err(Into::into)) {
                let mut decrypt = DecryptRequest::new(self.context, sealed.ciphertext);
                decrypt.aad.clone_from(&aad);
                let (began, opened) = (Instant::now(), self.client.decrypt(&decrypt).await);
                let opened = opened.map_err(anyhow::Error::from).and_then(|opened| {
                    let same = opened.plaintext.as_slice() == plaintext.as_bytes();
                    ensure!(same, "{plaintext:?} was decrypted to something else");
                    Ok(opened)
                });
                self.take(began, opened);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Counts an answer, or what came instead of one.
    fn take<T>(&mut self, began: Instant, answer: Result<Answer<T>>) -> Option<T> {
        match answer {
            Ok(answer) => {
                self.node = answer.meta.node.filter(|_| self.kept);
                self.tally.answered.send_modify(|answered| {
                    if let Some(answered) = answered.get_mut(self.number) {
                        *answered += 1;
                    }
                });
                Some(answer.body)
            }
            Err(error) => {
                self.tally.note(Failure {
                    worker: self.number,
                    kept: self.kept,
                    // The next one has a connection of its own.
                    node: self.node.take(),
                    began,
                    ended: Instant::now(),
                    error,
                });
                None
            }
        }
    }
}

/// Which node answers a new connection, and whether it is out of readiness.
async fn asked(cluster: &Playground, haproxy: &Haproxy) -> Result<(Option<String>, bool)> {
    let identity = cluster.pki().identity("trading-1")?;
    let client = cluster
        .pki()
        .client_that(false, Some(&identity), &[haproxy.endpoint()])?;
    let answer = client
        .encrypt(&EncryptRequest::new(CONTEXT, b"who are you"))
        .await?;
    Ok((answer.meta.node.clone(), answer.meta.stale))
}

/// Until every one of these may answer, in rotation or not.
async fn wait_serving(nodes: &[Node]) -> Result<()> {
    for node in nodes {
        let what = format!("{} may answer", node.id());
        let serving = until(&what, SOON, async || {
            let answer = node.health().get("/readyz?stale=ok").await.ok()?;
            (answer.status == 200).then_some(())
        });
        if let Err(error) = serving.await {
            return Err(error.context(node.checks().await));
        }
    }
    Ok(())
}

/// A formed cluster in mode active-passive, with a proxy that its nodes trust.
async fn active_passive() -> Result<(Playground, Edge)> {
    let cluster = Playground::builder().relayed().start().await?;
    let edge = Edge::issue(&cluster.pki())?;
    for node in cluster.nodes() {
        node.kill().await?;
    }
    for node in cluster.nodes() {
        let mut config = edge.trusted(&node.config()?, "")?;
        for (before, after) in [
            ("mode: active-active", "mode: active-passive"),
            // A balancer has to see that a node stops before the node closes: the examples' 1 s.
            ("notice_ms: 500", "notice_ms: 1000"),
        ] {
            ensure!(
                config.contains(before),
                "the playground's configuration has changed:\n{config}"
            );
            config = config.replace(before, after);
        }
        node.set_config(&config)?;
        cluster.start_node(node.number).await?;
    }
    cluster.leader().await?;
    wait_serving(&cluster.nodes()).await?;
    Ok((cluster, edge))
}

/// Elections at most, while one waits for balancers to see who leads.
const ELECTIONS: u32 = 3;

/// Until each of these balancers has one node in rotation: the leader, which answers.
async fn steered(cluster: &Playground, balancers: &[&Haproxy], among: &[Node]) -> Result<Node> {
    for _ in 1..ELECTIONS {
        let leader = cluster.leader_among(among).await?;
        let steered = steered_to(cluster, balancers, leader).await;
        // Unless another one was elected meanwhile.
        if steered.is_ok() || cluster.leader_among(among).await? == leader {
            return steered;
        }
    }
    steered_to(cluster, balancers, cluster.leader_among(among).await?).await
}

async fn steered_to(cluster: &Playground, balancers: &[&Haproxy], leader: Leader) -> Result<Node> {
    let node = cluster.node(leader.node);
    for haproxy in balancers {
        haproxy.wait_up(BALANCED, &[leader.node], SOON).await?;
        let (what, id) = (format!("{} answers, and is fresh", node.id()), node.id());
        // Not at once: a handshake that is slow on a busy machine leads to a standby until the next look.
        let answers = until(&what, SOON, async || {
            let (answered, stale) = asked(cluster, haproxy).await.ok()?;
            (answered.as_ref() == Some(&id) && !stale).then_some(())
        });
        answers.await.with_context(|| haproxy.said())?;
    }
    Ok(node)
}

/// Isolated, a leader still answers what reaches it, and balancers turn to the next one. Returns who leads afterwards.
async fn isolate(
    cluster: &Playground,
    balancers: &[&Haproxy],
    first: &Node,
    all: &[&Traffic],
) -> Result<Node> {
    let isolated = Instant::now();
    let in_time = || -> Result<()> {
        let took = isolated.elapsed();
        ensure!(
            took < ENCRYPTS,
            "this machine is too slow for this test: {took:?} after it was isolated the node may not encrypt any more"
        );
        Ok(())
    };
    cluster.relays()?.isolate(first.number);
    let second = steered(cluster, balancers, &cluster.others(first.number)).await?;
    for traffic in all {
        traffic.goes_on().await?;
        in_time()?;
        traffic.check("isolated", &[])?;
    }
    cluster.relays()?.heal();
    let what = format!("{} follows again", first.id());
    until(&what, SOON, async || {
        let status = cluster.status(first.number).await?;
        status.staleness_ms.is_some_and(|age| age < 1000).then_some(())
    })
    .await?;
    in_time()?;
    wait_serving(&cluster.nodes()).await?;
    let second = match cluster.leader().await? {
        leader if leader.node == second.number => second,
        _ => steered(cluster, balancers, &cluster.nodes()).await?,
    };
    for traffic in all {
        traffic.check("healed", &[])?;
    }
    Ok(second)
}

/// Both examples at once, before one cluster: what they see of it is the same, what their clients see is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn active_passive_leaders_are_isolated_killed_stopped_and_hang_behind_haproxy() -> Result<()> {
    let (cluster, edge) = active_passive().await?;
    edge.write_files(&cluster.pki(), &Haproxy::files(&cluster))?;
    let passing = Haproxy::start(&cluster, "haproxy-active-passive.cfg").await?;
    let ending = Haproxy::start(&cluster, "haproxy-active-passive-tls.cfg").await?;
    let both = [&passing, &ending];
    let mut leader = steered(&cluster, &both, &cluster.nodes()).await?;
    tls_ending::check(&cluster.pki(), ending.port())
        .await
        .with_context(|| ending.said())?;
    let (passed, repeated) = (
        Traffic::start(&cluster, &passing)?,
        Traffic::start(&cluster, &ending)?,
    );
    passed.goes_on().await?;
    repeated.goes_on().await?;
    leader = isolate(&cluster, &both, &leader, &[&passed, &repeated]).await?;

    // Killed, it takes what was sent to it along, and only a balancer that has it too can send it again.
    let kills = [kill(&leader).await?];
    let next = steered(&cluster, &both, &cluster.others(leader.number)).await?;
    passed.goes_on().await?;
    repeated.goes_on().await?;
    cluster.start_node(leader.number).await?;
    wait_serving(&cluster.nodes()).await?;
    passed.check("killed", &kills)?;
    repeated.check("killed", &[])?;
    leader = next;

    // Stopped, it says so first.
    leader.signal(Signal::SIGTERM)?;
    leader.wait_gone(SOON).await?;
    steered(&cluster, &both, &cluster.others(leader.number)).await?;
    passed.goes_on().await?;
    repeated.goes_on().await?;
    passed.check("stopped", &kills)?;
    repeated.check("stopped", &[])?;
    passed.stop().await;

    // What hangs, as what vanishes, takes requests and answers none: only time tells.
    cluster.start_node(leader.number).await?;
    wait_serving(&cluster.nodes()).await?;
    let hung = steered(&cluster, &[&ending], &cluster.nodes()).await?;
    hung.signal(Signal::SIGSTOP)?;
    steered(&cluster, &[&ending], &cluster.others(hung.number)).await?;
    repeated.goes_on().await?;
    repeated.check("hangs", &[])?;
    repeated.stop().await;
    drop((passing, ending));
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn active_active_nodes_die_and_join_behind_haproxy() -> Result<()> {
    let mut cluster = Playground::start(3).await?;
    let haproxy = Haproxy::start(&cluster, "haproxy-active-active.cfg").await?;
    haproxy.wait_up(BALANCED, &[1, 2, 3], SOON).await?;
    let traffic = Traffic::start(&cluster, &haproxy)?;
    traffic.goes_on().await?;
    let leader = cluster.leader().await?;
    let others = cluster.others(leader.node);
    let (next, last) = (&others[0], &others[1]);

    let mut kills = vec![kill(&cluster.node(leader.node)).await?];
    haproxy
        .wait_up(BALANCED, &[next.number, last.number], SOON)
        .await?;
    traffic.goes_on().await?;
    traffic.check("one dead", &kills)?;

    // Without a quorum the last one leaves the first pool, and answers from the second, marked.
    kills.push(kill(next).await?);
    haproxy.wait_up(BALANCED, &[], SOON).await?;
    haproxy.wait_up("stale", &[last.number], SOON).await?;
    let (answered, stale) = asked(&cluster, &haproxy).await?;
    ensure!(
        answered.as_deref() == Some(last.id().as_str()) && stale,
        "{answered:?} answered, stale: {stale}"
    );
    traffic.goes_on().await?;
    traffic.check("two dead", &kills)?;

    for node in [leader.node, next.number] {
        cluster.start_node(node).await?;
    }
    haproxy.wait_up(BALANCED, &[1, 2, 3], SOON).await?;
    traffic.goes_on().await?;
    traffic.check("all back", &kills)?;
    traffic.stop().await;
    a_node_joins(&mut cluster, &haproxy).await?;
    drop(haproxy);
    cluster.passed();
    Ok(())
}

/// Its token is made, and a member found, through balancers. The join is sent to the node itself: members behind a balancer
/// refuse one, and the token is as good as before.
async fn a_node_joins(cluster: &mut Playground, api: &Haproxy) -> Result<()> {
    let joining = Haproxy::start(cluster, "haproxy-join.cfg").await?;
    joining.wait_up("members", &[1, 2, 3], SOON).await?;
    let fourth = cluster.add_node(false).await?;
    let balancer = api.endpoint();
    let token = [
        "cluster",
        "token",
        "--node",
        &fourth.id(),
        "--endpoint",
        &balancer,
        "-o",
        "json",
    ];
    let token = cluster.hsmctl(&token).await?.ok()?;
    let file = cluster.scratch().join("join.json");
    std::fs::write(&file, &token)?;
    std::fs::set_permissions(&file, Permissions::from_mode(0o600))?;
    let (file, leader) = (
        file.display().to_string(),
        format!("127.0.0.1:{}", joining.port()),
    );
    let join = async |endpoint: &str| {
        let rest = ["--leader", &leader, "--token-file", &file, "--yes", "-o", "json"];
        let args = [&["cluster", "join", "--endpoint", endpoint][..], &rest].concat();
        cluster.hsmctl(&args).await
    };
    let refused = join(&balancer).await?;
    ensure!(
        refused.code == Some(4) && refused.stderr.contains("already_initialised"),
        "{refused:?}"
    );
    let joined = join(&fourth.endpoint()).await?.ok();
    let joined = json(&joined.with_context(|| joining.said())?)?;
    ensure!(joined["role"] == "voter", "{joined}");
    fourth.wait_ready(SOON).await
}
