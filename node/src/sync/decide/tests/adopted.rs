//! What a node does next with keys that version 1 made.

use super::super::super::held::Foreign;
use super::*;

const LABEL: &str = "old-a-v1";

/// With version 1's own key in it.
fn with_original(mut held: Held) -> Held {
    held.labelled.insert(LABEL.to_owned());
    held.foreign.push(Foreign {
        label: LABEL.to_owned(),
        what: format!("{LABEL:?} (class 0x4, id )"),
    });
    held
}

/// This node, which holds `a` version 1, and another, which does not.
fn adopted() -> (Cluster, KeyUid, RaftId) {
    let mut cluster = cluster();
    cluster.context("a");
    let uid = cluster.adopted("a", 1);
    let second = cluster.join("hsm-node-2");
    cluster.registered(second).grant(1, second);
    (cluster, uid, second)
}

fn adopt(replace: bool) -> Action {
    Action::Adopt {
        key: key("a", 1),
        replace,
    }
}

fn ack(uid: KeyUid) -> Action {
    Action::Ack(vec![(context("a"), 1, uid)])
}

fn done(uid: KeyUid) -> Action {
    Action::AckDestroyed(vec![(context("a"), 1, uid)])
}

fn is_unknown(problem: &Problem) -> bool {
    matches!(problem, Problem::Unknown { .. })
}

#[test]
fn the_holder_makes_a_copy_loads_it_for_decryption_and_acknowledges() {
    let (mut cluster, uid, _) = adopted();
    let mut held = with_original(token(ME, &[1]));
    let first = plan(&cluster, ME, &held);
    assert_eq!((&first.actions[..], first.missing), (&[adopt(false)][..], 1));
    assert!(!first.problems.iter().any(is_unknown), "{:?}", first.problems);
    held.apply(Effect::Proven(uid, LABEL.to_owned()));
    assert_eq!(plan(&cluster, ME, &held).actions, [Action::Load(uid, false)]);
    held.apply(Effect::Loaded(uid, false));
    assert_eq!(plan(&cluster, ME, &held).actions, [ack(uid)]);
    cluster.ack(ME, "a", 1);
    assert_eq!(plan(&cluster, ME, &held), Plan::default());
    // After a restart it is proven again, and where its copy is no good it is made anew.
    held.keks.insert(uid, HeldKek::default());
    assert_eq!(plan(&cluster, ME, &held).actions, [Action::Prove(key("a", 1))]);
    held.apply(Effect::Unusable(uid, "planted".to_owned()));
    assert_eq!(plan(&cluster, ME, &held).actions, [adopt(true)]);
}

#[test]
fn a_holder_that_has_lost_the_key_says_so_and_another_node_does_not_miss_it() {
    let (cluster, _, second) = adopted();
    let lost = plan(&cluster, ME, &token(ME, &[1]));
    assert_eq!((lost.missing, lost.actions.len()), (1, 0));
    assert!(matches!(&lost.problems[..], [Problem::Missing { why, .. }] if why.contains(LABEL)));
    assert_eq!(plan(&cluster, second, &token(second, &[1])), Plan::default());
}

#[test]
fn a_node_with_a_copy_of_the_token_proves_it_and_is_a_holder_from_then_on() {
    let (mut cluster, uid, second) = adopted();
    let mut held = with_original(token(second, &[1]));
    let first = plan(&cluster, second, &held);
    assert_eq!((&first.actions[..], first.missing), (&[adopt(false)][..], 0));
    held.apply(Effect::Proven(uid, LABEL.to_owned()));
    held.apply(Effect::Loaded(uid, false));
    assert_eq!(plan(&cluster, second, &held).actions, [ack(uid)]);
    cluster.ack(second, "a", 1);
    assert_eq!(plan(&cluster, second, &token(second, &[1])).missing, 1);
}

