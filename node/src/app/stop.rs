//! Stopping: readiness goes first, then connections drain, then a leader hands over.

use tokio::signal::unix::{SignalKind, signal};

use crate::config::Drain;
use crate::consensus::Consensus;
use crate::http::{DrainControl, OpenConnections};

/// Waits for SIGTERM or SIGINT, then drains.
pub(super) async fn wait(consensus: &Consensus, drain: &DrainControl, times: Drain, open: &OpenConnections) {
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
    consensus.step_down().await;
    tracing::info!("stopped");
}
