//! The leader's wall clock steps, by libfaketime; its monotonic clock goes on.

use std::time::{Duration, SystemTime};

use anyhow::Result;
use cluster_tests::{until, wall_clock};

use super::Done;
use crate::cluster::Cluster;

/// As far as the node's clock may be from what was asked for: it is asked some time after.
const CLOSE: f64 = 30.0;
/// A node reads its clock whenever it says its metrics.
const SEEN: Duration = Duration::from_secs(10);

pub(super) async fn step(seconds: i64, lasts: Duration, cluster: &Cluster) -> Result<Done> {
    let _moved = cluster.right_clocks().await;
    let Some(leader) = cluster.leader_soon().await else {
        return Ok(Done::not_counted("nobody", "nobody led"));
    };
    let node = cluster.node(leader.node);
    let what = format!("node {}, {seconds:+} s", leader.node);
    wall_clock::set(&node, &format!("{seconds:+}"))?;
    let seen = until("the other time", lasts.max(SEEN), async || {
        let shown = cluster.metric(leader.node, "hsm_clock_seconds").await?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
        let off = shown - now.as_secs_f64();
        ((off - seconds as f64).abs() < CLOSE).then_some(())
    });
    let (seen, ()) = tokio::join!(seen, tokio::time::sleep(lasts));
    wall_clock::set(&node, "+0d")?;
    Ok(Done::counted_if(
        seen.is_ok(),
        what,
        "the node has not shown that time",
    ))
}
