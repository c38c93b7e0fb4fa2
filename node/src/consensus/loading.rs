//! Who is being sent a snapshot just now, or will be again in a moment: it may say nothing for long, and is not dead.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use raft_store::names::RaftId;

use crate::clock;
use crate::lock::lock;

/// How long a peer counts as loading after an attempt that failed. Between two of them are openraft's pause of 200 ms and a
/// connection that may take 2 s, several times over if the peer is busy with what it was sent.
const BETWEEN_ATTEMPTS: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Default)]
pub(super) struct Loading(Mutex<BTreeMap<RaftId, Attempts>>);

/// Of one peer.
#[derive(Default)]
struct Attempts {
    running: u32,
    /// When the last one failed, unless the peer has acknowledged anything since.
    failed: Option<Instant>,
}

/// A snapshot on its way. The attempt has failed when this is dropped, unless the snapshot was taken.
pub(super) struct Transfer<'a> {
    of: &'a Loading,
    to: RaftId,
    taken: bool,
}

impl Loading {
    /// A peer has taken the connection that its snapshot is sent on.
    pub(super) fn begin(&self, to: RaftId) -> Transfer<'_> {
        lock(&self.0).entry(to).or_default().running += 1;
        Transfer {
            of: self,
            to,
            taken: false,
        }
    }

    /// A peer has acknowledged entries of the log: it has what was before them.
    pub(super) fn acknowledged(&self, peer: RaftId) {
        if let Some(attempts) = lock(&self.0).get_mut(&peer) {
            attempts.failed = None;
        }
    }

    pub(super) fn peers(&self, now: Instant) -> BTreeSet<RaftId> {
        let mut all = lock(&self.0);
        all.retain(|_, attempts| {
            let failed = attempts.failed;
            attempts.running > 0
                || failed.is_some_and(|at| now.saturating_duration_since(at) < BETWEEN_ATTEMPTS)
        });
        all.keys().copied().collect()
    }
}

impl Transfer<'_> {
    /// The peer has installed it.
    pub(super) fn taken(mut self) {
        self.taken = true;
    }
}

impl Drop for Transfer<'_> {
    fn drop(&mut self) {
        if let Some(attempts) = lock(&self.of.0).get_mut(&self.to) {
            attempts.running = attempts.running.saturating_sub(1);
            attempts.failed = (!self.taken).then(clock::now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loads(loading: &Loading) -> BTreeSet<RaftId> {
        loading.peers(clock::now())
    }

    #[test]
    fn a_peer_is_loading_until_the_last_transfer_to_it_was_taken() {
        let loading = Loading::default();
        let first = loading.begin(2);
        let second = loading.begin(2);
        let other = loading.begin(3);
        first.taken();
        assert_eq!(loads(&loading), BTreeSet::from([2, 3]));
        second.taken();
        assert_eq!(loads(&loading), BTreeSet::from([3]));
        other.taken();
        assert_eq!(loads(&loading), BTreeSet::new());
    }

    #[test]
    fn a_peer_is_loading_between_two_attempts_until_it_acknowledges_or_none_comes() {
        let loading = Loading::default();
        drop(loading.begin(2));
        assert_eq!(loads(&loading), BTreeSet::from([2]));
        // It was taken the second time.
        loading.begin(2).taken();
        assert_eq!(loads(&loading), BTreeSet::new());
        // What it was sent came to its end after the leader had given up.
        drop(loading.begin(2));
        loading.acknowledged(2);
        assert_eq!(loads(&loading), BTreeSet::new());
        // It does not take connections any more.
        drop(loading.begin(2));
        assert_eq!(loading.peers(clock::now() + BETWEEN_ATTEMPTS), BTreeSet::new());
        // While one is on its way it loads, whatever it acknowledges.
        let _running = loading.begin(2);
        loading.acknowledged(2);
        assert_eq!(
            loading.peers(clock::now() + BETWEEN_ATTEMPTS),
            BTreeSet::from([2])
        );
    }
}
