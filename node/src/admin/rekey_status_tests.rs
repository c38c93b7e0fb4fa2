//! What every node says of a replacement of keys, step by step, and of what removed nodes know.

use raft_store::command::{
    AckTransportKey, ActivateTransportKey, BuryNode, DestroyTransportKey, OfferTransportKey, Op,
    RekeyTransport, RemoveNode, ReportReplicationKeys, ResealKeys,
};
use raft_store::names::TransportId;
use raft_store::state::slot::TransportMode;

use super::*;
use crate::rotation::testing::{World, slot};

const NEW: TransportId = TransportId([2; 16]);
const OLD: TransportId = TransportId([1; 16]);

fn of(world: &World) -> SlotRekey {
    let mut slots = status(&world.state).slots;
    assert_eq!(slots.len(), 1);
    slots.remove(0)
}

fn ack(world: &mut World, node: RaftId, id: TransportId, gone: bool) {
    let slot = slot("s");
    let op = AckTransportKey { node, slot, id, gone };
    world.ok_as(node, Op::AckTransportKey(op));
}

#[test]
fn each_phase_of_a_rekey_says_whom_it_waits_for() {
    let mut world = World::new(2);
    let first = world.prepare("c");
    world.activate("c", first);
    let voters: Vec<RaftId> = world.voters.iter().copied().collect();
    for voter in &voters {
        world.slot_keys(*voter);
    }
    let settled = of(&world);
    assert_eq!(settled.phase, RekeyPhase::Settled);
    assert!(settled.transport_keys[0].waiting_for.is_empty());
    world.ok(Op::RekeyTransport(RekeyTransport {
        slot: slot("s"),
        expected_generation: 1,
        give_up: None,
    }));
    assert_eq!(of(&world).phase, RekeyPhase::Making);
    world.ok(Op::OfferTransportKey(OfferTransportKey {
        slot: slot("s"),
        id: NEW,
        expected_generation: 1,
        mode: TransportMode::Standard,
        check: vec![2; 40],
        grants: [].into(),
    }));
    ack(&mut world, voters[0], NEW, false);
    let granting = of(&world);
    assert_eq!(granting.phase, RekeyPhase::Granting);
    assert_eq!(granting.transport_keys[1].waiting_for.len(), 1);
    assert!(granting.next.contains(&granting.transport_keys[1].waiting_for[0]));
    ack(&mut world, voters[1], NEW, false);
    world.ok(Op::ActivateTransportKey(ActivateTransportKey {
        slot: slot("s"),
        id: NEW,
        left_out: [].into(),
    }));
    let rotating = of(&world);
    assert_eq!(rotating.phase, RekeyPhase::Rotating);
    assert_eq!(rotating.contexts_to_rotate, ["c"]);
    let second = world.prepare_under("c", 2);
    assert_eq!(
        of(&world).phase,
        RekeyPhase::Rotating,
        "the old one still encrypts"
    );
    world.activate("c", second);
    let waiting = of(&world);
    assert_eq!(waiting.phase, RekeyPhase::Waiting);
    assert_eq!(waiting.transport_keys[0].versions, 1);
    assert!(waiting.next.contains("key destroy"), "{}", waiting.next);
    world.schedule_destroy("c", 1, 1000);
    world.begin_destroy("c", 1);
    world.ok(Op::DestroyTransportKey(DestroyTransportKey {
        slot: slot("s"),
        id: OLD,
    }));
    ack(&mut world, voters[0], OLD, true);
    let destroying = of(&world);
    assert_eq!(destroying.phase, RekeyPhase::Destroying);
    assert_eq!(destroying.transport_keys[0].waiting_for.len(), 1);
    ack(&mut world, voters[1], OLD, true);
    assert_eq!(of(&world).phase, RekeyPhase::Settled);
    assert_eq!(of(&world).transport_keys[0].state, TransportKeyState::Destroyed);
}

/// A voter leaves for good.
fn remove(world: &mut World, node: RaftId) {
    world.ok(Op::RemoveNode(RemoveNode {
        node,
        successor: None,
        lose_keys: false,
    }));
    world.voters.remove(&node);
    world.ok(Op::BuryNode(BuryNode { node }));
}

