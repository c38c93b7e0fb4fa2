//! What the membership driver decides, and when.

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
