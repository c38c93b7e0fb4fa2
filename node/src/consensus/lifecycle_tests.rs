//! How a real node begins, gets its identity, once, and stops.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use hsm_api::ErrorCode;
use raft_store::command::{AddRevocations, Op, RemoveNode, ReportNode};
use raft_store::names::Boot;
use raft_store::state::FEATURE_LEVEL;
use raft_store::state::node::NodeReport;
use raft_store::storage::Poison;
use tokio::task::{JoinHandle, JoinSet};

use super::start::{prepare, start};
use super::test_world::{World, rotate, seed, until};
use super::wire::Response;
use super::{BoxFuture, LeaderCalls, ProposeError, Role, StartError};
use crate::admin::call::{AdminCall, CallError};
use crate::rotation::clocks::Doubt;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_is_taken_is_found_before_anything_is_made() {
    let world = World::new("latecomer").await;
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let options = world.options_at(taken.local_addr().unwrap().port());
    let data = options.data_dir.clone();
    let prepared = tokio::task::spawn_blocking(move || prepare(options))
        .await
        .unwrap();
    assert!(matches!(prepared.err().unwrap(), StartError::Listen(_)));
    assert!(!data.exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_stopping_appends_and_confirms_nothing() {
    let world = World::new("leaver").await;
    world.node.step_down().await;
    let last = world.node.view().last_log;
    let nothing = AddRevocations { revocations: vec![] };
    let proposed = world.node.propose_as_leader(Op::AddRevocations(nothing)).await;
    assert!(matches!(proposed, Err(ProposeError::Draining)), "{proposed:?}");
    let read = world.node.read_index().await;
    assert!(matches!(read, Err(ProposeError::Draining)), "{read:?}");
    assert_eq!(world.node.view().last_log, last);
}

/// Changes go on: there is nobody to leave them to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sole_voter_that_is_told_to_stop_leads_on_until_it_is_drained() {
    let world = World::new("last").await;
    // For which it does not wait.
    let in_hand = world.node.shared.calls_in_hand.read().await;
    let at_once = tokio::time::timeout(Duration::from_secs(2), world.node.hand_over_first());
    at_once.await.unwrap();
    drop(in_hand);
    assert_eq!(world.node.view().role, Role::Leader);
    world
        .done(Op::AddRevocations(AddRevocations { revocations: vec![] }))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_hands_over_begins_no_call() {
    let world = World::new("caller").await;
    world.node.serve_leader_calls(Arc::new(Doubtful));
    let id = world.admit().await;
    let rotated = async || match world.ask(&world.hello(id), rotate(id, 1)).await.unwrap() {
        Response::Admin(Err(error)) => error.code,
        _ => panic!("another answer"),
    };
    assert_eq!(rotated().await, ErrorCode::Internal);
    let none = world.node.shared.calls_in_hand.write().await;
    assert_eq!(rotated().await, ErrorCode::NotLeader);
    drop(none);
    assert_eq!(rotated().await, ErrorCode::Internal);
    // Nor does one begin while it waits for those that it has.
    let in_hand = world.node.shared.calls_in_hand.read().await;
    let mut none = Box::pin(world.node.shared.calls_in_hand.write());
    assert!(none.as_mut().now_or_never().is_none());
    assert_eq!(rotated().await, ErrorCode::NotLeader);
    drop(in_hand);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_told_to_stop_takes_over_from_nobody() {
    let world = World::new("stopping").await;
    world.node.hand_over_first().await;
    match world.node.shared.stand(1).await {
        Response::Failed(why) => assert_eq!(why, "this node is shutting down too"),
        _ => panic!("it stood"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_to_found_and_to_join_at_once_does_one_of_them() {
    let world = World::new("undecided").await;
    let node = world.another().await;
    let request = world.invitation().await;
    let joining = {
        let node = node.clone();
        tokio::spawn(async move { node.join(request).await.map(|joined| joined.raft_id) })
    };
    let founded = node.found(seed()).await;
    let own = node.control().get();
    match founded {
        Ok(founded) => {
            assert_eq!(
                (own.cluster_id, own.raft_id),
                (founded.cluster_id, founded.raft_id)
            );
            let refused = joining.await.unwrap().unwrap_err();
            assert_eq!(refused.code, ErrorCode::AlreadyInitialised, "{refused}");
        }
        Err(refused) => {
            assert_eq!(refused.code, ErrorCode::AlreadyInitialised, "{refused}");
            let cluster = world.node.published().state.meta().unwrap().cluster_id;
            assert_eq!(own.cluster_id, cluster);
            // Without tokens it does not prove its keys, and would wait for its vote.
            joining.abort();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_founded_once_by_however_many() {
    let world = World::new("founders").await;
    let node = world.another().await;
    let (one, other) = tokio::join!(node.found(seed()), node.found(seed()));
    let refused = match (one, other) {
        (Ok(_), Err(refused)) | (Err(refused), Ok(_)) => refused,
        (Ok(_), Ok(_)) => panic!("founded twice"),
        (Err(one), Err(other)) => panic!("{one}, {other}"),
    };
    assert_eq!(refused.code, ErrorCode::AlreadyInitialised, "{refused}");
}

/// What a leader does whose clock is not the voters'.
struct Doubtful;

impl LeaderCalls for Doubtful {
    fn execute(&self, _: AdminCall) -> BoxFuture<'_, Result<serde_json::Value, CallError>> {
        Box::pin(async { Err(CallError::new(ErrorCode::Internal, "no part of this test")) })
    }

    fn judge_clock(&self) -> Result<(), Doubt> {
        Err(Doubt::Apart { by_ms: -60_000 })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_doubts_its_clock_registers_nobody() {
    let world = World::new("timeless").await;
    world.node.serve_leader_calls(Arc::new(Doubtful));
    let node = world.another().await;
    let refused = node.join(world.invitation().await).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::NotReady, "{refused}");
    assert!(refused.detail.contains("60000 ms behind"), "{refused}");
    assert_eq!(world.node.published().state.nodes().len(), 1);
}

/// Passes on what comes to an address of its own, until it is aborted.
async fn door(to: String) -> (String, JoinHandle<()>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let open = tokio::spawn(async move {
        let mut through = JoinSet::new();
        while let Ok((mut from, _)) = listener.accept().await {
            let to = to.clone();
            through.spawn(async move {
                let mut to = tokio::net::TcpStream::connect(to).await?;
                tokio::io::copy_bidirectional(&mut from, &mut to).await
            });
        }
    });
    (address, open)
}

/// It does not stand for election, so it calls nobody; and Raft's membership has lost it, so nobody calls it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_learner_that_was_removed_while_it_was_away_asks_and_finds_out() {
    let world = World::new("wanderer").await;
    // Whoever removes has to have said that it can.
    let report = NodeReport {
        seq: 1,
        boot: Boot([1; 16]),
        incarnation: world.node.control().get().incarnation,
        clock: 0,
        durable_index: 0,
        proven_at: Some(1),
        feature_level: FEATURE_LEVEL,
        slots: BTreeMap::new(),
        uses: BTreeMap::new(),
    };
    world.done(Op::ReportNode(ReportNode { node: 1, report })).await;
    let port = {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap().port()
    };
    let (address, open) = door(format!("127.0.0.1:{port}")).await;
    let mut options = world.options_at(port);
    options.advertise = address;
    let node = tokio::task::spawn_blocking(move || start(options))
        .await
        .unwrap()
        .unwrap();
    let request = world.invitation().await;
    let joining = {
        let node = node.clone();
        tokio::spawn(async move { node.join(request).await.map(|joined| joined.raft_id) })
    };
    until("it to know whom to ask", || {
        let published = node.published();
        published.state.nodes().len() == 2 && node.staleness().is_some()
    })
    .await;
    // Without tokens it does not prove its keys, and would wait for its vote.
    joining.abort();
    open.abort();
    until("nobody to reach it", || open.is_finished()).await;
    let id = node.control().get().raft_id;
    let removal = RemoveNode {
        node: id,
        successor: None,
        lose_keys: false,
    };
    world.done(Op::RemoveNode(removal)).await;
    until("it to find out", || node.control().get().poison.is_some()).await;
    assert_eq!(node.control().get().poison, Some(Poison::Removed));
    assert!(
        node.published().state.nodes().get(&id).unwrap().is_standing(),
        "nobody sent it the entry"
    );
}
