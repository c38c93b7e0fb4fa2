//! A node whose data lies on a small file system of its own that is filled to its last byte under load, and freed again: it
//! refuses changes and leaves service in time, comes back by itself or ends with the reason and starts again, has lost
//! nothing that it acknowledged, and its use is bounded afterwards while keys are renewed all the time, and flat once they are
//! not.
//!
//! The file system is a tmpfs, which only root may mount. Where that is not permitted nothing is tested, and the test says so;
//! `HSM_NEED_TMPFS` makes that a failure.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cluster_tests::load::Load;
use cluster_tests::{Node, Playground, until};
use hsm_api::admin::{JoinTokenRequest, KeyState};
use hsm_api::client::Retry;
use hsm_api::{Client, ErrorCode};
use nix::sys::statvfs::statvfs;
use tokio::sync::watch;

use crate::common::{CONTEXT, Sealed, context_on, in_state, open_everywhere_soon, seal, seal_under};
use crate::key_life::{GONE, after};

/// How long its use is watched once there is room again, in seconds.
const FLAT: &str = "HSM_DISK_FLAT_SECS";
const USUAL_FLAT: u64 = 4;
/// Set where a tmpfs can be mounted: there it has to be tested.
const MUST_RUN: &str = "HSM_NEED_TMPFS";
/// The reserve is a twentieth of it, and a quarter of that is kept longest.
const SIZE: u64 = 64 << 20;
const RESERVE: u64 = SIZE / 20;
/// sled's segments: that much its file grows at a time.
const SEGMENT: u64 = 512 << 10;
/// How a node says that it met the end of its disk: running, and as it starts.
const NO_SPACE: [&str; 2] = ["No space left on device", "no room left"];
/// Changes asked for while there is no room at all; each may take its five seconds.
const ASKED: u32 = 10;
/// From the room to readiness, starts included.
const BACK: Duration = Duration::from_secs(60);
/// In which a node that was late is ready again.
const A_MOMENT: Duration = Duration::from_secs(2);
/// From the reserve's end to the end of readiness.
const NOTICED: Duration = Duration::from_secs(30);
/// Between two rotations while its use is watched.
const RENEWED: Duration = Duration::from_millis(500);
/// Versions of these that can be used: the active one and two that decrypt.
const KEPT: usize = 3;
/// Destructions asked for meanwhile, at least.
const FEWEST: usize = 3;
/// Then nobody changes anything for this part of that time: what is used does not grow any more.
const AT_REST: u32 = 5;

/// A file system of its own; gone when dropped.
struct Tmpfs {
    at: PathBuf,
}

impl Tmpfs {
    /// `None` where it is not permitted.
    fn mount(at: &Path) -> Result<Option<Self>> {
        let size = format!("size={SIZE},mode=700");
        let said = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "hsm-test"])
            .arg(at)
            .output()
            .context("mount")?;
        if said.status.success() {
            return Ok(Some(Self { at: at.to_owned() }));
        }
        // To others than root, and in containers without the capability, it says so and ends with 32 or 1.
        let why = String::from_utf8_lossy(&said.stderr);
        eprintln!(
            "NOT TESTED: a full disk: no tmpfs can be mounted here: {}",
            why.trim()
        );
        Ok(None)
    }

    fn free(&self) -> Result<u64> {
        let stat = statvfs(&self.at)?;
        Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
    }

    fn used(&self) -> Result<u64> {
        Ok(SIZE.saturating_sub(self.free()?))
    }

    fn ballast(&self) -> PathBuf {
        self.at.join("ballast")
    }

    /// Fills it until no more than `left` is free; to its last page with none.
    fn fill(&self, left: u64) -> Result<()> {
        let mut file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.ballast())?;
        let chunk = [0x5a; 4096];
        while self.free()? > left || left == 0 {
            match file.write_all(&chunk) {
                Err(error) if error.kind() == ErrorKind::StorageFull => break,
                written => written?,
            }
        }
        Ok(())
    }

    fn make_room(&self) -> Result<()> {
        std::fs::remove_file(self.ballast()).context("remove the ballast")
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: its node may still run.
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
    }
}

