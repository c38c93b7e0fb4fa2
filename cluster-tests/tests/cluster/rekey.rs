//! The replication key is replaced over rolling restarts: nothing is broken at any point, whoever lacks the new key is
//! named, and afterwards the new key alone opens everything. A removal replaces it where those that stay have another one.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
#[cfg(feature = "failpoints")]
use cluster_tests::failpoints::kill_leader_at;
use cluster_tests::{Node, Playground, until};
use hsm_api::ErrorCode;
use hsm_api::admin::{RekeyStatus, ReplicationRekey};
use hsm_api::client::Retry;

use crate::by_hand::Start;
use crate::common::{CONTEXT, Sealed, json, open, open_everywhere, seal, seal_under, settled_everywhere};
use crate::pkcs11::Token;

/// From a start, or a change, until every node goes by it.
const SEEN: Duration = Duration::from_secs(60);
/// The key under which the replacement is asked for.
const ONCE: &str = "replaced-once";
/// As the playground's configuration has it.
const KEY_LINE: &str = "encryption_key_env: TOKEN_REPLICATION_KEY";

/// What a node says of both, waiting for a leader if there is none.
pub(crate) async fn rekey_status(cluster: &Playground, number: u32) -> Result<RekeyStatus> {
    let client = cluster.client_on("admin", number)?;
    let client = client.with_retry(Retry::Until(SEEN));
    Ok(client.rekey_status().await?.into_body())
}

async fn replication(cluster: &Playground, number: u32) -> Result<ReplicationRekey> {
    Ok(rekey_status(cluster, number).await?.replication)
}

/// Until this node says so of what comes next.
async fn next(cluster: &Playground, number: u32, part: &str) -> Result<ReplicationRekey> {
    until(&format!("{part:?} on node {number}"), SEEN, async || {
        let status = replication(cluster, number).await.ok()?;
        status.next.contains(part).then_some(status)
    })
    .await
}

/// Starts a node again with other sources of replication keys, under way to the next one: the cluster serves meanwhile.
async fn restart_with(cluster: &Playground, node: &Node, original: &str, keys: &str) -> Result<()> {
    node.kill().await?;
    node.set_config(&original.replacen(KEY_LINE, keys, 1))?;
    cluster.start_node(node.number).await?;
    cluster.wait_ready(std::slice::from_ref(node)).await
}

fn key_file(path: &Path, digits: &str) -> Result<()> {
    std::fs::write(path, digits.repeat(32))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(())
}

async fn serves(cluster: &Playground, sealed: &mut Vec<Sealed>, what: &str) -> Result<()> {
    for node in cluster.nodes() {
        let client = cluster.client_on("trading-1", node.number)?;
        sealed.push(
            seal(&client, CONTEXT, what.as_bytes())
                .await
                .with_context(|| format!("{what}: {}", node.id()))?,
        );
    }
    open_everywhere(cluster, "trading-1", CONTEXT, sealed)
        .await
        .with_context(|| what.to_owned())
}

