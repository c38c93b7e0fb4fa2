//! Waiting for nodes: for their listeners, and until they may be sent requests. Every wait has a deadline,
//! and says at its end which check fails.

use std::process::Child;
use std::time::Duration;

use anyhow::{Result, bail};
use hsm_api::client::HealthClient;
use hsm_api::paths;
use tokio::time::Instant;

use super::layout::Node;
use super::process;

const POLL: Duration = Duration::from_millis(100);
/// Lines of the log in an error.
const TAIL: usize = 20;

/// Until the node's health listener answers. `child` is its process if this program started it.
pub(crate) async fn wait_live(node: &Node, mut child: Option<&mut Child>, limit: Duration) -> Result<()> {
    let health = HealthClient::new(&node.health());
    let deadline = Instant::now() + limit;
    loop {
        if health
            .get(paths::LIVEZ)
            .await
            .is_ok_and(|answer| answer.status == 200)
        {
            return Ok(());
        }
        // Before its pid file is there only the child itself tells.
        let ended = match &mut child {
            Some(child) => child.try_wait()?.map(|status| format!("ended with {status}")),
            None => process::running(node)
                .is_none()
                .then(|| "does not run".to_owned()),
        };
        if let Some(how) = ended {
            bail!("node {} {how}; {}", node.number, node.log_tail(TAIL));
        }
        if Instant::now() >= deadline {
            bail!(
                "node {} does not answer on http://{}{} after {limit:?}; {}",
                node.number,
                node.health(),
                paths::LIVEZ,
                node.log_tail(TAIL)
            );
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Until every node's `/readyz` is 200.
pub(crate) async fn wait_ready(nodes: &[Node], limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    let mut waiting: Vec<&Node> = nodes.iter().collect();
    loop {
        let mut still = Vec::with_capacity(waiting.len());
        for node in waiting {
            if !HealthClient::new(&node.health()).is_ready().await {
                still.push(node);
            }
        }
        if still.is_empty() {
            return Ok(());
        }
        if let Some(dead) = still.iter().find(|node| process::running(node).is_none()) {
            bail!("node {} has ended; {}", dead.number, dead.log_tail(TAIL));
        }
        if Instant::now() >= deadline {
            let mut text = format!("not ready after {limit:?}:");
            for node in still {
                text.push_str(&format!("\nnode {}: {}", node.number, failing_checks(node).await));
                text.push_str(&format!("\n  {}", node.log_tail(TAIL)));
            }
            bail!(text);
        }
        waiting = still;
        tokio::time::sleep(POLL).await;
    }
}

/// What `/readyz?verbose` says.
async fn failing_checks(node: &Node) -> String {
    match HealthClient::new(&node.health()).get("/readyz?verbose").await {
        Ok(answer) => answer.text().trim().replace('\n', "\n  "),
        Err(error) => error.to_string(),
    }
}
