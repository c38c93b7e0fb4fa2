use hsm_core::replication::ReplicationKey;
use raft_store::command::{AckTransportKey, OfferTransportKey, RekeyTransport};
use raft_store::names::TransportId;
use raft_store::state::ClusterState;
use raft_store::state::context::VersionState;
use raft_store::state::slot::{TransportMode, TransportState};

use super::*;
use crate::rotation::KeyMaker;
use crate::rotation::cluster::{Waited, wait_leading};
use crate::rotation::testing::{
    FakeCluster, FakeKeys, World, cluster_keys, context, replication_key, slot, still,
};

/// What drives a cluster on its leader.
struct Bench {
    cluster: Arc<FakeCluster>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

fn other_key() -> ReplicationKey {
    ReplicationKey::parse(&"cd".repeat(32)).unwrap()
}

fn driver(cluster: &Arc<FakeCluster>, replication: Replication) -> Driver {
    let as_dyn = || Arc::clone(cluster) as Arc<dyn Cluster>;
    let limits = Limits::new(Duration::from_secs(60));
    let keys = Arc::new(FakeKeys::default()) as Arc<dyn KeyMaker>;
    let rotator = Rotator::new(as_dyn(), keys, cluster_keys(), still(), limits);
    Driver::new(as_dyn(), Arc::new(rotator), Arc::new(replication), limits)
}

fn bench(world: World, replication: Replication) -> Bench {
    let cluster = FakeCluster::new(world);
    let limits = Limits::new(Duration::from_secs(60));
    let as_dyn = Arc::clone(&cluster) as Arc<dyn Cluster>;
    let tasks = vec![
        tokio::spawn(crate::rotation::drive(as_dyn, still(), limits)),
        tokio::spawn(driver(&cluster, replication).drive()),
    ];
    Bench { cluster, tasks }
}

impl Bench {
    async fn becomes(&self, what: &str, is_so: impl Fn(&ClusterState) -> bool + Send) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        let met = wait_leading(&*self.cluster, deadline, move |published| {
            is_so(&published.state).then_some(())
        });
        assert_eq!(met.await, Waited::Met(()), "{what}");
    }
}

fn state_of(state: &ClusterState, id: u8) -> Option<TransportState> {
    let slot = state.slots().get(&slot("s"))?;
    slot.transport(TransportId([id; 16])).map(|found| found.state)
}

fn ack(id: u8, gone: bool) -> Op {
    Op::AckTransportKey(AckTransportKey {
        node: 1,
        slot: slot("s"),
        id: TransportId([id; 16]),
        gone,
    })
}

#[tokio::test]
async fn a_rekey_rotates_every_context_and_ends_with_the_old_transport_key() {
    let mut world = World::new(1);
    let first = world.prepare("c");
    world.activate("c", first);
    world.ok(Op::RekeyTransport(RekeyTransport {
        slot: slot("s"),
        expected_generation: 1,
        give_up: None,
    }));
    world.ok(Op::OfferTransportKey(OfferTransportKey {
        slot: slot("s"),
        id: TransportId([2; 16]),
        expected_generation: 1,
        mode: TransportMode::Standard,
        check: vec![2; 40],
        grants: BTreeMap::new(),
    }));
    let bench = bench(world, Replication::new(replication_key(), "x"));
    bench.cluster.with(|world| world.ok(ack(2, false)));
    bench
        .becomes("rotated", |state| {
            let second = state.version(&context("c"), 2);
            let material = second.and_then(|version| version.material.as_ref());
            let under = material.map(|material| material.transport_id);
            let is_active = second.is_some_and(|version| version.state == VersionState::Active);
            is_active && under == Some(TransportId([2; 16]))
        })
        .await;
    let known = bench.cluster.published();
    assert_eq!(state_of(&known.state, 1), Some(TransportState::Superseded));
    bench.cluster.with(|world| {
        world.schedule_destroy("c", 1, 1000);
        world.begin_destroy("c", 1);
    });
    bench
        .becomes("destroying", |state| {
            state_of(state, 1) == Some(TransportState::Destroying)
        })
        .await;
    bench.cluster.with(|world| world.ok(ack(1, true)));
    bench
        .becomes("destroyed", |state| {
            state_of(state, 1) == Some(TransportState::Destroyed)
        })
        .await;
    // One rotation, and nothing that goes on for ever.
    let made = |op: &Op| matches!(op, Op::PrepareVersion(_));
    assert_eq!(bench.cluster.count(made), 2);
}

#[tokio::test]
async fn records_are_sealed_anew_and_the_former_key_is_retired() {
    let mut world = World::new(1);
    let cluster_id = world.state.meta().unwrap().cluster_id;
    let both = Replication::new(other_key(), "x").beside(replication_key(), "y");
    world.rekey_replication(both.trk_id(cluster_id));
    let bench = bench(world, both);
    bench
        .becomes("retired", |state| {
            let row = state.replication().unwrap();
            row.former.is_none() && row.retired.len() == 1
        })
        .await;
}

#[tokio::test]
async fn a_leader_without_the_former_key_says_so_once_and_retires_nothing() {
    let mut world = World::new(1);
    let cluster_id = world.state.meta().unwrap().cluster_id;
    let new = Replication::new(other_key(), "x");
    world.rekey_replication(new.trk_id(cluster_id));
    let cluster = FakeCluster::new(world);
    let before = cluster.count(|_| true);
    let (mut driver, mut now) = (driver(&cluster, new), Instant::now());
    for _ in 0..3 {
        assert_eq!(driver.look(now).await, AFTER_ERROR);
        now += AFTER_ERROR;
        assert_eq!(driver.stuck.len(), 1);
        assert!(
            driver.stuck[0].contains("previous_encryption_key_env"),
            "{:?}",
            driver.stuck
        );
    }
    assert_eq!(cluster.count(|_| true), before);
    assert!(cluster.published().state.replication().unwrap().former.is_some());
}

#[tokio::test]
async fn whoever_does_not_lead_does_nothing() {
    let mut world = World::new(1);
    world.rekey_replication([9; 8]);
    let cluster = FakeCluster::new(world);
    *cluster.leadership.lock().unwrap() = None;
    let before = cluster.count(|_| true);
    let mut driver = driver(&cluster, Replication::new(replication_key(), "x"));
    assert_eq!(driver.look(Instant::now()).await, IDLE_LOOK);
    assert_eq!(cluster.count(|_| true), before);
}
