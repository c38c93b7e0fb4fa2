//! One sick token beside a healthy one, in one module: whatever the sick one does, its own contexts say why they are
//! not served, the other slot serves as before, and nobody restarts anything when it is well again.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::http1::Connection;
use cluster_tests::shim::{SOFTHSM, Shim};
use cluster_tests::{Node, Playground, until};
use hsm_api::client::{Method, RawResponse};
use hsm_api::{Client, ErrorCode, Problem, paths};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::common::{CONTEXT, Sealed, formed_with, open, seal};
use crate::pkcs11::token_folder;

/// From the beginning of a trouble to the slot's first refusal, and from its end to its service: a deadline of 2 s for a
/// call, a test every 3 s, and 6 s until one that hangs is given up.
const NOTICED: Duration = Duration::from_secs(60);
/// Callers of the healthy slot at a time.
const CALLERS: usize = 4;
/// Round trips of each of them in the healthy slot of the sick node, after each of which there is one in the same slot of a
/// twin with no trouble. What counts is the median of either: whatever else the machine does, it does to both.
const TRIPS: usize = 60;
/// Measured so often until it is enough: what the machine does passes, what the sick slot does to its neighbour stays.
const ROUNDS: usize = 12;
/// So many times as long as in the twin a round trip takes at most: full speed, and what a median of so many is known by. In
/// a slot that waits for the other one's calls, which are given up after seconds, it takes hundreds of times as long.
const SLOWER: f64 = 1.25;

/// A way for a slot to be sick.
struct Trouble {
    name: &'static str,
    /// What the module does, to the token of slot `exchange` alone.
    rules: &'static [&'static str],
    /// What callers are told: of a call that met it, and of the slot once it has failed.
    codes: &'static [ErrorCode],
}

const TROUBLES: [Trouble; 5] = [
    Trouble {
        name: "the device fails",
        rules: &[
            "C_EncryptInit fail 30 slot-exchange",
            "C_DecryptInit fail 30 slot-exchange",
            "C_OpenSession fail 30 slot-exchange",
        ],
        codes: &[ErrorCode::SlotFailed],
    },
    Trouble {
        name: "the device has no memory",
        rules: &[
            "C_EncryptInit fail 31 slot-exchange",
            "C_DecryptInit fail 31 slot-exchange",
        ],
        codes: &[ErrorCode::TokenBusy, ErrorCode::SlotFailed],
    },
    Trouble {
        name: "every call is too slow",
        rules: &[
            "C_Encrypt delay 5000 slot-exchange",
            "C_Decrypt delay 5000 slot-exchange",
        ],
        codes: &[ErrorCode::TokenTimeout, ErrorCode::SlotFailed],
    },
    Trouble {
        name: "a call hangs",
        rules: &["C_Encrypt hang - slot-exchange", "C_Decrypt hang - slot-exchange"],
        codes: &[ErrorCode::TokenTimeout, ErrorCode::SlotFailed],
    },
    Trouble {
        name: "objects are not found",
        rules: &[
            "C_FindObjectsInit fail 30 slot-exchange",
            "C_DecryptInit fail 60 slot-exchange",
            "C_EncryptInit fail 60 slot-exchange",
        ],
        codes: &[ErrorCode::TokenBusy, ErrorCode::SlotFailed],
    },
];

/// A rule for nobody: the shim looks at the token of each call, in trouble or not.
const NO_TROUBLE: [&str; 2] = ["C_Encrypt delay 0 nobody", "C_Decrypt delay 0 nobody"];

/// How long a round trip in the healthy slot takes; it may not fail.
async fn trip(client: &Client) -> Result<Duration> {
    let begun = Instant::now();
    let sealed = seal(client, "2fa", b"meanwhile").await?;
    open(client, "2fa", &sealed).await?;
    Ok(begun.elapsed())
}

/// The median of round trips on either node: of several callers at once, each with a connection of its own to both.
async fn medians(owners: &[Client], twins: &[Client]) -> Result<[Duration; 2]> {
    let callers = owners.iter().cloned().zip(twins.iter().cloned());
    let running: Vec<JoinHandle<Result<Vec<[Duration; 2]>>>> = callers
        .map(|(own, twin)| {
            tokio::spawn(async move {
                let mut trips = Vec::with_capacity(TRIPS);
                for _ in 0..TRIPS {
                    trips.push([trip(&own).await?, trip(&twin).await?]);
                }
                anyhow::Ok(trips)
            })
        })
        .collect();
    let (mut own, mut twin) = (Vec::new(), Vec::new());
    for caller in running {
        for [here, there] in caller.await?? {
            own.push(here);
            twin.push(there);
        }
    }
    Ok([own, twin].map(|mut times| {
        times.sort_unstable();
        times[times.len() / 2]
    }))
}

