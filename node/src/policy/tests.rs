use super::*;
use crate::identity::Identity;

fn principal(cn: &str, ou: Option<&str>) -> Principal {
    Principal::new(Identity {
        cn: cn.to_owned(),
        ou: ou.map(str::to_owned),
        sans: Vec::new(),
        serial: "ab12".to_owned(),
        issuer_dn: "CN=Client CA".to_owned(),
        fingerprint: [1; 32],
        spki_sha256: [2; 32],
        not_after: i64::MAX,
    })
}

fn from(principal: &Principal, issuer: &str) -> Principal {
    Principal::new(Identity {
        issuer_dn: issuer.to_owned(),
        ..(**principal).clone()
    })
}

fn set(names: &[&str]) -> BTreeSet<ContextName> {
    names.iter().map(|name| ContextName::new(name).unwrap()).collect()
}

fn entry(role: Role) -> RoleEntry {
    RoleEntry {
        role,
        issuer: "CN=Admin CA".to_owned(),
        ou: None,
        cn: None,
        spki_sha256: None,
    }
}

fn policy(roles: Vec<RoleEntry>, revoked: Vec<RevocationKey>) -> Policy {
    let mappings = [
        ("Trading".to_owned(), set(&["exchange-key", "order-key"])),
        ("2FA".to_owned(), set(&["2fa"])),
        ("Database".to_owned(), BTreeSet::new()),
    ];
    Policy::new(
        &Acl {
            mappings: mappings.into(),
            roles,
        },
        revoked,
    )
}

#[test]
fn a_unit_may_use_its_own_contexts_and_no_others() {
    let policy = policy(vec![], vec![]);
    let caller = principal("trading-1", Some("Trading"));
    for op in [Op::Encrypt, Op::Decrypt] {
        assert_eq!(policy.authorise(&caller, "exchange-key", op), Ok(()));
        assert!(matches!(
            policy.authorise(&caller, "2fa", op),
            Err(Denial::Context { .. })
        ));
    }
    assert_eq!(policy.contexts_of(&caller).len(), 2);
}

#[test]
fn an_unknown_context_is_refused_as_a_foreign_one_is() {
    let policy = policy(vec![], vec![]);
    let caller = principal("trading-1", Some("Trading"));
    for context in ["2fa", "no-such-context", "", "Exchange-Key", &"x".repeat(100_000)] {
        let denial = policy.authorise(&caller, context, Op::Encrypt).unwrap_err();
        assert!(matches!(denial, Denial::Context { .. }), "{context}: {denial}");
        assert!(denial.to_string().len() < 300);
    }
}

#[test]
fn refusals_come_in_v1s_order() {
    let revoked = vec![RevocationKey::CommonName("gone".to_owned())];
    let policy = policy(vec![], revoked);
    let ask = |cn, ou| policy.authorise(&principal(cn, ou), "exchange-key", Op::Encrypt);
    assert_eq!(ask("gone", None), Err(Denial::Revoked));
    assert_eq!(ask("a", None), Err(Denial::NoOu));
    assert_eq!(
        ask("a", Some("Nobody")),
        Err(Denial::UnknownOu("Nobody".to_owned()))
    );
    assert_eq!(
        ask("a", Some("trading")),
        Err(Denial::UnknownOu("trading".to_owned()))
    );
    assert!(matches!(ask("a", Some("Database")), Err(Denial::Context { .. })));
}

#[test]
fn a_unit_without_a_mapping_is_known_before_any_context() {
    let policy = policy(vec![], vec![]);
    let unit = |ou| policy.unit(&principal("a", ou)).map(BTreeSet::len);
    assert_eq!(unit(Some("Trading")), Ok(2));
    assert_eq!(unit(Some("Database")), Ok(0));
    assert_eq!(unit(Some("Nobody")), Err(Denial::UnknownOu("Nobody".to_owned())));
    assert_eq!(unit(None), Err(Denial::NoOu));
}

#[test]
fn each_kind_of_revocation_matches_what_it_names() {
    let caller = principal("trading-1", Some("Trading"));
    let serial = |issuer: &str, serial: &str| RevocationKey::Serial {
        issuer: issuer.to_owned(),
        serial: serial.to_owned(),
    };
    for (key, matches) in [
        (RevocationKey::Fingerprint([1; 32]), true),
        (RevocationKey::Fingerprint([2; 32]), false),
        (RevocationKey::CommonName("trading-1".to_owned()), true),
        (RevocationKey::CommonName("Trading".to_owned()), false),
        (serial("CN=Client CA", "ab12"), true),
        (serial("CN=Other CA", "ab12"), false),
        (serial("CN=Client CA", "ab13"), false),
    ] {
        let revocations: Revocations = [key.clone()].into_iter().collect();
        assert_eq!(revocations.len(), 1);
        assert_eq!(revocations.contains(&caller), matches, "{key:?}");
    }
}

#[test]
fn a_role_needs_its_issuer_and_every_named_part() {
    let admin = RoleEntry {
        ou: Some("Admin".to_owned()),
        ..entry(Role::Admin)
    };
    let named = RoleEntry {
        cn: Some("aud".to_owned()),
        ..entry(Role::Auditor)
    };
    let pinned = RoleEntry {
        spki_sha256: Some([9; 32]),
        ..entry(Role::Backup)
    };
    let policy = policy(vec![admin, named, pinned], vec![]);
    let app = principal("root", Some("Admin"));
    assert!(
        policy.roles_of(&app).is_empty(),
        "the application CA made an admin"
    );
    let real = from(&app, "CN=Admin CA");
    assert_eq!(policy.roles_of(&real), BTreeSet::from([Role::Admin]));
    let auditor = from(&principal("aud", None), "CN=Admin CA");
    assert_eq!(policy.roles_of(&auditor), BTreeSet::from([Role::Auditor]));
    assert_eq!(policy.require_role(&auditor, &[Role::Auditor]), Ok(()));
    let denial = policy.require_role(&auditor, &[Role::Operator]).unwrap_err();
    assert_eq!(
        denial.to_string(),
        "needs one of the roles operator; the caller has [auditor]"
    );
    assert_eq!(policy.require_role(&real, &[Role::Operator]), Ok(()));
}

#[test]
fn a_revoked_admin_is_none() {
    let admin = RoleEntry {
        issuer: "CN=Client CA".to_owned(),
        ..entry(Role::Admin)
    };
    let policy = policy(vec![admin], vec![RevocationKey::Fingerprint([1; 32])]);
    let caller = principal("root", Some("Admin"));
    assert!(policy.roles_of(&caller).is_empty());
    assert_eq!(policy.require_role(&caller, &[]), Err(Denial::Revoked));
}

#[test]
fn seeds_without_an_issuer_get_the_admin_cas() {
    let seed = |issuer: Option<&str>| RoleSeed {
        key: "roles.admin[0]".to_owned(),
        role: Role::Admin,
        issuer: issuer.map(str::to_owned),
        ou: Some("Admin".to_owned()),
        cn: None,
        spki_sha256: None,
    };
    let entries = seed_roles(&[seed(None), seed(Some("CN=Other"))], "CN=Client CA");
    assert_eq!(entries[0].issuer, "CN=Client CA");
    assert_eq!(entries[1].issuer, "CN=Other");
}