pub(crate) async fn another_replication_key_comes_over_rolling_restarts() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let mut sealed = Vec::new();
    serves(&cluster, &mut sealed, "before").await?;
    let new = cluster.scratch().join("new.key");
    key_file(&new, "cd")?;
    let old = cluster.dir().join("secrets/replication.key");
    let (new, old) = (new.display().to_string(), old.display().to_string());
    let both = format!("encryption_key_file: \"{new}\", previous_encryption_key_file: \"{old}\"");
    let new_alone = format!("encryption_key_file: \"{new}\"");
    let nodes = cluster.nodes();
    let originals: Vec<String> = nodes.iter().map(Node::config).collect::<Result<_>>()?;
    let before = replication(&cluster, 1).await?;
    ensure!(
        before.former.is_none() && before.next == "nothing to do",
        "{before:?}"
    );

    // Whoever has the new key alone does not start: it could open nothing.
    nodes[0].kill().await?;
    let too_early = Start::of(&cluster, &nodes[0])?.with(KEY_LINE, &new_alone)?;
    too_early
        .refused(
            cluster.scratch(),
            &["encryption_key_file", &before.key, "needs both"],
        )
        .await?;
    for (node, original) in nodes.iter().zip(&originals) {
        if node.number == 3 {
            // Asked too early, it is refused, and nothing is changed.
            let lacking = next(&cluster, 1, "give the new key").await?;
            ensure!(lacking.next.contains("hsm-node-3"), "{lacking:?}");
            let admin = cluster.client("admin")?.with_retry(Retry::Until(SEEN));
            let refused = admin.rekey_replication(None).await;
            let error = refused.err().context("accepted without node 3")?;
            ensure!(error.code() == Some(ErrorCode::Conflict), "{error}");
        }
        restart_with(&cluster, node, original, &both).await?;
    }
    serves(&cluster, &mut sealed, "with both").await?;
    next(&cluster, 1, "hsmctl cluster rekey replication").await?;

    // The leader dies with the first records that it has sealed anew and not proposed: the next one goes on.
    #[cfg(feature = "failpoints")]
    let number = kill_leader_at(&cluster, &nodes, "rekey::before_reseal_commit")
        .await?
        .node;
    #[cfg(not(feature = "failpoints"))]
    let number = cluster.leader().await?.node;
    let follower = cluster.others(number)[0].number;
    let client = cluster.client_on("admin", follower)?;
    let client = client.with_retry(Retry::Until(SEEN));
    client.rekey_replication(Some(ONCE)).await?;
    let resealed = next(&cluster, follower, "take the old one out").await?;
    #[cfg(feature = "failpoints")]
    {
        cluster.node(number).wait_gone(SEEN).await?;
        cluster.start_node(number).await?;
        cluster.wait_ready(&nodes).await?;
    }
    // Whoever repeats it is told what he asked for.
    let args = [
        "cluster",
        "rekey",
        "replication",
        "--confirm",
        "replication",
        "-o",
        "json",
    ];
    let repeated = [args.as_slice(), &["--idempotency-key", ONCE]].concat();
    let done = json(&cluster.hsmctl(&repeated).await?.ok()?)?;
    ensure!(done["former"] == before.key.as_str(), "{done}");
    ensure!(
        resealed.former.is_none() && resealed.records_left == 0,
        "{resealed:?}"
    );
    ensure!(
        resealed.key == done["key"].as_str().unwrap_or_default(),
        "{resealed:?} after {done}"
    );
    let again = cluster.hsmctl(&args).await?;
    ensure!(
        again.code != Some(0) && again.stderr.contains("before"),
        "{again:?}"
    );
    let admin = cluster.client("admin")?.with_retry(Retry::Until(SEEN));
    let version = admin.rotate(CONTEXT, None).await?.version;
    settled_everywhere(&cluster, CONTEXT).await?;
    for node in &nodes {
        let client = cluster.client_on("trading-1", node.number)?;
        sealed.push(seal_under(&client, CONTEXT, b"under the new one", version).await?);
    }

    // The old one alone is refused from now on, by name.
    nodes[2].kill().await?;
    let too_late = Start::of(&cluster, &nodes[2])?.with(&both, KEY_LINE)?;
    too_late
        .refused(
            cluster.scratch(),
            &["TOKEN_REPLICATION_KEY", &resealed.key, "needs both"],
        )
        .await?;
    for (node, original) in nodes.iter().zip(&originals).rev() {
        restart_with(&cluster, node, original, &new_alone).await?;
    }
    let settled = next(&cluster, 1, "nothing to do").await?;
    ensure!(
        settled
            .nodes
            .iter()
            .all(|node| node.keys == [settled.key.clone()]),
        "{settled:?}"
    );

    // Everything that the state has opens with the new key: a token that has lost its keys gets them all back.
    nodes[1].kill().await?;
    for slot in ["exchange", "2fa"] {
        ensure!(Token::of(&cluster, &nodes[1], slot).forget_keys()? > 1, "{slot}");
    }
    cluster.start_node(2).await?;
    cluster.wait_ready(&nodes).await?;
    let client = cluster.client_on("trading-1", 2)?;
    for one in &sealed {
        open(&client, CONTEXT, one)
            .await
            .with_context(|| format!("version {}", one.version))?;
    }
    serves(&cluster, &mut sealed, "with the new one alone").await?;

    // A node is removed, and those that stay have another key that it never had: that becomes the cluster's.
    let newest = cluster.scratch().join("newest.key");
    key_file(&newest, "ef")?;
    let newest = newest.display();
    let both = format!("encryption_key_file: \"{newest}\", previous_encryption_key_file: \"{new}\"");
    for (node, original) in nodes.iter().zip(&originals).take(2) {
        restart_with(&cluster, node, original, &both).await?;
    }
    let leaves = nodes[2].id();
    next(&cluster, 1, &format!("beside the present one to: {leaves};")).await?;
    let args = ["cluster", "remove", &leaves, "--confirm", &leaves, "-o", "json"];
    let removed = json(&cluster.hsmctl(&args).await?.ok()?)?;
    let known = until("the new key on node 1", SEEN, async || {
        let status = replication(&cluster, 1).await.ok()?;
        (status.key != settled.key).then_some(status)
    })
    .await?;
    ensure!(
        removed["replication_key"] == known.key.as_str() && removed["knows_replication_key"] == false,
        "{removed}: {known:?}"
    );
    ensure!(
        known.known_to_removed.is_empty() && known.former.is_none() && known.records_left == 0,
        "{known:?}"
    );
    let (stay, mut everywhere) = (&nodes[..2], Vec::new());
    for node in stay {
        let client = cluster.client_on("trading-1", node.number)?;
        everywhere.push(seal(&client, CONTEXT, b"after the removal").await?);
    }
    for node in stay {
        let client = cluster.client_on("trading-1", node.number)?;
        for one in sealed.iter().chain(&everywhere) {
            open(&client, CONTEXT, one).await.with_context(|| node.id())?;
        }
    }
    cluster.passed();
    Ok(())
}
