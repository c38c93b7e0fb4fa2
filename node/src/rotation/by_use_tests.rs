use std::sync::atomic::Ordering;
use std::sync::{Mutex, mpsc};

use raft_store::command::{
    Claim, CreateContext, LeaseInvocations, Op, Outcome, PrepareVersion, Refusal, ReportNode,
};
use raft_store::names::{Boot, ContextUid, SlotName};
use raft_store::state::context::{BindingMode, RotationPolicy};
use raft_store::state::node::NodeReport;
use raft_store::state::usage::UseCount;

use super::super::decide::Limits;
use super::super::driver::drive;
use super::super::keys::{KeyMaker, KeyOrder, NewKey};
use super::super::testing::{FakeCluster, FakeKeys, World, cluster_keys, context, prepare, slot, still};
use super::*;
use crate::consensus::ProposeError;
use crate::test_log::Lines;

const LIMIT: u64 = 2000;

/// One member, and version 1 of `small` active under a small limit.
fn world() -> World {
    let mut world = World::new(1);
    limited(&mut world, "small");
    world
}

fn limited(world: &mut World, name: &str) {
    world.ok(Op::CreateContext(CreateContext {
        name: context(name),
        uid: ContextUid([name.as_bytes()[0]; 16]),
        slot: slot("s"),
        binding: BindingMode::Shared,
        policy: RotationPolicy {
            max_invocations: LIMIT,
            ..RotationPolicy::default()
        },
    }));
    let first = world.prepare(name);
    world.activate(name, first);
}

/// Gives so many of a version of `small` out.
fn give(world: &mut World, version: u32, count: u64) {
    give_of(world, "small", version, count);
}

