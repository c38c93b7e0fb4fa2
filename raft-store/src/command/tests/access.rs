//! Access control is replaced whole, and only by who has read it; revocations are added and taken back.

use super::*;
use crate::state::access::{Acl, AclRule, Operation, RevocationKey, Role, RoleEntry, Who};

fn entry(role: Role) -> RoleEntry {
    RoleEntry {
        role,
        issuer: "CN=ca".into(),
        ou: Some("Admin".into()),
        cn: None,
        spki_sha256: None,
    }
}

/// With an administrator, a unit that may only decrypt, and a rule.
fn acl() -> Acl {
    let who = Who {
        cn: Some("batch".into()),
        ..Who::default()
    };
    Acl {
        mappings: BTreeMap::from([("Trading".into(), BTreeSet::from([context()]))]),
        roles: vec![entry(Role::Admin)],
        operations: BTreeMap::from([("Trading".into(), BTreeSet::from([Operation::Decrypt]))]),
        rules: vec![AclRule {
            who,
            contexts: BTreeSet::from([context()]),
            operations: BTreeSet::from([Operation::Encrypt]),
        }],
    }
}

fn set(expected_digest: [u8; 32], acl: Acl) -> Op {
    Op::SetAcl(SetAcl { expected_digest, acl })
}

fn digest(world: &World) -> [u8; 32] {
    world.state.acl().unwrap().digest()
}

#[test]
fn access_control_is_replaced_by_who_has_read_it() {
    let mut world = World::new();
    let read = digest(&world);
    world.ok(set(read, acl()));
    assert_eq!(world.state.acl(), Some(&acl()));
    // Whoever has read what was there before is told so, and changes nothing.
    let digest = digest(&world);
    let refusal = world.refused(set(
        read,
        Acl {
            rules: vec![],
            ..acl()
        },
    ));
    assert_eq!(refusal, Refusal::from(Conflict::OtherAcl { digest }));
    assert_eq!(world.state.acl(), Some(&acl()));
    world.ok(set(
        digest,
        Acl {
            rules: vec![],
            ..acl()
        },
    ));
}

#[test]
fn nobody_is_left_without_an_administrator() {
    let mut world = World::new();
    for roles in [vec![], vec![entry(Role::Operator), entry(Role::Auditor)]] {
        let read = digest(&world);
        let refusal = world.refused(set(read, Acl { roles, ..acl() }));
        assert_eq!(refusal, Refusal::from(Invalid::NoAdmin));
    }
    assert_eq!(world.state.acl(), Some(&Acl::default()));
}

#[test]
fn before_there_is_a_cluster_there_is_nothing_to_set() {
    let refusal = World::empty().refused(set(Acl::default().digest(), acl()));
    assert_eq!(refusal, Refusal::from(Missing::Cluster));
}

#[test]
fn every_part_of_access_control_is_part_of_its_digest() {
    let other_who = |who: Who| {
        let mut acl = acl();
        acl.rules[0].who = who;
        acl
    };
    let all = [
        Acl::default(),
        acl(),
        Acl {
            mappings: BTreeMap::new(),
            ..acl()
        },
        Acl {
            mappings: BTreeMap::from([("Trading".into(), BTreeSet::new())]),
            ..acl()
        },
        Acl {
            roles: vec![],
            ..acl()
        },
        Acl {
            roles: vec![entry(Role::Operator)],
            ..acl()
        },
        Acl {
            roles: vec![RoleEntry {
                ou: None,
                cn: Some("Admin".into()),
                ..entry(Role::Admin)
            }],
            ..acl()
        },
        Acl {
            roles: vec![RoleEntry {
                spki_sha256: Some([7; 32]),
                ..entry(Role::Admin)
            }],
            ..acl()
        },
        Acl {
            operations: BTreeMap::new(),
            ..acl()
        },
        Acl {
            operations: BTreeMap::from([("Trading".into(), BTreeSet::from([Operation::Rewrap]))]),
            ..acl()
        },
        Acl {
            rules: vec![],
            ..acl()
        },
        other_who(Who {
            ou: Some("batch".into()),
            ..Who::default()
        }),
        other_who(Who {
            issuer: Some("batch".into()),
            ..Who::default()
        }),
    ];
    let digests: BTreeSet<[u8; 32]> = all.iter().map(Acl::digest).collect();
    assert_eq!(digests.len(), all.len());
}

/// Logs name digests: the form must never change. Computed apart from this code.
#[test]
fn the_digest_of_known_rules_is_what_it_always_was() {
    assert_eq!(
        hex::encode(Acl::default().digest()),
        "ea02692c336b9e7b04e6bcc96a4304a032c59944b98772054e04f1de3f5a5ed4"
    );
    assert_eq!(
        hex::encode(acl().digest()),
        "0a79a02e3e4233dcc78f7d2ce146b19188eb3a812f351a0babba33d5bf9f44d8"
    );
}

