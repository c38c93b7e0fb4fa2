//! A node that starts where nobody hears it: it is never ready, and answers nothing, or what it may if it was told to.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cluster_tests::{Node, Playground, until};
use hsm_api::ErrorCode;
use hsm_api::client::Retry;
use hsm_api::data::{DecryptRequest, EncryptRequest};
use serde_json::Value;

use crate::common::{CONTEXT, Sealed, seal, seal_under};
use crate::partitions::{FOLLOWS, code_of};

/// `serve_after_restart_without_quorum`: what it was sure of before it stopped it decrypts, marked and on record, and it
/// encrypts nothing; a balancer hears of it only if it asks for that.
async fn it_serves_all_the_same_if_it_is_told_to(
    cluster: &Playground,
    node: &Node,
    sealed: &Sealed,
    unknown: &Sealed,
) -> Result<()> {
    node.kill().await?;
    let setting = "serve_after_restart_without_quorum";
    node.set_config(&format!("{}{setting}: true\n", node.config()?))?;
    cluster.start_node(node.number).await?;
    let client = cluster.client_on("trading-1", node.number)?;
    let decrypt = |sealed: &Sealed| DecryptRequest::new(CONTEXT, sealed.ciphertext.clone());
    let opened = until("a decryption in isolation", FOLLOWS, async || {
        client.decrypt(&decrypt(sealed)).await.ok()
    })
    .await?;
    ensure!(
        opened.meta.stale && opened.plaintext.as_slice() == sealed.plaintext,
        "not marked, or something else: {:?}",
        opened.meta
    );
    for (outcome, code) in [
        (client.decrypt(&decrypt(unknown)).await.err(), ErrorCode::NoQuorum),
        (
            client.encrypt(&EncryptRequest::new(CONTEXT, b"x")).await.err(),
            ErrorCode::InvocationsExhausted,
        ),
    ] {
        let refused = outcome.with_context(|| format!("it is done, and not {code}"))?;
        ensure!(
            refused.code() == Some(code) && refused.status() == Some(503),
            "{refused} instead of {code}"
        );
    }
    let health = node.patient();
    until("/readyz?stale=ok in isolation", FOLLOWS, async || {
        (health.get("/readyz?stale=ok").await.ok()?.status == 200).then_some(())
    })
    .await
    .with_context(|| setting.to_owned())?;
    for path in ["/readyz", "/readyz?slot=exchange"] {
        let answer = health.get(path).await?;
        ensure!(answer.status == 503, "{path} is {} in isolation", answer.status);
    }
    // The log is written a moment later.
    let waived = until("the audit of what is waived", FOLLOWS, async || {
        let log = node.log();
        let lines = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let waived: Vec<Value> = lines
            .filter(|line| line["action"] == "start_gate.waive")
            .collect();
        (!waived.is_empty()).then_some(waived)
    })
    .await?;
    let [line] = &waived[..] else {
        bail!("it is said more than once: {waived:?}");
    };
    for (field, value) in [
        ("level", "WARN"),
        ("target", "audit"),
        ("setting", setting),
        ("first_request", "decrypt"),
        ("outcome", "done"),
    ] {
        ensure!(line[field] == value, "{field}: {line}");
    }
    Ok(())
}

pub(crate) async fn a_node_restarted_in_isolation_is_never_ready() -> Result<()> {
    let cluster = Playground::builder().relayed().start().await?;
    let sealed = seal(&cluster.client("trading-1")?, CONTEXT, b"before").await?;
    let leader = cluster.leader().await?;
    let node = cluster.others(leader.node)[0].clone();
    cluster.relays()?.isolate(node.number);
    node.kill().await?;
    cluster.start_node(node.number).await?;
    // Longer than anything by which a node could take itself for ready: dials, elections, the 5 s of readiness. The
    // bounds of staleness are counted from a contact, and it has none.
    let until_then = Instant::now() + Duration::from_secs(15);
    let client = cluster.client_on("trading-1", node.number)?;
    while Instant::now() < until_then {
        for path in ["/readyz", "/readyz?stale=ok", "/readyz?slot=exchange"] {
            let answer = node.patient().get(path).await?;
            ensure!(answer.status == 503, "{path} is {} in isolation", answer.status);
        }
        let outcome = code_of(seal(&client, CONTEXT, b"x").await.map(drop));
        ensure!(
            outcome == Err(Some(ErrorCode::NotReady)),
            "it encrypts in isolation, or says otherwise: {outcome:?}"
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    // A version it cannot know of, and then the way back: through the start gate, with every key.
    let version = cluster
        .client_on("admin", leader.node)?
        .with_retry(Retry::Until(FOLLOWS))
        .rotate(CONTEXT, None)
        .await?
        .version;
    let trading = cluster.client_on("trading-1", leader.node)?;
    let unknown = seal_under(&trading, CONTEXT, b"unknown", version).await?;
    it_serves_all_the_same_if_it_is_told_to(&cluster, &node, &sealed, &unknown).await?;
    cluster.relays()?.heal();
    node.wait_ready(FOLLOWS).await?;
    let sealed = seal(&client, CONTEXT, b"back").await?;
    ensure!(
        sealed.version == version,
        "it encrypts under version {}",
        sealed.version
    );
    cluster.passed();
    Ok(())
}
