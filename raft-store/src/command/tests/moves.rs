//! Contexts whose next versions are made in another slot.

use super::*;
use crate::state::table::{LoadError, Row, RowChange, RowKey};
use VersionState::*;

pub(super) fn other() -> SlotName {
    SlotName::new("t").unwrap()
}

/// A second slot, whose transport key has the id that `prepare` names.
pub(super) fn second_slot(world: &mut World) {
    let Op::AddTransportKey(first) = transport(1, 0) else {
        panic!()
    };
    world.ok(Op::AddTransportKey(AddTransportKey {
        slot: other(),
        ..first
    }));
}

pub(super) fn move_to(from: SlotName, to: SlotName) -> Op {
    Op::MoveContext(MoveContext {
        context: context(),
        from,
        to,
    })
}

fn slot_of(world: &World, version: u32) -> String {
    world.version(version).slot.to_string()
}

/// With version 1 active in the first slot, and a second slot.
fn world() -> World {
    let mut world = World::new();
    second_slot(&mut world);
    world.ok(prepare(0, 1));
    world.ack(1, 1);
    world.ok(activate(1, &[]));
    world
}

#[test]
fn the_next_version_is_made_in_the_new_slot_and_the_others_stay() {
    let mut world = world();
    world.ok(move_to(slot(), other()));
    assert_eq!(
        (world.version_state(1), slot_of(&world, 1)),
        (Active, "s".to_owned()),
        "it encrypts until there is another one"
    );
    world.ok(prepare(1, 2));
    world.ack(1, 2);
    world.ok(activate(2, &[]));
    assert_eq!(
        (slot_of(&world, 1), slot_of(&world, 2)),
        ("s".to_owned(), "t".to_owned())
    );
    assert_eq!(world.version_state(1), DecryptOnly);
    // And back again.
    world.ok(move_to(other(), slot()));
    world.ok(prepare(2, 3));
    assert_eq!(slot_of(&world, 3), "s");
}

#[test]
fn a_new_version_is_wrapped_under_the_new_slots_transport_key() {
    let mut world = world();
    world.ok(move_to(slot(), other()));
    let Op::AddTransportKey(next) = transport(2, 1) else {
        panic!()
    };
    world.ok(Op::AddTransportKey(AddTransportKey {
        slot: other(),
        ..next
    }));
    match world.refused(prepare(1, 2)) {
        Refusal::Conflict(Conflict::TransportNotCurrent { slot, .. }) => assert_eq!(slot, other()),
        refusal => panic!("{refusal}"),
    }
}

#[test]
fn a_move_that_was_decided_by_another_picture_is_refused_and_changes_nothing() {
    let mut world = world();
    let before = world.rows();
    let nowhere = SlotName::new("nowhere").unwrap();
    let is_in = |refusal: Refusal, wanted: SlotName| matches!(refusal, Refusal::Conflict(Conflict::ContextSlot { slot, .. }) if slot == wanted);
    assert!(is_in(world.refused(move_to(other(), slot())), slot()));
    assert!(is_in(world.refused(move_to(slot(), slot())), slot()));
    assert!(is_in(world.refused(move_to(nowhere.clone(), other())), slot()));
    assert!(matches!(
        world.refused(move_to(slot(), nowhere.clone())),
        Refusal::NotFound(Missing::Slot(slot)) if slot == nowhere
    ));
    let unknown = MoveContext {
        context: ContextName::new("none").unwrap(),
        from: slot(),
        to: other(),
    };
    assert!(matches!(
        world.refused(Op::MoveContext(unknown)),
        Refusal::NotFound(Missing::Context(_))
    ));
    assert_eq!(world.rows(), before);
    // A version that is being imported was sealed for the slot it was made in.
    world.ok(prepare(1, 2));
    assert!(matches!(
        world.refused(move_to(slot(), other())),
        Refusal::Conflict(Conflict::Pending { version: 2, .. })
    ));
    world.ok(abandon(2));
    world.ok(move_to(slot(), other()));
}

#[test]
fn only_an_administrator_moves_a_context() {
    let mut world = world();
    let command = world.command(move_to(slot(), other()), Origin::Node(1));
    assert!(matches!(
        world.send(&command),
        Outcome::Refused(Refusal::Forbidden(Forbidden::Operation { .. }))
    ));
}

#[test]
fn every_member_has_to_have_a_key_for_the_slot() {
    let mut world = world();
    let with_keys = |name: &str, filling: u8, slots: &[SlotName]| {
        let key = SlotKey {
            spki: vec![filling],
            epoch: 1,
            signature: vec![1],
            signer_chain: vec![],
        };
        let slot_keys = slots.iter().map(|slot| (slot.clone(), key.clone()));
        Node {
            slot_keys: slot_keys.collect(),
            ..node(name, filling)
        }
    };
    let both = [slot(), other()];
    world.state.nodes.put(1, with_keys("n1", 1, &both)).unwrap();
    world.state.nodes.put(2, with_keys("n2", 2, &both[..1])).unwrap();
    match world.refused(move_to(slot(), other())) {
        Refusal::Conflict(Conflict::NoSlotKey { node, slot }) => {
            assert_eq!((node.as_str(), slot), ("n2", other()));
        }
        refusal => panic!("{refusal}"),
    }
    world.state.nodes.put(2, with_keys("n2", 2, &both)).unwrap();
    world.ok(move_to(slot(), other()));
}

