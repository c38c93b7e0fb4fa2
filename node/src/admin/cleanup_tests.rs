use std::sync::Arc;

use super::*;
use crate::config::DAY;
use crate::rotation::testing::{FakeCluster, World, asked, context as name};

const DAY_MS: i64 = 24 * 3600 * 1000;

struct Bench {
    cluster: Arc<FakeCluster>,
    clocks: Clocks,
    wall: UnixMillis,
}

fn rotate(world: &mut World, times: u32) {
    for _ in 0..times {
        let version = world.prepare("c");
        world.activate("c", version);
    }
}

/// Leads, so many days after what was done last.
fn later(mut world: World, days: i64) -> Bench {
    let wall = world.index as i64 * 1000 + days * DAY_MS;
    for node in world.voters.clone() {
        world.report_clock(node, 0);
    }
    Bench {
        cluster: FakeCluster::new(world),
        clocks: Clocks::new(Box::new(move || wall)),
        wall,
    }
}

/// Six versions of `c` of about one age. The newest three are kept.
fn bench(days: i64) -> Bench {
    let mut world = World::new(1);
    rotate(&mut world, 6);
    later(world, days)
}

impl Bench {
    async fn run(&self, key: &str, dry_run: bool) -> Result<Vec<CleanupVersion>, CallError> {
        let cleanup = Cleanup {
            cluster: &*self.cluster,
            clocks: &self.clocks,
            day: DAY,
            deadline: tokio::time::Instant::now() + Duration::from_secs(5),
        };
        let asked = asked("cleanup-old-versions", key);
        cleanup.run(None, dry_run, &asked).await.map(|done| done.versions)
    }

    fn disabled(&self) -> Vec<u32> {
        let published = self.cluster.published();
        let versions = published.state.versions_of(&name("c"));
        versions
            .filter(|(_, version)| version.state == VersionState::Disabled)
            .map(|(number, _)| number)
            .collect()
    }
}

fn picked(versions: &[CleanupVersion]) -> Vec<u32> {
    let disabled = versions.iter().filter(|version| version.disabled);
    disabled.map(|version| version.version).collect()
}

#[tokio::test]
async fn what_is_old_and_beyond_those_that_are_kept_is_disabled_and_never_destroyed() {
    let bench = bench(31);
    let seen = bench.run("k", true).await.unwrap();
    assert_eq!((picked(&seen), bench.disabled()), (vec![1, 2, 3], vec![]));
    assert!(seen[4].kept_because.contains("newest 3"), "{seen:?}");
    assert_eq!(seen.len(), 5, "the active one is not asked about");
    let done = bench.run("k2", false).await.unwrap();
    assert_eq!((done, bench.disabled()), (seen, vec![1, 2, 3]));
    let destroys = bench.cluster.count(|op| matches!(op, Op::ScheduleDestroy(_)));
    assert_eq!(destroys, 0);
}

/// Version 1 would have deleted it.
#[tokio::test]
async fn a_version_just_retired_stays_however_long_ago_it_was_made() {
    let mut world = World::new(1);
    rotate(&mut world, 1);
    world.index += 40 * 24 * 3600;
    rotate(&mut world, 4);
    let bench = later(world, 1);
    let answer = bench.run("k", false).await.unwrap();
    assert_eq!(bench.disabled(), Vec::<u32>::new());
    let by_v1: Vec<bool> = answer.iter().map(|version| version.deleted_by_v1).collect();
    assert_eq!(by_v1, [true, false, false, false]);
    assert!(answer[0].kept_because.contains("retired within"), "{answer:?}");
}

#[tokio::test]
async fn a_version_in_use_stays() {
    let bench = bench(40);
    let used = |version, days_ago: i64| {
        let last = bench.wall - days_ago * DAY_MS;
        bench.cluster.with(|world| world.used(1, "c", version, last));
    };
    used(2, 29);
    used(3, 31);
    let answer = bench.run("k", false).await.unwrap();
    assert_eq!(bench.disabled(), [1, 3]);
    assert!(answer[1].kept_because.contains("used within"), "{answer:?}");
}

/// It counts those uses, and takes its own report of them: both by the same clock.
#[tokio::test]
async fn a_version_that_only_a_leader_uses_whose_clock_is_far_behind_stays() {
    let mut world = World::new(3);
    rotate(&mut world, 6);
    let bench = later(world, 400);
    let unheard = bench.run("k", true).await.unwrap_err();
    assert_eq!(unheard.code, ErrorCode::NotReady, "nobody has said its clock yet");
    bench.cluster.with(|world| {
        let others: Vec<_> = world.voters.iter().copied().filter(|voter| *voter != 1).collect();
        for other in others {
            world.report_clock(other, bench.wall);
        }
        let by_its_clock = world.index as i64 * 1000;
        world.used(1, "c", 1, by_its_clock);
    });
    // Whoever leads now knows the time.
    let answer = bench.run("k2", false).await.unwrap();
    assert_eq!(bench.disabled(), [2, 3]);
    assert!(answer[0].kept_because.contains("used within"), "{answer:?}");
}

#[tokio::test]
async fn a_repeat_says_the_same_and_disables_nothing_that_was_enabled_since() {
    let bench = bench(31);
    let first = bench.run("k", false).await.unwrap();
    assert_eq!(bench.run("k", false).await.unwrap(), first);
    let enable = |world: &mut World| world.set_use("c", 2, VersionState::DecryptOnly);
    bench.cluster.with(enable);
    let again = bench.run("k", false).await.unwrap();
    assert!(again[1].kept_because.contains("enabled again"), "{again:?}");
    assert_eq!(bench.disabled(), [1, 3]);
}

#[tokio::test]
async fn while_the_clock_is_in_doubt_nothing_is_cleaned_up() {
    let mut world = World::new(3);
    rotate(&mut world, 6);
    let bench = later(world, 400);
    let error = bench.run("k", false).await.unwrap_err();
    assert_eq!((error.code, bench.disabled()), (ErrorCode::NotReady, vec![]));
}

#[tokio::test]
async fn a_context_that_does_not_exist_is_not_clean() {
    let bench = bench(31);
    let cleanup = Cleanup {
        cluster: &*bench.cluster,
        clocks: &bench.clocks,
        day: DAY,
        deadline: tokio::time::Instant::now(),
    };
    let other = name("other");
    let error = cleanup
        .run(Some(&other), true, &asked("x", "k"))
        .await
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::NotFound);
}

#[tokio::test]
async fn a_failure_in_the_middle_does_not_say_that_nothing_was_changed() {
    let bench = bench(31);
    *bench.cluster.let_through.lock().unwrap() = 1;
    let failure = (ProposeError::NoQuorum, false);
    bench.cluster.failures.lock().unwrap().push(failure);
    let error = bench.run("k", false).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::OutcomeUnknown);
    assert_eq!(picked(&bench.run("k", false).await.unwrap()), [1, 2, 3]);
}
