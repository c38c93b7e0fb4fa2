//! What each node does in its token while a transport key is replaced.

use raft_store::command::{
    AckTransportKey, ActivateTransportKey, DestroyTransportKey, OfferTransportKey, Op, RekeyTransport,
};
use raft_store::names::TransportId;
use raft_store::state::slot::{Grant, Grantee, TransportMode};

use super::*;

const NEW: u8 = 2;

/// The leader and a second node, both with the first transport key, and a rekey that is asked for.
fn asked() -> (Cluster, RaftId) {
    let mut cluster = cluster();
    let second = cluster.join("hsm-node-2");
    cluster.registered(second).grant(1, second);
    cluster.run(
        ME,
        Op::RekeyTransport(RekeyTransport {
            slot: slot(),
            expected_generation: 1,
            give_up: None,
        }),
    );
    (cluster, second)
}

/// The same, once the new key is offered to both.
fn offered() -> (Cluster, RaftId) {
    let (mut cluster, second) = asked();
    let grant = || Grant {
        epoch: 1,
        blob: b"sealed".to_vec(),
    };
    cluster.run(
        ME,
        Op::OfferTransportKey(OfferTransportKey {
            slot: slot(),
            id: transport_id(NEW),
            expected_generation: 1,
            mode: TransportMode::Standard,
            check: check(NEW),
            grants: [ME, second].map(|node| (Grantee::Node(node), grant())).into(),
        }),
    );
    (cluster, second)
}

fn acknowledge(cluster: &mut Cluster, node: RaftId, id: TransportId, gone: bool) {
    let op = AckTransportKey {
        node,
        slot: slot(),
        id,
        gone,
    };
    cluster.run(node, Op::AckTransportKey(op));
}

#[test]
fn the_leader_with_the_right_replication_key_makes_what_a_rekey_asks_for() {
    let (cluster, second) = asked();
    let held = token(ME, &[1]);
    assert_eq!(plan(&cluster, ME, &held).actions, [Action::OfferTransport]);
    let blind = look(&cluster, ME, &held, |picture| picture.can_open = false);
    assert!(blind.actions.is_empty());
    assert!(plan(&cluster, second, &token(second, &[1])).actions.is_empty());
    let (made, _) = offered();
    assert!(!plan(&made, ME, &held).actions.contains(&Action::OfferTransport));
}

#[test]
fn an_offered_key_is_taken_then_acknowledged_once() {
    let (mut cluster, second) = offered();
    let id = transport_id(NEW);
    // Who made it takes it as the others do.
    for node in [ME, second] {
        let lacking = plan(&cluster, node, &token(node, &[1]));
        assert_eq!(lacking.actions, [Action::AcceptTransport(id)], "{node}");
        let held = token(node, &[1, NEW]);
        assert_eq!(
            plan(&cluster, node, &held).actions,
            [Action::AckTransport(id)],
            "{node}"
        );
        acknowledge(&mut cluster, node, id, false);
        assert_eq!(plan(&cluster, node, &held), Plan::default(), "{node}");
    }
}

#[test]
fn another_key_under_the_offered_id_is_not_acknowledged() {
    let (cluster, _) = offered();
    let mut held = token(ME, &[1]);
    held.transport.insert(transport_id(NEW), Ok(check(9)));
    let plan = plan(&cluster, ME, &held);
    assert!(plan.actions.is_empty(), "{:?}", plan.actions);
    assert!(matches!(plan.problems[0], Problem::TransportDiffers { .. }));
}

#[test]
fn whoever_was_away_takes_the_new_key_and_acknowledges_it_late() {
    let (mut cluster, second) = offered();
    let id = transport_id(NEW);
    acknowledge(&mut cluster, ME, id, false);
    cluster.run(
        ME,
        Op::ActivateTransportKey(ActivateTransportKey {
            slot: slot(),
            id,
            left_out: [second].into(),
        }),
    );
    let back = plan(&cluster, second, &token(second, &[1]));
    assert_eq!(back.actions, [Action::AcceptTransport(id)]);
    let held = plan(&cluster, second, &token(second, &[1, NEW]));
    assert_eq!(held.actions, [Action::AckTransport(id)]);
}

#[test]
fn an_ended_key_is_removed_before_the_node_is_ready_and_acknowledged_once_it_is_gone() {
    let (mut cluster, second) = offered();
    let (old, new) = (transport_id(1), transport_id(NEW));
    for node in [ME, second] {
        acknowledge(&mut cluster, node, new, false);
    }
    cluster.run(
        ME,
        Op::ActivateTransportKey(ActivateTransportKey {
            slot: slot(),
            id: new,
            left_out: [].into(),
        }),
    );
    let both = token(ME, &[1, NEW]);
    assert_eq!(
        plan(&cluster, ME, &both),
        Plan::default(),
        "superseded, and still of use"
    );
    cluster.run(
        ME,
        Op::DestroyTransportKey(DestroyTransportKey {
            slot: slot(),
            id: old,
        }),
    );
    let holding = plan(&cluster, ME, &both);
    assert_eq!(holding.actions, [Action::RemoveTransport(old)]);
    assert_eq!(holding.destructions, 1);
    let clean = token(ME, &[NEW]);
    assert_eq!(
        plan(&cluster, ME, &clean).actions,
        [Action::AckTransportGone(old)]
    );
    acknowledge(&mut cluster, ME, old, true);
    assert_eq!(plan(&cluster, ME, &clean), Plan::default());
    // An older copy of a token, put back after the end.
    assert_eq!(plan(&cluster, ME, &both).actions, [Action::RemoveTransport(old)]);
    // A joiner is asked too, though nobody waits for it.
    let joiner = plan(&cluster, second, &token(second, &[1, NEW]));
    assert_eq!(joiner.actions, [Action::RemoveTransport(old)]);
}
