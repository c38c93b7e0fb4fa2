//! What an administrator hears who wants a node to leave, or another one to lead.

use std::sync::Arc;
use std::time::Duration;

use raft_store::command::BuryNode;

use super::*;
use crate::rotation::testing::{FakeCluster, World, asked};

const REMOVE: &str = "cluster remove n";

struct Bench {
    cluster: Arc<FakeCluster>,
    /// By the order in which they joined.
    nodes: Vec<RaftId>,
}

impl Bench {
    fn of(nodes: u64) -> Self {
        let mut world = World::new(nodes);
        world.prepare("c");
        world.activate("c", 1);
        let nodes = world.voters.iter().copied().collect();
        Self {
            cluster: FakeCluster::new(world),
            nodes,
        }
    }

    fn name(&self, number: usize) -> NodeName {
        NodeName::new(&format!("n{}", self.nodes[number])).unwrap()
    }

    fn removal(&self) -> Removal<'_> {
        Removal {
            cluster: &*self.cluster,
            deadline: Instant::now() + Duration::from_millis(200),
        }
    }

    async fn leave(&self, wish: Leave<'_>, key: &str) -> Result<RemoveNodeResponse, CallError> {
        self.removal().leave(&wish, &asked(REMOVE, key)).await
    }

    async fn remove(&self, number: usize, key: &str) -> Result<RemoveNodeResponse, CallError> {
        let node = self.name(number);
        let wish = Leave {
            node: &node,
            successor: None,
            lose_keys: false,
            dry_run: false,
        };
        self.leave(wish, key).await
    }

    /// What the driver does once a node is to leave.
    fn bury(&self, number: usize) {
        let node = self.nodes[number];
        self.cluster.with(|world| {
            world.voters.remove(&node);
            world.ok(Op::BuryNode(BuryNode { node }));
        });
    }
}

#[tokio::test]
async fn a_removal_is_waited_for_and_a_repeat_is_told_that_it_is_done() {
    let bench = Bench::of(3);
    let late = bench.remove(2, "k").await.unwrap_err();
    assert_eq!(late.code, ErrorCode::OutcomeUnknown, "nobody drives here: {late}");
    assert!(late.detail.contains("--cancel"), "{late}");
    bench.bury(2);
    for _ in 0..2 {
        let done = bench.remove(2, "k").await.unwrap();
        assert_eq!(
            (done.state, done.raft_id),
            (RemovalState::Removed, bench.nodes[2])
        );
        assert_eq!((done.voters, done.majority, done.failure_tolerance), (2, 2, 0));
        assert_eq!(done.held, ["c"], "its active version is to be rotated");
    }
    assert_eq!(bench.cluster.count(|op| matches!(op, Op::RemoveNode(_))), 1);
    let again = bench.remove(2, "another").await.unwrap_err();
    assert_eq!(again.code, ErrorCode::NodeRemoved);
    assert!(again.detail.contains("active versions of c"), "{again}");
}

#[tokio::test]
async fn what_would_break_the_quorum_is_refused_with_the_numbers_and_changes_nothing() {
    let bench = Bench::of(3);
    bench.cluster.silence(bench.nodes[1], Duration::from_secs(9));
    let refused = bench.remove(2, "k").await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::QuorumAtRisk);
    for said in [
        "of 2 voters that would be left 1 answer and are up to date, and 2 are a majority",
        bench.name(1).as_str(),
        "nothing was changed",
    ] {
        assert!(refused.detail.contains(said), "{said}: {refused}");
    }
    // The dead one may go.
    let node = bench.name(1);
    let wish = Leave {
        node: &node,
        successor: None,
        lose_keys: false,
        dry_run: true,
    };
    let possible = bench.leave(wish, "k2").await.unwrap();
    assert_eq!((possible.state, possible.voters), (RemovalState::Possible, 2));
    assert_eq!(bench.cluster.count(|op| matches!(op, Op::RemoveNode(_))), 0);
}

#[tokio::test]
async fn the_last_voter_and_who_is_unknown_are_refused() {
    let bench = Bench::of(1);
    let last = bench.remove(0, "k").await.unwrap_err();
    assert_eq!(last.code, ErrorCode::QuorumAtRisk);
    assert!(last.detail.contains("only voter"), "{last}");
    let node = NodeName::new("nobody").unwrap();
    let wish = Leave {
        node: &node,
        successor: None,
        lose_keys: false,
        dry_run: false,
    };
    assert_eq!(
        bench.leave(wish, "k").await.unwrap_err().code,
        ErrorCode::NotFound
    );
}

