//! One sick token beside a healthy one, in one module: whatever the sick one does, its own contexts say why they are
//! not served, the other slot serves as before, and nobody restarts anything when it is well again.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::shim::{SOFTHSM, Shim};
use cluster_tests::{Node, Playground, until};
use hsm_api::data::{DecryptRequest, EncryptRequest};
use hsm_api::{Client, ClientError};
use nix::sys::signal::Signal;

use crate::common::{CONTEXT, Sealed, formed_with, open, seal};
use crate::pkcs11::token_folder;

/// From the beginning of a trouble to the slot's first refusal, and from its end to its service: a deadline of 2 s for a
/// call, a test every 3 s, and 30 s until one that hangs is given up.
const NOTICED: Duration = Duration::from_secs(60);
/// How long the healthy slot is measured in each trouble.
const MEASURED: Duration = Duration::from_secs(2);
/// The part of its own rate that the healthy slot keeps. Both share two cores with the test and the sick slot's
/// tests of itself; a slot that waits for the other one keeps nothing of it.
const KEPT: f64 = 0.5;

/// Each with what the module does, to the token of slot `exchange` alone.
const TROUBLES: [(&str, &[&str]); 5] = [
    (
        "the device fails",
        &[
            "C_EncryptInit fail 30 slot-exchange",
            "C_DecryptInit fail 30 slot-exchange",
            "C_OpenSession fail 30 slot-exchange",
        ],
    ),
    (
        "the device has no memory",
        &[
            "C_EncryptInit fail 31 slot-exchange",
            "C_DecryptInit fail 31 slot-exchange",
        ],
    ),
    (
        "every call is too slow",
        &[
            "C_Encrypt delay 5000 slot-exchange",
            "C_Decrypt delay 5000 slot-exchange",
        ],
    ),
    (
        "a call hangs",
        &["C_Encrypt hang - slot-exchange", "C_Decrypt hang - slot-exchange"],
    ),
    (
        "objects are not found",
        &[
            "C_FindObjectsInit fail 30 slot-exchange",
            "C_DecryptInit fail 60 slot-exchange",
            "C_EncryptInit fail 60 slot-exchange",
        ],
    ),
];

/// A rule for nobody: the shim looks at the token of each call, in trouble or not.
const NO_TROUBLE: [&str; 2] = ["C_Encrypt delay 0 nobody", "C_Decrypt delay 0 nobody"];

/// Round trips of the healthy slot in a second, none of which may fail.
async fn rate(client: &Client) -> Result<f64> {
    let begun = Instant::now();
    let mut trips = 0_u32;
    while begun.elapsed() < MEASURED {
        let sealed = seal(client, "2fa", b"meanwhile").await?;
        open(client, "2fa", &sealed).await?;
        trips += 1;
    }
    Ok(f64::from(trips) / begun.elapsed().as_secs_f64())
}

