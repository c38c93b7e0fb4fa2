//! What is acknowledged is on the disk: the system calls of real nodes, in their order. sled's file has to be
//! synced, then the control file has to be written and synced, and only then may anybody be told. A key's object and
//! the token's folder have to be synced before the node says that it holds the key.

use std::collections::BTreeMap;
#[cfg(feature = "failpoints")]
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use cluster_tests::{Node, Playground, until};
use hsm_api::admin::JoinTokenRequest;

#[cfg(feature = "failpoints")]
use crate::common::CONTEXT;
#[cfg(feature = "failpoints")]
use crate::pkcs11::token_folder;

/// Acknowledged changes, one after the other, so that nothing can be grouped.
const CHANGES: usize = 20;

/// A program that runs hsm-node under strace and writes what a barrier is made of, with the files' paths, beside
/// the node's configuration. The tracer is a grandchild (`-D`): the pid that the playground knows is the node's
/// own.
fn traced(folder: &Path) -> Result<PathBuf> {
    let node = cluster_tests::binary("hsm-node")?;
    let script = folder.join("traced-node");
    let text = format!(
        "#!/bin/sh\nexec strace -D --seccomp-bpf -f -y -qq -s 0 -e trace=fdatasync,fsync,pwrite64 -e signal=none \
         -o \"${{2%/*}}/strace\" '{}' \"$@\"\n",
        node.display()
    );
    std::fs::write(&script, text)?;
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o700))?;
    Ok(script)
}

/// A call that succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    SledSynced,
    ControlWritten,
    ControlSynced,
}

impl Call {
    fn parse(call: &str) -> Option<Self> {
        let (name, path) = name_and_path(call)?;
        match name {
            "fdatasync" if path.ends_with("/data/sled/db") => Some(Self::SledSynced),
            "fdatasync" if path.ends_with("/data/control") => Some(Self::ControlSynced),
            "pwrite64" if path.ends_with("/data/control") => Some(Self::ControlWritten),
            _ => None,
        }
    }
}

/// Of `fdatasync(21</…/data/sled/db>`, and what may follow.
fn name_and_path(call: &str) -> Option<(&str, &str)> {
    let (name, arguments) = call.split_once('(')?;
    let (path, _) = arguments.split_once('<')?.1.split_once('>')?;
    Some((name, path))
}

/// Each call that succeeded, as it was begun, with the thread that made it, in the order in which they returned.
fn succeeded(text: &str) -> Vec<(&str, &str)> {
    let mut calls = Vec::new();
    // Calls that another thread's came in between: `… <unfinished ...>`, later `<... name resumed>…`.
    let mut begun: BTreeMap<&str, &str> = BTreeMap::new();
    for line in text.lines() {
        let Some((thread, text)) = line.split_once(' ') else {
            continue;
        };
        let text = text.trim_start();
        let call = if text.starts_with("<... ") {
            begun.remove(thread)
        } else {
            Some(text)
        };
        let Some(call) = call else {
            continue;
        };
        if text.ends_with("<unfinished ...>") {
            begun.insert(thread, call);
        } else if let Some((_, returned)) = text.rsplit_once("= ")
            // A failure has words behind its number.
            && returned.parse::<i64>().is_ok_and(|value| value >= 0)
        {
            calls.push((thread, call));
        }
    }
    calls
}