fn give_of(world: &mut World, name: &str, version: u32, count: u64) {
    let key = key_of(&context(name), version);
    let before = world.state.lease(&key).leased;
    while world.state.lease(&key).leased < before + count {
        let left = before + count - world.state.lease(&key).leased;
        let boot = Boot([1; 16]);
        let claim = Claim {
            context: context(name),
            version,
            key_uid: world.state.version(&context(name), version).unwrap().key_uid,
            held: false,
            seen: world.state.lease(&key).given(1, boot),
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
    let driver = tokio::spawn(drive(Arc::clone(&cluster) as Arc<dyn Cluster>, still(), limits));
    Bench {
        cluster,
        keys: Arc::new(FakeKeys::default()),
        driver,
    }
}

impl ByUse {
    /// Looks once, and waits until what is due is rotated or not.
    async fn check(&mut self, now: Instant) {
        self.begin(now);
        while let Some(ended) = self.running.join_next_with_id().await {
            self.end(ended, now);
        }
    }
}

impl Bench {
    fn by_use(&self) -> ByUse {
        self.by_use_with(Arc::clone(&self.keys) as Arc<dyn KeyMaker>)
    }

    fn by_use_with(&self, keys: Arc<dyn KeyMaker>) -> ByUse {
        let cluster = || Arc::clone(&self.cluster) as Arc<dyn Cluster>;
        let rotator = Rotator::new(
            cluster(),
            keys,
            cluster_keys(),
            still(),
            Limits::new(Duration::from_secs(30)),
        );
        ByUse::new(cluster(), Arc::new(rotator))
    }

    fn active(&self) -> Option<u32> {
        self.active_of("small")
    }

    fn active_of(&self, name: &str) -> Option<u32> {
        let published = self.cluster.published();
        let known = published.state.contexts().get(&context(name));
        known.and_then(|known| known.active_version)
    }

    async fn until_active(&self, name: &str, version: u32) {
        let mut applied = self.cluster.applied();
        let there = async {
            loop {
                applied.borrow_and_update();
                if self.active_of(name) == Some(version) {
                    return;
                }
                applied.changed().await.unwrap();
            }
        };
        tokio::time::timeout(Duration::from_secs(20), there)
            .await
            .unwrap();
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

#[test]
fn a_version_that_was_used_up_before_there_were_leases_is_due_although_nobody_has_claimed_any() {
    let mut world = world();
    let uses = BTreeMap::from([(
        key_of(&context("small"), 1),
        UseCount {
            encryptions: LIMIT,
            ..UseCount::default()
        },
    )]);
    let report = NodeReport {
        seq: 1,
        boot: Boot([0; 16]),
        incarnation: world.state.nodes().get(&1).unwrap().incarnation,
        clock: 0,
        durable_index: 1,
        proven_at: Some(1),
        feature_level: raft_store::state::FEATURE_LEVEL,
        slots: BTreeMap::new(),
        uses,
    };
    world.ok(Op::ReportNode(ReportNode { node: 1, report }));
    assert!(world.state.leases().is_empty());
    assert_eq!(due(&world.state), [(context("small"), 1)]);
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
    let asked = [1, 1].map(|active| asked(OPERATION, &name, (active, 1), 1));
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
    by_use.fail(context("small"), 1, &failed, now);
    by_use.check(now + FIRST_PAUSE / 2).await;
    assert_eq!(bench.active(), Some(1));
    by_use.check(now + FIRST_PAUSE).await;
    assert_eq!(bench.active(), Some(2));
    by_use.check(now + FIRST_PAUSE).await;
    assert!(by_use.failed.is_empty());
}

#[tokio::test]
async fn the_pause_grows_with_each_failure_and_is_short_once_nobody_can_be_given_any() {
    let (mut spent, enough) = (world(), world());
    give(&mut spent, 1, 1799);
    let bench = bench(world());
    let mut by_use = bench.by_use();
    let failed = CallError::new(ErrorCode::SlotFailed, "no token");
    let (name, now) = (context("small"), Instant::now());
    let mut pauses = Vec::new();
    for _ in 0..9 {
        by_use.fail(name.clone(), 1, &failed, now);
        pauses.push(by_use.failed[&name].pause.as_secs());
    }
    assert_eq!(pauses, [5, 10, 20, 40, 80, 160, 320, 600, 600]);
    for (world, pause) in [(&spent, URGENT_PAUSE), (&enough, LONGEST_PAUSE)] {
        let waits = |after| by_use.waits(&world.state, &name, now + after);
        assert_eq!([waits(pause / 2), waits(pause)], [true, false]);
    }
    // With another active version it is another matter.
    bench.cluster.with(|world| {
        let next = world.prepare("small");
        world.activate("small", next);
    });
    by_use.check(now).await;
    assert!(by_use.failed.is_empty());
}

/// Nothing was appended: no number is used up, and the same request makes one version once it is understood.
#[tokio::test]
async fn what_a_member_does_not_understand_is_said_and_waited_for_and_neither_skips_nor_doubles_a_version() {
    let mut world = world();
    give(&mut world, 1, 1799);
    let bench = bench(world);
    let refused = ProposeError::NotUnderstood {
        operation: "prepare_version".to_owned(),
        level: 9,
        node: "n1".to_owned(),
        understands: 4,
    };
    bench
        .cluster
        .failures
        .lock()
        .unwrap()
        .push((refused.clone(), false));
    let mut by_use = bench.by_use();
    let (name, now) = (context("small"), Instant::now());
    by_use.check(now).await;
    assert_eq!((bench.active(), by_use.failed.len()), (Some(1), 1));
    // Not at every look: each attempt costs the token a key.
    by_use.check(now + FIRST_PAUSE / 2).await;
    assert_eq!(bench.keys.made.load(Ordering::SeqCst), 1);
    by_use.check(now + FIRST_PAUSE).await;
    let published = bench.cluster.published();
    let versions: Vec<u32> = published
        .state
        .versions_of(&name)
        .map(|(number, _)| number)
        .collect();
    assert_eq!((bench.active(), versions), (Some(2), vec![1, 2]));
    by_use.check(now + FIRST_PAUSE).await;
    // Whoever was quicker is no failure, and one that stays is an error in the log.
    let conflict = CallError::from(refused);
    let said = Lines::of(|| by_use.fail(name.clone(), 1, &conflict, now)).all();
    assert!(by_use.failed.is_empty() && said.is_empty(), "{said:?}");
    let said = Lines::of(|| by_use.fail(name.clone(), 2, &conflict, now)).all();
    assert!(
        said[0]["level"] == "ERROR" && said[0]["error"].as_str().unwrap().contains("upgrade that node"),
        "{said:?}"
    );
}

/// A token that makes no key for one context until it is let.
struct Hanging {
    context: ContextName,
    until: Mutex<mpsc::Receiver<()>>,
}

impl KeyMaker for Hanging {
    fn check(&self, _: &SlotName) -> Result<(), CallError> {
        Ok(())
    }

    fn make(&self, order: &KeyOrder) -> Result<NewKey, CallError> {
        if order.context == self.context {
            // An error means that it is over.
            let _ = self.until.lock().unwrap().recv();
        }
        FakeKeys::default().make(order)
    }
}

#[tokio::test]
async fn a_token_that_hangs_over_one_context_delays_no_other() {
    let mut world = world();
    limited(&mut world, "hangs");
    for name in ["hangs", "small"] {
        give_of(&mut world, name, 1, 1799);
    }
    assert_eq!(due(&world.state)[0].0, context("hangs"), "its turn is first");
    let bench = bench(world);
    let (release, until) = mpsc::channel();
    let keys = Arc::new(Hanging {
        context: context("hangs"),
        until: Mutex::new(until),
    });
    let driver = tokio::spawn(bench.by_use_with(keys).drive());
    bench.until_active("small", 2).await;
    // And not only once.
    bench.cluster.with(|world| give(world, 2, 1799));
    bench.until_active("small", 3).await;
    assert_eq!(bench.active_of("hangs"), Some(1));
    drop(release);
    bench.until_active("hangs", 2).await;
    driver.abort();
    let prepared = bench.cluster.count(|op| matches!(op, Op::PrepareVersion(_)));
    assert_eq!(prepared, 5, "two first ones, two of one and one of the other");
}

/// As it is when two contexts are to get one label in the same moment.
#[tokio::test]
async fn a_refusal_that_is_remembered_is_not_the_answer_for_ever_and_two_leaders_make_one_version() {
    let mut world = world();
    give(&mut world, 1, 1799);
    let name = context("small");
    let asked = asked(OPERATION, &name, (1, 1), 1);
    let Op::PrepareVersion(op) = prepare("small", 1, 2) else {
        panic!("another operation")
    };
    let taken = Op::PrepareVersion(PrepareVersion {
        label: "kek-small-v1".to_owned(),
        ..op
    });
    let refused = world.send(asked.id(0), asked.body_hash, asked.origin.clone(), taken);
    assert!(
        matches!(refused, Outcome::Refused(Refusal::Exists(_))),
        "{refused:?}"
    );
    let bench = bench(world);
    let (mut old, mut new) = (bench.by_use(), bench.by_use());
    let now = Instant::now();
    tokio::join!(old.check(now), new.check(now));
    assert_eq!(bench.active(), Some(2));
    let published = bench.cluster.published();
    assert_eq!(published.state.versions_of(&name).count(), 2);
}

#[tokio::test]
async fn a_context_that_is_rotated_all_the_time_is_said_to_be_and_goes_on() {
    let bench = bench(world());
    let mut by_use = bench.by_use();
    let (name, begin) = (context("small"), Instant::now());
    let mut count = |minutes: u64| {
        let at = begin + Duration::from_secs(60 * minutes);
        Lines::of(|| by_use.count(&name, at)).all().len()
    };
    // Every seven minutes is ten times within the hour at most.
    assert!((0..20).all(|turn| count(7 * turn) == 0));
    let said: usize = (0..20).map(|turn| count(1000 + 5 * turn)).sum();
    assert_eq!(said, 10, "from the eleventh on, each time");
    assert!(by_use.rotated[&name].len() <= OFTEN + 1);
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
