//! Nodes under strace: started so that a system call of theirs, counted through, kills them; and what they have
//! to be when they have come back.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::{Node, Playground, Program, until};

use crate::common::{CONTEXT, Sealed, open, seal};

/// From a start to readiness, or to the kill.
pub(crate) const STARTED: Duration = Duration::from_secs(60);
/// strace writes its file a little later.
pub(crate) const WRITTEN: Duration = Duration::from_secs(30);
/// The tracer is a grandchild (`-D`): the pid that the playground knows is the node's own. Without
/// `--seccomp-bpf`, which takes no signals at the calls that it stops.
pub(crate) fn traced(program: &Program, options: &str) -> Result<()> {
    program.write(&format!(
        "strace -D -f -q -y -e signal=KILL,USR1 {options} -o \"${{2%/*}}/strace\" "
    ))
}

/// `-P` for a path: strace then looks at calls on this file only.
pub(crate) fn only(path: &Path) -> String {
    format!("-P '{}' ", path.display())
}

/// SIGKILL cancels the call that it meets. SIGUSR1 kills just the same, because no node handles it, but only
/// once the call is done.
pub(crate) fn inject(call: &str, signal: &str, nth: u32) -> String {
    format!("-e trace={call} -e inject={call}:signal={signal}:when={nth}")
}

/// Removes every object from tokens that no node uses; how many files of objects are left, the tokens' own.
pub(crate) fn forget_objects(tokens: &Path) -> Result<usize> {
    for entry in fs::read_dir(tokens)? {
        let folder = entry?.path();
        if !folder.is_dir() {
            continue;
        }
        for file in fs::read_dir(&folder)? {
            let path = file?.path();
            let is_object = path.extension().is_some_and(|ext| ext == "object");
            if is_object && path.file_name().is_some_and(|name| name != "token.object") {
                fs::remove_file(path)?;
            }
        }
    }
    objects(tokens)
}

/// Object files in all tokens of a folder.
pub(crate) fn objects(tokens: &Path) -> Result<usize> {
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
pub(crate) struct Acknowledged {
    pub(crate) exchange: Vec<Sealed>,
    pub(crate) own: Sealed,
}

/// The node that is killed.
pub(crate) struct Victim<'a> {
    pub(crate) cluster: &'a Playground,
    pub(crate) program: &'a Program,
    pub(crate) node: Node,
    pub(crate) tokens: PathBuf,
}

impl<'a> Victim<'a> {
    /// A node that does not lead: the others go on without an election.
    pub(crate) async fn of(cluster: &'a Playground, program: &'a Program) -> Result<Self> {
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
    pub(crate) async fn dies(&self, options: &str) -> Result<bool> {
        self.node.kill().await?;
        if self.trace().exists() {
            fs::remove_file(self.trace())?;
        }
        traced(self.program, options)?;
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
            self.is_killed(WRITTEN)
                .await
                .with_context(|| format!("{options}: {started:?}"))?;
        }
        Ok(died)
    }

    pub(crate) fn trace(&self) -> PathBuf {
        self.node.dir.join("strace")
    }

    /// It has not ended in any other way.
    pub(crate) async fn is_killed(&self, limit: Duration) -> Result<()> {
        until("strace's word of the kill", limit, async || {
            let trace = fs::read_to_string(self.trace()).ok()?;
            trace.contains("+++ killed by SIG").then_some(())
        })
        .await
    }

    /// Starts it as always; returns what it has said by the time it was ready.
    pub(crate) async fn comes_back(&self) -> Result<String> {
        let before = self.node.log().len();
        self.cluster.start_node(self.node.number).await?;
        self.node.wait_ready(STARTED).await?;
        let log = self.node.log();
        Ok(log.get(before..).unwrap_or_default().to_owned())
    }

    /// Every slot is well, every key is there once, and everything acknowledged opens here.
    pub(crate) async fn is_whole(&self, expected: usize, acknowledged: &Acknowledged) -> Result<()> {
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

pub(crate) async fn acknowledge(cluster: &Playground, versions: usize) -> Result<Acknowledged> {
    let mut exchange = vec![seal(&cluster.client("trading-1")?, CONTEXT, b"exchange").await?];
    while exchange.len() < versions {
        cluster.client("admin")?.rotate(CONTEXT, None).await?;
        exchange.push(seal(&cluster.client("trading-1")?, CONTEXT, b"exchange").await?);
    }
    let own = seal(&cluster.client("2fa-1")?, "2fa", b"2fa").await?;
    Ok(Acknowledged { exchange, own })
}

pub(crate) async fn cluster_of(program: &Program) -> Result<Playground> {
    Playground::builder()
        .env("HSM_NODE_BIN", program.path())
        .start()
        .await
}