#[test]
fn a_revocation_is_taken_back_and_what_is_not_there_is_no_matter() {
    let mut world = World::new();
    let by_cn = |cn: &str| RevocationKey::CommonName(cn.into());
    let revocations = ["a", "b"].map(|cn| (by_cn(cn), "lost".to_owned())).to_vec();
    world.ok(Op::AddRevocations(AddRevocations { revocations }));
    for _ in 0..2 {
        world.ok(Op::RemoveRevocations(RemoveRevocations {
            revocations: vec![by_cn("a"), by_cn("never"), RevocationKey::Fingerprint([1; 32])],
        }));
        let left: Vec<_> = world
            .state
            .revocations()
            .iter()
            .map(|(key, _)| key.clone())
            .collect();
        assert_eq!(left, [by_cn("b")]);
    }
}

/// The leader has let both through: neither was revoked when it looked.
#[test]
fn of_two_who_revoke_each_other_at_once_one_stays() {
    let admin_named = |cn: &str, serial: &str| {
        let Origin::Admin(admin) = admin() else { panic!() };
        Origin::Admin(AdminOrigin {
            fingerprint: [serial.len() as u8; 32],
            cn: cn.into(),
            serial: serial.into(),
            ..admin
        })
    };
    let revoke = |key: RevocationKey| {
        Op::AddRevocations(AddRevocations {
            revocations: vec![(key, "stolen".to_owned())],
        })
    };
    let by_serial = |serial: &str| RevocationKey::Serial {
        issuer: "CN=ca".into(),
        serial: serial.into(),
    };
    let (ann, bob) = (admin_named("ann", "a"), admin_named("bob", "bb"));
    for of_bob in [
        RevocationKey::CommonName("bob".into()),
        by_serial("bb"),
        RevocationKey::Fingerprint([2; 32]),
    ] {
        let mut world = World::new();
        let first = world.command(revoke(of_bob.clone()), ann.clone());
        assert!(matches!(world.send(&first), Outcome::Done(_)));
        let digest = digest(&world);
        for late in [
            revoke(by_serial("a")),
            Op::RemoveRevocations(RemoveRevocations {
                revocations: vec![of_bob.clone()],
            }),
            set(digest, acl()),
            prepare(0, 1),
        ] {
            let late = world.command(late, bob.clone());
            assert_eq!(world.send(&late), Outcome::Refused(Forbidden::Revoked.into()));
        }
        let kept: Vec<_> = world.state.revocations().iter().map(|(key, _)| key).collect();
        assert_eq!(kept, [&of_bob]);
        // Ann goes on, and so does what nodes do by themselves.
        world.ok(prepare(0, 1));
        let back = world.command(
            Op::RemoveRevocations(RemoveRevocations {
                revocations: vec![of_bob],
            }),
            ann.clone(),
        );
        assert!(matches!(world.send(&back), Outcome::Done(_)));
    }
}

#[test]
fn neither_comes_from_a_node_in_its_own_name() {
    let operations = [
        set([0; 32], acl()),
        Op::RemoveRevocations(RemoveRevocations { revocations: vec![] }),
    ];
    for op in operations {
        assert!(!op.forwardable_from_node(), "{}", op.name());
    }
}

/// What stands in its own files a member may add, and nobody takes that for another's word.
#[test]
fn a_member_adds_revocations_in_its_own_name_and_who_only_registered_adds_none() {
    let mut world = World::new();
    let joiner = world.join("n2", 2);
    let revoke = |cn: &str| {
        Op::AddRevocations(AddRevocations {
            revocations: vec![(RevocationKey::CommonName(cn.into()), "lost".to_owned())],
        })
    };
    assert!(revoke("a").forwardable_from_node());
    let refusal = world.refused_as(joiner, revoke("admin"));
    let operation = "add_revocations".to_owned();
    assert_eq!(refusal, Refusal::from(Forbidden::Operation { operation }));
    assert_eq!(
        world.refused_as(77, revoke("admin")),
        Refusal::from(Missing::Node(77))
    );
    assert!(world.state.revocations().is_empty());

    let member = Node {
        status: NodeStatus::Member,
        ..Node::clone(world.state.nodes.get(&joiner).unwrap())
    };
    world.state.nodes.put(joiner, member).unwrap();
    // The leader is another node.
    assert_ne!(world.leader, joiner);
    world.ok_as(joiner, revoke("a"));
    assert_eq!(world.state.revocations().len(), 1);
    world.remove(joiner);
    let refusal = world.refused_as(joiner, revoke("b"));
    assert!(
        matches!(refusal, Refusal::Forbidden(Forbidden::Removed { .. })),
        "{refusal}"
    );
}
