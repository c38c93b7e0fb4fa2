//! Stopping: readiness goes first, then connections drain, then changes end that nobody waits for any more, then a
//! leader hands over.

use tokio::signal::unix::{SignalKind, signal};

use crate::admin::Changes;
use crate::config::Drain;
use crate::consensus::Consensus;
use crate::http::{DrainControl, OpenConnections};

/// Waits for SIGTERM or SIGINT, then drains.
pub(super) async fn wait(
    consensus: &Consensus,
    drain: &DrainControl,
    times: Drain,
    open: &OpenConnections,
    changes: &Changes,
) {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        super::die("signals cannot be received");
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping: not ready from now on, draining connections");
    drain.run(times.notice, times.timeout, open).await;
    // A change whose caller is gone still has a line of the audit to write, and may need this leader.
    if tokio::time::timeout(times.timeout, changes.end()).await.is_err() {
        tracing::warn!("administrative changes were still under way when the time to drain was over");
    }
    consensus.step_down().await;
    tracing::info!("stopped");
}
