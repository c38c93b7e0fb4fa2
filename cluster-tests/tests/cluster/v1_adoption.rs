//! Keys that version 1 made become versions: at the first start of a node on version 1's token, all of its list or none; and
//! in a cluster, one by one, where some nodes have that token, or a copy of it, and others have not.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::{Playground, until};
use hsm_api::admin::{DestroyKeyRequest, KeyOrigin, KeyState, KeyVersionInfo};
use hsm_api::client::{Method, Retry};
use hsm_api::data::{DecryptRequest, RewrapRequest};
use hsm_api::{ErrorCode, paths};
use serde_json::{Value, json};

use crate::common::{CONTEXT, context_on, formed_with, open, seal, seal_under};
use crate::pkcs11::Token;
use crate::site::{Site, version_1s_site};
use crate::v1_service::{FIRST, KEYS, SECOND, TWO_FACTOR, ciphertexts_open, make_keys, sealed, write_list};

/// From a start that is refused to its end.
const REFUSED: Duration = Duration::from_secs(60);
/// From a committed change until every node goes by it.
const SEEN: Duration = Duration::from_secs(30);
const READY: Duration = Duration::from_secs(60);
/// Of a key whose label is none of the form that version 1 gave.
const OLD: &str = "old exchange key";

fn count(labels: &[String], wanted: &str) -> usize {
    labels.iter().filter(|label| *label == wanted).count()
}

/// Starts with lists that the token does not agree with.
async fn refuses_to_lose_a_key(site: &Site) -> Result<()> {
    ends_unstarted(site, "metadata.yaml is not there").await?;
    // Cut short: the token has more.
    write_list(site, &[2])?;
    ends_unstarted(
        site,
        "kek-exchange-key-v1: it is in the token and not in the list",
    )
    .await?;
    write_list(site, &[1, 2, 3])?;
    ends_unstarted(site, "kek-exchange-key-v3 (version 3 of exchange-key)").await
}

/// Exit code 78, with the reason in the log.
async fn ends_unstarted(site: &Site, why: &str) -> Result<()> {
    let mut node = site.command()?.stdout(std::process::Stdio::null()).spawn()?;
    let status = tokio::time::timeout(REFUSED, node.wait()).await??;
    ensure!(status.code() == Some(78), "{why}: it ended with {status}");
    ensure!(site.log().contains(why), "no word of {why:?}");
    Ok(())
}

/// A first start that is killed in its middle, again and again: the next one finds what was done, and goes on.
#[cfg(feature = "failpoints")]
async fn is_cut_off(site: &Site) -> Result<()> {
    use std::os::unix::process::ExitStatusExt;

    let marker = site.folder.join("data/v1-metadata");
    for point in [
        "v1_keys::after_version",
        "sync::before_adopt",
        "rotation::after_prepare_commit",
        "v1_keys::before_marker",
    ] {
        let mut node = site
            .command()?
            .env("HSM_FAILPOINTS", format!("{point}=kill"))
            .stdout(std::process::Stdio::null())
            .spawn()?;
        let status = tokio::time::timeout(READY, node.wait())
            .await
            .with_context(|| format!("{point} was not reached"))??;
        ensure!(status.signal() == Some(9), "{point}: it ended with {status}");
        ensure!(
            !marker.exists(),
            "{point}: it has noted that the list was read to its end"
        );
    }
    Ok(())
}

/// What the list says of its versions, and what became of them.
async fn has_adopted_the_list(site: &Site) -> Result<()> {
    let admin = site.client("admin")?;
    let keks = admin.list_keks().await?.into_body();
    for info in &keks.contexts {
        for version in &info.versions {
            let adopted = version.origin == KeyOrigin::Adopted;
            let expected = if adopted {
                KeyState::DecryptOnly
            } else {
                KeyState::Active
            };
            ensure!(version.state == expected, "{} {version:?}", info.context);
            ensure!(adopted == (version.holders.len() == 1), "{version:?}");
            if version.key_id == "kek-exchange-key-v2" {
                ensure!(version.created_at == "2024-02-01T00:00:00Z", "{version:?}");
            }
        }
    }
    let adopted: usize = keks
        .contexts
        .iter()
        .flat_map(|info| &info.versions)
        .filter(|version| version.origin == KeyOrigin::Adopted)
        .count();
    ensure!(adopted == KEYS.len(), "{adopted} keys were adopted");
    let due = admin.rotation_status().await?.into_body();
    let days: Vec<u32> = due
        .contexts
        .iter()
        .map(|context| context.rotation_interval_days)
        .collect();
    ensure!(days == [90, 45], "rotation intervals: {days:?}");
    Ok(())
}

