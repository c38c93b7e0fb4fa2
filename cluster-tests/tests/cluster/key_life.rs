//! The life of a key version after its retirement: disabled and enabled, destroyed after a wait on every node, spared
//! in time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::{Node, Playground, until};
use hsm_api::admin::{DestroyKeyRequest, KeyState, KeyVersionInfo};
use hsm_api::client::Retry;
use hsm_api::{Client, ClientError, ErrorCode};

use crate::common::{CONTEXT, Sealed, context_on, formed_with, open, open_everywhere, seal, settled_on};
use crate::pkcs11::Token;

/// From a committed change until every node goes by it.
const SEEN: Duration = Duration::from_secs(30);
/// From the end of a wait until every token is clean and the cluster says so. The wait begins anew under another leader,
/// which takes half a minute.
pub(crate) const GONE: Duration = Duration::from_secs(150);
/// From a node's start until it is ready.
pub(crate) const READY: Duration = Duration::from_secs(60);
pub(crate) const FIRST: &str = "kek-exchange-key-v1";

/// A cluster that lets a destruction wait for a second only, with a ciphertext of version 1, and version 2 active.
pub(crate) async fn retired() -> Result<(Playground, Sealed)> {
    let cluster = formed_with(Playground::builder(), |config| {
        config.replacen("logging:", "keys: {destroy: {min_wait_seconds: 1}}\nlogging:", 1)
    })
    .await?;
    let sealed = seal(&cluster.client("trading-1")?, CONTEXT, b"under the first").await?;
    ensure!(sealed.version == 1, "version {}", sealed.version);
    cluster.client("admin")?.rotate(CONTEXT, None).await?;
    for node in cluster.nodes() {
        settled_on(&cluster, node.number, CONTEXT, 2).await?;
    }
    Ok((cluster, sealed))
}

/// A destruction after so many seconds. What a test has just encrypted is recent.
pub(crate) fn after(seconds: u64) -> DestroyKeyRequest {
    DestroyKeyRequest {
        wait_seconds: Some(seconds),
        override_recent_use: true,
    }
}

pub(crate) fn code<T>(outcome: Result<T, ClientError>) -> Option<ErrorCode> {
    outcome.err().and_then(|error| error.code())
}

/// A client that waits for a leader.
fn patient(cluster: &Playground, number: u32) -> Result<Client> {
    let client = cluster.client_on("admin", number)?;
    Ok(client.with_retry(Retry::Until(Duration::from_secs(40))))
}

pub(crate) async fn version_on(cluster: &Playground, number: u32, version: u32) -> Result<KeyVersionInfo> {
    let info = context_on(cluster, number, CONTEXT).await?;
    let mut versions = info.versions.into_iter();
    versions
        .find(|held| held.version == version)
        .with_context(|| format!("node {number} does not know version {version}"))
}

/// Until this node says so of the version.
pub(crate) async fn becomes(
    cluster: &Playground,
    number: u32,
    version: u32,
    state: KeyState,
    within: Duration,
) -> Result<KeyVersionInfo> {
    let what = format!("version {version} {state} on node {number}");
    until(&what, within, async || {
        let held = version_on(cluster, number, version).await.ok()?;
        (held.state == state).then_some(held)
    })
    .await
}

/// Until no node opens it, each with this code.
pub(crate) async fn refused_everywhere(
    cluster: &Playground,
    sealed: &Sealed,
    wanted: ErrorCode,
) -> Result<()> {
    for node in cluster.nodes() {
        let client = cluster.client_on("trading-1", node.number)?;
        let what = format!("{wanted} on {}", node.id());
        until(&what, SEEN, async || {
            let request = hsm_api::data::DecryptRequest::new(CONTEXT, sealed.ciphertext.clone());
            (code(client.decrypt(&request).await) == Some(wanted)).then_some(())
        })
        .await?;
    }
    Ok(())
}