#[test]
fn a_slot_is_needed_for_as_long_as_a_version_in_it_is_not_over() {
    let mut world = world();
    let needed = |world: &World, node| {
        let slots = world.state.slots_needed_by(node).into_iter();
        slots.map(|slot| slot.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(needed(&world, Some(1)), ["s"]);
    world.ok(move_to(slot(), other()));
    // New versions are made there, whether there is one yet or not.
    assert_eq!(needed(&world, Some(1)), ["s", "t"]);
    world.ok(prepare(1, 2));
    world.ack(1, 2);
    world.ok(activate(2, &[]));
    for step in [
        set_use(1, DecryptOnly, Disabled),
        Op::ScheduleDestroy(schedule(1, Disabled)),
    ] {
        world.ok(step);
        assert_eq!(needed(&world, None), ["s", "t"], "it can come back");
    }
    let seen = world.seen(1);
    world.ok(advance(LEAST_WAIT_MS, vec![seen]));
    world.ok(begin(1));
    assert_eq!(needed(&world, Some(1)), ["s", "t"], "it is still to be removed");
    world.ok(ack_destroyed(1, 1));
    assert_eq!(needed(&world, Some(1)), ["t"]);
}

/// What was adopted is in one node's token, and cannot come into another's.
#[test]
fn only_holders_need_the_slot_of_an_adopted_version() {
    let mut world = World::new();
    second_slot(&mut world);
    world.ok(Op::AdoptVersion(AdoptVersion {
        context: context(),
        version: 1,
        key_uid: uid(1),
        label: "kek-old-v1".into(),
        slot: slot(),
        check_record: vec![4, 5],
        holder: 1,
        floor: 0,
        created_at: None,
    }));
    world.ok(move_to(slot(), other()));
    let needs = |node| world.state.slots_needed_by(node).contains(&slot());
    assert_eq!(
        (needs(Some(1)), needs(Some(2)), needs(None)),
        (true, false, false)
    );
}

/// The row of version `number`, which is in slot `s`, as the release before moves wrote it.
fn third_form(number: u32, row: &[u8]) -> Vec<u8> {
    // The slot stands behind the id and the label.
    let at = 16 + 8 + format!("kek-c-v{number}").len();
    [&row[..at], &row[at + 8 + "s".len()..]].concat()
}

/// The rows of a state, as the release before moves wrote them.
fn third_rows(state: &ClusterState) -> Vec<RowChange> {
    let mut rows = state.dump().unwrap();
    for row in rows.iter_mut().filter(|row| row.kind == RowKind::Version) {
        let number = VersionKey::decode(&row.key).unwrap().version;
        let value = third_form(number, row.value.as_ref().unwrap());
        (row.version, row.value) = (3, Some(value));
    }
    rows
}

fn read_back(rows: &[RowChange]) -> ClusterState {
    let mut state = ClusterState::default();
    for row in rows {
        let value = row.value.as_ref().unwrap();
        state.load(row.kind, row.version, &row.key, value).unwrap();
    }
    state.loaded()
}

#[test]
fn a_version_from_before_there_were_moves_is_where_its_context_is() {
    let world = world();
    let rows = third_rows(&world.state);
    assert_eq!(read_back(&rows).version(&context(), 1), Some(world.version(1)));
    let old = rows.iter().find(|row| row.kind == RowKind::Version).unwrap();
    let value = old.value.as_ref().unwrap();
    let orphan = ClusterState::default().load(RowKind::Version, 3, &old.key, value);
    assert!(matches!(orphan, Err(LoadError::Damaged(what)) if what.contains("context c")));
    assert!(matches!(KeyVersion::decode(3, value), Err(LoadError::Damaged(_))));
}

/// A store is upgraded row by row, as they are written: what a move leaves alone would be read with the new slot later.
#[test]
fn versions_from_before_there_were_moves_stay_where_they_are_through_a_move_and_a_restart() {
    let mut world = world();
    world.ok(prepare(1, 2));
    world.ack(1, 2);
    world.ok(activate(2, &[]));
    world.ok(prepare(2, 3));
    world.ok(abandon(3));
    let stored = third_rows(&world.state);
    world.state = read_back(&stored);
    world.ok(move_to(slot(), other()));

    // On the disk, over what was there.
    let mut disk: BTreeMap<(RowKind, Vec<u8>), RowChange> = BTreeMap::new();
    for row in stored.into_iter().chain(world.state.drain().unwrap()) {
        disk.insert((row.kind, row.key.clone()), row);
    }
    let disk: Vec<RowChange> = disk.into_values().collect();
    let versions = || disk.iter().filter(|row| row.kind == RowKind::Version);
    assert_eq!(versions().count(), 3);
    assert!(versions().all(|row| row.version == KeyVersion::VERSION));
    // And in a snapshot.
    for rows in [disk, world.state.dump().unwrap()] {
        let read = read_back(&rows);
        assert_eq!(read.contexts().get(&context()).unwrap().slot, other());
        for number in 1..=3 {
            let version = read.version(&context(), number);
            assert_eq!(version, Some(world.version(number)), "version {number}");
            assert_eq!(version.unwrap().slot, slot(), "version {number}");
        }
    }
}
