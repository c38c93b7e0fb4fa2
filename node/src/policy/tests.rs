use raft_store::state::access::{AclRule, Who};

use super::*;
use crate::identity::{Authority, Identity};

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
            ..Acl::default()
        },
        revoked,
    )
}

#[test]
fn a_unit_may_use_its_own_contexts_and_no_others() {
    let policy = policy(vec![], vec![]);
    let caller = principal("trading-1", Some("Trading"));
    for op in [Op::Encrypt, Op::Decrypt, Op::Rewrap, Op::DataKey] {
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
    let unit = |ou| policy.unit(&principal("a", ou));
    assert_eq!(unit(Some("Trading")), Ok(()));
    assert_eq!(unit(Some("Database")), Ok(()));
    assert_eq!(unit(Some("Nobody")), Err(Denial::UnknownOu("Nobody".to_owned())));
    assert_eq!(unit(None), Err(Denial::NoOu));
}

/// Trading may only decrypt under its context; rules grant the rest.
fn finer(rules: Vec<AclRule>) -> Policy {
    let acl = Acl {
        mappings: [("Trading".to_owned(), set(&["exchange-key"]))].into(),
        operations: [("Trading".to_owned(), [Operation::Decrypt].into())].into(),
        rules,
        ..Acl::default()
    };
    Policy::new(&acl, [])
}

fn rule(who: Who, contexts: &[&str], operations: &[Op]) -> AclRule {
    AclRule {
        who,
        contexts: set(contexts),
        operations: operations.iter().map(|op| op.operation()).collect(),
    }
}

/// Everything that a caller may do, as `context:operation`.
fn all(policy: &Policy, caller: &Principal) -> Vec<String> {
    let mut all = Vec::new();
    for context in ["2fa", "exchange-key", "no-such"] {
        for op in OPS {
            if policy.authorise(caller, context, op).is_ok() {
                all.push(format!("{context}:{}", op.as_str()));
            }
        }
    }
    all
}

#[test]
fn a_unit_may_be_held_to_some_operations() {
    let policy = finer(vec![]);
    let caller = principal("trading-1", Some("Trading"));
    assert_eq!(all(&policy, &caller), ["exchange-key:decrypt"]);
    let denial = policy
        .authorise(&caller, "exchange-key", Op::Encrypt)
        .unwrap_err();
    assert_eq!(
        denial.to_string(),
        "organizational unit \"Trading\" may not encrypt under context \"exchange-key\""
    );
}

#[test]
fn a_rule_grants_beside_the_mapping_and_needs_every_named_part() {
    let who = |issuer: Option<&str>, ou: Option<&str>, cn: Option<&str>| Who {
        issuer: issuer.map(str::to_owned),
        ou: ou.map(str::to_owned),
        cn: cn.map(str::to_owned),
    };
    let writer = rule(
        who(Some("CN=Client CA"), Some("Trading"), Some("writer")),
        &["exchange-key"],
        &[Op::Encrypt, Op::DataKey],
    );
    let batch = rule(who(None, None, Some("batch")), &["2fa"], &[Op::Rewrap]);
    let policy = finer(vec![writer, batch]);
    let caller = |cn: &str, ou: &str| principal(cn, Some(ou));
    assert_eq!(
        all(&policy, &caller("writer", "Trading")),
        [
            "exchange-key:encrypt",
            "exchange-key:decrypt",
            "exchange-key:datakey"
        ]
    );
    // Its own unit's mapping, and nothing of the rule.
    for other in [
        caller("reader", "Trading"),
        from(&caller("writer", "Trading"), "CN=Other CA"),
    ] {
        assert_eq!(all(&policy, &other), ["exchange-key:decrypt"], "{other}");
    }
    assert!(all(&policy, &caller("writer", "Other")).is_empty());
    // A unit without a mapping.
    let batch = caller("batch", "Night");
    assert_eq!(all(&policy, &batch), ["2fa:rewrap"]);
    assert_eq!(policy.contexts_of(&batch), [ContextName::new("2fa").unwrap()]);
    assert_eq!(policy.unit(&batch), Ok(()));
    assert_eq!(policy.grant(&batch, "2fa", Op::Rewrap), Ok(Grant::Rule(1)));
    let mapped = caller("reader", "Trading");
    let grant = policy.grant(&mapped, "exchange-key", Op::Decrypt).unwrap();
    assert_eq!(grant.to_string(), "mappings.Trading");
    let foreign = policy.authorise(&batch, "2fa", Op::Decrypt);
    assert!(matches!(foreign, Err(Denial::Context { .. })), "{foreign:?}");
}

#[test]
fn no_rule_helps_a_certificate_without_a_unit_or_a_revoked_one() {
    let who = Who {
        cn: Some("batch".to_owned()),
        ..Who::default()
    };
    let acl = Acl {
        rules: vec![rule(who, &["2fa"], &OPS)],
        ..Acl::default()
    };
    let ask = |revoked: Vec<RevocationKey>, ou| {
        let policy = Policy::new(&acl, revoked);
        policy.authorise(&principal("batch", ou), "2fa", Op::Decrypt)
    };
    assert_eq!(ask(vec![], Some("Any")), Ok(()));
    assert_eq!(ask(vec![], None), Err(Denial::NoOu));
    let revoked = vec![RevocationKey::CommonName("batch".to_owned())];
    assert_eq!(ask(revoked, Some("Any")), Err(Denial::Revoked));
}

#[test]
fn a_rule_that_names_nobody_grants_nothing() {
    let policy = finer(vec![rule(Who::default(), &["2fa"], &OPS)]);
    assert!(all(&policy, &principal("a", Some("Any"))).is_empty());
    assert!(policy.unit(&principal("a", Some("Any"))).is_err());
}

#[test]
fn rules_of_an_issuer_that_is_not_known_here_do_not_count() {
    let bound = |issuer: &str| Who {
        issuer: Some(issuer.to_owned()),
        ..Who::default()
    };
    let mut policy = finer(vec![
        rule(bound("CN=Client CA"), &["2fa"], &[Op::Encrypt]),
        rule(bound("CN=Some Intermediate"), &["2fa"], &[Op::Decrypt]),
    ]);
    let (known, unknown) = (principal("a", Some("Any")), "CN=Some Intermediate");
    let unknown = from(&known, unknown);
    assert_eq!(all(&policy, &unknown), ["2fa:decrypt"]);
    policy.keep_issuers(&["CN=Client CA".to_owned()]);
    assert_eq!(all(&policy, &known), ["2fa:encrypt"]);
    assert!(all(&policy, &unknown).is_empty());
    assert!(policy.unit(&unknown).is_err() && policy.contexts_of(&unknown).is_empty());
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

#[test]
fn a_certificate_is_revoked_with_any_ca_that_it_hangs_on() {
    let authority = |serial: &str, fingerprint| Authority {
        serial: serial.to_owned(),
        issuer_dn: "CN=Root".to_owned(),
        fingerprint: [fingerprint; 32],
    };
    let below = vec![authority("a1", 7), authority("b2", 8)];
    let caller = Principal::below((*principal("x", Some("Trading"))).clone(), below);
    let by_serial = |serial: &str, issuer: &str| RevocationKey::Serial {
        issuer: issuer.to_owned(),
        serial: serial.to_owned(),
    };
    for (key, revoked) in [
        (by_serial("b2", "CN=Root"), true),
        (RevocationKey::Fingerprint([7; 32]), true),
        (by_serial("b2", "CN=Client CA"), false),
        (by_serial("c3", "CN=Root"), false),
        (RevocationKey::Fingerprint([9; 32]), false),
        // A common name is a caller's.
        (RevocationKey::CommonName("Root".to_owned()), false),
    ] {
        let policy = policy(vec![entry(Role::Admin)], vec![key.clone()]);
        assert_eq!(policy.check_certificate(&caller).is_err(), revoked, "{key:?}");
        assert_eq!(policy.contexts_of(&caller).is_empty(), revoked, "{key:?}");
    }
}

#[test]
fn names_in_metrics_are_for_everybody_until_somebody_has_the_role_for_it() {
    let of_unit = |role, unit: &str| RoleEntry {
        ou: Some(unit.to_owned()),
        issuer: "CN=Client CA".to_owned(),
        ..entry(role)
    };
    let reads = |policy: &Policy, unit: &str| policy.reads_names(&principal("x", Some(unit)));
    let open = policy(vec![of_unit(Role::Operator, "Ops")], vec![]);
    assert!(reads(&open, "Trading") && reads(&open, "Ops"));
    let roles = [
        (Role::Metrics, "Watch"),
        (Role::Operator, "Ops"),
        (Role::Backup, "Save"),
    ];
    let roles = roles.map(|(role, unit)| of_unit(role, unit)).to_vec();
    let mut kept = policy(roles, vec![]);
    for (unit, wanted) in [
        ("Watch", true),
        ("Ops", true),
        ("Save", false),
        ("Trading", false),
    ] {
        assert_eq!(reads(&kept, unit), wanted, "{unit}");
    }
    // That this node does not know the holders' CA opens nothing to others.
    kept.keep_issuers(&["CN=Other CA".to_owned()]);
    assert!(!reads(&kept, "Watch") && !reads(&kept, "Trading"));
}
