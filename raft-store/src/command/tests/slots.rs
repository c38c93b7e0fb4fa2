//! Slot keys, transport keys and their grants.

use super::*;

fn key(spki: u8, epoch: u64, signature: u8) -> SlotKey {
    SlotKey {
        spki: vec![spki],
        epoch,
        signature: vec![signature],
        signer_chain: vec![],
    }
}

fn register_key(node: RaftId, key: SlotKey) -> Op {
    Op::RegisterSlotKey(RegisterSlotKey {
        node,
        slot: slot(),
        key,
    })
}

fn grant_to(grantee: Grantee, grant: Grant) -> Op {
    Op::GrantTransportKey(GrantTransportKey {
        slot: slot(),
        id: TransportId([2; 16]),
        grantee,
        grant,
    })
}

/// A world whose second transport key is granted to node 1, and a joiner with a slot key.
fn granting() -> (World, RaftId) {
    let mut world = World::new();
    let joiner = world.join("n2", 2);
    world.ok(Op::AddTransportKey(AddTransportKey {
        slot: slot(),
        id: TransportId([2; 16]),
        expected_generation: 1,
        mode: TransportMode::Standard,
        check: vec![2; 40],
        grants: BTreeMap::from([(Grantee::Node(1), grant(1))]),
    }));
    world.ok_as(joiner, register_key(joiner, key(1, 1, 1)));
    (world, joiner)
}

fn granted(world: &World, node: RaftId) -> Option<Grant> {
    let slots = world.state.slots();
    let transport = slots.get(&slot()).unwrap().current_transport().unwrap();
    transport.grants.get(&Grantee::Node(node)).cloned()
}

#[test]
fn a_slot_key_is_registered_once_per_raft_id() {
    let mut world = World::new();
    world.ok(register_key(1, key(1, 1, 1)));
    world.ok(register_key(1, key(1, 1, 1)));
    assert!(
        matches!(
            world.refused(register_key(1, key(2, 1, 1))),
            Refusal::Conflict(Conflict::OtherSlotKey { .. })
        ),
        "a substituted key"
    );
}

#[test]
fn a_newer_signature_of_the_same_slot_key_is_taken_and_an_older_one_is_not() {
    let mut world = World::new();
    let kept = |world: &World| {
        let node = world.state.nodes().get(&1).unwrap();
        let key = node.slot_keys.get(&slot()).unwrap();
        (key.epoch, key.signature[0])
    };
    world.ok(register_key(1, key(1, 1, 1)));
    world.ok(register_key(1, key(1, 1, 2)));
    assert_eq!(kept(&world), (1, 2), "by another certificate");
    let later = world.refused(register_key(1, key(1, 2, 3)));
    assert!(matches!(
        later,
        Refusal::Invalid(Invalid::Epoch { epoch: 2, current: 1 })
    ));
    let meta = world.state.meta().unwrap().clone();
    let raised = crate::state::ClusterMeta { epoch: 2, ..meta };
    world.state.meta.put((), raised).unwrap();
    world.ok(register_key(1, key(1, 2, 3)));
    world.ok(register_key(1, key(1, 1, 4)));
    assert_eq!(kept(&world), (2, 3), "what was long under way takes nothing back");
}

#[test]
fn only_a_node_that_was_granted_a_transport_key_grants_it() {
    let (mut world, joiner) = granting();
    let to_joiner = |blob| grant_to(Grantee::Node(joiner), grant(blob));
    let forged = world.refused_as(joiner, to_joiner(9));
    assert!(matches!(forged, Refusal::Forbidden(Forbidden::Grantor { .. })));
    assert_eq!(granted(&world, joiner), None);
    world.ok(to_joiner(1));
    world.ok(to_joiner(2));
    assert_eq!(granted(&world, joiner), Some(grant(1)), "the first one stands");
}

fn reject(node: RaftId, grant: Grant) -> Op {
    Op::RejectGrant(RejectGrant {
        node,
        slot: slot(),
        id: TransportId([2; 16]),
        grant,
    })
}

/// As [`granting`], with a third node that holds the key too.
fn two_holders() -> (World, RaftId, RaftId) {
    let (mut world, joiner) = granting();
    let other = world.join("n3", 3);
    world.ok_as(other, register_key(other, key(3, 1, 1)));
    world.ok(grant_to(Grantee::Node(other), grant(3)));
    (world, joiner, other)
}