async fn adopts_at_its_first_start(site: &Site) -> Result<()> {
    let token = make_keys(site)?;
    refuses_to_lose_a_key(site).await?;
    let written = write_list(site, &[1, 2])?;
    #[cfg(feature = "failpoints")]
    is_cut_off(site).await?;
    let mut node = site.start().await?;
    site.wait_ready().await?;
    has_adopted_the_list(site).await?;
    ciphertexts_open(site).await?;
    node.kill().await?;
    let list = fs::read_to_string(site.folder.join("metadata.yaml"))?;
    ensure!(list == written, "the list was written to");
    // Version 1 still finds its keys where it left them, and each once.
    let labels = token.labels()?;
    for (label, _) in KEYS {
        let copy = format!("adopted:{label}");
        ensure!(
            count(&labels, label) == 1 && count(&labels, &copy) == 1,
            "{label}: {labels:?}"
        );
    }
    // The list has been read: another one is not.
    write_list(site, &[1, 2, 4])?;
    let mut node = site.start().await?;
    site.wait_ready().await?;
    ciphertexts_open(site).await?;
    until("a word of the other list", SEEN, async || {
        site.log().contains("hsm.metadata_file has changed").then_some(())
    })
    .await?;
    node.kill().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_first_start_adopts_all_that_version_1_listed_or_is_refused() -> Result<()> {
    let site = version_1s_site().await?;
    let adopted = adopts_at_its_first_start(&site).await;
    adopted.with_context(|| site.log())?;
    site.passed();
    Ok(())
}

async fn adopted_on(cluster: &Playground, number: u32) -> Result<KeyVersionInfo> {
    let info = context_on(cluster, number, CONTEXT).await?;
    let mut versions = info.versions.into_iter();
    versions
        .find(|version| version.key_id == OLD)
        .with_context(|| format!("node {number} knows no version {OLD:?}"))
}

/// Until every node says so of the adopted version.
async fn becomes(
    cluster: &Playground,
    what: &str,
    is: impl Fn(&KeyVersionInfo) -> bool,
    within: Duration,
) -> Result<KeyVersionInfo> {
    until(what, within, async || {
        let mut last = None;
        for node in cluster.nodes() {
            last = Some(adopted_on(cluster, node.number).await.ok().filter(&is)?);
        }
        last
    })
    .await
}

/// Disabled it decrypts nowhere, also after a restart; enabled it decrypts again.
async fn is_disabled_over_a_restart(cluster: &Playground, version: u32, ask: &DecryptRequest) -> Result<()> {
    let admin = cluster.client_on("admin", 3)?.with_retry(Retry::Until(READY));
    admin.disable_key(CONTEXT, version, None).await?;
    let disabled = |version: &KeyVersionInfo| version.state == KeyState::Disabled;
    becomes(cluster, "it is disabled", disabled, SEEN).await?;
    let first = cluster.node(1);
    first.kill().await?;
    cluster.start_node(1).await?;
    first.wait_ready(READY).await?;
    let client = cluster.client_on("trading-1", 1)?;
    until("node 1 refuses it as disabled", SEEN, async || {
        let error = client.decrypt(ask).await.err()?;
        (error.code() == Some(ErrorCode::KeyVersionDisabled)).then_some(())
    })
    .await?;
    admin.enable_key(CONTEXT, version, None).await?;
    until("node 1 opens it again", SEEN, async || {
        client.decrypt(ask).await.ok()
    })
    .await?;
    Ok(())
}

async fn refuses(cluster: &Playground, arguments: &[&str], why: &str) -> Result<()> {
    let refused = cluster.hsmctl(arguments).await?;
    ensure!(
        refused.code != Some(0) && refused.stderr.contains(why),
        "{why:?} is not why: {:?}: {}",
        refused.code,
        refused.stderr
    );
    Ok(())
}

async fn answers(cluster: &Playground, arguments: &[&str]) -> Result<Value> {
    let answer = cluster.hsmctl(arguments).await?.ok()?;
    Ok(serde_json::from_slice(&answer)?)
}

/// Of two keys of a context that does not exist yet, the first alone, then the second; the first is given back.
async fn adopts_one_by_one(cluster: &Playground, endpoint: &str) -> Result<()> {
    let adopt = |label: &'static str, more: &[&'static str]| {
        let place = ["--slot", "exchange", "--endpoint", endpoint, "-o", "json"];
        let key = ["key", "adopt", "--context", "later", "--label", label];
        [&key[..], &place[..], more].concat()
    };
    // To whom was it bound, and what of the other key?
    let (first, second) = ("kek-later-v1", "kek-later-v2");
    refuses(cluster, &adopt(first, &[]), "--mode shared, private").await?;
    refuses(cluster, &adopt(first, &["--mode", "shared"]), second).await?;
    let made = answers(cluster, &adopt(first, &["--mode", "shared", "--only"])).await?;
    ensure!(
        made["versions"][0]["version"] == 1 && made["active_version"] == 3 && made["binding"] == "shared",
        "{made:#}"
    );
    let otherwise = adopt(second, &["--mode", "private"]);
    refuses(cluster, &otherwise, "shared, for good, and not private").await?;
    // All of them by version 1's list: it goes on where the commands before stopped.
    let list = cluster.scratch().join("metadata.yaml");
    fs::write(
        &list,
        format!(
            "rotation: {{later: {{current: {second}, versions: [{{label: {first}, version: 1}}, {{label: {second}, \
             version: 2}}, {{label: gone, version: 9}}]}}}}\n"
        ),
    )?;
    let list = list.to_str().context("folder is not UTF-8")?;
    let by_list = [
        "key",
        "adopt",
        "--metadata-file",
        list,
        "--slot",
        "exchange",
        "--endpoint",
        endpoint,
        "-o",
        "json",
    ];
    // A listed key that is lost is left out if that is said, and named wherever it is.
    refuses(
        cluster,
        &by_list,
        "(version 9); nothing was adopted of this context",
    )
    .await?;
    let skipping = [&by_list[..], &["--skip-missing"]].concat();
    let gone = json!([{"key_id": "gone", "version": 9}]);
    let recorded = || {
        cluster
            .node(1)
            .log()
            .contains("later/v9 skipped, not in the token: gone")
    };
    let seen = answers(cluster, &[&skipping[..], &["--dry-run"]].concat()).await?;
    ensure!(seen[0]["skipped"] == gone, "{seen:#}");
    ensure!(!recorded(), "a dry run was recorded");
    let made = answers(cluster, &skipping).await?;
    ensure!(made[0]["skipped"] == gone, "{made:#}");
    until("the audit names it", SEEN, async || recorded().then_some(())).await?;
    let new: Vec<_> = made[0]["versions"]
        .as_array()
        .context("no versions")?
        .iter()
        .map(|version| (version["version"].as_u64(), version["new"].as_bool()))
        .collect();
    ensure!(
        new == [(Some(1), Some(false)), (Some(2), Some(true))] && made[0]["active_version"] == 3,
        "{made:#}"
    );
    let release = [
        "key",
        "release",
        "later/v1",
        "--confirm",
        "later/v1",
        "-o",
        "json",
    ];
    let released = answers(cluster, &release).await?;
    ensure!(released["state"] == "abandoned", "{released:#}");
    Ok(())
}

