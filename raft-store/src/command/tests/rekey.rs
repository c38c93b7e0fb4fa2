//! Transport keys and the replication key are replaced in two phases, and nothing is lost in between.

use sha2::{Digest, Sha256};

use super::*;
use crate::state::frozen::SlotV2;
use crate::state::replication::{FormerKey, ReplicationKeyId};
use crate::state::slot::{Slot, TransportGeneration, TransportState};
use crate::state::table::{Row, RowChange};

/// The cluster's replication key, as the tests' cluster is founded.
const OLD: ReplicationKeyId = [2; 8];
const NEW: ReplicationKeyId = [3; 8];

fn id(number: u8) -> TransportId {
    TransportId([number; 16])
}

fn rekey(expected_generation: u32, give_up: Option<u8>) -> Op {
    Op::RekeyTransport(RekeyTransport {
        slot: slot(),
        expected_generation,
        give_up: give_up.map(id),
    })
}

fn offer(number: u8, expected_generation: u32) -> Op {
    Op::OfferTransportKey(OfferTransportKey {
        slot: slot(),
        id: id(number),
        expected_generation,
        mode: TransportMode::Standard,
        check: vec![number; 40],
        grants: BTreeMap::from([(Grantee::Node(1), grant(1))]),
    })
}

fn ack(node: RaftId, number: u8, gone: bool) -> Op {
    Op::AckTransportKey(AckTransportKey {
        node,
        slot: slot(),
        id: id(number),
        gone,
    })
}

fn activate_key(number: u8, left_out: &[RaftId]) -> Op {
    Op::ActivateTransportKey(ActivateTransportKey {
        slot: slot(),
        id: id(number),
        left_out: left_out.iter().copied().collect(),
    })
}

fn destroy_key(number: u8) -> Op {
    Op::DestroyTransportKey(DestroyTransportKey {
        slot: slot(),
        id: id(number),
    })
}

fn row(world: &World) -> Slot {
    Slot::clone(world.state.slots().get(&slot()).unwrap())
}

fn generation(world: &World, number: u8) -> TransportGeneration {
    row(world).transport(id(number)).unwrap().clone()
}

fn state_of(world: &World, number: u8) -> TransportState {
    generation(world, number).state
}

/// A member besides node 1, which votes.
fn second(world: &mut World) -> RaftId {
    world.slot_key(1, slot());
    let node = world.join("n2", 2);
    world.slot_key(node, slot());
    let incarnation = world.state.nodes().get(&node).unwrap().incarnation;
    let report = NodeReport {
        incarnation,
        ..report(1, 1)
    };
    world.ok_as(node, Op::ReportNode(ReportNode { node, report }));
    world.ok(Op::AdmitNode(AdmitNode { node }));
    world.voters.insert(node);
    node
}

