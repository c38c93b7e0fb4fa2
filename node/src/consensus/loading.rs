//! Who is being sent a snapshot just now: it may say nothing for long, and is not dead.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use raft_store::names::RaftId;

use crate::lock::lock;

/// See the module.
#[derive(Default)]
pub(super) struct Loading(Mutex<BTreeMap<RaftId, u32>>);

/// A snapshot on its way. It has ended, well or not, when this is dropped.
pub(super) struct Transfer<'a> {
    of: &'a Loading,
    to: RaftId,
}

impl Loading {
    /// A peer has taken the connection that its snapshot is sent on.
    pub(super) fn begin(&self, to: RaftId) -> Transfer<'_> {
        *lock(&self.0).entry(to).or_default() += 1;
        Transfer { of: self, to }
    }

    pub(super) fn peers(&self) -> BTreeSet<RaftId> {
        lock(&self.0).keys().copied().collect()
    }
}

impl Drop for Transfer<'_> {
    fn drop(&mut self) {
        let mut running = lock(&self.of.0);
        if let Some(count) = running.get_mut(&self.to) {
            *count -= 1;
            if *count == 0 {
                running.remove(&self.to);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_loading_until_the_last_transfer_to_it_has_ended() {
        let loading = Loading::default();
        let first = loading.begin(2);
        let second = loading.begin(2);
        let other = loading.begin(3);
        drop(first);
        assert_eq!(loading.peers(), BTreeSet::from([2, 3]));
        drop(second);
        assert_eq!(loading.peers(), BTreeSet::from([3]));
        drop(other);
        assert_eq!(loading.peers(), BTreeSet::new());
    }
}
