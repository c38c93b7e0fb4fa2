//! Nodes that join and then lie: about their own key, about a key that is not theirs, about who they are. Somebody
//! refuses it, says who it was and why, and nobody else is harmed.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::failpoints::arm;
use cluster_tests::{Node, Playground, until};
use hsm_api::admin::{JoinRequest, JoinTokenRequest, MemberRole};
use hsm_api::client::Retry;
use serde_json::Value;

use crate::common::{CONTEXT, context_on, made, open, seal_under};
use crate::victim::objects;

/// From a lie to the line about it.
const AUDITED_WITHIN: Duration = Duration::from_secs(60);
/// From a join to readiness.
const JOINED_WITHIN: Duration = Duration::from_secs(60);
/// Those who are in the cluster from the start.
const MEMBERS: [u32; 3] = [1, 2, 3];

/// A further node that joins with this point armed.
async fn joins_with(cluster: &mut Playground, point: &str) -> Result<Node> {
    let node = cluster.add_node(false).await?;
    arm(&node, point, "return").await?;
    joins(cluster, &node).await?;
    Ok(node)
}

async fn joins(cluster: &Playground, node: &Node) -> Result<()> {
    let wanted = JoinTokenRequest {
        ttl_seconds: Some(300),
        node_id: Some(node.id()),
    };
    let admin = cluster
        .client_on("admin", 1)?
        .with_retry(Retry::Until(Duration::from_secs(20)));
    let token = admin.create_join_token(&wanted).await?.into_body();
    let request = JoinRequest {
        token: token.token,
        cluster_ca_sha256: token.cluster_ca_sha256,
        leader_addresses: MEMBERS
            .iter()
            .map(|number| format!("127.0.0.1:{}", cluster.node(*number).cluster_port))
            .collect(),
    };
    // The answer comes once the node votes, which it does not as long as it lies.
    let client = cluster.client_on("admin", node.number)?;
    tokio::spawn(async move { client.join(&request).await });
    Ok(())
}

/// The line of the audit that a member writes about it.
async fn audited(cluster: &Playground, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    until("the line of the audit", AUDITED_WITHIN, async || {
        let logs: Vec<String> = MEMBERS.iter().map(|number| cluster.node(*number).log()).collect();
        let lines = logs.iter().flat_map(|log| log.lines());
        let mut lines = lines.filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.find(|line| line["target"] == "audit" && wanted(line))
    })
    .await
}

fn says(line: &Value, field: &str, part: &str) -> bool {
    line[field].as_str().is_some_and(|text| text.contains(part))
}

/// The members serve, a rotation needs nobody else, and the liar does not vote and is not ready.
async fn check_unharmed(cluster: &Playground, liar: &Node) -> Result<()> {
    let admin = cluster
        .client_on("admin", 1)?
        .with_retry(Retry::Until(Duration::from_secs(20)));
    let version = admin.rotate(CONTEXT, None).await?.version;
    let sealed = seal_under(&cluster.client_on("trading-1", 1)?, CONTEXT, b"unharmed", version).await?;
    for number in MEMBERS {
        let node = cluster.node(number);
        ensure!(node.is_ready().await, "{}: {}", node.id(), node.checks().await);
        open(&cluster.client_on("trading-1", number)?, CONTEXT, &sealed)
            .await
            .with_context(|| node.id())?;
    }
    let members = admin.members().await?.into_body().members;
    let voters = members.iter().filter(|member| member.role == MemberRole::Voter);
    ensure!(voters.count() == MEMBERS.len(), "{members:?}");
    ensure!(!liar.is_ready().await, "{} is ready", liar.id());
    Ok(())
}

pub(crate) async fn a_substituted_slot_key_is_granted_nothing() -> Result<()> {
    let mut cluster = Playground::start(3).await?;
    let liar = joins_with(&mut cluster, "sync::register_other_key").await?;
    let name = liar.id();
    let line = audited(&cluster, |line| {
        says(line, "problem", &name) && says(line, "problem", "signature")
    })
    .await?;
    println!("{line}");
    check_unharmed(&cluster, &liar).await?;
    // It finds out by itself that its token is not the one it has registered.
    until("its own line", AUDITED_WITHIN, async || {
        liar.log().contains("the token was replaced").then_some(())
    })
    .await?;
    cluster.passed();
    Ok(())
}

/// The leader refuses what a node proposes; told to stop lying, the node joins.
async fn is_refused_until_it_stops(point: &str, asked: &str, reason: &str) -> Result<()> {
    let mut cluster = Playground::start(3).await?;
    let liar = joins_with(&mut cluster, point).await?;
    let name = liar.id();
    let line = audited(&cluster, |line| {
        line["peer"] == name.as_str() && line["asked"] == asked && says(line, "reason", reason)
    })
    .await?;
    println!("{line}");
    check_unharmed(&cluster, &liar).await?;
    arm(&liar, point, "off").await?;
    liar.wait_ready(JOINED_WITHIN).await?;
    cluster.passed();
    Ok(())
}

pub(crate) async fn a_forged_grant_is_refused() -> Result<()> {
    let reason = "only by a node that was granted it";
    is_refused_until_it_stops("sync::grant_junk", "grant_transport_key", reason).await
}

/// Lines of the audit in one node's log that are about this.
fn audit_of(node: &Node, message: &str) -> Vec<Value> {
    let log = node.log();
    let lines = log
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines
        .filter(|line| line["target"] == "audit" && says(line, "message", message))
        .collect()
}

