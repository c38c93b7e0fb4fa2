//! The driver of destructions: carries out on the leader what [`decide`] decides, and does nothing anywhere else. What
//! a new leader has to know is in the state.

use std::sync::Arc;
use std::time::{Duration, Instant};

use raft_store::command::{AdvanceWaits, BeginDestroy, Done, Op};

use super::decide::{Action, decide, next_look};
use super::waits::Waits;
use crate::consensus::ProposeError;
use crate::rotation::{Cluster, reach};

/// Between looks while nothing waits; changes of the state wake the driver at once.
const IDLE_LOOK: Duration = Duration::from_secs(1);
/// After a proposal that was not done: each one may be an entry in the log.
const AFTER_ERROR: Duration = Duration::from_secs(1);
/// A leader that has not heard a quorum for so long sees no time pass.
const BACKED: Duration = Duration::from_secs(5);

/// Runs the driver until the consensus of this node ends.
pub async fn drive(cluster: Arc<dyn Cluster>) {
    let mut applied = cluster.applied();
    let mut seen = Seen::default();
    loop {
        applied.borrow_and_update();
        let pause = match look(&*cluster, &mut seen, Instant::now()).await {
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

/// What this leader has seen and told.
#[derive(Debug, Default)]
struct Seen {
    waits: Waits,
    told: Option<Instant>,
}

/// When to look again.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// Once the state has changed, or after this time.
    Change { within: Duration },
    /// After [`AFTER_ERROR`], whatever is applied meanwhile.
    Pause,
}

/// Looks once.
async fn look(cluster: &dyn Cluster, seen: &mut Seen, now: Instant) -> Next {
    let Some(leadership) = cluster.leadership() else {
        *seen = Seen::default();
        return Next::Change { within: IDLE_LOOK };
    };
    let published = cluster.published();
    let backed = leadership.quorum_age.is_some_and(|age| age <= BACKED);
    let state = &published.state;
    seen.waits.look(leadership.term, backed, state, now);
    if seen.waits.is_empty() {
        return Next::Change { within: IDLE_LOOK };
    }
    for action in decide(state, &seen.waits, seen.told, now) {
        let is_beat = matches!(action, Action::Advance { .. });
        if !carry_out(cluster, action).await {
            return Next::Pause;
        }
        if is_beat {
            seen.told = Some(now);
        }
    }
    let within = next_look(state, &seen.waits).unwrap_or(IDLE_LOOK);
    Next::Change { within }
}

/// Whether it was done.
async fn carry_out(cluster: &dyn Cluster, action: Action) -> bool {
    match action {
        Action::Advance { elapsed_ms, waits } => {
            let count = waits.len();
            let op = AdvanceWaits {
                elapsed_ms,
                expected: waits,
            };
            let proposed = cluster.propose_as_leader(Op::AdvanceWaits(op)).await;
            if proposed.is_ok() {
                tracing::debug!(
                    elapsed_ms,
                    waits = count,
                    "time has passed for destructions that wait"
                );
            }
            report("advance_waits", "", proposed)
        }
        Action::Begin { context, version } => {
            reach("destruction::before_begin_commit").await;
            let op = BeginDestroy {
                context: context.clone(),
                version,
            };
            let proposed = cluster.propose_as_leader(Op::BeginDestroy(op)).await;
            if proposed.is_ok() {
                reach("destruction::after_begin_commit").await;
                let epoch = crate::logging::epoch();
                tracing::warn!(
                    target: "audit", epoch, action = "key.destroy.begin", %context, version,
                    "the wait is over: the key version is being removed from every token"
                );
            }
            report("begin_destroy", &format!("{context} v{version}"), proposed)
        }
    }
}

fn report(step: &str, of: &str, proposed: Result<Done, ProposeError>) -> bool {
    match proposed {
        Ok(_) => return true,
        // All end by themselves, or another leader goes on. A wait that was undone at that moment is seen at the next
        // look.
        Err(
            error @ (ProposeError::NotLeader { .. }
            | ProposeError::NoQuorum
            | ProposeError::Draining
            | ProposeError::Unknown
            | ProposeError::Refused(_)),
        ) => tracing::debug!(step, of, %error, "destruction waits"),
        Err(error) => tracing::warn!(step, of, %error, "destruction step not done; looking again"),
    }
    false
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::collections::BTreeMap;

    use raft_store::state::context::VersionState;

    use super::*;
    use crate::rotation::cluster::{Leadership, Waited, wait_leading};
    use crate::rotation::testing::{FakeCluster, World, context};

    fn world(wait_ms: u64) -> World {
        let mut world = World::new(3);
        for _ in 0..2 {
            let version = world.prepare("c");
            world.activate("c", version);
        }
        world.schedule_destroy("c", 1, wait_ms);
        world
    }

    fn leads(term: u64, quorum_age: Option<Duration>) -> Leadership {
        Leadership {
            term,
            silent_for: BTreeMap::new(),
            quorum_age,
        }
    }

    async fn becomes(cluster: &Arc<FakeCluster>, state: VersionState) -> bool {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        let met = wait_leading(&**cluster, deadline, |published| {
            let found = published.state.version(&context("c"), 1)?;
            (found.state == state).then_some(())
        });
        met.await == Waited::Met(())
    }

    fn appended(cluster: &FakeCluster) -> usize {
        cluster.count(|_| true)
    }

    #[tokio::test]
    async fn a_wait_passes_and_the_destruction_begins() {
        let cluster = FakeCluster::new(world(1000));
        let begun = Instant::now();
        let driver = tokio::spawn(drive(Arc::clone(&cluster) as Arc<dyn Cluster>));
        assert!(becomes(&cluster, VersionState::Destroying).await);
        assert!(begun.elapsed() >= Duration::from_secs(1));
        assert_eq!(cluster.count(|op| matches!(op, Op::AdvanceWaits(_))), 1);
        driver.abort();
    }

    #[tokio::test]
    async fn a_wait_that_is_undone_at_its_last_moment_ends_nothing() {
        let cluster = FakeCluster::new(world(2000));
        let (mut seen, now) = (Seen::default(), Instant::now());
        look(&*cluster, &mut seen, now).await;
        cluster.with(|world| {
            world.ok(Op::UndoDestroy(raft_store::command::UndoDestroy {
                context: context("c"),
                version: 1,
            }));
        });
        let before = appended(&cluster);
        for seconds in 1..100 {
            let next = look(&*cluster, &mut seen, now + Duration::from_secs(seconds)).await;
            assert_eq!(next, Next::Change { within: IDLE_LOOK });
        }
        assert_eq!(appended(&cluster), before);
        let state = cluster.published().state.clone();
        let first = state.version(&context("c"), 1).unwrap();
        assert_eq!(first.state, VersionState::DecryptOnly);
    }

    #[tokio::test]
    async fn whoever_does_not_lead_tells_nothing_and_forgets_what_it_saw() {
        let cluster = FakeCluster::new(world(1000));
        let (mut seen, now) = (Seen::default(), Instant::now());
        look(&*cluster, &mut seen, now).await;
        *cluster.leadership.lock().unwrap() = None;
        let later = now + Duration::from_secs(5);
        assert_eq!(
            look(&*cluster, &mut seen, later).await,
            Next::Change { within: IDLE_LOOK }
        );
        *cluster.leadership.lock().unwrap() = Some(leads(1, Some(Duration::ZERO)));
        let before = appended(&cluster);
        look(&*cluster, &mut seen, later + Duration::from_secs(1)).await;
        assert_eq!(appended(&cluster), before, "it begins anew");
    }

    #[tokio::test]
    async fn a_leader_without_a_quorum_sees_no_time_pass() {
        let cluster = FakeCluster::new(world(3000));
        let (mut seen, mut now) = (Seen::default(), Instant::now());
        let before = appended(&cluster);
        for age in [None, Some(BACKED * 2)] {
            *cluster.leadership.lock().unwrap() = Some(leads(1, age));
            for _ in 0..100 {
                now += Duration::from_secs(1);
                look(&*cluster, &mut seen, now).await;
            }
        }
        assert_eq!(appended(&cluster), before);
        *cluster.leadership.lock().unwrap() = Some(leads(1, Some(Duration::ZERO)));
        for _ in 0..3 {
            now += Duration::from_secs(1);
            look(&*cluster, &mut seen, now).await;
        }
        assert_eq!(appended(&cluster), before + 1, "three seconds later it is over");
    }

    #[tokio::test]
    async fn after_a_refusal_it_waits_and_no_time_is_lost_or_counted_twice() {
        let cluster = FakeCluster::new(world(2000));
        let (mut seen, mut now) = (Seen::default(), Instant::now());
        for (failure, applied) in [(ProposeError::NoQuorum, false), (ProposeError::Unknown, true)] {
            cluster.failures.lock().unwrap().push((failure, applied));
        }
        // The failures are taken from the end: first the one that was done all the same.
        look(&*cluster, &mut seen, now).await;
        now += Duration::from_secs(2);
        assert_eq!(look(&*cluster, &mut seen, now).await, Next::Pause);
        let elapsed = cluster.with(|world| world.elapsed("c", 1));
        assert_eq!(elapsed, 2000);
        assert_eq!(
            look(&*cluster, &mut seen, now).await,
            Next::Pause,
            "it could not begin"
        );
        look(&*cluster, &mut seen, now).await;
        assert!(becomes(&cluster, VersionState::Destroying).await);
    }
}
