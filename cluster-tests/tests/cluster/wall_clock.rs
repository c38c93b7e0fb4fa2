//! The leader's wall clock jumps by more than a year while it runs, with libfaketime; its monotonic clock does not. What
//! a wrong clock says rotates nothing, cleans nothing up and destroys nothing, and what is done meanwhile has a time that
//! can be believed. In the end every clock says the same, so that it is seen that a clock could do it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use cluster_tests::{Node, Playground, Program, until, wall_clock};
use hsm_api::ErrorCode;
use hsm_api::admin::{CleanupRequest, CreateKekRequest, JoinTokenRequest, KeyState, KeyVersionInfo};
use jiff::{SignedDuration, Timestamp};

use crate::common::{CONTEXT, Sealed, context_on, formed_with, open, seal, settled_on};
use crate::key_life::{GONE, after, becomes, code, version_on};

/// A context that nobody uses: its old version is what a clean-up would find.
const UNUSED: &str = "order-key";
/// `hsm.cleanup_after_days`, which is not the default.
const UNUSED_FOR: u32 = 45;
/// Until the nodes have told what they counted.
const TOLD: Duration = Duration::from_secs(60);
/// From a step until the leader has looked at what is due.
const NOTICED: Duration = Duration::from_secs(60);
/// Two rotations by age, one after the other.
const ROTATED: Duration = Duration::from_secs(120);
/// A destruction that is over soon, by any clock that runs.
const BRIEF: Duration = Duration::from_secs(5);
/// One that is over after a jump only.
const LONG: Duration = Duration::from_secs(3600);

/// hsm-node with a wall clock of its own.
fn program() -> Result<Program> {
    let program = Program::new()?;
    program.write(&wall_clock::before_node()?)?;
    Ok(program)
}

/// Until the node has looked at what is due by age with the clock that it has now, and has found it in doubt or not.
async fn alarm(node: &Node, wanted: bool) -> Result<()> {
    let what = format!("hsm_rotation_clock_alarm {wanted} on {}", node.id());
    until(&what, NOTICED, async || {
        let alarm = node.metrics().await.ok()?.sum("hsm_rotation_clock_alarm")?;
        (alarm == f64::from(u8::from(wanted))).then_some(())
    })
    .await
}

/// Whether a time that the cluster has stored is about now, by the clock of this process.
fn is_now(stored: Option<&String>) -> Result<()> {
    let stored: Timestamp = stored.context("no time")?.parse()?;
    let off = Timestamp::now().duration_since(stored).abs();
    ensure!(off < SignedDuration::from_mins(10), "{stored} is {off} away");
    Ok(())
}

/// Every node decrypts what there is, and encrypts.
async fn works(cluster: &Playground, sealed: &Sealed) -> Result<()> {
    for node in cluster.nodes() {
        // A look at a token that comes late, because the machine stood still, takes readiness for a moment.
        node.wait_ready(BRIEF).await?;
        let client = cluster.client_on("trading-1", node.number)?;
        open(&client, CONTEXT, sealed).await.with_context(|| node.id())?;
        seal(&client, CONTEXT, b"meanwhile")
            .await
            .with_context(|| node.id())?;
    }
    Ok(())
}

/// A clean-up, and one that only looks, are refused by a leader that doubts its clock; by API and command line.
async fn cleans_nothing_up(cluster: &Playground, leader: &Node) -> Result<()> {
    let admin = cluster.client_on("admin", leader.number)?;
    for dry_run in [true, false] {
        let request = CleanupRequest {
            context: None,
            dry_run,
        };
        let refused = code(admin.clean_up_keys(&request, None).await);
        ensure!(
            refused == Some(ErrorCode::NotReady),
            "dry run {dry_run}: {refused:?}"
        );
        let endpoint = leader.endpoint();
        let mut args = vec!["cleanup-old-versions", "--endpoint", &endpoint, "--timeout", "2"];
        if dry_run {
            args.push("--dry-run");
        }
        // One that has no answer in its two seconds cannot say why.
        let what = format!("a word of the clock, dry run {dry_run}");
        until(&what, NOTICED, async || match cluster.hsmctl(&args).await {
            Ok(said) if said.code == Some(0) => Some(Err(anyhow!("it is done: {said:?}"))),
            Ok(said) => said.stderr.contains("clock").then_some(Ok(())),
            Err(error) => Some(Err(error)),
        })
        .await??;
    }
    Ok(())
}

