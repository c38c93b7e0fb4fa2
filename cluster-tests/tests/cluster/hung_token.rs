//! A token of the leader that hangs: its slot alone stops serving, until the token comes back. Raft, the other
//! slot and every listener go on.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::{Leader, Node, Playground, Stalls, until};
use hsm_api::data::{DecryptRequest, EncryptRequest};
use hsm_api::{Client, ClientError, ErrorCode};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::common::{CONTEXT, Sealed, json, open, seal};
use crate::pkcs11::token_folder;

/// A known-answer test every three seconds meets the hang, and is given up after six.
const GIVEN_UP_WITHIN: Duration = Duration::from_secs(60);
/// How long the slot is watched after that.
const WATCHED: Duration = Duration::from_secs(10);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(100);
/// A status that has to wait for a token would take longer, each time.
const AT_ONCE: Duration = Duration::from_secs(2);
/// Asked so often until it comes at once: what the machine does passes, and the hang stays.
const TRIES: usize = 3;
/// Clusters in which somebody else is elected while the machine stands still, so that heartbeats are missed whatever the token
/// does. Without that one is one too many.
const ROUNDS: usize = 3;
const STOOD_STILL: Duration = Duration::from_millis(400);

/// Takes the lock that SoftHSM takes to see whether a token has changed; it waits for it inside the call, for as
/// long as it takes. The lock is this process's until the file is closed. `None` while the node has it.
pub(crate) fn hold(generation: &Path) -> Result<Option<File>> {
    let file = File::options()
        .read(true)
        .write(true)
        .open(generation)
        .with_context(|| generation.display().to_string())?;
    let lock = libc::flock {
        l_type: libc::F_WRLCK as _,
        l_whence: libc::SEEK_SET as _,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(&file, FcntlArg::F_SETLK(&lock)) {
        Ok(_) => Ok(Some(file)),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(None),
        Err(error) => Err(error).context("lock the token's generation"),
    }
}

/// Somebody else was elected.
#[derive(Debug)]
struct Elected(String);

impl std::fmt::Display for Elected {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(&self.0)
    }
}

impl std::error::Error for Elected {}

/// Nobody has elected anybody, the leader says how it is, and its other slot serves.
async fn goes_on(cluster: &Playground, leader: Leader, own: &Sealed) -> Result<()> {
    for node in cluster.nodes() {
        let mut took = Vec::new();
        let status = loop {
            let asked = Instant::now();
            let status = cluster.status(node.number).await;
            took.push(asked.elapsed());
            match status {
                Some(status) if took.last() < Some(&AT_ONCE) => break status,
                _ => ensure!(took.len() < TRIES, "{}: a status after {took:?}", node.id()),
            }
        };
        if status.term != leader.term {
            let what = format!("{} is in term {}, {leader:?}", node.id(), status.term);
            return Err(Elected(what).into());
        }
    }
    let node = cluster.node(leader.node);
    ensure!(
        node.patient().get("/livez").await?.status == 200,
        "the node is down"
    );
    // A look at a token that comes late, because the machine stood still, takes readiness for a moment.
    until("readiness of the other slot", AT_ONCE, async || {
        (ready(&node, "2fa").await.ok()? == 200).then_some(())
    })
    .await?;
    let owner = cluster.client_on("2fa-1", leader.node)?;
    open(&owner, "2fa", own).await?;
    seal(&owner, "2fa", b"meanwhile").await.map(drop)
}

async fn ready(node: &Node, slot: &str) -> Result<u16> {
    let answer = node.patient().get(&format!("/readyz?slot={slot}")).await?;
    Ok(answer.status)
}

/// Both operations end with a refusal that says what it is about.
async fn refuses(client: &Client, sealed: &Sealed) -> Result<()> {
    let encrypted = client.encrypt(&EncryptRequest::new(CONTEXT, b"x")).await;
    let request = DecryptRequest::new(CONTEXT, sealed.ciphertext.clone());
    let decrypted = client.decrypt(&request).await;
    for error in [encrypted.err(), decrypted.err()] {
        check_refusal(&error.context("the slot whose token hangs has answered")?)?;
    }
    Ok(())
}

