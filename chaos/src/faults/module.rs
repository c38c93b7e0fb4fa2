//! A PKCS#11 module that is slow, hangs or returns errors: the shim before a node's tokens.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cluster_tests::until;
use hsm_api::data::EncryptRequest;

use super::{Done, one_of};
use crate::cluster::Cluster;

/// What an encryption, a decryption and an import are made of.
const CALLS: [&str; 3] = ["C_Encrypt", "C_Decrypt", "C_UnwrapKey"];
/// A context that every playground has a key in.
const CONTEXT: &str = "exchange-key";
/// For a request to meet it.
const SEEN: Duration = Duration::from_secs(15);

fn obey(number: u32, rules: &[String], cluster: &Cluster) -> Result<()> {
    let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
    cluster
        .with_equipment(number, |equipment| equipment.shim().map(|shim| shim.obey(&rules)))?
        .context("no shim is before its tokens")?
}

/// Puts these in force on one node until a request to it is as it should be with them, and at least for the time.
async fn with_rules(
    rules: &[String],
    pick: u32,
    lasts: Duration,
    cluster: &Cluster,
    is_it: impl Fn(Duration, bool) -> bool,
) -> Result<(u32, bool)> {
    let number = one_of(&cluster.members(), pick).context("no node is left")?;
    let client = cluster.playground().client_on("trading-1", number)?;
    obey(number, rules, cluster)?;
    let seen = until("a request that meets it", lasts.max(SEEN), async || {
        let begun = Instant::now();
        let answer = client
            .encrypt(&EncryptRequest::new(CONTEXT, b"does the module work?".as_slice()))
            .await;
        is_it(begun.elapsed(), answer.is_ok()).then_some(())
    });
    let (seen, ()) = tokio::join!(seen, tokio::time::sleep(lasts));
    obey(number, &[], cluster)?;
    Ok((number, seen.is_ok()))
}

pub(super) async fn slow(ms: u32, pick: u32, lasts: Duration, cluster: &Cluster) -> Result<Done> {
    let rules = CALLS.map(|call| format!("{call} delay {ms}"));
    let least = Duration::from_millis(u64::from(ms));
    let (number, seen) = with_rules(&rules, pick, lasts, cluster, |took, _| took >= least).await?;
    let what = format!("node {number}, {ms} ms each");
    Ok(Done::counted_if(seen, what, "no request took longer"))
}

pub(super) async fn hung(pick: u32, lasts: Duration, cluster: &Cluster) -> Result<Done> {
    let rules = CALLS.map(|call| format!("{call} hang -"));
    let (number, seen) = with_rules(&rules, pick, lasts, cluster, |_, done| !done).await?;
    Ok(Done::counted_if(
        seen,
        format!("node {number}"),
        "every request was answered",
    ))
}

pub(super) async fn errors(code: u32, pick: u32, lasts: Duration, cluster: &Cluster) -> Result<Done> {
    let rules = CALLS.map(|call| format!("{call} fail {code:x}"));
    let (number, seen) = with_rules(&rules, pick, lasts, cluster, |_, done| !done).await?;
    let what = format!("node {number}, {code:#x}");
    Ok(Done::counted_if(seen, what, "every request was answered"))
}