pub(crate) async fn opened_everywhere(cluster: &Playground, sealed: &Sealed) -> Result<()> {
    for node in cluster.nodes() {
        let client = cluster.client_on("trading-1", node.number)?;
        let what = format!("version {} opened on {}", sealed.version, node.id());
        until(&what, SEEN, async || open(&client, CONTEXT, sealed).await.ok()).await?;
    }
    Ok(())
}

/// Until every node but this one, which is away, has destroyed the first version, as the leader says.
pub(crate) async fn owed_only_by(cluster: &Playground, away: &Node, leader: u32) -> Result<()> {
    let owed = format!("a destruction that only {} owes", away.id());
    until(&owed, GONE, async || {
        let held = version_on(cluster, leader, 1).await.ok()?;
        let owing = held.destruction?.owing;
        (held.state == KeyState::Destroying && owing == [away.id()]).then_some(())
    })
    .await
}

/// The KEKs in the token of a node that does not run.
pub(crate) fn keks(cluster: &Playground, node: &Node) -> Result<Vec<String>> {
    Token::of(cluster, node, "exchange").keks()
}
pub(crate) async fn a_disabled_version_decrypts_nowhere_until_it_is_enabled() -> Result<()> {
    let (cluster, sealed) = retired().await?;
    let admin = |number| cluster.client_on("admin", number);
    let active = code(admin(1)?.disable_key(CONTEXT, 2, None).await);
    assert_eq!(active, Some(ErrorCode::Conflict), "the active version");
    let done = admin(2)?
        .disable_key(CONTEXT, 1, Some("disable"))
        .await?
        .into_body();
    assert_eq!(
        (done.context.as_str(), done.info.state),
        (CONTEXT, KeyState::Disabled)
    );
    refused_everywhere(&cluster, &sealed, ErrorCode::KeyVersionDisabled).await?;
    // It is nobody's reason to be out of service, and the others go on.
    for node in cluster.nodes() {
        ensure!(node.is_ready().await, "{}: {}", node.id(), node.checks().await);
        seal(
            &cluster.client_on("trading-1", node.number)?,
            CONTEXT,
            b"meanwhile",
        )
        .await?;
    }
    // The key is at hand in every token: to use it again takes nobody out of service.
    let (nodes, stop) = (cluster.nodes(), Arc::new(AtomicBool::new(false)));
    let watched = {
        let stop = Arc::clone(&stop);
        tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                for node in &nodes {
                    ensure!(node.is_ready().await, "{}: {}", node.id(), node.checks().await);
                }
            }
            Ok(())
        })
    };
    admin(3)?.enable_key(CONTEXT, 1, Some("enable")).await?;
    opened_everywhere(&cluster, &sealed).await?;
    stop.store(true, Ordering::Relaxed);
    watched.await??;
    // A late repeat is answered, and disables nothing.
    let repeated = admin(1)?.disable_key(CONTEXT, 1, Some("disable")).await?;
    assert_eq!(repeated.info.state, KeyState::DecryptOnly);
    opened_everywhere(&cluster, &sealed).await?;
    let auditor = code(cluster.client("auditor")?.disable_key(CONTEXT, 1, None).await);
    assert_eq!(auditor, Some(ErrorCode::RoleRequired));
    cluster.passed();
    Ok(())
}

