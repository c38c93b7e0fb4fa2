//! A node that joins, in the eyes of whoever asks it meanwhile: it refuses, with documented codes, until it holds
//! every key, and is ready only then.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cluster_tests::failpoints::arm;
use cluster_tests::{Node, Playground};
use hsm_api::data::{DecryptRequest, EncryptRequest};
use hsm_api::{Client, ClientError, ErrorCode};

use crate::common::{CONTEXT, Sealed, open, open_everywhere, seal, seal_under};

/// Key versions to import, and how much longer each import takes: enough time to be watched in.
const VERSIONS: u32 = 8;
const LONGER: &str = "sleep(300)";
/// From the start of the watch to readiness.
const JOINED_WITHIN: Duration = Duration::from_secs(90);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(5);
/// The watch must have seen it while it imported, and once before it belonged to the cluster.
const REFUSALS: [(ErrorCode, u32); 2] = [(ErrorCode::Uninitialised, 1), (ErrorCode::NotReady, 10)];
/// What `docs/errors.md` has for a node that may not answer yet. A joiner that has a part of the keys is none that
/// lacks some: it serves nothing of any slot.
const NOT_YET: [ErrorCode; 2] = [ErrorCode::Uninitialised, ErrorCode::NotReady];

/// A ciphertext, whose it is, and who may open it.
struct Theirs {
    client: Client,
    context: &'static str,
    sealed: Sealed,
}

fn documented(error: &ClientError) -> Result<ErrorCode> {
    let code = error.code().filter(|code| NOT_YET.contains(code));
    ensure!(error.status() == Some(503), "{error}");
    code.with_context(|| error.to_string())
}

/// Asks a joiner for everything again and again until its first ready moment, in which it has to open all of it.
/// Returns what it refused before, by code.
async fn watch(node: Node, all: Vec<Theirs>) -> Result<BTreeMap<ErrorCode, u32>> {
    let begun = Instant::now();
    let mut refused = BTreeMap::new();
    // Whoever opens one version opens them all from then on.
    let mut opens = false;
    loop {
        match node.patient().get("/readyz").await?.status {
            200 => break,
            503 => {}
            status => bail!("/readyz is {status}"),
        }
        for Theirs {
            client,
            context,
            sealed,
        } in &all
        {
            let request = DecryptRequest::new(*context, sealed.ciphertext.clone());
            let what = || format!("version {} of {context}", sealed.version);
            let error = match client.decrypt(&request).await {
                Ok(opened) => {
                    ensure!(
                        opened.plaintext.as_slice() == sealed.plaintext,
                        "{} decrypted to something else",
                        what()
                    );
                    opens = true;
                    continue;
                }
                Err(error) => error,
            };
            ensure!(!opens, "{} refused although others open: {error}", what());
            *refused.entry(documented(&error).with_context(what)?).or_insert(0) += 1;
            let encrypted = client.encrypt(&EncryptRequest::new(*context, b"x")).await;
            match encrypted {
                // It became a member between the two, and decrypts. It encrypts, and is ready, once it was given
                // invocations.
                Ok(_) => opens = true,
                Err(error) if error.code() == Some(ErrorCode::InvocationsExhausted) => opens = true,
                Err(error) => {
                    documented(&error).with_context(|| format!("encrypt for {context}"))?;
                }
            }
        }
        if begun.elapsed() > JOINED_WITHIN {
            let checks = node.checks().await;
            bail!("not ready after {JOINED_WITHIN:?}: {checks}");
        }
        tokio::time::sleep(PAUSE).await;
    }
    for theirs in &all {
        open(&theirs.client, theirs.context, &theirs.sealed)
            .await
            .with_context(|| format!("ready, and version {} does not open", theirs.sealed.version))?;
    }
    let missing = node.metrics().await?.sum("hsm_keys_missing");
    ensure!(
        missing == Some(0.0),
        "{missing:?} keys are missing on a ready node"
    );
    Ok(refused)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_joiner_serves_only_after_holding_every_key() -> Result<()> {
    let mut cluster = Playground::start(3).await?;
    let trading = cluster.client("trading-1")?;
    let mut all = vec![seal(&trading, CONTEXT, b"version 1").await?];
    for version in 2..=VERSIONS {
        let made = cluster.client("admin")?.rotate(CONTEXT, None).await?.version;
        ensure!(made == version, "version {made} instead of {version}");
        let plaintext = format!("version {version}");
        all.push(seal_under(&trading, CONTEXT, plaintext.as_bytes(), version).await?);
    }
    let own = seal(&cluster.client("2fa-1")?, "2fa", b"2fa").await?;

    let fourth = cluster.add_node(false).await?;
    arm(&fourth, "rotation::before_import", LONGER).await?;
    let client = cluster.client_on("trading-1", fourth.number)?;
    let of_exchange = all.iter().map(|sealed| Theirs {
        client: client.clone(),
        context: CONTEXT,
        sealed: sealed.clone(),
    });
    // One slot's only key is there long before the other slot's eight.
    let of_2fa = Theirs {
        client: cluster.client_on("2fa-1", fourth.number)?,
        context: "2fa",
        sealed: own.clone(),
    };
    let asked = of_exchange.chain([of_2fa]).collect();
    let watched = tokio::spawn(watch(fourth.clone(), asked));
    cluster.up().await?;
    let refused = watched.await??;
    println!("refused before it was ready: {refused:?}");
    for (code, least) in REFUSALS {
        let times = refused.get(&code).copied().unwrap_or(0);
        ensure!(times >= least, "{code} only {times} times: {refused:?}");
    }
    arm(&fourth, "rotation::before_import", "off").await?;
    open(&cluster.client_on("2fa-1", fourth.number)?, "2fa", &own).await?;
    open_everywhere(&cluster, "trading-1", CONTEXT, &all).await?;
    cluster.passed();
    Ok(())
}
