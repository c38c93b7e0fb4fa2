//! Work on the directory of a stopped node, and voters that never come back: a survivor goes on alone, whoever belonged to
//! the old epoch is refused until it comes anew, what is lost is said, and a store that is written anew holds what it held.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::{Node, Playground, until};
use hsm_api::admin::{
    ClusterStatus, JoinRequest, JoinTokenRequest, MemberRole, NodeRole, RevocationMatch, RevocationsPage,
    RevokeRequest,
};
use hsm_api::client::Retry;
use hsm_api::data::EncryptRequest;
use hsm_api::{ClientError, ErrorCode};
use serde_json::Value;

use crate::common::{
    CONTEXT, Sealed, formed_with, json, open, open_everywhere_soon, seal, seal_under, settled_everywhere,
};

/// From a start, or a join, until a node is ready, and what else takes a moment on a busy machine.
const READY: Duration = Duration::from_secs(60);
/// For how long old nodes are watched that have heard of the end of their epoch: several elections.
const REFUSED: Duration = Duration::from_secs(10);
/// A voter that said nothing for ten seconds is taken out, and the looks around it.
const TAKEN_OUT: Duration = Duration::from_secs(90);
/// Version numbers that a recovery leaves out: `docs/operations.md`.
const LEFT_OUT: u32 = 100;
/// Of a certificate that nobody has: its revocation is lost.
const REVOKED: &str = "revoked-and-lost";

fn config_of(node: &Node) -> Result<String> {
    let path = node.dir.join("config.yaml");
    Ok(path.to_str().context("folder is not UTF-8")?.to_owned())
}

/// `hsmctl node …` as JSON, about a node that is stopped.
async fn maintain(cluster: &Playground, node: &Node, what: &str, further: &[&str]) -> Result<Value> {
    let config = config_of(node)?;
    let mut args = vec!["-o", "json", "--no-input", "node", what, "--node-config", &config];
    args.extend_from_slice(further);
    let said = cluster.hsmctl(&args).await?.ok();
    json(&said.with_context(|| format!("{what} {further:?}"))?)
}

/// The same, which has to be refused and to say so.
async fn refused(cluster: &Playground, node: &Node, args: &[&str], named: &str) -> Result<()> {
    let config = config_of(node)?;
    let mut all = vec!["--no-input", "node"];
    all.extend_from_slice(args);
    all.extend(["--node-config", &config]);
    let output = cluster.hsmctl(&all).await?;
    ensure!(output.code != Some(0), "{args:?}: not refused");
    ensure!(
        output.stderr.contains(named),
        "{args:?}: {named:?} is not said: {}",
        output.stderr
    );
    Ok(())
}

