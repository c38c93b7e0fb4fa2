//! Nodes killed inside `C_Login` and inside the writes of an import: strace does it, in system calls that are
//! counted through, so that every state in which a kill can leave a token's files comes up. Whatever it was, the
//! node comes back by itself with every key.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use cluster_tests::{Node, Playground, until};
use hsm_api::client::Retry;
use tempfile::TempDir;

use crate::common::{CONTEXT, Sealed, check_settled, context_on, open, open_everywhere, seal};
use crate::pkcs11::{Token, copy_folder, token_folder};

/// From a start to readiness, or to the kill.
const STARTED: Duration = Duration::from_secs(60);
/// strace writes its file a little later.
const WRITTEN: Duration = Duration::from_secs(10);
/// More calls of one kind than a thread makes before the kill that is looked for.
const MOST: u32 = 40;
/// Key versions to import: enough for any thread that imports to import several.
const VERSIONS: usize = 12;

/// What nodes are started as: hsm-node, or hsm-node under strace while a test says how.
struct Program {
    folder: TempDir,
    node: PathBuf,
}

impl Program {
    fn new() -> Result<Self> {
        let program = Self {
            folder: tempfile::Builder::new().prefix("hsm-killed-").tempdir()?,
            node: cluster_tests::binary("hsm-node")?,
        };
        program.plain()?;
        Ok(program)
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("node")
    }

    fn plain(&self) -> Result<()> {
        self.write("")
    }

    /// The tracer is a grandchild (`-D`): the pid that the playground knows is the node's own. Without
    /// `--seccomp-bpf`, which takes no signals at the calls that it stops.
    fn traced(&self, options: &str) -> Result<()> {
        self.write(&format!(
            "strace -D -f -q -y -e signal=KILL,USR1 {options} -o \"${{2%/*}}/strace\" "
        ))
    }

    fn write(&self, before: &str) -> Result<()> {
        let text = format!("#!/bin/sh\nexec {before}'{}' \"$@\"\n", self.node.display());
        fs::write(self.path(), text)?;
        fs::set_permissions(self.path(), fs::Permissions::from_mode(0o700))?;
        Ok(())
    }
}

/// `-P` for a path: strace then looks at calls on this file only.
fn only(path: &Path) -> String {
    format!("-P '{}' ", path.display())
}

/// SIGKILL cancels the call that it meets. SIGUSR1 kills just the same, because no node handles it, but only
/// once the call is done.
fn inject(call: &str, signal: &str, nth: u32) -> String {
    format!("-e trace={call} -e inject={call}:signal={signal}:when={nth}")
}

/// Object files in all tokens of a folder.
fn objects(tokens: &Path) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(tokens)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            continue;
        }
        for file in fs::read_dir(entry.path())? {
            if Path::new(&file?.file_name())
                .extension()
                .is_some_and(|ext| ext == "object")
            {
                count += 1;
            }
        }
    }
    Ok(count)
}

/// Ciphertexts of both slots, acknowledged while nothing was wrong.
struct Acknowledged {
    exchange: Vec<Sealed>,
    own: Sealed,
}

/// The node that is killed.
struct Victim<'a> {
    cluster: &'a Playground,
    program: &'a Program,
    node: Node,
    tokens: PathBuf,
}

impl<'a> Victim<'a> {
    /// A node that does not lead: the others go on without an election.
    async fn of(cluster: &'a Playground, program: &'a Program) -> Result<Self> {
        let leader = cluster.leader().await?;
        let node = cluster.others(leader.node)[0].clone();
        Ok(Self {
            cluster,
            program,
            tokens: node.dir.join("tokens"),
            node,
        })
    }

    /// Starts it anew under strace. True if a call has killed it, false once it is ready.
    async fn dies(&self, options: &str) -> Result<bool> {
        self.node.kill().await?;
        if self.trace().exists() {
            fs::remove_file(self.trace())?;
        }
        self.program.traced(options)?;
        // Fails if the node dies before it listens.
        let started = self.cluster.start_node(self.node.number).await;
        self.program.plain()?;
        let died = until("a kill, or readiness", STARTED, async || match self.node.pid() {
            None => Some(true),
            Some(_) => self.node.is_ready().await.then_some(false),
        })
        .await
        .with_context(|| options.to_owned())?;
        if died {
            self.was_killed()
                .await
                .with_context(|| format!("{options}: {started:?}"))?;
        }
        Ok(died)
    }

    fn trace(&self) -> PathBuf {
        self.node.dir.join("strace")
    }

    /// It has not ended in any other way.
    async fn was_killed(&self) -> Result<()> {
        until("strace's word of the kill", WRITTEN, async || {
            let trace = fs::read_to_string(self.trace()).ok()?;
            trace.contains("+++ killed by SIG").then_some(())
        })
        .await
    }

