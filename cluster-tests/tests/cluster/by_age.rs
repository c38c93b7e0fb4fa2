//! Versions that come by age: one after the other, each once, whoever leads and wherever a leader dies.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::failpoints::{PREPARED, kill_at};
use cluster_tests::{Playground, until};
use hsm_api::admin::{ContextInfo, KeyState, ListKeksResponse};
use jiff::{SignedDuration, Timestamp};

use crate::common::{CONTEXT, formed_with, in_state, made, open, seal};
use crate::key_life::READY;

/// Forty days of a tenth of a second.
const AGE: SignedDuration = SignedDuration::from_secs(4);
/// Until a few more versions have come, whoever has to be elected meanwhile.
const COME: Duration = Duration::from_secs(90);

/// Until each context has this version, or a later one, active on a node.
async fn each_has(cluster: &Playground, number: u32, version: u32) -> Result<Vec<ContextInfo>> {
    let admin = cluster.client_on("admin", number)?;
    let what = format!("version {version} of each context on node {number}");
    until(&what, COME, async || {
        let ListKeksResponse { contexts } = admin.list_keks().await.ok()?.into_body();
        let mut all = contexts.iter();
        let there = !contexts.is_empty() && all.all(|info| info.active_version >= Some(version));
        there.then_some(contexts)
    })
    .await
}

/// Every number from 1 is there, none was given up, and each version was active for its age before the next one was.
fn one_after_the_other(info: &ContextInfo) -> Result<()> {
    let numbers: Vec<u32> = info.versions.iter().map(|held| held.version).collect();
    let from_one: Vec<u32> = (1..).take(numbers.len()).collect();
    ensure!(numbers == from_one, "{}: versions {numbers:?}", info.context);
    ensure!(made(info) == numbers.len(), "one was given up: {info:?}");
    // Only the last one may be pending.
    let since: Vec<Timestamp> = info
        .versions
        .iter()
        .filter_map(|held| held.activated_at.as_ref())
        .map(|at| at.parse::<Timestamp>())
        .collect::<Result<_, _>>()?;
    let pending = in_state(info, KeyState::Pending).len();
    ensure!(since.len() + pending == numbers.len(), "{info:?}");
    for (number, pair) in numbers.iter().zip(since.windows(2)) {
        let lived = pair[1].duration_since(pair[0]);
        ensure!(
            lived >= AGE,
            "{}: version {number} was replaced after {lived}",
            info.context
        );
    }
    Ok(())
}

/// By age one version comes after the other. A leader that dies inside of one is followed by another one that ends it,
/// and begins none in its place.
pub(crate) async fn versions_are_rotated_by_age_and_never_twice() -> Result<()> {
    let cluster = formed_with(Playground::builder(), |config| {
        let section = "rotation: {interval_days: 40, day_ms: 100, check_interval_seconds: 1}\nlogging:";
        config.replacen("logging:", section, 1)
    })
    .await?;
    let sealed = seal(&cluster.client("trading-1")?, CONTEXT, b"by whichever").await?;
    let leader = cluster.leader().await?;
    each_has(&cluster, leader.node, sealed.version + 1).await?;

    let leader = cluster.leader().await?;
    let dying = cluster.node(leader.node);
    kill_at(&dying, PREPARED).await?;
    dying.wait_gone(COME).await.context("it rotates nothing by age")?;
    let next = cluster.leader_among(&cluster.others(leader.node)).await?;
    ensure!(next.term > leader.term, "{next:?} after {leader:?}");
    let admin = cluster.client_on("admin", next.node)?;
    // The dead one votes, so that nobody ends it until it is back, or has been silent for long.
    let begun = until("the version that it has left behind", READY, async || {
        let contexts = admin.list_keks().await.ok()?.into_body().contexts;
        let pending = |info: &ContextInfo| !in_state(info, KeyState::Pending).is_empty();
        contexts.into_iter().find(pending)
    })
    .await?;
    one_after_the_other(&begun)?;
    let left = in_state(&begun, KeyState::Pending);
    ensure!(
        begun.active_version.map(|active| vec![active + 1]) == Some(left.clone()),
        "{left:?} are pending: {begun:?}"
    );
    cluster.start_node(dying.number).await?;
    dying.wait_ready(READY).await?;

    for info in each_has(&cluster, dying.number, left[0] + 2).await? {
        one_after_the_other(&info)?;
    }
    let client = cluster.client_on("trading-1", dying.number)?;
    open(&client, CONTEXT, &sealed).await?;
    cluster.passed();
    Ok(())
}