/// Each operation ends with 503, sooner or later: until the trouble is noticed, copies of keys may work.
async fn refuses(client: &Client, sealed: &Sealed) -> Result<()> {
    let refused = |error: Option<ClientError>| match error {
        // Not the test's own time-out: the node answers.
        Some(error) if error.status() == Some(503) => Some(Ok(error)),
        Some(error) => Some(Err(error)),
        None => None,
    };
    let encrypted = until("a refused encryption", NOTICED, async || {
        refused(client.encrypt(&EncryptRequest::new(CONTEXT, b"x")).await.err())
    });
    let said = encrypted.await??;
    println!("  it says: {said}");
    let decrypted = until("a refused decryption", NOTICED, async || {
        let request = DecryptRequest::new(CONTEXT, sealed.ciphertext.clone());
        refused(client.decrypt(&request).await.err())
    });
    decrypted.await??;
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
    let cluster = formed_with(Playground::builder().nodes(1), |config| {
        config.replace(SOFTHSM, &shim.library().display().to_string())
    })
    .await?;
    let node = cluster.node(1);
    let (trading, owner) = (cluster.client("trading-1")?, cluster.client("2fa-1")?);
    let sealed = seal(&trading, CONTEXT, b"before").await?;
    shim.obey(&NO_TROUBLE)?;
    let well = rate(&owner).await?;
    println!("well: {well:.0} round trips a second");
    for (trouble, rules) in TROUBLES {
        println!("{trouble}:");
        shim.obey(rules)?;
        refuses(&trading, &sealed)
            .await
            .with_context(|| trouble.to_owned())?;
        let sick = rate(&owner).await.with_context(|| trouble.to_owned())?;
        println!("  the other slot: {sick:.0} round trips a second");
        ensure!(
            sick >= KEPT * well,
            "{trouble}: {sick:.0} of {well:.0} round trips a second"
        );
        refuses(&trading, &sealed)
            .await
            .with_context(|| trouble.to_owned())?;
        slot_is(&node, "2fa", 200).await?;
        shim.obey(&NO_TROUBLE)?;
        until(&format!("the end of: {trouble}"), NOTICED, async || {
            open(&trading, CONTEXT, &sealed).await.ok()
        })
        .await?;
        slot_is(&node, "exchange", 200).await?;
    }
    cluster.passed();
    Ok(())
}

/// The owner of a PIN file writes another PIN into it.
fn write_pin(path: &Path, pin: &str) -> Result<()> {
    std::fs::write(path, pin)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(())
}

/// The trouble lasts until something is put right; the neighbour has half of its rate at least, in trouble and after.
async fn neighbour_serves(owner: &Client, well: f64, trouble: &str) -> Result<()> {
    let now = rate(owner).await.with_context(|| trouble.to_owned())?;
    println!("{trouble}: the other slot: {now:.0} round trips a second");
    ensure!(
        now >= KEPT * well,
        "{trouble}: {now:.0} of {well:.0} round trips a second"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_pin_is_put_right_without_a_restart_and_a_removed_token_with_one() -> Result<()> {
    let cluster = Playground::start(1).await?;
    let node = cluster.node(1);
    let (trading, owner) = (cluster.client("trading-1")?, cluster.client("2fa-1")?);
    let sealed = seal(&trading, CONTEXT, b"before").await?;
    let well = rate(&owner).await?;

    // A slot that was ready once, and whose PIN is wrong now: as long as a right one, and tried once.
    cluster.dev("down", &[]).await?;
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
    node.wait_ready(NOTICED).await?;
    let pid = node.pid().context("the node does not run")?;
    refuses(&trading, &sealed).await?;
    slot_is(&node, "exchange", 503).await?;
    neighbour_serves(&owner, well, "a wrong PIN").await?;
    let status = cluster.status(1).await.context("no status")?;
    let slot = status.slots.iter().find(|slot| slot.slot == "exchange");
    let reason = slot.and_then(|slot| slot.reason.clone()).unwrap_or_default();
    ensure!(reason.contains("PIN"), "the slot says: {reason:?}");
    write_pin(&pin_file, &right)?;
    until("the slot with the right PIN", NOTICED, async || {
        open(&trading, CONTEXT, &sealed).await.ok()
    })
    .await?;
    ensure!(node.pid() == Some(pid), "it was restarted");

    // A token that is taken away. It comes back with the module's next start only.
    let folder = token_folder(&node.dir.join("tokens"), "slot-exchange")?;
    let away = cluster.scratch().join("taken-away");
    std::fs::rename(&folder, &away)?;
    refuses(&trading, &sealed).await?;
    slot_is(&node, "exchange", 503).await?;
    neighbour_serves(&owner, well, "a removed token").await?;
    std::fs::rename(&away, &folder)?;
    neighbour_serves(&owner, well, "a token that was put back").await?;
    node.signal(Signal::SIGTERM)?;
    node.wait_gone(NOTICED).await?;
    cluster.start_node(1).await?;
    node.wait_ready(NOTICED).await?;
    open(&trading, CONTEXT, &sealed).await?;
    seal(&trading, CONTEXT, b"again").await?;
    cluster.passed();
    Ok(())
}
