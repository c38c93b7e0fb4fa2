//! What a node does next with the keys of its contexts.

use super::super::super::held::Foreign;
use super::super::super::testing::uid;
use super::*;

#[test]
fn a_version_is_imported_proven_loaded_and_only_then_acknowledged() {
    let mut cluster = cluster();
    cluster.context("a");
    let first = cluster.pending("a", 1);
    let mut held = token(ME, &[1]);
    assert_eq!(plan(&cluster, ME, &held).actions, [import("a", 1)]);
    held.keks.insert(first, HeldKek::default());
    assert_eq!(plan(&cluster, ME, &held).actions, [Action::Prove(key("a", 1))]);
    held.apply(Effect::Proven(first, "label".to_owned()));
    assert_eq!(plan(&cluster, ME, &held).actions, [Action::Load(first, true)]);
    held.apply(Effect::Loaded(first, true));
    assert_eq!(
        plan(&cluster, ME, &held).actions,
        [Action::Ack(vec![(context("a"), 1, first)])]
    );
    cluster.ack(ME, "a", 1);
    assert_eq!(plan(&cluster, ME, &held), Plan::default());
}

#[test]
fn activation_takes_no_step_and_the_retired_version_loses_encryption() {
    let mut cluster = cluster();
    cluster.context("a");
    let first = cluster.active("a", 1);
    let second = cluster.pending("a", 2);
    cluster.ack(ME, "a", 2);
    let mut held = with_keys(token(ME, &[1]), &[first, second]);
    assert_eq!(plan(&cluster, ME, &held), Plan::default());
    cluster.activate("a", 2);
    let retired = plan(&cluster, ME, &held);
    assert_eq!(
        (retired.actions, retired.missing),
        (vec![Action::Retire(first)], 0)
    );
    held.apply(Effect::Loaded(first, false));
    assert_eq!(plan(&cluster, ME, &held), Plan::default());
    held.apply(Effect::Unloaded(first));
    assert_eq!(plan(&cluster, ME, &held).actions, [Action::Load(first, false)]);
}

#[test]
fn an_abandoned_versions_object_is_destroyed_and_an_unknown_one_is_only_reported() {
    let mut cluster = cluster();
    cluster.context("a");
    let first = cluster.pending("a", 1);
    cluster.abandon("a", 1);
    let mut held = with_keys(token(ME, &[1, 7]), &[first]);
    held.keks.insert(KeyUid([0xEE; 16]), HeldKek::default());
    held.foreign.push(Foreign {
        label: "their certificate".to_owned(),
        what: "\"their certificate\"".to_owned(),
    });
    let planned = plan(&cluster, ME, &held);
    assert_eq!(
        (&planned.actions[..], planned.destructions),
        (&[Action::Remove(first)][..], 1)
    );
    assert_eq!(planned.problems.len(), 3);
    assert!(
        planned
            .problems
            .iter()
            .all(|problem| matches!(problem, Problem::Unknown { .. }))
    );
    held.apply(Effect::Gone(vec![first]));
    assert!(plan(&cluster, ME, &held).actions.is_empty());
}

fn gone(name: &str, version: u32, uid: KeyUid) -> Action {
    Action::AckDestroyed(vec![(context(name), version, uid)])
}