#[test]
fn a_grant_that_cannot_be_opened_makes_room_for_another_holders() {
    let (mut world, joiner, other) = two_holders();
    let to_joiner = |blob| grant_to(Grantee::Node(joiner), grant(blob));
    world.ok(to_joiner(9));
    world.ok_as(joiner, reject(joiner, grant(9)));
    assert_eq!(granted(&world, joiner), None);
    // Whose the first was nobody has written down; the second one is.
    world.ok(to_joiner(8));
    world.ok_as(joiner, reject(joiner, grant(8)));
    assert_eq!(granted(&world, joiner), None);
    let again = world.refused(to_joiner(7));
    assert!(matches!(
        again,
        Refusal::Forbidden(Forbidden::RejectedGrantor { .. })
    ));
    world.ok_as(other, to_joiner(1));
    assert_eq!(granted(&world, joiner), Some(grant(1)));
    // That one is the last that could: what it sends stays, whatever is said of it.
    let refused = world.refused_as(joiner, reject(joiner, grant(1)));
    assert!(matches!(
        refused,
        Refusal::Conflict(Conflict::NoOtherGranter { .. })
    ));
    assert_eq!(granted(&world, joiner), Some(grant(1)));
    // To everybody else the first holder grants as before.
    let fourth = world.join("n4", 4);
    world.ok_as(fourth, register_key(fourth, key(4, 1, 1)));
    world.ok(grant_to(Grantee::Node(fourth), grant(4)));
}

#[test]
fn a_node_rejects_its_own_grant_and_only_the_one_it_names() {
    let (mut world, joiner, other) = two_holders();
    world.ok(grant_to(Grantee::Node(joiner), grant(1)));
    let before = world.rows();
    let foreign = world.refused_as(other, reject(joiner, grant(1)));
    assert!(matches!(foreign, Refusal::Forbidden(Forbidden::NotItself { .. })));
    // What was long under way, or is said of a key that was never granted, changes nothing.
    world.ok_as(joiner, reject(joiner, grant(9)));
    assert_eq!(world.rows(), before);
}

#[test]
fn the_only_holder_keeps_its_grant() {
    let (mut world, _) = granting();
    let refused = world.refused(reject(1, grant(1)));
    assert!(matches!(
        refused,
        Refusal::Conflict(Conflict::NoOtherGranter { .. })
    ));
    assert_eq!(granted(&world, 1), Some(grant(1)));
}

#[test]
fn a_removed_node_is_no_other_holder() {
    let (mut world, joiner, other) = two_holders();
    world.ok(grant_to(Grantee::Node(joiner), grant(9)));
    world.remove(other);
    world.remove(1);
    let refused = world.refused_as(joiner, reject(joiner, grant(9)));
    assert!(matches!(
        refused,
        Refusal::Conflict(Conflict::NoOtherGranter { .. })
    ));
}

#[test]
fn a_node_grants_a_transport_key_to_nodes_only() {
    let (mut world, _) = granting();
    let before = world.rows();
    for grantee in [Grantee::Recovery("r".into()), Grantee::Backup("b".into())] {
        let refused = world.refused(grant_to(grantee.clone(), grant(1)));
        assert!(matches!(refused, Refusal::Forbidden(Forbidden::Grantee { .. })));
        let first = AddTransportKey {
            slot: slot(),
            id: TransportId([3; 16]),
            expected_generation: 2,
            mode: TransportMode::Standard,
            check: vec![],
            grants: BTreeMap::from([(grantee, grant(1))]),
        };
        let refused = world.refused(Op::AddTransportKey(first));
        assert!(matches!(refused, Refusal::Forbidden(Forbidden::Grantee { .. })));
    }
    assert_eq!(world.rows(), before);
}

#[test]
fn a_grant_names_no_epoch_that_is_yet_to_come() {
    let (mut world, joiner) = granting();
    let later = Grant { epoch: 2, ..grant(1) };
    let refused = world.refused(grant_to(Grantee::Node(joiner), later));
    assert!(matches!(refused, Refusal::Invalid(Invalid::Epoch { .. })));
}

#[test]
fn a_removed_node_grants_nothing_is_granted_nothing_and_names_no_key() {
    let (mut world, joiner) = granting();
    let is_removed = |refusal| matches!(refusal, Refusal::Forbidden(Forbidden::Removed { .. }));
    world.ok(grant_to(Grantee::Node(joiner), grant(1)));
    let third = world.join("n3", 3);
    world.ok_as(third, register_key(third, key(3, 1, 1)));
    world.remove(joiner);
    assert!(is_removed(
        world.refused_as(joiner, grant_to(Grantee::Node(third), grant(1)))
    ));
    assert!(is_removed(
        world.refused_as(joiner, register_key(joiner, key(1, 1, 2)))
    ));
    world.remove(third);
    assert!(is_removed(
        world.refused(grant_to(Grantee::Node(third), grant(1)))
    ));
}

#[test]
fn keys_are_prepared_only_under_the_current_transport_key() {
    let mut world = World::new();
    world.ok(transport(2, 1));
    assert!(matches!(world.refused(transport(3, 1)), Refusal::Conflict(_)));
    assert!(
        matches!(world.refused(prepare(0, 1)), Refusal::Conflict(_)),
        "generation 1 is superseded"
    );
}
