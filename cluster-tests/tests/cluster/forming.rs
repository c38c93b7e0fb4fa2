//! How a cluster is made without `hsmctl dev`, by the commands that an operator has: tokens with their PINs, a founder,
//! join tokens, a first key.

use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::{Playground, until};

use crate::common::{json, mode, softhsm_conf};

const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";

/// hsmctl as the administrator, in a session of its own: it has no terminal, whatever this test has.
fn without_terminal(cluster: &Playground, args: &[&str]) -> Result<std::process::Output> {
    let pki = cluster.dir().join("pki");
    std::process::Command::new("setsid")
        .arg("--wait")
        .arg(cluster_tests::binary("hsmctl")?)
        .args(args)
        .env("HSMCTL_CA", pki.join("ca.crt"))
        .env("HSMCTL_PKI", pki)
        .env("HSMCTL_PROFILE", "admin")
        .stdin(Stdio::null())
        .output()
        .context("setsid: install util-linux")
}

/// What an operator does without `hsmctl dev`: found, make tokens for the others, let them join, make a key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_is_formed_by_its_own_commands() -> Result<()> {
    let cluster = Playground::builder().unformed().start().await?;
    let endpoint = |number: u32| cluster.node(number).endpoint();
    let founded = ["cluster", "init", "--endpoint", &endpoint(1), "-o", "json"];
    let founded = json(&cluster.hsmctl(&founded).await?.ok()?)?;
    for number in [2, 3] {
        let node = cluster.node(number);
        // Any member will do: the third asks one that does not lead.
        let leader = format!("127.0.0.1:{}", cluster.node(number - 1).cluster_port);
        let token = [
            "cluster",
            "token",
            "--node",
            &node.id(),
            "--endpoint",
            &endpoint(1),
            "-o",
            "json",
        ];
        let token = cluster.hsmctl(&token).await?.ok()?;
        let file = cluster.scratch().join(format!("join-{number}.json"));
        std::fs::write(&file, &token)?;
        let shown = file.display().to_string();
        let join = [
            "cluster",
            "join",
            "--endpoint",
            &node.endpoint(),
            "--leader",
            &leader,
            "--token-file",
            &shown,
            "--yes",
            "-o",
            "json",
        ];
        // Whoever has the token can join: others may not read it.
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644))?;
        let refused = cluster.hsmctl(&join).await?;
        ensure!(
            refused.code != Some(0) && refused.stderr.contains("chmod 600"),
            "{refused:?}"
        );
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600))?;
        // Nobody said that its slots' keys are its own, and nobody can be asked: nothing is done.
        let unasked: Vec<&str> = join.iter().copied().filter(|arg| *arg != "--yes").collect();
        let refused = without_terminal(&cluster, &unasked)?;
        ensure!(
            refused.status.code() == Some(2) && String::from_utf8_lossy(&refused.stderr).contains("--yes"),
            "{refused:?}"
        );
        let before = cluster.client_on("admin", number)?.slot_keys().await?.into_body();
        assert_eq!(before.slots.len(), 2, "{before:?}");
        let joined = json(&cluster.hsmctl(&join).await?.ok()?)?;
        ensure!(
            joined["role"] == "voter" && joined["cluster_id"] == founded["cluster_id"],
            "{joined}"
        );
        // What was shown before is what is registered, and what a member goes on saying.
        assert_eq!(joined["slots"], serde_json::to_value(&before.slots)?);
        let after = cluster.client_on("admin", number)?.slot_keys().await?.into_body();
        assert_eq!(after, before);
        // It lets one node join, once.
        let again = cluster.hsmctl(&join).await?;
        ensure!(again.code == Some(4), "{again:?}");
    }
    let made = ["create-kek", "--context", "exchange-key", "-o", "json"];
    let made = json(&cluster.hsmctl(&made).await?.ok()?)?;
    ensure!(made["version"] == 1 && made["state"] == "active", "{made}");
    cluster.wait_ready(&cluster.nodes()).await?;
    for (here, there) in [(1, 3), (2, 1), (3, 2)] {
        let encrypt = [
            "encrypt",
            "--context",
            "exchange-key",
            "--endpoint",
            &endpoint(here),
        ];
        let plaintext = format!("from {here} to {there}");
        // A follower hears of the first key a moment after it was acknowledged.
        let sealed = until("the first key", Duration::from_secs(30), async || {
            let output = cluster
                .hsmctl_as("trading-1", &encrypt, plaintext.as_bytes())
                .await;
            output.ok()?.ok().ok()
        })
        .await?;
        let decrypt = [
            "decrypt",
            "--context",
            "exchange-key",
            "--endpoint",
            &endpoint(there),
        ];
        let opened = cluster.hsmctl_as("trading-2", &decrypt, &sealed).await?.ok()?;
        ensure!(
            opened == plaintext.as_bytes(),
            "{plaintext}: {}",
            String::from_utf8_lossy(&opened)
        );
    }
    cluster.passed();
    Ok(())
}

#[test]
fn a_fresh_token_is_made_with_pins_that_nobody_had_to_think_of() -> Result<()> {
    let folder = tempfile::Builder::new().prefix("hsm-slot-").tempdir()?;
    let at = |name: &str| folder.path().join(name);
    std::fs::create_dir(at("tokens"))?;
    softhsm_conf(&at("softhsm2.conf"), &at("tokens"))?;
    let init = || -> Result<std::process::Output> {
        Ok(std::process::Command::new(cluster_tests::binary("hsmctl")?)
            .args(["slot", "init", "--label", "fresh", "-o", "json"])
            .args(["--module", MODULE, "--pin-file"])
            .arg(at("pin"))
            .arg("--so-pin-file")
            .arg(at("so-pin"))
            .env("SOFTHSM2_CONF", at("softhsm2.conf"))
            .stdin(Stdio::null())
            .output()?)
    };
    let output = init()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{said}");
    let made = json(&output.stdout)?;
    ensure!(
        made["label"] == "fresh" && made["serial"].as_str().is_some_and(|serial| !serial.is_empty()),
        "{made}"
    );
    let (pin, so_pin) = (
        std::fs::read_to_string(at("pin"))?,
        std::fs::read_to_string(at("so-pin"))?,
    );
    ensure!(
        pin.len() == 28 && so_pin.len() == 28 && pin != so_pin,
        "PINs of {} and {} characters",
        pin.len(),
        so_pin.len()
    );
    for file in ["pin", "so-pin"] {
        assert_eq!(mode(&at(file))?, 0o600, "{file}");
    }
    let shown = String::from_utf8_lossy(&output.stdout).into_owned() + &said;
    ensure!(
        !shown.contains(&pin) && !shown.contains(&so_pin),
        "a PIN was shown"
    );
    // Another program logs in with it.
    let listed = std::process::Command::new("pkcs11-tool")
        .args(["--module", MODULE, "--token-label", "fresh"])
        .args(["--login", "--pin", "env:TEST_PIN", "--list-objects"])
        .env("SOFTHSM2_CONF", at("softhsm2.conf"))
        .env("TEST_PIN", &pin)
        .output()
        .context("pkcs11-tool: install opensc")?;
    ensure!(
        listed.status.success(),
        "{}",
        String::from_utf8_lossy(&listed.stderr)
    );
    // A second one is not made in its place.
    let again = init()?;
    let said = String::from_utf8_lossy(&again.stderr);
    ensure!(
        !again.status.success() && said.contains("initialised already"),
        "{said}"
    );
    Ok(())
}
