use super::super::testing::{World, context};
use super::*;

const SHORT: Duration = Duration::from_secs(1);
const LONG: Duration = Duration::from_secs(60);

fn limits() -> Limits {
    Limits::new(Duration::from_secs(8))
}

/// Decides with some nodes silent for a minute and every version pending for `age`.
fn run(world: &World, silent: &[RaftId], age: Duration) -> Vec<Action> {
    let silent_for = |id| if silent.contains(&id) { LONG } else { SHORT };
    decide(&world.state, &world.voters, silent_for, |_| age, &limits())
}

fn activate(version: u32, left_out: &[RaftId]) -> Vec<Action> {
    let left_out = left_out.iter().copied().collect();
    vec![Action::Activate {
        context: context("c"),
        version,
        left_out,
    }]
}

fn voters(world: &World) -> Vec<RaftId> {
    world.voters.iter().copied().collect()
}

#[test]
fn nothing_pending_needs_nothing() {
    assert_eq!(run(&World::new(3), &[], LONG), vec![]);
}

#[test]
fn a_version_that_everybody_holds_is_activated() {
    let mut world = World::new(3);
    world.prepare("c");
    for voter in voters(&world) {
        assert_eq!(run(&world, &[], SHORT), vec![], "before node {voter}");
        world.ack(voter, "c", 1);
    }
    assert_eq!(run(&world, &[], SHORT), activate(1, &[]));
    // Its time being over changes nothing once it can be activated.
    assert_eq!(run(&world, &[], LONG), activate(1, &[]));
}

#[test]
fn a_node_is_left_out_only_after_its_silence() {
    let mut world = World::new(3);
    let [one, two, three] = voters(&world)[..] else {
        panic!()
    };
    world.prepare("c");
    world.ack(one, "c", 1);
    world.ack(two, "c", 1);
    assert_eq!(run(&world, &[], SHORT), vec![]);
    assert_eq!(run(&world, &[three], SHORT), activate(1, &[three]));
    let at = |silence| decide(&world.state, &world.voters, |_| silence, |_| SHORT, &limits()).len();
    assert_eq!(at(Duration::from_millis(7999)), 0);
    assert_eq!(at(Duration::from_millis(8000)), 1);
}

#[test]
fn a_silent_node_that_holds_the_version_is_not_left_out() {
    let mut world = World::new(3);
    let all = voters(&world);
    world.prepare("c");
    for voter in &all {
        world.ack(*voter, "c", 1);
    }
    assert_eq!(run(&world, &all, SHORT), activate(1, &[]));
}

#[test]
fn never_fewer_than_a_majority() {
    let mut world = World::new(3);
    let [one, two, three] = voters(&world)[..] else {
        panic!()
    };
    world.prepare("c");
    world.ack(one, "c", 1);
    assert_eq!(run(&world, &[two, three], SHORT), vec![]);
    let abandoned = run(&world, &[two, three], LONG);
    assert!(
        matches!(&abandoned[..], [Action::Abandon { version: 1, .. }]),
        "{abandoned:?}"
    );
    // Half is no majority.
    let mut world = World::new(4);
    let all = voters(&world);
    world.prepare("c");
    world.ack(all[0], "c", 1);
    world.ack(all[1], "c", 1);
    assert_eq!(run(&world, &all[2..], SHORT), vec![]);
    world.ack(all[2], "c", 1);
    assert_eq!(run(&world, &all[3..], SHORT), activate(1, &[all[3]]));
}

#[test]
fn a_version_that_cannot_finish_is_given_up_and_says_why() {
    let mut world = World::new(3);
    let [one, two, three] = voters(&world)[..] else {
        panic!()
    };
    world.prepare("c");
    world.ack(one, "c", 1);
    world.ack(two, "c", 1);
    let actions = decide(&world.state, &world.voters, |_| SHORT, |_| LONG, &limits());
    let [
        Action::Abandon {
            version: 1, reason, ..
        },
    ] = &actions[..]
    else {
        panic!("{actions:?}")
    };
    assert_eq!(*reason, format!("not proven within 10 s by n{three}"));
    let at = |age| run(&world, &[], age).len();
    assert_eq!(at(Duration::from_millis(9999)), 0);
    assert_eq!(at(Duration::from_secs(10)), 1);
}

/// A joining node may not serve; a member may, a moment before it votes.
#[test]
fn a_member_that_does_not_vote_yet_is_waited_for_and_a_learner_is_not() {
    let mut world = World::new(1);
    let learner = world.join();
    world.prepare("c");
    world.ack(1, "c", 1);
    assert_eq!(run(&world, &[], SHORT), activate(1, &[]));
    world.ack(learner, "c", 1);
    world.admit(learner);
    world.activate("c", 1);
    world.prepare("c");
    world.ack(1, "c", 2);
    assert_eq!(run(&world, &[], SHORT), vec![]);
    // It may die before it votes: then it is left out like any voter.
    assert_eq!(run(&world, &[learner], SHORT), activate(2, &[learner]));
    world.ack(learner, "c", 2);
    assert_eq!(run(&world, &[], SHORT), activate(2, &[]));
}

