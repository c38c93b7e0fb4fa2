//! Nodes: registered, admitted, reporting; and who may speak for one.

use super::moves::{move_to, other, second_slot};
use super::*;

#[test]
fn a_node_speaks_only_for_itself() {
    let mut world = World::new();
    world.ok(prepare(0, 1));
    let ack = Op::AckVersions(AckVersions {
        node: 1,
        versions: vec![(context(), 1, uid(1))],
    });
    assert!(matches!(world.refused_as(2, ack), Refusal::Forbidden(_)));
    assert!(world.state.version(&context(), 1).unwrap().acks.is_empty());
}

#[test]
fn a_join_token_works_once_but_tells_its_node_the_id_again() {
    let mut world = World::new();
    let id = world.join("n2", 2);
    let token = *world.state.join_tokens().iter().next().unwrap().0;
    assert_eq!(
        world.ok(register(token, "n2", 2)),
        Done::Registered { raft_id: id }
    );
    assert!(matches!(
        world.refused(register(token, "n3", 3)),
        Refusal::Forbidden(_)
    ));
    assert!(
        matches!(world.refused(register(token, "n2", 7)), Refusal::Exists(_)),
        "a wiped node is another node"
    );
    assert!(matches!(
        world.refused(register(token + 100, "n4", 4)),
        Refusal::Forbidden(_)
    ));
}

#[test]
fn a_node_that_never_heard_its_id_learns_it_with_a_new_token_too() {
    let mut world = World::new();
    let id = world.join("n2", 2);
    assert_eq!(world.join("n2", 2), id, "the same filling asks again");
    assert_eq!(world.state.nodes().len(), 2);
}

#[test]
fn an_expired_token_is_refused_by_the_proposers_clock() {
    let mut world = World::new();
    let expires_at = world.index as i64 * 1000 + 1;
    let Done::JoinToken { number } = world.ok(Op::CreateJoinToken(CreateJoinToken {
        secret_hash: [5; 32],
        expires_at,
        node: None,
    })) else {
        panic!()
    };
    assert!(matches!(
        world.refused(register(number, "n2", 2)),
        Refusal::Forbidden(_)
    ));
}

#[test]
fn a_join_that_is_repeated_with_another_address_corrects_it_until_the_node_is_a_member() {
    let mut world = World::new();
    let id = world.join("n2", 2);
    let at = |token, address: &str| {
        let Op::RegisterNode(register) = register(token, "n2", 2) else {
            panic!()
        };
        Op::RegisterNode(RegisterNode {
            api_address: format!("api.{address}"),
            cluster_address: address.into(),
            ..register
        })
    };
    let kept = |world: &World| {
        let node = world.state.nodes().get(&id).unwrap();
        (node.api_address.clone(), node.cluster_address.clone())
    };
    let token = world.token();
    world.slot_key(id, slot());
    world.ok(at(token, "right:1"));
    assert_eq!(kept(&world), ("api.right:1".into(), "right:1".into()));
    world.ok_as(
        id,
        Op::ReportNode(ReportNode {
            node: id,
            report: report(1, 2),
        }),
    );
    world.ok(Op::AdmitNode(AdmitNode { node: id }));
    world.ok(at(token, "other:1"));
    assert_eq!(kept(&world).1, "right:1", "others reach a member where it was");
}

fn admit(node: RaftId) -> Op {
    Op::AdmitNode(AdmitNode { node })
}

#[test]
fn a_learner_is_admitted_only_once_it_has_proven_every_key() {
    let mut world = World::new();
    let id = world.join("n2", 2);
    world.slot_key(id, slot());
    assert!(matches!(world.refused(admit(id)), Refusal::Conflict(_)));
    world.ok_as(
        id,
        Op::ReportNode(ReportNode {
            node: id,
            report: report(1, 2),
        }),
    );
    world.ok(prepare(0, 1));
    assert!(
        matches!(world.refused(admit(id)), Refusal::Conflict(_)),
        "a version it has not acknowledged is pending"
    );
    world.ack(id, 1);
    world.ok(admit(id));
}