#[test]
fn a_slots_next_transport_key_is_offered_then_current_and_the_old_one_goes_with_its_last_version() {
    let mut world = World::new();
    world.ok(prepare(0, 1));
    world.ack(1, 1);
    world.ok(activate(1, &[]));
    world.ok(rekey(1, None));
    assert!(row(&world).awaits_transport());
    world.ok(offer(2, 1));
    assert!(!row(&world).awaits_transport());
    assert_eq!(state_of(&world, 2), TransportState::Offered);
    // Until everybody holds it, the old one is used.
    assert_eq!(row(&world).current_transport().unwrap().id, id(1));
    let early = world.refused(activate_key(2, &[]));
    assert!(matches!(
        early,
        Refusal::Conflict(Conflict::TransportHolders { .. })
    ));
    world.ok(ack(1, 2, false));
    world.ok(activate_key(2, &[]));
    world.ok(activate_key(2, &[]));
    assert_eq!(row(&world).current_transport().unwrap().id, id(2));
    assert_eq!(state_of(&world, 1), TransportState::Superseded);
    assert!(matches!(
        world.refused(prepare(1, 2)),
        Refusal::Conflict(Conflict::TransportNotCurrent { .. })
    ));
    let needed = world.refused(destroy_key(1));
    assert!(matches!(
        needed,
        Refusal::Conflict(Conflict::TransportInUse { version: 1, .. })
    ));
    // The version leaves; it may well be on its way out of the tokens still.
    let key = key(1);
    let gone = KeyVersion {
        material: None,
        ..world.version(1).clone()
    };
    world.state.versions.put(key, gone).unwrap();
    world.ok(destroy_key(1));
    let ending = generation(&world, 1);
    assert_eq!(ending.state, TransportState::Destroying);
    assert!(ending.grants.is_empty() && ending.acks.is_empty() && ending.ended_at.is_none());
    // What was said of holding it is nothing said of its end.
    world.ok(ack(1, 1, false));
    assert_eq!(state_of(&world, 1), TransportState::Destroying);
    world.ok(ack(1, 1, true));
    assert_eq!(state_of(&world, 1), TransportState::Destroyed);
    assert!(generation(&world, 1).ended_at.is_some());
    assert!(generation(&world, 1).acks.is_empty(), "a tombstone says no more");
    world.ok(destroy_key(1));
    assert_eq!(state_of(&world, 1), TransportState::Destroyed);
}

#[test]
fn one_rekey_of_a_slot_is_open_at_a_time_and_none_while_a_version_is_pending() {
    let mut world = World::new();
    assert!(matches!(
        world.refused(rekey(0, None)),
        Refusal::Conflict(Conflict::TransportGeneration { generation: 1, .. })
    ));
    world.ok(prepare(0, 1));
    assert!(matches!(
        world.refused(rekey(1, None)),
        Refusal::Conflict(Conflict::Pending { version: 1, .. })
    ));
    world.ok(abandon(1));
    world.ok(rekey(1, None));
    let open = |refusal| matches!(refusal, Refusal::Conflict(Conflict::RekeyOpen { .. }));
    assert!(open(world.refused(rekey(1, None))));
    world.ok(offer(2, 1));
    assert!(open(world.refused(rekey(2, None))));
    // Made twice by two leaders: one of them is too late.
    assert!(matches!(world.refused(offer(3, 1)), Refusal::Conflict(_)));
    assert!(matches!(world.refused(offer(3, 2)), Refusal::Conflict(_)));
    world.ok(ack(1, 2, false));
    world.ok(activate_key(2, &[]));
    world.ok(rekey(2, None));
}

#[test]
fn an_offered_key_that_nobody_can_grant_is_given_up_for_another() {
    let mut world = World::new();
    world.ok(rekey(1, None));
    world.ok(offer(2, 1));
    assert!(matches!(
        world.refused(rekey(2, Some(1))),
        Refusal::Conflict(Conflict::TransportState { .. })
    ));
    world.ok(rekey(2, Some(2)));
    assert_eq!(state_of(&world, 2), TransportState::Destroying);
    assert!(row(&world).awaits_transport());
    world.ok(offer(3, 2));
    world.ok(ack(1, 3, false));
    world.ok(activate_key(3, &[]));
    let (generation, current) = {
        let row = row(&world);
        let current = row.current_transport().unwrap();
        (current.generation, current.id)
    };
    assert_eq!((generation, current), (3, id(3)));
    world.ok(ack(1, 2, true));
    assert_eq!(state_of(&world, 2), TransportState::Destroyed);
}

