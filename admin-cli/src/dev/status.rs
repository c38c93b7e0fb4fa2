//! `hsmctl dev status`: which nodes run, and which are ready, asked of their health listeners.

use anyhow::Result;
use hsm_api::client::HealthClient;
use serde::Serialize;

use super::layout::{Layout, Node};
use super::{Place, process};
use crate::commands::{Session, on_runtime};
use crate::output::{self, or_dash};

/// One node, as it is now.
#[derive(Debug, Serialize)]
struct NodeStatus {
    node: u32,
    node_id: String,
    /// Absent while it does not run.
    pid: Option<i32>,
    ready: bool,
    api: String,
    health: String,
    log: String,
}

pub(super) fn status(session: &Session, place: &Place) -> Result<()> {
    let (layout, facts) = Layout::open(&place.dir)?;
    print(session, &layout.nodes(facts)?)
}

pub(super) fn print(session: &Session, nodes: &[Node]) -> Result<()> {
    let seen = on_runtime(async {
        let mut seen = Vec::with_capacity(nodes.len());
        for node in nodes {
            let pid = process::running(node);
            seen.push(NodeStatus {
                node: node.number,
                node_id: node.id(),
                pid,
                ready: pid.is_some() && HealthClient::new(&node.health()).is_ready().await,
                api: node.endpoint(),
                health: format!("http://{}", node.health()),
                log: node.log().display().to_string(),
            });
        }
        seen
    })?;
    output::print(session.format(), &seen, || {
        output::table(
            ["NODE", "PID", "STATE", "API", "HEALTH", "LOG"],
            seen.iter().map(|node| {
                [
                    node.node_id.clone(),
                    or_dash(node.pid),
                    match (node.pid, node.ready) {
                        (None, _) => "stopped",
                        (Some(_), false) => "not ready",
                        (Some(_), true) => "ready",
                    }
                    .to_owned(),
                    node.api.clone(),
                    node.health.clone(),
                    node.log.clone(),
                ]
            }),
        )
    })
}
