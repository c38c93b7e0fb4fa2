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
    let mut heard = shared.heard_lately();
    heard.extend(id);
    let membership = Membership {
        id,
        voters,
        learners,
        nodes: config.nodes().map(|(id, node)| (*id, node.clone())).collect(),
        joint,
        matched: matched.unwrap_or_default(),
        heard,
        own: own.filter(|(_, here)| !here.cluster_address.is_empty()),
    };
    decide(&shared.published.load().state, &membership)
}

impl Shared {
    /// The peers that have answered this leader within a few heartbeats, and that can acknowledge the next entry within a
    /// moment: those that a quorum can rest on.
    pub(super) fn heard_lately(&self) -> BTreeSet<RaftId> {
        let heard = self.heard_within(self.options.timing.heartbeat * HEARTBEATS, clock::now());
        let Some(sample) = self.metrics() else {
            return BTreeSet::new();
        };
        keeping_up(heard, &self.loading.peers(), &sample.metrics)
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
    admitted.map(|_| ()).map_err(|e| e.to_string())
}

#[cfg(test)]
pub(super) mod tests {
    use openraft::CommittedLeaderId;
    use raft_store::LogId;
    use raft_store::state::FEATURE_LEVEL;

    use super::super::quorum;
    use super::*;
    use crate::rotation::testing::World;

    /// Raft's membership of a world that node 1 leads: every node is known to it and has everything.
    pub(in super::super) fn raft_of(world: &World, heard: &BTreeSet<RaftId>) -> Membership {
        let all: BTreeSet<RaftId> = world.state.nodes().iter().map(|(id, _)| *id).collect();
        Membership {
            id: Some(1),
            voters: world.voters.clone(),
            learners: all.difference(&world.voters).copied().collect(),
            nodes: world
                .state
                .nodes()
                .iter()
                .map(|(id, node)| (*id, member_of(node)))
                .collect(),
            joint: false,
            matched: all.iter().map(|id| (*id, world.index)).collect(),
            heard: heard.clone(),
            own: None,
        }
    }

    /// What the driver does for the last node to join, matched up to everything.
    fn next(world: &World, heard: &[RaftId]) -> Option<Step> {
        let heard = heard.iter().copied().collect();
        decide(&world.state, &raft_of(world, &heard))
    }

    fn ids(ids: impl IntoIterator<Item = RaftId>) -> BTreeSet<RaftId> {
        ids.into_iter().collect()
    }

    /// A leader's metrics at entry 5000, of which everything below 1000 is in a snapshot, and how far the others are.
    fn leading(matched: &[(RaftId, Option<u64>)]) -> Metrics {
        let at = |index| LogId::new(CommittedLeaderId::new(1, 1), index);
        let mut metrics = Metrics::new_initial(1);
        metrics.last_log_index = Some(5000);
        metrics.purged = Some(at(999));
        let matched = matched.iter().map(|(id, index)| (*id, index.map(at)));
        metrics.replication = Some(matched.collect());
        metrics
    }

    #[test]
    fn whoever_leaves_is_sent_the_log_for_the_time_that_balancers_need() {
        const NOTICE: Duration = Duration::from_millis(1_200);
        let (begun, mut left) = (clock::now(), None);
        let at = |ms: u64| begun + Duration::from_millis(ms);
        assert_eq!(left_of(NOTICE, &mut left, 2, at(0)), Some(NOTICE));
        let rest = Duration::from_millis(200);
        assert_eq!(left_of(NOTICE, &mut left, 2, at(1_000)), Some(rest));
        assert_eq!(left_of(NOTICE, &mut left, 2, at(1_200)), None);
        assert_eq!(left_of(NOTICE, &mut left, 2, at(9_000)), None);
        // Another one has its own time.
        assert_eq!(left_of(NOTICE, &mut left, 3, at(9_000)), Some(NOTICE));
        assert_eq!(left_of(Duration::ZERO, &mut None, 2, at(0)), None);
    }