pub(crate) async fn a_destroyed_version_is_gone_from_every_token_and_its_number_with_it() -> Result<()> {
    let (cluster, sealed) = retired().await?;
    let admin = |number| cluster.client_on("admin", number);
    let scheduled = admin(1)?
        .destroy_key(CONTEXT, 1, &after(2), Some("destroy"))
        .await?;
    assert_eq!(scheduled.info.state, KeyState::DestroyScheduled);
    for node in cluster.nodes() {
        let destroyed = becomes(&cluster, node.number, 1, KeyState::Destroyed, GONE).await?;
        let end = destroyed.destruction.context("no tombstone")?;
        ensure!(end.ended_at.is_some() && end.owing.is_empty(), "{end:?}");
        ensure!(destroyed.acks.len() == 3, "{:?}", destroyed.acks);
        ensure!(node.is_ready().await, "{}: {}", node.id(), node.checks().await);
    }
    refused_everywhere(&cluster, &sealed, ErrorCode::KeyVersionDestroyed).await?;
    // The same request has the same answer and does nothing; another one comes too late.
    let again = admin(3)?
        .destroy_key(CONTEXT, 1, &after(2), Some("destroy"))
        .await?;
    assert_eq!(again.info.state, KeyState::Destroyed);
    for outcome in [
        admin(2)?
            .destroy_key(CONTEXT, 1, &after(2), Some("another"))
            .await,
        admin(2)?.undo_destroy_key(CONTEXT, 1, None).await,
        admin(2)?.enable_key(CONTEXT, 1, None).await,
    ] {
        assert_eq!(code(outcome), Some(ErrorCode::Conflict));
    }
    for node in cluster.nodes() {
        node.kill().await?;
        assert_eq!(keks(&cluster, &node)?, ["kek-exchange-key-v2"], "{}", node.id());
    }
    cluster.up().await?;
    refused_everywhere(&cluster, &sealed, ErrorCode::KeyVersionDestroyed).await?;
    let next = patient(&cluster, 1)?.rotate(CONTEXT, None).await?;
    assert_eq!((next.version, next.previous_version), (3, 2));
    cluster.passed();
    Ok(())
}

pub(crate) async fn a_destruction_that_waits_can_be_undone_and_stays_undone() -> Result<()> {
    let (cluster, sealed) = retired().await?;
    let admin = |number| cluster.client_on("admin", number);
    let short = DestroyKeyRequest {
        wait_seconds: Some(0),
        override_recent_use: true,
    };
    let short = code(admin(1)?.destroy_key(CONTEXT, 1, &short, None).await);
    assert_eq!(short, Some(ErrorCode::InvalidArgument), "no wait at all");
    admin(1)?
        .destroy_key(CONTEXT, 1, &after(3600), Some("destroy"))
        .await?;
    refused_everywhere(&cluster, &sealed, ErrorCode::KeyVersionDisabled).await?;
    let undone = admin(2)?.undo_destroy_key(CONTEXT, 1, Some("undo")).await?;
    assert_eq!(undone.info.state, KeyState::DecryptOnly);
    opened_everywhere(&cluster, &sealed).await?;
    // A repeat of the first request, as from a client that never heard its answer.
    let repeated = admin(3)?
        .destroy_key(CONTEXT, 1, &after(3600), Some("destroy"))
        .await?;
    assert_eq!(repeated.info.state, KeyState::DecryptOnly);
    opened_everywhere(&cluster, &sealed).await?;
    cluster.passed();
    Ok(())
}

pub(crate) async fn a_node_that_was_away_destroys_its_copy_before_it_is_ready() -> Result<()> {
    let (cluster, sealed) = retired().await?;
    let leader = cluster.leader().await?;
    let away = cluster.others(leader.node)[0].clone();
    away.kill().await?;
    let admin = cluster.client_on("admin", leader.node)?;
    admin.destroy_key(CONTEXT, 1, &after(1), None).await?;
    owed_only_by(&cluster, &away, leader.node).await?;
    ensure!(keks(&cluster, &away)?.iter().any(|label| label == FIRST));
    for node in cluster.others(away.number) {
        ensure!(node.is_ready().await, "{}: {}", node.id(), node.checks().await);
    }
    // From the moment it says that it is ready, its token is clean. It dies there and then.
    cluster.start_node(away.number).await?;
    away.wait_ready(READY).await?;
    away.kill().await?;
    assert_eq!(keks(&cluster, &away)?, ["kek-exchange-key-v2"]);
    cluster.start_node(away.number).await?;
    away.wait_ready(READY).await?;
    for node in cluster.nodes() {
        becomes(&cluster, node.number, 1, KeyState::Destroyed, GONE).await?;
    }
    refused_everywhere(&cluster, &sealed, ErrorCode::KeyVersionDestroyed).await?;
    cluster.passed();
    Ok(())
}

