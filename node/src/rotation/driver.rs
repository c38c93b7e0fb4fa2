//! The rotation driver: carries out on the leader what [`decide`] decides, and does nothing anywhere
//! else. It keeps no state that a new leader would miss.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use raft_store::command::{AbandonVersion, ActivateVersion, Done, Op};
use raft_store::names::RaftId;
use raft_store::state::context::VersionKey;
use raft_store::storage::Published;

use super::clocks::Clocks;
use super::cluster::{Cluster, Leadership};
use super::decide::{Action, Limits, Sightings, decide, names};
use super::reach;
use crate::clock;
use crate::consensus::ProposeError;

/// Between looks while a version is pending: silence and deadlines pass without an entry.
const PENDING_LOOK: Duration = Duration::from_millis(100);
/// Between looks otherwise; changes of the state wake the driver at once.
const IDLE_LOOK: Duration = Duration::from_millis(1000);
/// After a proposal that did not do what was decided: each one may be an entry in the log.
const AFTER_ERROR: Duration = Duration::from_millis(1000);

/// Runs the driver until the consensus of this node ends.
pub async fn drive(cluster: Arc<dyn Cluster>, clocks: Arc<Clocks>, limits: Limits) {
    let mut applied = cluster.applied();
    let mut sightings = Sightings::default();
    loop {
        applied.borrow_and_update();
        let pause = match look(&*cluster, &clocks, &mut sightings, &limits).await {
            Next::Change { within } => within,
            Next::Pause => {
                tokio::time::sleep(AFTER_ERROR).await;
                continue;
            }
        };
        if let Ok(Err(_)) = tokio::time::timeout(pause, applied.changed()).await {
            return;
        }
    }
}

/// When to look again.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// Once the state has changed, or after this time.
    Change { within: Duration },
    /// After [`AFTER_ERROR`], whatever is applied meanwhile: a refusal is an entry too.
    Pause,
}

/// Looks once.
async fn look(cluster: &dyn Cluster, clocks: &Clocks, sightings: &mut Sightings, limits: &Limits) -> Next {
    let Some(leadership) = cluster.leadership() else {
        sightings.forget();
        return Next::Change { within: IDLE_LOOK };
    };
    // Once for each: a voter that never says its clock must not hold up every later look.
    if sightings.is_news(leadership.term, &cluster.published().state) {
        clocks.before_stamp(cluster, None).await;
    }
    let published = cluster.published();
    let now = clock::now();
    sightings.look(leadership.term, &published.state, now);
    let actions = actions(&published, cluster.raft_id(), &leadership, sightings, limits, now);
    let mut failed = false;
    for action in actions {
        failed |= !carry_out(cluster, &published, action).await;
    }
    if failed {
        return Next::Pause;
    }
    let pending = published.state.pending().next().is_some();
    let within = if pending { PENDING_LOOK } else { IDLE_LOOK };
    Next::Change { within }
}

fn actions(
    published: &Published,
    own: Option<RaftId>,
    leadership: &Leadership,
    sightings: &Sightings,
    limits: &Limits,
    now: Instant,
) -> Vec<Action> {
    let voters: BTreeSet<RaftId> = published.membership.voter_ids().collect();
    let silent_for = |id: RaftId| {
        if Some(id) == own {
            return Duration::ZERO;
        }
        sightings.silent_for(leadership.silent_for.get(&id).copied(), now)
    };
    let pending_for = |key: &VersionKey| sightings.pending_for(key, now);
    decide(&published.state, &voters, silent_for, pending_for, limits)
}

/// Whether it was done.
async fn carry_out(cluster: &dyn Cluster, published: &Published, action: Action) -> bool {
    match action {
        Action::Activate {
            context,
            version,
            left_out,
        } => {
            reach("rotation::before_activate_commit").await;
            let left = names(&published.state, &left_out);
            let op = ActivateVersion {
                context: context.clone(),
                version,
                left_out,
            };
            let proposed = cluster.propose_as_leader(Op::ActivateVersion(op)).await;
            if proposed.is_ok() {
                reach("rotation::after_activate_commit").await;
                if left.is_empty() {
                    tracing::info!(%context, version, "key version activated");
                } else {
                    tracing::warn!(%context, version, left_out = left, "key version activated without silent nodes");
                }
            }
            report(context.as_str(), version, proposed)
        }
        Action::Abandon {
            context,
            version,
            reason,
        } => {
            let op = AbandonVersion {
                context: context.clone(),
                version,
                reason: reason.clone(),
            };
            let proposed = cluster.propose_as_leader(Op::AbandonVersion(op)).await;
            if proposed.is_ok() {
                tracing::warn!(%context, version, reason, "key version abandoned");
            }
            report(context.as_str(), version, proposed)
        }
    }
}