/// Otherwise every node would be short of a key at the moment at which it is enabled.
#[test]
fn a_version_out_of_use_stays_at_hand_so_that_enabling_it_takes_no_step() {
    let mut cluster = cluster();
    cluster.context("a");
    let first = cluster.active("a", 1);
    let second = cluster.active("a", 2);
    let mut held = with_keys(token(ME, &[1]), &[first, second]);
    held.apply(Effect::Loaded(first, false));
    for scheduled in [false, true] {
        if scheduled {
            cluster.schedule_destroy("a", 1);
        } else {
            cluster.set_use("a", 1, VersionState::Disabled);
        }
        assert_eq!(plan(&cluster, ME, &held), Plan::default());
        // A node that has started meanwhile proves and loads it too, after all others.
        let mut started = with_keys(token(ME, &[1]), &[second]);
        started.keks.insert(first, HeldKek::default());
        assert_eq!(plan(&cluster, ME, &started).actions, [Action::Prove(key("a", 1))]);
        started.apply(Effect::Proven(first, "label".to_owned()));
        assert_eq!(plan(&cluster, ME, &started).actions, [Action::Load(first, false)]);
        started.apply(Effect::Unusable(first, "torn".to_owned()));
        assert_eq!(
            plan(&cluster, ME, &started),
            Plan::default(),
            "nobody needs it now"
        );
        // Nor is it imported where it is not.
        assert_eq!(
            plan(&cluster, ME, &with_keys(token(ME, &[1]), &[second])),
            Plan::default()
        );
        if !scheduled {
            cluster.set_use("a", 1, VersionState::DecryptOnly);
            assert_eq!(plan(&cluster, ME, &held), Plan::default());
        }
    }
}

#[test]
fn a_destroyed_key_is_removed_and_only_then_acknowledged() {
    let mut cluster = cluster();
    cluster.context("a");
    let first = cluster.active("a", 1);
    let second = cluster.active("a", 2);
    cluster.schedule_destroy("a", 1).begin_destroy("a", 1);
    let mut held = with_keys(token(ME, &[1]), &[first, second]);
    let removes = plan(&cluster, ME, &held);
    assert_eq!(
        (removes.actions, removes.destructions, removes.missing),
        (vec![Action::Remove(first)], 1, 0)
    );
    held.apply(Effect::Gone(vec![first]));
    let acknowledges = plan(&cluster, ME, &held);
    assert_eq!(
        (acknowledges.actions, acknowledges.destructions),
        (vec![gone("a", 1, first)], 0)
    );
    cluster.ack_destroyed(ME, "a", 1);
    assert_eq!(plan(&cluster, ME, &held), Plan::default());
    // Whoever brings the token back as it was.
    let back = with_keys(token(ME, &[1]), &[first, second]);
    assert_eq!(plan(&cluster, ME, &back).actions, [Action::Remove(first)]);
}

#[test]
fn a_joiner_acknowledges_too_whatever_was_in_its_token_before() {
    let mut cluster = cluster();
    cluster.context("a");
    let first = cluster.active("a", 1);
    cluster.active("a", 2);
    cluster.schedule_destroy("a", 1).begin_destroy("a", 1);
    cluster.ack_destroyed(ME, "a", 1);
    let joiner = cluster.join("hsm-node-2");
    cluster.registered(joiner).grant(1, joiner);
    // Of what was over before it came there is the tombstone.
    let before = with_keys(token(joiner, &[1]), &[first]);
    let removes = plan(&cluster, joiner, &before);
    assert!(
        removes.actions.contains(&Action::Remove(first)) && removes.destructions == 1,
        "{:?}",
        removes.actions
    );

    let third = cluster.active("a", 3);
    // It held this one, and owes its destruction: one that never did is in nobody's way.
    cluster.ack(joiner, "a", 2);
    cluster.ack(joiner, "a", 3);
    let second = uid("a", 2);
    cluster.schedule_destroy("a", 2).begin_destroy("a", 2);
    cluster.ack_destroyed(ME, "a", 2);
    let fresh = with_keys(token(joiner, &[1]), &[third]);
    assert_eq!(plan(&cluster, joiner, &fresh).actions, [gone("a", 2, second)]);
}

#[test]
fn nothing_is_acknowledged_about_a_token_that_cannot_be_asked() {
    let mut cluster = cluster();
    cluster.context("a");
    cluster.active("a", 1);
    cluster.active("a", 2);
    cluster.schedule_destroy("a", 1).begin_destroy("a", 1);
    let (name, trust) = (slot(), trust());
    let unasked = decide(&Picture {
        state: &cluster.state,
        me: ME,
        leader: true,
        trust: Some(&trust),
        can_open: true,
        slot: &name,
        held: None,
    });
    assert!(unasked.actions.is_empty(), "{:?}", unasked.actions);
    // Nor about one that is not the slot's.
    assert!(plan(&cluster, ME, &token(77, &[])).actions.is_empty());
}