pub(crate) async fn a_version_in_recent_use_is_destroyed_by_an_override_only() -> Result<()> {
    let (cluster, sealed) = retired().await?;
    // By two nodes, so that their counts have to be added up.
    for number in [1, 2] {
        open(&cluster.client_on("trading-1", number)?, CONTEXT, &sealed).await?;
    }
    for node in cluster.nodes() {
        let client = cluster.client_on("admin", node.number)?;
        let what = format!("the uses of version 1 on {}", node.id());
        until(&what, GONE, async || {
            let usage = client.key_usage().await.ok()?.into_body();
            let mut versions = usage.versions.into_iter();
            let first = versions.find(|used| used.context == CONTEXT && used.version == 1)?;
            (first.encryptions >= 1 && first.decryptions == 2 && first.nodes.len() >= 2).then_some(())
        })
        .await?;
    }
    let mindful = DestroyKeyRequest {
        wait_seconds: Some(1),
        override_recent_use: false,
    };
    for key in ["mindful", "mindful", "again"] {
        let refused = patient(&cluster, 1)?
            .destroy_key(CONTEXT, 1, &mindful, Some(key))
            .await;
        assert_eq!(code(refused), Some(ErrorCode::Conflict), "{key}");
    }
    open_everywhere(&cluster, "trading-1", CONTEXT, std::slice::from_ref(&sealed)).await?;
    let admin = cluster.client("admin")?;
    admin.destroy_key(CONTEXT, 1, &after(1), Some("override")).await?;
    becomes(&cluster, 1, 1, KeyState::Destroyed, GONE).await?;
    cluster.passed();
    Ok(())
}

pub(crate) async fn a_wait_goes_on_under_the_next_leader() -> Result<()> {
    let (cluster, sealed) = retired().await?;
    let leader = cluster.leader().await?;
    let admin = cluster.client_on("admin", leader.node)?;
    let begun = Instant::now();
    admin.destroy_key(CONTEXT, 1, &after(8), None).await?;
    let dead = cluster.node(leader.node);
    dead.kill().await?;
    let others = cluster.others(leader.node);
    let begins = becomes(&cluster, others[0].number, 1, KeyState::Destroying, GONE).await?;
    // Less than that no leader can have seen pass.
    ensure!(begun.elapsed() >= Duration::from_secs(7), "{:?}", begun.elapsed());
    let owing = begins.destruction.context("no destruction")?.owing;
    ensure!(owing.contains(&dead.id()), "{owing:?}");
    cluster.start_node(dead.number).await?;
    dead.wait_ready(READY).await?;
    for node in cluster.nodes() {
        becomes(&cluster, node.number, 1, KeyState::Destroyed, GONE).await?;
    }
    refused_everywhere(&cluster, &sealed, ErrorCode::KeyVersionDestroyed).await?;
    cluster.passed();
    Ok(())
}

/// A node that dies between the commit and its token's deed does it when it is back.
#[cfg(feature = "failpoints")]
pub(crate) async fn a_node_that_dies_before_it_removes_a_key_removes_it_when_it_returns() -> Result<()> {
    let (cluster, _) = retired().await?;
    let leader = cluster.leader().await?;
    for node in [cluster.node(leader.node), cluster.others(leader.node)[0].clone()] {
        cluster_tests::failpoints::kill_at(&node, "sync::before_remove").await?;
    }
    let admin = cluster.client_on("admin", leader.node)?;
    admin.destroy_key(CONTEXT, 1, &after(1), None).await?;
    for node in [cluster.node(leader.node), cluster.others(leader.node)[0].clone()] {
        node.wait_gone(GONE).await?;
        ensure!(keks(&cluster, &node)?.iter().any(|label| label == FIRST));
    }
    cluster.up().await?;
    for node in cluster.nodes() {
        becomes(&cluster, node.number, 1, KeyState::Destroyed, GONE).await?;
        node.kill().await?;
        assert_eq!(keks(&cluster, &node)?, ["kek-exchange-key-v2"], "{}", node.id());
        cluster.start_node(node.number).await?;
        node.wait_ready(READY).await?;
    }
    cluster.passed();
    Ok(())
}