#[tokio::test]
async fn a_replacement_waits_for_its_successor_and_can_be_taken_back() {
    let bench = Bench::of(3);
    let (old, new) = (bench.name(2), NodeName::new("new").unwrap());
    let wish = Leave {
        node: &old,
        successor: Some(&new),
        lose_keys: false,
        dry_run: false,
    };
    let waiting = bench.leave(wish.clone(), "k").await.unwrap();
    assert_eq!(waiting.state, RemovalState::Waiting);
    assert_eq!(waiting.successor.as_deref(), Some("new"));
    let other = bench.remove(1, "k2").await.unwrap_err();
    assert_eq!(other.code, ErrorCode::Conflict, "one after the other: {other}");
    let kept = bench.removal().keep(&old, &asked("cluster keep n", "k")).await;
    assert_eq!(kept.unwrap().raft_id, bench.nodes[2]);
    // A late repeat does not have it leave once more.
    let repeated = bench.leave(wish, "k").await.unwrap_err();
    assert_eq!(repeated.code, ErrorCode::Conflict);
    let votes = bench.name(1);
    let wish = Leave {
        node: &old,
        successor: Some(&votes),
        lose_keys: false,
        dry_run: false,
    };
    let refused = bench.leave(wish, "k3").await.unwrap_err();
    assert!(refused.detail.contains("votes already"), "{refused}");
}

#[tokio::test]
async fn a_leader_that_steps_aside_sends_the_caller_to_the_next_one() {
    let bench = Bench::of(3);
    *bench.cluster.leadership.lock().unwrap() = None;
    let elsewhere = bench.remove(0, "k").await.unwrap_err();
    assert_eq!(elsewhere.code, ErrorCode::NotLeader);
}

#[tokio::test]
async fn leadership_goes_to_a_voter_and_a_repeat_moves_nothing() {
    let bench = Bench::of(3);
    let to = bench.name(1);
    let done = bench.removal().transfer(1, Some(&to)).await.unwrap();
    assert_eq!((done.leader.as_str(), done.before.as_str()), (to.as_str(), "n1"));
    assert!(bench.cluster.leadership().is_none());
    // Node 1 leads again by now; the request was about another leader.
    let repeat = bench.removal().transfer(bench.nodes[1], None).await.unwrap();
    assert_eq!(repeat.raft_id, 1);
    let own = NodeName::new("n1").unwrap();
    assert_eq!(bench.removal().transfer(1, Some(&own)).await.unwrap().raft_id, 1);
}

#[tokio::test]
async fn whoever_leaves_is_not_given_the_lead() {
    let bench = Bench::of(3);
    let to = bench.name(1);
    let late = bench.remove(1, "k").await.unwrap_err();
    assert_eq!(late.code, ErrorCode::OutcomeUnknown, "{late}");
    let refused = bench.removal().transfer(1, Some(&to)).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Conflict);
    assert!(
        refused.detail.contains("is leaving") && refused.detail.contains("--cancel"),
        "{refused}"
    );
    assert!(bench.cluster.leadership().is_some(), "nothing was handed over");
    bench
        .removal()
        .keep(&to, &asked("cluster keep n", "k"))
        .await
        .unwrap();
    let done = bench.removal().transfer(1, Some(&to)).await.unwrap();
    assert_eq!(done.leader, to.as_str());
}

#[tokio::test]
async fn only_a_voter_is_given_the_lead() {
    let bench = Bench::of(2);
    let learner = bench.cluster.with(World::join);
    let learner = NodeName::new(&format!("n{learner}")).unwrap();
    let refused = bench.removal().transfer(1, Some(&learner)).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Conflict);
    let alone = Bench::of(1);
    let refused = alone.removal().transfer(1, None).await.unwrap_err();
    assert!(refused.detail.contains("only voter"), "{refused}");
    let unknown = NodeName::new("nobody").unwrap();
    let refused = alone.removal().transfer(1, Some(&unknown)).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::NotFound);
}
