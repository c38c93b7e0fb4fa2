//! Keys that version 1 made: where they are held, who owes their end, and that nothing is ever encrypted with them.

use super::life::STATES;
use super::moves::{move_to, other, second_slot};
use super::*;
use crate::state::context::KeyOrigin;
use VersionState::*;

fn adopt(version: u32, holder: RaftId) -> AdoptVersion {
    AdoptVersion {
        context: context(),
        version,
        key_uid: uid(version),
        label: format!("kek-old-v{version}"),
        slot: slot(),
        check_record: vec![4, 5],
        holder,
        floor: 0,
        created_at: None,
    }
}

fn release(version: u32, expected: VersionState) -> Op {
    Op::ReleaseVersion(ReleaseVersion {
        context: context(),
        version,
        expected,
    })
}

/// As an administrator's who asked this node.
fn asked_of(node: RaftId) -> Origin {
    match admin() {
        Origin::Admin(admin) => Origin::Admin(AdminOrigin {
            via_node: node,
            ..admin
        }),
        other => other,
    }
}

fn send(world: &mut World, op: AdoptVersion, origin: Origin) -> Outcome {
    let command = world.command(Op::AdoptVersion(op), origin);
    world.send(&command)
}

fn refused(world: &mut World, op: AdoptVersion, origin: Origin) -> Refusal {
    match send(world, op, origin) {
        Outcome::Refused(refusal) => refusal,
        other => panic!("{other:?}"),
    }
}

pub(super) fn adopted(world: &mut World, version: u32) {
    world.ok(Op::AdoptVersion(adopt(version, 1)));
}

