use std::collections::HashMap;
use std::sync::Mutex;

use hsm_core::envelope::Binding;
use hsm_core::{OnBatchDone, OnDone, OpError, Work};
use raft_store::names::Boot;
use tokio::time::timeout;

use super::super::Meter;
use super::super::empty::{Empty, LONG};
use super::super::tests::{key, run, world};
use super::*;
use crate::keyring::{ClosedSlot, ContextKeys, KeySlot, ReadableKey, TokenOps};
use crate::rotation::testing::{World, context};

const SOON: Duration = Duration::from_secs(20);

/// What becomes of a proposal.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Done,
    /// The leader's disk is full.
    NoRoom,
    /// It was done, and the answer was lost.
    Unknown,
    /// It was not.
    Lost,
}

/// A state that takes what it is told to, and says how often it was asked.
struct Ground {
    world: Mutex<World>,
    fates: Mutex<Vec<Fate>>,
    asked: watch::Sender<usize>,
    applied: watch::Sender<u64>,
}

impl Ground {
    fn new(fates: &[Fate]) -> Arc<Self> {
        let world = world();
        Arc::new(Self {
            applied: watch::channel(world.index).0,
            world: Mutex::new(world),
            fates: Mutex::new(fates.iter().rev().copied().collect()),
            asked: watch::channel(0).0,
        })
    }

    fn leased(&self, version: u32) -> u64 {
        self.world
            .lock()
            .unwrap()
            .state
            .lease(&key("small", version))
            .leased
    }

    async fn until(&self, asked: usize) {
        let mut times = self.asked.subscribe();
        timeout(SOON, times.wait_for(|times| *times >= asked))
            .await
            .unwrap()
            .unwrap();
    }
}

#[async_trait]
impl Proposer for Ground {
    fn published(&self) -> Arc<Published> {
        Arc::new(self.world.lock().unwrap().published())
    }

    fn applied(&self) -> watch::Receiver<u64> {
        self.applied.subscribe()
    }

    fn raft_id(&self) -> Option<RaftId> {
        Some(1)
    }

    async fn propose_as_node(&self, op: Op) -> Result<Done, ProposeError> {
        let fate = self.fates.lock().unwrap().pop().unwrap_or(Fate::Done);
        let mut done = Done::Ok;
        if matches!(fate, Fate::Done | Fate::Unknown) {
            let mut world = self.world.lock().unwrap();
            done = world.ok_as(1, op);
            self.applied.send_replace(world.index);
        }
        self.asked.send_modify(|times| *times += 1);
        match fate {
            Fate::Done => Ok(done),
            Fate::NoRoom => Err(ProposeError::NoSpace),
            Fate::Unknown => Err(ProposeError::Unknown),
            Fate::Lost => Err(ProposeError::NotLeader { leader: None }),
        }
    }
}

/// A slot that serves.
struct Open;

impl TokenOps for Open {
    fn state(&self) -> SlotState {
        SlotState::Ready
    }

    fn run(&self, _work: Work, _until: Instant, _done: OnDone) -> Result<(), OpError> {
        Err(OpError::QueueFull)
    }

    fn run_batch(&self, _works: Vec<Work>, _until: Instant, _done: OnBatchDone) -> Result<(), OpError> {
        Err(OpError::QueueFull)
    }
}

/// A ring in which the only version of `small` is held, in this slot.
fn ring(ground: &Ground, slot: Arc<dyn TokenOps>) -> Arc<ArcSwap<KeyRing>> {
    let uid = key_uid(ground);
    let held = ReadableKey {
        slot: KeySlot {
            name: "s".into(),
            ops: slot,
        },
        version: 1,
        key_id: "kek-small-v1".to_owned(),
    };
    let keys = ContextKeys {
        binding: Binding::Shared,
        active: None,
        readable: HashMap::from([(to_token_key(uid), held)]),
        by_key_id: HashMap::new(),
        highest_known: 1,
        missing: HashMap::new(),
        retired: HashMap::new(),
    };
    Arc::new(ArcSwap::from_pointee(KeyRing::new(HashMap::from([(
        context("small"),
        keys,
    )]))))
}

fn key_uid(ground: &Ground) -> raft_store::names::KeyUid {
    let world = ground.world.lock().unwrap();
    world.state.version(&context("small"), 1).unwrap().key_uid
}