/// The long destruction: waiting, and no further than this process has seen time pass.
fn waits(held: &KeyVersionInfo, since: Instant) -> Result<()> {
    let way = held.destruction.as_ref().context("no destruction")?;
    let most = since.elapsed().as_secs() + 1;
    ensure!(
        held.state == KeyState::DestroyScheduled && way.elapsed_seconds <= most,
        "after {most} s: {held:?}"
    );
    Ok(())
}

pub(crate) async fn a_leader_whose_wall_clock_jumps_rotates_cleans_up_and_destroys_nothing() -> Result<()> {
    let _shared_memory = wall_clock::SharedMemory;
    let program = program()?;
    let builder = Playground::builder().env("HSM_NODE_BIN", program.path());
    let kept = format!("hsm:\n  max_versions: 1\n  cleanup_after_days: {UNUSED_FOR}\n");
    let cluster = formed_with(builder, |config| {
        let sections =
            "rotation: {check_interval_seconds: 1}\nkeys: {destroy: {min_wait_seconds: 1}}\nlogging:";
        config
            .replacen("hsm:\n", &kept, 1)
            .replacen("logging:", sections, 1)
    })
    .await?;
    let sealed = seal(&cluster.client("trading-1")?, CONTEXT, b"under the first").await?;
    let admin = cluster.client("admin")?;
    admin.create_kek(&CreateKekRequest::new(UNUSED), None).await?;
    admin.rotate(UNUSED, None).await?;
    // The first stays, the second waits for long, the next two are destroyed during the jumps.
    let mut active = sealed.version;
    for _ in 0..4 {
        active = admin.rotate(CONTEXT, None).await?.version;
    }
    let long = Destruction::begin(&cluster, 2, LONG).await?;

    for (offset, brief) in [("+400d", 3), ("-400d", 4)] {
        let before = cluster.leader().await?;
        let leader = cluster.node(before.node);
        let brief = Destruction::begin(&cluster, brief, BRIEF).await?;
        wall_clock::set(&leader, offset)?;
        // The look that has raised it is the one that would have rotated.
        alarm(&leader, true).await?;
        cleans_nothing_up(&cluster, &leader).await?;
        let tokens = cluster.client_on("admin", leader.number)?;
        let refused = code(tokens.create_join_token(&JoinTokenRequest::default()).await);
        ensure!(
            refused == Some(ErrorCode::NotReady),
            "a token with {offset}: {refused:?}"
        );
        works(&cluster, &sealed).await?;
        // What is done by hand has the time that the other voters tell.
        let on_leader = cluster.client_on("admin", leader.number)?;
        let previous = active;
        active = on_leader.rotate(CONTEXT, None).await?.version;
        ensure!(active == previous + 1, "{previous}, then {active}");
        let made = version_on(&cluster, leader.number, active).await?;
        let retired = version_on(&cluster, leader.number, previous).await?;
        for stored in [made.activated_at.as_ref(), retired.retired_at.as_ref()] {
            is_now(stored).with_context(|| offset.to_owned())?;
        }
        // A wait is neither cut short nor held up.
        becomes(&cluster, leader.number, brief.version, KeyState::Destroyed, GONE).await?;
        ensure!(brief.since.elapsed() >= BRIEF, "{:?}", brief.since.elapsed());
        waits(
            &version_on(&cluster, leader.number, long.version).await?,
            long.since,
        )?;
        let now = cluster.leader().await?;
        ensure!(now == before, "{before:?}, then {now:?}");

        wall_clock::set(&leader, "+0d")?;
        alarm(&leader, false).await?;
        on_leader.create_join_token(&JoinTokenRequest::default()).await?;
        let looked = CleanupRequest {
            context: None,
            dry_run: true,
        };
        let looked = on_leader.clean_up_keys(&looked, None).await?.into_body();
        ensure!(looked.versions.iter().all(|one| !one.disabled), "{looked:?}");
        for node in cluster.nodes() {
            settled_on(&cluster, node.number, CONTEXT, active).await?;
            settled_on(&cluster, node.number, UNUSED, 2).await?;
        }
        works(&cluster, &sealed)
            .await
            .with_context(|| offset.to_owned())?;
    }

    // The same jump of every clock is time that has passed, for all that anybody can know.
    let leader = cluster.node(cluster.leader().await?.node);
    for node in cluster.nodes() {
        wall_clock::set(&node, "+400d")?;
    }
    for (context, next) in [(CONTEXT, active + 1), (UNUSED, 3)] {
        let what = format!("version {next} of {context} by age");
        until(&what, ROTATED, async || {
            let info = context_on(&cluster, leader.number, context).await.ok()?;
            (info.active_version == Some(next)).then_some(())
        })
        .await?;
    }
    let request = CleanupRequest {
        context: Some(UNUSED.to_owned()),
        dry_run: false,
    };
    let on_leader = cluster.client_on("admin", leader.number)?;
    let cleaned = on_leader.clean_up_keys(&request, None).await?.into_body();
    let disabled: Vec<u32> = cleaned
        .versions
        .iter()
        .filter(|one| one.disabled)
        .map(|one| one.version)
        .collect();
    ensure!(disabled == [1], "{cleaned:?}");
    // The one that the rotation has just retired stays, however long ago it was made, and whatever version 1 did.
    let retired = cleaned.versions.iter().find(|one| one.version == 2);
    let retired = retired.with_context(|| format!("{cleaned:?}"))?;
    ensure!(
        retired.kept_because == format!("retired within the last {UNUSED_FOR} d") && retired.deleted_by_v1,
        "{retired:?}"
    );
    // Retired as long ago as the first, and used since: it stays as soon as its use is told.
    works(&cluster, &sealed).await?;
    let looked = CleanupRequest {
        context: Some(CONTEXT.to_owned()),
        dry_run: true,
    };
    let wanted = format!("used within the last {UNUSED_FOR} d");
    until("the use that keeps the first version", TOLD, async || {
        let looked = on_leader.clean_up_keys(&looked, None).await.ok()?.into_body();
        let mut versions = looked.versions.iter();
        let first = versions.find(|one| one.version == sealed.version)?;
        (!first.disabled && first.kept_because == wanted).then_some(())
    })
    .await?;
    // A destruction goes by no wall clock, however many there are.
    waits(
        &version_on(&cluster, leader.number, long.version).await?,
        long.since,
    )?;
    works(&cluster, &sealed).await?;
    for (context, once) in [(CONTEXT, active + 1), (UNUSED, 3)] {
        settled_on(&cluster, leader.number, context, once).await?;
    }
    cluster.passed();
    Ok(())
}

/// A destruction under way.
struct Destruction {
    version: u32,
    since: Instant,
}

impl Destruction {
    async fn begin(cluster: &Playground, version: u32, wait: Duration) -> Result<Self> {
        let admin = cluster.client("admin")?;
        let since = Instant::now();
        let request = after(wait.as_secs());
        let scheduled = admin.destroy_key(CONTEXT, version, &request, None).await?;
        ensure!(
            scheduled.info.state == KeyState::DestroyScheduled,
            "{:?}",
            scheduled.info
        );
        Ok(Self { version, since })
    }
}