/// The slots of those lines that are about grants to a node, in order.
fn granted_to(nodes: &[Node], raft_id: u64) -> Vec<String> {
    let lines = nodes
        .iter()
        .flat_map(|node| audit_of(node, "granting a transport key"));
    let to_it = lines.filter(|line| line["node"] == raft_id);
    let mut slots: Vec<String> = to_it.map(|line| line["slot"].to_string()).collect();
    slots.sort();
    slots
}

/// The leader is the first to grant, and what it sends opens with nothing. Whose the first one was nobody has noted,
/// so it sends another, which opens, and is another key than the cluster's; then it is noted, and another holder's turn.
pub(crate) async fn a_grant_of_nothing_or_of_another_key_is_rejected_and_another_holder_grants() -> Result<()>
{
    let mut cluster = Playground::start(3).await?;
    let leader = cluster.leader().await?.node;
    // It grants for each of two slots.
    arm(&cluster.node(leader), "sync::grant_unopenable", "2*return").await?;
    arm(&cluster.node(leader), "sync::grant_planted", "2*off->return").await?;
    let node = cluster.add_node(false).await?;
    joins(&cluster, &node).await?;
    node.wait_ready(JOINED_WITHIN).await?;
    let both = ["\"2fa\"", "\"exchange\""];
    let raft_id = async |number: u32| -> Result<u64> {
        let status = cluster.status(number).await;
        Ok(status
            .with_context(|| format!("no status of node {number}"))?
            .raft_id)
    };
    let (own, granter) = (raft_id(node.number).await?, raft_id(leader).await?);

    // Once of a granter that nobody has noted, then of the leader. Logs are written a moment later.
    let rejected = until(
        "rejections of both granters for both slots",
        AUDITED_WITHIN,
        async || {
            let lines = audit_of(&node, "another holder has to grant");
            let different: BTreeSet<String> = lines
                .iter()
                .map(|line| format!("{} {}", line["granted_by"], line["slot"]))
                .collect();
            (different.len() >= 4).then_some(lines)
        },
    )
    .await?;
    let granters = [Value::Null, Value::from(granter)];
    for by in &granters {
        let lines = rejected.iter().filter(|line| line["granted_by"] == *by);
        let mut slots: Vec<String> = lines.map(|line| line["slot"].to_string()).collect();
        slots.sort();
        // A rejection that had no answer in time is said once more.
        slots.dedup();
        assert_eq!(slots, both, "granted by {by}: {rejected:?}");
    }
    let by_them = |line: &Value| granters.contains(&line["granted_by"]);
    ensure!(rejected.iter().all(by_them), "{rejected:?}");
    let another = |line: &Value| says(line, "reason", "its check differs from the committed one");
    until("refusals of both kinds", AUDITED_WITHIN, async || {
        let refused = audit_of(&node, "token sync refuses");
        let others = refused.iter().filter(|line| another(line)).count();
        (others > 0 && others < refused.len()).then_some(())
    })
    .await?;

    // Who granted is in the audit of those who did.
    until(
        "two grants of the leader for each slot",
        AUDITED_WITHIN,
        async || {
            let of_leader = granted_to(&[cluster.node(leader)], own);
            let times = |slot: &str| of_leader.iter().filter(|granted| *granted == slot).count();
            both.iter().all(|slot| times(slot) >= 2).then_some(())
        },
    )
    .await?;
    until("another's grants in its audit", AUDITED_WITHIN, async || {
        let mut of_others = granted_to(&cluster.others(leader), own);
        of_others.dedup();
        (of_others == both).then_some(())
    })
    .await?;

    // Nothing of what was refused is left in its tokens.
    let holder = MEMBERS.into_iter().find(|number| *number != leader);
    let holder = cluster.node(holder.context("no other holder")?);
    let held = |node: &Node| objects(&node.dir.join("tokens"));
    assert_eq!(held(&node)?, held(&holder)?);
    let sealed = seal_under(&cluster.client_on("trading-1", 1)?, CONTEXT, b"granted", 1).await?;
    open(&cluster.client_on("trading-1", node.number)?, CONTEXT, &sealed).await?;
    cluster.passed();
    Ok(())
}

pub(crate) async fn an_acknowledgement_for_another_node_is_refused() -> Result<()> {
    let reason = "may say this of itself";
    is_refused_until_it_stops("sync::ack_as_other", "ack_versions", reason).await
}

/// It takes an administrator's call as only a member may, and hands it on in his name.
pub(crate) async fn a_call_forwarded_by_a_node_that_is_no_member_yet_is_refused() -> Result<()> {
    let mut cluster = Playground::start(3).await?;
    // With a key that nobody believes it stays what it is.
    let liar = joins_with(&mut cluster, "sync::register_other_key").await?;
    arm(&liar, "forward::as_member", "return").await?;
    let name = liar.id();
    audited(&cluster, |line| says(line, "problem", &name)).await?;
    let before = made(&context_on(&cluster, 1, CONTEXT).await?);
    let forwarded = cluster
        .client_on("admin", liar.number)?
        .rotate(CONTEXT, Some("forwarded-by-a-liar"))
        .await;
    ensure!(forwarded.is_err(), "{forwarded:?}");
    let line = audited(&cluster, |line| {
        line["peer"] == name.as_str()
            && line["asked"] == "key.rotate"
            && line["outcome"] == "refused"
            && line["epoch"] == 1
    })
    .await?;
    println!("{line}");
    let after = made(&context_on(&cluster, 1, CONTEXT).await?);
    ensure!(before == after, "{after} versions instead of {before}");
    check_unharmed(&cluster, &liar).await?;
    cluster.passed();
    Ok(())
}
