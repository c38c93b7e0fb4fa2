//! Secrets are planted, and then looked for in everything a node leaves behind: logs, Raft's files and snapshots,
//! tokens, configuration, process arguments. A process's environment is not looked at: the playground hands
//! secrets over in it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use cluster_tests::{Playground, until};
use hsm_api::admin::JoinTokenRequest;
use hsm_api::client::Method;
use hsm_api::paths;

use crate::common::{CONTEXT, formed_with, open_everywhere, seal};

/// Something that must be nowhere.
struct Canary {
    what: String,
    bytes: Vec<u8>,
}

impl Canary {
    fn new(what: impl Into<String>, bytes: impl Into<Vec<u8>>) -> Self {
        Self {
            what: what.into(),
            bytes: bytes.into(),
        }
    }

    /// As it is, and as it travels.
    fn of_text(what: &str, text: &str) -> Vec<Self> {
        vec![
            Self::new(what, text),
            Self::new(format!("{what} in base64"), STANDARD.encode(text)),
        ]
    }

    fn is_in(&self, haystack: &[u8]) -> bool {
        haystack
            .windows(self.bytes.len())
            .any(|window| window == self.bytes)
    }
}

fn files_below(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            files_below(&path, found)?;
        } else {
            found.push(path);
        }
    }
    Ok(())
}

fn look_for(canaries: &[Canary], content: &[u8], whence: &str) -> Result<()> {
    for canary in canaries {
        ensure!(!canary.is_in(content), "{} is in {whence}", canary.what);
    }
    Ok(())
}

/// Makes entries until every node has written a snapshot of all that is committed now; says up to where that is.
async fn force_snapshots(cluster: &Playground) -> Result<u64> {
    let mut last = 0.0_f64;
    for node in cluster.nodes() {
        let index = node.metrics().await?.sum("hsm_raft_last_log_index");
        last = last.max(index.context("no last log index")?);
    }
    let admin = cluster.client("admin")?;
    let request = JoinTokenRequest {
        ttl_seconds: Some(60),
        node_id: None,
    };
    until("snapshots on all nodes", Duration::from_secs(60), async || {
        admin.create_join_token(&request).await.ok()?;
        for node in cluster.nodes() {
            let covered = node.metrics().await.ok()?.sum("hsm_raft_snapshot_index")?;
            if covered < last {
                return None;
            }
        }
        Some(())
    })
    .await?;
    // An index, as the metrics give it.
    Ok(last as u64)
}

/// Up to which index a file is a snapshot: `data/snapshots/INDEX-TERM.snapshot`.
fn snapshot_index(file: &Path) -> Option<u64> {
    if file.extension()? != "snapshot" {
        return None;
    }
    let (index, _) = file.file_stem()?.to_str()?.split_once('-')?;
    index.parse().ok()
}