    /// Starts it as always; returns what it has said by the time it was ready.
    async fn comes_back(&self) -> Result<String> {
        let before = self.node.log().len();
        self.cluster.start_node(self.node.number).await?;
        self.node.wait_ready(STARTED).await?;
        let log = self.node.log();
        Ok(log.get(before..).unwrap_or_default().to_owned())
    }

    /// Every slot is well, every key is there once, and everything acknowledged opens here.
    async fn is_whole(&self, expected: usize, acknowledged: &Acknowledged) -> Result<()> {
        let found = objects(&self.tokens)?;
        ensure!(
            found == expected,
            "{found} objects in its tokens instead of {expected}"
        );
        let metrics = self.node.metrics().await?;
        for state in metrics.all("hsm_slot_state") {
            let ready = state.labels.get("state").is_some_and(|name| name == "ready");
            ensure!(state.value == f64::from(u8::from(ready)), "{state:?}");
        }
        ensure!(metrics.sum("hsm_keys_missing") == Some(0.0), "keys are missing");
        let trading = self.cluster.client_on("trading-1", self.node.number)?;
        for sealed in &acknowledged.exchange {
            open(&trading, CONTEXT, sealed)
                .await
                .with_context(|| format!("version {}", sealed.version))?;
        }
        seal(&trading, CONTEXT, b"after a kill").await?;
        let owner = self.cluster.client_on("2fa-1", self.node.number)?;
        open(&owner, "2fa", &acknowledged.own).await
    }
}

async fn acknowledge(cluster: &Playground, versions: usize) -> Result<Acknowledged> {
    let mut exchange = vec![seal(&cluster.client("trading-1")?, CONTEXT, b"exchange").await?];
    while exchange.len() < versions {
        cluster.client("admin")?.rotate(CONTEXT, None).await?;
        exchange.push(seal(&cluster.client("trading-1")?, CONTEXT, b"exchange").await?);
    }
    let own = seal(&cluster.client("2fa-1")?, "2fa", b"2fa").await?;
    Ok(Acknowledged { exchange, own })
}

