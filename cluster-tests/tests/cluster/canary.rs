//! Secrets are planted, and then looked for in everything a node leaves behind: logs, Raft's files and snapshots,
//! tokens, configuration, process arguments. A process's environment is not looked at: the playground hands
//! secrets over in it.

use std::collections::BTreeSet;
use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use cluster_tests::{Playground, until};
use hsm_api::admin::JoinTokenRequest;
use hsm_api::client::Method;
use hsm_api::paths;

use crate::common::{CONTEXT, formed_with, open_everywhere_soon, seal};

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

    /// As it is, as it travels, and as it would be printed by whoever forgot what it is.
    fn of(what: &str, secret: impl AsRef<[u8]>) -> Vec<Self> {
        let bytes = secret.as_ref();
        let debug = format!("{bytes:?}");
        vec![
            Self::new(what, bytes),
            Self::new(format!("{what} in base64"), STANDARD.encode(bytes)),
            Self::new(format!("{what} in hex"), hex::encode(bytes)),
            Self::new(
                format!("{what} as a list of bytes"),
                debug.trim_matches(['[', ']']),
            ),
        ]
    }

    /// From one first byte to the next, as `skip_until` finds them: this is built without optimisation.
    fn is_in(&self, haystack: &[u8]) -> bool {
        let Some((first, rest)) = self.bytes.split_first() else {
            return true;
        };
        let mut left = haystack;
        while left.skip_until(*first).is_ok_and(|skipped| skipped > 0) {
            if !rest.is_empty() && left.starts_with(rest) {
                return true;
            }
        }
        false
    }
}

/// The arguments of every process of this machine, looked at again and again: programs come and go.
struct Arguments {
    stop: Arc<AtomicBool>,
    looking: JoinHandle<BTreeSet<Vec<u8>>>,
}

impl Arguments {
    fn watch() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let looking = std::thread::spawn(move || {
            let mut seen = BTreeSet::new();
            while !stopped.load(Ordering::Relaxed) {
                for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
                    // One that has ended meanwhile, and what is no process, has none.
                    let arguments = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
                    seen.insert(arguments);
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            seen
        });
        Self { stop, looking }
    }

    fn seen(self) -> Result<BTreeSet<Vec<u8>>> {
        self.stop.store(true, Ordering::Relaxed);
        self.looking
            .join()
            .map_err(|_| anyhow!("the watch of /proc panicked"))
    }
}

/// The secrets that `hsmctl dev` has made for its tokens.
fn pins(playground: &Path) -> Result<Vec<Canary>> {
    let mut canaries = Vec::new();
    for file in ["exchange.pin", "2fa.pin", "exchange.so-pin", "2fa.so-pin"] {
        let secret = std::fs::read_to_string(playground.join("secrets").join(file))?;
        canaries.extend(Canary::of(file, secret.trim()));
    }
    Ok(canaries)
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
    until("snapshots on all nodes", Duration::from_secs(120), async || {
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
    let forming = formed_with(builder, |config| {
        let raft = "cluster:\n  raft: {snapshot_every: 20, keep_logs: 20}\n  enabled: true\n";
        config.replace("cluster:\n  enabled: true\n", raft)
    });
    let arguments = Arguments::watch();
    // Beside it a playground that makes its tokens itself, as those of tests do not.
    let scratch = tempfile::Builder::new().prefix("hsm-canary-").tempdir()?;
    let own = scratch.path().join("own");
    let making = tokio::process::Command::new(cluster_tests::binary("hsmctl")?)
        .args(["dev", "up", "--prepare-only", "--nodes", "1", "--dir"])
        .arg(&own)
        .env_remove("HSM_PKCS11_LIB")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let (cluster, made) = tokio::join!(forming, making);
    let (cluster, made) = (cluster?, made?);
    ensure!(made.status.success(), "hsmctl dev up --prepare-only: {made:?}");
    let arguments = arguments.seen()?;
    let mut canaries = pins(cluster.dir())?;
    let key = std::fs::read_to_string(cluster.dir().join("secrets/replication.key"))?;
    let key_bytes = hex::decode(key.trim())?;
    canaries.extend(Canary::of("the replication key's bytes", key_bytes));
    canaries.extend(Canary::of("the replication key", key.trim()));
    let of_own = pins(&own)?;
    for line in &arguments {
        let whence = String::from_utf8_lossy(line).replace('\0', " ");
        look_for(&canaries, line, &whence)?;
        look_for(&of_own, line, &whence)?;
    }
    for program in ["slot\0init", "dev\0up", "hsm-node\0--config"] {
        let known = Canary::new(program, program);
        let found = arguments.iter().any(|line| known.is_in(line));
        ensure!(found, "the watch has not seen {program:?}");
    }

    // Plaintexts in requests that succeed, that are refused, and that are broken.
    let planted = |number: u32| format!("PLANTED-{number}-PLAINTEXT-canary-{}", "x".repeat(40));
    let trading = cluster.client("trading-1")?;
    let mut acknowledged = Vec::new();
    for number in 0..6 {
        let client = cluster.client_on("trading-1", number % 3 + 1)?;
        acknowledged.push(seal(&client, CONTEXT, planted(number).as_bytes()).await?);
        canaries.extend(Canary::of("a plaintext", planted(number)));
        if number % 2 == 0 {
            cluster.client("admin")?.rotate(CONTEXT, None).await?;
        }
    }
    open_everywhere_soon(&cluster, "trading-1", CONTEXT, &acknowledged).await?;
    let refused = planted(100);
    canaries.extend(Canary::of("a refused plaintext", &refused));
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
    canaries.extend(Canary::of("a join token", token));
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
