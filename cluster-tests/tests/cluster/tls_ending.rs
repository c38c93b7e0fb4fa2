//! What has to hold of every balancer that ends TLS, before real nodes.

use anyhow::{Context, Result, ensure};
use cluster_tests::Pki;
use cluster_tests::http1::Connection;
use cluster_tests::proxy::client_cert;
use hsm_api::{Base64, paths};
use serde_json::{Value, json};

use crate::common::CONTEXT;

/// A batch whose text has at least so many bytes.
fn batch(bytes: usize) -> Value {
    let item = json!({"context": CONTEXT, "plaintext": Base64::from(&[7_u8; 3000][..])});
    json!({"batch": vec![item; bytes / 4000 + 1]})
}

/// Requests of any length arrive with a certificate that is longer than what HAProxy leaves free for it by default.
pub(crate) async fn a_large_certificate_and_a_large_body(pki: &Pki, port: u16) -> Result<()> {
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

/// Who a client is, is what the balancer has seen, whatever the client says.
pub(crate) async fn what_a_client_says_of_certificates_is_removed(pki: &Pki, port: u16) -> Result<()> {
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

pub(crate) async fn administrators_are_refused(pki: &Pki, port: u16) -> Result<()> {
    let marked = ["x-hsm-request: 1".to_owned()];
    let mut admin = Connection::open(pki, port, &pki.identity("admin")?).await?;
    let answer = admin.ask("GET", paths::WHOAMI, &marked, &json!({})).await?;
    ensure!(answer.status()? == 403, "{answer:?}");
    // By the balancer itself: the node would have said why.
    ensure!(answer.header("x-hsm-node").is_none(), "{answer:?}");
    Ok(())
}