async fn cluster_of(program: &Program) -> Result<Playground> {
    Playground::builder()
        .env("HSM_NODE_BIN", program.path())
        .start()
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_inside_a_login_costs_no_token() -> Result<()> {
    let program = Program::new()?;
    let cluster = cluster_of(&program).await?;
    let acknowledged = acknowledge(&cluster, 1).await?;
    let victim = Victim::of(&cluster, &program).await?;
    let whole = objects(&victim.tokens)?;
    let files: Vec<PathBuf> = ["slot-exchange", "slot-2fa"]
        .into_iter()
        .map(|label| Ok(token_folder(&victim.tokens, label)?.join("token.object")))
        .collect::<Result<_>>()?;
    let filter: String = files.iter().map(|file| only(file)).collect();
    let empty = || -> Result<usize> {
        let mut count = 0;
        for file in &files {
            count += usize::from(fs::metadata(file)?.len() == 0);
        }
        Ok(count)
    };

    // C_Login cuts the file to nothing, then writes it anew.
    for (call, leaves_empty) in [("ftruncate", false), ("write", true)] {
        let mut kills = 0;
        loop {
            let nth = kills + 1;
            ensure!(nth <= MOST, "{call}: no end of it");
            if !victim
                .dies(&format!("{filter}{}", inject(call, "KILL", nth)))
                .await?
            {
                break;
            }
            kills = nth;
            let emptied = empty()?;
            ensure!(
                emptied == usize::from(leaves_empty),
                "{call} {nth}: {emptied} files are empty"
            );
            let said = victim
                .comes_back()
                .await
                .with_context(|| format!("{call} {nth}"))?;
            ensure!(
                said.contains("it was restored from its copy") == leaves_empty,
                "{call} {nth}: {said}"
            );
            victim
                .is_whole(whole, &acknowledged)
                .await
                .with_context(|| format!("{call} {nth}"))?;
        }
        // Both tokens were logged in to.
        ensure!(kills >= 2, "only {kills} kills in {call}");
    }

    // Killed once more while the file is put back: the copy is still there.
    ensure!(
        victim
            .dies(&format!("{filter}{}", inject("write", "KILL", 1)))
            .await?,
        "it lives"
    );
    let partial: String = files
        .iter()
        .map(|file| only(&file.with_extension("object.partial")))
        .collect();
    ensure!(
        victim
            .dies(&format!("{partial}{}", inject("rename", "KILL", 1)))
            .await?,
        "it lives"
    );
    ensure!(empty()? == 1, "the kill came too late");
    let said = victim.comes_back().await?;
    ensure!(said.contains("it was restored from its copy"), "{said}");
    victim.is_whole(whole, &acknowledged).await?;
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_inside_any_write_of_an_import_is_made_good_by_importing_again() -> Result<()> {
    let program = Program::new()?;
    let cluster = cluster_of(&program).await?;
    let acknowledged = acknowledge(&cluster, VERSIONS).await?;
    let victim = Victim::of(&cluster, &program).await?;
    let whole = objects(&victim.tokens)?;
    // Tokens that have everything to import: transport keys by their grants, then the KEKs.
    victim.node.kill().await?;
    let mut forgotten = 0;
    for slot in ["exchange", "2fa"] {
        forgotten += Token::of(&cluster, &victim.node, slot).forget_keys()?;
    }
    ensure!(
        forgotten == VERSIONS as u64 + 3,
        "{forgotten} keys were in the tokens"
    );
    let lacking = cluster.scratch().join("lacking");
    copy_folder(&victim.tokens, &lacking)?;
    let few = objects(&lacking)?;
    let folder = token_folder(&lacking, "slot-exchange")?;
    let folder = victim.tokens.join(folder.file_name().context("no name")?);

    // An object is stored three times, each time cut to nothing and written: empty, complete but no token object
    // yet, final. Between the first two the token's generation is written; at the end all of it is synced.
    let all = String::new();
    let generation = only(&folder.join("generation"));
    let folder_only = only(&folder);
    let mut said = String::new();
    for (filter, call, signal, wanted) in [
        (&all, "ftruncate", "KILL", 3),
        (&all, "ftruncate", "USR1", 3),
        (&generation, "write", "KILL", 2),
        (&folder_only, "fsync", "KILL", 2),
    ] {
        let mut kills_in_imports = 0;
        // strace counts by thread. The first ones are those of the thread that opens the tokens.
        for nth in 1..=MOST {
            victim.node.kill().await?;
            fs::remove_dir_all(&victim.tokens)?;
            copy_folder(&lacking, &victim.tokens)?;
            let what = format!("{filter}{}", inject(call, signal, nth));
            ensure!(
                victim.dies(&what).await?,
                "{what}: it lives, after {kills_in_imports} kills in imports"
            );
            if objects(&victim.tokens)? > few {
                kills_in_imports += 1;
            }
            said += &victim.comes_back().await.with_context(|| what.clone())?;
            victim.is_whole(whole, &acknowledged).await.context(what)?;
            if kills_in_imports == wanted {
                break;
            }
        }
        ensure!(
            kills_in_imports == wanted,
            "{filter}{call}, {signal}: {kills_in_imports} kills in imports"
        );
    }
    // What a kill can leave of an object: nothing of it, no attribute, all but that it is a token object.
    for torn in [
        "cut off",
        "object without class or key type",
        "had not become a token object",
    ] {
        ensure!(said.contains(torn), "{torn:?} never came up");
    }
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_waits_for_a_node_that_was_killed_in_its_import() -> Result<()> {
    let program = Program::new()?;
    let cluster = cluster_of(&program).await?;
    let mut acknowledged = acknowledge(&cluster, 1).await?;
    let victim = Victim::of(&cluster, &program).await?;
    // The first call that a start without imports does not reach.
    let mut nth = 1;
    while victim.dies(&inject("ftruncate", "KILL", nth)).await? {
        nth += 1;
        ensure!(nth <= MOST, "it dies at every start");
    }
    let leader = cluster.leader().await?;
    let mut cut_short = None;
    for _ in 0..MOST {
        let client = cluster
            .client_on("admin", leader.node)?
            .with_retry(Retry::Until(STARTED));
        let rotation = tokio::spawn(async move { client.rotate(CONTEXT, None).await });
        until("the rotation's end, or the node's", STARTED, async || {
            (rotation.is_finished() || victim.node.pid().is_none()).then_some(())
        })
        .await?;
        if victim.node.pid().is_none() {
            cut_short = Some(rotation);
            break;
        }
        rotation.await??;
        let client = cluster.client_on("trading-1", leader.node)?;
        acknowledged
            .exchange
            .push(seal(&client, CONTEXT, b"exchange").await?);
    }
    let Some(rotation) = cut_short else {
        bail!("it lives after {MOST} rotations");
    };
    victim.was_killed().await?;
    victim.comes_back().await?;
    let version = rotation.await??.version;
    for node in cluster.nodes() {
        until("the new version on every node", STARTED, async || {
            let info = context_on(&cluster, node.number, CONTEXT).await.ok()?;
            (check_settled(&info).ok()? == version).then_some(())
        })
        .await
        .with_context(|| node.id())?;
        node.wait_ready(STARTED).await?;
        let client = cluster.client_on("trading-1", node.number)?;
        acknowledged
            .exchange
            .push(seal(&client, CONTEXT, b"exchange").await?);
    }
    open_everywhere(&cluster, "trading-1", CONTEXT, &acknowledged.exchange).await?;
    // As many objects as a node has that was never killed.
    let sound = objects(&cluster.node(leader.node).dir.join("tokens"))?;
    victim.is_whole(sound, &acknowledged).await?;
    cluster.passed();
    Ok(())
}
