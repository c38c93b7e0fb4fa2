//! The membership driver: learners are added, and become voters once they have proven every key; nodes that leave are
//! taken out (`leaving.rs`). A pure decision over state and membership, so that a new leader goes on where the old one died.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use openraft::ChangeMembers;
use raft_store::MemberNode;
use raft_store::command::{AdmitNode, Op, Origin, RequestId};
use raft_store::names::RaftId;
use raft_store::state::ClusterState;
use raft_store::state::node::{Node, NodeStatus};

use super::held_back::Told;
use super::leaving;
use super::propose::{LAST_ANSWER, answer_of};
use super::shared::{Metrics, Shared};
use crate::clock;
use crate::rotation::reach;

/// Between looks; changes of the state wake the driver at once.
const PERIOD: Duration = Duration::from_millis(250);
/// Between looks while a node is on its way in: how far it has got, and that it answers, is in no entry.
const JOINING_LOOK: Duration = Duration::from_millis(50);
/// A membership change that takes longer goes on by itself; the driver looks again.
const CHANGE_WITHIN: Duration = Duration::from_secs(5);
/// Heartbeats within which a node has to have answered before it may count for a majority.
const HEARTBEATS: u32 = 5;
/// Entries that a peer may be behind and still acknowledge the next one within a moment. Far more than are ever on their
/// way at a time.
const BEHIND: u64 = 1024;

/// After a hand-over that failed: for a time nobody led. Each further one that fails in a row doubles it, up to a minute.
const HELD_ON: Duration = Duration::from_secs(5);
const MOST_HELD_ON: Duration = Duration::from_secs(60);

/// The next step.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A registered node is unknown to Raft.
    AddLearner(RaftId, MemberNode),
    /// A learner was registered again, or the only voter is started, under another address than Raft reaches it at.
    Correct(RaftId, MemberNode),
    /// A learner has proven every key: make it a member, which rotations wait for.
    Admit(RaftId),
    /// A member does not vote yet.
    Promote(RaftId),
    /// A leader died inside a joint change.
    FinishJoint,
    /// A voter leaves, and the others go on without it.
    Expel(RaftId),
    /// A voter leaves, and a member takes its place in the same change.
    Swap {
        /// Who leaves.
        old: RaftId,
        /// Who takes its place.
        new: RaftId,
    },
    /// This leader leaves: another one has to lead first.
    HandOver(RaftId),
    /// A learner that belongs to the cluster no more.
    Forget(RaftId),
    /// A node that left Raft's membership becomes a tombstone.
    Bury(RaftId),
}

/// What the decision looks at besides the state.
pub(super) struct Membership {
    /// This node.
    pub(super) id: Option<RaftId>,
    pub(super) voters: BTreeSet<RaftId>,
    pub(super) learners: BTreeSet<RaftId>,
    /// How Raft reaches each.
    pub(super) nodes: BTreeMap<RaftId, MemberNode>,
    pub(super) joint: bool,
    /// Index each follower has, by replication.
    matched: BTreeMap<RaftId, u64>,
    /// Who has answered this leader lately and keeps up with it, and itself. A node that is dead already would only make the
    /// majority larger.
    pub(super) heard: BTreeSet<RaftId>,
    /// This node, and where its configuration says that it is reached; nothing without a listener.
    own: Option<(RaftId, MemberNode)>,
}

impl Membership {
    /// The only voter, where its configuration has it: nobody has to reach it to elect it. One that version 1's
    /// configuration founded has no address before. Learners hear of it from the leader, who calls them; under a wrong
    /// address they would never come to prove a key, and nobody could join any more.
    fn moved(&self) -> Option<Step> {
        let (id, here) = self.own.as_ref()?;
        let votes_alone = self.voters.iter().eq([id]);
        let known = self.nodes.get(id)?;
        (votes_alone && known != here).then(|| Step::Correct(*id, here.clone()))
    }
}

/// Whether a node has acknowledged every version that it would have to serve, pending ones too.
fn acknowledged_all(state: &ClusterState, id: RaftId) -> bool {
    let mut held = state.held_by_members();
    held.all(|(_, version)| version.acks.contains(&id))
}

