//! The sessions of its tokens in which a node encrypts: one for each thread of a slot.

use anyhow::{Context, Result, ensure};
use cluster_tests::{Node, Playground, Shim};
use tokio::task::JoinSet;

use crate::common::{CONTEXT, seal};

/// Threads of each slot, by the configuration of a test.
pub(crate) const THREADS: usize = 4;
/// Rounds of requests: on a slow machine those of one may come one after the other.
const ROUNDS: usize = 5;
/// The rule by which a shim notes where something is encrypted.
pub(crate) const LOG: &str = "C_EncryptInit log -";

/// How often a node has encrypted in each session, since [`LOG`] is in force.
pub(crate) fn sessions(shim: &Shim, node: &Node) -> Result<Vec<usize>> {
    let process = node
        .pid()
        .with_context(|| format!("{} does not run", node.id()))?;
    Ok(shim.logged(process)?.into_values().collect())
}

/// Requests by themselves are spread over the threads of their slot, and so over sessions: over more than before.
pub(crate) async fn single_requests_have_several(
    cluster: &Playground,
    node: &Node,
    shim: &Shim,
) -> Result<()> {
    let before = sessions(shim, node)?;
    // A thread that waits for its token leaves what is queued meanwhile to the others.
    shim.obey(&[LOG, "C_Encrypt delay 5"])?;
    let mut after = Vec::new();
    for _ in 0..ROUNDS {
        let mut callers = JoinSet::new();
        for _ in 0..THREADS * 2 {
            let client = cluster.client_on("trading-1", node.number)?;
            callers.spawn(async move {
                for _ in 0..5 {
                    seal(&client, CONTEXT, b"by itself").await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(ended) = callers.join_next().await {
            ended??;
        }
        after = sessions(shim, node)?;
        if after.len() > before.len() {
            break;
        }
    }
    shim.obey(&[])?;
    ensure!(
        after.len() > before.len(),
        "{before:?} encryptions in each session before, then {after:?}"
    );
    Ok(())
}
