//! What has to hold of every balancer that ends TLS, before real nodes.

use anyhow::{Context, Result, ensure};
use cluster_tests::client::alert_for_tls12;
use cluster_tests::http1::Connection;
use cluster_tests::proxy::client_cert;
use cluster_tests::{Pki, http2};
use hsm_api::{Base64, headers, paths};
use serde_json::{Value, json};

use crate::common::CONTEXT;

/// In every answer to an encryption that was done.
const DONE: &str = "\"ciphertext\"";
const CHUNKED: &str = "transfer-encoding: chunked";
/// The last request of a connection.
const END: &str = "GET /nothing HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";

/// Who a client is, is what the balancer has seen in a whole handshake, and nothing else; and large requests are done.
pub(crate) async fn check(pki: &Pki, port: u16) -> Result<()> {
    strangers_are_refused(pki, port).await?;
    identities_do_not_mix(pki, port).await?;
    what_a_client_says_of_certificates_is_removed(pki, port).await?;
    nothing_is_smuggled_over_http1(pki, port).await?;
    nothing_is_smuggled_over_http2(pki, port).await?;
    administrators_are_refused(pki, port).await?;
    a_large_certificate_and_a_large_body(pki, port).await
}

/// An encryption that only `Trading` may ask for.
fn tradings() -> Value {
    json!({"context": CONTEXT, "plaintext": "aGVsbG8="})
}

/// By the balancer itself, which also goes by no earlier handshake and speaks TLS 1.3 only.
async fn strangers_are_refused(pki: &Pki, port: u16) -> Result<()> {
    let trading = pki.identity("trading-1")?;
    let shown = [client_cert(&trading.der()?)];
    for stranger in [
        Pki::foreign("trading-1", Some("Trading"))?,
        pki.issue_expired("trading-1", Some("Trading"))?,
    ] {
        // HAProxy refuses the handshake, which a client of TLS 1.3 may see late; nginx the request.
        let asked = async {
            let mut connection = Connection::open(pki, port, &stranger).await?;
            connection.ask("POST", paths::ENCRYPT, &shown, &tradings()).await
        };
        if let Ok(answer) = asked.await {
            ensure!(answer.status()? == 400, "{answer:?}");
            ensure!(answer.header(headers::X_HSM_NODE).is_none(), "{answer:?}");
        }
    }
    let resumed = Connection::is_resumed(pki, port, &trading).await?;
    ensure!(!resumed, "a certificate was not asked for again");
    let alert = alert_for_tls12(port).await?;
    // Fatal, protocol_version.
    ensure!(alert == (2, 70), "{alert:?} instead of an alert for TLS 1.2");
    Ok(())
}

/// Asks, and is answered with this code, or well.
async fn expect(
    connection: &mut Connection,
    path: &str,
    body: &Value,
    code: Option<&str>,
) -> Result<Option<Value>> {
    let answer = connection.ask("POST", path, &[], body).await?;
    let given = answer.code();
    ensure!(
        given.as_deref() == code && (code.is_some() || answer.status()? == 200),
        "{given:?} instead of {code:?}: {answer:?}"
    );
    Ok(answer.json().ok())
}

/// Clients that take turns on connections which they have in common are each who they are.
pub(crate) async fn identities_do_not_mix(pki: &Pki, port: u16) -> Result<()> {
    let mut trading = Connection::open(pki, port, &pki.identity("trading-1")?).await?;
    let mut owner = Connection::open(pki, port, &pki.identity("2fa-1")?).await?;
    let mut other = Connection::open(pki, port, &pki.issue("2fa-2", Some("2FA"))?).await?;
    let shared = tradings();
    // Its ciphertexts are for one CN.
    let private = json!({"context": "2fa", "plaintext": "aGVsbG8="});
    let sealed = expect(&mut owner, paths::ENCRYPT, &private, None).await?;
    let ciphertext = sealed.context("no answer")?["ciphertext"].clone();
    let sealed = json!({"context": "2fa", "ciphertext": ciphertext});
    for _ in 0..5 {
        expect(&mut trading, paths::ENCRYPT, &shared, None).await?;
        expect(&mut owner, paths::ENCRYPT, &shared, Some("access_denied")).await?;
        expect(&mut trading, paths::DECRYPT, &sealed, Some("access_denied")).await?;
        expect(&mut other, paths::DECRYPT, &sealed, Some("authentication_failed")).await?;
        expect(&mut owner, paths::DECRYPT, &sealed, None).await?;
    }
    Ok(())
}

/// An encryption as it is on the wire.
fn raw(lines: &[&str], body: &str) -> String {
    let lines = lines.join("\r\n");
    format!(
        "POST {} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{lines}\r\n\r\n{body}",
        paths::ENCRYPT
    )
}

