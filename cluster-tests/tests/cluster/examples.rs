//! The files of `config-examples/`, run: each in a folder of its own that its relative paths point into, as it stands
//! but for addresses, the cluster's name, and the playground's CA, which is marked DEV.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use cluster_tests::until;
use hsm_api::ErrorCode;
use hsm_api::data::EncryptRequest;
use serde_json::Value;

use crate::common::{CONTEXT, Sealed, open, seal_under};
use crate::site::{MODULE, PATIENT, STARTED, Site, version_1s_site};

/// Encrypts, rotates, is killed, comes back with everything, and ends when it is told to.
async fn serves_alone(site: &Site) -> Result<()> {
    site.check().await?;
    let mut node = site.start().await?;
    site.wait_ready().await?;
    site.create(&[CONTEXT, "2fa"]).await?;
    let (trading, other) = (site.client("trading-1")?, site.client("2fa-1")?);
    let code = seal_under(&other, "2fa", b"123456", 1).await?;
    let before = seal_under(&trading, CONTEXT, b"before", 1).await?;
    let rotated = site
        .client("admin")?
        .with_retry(PATIENT)
        .rotate(CONTEXT, None)
        .await?;
    ensure!(rotated.version == 2, "rotated to version {}", rotated.version);
    let after = seal_under(&trading, CONTEXT, b"after", 2).await?;

    node.kill().await?;
    let node = site.start().await?;
    site.wait_ready().await?;
    let (trading, other) = (site.client("trading-1")?, site.client("2fa-1")?);
    for sealed in [&before, &after] {
        open(&trading, CONTEXT, sealed).await?;
    }
    open(&other, "2fa", &code).await?;
    drop((trading, other));
    site.stop(node).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_standalone_example_founds_itself_and_survives_a_kill() -> Result<()> {
    let site = Site::of(
        "standalone.yaml",
        &[
            ("ca.crt", "ca.crt"),
            ("server.crt", "nodes/hsm-node-1/server.crt"),
            ("server.key", "nodes/hsm-node-1/server.key"),
        ],
    )
    .await?;
    site.token("slot-exchange", "secrets/exchange.pin")?;
    site.token("slot-2fa", "credentials/hsm-pin-2fa")?;
    let (api, health) = (site.api(), site.health());
    let credentials = site.folder.join("credentials").display().to_string();
    let site = site
        .with("127.0.0.1:8443", &api)?
        .with("127.0.0.1:8444", &health)?
        .with("data_dir: data\n", "data_dir: data\ndev: true\n")?
        .with_env("CREDENTIALS_DIRECTORY", credentials);
    serves_alone(&site).await.with_context(|| site.log())?;
    site.passed();
    Ok(())
}

async fn founds(site: &Site) -> Result<()> {
    site.check().await?;
    let node = site.start().await?;
    site.client("admin")?.with_retry(PATIENT).cluster_init().await?;
    site.wait_ready().await?;
    site.create(&[CONTEXT, "2fa"]).await?;
    let trading = site.client("trading-1")?;
    let sealed = seal_under(&trading, CONTEXT, b"text", 1).await?;
    open(&trading, CONTEXT, &sealed).await?;
    drop(trading);
    site.stop(node).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_example_of_a_clusters_node_founds_one() -> Result<()> {
    let site = Site::of(
        "cluster-node.yaml",
        &[
            ("ca.crt", "ca.crt"),
            ("node1.crt", "nodes/hsm-node-1/server.crt"),
            ("node1.key", "nodes/hsm-node-1/server.key"),
            ("cluster-ca.crt", "cluster-ca.crt"),
            ("node1-cluster.crt", "nodes/hsm-node-1/cluster.crt"),
            ("node1-cluster.key", "nodes/hsm-node-1/cluster.key"),
        ],
    )
    .await?;
    let exchange = site.token("slot-exchange", "secrets/exchange.pin")?;
    let two_factor = site.token("slot-2fa", "secrets/2fa.pin")?;
    let (api, health, cluster) = (site.api(), site.health(), site.cluster());
    let site = site
        .with("127.0.0.1:8443", &api)?
        .with("127.0.0.1:8444", &health)?
        .with("127.0.0.1:8445", &cluster)?
        .with("\ndev: false\n", "\ndev: true\n")?
        .with("name: production", "name: playground")?
        .with_env("HSM_PIN_EXCHANGE", exchange)
        .with_env("HSM_PIN_2FA", two_factor)
        .with_env("TOKEN_REPLICATION_KEY", "5a".repeat(32));
    founds(&site).await.with_context(|| site.log())?;
    site.passed();
    Ok(())
}

/// What version 1's users have: one token with a PIN that anybody can guess.
async fn serves_as_version_1_did(site: &Site) -> Result<()> {
    site.check().await?;
    let node = site.start().await?;
    site.wait_ready().await?;
    site.create(&[CONTEXT, "2fa"]).await?;
    let trading = site.client("trading-1")?;
    let sealed = seal_under(&trading, CONTEXT, b"planted plaintext", 1).await?;
    open(&trading, CONTEXT, &sealed).await?;
    drop(trading);
    site.stop(node).await?;
    logs_as_version_1_did(site, &sealed)?;
    starts_again_without_a_list(site, &sealed).await?;
    let log = site.log();
    for warned in [
        "revoked.yaml is not there; nobody is revoked",
        "revoked.yaml is not there; what it has said before stays revoked",
        "its PIN may be short, as in v1",
        "metadata_file",
        "initial_window_size",
    ] {
        ensure!(log.contains(warned), "no word of {warned:?}");
    }
    serves_by_variables(site, &sealed).await
}

/// Each line is in the file of its kind, whole, and none has what nobody may read.
fn logs_as_version_1_did(site: &Site, sealed: &Sealed) -> Result<()> {
    let read = |name: &str| -> Result<Vec<Value>> {
        let path = site.folder.join("logs").join(name);
        let mode = fs::metadata(&path)
            .with_context(|| path.display().to_string())?
            .permissions()
            .mode();
        ensure!(mode & 0o777 == 0o600, "{name} has mode {mode:o}");
        let text = fs::read_to_string(path)?;
        for secret in [
            String::from_utf8_lossy(&sealed.plaintext).into_owned(),
            STANDARD.encode(&sealed.plaintext),
            STANDARD.encode(sealed.ciphertext.as_slice()),
        ] {
            ensure!(!text.contains(&secret), "{name} has {secret:?}: {text}");
        }
        let lines = text.lines().map(serde_json::from_str::<Value>);
        lines
            .collect::<Result<_, serde_json::Error>>()
            .with_context(|| format!("{name}: {text}"))
    };
    let (error, audit, access) = (read("error.log")?, read("audit.log")?, read("access.log")?);
    let are = |lines: &[Value], target: &str| lines.iter().all(|line| line["target"] == target);
    let has = |lines: &[Value], field: &str, value: &str| lines.iter().any(|line| line[field] == value);
    ensure!(
        are(&audit, "audit") && has(&audit, "action", "key.create"),
        "{audit:?}"
    );
    ensure!(are(&access, "access"), "{access:?}");
    ensure!(has(&error, "message", "started"), "{error:?}");
    let others = ["audit", "access"]
        .iter()
        .any(|target| has(&error, "target", target));
    ensure!(!others, "{error:?}");
    for path in ["/encrypt", "/decrypt"] {
        let is_it =
            |line: &&Value| line["path"] == path && line["status"] == 200 && line["client_cn"] == "trading-1";
        // Each has succeeded once; before that it may have been tried.
        ensure!(access.iter().filter(is_it).count() == 1, "{path}: {access:?}");
    }
    // Standard error has what is said before there is a log, and after.
    ensure!(!site.read("log").contains("\"message\":\"started\""));
    Ok(())
}

/// Version 1 had no list of revocations until somebody was revoked, and looked for one all the time.
async fn starts_again_without_a_list(site: &Site, sealed: &Sealed) -> Result<()> {
    let list = site.folder.join("pki/revoked.yaml");
    ensure!(!list.exists(), "there is a list");
    let node = site.start().await?;
    site.wait_ready().await?;
    open(&site.client("trading-1")?, CONTEXT, sealed).await?;
    seal_under(&site.client_named("gone", Some("Trading"))?, CONTEXT, b"mine", 1).await?;
    fs::write(
        &list,
        "revoked:\n  - cn: gone\n    reason: lost\n    date: 2025-01-01\n",
    )?;
    is_refused(site, "gone").await?;
    fs::remove_file(&list)?;
    site.stop(node).await
}

/// Until a client is refused as revoked.
async fn is_refused(site: &Site, cn: &str) -> Result<()> {
    until("the refusal of who is in the list", STARTED, async || {
        let client = site.client_named(cn, Some("Trading")).ok()?;
        let refused = client.encrypt(&EncryptRequest::new(CONTEXT, b"x")).await.err()?;
        (refused.code() == Some(ErrorCode::CertificateRevoked)).then_some(())
    })
    .await
}

/// The same node, told by version 1's variables. What its file says of the same things it could not start with.
async fn serves_by_variables(site: &Site, sealed: &Sealed) -> Result<()> {
    let at = |name: &str| site.folder.join(name);
    // Under names that only the variables have.
    std::os::unix::fs::symlink(MODULE, at("module.so"))?;
    for (name, of_the_example) in [
        ("a.crt", "ca.crt"),
        ("s.crt", "server.crt"),
        ("s.key", "server.key"),
    ] {
        fs::rename(at("pki").join(of_the_example), at(name))?;
    }
    let config = format!(
        "dev: true\nserver:\n  listen: 127.0.0.1:1\n  health_listen: {}\n  \
         tls: {{ca_path: absent, cert_path: absent, key_path: absent}}\n\
         hsm:\n  pkcs11_lib: /absent\n  slot_id: absent\n  keys: {{exchange-key: {{mode: shared}}, 2fa: {{}}}}\n\
         logging: {{level: error, format: json}}\n",
        site.health()
    );
    fs::write(at("by-variables.yaml"), config)?;
    fs::remove_file(at("config.yaml"))?;
    let port = site.playground().node(1).api_port.to_string();
    let before = site.read("log").len();
    let mut command = site.hsm_node()?;
    command.envs([
        ("CONFIG_PATH", "by-variables.yaml"),
        ("HSM_SERVER_PORT", port.as_str()),
        ("HSM_SERVER_CERT", "s.crt"),
        ("HSM_SERVER_KEY", "s.key"),
        ("HSM_SERVER_CA", "a.crt"),
        ("HSM_PKCS11_LIB", "./module.so"),
        ("HSM_SLOT_ID", "hsm-token"),
        ("HSM_PIN", "1234"),
        ("HSM_LOG_LEVEL", "info,hsm_node=debug"),
        ("HSM_LOG_FORMAT", "text"),
    ]);
    let node = site.started(command).await?;
    site.wait_ready().await?;
    let trading = site.client("trading-1")?;
    open(&trading, CONTEXT, sealed).await?;
    seal_under(&trading, CONTEXT, b"by variables", 1).await?;
    // The list is gone, and this configuration names none.
    is_refused(site, "gone").await?;
    drop(trading);
    site.stop(node).await?;
    let log = site.read("log");
    let lines: Vec<&str> = log.get(before..).unwrap_or_default().lines().collect();
    let first = lines.first().context("it has logged nothing")?;
    ensure!(!first.starts_with('{'), "that is JSON: {first}");
    ensure!(
        lines
            .iter()
            .any(|line| line.contains("DEBUG") && line.contains("hsm_node")),
        "nothing of level debug"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn version_1s_example_warns_and_serves() -> Result<()> {
    let site = version_1s_site().await?;
    // As a site is where nobody was revoked yet, and looked at more often than every 30 s.
    fs::remove_file(site.folder.join("pki/revoked.yaml"))?;
    let list = "revoked_file: pki/revoked.yaml";
    let site = site.with(list, &format!("revoked_check_interval_ms: 100\n  {list}"))?;
    serves_as_version_1_did(&site).await.with_context(|| site.log())?;
    site.passed();
    Ok(())
}