    #[test]
    fn a_quorum_rests_on_nobody_who_cannot_acknowledge_the_next_entry() {
        let matched = [
            (2, Some(5000)),
            (3, Some(4999)),
            (4, Some(5000 - BEHIND - 1)),
            (5, None),
        ];
        let metrics = leading(&matched);
        let none = BTreeSet::new();
        assert_eq!(keeping_up(ids(2..=6), &none, &metrics), ids([2, 3]));
        // It answers, and has what it had before: it is being sent a snapshot.
        assert_eq!(keeping_up(ids(2..=6), &ids([3]), &metrics), ids([2]));
        // Whom nobody hears has it all in vain.
        assert_eq!(keeping_up(ids([3]), &none, &metrics), ids([3]));
        let mut young = leading(&[(2, Some(10)), (3, Some(1000))]);
        young.last_log_index = Some(1010);
        assert_eq!(
            keeping_up(ids([2, 3]), &none, &young),
            ids([3]),
            "what it needs next is in a snapshot only"
        );
        // Nobody keeps up with one who does not lead.
        young.replication = None;
        assert_eq!(keeping_up(ids([2, 3]), &none, &young), none);
    }

    #[test]
    fn a_healthy_voter_does_not_leave_while_the_others_wait_for_a_snapshot() {
        let metrics = leading(&[(2, Some(5000)), (3, Some(5000))]);
        let voters = ids([1, 2, 3]);
        let removable = |loading: &[RaftId], leaving| {
            let loading = loading.iter().copied().collect();
            let mut heard = keeping_up(ids([2, 3]), &loading, &metrics);
            heard.insert(1);
            quorum::without(&voters, &heard, leaving, None).is_ok()
        };
        assert!(removable(&[], 3));
        assert!(!removable(&[2], 3), "of 1 and 2 that would be left 2 loads");
        assert!(removable(&[2], 2), "the one that loads may go");
    }

    #[test]
    fn a_hand_over_that_fails_again_and_again_is_tried_less_and_less_often() {
        let pauses: Vec<u64> = (1..=6)
            .map(|failed| pause_after_hand_overs(failed).as_secs())
            .collect();
        assert_eq!(pauses, [5, 10, 20, 40, 60, 60]);
        assert_eq!(pause_after_hand_overs(u32::MAX), MOST_HELD_ON);
    }

    #[test]
    fn a_learner_that_is_dead_already_is_neither_admitted_nor_promoted() {
        let mut world = World::new(1);
        let learner = world.join();
        world.prove(learner);
        assert_eq!(next(&world, &[]), None);
        assert_eq!(next(&world, &[learner]), Some(Step::Admit(learner)));
        world.admit(learner);
        assert_eq!(next(&world, &[]), None);
        assert_eq!(next(&world, &[learner]), Some(Step::Promote(learner)));
        world.voters.insert(learner);
        assert_eq!(next(&world, &[]), None);
    }

    #[test]
    fn a_learner_is_admitted_once_it_has_acknowledged_every_version() {
        let mut world = World::new(1);
        world.prepare("c");
        world.activate("c", 1);
        let learner = world.join();
        world.prove(learner);
        assert_eq!(next(&world, &[learner]), None, "the active version");
        world.prepare("c");
        world.ack(learner, "c", 1);
        assert_eq!(next(&world, &[learner]), None, "the pending version");
        world.ack(learner, "c", 2);
        assert_eq!(next(&world, &[learner]), Some(Step::Admit(learner)));
    }

    #[test]
    fn a_learner_that_owes_a_destruction_is_not_admitted_before_it_is_done() {
        let mut world = World::new(1);
        for version in [1, 2] {
            world.prepare("c");
            world.activate("c", version);
        }
        let learner = world.join();
        world.prove(learner);
        for version in [1, 2] {
            world.ack(learner, "c", version);
        }
        world.schedule_destroy("c", 1, 1000);
        assert_eq!(next(&world, &[learner]), Some(Step::Admit(learner)));
        world.begin_destroy("c", 1);
        assert_eq!(next(&world, &[learner]), None);
        world.ack_destroyed(learner, "c", 1);
        assert_eq!(next(&world, &[learner]), Some(Step::Admit(learner)));
    }

