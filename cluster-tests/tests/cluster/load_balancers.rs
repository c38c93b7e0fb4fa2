//! The examples for HAProxy, with HAProxy before real nodes, and clients that send each request once and never again.
//! What dies takes with it what was sent to it, which nobody behind a balancer can save: that is counted apart.
//! Nothing else may fail.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::{Haproxy, Node, Playground, until};
use hsm_api::client::Answer;
use hsm_api::data::{DecryptRequest, EncryptRequest};
use hsm_api::{Client, ClientError};
use nix::sys::signal::Signal;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::common::CONTEXT;

const BALANCED: &str = "fresh";
/// Between two operations of one worker.
const PAUSE: Duration = Duration::from_millis(10);
/// Workers with a connection for each request, and such that keep one.
const FRESH: usize = 4;
const KEPT: usize = 2;
/// Until a client that keeps its connection has seen that it was closed, on a busy machine.
const NOTICED: Duration = Duration::from_millis(250);
/// `staleness.encrypt_ms` of the playground: for so long an isolated node encrypts.
const ENCRYPTS: Duration = Duration::from_secs(60);
/// A balancer's look at a node, an election, and all of that on a busy machine.
const SOON: Duration = Duration::from_secs(30);

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
    answered: watch::Sender<u64>,
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
        let identity = cluster.pki().identity("trading-1")?;
        let mut workers = Vec::new();
        for number in 0..FRESH + KEPT {
            let kept = number >= FRESH;
            let endpoint = [haproxy.endpoint()];
            let client = cluster.pki().client_that(kept, Some(&identity), &endpoint)?;
            let (tally, stopped) = (Arc::clone(&tally), stopped.clone());
            let worker = Worker {
                number,
                kept,
                client,
                node: None,
                tally,
            };
            workers.push(tokio::spawn(worker.work(stopped)));
        }
        Ok(Self { tally, stop, workers })
    }

    /// Until as many requests more were answered as show that it goes on.
    async fn goes_on(&self) -> Result<()> {
        let mut answered = self.tally.answered.subscribe();
        let enough = *answered.borrow() + 100;
        let more = answered.wait_for(|answered| *answered >= enough);
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
        let answered = *self.tally.answered.borrow();
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
    node: Option<String>,
    tally: Arc<Tally>,
}

impl Worker {
    async fn work(mut self, stopped: watch::Receiver<bool>) {
        let mut count = 0_u64;
        while !*stopped.borrow() {
            count += 1;
            let plaintext = format!("through the balancer {count}");
            let encrypt = EncryptRequest::new(CONTEXT, plaintext.as_bytes());
            let (began, sealed) = (Instant::now(), self.client.encrypt(&encrypt).await);
            if let Some(sealed) = self.take(began, sealed.map_err(Into::into)) {
                let decrypt = DecryptRequest::new(CONTEXT, sealed.ciphertext);
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
                self.tally.answered.send_modify(|answered| *answered += 1);
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

/// A formed cluster whose nodes were started again with another configuration.
async fn reconfigured(change: impl Fn(&str) -> String) -> Result<Playground> {
    let cluster = Playground::builder().relayed().start().await?;
    for node in cluster.nodes() {
        node.kill().await?;
    }
    for node in cluster.nodes() {
        let before = node.config()?;
        let after = change(&before);
        ensure!(
            after != before,
            "the playground's configuration has changed:\n{before}"
        );
        node.set_config(&after)?;
        cluster.start_node(node.number).await?;
    }
    cluster.leader().await?;
    wait_serving(&cluster.nodes()).await?;
    Ok(cluster)
}

/// Until the balancer has one node in rotation: the leader, which answers.
async fn steered(cluster: &Playground, haproxy: &Haproxy, among: &[Node]) -> Result<Node> {
    let leader = cluster.leader_among(among).await?;
    let node = cluster.node(leader.node);
    haproxy.wait_up(BALANCED, &[leader.node], SOON).await?;
    let (answered, stale) = asked(cluster, haproxy).await?;
    ensure!(
        answered.as_deref() == Some(node.id().as_str()) && !stale,
        "{answered:?} answered, stale: {stale}; {} leads",
        node.id()
    );
    Ok(node)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn active_passive_leaders_are_isolated_killed_and_stopped_behind_haproxy() -> Result<()> {
    // A balancer has to see that a node stops before the node closes: the examples' 1 s.
    let cluster = reconfigured(|config| {
        config
            .replace("mode: active-active", "mode: active-passive")
            .replace("notice_ms: 500", "notice_ms: 1000")
    })
    .await?;
    let haproxy = Haproxy::start(&cluster, "haproxy-active-passive.cfg").await?;
    let first = steered(&cluster, &haproxy, &cluster.nodes()).await?;
    let traffic = Traffic::start(&cluster, &haproxy)?;
    traffic.goes_on().await?;

    // Isolated, it still answers what reaches it, and the balancer turns to the next leader.
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
    let second = steered(&cluster, &haproxy, &cluster.others(first.number)).await?;
    traffic.goes_on().await?;
    in_time()?;
    traffic.check("isolated", &[])?;
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
        _ => steered(&cluster, &haproxy, &cluster.nodes()).await?,
    };
    traffic.check("healed", &[])?;

    // Killed, it takes what was sent to it along, and nothing else.
    let killed = [kill(&second).await?];
    let third = steered(&cluster, &haproxy, &cluster.others(second.number)).await?;
    traffic.goes_on().await?;
    cluster.start_node(second.number).await?;
    wait_serving(&cluster.nodes()).await?;
    traffic.check("killed", &killed)?;

    // Stopped, it says so first.
    third.signal(Signal::SIGTERM)?;
    third.wait_gone(SOON).await?;
    steered(&cluster, &haproxy, &cluster.others(third.number)).await?;
    traffic.goes_on().await?;
    traffic.check("stopped", &killed)?;
    traffic.stop().await;
    drop(haproxy);
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn active_active_nodes_die_behind_haproxy_until_the_last_one_is_stale() -> Result<()> {
    let cluster = Playground::start(3).await?;
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
    drop(haproxy);
    cluster.passed();
    Ok(())
}