/// A crash leaves no core file behind, and the process cannot raise its limit again.
fn check_no_core_dump(pid: i32) -> Result<()> {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let core = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max core file size"))
        .context("no limit of core files")?;
    let words: Vec<&str> = core.split_whitespace().collect();
    ensure!(words.starts_with(&["0", "0"]), "core files up to {core}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_secret_is_left_anywhere() -> Result<()> {
    let builder = Playground::builder().env("HSM_LOG_LEVEL", "debug");
    // Snapshots soon, and logs that are cut behind them.
    let cluster = formed_with(builder, |config| {
        let raft = "cluster:\n  raft: {snapshot_every: 20, keep_logs: 20}\n  enabled: true\n";
        config.replace("cluster:\n  enabled: true\n", raft)
    })
    .await?;
    let mut canaries = Vec::new();
    for file in ["exchange.pin", "2fa.pin", "exchange.so-pin", "2fa.so-pin"] {
        let secret = std::fs::read_to_string(cluster.dir().join("secrets").join(file))?;
        canaries.extend(Canary::of_text(file, secret.trim()));
    }
    let key = std::fs::read_to_string(cluster.dir().join("secrets/replication.key"))?;
    canaries.push(Canary::new(
        "the replication key's bytes",
        hex::decode(key.trim())?,
    ));
    canaries.extend(Canary::of_text("the replication key", key.trim()));

    // Plaintexts in requests that succeed, that are refused, and that are broken.
    let planted = |number: u32| format!("PLANTED-{number}-PLAINTEXT-canary-{}", "x".repeat(40));
    let trading = cluster.client("trading-1")?;
    let mut acknowledged = Vec::new();
    for number in 0..6 {
        let client = cluster.client_on("trading-1", number % 3 + 1)?;
        acknowledged.push(seal(&client, CONTEXT, planted(number).as_bytes()).await?);
        canaries.extend(Canary::of_text("a plaintext", &planted(number)));
        if number % 2 == 0 {
            cluster.client("admin")?.rotate(CONTEXT, None).await?;
        }
    }
    open_everywhere(&cluster, "trading-1", CONTEXT, &acknowledged).await?;
    let refused = planted(100);
    canaries.extend(Canary::of_text("a refused plaintext", &refused));
    for body in [
        format!(
            r#"{{"context":"2fa","plaintext":"{}"}}"#,
            STANDARD.encode(&refused)
        ),
        format!(r#"{{"context":"exchange-key","plaintext":"{}"}}"#, refused),
        format!(
            r#"{{"context":"exchange-key","plaintext":"{}"#,
            STANDARD.encode(&refused)
        ),
    ] {
        let answer = trading
            .request(
                Method::POST,
                paths::ENCRYPT,
                &[("content-type", "application/json")],
                body.into_bytes(),
            )
            .await?;
        ensure!(
            answer.status >= 400,
            "a broken request was answered with {}",
            answer.status
        );
        look_for(&canaries, &answer.body, "an error's body")?;
    }
    let token = cluster.hsmctl(&["cluster", "token", "-o", "json"]).await?.ok()?;
    let token: serde_json::Value = serde_json::from_slice(&token)?;
    let token = token["token"].as_str().context("no token")?;
    let secret = token.rsplit('.').next().context("no secret part")?;
    canaries.extend(Canary::of_text("a join token", token));
    canaries.push(Canary::new("a join token's secret", secret));

    let planted_until = force_snapshots(&cluster).await?;
    let mut searched = 0;
    for node in cluster.nodes() {
        let pid = node
            .pid()
            .with_context(|| format!("{} does not run", node.id()))?;
        check_no_core_dump(pid).with_context(|| node.id())?;
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline"))?;
        look_for(&canaries, &arguments, &format!("the arguments of {}", node.id()))?;
    }
    // Once while they run, once at rest: sled writes when it likes.
    for round in ["running", "stopped"] {
        if round == "stopped" {
            cluster.dev("down", &[]).await?;
        }
        for node in cluster.nodes() {
            let (mut files, mut snapshots) = (Vec::new(), 0);
            files_below(&node.dir, &mut files)?;
            for file in files {
                // Files of the store come and go while it runs.
                let Ok(content) = std::fs::read(&file) else {
                    continue;
                };
                look_for(&canaries, &content, &format!("{} ({round})", file.display()))?;
                searched += 1;
                if snapshot_index(&file).is_some_and(|index| index >= planted_until) {
                    // Of everything planted, and in a form in which it would be found.
                    let known = Canary::new("the context's name", CONTEXT);
                    ensure!(known.is_in(&content), "{} hides its rows", file.display());
                    snapshots += 1;
                }
            }
            ensure!(
                snapshots > 0 || round == "running",
                "{} has no snapshot up to {planted_until}",
                node.id()
            );
        }
    }
    ensure!(searched > 20, "only {searched} files were searched");
    // The search itself finds what is there.
    let env = std::fs::read(cluster.dir().join("env"))?;
    ensure!(
        look_for(&canaries, &env, "env").is_err(),
        "the search finds nothing anywhere"
    );
    cluster.passed();
    Ok(())
}
