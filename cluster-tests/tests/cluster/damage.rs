//! Damage to a stopped node's files, met by the program itself: it comes back with everything that was acknowledged, or ends
//! with its documented exit code and says what to do. The same is done to the store alone, hundreds of times
//! (`raft-store/tests/store/damage.rs`). A slot whose token's files are damaged serves with every key, or says why not and which
//! section of `docs/operations.md` helps.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cluster_tests::{Node, Playground, until};
use hsm_api::admin::{ClusterStatus, ContextInfo, CreateKekRequest, SlotStatus};

use crate::by_hand::Start;
use crate::common::{CONTEXT, Sealed, context_on, open, open_everywhere, seal, seal_under, versions};
use crate::pkcs11::token_folder;

/// What is damaged follows from it; what stands there differs from run to run, as keys and ids do.
const SEED: u64 = 0x5eed_0010;
/// A store that is refused: `docs/operations.md`, "Under a supervisor".
const EXIT_REFUSED: i32 = 70;
/// Said with it.
const NAMED: [&str; 3] = [
    "data_dir ",
    "this node cannot go on with this data directory",
    "join a new node under a new node_id with an empty directory",
];
/// Of a process that is known to end.
const ENDED_WITHIN: Duration = Duration::from_secs(60);
/// Elections of one voter need not take as long as a cluster's.
const RAFT: [&str; 2] = [
    "  coordination: {type: raft}\n",
    "  coordination: {type: raft}\n  raft: {heartbeat_ms: 50, election_min_ms: 150, election_max_ms: 300}\n",
];

/// File, what is done to it, and how.
type Round = (
    &'static str,
    &'static str,
    fn(&File, &mut Random) -> io::Result<()>,
);

const DB: &str = "sled/db";
const CONTROL: &str = "control";
/// The last ones are harmless, always: they show that the tokens are as they were, too.
const ROUNDS: [Round; 12] = [
    (DB, "cut short", cut_early),
    (DB, "cut", cut),
    (DB, "cut", cut),
    (DB, "one bit flipped", flip),
    (DB, "one bit flipped", flip),
    (DB, "one bit flipped", flip),
    (DB, "one bit flipped", flip),
    (CONTROL, "cut", cut_in_slots),
    (CONTROL, "cut", cut_in_slots),
    (CONTROL, "one bit flipped", flip_in_slots),
    (CONTROL, "one bit flipped", flip_in_slots),
    (CONTROL, "one bit flipped", flip_in_slots),
];

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) % limit.max(1)
    }
}

/// Where what was written ends: sled makes its file longer than that.
fn written(mut file: &File) -> io::Result<u64> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let last = bytes.iter().rposition(|byte| *byte != 0);
    Ok(last.map_or(0, |last| last as u64 + 1))
}

fn flip_at(file: &File, place: u64, random: &mut Random) -> io::Result<()> {
    let mut byte = [0];
    file.read_exact_at(&mut byte, place)?;
    byte[0] ^= 1 << random.below(8);
    file.write_all_at(&byte, place)
}

fn flip(file: &File, random: &mut Random) -> io::Result<()> {
    let place = random.below(written(file)?);
    flip_at(file, place, random)
}

fn cut(file: &File, random: &mut Random) -> io::Result<()> {
    file.set_len(random.below(written(file)?))
}

/// So early that what was acknowledged is gone.
fn cut_early(file: &File, random: &mut Random) -> io::Result<()> {
    file.set_len(random.below(written(file)? / 4))
}

/// A place inside one of the two slots of `control`, which has their layout (`raft-store/src/storage/control.rs`).
fn inside_slots(file: &File, random: &mut Random) -> io::Result<u64> {
    let slot = random.below(2) * 4096;
    let mut length = [0; 4];
    file.read_exact_at(&mut length, slot + 16)?;
    Ok(slot + random.below(u64::from(u32::from_be_bytes(length)) + 24))
}

fn flip_in_slots(file: &File, random: &mut Random) -> io::Result<()> {
    let place = inside_slots(file, random)?;
    flip_at(file, place, random)
}

fn cut_in_slots(file: &File, random: &mut Random) -> io::Result<()> {
    file.set_len(inside_slots(file, random)?)
}

