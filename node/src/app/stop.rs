//! Stopping, at a signal or because this node was removed from its cluster: readiness goes first, then a leader hands over,
//! then connections drain, then changes end that nobody waits for any more.

use std::time::Duration;

use raft_store::state::node::NodeStatus;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::admin::Changes;
use crate::config::Drain;
use crate::consensus::{Consensus, Gate};
use crate::http::{DrainControl, OpenConnections, Phase};

/// Waits for SIGTERM, SIGINT or this node's removal, then drains. Says why it was removed, if it was: whoever is on its way
/// to it is served, and it holds what the others hold until then. A node that leaves drains once it votes no more, while it
/// is still sent the log (`consensus::membership`).
pub(super) async fn wait(
    consensus: &Consensus,
    mut removed: watch::Receiver<Option<String>>,
    drain: &DrainControl,
    times: Drain,
    open: &OpenConnections,
    changes: &Changes,
) -> Option<String> {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        super::die("signals cannot be received");
    };
    let mut leaves = false;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        Ok(_) = removed.wait_for(Option::is_some) => {}
        () = when(consensus, |status, votes| matches!(status, NodeStatus::Leaving { .. }) && !votes) => leaves = true,
    }
    tell(&removed);
    tracing::info!(leaves, "stopping: not ready from now on");
    drain.advance(Phase::Notice);
    consensus.hand_over_first().await;
    tracing::info!("draining connections");
    tokio::select! {
        () = drain.run(times, open) => {}
        () = consensus.go_on_handing_over() => {}
    }
    if leaves {
        // Its tombstone says that it never runs again. One that is kept after all has to be started anew.
        tokio::select! {
            Ok(_) = removed.wait_for(Option::is_some) => {}
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = when(consensus, |status, _| *status == NodeStatus::Member) => {
                tracing::error!("this node was to leave and stays after all, but has stopped listening: start it again");
            }
        }
        tell(&removed);
    }
    // A change whose caller is gone still has a line of the audit to write.
    if tokio::time::timeout(times.timeout, changes.end()).await.is_err() {
        tracing::warn!("administrative changes were still under way when the time to drain was over");
    }
    consensus.step_down().await;
    tracing::info!("stopped");
    removed.borrow().clone()
}

fn tell(removed: &watch::Receiver<Option<String>>) {
    if let Some(why) = &*removed.borrow() {
        tracing::error!(why, "this node was removed from its cluster");
    }
}

/// Between looks: that the state has caught up is in no entry.
const LOOK: Duration = Duration::from_millis(100);

/// Until this is so of what the state says of this node, and of whether it votes. What it says right after a start may be long over.
async fn when(consensus: &Consensus, holds: impl Fn(&NodeStatus, bool) -> bool) {
    let is_so = || {
        if !matches!(consensus.start_gate(), Gate::Open { .. }) {
            return false;
        }
        let (published, own) = (consensus.published(), consensus.raft_id());
        let node = own.and_then(|id| published.state.nodes().get(&id));
        let votes = published.membership.voter_ids().any(|id| own == Some(id));
        node.is_some_and(|node| holds(&node.status, votes))
    };
    let mut applied = consensus.applied();
    loop {
        applied.mark_unchanged();
        if is_so() {
            return;
        }
        // The process ends first where nothing is applied any more.
        if let Ok(Err(_)) = tokio::time::timeout(LOOK, applied.changed()).await {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::path::Path;

    use hsm_api::data::BATCH_MAX_ITEMS;
    use hsm_core::secrets::Pin;
    use hsm_core::{SlotOptions, batch_time, batch_wait};

    use crate::app::start::TOKEN_TIMEOUT;
    use crate::config::Config;
    use crate::sync::RETIRE_AFTER;

    #[test]
    fn callers_wait_for_as_long_as_a_batch_may_take_and_its_keys_stay_for_longer() {
        let pin = Pin::new(String::new());
        let deadline = SlotOptions::new("s", "l", pin, "/nonexistent".into()).deadline;
        for items in [1, 99, 100, BATCH_MAX_ITEMS] {
            let wait = batch_wait(deadline, items);
            assert_eq!(wait, batch_time(TOKEN_TIMEOUT, items), "{items}");
            assert!(RETIRE_AFTER > wait, "{items}: {wait:?}");
        }
    }

    #[test]
    fn what_is_in_hand_has_the_time_of_the_largest_batch() {
        let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config-examples/cluster-node.yaml");
        let given = std::fs::read_to_string(&example).unwrap();
        let by_default = given.replace("finish_ms: 70000", "finish_ms: ~");
        assert_ne!(given, by_default);
        for text in [given, by_default] {
            let set = |name: &str| {
                let secret = name.starts_with("HSM_PIN_") || name == "TOKEN_REPLICATION_KEY";
                secret.then(|| "5a".repeat(32))
            };
            let config = Config::parse(&text, &example, Some(0o600), &set).unwrap();
            let drain = config.server.drain;
            assert!(
                drain.finish >= batch_time(TOKEN_TIMEOUT, BATCH_MAX_ITEMS),
                "{drain:?}"
            );
        }
    }
}
