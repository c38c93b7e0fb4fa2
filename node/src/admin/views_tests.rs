use std::collections::BTreeMap;
use std::time::Duration;

use raft_store::command::{Op, ReportNode};
use raft_store::names::Incarnation;
use raft_store::state::node::NodeReport;

use super::*;
use crate::consensus::{Gate, Peer, Role};
use crate::rotation::testing::{World, slot};

fn view(role: Role, leader: RaftId, peers: BTreeMap<RaftId, Peer>) -> View {
    View {
        role,
        term: 3,
        leader: Some(leader),
        last_log: 100,
        committed: 100,
        applied: 100,
        snapshot: 0,
        quorum_ack_age: None,
        staleness: None,
        start_gate: Gate::Open { since: 1 },
        silent: std::collections::BTreeSet::new(),
        heard: std::collections::BTreeSet::new(),
        peers,
        proposals_pending: 0,
        proposals_timed_out: 0,
        leader_changes: 0,
        stopped: None,
    }
}

#[test]
fn every_version_is_listed_with_who_has_proven_it() {
    let mut world = World::new(1);
    for _ in 0..2 {
        let version = world.prepare("c");
        world.activate("c", version);
    }
    world.prepare("c");
    world.abandon("c", 3);
    let listed = keys(&world.state);
    let [context] = &listed.contexts[..] else { panic!() };
    assert_eq!((context.context.as_str(), context.slot.as_str()), ("c", "s"));
    assert_eq!(
        (context.binding, context.active_version),
        (ApiBinding::Shared, Some(2))
    );
    let states: Vec<_> = context.versions.iter().map(|v| (v.version, v.state)).collect();
    let expected = [
        (1, KeyState::DecryptOnly),
        (2, KeyState::Active),
        (3, KeyState::Abandoned),
    ];
    assert_eq!(states, expected);
    let first = &context.versions[0];
    assert_eq!(
        (first.key_id.as_str(), first.acks.clone()),
        ("kek-c-v1", vec!["n1".to_owned()])
    );
    assert!(first.retired_at.is_some() && first.activated_at.is_some());
    assert_eq!(first.key_uid.len(), 32);
    assert_eq!(context.versions[1].retired_at, None);
}

#[test]
fn a_version_on_its_way_to_its_end_says_how_far_it_is_and_who_has_yet_to_remove_it() {
    let mut world = World::new(2);
    for _ in 0..2 {
        let version = world.prepare("c");
        world.activate("c", version);
    }
    let way = |world: &World| keys(&world.state).contexts[0].versions[0].clone();
    assert_eq!(way(&world).destruction, None);
    world.schedule_destroy("c", 1, 100_000);
    world.advance("c", 1, 40_900);
    let scheduled = way(&world);
    assert_eq!(scheduled.state, KeyState::DestroyScheduled);
    let info = scheduled.destruction.unwrap();
    assert_eq!((info.wait_seconds, info.elapsed_seconds), (100, 40));
    assert_eq!(
        (info.undone, info.begun_at, info.owing.len()),
        (KeyState::DecryptOnly, None, 0)
    );
    world.begin_destroy("c", 1);
    world.ack_destroyed(1, "c", 1);
    let begun = way(&world);
    let info = begun.destruction.unwrap();
    assert_eq!(
        (begun.state, begun.acks.as_slice()),
        (KeyState::Destroying, &["n1".to_owned()][..])
    );
    let second = *world.voters.iter().max().unwrap();
    assert_eq!(info.owing, [format!("n{second}")]);
    assert!(info.begun_at.is_some() && info.ended_at.is_none());
    world.ack_destroyed(second, "c", 1);
    let tombstone = way(&world);
    let info = tombstone.destruction.unwrap();
    assert_eq!((tombstone.state, info.owing.len()), (KeyState::Destroyed, 0));
    assert!(
        info.ended_at.is_some() && info.remnants_sealed,
        "its transport key lives"
    );
    assert_eq!(tombstone.key_id, "kek-c-v1");
}