/// Whoever rotates as often as the node lets him, and keeps what was acknowledged.
#[derive(Default)]
struct Acknowledged {
    sealed: Vec<Sealed>,
    versions: Vec<u32>,
    refused: u32,
}

type Shared = Arc<Mutex<Acknowledged>>;

fn lock(shared: &Shared) -> std::sync::MutexGuard<'_, Acknowledged> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn rotate_on(admin: Client, trading: Client, shared: Shared, stopped: watch::Receiver<bool>) {
    while !*stopped.borrow() {
        match admin.rotate(CONTEXT, None).await {
            Ok(rotated) => {
                lock(&shared).versions.push(rotated.version);
                if let Ok(sealed) = seal(&trading, CONTEXT, b"before the disk was full").await {
                    lock(&shared).sealed.push(sealed);
                }
            }
            Err(_) => lock(&shared).refused += 1,
        }
        // As an operator's script would; a node that is gone refuses at once.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A configuration under which a destruction waits for a second only.
fn renewable(config: &str) -> Result<String> {
    let changed = config.replacen("logging:", "keys: {destroy: {min_wait_seconds: 1}}\nlogging:", 1);
    ensure!(
        changed != config,
        "the playground's configuration has changed:\n{config}"
    );
    Ok(changed)
}

/// Rotates until it is stopped, and has the fourth last version that it made destroyed each time: much is written, and what
/// is alive stays what it was. The versions that are to be destroyed.
async fn renew(admin: &Client, asked: &AtomicUsize, stopped: watch::Receiver<bool>) -> Result<Vec<u32>> {
    let mut made = Vec::new();
    let mut leaving = Vec::new();
    while !*stopped.borrow() {
        made.push(admin.rotate(CONTEXT, None).await?.version);
        if made.len() > KEPT {
            let old = made.remove(0);
            admin.destroy_key(CONTEXT, old, &after(1), None).await?;
            leaving.push(old);
            asked.store(leaving.len(), Ordering::Relaxed);
        }
        tokio::time::sleep(RENEWED).await;
    }
    Ok(leaving)
}

/// Puts the data of a stopped node on a file system of its own.
fn move_data(node: &Node, scratch: &Path) -> Result<Option<Tmpfs>> {
    let (data, aside) = (node.dir.join("data"), scratch.join("data-aside"));
    std::fs::rename(&data, &aside)?;
    std::fs::create_dir(&data)?;
    let Some(tmpfs) = Tmpfs::mount(&data)? else {
        return Ok(None);
    };
    let copied = Command::new("cp")
        .arg("-a")
        .arg(aside.join("."))
        .arg(&data)
        .status()?;
    ensure!(copied.success(), "cp: {copied}");
    Ok(Some(tmpfs))
}

/// Until it is ready and has `done` something more, started again if it has ended, which it may do only over its full disk.
/// How often it had.
async fn comes_back(cluster: &Playground, node: &Node, done: impl Fn() -> bool) -> Result<u32> {
    let deadline = Instant::now() + BACK;
    let mut ended = 0;
    loop {
        if done() && node.is_ready().await {
            return Ok(ended);
        }
        if node.pid().is_none() {
            let log = node.log();
            let said = NO_SPACE.iter().any(|words| log.contains(words));
            ensure!(said, "it ended and did not say why");
            ended += 1;
            ensure!(ended <= 2, "it ends again and again although there is room");
            cluster.start_node(node.number).await?;
        }
        if Instant::now() > deadline {
            bail!("not ready {BACK:?} after there was room: {}", node.checks().await);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The most that was used in the first and in the second half of a while, under load. The second one lasts until enough was
/// destroyed.
async fn watched(tmpfs: &Tmpfs, node: &Node, seconds: u64, destructions: &AtomicUsize) -> Result<[u64; 2]> {
    let begun = Instant::now();
    let all = Duration::from_secs(seconds);
    let mut peaks = [0, 0];
    while begun.elapsed() < all || destructions.load(Ordering::Relaxed) < FEWEST {
        ensure!(
            begun.elapsed() < all + BACK,
            "hardly anything is rotated and destroyed: nothing was watched"
        );
        let half = usize::from(begun.elapsed() * 2 > all);
        peaks[half] = tmpfs.used()?.max(peaks[half]);
        // A look at a token that comes late, because the machine stood still, takes readiness for a moment.
        let ready = node.is_ready().await || node.wait_ready(A_MOMENT).await.is_ok();
        ensure!(ready, "{}", node.checks().await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(peaks)
}

/// The most that is used in the first third, and what is at the end, of a while in which there is nothing but load.
async fn at_rest(tmpfs: &Tmpfs, node: &Node, lasts: Duration) -> Result<[u64; 2]> {
    let begun = Instant::now();
    let (mut first, mut last) = (0, 0);
    while begun.elapsed() < lasts {
        last = tmpfs.used()?;
        if begun.elapsed() < lasts / 3 {
            first = last.max(first);
        }
        // The log of a node under load has an entry every few seconds.
        ensure!(
            last <= first + 2 * SEGMENT,
            "its use grows although nobody changes anything: {first} bytes, {last} after {:?}",
            begun.elapsed()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    node.wait_ready(A_MOMENT).await?;
    Ok([first, last])
}

pub(crate) async fn a_disk_that_fills_up_and_is_freed_again_costs_nothing_acknowledged() -> Result<()> {
    // One node: nobody could give back what it lost.
    let cluster = Playground::start(1).await?;
    let node = cluster.node(1);
    node.kill().await?;
    let Some(tmpfs) = move_data(&node, cluster.scratch())? else {
        ensure!(
            std::env::var_os(MUST_RUN).is_none(),
            "no tmpfs can be mounted here, and {MUST_RUN} says that one can"
        );
        cluster.passed();
        return Ok(());
    };
    node.set_config(&renewable(&node.config()?)?)?;
    cluster.start_node(1).await?;
    node.wait_ready(BACK).await?;

    let (admin, trading) = (cluster.client("admin")?, cluster.client("trading-1")?);
    let shared = Shared::default();
    let (stop, stopped) = watch::channel(false);
    let load = Load::start(&cluster)?;
    let rotating = tokio::spawn(rotate_on(
        admin.clone(),
        trading.clone(),
        Arc::clone(&shared),
        stopped,
    ));
    until("some acknowledged rotations", BACK, async || {
        (lock(&shared).versions.len() >= 5).then_some(())
    })
    .await?;
    let before = tmpfs.used()?;

    // Into the reserve, and not into its last quarter: it changes nothing any more, and encrypts on.
    tmpfs.fill(RESERVE / 2)?;
    until("the end of readiness", NOTICED, async || {
        let checks = node.checks().await;
        (!node.is_ready().await && checks.contains("below its reserve")).then_some(())
    })
    .await?;
    // What an alert goes by.
    until("hsm_disk_below_reserve", NOTICED, async || {
        let below = node.metrics().await.ok()?.sum("hsm_disk_below_reserve")?;
        (below == 1.0).then_some(())
    })
    .await?;
    let token = JoinTokenRequest {
        ttl_seconds: Some(60),
        node_id: None,
    };
    // Until it is answered at all: the machine may stand still.
    let refused = until(
        "an answer to a change within the reserve",
        NOTICED,
        async || match admin.create_join_token(&token).await {
            Ok(_) => Some(None),
            Err(error) => error.code().map(Some),
        },
    )
    .await?;
    ensure!(
        refused == Some(ErrorCode::NotReady),
        "a change within the reserve: {refused:?}"
    );
    seal(&trading, CONTEXT, b"within the reserve").await?;

    // To the last byte, slowly and at once, so that something is under way: whether it lives on is its own affair, as long as
    // it says why it does not.
    let mut ended = 0;
    for round in ["out of the reserve", "at once"] {
        tmpfs.fill(0)?;
        // A rotation that waits for its version is refused only when its time is over.
        let mut refused = 0;
        until("changes refused while there is no room", BACK, async || {
            refused += u32::from(admin.create_join_token(&token).await.is_err());
            (refused >= ASKED).then_some(())
        })
        .await?;
        ensure!(!node.is_ready().await, "{round}: ready without any room");
        if round == "at once" {
            // As a supervisor would start it again. Without room it may be refused, and nothing is the worse for it.
            node.kill().await?;
            let started = cluster.start_node(1).await;
            println!("started without any room: {}", started.is_ok());
        }
        let until_then = lock(&shared).versions.len();
        tmpfs.make_room()?;
        // In the same process or in the next one, changes go on.
        ended += comes_back(&cluster, &node, || lock(&shared).versions.len() > until_then)
            .await
            .context(round)?;
    }
    stop.send_replace(true);
    rotating.await?;
    let (sealed, versions, refused) = {
        let mut all = lock(&shared);
        (
            std::mem::take(&mut all.sealed),
            std::mem::take(&mut all.versions),
            all.refused,
        )
    };
    let info = context_on(&cluster, 1, CONTEXT).await?;
    for version in &versions {
        let there = info.versions.iter().any(|held| held.version == *version);
        ensure!(there, "version {version} was acknowledged and is gone");
    }
    open_everywhere_soon(&cluster, "trading-1", CONTEXT, &sealed).await?;
    let admin = admin.with_retry(Retry::Until(BACK));
    let next = admin.rotate(CONTEXT, None).await?.version;
    ensure!(
        versions.iter().all(|version| *version < next),
        "{next} after {versions:?}"
    );
    seal_under(&trading, CONTEXT, b"and more", next).await?;

    let seconds = std::env::var(FLAT).map_or(Ok(USUAL_FLAT), |text| text.parse().context(FLAT))?;
    let (stop, stopped) = watch::channel(false);
    let asked = AtomicUsize::new(0);
    let watching = async {
        let peaks = watched(&tmpfs, &node, seconds, &asked).await;
        stop.send_replace(true);
        peaks
    };
    let (peaks, leaving) = tokio::try_join!(watching, renew(&admin, &asked, stopped))?;
    until("the end of what was to be destroyed", GONE, async || {
        let info = context_on(&cluster, 1, CONTEXT).await.ok()?;
        let gone = in_state(&info, KeyState::Destroyed);
        leaving.iter().all(|version| gone.contains(version)).then_some(())
    })
    .await?;
    let rest = (Duration::from_secs(seconds) / AT_REST).max(Duration::from_secs(3));
    let calm = at_rest(&tmpfs, &node, rest).await?;
    let report = load.stop().await;
    println!(
        "{SIZE} bytes filled: {} rotations acknowledged, {refused} refused, 0 lost; the node ended {ended} times; \
         {before} bytes used before, at most {} and {} in the halves of {seconds} s afterwards, in which {} versions were \
         destroyed; then {} and, after {} s without changes, {}; {} encryptions",
        versions.len(),
        peaks[0],
        peaks[1],
        leaving.len(),
        calm[0],
        rest.as_secs(),
        calm[1],
        report.encrypted
    );
    ensure!(
        peaks[1] <= peaks[0] + 4 * SEGMENT,
        "its use grows: at most {} bytes in the first half of {seconds} s, {} in the second",
        peaks[0],
        peaks[1]
    );
    // The room is the node's once it is gone.
    node.kill().await?;
    drop(tmpfs);
    cluster.passed();
    Ok(())
}
