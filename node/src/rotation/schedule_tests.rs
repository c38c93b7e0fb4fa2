use std::sync::atomic::Ordering;

use super::super::decide::Limits;
use super::super::driver::drive;
use super::super::keys::KeyMaker;
use super::super::testing::{FakeCluster, FakeKeys, World, cluster_keys, context, still};
use super::*;
use crate::config::DAY;

const DAY_MS: i64 = 24 * 3600 * 1000;

fn world(nodes: u64) -> World {
    let mut world = World::new(nodes);
    let first = world.prepare("c");
    world.activate("c", first);
    world
}

/// When the active version of `c` became it.
fn since(world: &World) -> UnixMillis {
    let active = world.state.contexts().get(&context("c")).unwrap().active_version;
    let version = world.state.version(&context("c"), active.unwrap()).unwrap();
    version.activated_at.unwrap()
}

struct Bench {
    cluster: Arc<FakeCluster>,
    keys: Arc<FakeKeys>,
    clocks: Arc<Clocks>,
    driver: tokio::task::JoinHandle<()>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// A leader whose clock says so many days since the active version became it.
fn bench(world: World, days: i64) -> Bench {
    let wall = since(&world) + days * DAY_MS;
    let cluster = FakeCluster::new(world);
    let limits = Limits::new(Duration::from_secs(30));
    let driver = tokio::spawn(drive(Arc::clone(&cluster) as Arc<dyn Cluster>, still(), limits));
    Bench {
        cluster,
        keys: Arc::new(FakeKeys::default()),
        clocks: Arc::new(Clocks::new(Box::new(move || wall))),
        driver,
    }
}

impl Bench {
    fn schedule(&self) -> Schedule {
        let cluster = || Arc::clone(&self.cluster) as Arc<dyn Cluster>;
        let rotator = Rotator::new(
            cluster(),
            Arc::clone(&self.keys) as Arc<dyn KeyMaker>,
            cluster_keys(),
            still(),
            Limits::new(Duration::from_secs(30)),
        );
        let rules = config::Rotation {
            enabled: true,
            interval_days: 90,
            check_interval: Duration::from_secs(60),
            day: DAY,
        };
        Schedule::new(cluster(), Arc::new(rotator), Arc::clone(&self.clocks), rules)
    }

    fn highest(&self) -> u32 {
        let published = self.cluster.published();
        published
            .state
            .contexts()
            .get(&context("c"))
            .unwrap()
            .highest_version
    }

