//! What keeps a node from starting, each with key, value and remedy; and what must not keep it from starting.

use std::net::TcpListener;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::shim::SOFTHSM;
use cluster_tests::{Node, Playground, until};
use hsm_api::admin::{SlotState, SlotStatus};
use hsm_api::client::Method;
use hsm_api::{Client, ErrorCode, paths};
use serde_json::{Value, json};

use crate::by_hand::{STARTED_WITHIN, Start};
use crate::common::{CONTEXT, open, seal};
use crate::pkcs11::token_folder;

/// From SIGTERM to the end: `server.drain` of the playground is 3.5 s.
const STOPPED_WITHIN: Duration = Duration::from_secs(30);
/// Of a supervisor's `RestartPreventExitStatus`.
const EXIT_PIN: i32 = 77;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_a_configuration_is_named_with_its_remedy() -> Result<()> {
    let cluster = Playground::start(1).await?;
    cluster.dev("down", &[]).await?;
    let (node, scratch) = (cluster.node(1), cluster.scratch());
    let start = || Start::of(&cluster, &node);

    let unset = start()?.with_env("HSM_PIN_2FA", None);
    unset
        .refused(scratch, &["hsm.slots.2fa.pin_env", "HSM_PIN_2FA", "export it"])
        .await?;
    let unset = start()?.with_env("TOKEN_REPLICATION_KEY", None);
    unset
        .refused(
            scratch,
            &["encryption_key_env", "TOKEN_REPLICATION_KEY", "export it"],
        )
        .await?;
    let twice = start()?.with("contexts: [2fa]", "contexts: [2fa, order-key]")?;
    twice
        .refused(
            scratch,
            &[
                "hsm.slots.exchange.contexts",
                "order-key",
                "hsm.slots.2fa",
                "name it in one slot only",
            ],
        )
        .await?;
    let one_token = start()?.with("label: slot-2fa", "label: slot-exchange")?;
    one_token
        .refused(
            scratch,
            &[
                "hsm.slots.exchange.label",
                "slot-exchange",
                "is the token of hsm.slots.2fa too",
                "give each slot a token of its own",
            ],
        )
        .await?;
    let both = start()?.with("  slots:\n", "  slot_id: hsm-token\n  slots:\n")?;
    both.refused(
        scratch,
        &[
            "hsm.slot_id",
            "hsm-token",
            "keep hsm.slots and remove hsm.slot_id",
        ],
    )
    .await?;
    let misspelt = start()?.with("drain:", "drian:")?;
    misspelt
        .refused(scratch, &["server.drian", "did you mean drain?"])
        .await?;
    let unreadable = start()?.with("server.crt", "absent.crt")?;
    unreadable
        .refused(
            scratch,
            &["server.tls.cert_path", "absent.crt", "give a readable PEM file"],
        )
        .await?;
    // What nobody can read, root included.
    let folder = scratch.join("folder.crt");
    std::fs::create_dir(&folder)?;
    let own = cluster
        .pki()
        .dir()
        .join("nodes")
        .join(node.id())
        .join("server.crt");
    let unreadable = start()?.with(&own.display().to_string(), &folder.display().to_string())?;
    unreadable
        .refused(
            scratch,
            &["server.tls.cert_path", "folder.crt", "give a readable PEM file"],
        )
        .await?;
    let no_pem = start()?.with("server.crt", "../../../env")?;
    no_pem
        .refused(
            scratch,
            &[
                "server.tls.cert_path",
                "/env",
                "no certificate",
                "give a PEM file with one",
            ],
        )
        .await?;
    let other_key = start()?.with("/server.key", "/cluster.key")?;
    other_key
        .refused(
            scratch,
            &[
                "server.tls.key_path",
                "cluster.key",
                "server.tls.cert_path",
                "server.crt",
                "give the key that the certificate was issued for",
            ],
        )
        .await?;
    let production = start()?.with("dev: true", "dev: false")?;
    production.refused(scratch, &["DEV", "dev: true"]).await?;
    let one_ca = start()?.with("cluster-ca.crt", "ca.crt")?;
    one_ca
        .refused(
            scratch,
            &[
                "server.tls.ca_path",
                "cluster.tls.ca_path",
                "give the cluster a CA of its own",
            ],
        )
        .await?;
    let external = start()?.with("type: raft", "type: etcd")?;
    external
        .refused(
            scratch,
            &["cluster.coordination.type", "etcd", "write `type: raft`"],
        )
        .await?;

    for (port, key) in [
        (node.api_port, "server.listen"),
        (node.health_port, "server.health_listen"),
        (node.cluster_port, "cluster.listen"),
    ] {
        let taken = TcpListener::bind(("127.0.0.1", port))?;
        let remedy = "is in use by another process; stop that one or choose another port";
        start()?
            .refused(scratch, &[key, &port.to_string(), remedy])
            .await?;
        drop(taken);
    }

    // A member with another replication key is told so before it imports anything.
    let wrong = start()?.with_env("TOKEN_REPLICATION_KEY", Some(&"5a".repeat(32)));
    wrong
        .refused(
            scratch,
            &["TOKEN_REPLICATION_KEY", "the same replication key as the others"],
        )
        .await?;

    // None of it has changed anything.
    cluster.up().await?;
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_was_never_ready_keeps_the_node_from_starting() -> Result<()> {
    let cluster = Playground::start(1).await?;
    cluster.dev("down", &[]).await?;
    let (node, scratch) = (cluster.node(1), cluster.scratch());
    let fresh = |name: &str| Start::of(&cluster, &node)?.with_fresh_data(&node, &scratch.join(name));

    let unknown = fresh("label")?.with("label: slot-2fa", "label: slot-of-nobody")?;
    unknown
        .refused(
            scratch,
            &[
                "hsm.slots.2fa.label",
                "slot-of-nobody",
                "slot-2fa",
                "make the token with: hsmctl slot init",
            ],
        )
        .await?;
    let absent = fresh("module")?.with("libsofthsm2.so", "libabsent.so")?;
    absent
        .refused(
            scratch,
            &[
                ".pkcs11_lib",
                "libabsent.so",
                "install the module, or set pkcs11_lib to its full path",
            ],
        )
        .await?;

    // One token under two slots, through two files of one module: the configuration cannot show it, the token does.
    let copy = scratch.join("another-softhsm2.so");
    std::fs::copy(SOFTHSM, &copy)?;
    let through_copy = format!("label: slot-exchange, pkcs11_lib: {copy:?}, pin_env: HSM_PIN_EXCHANGE");
    let twice = fresh("twice")?.with("label: slot-2fa, pin_env: HSM_PIN_2FA", &through_copy)?;
    twice
        .refused(
            scratch,
            &[
                "hsm.slots.exchange.label",
                "is token",
                "which hsm.slots.2fa has already",
                "give each slot a token of its own",
            ],
        )
        .await?;

    // A wrong PIN is tried once, whatever a supervisor does.
    let wrong_pin = "7K2QX9D4MZ8RBH3TWF6VPN5CJYGE";
    let wrong = fresh("pin")?.with_env("HSM_PIN_2FA", Some(wrong_pin));
    let first = wrong
        .refused(
            scratch,
            &["hsm.slots.2fa.pin_env", "HSM_PIN_2FA", "set the right one"],
        )
        .await?;
    assert_eq!(first.code, Some(EXIT_PIN), "{}", first.said);
    // Every C_Login writes this file.
    let token = token_folder(&node.dir.join("tokens"), "slot-2fa")?.join("token.object");
    let written = std::fs::read(&token)?;
    for _ in 0..5 {
        let again = wrong
            .refused(
                scratch,
                &[
                    "hsm.slots.2fa.pin_env",
                    "HSM_PIN_2FA",
                    "not tried again; set the right one",
                ],
            )
            .await?;
        assert_eq!(again.code, Some(EXIT_PIN), "{}", again.said);
        ensure!(!again.said.contains(wrong_pin), "the PIN is in the log");
        ensure!(
            std::fs::read(&token)? == written,
            "the refused PIN was tried again"
        );
    }
    // A short one is not tried at all.
    let short = fresh("short")?.with_env("HSM_PIN_2FA", Some("1234"));
    short
        .refused(
            scratch,
            &[
                "hsm.slots.2fa.pin_env",
                "HSM_PIN_2FA",
                "128 random bits",
                "make one with hsmctl slot init",
            ],
        )
        .await?;
    // With the right one the token is as it was: both slots are open, and the node runs until it is stopped. It
    // belongs to no cluster, so that is as ready as it gets.
    let right = fresh("pin")?.spawn(scratch)?;
    let opened = until("both slots open", STARTED_WITHIN, async || {
        let status = cluster.status(node.number).await?;
        let ready = |slot: &SlotStatus| slot.state == SlotState::Ready;
        (status.slots.len() == 2 && status.slots.iter().all(ready)).then_some(())
    })
    .await;
    // Whatever became of it, it says why in the end.
    let _ = right.stop();
    let right = right.ended(STOPPED_WITHIN).await?;
    opened.with_context(|| format!("with the right PIN: {}", right.said))?;
    assert_eq!(right.code, Some(0), "stopped: {}", right.said);
    cluster.passed();
    Ok(())
}

/// Version 1's `/health`: 503 as soon as one key cannot be used, and which one that is; the names for clients alone.
async fn says_that_one_key_is_gone(node: &Node, client: &Client) -> Result<()> {
    let keys = json!({ "kek-2fa-v1": "unavailable", "kek-exchange-key-v1": "available" });
    let answer = client
        .request(Method::GET, paths::HEALTH, &[], Vec::new())
        .await?;
    let open = node.patient().get(paths::HEALTH).await?;
    for (answer, keys) in [(answer, keys), (open, json!({}))] {
        let expected = json!({ "status": "degraded", "hsm_available": false, "kek_status": keys });
        let said: Value = serde_json::from_str(&answer.text())?;
        ensure!(
            (answer.status, &said) == (503, &expected),
            "{} {said:#}",
            answer.status
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_was_ready_fails_alone() -> Result<()> {
    let cluster = Playground::start(1).await?;
    let node = cluster.node(1);
    let trading = cluster.client("trading-1")?;
    let sealed = seal(&trading, CONTEXT, b"before").await?;
    let config = node.config()?;

    // Its token is gone: another label has the same effect, and loses nothing. Or its module is.
    let module = "label: slot-2fa, pkcs11_lib: /absent/libabsent.so";
    for (instead, state, named) in [
        (
            "label: slot-of-nobody",
            SlotState::Absent,
            ["hsm.slots.2fa.label", "hsmctl slot init"],
        ),
        (
            module,
            SlotState::Failed,
            ["hsm.slots.2fa.pkcs11_lib", "install the module"],
        ),
    ] {
        let changed = config.replace("label: slot-2fa", instead);
        ensure!(changed != config, "{config}");
        node.kill().await?;
        node.set_config(&changed)?;
        cluster.start_node(1).await?;
        // A slot that nobody serves makes nobody unready.
        node.wait_ready(STARTED_WITHIN).await?;
        open(&trading, CONTEXT, &sealed).await?;
        seal(&trading, CONTEXT, b"meanwhile").await?;
        let outcome = cluster
            .client("2fa-1")?
            .encrypt(&hsm_api::data::EncryptRequest::new("2fa", b"x"))
            .await;
        let code = outcome.err().and_then(|error| error.code());
        assert_eq!(code, Some(ErrorCode::SlotFailed), "{instead}");
        assert_eq!(node.patient().get("/readyz?slot=exchange").await?.status, 200);
        assert_eq!(node.patient().get("/readyz?slot=2fa").await?.status, 503);
        says_that_one_key_is_gone(&node, &trading).await?;
        let status = cluster.status(1).await.context("no status")?;
        let slot = status
            .slots
            .iter()
            .find(|slot| slot.slot == "2fa")
            .context("no slot 2fa in status")?;
        let reason = slot.reason.as_deref().unwrap_or_default();
        ensure!(slot.state == state && reason.contains(named[1]), "{slot:?}");
        // It started, and all the same the log has what a refusal would have said.
        let loudly = |line: &str| line.contains("\"ERROR\"") && named.iter().all(|word| line.contains(word));
        until(&format!("{named:?} in its log"), STARTED_WITHIN, async || {
            node.log().lines().any(loudly).then_some(())
        })
        .await?;
    }

    // Put right, it serves again.
    node.kill().await?;
    node.set_config(&config)?;
    cluster.start_node(1).await?;
    node.wait_ready(STARTED_WITHIN).await?;
    seal(&cluster.client("2fa-1")?, "2fa", b"again").await?;
    assert_eq!(node.patient().get(paths::HEALTH).await?.status, 200);
    cluster.passed();
    Ok(())
}

/// Somebody tried a wrong PIN: the node's own is not tried until an administrator allows one more attempt.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_strangers_wrong_pin_one_attempt_has_to_be_allowed() -> Result<()> {
    let cluster = Playground::start(1).await?;
    let node = cluster.node(1);
    let sealed = seal(&cluster.client("2fa-1")?, "2fa", b"before").await?;
    cluster.dev("down", &[]).await?;
    let guess = std::process::Command::new("pkcs11-tool")
        .args([
            "--module",
            "/usr/lib/softhsm/libsofthsm2.so",
            "--token-label",
            "slot-2fa",
        ])
        .args(["--login", "--pin", "env:TEST_PIN", "--list-objects"])
        .env("SOFTHSM2_CONF", node.dir.join("softhsm2.conf"))
        .env("TEST_PIN", "a wrong guess")
        .output()
        .context("pkcs11-tool: install opensc")?;
    ensure!(!guess.status.success(), "the guess was right");
    cluster.start_node(1).await?;
    // The slot that nobody serves makes nobody unready, and its neighbour serves.
    node.wait_ready(STARTED_WITHIN).await?;
    seal(&cluster.client("trading-1")?, CONTEXT, b"meanwhile").await?;
    let slot = ["slot", "unlock", "--slot", "2fa"];
    let refused = async |more: &[&str], code: &str, word: &str| -> Result<()> {
        let output = cluster.hsmctl(&[&slot[..], more].concat()).await?;
        let said = &output.stderr;
        ensure!(
            output.code != Some(0) && said.contains(code) && said.contains(word),
            "{more:?}: {output:?}"
        );
        Ok(())
    };
    refused(&[], "slot_locked", "hsmctl slot unlock --slot 2fa --retry").await?;
    let stranger = cluster
        .hsmctl_as("trading-1", &["slot", "unlock", "--slot", "2fa", "--retry"], &[])
        .await?;
    ensure!(stranger.stderr.contains("role_required"), "{stranger:?}");
    let unknown = cluster.hsmctl(&["slot", "unlock", "--slot", "3fa"]).await?;
    ensure!(unknown.stderr.contains("it has 2fa, exchange"), "{unknown:?}");
    let unlocked = cluster
        .hsmctl(&["slot", "unlock", "--slot", "2fa", "--retry"])
        .await?
        .ok()?;
    ensure!(
        String::from_utf8_lossy(&unlocked).contains("ready"),
        "{}",
        String::from_utf8_lossy(&unlocked)
    );
    until("slot 2fa serving", STARTED_WITHIN, async || {
        open(&cluster.client("2fa-1").ok()?, "2fa", &sealed).await.ok()
    })
    .await?;
    until("slot.unlock in the audit", STARTED_WITHIN, async || {
        node.log().contains("slot.unlock").then_some(())
    })
    .await?;
    // Unlocking what is open changes nothing.
    cluster.hsmctl(&["slot", "unlock", "--slot", "2fa"]).await?.ok()?;
    cluster.passed();
    Ok(())
}
