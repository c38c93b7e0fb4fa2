use hsm_api::admin::{AdoptKey, AdoptKeysRequest};
use raft_store::command::{Origin, RequestId};
use serde_json::{Value, json};

use super::*;
use crate::admin::call::{AdminBody, AdminCall};
use crate::admin::service::tests::{Bench, bench, call};
use crate::rotation::Cluster;
use crate::rotation::testing::{FakeCluster, context as name, slot};

fn found(label: &str, version: u32, uid: u8) -> FoundKey {
    FoundKey {
        label: label.to_owned(),
        version,
        key_uid: KeyUid([uid; 16]),
        check_record: vec![uid],
        created_at: None,
    }
}

/// As it arrives from node 1, which has looked into its token.
fn order(context: &str, key: &str, keys: Vec<FoundKey>) -> AdminCall {
    let request = AdoptKeysRequest {
        context: context.to_owned(),
        keys: keys
            .iter()
            .map(|key| AdoptKey {
                label: key.label.clone(),
                version: Some(key.version),
                id: None,
                created_at: None,
            })
            .collect(),
        slot: Some("s".to_owned()),
        binding: None,
        only: false,
        skip_missing: false,
        dry_run: false,
    };
    let body = AdminBody::AdoptKeys(AdoptOrder {
        context: name(context),
        slot: slot("s"),
        binding: BindingMode::Shared,
        floor: 0,
        keys,
    });
    let mut call = call("Ops", key, body, &request);
    call.origin.via_node = 1;
    call
}

/// Acknowledges whatever is adopted, as the token sync of node 1 does.
fn acknowledge(cluster: &std::sync::Arc<FakeCluster>) -> tokio::task::JoinHandle<()> {
    let cluster = std::sync::Arc::clone(cluster);
    tokio::spawn(async move {
        let mut applied = cluster.applied();
        loop {
            cluster.with(|world| {
                let adopted = world.state.versions().iter();
                let lacking: Vec<_> = adopted
                    .filter(|(_, version)| version.origin.is_adopted() && version.acks.is_empty())
                    .map(|(key, _)| key.clone())
                    .collect();
                for key in lacking {
                    world.ack(1, key.context.as_str(), key.version);
                }
            });
            applied.borrow_and_update();
            if applied.changed().await.is_err() {
                return;
            }
        }
    })
}

async fn ask(bench: &Bench, call: AdminCall) -> Value {
    bench.ask(call).await.unwrap()
}

#[tokio::test]
async fn adopted_keys_only_decrypt_and_a_fresh_one_encrypts() {
    let bench = bench();
    let acks = acknowledge(&bench.cluster);
    let keys = || vec![found("kek-old-v2", 2, 2), found("an old one", 1, 1)];
    let answer = ask(&bench, order("old", "k", keys())).await;
    let expected = |new: bool| {
        json!({
            "context": "old", "slot": "s", "binding": "shared", "dry_run": false, "active_version": 3,
            "versions": [
                {"version": 2, "key_id": "kek-old-v2", "new": new, "proven": true},
                {"version": 1, "key_id": "an old one", "new": new, "proven": true},
            ],
        })
    };
    assert_eq!(answer, expected(true));
    let published = bench.cluster.published();
    let context = published.state.contexts().get(&name("old")).unwrap();
    assert_eq!(
        (context.binding, context.active_version),
        (BindingMode::Shared, Some(3))
    );
    for number in [1, 2] {
        let version = published.state.version(&name("old"), number).unwrap();
        assert_eq!(version.state, VersionState::DecryptOnly);
    }
    // The same request again, with other ids and records: the node has looked into its token once more.
    let again = vec![found("kek-old-v2", 2, 8), found("an old one", 1, 9)];
    assert_eq!(ask(&bench, order("old", "k", again)).await, expected(true));
    // Another one for the same keys finds them there.
    assert_eq!(ask(&bench, order("old", "k2", keys())).await, expected(false));
    assert_eq!(bench.cluster.count(|op| matches!(op, Op::AdoptVersion(_))), 2);
    assert_eq!(bench.keys.made.load(std::sync::atomic::Ordering::SeqCst), 1);
    acks.abort();
}

#[tokio::test]
async fn an_adoption_that_was_cut_goes_on_where_it_stopped() {
    let bench = bench();
    let acks = acknowledge(&bench.cluster);
    let keys = || vec![found("kek-old-v1", 1, 1), found("kek-old-v2", 2, 2)];
    // The context and the first key go through, the answer to the second is lost.
    bench
        .cluster
        .failures
        .lock()
        .unwrap()
        .push((crate::consensus::ProposeError::Unknown, true));
    *bench.cluster.let_through.lock().unwrap() = 2;
    let cut = bench.ask(order("old", "k", keys())).await;
    assert_eq!(cut, Err(ErrorCode::OutcomeUnknown));
    let answer = ask(&bench, order("old", "k", keys())).await;
    assert_eq!(answer["active_version"], 3);
    assert!(
        answer["versions"]
            .as_array()
            .unwrap()
            .iter()
            .all(|one| one["new"] == true)
    );
    assert_eq!(bench.cluster.count(|op| matches!(op, Op::AdoptVersion(_))), 2);
    acks.abort();
}