/// Its report is from before the context moved, and the slot is not in its configuration.
#[test]
fn a_learner_without_a_key_for_a_slot_that_is_needed_is_not_admitted() {
    let mut world = World::new();
    let id = world.join("n2", 2);
    world.slot_key(id, slot());
    let report = report(1, 2);
    world.ok_as(id, Op::ReportNode(ReportNode { node: id, report }));
    second_slot(&mut world);
    world.ok(move_to(slot(), other()));
    let before = world.rows();
    match world.refused(admit(id)) {
        Refusal::Conflict(Conflict::NoSlotKey { node, slot }) => {
            assert_eq!((node.as_str(), slot), ("n2", other()));
        }
        refusal => panic!("{refusal}"),
    }
    assert_eq!(world.rows(), before);
    world.slot_key(id, other());
    world.ok(admit(id));
}

/// Its report says that it held every key there was: a version that was made and activated since is not in it.
#[test]
fn a_version_made_and_activated_after_a_learners_report_has_to_be_acknowledged_first() {
    let mut world = World::new();
    world.ok(prepare(0, 1));
    world.ack(1, 1);
    world.ok(activate(1, &[]));
    let id = world.join("n2", 2);
    world.slot_key(id, slot());
    world.ok_as(
        id,
        Op::ReportNode(ReportNode {
            node: id,
            report: report(1, 2),
        }),
    );
    world.ack(id, 1);
    world.ok(prepare(1, 2));
    world.ack(1, 2);
    world.ok(activate(2, &[]));
    let refused = world.refused(admit(id));
    assert!(matches!(
        refused,
        Refusal::Conflict(Conflict::NotAcknowledged { version: 2, .. })
    ));
    world.ack(id, 2);
    world.ok(admit(id));
}

/// A learner takes over what is active and what is retired, not only what is being prepared.
#[test]
fn a_learner_acknowledges_active_and_retired_versions_and_has_to() {
    let mut world = World::new();
    for version in [1, 2] {
        world.ok(prepare(version - 1, version));
        world.ack(1, version);
        world.ok(activate(version, &[]));
    }
    let id = world.join("n2", 2);
    world.slot_key(id, slot());
    world.ok_as(
        id,
        Op::ReportNode(ReportNode {
            node: id,
            report: report(1, 2),
        }),
    );
    for (version, state) in [(1, VersionState::DecryptOnly), (2, VersionState::Active)] {
        assert_eq!(world.version_state(version), state);
        assert!(matches!(world.refused(admit(id)), Refusal::Conflict(_)));
        world.ack(id, version);
        assert!(
            world
                .state
                .version(&context(), version)
                .unwrap()
                .acks
                .contains(&id)
        );
    }
    world.ok(admit(id));
}

#[test]
fn older_reports_are_ignored_and_other_incarnations_refused() {
    let mut world = World::new();
    let send = |seq, filling| {
        let report = report(seq, filling);
        Op::ReportNode(ReportNode { node: 1, report })
    };
    world.ok(send(2, 1));
    world.ok(send(1, 1));
    assert_eq!(world.state.reports().get(&1).unwrap().seq, 2);
    assert!(matches!(world.refused(send(3, 9)), Refusal::Forbidden(_)));
}

#[test]
fn what_a_node_once_had_no_later_report_takes_back() {
    let mut world = World::new();
    for (seq, durable_index) in [(1, 100), (2, 7)] {
        let report = NodeReport {
            durable_index,
            ..report(seq, 1)
        };
        world.ok(Op::ReportNode(ReportNode { node: 1, report }));
    }
    let kept = world.state.reports().get(&1).unwrap();
    assert_eq!((kept.seq, kept.durable_index), (2, 100));
}

#[test]
fn a_removed_node_acknowledges_and_reports_nothing() {
    let mut world = World::new();
    let id = world.join("n2", 2);
    world.ok(prepare(0, 1));
    world.remove(id);
    let ack = Op::AckVersions(AckVersions {
        node: id,
        versions: vec![(context(), 1, uid(1))],
    });
    let report = Op::ReportNode(ReportNode {
        node: id,
        report: report(1, 2),
    });
    for op in [ack, report] {
        let refused = world.refused_as(id, op);
        assert!(matches!(refused, Refusal::Forbidden(Forbidden::Removed { .. })));
    }
    assert!(world.state.version(&context(), 1).unwrap().acks.is_empty());
}