/// Runs hsm-node's own command, which kills itself at a point.
#[cfg(feature = "failpoints")]
async fn killed_at(node: &Node, point: &str, args: &[&str]) -> Result<()> {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Stdio;
    let status = tokio::process::Command::new(cluster_tests::binary("hsm-node")?)
        .arg("--config")
        .arg(config_of(node)?)
        .args(args)
        .env("HSM_FAILPOINTS", format!("{point}=kill"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .await?;
    ensure!(status.signal() == Some(9), "{point}: {status}");
    Ok(())
}

async fn status(cluster: &Playground, number: u32) -> Result<ClusterStatus> {
    cluster.status(number).await.context("no status")
}

/// Lets an empty node join through another one.
async fn join(cluster: &Playground, number: u32, through: &Node) -> Result<()> {
    let token = cluster
        .client_on("admin", through.number)?
        .with_retry(Retry::Until(READY))
        .create_join_token(&JoinTokenRequest {
            ttl_seconds: Some(300),
            node_id: Some(cluster.node(number).id()),
        })
        .await?
        .into_body();
    let request = JoinRequest {
        token: token.token,
        cluster_ca_sha256: token.cluster_ca_sha256,
        leader_addresses: vec![format!("127.0.0.1:{}", through.cluster_port)],
    };
    let joining = cluster
        .client_on("admin", number)?
        .with_retry(Retry::Until(READY));
    joining.join(&request).await?;
    Ok(())
}

async fn opens_all(cluster: &Playground, number: u32, all: &[Sealed]) -> Result<()> {
    let client = cluster.client_on("trading-1", number)?;
    for sealed in all {
        let opened = open(&client, CONTEXT, sealed).await;
        opened.with_context(|| format!("version {} on node {number}", sealed.version))?;
    }
    Ok(())
}

/// Acknowledged by the two nodes that are lost later, when the third was dead already.
struct Lost {
    sealed: Sealed,
    /// Of the last of it.
    index: u64,
}

/// Kills one node of three, and has the others acknowledge a rotation, an encryption and a revocation. With failpoints it dies
/// with the entry of one more change, and without a word of whether that counts.
async fn acknowledged_without(cluster: &Playground, dies: &Node) -> Result<Lost> {
    let others = cluster.others(dies.number);
    let asked = others.first().context("nobody else")?.number;
    let admin = cluster.client_on("admin", asked)?.with_retry(Retry::Until(READY));
    #[cfg(feature = "failpoints")]
    {
        cluster_tests::failpoints::kill_at(dies, "store::after_append").await?;
        let change = JoinTokenRequest {
            ttl_seconds: Some(60),
            node_id: None,
        };
        admin.create_join_token(&change).await?;
        dies.wait_gone(READY).await.context("it appends nothing")?;
    }
    dies.kill().await?;
    // Once it has been silent for long enough to be left out.
    let version = admin.rotate(CONTEXT, None).await?.version;
    let trading = cluster.client_on("trading-1", asked)?;
    let sealed = seal_under(&trading, CONTEXT, b"of a version that is lost", version).await?;
    let revoked = RevokeRequest {
        what: Some(RevocationMatch {
            cn: Some(REVOKED.to_owned()),
            ..RevocationMatch::default()
        }),
        certificate: None,
        reason: "shortly before the loss".to_owned(),
    };
    let revoked = admin.revoke(&revoked).await?;
    let index = revoked.meta.index.context("an answer without an index")?.index;
    Ok(Lost { sealed, index })
}

/// The survivor has nothing of it, says so, and gives no number again that was given: `next` comes after the highest that it
/// knew, and by so much later as is left out.
async fn check_lost(cluster: &Playground, survivor: &Node, lost: &Lost, known: u32, next: u32) -> Result<()> {
    let trading = cluster.client_on("trading-1", survivor.number)?;
    let opened = open(&trading, CONTEXT, &lost.sealed).await;
    let error = opened.err().context("what was lost opens")?;
    let code = error.downcast_ref::<ClientError>().and_then(ClientError::code);
    ensure!(code == Some(ErrorCode::UnknownKeyVersion), "{error:#}");
    ensure!(
        next == known + 1 + LEFT_OUT && next > lost.sealed.version,
        "version {next} after {known} was known and {} lost",
        lost.sealed.version
    );
    let admin = cluster.client_on("admin", survivor.number)?;
    let revoked = admin.revocations(&RevocationsPage::default()).await?.into_body();
    ensure!(
        revoked
            .revocations
            .iter()
            .all(|one| one.what.cn.as_deref() != Some(REVOKED)),
        "{revoked:?}"
    );
    Ok(())
}

/// It answers, is not ready, and encrypts nothing.
async fn serves_nobody(cluster: &Playground, node: &Node) -> Result<()> {
    let status = node.patient().get("/readyz").await?.status;
    ensure!(status == 503, "{}: /readyz is {status}", node.id());
    let trading = cluster.client_on("trading-1", node.number)?;
    let sealed = seal(&trading, CONTEXT, b"of an epoch that has ended").await;
    let error = sealed.err().with_context(|| format!("{} encrypts", node.id()))?;
    let code = error.downcast_ref::<ClientError>().and_then(ClientError::code);
    ensure!(code == Some(ErrorCode::NotReady), "{}: {error:#}", node.id());
    Ok(())
}

pub(crate) async fn a_survivor_goes_on_alone_and_the_old_nodes_are_refused_until_they_come_anew() -> Result<()>
{
    let cluster = Playground::start(3).await?;
    let (admin, trading) = (cluster.client("admin")?, cluster.client("trading-1")?);
    let mut acknowledged = vec![seal(&trading, CONTEXT, b"of the first version").await?];
    let rotated = admin
        .with_retry(Retry::Until(READY))
        .rotate(CONTEXT, None)
        .await?;
    acknowledged.push(seal_under(&trading, CONTEXT, b"of the second", rotated.version).await?);
    settled_everywhere(&cluster, CONTEXT).await?;
    let old_index = rotated.meta.index.context("an answer without an index")?;
    let lost = [cluster.node(1), cluster.node(2)];
    let survivor = cluster.node(3);

    let name = survivor.id();
    refused(
        &cluster,
        &survivor,
        &["recover-quorum", "--dry-run"],
        "another process uses it",
    )
    .await?;
    refused(&cluster, &survivor, &["compact"], "another process uses it").await?;
    let gone = acknowledged_without(&cluster, &survivor).await?;
    for node in &lost {
        node.kill().await?;
    }

    // Looked at, refused without a word or with a wrong one, and done; a kill half-way changes nothing about that.
    let seen = maintain(&cluster, &survivor, "recover-quorum", &["--dry-run"]).await?;
    let names: Vec<&str> = seen["left_out"]
        .as_array()
        .context("left_out")?
        .iter()
        .filter_map(|node| node["node_id"].as_str())
        .collect();
    ensure!(names == ["hsm-node-1", "hsm-node-2"], "{seen}");
    ensure!(
        seen["epoch"] == 1
            && seen["new_epoch"] == 2
            && seen["done"] == false
            && seen["node_id"] == name.as_str(),
        "{seen}"
    );
    let last = seen["last_log"]["index"].as_u64().context("no last entry")?;
    ensure!(
        (old_index.index..gone.index).contains(&last) && seen["last_written_at"].is_string(),
        "{} was lost: {seen}",
        gone.index
    );
    let uncertain = seen["uncertain_entries"].as_u64().context("uncertain entries")?;
    ensure!(uncertain > 0 || cfg!(not(feature = "failpoints")), "{seen}");
    refused(&cluster, &survivor, &["recover-quorum"], "--confirm hsm-node-3").await?;
    for named in [
        format!(
            "which ends at term {}, index {last}, are lost",
            seen["last_log"]["term"]
        ),
        format!("Its last {uncertain} entries become committed"),
        "hsm-node-1, hsm-node-2 will never be taken back".to_owned(),
    ] {
        let wrong = ["recover-quorum", "--confirm", "hsm-node-1"];
        refused(&cluster, &survivor, &wrong, &named).await?;
    }
    #[cfg(feature = "failpoints")]
    killed_at(
        &survivor,
        "recover::before_control",
        &["recover-quorum", "--confirm", &name],
    )
    .await?;
    let done = maintain(&cluster, &survivor, "recover-quorum", &["--confirm", &name]).await?;
    ensure!(done["done"] == true && done["new_epoch"] == 2, "{done}");
    ensure!(
        done["done_before"] == cfg!(feature = "failpoints"),
        "done by the one that was killed: {done}"
    );
    let again = maintain(&cluster, &survivor, "recover-quorum", &["--confirm", &name]).await?;
    ensure!(again["done_before"] == true && again["new_epoch"] == 2, "{again}");
    let compacted = maintain(&cluster, &survivor, "compact", &[]).await?;
    ensure!(compacted["done"] == true, "{compacted}");

    // Alone, it has everything that it had, and says what it is.
    cluster.start_node(survivor.number).await?;
    survivor.wait_ready(READY).await?;
    opens_all(&cluster, survivor.number, &acknowledged).await?;
    let now = status(&cluster, survivor.number).await?;
    ensure!(
        now.epoch == 2 && now.role == NodeRole::Leader && now.voters == 1,
        "{now:?}"
    );
    until("the audit of the recovery", READY, async || {
        let log = survivor.log();
        let audited = |line: &str| {
            line.contains("\"target\":\"audit\"")
                && line.contains(
                    "the quorum was recovered by this node alone: what was committed behind its log is lost",
                )
                && line.contains(&format!("\"last_index\":{last}"))
                && line.contains("hsm-node-1 hsm-node-2")
        };
        log.lines().any(audited).then_some(())
    })
    .await?;
    let (admin, trading) = (
        cluster.client_on("admin", survivor.number)?,
        cluster.client_on("trading-1", survivor.number)?,
    );
    let of_before = trading
        .with_min_index(old_index)
        .encrypt(&EncryptRequest::new(CONTEXT, b"of another time"))
        .await;
    let code = of_before.err().as_ref().and_then(ClientError::code);
    ensure!(code == Some(ErrorCode::IndexEpochChanged), "{code:?}");
    let version = admin
        .with_retry(Retry::Until(READY))
        .rotate(CONTEXT, None)
        .await?
        .version;
    acknowledged.push(seal_under(&trading, CONTEXT, b"of the new epoch", version).await?);
    check_lost(&cluster, &survivor, &gone, rotated.version, version).await?;

    // The old ones come back, two of three: among themselves they are a quorum, and serve nobody.
    let begun = survivor.log().len();
    for node in &lost {
        cluster.start_node(node.number).await?;
    }
    // Whoever leads of them calls the survivor, and whoever hears of no quorum asks it.
    until(
        "the end of their epoch heard by both old nodes",
        READY,
        async || {
            for node in &lost {
                if !node.checks().await.contains("the epoch of this node has ended") {
                    return None;
                }
            }
            Some(())
        },
    )
    .await?;
    let heard = Instant::now();
    let refusals = until("some time of refusals", READY, async || {
        for node in &lost {
            if let Err(error) = serves_nobody(&cluster, node).await {
                return Some(Err(error));
            }
        }
        (heard.elapsed() > REFUSED).then_some(Ok(()))
    });
    refusals.await??;
    until("the survivor to name whom it refuses", READY, async || {
        let log = survivor.log();
        let named = log.get(begun..).unwrap_or_default().lines().any(|line| {
            line.contains("peer refused")
                && lost.iter().any(|node| line.contains(&node.id()))
                && line.contains("is of epoch 1, this node of epoch 2")
        });
        named.then_some(())
    })
    .await?;
    for node in &lost {
        let client = cluster.client_on("admin", node.number)?;
        let changed = client.rotate(CONTEXT, None).await;
        ensure!(changed.is_err(), "{}: it changes what nobody else has", node.id());
    }
    ensure!(survivor.is_ready().await, "{}", survivor.checks().await);

    // Emptied, as they are told, they join like new ones, under ids of their own.
    for node in &lost {
        node.kill().await?;
        std::fs::remove_dir_all(node.dir.join("data"))?;
        cluster.start_node(node.number).await?;
        join(&cluster, node.number, &survivor).await?;
    }
    cluster.wait_ready(&cluster.nodes()).await?;
    let members = cluster
        .client_on("admin", survivor.number)?
        .members()
        .await?
        .into_body()
        .members;
    ensure!(
        members.len() == 3 && members.iter().all(|member| member.role == MemberRole::Voter),
        "{members:?}"
    );
    let version = cluster
        .client("admin")?
        .with_retry(Retry::Until(READY))
        .rotate(CONTEXT, None)
        .await?
        .version;
    acknowledged.push(seal_under(&trading, CONTEXT, b"of three again", version).await?);
    open_everywhere_soon(&cluster, "trading-1", CONTEXT, &acknowledged).await?;
    cluster.passed();
    Ok(())
}

/// Killed between the two renames there is no store under its name, and killed before them two.
#[cfg(feature = "failpoints")]
pub(crate) async fn a_compaction_that_is_killed_leaves_the_node_as_it_was() -> Result<()> {
    let cluster = Playground::start(1).await?;
    let node = cluster.node(1);
    let (admin, trading) = (cluster.client("admin")?, cluster.client("trading-1")?);
    let mut acknowledged = vec![seal(&trading, CONTEXT, b"of the first version").await?];
    for _ in 0..3 {
        let version = admin.rotate(CONTEXT, None).await?.version;
        acknowledged.push(seal_under(&trading, CONTEXT, b"of a later one", version).await?);
    }
    node.kill().await?;
    let looked = maintain(&cluster, &node, "compact", &["--dry-run"]).await?;
    ensure!(
        looked["done"] == false && looked["bytes_after"] == looked["bytes_before"],
        "{looked}"
    );
    for point in ["compact::before_swap", "compact::between_renames"] {
        killed_at(&node, point, &["compact"]).await?;
        cluster.start_node(1).await?;
        node.wait_ready(READY).await?;
        opens_all(&cluster, 1, &acknowledged).await?;
        node.kill().await?;
    }
    let done = maintain(&cluster, &node, "compact", &[]).await?;
    ensure!(done["done"] == true, "{done}");
    cluster.start_node(1).await?;
    node.wait_ready(READY).await?;
    opens_all(&cluster, 1, &acknowledged).await?;
    cluster.passed();
    Ok(())
}

pub(crate) async fn a_dead_voter_is_taken_out_once_another_one_has_joined_and_not_before() -> Result<()> {
    let mut cluster = formed_with(Playground::builder(), |config| {
        config.replace(
            "  coordination: {type: raft}\n",
            "  coordination: {type: raft}\n  autopilot: {remove_dead_after_seconds: 10}\n",
        )
    })
    .await?;
    let leader = cluster.leader().await?;
    let dead = cluster.others(leader.node)[0].clone();
    dead.kill().await?;
    // Of the two that would be left none may fail.
    until("why it is kept", TAKEN_OUT, async || {
        let kept = |line: &str| {
            line.contains("a dead voter is not removed by the auto-pilot")
                && line.contains("cluster.autopilot.min_voters")
        };
        let mut logs = cluster.others(dead.number).into_iter().map(|node| node.log());
        logs.any(|log| log.lines().any(kept)).then_some(())
    })
    .await?;
    // To a leader whose machine has just stood still the other follower is silent too.
    until("one silent voter of three", READY, async || {
        let leader = cluster.leader_among(&cluster.others(dead.number)).await.ok()?;
        let status = cluster.status(leader.node).await?;
        // What an alert goes by says the same.
        let metrics = cluster.node(leader.node).metrics().await.ok()?;
        let shown = metrics.sum("hsm_raft_failure_tolerance")?;
        (status.voters == 3
            && status.failure_tolerance == 0
            && shown == 0.0
            && status.silent_voters == [dead.id()])
        .then_some(())
    })
    .await?;
    // That starts the dead one too.
    let fourth = cluster.add_node(false).await?;
    dead.kill().await?;
    let through = cluster.node(leader.node);
    join(&cluster, fourth.number, &through).await?;
    until("three voters that are all heard", TAKEN_OUT, async || {
        let leader = cluster.leader_among(&cluster.others(dead.number)).await.ok()?;
        let status = cluster.status(leader.node).await?;
        // A voter that has missed a few heartbeats counts as failed, too.
        (status.voters == 3 && status.silent_voters.is_empty() && status.failure_tolerance == 1).then_some(())
    })
    .await?;
    // Nobody has replaced what it knows.
    until("the keys that the removed one knows", READY, async || {
        let leader = cluster.leader_among(&cluster.others(dead.number)).await.ok()?;
        let metrics = cluster.node(leader.node).metrics().await.ok()?;
        let known = |kind| metrics.with_label("hsm_keys_known_to_removed", "kind", kind);
        let all = [known("version")?, known("transport")?, known("replication")?];
        let status = cluster.status(leader.node).await?;
        (all.iter().all(|count| *count > 0.0) && status.known_to_removed.replication_key).then_some(())
    })
    .await?;
    let logs: Vec<String> = cluster.nodes().iter().map(Node::log).collect();
    let audited = logs.iter().flat_map(|log| log.lines()).any(|line| {
        line.contains("the auto-pilot removes a voter that is dead") && line.contains(&dead.id())
    });
    ensure!(audited, "no line of the audit names it");
    cluster.passed();
    Ok(())
}
