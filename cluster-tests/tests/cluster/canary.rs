//! Secrets are planted, and then looked for in everything a node leaves behind: logs, Raft's files, tokens,
//! configuration, process arguments.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use cluster_tests::Playground;
use hsm_api::client::Method;
use hsm_api::paths;

use crate::common::{CONTEXT, open_everywhere, seal};

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_secret_is_left_anywhere() -> Result<()> {
    let cluster = Playground::builder()
        .env("HSM_LOG_LEVEL", "debug")
        .start()
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

    let mut searched = 0;
    for node in cluster.nodes() {
        let pid = node
            .pid()
            .with_context(|| format!("{} does not run", node.id()))?;
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline"))?;
        look_for(&canaries, &arguments, &format!("the arguments of {}", node.id()))?;
    }
    // Once while they run, once at rest: sled writes when it likes.
    for round in ["running", "stopped"] {
        if round == "stopped" {
            cluster.dev("down", &[]).await?;
        }
        for node in cluster.nodes() {
            let mut files = Vec::new();
            files_below(&node.dir, &mut files)?;
            for file in files {
                // Files of the store come and go while it runs.
                let Ok(content) = std::fs::read(&file) else {
                    continue;
                };
                look_for(&canaries, &content, &format!("{} ({round})", file.display()))?;
                searched += 1;
            }
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