fn report(context: &str, version: u32, proposed: Result<Done, ProposeError>) -> bool {
    match proposed {
        Ok(_) => return true,
        // Both end by themselves, or another leader goes on.
        Err(error @ (ProposeError::NotLeader { .. } | ProposeError::NoQuorum)) => {
            tracing::debug!(context, version, %error, "rotation waits");
        }
        Err(error) => tracing::warn!(context, version, %error, "rotation step not done; looking again"),
    }
    false
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use raft_store::state::context::VersionState;

    use super::super::cluster::{Waited, wait_leading};
    use super::super::testing::{FakeCluster, World, context, still};
    use super::*;

    fn limits(fence: u64, pending: u64) -> Limits {
        Limits {
            fence_after: Duration::from_millis(fence),
            pending: Duration::from_millis(pending),
        }
    }

    async fn becomes(cluster: &Arc<FakeCluster>, version: u32, state: VersionState) -> bool {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        let met = wait_leading(&**cluster, deadline, |published| {
            let found = published.state.version(&context("c"), version)?;
            (found.state == state).then_some(())
        });
        met.await == Waited::Met(())
    }

    fn start(world: World, limits: Limits) -> (Arc<FakeCluster>, tokio::task::JoinHandle<()>) {
        let cluster = FakeCluster::new(world);
        let driver = tokio::spawn(drive(Arc::clone(&cluster) as Arc<dyn Cluster>, still(), limits));
        (cluster, driver)
    }

    #[tokio::test]
    async fn an_acknowledged_version_is_activated_and_the_old_one_retired() {
        let mut world = World::new(3);
        let first = world.prepare("c");
        world.activate("c", first);
        let (cluster, driver) = start(world, limits(60_000, 60_000));
        let voters = cluster.with(|world| {
            world.prepare("c");
            world.voters.clone()
        });
        for voter in voters {
            cluster.with(|world| world.ack(voter, "c", 2));
        }
        assert!(becomes(&cluster, 2, VersionState::Active).await);
        assert!(becomes(&cluster, 1, VersionState::DecryptOnly).await);
        driver.abort();
    }

    #[tokio::test]
    async fn an_idle_driver_acts_on_a_change_at_once() {
        let (cluster, driver) = start(World::new(1), limits(60_000, 60_000));
        let rotations = 8;
        let begun = Instant::now();
        for version in 1..=rotations {
            cluster.with(|world| {
                world.prepare("c");
                world.ack(1, "c", version);
            });
            assert!(becomes(&cluster, version, VersionState::Active).await);
        }
        assert!(
            begun.elapsed() < IDLE_LOOK * rotations / 2,
            "{:?}",
            begun.elapsed()
        );
        driver.abort();
    }

    #[tokio::test]
    async fn a_version_that_nobody_else_imports_is_abandoned() {
        let (cluster, driver) = start(World::new(3), limits(60_000, 150));
        cluster.with(|world| {
            world.prepare("c");
            world.ack(1, "c", 1);
        });
        assert!(becomes(&cluster, 1, VersionState::Abandoned).await);
        driver.abort();
    }

    #[tokio::test]
    async fn a_version_is_activated_once_it_is_known_what_the_time_is() {
        let mut world = World::new(3);
        let voters: Vec<_> = world.voters.iter().copied().collect();
        world.prepare("c");
        for voter in &voters {
            world.ack(*voter, "c", 1);
        }
        // All of them reported three hours ago.
        let now = 3 * 3600 * 1000;
        let clocks = Arc::new(Clocks::new(Box::new(move || now)));
        let cluster = FakeCluster::new(world);
        let as_dyn = Arc::clone(&cluster) as Arc<dyn Cluster>;
        let driver = tokio::spawn(drive(as_dyn, clocks, limits(60_000, 60_000)));
        let active = becomes(&cluster, 1, VersionState::Active);
        let early = tokio::time::timeout(Duration::from_millis(300), active).await;
        assert!(early.is_err(), "stamped with the time of old reports");
        cluster.with(|world| world.report_clock(voters[1], now));
        assert!(becomes(&cluster, 1, VersionState::Active).await);
        driver.abort();
    }

    #[tokio::test]
    async fn a_silent_node_is_left_out() {
        let mut world = World::new(3);
        let voters: Vec<_> = world.voters.iter().copied().collect();
        world.prepare("c");
        world.ack(voters[0], "c", 1);
        world.ack(voters[1], "c", 1);
        let (cluster, driver) = start(world, limits(150, 60_000));
        cluster.silence(voters[1], Duration::from_millis(1));
        assert!(becomes(&cluster, 1, VersionState::Active).await);
        driver.abort();
    }

    #[tokio::test]
    async fn a_failed_proposal_is_made_again() {
        let mut world = World::new(1);
        world.prepare("c");
        world.ack(1, "c", 1);
        let cluster = FakeCluster::new(world);
        cluster
            .failures
            .lock()
            .unwrap()
            .push((ProposeError::Unknown, false));
        let driver = tokio::spawn(drive(
            Arc::clone(&cluster) as Arc<dyn Cluster>,
            still(),
            limits(60_000, 60_000),
        ));
        assert!(becomes(&cluster, 1, VersionState::Active).await);
        driver.abort();
    }

    #[tokio::test]
    async fn a_node_that_does_not_lead_does_nothing() {
        let mut world = World::new(1);
        world.prepare("c");
        world.ack(1, "c", 1);
        let cluster = FakeCluster::new(world);
        let before = cluster.count(|_| true);
        *cluster.leadership.lock().unwrap() = None;
        let mut sightings = Sightings::default();
        assert_eq!(
            look(&*cluster, &still(), &mut sightings, &limits(0, 0)).await,
            Next::Change { within: IDLE_LOOK }
        );
        assert_eq!(cluster.count(|_| true), before);
    }

    /// A refused proposal is an entry; a driver that repeats it at once would fill the log.
    #[tokio::test]
    async fn after_a_refusal_it_waits() {
        let mut world = World::new(1);
        world.prepare("c");
        let cluster = FakeCluster::new(world);
        cluster
            .failures
            .lock()
            .unwrap()
            .push((ProposeError::NoQuorum, false));
        let mut sightings = Sightings::default();
        assert_eq!(
            look(&*cluster, &still(), &mut sightings, &limits(0, 0)).await,
            Next::Pause
        );
    }
}
