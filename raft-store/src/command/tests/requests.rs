//! The window of remembered requests.

use super::*;
use crate::state::requests::{CLIENTS, NODES};

#[test]
fn a_repeat_gets_the_stored_answer_and_changes_nothing() {
    let mut world = World::new();
    let command = world.command(prepare(0, 1), Origin::Node(1));
    let first = world.send(&command);
    let again = world.send(&command);
    assert_eq!(first, again);
    assert_eq!(world.state.contexts().get(&context()).unwrap().highest_version, 1);
    let other = Command {
        body_hash: [9; 32],
        ..command
    };
    assert_eq!(world.send(&other), Outcome::Refused(Refusal::KeyReused));
}

fn nothing_much() -> Op {
    Op::AddRevocations(AddRevocations { revocations: vec![] })
}

#[test]
fn the_window_is_bounded_and_what_left_it_is_still_recognised() {
    let mut world = World::new();
    let first = world.command(nothing_much(), Origin::Node(1));
    world.send(&first);
    for _ in 0..NODES.answers {
        world.ok(nothing_much());
    }
    assert_eq!(world.send(&first), Outcome::Refused(Refusal::KeyExpired));
    for _ in 0..NODES.recognised {
        world.ok(nothing_much());
    }
    assert_eq!(world.state.requests().len(), NODES.recognised);
    assert_eq!(world.send(&first), Outcome::Done(Done::Ok), "long forgotten");
}

#[test]
fn the_nodes_own_steps_push_no_clients_answer_out() {
    let mut world = World::new();
    let client = Command {
        id: RequestId::Client {
            principal: [1; 32],
            operation: "revoke".into(),
            key: "k".into(),
        },
        ..world.command(nothing_much(), Origin::Node(1))
    };
    let answer = world.send(&client);
    for _ in 0..NODES.recognised + CLIENTS.answers {
        world.ok(nothing_much());
    }
    assert_eq!(world.send(&client), answer);
    let other = Command {
        body_hash: [7; 32],
        ..client
    };
    assert_eq!(world.send(&other), Outcome::Refused(Refusal::KeyReused));
}