#[test]
fn every_member_has_to_hold_the_new_key_or_to_be_silent_and_has_to_remove_the_old_one() {
    let mut world = World::new();
    let other = second(&mut world);
    world.voters.insert(3);
    world.ok(rekey(1, None));
    world.ok(offer(2, 1));
    world.ok(ack(1, 2, false));
    world.ok_as(other, ack(other, 2, false));
    let refused = |refusal| matches!(refusal, Refusal::Conflict(Conflict::TransportHolders { .. }));
    assert!(
        refused(world.refused(activate_key(2, &[]))),
        "voter 3 is unaccounted for"
    );
    world.ok(activate_key(2, &[3]));
    world.ok(destroy_key(1));
    world.ok(ack(1, 1, true));
    let owing = |world: &World| {
        let ending = generation(world, 1);
        let owing = world.state.owing_transport(&ending);
        owing.map(|(id, _)| id).collect::<Vec<_>>()
    };
    assert_eq!(owing(&world), [other]);
    let forged = world.refused(ack(other, 1, true));
    assert!(matches!(forged, Refusal::Forbidden(Forbidden::NotItself { .. })));
    // A node that was removed holds nobody up.
    world.remove(other);
    super::super::destruction::settle(&mut world.state, 7).unwrap();
    assert_eq!(state_of(&world, 1), TransportState::Destroyed);
    assert!(owing(&world).is_empty());
}

#[test]
fn nothing_is_replaced_while_a_node_leaves_that_would_get_the_new_key_too() {
    let mut world = World::new();
    let other = second(&mut world);
    world.ok(holds(1, &[OLD, NEW]));
    world.ok_as(other, holds(other, &[OLD, NEW]));
    let leave = RemoveNode {
        node: other,
        successor: None,
        lose_keys: false,
    };
    world.ok(Op::RemoveNode(leave));
    for op in [rekey(1, None), rekey_replication(OLD, NEW)] {
        let name = op.name();
        let refused = world.refused(op);
        assert!(
            matches!(&refused, Refusal::Conflict(Conflict::NodeLeaves { node }) if node.as_str() == "n2"),
            "{name}: {refused:?}"
        );
    }
    assert!(row(&world).rekey.is_none());
    world.ok(Op::KeepNode(KeepNode { node: other }));
    assert_eq!(world.ok(rekey(1, None)), Done::TransportRekey { generation: 1 });
    let done = Done::ReplicationRekey {
        key: NEW,
        former: OLD,
    };
    assert_eq!(world.ok(rekey_replication(OLD, NEW)), done);
}

/// The row of the slot, as a snapshot has it.
fn stored(world: &World) -> RowChange {
    let mut rows = world.state.dump().unwrap().into_iter();
    rows.find(|row| row.kind == RowKind::Slot).unwrap()
}

#[test]
fn a_slot_is_written_as_the_release_before_reads_it_until_a_rekey_is_asked_for() {
    let mut world = World::new();
    let other = second(&mut world);
    world.ok(Op::GrantTransportKey(GrantTransportKey {
        slot: slot(),
        id: id(1),
        grantee: Grantee::Node(other),
        grant: grant(1),
    }));
    // On disk and in snapshots alike, and as that release wrote it.
    let mut drained = world.state.drain().unwrap().into_iter();
    let on_disk = drained.find(|row| row.kind == RowKind::Slot).unwrap();
    let before = stored(&world);
    assert_eq!((on_disk.version, before.version), (2, 2));
    assert_eq!(on_disk.value, before.value);
    let value = before.value.unwrap();
    // What a release before refuses as too large is refused by this one, and nothing else.
    assert_eq!(row(&world).written_size(), value.len() as u64);
    let read: SlotV2 = crate::codec::decode(&value).unwrap();
    assert_eq!(Slot::from(read), row(&world));
    // Whoever has read it writes the same.
    let mut again = ClusterState::default();
    again.load(RowKind::Slot, 2, &before.key, &value).unwrap();
    assert_eq!(again.slots().get(&slot()).unwrap().as_ref(), &row(&world));
    let rows = again.dump().unwrap();
    assert_eq!((rows[0].version, rows[0].value.as_ref()), (2, Some(&value)));

    world.ok(rekey(1, None));
    let after = stored(&world);
    assert_eq!(after.version, RowKind::Slot.version());
    let mut again = ClusterState::default();
    let value = after.value.unwrap();
    assert_eq!(row(&world).written_size(), value.len() as u64);
    again
        .load(RowKind::Slot, after.version, &after.key, &value)
        .unwrap();
    assert_eq!(again.slots().get(&slot()).unwrap().as_ref(), &row(&world));
}