    #[test]
    fn a_learner_without_a_key_for_a_slot_that_is_needed_is_not_admitted() {
        let mut world = World::new(1);
        let learner = world.join();
        world.prove(learner);
        // It was proven before the context moved.
        world.second_slot("t");
        world.move_to("c", "t");
        assert_eq!(next(&world, &[learner]), None);
        world.slot_keys(learner);
        assert_eq!(next(&world, &[learner]), Some(Step::Admit(learner)));
    }

    #[test]
    fn a_learner_of_an_earlier_release_than_every_member_is_not_admitted() {
        let mut world = World::new(1);
        world.report_clock(1, 0);
        let learner = world.join();
        world.slot_keys(learner);
        world.report_level(learner, FEATURE_LEVEL - 1);
        assert_eq!(next(&world, &[learner]), None);
        world.report_level(learner, FEATURE_LEVEL);
        assert_eq!(next(&world, &[learner]), Some(Step::Admit(learner)));
        // One member that does not know more is held up by it no further.
        world.report_level(learner, FEATURE_LEVEL - 1);
        world.report_level(1, FEATURE_LEVEL - 1);
        assert_eq!(next(&world, &[learner]), Some(Step::Admit(learner)));
    }

    #[test]
    fn a_learner_that_was_registered_again_is_reached_at_its_new_address() {
        let mut world = World::new(1);
        let learner = world.join();
        let wrong = MemberNode {
            name: format!("n{learner}"),
            cluster_address: "wrong".into(),
        };
        let raft = |id| Membership {
            id: Some(1),
            voters: BTreeSet::from([1]),
            learners: BTreeSet::from([learner]),
            nodes: BTreeMap::from([(id, wrong.clone())]),
            joint: false,
            matched: BTreeMap::new(),
            heard: BTreeSet::new(),
            own: None,
        };
        let Some(Step::Correct(id, right)) = decide(&world.state, &raft(learner)) else {
            panic!()
        };
        assert_eq!((id, right.cluster_address.as_str()), (learner, "c"));
        assert_eq!(decide(&world.state, &raft(1)), None, "a member's address stands");
    }

    #[test]
    fn a_node_is_reached_where_its_configuration_says_for_as_long_as_it_votes_alone() {
        let mut world = World::new(1);
        let at = |address: &str| MemberNode {
            name: "n1".into(),
            cluster_address: address.into(),
        };
        let raft = |known: &str, learners: &[RaftId]| Membership {
            id: Some(1),
            voters: BTreeSet::from([1]),
            learners: learners.iter().copied().collect(),
            nodes: BTreeMap::from([(1, at(known))]),
            joint: false,
            matched: BTreeMap::new(),
            heard: BTreeSet::new(),
            own: Some((1, at("here"))),
        };
        assert_eq!(decide(&world.state, &raft("here", &[])), None);
        for known in ["", "elsewhere"] {
            let moved = Some(Step::Correct(1, at("here")));
            assert_eq!(decide(&world.state, &raft(known, &[])), moved, "{known:?}");
            let joint = Membership {
                joint: true,
                ..raft(known, &[])
            };
            assert_eq!(decide(&world.state, &joint), Some(Step::FinishJoint));
        }
        let learner = world.join();
        world.prove(learner);
        for known in ["", "elsewhere"] {
            for learners in [vec![], vec![learner]] {
                let moved = Some(Step::Correct(1, at("here")));
                assert_eq!(decide(&world.state, &raft(known, &learners)), moved, "{known:?}");
            }
        }
        // Its voice counts: it has to reach the leader, or whoever it elects.
        let larger = Membership {
            voters: BTreeSet::from([1, learner]),
            ..raft("elsewhere", &[])
        };
        assert_eq!(decide(&world.state, &larger), None);
    }

    #[test]
    fn a_joint_configuration_is_finished_before_anything_else() {
        let mut world = World::new(1);
        let learner = world.join();
        world.prove(learner);
        let raft = Membership {
            id: Some(1),
            voters: BTreeSet::from([1]),
            learners: BTreeSet::from([learner]),
            nodes: BTreeMap::new(),
            joint: true,
            matched: BTreeMap::new(),
            heard: BTreeSet::from([learner]),
            own: None,
        };
        assert_eq!(decide(&world.state, &raft), Some(Step::FinishJoint));
    }
}
