//! Invocations of AES-GCM: a key is replaced before its limit, once whoever leads; what a node was given it may use for
//! as long as it may be stale, and not one more; what a killed node had is gone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cluster_tests::failpoints::{PREPARED, kill_at};
use cluster_tests::load::Report;
use cluster_tests::{Load, Playground, until};
use hsm_api::admin::{KeyState, KeyUsage};
use hsm_api::{Client, ClientError, ErrorCode};
use tokio::time::MissedTickBehavior;

use crate::common::{CONTEXT, formed_with, in_state, made, open, seal, settled_everywhere};

/// `max_invocations` of the context: a high load uses it up within half a minute, and half of a largest lease, a 32nd of
/// it, lasts a node for about a second. That is long enough for a claim, so that nobody notices how small the limit is.
const SMALL: u64 = 10_000;
/// What is given out of it at most.
const CEILING: u64 = SMALL * 9 / 10;
const NODES: u64 = 3;
/// The largest lease that one of so few nodes is given.
const LARGEST: u64 = SMALL / 16;
/// What is given out of a version at least, once it is rotated by use: some node has asked for more than an equal part of
/// what was left, and was given that part. It asked for no more than a largest lease.
const DUE: u64 = CEILING - (NODES - 1) * LARGEST;
/// Until a version is used up, and replaced.
const USED_UP: Duration = Duration::from_secs(180);
/// Until the nodes have told what they counted.
const TOLD: Duration = Duration::from_secs(60);

/// A cluster whose context has a limit, and more in its configuration.
async fn limited(limit: u64, more: &str) -> Result<Playground> {
    formed_with(Playground::builder().relayed(), |config| {
        let (before, after) = (
            "\"exchange-key\": {type: aes, mode: shared}",
            format!("\"exchange-key\": {{type: aes, mode: shared, max_invocations: {limit}}}"),
        );
        format!("{}{more}", config.replacen(before, &after, 1))
    })
    .await
}

async fn usage_of(client: &Client, version: u32) -> Result<KeyUsage> {
    let usage = client.key_usage().await?.into_body();
    let mut versions = usage.versions.into_iter();
    versions
        .find(|usage| usage.context == CONTEXT && usage.version == version)
        .with_context(|| format!("version {version} is not listed"))
}

async fn leased(client: &Client, version: u32) -> Result<u64> {
    let invocations = usage_of(client, version).await?.invocations;
    let invocations = invocations.context("nothing is said of its invocations")?;
    ensure!(invocations.limit == SMALL, "the limit is {}", invocations.limit);
    Ok(invocations.leased)
}

async fn active_becomes(cluster: &Playground, version: u32) -> Result<()> {
    let what = format!("version {version} by use");
    until(&what, USED_UP, async || {
        for node in cluster.nodes() {
            let client = cluster.client_on("admin", node.number).ok()?;
            let Ok(keks) = client.list_keks().await else {
                continue;
            };
            let known = keks.into_body().contexts;
            let context = known.into_iter().find(|context| context.context == CONTEXT);
            if context.and_then(|context| context.active_version) >= Some(version) {
                return Some(());
            }
        }
        None
    })
    .await
}

/// Whoever led has said of the first version that half of it was given out, and that four fifths were.
async fn warned(cluster: &Playground) -> Result<()> {
    for (percent, least) in [(50_u64, SMALL / 2), (80, SMALL / 5 * 4)] {
        let what = format!("the warning at {percent} %");
        // The log is written a moment later.
        let line = until(&what, TOLD, async || {
            let logs: Vec<String> = cluster.nodes().iter().map(cluster_tests::Node::log).collect();
            logs.iter()
                .flat_map(|log| log.lines())
                .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
                .find(|line| {
                    let about = line["context"] == CONTEXT && line["version"] == 1;
                    about && line["reached_percent"] == percent
                })
        })
        .await?;
        ensure!(
            line["level"] == "WARN" && line["limit"] == SMALL && line["leased"].as_u64() >= Some(least),
            "{line}"
        );
        let text = line["message"].as_str().unwrap_or_default();
        ensure!(text.contains("given out"), "{line}");
    }
    Ok(())
}