#[test]
fn a_rekey_is_refused_for_which_the_slots_row_has_no_room() {
    let mut world = World::new();
    let granted = |world: &mut World, count: u64| {
        let mut full = row(world);
        let blob = vec![7; 8 << 10];
        let grants = (1..=count).map(|node| {
            (
                Grantee::Node(node),
                Grant {
                    epoch: 1,
                    blob: blob.clone(),
                },
            )
        });
        full.transport[0].grants = grants.collect();
        world.state.slots.put(slot(), full).unwrap();
    };
    granted(&mut world, 10);
    let refused = world.refused(rekey(1, None));
    assert!(
        matches!(
            refused,
            Refusal::Invalid(Invalid::TooLarge {
                what: Bounded::Row(RowKind::Slot),
                ..
            })
        ),
        "{refused:?}"
    );
    assert!(
        !row(&world).awaits_transport(),
        "nothing is begun that cannot end"
    );
    granted(&mut world, 4);
    world.ok(rekey(1, None));
}

#[test]
fn a_majority_has_to_hold_the_new_key_whoever_is_silent() {
    let mut world = World::new();
    world.voters.extend([2, 3]);
    world.ok(rekey(1, None));
    world.ok(offer(2, 1));
    world.ok(ack(1, 2, false));
    assert!(matches!(
        world.refused(activate_key(2, &[2, 3])),
        Refusal::Conflict(Conflict::TransportHolders {
            holders: 1,
            voters: 3,
            ..
        })
    ));
}

#[test]
fn a_slot_keeps_so_many_transport_keys_and_no_more() {
    let mut world = World::new();
    for newest in 1..MAX_LIVE_TRANSPORT_KEYS as u8 {
        let next = newest + 1;
        world.ok(rekey(u32::from(newest), None));
        world.ok(offer(next, u32::from(newest)));
        world.ok(ack(1, next, false));
        world.ok(activate_key(next, &[]));
    }
    let newest = MAX_LIVE_TRANSPORT_KEYS as u32;
    assert!(matches!(
        world.refused(rekey(newest, None)),
        Refusal::Conflict(Conflict::LiveTransportKeys { live: 8, .. })
    ));
    world.ok(destroy_key(1));
    world.ok(ack(1, 1, true));
    world.ok(rekey(newest, None));
}

#[test]
fn only_an_administrator_asks_for_a_rekey_and_only_the_leader_takes_its_steps() {
    let mut world = World::new();
    let other = second(&mut world);
    for op in [rekey(1, None), rekey_replication(OLD, NEW)] {
        let command = world.command(op, Origin::Node(1));
        let Outcome::Refused(refusal) = world.send(&command) else {
            panic!()
        };
        assert!(matches!(refusal, Refusal::Forbidden(Forbidden::Operation { .. })));
    }
    let reseal = Op::ResealKeys(ResealKeys::default());
    for op in [offer(2, 1), activate_key(2, &[]), destroy_key(1), reseal] {
        assert!(!op.forwardable_from_node(), "{}", op.name());
        let refusal = world.refused_as(other, op);
        assert!(matches!(refusal, Refusal::Forbidden(Forbidden::Driver { .. })));
    }
    assert!(ack(1, 2, false).forwardable_from_node() && holds(1, &[OLD]).forwardable_from_node());
}

#[test]
fn a_key_that_is_being_destroyed_is_granted_to_nobody() {
    let mut world = World::new();
    let other = second(&mut world);
    world.ok(rekey(1, None));
    world.ok(offer(2, 1));
    world.ok(rekey(2, Some(2)));
    let late = Op::GrantTransportKey(GrantTransportKey {
        slot: slot(),
        id: id(2),
        grantee: Grantee::Node(other),
        grant: grant(1),
    });
    assert!(matches!(
        world.refused(late),
        Refusal::Conflict(Conflict::TransportState { .. })
    ));
}