/// Whether a node understands less than every member. As a member it would keep all of them from changes that they
/// understand, and could be the one thing that keeps them from the change that would take it out again.
pub(super) fn is_below_members(state: &ClusterState, id: RaftId) -> bool {
    let report = state.reports().get(&id);
    report.is_some_and(|report| {
        state
            .below_level(report.feature_level.saturating_add(1))
            .next()
            .is_none()
    })
}

/// How a node is reached, as it was registered.
pub(super) fn member_of(node: &Node) -> MemberNode {
    MemberNode {
        name: node.name.to_string(),
        cluster_address: node.cluster_address.clone(),
    }
}

pub(super) fn decide(state: &ClusterState, raft: &Membership) -> Option<Step> {
    if raft.joint {
        return Some(Step::FinishJoint);
    }
    if let Some(step) = raft.moved() {
        return Some(step);
    }
    if let Some(step) = leaving::decide(state, raft) {
        return Some(step);
    }
    for (id, node) in state.nodes().iter() {
        let known = raft.voters.contains(id) || raft.learners.contains(id);
        match node.status {
            NodeStatus::Removed { .. } | NodeStatus::Leaving { .. } => {}
            NodeStatus::Joining | NodeStatus::Member if !known => {
                return Some(Step::AddLearner(*id, member_of(node)));
            }
            // Only a learner's: under a wrong address a voter would count and not be reached.
            NodeStatus::Joining if raft.nodes.get(id).is_some_and(|known| *known != member_of(node)) => {
                return Some(Step::Correct(*id, member_of(node)));
            }
            NodeStatus::Joining => {
                let proven_at = state.reports().get(id).and_then(|report| report.proven_at);
                let matched = raft.matched.get(id).copied();
                let proven = proven_at.is_some() && matched >= proven_at;
                if proven
                    && raft.heard.contains(id)
                    && !is_below_members(state, *id)
                    && !state.owes_destruction(*id)
                    && acknowledged_all(state, *id)
                    && state.slot_without_key(*id).is_none()
                {
                    return Some(Step::Admit(*id));
                }
            }
            NodeStatus::Member => {
                if !raft.voters.contains(id)
                    && raft.heard.contains(id)
                    && !leaving::takes_a_place(state, raft, &node.name)
                {
                    return Some(Step::Promote(*id));
                }
            }
        }
    }
    None
}

/// When to look again.
enum Next {
    /// In a moment: a step was done, and what is known of Raft's membership has to catch up with it.
    Soon,
    /// Once the state has changed, or after this time.
    Change { within: Duration },
    /// After this time, whatever is applied meanwhile: changes in progress and lost leadership end by themselves.
    Pause(Duration),
}

/// What the driver remembers from one look to the next.
struct Seen {
    /// When the driver began.
    began: Instant,
    /// Nodes of which it was said that their release is too old.
    told: BTreeSet<RaftId>,
    held_back: Told,
    /// Hand-overs that have failed in a row.
    held_on: u32,
    /// Who leaves and votes no more, and when that was seen.
    left: Option<(RaftId, Instant)>,
}

/// How long nobody is asked to lead after so many hand-overs that failed in a row: while one is tried no change is taken.
fn pause_after_hand_overs(failed: u32) -> Duration {
    let doubled = HELD_ON.saturating_mul(1 << failed.saturating_sub(1).min(8));
    doubled.min(MOST_HELD_ON)
}

/// Runs the driver until the runtime ends.
pub(super) async fn drive(shared: Arc<Shared>) {
    let mut applied = shared.applied.clone();
    let mut seen = Seen {
        began: clock::now(),
        told: BTreeSet::new(),
        held_back: Told::default(),
        held_on: 0,
        left: None,
    };
    loop {
        applied.borrow_and_update();
        match look(&shared, &mut seen).await {
            Next::Soon => tokio::time::sleep(JOINING_LOOK).await,
            Next::Pause(time) => tokio::time::sleep(time).await,
            Next::Change { within } => {
                if let Ok(Err(_)) = tokio::time::timeout(within, applied.changed()).await {
                    return;
                }
            }
        }
    }
}

