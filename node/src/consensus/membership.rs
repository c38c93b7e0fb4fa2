//! The membership driver: learners are added, and become voters once they have proven every key. A pure
//! decision over state and membership, so that a new leader goes on where the old one died.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use openraft::ChangeMembers;
use raft_store::MemberNode;
use raft_store::command::{AdmitNode, Op, Origin, RequestId};
use raft_store::names::RaftId;
use raft_store::state::ClusterState;
use raft_store::state::node::NodeStatus;

use super::shared::Shared;
use crate::clock;

const PERIOD: Duration = Duration::from_millis(250);
/// A membership change that takes longer goes on by itself; the driver looks again.
const CHANGE_WITHIN: Duration = Duration::from_secs(5);

/// The next step.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// A registered node is unknown to Raft.
    AddLearner(RaftId, MemberNode),
    /// A learner has proven every key: make it a member, which rotations wait for.
    Admit(RaftId),
    /// A member does not vote yet.
    Promote(RaftId),
    /// A leader died inside a joint change.
    FinishJoint,
}

/// What the decision looks at besides the state.
struct Membership {
    voters: BTreeSet<RaftId>,
    learners: BTreeSet<RaftId>,
    joint: bool,
    /// Index each follower has, by replication.
    matched: BTreeMap<RaftId, u64>,
}

fn decide(state: &ClusterState, raft: &Membership) -> Option<Step> {
    if raft.joint {
        return Some(Step::FinishJoint);
    }
    for (id, node) in state.nodes().iter() {
        let known = raft.voters.contains(id) || raft.learners.contains(id);
        match node.status {
            NodeStatus::Removed { .. } => {}
            NodeStatus::Joining | NodeStatus::Member if !known => {
                let member = MemberNode {
                    name: node.name.to_string(),
                    cluster_address: node.cluster_address.clone(),
                };
                return Some(Step::AddLearner(*id, member));
            }
            NodeStatus::Joining => {
                let proven_at = state.reports().get(id).and_then(|report| report.proven_at);
                let matched = raft.matched.get(id).copied();
                let pending = state.pending().any(|(_, version)| !version.acks.contains(id));
                if proven_at.is_some() && matched >= proven_at && !pending {
                    return Some(Step::Admit(*id));
                }
            }
            NodeStatus::Member => {
                if !raft.voters.contains(id) {
                    return Some(Step::Promote(*id));
                }
            }
        }
    }
    None
}

/// Runs the driver until the runtime ends.
pub(super) async fn drive(shared: Arc<Shared>) {
    let mut tick = tokio::time::interval(PERIOD);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        tick.tick().await;
        if !shared.is_leader() || shared.draining.load(std::sync::atomic::Ordering::SeqCst) {
            continue;
        }
        let Some(step) = next_step(&shared) else { continue };
        tracing::info!(?step, "membership");
        if let Err(error) = carry_out(&shared, step).await {
            // Changes in progress and lost leadership both end by themselves; the next tick looks again.
            tracing::info!(error, "membership step not done yet");
        }
    }
}

fn next_step(shared: &Shared) -> Option<Step> {
    let sample = shared.metrics()?;
    let config = &sample.metrics.membership_config;
    let voters: BTreeSet<RaftId> = config.voter_ids().collect();
    let learners = config.membership().learner_ids().collect();
    let replication = sample.metrics.replication.as_ref();
    let matched = replication.map(|r| {
        r.iter()
            .filter_map(|(id, at)| Some((*id, (*at)?.index)))
            .collect()
    });
    let joint = config.membership().get_joint_config().len() > 1;
    let membership = Membership {
        voters,
        learners,
        joint,
        matched: matched.unwrap_or_default(),
    };
    decide(&shared.published.load().state, &membership)
}

async fn carry_out(shared: &Arc<Shared>, step: Step) -> Result<(), String> {
    let running = shared.raft.get().ok_or("raft is not running")?;
    let raft = &running.raft;
    let change = async {
        match step {
            Step::AddLearner(id, node) => raft
                .add_learner(id, node, false)
                .await
                .map(|_| ())
                .map_err(|e| e.to_string()),
            Step::Admit(node) => {
                let id = RequestId::Node {
                    node: running.id,
                    nonce: clock::random_id(),
                };
                let origin = Origin::Node(running.id);
                let admitted = shared
                    .propose(id, [0; 32], origin, Op::AdmitNode(AdmitNode { node }))
                    .await;
                admitted.map(|_| ()).map_err(|e| e.to_string())
            }
            Step::Promote(id) => {
                let add = ChangeMembers::AddVoterIds(BTreeSet::from([id]));
                raft.change_membership(add, false)
                    .await
                    .map(|_| ())
                    .map_err(|e| e.to_string())
            }
            Step::FinishJoint => {
                // Proposing the newest of the joint configurations again makes it the only one.
                let none = ChangeMembers::AddVoterIds(BTreeSet::new());
                raft.change_membership(none, false)
                    .await
                    .map(|_| ())
                    .map_err(|e| e.to_string())
            }
        }
    };
    tokio::time::timeout(CHANGE_WITHIN, change)
        .await
        .unwrap_or_else(|_| Err("it takes long".into()))
}