fn check_refusal(error: &ClientError) -> Result<()> {
    let code = error.code();
    ensure!(
        error.status() == Some(503) && matches!(code, Some(ErrorCode::SlotFailed | ErrorCode::TokenTimeout)),
        "{error}"
    );
    Ok(())
}

/// Of all contexts those of the other slot get a version; the refused one is named, and the command has failed.
async fn rotates_the_other_slot(cluster: &Playground, node: &Node) -> Result<()> {
    let endpoint = node.endpoint();
    let all = ["rotate", "--all", "--endpoint", &endpoint, "-o", "json"];
    let output = cluster.hsmctl(&all).await?;
    ensure!(
        output.code == Some(5)
            && output
                .stderr
                .contains(&format!("not rotated: {CONTEXT}; rotated: 2fa")),
        "{output:?}"
    );
    let turns = json(&output.stdout)?;
    let of = |context: &str| {
        let mut turns = turns["contexts"].as_array().into_iter().flatten();
        turns.find(|turn| turn["context"] == context).cloned()
    };
    let (refused, rotated) = (of(CONTEXT).context("not named")?, of("2fa").context("not named")?);
    ensure!(
        refused["outcome"] == "refused" && rotated["outcome"] == "rotated" && rotated["version"] == 2,
        "{turns}"
    );
    Ok(())
}

pub(crate) async fn a_hung_token_of_the_leader_costs_its_slot_and_nothing_else() -> Result<()> {
    let stalls = Stalls::watch()?;
    for _ in 1..ROUNDS {
        let began = Instant::now();
        match costs_its_slot().await {
            Err(error)
                if error.downcast_ref::<Elected>().is_some()
                    && stalls.between(began, Instant::now()) > STOOD_STILL =>
            {
                println!("once more: {error:#}");
            }
            ended => return ended,
        }
    }
    costs_its_slot().await
}

async fn costs_its_slot() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let leader = cluster.leader().await?;
    let node = cluster.node(leader.node);
    let trading = cluster.client_on("trading-1", leader.node)?;
    let sealed = seal(&trading, CONTEXT, b"before").await?;
    let own = seal(&cluster.client_on("2fa-1", leader.node)?, "2fa", b"before").await?;
    let generation = token_folder(&node.dir.join("tokens"), "slot-exchange")?.join("generation");
    let held = until("the token's lock", GIVEN_UP_WITHIN, async || {
        hold(&generation).transpose()
    })
    .await??;

    // Until the hang is noticed, copies of the keys go on working.
    let begun = Instant::now();
    while node.patient().is_ready().await {
        goes_on(&cluster, leader, &own).await?;
        ensure!(
            begun.elapsed() < GIVEN_UP_WITHIN,
            "still ready {:?} after the token hangs",
            begun.elapsed()
        );
        tokio::time::sleep(PAUSE).await;
    }
    println!("the hang was noticed after {:?}", begun.elapsed());
    let noticed = Instant::now();
    while noticed.elapsed() < WATCHED {
        goes_on(&cluster, leader, &own).await?;
        refuses(&trading, &sealed).await?;
        ensure!(ready(&node, "exchange").await? == 503, "the slot is ready");
        tokio::time::sleep(PAUSE).await;
    }
    // The others serve what this one cannot.
    for other in cluster.others(leader.node) {
        other.wait_ready(GIVEN_UP_WITHIN).await?;
        open(&cluster.client_on("trading-1", other.number)?, CONTEXT, &sealed).await?;
    }
    // A key that the leader cannot make is refused; one of the other slot is made.
    let admin = cluster.client_on("admin", leader.node)?;
    let error = admin.rotate(CONTEXT, None).await.err();
    check_refusal(&error.context("rotated with a token that hangs")?)?;
    rotates_the_other_slot(&cluster, &node).await?;
    goes_on(&cluster, leader, &own).await?;

    drop(held);
    until("the slot's recovery", GIVEN_UP_WITHIN, async || {
        open(&trading, CONTEXT, &sealed).await.ok()
    })
    .await?;
    node.wait_ready(GIVEN_UP_WITHIN).await?;
    goes_on(&cluster, leader, &own).await?;
    let version = admin.rotate(CONTEXT, None).await?.version;
    ensure!(version == 2, "version {version} after the recovery");
    goes_on(&cluster, leader, &own).await?;
    cluster.passed();
    Ok(())
}