#[tokio::test]
async fn what_is_taken_or_elsewhere_is_refused_and_nothing_is_made() {
    let bench = bench();
    let acks = acknowledge(&bench.cluster);
    bench.cluster.with(|world| {
        let version = world.prepare("c");
        world.activate("c", version);
    });
    for (keys, code) in [
        (vec![found("old", 1, 1)], ErrorCode::AlreadyExists),
        (vec![found("kek-c-v1", 7, 1)], ErrorCode::AlreadyExists),
        // The node thought that it was adopted; here it is not.
        (
            vec![FoundKey {
                check_record: Vec::new(),
                ..found("old", 7, 1)
            }],
            ErrorCode::NotReady,
        ),
    ] {
        assert_eq!(
            bench.ask(order("c", "k", keys.clone())).await,
            Err(code),
            "{keys:?}"
        );
    }
    // A slot that the cluster does not know.
    let mut elsewhere = order("c", "k0", vec![found("old", 7, 1)]);
    if let AdminBody::AdoptKeys(order) = &mut elsewhere.body {
        order.slot = slot("t");
    }
    assert_eq!(bench.ask(elsewhere).await, Err(ErrorCode::NotFound));
    let none = |op: &Op| matches!(op, Op::AdoptVersion(op) if op.slot.as_str() != "t");
    assert_eq!(bench.cluster.count(none), 0);
    let mut otherwise = order("c", "k", vec![found("old", 7, 1)]);
    if let AdminBody::AdoptKeys(order) = &mut otherwise.body {
        order.binding = BindingMode::Private;
    }
    assert_eq!(bench.ask(otherwise).await, Err(ErrorCode::Conflict));
    assert_eq!(bench.cluster.count(none), 0);
    assert_eq!(bench.cluster.published().state.versions_of(&name("c")).count(), 1);
    // A context with an active version gets no other.
    let answer = ask(&bench, order("c", "k3", vec![found("old", 7, 1)])).await;
    assert_eq!(answer["active_version"], 1);
    acks.abort();
}

#[tokio::test]
async fn what_is_in_the_old_slot_is_adopted_there_after_the_move() {
    let bench = bench();
    let acks = acknowledge(&bench.cluster);
    bench.cluster.with(|world| {
        let version = world.prepare("c");
        world.activate("c", version);
        world.second_slot("t");
        world.move_to("c", "t");
    });
    let answer = ask(&bench, order("c", "k", vec![found("old", 7, 1)])).await;
    assert_eq!(
        (&answer["slot"], &answer["active_version"]),
        (&json!("s"), &json!(1))
    );
    let published = bench.cluster.published();
    let version = published.state.version(&name("c"), 7).unwrap();
    assert_eq!(
        (version.slot.clone(), version.state),
        (slot("s"), VersionState::DecryptOnly)
    );
    // Its label is that key's, whatever the new token has.
    let mut there = order("c", "k2", vec![found("old", 7, 1)]);
    if let AdminBody::AdoptKeys(order) = &mut there.body {
        order.slot = slot("t");
    }
    assert_eq!(bench.ask(there).await, Err(ErrorCode::AlreadyExists));
    acks.abort();
}

#[tokio::test]
async fn nobody_adopts_in_the_name_of_another_node() {
    let bench = bench();
    let op = Op::AdoptVersion(AdoptVersion {
        context: name("c"),
        version: 1,
        key_uid: KeyUid([1; 16]),
        label: "old".to_owned(),
        slot: slot("s"),
        check_record: vec![1],
        holder: 1,
        floor: 0,
        created_at: None,
    });
    let mut asked = order("c", "k", vec![found("old", 1, 1)]);
    asked.origin.via_node = 2;
    let id = RequestId::Node {
        node: 2,
        nonce: [1; 16],
    };
    let origin = Origin::Admin(asked.origin);
    let refused = bench.service.parts.cluster.propose(id, [0; 32], origin, op).await;
    assert!(refused.is_err());
}

#[tokio::test]
async fn a_version_that_is_made_here_takes_no_label_that_version_1_has_given() {
    let bench = bench();
    let acks = acknowledge(&bench.cluster);
    // Version 1 made three, and the first is adopted alone.
    let with_floor = |key: &str, keys| {
        let mut call = order("old", key, keys);
        if let AdminBody::AdoptKeys(order) = &mut call.body {
            order.floor = 3;
        }
        call
    };
    let answer = ask(&bench, with_floor("k1", vec![found("kek-old-v1", 1, 1)])).await;
    assert_eq!(answer["active_version"], 4);
    // So the others can be adopted as they are called.
    let rest = vec![found("kek-old-v2", 2, 2), found("kek-old-v3", 3, 3)];
    let answer = ask(&bench, with_floor("k2", rest)).await;
    assert_eq!(answer["active_version"], 4);
    let published = bench.cluster.published();
    let labels: Vec<_> = published
        .state
        .versions_of(&name("old"))
        .map(|(number, version)| (number, version.label.clone()))
        .collect();
    let expected = [1, 2, 3, 4].map(|number| (number, format!("kek-old-v{number}")));
    assert_eq!(labels, expected);
    acks.abort();
}
