//! The examples for HAProxy that show clients to the nodes, with HAProxy before a real node: the one that ends TLS and
//! writes `Client-Cert`, and the one that passes TLS through behind a PROXY header.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::haproxy::BALANCER;
use cluster_tests::http1::Connection;
use cluster_tests::{Edge, Haproxy, Node, Playground, until};
use hsm_api::paths;
use serde_json::json;

use crate::common::{CONTEXT, open, seal};
use crate::tls_ending;

const BACKEND: &str = "hsm_nodes";
/// A balancer's look at a node, and a line of a log, on a busy machine.
const SOON: Duration = Duration::from_secs(60);
/// Where a client of the balancer is.
const CLIENT: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);

/// A node that trusts the balancer's certificate and its address, and the certificate.
async fn start() -> Result<(Playground, Edge)> {
    let cluster = Playground::builder().nodes(1).unformed().start().await?;
    let edge = Edge::issue(&cluster.pki())?;
    let node = cluster.node(1);
    node.kill().await?;
    let balancer = format!("  proxy_protocol_from: [{BALANCER}]\n");
    node.set_config(&edge.trusted(&node.config()?, &balancer)?)?;
    cluster.up().await?;
    Ok((cluster, edge))
}

/// Until the audit has a line with all of this.
async fn audited(node: &Node, parts: &[&str]) -> Result<()> {
    let what = format!("a line of the audit of {} with {parts:?}", node.id());
    until(&what, SOON, async || {
        let log = node.log();
        let has =
            |line: &str| line.contains(r#""target":"audit""#) && parts.iter().all(|part| line.contains(part));
        log.lines().any(has).then_some(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn haproxy_ends_tls_for_clients_or_says_where_they_are() -> Result<()> {
    let (cluster, edge) = start().await?;
    let (pki, node) = (cluster.pki(), cluster.node(1));
    edge.write_files(&pki, &Haproxy::files(&cluster))?;

    let haproxy = Haproxy::start(&cluster, "haproxy-client-cert.cfg").await?;
    haproxy.wait_up(BACKEND, &[1], SOON).await?;
    // Over HTTP/2, as clients speak with it.
    let trading = pki.identity("trading-1")?;
    let client = pki.client(Some(&trading), &[haproxy.endpoint()])?;
    let sealed = seal(&client, CONTEXT, b"through the balancer").await?;
    open(&client, CONTEXT, &sealed).await?;
    tls_ending::check(&pki, haproxy.port())
        .await
        .with_context(|| haproxy.said())?;
    drop((client, haproxy));

    let haproxy = Haproxy::start(&cluster, "haproxy-pass-through.cfg").await?;
    haproxy.wait_up(BACKEND, &[1], SOON).await?;
    let marked = ["x-hsm-request: 1".to_owned()];
    let admin = pki.identity("admin")?;
    let mut connection = Connection::open_from(&pki, haproxy.port(), &admin, CLIENT, &[]).await?;
    let answer = connection.ask("GET", paths::WHOAMI, &marked, &json!({})).await?;
    ensure!(answer.status()? == 200, "{answer:?}");
    audited(&node, &[&format!(r#""source":"{CLIENT}:"#), "CN=admin"]).await?;
    let client = pki.client(Some(&trading), &[haproxy.endpoint()])?;
    open(&client, CONTEXT, &sealed).await?;
    drop((client, connection, haproxy));
    cluster.passed();
    Ok(())
}
