//! Failpoints of a running node, over its health listener. Only builds with the feature have them.

use anyhow::{Context, Result, bail};
use hsm_api::paths;

use crate::node::Node;
use crate::playground::{Leader, Playground};

/// The leader has committed a version. From here on it has a number for good, and whoever leads next has to do something
/// about it.
pub const PREPARED: &str = "rotation::after_prepare_commit";

/// A node is about to import a key into its token.
pub const IMPORTS: &str = "rotation::before_import";

/// The steps of a rotation, in the order in which a leader passes them.
pub const ROTATION: [&str; 10] = [
    "rotation::before_wrap",
    "rotation::after_wrap",
    "rotation::before_prepare_commit",
    PREPARED,
    IMPORTS,
    "rotation::after_import",
    "rotation::before_ack",
    "rotation::after_ack",
    "rotation::before_activate_commit",
    "rotation::after_activate_commit",
];

/// Configures a failpoint with `kill` or an action of the `fail` crate; `off` disarms it.
pub async fn arm(node: &Node, name: &str, action: &str) -> Result<()> {
    let path = format!(
        "{}?name={}&action={}",
        paths::FAILPOINTS,
        // The listener decodes the action only.
        name,
        paths::encode_segment(action)
    );
    let answer = node.patient().post(&path).await.with_context(|| node.id())?;
    if answer.status == 404 {
        bail!(
            "{}: no failpoints in this build; build with --features failpoints",
            node.id()
        );
    }
    if !answer.is_success() {
        bail!(
            "{}: {name}={action}: {} {}",
            node.id(),
            answer.status,
            answer.text()
        );
    }
    Ok(())
}

/// Elections at most that come between a look for the leader and its failpoint.
const ELECTIONS: u32 = 10;

/// Lets the leader among these nodes kill itself when it reaches the point. It leads with the failpoint: of one that was
/// overtaken meanwhile it is taken back, because it may never get there.
pub async fn kill_leader_at(cluster: &Playground, among: &[Node], name: &str) -> Result<Leader> {
    for _ in 0..ELECTIONS {
        let leader = cluster.leader_among(among).await?;
        let node = cluster.node(leader.node);
        kill_at(&node, name).await?;
        if cluster.leader_among(among).await? == leader {
            return Ok(leader);
        }
        arm(&node, name, "off").await?;
    }
    bail!("{ELECTIONS} elections in a row: no leader stays for long enough to be given {name}")
}

/// Lets the node kill itself with SIGKILL when it reaches the point.
pub async fn kill_at(node: &Node, name: &str) -> Result<()> {
    arm(node, name, "kill").await
}