fn holds(node: RaftId, held: &[ReplicationKeyId]) -> Op {
    Op::ReportReplicationKeys(ReportReplicationKeys {
        node,
        held: held.iter().copied().collect(),
    })
}

fn rekey_replication(from: ReplicationKeyId, to: ReplicationKeyId) -> Op {
    Op::RekeyReplication(RekeyReplication { from, to })
}

/// A record that names a replication key.
fn sealed(key: ReplicationKeyId, rest: u8) -> Vec<u8> {
    [b"HSK1".as_slice(), &key, &[rest; 40]].concat()
}

fn prepare_sealed(expected_highest: u32, record: Vec<u8>) -> Op {
    let Op::PrepareVersion(mut prepare) = prepare(expected_highest, expected_highest + 1) else {
        panic!()
    };
    prepare.material.sealed_key = record;
    Op::PrepareVersion(prepare)
}

fn digest(record: &[u8]) -> [u8; 32] {
    Sha256::digest(record).into()
}

fn resealed(version: u32, replaces: &[u8], record: Vec<u8>) -> ResealKeys {
    ResealKeys {
        keys: vec![ResealedKey {
            context: context(),
            version,
            replaces: digest(replaces),
            sealed_key: record,
        }],
        grants: vec![],
    }
}

fn record(world: &World, version: u32) -> Vec<u8> {
    let material = world.version(version).material.as_ref().unwrap();
    material.sealed_key.clone()
}

#[test]
fn another_replication_key_is_taken_once_every_node_has_it() {
    let mut world = World::new();
    let other = second(&mut world);
    let joiner = world.join("n3", 3);
    world.ok(holds(1, &[OLD, NEW]));
    for node in [other, joiner] {
        let refused = world.refused(rekey_replication(OLD, NEW));
        assert!(matches!(
            refused,
            Refusal::Conflict(Conflict::LacksReplicationKey { id: NEW, .. })
        ));
        world.ok_as(node, holds(node, &[OLD, NEW]));
    }
    let forged = world.refused_as(other, holds(1, &[OLD]));
    assert!(matches!(forged, Refusal::Forbidden(Forbidden::NotItself { .. })));
    let other_key = world.refused(rekey_replication(NEW, OLD));
    assert!(matches!(
        other_key,
        Refusal::Conflict(Conflict::ReplicationKey { current: OLD })
    ));
    world.ok(rekey_replication(OLD, NEW));
    assert_eq!(world.state.meta().unwrap().trk_id, NEW);
    let again = world.refused(rekey_replication(NEW, [9; 8]));
    assert!(matches!(again, Refusal::Conflict(Conflict::ResealOpen)));
}

#[test]
fn who_holds_the_clusters_key_alone_takes_no_room() {
    let mut world = World::new();
    let other = second(&mut world);
    world.ok(holds(1, &[OLD]));
    assert!(world.state.replication().is_none());
    assert_eq!(world.state.replication_keys_of(1), BTreeSet::from([OLD]));
    world.ok_as(other, holds(other, &[OLD, NEW]));
    world.ok(holds(1, &[OLD, NEW]));
    world.ok(holds(1, &[OLD]));
    let held = &world.state.replication().unwrap().held;
    assert_eq!(held.keys().copied().collect::<Vec<_>>(), [other]);
    world.remove(other);
    world.ok(holds(1, &[OLD, NEW]));
    let held = &world.state.replication().unwrap().held;
    let both = BTreeSet::from([OLD, NEW]);
    let known = [(1, both.clone()), (other, both)];
    assert_eq!(*held, known.into(), "it knows them still");
    let three = world.refused(holds(1, &[OLD, NEW, [9; 8]]));
    assert!(matches!(three, Refusal::Invalid(Invalid::TooLarge { .. })));
}

