//! The gauges that are read rather than counted: set from one picture of the node each time somebody
//! asks for metrics.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use raft_store::names::RaftId;
use raft_store::state::ClusterState;
use raft_store::state::access::RevocationKey;
use raft_store::state::context::VersionKey;
use raft_store::storage::{Published, StoreFigures};

use super::rules::same;
use crate::admin::differences::Differences;
use crate::admin::revoked_file::Listed;
use crate::admin::seed::Seed;
use crate::consensus::View;
use crate::leases::Leases;
use crate::metrics;
use crate::slots::SlotManager;
use crate::sync::SyncStatus;

/// What was counted when the metrics were last asked for.
#[derive(Debug, Default)]
pub(super) struct Counted {
    timed_out: AtomicU64,
    leader_changes: AtomicU64,
}

/// Repeats what was added since the last time.
fn add_since(last: &AtomicU64, now: u64, add: impl Fn()) {
    let before = last.fetch_max(now, Ordering::Relaxed);
    for _ in before..now {
        add();
    }
}

impl Counted {
    pub(super) fn consensus(&self, view: &View, own: Option<RaftId>, state: &ClusterState) {
        metrics::role(view.role.as_str());
        metrics::raft_indexes(metrics::RaftIndexes {
            term: view.term,
            last_log: view.last_log,
            committed: view.committed,
            applied: view.applied,
            snapshot: view.snapshot,
        });
        metrics::quorum_ack_age(view.quorum_ack_age);
        metrics::staleness(view.staleness);
        metrics::proposals_pending(view.proposals_pending);
        add_since(
            &self.timed_out,
            view.proposals_timed_out,
            metrics::proposal_timed_out,
        );
        add_since(&self.leader_changes, view.leader_changes, metrics::leader_change);
        for (id, node) in state.nodes().iter() {
            // A peer that never answered this leader lacks everything, as far as anybody knows.
            let peer = view.peers.get(id).filter(|_| own != Some(*id));
            let lag = peer.map(|peer| view.last_log.saturating_sub(peer.matched.unwrap_or(0)));
            metrics::peer_lag(&node.name.to_arc(), lag);
        }
    }
}

/// Of contexts that have no key yet nothing is shown.
pub(super) fn invocations(state: &ClusterState, leases: &Leases) {
    for (context, left) in leases.left(state) {
        metrics::invocations_left(&context.to_arc(), left);
    }
    for (name, context) in state.contexts().iter() {
        let Some(version) = context.active_version else {
            continue;
        };
        let key = VersionKey {
            context: name.clone(),
            version,
        };
        let (lease, limit) = (state.lease(&key), context.policy.max_invocations);
        metrics::invocations_leased(&name.to_arc(), lease.leased, limit, state.is_used_up(&key));
    }
}

pub(super) fn store(figures: &StoreFigures) {
    metrics::store_bytes(figures.sled_bytes, figures.live_bytes);
}

/// Which rules the configuration was last compared with, and what stood in its file of revocations: they seldom change,
/// and metrics are asked for by everybody at any time.
#[derive(Default)]
pub(super) struct Compared(Mutex<Option<Last>>);

struct Last {
    published: Arc<Published>,
    listed: Arc<Vec<(RevocationKey, String)>>,
}

impl Compared {
    pub(super) fn configuration(&self, seed: &Seed, published: &Arc<Published>) {
        if !self.has_changed(published, &seed.revocations) {
            return;
        }
        let differences = Differences::between(seed, &published.state);
        metrics::config_differs(differences.sections());
    }

    /// Whether the rules, or the file's, are others than when this was last asked.
    fn has_changed(&self, published: &Arc<Published>, listed: &Listed) -> bool {
        let listed = listed.load();
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = !last.as_ref().is_some_and(|last| {
            let contexts = last.published.state.contexts();
            contexts.is_clone_of(published.state.contexts())
                && same(&last.published, published)
                && Arc::ptr_eq(&last.listed, &listed)
        });
        *last = Some(Last {
            published: Arc::clone(published),
            listed,
        });
        changed
    }
}

pub(super) fn slots(slots: &SlotManager, sync: &SyncStatus, state: &ClusterState) {
    // Every slot of the cluster: one that is not lacking any more shows as such.
    let known = state.slots().iter().map(|(name, _)| name);
    for name in known.chain(&sync.unconfigured) {
        metrics::slot_unconfigured(&name.to_arc(), sync.unconfigured.contains(name));
    }
    for entry in slots.entries() {
        let name: Arc<str> = entry.name().to_arc();
        metrics::slot_state(&name, entry.state().name());
        let missing = sync.missing_keys(entry.name().as_str());
        metrics::keys_missing(&name, usize::try_from(missing).unwrap_or(usize::MAX));
    }
    if let Some(at) = sync.last_full_sync() {
        metrics::sync_age(Instant::now().saturating_duration_since(at));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::cell::Cell;

    use raft_store::command::{AddRevocations, Op};

    use super::*;
    use crate::rotation::testing::World;

    #[test]
    fn what_was_counted_is_added_once() {
        let (last, added) = (AtomicU64::new(0), Cell::new(0));
        for (now, total) in [(0, 0), (3, 3), (3, 3), (2, 3), (5, 5)] {
            add_since(&last, now, || added.set(added.get() + 1));
            assert_eq!(added.get(), total);
        }
    }

    #[test]
    fn the_configuration_is_compared_again_only_with_other_rules() {
        let compared = Compared::default();
        let mut world = World::new(1);
        let listed = std::cell::RefCell::new(Listed::default());
        let has_changed = |world: &World| {
            let published = Arc::new(world.published());
            compared.has_changed(&published, &listed.borrow())
        };
        assert!(has_changed(&world));
        let version = world.prepare("c");
        assert!(has_changed(&world));
        world.ack(1, "c", version);
        assert!(!has_changed(&world));
        world.context("new", "s");
        assert!(has_changed(&world));
        world.ok(Op::AddRevocations(AddRevocations {
            revocations: vec![(RevocationKey::CommonName("gone".to_owned()), String::new())],
        }));
        assert!(has_changed(&world));
        assert!(!has_changed(&world));
        let revoked = (RevocationKey::CommonName("other".to_owned()), String::new());
        *listed.borrow_mut() = [revoked].into_iter().collect();
        assert!(has_changed(&world));
        assert!(!has_changed(&world));
    }
}