#[test]
fn copies_of_an_unknown_key_are_given_up_and_its_object_stays() {
    let stranger = KeyUid([0xEE; 16]);
    let plan = plan(&cluster(), ME, &with_keys(token(ME, &[1]), &[stranger]));
    assert_eq!(
        (plan.actions, plan.destructions),
        (vec![Action::Unload(stranger)], 0)
    );
}

#[test]
fn a_quarantined_key_is_replaced_if_it_can_come_back_and_else_stays_out_of_use() {
    let mut cluster = cluster();
    cluster.context("a");
    let first = cluster.active("a", 1);
    let mut held = with_keys(token(ME, &[1]), &[first]);
    held.apply(Effect::Unusable(first, "two objects".to_owned()));
    let replaced = plan(&cluster, ME, &held);
    assert_eq!(
        replaced.actions,
        [Action::Import {
            key: key("a", 1),
            replace: true
        }]
    );
    assert!(matches!(replaced.problems[..], [Problem::Quarantined { .. }]));
    assert_eq!(replaced.missing, 1);
    held.transport.clear();
    let stuck = plan(&cluster, ME, &held);
    assert_eq!(stuck.actions, [Action::AcceptTransport(transport_id(1))]);
    assert!(
        stuck
            .problems
            .iter()
            .any(|problem| matches!(problem, Problem::Missing { .. }))
    );
}

#[test]
fn a_wrong_replication_key_imports_nothing_and_keeps_what_is_proven_in_use() {
    let mut cluster = cluster();
    cluster.context("a").context("b");
    let first = cluster.pending("a", 1);
    cluster.active("b", 1);
    let held = with_keys(token(ME, &[1]), &[first]);
    let plan = look(&cluster, ME, &held, |picture| picture.can_open = false);
    assert_eq!(plan.actions, [Action::Ack(vec![(context("a"), 1, first)])]);
    assert_eq!(plan.missing, 1);
    let why = "this node has another replication key".to_owned();
    assert_eq!(
        plan.problems,
        [Problem::Missing {
            context: context("b"),
            version: 1,
            why
        }]
    );
}

#[test]
fn a_token_that_cannot_be_asked_lacks_everything_but_what_is_pending() {
    let mut cluster = cluster();
    cluster.context("a");
    cluster.active("a", 1);
    cluster.pending("a", 2);
    let name = slot();
    let picture = Picture {
        state: &cluster.state,
        me: ME,
        leader: true,
        trust: None,
        can_open: true,
        slot: &name,
        held: None,
    };
    let plan = decide(&picture);
    assert_eq!((plan.actions.len(), plan.missing), (0, 1));
}

#[test]
fn a_lost_key_is_missing_and_imported_again() {
    let mut cluster = cluster();
    cluster.context("a");
    cluster.active("a", 1);
    let plan = plan(&cluster, ME, &token(ME, &[1]));
    assert_eq!((plan.actions, plan.missing), (vec![import("a", 1)], 1));
}

#[test]
fn many_versions_are_acknowledged_in_one_command() {
    let mut cluster = cluster();
    cluster.context("a").context("b");
    let keys = [cluster.pending("a", 1), cluster.pending("b", 1)];
    let plan = plan(&cluster, ME, &with_keys(token(ME, &[1]), &keys));
    let expected = vec![(context("a"), 1, keys[0]), (context("b"), 1, keys[1])];
    assert_eq!(plan.actions, [Action::Ack(expected)]);
}

#[test]
fn pending_and_active_versions_come_before_retired_ones() {
    let mut cluster = cluster();
    cluster.context("a").context("b");
    cluster.active("a", 1);
    cluster.active("a", 2);
    cluster.pending("b", 1);
    let plan = plan(&cluster, ME, &token(ME, &[1]));
    assert_eq!(plan.actions, [import("b", 1), import("a", 2), import("a", 1)]);
}

