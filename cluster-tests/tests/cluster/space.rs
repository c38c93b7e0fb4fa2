//! What real rotations leave behind, each with the destruction of the fourth last version after the shortest wait there is:
//! as many objects in the tokens as before, and no more on disk than a multiple of what is alive. The same is done to the
//! store alone, a hundred thousand times (`raft-store/tests/store/space.rs`).

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::{Node, Playground, until};
use hsm_api::Client;
use hsm_api::admin::KeyState;
use hsm_api::client::Retry;

use crate::common::{CONTEXT, context_on, formed_with, in_state, settled_everywhere};
use crate::key_life::{GONE, after};

/// How many rotations.
const ROTATIONS: &str = "HSM_REAL_ROTATIONS";
const USUAL: u32 = 20;
/// Versions that can be used: the active one and two that decrypt.
const KEPT: u32 = 3;
/// Rotations after which the tokens hold what they hold from then on.
const FIRST: u32 = 5;
/// Destructions that may be under way: each waits for a second, and rotations do not.
const UNDER_WAY: usize = 40;
/// Rotations between two looks at that.
const LOOK: u32 = 20;
/// Bytes on disk for each byte of live rows, those of the log not among them.
const RATIO: u64 = 20;
/// Below that a ratio says nothing: it is one of the segments that sled's file is made of.
const LEAST: u64 = 512 << 10;

/// What a node has on disk.
#[derive(Debug)]
struct Use {
    data: u64,
    sled: u64,
    /// Rows of state and log, as the metrics have them.
    live: u64,
    /// The newest snapshot, which holds the live rows and nothing else; nothing before the first one, which takes a thousand
    /// entries.
    state: u64,
    /// Objects in its tokens, other than the tokens themselves.
    objects: usize,
}

/// Visits every file below a directory. One that is removed meanwhile is none.
fn files(dir: &Path, visit: &mut dyn FnMut(&Path, u64)) -> Result<()> {
    let entries = std::fs::read_dir(dir).with_context(|| dir.display().to_string())?;
    for entry in entries.flatten() {
        let path = entry.path();
        match std::fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_dir() => files(&path, visit)?,
            Ok(meta) => visit(&path, meta.len()),
            Err(_) => {}
        }
    }
    Ok(())
}

impl Use {
    async fn of(node: &Node) -> Result<Self> {
        let metrics = node.metrics().await?;
        let bytes = |name: &str| -> Result<u64> {
            let value = metrics.sum(name).with_context(|| format!("no {name}"))?;
            // A number of bytes, as the metrics give it.
            Ok(value as u64)
        };
        let (sled, live) = (bytes("hsm_store_bytes")?, bytes("hsm_store_live_bytes")?);
        let (mut data, mut objects) = (0, 0);
        let mut newest = (std::ffi::OsString::new(), 0);
        files(&node.dir.join("data"), &mut |path, length| {
            data += length;
            // Their names begin with the index, all in the same number of digits.
            if path.extension().is_some_and(|ext| ext == "snapshot")
                && let Some(name) = path.file_name()
                && *name > *newest.0
            {
                newest = (name.to_owned(), length);
            }
        })?;
        files(&node.dir.join("tokens"), &mut |path, _| {
            let is_object = path.extension().is_some_and(|ext| ext == "object");
            objects += usize::from(is_object && !path.ends_with("token.object"));
        })?;
        Ok(Self {
            data,
            sled,
            live,
            state: newest.1,
            objects,
        })
    }
}

fn patient(cluster: &Playground) -> Result<Client> {
    let client = cluster.client("admin")?;
    Ok(client.with_retry(Retry::Until(Duration::from_secs(60))))
}

/// Until no more than so many versions are on their way out, on this node.
async fn under_way(cluster: &Playground, number: u32, most: usize) -> Result<()> {
    let what = format!("at most {most} destructions under way on node {number}");
    until(&what, GONE, async || {
        let info = context_on(cluster, number, CONTEXT).await.ok()?;
        let waiting = in_state(&info, KeyState::DestroyScheduled).len();
        let leaving = in_state(&info, KeyState::Destroying).len();
        (waiting + leaving <= most).then_some(())
    })
    .await
}

/// The versions up to `highest` that can be used are the last ones, and all nodes agree on it.
async fn only_the_last_are_left(cluster: &Playground, highest: u32) -> Result<()> {
    for node in cluster.nodes() {
        under_way(cluster, node.number, 0).await?;
    }
    let info = settled_everywhere(cluster, CONTEXT).await?;
    let kept: Vec<u32> = (highest + 1 - KEPT..highest).collect();
    ensure!(
        in_state(&info, KeyState::DecryptOnly) == kept,
        "{kept:?} were to decrypt"
    );
    let destroyed = in_state(&info, KeyState::Destroyed).len();
    ensure!(
        destroyed == (highest - KEPT) as usize,
        "{destroyed} of {highest} versions are destroyed"
    );
    Ok(())
}

pub(crate) async fn rotations_with_destructions_leave_nothing_behind() -> Result<()> {
    let rotations = std::env::var(ROTATIONS).map_or(Ok(USUAL), |text| text.parse().context(ROTATIONS))?;
    ensure!(rotations > FIRST, "{ROTATIONS}: at least {}", FIRST + 1);
    let cluster = formed_with(Playground::builder(), |config| {
        config.replacen("logging:", "keys: {destroy: {min_wait_seconds: 1}}\nlogging:", 1)
    })
    .await?;
    let admin = patient(&cluster)?;
    let begun = Instant::now();
    let mut first = Vec::new();
    let mut highest = 1;
    for rotation in 1..=rotations {
        highest = admin.rotate(CONTEXT, None).await?.version;
        if let Some(old) = highest.checked_sub(KEPT).filter(|old| *old > 0) {
            admin.destroy_key(CONTEXT, old, &after(1), None).await?;
        }
        if rotation % LOOK == 0 {
            under_way(&cluster, 1, UNDER_WAY).await?;
        }
        if rotation == FIRST {
            only_the_last_are_left(&cluster, highest).await?;
            for node in cluster.nodes() {
                first.push(Use::of(&node).await?.objects);
            }
        }
    }
    only_the_last_are_left(&cluster, highest).await?;
    let took = begun.elapsed();
    for (node, objects) in cluster.nodes().iter().zip(first) {
        let used = Use::of(node).await?;
        println!(
            "{} after {rotations} rotations in {took:.0?}: {} bytes in data ({} sled), {} in its newest snapshot ({} live with \
             the log), {} objects in its tokens ({objects} after {FIRST} rotations)",
            node.id(),
            used.data,
            used.sled,
            used.state,
            used.live,
            used.objects
        );
        ensure!(
            used.objects == objects,
            "{}: {objects} objects became {}",
            node.id(),
            used.objects
        );
        ensure!(
            used.data <= RATIO * used.state.max(LEAST),
            "{}: {used:?}: more than {RATIO} times what is alive",
            node.id()
        );
    }
    cluster.passed();
    Ok(())
}