/// The healthy slot's callers on one node.
fn owners(cluster: &Playground, number: u32) -> Result<Vec<Client>> {
    (0..CALLERS).map(|_| cluster.client_on("2fa-1", number)).collect()
}

/// A refusal says which it is, in its code and in words; and to version 1's clients what theirs said of whatever the
/// token could not do.
fn says(answer: &RawResponse, codes: &[ErrorCode], text: &str) -> Result<()> {
    let body = answer.text();
    let problem: Problem = serde_json::from_str(&body).with_context(|| body.clone())?;
    let code = problem.error_code().filter(|code| codes.contains(code));
    let code = code.with_context(|| format!("{body}; expected one of {codes:?}"))?;
    // Not version 1's 500: a balancer tries the next node.
    ensure!(
        (answer.status, problem.status) == (503, 503),
        "{}: {body}",
        answer.status
    );
    ensure!(problem.error == text, "{text:?} is expected: {body}");
    ensure!(
        answer.header("content-type") == Some("application/problem+json"),
        "{:?}",
        answer.header("content-type")
    );
    let passes = matches!(code, ErrorCode::TokenBusy | ErrorCode::TokenTimeout);
    ensure!(
        answer.header("retry-after") == passes.then_some("1") && problem.retryable == passes,
        "{:?}: {body}",
        answer.header("retry-after")
    );
    let named = ["slot", "token"].iter().any(|what| problem.detail.contains(what));
    ensure!(named, "it does not say what is wrong: {body}");
    Ok(())
}

/// Each operation ends with 503, sooner or later: until the trouble is noticed, copies of keys may work.
async fn refuses(client: &Client, sealed: &Sealed, codes: &[ErrorCode]) -> Result<()> {
    let headers = [("content-type", "application/json")];
    let encrypt = json!({"context": CONTEXT, "plaintext": "eA=="});
    let decrypt = json!({"context": CONTEXT, "ciphertext": sealed.ciphertext.to_string()});
    for (path, body, text) in [
        (paths::ENCRYPT, encrypt, "encryption failed"),
        (paths::DECRYPT, decrypt, "decryption failed"),
    ] {
        let what = format!("a refusal by {path}");
        let refused = until(&what, NOTICED, async || {
            let asked = client.request(Method::POST, path, &headers, body.to_string());
            match asked.await {
                Ok(answer) if answer.status == 200 => None,
                // Not the test's own time-out: the node answers.
                ended => Some(ended),
            }
        });
        let answer = refused.await??;
        println!("  {path} says: {} {}", answer.status, answer.text());
        says(&answer, codes, text)?;
    }
    Ok(())
}

/// What `hsmctl slot status` says of a node's slot.
async fn shown(cluster: &Playground, node: &Node, slot: &str) -> Result<Value> {
    let printed = cluster
        .hsmctl(&["slot", "status", "--slot", slot, "-o", "json"])
        .await?
        .ok()?;
    let lines: Vec<Value> = serde_json::from_slice(&printed)?;
    let mut own = lines.into_iter().filter(|line| line["node_id"] == node.id());
    let line = own
        .next()
        .with_context(|| format!("nothing of {} {slot}", node.id()))?;
    ensure!(
        own.next().is_none() && line["slot"] == slot,
        "{slot} is not shown once"
    );
    Ok(line)
}

/// Until the sick slot is shown in one of these states, with the reason; the other one is shown as ready.
async fn shown_sick(cluster: &Playground, node: &Node, states: &[&str]) -> Result<()> {
    let what = format!("exchange {states:?} in hsmctl slot status");
    let line = until(&what, NOTICED, async || {
        let line = shown(cluster, node, "exchange").await.ok()?;
        let state = line["state"].as_str()?;
        states.contains(&state).then_some(line)
    })
    .await?;
    let reason = line["reason"].as_str().unwrap_or_default();
    ensure!(!reason.is_empty(), "no reason: {line}");
    println!("  slot status: {}: {reason}", line["state"]);
    shown_ready(cluster, node, "2fa").await
}

async fn shown_ready(cluster: &Playground, node: &Node, slot: &str) -> Result<()> {
    let line = shown(cluster, node, slot).await?;
    ensure!(
        line["state"] == "ready" && line["reason"].is_null() && line["missing_keys"] == 0,
        "{line}"
    );
    Ok(())
}

