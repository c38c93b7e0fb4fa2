//! What is acknowledged is on the disk: the system calls of real nodes, counted.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use cluster_tests::{Node, Playground, until};
use hsm_api::admin::JoinTokenRequest;

/// A program that runs hsm-node under strace and writes every fdatasync beside the node's configuration. The
/// tracer is a grandchild (`-D`): the pid that the playground knows is the node's own.
fn traced(folder: &Path) -> Result<PathBuf> {
    let node = cluster_tests::binary("hsm-node")?;
    let script = folder.join("traced-node");
    let text = format!(
        "#!/bin/sh\nexec strace -D --seccomp-bpf -f -qq -e trace=fdatasync -e signal=none \
         -o \"${{2%/*}}/strace\" '{}' \"$@\"\n",
        node.display()
    );
    std::fs::write(&script, text)?;
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o700))?;
    Ok(script)
}

fn syncs(node: &Node) -> Result<usize> {
    let path = node.dir.join("strace");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(text
        .lines()
        .filter(|line| line.contains("fdatasync(") && line.contains("= 0"))
        .count()
        + text
            .lines()
            .filter(|line| line.contains("fdatasync resumed") && line.contains("= 0"))
            .count())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_acknowledged_change_was_synced_on_a_majority() -> Result<()> {
    let scratch = tempfile_dir()?;
    let cluster = Playground::builder()
        .env("HSM_NODE_BIN", traced(scratch.path())?)
        .start()
        .await?;
    let changes = 20;
    let before: Vec<usize> = cluster.nodes().iter().map(syncs).collect::<Result<_>>()?;
    let admin = cluster.client("admin")?;
    for _ in 0..changes {
        let request = JoinTokenRequest {
            ttl_seconds: Some(60),
            node_id: None,
        };
        admin.create_join_token(&request).await?;
    }
    let grown = || -> Result<Vec<usize>> {
        cluster
            .nodes()
            .iter()
            .zip(&before)
            .map(|(node, before)| Ok(syncs(node)? - before))
            .collect()
    };
    // One after the other, so that nothing could be grouped: the leader and one more for each of them. strace
    // writes its file a little later.
    let counted = until("the calls of a majority", Duration::from_secs(10), async || {
        let grown = grown().ok()?;
        (grown.iter().filter(|count| **count >= changes).count() >= 2).then_some(grown)
    })
    .await
    .with_context(|| format!("{changes} changes, calls: {:?}", grown()))?;
    println!("{changes} changes: {counted:?} calls of fdatasync");

    // A vote, too: each survivor of a dead leader votes, and syncs before it says so.
    let leader = cluster.leader().await?;
    let survivors = cluster.others(leader.node);
    let before: Vec<usize> = survivors.iter().map(syncs).collect::<Result<_>>()?;
    cluster.node(leader.node).kill().await?;
    cluster.leader_among(&survivors).await?;
    for (node, before) in survivors.iter().zip(before) {
        until("the sync of a vote", Duration::from_secs(10), async || {
            (syncs(node).ok()? > before).then_some(())
        })
        .await
        .with_context(|| node.id())?;
    }
    cluster.passed();
    Ok(())
}

fn tempfile_dir() -> Result<tempfile::TempDir> {
    Ok(tempfile::Builder::new().prefix("hsm-traced-").tempdir()?)
}