async fn look(shared: &Arc<Shared>, seen: &mut Seen) -> Next {
    if shared.draining.load(std::sync::atomic::Ordering::SeqCst) {
        return Next::Pause(PERIOD);
    }
    if !shared.is_leader() {
        seen.held_on = 0;
        seen.left = None;
        shared.ask_if_lost(seen.began);
        return Next::Pause(PERIOD);
    }
    tell_below_members(&shared.published.load().state, &mut seen.told);
    seen.held_back.tell(&shared.published.load().state, clock::now());
    let Some(step) = next_step(shared) else {
        let within = if is_anybody_on_the_way(shared) {
            JOINING_LOOK
        } else {
            PERIOD
        };
        return Next::Change { within };
    };
    if let Some(time) = held_for(shared, seen, &step) {
        reach("membership::in_notice").await;
        return Next::Pause(time.min(PERIOD));
    }
    tracing::info!(?step, "membership");
    let hands_over = matches!(step, Step::HandOver(_));
    if !hands_over {
        seen.held_on = 0;
    }
    match carry_out(shared, step).await {
        Ok(()) => Next::Soon,
        Err(error) => {
            tracing::info!(error, "membership step not done yet");
            if !hands_over {
                return Next::Pause(PERIOD);
            }
            seen.held_on = seen.held_on.saturating_add(1);
            Next::Pause(pause_after_hand_overs(seen.held_on))
        }
    }
}

/// For how much longer whoever votes no more is sent the log. It is out of `/readyz` from then on, and balancers send it
/// requests until they have seen that: some under key versions that it would not know, if it had the log no more. Who does
/// not answer serves nobody.
fn held_for(shared: &Shared, seen: &mut Seen, step: &Step) -> Option<Duration> {
    let Step::Forget(id) = step else {
        seen.left = None;
        return None;
    };
    let published = shared.published.load();
    let leaves = published
        .state
        .nodes()
        .get(id)
        .is_some_and(|node| node.is_leaving());
    let is_own = shared.raft.get().is_some_and(|running| running.id == *id);
    if !leaves || !(is_own || shared.heard_lately().contains(id)) {
        return None;
    }
    left_of(shared.options.notice, &mut seen.left, *id, clock::now())
}

/// What is left of a time that began when this was asked about `id` first.
fn left_of(
    notice: Duration,
    left: &mut Option<(RaftId, Instant)>,
    id: RaftId,
    now: Instant,
) -> Option<Duration> {
    let since = left
        .filter(|(known, _)| *known == id)
        .map_or(now, |(_, since)| since);
    *left = Some((id, since));
    let time = notice.checked_sub(now.saturating_duration_since(since));
    time.filter(|time| !time.is_zero())
}

/// Says once of each node that is not let in for its release.
fn tell_below_members(state: &ClusterState, told: &mut BTreeSet<RaftId>) {
    for (id, node) in state.nodes().iter() {
        if node.status == NodeStatus::Joining && is_below_members(state, *id) && told.insert(*id) {
            let node = node.name.as_str();
            tracing::warn!(
                node,
                "not admitted: its release is older than every member's; start it with the members' release"
            );
        }
    }
}

/// Whether a node is registered that does not vote yet, or one is to leave.
fn is_anybody_on_the_way(shared: &Shared) -> bool {
    let published = shared.published.load();
    let voters: BTreeSet<RaftId> = published.membership.voter_ids().collect();
    let mut nodes = published.state.nodes().iter();
    nodes.any(|(id, node)| node.is_leaving() || (node.is_standing() && !voters.contains(id)))
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
    let options = &shared.options;
    let here = MemberNode {
        name: options.node_name.to_string(),
        cluster_address: options.advertise.clone(),
    };
    let id = shared.raft.get().map(|running| running.id);
    let own = id.map(|id| (id, here));
    let membership = Membership {
        id,
        voters,
        learners,
        nodes: config.nodes().map(|(id, node)| (*id, node.clone())).collect(),
        joint,
        matched: matched.unwrap_or_default(),
        heard: shared.heard(),
        own: own.filter(|(_, here)| !here.cluster_address.is_empty()),
    };
    decide(&shared.published.load().state, &membership)
}

impl Shared {
    /// The peers that have answered this leader within a few heartbeats, and that can acknowledge the next entry within a
    /// moment: those that a quorum can rest on.
    pub(super) fn heard_lately(&self) -> BTreeSet<RaftId> {
        let now = clock::now();
        let heard = self.heard_within(self.options.timing.heartbeat * HEARTBEATS, now);
        let Some(sample) = self.metrics() else {
            return BTreeSet::new();
        };
        keeping_up(heard, &self.loading.peers(now), &sample.metrics)
    }