/// Whatever failed failed so.
fn only_for_want_of_invocations(report: &Report) -> Result<()> {
    let mut failures = report.failures.iter();
    let other = failures.find(|why| !why.contains("invocations_exhausted"));
    ensure!(other.is_none(), "{report:?}");
    Ok(())
}

/// Encrypts until it is refused; says how often it was done, and how it ended.
async fn until_refused(client: &Client) -> Result<(u64, ClientError)> {
    let request = hsm_api::data::EncryptRequest::new(CONTEXT, b"alone".as_slice());
    for done in 0..SMALL {
        if let Err(error) = client.encrypt(&request).await {
            return Ok((done, error));
        }
    }
    bail!("a node that is alone encrypted {SMALL} times")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[cfg_attr(not(feature = "failpoints"), ignore = "kills a leader at a failpoint")]
async fn a_small_limit_is_rotated_by_use_and_nobody_encrypts_beyond_what_he_was_given() -> Result<()> {
    let cluster = limited(SMALL, "").await?;
    let admin = cluster.client("admin")?;
    let first = seal(&cluster.client("trading-1")?, CONTEXT, b"under the first").await?;
    ensure!(first.version == 1, "version {}", first.version);

    // Through all nodes until it is used up: nobody notices.
    let load = Load::start_high(&cluster)?;
    active_becomes(&cluster, 2).await?;
    let report = load.stop().await;
    // A lease of a second or two is over before the next one if a disk stands still: that is documented, and rare.
    only_for_want_of_invocations(&report)?;
    ensure!(report.failed * 20 <= report.encrypted, "{report:?}");
    let info = settled_everywhere(&cluster, CONTEXT).await?;
    ensure!(
        info.active_version == Some(2) && info.versions.len() == 2,
        "{info:?}"
    );
    let given = leased(&admin, 1).await?;
    ensure!(
        (DUE..=CEILING).contains(&given),
        "{given} were given out, not {DUE} to {CEILING}"
    );
    warned(&cluster).await?;
    let told = until("the uses of both versions", TOLD, async || {
        let (old, new) = (usage_of(&admin, 1).await.ok()?, usage_of(&admin, 2).await.ok()?);
        (old.encryptions + new.encryptions > report.encrypted).then_some(old.encryptions)
    })
    .await?;
    ensure!(told < given, "{told} encryptions, {given} invocations");
    // But for the check record, what nobody has used is what nodes still had, none of them more than a largest lease.
    ensure!(
        told + 1 + NODES * LARGEST >= given,
        "{told} encryptions, {given} invocations"
    );

    // A killed node comes back with nothing, and what it had counts as used.
    let before = leased(&admin, 2).await?;
    let killed = cluster.others(cluster.leader().await?.node)[0].clone();
    killed.kill().await?;
    cluster.start_node(killed.number).await?;
    killed.wait_ready(TOLD).await?;
    seal(&cluster.client_on("trading-1", killed.number)?, CONTEXT, b"back")
        .await
        .context("the moment it is ready")?;
    let after = leased(&admin, 2).await?;
    ensure!(
        after >= before + SMALL / 64,
        "{before} given out before the kill, {after} after it"
    );

    // The leader dies inside the next rotation by use: another one ends it, and begins none in its place.
    let leader = cluster.node(cluster.leader().await?.node);
    let load = Load::start_high(&cluster)?;
    load.pause(leader.number).await;
    kill_at(&leader, PREPARED).await?;
    leader
        .wait_gone(USED_UP)
        .await
        .context("it rotates nothing by use")?;
    cluster.start_node(leader.number).await?;
    leader.wait_ready(TOLD).await?;
    load.resume(leader.number).await;
    active_becomes(&cluster, 3).await?;
    let report = load.stop().await;
    // While nobody leads nobody is given any more, and a small limit has leases of a second or two.
    only_for_want_of_invocations(&report)?;
    let info = settled_everywhere(&cluster, CONTEXT).await?;
    ensure!(made(&info) == 3 && info.active_version == Some(3), "{info:?}");
    ensure!(in_state(&info, KeyState::DecryptOnly) == [1, 2], "{info:?}");
    let given = leased(&admin, 2).await?;
    ensure!(
        (DUE..=CEILING).contains(&given),
        "{given} were given out, not {DUE} to {CEILING}"
    );

    // Cut off, a node uses up what it has, and decrypts on.
    let alone = cluster.others(cluster.leader().await?.node)[0].clone();
    let client = cluster.client_on("trading-1", alone.number)?;
    let sealed = seal(&client, CONTEXT, b"before").await?;
    cluster.relays()?.isolate(alone.number);
    let (done, refused) = until_refused(&client).await?;
    ensure!(
        refused.code() == Some(ErrorCode::InvocationsExhausted),
        "after {done}: {refused}"
    );
    ensure!(refused.status() == Some(503), "{refused}");
    ensure!(done <= SMALL / 8, "it encrypted {done} times alone");
    for sealed in [&first, &sealed] {
        open(&client, CONTEXT, sealed).await.context("alone")?;
    }
    cluster.relays()?.heal();
    until("it encrypts again", TOLD, async || {
        seal(&client, CONTEXT, b"healed").await.ok()
    })
    .await?;
    cluster.passed();
    Ok(())
}

/// `staleness.encrypt_ms` of the cluster that is cut under load.
const BOUND: Duration = Duration::from_secs(8);
/// Around it: frames that were on their way, and what a busy machine takes.
const AROUND: Duration = Duration::from_secs(1);
/// So that at [`RATE`] the smallest lease, a 64th, does not last for the bound, and half of the largest one does.
const SOME: u64 = 240_000;
/// Callers of one node at a time.
const CALLERS: u32 = 8;
/// What they encrypt together, a second, if they are answered in time: a third of what two cores can do.
const RATE: u32 = 700;

/// Encrypts at its part of the rate until something else than an answer comes; says when, and what.
async fn at_its_rate(client: Client, cut: Arc<AtomicBool>) -> Result<(u64, Instant, ClientError)> {
    let request = hsm_api::data::EncryptRequest::new(CONTEXT, b"under load".as_slice());
    let mut beat = tokio::time::interval(Duration::from_secs(1) * CALLERS / RATE);
    // What could not be done in time is not made up for: nowhere is it faster than that.
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut after_the_cut = 0;
    loop {
        beat.tick().await;
        if let Err(error) = client.encrypt(&request).await {
            return Ok((after_the_cut, Instant::now(), error));
        }
        after_the_cut += u64::from(cut.load(Ordering::Relaxed));
    }
}

/// A context with the default limit, 2^32, in a slot of its own.
const OTHER: &str = "2fa";
/// Callers of each node that do not wait between requests: more than two cores can answer.
const UNPACED: usize = 2;
/// What a node does alone at least until its bound; far less than its part of two cores.
const FEWEST: u64 = 200;

/// Encrypts as fast as it is answered until something else than an answer comes; says when, and what.
async fn at_full_load(client: Client, done: Arc<AtomicU64>) -> (Instant, ClientError) {
    let request = hsm_api::data::EncryptRequest::new(OTHER, b"under load".as_slice());
    loop {
        if let Err(error) = client.encrypt(&request).await {
            return (Instant::now(), error);
        }
        done.fetch_add(1, Ordering::Relaxed);
    }
}

/// Every node is asked for all that it can do, and then nobody hears anybody: each encrypts until its bound, and none
/// runs out of invocations before.
async fn all_encrypt_until_their_bound(cluster: &Playground) -> Result<()> {
    let mut callers = Vec::new();
    for node in cluster.nodes() {
        let done = Arc::new(AtomicU64::new(0));
        for _ in 0..UNPACED {
            let client = cluster.client_on("2fa-1", node.number)?;
            let running = tokio::spawn(at_full_load(client, Arc::clone(&done)));
            callers.push((node.id(), Arc::clone(&done), running));
        }
    }
    let busy = TOLD;
    until("load on every node", busy, async || {
        let mut all = callers.iter();
        all.all(|(_, done, _)| done.load(Ordering::Relaxed) > FEWEST)
            .then_some(())
    })
    .await?;
    for node in cluster.nodes() {
        cluster.relays()?.isolate(node.number);
    }
    let mut heard = BTreeMap::new();
    for node in cluster.nodes() {
        heard.insert(node.id(), cluster.last_heard(node.number).await?);
    }
    let before: Vec<u64> = callers
        .iter()
        .map(|(_, done, _)| done.load(Ordering::Relaxed))
        .collect();
    for ((id, done, running), before) in callers.into_iter().zip(before) {
        let (at, error) = running.await?;
        let lasted = at.saturating_duration_since(heard[&id]);
        ensure!(
            error.code() == Some(ErrorCode::Stale),
            "{id}, after {lasted:?}: {error}"
        );
        ensure!(
            lasted > BOUND - AROUND && lasted < BOUND + AROUND * 3,
            "{id} encrypted for {lasted:?}"
        );
        let after = done.load(Ordering::Relaxed) - before;
        println!("{id}: {after} encryptions in {lasted:?} without a quorum");
        ensure!(
            after > FEWEST,
            "{id}: {after} encryptions without a quorum are no load"
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_a_node_under_load_encrypts_until_its_bound() -> Result<()> {
    let staleness = format!("staleness: {{encrypt_ms: {}}}\n", BOUND.as_millis());
    let cluster = limited(SOME, &staleness).await?;
    let node = cluster.others(cluster.leader().await?.node)[0].clone();
    let (cut, admin) = (
        Arc::new(AtomicBool::new(false)),
        cluster.client_on("admin", node.number)?,
    );
    let mut callers = Vec::new();
    for _ in 0..CALLERS {
        let client = cluster.client_on("trading-1", node.number)?;
        callers.push(tokio::spawn(at_its_rate(client, Arc::clone(&cut))));
    }
    // Until it has claimed what its rate asks for: each node has had a first lease, the smallest there is.
    // It is asked itself, which answers by what it has applied: a lease that only the others know of is lost with them.
    let first = 1 + 3 * (SOME / 64);
    until("a lease by the rate", Duration::from_secs(60), async || {
        let usage = usage_of(&admin, 1).await.ok()?;
        (usage.invocations?.leased > first + SOME / 32).then_some(())
    })
    .await?;
    // Nobody hears anybody.
    for other in cluster.nodes() {
        cluster.relays()?.isolate(other.number);
    }
    cut.store(true, Ordering::Relaxed);
    let heard = cluster.last_heard(node.number).await?;
    let mut encrypted = 0;
    for caller in callers {
        let (done, at, error) = caller.await??;
        encrypted += done;
        let lasted = at.saturating_duration_since(heard);
        ensure!(
            error.code() == Some(ErrorCode::Stale),
            "after {lasted:?} and {encrypted} encryptions: {error}"
        );
        ensure!(
            lasted > BOUND - AROUND && lasted < BOUND + AROUND * 3,
            "it encrypted for {lasted:?}"
        );
    }
    ensure!(
        encrypted > SOME / 64,
        "{encrypted} encryptions in the {BOUND:?} after the cut prove nothing: the smallest lease is {}",
        SOME / 64
    );
    cluster.relays()?.heal();
    cluster.wait_ready(&cluster.nodes()).await?;

    // The default limit, all nodes, and as much load as there can be.
    for node in cluster.nodes() {
        until("it encrypts again", TOLD, async || {
            let client = cluster.client_on("2fa-1", node.number).ok()?;
            seal(&client, OTHER, b"healed").await.ok()
        })
        .await?;
    }
    all_encrypt_until_their_bound(&cluster).await?;
    cluster.relays()?.heal();
    cluster.wait_ready(&cluster.nodes()).await?;
    cluster.passed();
    Ok(())
}