fn traced_of(node: &Node) -> Result<String> {
    let path = node.dir.join("strace");
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// Calls with the thread that made them, in the order in which they returned. strace lets a thread go on only
/// after its call is in the file: whoever hears an answer finds here all that came before it.
struct Trace {
    calls: Vec<(String, Call)>,
}

impl Trace {
    fn of(node: &Node) -> Result<Self> {
        let trace = Self::parse(&traced_of(node)?);
        ensure!(!trace.calls.is_empty(), "{}: nothing was traced", node.id());
        Ok(trace)
    }

    fn parse(text: &str) -> Self {
        let calls = succeeded(text)
            .into_iter()
            .filter_map(|(thread, call)| Some((thread.to_owned(), Call::parse(call)?)));
        Self {
            calls: calls.collect(),
        }
    }

    /// How often since `mark` a thread has kept the rule as a whole: sled's sync, control's write, control's
    /// sync. Any other order is an error.
    fn kept_since(&self, mark: usize) -> Result<usize> {
        use Call::{ControlSynced, ControlWritten, SledSynced};

        let mut last: BTreeMap<&str, (Call, usize)> = BTreeMap::new();
        let mut kept = 0;
        for (at, (thread, call)) in self.calls.iter().enumerate() {
            let before = last.get(thread.as_str()).copied();
            let begun = match (before, call) {
                (Some((ControlWritten, _)), SledSynced) if at >= mark => {
                    bail!("control was written and not synced before the next barrier")
                }
                (_, SledSynced) => at,
                (Some((SledSynced, begun)), ControlWritten) => begun,
                (Some((ControlWritten, begun)), ControlSynced) => {
                    kept += usize::from(begun >= mark);
                    begun
                }
                // Before the mark a node may have become a member, which promises nothing about sled.
                _ if at < mark => at,
                (before, call) => bail!("{call:?} after {before:?} in one thread"),
            };
            last.insert(thread, (*call, begun));
        }
        Ok(kept)
    }
}

/// Whether a trace has the fsync of a file, and after it that of the folder that names it.
fn is_on_disk(trace: &str, file: &Path) -> Result<()> {
    let calls = succeeded(trace)
        .into_iter()
        .filter_map(|(_, call)| name_and_path(call));
    let mut synced = calls
        .filter(|(name, _)| *name == "fsync")
        .map(|(_, path)| Path::new(path));
    ensure!(
        synced.any(|path| path == file),
        "{} was not synced",
        file.display()
    );
    ensure!(
        synced.any(|path| Some(path) == file.parent()),
        "{}: the folder was not synced after it",
        file.display()
    );
    Ok(())
}

/// How much each node's trace holds now.
fn marks(nodes: &[Node]) -> Result<Vec<usize>> {
    nodes
        .iter()
        .map(|node| Ok(Trace::of(node)?.calls.len()))
        .collect()
}

/// How often each node has kept the rule since.
fn kept(nodes: &[Node], marks: &[usize]) -> Result<Vec<usize>> {
    let of = |(node, mark): (&Node, &usize)| -> Result<usize> {
        Trace::of(node)?.kept_since(*mark).with_context(|| node.id())
    };
    nodes.iter().zip(marks).map(of).collect()
}

/// The term of the vote that a node's control file holds: `raft-store/src/storage/control.rs` has its form.
fn voted_term(node: &Node) -> Result<u64> {
    let path = node.dir.join("data/control");
    let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
    let slots = [0_usize, 4096].into_iter().filter_map(|at| {
        let slot = bytes.get(at..)?;
        let sequence = u64::from_be_bytes(slot.get(8..16)?.try_into().ok()?);
        slot.starts_with(b"HSMCTRL1")
            .then_some((sequence, slot.get(20..)?))
    });
    let (_, body) = slots.max_by_key(|(sequence, _)| *sequence).context("no slot")?;
    let number = |at: usize| -> Result<u64> {
        let digits = body.get(at..at + 8).context("control ends early")?;
        Ok(u64::from_le_bytes(digits.try_into()?))
    };
    // Name of the node, incarnation, cluster id, epoch, raft id; then the vote, if there is one.
    let vote = 8 + usize::try_from(number(0)?)? + 16 + 16 + 8 + 8;
    ensure!(body.get(vote) == Some(&1), "{} holds no vote", path.display());
    number(vote + 1)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_acknowledged_change_was_synced_on_a_majority() -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("hsm-traced-").tempdir()?;
    let cluster = Playground::builder()
        .env("HSM_NODE_BIN", traced(scratch.path())?)
        .start()
        .await?;
    let nodes = cluster.nodes();
    let admin = cluster.client("admin")?;
    let request = JoinTokenRequest {
        ttl_seconds: Some(60),
        node_id: None,
    };
    let begun = marks(&nodes)?;
    for number in 1..=CHANGES {
        let before = marks(&nodes)?;
        admin.create_join_token(&request).await?;
        let each = kept(&nodes, &before)?;
        ensure!(
            each.iter().filter(|times| **times >= 1).count() >= 2,
            "change {number} was acknowledged, and the nodes have synced {each:?} times"
        );
    }
    println!(
        "{CHANGES} changes; synced on each node: {:?}",
        kept(&nodes, &begun)?
    );
    #[cfg(feature = "failpoints")]
    a_key_is_on_disk_before_it_is_acknowledged(&cluster).await?;

    // A vote, too: both survivors of a dead leader have voted for the next one, and had it on disk before.
    let leader = cluster.leader().await?;
    let survivors = cluster.others(leader.node);
    let before = marks(&survivors)?;
    for node in &survivors {
        let term = voted_term(node)?;
        ensure!(
            term == leader.term,
            "{} has voted in term {term}, {leader:?}",
            node.id()
        );
    }
    cluster.node(leader.node).kill().await?;
    let next = cluster.leader_among(&survivors).await?;
    // One barrier for the vote, and one more for the first entry of the new term, which the follower has a moment
    // after its leader.
    let what = "two barriers on each survivor, for its vote and for the first entry of the term";
    until(what, Duration::from_secs(60), async || {
        match kept(&survivors, &before) {
            Ok(each) => each.iter().all(|times| *times >= 2).then_some(Ok(())),
            Err(error) => Some(Err(error)),
        }
    })
    .await??;
    for node in &survivors {
        let term = voted_term(node)?;
        ensure!(
            term >= next.term,
            "{} has term {term} on disk, {next:?}",
            node.id()
        );
    }
    cluster.passed();
    Ok(())
}

/// Each node has its object synced when the rotation is answered; one that dies before it acknowledges has by then.
#[cfg(feature = "failpoints")]
async fn a_key_is_on_disk_before_it_is_acknowledged(cluster: &Playground) -> Result<()> {
    use cluster_tests::failpoints::kill_at;
    use hsm_api::client::Retry;

    const LIMIT: Duration = Duration::from_secs(30);
    let objects = |node: &Node| -> Result<BTreeSet<PathBuf>> {
        let folder = token_folder(&node.dir.join("tokens"), "slot-exchange")?.canonicalize()?;
        let mut found = BTreeSet::new();
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|ext| ext == "object") {
                found.insert(path);
            }
        }
        Ok(found)
    };
    let nodes = cluster.nodes();
    let before: Vec<BTreeSet<PathBuf>> = nodes.iter().map(objects).collect::<Result<_>>()?;
    let check = |node: &Node| -> Result<()> {
        let now = objects(node)?;
        let new: Vec<&PathBuf> = now.difference(&before[node.number as usize - 1]).collect();
        ensure!(new.len() == 1, "{}: new objects: {new:?}", node.id());
        is_on_disk(&traced_of(node)?, new[0]).with_context(|| node.id())
    };

    let leader = cluster.leader().await?;
    let victim = cluster.others(leader.node)[0].clone();
    kill_at(&victim, "rotation::before_ack").await?;
    let admin = cluster
        .client_on("admin", leader.node)?
        .with_retry(Retry::Until(LIMIT));
    let rotation = tokio::spawn(async move { admin.rotate(CONTEXT, None).await });
    victim.wait_gone(LIMIT).await?;
    check(&victim)?;
    // Its trace begins anew.
    cluster.start_node(victim.number).await?;
    let rotated = rotation.await??.into_body();
    ensure!(rotated.version == 2, "{rotated:?}");
    for node in cluster.others(victim.number) {
        check(&node)?;
    }
    cluster.wait_ready(&nodes).await
}