/// What is decided must be what the state accepts.
#[test]
fn the_state_accepts_what_is_decided() {
    let mut world = World::new(5);
    let all = voters(&world);
    world.prepare("c");
    for voter in &all[..3] {
        world.ack(*voter, "c", 1);
    }
    let actions = run(&world, &all[3..], SHORT);
    let [
        Action::Activate {
            context,
            version,
            left_out,
        },
    ] = &actions[..]
    else {
        panic!()
    };
    world.ok(raft_store::command::Op::ActivateVersion(
        raft_store::command::ActivateVersion {
            context: context.clone(),
            version: *version,
            left_out: left_out.clone(),
        },
    ));
    assert_eq!(run(&world, &[], LONG), vec![]);
}

#[test]
fn contexts_are_judged_one_by_one() {
    let mut world = World::new(1);
    world.context("d", "s");
    world.prepare("c");
    world.prepare("d");
    world.ack(1, "d", 1);
    let actions = run(&world, &[], LONG);
    assert!(matches!(&actions[0], Action::Abandon { context, .. } if context.as_str() == "c"));
    assert!(matches!(&actions[1], Action::Activate { context, .. } if context.as_str() == "d"));
    assert_eq!(actions.len(), 2);
}

#[test]
fn without_voters_nothing_is_decided() {
    let mut world = World::new(1);
    world.prepare("c");
    world.voters.clear();
    assert_eq!(run(&world, &[], LONG), vec![]);
}

#[test]
fn a_long_fence_lengthens_the_deadline() {
    assert_eq!(limits().pending, Duration::from_secs(10));
    assert_eq!(
        Limits::new(Duration::from_secs(20)).pending,
        Duration::from_secs(22)
    );
    assert_eq!(Limits::new(Duration::from_secs(1)).pending, PENDING_DEADLINE);
}

#[test]
fn a_deadline_runs_from_when_this_leader_first_saw_the_version() {
    let mut world = World::new(1);
    world.prepare("c");
    let key = VersionKey {
        context: context("c"),
        version: 1,
    };
    let (mut sightings, start) = (Sightings::default(), Instant::now());
    let after = |seconds| start + Duration::from_secs(seconds);
    assert_eq!(sightings.pending_for(&key, start), Duration::ZERO);
    sightings.look(1, &world.state, start);
    sightings.look(1, &world.state, after(4));
    assert_eq!(sightings.pending_for(&key, after(5)), Duration::from_secs(5));
    // Another term begins anew, and so does a version once it was not pending.
    sightings.look(2, &world.state, after(6));
    assert_eq!(sightings.pending_for(&key, after(7)), Duration::from_secs(1));
    world.activate("c", 1);
    sightings.look(2, &world.state, after(8));
    assert_eq!(sightings.pending_for(&key, after(9)), Duration::ZERO);
    assert!(sightings.pending.is_empty());
}

/// Another leader may have been in contact with the node a moment ago.
#[test]
fn silence_is_never_longer_than_this_node_leads() {
    let (mut sightings, start) = (Sightings::default(), Instant::now());
    let after = |seconds| start + Duration::from_secs(seconds);
    let state = ClusterState::default();
    assert_eq!(sightings.silent_for(Some(LONG), start), Duration::ZERO);
    sightings.look(7, &state, start);
    assert_eq!(sightings.silent_for(Some(LONG), after(3)), Duration::from_secs(3));
    assert_eq!(sightings.silent_for(None, after(9)), Duration::from_secs(9));
    assert_eq!(sightings.silent_for(Some(SHORT), after(9)), SHORT);
    sightings.forget();
    assert_eq!(sightings.silent_for(None, after(99)), Duration::ZERO);
}

#[test]
fn a_long_list_of_nodes_is_cut() {
    let world = World::new(1);
    let many: BTreeSet<RaftId> = (1..=8).collect();
    assert_eq!(
        names(&world.state, &many),
        "n1, raft id 2, raft id 3, raft id 4, raft id 5, 3 more"
    );
}

#[test]
fn the_clocks_are_waited_for_once_for_each_pending_version_of_a_term() {
    let (mut world, mut sightings) = (World::new(1), Sightings::default());
    assert!(!sightings.is_news(1, &world.state));
    world.prepare("c");
    let mut twice = |term, world: &World| [(); 2].map(|()| sightings.is_news(term, &world.state));
    assert_eq!(twice(1, &world), [true, false]);
    world.context("d", "s");
    world.prepare("d");
    assert_eq!(twice(1, &world), [true, false]);
    world.activate("c", 1);
    assert_eq!(twice(1, &world), [false, false]);
    assert_eq!(
        twice(2, &world),
        [true, false],
        "another term has heard nobody yet"
    );
}