async fn slot_is(node: &Node, slot: &str, status: u16) -> Result<()> {
    until(&format!("{status} of slot {slot}"), NOTICED, async || {
        let answer = node.health().get(&format!("/readyz?slot={slot}")).await.ok()?;
        (answer.status == status).then_some(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sick_slot_takes_nothing_from_its_neighbour_and_recovers_by_itself() -> Result<()> {
    let folder = tempfile::Builder::new().prefix("hsm-slots-").tempdir()?;
    let shim = Shim::build(folder.path(), "shim", Path::new(SOFTHSM))?;
    let cluster = alone(&shim).await?;
    // Another one in front of the same module, that nobody tells anything.
    let twin = alone(&Shim::build(folder.path(), "twin", Path::new(SOFTHSM))?).await?;
    let node = cluster.node(1);
    let (trading, owners, twins) = (
        cluster.client("trading-1")?,
        owners(&cluster, 1)?,
        owners(&twin, 1)?,
    );
    let sealed = seal(&trading, CONTEXT, b"before").await?;
    for Trouble { name, rules, codes } in TROUBLES {
        shim.obey(rules)?;
        refuses(&trading, &sealed, codes)
            .await
            .with_context(|| name.to_owned())?;
        neighbour_serves(&owners, &twins, name).await?;
        shown_sick(&cluster, &node, &["failed"])
            .await
            .with_context(|| name.to_owned())?;
        refuses(&trading, &sealed, codes)
            .await
            .with_context(|| name.to_owned())?;
        slot_is(&node, "2fa", 200).await?;
        shim.obey(&NO_TROUBLE)?;
        until(&format!("the end of: {name}"), NOTICED, async || {
            open(&trading, CONTEXT, &sealed).await.ok()
        })
        .await?;
        slot_is(&node, "exchange", 200).await?;
        shown_well(&cluster, &node)
            .await
            .with_context(|| name.to_owned())?;
    }
    cluster.passed();
    twin.passed();
    Ok(())
}

/// A node alone, whose tokens are behind the shim.
async fn alone(shim: &Shim) -> Result<Playground> {
    // The shim looks at the token of each call, in trouble or not.
    shim.obey(&NO_TROUBLE)?;
    formed_with(Playground::builder().nodes(1), |config| {
        config.replace(SOFTHSM, &shim.library().display().to_string())
    })
    .await
}

/// Until the slot that was sick is shown as ready.
async fn shown_well(cluster: &Playground, node: &Node) -> Result<()> {
    until("exchange ready in hsmctl slot status", NOTICED, async || {
        shown_ready(cluster, node, "exchange").await.ok()
    })
    .await
}

/// The owner of a PIN file writes another PIN into it.
fn write_pin(path: &Path, pin: &str) -> Result<()> {
    std::fs::write(path, pin)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(())
}

/// The neighbour of the sick slot is as quick as its twin.
async fn neighbour_serves(owners: &[Client], twins: &[Client], trouble: &str) -> Result<()> {
    let mut seen = Vec::new();
    for _ in 0..ROUNDS {
        let [own, twin] = medians(owners, twins).await?;
        println!("{trouble}: a round trip in the other slot takes {own:?}, in its twin {twin:?}");
        if own <= twin.mul_f64(SLOWER) {
            return Ok(());
        }
        seen.push((own, twin));
    }
    anyhow::bail!("{trouble}: round trips in the other slot, and in its twin: {seen:?}")
}

/// Drained, as a restart is.
async fn stop(node: &Node) -> Result<()> {
    ensure!(node.signal(Signal::SIGTERM)?, "{} does not run", node.id());
    node.wait_gone(NOTICED).await
}

/// Encrypts in the healthy slot on one connection until it is told to stop; says how often. Each request is sent once.
async fn until_told(client: Client, stop: watch::Receiver<bool>) -> Result<u64> {
    let mut done = 0;
    while !*stop.borrow() {
        let sealed = seal(&client, "2fa", b"meanwhile").await?;
        open(&client, "2fa", &sealed).await?;
        done += 1;
    }
    Ok(done)
}

/// Encrypts in the healthy slot on one connection until the node says with an answer that it closes it, and does.
async fn until_closed(mut connection: Connection, answered: watch::Sender<u64>) -> Result<u64> {
    let body = json!({"context": "2fa", "plaintext": "aGVsbG8="});
    let mut done = 0;
    loop {
        let answer = connection.ask("POST", paths::ENCRYPT, &[], &body).await?;
        ensure!(answer.status()? == 200, "after {done}: {answer:?}");
        done += 1;
        answered.send_replace(done);
        let closes = answer.header("connection");
        if closes.is_some_and(|value| value.eq_ignore_ascii_case("close")) {
            connection.until_closed().await?;
            return Ok(done);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_pin_is_put_right_without_a_restart_and_a_removed_token_with_one() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let node = cluster.node(1);
    let (trading, owners, twins) = (
        cluster.client_on("trading-1", 1)?,
        owners(&cluster, 1)?,
        owners(&cluster, 2)?,
    );
    let sealed = seal(&trading, CONTEXT, b"before").await?;

    // A slot that was ready once, and whose PIN is wrong now: as long as a right one, and tried once.
    stop(&node).await?;
    let right = std::fs::read_to_string(cluster.dir().join("secrets/exchange.pin"))?;
    let pin_file = cluster.scratch().join("exchange.pin");
    let wrong: String = right.chars().rev().collect();
    ensure!(wrong != right, "the PIN reads the same backwards");
    write_pin(&pin_file, &wrong)?;
    let config = node.config()?;
    let from_file = format!("pin_file: {}", pin_file.display());
    let changed = config.replace("pin_env: HSM_PIN_EXCHANGE", &from_file);
    ensure!(
        changed != config,
        "the playground's configuration has changed:\n{config}"
    );
    node.set_config(&changed)?;
    cluster.start_node(1).await?;
    // Others serve the slot that it does not: out of the balancer, but for its other slot.
    slot_is(&node, "2fa", 200).await?;
    let pid = node.pid().context("the node does not run")?;
    refuses(&trading, &sealed, &[ErrorCode::SlotLocked]).await?;
    slot_is(&node, "exchange", 503).await?;
    neighbour_serves(&owners, &twins, "a wrong PIN").await?;
    shown_sick(&cluster, &node, &["locked"]).await?;
    let line = shown(&cluster, &node, "exchange").await?;
    let reason = line["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains("PIN"), "the slot says: {reason:?}");
    write_pin(&pin_file, &right)?;
    until("the slot with the right PIN", NOTICED, async || {
        open(&trading, CONTEXT, &sealed).await.ok()
    })
    .await?;
    ensure!(node.pid() == Some(pid), "it was restarted");
    shown_well(&cluster, &node).await?;

    // A token that is taken away. It comes back with the module's next start only.
    let folder = token_folder(&node.dir.join("tokens"), "slot-exchange")?;
    let away = cluster.scratch().join("taken-away");
    std::fs::rename(&folder, &away)?;
    let codes = [ErrorCode::SlotFailed, ErrorCode::TokenBusy];
    refuses(&trading, &sealed, &codes).await?;
    slot_is(&node, "exchange", 503).await?;
    neighbour_serves(&owners, &twins, "a removed token").await?;
    shown_sick(&cluster, &node, &["failed", "absent"]).await?;

    // It is put back, and the node restarted: nobody who uses the other slot notices, here or elsewhere.
    std::fs::rename(&away, &folder)?;
    neighbour_serves(&owners, &twins, "a token that was put back").await?;
    let (told, stopped) = watch::channel(false);
    let mut elsewhere = Vec::new();
    for other in cluster.others(1) {
        let client = cluster.client_on("2fa-1", other.number)?;
        elsewhere.push(tokio::spawn(until_told(client, stopped.clone())));
    }
    let owner = cluster.pki().identity("2fa-1")?;
    let connection = Connection::open(&cluster.pki(), node.api_port, &owner).await?;
    let (answered, mut answers) = watch::channel(0);
    let here = tokio::spawn(until_closed(connection, answered));
    // The node stops while it is in use.
    let on_its_way = answers.wait_for(|done| *done > 1);
    tokio::time::timeout(NOTICED, on_its_way)
        .await
        .context("no answer")??;
    stop(&node).await?;
    let done = here.await?.context("on the node that stopped")?;
    ensure!(done > 1, "{done} requests on the node that stopped");
    cluster.start_node(1).await?;
    node.wait_ready(NOTICED).await?;
    open(&trading, CONTEXT, &sealed).await?;
    seal(&trading, CONTEXT, b"again").await?;
    shown_well(&cluster, &node).await?;
    told.send_replace(true);
    for caller in elsewhere {
        let done = caller.await?.context("on a node that went on")?;
        ensure!(done > 1, "{done} requests on a node that went on");
    }
    cluster.passed();
    Ok(())
}
