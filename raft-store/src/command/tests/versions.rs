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
