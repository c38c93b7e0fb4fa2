use std::sync::atomic::Ordering;

use raft_store::command::{Claim, CreateContext, LeaseInvocations, Op};
use raft_store::names::{Boot, ContextUid};
use raft_store::state::context::{BindingMode, RotationPolicy};

use super::super::decide::Limits;
use super::super::driver::drive;
use super::super::keys::KeyMaker;
use super::super::testing::{FakeCluster, FakeKeys, World, cluster_keys, context, slot};
use super::*;

const LIMIT: u64 = 2000;

/// One member, and version 1 of `small` active under a small limit.
fn world() -> World {
    let mut world = World::new(1);
    world.ok(Op::CreateContext(CreateContext {
        name: context("small"),
        uid: ContextUid([2; 16]),
        slot: slot("s"),
        binding: BindingMode::Shared,
        policy: RotationPolicy {
            max_invocations: LIMIT,
            ..RotationPolicy::default()
        },
    }));
    let first = world.prepare("small");
    world.activate("small", first);
    world
}

fn key(version: u32) -> VersionKey {
    VersionKey {
        context: context("small"),
        version,
    }
}

/// Gives so many of a version out.
fn give(world: &mut World, version: u32, count: u64) {
    let before = world.state.lease(&key(version)).leased;
    while world.state.lease(&key(version)).leased < before + count {
        let left = before + count - world.state.lease(&key(version)).leased;
        let boot = Boot([1; 16]);
        let claim = Claim {
            context: context("small"),
            version,
            key_uid: world.state.version(&context("small"), version).unwrap().key_uid,
            held: false,
            seen: world.state.lease(&key(version)).given(1, boot),
            count: left,
        };
        world.ok(Op::LeaseInvocations(LeaseInvocations {
            node: 1,
            boot,
            claims: vec![claim],
        }));
    }
}

struct Bench {
    cluster: Arc<FakeCluster>,
    keys: Arc<FakeKeys>,
    driver: tokio::task::JoinHandle<()>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

fn bench(world: World) -> Bench {
    let cluster = FakeCluster::new(world);
    let limits = Limits::new(Duration::from_secs(30));
    let driver = tokio::spawn(drive(Arc::clone(&cluster) as Arc<dyn Cluster>, limits));
    Bench {
        cluster,
        keys: Arc::new(FakeKeys::default()),
        driver,
    }
}

impl Bench {
    fn by_use(&self) -> ByUse {
        let cluster = || Arc::clone(&self.cluster) as Arc<dyn Cluster>;
        let rotator = Rotator::new(
            cluster(),
            Arc::clone(&self.keys) as Arc<dyn KeyMaker>,
            cluster_keys(),
            Limits::new(Duration::from_secs(30)),
        );
        ByUse::new(cluster(), Arc::new(rotator))
    }

    fn active(&self) -> Option<u32> {
        let published = self.cluster.published();
        let known = published.state.contexts().get(&context("small"));
        known.and_then(|known| known.active_version)
    }
}

#[test]
fn a_version_is_due_when_nine_tenths_are_given_out_and_nothing_is_pending() {
    let mut world = world();
    assert!(due(&world.state).is_empty());
    give(&mut world, 1, 1798);
    assert!(due(&world.state).is_empty(), "one is left");
    give(&mut world, 1, 1);
    assert_eq!(due(&world.state), [(context("small"), 1)]);
    let next = world.prepare("small");
    assert!(due(&world.state).is_empty());
    world.activate("small", next);
    assert!(due(&world.state).is_empty(), "the next one has its own");
}

#[tokio::test]
async fn what_is_due_is_rotated_once_whoever_leads() {
    let mut world = world();
    give(&mut world, 1, 1799);
    let bench = bench(world);
    let (mut old, mut new) = (bench.by_use(), bench.by_use());
    let now = Instant::now();
    // As if neither saw what the other has done.
    let name = context("small");
    let asked = [1, 1].map(|active| asked(&name, (active, 1), 1));
    assert_eq!(asked[0].id(0), asked[1].id(0));
    let wish = Wish::Replace { active: 1 };
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    let (first, second) = tokio::join!(
        old.rotator.make(&name, &wish, &asked[0], deadline),
        new.rotator.make(&name, &wish, &asked[1], deadline),
    );
    assert_eq!((first.unwrap().version, second.unwrap().version), (2, 2));
    for by_use in [&mut old, &mut new] {
        by_use.check(now).await;
    }
    assert_eq!(bench.active(), Some(2));
    let published = bench.cluster.published();
    assert_eq!(published.state.versions_of(&context("small")).count(), 2);
}

#[tokio::test]
async fn it_is_rotated_by_the_leader_alone_and_again_when_the_next_one_is_used_up() {
    let mut world = world();
    give(&mut world, 1, 1799);
    let bench = bench(world);
    let mut by_use = bench.by_use();
    let leadership = bench.cluster.leadership.lock().unwrap().take();
    by_use.check(Instant::now()).await;
    assert_eq!(bench.keys.made.load(Ordering::SeqCst), 0);
    *bench.cluster.leadership.lock().unwrap() = leadership;
    by_use.check(Instant::now()).await;
    assert_eq!(bench.active(), Some(2));
    bench.cluster.with(|world| give(world, 2, 1799));
    by_use.check(Instant::now()).await;
    assert_eq!(bench.active(), Some(3));
}

#[tokio::test]
async fn after_a_failure_it_waits_before_it_tries_again() {
    let mut world = world();
    give(&mut world, 1, 1799);
    let bench = bench(world);
    let failed = CallError::new(hsm_api::ErrorCode::SlotFailed, "no token");
    let mut by_use = bench.by_use();
    let now = Instant::now();
    by_use.fail(context("small"), &failed, now);
    by_use.check(now + FIRST_PAUSE / 2).await;
    assert_eq!(bench.active(), Some(1));
    by_use.check(now + FIRST_PAUSE).await;
    assert_eq!(bench.active(), Some(2));
    by_use.check(now + FIRST_PAUSE).await;
    assert!(by_use.failed.is_empty());
}

#[tokio::test]
async fn half_and_four_fifths_are_said_once_for_each_version() {
    let bench = bench(world());
    let mut by_use = bench.by_use();
    let mut said = Vec::new();
    for count in [998, 1, 0, 600, 0, 50] {
        bench.cluster.with(|world| give(world, 1, count));
        by_use.warn(&bench.cluster.published().state);
        said.push(by_use.warned.get(&context("small")).copied());
    }
    let (none, half, most) = (None, Some((1, 50)), Some((1, 80)));
    assert_eq!(said, [none, half, half, most, most, most]);
    bench.cluster.with(|world| {
        let next = world.prepare("small");
        world.activate("small", next);
        give(world, next, 1000);
    });
    by_use.warn(&bench.cluster.published().state);
    assert_eq!(by_use.warned.get(&context("small")), Some(&(2, 50)));
}
