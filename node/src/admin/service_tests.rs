use std::collections::BTreeSet;

use hsm_api::admin::{
    CreateKekRequest, DestroyKeyRequest, JoinTokenRequest, KeyUseRequest, MoveKeyRequest, RotateRequest,
};
use hsm_core::replication::ReplicationKey;
use raft_store::command::Existing;
use raft_store::state::access::RevocationKey;
use serde_json::json;

use super::super::access::AccessBody;
use super::super::arrival::Arrival;
use super::*;
use crate::config::DAY;
use crate::identity::{Identity, Principal};
use crate::rotation::testing::{
    FakeCluster, FakeKeys, ISSUER, World, cluster_keys, context as name, replication_key, slot, still,
};
use crate::rotation::{KeyMaker, Limits, drive};

pub(in crate::admin) struct Bench {
    pub(in crate::admin) cluster: Arc<FakeCluster>,
    pub(in crate::admin) keys: Arc<FakeKeys>,
    pub(in crate::admin) service: AdminService,
    driver: tokio::task::JoinHandle<()>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

pub(in crate::admin) fn bench() -> Bench {
    let mut world = World::new(3);
    for node in world.voters.clone() {
        world.report_clock(node, 0);
    }
    let cluster = FakeCluster::new(world);
    let limits = Limits::new(Duration::from_secs(60));
    let driver = tokio::spawn(drive(Arc::clone(&cluster) as Arc<dyn Cluster>, still(), limits));
    let keys = Arc::new(FakeKeys::default());
    let other = ReplicationKey::parse(&"cd".repeat(32)).unwrap();
    let replication = Replication::new(other, "x").beside(replication_key(), "y");
    let service = AdminService::new(ServiceParts {
        cluster: Arc::clone(&cluster) as Arc<dyn Cluster>,
        rotator: Arc::new(Rotator::new(
            Arc::clone(&cluster) as Arc<dyn Cluster>,
            Arc::clone(&keys) as Arc<dyn KeyMaker>,
            cluster_keys(),
            still(),
            limits,
        )),
        clocks: still(),
        policy: RotationPolicy {
            max_versions: 7,
            ..RotationPolicy::default()
        },
        max_invocations: BTreeMap::from([(name("new"), 5000)]),
        destroy: Destroy {
            default_wait: DAY * 7,
            min_wait: DAY,
            recent_use: DAY * 7,
        },
        day: DAY,
        seed: Seed {
            issuers: vec![ISSUER.to_owned()],
            ..Seed::default()
        },
        cluster_ca_sha256: Some([0xca; 32]),
        replication: Arc::new(replication),
    });
    Bench {
        cluster,
        keys,
        service,
        driver,
    }
}

pub(in crate::admin) fn caller(ou: &str, issuer: &str) -> Principal {
    Principal::new(Identity {
        cn: "someone".to_owned(),
        ou: Some(ou.to_owned()),
        sans: Vec::new(),
        serial: "1".to_owned(),
        issuer_dn: issuer.to_owned(),
        fingerprint: [1; 32],
        spki_sha256: [2; 32],
        not_after: 0,
    })
}

pub(in crate::admin) fn call(ou: &str, key: &str, body: AdminBody, asked: &impl Serialize) -> AdminCall {
    let arrival = Arrival {
        principal: &caller(ou, ISSUER),
        via_node: 2,
        source: "127.0.0.1:1".to_owned(),
        request_id: "r".to_owned(),
        trace_id: "t".to_owned(),
        key: key.to_owned(),
    };
    AdminCall::new(arrival, body, asked)
}

fn rotate(ou: &str, key: &str) -> AdminCall {
    call(
        ou,
        key,
        AdminBody::Rotate { context: name("c") },
        &RotateRequest {},
    )
}

fn create(context: &str, key: &str, slot_name: Option<&str>) -> AdminCall {
    let body = AdminBody::CreateKey {
        context: name(context),
        label: None,
        version: None,
        slot: slot_name.map(slot),
        binding: BindingMode::Private,
    };
    call("Admin", key, body, &CreateKekRequest::new(context))
}

fn token(ou: &str) -> AdminCall {
    let body = AdminBody::CreateJoinToken {
        ttl_seconds: 60,
        node: None,
    };
    call(ou, "k", body, &JoinTokenRequest::default())
}

impl Bench {
    pub(in crate::admin) async fn ask(&self, call: AdminCall) -> Result<Value, ErrorCode> {
        self.service.execute(call).await.map_err(|error| error.code)
    }
}

#[tokio::test]
async fn create_kek_makes_context_and_first_version_and_rotate_the_next() {
    let bench = bench();
    let created = bench.ask(create("new", "k", Some("s"))).await.unwrap();
    let expected = json!({"context": "new", "version": 1, "key_id": "kek-new-v1", "state": "active"});
    assert_eq!(created, expected);
    let state = bench.cluster.published().state.clone();
    let context = state.contexts().get(&name("new")).unwrap();
    assert_eq!(
        (context.binding, context.policy.max_versions),
        (BindingMode::Private, 7)
    );
    // The first version of `c`, then a rotation by an operator.
    bench.ask(create("c", "k", None)).await.unwrap();
    let rotated = bench.ask(rotate("Ops", "k")).await.unwrap();
    let expected = json!({"context": "c", "version": 2, "key_id": "kek-c-v2", "previous_version": 1});
    assert_eq!(rotated, expected);
}

#[tokio::test]
async fn a_repeated_create_makes_one_context_and_one_version() {
    let bench = bench();
    let first = bench.ask(create("new", "k", Some("s"))).await.unwrap();
    assert_eq!(bench.ask(create("new", "k", Some("s"))).await.unwrap(), first);
    // Another node, whose configuration does not know the context, is asked the same.
    assert_eq!(bench.ask(create("new", "k", None)).await.unwrap(), first);
    assert_eq!(bench.cluster.count(|op| matches!(op, Op::PrepareVersion(_))), 1);
    // Nor is the second command of a request taken for its first.
    assert_eq!(
        bench
            .cluster
            .count(|op| matches!(op, Op::CreateContext(c) if c.name.as_str() == "new")),
        1
    );
    let published = bench.cluster.published();
    let limits = ["new", "c"].map(|context| published.state.max_invocations(&name(context)));
    assert_eq!(limits, [5000, 1 << 32], "as the configuration has it");
}

#[tokio::test]
async fn a_context_that_could_not_get_a_key_is_not_made() {
    let bench = bench();
    let before = bench.cluster.count(|_| true);
    assert_eq!(
        bench.ask(create("new", "k1", None)).await,
        Err(ErrorCode::NotFound)
    );
    assert_eq!(
        bench.ask(create("new", "k2", Some("other"))).await,
        Err(ErrorCode::NotReady)
    );
    *bench.keys.refuse.lock().unwrap() = Some(CallError::new(ErrorCode::SlotLocked, ""));
    assert_eq!(
        bench.ask(create("new", "k3", Some("s"))).await,
        Err(ErrorCode::SlotLocked)
    );
    *bench.keys.refuse.lock().unwrap() = None;
    let with = |label: Option<&str>, version, key| {
        let body = AdminBody::CreateKey {
            context: name("new"),
            label: label.map(str::to_owned),
            version,
            slot: Some(slot("s")),
            binding: BindingMode::Shared,
        };
        call("Admin", key, body, &CreateKekRequest::new("new"))
    };
    let second = bench.ask(with(None, Some(2), "k4")).await;
    assert_eq!(second, Err(ErrorCode::InvalidArgument));
    assert_eq!(bench.cluster.count(|_| true), before);
    // A label of another context's version.
    bench.ask(create("c", "k5", Some("s"))).await.unwrap();
    let taken = bench.ask(with(Some("kek-c-v1"), None, "k6")).await;
    assert_eq!(taken, Err(ErrorCode::AlreadyExists));
    assert_eq!(bench.cluster.count(|op| matches!(op, Op::CreateContext(_))), 1);
}

#[tokio::test]
async fn a_call_that_made_its_context_never_says_that_nothing_was_changed() {
    for error in [
        ProposeError::NoQuorum,
        ProposeError::Draining,
        ProposeError::NotLeader { leader: None },
    ] {
        let bench = bench();
        *bench.cluster.let_through.lock().unwrap() = 1;
        bench.cluster.failures.lock().unwrap().push((error, false));
        let answer = bench.ask(create("new", "k", Some("s"))).await;
        assert_eq!(answer, Err(ErrorCode::OutcomeUnknown));
        bench.ask(create("new", "k", Some("s"))).await.unwrap();
        assert_eq!(bench.cluster.count(|op| matches!(op, Op::PrepareVersion(_))), 1);
    }
}

#[tokio::test]
async fn a_context_that_another_call_makes_meanwhile_gets_its_key_all_the_same() {
    let bench = bench();
    let (context, slot) = (name("new"), slot("s"));
    let exists = ProposeError::Refused(Existing::Context { context, slot }.into());
    bench.cluster.failures.lock().unwrap().push((exists, true));
    let created = bench.ask(create("new", "k", Some("s"))).await.unwrap();
    assert_eq!(created["version"], 1);
}

#[tokio::test]
async fn the_leader_authorises_by_its_own_state() {
    let bench = bench();
    bench.ask(create("c", "k", None)).await.unwrap();
    for ou in ["Trading", "Audit", ""] {
        assert_eq!(
            bench.ask(rotate(ou, "x")).await,
            Err(ErrorCode::RoleRequired),
            "{ou}"
        );
    }
    assert_eq!(bench.ask(token("Ops")).await, Err(ErrorCode::RoleRequired));
    let mut other_ca = rotate("Admin", "x");
    other_ca.origin.issuer = "CN=Application CA".to_owned();
    other_ca.id = RequestId::Client {
        principal: principal_hash(&other_ca.origin),
        operation: "rotate c".to_owned(),
        key: "x".to_owned(),
    };
    assert_eq!(bench.ask(other_ca).await, Err(ErrorCode::RoleRequired));
    bench.cluster.with(|world| {
        world.ok(Op::AddRevocations(raft_store::command::AddRevocations {
            revocations: vec![(RevocationKey::Fingerprint([1; 32]), String::new())],
        }))
    });
    assert_eq!(
        bench.ask(rotate("Admin", "x")).await,
        Err(ErrorCode::CertificateRevoked)
    );
}

#[tokio::test]
async fn a_retired_version_is_taken_out_of_use_by_an_operator_and_destroyed_by_an_admin() {
    let bench = bench();
    bench.ask(create("c", "k", None)).await.unwrap();
    bench.ask(rotate("Ops", "k")).await.unwrap();
    let disable = |ou, version| {
        let body = AdminBody::SetKeyUse {
            context: name("c"),
            version,
            enable: false,
        };
        call(ou, "k", body, &KeyUseRequest {})
    };
    let destroy = |ou, version| {
        let body = AdminBody::DestroyKey {
            context: name("c"),
            version,
            wait_ms: None,
            override_recent_use: false,
        };
        call(ou, "k", body, &DestroyKeyRequest::default())
    };
    let refused = bench.ask(disable("Audit", 1)).await;
    assert_eq!(refused, Err(ErrorCode::RoleRequired));
    let disabled = bench.ask(disable("Ops", 1)).await.unwrap();
    assert_eq!(
        (&disabled["state"], &disabled["context"]),
        (&json!("disabled"), &json!("c"))
    );
    assert_eq!(bench.ask(destroy("Ops", 1)).await, Err(ErrorCode::RoleRequired));
    let scheduled = bench.ask(destroy("Admin", 1)).await.unwrap();
    assert_eq!(scheduled["state"], "destroy_scheduled");
    assert_eq!(scheduled["destruction"]["undone"], "disabled");
    let active = bench.ask(destroy("Admin", 2)).await;
    assert_eq!(active, Err(ErrorCode::Conflict));
    let undo = AdminBody::UndoDestroy {
        context: name("c"),
        version: 1,
    };
    let undone = bench
        .ask(call("Ops", "k", undo, &KeyUseRequest {}))
        .await
        .unwrap();
    assert_eq!(undone["state"], "disabled");
}

/// Its clock is one of three, and nobody has told it the others' yet.
#[tokio::test]
async fn a_clean_up_asks_for_the_clocks_first() {
    let bench = bench();
    let body = AdminBody::Cleanup {
        context: None,
        dry_run: true,
    };
    let asked = call("Ops", "k", body, &hsm_api::admin::CleanupRequest::default());
    assert_eq!(bench.ask(asked).await, Err(ErrorCode::NotReady));
}

#[tokio::test]
async fn a_call_whose_id_is_not_its_askers_is_refused() {
    let bench = bench();
    bench.ask(create("c", "k", None)).await.unwrap();
    let mut foreign = rotate("Admin", "x");
    foreign.origin.cn = "somebody else".to_owned();
    assert_eq!(bench.ask(foreign).await, Err(ErrorCode::InvalidArgument));
    let mut node = rotate("Admin", "x");
    node.id = RequestId::Node {
        node: 1,
        nonce: [0; 16],
    };
    assert_eq!(bench.ask(node).await, Err(ErrorCode::InvalidArgument));
    let mut other = rotate("Admin", "x");
    other.body = AdminBody::Rotate {
        context: name("other"),
    };
    assert_eq!(bench.ask(other).await, Err(ErrorCode::InvalidArgument));
}

#[tokio::test]
async fn a_join_token_comes_with_the_ca_it_belongs_to() {
    let bench = bench();
    let answer = bench.ask(token("Admin")).await.unwrap();
    assert_eq!(answer["cluster_ca_sha256"], "ca".repeat(32));
    assert!(answer["token"].as_str().unwrap().starts_with("hsm-join-1."));
    assert!(answer["expires_at"].as_str().unwrap().ends_with('Z'));
}

#[tokio::test]
async fn commands_carry_the_administrator_they_are_for() {
    let bench = bench();
    bench.ask(create("c", "k", None)).await.unwrap();
    let prepared = asked(&rotate("Admin", "k")).unwrap();
    let Origin::Admin(origin) = prepared.origin else {
        panic!()
    };
    assert_eq!((origin.cn.as_str(), origin.via_node), ("someone", 2));
}

#[tokio::test]
async fn a_node_that_does_not_lead_says_so() {
    let bench = bench();
    *bench.cluster.leadership.lock().unwrap() = None;
    assert_eq!(bench.ask(rotate("Admin", "k")).await, Err(ErrorCode::NotLeader));
    let errors: BTreeSet<_> = [ProposeError::NotLeader { leader: None }, ProposeError::NoQuorum]
        .map(|error| CallError::from(error).code)
        .into();
    assert_eq!(errors.len(), 2);
}

#[tokio::test]
async fn too_many_calls_are_shed() {
    let bench = bench();
    let _all = bench.service.calls.try_acquire_many(MAX_CALLS as u32).unwrap();
    assert_eq!(bench.ask(rotate("Admin", "k")).await, Err(ErrorCode::Overloaded));
}

#[tokio::test]
async fn who_may_do_what_is_changed_by_administrators_only() {
    let bench = bench();
    let revoked = |cn: &str| AccessBody::Revoke {
        revocations: vec![(RevocationKey::CommonName(cn.to_owned()), "lost".to_owned())],
    };
    let access = |ou: &str, body: AccessBody| call(ou, "k", AdminBody::Access(body), &"asked");
    for ou in ["Ops", "Audit", "Trading"] {
        let refused = bench.ask(access(ou, revoked("gone"))).await;
        assert_eq!(refused, Err(ErrorCode::RoleRequired), "{ou}");
    }
    let answer = bench.ask(access("Admin", revoked("gone"))).await.unwrap();
    assert_eq!(answer, json!({"changed": 1}));
    // An administrator whose role is taken has lost it with the next call.
    let mut acl = bench.cluster.published().state.acl().unwrap().clone();
    let expected = acl.digest();
    acl.roles
        .retain(|entry| entry.role != crate::policy::Role::Operator);
    let body = AccessBody::SetAcl { expected, acl };
    bench.ask(access("Admin", body)).await.unwrap();
    assert_eq!(bench.ask(rotate("Ops", "x")).await, Err(ErrorCode::RoleRequired));
}

fn relocate(ou: &str, key: &str, to: &str) -> AdminCall {
    let body = AdminBody::MoveKey {
        context: name("c"),
        to: slot(to),
    };
    let asked = MoveKeyRequest { slot: to.to_owned() };
    call(ou, key, body, &asked)
}

#[tokio::test]
async fn a_move_answers_with_the_first_version_in_the_new_slot() {
    let bench = bench();
    bench.cluster.with(|world| world.second_slot("t"));
    bench.ask(create("c", "k", None)).await.unwrap();
    let moved = bench.ask(relocate("Ops", "k", "t")).await.unwrap();
    let expected = json!({
        "context": "c", "slot": "t", "version": 2, "key_id": "kek-c-v2", "previous_version": 1
    });
    assert_eq!(moved, expected);
    assert_eq!(bench.ask(relocate("Ops", "k", "t")).await.unwrap(), expected);
    for (call, code) in [
        (relocate("Ops", "another", "t"), ErrorCode::Conflict),
        (relocate("Ops", "k", "s"), ErrorCode::IdempotencyKeyReused),
        (relocate("Audit", "k", "s"), ErrorCode::RoleRequired),
    ] {
        assert_eq!(bench.ask(call).await, Err(code));
    }
    // The versions after it are made there too.
    bench.ask(rotate("Ops", "k")).await.unwrap();
    let published = bench.cluster.published();
    let slots = published.state.versions_of(&name("c"));
    let slots: Vec<String> = slots.map(|(_, version)| version.slot.to_string()).collect();
    assert_eq!(slots, ["s", "t", "t"]);
}

#[tokio::test]
async fn a_call_that_has_moved_its_context_and_made_no_key_says_so() {
    let bench = bench();
    bench.cluster.with(|world| world.second_slot("t"));
    bench.ask(create("c", "k", None)).await.unwrap();
    *bench.cluster.let_through.lock().unwrap() = 1;
    bench
        .cluster
        .failures
        .lock()
        .unwrap()
        .push((ProposeError::NoQuorum, false));
    let error = bench
        .service
        .execute(relocate("Ops", "k", "t"))
        .await
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::OutcomeUnknown);
    assert!(error.detail.contains("context c is moved to slot t"), "{error}");
    assert!(error.detail.contains("hsmctl key move c --to s"), "{error}");
    // Nor does a refusal that says that nothing was made, whether this call moved it or one before.
    let sick = *bench.cluster.with(|world| world.voters.clone()).last().unwrap();
    bench.cluster.silence(sick, Duration::from_millis(100));
    bench.cluster.with(|world| world.report_slot(sick, "t", "failed"));
    for key in ["k", "another"] {
        let error = bench
            .service
            .execute(relocate("Ops", key, "t"))
            .await
            .unwrap_err();
        assert_eq!(error.code, ErrorCode::SlotFailed);
        for part in [
            "context c is moved to slot t and encrypts where it did",
            "does not serve on",
            "hsmctl key move c --to s",
        ] {
            assert!(error.detail.contains(part), "{part}: {error}");
        }
    }
    bench.cluster.with(|world| world.report_slot(sick, "t", "ready"));
    let moved = bench.ask(relocate("Ops", "k", "t")).await.unwrap();
    assert_eq!((&moved["slot"], &moved["version"]), (&json!("t"), &json!(2)));
}