pub(crate) async fn an_adopted_key_serves_where_its_token_is_and_ends_there() -> Result<()> {
    let cluster = formed_with(Playground::builder(), |config| {
        config.replacen("logging:", "keys: {destroy: {min_wait_seconds: 1}}\nlogging:", 1)
    })
    .await?;
    // Version 1's token on node 1, a copy of it on node 2, none on node 3.
    for node in &cluster.nodes()[..2] {
        node.kill().await?;
        let token = Token::of(&cluster, node, "exchange");
        token.make_v1(OLD, &FIRST)?;
        if node.number == 1 {
            token.make_v1("kek-later-v1", &SECOND)?;
            token.make_v1("kek-later-v2", &TWO_FACTOR)?;
        }
        cluster.start_node(node.number).await?;
        node.wait_ready(READY).await?;
    }
    let first = cluster.node(1).endpoint();
    let adopt = [
        "key",
        "adopt",
        "--context",
        CONTEXT,
        "--label",
        OLD,
        "--endpoint",
        &first,
        "-o",
        "json",
    ];
    let dry = cluster
        .hsmctl(&[&adopt[..], &["--dry-run"]].concat())
        .await?
        .ok()?;
    let dry: Value = serde_json::from_slice(&dry)?;
    let expected = json!([{ "version": 2, "key_id": OLD, "new": true, "proven": false }]);
    ensure!(dry["versions"] == expected && dry["dry_run"] == true, "{dry:#}");
    ensure!(adopted_on(&cluster, 1).await.is_err(), "a dry run adopted it");
    let refused = cluster.hsmctl_as("trading-1", &adopt, &[]).await?;
    ensure!(refused.code != Some(0), "a client adopted a key");
    let absent = [
        "key",
        "adopt",
        "--context",
        CONTEXT,
        "--label",
        "no such key",
        "--endpoint",
        &first,
    ];
    let absent = cluster.hsmctl(&absent).await?;
    ensure!(
        absent.code != Some(0) && absent.stderr.contains("no such key"),
        "{:?}: {}",
        absent.code,
        absent.stderr
    );

    let repeatable = [&adopt[..], &["--idempotency-key", "adopt-once"]].concat();
    for _ in 0..2 {
        let made = cluster.hsmctl(&repeatable).await?.ok()?;
        let made: Value = serde_json::from_slice(&made)?;
        let expected = json!([{ "version": 2, "key_id": OLD, "new": true, "proven": true }]);
        ensure!(made["versions"] == expected, "{made:#}");
        ensure!(made["active_version"] == 1, "{made:#}");
    }
    let both = ["hsm-node-1", "hsm-node-2"].map(str::to_owned);
    let held = becomes(
        &cluster,
        "both tokens are holders",
        |version| version.holders == both,
        SEEN,
    )
    .await?;
    ensure!(held.state == KeyState::DecryptOnly, "{held:?}");

    let ciphertext = sealed(&FIRST, CONTEXT, "Trading", b"4111");
    let ask = || DecryptRequest::new(CONTEXT, ciphertext.as_slice()).with_key_id(OLD);
    for number in [1, 2] {
        let client = cluster.client_on("trading-1", number)?;
        let what = format!("node {number} opens it");
        let opened = until(&what, SEEN, async || client.decrypt(&ask()).await.ok()).await?;
        ensure!(opened.plaintext.as_slice() == b"4111", "something else came out");
    }
    is_disabled_over_a_restart(&cluster, held.version, &ask()).await?;
    let third = cluster.client_on("trading-1", 3)?;
    // The state says so on every node; what a node serves follows it.
    let refusal = until("node 3 knows that it has no such key", SEEN, async || {
        let error = third.decrypt(&ask()).await.err()?;
        let refusal = error.api()?.clone();
        (refusal.code == Some(ErrorCode::KeyNotOnThisNode)).then_some(refusal)
    })
    .await?;
    ensure!(
        refusal.status == 503 && refusal.retryable && refusal.retry_after == Some(Duration::from_secs(1)),
        "{refusal:?}"
    );
    // It lacks nothing that it could have: it is ready, healthy, and encrypts.
    let node = cluster.node(3);
    node.wait_ready(READY).await?;
    let health = third.request(Method::GET, paths::HEALTH, &[], Vec::new()).await?;
    ensure!(health.status == 200, "{}", health.text());
    seal_under(&third, CONTEXT, b"meanwhile", 1).await?;
    // A client of all nodes finds one that has it.
    let everybody = cluster.client("trading-1")?.with_retry(Retry::Until(SEEN));
    for _ in 0..6 {
        everybody.decrypt(&ask()).await?;
    }
    // What is rewrapped is everybody's.
    let moved = cluster
        .client_on("trading-1", 1)?
        .rewrap(&RewrapRequest::new(CONTEXT, ciphertext.as_slice()).with_key_id(OLD))
        .await?
        .into_body();
    let opened = third
        .decrypt(&DecryptRequest::new(CONTEXT, moved.ciphertext))
        .await?;
    ensure!(opened.plaintext.as_slice() == b"4111", "something else came out");

    adopts_one_by_one(&cluster, &first).await?;

    // Its end: the copies, and what they were made of, on both nodes.
    let admin = cluster.client_on("admin", 3)?.with_retry(Retry::Until(READY));
    let destroy = DestroyKeyRequest {
        wait_seconds: Some(1),
        override_recent_use: true,
    };
    admin.destroy_key(CONTEXT, held.version, &destroy, None).await?;
    let gone = |version: &KeyVersionInfo| version.state == KeyState::Destroyed;
    becomes(&cluster, "it is destroyed", gone, READY).await?;
    let sealed = seal(&third, CONTEXT, b"after").await?;
    cluster.dev("down", &[]).await?;
    for node in cluster.nodes() {
        let labels = Token::of(&cluster, &node, "exchange").labels()?;
        let left: Vec<_> = labels.iter().filter(|label| label.contains(OLD)).collect();
        ensure!(left.is_empty(), "{}: {left:?}", node.id());
        let later = |label: &str| (count(&labels, label), count(&labels, &format!("adopted:{label}")));
        let there = usize::from(node.number == 1);
        // The first was given back.
        let expected = ((there, 0), (there, there));
        let seen = (later("kek-later-v1"), later("kek-later-v2"));
        ensure!(seen == expected, "{}: {labels:?}", node.id());
    }
    cluster.up().await?;
    open(&cluster.client_on("trading-1", 1)?, CONTEXT, &sealed).await?;
    cluster.passed();
    Ok(())
}