#[test]
fn uses_are_listed_by_version_with_the_nodes_that_reported_them() {
    let mut world = World::new(1);
    for _ in 0..2 {
        let version = world.prepare("c");
        world.activate("c", version);
    }
    let key = raft_store::state::context::VersionKey {
        context: crate::rotation::testing::context("c"),
        version: 1,
    };
    let count = raft_store::state::usage::UseCount {
        encryptions: 3,
        decryptions: 4,
        last_used: 5_000_000,
    };
    let report = NodeReport {
        seq: 1,
        boot: raft_store::names::Boot([0; 16]),
        incarnation: Incarnation([1; 16]),
        clock: 0,
        durable_index: 1,
        proven_at: None,
        feature_level: 2,
        slots: BTreeMap::new(),
        uses: BTreeMap::from([(key, count)]),
    };
    world.ok(Op::ReportNode(ReportNode { node: 1, report }));
    let listed = usage(&world.state).versions;
    assert_eq!(listed.len(), 2);
    let (first, second) = (&listed[0], &listed[1]);
    assert_eq!((first.encryptions, first.decryptions), (3, 4));
    assert_eq!(first.last_used.as_deref(), Some("1970-01-01T01:23:20Z"));
    assert_eq!(first.nodes.len(), 1);
    assert_eq!(first.nodes[0].node_id, "n1");
    assert_eq!((second.encryptions, second.last_used.clone()), (0, None));
}

/// Nobody can remove it yet, so whoever destroys a version has to know before the wait is over.
#[test]
fn who_holds_a_version_and_has_not_joined_is_named_as_long_as_it_holds_up_the_destruction() {
    let mut world = World::new(1);
    for _ in 0..2 {
        let version = world.prepare("c");
        world.activate("c", version);
    }
    // Both have failed to join; one of them had got so far as to hold the key.
    let (joiner, _) = (world.join(), world.join());
    world.ack(joiner, "c", 1);
    let named = |world: &World| {
        let version = keys(&world.state).contexts[0].versions[0].clone();
        version.destruction.map(|way| way.joining).unwrap_or_default()
    };
    world.schedule_destroy("c", 1, 1000);
    assert_eq!(named(&world), [format!("n{joiner}")]);
    world.begin_destroy("c", 1);
    world.ack_destroyed(1, "c", 1);
    assert_eq!(named(&world), [format!("n{joiner}")]);
    let version = &keys(&world.state).contexts[0].versions[0];
    assert_eq!(version.state, KeyState::Destroying);
    world.ack_destroyed(joiner, "c", 1);
    let version = &keys(&world.state).contexts[0].versions[0];
    assert_eq!((version.state, named(&world).len()), (KeyState::Destroyed, 0));
}

#[test]
fn a_pending_rotation_shows_who_is_missing() {
    let mut world = World::new(3);
    let idle = rotation_status(&world.state);
    assert_eq!(
        (idle.contexts[0].active_version, idle.contexts[0].missing.len()),
        (None, 0)
    );
    let version = world.prepare("c");
    world.activate("c", version);
    world.prepare("c");
    world.ack(1, "c", 2);
    let status = &rotation_status(&world.state).contexts[0];
    assert_eq!(
        (status.active_version, status.pending_version),
        (Some(1), Some(2))
    );
    assert_eq!(
        (status.acks.clone(), status.missing.len()),
        (vec!["n1".to_owned()], 2)
    );
    assert!(status.pending_since.is_some() && !status.missing.contains(&"n1".to_owned()));
    world.activate("c", 2);
    let status = &rotation_status(&world.state).contexts[0];
    assert_eq!(
        (status.pending_version, status.acks.len(), status.missing.len()),
        (None, 3, 0)
    );
}

#[test]
fn a_rotation_is_due_its_interval_after_activation() {
    let mut world = World::new(1);
    let version = world.prepare("c");
    world.activate("c", version);
    let activated = world
        .state
        .version(&crate::rotation::testing::context("c"), 1)
        .unwrap()
        .activated_at;
    let status = &rotation_status(&world.state).contexts[0];
    assert_eq!(status.rotation_interval_days, 90);
    assert_eq!(status.active_since, activated.map(rfc3339));
    assert_eq!(
        status.next_rotation_due,
        activated.map(|at| rfc3339(at + 90 * DAY_MS))
    );
}

