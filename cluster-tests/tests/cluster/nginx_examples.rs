//! The examples for nginx, with nginx before real nodes: the one that ends TLS and writes `Client-Cert`, and the one that
//! passes TLS through.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::http1::Connection;
use cluster_tests::{Edge, Nginx, Pki, Playground, http2, until};
use hsm_api::{Client, paths};
use serde_json::json;
use tokio::sync::watch;

use crate::common::{CONTEXT, open, seal};
use crate::tls_ending;

/// Whatever is waited for, on a busy machine.
const SOON: Duration = Duration::from_secs(60);
/// Requests that show that it goes on.
const SOME: u64 = 40;
/// Requests of one client at once, as the example has it.
const AT_ONCE: u32 = 64;

/// Two nodes that trust a proxy's certificate.
async fn start() -> Result<(Playground, Edge)> {
    let cluster = Playground::builder().nodes(2).unformed().start().await?;
    let edge = Edge::issue(&cluster.pki())?;
    for node in cluster.nodes() {
        node.kill().await?;
        node.set_config(&edge.trusted(&node.config()?, "")?)?;
    }
    cluster.up().await?;
    Ok((cluster, edge))
}

/// Clients have connections to the nodes in common, and are each who they are.
async fn identities_do_not_mix(cluster: &Playground, pki: &Pki, port: u16) -> Result<()> {
    tls_ending::identities_do_not_mix(pki, port).await?;
    // One to each node, as there was never more than one request at a time.
    let nodes = cluster.nodes();
    until("clients with connections in common", SOON, async || {
        let mut connections = 0.0;
        for node in &nodes {
            connections += node.metrics().await.ok()?.sum("hsm_active_connections")?;
        }
        (1.0..=2.0).contains(&connections).then_some(())
    })
    .await
}

/// What one client has in hand is bounded, on one connection of HTTP/2 too, and others are served meanwhile.
async fn one_client_does_not_take_all(pki: &Pki, nginx: &Nginx) -> Result<()> {
    let who = pki.issue("greedy", Some("Trading"))?;
    let mut greedy = http2::Connection::open(pki, nginx.port(), &who).await?;
    let stream = |number: u32| 2 * number + 1;
    for number in 0..=AT_ONCE {
        greedy.begin(stream(number), paths::ENCRYPT).await?;
    }
    let refused = greedy.answer(stream(AT_ONCE)).await?;
    ensure!(
        matches!(refused, http2::Answer::Status(status) if status != Some(200)),
        "{refused:?}"
    );
    let said = nginx.errors();
    ensure!(
        said.contains("limiting connections"),
        "it was not refused: {said}"
    );
    let trading = pki.client(Some(&pki.identity("trading-1")?), &[nginx.endpoint()])?;
    seal(&trading, CONTEXT, b"meanwhile").await?;
    // Of those before it none was refused.
    greedy
        .finish(
            stream(0),
            br#"{"context": "exchange-key", "plaintext": "aGVsbG8="}"#,
        )
        .await?;
    let served = greedy.answer(stream(0)).await?;
    ensure!(served == http2::Answer::Status(Some(200)), "{served:?}");
    Ok(())
}

/// Encrypts and decrypts until it is told to stop, or until something fails.
async fn work(client: Client, answered: Arc<AtomicU64>, stopped: watch::Receiver<bool>) -> Result<()> {
    while !*stopped.borrow() {
        let sealed = seal(&client, CONTEXT, b"through nginx").await?;
        open(&client, CONTEXT, &sealed).await?;
        answered.fetch_add(1, Ordering::SeqCst);
    }
    Ok(())
}

/// What a node did not answer any more, another one does.
async fn a_node_dies_and_nobody_notices(cluster: &Playground, nginx: &Nginx) -> Result<()> {
    let pki = cluster.pki();
    let trading = pki.identity("trading-1")?;
    let answered = Arc::<AtomicU64>::default();
    let (stop, stopped) = watch::channel(false);
    let mut workers = Vec::new();
    for number in 0..6 {
        let client = pki.client_that(number % 2 == 0, Some(&trading), &[nginx.endpoint()])?;
        workers.push(tokio::spawn(work(client, Arc::clone(&answered), stopped.clone())));
    }
    let more = async || {
        let enough = answered.load(Ordering::SeqCst) + SOME;
        until("answers", SOON, async || {
            (answered.load(Ordering::SeqCst) >= enough).then_some(())
        })
        .await
    };
    more().await?;
    cluster.node(2).kill().await?;
    more().await?;
    stop.send_replace(true);
    for worker in workers {
        worker.await??;
    }
    // It was in use: nginx has noticed.
    let dead = format!("127.0.0.1:{}", cluster.node(2).api_port);
    ensure!(nginx.errors().contains(&dead), "nothing was sent to {dead}");
    Ok(())
}

async fn ends_tls(cluster: &Playground, pki: &Pki, nginx: &Nginx) -> Result<()> {
    // Over HTTP/2, as clients speak with it.
    let trading = pki.identity("trading-1")?;
    let client = pki.client(Some(&trading), &[nginx.endpoint()])?;
    let sealed = seal(&client, CONTEXT, b"through nginx").await?;
    open(&client, CONTEXT, &sealed).await?;
    identities_do_not_mix(cluster, pki, nginx.port()).await?;
    tls_ending::check(pki, nginx.port()).await?;
    one_client_does_not_take_all(pki, nginx).await?;
    // nginx warns of each body that it writes to a file.
    ensure!(
        !nginx.errors().contains("temporary file"),
        "plaintexts were written to a disk"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nginx_ends_tls_for_clients_or_passes_it_through() -> Result<()> {
    let (cluster, edge) = start().await?;
    let pki = cluster.pki();
    edge.write_files(&pki, &Nginx::files(&cluster))?;
    let nginx = Nginx::start(&cluster, "nginx-client-cert.conf").await?;
    ends_tls(&cluster, &pki, &nginx)
        .await
        .with_context(|| nginx.said())?;

    let through = Nginx::start(&cluster, "nginx-pass-through.conf").await?;
    let marked = ["x-hsm-request: 1".to_owned()];
    let mut admin = Connection::open(&pki, through.port(), &pki.identity("admin")?).await?;
    let answer = admin.ask("GET", paths::WHOAMI, &marked, &json!({})).await?;
    ensure!(answer.status()? == 200, "{answer:?}");

    a_node_dies_and_nobody_notices(&cluster, &nginx)
        .await
        .with_context(|| nginx.said())?;
    let trading = pki.identity("trading-1")?;
    let client = pki.client_that(false, Some(&trading), &[through.endpoint()])?;
    for _ in 0..5 {
        let sealed = seal(&client, CONTEXT, b"passed through").await?;
        open(&client, CONTEXT, &sealed)
            .await
            .with_context(|| through.said())?;
    }
    drop((client, admin, through, nginx));
    cluster.passed();
    Ok(())
}
