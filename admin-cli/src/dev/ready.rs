//! Waiting for nodes: for their listeners, and until they may be sent requests. Every wait has a deadline,
//! and says at its end which check fails, with what the log says of this start alone.

use std::collections::BTreeMap;
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

/// Where in each node's log the lines of its present start begin, by its number; absent is the beginning.
pub(crate) type Begun = BTreeMap<u32, u64>;

/// Whether the node says that it is shutting down.
pub(crate) async fn is_draining(node: &Node) -> bool {
    let answer = HealthClient::new(&node.health()).get(paths::READYZ).await;
    answer.is_ok_and(|answer| says_it_drains(&answer.text()))
}

fn says_it_drains(readyz: &str) -> bool {
    readyz.lines().any(|line| line.starts_with("[-] draining:"))
}

/// Until the node's health listener answers. `child` is its process if this program started it.
pub(crate) async fn wait_live(
    node: &Node,
    mut child: Option<&mut Child>,
    begun: &Begun,
    limit: Duration,
) -> Result<()> {
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
            bail!("node {} {how}; {}", node.number, tail(node, begun));
        }
        if Instant::now() >= deadline {
            bail!(
                "node {} does not answer on http://{}{} after {limit:?}; {}",
                node.number,
                node.health(),
                paths::LIVEZ,
                tail(node, begun)
            );
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Until every node's `/readyz` is 200.
pub(crate) async fn wait_ready(nodes: &[Node], begun: &Begun, limit: Duration) -> Result<()> {
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
            bail!("node {} has ended; {}", dead.number, tail(dead, begun));
        }
        if Instant::now() >= deadline {
            let mut text = format!("not ready after {limit:?}:");
            for node in still {
                text.push_str(&format!("\nnode {}: {}", node.number, failing_checks(node).await));
                text.push_str(&format!("\n  {}", tail(node, begun)));
            }
            bail!(text);
        }
        waiting = still;
        tokio::time::sleep(POLL).await;
    }
}

fn tail(node: &Node, begun: &Begun) -> String {
    node.log_tail(TAIL, begun.get(&node.number).copied().unwrap_or_default())
}

/// What `/readyz?verbose` says.
async fn failing_checks(node: &Node) -> String {
    match HealthClient::new(&node.health()).get("/readyz?verbose").await {
        Ok(answer) => answer.text().trim().replace('\n', "\n  "),
        Err(error) => error.to_string(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_is_shutting_down_is_told_from_one_that_is_not_ready() {
        assert!(says_it_drains(
            "[-] draining: the node is shutting down\nnot ready\n"
        ));
        assert!(!says_it_drains(
            "[+] draining: serving\n[-] fresh: no leader\nnot ready\n"
        ));
        assert!(!says_it_drains("ready\n"));
    }
}