#[test]
fn a_leader_knows_how_far_its_peers_are_and_a_follower_does_not() {
    let mut world = World::new(2);
    let learner = world.join();
    let two = world.voters.iter().copied().max().unwrap();
    let peer = Peer {
        matched: Some(97),
        silent_for: Some(Duration::from_millis(40)),
    };
    let leading = view(Role::Leader, 1, BTreeMap::from([(two, peer)]));
    let known = members(&world.published(), &leading, Some(1), &BTreeSet::new()).members;
    assert_eq!(known.len(), 3);
    assert!(known[0].is_leader && !known[1].is_leader);
    assert_eq!(
        (known[0].matched_index, known[0].lag, known[0].last_seen_ms),
        (Some(100), Some(0), Some(0))
    );
    assert_eq!(
        (known[1].matched_index, known[1].lag, known[1].last_seen_ms),
        (Some(97), Some(3), Some(40))
    );
    assert_eq!(
        (known[2].raft_id, known[2].role, known[2].matched_index),
        (learner, MemberRole::Learner, None)
    );
    let following = view(Role::Follower, 1, BTreeMap::new());
    let known = members(&world.published(), &following, Some(two), &BTreeSet::new()).members;
    assert!(known[0].is_leader);
    // What keeps a learner from being let in every node knows.
    let held_back: Vec<usize> = known.iter().map(|member| member.held_back.len()).collect();
    assert_eq!(held_back, [0, 0, 1]);
    assert!(
        known[2].held_back[0].starts_with("slot s: "),
        "{:?}",
        known[2].held_back
    );
    assert!(
        known
            .iter()
            .all(|member| member.matched_index.is_none() && member.last_seen_ms.is_none())
    );
    assert!(known[..2].iter().all(|member| member.role == MemberRole::Voter));
}

#[test]
fn slots_are_shown_as_last_reported() {
    let mut world = World::new(1);
    let report = NodeReport {
        seq: 1,
        boot: raft_store::names::Boot([0; 16]),
        incarnation: Incarnation([1; 16]),
        clock: 0,
        durable_index: 1,
        proven_at: None,
        feature_level: 1,
        slots: BTreeMap::from([(
            slot("s"),
            SlotReport {
                serving: false,
                state: "locked".to_owned(),
                missing_keys: 2,
            },
        )]),
        uses: BTreeMap::new(),
    };
    world.ok(Op::ReportNode(ReportNode { node: 1, report }));
    let shown = |silent| {
        let slots = member_slots(&world.state, 1, silent);
        let [one] = &slots[..] else { panic!("{slots:?}") };
        assert_eq!(one.slot, "s");
        one.state
    };
    assert_eq!(shown(false), SlotState::Locked);
    assert_eq!(shown(true), SlotState::Silent);
    assert!(member_slots(&world.state, 99, false).is_empty() && fingerprints(&world.state, 1).is_empty());
}

/// Raft ids are indexes of the log.
fn ids(world: &World) -> Vec<RaftId> {
    world.state.nodes().iter().map(|(id, _)| *id).collect()
}

#[test]
fn a_silent_member_is_not_shown_as_it_last_reported() {
    let world = World::new(3);
    let third = ids(&world)[2];
    let mut leading = view(Role::Leader, 1, BTreeMap::new());
    leading.silent = BTreeSet::from([third]);
    let gone = silent(&world.published(), &leading, Some(1), true);
    let known = members(&world.published(), &leading, Some(1), &gone).members;
    let states: Vec<_> = known.iter().map(|member| member.state).collect();
    let (heard, silent) = (Some(MemberState::Heard), Some(MemberState::Silent));
    assert_eq!(states, [heard, heard, silent]);
    assert_eq!(silent_voters(&world.published(), &gone), [format!("n{third}")]);
}

