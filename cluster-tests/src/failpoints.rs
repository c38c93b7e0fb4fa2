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

/// Where a node writes what Raft must not lose, and applies it.
pub const STORE: [&str; 5] = [
    "store::before_append",
    "store::after_append",
    "store::before_vote",
    "store::after_vote",
    "store::before_apply",
];

/// Where it makes a snapshot, and shortens its log behind one.
pub const SNAPSHOT: [&str; 6] = [
    "store::before_snapshot",
    "store::before_snapshot_name",
    "store::after_snapshot",
    "store::before_purge",
    "store::between_purge_and_promise",
    "store::after_purge",
];

/// Where it installs one that it was sent.
pub const INSTALL: [&str; 4] = [
    "store::before_install",
    "store::in_install",
    "store::before_pointer",
    "store::after_pointer",
];

/// Where the leader begins a destruction whose wait is over.
pub const BEGIN_DESTROY: [&str; 2] = [
    "destruction::before_begin_commit",
    "destruction::after_begin_commit",
];

/// Where the leader changes Raft's membership.
pub const MEMBERSHIP: [&str; 4] = [
    "membership::before_change",
    "membership::after_change",
    "store::joint_applied",
    "store::uniform_applied",
];

/// Where the leader makes a node that has left a tombstone.
pub const BURY: [&str; 2] = ["membership::before_bury", "membership::after_bury"];

/// Where the leader replaces the transport key of a slot.
pub const REKEY: [&str; 3] = [
    "rekey::before_offer",
    "rekey::before_activate_commit",
    "rekey::after_activate_commit",
];

/// Where the leader seals records anew, under another replication key.
pub const RESEAL: [&str; 2] = ["rekey::before_reseal_commit", "rekey::after_reseal_commit"];

/// Where it removes a key that is to be destroyed from its token.
pub const DESTROY: [&str; 2] = ["sync::before_remove", "sync::after_remove"];

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
