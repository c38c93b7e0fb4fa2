use std::sync::Arc;

use raft_store::state::access::RoleEntry;
use serde_json::json;

use super::*;
use crate::identity::{Authority, Identity};
use crate::rotation::testing::{FakeCluster, ISSUER, World, asked as asked_for};

fn caller(cn: &str, ou: &str) -> Principal {
    Principal::new(Identity {
        cn: cn.to_owned(),
        ou: Some(ou.to_owned()),
        sans: Vec::new(),
        serial: "ab".to_owned(),
        issuer_dn: ISSUER.to_owned(),
        fingerprint: [1; 32],
        spki_sha256: [2; 32],
        not_after: i64::MAX,
    })
}

fn seed() -> Seed {
    Seed {
        issuers: vec![ISSUER.to_owned()],
        ..Seed::default()
    }
}

async fn ask(cluster: &Arc<FakeCluster>, key: &str, body: AccessBody) -> Result<Value, CallError> {
    let asked = asked_for(body.operation(), key);
    execute(&**cluster, &seed(), &caller("root", "Admin"), &asked, &body).await
}

fn by_cn(cn: &str) -> RevocationKey {
    RevocationKey::CommonName(cn.to_owned())
}

fn revoke(names: &[&str]) -> AccessBody {
    AccessBody::Revoke {
        revocations: names.iter().map(|cn| (by_cn(cn), "lost".to_owned())).collect(),
    }
}

fn unrevoke(names: &[&str]) -> AccessBody {
    AccessBody::Unrevoke {
        revocations: names.iter().map(|cn| by_cn(cn)).collect(),
    }
}

fn in_force(cluster: &FakeCluster) -> Acl {
    cluster.with(|world| world.state.acl().unwrap().clone())
}

#[tokio::test]
async fn what_was_read_is_replaced_once() {
    let cluster = FakeCluster::new(World::new(3));
    let read = in_force(&cluster);
    let mut acl = read.clone();
    acl.roles.truncate(2);
    let body = AccessBody::SetAcl {
        expected: read.digest(),
        acl: acl.clone(),
    };
    let answer = ask(&cluster, "k", body.clone()).await.unwrap();
    assert_eq!(answer, json!({"digest": hex::encode(acl.digest())}));
    assert_eq!(in_force(&cluster), acl);
    // A repeat of the same request is answered as it was; another one has read what is there no more.
    assert_eq!(ask(&cluster, "k", body.clone()).await.unwrap(), answer);
    let late = ask(&cluster, "k2", body).await.unwrap_err();
    assert_eq!(late.code, ErrorCode::Conflict);
    assert!(late.detail.contains(&hex::encode(acl.digest())), "{late}");
    assert!(is_as_read(&cluster.published().state, &acl.digest()).is_ok());
    assert!(is_as_read(&cluster.published().state, &read.digest()).is_err());
}

#[tokio::test]
async fn nobody_locks_himself_out() {
    let cluster = FakeCluster::new(World::new(1));
    let read = in_force(&cluster);
    let admin = |ou: &str, issuer: &str| RoleEntry {
        role: Role::Admin,
        issuer: issuer.to_owned(),
        ou: Some(ou.to_owned()),
        cn: None,
        spki_sha256: None,
    };
    for (roles, code) in [
        (vec![], ErrorCode::InvalidArgument),
        (vec![admin("Boss", ISSUER)], ErrorCode::Conflict),
        // No CA of this node: it would not count.
        (vec![admin("Admin", "CN=Other CA")], ErrorCode::Conflict),
    ] {
        let acl = Acl {
            roles,
            ..Acl::default()
        };
        let expected = read.digest();
        let error = ask(&cluster, "k", AccessBody::SetAcl { expected, acl }).await;
        assert_eq!(error.unwrap_err().code, code);
    }
    for body in [
        revoke(&["other", "root"]),
        AccessBody::Revoke {
            revocations: vec![(RevocationKey::Fingerprint([1; 32]), "lost".to_owned())],
        },
    ] {
        let error = ask(&cluster, "k", body).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Conflict);
    }
    assert_eq!(in_force(&cluster), read);
    assert!(cluster.published().state.revocations().is_empty());
}

#[test]
fn nobody_revokes_a_ca_that_his_own_certificate_hangs_on() {
    let (issuer, serial) = ("CN=Root".to_owned(), "ca1".to_owned());
    let ca = Authority {
        serial: serial.clone(),
        issuer_dn: issuer.clone(),
        fingerprint: [9; 32],
    };
    let admin = Principal::below((*caller("root", "Admin")).clone(), vec![ca]);
    for key in [
        RevocationKey::Serial { issuer, serial },
        RevocationKey::Fingerprint([9; 32]),
    ] {
        let error = spares_caller([&key].into_iter(), &admin).unwrap_err();
        assert_eq!(error.code, ErrorCode::Conflict, "{key:?}");
    }
    assert!(spares_caller([&by_cn("Root")].into_iter(), &admin).is_ok());
}

#[tokio::test]
async fn revoking_twice_is_revoking_once_and_so_is_taking_back() {
    let cluster = FakeCluster::new(World::new(1));
    let proposed = || cluster.count(|op| matches!(op, Op::AddRevocations(_) | Op::RemoveRevocations(_)));
    for (key, body, changed, after) in [
        ("1", revoke(&["a", "b"]), 2, 1),
        ("2", revoke(&["a", "b"]), 0, 1),
        ("3", revoke(&["b", "c"]), 1, 2),
        ("4", unrevoke(&["c", "never"]), 1, 3),
        ("5", unrevoke(&["c"]), 0, 3),
    ] {
        let answer = ask(&cluster, key, body.clone()).await.unwrap();
        assert_eq!(answer, json!({"changed": changed}), "{body:?}");
        assert_eq!(proposed(), after, "{body:?}");
    }
    let state = cluster.published().state.clone();
    assert!(state.revocations().contains(&by_cn("a")) && !state.revocations().contains(&by_cn("c")));
}

#[test]
fn no_more_is_kept_than_can_be() {
    let state = World::new(1).state;
    assert!(has_room(&state, MAX_KEPT).is_ok());
    let error = has_room(&state, MAX_KEPT + 1).unwrap_err();
    assert!(error.detail.contains("50001 more"), "{error}");
}

#[test]
fn the_audit_names_what_a_call_is_about() {
    assert_eq!(revoke(&["a"]).target(), "cn a");
    assert_eq!(unrevoke(&["a", "b", "c"]).target(), "cn a and 2 more");
    let target = AccessBody::SetAcl {
        expected: [0xab; 32],
        acl: Acl::default(),
    }
    .target();
    assert!(target.starts_with("abababababababab becomes "), "{target}");
}