fn holders(world: &World, version: u32) -> Vec<RaftId> {
    match &world.version(version).origin {
        KeyOrigin::Adopted { holders, .. } => holders.iter().copied().collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_adopted_version_decrypts_at_once_and_the_next_number_is_the_clusters() {
    let mut world = World::new();
    adopted(&mut world, 2);
    let version = world.version(2);
    assert_eq!((version.state, &*version.label), (DecryptOnly, "kek-old-v2"));
    assert!(version.material.is_none() && version.acks.is_empty());
    assert_eq!(version.check_record(), Some(&[4, 5][..]));
    assert_eq!(holders(&world, 2), [1]);
    // Version 1's older ones may come after it; the highest stays.
    adopted(&mut world, 1);
    let row = world.state.contexts().get(&context()).unwrap();
    assert_eq!((row.highest_version, row.active_version), (2, None));
    assert!(world.state.held_by_members().next().is_none());
    world.ok(prepare(2, 3));
    world.ack(1, 3);
    world.ok(activate(3, &[]));
    assert_eq!(world.version_state(2), DecryptOnly);
}

#[test]
fn a_key_is_adopted_in_the_slot_it_was_found_in_wherever_its_context_is_by_now() {
    let mut world = World::new();
    second_slot(&mut world);
    adopted(&mut world, 1);
    world.ok(move_to(slot(), other()));
    adopted(&mut world, 2);
    let there = AdoptVersion {
        slot: other(),
        ..adopt(3, 1)
    };
    world.ok(Op::AdoptVersion(there));
    let slots = [1, 2, 3].map(|version| world.version(version).slot.clone());
    assert_eq!(slots, [slot(), slot(), other()]);
    // A slot that the cluster does not know can be nobody's.
    let before = world.rows();
    let nowhere = SlotName::new("nowhere").unwrap();
    let lost = AdoptVersion {
        slot: nowhere.clone(),
        ..adopt(4, 1)
    };
    assert!(matches!(
        world.refused(Op::AdoptVersion(lost)),
        Refusal::NotFound(Missing::Slot(slot)) if slot == nowhere
    ));
    assert_eq!(world.rows(), before);
}

#[test]
fn nothing_makes_an_adopted_version_encrypt() {
    let mut world = World::new();
    adopted(&mut world, 1);
    world.ack(1, 1);
    assert!(matches!(
        world.refused(activate(1, &[])),
        Refusal::Conflict(Conflict::VersionState { .. })
    ));
    assert!(matches!(
        world.refused(set_use(1, DecryptOnly, Active)),
        Refusal::Invalid(Invalid::Use { .. })
    ));
    world.ok(set_use(1, DecryptOnly, Disabled));
    world.ok(set_use(1, Disabled, DecryptOnly));
}

#[test]
fn a_number_or_a_label_that_is_taken_is_refused_and_changes_nothing() {
    let mut world = World::new();
    world.ok(prepare(0, 1));
    adopted(&mut world, 2);
    let before = world.rows();
    let same_number = AdoptVersion {
        label: "another".into(),
        key_uid: uid(9),
        ..adopt(1, 1)
    };
    let same_label = AdoptVersion {
        version: 7,
        key_uid: uid(9),
        ..adopt(2, 1)
    };
    let same_key = AdoptVersion {
        key_uid: uid(2),
        ..adopt(7, 1)
    };
    for op in [same_number, same_label, same_key] {
        let refusal = world.refused(Op::AdoptVersion(op.clone()));
        assert!(
            matches!(refusal, Refusal::Exists(Existing::Version { .. })),
            "{op:?}: {refusal}"
        );
    }
    for number in [0, MAX_ADOPTED + 1] {
        let refusal = world.refused(Op::AdoptVersion(adopt(number, 1)));
        assert!(matches!(refusal, Refusal::Invalid(Invalid::VersionNumber { .. })));
    }
    let long = AdoptVersion {
        label: "x".repeat(256),
        ..adopt(7, 1)
    };
    assert!(matches!(
        world.refused(Op::AdoptVersion(long)),
        Refusal::Invalid(Invalid::TooLarge { .. })
    ));
    let elsewhere = AdoptVersion {
        context: ContextName::new("none").unwrap(),
        ..adopt(7, 1)
    };
    assert!(matches!(
        world.refused(Op::AdoptVersion(elsewhere)),
        Refusal::NotFound(Missing::Context(_))
    ));
    assert_eq!(world.rows(), before);
}

#[test]
fn only_the_node_that_looked_into_its_token_is_named_as_a_holder() {
    let mut world = World::new();
    let second = world.join("n2", 2);
    for (holder, origin) in [
        (second, asked_of(1)),
        (1, asked_of(second)),
        // A member that does not lead asks for nothing by itself.
        (second, Origin::Node(second)),
        (1, Origin::Node(second)),
    ] {
        let refusal = refused(&mut world, adopt(1, holder), origin);
        assert!(matches!(refusal, Refusal::Forbidden(Forbidden::NotItself { .. })));
    }
    assert!(matches!(
        send(&mut world, adopt(1, second), asked_of(second)),
        Outcome::Done(_)
    ));
    assert_eq!(holders(&world, 1), [second]);
    world.remove(second);
    let refusal = refused(&mut world, adopt(2, second), asked_of(second));
    assert!(matches!(refusal, Refusal::Forbidden(Forbidden::Removed { .. })));
}

#[test]
fn who_proves_a_copy_becomes_a_holder_and_only_holders_owe_its_end() {
    let mut world = World::new();
    let (second, third) = (world.join("n2", 2), world.join("n3", 3));
    for (id, name, filling) in [(second, "n2", 2), (third, "n3", 3)] {
        world.state.nodes.put(id, node(name, filling)).unwrap();
    }
    adopted(&mut world, 1);
    world.ack(second, 1);
    world.ack(1, 1);
    assert_eq!(holders(&world, 1), [1, second]);
    world.ok(Op::ScheduleDestroy(schedule(1, DecryptOnly)));
    let seen = world.seen(1);
    world.ok(advance(LEAST_WAIT_MS, vec![seen]));
    world.ok(begin(1));
    let version = world.version(1);
    assert_eq!(
        version.check_record(),
        Some(&[4, 5][..]),
        "it proves the original"
    );
    let owing: Vec<RaftId> = world.state.owing(version).map(|(id, _)| id).collect();
    assert_eq!(owing, [1, second]);
    assert!(!world.state.owes_destruction(third));
    world.ok_as(second, ack_destroyed(second, 1));
    assert_eq!(world.version_state(1), Destroying);
    world.ok(ack_destroyed(1, 1));
    assert_eq!(world.version_state(1), Destroyed);
    // Its label stays with its tombstone.
    let again = AdoptVersion {
        label: "kek-old-v1".into(),
        ..adopt(5, 1)
    };
    assert!(matches!(
        world.refused(Op::AdoptVersion(again)),
        Refusal::Exists(_)
    ));
}

#[test]
fn the_next_number_is_above_every_one_that_version_1_gave() {
    let mut world = World::new();
    world.ok(Op::AdoptVersion(AdoptVersion {
        floor: 7,
        ..adopt(2, 1)
    }));
    let highest = |world: &World| world.state.contexts().get(&context()).unwrap().highest_version;
    assert_eq!(highest(&world), 7);
    // The next of version 1's is still free, and nothing goes back.
    adopted(&mut world, 3);
    assert_eq!(highest(&world), 7);
    world.ok(prepare(7, 8));
    let before = world.rows();
    let refusal = world.refused(Op::AdoptVersion(AdoptVersion {
        floor: MAX_ADOPTED + 1,
        ..adopt(4, 1)
    }));
    assert!(
        matches!(refusal, Refusal::Invalid(Invalid::VersionNumber { version, .. }) if version == MAX_ADOPTED + 1)
    );
    assert_eq!(world.rows(), before);
}

#[test]
fn version_1s_time_is_shown_and_the_leaders_counts() {
    let mut world = World::new();
    adopted(&mut world, 1);
    let now = world.version(1).created_at;
    assert_eq!(world.version(1).ended_at, Some(now));
    for (version, made, shown) in [(2, now - 1, now - 1), (3, now + 3_600_000, 0), (4, -5, 0)] {
        world.ok(Op::AdoptVersion(AdoptVersion {
            created_at: Some(made),
            ..adopt(version, 1)
        }));
        let row = world.version(version);
        let retired = row.ended_at.unwrap();
        let expected = if shown == 0 { retired } else { shown };
        assert_eq!(row.created_at, expected, "version {version}");
        assert!(retired >= now);
    }
}

#[test]
fn what_was_adopted_lately_counts_as_used() {
    let mut world = World::new();
    adopted(&mut world, 1);
    let careful = ScheduleDestroy {
        override_recent_use: false,
        ..schedule(1, DecryptOnly)
    };
    let before = world.version(1).clone();
    let refusal = world.refused(Op::ScheduleDestroy(careful));
    assert!(
        matches!(refusal, Refusal::Conflict(Conflict::UsedRecently { .. })),
        "{refusal}"
    );
    assert_eq!(*world.version(1), before);
    world.ok(Op::ScheduleDestroy(schedule(1, DecryptOnly)));
}

#[test]
fn a_released_version_is_over_and_its_label_free() {
    for state in [DecryptOnly, Disabled] {
        let mut world = World::new();
        adopted(&mut world, 1);
        world.ack(1, 1);
        if state == Disabled {
            world.ok(set_use(1, DecryptOnly, Disabled));
        }
        world.ok(release(1, state));
        let version = world.version(1);
        assert_eq!(version.state, Abandoned);
        assert!(!version.note.is_empty());
        assert!(!world.state.label_taken("kek-old-v1"));
        // It is one more tombstone: nobody takes it back, and its number is gone.
        assert!(matches!(
            world.refused(release(1, Abandoned)),
            Refusal::Conflict(_)
        ));
        let again = AdoptVersion {
            label: "kek-old-v1".into(),
            key_uid: uid(5),
            ..adopt(1, 1)
        };
        assert!(matches!(
            world.refused(Op::AdoptVersion(again.clone())),
            Refusal::Exists(_)
        ));
        world.ok(Op::AdoptVersion(AdoptVersion { version: 5, ..again }));
        assert_eq!(world.version_state(5), DecryptOnly);
    }
}

#[test]
fn nothing_but_a_retired_adopted_version_is_released_and_by_an_administrator_only() {
    for state in STATES {
        let mut world = World::in_state(state);
        let before = world.rows();
        assert!(
            matches!(world.refused(release(1, state)), Refusal::Conflict(_)),
            "{state:?}"
        );
        assert_eq!(world.rows(), before);
    }
    let mut world = World::new();
    adopted(&mut world, 1);
    assert!(!release(1, DecryptOnly).forwardable_from_node());
    let driver = world.command(release(1, DecryptOnly), Origin::Node(1));
    assert!(matches!(
        world.send(&driver),
        Outcome::Refused(Refusal::Forbidden(Forbidden::Operation { .. }))
    ));
    // Another state than the proposer saw.
    assert!(matches!(
        world.refused(release(1, Disabled)),
        Refusal::Conflict(_)
    ));
    world.ok(Op::ScheduleDestroy(schedule(1, DecryptOnly)));
    assert!(matches!(
        world.refused(release(1, DestroyScheduled)),
        Refusal::Conflict(_)
    ));
}