/// What a node has acknowledged, and who it is.
struct Acknowledged {
    sealed: Vec<Sealed>,
    contexts: Vec<ContextInfo>,
    status: ClusterStatus,
}

impl Acknowledged {
    /// Four versions of one context, and one of another.
    async fn by(cluster: &Playground) -> Result<Self> {
        let (admin, trading) = (cluster.client("admin")?, cluster.client("trading-1")?);
        let mut sealed = vec![seal(&trading, CONTEXT, b"of the first version").await?];
        for _ in 0..3 {
            let version = admin.rotate(CONTEXT, None).await?.version;
            sealed.push(seal_under(&trading, CONTEXT, b"of a later one", version).await?);
        }
        admin
            .create_kek(&CreateKekRequest::new("order-key"), None)
            .await?;
        Ok(Self {
            sealed,
            contexts: admin.list_keks().await?.into_body().contexts,
            status: cluster.status(1).await.context("no status")?,
        })
    }

    /// All of it is there, in a later term, and more is done.
    async fn check(&self, cluster: &Playground) -> Result<()> {
        let before = &self.status;
        let now = cluster.status(1).await.context("no status")?;
        ensure!(
            now.cluster_id == before.cluster_id
                && (now.epoch, now.raft_id) == (before.epoch, before.raft_id)
                && now.term > before.term
                && now.applied_index > before.applied_index,
            "{now:?} after {before:?}"
        );
        for before in &self.contexts {
            let now = context_on(cluster, 1, &before.context).await?;
            ensure!(versions(&now) == versions(before), "{now:?} after {before:?}");
        }
        open_everywhere(cluster, "trading-1", CONTEXT, &self.sealed).await?;
        seal(&cluster.client("trading-1")?, CONTEXT, b"and more").await?;
        Ok(())
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let copied = std::process::Command::new("cp")
        .arg("-a")
        .args([from, to])
        .status()?;
    ensure!(copied.success(), "cp: {copied}");
    Ok(())
}

/// Whether a node that is started on a damaged copy comes back. If not, it has ended as it should.
async fn comes_back(
    cluster: &Playground,
    node: &Node,
    data: &Path,
    acknowledged: &Acknowledged,
) -> Result<bool> {
    let own = node.dir.join("data").display().to_string();
    let start = Start::of(cluster, node)?
        .with(&own, &data.display().to_string())?
        .with(RAFT[0], RAFT[1])?;
    let mut started = start.spawn(cluster.scratch())?;
    match started.gets_ready(node).await {
        Ok(true) => {
            let checked = acknowledged.check(cluster).await;
            let said = started.kill().await?;
            checked.with_context(|| format!("it came back with something else, and said: {said}"))?;
            Ok(true)
        }
        Ok(false) => {
            let ended = started.ended(ENDED_WITHIN).await?;
            ensure!(
                ended.code == Some(EXIT_REFUSED) && NAMED.iter().all(|word| ended.said.contains(word)),
                "it ended with {:?}, and said: {}",
                ended.code,
                ended.said
            );
            Ok(false)
        }
        Err(error) => {
            let said = started.kill().await?;
            bail!("{error:#}; it said: {said}")
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_on_damaged_files_comes_back_whole_or_says_what_to_do() -> Result<()> {
    let cluster = Playground::start(1).await?;
    let node = cluster.node(1);
    let acknowledged = Acknowledged::by(&cluster).await?;
    node.kill().await?;

    let mut random = Random(SEED);
    let (mut whole, mut refused) = (0, 0);
    for (number, (file, what, damage)) in ROUNDS.into_iter().enumerate() {
        let told = || format!("round {number}, seed {SEED:#x}: {file} {what}");
        let data = cluster.scratch().join(format!("damaged-{number}"));
        copy(&node.dir.join("data"), &data)?;
        let damaged = OpenOptions::new().read(true).write(true).open(data.join(file))?;
        damage(&damaged, &mut random).with_context(told)?;
        drop(damaged);
        let back = comes_back(&cluster, &node, &data, &acknowledged)
            .await
            .with_context(told)?;
        let harmless = (file, what) == (CONTROL, "one bit flipped");
        ensure!(back || !harmless, "{}: it was refused", told());
        if back {
            whole += 1;
        } else {
            refused += 1;
        }
    }
    println!("{whole} came back whole, {refused} refused (seed {SEED:#x})");
    ensure!(whole > 0 && refused > 0, "{whole} came back, {refused} refused");
    cluster.passed();
    Ok(())
}

/// How often each file of the token is damaged in each way.
const TOKEN_ROUNDS: &str = "HSM_TOKEN_DAMAGE_ROUNDS";
const USUAL_TOKEN_ROUNDS: u32 = 1;
/// From a start to a slot that is ready, or says why it is not.
const SETTLED: Duration = Duration::from_secs(60);
/// A slot that has said why it is not ready for so long is not waited for any longer: what is missing is imported in less.
const SAYS_SO: Duration = Duration::from_secs(8);
/// Sections of the manual, by which a reason names its remedy.
const MANUAL: &str = include_str!("../../../docs/operations.md");

/// The section of the manual that a text points to; it has to be there.
fn section(text: &str) -> Option<&str> {
    let (_, after) = text.split_once("docs/operations.md, \"")?;
    let (section, _) = after.split_once('"')?;
    let mut headings = MANUAL.lines().filter_map(|line| line.strip_prefix("### "));
    headings.any(|heading| heading == section).then_some(section)
}

/// What the node says of the slot.
async fn slot_of(cluster: &Playground, node: &Node) -> Option<SlotStatus> {
    let status = cluster.status(node.number).await?;
    status.slots.into_iter().find(|slot| slot.slot == "exchange")
}

/// Until the slot is ready (`None`), or for a while has said why it is not and what helps: to administrators, and without names
/// on the health listener.
async fn settled(cluster: &Playground, node: &Node) -> Result<Option<String>> {
    let mut since: Option<Instant> = None;
    let outcome = until("the slot, or its reason", SETTLED, async || {
        // The node itself may be ready: another slot serves.
        let answer = node.patient().get("/readyz?verbose&slot=exchange").await.ok()?;
        if answer.status == 200 {
            return Some(None);
        }
        let checks = answer.text();
        let mut lines = checks.lines().filter(|line| line.contains("slot:exchange"));
        let told = lines.any(|line| section(line).is_some());
        let reason = slot_of(cluster, node).await.and_then(|slot| slot.reason);
        let Some(why) = reason.filter(|why| told && section(why).is_some()) else {
            since = None;
            return None;
        };
        let began = *since.get_or_insert_with(Instant::now);
        (began.elapsed() >= SAYS_SO).then_some(Some(why))
    })
    .await;
    match outcome {
        Ok(outcome) => Ok(outcome),
        Err(error) => bail!(
            "{error:#}: neither ready nor with a reason that names a section of the manual: {:?}; {}",
            slot_of(cluster, node).await,
            node.checks().await
        ),
    }
}

/// Whether the slot came back with every key. If not, the node says why and what helps, and no ciphertext was opened as something
/// else.
async fn slot_comes_back(cluster: &Playground, node: &Node, acknowledged: &Acknowledged) -> Result<bool> {
    let Some(why) = settled(cluster, node).await? else {
        acknowledged.check(cluster).await?;
        return Ok(true);
    };
    let client = cluster.client("trading-1")?;
    for sealed in &acknowledged.sealed {
        if let Err(error) = open(&client, CONTEXT, sealed).await {
            ensure!(
                error.downcast_ref::<hsm_api::ClientError>().is_some(),
                "{error:#}"
            );
        }
    }
    println!("not ready: {why}");
    Ok(false)
}

/// `CKO_SECRET_KEY` and `CKO_PRIVATE_KEY`.
const SECRET_KEY: u64 = 4;
const PRIVATE_KEY: u64 = 3;

/// The number at this place of a file of SoftHSM.
fn number(contents: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*contents.get(at..)?.first_chunk::<8>()?))
}

/// `CKA_CLASS`, which SoftHSM writes first: generation(8) type(8) kind(8) value(8).
fn class_of(file: &Path) -> Option<u64> {
    let contents = std::fs::read(file).ok()?;
    (number(&contents, 8)? == 0)
        .then(|| number(&contents, 24))
        .flatten()
}

/// One damaged byte, of the first length in the file (kind 3: length(8) bytes): there cannot be as much memory as that.
fn announce_too_much(file: &Path) -> Result<()> {
    let mut contents = std::fs::read(file)?;
    let mut at = 8;
    let length = loop {
        match number(&contents, at + 8).context("no length in the file")? {
            1 => at += 8 + 8 + 1,
            2 => at += 8 + 8 + 8,
            3 => break at + 16,
            kind => bail!("{}: kind {kind} at {at}", file.display()),
        }
    };
    contents[length] = 0x40;
    std::fs::write(file, contents)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_on_damaged_files_of_its_token_serves_every_key_or_says_what_to_do() -> Result<()> {
    let rounds = std::env::var(TOKEN_ROUNDS).map_or(Ok(USUAL_TOKEN_ROUNDS), |text| text.parse())?;
    let cluster = Playground::start(1).await?;
    let node = cluster.node(1);
    let mut acknowledged = Acknowledged::by(&cluster).await?;
    node.kill().await?;
    let tokens = node.dir.join("tokens");
    // With what the node keeps of its slots: a PIN that was refused is not tried again.
    let (slots, whole) = (node.dir.join("data/slots"), cluster.scratch());
    copy(&tokens, &whole.join("tokens"))?;
    copy(&slots, &whole.join("slots"))?;
    let place = token_folder(&tokens, "slot-exchange")?;
    let mut files: Vec<_> = std::fs::read_dir(&place)?
        .map(|entry| Ok(entry?.path()))
        .collect::<io::Result<Vec<_>>>()?;
    files.retain(|file| file.extension().is_some_and(|kind| kind == "object"));
    // Their names are drawn; their lengths say what they are.
    files.sort_by_key(|file| {
        (
            std::fs::metadata(file).map_or(0, |found| found.len()),
            file.clone(),
        )
    });
    ensure!(files.len() > 4, "{files:?}");

    let restored = || -> Result<()> {
        for (damaged, kept) in [(&tokens, "tokens"), (&slots, "slots")] {
            std::fs::remove_dir_all(damaged)?;
            copy(&whole.join(kept), damaged)?;
        }
        Ok(())
    };
    for (class, imported) in [(SECRET_KEY, true), (PRIVATE_KEY, false)] {
        let file = files.iter().find(|file| class_of(file) == Some(class));
        let file = file.with_context(|| format!("no object of class {class}"))?;
        announce_too_much(file)?;
        let told = || format!("{} announces too much", file.display());
        cluster.start_node(1).await.with_context(told)?;
        let serves = slot_comes_back(&cluster, &node, &acknowledged)
            .await
            .with_context(told)?;
        ensure!(serves == imported, "{}: serves: {serves}", told());
        ensure!(
            file.with_extension("object-damaged").is_file(),
            "{}: it is gone",
            told()
        );
        node.kill().await?;
        restored()?;
    }

    let mut random = Random(SEED);
    let (mut back, mut failed) = (0, 0);
    let each = files.iter().flat_map(|file| [(file, "flipped"), (file, "cut")]);
    for (file, way) in each.cycle().take(files.len() * 2 * rounds as usize) {
        let damaged = OpenOptions::new().read(true).write(true).open(file)?;
        let place = random.below(damaged.metadata()?.len());
        match way {
            "cut" => damaged.set_len(place)?,
            _ => flip_at(&damaged, place, &mut random)?,
        }
        drop(damaged);
        let told = || format!("{}, {way} at byte {place}, seed {SEED:#x}", file.display());
        cluster.start_node(1).await.with_context(told)?;
        let serves = slot_comes_back(&cluster, &node, &acknowledged)
            .await
            .with_context(told)?;
        println!("{}: {}", told(), if serves { "every key" } else { "failed" });
        if serves {
            back += 1;
            acknowledged.status = cluster.status(1).await.context("no status")?;
        } else {
            failed += 1;
        }
        node.kill().await?;
        restored()?;
    }
    println!("{back} came back with every key, {failed} failed with reason and remedy (seed {SEED:#x})");
    ensure!(back > 0, "no slot came back");
    cluster.passed();
    Ok(())
}