/// All that a connection says to this.
async fn conversed(pki: &Pki, port: u16, profile: &str, text: &str) -> Result<String> {
    let connection = Connection::open(pki, port, &pki.identity(profile)?).await?;
    let said = connection.converse(format!("{text}{END}").as_bytes()).await;
    let said = said.with_context(|| format!("{text:?}"))?;
    Ok(String::from_utf8_lossy(&said).into_owned())
}

/// Neither a line with somebody else's certificate nor a request of which only the node would know.
async fn nothing_is_smuggled_over_http1(pki: &Pki, port: u16) -> Result<()> {
    let shown = client_cert(&pki.identity("trading-1")?.der()?);
    let body = tradings().to_string();
    let length = format!("content-length: {}", body.len());
    let plain = raw(&[&length], &body);
    let said = conversed(pki, port, "trading-1", &plain).await?;
    ensure!(said.contains(DONE), "{plain:?}: {said}");

    let chunk = |text: &str| format!("{:x}\r\n{text}\r\n0\r\n", text.len());
    let inner = raw(&[&shown, &length], &body);
    for attack in [
        raw(&[&shown.replacen(':', " :", 1), &length], &body),
        raw(&[&shown.replacen('-', "_", 1), &length], &body),
        // Whoever takes such lines off must not take his own off.
        raw(&["connection: client-cert", &shown, &length], &body),
        // Two lines for some, one for others.
        raw(&[&format!("x-a: b\r\n {shown}"), &length], &body),
        raw(&[&format!("x-a: b\n{shown}"), &length], &body),
        raw(&[&format!("x-a: b\r{shown}"), &length], &body),
        // In the trailer.
        raw(&[CHUNKED], &format!("{}{shown}\r\n\r\n", chunk(&body))),
        // One request for some, two for others.
        raw(
            &[CHUNKED, &format!("content-length: {}", inner.len() + 5)],
            &format!("0\r\n\r\n{inner}"),
        ),
        raw(&[CHUNKED, "content-length: 4"], &format!("{}\r\n", chunk(&inner))),
        raw(
            &["content-length: 0", &format!("content-length: {}", inner.len())],
            &inner,
        ),
        // A tunnel, if the node took it up.
        raw(
            &[
                "connection: upgrade, http2-settings",
                "upgrade: h2c",
                "http2-settings: AAMAAABk",
                &length,
            ],
            &body,
        ),
    ] {
        let said = conversed(pki, port, "2fa-1", &attack).await?;
        ensure!(!said.contains(DONE), "{attack:?}: {said}");
    }
    Ok(())
}

/// Whether an encryption with this path, and these names and values beside it, is done.
async fn is_done(pki: &Pki, port: u16, profile: &str, path: &str, further: &[(&str, &str)]) -> Result<bool> {
    let mut connection = http2::Connection::open(pki, port, &pki.identity(profile)?).await?;
    // Whoever ends the connection has refused as well.
    let answered = async {
        connection.begin_with(1, path, further).await?;
        connection.finish(1, tradings().to_string().as_bytes()).await?;
        connection.answer(1).await
    };
    Ok(matches!(answered.await, Ok(http2::Answer::Status(Some(200)))))
}

/// What is one value in HTTP/2 would be several lines in the HTTP/1.1 that nodes get.
async fn nothing_is_smuggled_over_http2(pki: &Pki, port: u16) -> Result<()> {
    let shown = client_cert(&pki.identity("trading-1")?.der()?);
    let (_, value) = shown.split_once(": ").context("no value")?;
    let lines = format!("b\r\n{shown}\r\nx-c: d");
    let target = format!("{} HTTP/1.1\r\n{shown}\r\nx-c: d", paths::ENCRYPT);
    let name = format!("x-a: b\r\n{shown}\r\nx-c");
    ensure!(
        is_done(pki, port, "trading-1", paths::ENCRYPT, &[]).await?,
        "a client of its own is refused"
    );
    for (path, further) in [
        (paths::ENCRYPT, ("client-cert", value)),
        (paths::ENCRYPT, ("Client-Cert", value)),
        (paths::ENCRYPT, ("client_cert", value)),
        (paths::ENCRYPT, (":client-cert", value)),
        (paths::ENCRYPT, ("x-a", lines.as_str())),
        (paths::ENCRYPT, (name.as_str(), "d")),
        (target.as_str(), ("x-a", "b")),
    ] {
        let done = is_done(pki, port, "2fa-1", path, &[further]).await?;
        ensure!(!done, "{path:?}, {further:?}");
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

async fn what_a_client_says_of_certificates_is_removed(pki: &Pki, port: u16) -> Result<()> {
    let shown = client_cert(&pki.identity("trading-1")?.der()?);
    let value = shown.split_once(':').map_or("", |(_, value)| value.trim());
    let mut owner = Connection::open(pki, port, &pki.identity("2fa-1")?).await?;
    let body = tradings();
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
    // By the balancer itself: the node would have said why.
    ensure!(answer.header(headers::X_HSM_NODE).is_none(), "{answer:?}");
    Ok(())
}