#[test]
fn a_node_without_a_leader_vouches_for_nobody_and_a_leader_for_whom_it_hears() {
    let world = World::new(3);
    let [first, second, third] = ids(&world)[..] else {
        panic!("{:?}", ids(&world))
    };
    let following = view(Role::Follower, first, BTreeMap::new());
    let published = world.published();
    assert!(silent(&published, &following, Some(second), true).is_empty());
    assert_eq!(
        silent(&published, &following, Some(second), false),
        BTreeSet::from([first, third])
    );
    // It has lost its quorum, and still hears some of its members.
    let mut leading = view(Role::Leader, first, BTreeMap::new());
    leading.silent = BTreeSet::from([third]);
    assert_eq!(
        silent(&published, &leading, Some(first), false),
        BTreeSet::from([third])
    );
}

#[test]
fn a_learner_that_is_silent_costs_no_tolerance() {
    let mut world = World::new(3);
    let learner = world.join();
    let gone = BTreeSet::from([learner]);
    assert!(silent_voters(&world.published(), &gone).is_empty());
}

#[test]
fn to_a_leader_whoever_does_not_keep_up_has_failed_and_to_others_who_is_silent() {
    let voters = BTreeSet::from([1, 2, 3]);
    let mut leading = view(Role::Leader, 1, BTreeMap::new());
    leading.heard = BTreeSet::from([1, 2, 4]);
    // The third answers, and loads a snapshot.
    assert_eq!(
        failed_voters(&leading, &voters, &BTreeSet::new()),
        BTreeSet::from([3])
    );
    let following = view(Role::Follower, 1, BTreeMap::new());
    assert!(failed_voters(&following, &voters, &BTreeSet::new()).is_empty());
    assert_eq!(
        failed_voters(&following, &voters, &BTreeSet::from([2, 4])),
        BTreeSet::from([2])
    );
}

#[test]
fn one_of_three_may_fail() {
    let tolerated: Vec<_> = (0..=5).map(|voters| failure_tolerance(voters, 0)).collect();
    assert_eq!(tolerated, [0, 0, 0, 1, 1, 2]);
}

#[test]
fn who_has_failed_already_counts_against_what_may_fail() {
    let of_five: Vec<_> = (0..=5).map(|silent| failure_tolerance(5, silent)).collect();
    assert_eq!(of_five, [2, 1, 0, 0, 0, 0]);
    assert_eq!(failure_tolerance(3, 1), 0);
}

#[test]
fn times_are_rfc_3339() {
    assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
    assert_eq!(rfc3339(1_700_000_000_123), "2023-11-14T22:13:20.123Z");
    assert_eq!(node_name(&ClusterState::default(), 7), "raft-id-7");
}

#[test]
fn who_leaves_and_who_was_removed_is_said_with_what_is_still_to_be_rotated() {
    use raft_store::command::{BuryNode, RemoveNode};

    let mut world = World::new(3);
    world.prepare("c");
    world.activate("c", 1);
    let third = ids(&world)[2];
    let shown = |world: &World| {
        let leading = view(Role::Leader, 1, BTreeMap::new());
        members(&world.published(), &leading, Some(1), &BTreeSet::new())
    };
    world.ok(Op::RemoveNode(RemoveNode {
        node: third,
        successor: None,
        lose_keys: false,
    }));
    let leaving = shown(&world);
    assert_eq!((leaving.members.len(), leaving.removed.len()), (3, 0));
    assert!(
        leaving.members[2]
            .leaving
            .as_ref()
            .is_some_and(|leaving| leaving.successor.is_none())
    );
    assert!(leaving.members[1].leaving.is_none());
    world.voters.remove(&third);
    world.ok(Op::BuryNode(BuryNode { node: third }));
    let left = shown(&world);
    assert_eq!((left.members.len(), left.removed.len()), (2, 1));
    assert_eq!(
        (left.removed[0].raft_id, &left.removed[0].held[..]),
        (third, &["c".to_owned()][..])
    );
    world.prepare("c");
    world.activate("c", 2);
    assert!(shown(&world).removed[0].held.is_empty());
}