#[test]
fn a_trace_is_read_by_thread_and_a_missing_sync_is_seen() -> Result<()> {
    fn parse(lines: &[&str]) -> Trace {
        Trace::parse(&lines.join("\n"))
    }
    let sled = "7 fdatasync(21</p/data/sled/db>) = 0";
    let write = "7 pwrite64(19</p/data/control>, \"\"..., 135, 0) = 135";
    let sync = "7 fdatasync(19</p/data/control>) = 0";
    let whole = [sled, write, sync].repeat(2);
    assert_eq!(parse(&whole).kept_since(0)?, 2);
    // What began before the mark does not count after it.
    assert_eq!(parse(&whole).kept_since(1)?, 1);
    let mixed = [
        "7 fdatasync(21</p/data/sled/db> <unfinished ...>",
        "8 fdatasync(30</p/tokens/x>) = 0",
        "8 pwrite64(20</p/data/sled/db>, \"\"..., 24, 537) = 24",
        "7 <... fdatasync resumed>)          = 0",
        write,
        sync,
    ];
    assert_eq!(parse(&mixed).kept_since(0)?, 1);
    let failed = "7 fdatasync(21</p/data/sled/db>) = -1 EIO (Input/output error)";
    for broken in [
        vec![write, sync],
        vec![failed, write, sync],
        vec![sled, sync],
        vec![sled, write, sled],
        vec![sled, write, sync, write],
    ] {
        assert!(parse(&broken).kept_since(0).is_err(), "{broken:?}");
    }
    // Syncs of a key's object: the folder's comes after it, and has returned.
    let object = Path::new("/t/u/x.object");
    let file = "9 fsync(12</t/u/x.object> <unfinished ...>";
    let resumed = "9 <... fsync resumed>) = 0";
    let folder = "9 fsync(12</t/u>) = 0";
    let on_disk = |lines: &[&str]| is_on_disk(&lines.join("\n"), object);
    on_disk(&[file, sled, resumed, folder])?;
    for late in [
        vec![folder, file, resumed],
        vec![file, folder],
        vec![folder],
        vec![file, resumed, "9 fsync(12</t/u>) = -1 EIO (Input/output error)"],
    ] {
        assert!(on_disk(&late).is_err(), "{late:?}");
    }
    // A sync that has not returned says nothing.
    let open = [sled, write, "7 fdatasync(19</p/data/control>"];
    assert_eq!(parse(&open).kept_since(0)?, 0);
    Ok(())
}
