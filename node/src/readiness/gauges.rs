//! The gauges that are read rather than counted: set from one picture of the node each time somebody
//! asks for metrics.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use raft_store::names::{RaftId, UnixMillis};
use raft_store::state::ClusterState;
use raft_store::state::access::RevocationKey;
use raft_store::state::context::VersionKey;
use raft_store::storage::{Published, StoreFigures};

use super::rules::same;
use crate::admin::differences::Differences;
use crate::admin::rekey_status;
use crate::admin::revoked_file::Listed;
use crate::admin::seed::Seed;
use crate::admin::views::{failed_voters, failure_tolerance};
use crate::config::DAY;
use crate::consensus::{Role, View};
use crate::leases::Leases;
use crate::metrics;
use crate::rotation::schedule::is_too_old;
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
    pub(super) fn consensus(&self, view: &View, own: Option<RaftId>, published: &Published) {
        metrics::role(view.role.as_str());
        metrics::raft_indexes(metrics::RaftIndexes {
            term: view.term,
            last_log: view.last_log,
            committed: view.committed,
            applied: view.applied,
            snapshot: view.snapshot,
        });
        let voters: BTreeSet<RaftId> = published.membership.voter_ids().collect();
        metrics::voters(voters.len(), tolerance(view, &voters));
        metrics::quorum_ack_age(view.quorum_ack_age);
        metrics::staleness(view.staleness);
        metrics::proposals_pending(view.proposals_pending);
        add_since(
            &self.timed_out,
            view.proposals_timed_out,
            metrics::proposal_timed_out,
        );
        add_since(&self.leader_changes, view.leader_changes, metrics::leader_change);
        for (id, node) in published.state.nodes().iter() {
            // A peer that never answered this leader lacks everything, as far as anybody knows.
            let peer = view.peers.get(id).filter(|_| own != Some(*id));
            let lag = peer.map(|peer| view.last_log.saturating_sub(peer.matched.unwrap_or(0)));
            metrics::peer_lag(&node.name.to_arc(), lag);
        }
    }
}

/// How many more voters may fail. Only the leader knows which have failed already.
fn tolerance(view: &View, voters: &BTreeSet<RaftId>) -> Option<u32> {
    let failed = || failed_voters(view, voters, &view.silent).len();
    (view.role == Role::Leader).then(|| failure_tolerance(voters.len(), failed()))
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

/// By this node's clock, which is shown too. A version that is being replaced stays due until it is: a rotation that fails
/// again and again is seen to be none.
pub(super) fn clock(state: &ClusterState, wall: UnixMillis) {
    metrics::clock(Duration::from_millis(u64::try_from(wall).unwrap_or(0)));
    for (name, context) in state.contexts().iter() {
        if context.active_version.is_some() {
            metrics::rotation_due(&name.to_arc(), is_too_old(state, (name, context), wall, DAY));
        }
    }
}

/// What removed nodes know is seen until it is replaced, whoever removed them and whatever was to be done then.
pub(super) fn known_to_removed(state: &ClusterState) {
    let known = rekey_status::known_to_removed(state);
    metrics::known_to_removed([
        ("version", known.versions),
        ("transport", known.transport_keys),
        ("replication", u32::from(known.replication_key)),
    ]);
}

pub(super) fn store(figures: &StoreFigures) {
    metrics::store_bytes(figures.sled_bytes, figures.live_bytes);
    metrics::disk(figures.free_bytes, figures.below_reserve);
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
    use std::collections::BTreeMap;

    use raft_store::command::{AddRevocations, Op};

    use super::*;
    use crate::consensus::Gate;
    use crate::rotation::testing::{World, context};

    const DAY_MS: i64 = 24 * 3600 * 1000;

    #[test]
    fn what_was_counted_is_added_once() {
        let (last, added) = (AtomicU64::new(0), Cell::new(0));
        for (now, total) in [(0, 0), (3, 3), (3, 3), (2, 3), (5, 5)] {
            add_since(&last, now, || added.set(added.get() + 1));
            assert_eq!(added.get(), total);
        }
    }

    /// A node of which nothing is known.
    fn idle() -> View {
        View {
            role: Role::Uninitialised,
            term: 0,
            leader: None,
            last_log: 0,
            committed: 0,
            applied: 0,
            snapshot: 0,
            quorum_ack_age: None,
            staleness: None,
            start_gate: Gate::NoLeaderSeen,
            silent: BTreeSet::new(),
            heard: BTreeSet::new(),
            peers: BTreeMap::new(),
            proposals_pending: 0,
            proposals_timed_out: 0,
            leader_changes: 0,
            stopped: None,
        }
    }

    #[test]
    fn only_a_leader_knows_how_many_more_may_fail_and_learners_do_not_count() {
        let voters = BTreeSet::from([1, 2, 3]);
        let shown = |role, heard: &[RaftId]| {
            let view = View {
                role,
                heard: heard.iter().copied().collect(),
                ..idle()
            };
            tolerance(&view, &voters)
        };
        assert_eq!(shown(Role::Leader, &[1, 2, 3]), Some(1));
        assert_eq!(shown(Role::Leader, &[1, 2, 3, 4]), Some(1));
        // It is silent, or answers and is sent a snapshot.
        assert_eq!(shown(Role::Leader, &[1, 2, 4]), Some(0));
        assert_eq!(shown(Role::Leader, &[1]), Some(0));
        assert_eq!(shown(Role::Follower, &[]), None);
    }

    #[test]
    fn a_key_is_due_until_it_is_replaced_whatever_is_pending() {
        let mut world = World::new(1);
        let first = world.prepare("c");
        world.activate("c", first);
        let version = world.state.version(&context("c"), first).unwrap();
        let due_at = version.activated_at.unwrap() + 90 * DAY_MS;
        let shown = |world: &World, wall| {
            let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
            ::metrics::with_local_recorder(&recorder, || clock(&world.state, wall));
            recorder.handle().render()
        };
        let is_due =
            |text: &str, due: u8| text.contains(&format!("hsm_key_rotation_due{{context=\"c\"}} {due}\n"));
        assert!(is_due(&shown(&world, due_at - 1), 0));
        assert!(is_due(&shown(&world, due_at), 1));
        let second = world.prepare("c");
        assert!(is_due(&shown(&world, due_at), 1));
        world.activate("c", second);
        let version = world.state.version(&context("c"), second).unwrap();
        assert!(is_due(&shown(&world, version.activated_at.unwrap()), 0));
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
