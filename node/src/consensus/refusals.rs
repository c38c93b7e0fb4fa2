//! The audit of the cluster listener: which peer was refused what, and why. Peers go by the name in their
//! verified certificate, and each has a budget of lines, so that none can fill the log or hide another.

use std::fmt::Display;
use std::time::{Duration, Instant};

use raft_store::names::RaftId;

use super::budget::Budget;
use super::shared::Shared;

/// Longest text of a reason, which may repeat what a peer has sent.
const MAX: usize = 300;

/// Lines of one peer.
pub(super) fn lines() -> Budget {
    Budget::new(50, Duration::from_secs(10))
}

/// One line, whatever a peer has sent.
fn plain(text: &str) -> String {
    let text = text.chars().take(MAX);
    text.map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

impl Shared {
    /// Writes that `peer`, which says it is `raft_id`, was refused what it asked for.
    pub(super) fn refuse(&self, peer: &str, raft_id: RaftId, asked: &str, reason: impl Display) {
        let Some(suppressed) = self.refusals.take(peer, Instant::now()) else {
            return;
        };
        let (peer, reason) = (plain(peer), plain(&reason.to_string()));
        let (outcome, epoch) = ("refused", crate::logging::epoch());
        tracing::warn!(
            target: "audit",
            epoch, peer, raft_id, asked, reason, outcome, suppressed,
            "peer refused"
        );
    }

    /// Writes that `peer` refuses this node, and what follows from it.
    pub(super) fn note_accusation(&self, peer: &str, raft_id: RaftId, reason: impl Display, what: &str) {
        if self.refusals.take(peer, Instant::now()).is_none() {
            return;
        }
        let (peer, reason) = (plain(peer), plain(&reason.to_string()));
        tracing::error!(target: "audit", epoch = crate::logging::epoch(), peer, raft_id, reason, "{what}");
    }

    /// Writes, once in a run, which peer showed that this node's log, or its epoch, is not its cluster's.
    pub(super) fn note_older_copy(&self, peer: &str, raft_id: RaftId, reason: impl Display) {
        let (peer, reason) = (plain(peer), plain(&reason.to_string()));
        let what = "this node is not ready and changes nothing any more";
        tracing::error!(target: "audit", epoch = crate::logging::epoch(), peer, raft_id, reason, "{what}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_peer_makes_a_second_line() {
        assert_eq!(plain("a\nb\r\u{7}c"), "a\u{fffd}b\u{fffd}\u{fffd}c");
        assert_eq!(plain(&"x".repeat(1000)).len(), MAX);
    }
}