    /// Those, and this node.
    pub(super) fn heard(&self) -> BTreeSet<RaftId> {
        let mut heard = self.heard_lately();
        heard.extend(self.raft.get().map(|running| running.id));
        heard
    }
}

/// Those of `heard` that have nearly the whole log, by what they have acknowledged. One that is being sent a snapshot answers
/// all the while, and so does one that needs entries which are here no more; nothing commits with either.
fn keeping_up(heard: BTreeSet<RaftId>, loading: &BTreeSet<RaftId>, metrics: &Metrics) -> BTreeSet<RaftId> {
    let last = metrics.last_log_index.unwrap_or(0);
    let purged = metrics.purged.map_or(0, |id| id.index);
    let has_enough = |id: &RaftId| {
        let matched = metrics.replication.as_ref().and_then(|all| *all.get(id)?);
        matched.is_some_and(|at| at.index >= purged && at.index.saturating_add(BEHIND) >= last)
    };
    heard
        .into_iter()
        .filter(|id| !loading.contains(id) && has_enough(id))
        .collect()
}

/// The voters once `new` has taken the place of `old`.
fn swapped(shared: &Shared, old: RaftId, new: RaftId) -> BTreeSet<RaftId> {
    let sample = shared.metrics();
    let voters = sample
        .iter()
        .flat_map(|sample| sample.metrics.membership_config.voter_ids());
    voters.filter(|id| *id != old).chain([new]).collect()
}

async fn carry_out(shared: &Arc<Shared>, step: Step) -> Result<(), String> {
    let forgotten = match step {
        Step::Forget(id) => Some(id),
        _ => None,
    };
    let (change, keep_learners) = match step {
        Step::Admit(node) => return admit(shared, node).await,
        Step::Bury(node) => return shared.bury(node).await,
        Step::HandOver(_) => return shared.transfer(None).await.map(drop),
        // Whoever leaves stays a learner for a moment, see `held_for`; also where a leader dies in between.
        Step::Expel(id) => (ChangeMembers::RemoveVoters(BTreeSet::from([id])), true),
        Step::Swap { old, new } => (ChangeMembers::ReplaceAllVoters(swapped(shared, old, new)), true),
        Step::Forget(id) => (ChangeMembers::RemoveNodes(BTreeSet::from([id])), true),
        Step::AddLearner(id, node) => (ChangeMembers::AddNodes(BTreeMap::from([(id, node)])), true),
        Step::Correct(id, node) => (ChangeMembers::SetNodes(BTreeMap::from([(id, node)])), true),
        Step::Promote(id) => (ChangeMembers::AddVoterIds(BTreeSet::from([id])), false),
        // Proposing the newest of the joint configurations again makes it the only one.
        Step::FinishJoint => (ChangeMembers::AddVoterIds(BTreeSet::new()), true),
    };
    // Under the same conditions as any other entry: not without a quorum, not on a full disk, not while this
    // leader hands over.
    let place = shared.may_append(None).map_err(|e| e.to_string())?;
    reach("membership::before_change").await;
    let raft = shared.raft.get().ok_or("raft is not running")?.raft.clone();
    let metrics = raft.metrics();
    let changed = tokio::spawn(async move {
        let _place = place;
        answer_of(
            metrics,
            LAST_ANSWER,
            raft.change_membership(change, keep_learners),
        )
        .await
    });
    match tokio::time::timeout(CHANGE_WITHIN, changed).await {
        Ok(Ok(Some(changed))) => {
            reach("membership::after_change").await;
            changed.map_err(|e| e.to_string())?;
            if let Some(id) = forgotten {
                shared.tell_removed(id);
            }
            Ok(())
        }
        Ok(Ok(None)) => Err("this node does not lead any more".into()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("it takes long".into()),
    }
}

async fn admit(shared: &Arc<Shared>, node: RaftId) -> Result<(), String> {
    let own = shared.raft.get().ok_or("raft is not running")?.id;
    let nonce = clock::random_id();
    let id = RequestId::Node { node: own, nonce };
    let op = Op::AdmitNode(AdmitNode { node });
    let admitted = shared.propose(id, [0; 32], Origin::Node(own), op).await;
    admitted.map_err(|e| e.to_string())?;
    reach("membership::after_admit").await;
    Ok(())
}

#[cfg(test)]
#[path = "membership_tests.rs"]
pub(super) mod tests;
