//! A node that was away while a key version was destroyed, and for so long that the others do not have the log any
//! more that says so: what it comes back by is a snapshot.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use cluster_tests::{Playground, Program};
use hsm_api::ErrorCode;
use hsm_api::admin::KeyState;

use crate::common::{CONTEXT, formed_with, seal, settled_on};
use crate::key_life::{FIRST, GONE, READY, after, becomes, keks, owed_only_by, refused_everywhere};
use crate::snapshots::{index, leave_behind, with_short_logs};

/// As long as the node that returns takes before it destroys a key, if this build has failpoints: one that becomes ready
/// too early is ready long before.
const HESITATES: Duration = Duration::from_secs(3);

pub(crate) async fn a_node_that_returns_by_a_snapshot_destroys_its_copy_before_it_is_ready() -> Result<()> {
    let program = Program::new()?;
    let builder = Playground::builder().env("HSM_NODE_BIN", program.path());
    let cluster = formed_with(builder, |config| {
        let keys = "keys: {destroy: {min_wait_seconds: 1}}\nlogging:";
        with_short_logs(config).replacen("logging:", keys, 1)
    })
    .await?;
    let sealed = seal(&cluster.client("trading-1")?, CONTEXT, b"under the first").await?;
    cluster.client("admin")?.rotate(CONTEXT, None).await?;
    for node in cluster.nodes() {
        settled_on(&cluster, node.number, CONTEXT, 2).await?;
    }
    let leader = cluster.leader().await?;
    let others = cluster.others(leader.node);
    let (away, there) = (others[0].clone(), [cluster.node(leader.node), others[1].clone()]);
    let last = index(&away, "hsm_raft_last_log_index").await?;
    away.kill().await?;

    let admin = cluster.client_on("admin", leader.node)?;
    admin.destroy_key(CONTEXT, 1, &after(1), None).await?;
    owed_only_by(&cluster, &away, leader.node).await?;
    leave_behind(&admin, &there, last).await?;
    ensure!(
        keks(&cluster, &away)?.iter().any(|label| label == FIRST),
        "its copy is gone already"
    );

    // From the moment it says that it is ready, its token is clean. It dies there and then.
    program.write(&format!(
        "env HSM_FAILPOINTS='sync::before_remove=sleep({})' ",
        HESITATES.as_millis()
    ))?;
    let started = Instant::now();
    cluster.start_node(away.number).await?;
    away.wait_ready(READY).await?;
    let took = started.elapsed();
    let covered = index(&away, "hsm_raft_snapshot_index").await?;
    away.kill().await?;
    ensure!(
        covered > last,
        "its snapshot ends at {covered}, its log ended at {last}: it was sent none"
    );
    assert_eq!(keks(&cluster, &away)?, ["kek-exchange-key-v2"]);
    ensure!(
        !cfg!(feature = "failpoints") || took >= HESITATES,
        "it was ready after {took:?}, and removes a key in {HESITATES:?} at least"
    );

    program.plain()?;
    cluster.start_node(away.number).await?;
    away.wait_ready(READY).await?;
    for node in cluster.nodes() {
        let destroyed = becomes(&cluster, node.number, 1, KeyState::Destroyed, GONE).await?;
        ensure!(destroyed.acks.len() == 3, "{:?}", destroyed.acks);
    }
    refused_everywhere(&cluster, &sealed, ErrorCode::KeyVersionDestroyed).await?;
    cluster.passed();
    Ok(())
}
