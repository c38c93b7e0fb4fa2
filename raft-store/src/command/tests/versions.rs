//! Key versions: prepared, acknowledged, activated, abandoned.

use super::*;

#[test]
fn a_rotation_retires_the_old_version_in_the_same_entry() {
    let mut world = World::new();
    world.ok(prepare(0, 1));
    world.ack(1, 1);
    world.ok(activate(1, &[]));
    world.ok(prepare(1, 2));
    world.ack(1, 2);
    assert_eq!(world.version_state(1), VersionState::Active);
    world.ok(activate(2, &[]));
    assert_eq!(world.version_state(1), VersionState::DecryptOnly);
    assert_eq!(world.version_state(2), VersionState::Active);
    assert_eq!(
        world.state.contexts().get(&context()).unwrap().active_version,
        Some(2)
    );
}

#[test]
fn two_prepares_that_saw_the_same_highest_never_share_a_number() {
    let mut world = World::new();
    world.ok(prepare(0, 1));
    assert!(matches!(world.refused(prepare(0, 1)), Refusal::Conflict(_)));
    assert!(
        matches!(world.refused(prepare(1, 2)), Refusal::Conflict(_)),
        "one pending at a time"
    );
}

#[test]
fn an_abandoned_number_is_not_used_again_and_its_key_leaves_state() {
    let mut world = World::new();
    world.ok(prepare(0, 1));
    world.ok(abandon(1));
    assert_eq!(world.version_state(1), VersionState::Abandoned);
    assert!(world.state.version(&context(), 1).unwrap().material.is_none());
    assert!(matches!(world.refused(activate(1, &[])), Refusal::Conflict(_)));
    assert!(matches!(world.refused(prepare(0, 1)), Refusal::Conflict(_)));
    world.ok(prepare(1, 2));
}

#[test]
fn activation_needs_every_voter_or_its_absence_and_always_a_majority() {
    let mut world = World::new();
    world.voters = BTreeSet::from([1, 2, 3]);
    world.state.nodes.put(2, node("n2", 2)).unwrap();
    world.state.nodes.put(3, node("n3", 3)).unwrap();
    world.ok(prepare(0, 1));
    world.ack(1, 1);
    assert!(matches!(world.refused(activate(1, &[])), Refusal::Conflict(_)));
    assert!(
        matches!(world.refused(activate(1, &[2, 3])), Refusal::Conflict(_)),
        "no majority holds it"
    );
    world.ack(2, 1);
    assert!(
        matches!(world.refused(activate(1, &[])), Refusal::Conflict(_)),
        "node 3 is unaccounted for"
    );
    world.ok(activate(1, &[3]));
}

#[test]
fn an_ack_for_another_key_under_the_same_number_counts_nothing() {
    let mut world = World::new();
    world.ok(prepare(0, 1));
    world.ok(Op::AckVersions(AckVersions {
        node: 1,
        versions: vec![(context(), 1, uid(9))],
    }));
    assert!(world.state.version(&context(), 1).unwrap().acks.is_empty());
}

#[test]
fn a_version_is_the_next_one_and_no_other() {
    let mut world = World::new();
    world.ok(prepare(0, 1));
    world.ack(1, 1);
    world.ok(activate(1, &[]));
    for number in [0, 1, 3, u32::MAX] {
        let refused = world.refused(prepare(1, number));
        assert!(matches!(
            refused,
            Refusal::Invalid(Invalid::VersionNumber { next: 2, .. })
        ));
    }
    world.ok(prepare(1, 2));
}

#[test]
fn a_label_is_free_again_once_its_version_is_abandoned_and_a_key_is_never() {
    let mut world = World::new();
    let labelled = |expected, version, key_uid| {
        let Op::PrepareVersion(prepare) = prepare(expected, version) else {
            panic!()
        };
        Op::PrepareVersion(PrepareVersion {
            label: "mine".into(),
            key_uid: uid(key_uid),
            ..prepare
        })
    };
    let taken = |refusal| matches!(refusal, Refusal::Exists(Existing::Version { .. }));
    world.ok(labelled(0, 1, 1));
    world.ok(abandon(1));
    assert!(
        taken(world.refused(labelled(1, 2, 1))),
        "the abandoned key itself"
    );
    world.ok(labelled(1, 2, 2));
    world.ack(1, 2);
    world.ok(activate(2, &[]));
    assert!(taken(world.refused(labelled(2, 3, 3))), "a label in use");
}

/// Ages are told from these stamps: a wrong clock must neither put the next rotation off for a year nor make it due.
#[test]
fn a_leader_with_a_wrong_clock_stamps_versions_with_the_time_that_the_others_tell() {
    const NOW: UnixMillis = 1_000 * 24 * 3600 * 1000;
    const JUMP: UnixMillis = 400 * 24 * 3600 * 1000;
    for at in [NOW + JUMP, NOW - JUMP] {
        let mut world = World::new();
        world.voters = BTreeSet::from([1, 2, 3]);
        for (id, name) in [(2, "n2"), (3, "n3")] {
            world.state.nodes.put(id, node(name, id as u8)).unwrap();
            let report = NodeReport {
                clock: NOW - id as i64,
                ..report(1, id as u8)
            };
            world.ok_as(id, Op::ReportNode(ReportNode { node: id, report }));
        }
        let by_leader = |world: &mut World, op: Op| {
            let command = Command {
                at,
                ..world.command(op, Origin::Node(1))
            };
            assert!(matches!(world.send(&command), Outcome::Done(_)));
        };
        for version in [1, 2] {
            by_leader(&mut world, prepare(version - 1, version));
            for id in [1, 2, 3] {
                world.ack(id, version);
            }
            by_leader(&mut world, activate(version, &[]));
        }
        by_leader(&mut world, prepare(2, 3));
        by_leader(&mut world, abandon(3));
        let (first, second) = (world.version(1), world.version(2));
        let stamps = [
            Some(first.created_at),
            first.activated_at,
            first.ended_at,
            second.activated_at,
            world.version(3).ended_at,
        ];
        let close = |stamp: &Option<UnixMillis>| stamp.is_some_and(|stamp| (NOW - 3..=NOW).contains(&stamp));
        assert!(stamps.iter().all(close), "{at}: {stamps:?}");
    }
}