#[test]
fn what_a_removed_node_knows_is_said_until_it_is_replaced() {
    let mut world = World::new(3);
    let first = world.prepare("c");
    world.activate("c", first);
    assert!(of(&world).known_to_removed.is_empty());
    assert_eq!(known_to_removed(&world.state), KnownToRemoved::default());
    let voters: Vec<RaftId> = world.voters.iter().copied().collect();
    remove(&mut world, voters[2]);
    let gone = format!("n{}", voters[2]);
    let slot_of = of(&world);
    assert_eq!(slot_of.phase, RekeyPhase::Settled);
    assert_eq!(slot_of.known_to_removed, std::slice::from_ref(&gone));
    assert!(
        slot_of.next.contains(&gone) && slot_of.next.contains("hsmctl cluster rekey transport --slot s"),
        "{}",
        slot_of.next
    );
    let replication = status(&world.state).replication;
    assert_eq!(replication.known_to_removed, std::slice::from_ref(&gone));
    assert!(
        replication.next.contains(&gone) && replication.next.contains("hsmctl cluster rekey replication"),
        "{}",
        replication.next
    );

    let known = |world: &World| {
        let known = known_to_removed(&world.state);
        (known.versions, known.transport_keys, known.replication_key)
    };
    assert_eq!(known(&world), (1, 1, true));

    // The next transport key it never had.
    for voter in &voters[..2] {
        world.slot_keys(*voter);
    }
    world.ok(Op::RekeyTransport(RekeyTransport {
        slot: slot("s"),
        expected_generation: 1,
        give_up: None,
    }));
    world.ok(Op::OfferTransportKey(OfferTransportKey {
        slot: slot("s"),
        id: NEW,
        expected_generation: 1,
        mode: TransportMode::Standard,
        check: vec![2; 40],
        grants: [].into(),
    }));
    assert!(of(&world).next.contains("every member has to take"), "first that");
    for voter in &voters[..2] {
        ack(&mut world, *voter, NEW, false);
    }
    world.ok(Op::ActivateTransportKey(ActivateTransportKey {
        slot: slot("s"),
        id: NEW,
        left_out: [].into(),
    }));
    assert!(of(&world).known_to_removed.is_empty());
    assert_eq!(known(&world), (1, 0, true));
    let second = world.prepare_under("c", 2);
    world.activate("c", second);
    assert_eq!(known(&world), (0, 0, true));
    assert!(of(&world).next.contains("key destroy"), "{}", of(&world).next);

    // Nor the next replication key, unless it has said that it has it.
    world.rekey_replication([9; 8]);
    world.ok(Op::ResealKeys(ResealKeys::default()));
    assert!(status(&world.state).replication.known_to_removed.is_empty());
    assert_eq!(known(&world), (0, 0, false));
}

/// As when the old key is taken out of the others' configuration, one by one.
#[test]
fn a_removed_node_that_had_the_next_replication_key_too_is_named_whatever_others_report() {
    let mut world = World::new(3);
    let old = world.state.meta().unwrap().trk_id;
    let (new, newest) = ([9; 8], [8; 8]);
    world.hold_replication_keys(&[old, new]);
    let voters: Vec<RaftId> = world.voters.iter().copied().collect();
    remove(&mut world, voters[2]);
    let gone = format!("n{}", voters[2]);
    let report = |world: &mut World, held: &[[u8; 8]]| {
        for node in &voters[..2] {
            let (node, held) = (*node, held.iter().copied().collect());
            world.ok_as(
                node,
                Op::ReportReplicationKeys(ReportReplicationKeys { node, held }),
            );
        }
    };
    let warned = status(&world.state).replication;
    assert!(
        warned.next_key.is_none() && warned.next.contains(&gone),
        "{warned:?}"
    );
    let named = |world: &World| status(&world.state).replication.known_to_removed;
    for next in [new, newest] {
        let replace = |world: &mut World| {
            world.rekey_replication(next);
            world.ok(Op::ResealKeys(ResealKeys::default()));
            report(world, &[next]);
        };
        replace(&mut world);
        let knows = next == new;
        assert_eq!(named(&world), if knows { vec![gone.clone()] } else { vec![] });
        report(&mut world, &[next, newest]);
        let next_key = status(&world.state).replication.next_key;
        assert_eq!(next_key, knows.then(|| hex::encode(newest)));
    }
    assert_eq!(world.state.replication().unwrap().held.get(&voters[2]), None);
}

#[test]
fn each_step_of_another_replication_key_says_what_to_do_next() {
    let mut world = World::new(2);
    let old = world.state.meta().unwrap().trk_id;
    let new = [9; 8];
    let next = |world: &World| status(&world.state).replication.next;
    assert_eq!(next(&world), "nothing to do");
    let held = [old, new].into();
    world.ok(Op::ReportReplicationKeys(ReportReplicationKeys { node: 1, held }));
    let lacking = next(&world);
    assert!(
        lacking.contains("give the new key") && !lacking.contains("n1"),
        "{lacking}"
    );
    let next_key = |world: &World| status(&world.state).replication.next_key;
    assert_eq!(next_key(&world), None);
    world.hold_replication_keys(&[old, new]);
    assert_eq!(next_key(&world), Some(hex::encode(new)));
    assert!(next(&world).contains("hsmctl cluster rekey replication"));
    world.rekey_replication(new);
    let open = status(&world.state).replication;
    // Neither what is on its way nor, later, what is on its way out.
    assert_eq!(open.next_key, None);
    assert_eq!(open.former, Some(hex::encode(old)));
    assert!(open.next.contains("keeps both"), "{}", open.next);
    world.ok(Op::ResealKeys(ResealKeys::default()));
    let done = next(&world);
    assert!(
        done.contains("take the old one out") && done.contains("n1"),
        "{done}"
    );
    world.hold_replication_keys(&[new]);
    assert_eq!(next(&world), "nothing to do");
}
