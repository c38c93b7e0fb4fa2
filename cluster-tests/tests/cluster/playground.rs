//! `hsmctl dev` and the other commands as people use them: what they print, how they end, what they refuse.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use cluster_tests::{Identity, Playground, until};
use x509_parser::prelude::{AttributeTypeAndValue, FromDer, X509Certificate};

use crate::common::{json, mode};

/// What takes a moment, on a machine that stands still now and then.
const SOON: Duration = Duration::from_secs(30);

/// The last CN and OU of a certificate's subject.
fn subject(identity: &Identity) -> Result<(String, String)> {
    let der = identity.der()?;
    let (_, certificate) =
        X509Certificate::from_der(&der).map_err(|error| anyhow!("certificate: {error}"))?;
    let name = certificate.subject();
    let last = |part: Option<&AttributeTypeAndValue<'_>>| -> Result<String> {
        let value = part.context("it is not there")?.as_str();
        Ok(value.map_err(|error| anyhow!("{error}"))?.to_owned())
    };
    Ok((
        last(name.iter_common_name().last()).context("CN")?,
        last(name.iter_organizational_unit().last()).context("OU")?,
    ))
}

/// What a shell prints that has read the playground's `env`, as a strict one, which was somebody else before.
fn sourced(cluster: &Playground, script: &str) -> Result<String> {
    let output = std::process::Command::new("sh")
        .args(["-euc", &format!(". \"$1\"; {script}"), "sh"])
        .arg(cluster.dir().join("env"))
        .env("HSMCTL_PROFILE", "nobody")
        .env("HSMCTL_ENDPOINTS", "https://127.0.0.1:9")
        .stdin(Stdio::null())
        .output()
        .context("sh")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{script}: {said}");
    Ok(String::from_utf8(output.stdout)?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_commands_of_the_readme_work() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let endpoint = |number: u32| cluster.node(number).endpoint();

    // Everything is there and private.
    assert_eq!(mode(cluster.dir())?, 0o700);
    for file in [
        "env",
        "pki/ca.crt",
        "pki/clients/admin.key",
        "secrets/2fa.pin",
        "node1/config.yaml",
        "node1/log",
    ] {
        assert_eq!(mode(&cluster.dir().join(file))?, 0o600, "{file}");
    }
    for (name, unit) in [
        ("trading-1", "Trading"),
        ("trading-2", "Trading"),
        ("2fa-1", "2FA"),
        ("admin", "Admin"),
        ("auditor", "Auditor"),
        ("officer-1", "Officer"),
        ("officer-2", "Officer"),
        ("officer-3", "Officer"),
        ("nobody", "Nobody"),
    ] {
        let key = cluster.dir().join(format!("pki/clients/{name}.key"));
        assert_eq!(mode(&key)?, 0o600, "{name}");
        let who = subject(&cluster.pki().identity(name)?)?;
        assert_eq!(who, (name.to_owned(), unit.to_owned()));
    }

    // With `env` a plain hsmctl is the administrator, whoever it was before; and the nodes' secrets are there.
    let hsmctl = cluster_tests::binary("hsmctl")?;
    let whoami = sourced(&cluster, &format!("exec '{}' whoami -o json", hsmctl.display()))?;
    let whoami = json(whoami.as_bytes())?;
    assert_eq!((&whoami["cn"], &whoami["ou"]), (&"admin".into(), &"Admin".into()));
    for (variable, file) in [
        ("HSM_PIN_EXCHANGE", "exchange.pin"),
        ("HSM_PIN_2FA", "2fa.pin"),
        ("TOKEN_REPLICATION_KEY", "replication.key"),
    ] {
        let secret = std::fs::read_to_string(cluster.dir().join("secrets").join(file))?;
        let exported = sourced(&cluster, &format!("exec printenv {variable}"))?;
        ensure!(
            exported.trim() == secret.trim(),
            "{variable} is not what is in {file}"
        );
        ensure!(secret.trim().len() >= 28, "{file} has {} bytes", secret.len());
    }

    // Encrypt, pipe, decrypt.
    let encrypt = ["encrypt", "--context", "exchange-key", "--endpoint", &endpoint(1)];
    let sealed = cluster.hsmctl_as("trading-1", &encrypt, b"hello").await?.ok()?;
    let decrypt = ["decrypt", "--context", "exchange-key", "--endpoint", &endpoint(3)];
    assert_eq!(
        cluster.hsmctl_as("trading-2", &decrypt, &sealed).await?.ok()?,
        b"hello"
    );
    let mut as_json = decrypt.to_vec();
    as_json.extend(["-o", "json"]);
    let opened = json(&cluster.hsmctl_as("trading-1", &as_json, &sealed).await?.ok()?)?;
    assert_eq!(opened["plaintext"], STANDARD.encode("hello"));

    // Look around. A leader whose machine has just stood still has heard of nobody for a moment.
    let status = until("a cluster that tolerates a failure", SOON, async || {
        let status = cluster.hsmctl(&["cluster", "status", "-o", "json"]).await.ok()?;
        let status = json(&status.ok().ok()?).ok()?;
        (status["failure_tolerance"] == 1 && status["ready"] == true).then_some(status)
    })
    .await?;
    assert_eq!(status["cluster_name"], "playground");
    let members = json(
        &cluster
            .hsmctl(&["cluster", "members", "-o", "json"])
            .await?
            .ok()?,
    )?;
    assert_eq!(members["members"].as_array().map(Vec::len), Some(3));
    let all = json(
        &cluster
            .hsmctl(&["cluster", "status", "--all", "-o", "json"])
            .await?
            .ok()?,
    )?;
    assert_eq!(all.as_array().map(Vec::len), Some(3));
    let table = String::from_utf8(cluster.hsmctl(&["list-kek", "--verbose"]).await?.ok()?)?;
    for word in ["exchange-key", "kek-2fa-v1", "shared", "active"] {
        ensure!(table.contains(word), "{word} is not in\n{table}");
    }
    let whoami = json(&cluster.hsmctl(&["whoami", "-o", "json"]).await?.ok()?)?;
    assert_eq!(whoami["cn"], "admin");

    // Rotate through a follower, and see it.
    let rotated = json(
        &cluster
            .hsmctl(&["rotate", "exchange-key", "-o", "json"])
            .await?
            .ok()?,
    )?;
    assert_eq!(
        (&rotated["version"], &rotated["previous_version"]),
        (&2.into(), &1.into())
    );
    // Whichever node is asked hears of it a moment later.
    until(
        "version 2 in rotation-status",
        Duration::from_secs(30),
        async || {
            let rotation = cluster.hsmctl(&["rotation-status", "-o", "json"]).await.ok()?;
            let rotation = json(&rotation.ok().ok()?).ok()?;
            let mut contexts = rotation["contexts"].as_array()?.iter();
            let exchange = contexts.find(|context| context["context"] == "exchange-key")?;
            (exchange["active_version"] == 2).then_some(())
        },
    )
    .await?;

    // dev status, kill, start.
    let running = json(&cluster.dev("status", &["-o", "json"]).await?)?;
    let nodes = running.as_array().context("no array")?;
    ensure!(
        nodes
            .iter()
            .all(|node| node["ready"] == true && node["pid"].is_number()),
        "{running}"
    );
    cluster.dev("kill", &["--node", "2"]).await?;
    let running = json(&cluster.dev("status", &["-o", "json"]).await?)?;
    ensure!(
        running[1]["pid"].is_null() && running[1]["ready"] == false,
        "{running}"
    );
    let again = cluster
        .hsmctl(&[
            "dev",
            "kill",
            "--node",
            "2",
            "--dir",
            &cluster.dir().display().to_string(),
        ])
        .await?;
    ensure!(
        again.code == Some(4) && again.stderr.contains("does not run"),
        "{again:?}"
    );
    cluster.start_node(2).await?;
    cluster.wait_ready(&cluster.nodes()).await?;

    // Told to stop and started again at once: the new process is not taken for the old one.
    cluster.dev("kill", &["--node", "3", "--signal", "TERM"]).await?;
    ensure!(
        cluster.node(3).pid().is_none(),
        "dev kill did not wait for its end"
    );
    cluster.start_node(3).await?;
    cluster.wait_ready(&cluster.nodes()).await?;
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_have_their_exit_codes() -> Result<()> {
    let cluster = Playground::start(1).await?;
    let encrypt = ["encrypt", "--context", "exchange-key"];
    let code = async |profile: &str, args: &[&str]| {
        let output = cluster.hsmctl_as(profile, args, b"x").await?;
        ensure!(
            output.stdout.is_empty() || output.code == Some(0),
            "a result with a failure: {output:?}"
        );
        anyhow::Ok(output.code)
    };
    assert_eq!(code("trading-1", &encrypt).await?, Some(0));
    assert_eq!(code("trading-1", &["no-such-command"]).await?, Some(2));
    assert_eq!(code("trading-1", &["encrypt"]).await?, Some(2));
    assert_eq!(code("../admin", &encrypt).await?, Some(2));
    assert_eq!(code("nobody", &encrypt).await?, Some(3));
    assert_eq!(code("trading-1", &["rotate", "exchange-key"]).await?, Some(3));
    assert_eq!(code("admin", &["cluster", "init"]).await?, Some(4));
    let dead = [
        "encrypt",
        "--context",
        "exchange-key",
        "--timeout",
        "1",
        "--endpoint",
        "https://127.0.0.1:9",
    ];
    assert_eq!(code("trading-1", &dead).await?, Some(5));
    let decrypt = ["decrypt", "--context", "exchange-key"];
    assert_eq!(
        cluster.hsmctl_as("trading-1", &decrypt, b"AAAA").await?.code,
        Some(1)
    );

    // Under the old names: one code, the PIN is ignored and warned about.
    let hsmctl = cluster_tests::binary("hsmctl")?;
    let links = cluster.scratch().join("v1");
    std::fs::create_dir(&links)?;
    for name in ["hsm-admin", "create-kek"] {
        std::os::unix::fs::symlink(&hsmctl, links.join(name))?;
    }
    let pki = cluster.dir().join("pki");
    let run = |name: &str, args: &[&str]| {
        std::process::Command::new(links.join(name))
            .args(args)
            .env("HSMCTL_ENDPOINTS", cluster.node(1).endpoint())
            .env("HSMCTL_PKI", &pki)
            .env("HSMCTL_PROFILE", "admin")
            .stdin(Stdio::null())
            .output()
    };
    let output = run("create-kek", &["kek-order-key-v1", "1234-planted", "1"])?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{said}");
    ensure!(
        said.contains("DEPRECATED: use 'hsmctl create-kek --label kek-order-key-v1'"),
        "{said}"
    );
    ensure!(said.contains("WARNING") && !said.contains("planted"), "{said}");
    let output = run("hsm-admin", &["list-kek"])?;
    let listed = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success() && listed.contains("kek-order-key-v1"),
        "{listed}"
    );
    assert_eq!(run("hsm-admin", &["no-such-command"])?.status.code(), Some(1));
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_up_is_continued() -> Result<()> {
    let cluster = Playground::builder().unformed().start().await?;
    for node in cluster.nodes() {
        ensure!(!node.is_ready().await, "{} is ready without a cluster", node.id());
    }
    // Killed at several moments, it goes on where it was.
    let hsmctl = cluster_tests::binary("hsmctl")?;
    for sign in ["makes the cluster", "node 2: joins", "makes its first key"] {
        let log = cluster.scratch().join("up.log");
        let file = std::fs::File::create(&log)?;
        let mut child = tokio::process::Command::new(&hsmctl)
            .args(["dev", "up", "--dir"])
            .arg(cluster.dir())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .kill_on_drop(true)
            .spawn()?;
        until(sign, Duration::from_secs(60), async || {
            let said = std::fs::read_to_string(&log).unwrap_or_default();
            (said.contains(sign) || child.try_wait().ok()?.is_some()).then_some(())
        })
        .await?;
        child.kill().await?;
    }
    cluster.up().await?;
    let status = until("a cluster that tolerates a failure", SOON, async || {
        let status = cluster.status(1).await?;
        (status.failure_tolerance == 1).then_some(status)
    })
    .await?;
    let keks = cluster.client("admin")?.list_keks().await?.into_body();
    for context in ["exchange-key", "2fa"] {
        let found = keks.contexts.iter().find(|info| info.context == context);
        ensure!(
            found.is_some_and(|info| info.active_version.is_some()),
            "{context}: {keks:?}"
        );
    }
    // Down and up again: the same cluster.
    cluster.dev("down", &[]).await?;
    for node in cluster.nodes() {
        ensure!(node.pid().is_none(), "{} still runs", node.id());
    }
    cluster.up().await?;
    let again = cluster.status(1).await.context("no status")?;
    assert_eq!(again.cluster_id, status.cluster_id);
    cluster.passed();
    Ok(())
}