#[test]
fn its_end_takes_copy_and_original_and_is_acknowledged_by_holders_only() {
    let (mut cluster, uid, second) = adopted();
    cluster.ack(ME, "a", 1);
    cluster.schedule_destroy("a", 1).begin_destroy("a", 1);
    let remove = Action::RemoveAdopted(key("a", 1));
    // Whether the copy is there, or only the key that it would be made of.
    let mut held = with_original(token(ME, &[1]));
    assert_eq!(plan(&cluster, ME, &held).actions, std::slice::from_ref(&remove));
    held.apply(Effect::Proven(uid, LABEL.to_owned()));
    let planned = plan(&cluster, ME, &held);
    assert_eq!(
        (&planned.actions[..], planned.destructions),
        (&[remove.clone()][..], 1)
    );
    let gone = |others| Effect::AdoptedGone {
        uid,
        label: LABEL.to_owned(),
        others,
    };
    held.apply(gone(false));
    assert!(held.labelled.is_empty() && held.foreign.is_empty());
    assert_eq!(plan(&cluster, ME, &held).actions, [done(uid)]);

    // A copy of the token loses it too; nobody waits for that.
    let mut copied = with_original(token(second, &[1]));
    assert_eq!(
        plan(&cluster, second, &copied).actions,
        std::slice::from_ref(&remove)
    );
    copied.apply(gone(false));
    assert!(plan(&cluster, second, &copied).actions.is_empty());

    cluster.ack_destroyed(ME, "a", 1);
    // Somebody else's key of the same label is looked at once, and reported.
    let mut other = with_original(token(ME, &[1]));
    assert_eq!(plan(&cluster, ME, &other).actions, [remove]);
    other.apply(gone(true));
    let planned = plan(&cluster, ME, &other);
    assert!(planned.actions.is_empty() && planned.problems.iter().any(is_unknown));
}

/// Whatever was disabled, or waits for its end, can come back at any moment.
#[test]
fn out_of_use_it_is_kept_at_hand_over_a_restart_and_never_copied_again() {
    for scheduled in [false, true] {
        let (mut cluster, uid, _) = adopted();
        cluster.ack(ME, "a", 1);
        if scheduled {
            cluster.schedule_destroy("a", 1);
        } else {
            cluster.set_use("a", 1, VersionState::Disabled);
        }
        let mut held = with_original(token(ME, &[1]));
        // Without its copy nothing is made until it is wanted again.
        let planned = plan(&cluster, ME, &held);
        assert!(planned.actions.is_empty(), "{:?}", planned.actions);
        assert_eq!(planned.missing, 0);
        held.keks.insert(uid, HeldKek::default());
        assert_eq!(plan(&cluster, ME, &held).actions, [Action::Prove(key("a", 1))]);
        held.apply(Effect::Proven(uid, LABEL.to_owned()));
        assert_eq!(plan(&cluster, ME, &held).actions, [Action::Load(uid, false)]);
        held.apply(Effect::Loaded(uid, false));
        assert!(plan(&cluster, ME, &held).actions.is_empty());
    }
}

#[test]
fn a_released_version_loses_its_copies_and_no_original() {
    let (mut cluster, uid, second) = adopted();
    cluster.ack(ME, "a", 1);
    cluster.release("a", 1);
    for node in [ME, second] {
        let mut held = with_original(token(node, &[1]));
        held.apply(Effect::Proven(uid, LABEL.to_owned()));
        held.apply(Effect::Loaded(uid, false));
        let planned = plan(&cluster, node, &held);
        assert_eq!(
            (&planned.actions[..], planned.destructions),
            (&[Action::RemoveCopy(key("a", 1))][..], 0)
        );
        held.apply(Effect::Gone(vec![uid]));
        let planned = plan(&cluster, node, &held);
        assert!(planned.actions.is_empty() && held.labelled.contains(LABEL));
        assert_eq!(planned.missing, 0);
        // Nobody's key any more, so it is reported.
        assert!(planned.problems.iter().any(is_unknown));
    }
}

#[test]
fn a_released_copy_without_its_original_is_kept_and_said_until_the_original_is_back() {
    let (mut cluster, uid, _) = adopted();
    cluster.ack(ME, "a", 1);
    cluster.release("a", 1);
    for other in [false, true] {
        // Another key under that label is no original either.
        let mut held = token(ME, &[1]);
        if other {
            held = with_original(held);
        }
        held.apply(Effect::Proven(uid, LABEL.to_owned()));
        held.apply(Effect::Loaded(uid, false));
        held.apply(Effect::Kept(uid, LABEL.to_owned()));
        assert_eq!(held.keks[&uid].loaded, None);
        let planned = plan(&cluster, ME, &held);
        assert!(planned.actions.is_empty(), "{:?}", planned.actions);
        assert_eq!(
            (planned.missing, planned.destructions),
            (0, 0),
            "the node is ready"
        );
        let said = |problem: &Problem| problem.to_string().contains("its copy is kept");
        assert!(planned.problems.iter().any(said), "{:?}", planned.problems);
        if !other {
            let planned = plan(&cluster, ME, &with_original(held));
            assert_eq!(planned.actions, [Action::RemoveCopy(key("a", 1))]);
        }
    }
}