#[test]
fn a_replaced_token_is_named_and_gets_nothing() {
    let mut cluster = cluster();
    cluster.context("a");
    cluster.active("a", 1);
    let plan = plan(&cluster, ME, &token(77, &[]));
    assert!(plan.actions.is_empty(), "{:?}", plan.actions);
    assert_eq!(plan.problems, [Problem::TokenReplaced]);
    assert_eq!(plan.missing, 1);
    let fresh = Held::default();
    let plan = look(&cluster, ME, &fresh, |_| {});
    assert!(
        plan.disowns() && plan.actions.is_empty(),
        "one that was made anew"
    );
}

#[test]
fn a_standalone_nodes_token_is_known_by_any_key_of_the_slot() {
    let mut cluster = Cluster::founded();
    cluster.transport(&[]).context("a");
    let active = cluster.active("a", 1);
    let alone = |held: &Held| look(&cluster, ME, held, |picture| picture.trust = None);
    let replaced = alone(&token(9, &[]));
    assert!(replaced.disowns() && replaced.actions.is_empty() && replaced.missing == 1);
    assert!(!alone(&token(9, &[1])).disowns(), "it holds the transport key");
    let without_transport = with_keys(token(9, &[]), &[active]);
    assert!(!alone(&without_transport).disowns(), "it holds a KEK");
}

#[test]
fn an_older_generation_is_needed_only_while_a_version_names_it() {
    let mut cluster = cluster();
    cluster.context("a");
    cluster.pending("a", 1);
    cluster.transport(&[ME]);
    let held = token(ME, &[2]);
    let accept = Action::AcceptTransport(transport_id(1));
    assert_eq!(plan(&cluster, ME, &held).actions, [accept]);
    cluster.abandon("a", 1);
    assert!(plan(&cluster, ME, &held).actions.is_empty());
}

/// Whatever a node died in: step by step it comes to rest with every key, and never destroys one it
/// has to serve.
#[test]
fn every_start_comes_to_rest_with_all_keys() {
    let mut cluster = cluster();
    cluster.context("a").context("b");
    cluster.active("a", 1);
    cluster.active("a", 2);
    cluster.pending("a", 3);
    cluster.abandon("a", 3);
    cluster.active("b", 1);
    let keys = [("a", 1), ("a", 2), ("a", 3), ("b", 1)].map(|(name, version)| uid(name, version));
    for start in 0..3_usize.pow(4) {
        let mut held = token(ME, &[1]);
        for (place, uid) in (0_u32..).zip(keys) {
            match start / 3_usize.pow(place) % 3 {
                0 => {}
                1 => drop(held.keks.insert(uid, HeldKek::default())),
                _ => {
                    let kek = HeldKek {
                        problem: Some("torn".to_owned()),
                        ..HeldKek::default()
                    };
                    drop(held.keks.insert(uid, kek));
                }
            }
        }
        let mut steps = 0;
        while let Some(action) = plan(&cluster, ME, &held).actions.first().cloned() {
            steps += 1;
            assert!(steps < 50, "no rest after {action:?}");
            let of = |key: &VersionKey| uid(key.context.as_str(), key.version);
            held.apply(match &action {
                Action::Prove(key) | Action::Import { key, .. } => Effect::Proven(of(key), String::new()),
                Action::Load(uid, encrypts) => Effect::Loaded(*uid, *encrypts),
                Action::Retire(uid) => Effect::Loaded(*uid, false),
                Action::Remove(uid) => {
                    assert_eq!(*uid, keys[2]);
                    Effect::Gone(vec![*uid])
                }
                other => panic!("{other:?}"),
            });
        }
        assert_eq!(held.keks.len(), 3);
        assert!(held.keks.values().all(|kek| kek.proven && kek.loaded.is_some()));
    }
}
