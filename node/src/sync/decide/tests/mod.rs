//! What a node does next, for every picture that matters: first its transport keys.

mod adopted;
mod keys;
mod rekey;

use super::super::held::Effect;
use super::super::slot_key::SlotKeyContext;
use super::super::slot_key::tests::{signer, trust};
use super::super::testing::{Cluster, ME, check, context, slot, spki, transport_id};
use super::*;
use raft_store::state::node::SlotKey;

/// A token with this node's key and these transport generations.
fn token(node: RaftId, generations: &[u8]) -> Held {
    let transport = generations
        .iter()
        .map(|number| (transport_id(*number), Ok(check(*number))));
    Held {
        node_spki: Some(spki(node)),
        transport: transport.collect(),
        ..Held::default()
    }
}

/// With keys that are proven and loaded for encryption.
fn with_keys(mut held: Held, keys: &[KeyUid]) -> Held {
    for uid in keys {
        held.apply(Effect::Proven(*uid, "label".to_owned()));
        held.apply(Effect::Loaded(*uid, true));
    }
    held
}

fn look(cluster: &Cluster, me: RaftId, held: &Held, change: impl FnOnce(&mut Picture<'_>)) -> Plan {
    let (slot, trust) = (slot(), trust());
    let mut picture = Picture {
        state: &cluster.state,
        me,
        leader: me == ME,
        trust: Some(&trust),
        can_open: true,
        slot: &slot,
        held: None,
    };
    change(&mut picture);
    decide(&Picture {
        held: Some(held),
        ..picture
    })
}

fn plan(cluster: &Cluster, me: RaftId, held: &Held) -> Plan {
    look(cluster, me, held, |_| {})
}

/// A cluster of one with its transport key, granted to it.
fn cluster() -> Cluster {
    let mut cluster = Cluster::founded();
    cluster.registered(ME).transport(&[ME]);
    cluster
}

fn key(name: &str, version: u32) -> VersionKey {
    VersionKey {
        context: context(name),
        version,
    }
}

fn import(name: &str, version: u32) -> Action {
    Action::Import {
        key: key(name, version),
        replace: false,
    }
}

#[test]
fn a_node_names_its_key_before_anything_else() {
    let cluster = Cluster::founded();
    let held = token(ME, &[]);
    assert_eq!(plan(&cluster, ME, &held).actions, [Action::RegisterSlotKey]);
    assert_eq!(
        plan(&cluster, 99, &held),
        Plan::default(),
        "a node the state does not know does nothing"
    );
}

#[test]
fn only_the_leader_with_the_right_replication_key_makes_a_transport_key() {
    let mut cluster = Cluster::founded();
    cluster.registered(ME);
    let held = token(ME, &[]);
    assert_eq!(plan(&cluster, ME, &held).actions, [Action::CreateTransport]);
    assert!(
        look(&cluster, ME, &held, |picture| picture.leader = false)
            .actions
            .is_empty()
    );
    assert!(
        look(&cluster, ME, &held, |picture| picture.can_open = false)
            .actions
            .is_empty()
    );
    assert!(
        plan(&cluster, ME, &token(2, &[])).actions.is_empty(),
        "not with a token it did not register"
    );
}

#[test]
fn a_standalone_node_without_a_cluster_key_does_without_vouching() {
    let cluster = Cluster::founded();
    let plan = look(&cluster, ME, &token(ME, &[]), |picture| picture.trust = None);
    assert_eq!(plan.actions, [Action::CreateTransport]);
}

#[test]
fn a_joiner_takes_its_grant_and_waits_for_one_it_has_not() {
    let mut cluster = cluster();
    let joiner = cluster.join("hsm-node-2");
    let held = token(joiner, &[]);
    assert_eq!(plan(&cluster, joiner, &held).actions, [Action::RegisterSlotKey]);
    cluster.registered(joiner);
    let waiting = plan(&cluster, joiner, &held);
    assert!(waiting.actions.is_empty());
    assert_eq!(waiting.problems, [Problem::NoGrant { id: transport_id(1) }]);
    cluster.grant(1, joiner);
    let accept = Action::AcceptTransport(transport_id(1));
    assert_eq!(plan(&cluster, joiner, &held).actions, [accept]);
    assert!(
        look(&cluster, joiner, &held, |picture| picture.can_open = false)
            .actions
            .is_empty()
    );
    assert_eq!(plan(&cluster, joiner, &token(joiner, &[1])), Plan::default());
}

#[test]
fn a_holder_grants_to_every_node_whose_slot_key_holds_once() {
    let mut cluster = cluster();
    let joiner = cluster.join("hsm-node-2");
    let held = token(ME, &[1]);
    assert_eq!(
        plan(&cluster, ME, &held),
        Plan::default(),
        "no key registered, no grant"
    );
    cluster.registered(joiner);
    let grant = Action::Grant(transport_id(1), joiner);
    assert_eq!(plan(&cluster, ME, &held).actions, std::slice::from_ref(&grant));
    let follower = look(&cluster, ME, &held, |picture| picture.leader = false);
    assert_eq!(follower.actions, [grant], "any holder may");
    assert!(
        look(&cluster, ME, &held, |picture| picture.can_open = false)
            .actions
            .is_empty()
    );
    assert!(
        plan(&cluster, ME, &token(ME, &[]))
            .actions
            .iter()
            .all(|a| !matches!(a, Action::Grant(..)))
    );
    cluster.grant(1, joiner);
    assert_eq!(plan(&cluster, ME, &held), Plan::default());
}

#[test]
fn a_holder_whose_grant_could_not_be_opened_leaves_it_to_another() {
    let mut cluster = cluster();
    let (second, joiner) = (cluster.join("hsm-node-2"), cluster.join("hsm-node-3"));
    cluster.registered(second).registered(joiner);
    cluster.grant(1, second).grant(1, joiner).reject(1, joiner);
    let grant = [Action::Grant(transport_id(1), joiner)];
    // Nobody has written down whose it was.
    assert_eq!(plan(&cluster, ME, &token(ME, &[1])).actions, grant);
    cluster.grant(1, joiner).reject(1, joiner);
    assert!(plan(&cluster, ME, &token(ME, &[1])).actions.is_empty());
    assert_eq!(plan(&cluster, second, &token(second, &[1])).actions, grant);
    let waiting = plan(&cluster, joiner, &token(joiner, &[])).problems;
    assert_eq!(waiting, [Problem::NoGrant { id: transport_id(1) }]);
}

#[test]
fn a_substituted_slot_key_gets_no_grant_and_is_named() {
    let mut cluster = cluster();
    let joiner = cluster.join("hsm-node-2");
    let meta = cluster.state.meta().unwrap().clone();
    let name = slot();
    let signed = signer("hsm-node-2")
        .sign(&SlotKeyContext::new(&meta, joiner, &name), &spki(joiner))
        .unwrap();
    cluster.registered_with(
        joiner,
        SlotKey {
            spki: b"the attacker's".to_vec(),
            ..signed
        },
    );
    let plan = plan(&cluster, ME, &token(ME, &[1]));
    assert!(plan.actions.is_empty());
    let [Problem::BadSlotKey { node, name, .. }] = &plan.problems[..] else {
        panic!("{:?}", plan.problems);
    };
    assert_eq!((*node, name.as_str()), (joiner, "hsm-node-2"));
    assert!(plan.problems[0].is_security());
}

#[test]
fn another_key_under_a_committed_transport_id_is_never_used() {
    let mut cluster = cluster();
    let joiner = cluster.join("hsm-node-2");
    cluster.registered(joiner).context("a");
    cluster.active("a", 1);
    for wrong in [Ok(check(9)), Err("twice".to_owned())] {
        let mut held = token(ME, &[]);
        held.transport.insert(transport_id(1), wrong);
        let plan = plan(&cluster, ME, &held);
        assert!(
            plan.actions.is_empty(),
            "neither import nor grant: {:?}",
            plan.actions
        );
        assert!(matches!(plan.problems[0], Problem::TransportDiffers { .. }));
        assert_eq!(plan.missing, 1);
    }
}

#[test]
fn a_slot_is_warned_of_until_its_transport_key_is_kept_apart_from_the_nodes() {
    let mut cluster = Cluster::founded();
    assert_eq!(warning(&cluster.state, &slot()), None, "no key, nothing to lose");
    cluster.registered(ME).transport(&[ME]);
    let id = transport_id(1);
    assert_eq!(warning(&cluster.state, &slot()), Some(Problem::NoRecovery { id }));
}
