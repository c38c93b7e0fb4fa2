//! The examples for HAProxy that show clients to the nodes, with HAProxy before a real node: the one that ends TLS and
//! writes `Client-Cert`, and the one that passes TLS through behind a PROXY header.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::haproxy::BALANCER;
use cluster_tests::http1::Connection;
use cluster_tests::proxy::client_cert;
use cluster_tests::{Haproxy, Identity, Node, Pki, Playground, until};
use hsm_api::{Base64, paths};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::common::{CONTEXT, open, seal};

const BACKEND: &str = "hsm_nodes";
/// A balancer's look at a node, and a line of a log, on a busy machine.
const SOON: Duration = Duration::from_secs(30);
/// Where a client of the balancer is.
const CLIENT: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);

/// A node that trusts the balancer's certificate and its address, and the certificate.
async fn start() -> Result<(Playground, Identity)> {
    let cluster = Playground::builder().nodes(1).unformed().start().await?;
    let edge = cluster.pki().issue("edge-1", Some("Trading"))?;
    let pin = hex::encode(Sha256::digest(edge.spki()?));
    let node = cluster.node(1);
    node.kill().await?;
    let before = node.config()?;
    let keys = format!(
        "  trusted_proxies: [{{name: edge, spki_sha256: \"{pin}\"}}]\n  proxy_protocol_from: [{BALANCER}]\n  drain: {{"
    );
    let after = before.replacen("  drain: {", &keys, 1);
    ensure!(
        after != before,
        "the playground's configuration has changed:\n{before}"
    );
    node.set_config(&after)?;
    cluster.up().await?;
    Ok((cluster, edge))
}

/// What the example has in `/etc/haproxy`.
fn write_files(cluster: &Playground, edge: &Identity) -> Result<()> {
    let (pki, folder) = (cluster.pki(), Haproxy::files(cluster));
    let server = pki.dir().join("nodes").join(cluster.node(1).id());
    let read = |name: &str| {
        let path = server.join(name);
        std::fs::read_to_string(&path).with_context(|| path.display().to_string())
    };
    std::fs::create_dir(&folder)?;
    std::fs::write(
        folder.join("edge-server.pem"),
        read("server.crt")? + &read("server.key")?,
    )?;
    std::fs::write(
        folder.join("edge-client.pem"),
        format!("{}{}", edge.cert, edge.key),
    )?;
    for name in ["client-ca.crt", "server-ca.crt"] {
        std::fs::copy(pki.dir().join("ca.crt"), folder.join(name))?;
    }
    Ok(())
}

/// A batch whose text has at least so many bytes.
fn batch(bytes: usize) -> Value {
    let item = json!({"context": CONTEXT, "plaintext": Base64::from(&[7_u8; 3000][..])});
    json!({"batch": vec![item; bytes / 4000 + 1]})
}

/// Requests of any length arrive with a certificate that is longer than what HAProxy leaves free for it by default.
async fn a_large_certificate_and_a_large_body(pki: &Pki, port: u16) -> Result<()> {
    let client = pki.issue_large("trading-large", Some("Trading"))?;
    let length = client.der()?.len();
    ensure!(length > 1500, "its certificate has {length} bytes only");
    let mut connection = Connection::open(pki, port, &client).await?;
    for bytes in [0, 8 << 10, 15 << 10, 48 << 10, 64 << 10, 300 << 10] {
        let body = batch(bytes);
        let items = body["batch"].as_array().map_or(0, Vec::len);
        let answer = connection.ask("POST", paths::ENCRYPT, &[], &body).await?;
        ensure!(
            answer.status()? == 200,
            "{bytes} bytes: {} {:?}",
            answer.start,
            answer.code()
        );
        let answered = answer.json()?;
        let sealed = answered["batch"].as_array().context("no batch")?;
        ensure!(
            sealed.len() == items && sealed.iter().all(|item| item["ciphertext"].is_string()),
            "{bytes} bytes: {items} items, {} answers",
            sealed.len()
        );
    }
    Ok(())
}

/// Who a client is, is what HAProxy has seen, whatever the client says.
async fn what_a_client_says_of_certificates_is_removed(pki: &Pki, port: u16) -> Result<()> {
    let shown = client_cert(&pki.identity("trading-1")?.der()?);
    let value = shown.split_once(':').map_or("", |(_, value)| value.trim());
    let mut owner = Connection::open(pki, port, &pki.identity("2fa-1")?).await?;
    let body = json!({"context": CONTEXT, "plaintext": "aGVsbG8="});
    for lines in [
        vec![shown.clone()],
        vec![format!("client-cert: {value}")],
        vec![format!("CLIENT-CERT: {value}"), shown.clone()],
        vec![format!("Client-Cert-Chain: {value}")],
        vec!["Client-Cert-Chain: x".to_owned()],
    ] {
        let answer = owner.ask("POST", paths::ENCRYPT, &lines, &body).await?;
        ensure!(
            answer.code().as_deref() == Some("access_denied"),
            "{lines:?}: {answer:?}"
        );
        let own = json!({"context": "2fa", "plaintext": "aGVsbG8="});
        let answer = owner.ask("POST", paths::ENCRYPT, &lines, &own).await?;
        ensure!(answer.status()? == 200, "{lines:?}: {answer:?}");
    }
    Ok(())
}

async fn administrators_are_refused(pki: &Pki, port: u16) -> Result<()> {
    let marked = ["x-hsm-request: 1".to_owned()];
    let mut admin = Connection::open(pki, port, &pki.identity("admin")?).await?;
    let answer = admin.ask("GET", paths::WHOAMI, &marked, &json!({})).await?;
    ensure!(answer.status()? == 403, "{answer:?}");
    // By HAProxy itself: the node would have said why.
    ensure!(answer.header("x-hsm-node").is_none(), "{answer:?}");
    Ok(())
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
    write_files(&cluster, &edge)?;

    let haproxy = Haproxy::start(&cluster, "haproxy-client-cert.cfg").await?;
    haproxy.wait_up(BACKEND, &[1], SOON).await?;
    // Over HTTP/2, as clients speak with it.
    let trading = pki.identity("trading-1")?;
    let client = pki.client(Some(&trading), &[haproxy.endpoint()])?;
    let sealed = seal(&client, CONTEXT, b"through the balancer").await?;
    open(&client, CONTEXT, &sealed).await?;
    let checked = async {
        a_large_certificate_and_a_large_body(&pki, haproxy.port()).await?;
        what_a_client_says_of_certificates_is_removed(&pki, haproxy.port()).await?;
        administrators_are_refused(&pki, haproxy.port()).await
    };
    checked.await.with_context(|| haproxy.said())?;
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
