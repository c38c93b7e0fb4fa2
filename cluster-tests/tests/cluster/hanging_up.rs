//! Whoever asks for a change and hangs up has asked for it all the same: it is done, and it is in the audit.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::failpoints::arm;
use cluster_tests::{Node, Playground, until};
use serde_json::Value;

use crate::common::{CONTEXT, settled_on};
use crate::metrics::token_calls;

/// How long the change takes once its key is made, which is when the caller loses patience.
const TAKES: &str = "1*sleep(2000)";
/// Until it is made on a busy machine.
const MADE_WITHIN: Duration = Duration::from_secs(60);
/// From then to the line.
const AUDITED_WITHIN: Duration = Duration::from_secs(60);

/// Lines of the audit about finished rotations, of the node that was asked.
fn entries(node: &Node) -> usize {
    let log = node.log();
    let lines = log
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines
        .filter(|line| {
            line["target"] == "audit"
                && line["action"] == "key.rotate"
                && line["place"] == "entry"
                && line["outcome"] == "done"
        })
        .count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_who_hangs_up_takes_no_line_of_the_audit_with_him() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let leader = cluster.leader().await?;
    let follower = cluster.others(leader.node)[0].number;
    let leading = cluster.node(leader.node);
    let keys_made = async || -> Result<f64> {
        let metrics = leading.metrics().await?;
        Ok(token_calls(&metrics, "generate_kek"))
    };
    let mut version = 1;
    for number in [leader.node, follower] {
        let node = cluster.node(number);
        let before = entries(&node);
        arm(
            &cluster.node(leader.node),
            "rotation::before_prepare_commit",
            TAKES,
        )
        .await?;
        let keys = keys_made().await?;
        let client = cluster.client_on("admin", number)?;
        let asked = tokio::spawn(async move { client.rotate(CONTEXT, None).await });
        until("the key that the leader makes for it", MADE_WITHIN, async || {
            let made = keys_made().await.ok()? > keys;
            (made || asked.is_finished()).then_some(())
        })
        .await?;
        // With its connection.
        asked.abort();
        let answer = asked.await;
        ensure!(answer.is_err(), "it was answered: {answer:?}");
        until("the line", AUDITED_WITHIN, async || {
            (entries(&node) == before + 1).then_some(())
        })
        .await
        .with_context(|| node.id())?;
        version += 1;
        settled_on(&cluster, number, CONTEXT, version).await?;
    }
    cluster.passed();
    Ok(())
}