/// A driver at work, until it is dropped.
struct Bench {
    ground: Arc<Ground>,
    leases: Arc<Leases>,
    meter: Arc<Meter>,
    driver: tokio::task::JoinHandle<()>,
    _running: watch::Sender<bool>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

fn start(ground: Arc<Ground>, slot: Arc<dyn TokenOps>) -> Bench {
    let leases = run(1);
    assert_eq!(leases.boot(), Boot([1; 16]));
    let meter = leases.meter(key_uid(&ground));
    let (running, shutdown) = watch::channel(false);
    let ring = ring(&ground, slot);
    let driver = tokio::spawn(drive(
        Arc::clone(&ground) as Arc<dyn Proposer>,
        Arc::clone(&leases),
        ring,
        shutdown,
    ));
    Bench {
        ground,
        leases,
        meter,
        driver,
        _running: running,
    }
}

impl Bench {
    /// How many versions would be starved if it stayed for long as it is now.
    fn starved(&self) -> u32 {
        self.leases.books().empty = Empty::default();
        let (published, now) = (self.ground.published(), Instant::now());
        let starved = |now| self.leases.starved(&published.state, now, |_| true);
        assert_eq!(starved(now), 0, "nobody has looked before");
        starved(now + 2 * LONG)
    }

    async fn full(&self) {
        let full = async {
            while self.meter.left() < FULL {
                tokio::task::yield_now().await;
            }
        };
        timeout(SOON, full).await.unwrap();
    }
}

/// The smallest lease under the limit of `small`.
const FULL: u64 = 312;

#[tokio::test]
async fn a_held_version_gets_its_first_lease_and_another_one_at_half_and_none_while_it_rests() {
    let bench = start(Ground::new(&[]), Arc::new(Open));
    bench.ground.until(1).await;
    bench.full().await;
    assert_eq!(bench.ground.leased(1), 1 + FULL);
    // Nothing is encrypted: other entries wake it, and it claims nothing.
    for _ in 0..20 {
        {
            let mut world = bench.ground.world.lock().unwrap();
            world.report_clock(1, 0);
            bench.ground.applied.send_replace(world.index);
        }
        tokio::task::yield_now().await;
    }
    assert_eq!(*bench.ground.asked.borrow(), 1);
    while bench.meter.left() > FULL / 2 - 1 {
        assert!(bench.meter.take());
    }
    bench.ground.until(2).await;
    bench.full().await;
    assert!(bench.ground.leased(1) > 1 + FULL);
}

#[tokio::test]
async fn a_claim_whose_outcome_is_unknown_is_met_once() {
    let bench = start(Ground::new(&[Fate::Unknown]), Arc::new(Open));
    bench.ground.until(1).await;
    bench.full().await;
    assert_eq!(bench.ground.leased(1), 1 + FULL);
    // Long enough for a second one, if it still wanted something.
    tokio::time::sleep(2 * AGAIN).await;
    assert_eq!(*bench.ground.asked.borrow(), 1, "the state says that it was done");
}

#[tokio::test]
async fn a_claim_that_was_lost_is_made_again() {
    let bench = start(Ground::new(&[Fate::Lost, Fate::Lost]), Arc::new(Open));
    bench.ground.until(3).await;
    bench.full().await;
    assert_eq!(bench.ground.leased(1), 1 + FULL);
}

/// Then no node is given any, and this one is no worse than the others.
#[tokio::test]
async fn a_leader_without_room_starves_nobody() {
    let bench = start(Ground::new(&[]), Arc::new(Open));
    bench.ground.until(1).await;
    bench.full().await;
    assert_eq!(bench.starved(), 0);
    *bench.ground.fates.lock().unwrap() = vec![Fate::Lost, Fate::NoRoom, Fate::Lost];
    while bench.meter.take() {}
    let mut seen = Vec::new();
    for asked in 2..=4 {
        bench.ground.until(asked).await;
        seen.push(bench.starved());
    }
    assert_eq!(seen, [1, 0, 1]);
    bench.full().await;
    assert_eq!(bench.starved(), 0);
}

/// A leader that leaves the balancer must not find that those who starve have left it before.
#[test]
fn what_the_leader_refuses_everybody_is_told_from_what_this_node_alone_suffers() {
    let older = ProposeError::OlderCopy { node: 9 };
    let not_understood = ProposeError::NotUnderstood {
        operation: "lease_invocations".to_owned(),
        level: 9,
        node: "n1".to_owned(),
        understands: 4,
    };
    for failure in [
        ProposeError::NoSpace,
        ProposeError::NoQuorum,
        ProposeError::Draining,
        ProposeError::Busy,
        older,
        not_understood,
    ] {
        assert!(is_everybodys(&failure), "{failure}");
    }
    for failure in [ProposeError::Unknown, ProposeError::NotLeader { leader: Some(2) }] {
        assert!(!is_everybodys(&failure), "{failure}");
    }
}

#[tokio::test]
async fn a_slot_that_does_not_serve_claims_nothing() {
    let bench = start(Ground::new(&[]), Arc::new(ClosedSlot(SlotState::Locked)));
    for _ in 0..50 {
        bench.ground.applied.send_modify(|index| *index += 1);
        tokio::task::yield_now().await;
    }
    assert_eq!(*bench.ground.asked.borrow(), 0);
    assert_eq!(bench.meter.left(), 0);
}