    fn tries(&self) -> usize {
        self.keys.made.load(Ordering::SeqCst)
    }
}

#[test]
fn a_version_is_due_when_its_contexts_interval_has_passed_and_nothing_is_pending() {
    let mut world = world(1);
    let wall = |world: &World, days: i64| since(world) + days * DAY_MS;
    let is_due = |world: &World, wall| due(&world.state, wall, DAY);
    assert!(is_due(&world, wall(&world, 90) - 1).is_empty());
    assert_eq!(is_due(&world, wall(&world, 90)), [(context("c"), 1)]);
    assert!(is_due(&world, wall(&world, -400)).is_empty());
    // A context without a key has no age.
    world.context("d", "s");
    assert_eq!(is_due(&world, i64::MAX), [(context("c"), 1)]);
    world.prepare("c");
    assert!(is_due(&world, wall(&world, 400)).is_empty());
    world.activate("c", 2);
    assert!(is_due(&world, wall(&world, 89)).is_empty());
    assert_eq!(is_due(&world, wall(&world, 90)), [(context("c"), 2)]);
}

#[tokio::test]
async fn what_is_due_is_rotated_once() {
    let bench = bench(world(1), 90);
    let mut schedule = bench.schedule();
    for _ in 0..2 {
        schedule.check(Instant::now()).await;
        assert_eq!(bench.highest(), 2);
    }
    // The same says another leader.
    bench.schedule().check(Instant::now()).await;
    assert_eq!(bench.highest(), 2);
}

/// As if the state had stamped the new version with a time long ago.
#[tokio::test]
async fn a_stamp_that_is_wrong_costs_one_rotation_a_day() {
    let bench = bench(world(1), 91);
    let mut schedule = bench.schedule();
    let begin = Instant::now();
    for (after, highest) in [(Duration::ZERO, 2), (DAY / 2, 2), (DAY, 3), (DAY, 3)] {
        schedule.check(begin + after).await;
        assert_eq!(bench.highest(), highest, "{after:?}");
    }
}

#[tokio::test]
async fn two_leaders_that_find_the_same_version_due_replace_it_once() {
    let bench = bench(world(1), 90);
    let (mut old, mut new) = (bench.schedule(), bench.schedule());
    let now = Instant::now();
    let asked = [1, 1].map(|active| asked(OPERATION, &context("c"), (active, 1), 1));
    assert_eq!(asked[0].id(0), asked[1].id(0));
    assert_ne!(
        asked[0].id(0),
        super::asked(OPERATION, &context("c"), (2, 2), 1).id(0)
    );
    // As if neither saw what the other has done.
    let wish = Wish::Replace { active: 1 };
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    let name = context("c");
    let (first, second) = tokio::join!(
        old.rotator.make(&name, &wish, &asked[0], deadline),
        new.rotator.make(&name, &wish, &asked[1], deadline),
    );
    assert_eq!((first.unwrap().version, second.unwrap().version), (2, 2));
    assert_eq!(bench.highest(), 2);
    // An administrator was quicker, under another request.
    bench.cluster.with(|world| {
        let version = world.prepare("c");
        world.activate("c", version);
    });
    let (wish, asked) = (
        Wish::Replace { active: 2 },
        super::asked(OPERATION, &name, (2, 2), 1),
    );
    let late = old
        .rotator
        .make(&name, &wish, &asked, deadline)
        .await
        .unwrap_err();
    let published = bench.cluster.published();
    assert!(is_passing(&late, &published.state, (&name, 2)), "{late}");
    assert_eq!(bench.highest(), 3);
    new.fail(name.clone(), 2, &late, now);
    old.fail(name.clone(), 2, &late, now);
    assert!(old.failed.is_empty() && new.failed.is_empty());
    // The same of the version that is active now would stay.
    new.fail(name, 3, &late, now);
    assert_eq!(new.failed.len(), 1);
}

#[tokio::test]
async fn a_leader_whose_clock_is_in_doubt_rotates_nothing() {
    for days in [-400, 400] {
        let bench = bench(world(3), days);
        let mut schedule = bench.schedule();
        let now = Instant::now();
        schedule.check(now).await;
        assert!(matches!(schedule.doubt, Some(Doubt::Unheard { .. })));
        // Both others say the time at which the version was made.
        let others: Vec<RaftId> = bench.cluster.with(|world| world.voters.iter().copied().collect());
        for id in &others[1..] {
            bench.cluster.with(|world| {
                let clock = since(world);
                world.report_clock(*id, clock);
            });
        }
        schedule.check(now).await;
        assert!(matches!(schedule.doubt, Some(Doubt::Apart { .. })));
        assert_eq!(bench.highest(), 1);
    }
}

#[tokio::test]
async fn a_rotation_that_fails_is_tried_again_later_and_ever_later() {
    let bench = bench(world(1), 90);
    bench.cluster.with(|world| world.report_slot(1, "s", "failed"));
    bench.cluster.silence(1, Duration::ZERO);
    let mut schedule = bench.schedule();
    let begin = Instant::now();
    schedule.check(begin).await;
    let pause = |schedule: &Schedule| schedule.failed[&context("c")];
    assert_eq!(pause(&schedule), (begin, FIRST_PAUSE));
    schedule.check(begin + FIRST_PAUSE / 2).await;
    assert_eq!(pause(&schedule), (begin, FIRST_PAUSE));
    schedule.check(begin + FIRST_PAUSE).await;
    assert_eq!(pause(&schedule), (begin + FIRST_PAUSE, FIRST_PAUSE * 2));
    assert_eq!((bench.tries(), bench.highest()), (0, 1));
    bench.cluster.with(|world| world.report_slot(1, "s", "ready"));
    schedule.check(begin + FIRST_PAUSE * 4).await;
    assert_eq!((bench.tries(), bench.highest()), (1, 2));
}

#[tokio::test]
async fn who_does_not_lead_rotates_nothing_and_raises_no_alarm() {
    let bench = bench(world(1), 90);
    *bench.cluster.leadership.lock().unwrap() = None;
    let mut schedule = bench.schedule();
    schedule.check(Instant::now()).await;
    assert_eq!((bench.highest(), schedule.doubt), (1, Some(Doubt::NotLeader)));
}