#[test]
fn every_record_is_sealed_anew_and_the_former_key_is_retired_with_the_last() {
    let mut world = World::new();
    world.ok(prepare_sealed(0, sealed(OLD, 1)));
    world.ack(1, 1);
    world.ok(activate(1, &[]));
    world.slot_key(1, slot());
    let granted = Grant {
        epoch: 1,
        blob: sealed(OLD, 7),
    };
    world.ok(Op::GrantTransportKey(GrantTransportKey {
        slot: slot(),
        id: id(1),
        grantee: Grantee::Node(1),
        grant: granted.clone(),
    }));
    world.ok(holds(1, &[OLD, NEW]));
    world.ok(rekey_replication(OLD, NEW));
    let former = world.state.replication().unwrap().former.clone();
    assert!(matches!(former, Some(FormerKey { id: OLD, .. })));
    // Whoever has not heard of it seals under the old one still.
    assert!(matches!(
        world.refused(prepare_sealed(1, sealed(OLD, 2))),
        Refusal::Conflict(Conflict::ReplicationKey { current: NEW })
    ));
    world.ok(prepare_sealed(1, sealed(NEW, 2)));
    assert_eq!(world.state.keys_sealed_under(OLD).count(), 1);
    assert_eq!(world.state.grants_sealed_under(OLD).len(), 1);
    // Not what the leader has seen, or not under the new key.
    world.ok(Op::ResealKeys(resealed(1, &sealed(OLD, 9), sealed(NEW, 3))));
    world.ok(Op::ResealKeys(resealed(1, &sealed(OLD, 1), sealed([9; 8], 3))));
    assert_eq!(record(&world, 1), sealed(OLD, 1));
    world.ok(Op::ResealKeys(resealed(1, &sealed(OLD, 1), sealed(NEW, 3))));
    assert_eq!(record(&world, 1), sealed(NEW, 3));
    assert!(
        world.state.replication().unwrap().former.is_some(),
        "a grant is left"
    );
    world.ok(Op::ResealKeys(ResealKeys {
        keys: vec![],
        grants: vec![ResealedGrant {
            slot: slot(),
            id: id(1),
            node: 1,
            replaces: digest(&granted.blob),
            blob: sealed(NEW, 8),
        }],
    }));
    let kept = generation(&world, 1).grants[&Grantee::Node(1)].clone();
    assert_eq!((kept.epoch, kept.blob), (1, sealed(NEW, 8)));
    let row = world.state.replication().unwrap().clone();
    assert_eq!((row.former, row.retired), (None, vec![OLD]));
    // It does not come back, neither in a record nor as the cluster's.
    world.ok(abandon(2));
    assert!(matches!(
        world.refused(prepare_sealed(2, sealed(OLD, 4))),
        Refusal::Conflict(Conflict::ReplicationKey { current: NEW })
    ));
    world.ok(holds(1, &[OLD, NEW]));
    assert!(matches!(
        world.refused(rekey_replication(NEW, OLD)),
        Refusal::Conflict(Conflict::RetiredReplicationKey { id: OLD })
    ));
}

#[test]
fn what_is_granted_to_a_removed_node_keeps_no_key_alive() {
    let mut world = World::new();
    let other = second(&mut world);
    let old = Grant {
        epoch: 1,
        blob: sealed(OLD, 7),
    };
    world.ok(Op::GrantTransportKey(GrantTransportKey {
        slot: slot(),
        id: id(1),
        grantee: Grantee::Node(other),
        grant: old,
    }));
    world.remove(other);
    world.voters.remove(&other);
    world.ok(holds(1, &[OLD, NEW]));
    world.ok(rekey_replication(OLD, NEW));
    world.ok(Op::ResealKeys(ResealKeys::default()));
    assert_eq!(world.state.replication().unwrap().retired, [OLD]);
}
