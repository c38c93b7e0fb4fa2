//! What nodes write down about administrators' calls, and that the leader judges by itself what another node hands on.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::{Node, Playground, until};
use hsm_api::admin::{RevocationMatch, RevokeRequest};
use serde_json::Value;

/// A node writes its log a moment after it has answered.
const WRITTEN: Duration = Duration::from_secs(30);

/// The line of the audit about a call, in one node's log. It is one where the call came in; the leader has one for each time
/// that it was handed on, which a node repeats when it had no answer in time.
async fn line(node: &Node, place: &str, action: &str, resource: &str) -> Result<Value> {
    let wanted = |line: &Value| {
        line["target"] == "audit"
            && line["place"] == place
            && line["action"] == action
            && line["resource"] == resource
    };
    let what = format!("{place} {action} {resource} in the audit of {}", node.id());
    let mut found: Vec<Value> = until(&what, WRITTEN, async || {
        let log = node.log();
        let lines = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let found: Vec<Value> = lines.filter(wanted).collect();
        (!found.is_empty()).then_some(found)
    })
    .await?;
    let handed_on = |line: &Value| place == "leader" && line["request_id"] == found[0]["request_id"];
    ensure!(found.iter().skip(1).all(handed_on), "{found:?}");
    Ok(found.remove(0))
}

fn says(line: &Value, field: &str, part: &str) -> bool {
    line[field].as_str().is_some_and(|text| text.contains(part))
}

async fn raft_id(cluster: &Playground, node: &Node) -> Result<u64> {
    let status = cluster.status(node.number).await;
    Ok(status
        .with_context(|| format!("no status of {}", node.id()))?
        .raft_id)
}

/// Through each node in turn: who did what, and on the leader also which node says so.
pub(crate) async fn every_change_is_audited_where_it_was_asked_for_and_on_the_leader(
    cluster: &Playground,
) -> Result<()> {
    let leader = cluster.node(cluster.leader().await?.node);
    for node in cluster.nodes() {
        let cn = format!("through-{}", node.number);
        let resource = format!("cn {cn}");
        let request = RevokeRequest {
            what: Some(RevocationMatch {
                cn: Some(cn),
                ..RevocationMatch::default()
            }),
            certificate: None,
            reason: "audited".to_owned(),
        };
        let admin = cluster.client_on("admin", node.number)?;
        admin.revoke(&request).await?;
        let entry = line(&node, "entry", "revocations.add", &resource).await?;
        let decided = line(&leader, "leader", "revocations.add", &resource).await?;
        for line in [&entry, &decided] {
            let done = line["outcome"] == "done" && says(line, "principal", "CN=admin OU=Admin");
            ensure!(done, "{line}");
        }
        let via = raft_id(cluster, &node).await?;
        ensure!(decided["via_node"] == via, "not {via}: {decided}");
        let same = entry["request_id"] == decided["request_id"] && entry["request_id"].is_string();
        ensure!(same, "{entry} {decided}");
    }
    Ok(())
}

/// A follower that looks at nobody's role hands on what it is asked for. The leader knows who asked, and through whom.
#[cfg(feature = "failpoints")]
pub(crate) async fn what_a_follower_lets_through_the_leader_refuses(cluster: &Playground) -> Result<()> {
    use cluster_tests::failpoints::arm;
    use hsm_api::ErrorCode;

    use crate::common::{CONTEXT, context_on};

    const POINT: &str = "admin::allow_everybody";
    let leader = cluster.node(cluster.leader().await?.node);
    let follower = cluster.others(leader.number)[0].clone();
    let before = context_on(cluster, leader.number, CONTEXT).await?.versions.len();
    arm(&follower, POINT, "return").await?;
    let nobody = cluster.client_on("trading-1", follower.number)?;
    let refused = nobody.rotate(CONTEXT, None).await;
    arm(&follower, POINT, "off").await?;
    let code = refused.err().and_then(|error| error.code());
    ensure!(code == Some(ErrorCode::RoleRequired), "{code:?}");

    let line = line(&leader, "leader", "key.rotate", CONTEXT).await?;
    let via = raft_id(cluster, &follower).await?;
    ensure!(
        line["outcome"] == "refused" && line["code"] == "role_required" && line["via_node"] == via,
        "not through {via}: {line}"
    );
    ensure!(
        says(&line, "principal", "CN=trading-1 OU=Trading")
            && says(&line, "reason", "needs one of the roles admin"),
        "{line}"
    );
    let after = context_on(cluster, leader.number, CONTEXT).await?.versions.len();
    ensure!(before == after, "{after} versions instead of {before}");
    Ok(())
}
