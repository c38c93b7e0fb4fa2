//! Nothing grows beyond what storage takes: a command that would is refused while it still can be.

use super::*;
use crate::state::access::RevocationKey;
use crate::state::node::SlotReport;
use crate::state::table::MAX_KEY;
use crate::state::usage::UseCount;

fn too_large(refusal: &Refusal) -> Option<(Bounded, u64, u64)> {
    match refusal {
        Refusal::Invalid(Invalid::TooLarge { what, size, most }) => Some((*what, *size, *most)),
        _ => None,
    }
}

fn filler(length: usize) -> String {
    "x".repeat(length)
}

/// An operation whose row is longer by a given number of bytes.
type Growing = fn(&mut World, usize) -> Op;

fn meta(world: &mut World, more: usize) -> Op {
    *world = World::empty();
    let name = filler(more);
    Op::CreateCluster(CreateCluster { name, ..cluster() })
}

fn acl(world: &mut World, more: usize) -> Op {
    *world = World::empty();
    let acl = AclV1 {
        mappings: BTreeMap::from([(filler(more), BTreeSet::new())]),
        roles: vec![],
    };
    Op::CreateCluster(CreateCluster { acl, ..cluster() })
}

fn version(_: &mut World, more: usize) -> Op {
    let Op::PrepareVersion(mut prepare) = prepare(0, 1) else {
        panic!()
    };
    prepare.material.sealed_key = vec![0; more];
    Op::PrepareVersion(prepare)
}

fn slot_row(_: &mut World, more: usize) -> Op {
    let Op::AddTransportKey(mut add) = transport(2, 1) else {
        panic!()
    };
    add.check = vec![0; more];
    Op::AddTransportKey(add)
}

fn report_row(_: &mut World, more: usize) -> Op {
    let slot_report = SlotReport {
        serving: true,
        state: filler(more),
        missing_keys: 0,
    };
    let report = NodeReport {
        slots: BTreeMap::from([(slot(), slot_report)]),
        ..report(1, 1)
    };
    Op::ReportNode(ReportNode { node: 1, report })
}

fn revocation(_: &mut World, more: usize) -> Op {
    let revocations = vec![(RevocationKey::CommonName("cn".into()), filler(more))];
    Op::AddRevocations(AddRevocations { revocations })
}

/// The longest row of a kind.
fn longest(world: &World, kind: RowKind) -> usize {
    let rows = world.rows().into_iter();
    rows.filter(|row| row.0 == kind)
        .map(|row| row.2.len())
        .max()
        .unwrap_or(0)
}

#[test]
fn every_kind_of_row_takes_its_most_and_refuses_one_byte_more() {
    let cases: [(RowKind, Growing); 6] = [
        (RowKind::Meta, meta),
        (RowKind::Acl, acl),
        (RowKind::Version, version),
        (RowKind::Slot, slot_row),
        (RowKind::Report, report_row),
        (RowKind::Revocation, revocation),
    ];
    for (kind, grow) in cases {
        let attempt = |more| {
            let mut world = World::new();
            let op = grow(&mut world, more);
            let before = world.rows();
            let outcome = world.run(op);
            (world, before, outcome)
        };
        let (world, _, outcome) = attempt(0);
        assert!(matches!(outcome, Outcome::Done(_)), "{kind}: {outcome:?}");
        let room = kind.limit() - longest(&world, kind);
        let (world, _, outcome) = attempt(room);
        assert!(matches!(outcome, Outcome::Done(_)), "{kind}: {outcome:?}");
        assert_eq!(longest(&world, kind), kind.limit());
        let (world, before, outcome) = attempt(room + 1);
        let Outcome::Refused(refusal) = outcome else {
            panic!("{kind}: {outcome:?}")
        };
        let limit = kind.limit() as u64;
        assert_eq!(
            too_large(&refusal),
            Some((Bounded::Row(kind), limit + 1, limit)),
            "{kind}"
        );
        assert_eq!(world.rows(), before, "{kind}: what was refused changed nothing");
    }
}

#[test]
fn rows_that_nothing_can_make_longer_are_far_below_their_most() {
    let mut world = World::new();
    world.token();
    world.ok(prepare(0, 1));
    let key = VersionKey {
        context: context(),
        version: 1,
    };
    let count = UseCount {
        decryptions: 1,
        ..UseCount::default()
    };
    for feature_level in [1, FEATURE_LEVEL] {
        let report = NodeReport {
            feature_level,
            uses: BTreeMap::from([(key.clone(), count)]),
            ..report(u64::from(feature_level), 1)
        };
        world.ok(Op::ReportNode(ReportNode { node: 1, report }));
    }
    world.ok(Op::LeaseInvocations(LeaseInvocations {
        node: 1,
        boot: Boot([1; 16]),
        claims: vec![Claim {
            context: context(),
            version: 1,
            key_uid: uid(1),
            held: true,
            seen: 0,
            count: 1,
        }],
    }));
    let kinds = [
        RowKind::Context,
        RowKind::JoinToken,
        RowKind::Use,
        RowKind::Uncounted,
        RowKind::Lease,
    ];
    for kind in kinds {
        assert!((1..kind.limit() / 8).contains(&longest(&world, kind)), "{kind}");
    }
}

#[test]
fn an_address_is_no_longer_than_a_host_name_and_a_port_can_be() {
    let mut world = World::new();
    for (bytes, kept) in [(300, true), (301, false)] {
        let Op::RegisterNode(mut register) = register(world.token(), "n2", 2) else {
            panic!()
        };
        register.cluster_address = filler(bytes);
        let outcome = world.run(Op::RegisterNode(register));
        if kept {
            assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
            continue;
        }
        let Outcome::Refused(refusal) = outcome else {
            panic!("{outcome:?}")
        };
        assert_eq!(too_large(&refusal), Some((Bounded::Address, 301, 300)));
    }
    let long = CreateCluster {
        api_address: filler(301),
        ..cluster()
    };
    let refusal = World::empty().refused(Op::CreateCluster(long));
    assert_eq!(too_large(&refusal), Some((Bounded::Address, 301, 300)));
}

#[test]
fn an_answer_that_cannot_be_kept_is_not_given_for_something_done() {
    let mut world = World::new();
    let before = (world.rows(), world.state.requests().len());
    let op = revocation(&mut world, 0);
    let long = Command {
        id: RequestId::Client {
            principal: [1; 32],
            operation: "op".into(),
            key: filler(RowKind::Request.limit()),
        },
        ..world.command(op, Origin::Node(1))
    };
    let Outcome::Refused(refusal) = world.send(&long) else {
        panic!()
    };
    assert!(matches!(
        too_large(&refusal),
        Some((Bounded::Row(RowKind::Request), ..))
    ));
    assert_eq!((world.rows(), world.state.requests().len()), before);
}

#[test]
fn a_key_is_kept_up_to_its_limit_and_only_if_its_bytes_give_it_back() {
    let mut world = World::new();
    let mut revoke = |key| {
        let revocations = vec![(key, String::new())];
        world.run(Op::AddRevocations(AddRevocations { revocations }))
    };
    let done = Outcome::Done(Done::Ok);
    // One byte of the key says which kind of revocation it is.
    assert_eq!(revoke(RevocationKey::CommonName(filler(MAX_KEY - 1))), done);
    let Outcome::Refused(refusal) = revoke(RevocationKey::CommonName(filler(MAX_KEY))) else {
        panic!()
    };
    let most = MAX_KEY as u64;
    let what = Bounded::RowKey(RowKind::Revocation);
    assert_eq!(too_large(&refusal), Some((what, most + 1, most)));
    let serial = |serial: &str| RevocationKey::Serial {
        issuer: "CN=ca".into(),
        serial: serial.into(),
    };
    assert_eq!(revoke(serial("0a")), done);
    let kind = RowKind::Revocation;
    let split = Refusal::Invalid(Invalid::Key { kind });
    assert_eq!(revoke(serial("0\0a")), Outcome::Refused(split));
}

#[test]
fn what_a_node_registers_and_grants_has_its_limits() {
    let mut world = World::new();
    let key = SlotKey {
        spki: vec![1; 2 << 10],
        epoch: 1,
        signature: vec![1; 1 << 10],
        signer_chain: vec![vec![1; 4 << 10]; 4],
    };
    let register = |key: &SlotKey| {
        let (slot, key) = (slot(), key.clone());
        Op::RegisterSlotKey(RegisterSlotKey { node: 1, slot, key })
    };
    let longer = [
        (
            Bounded::SlotPublicKey,
            SlotKey {
                spki: vec![1; (2 << 10) + 1],
                ..key.clone()
            },
        ),
        (
            Bounded::SlotSignature,
            SlotKey {
                signature: vec![1; (1 << 10) + 1],
                ..key.clone()
            },
        ),
        (
            Bounded::Certificates,
            SlotKey {
                signer_chain: vec![vec![1]; 5],
                ..key.clone()
            },
        ),
        (
            Bounded::CertificateBytes,
            SlotKey {
                signer_chain: vec![vec![1; (16 << 10) + 1]],
                ..key.clone()
            },
        ),
    ];
    for (what, key) in longer {
        let refusal = world.refused(register(&key));
        assert_eq!(too_large(&refusal).map(|found| found.0), Some(what));
    }
    world.ok(register(&key));
    let grant = |bytes| {
        Op::GrantTransportKey(GrantTransportKey {
            slot: slot(),
            id: TransportId([1; 16]),
            grantee: Grantee::Node(1),
            grant: Grant {
                epoch: 1,
                blob: vec![1; bytes],
            },
        })
    };
    let refusal = world.refused(grant((8 << 10) + 1));
    assert_eq!(too_large(&refusal).map(|found| found.0), Some(Bounded::Grant));
    world.ok(grant(8 << 10));
}

#[test]
fn a_label_is_as_long_as_a_token_keeps() {
    let mut world = World::new();
    let labelled = |bytes| {
        let Op::PrepareVersion(mut prepare) = prepare(0, 1) else {
            panic!()
        };
        prepare.label = filler(bytes);
        Op::PrepareVersion(prepare)
    };
    let refusal = world.refused(labelled(256));
    assert_eq!(too_large(&refusal), Some((Bounded::Label, 256, 255)));
    world.ok(labelled(255));
}

/// Registers keys for slots `s0` and on, `chain` bytes of certificates with each, until one is refused.
fn register_slots(world: &mut World, chain: usize) -> (u32, Refusal) {
    for number in 0..100 {
        let register = RegisterSlotKey {
            node: 1,
            slot: SlotName::new(&format!("s{number}")).unwrap(),
            key: SlotKey {
                spki: vec![1; 422],
                epoch: 1,
                signature: vec![1; 72],
                signer_chain: vec![vec![1; chain]],
            },
        };
        let before = world.rows();
        match world.run(Op::RegisterSlotKey(register)) {
            Outcome::Done(_) => {}
            Outcome::Refused(refusal) => {
                assert_eq!(world.rows(), before);
                return (number, refusal);
            }
            Outcome::Nothing => panic!(),
        }
    }
    panic!("a hundred slots are kept")
}

#[test]
fn a_node_has_keys_for_64_slots_or_as_many_as_its_row_takes() {
    let (kept, refusal) = register_slots(&mut World::new(), 1000);
    assert_eq!(kept, 64);
    assert_eq!(too_large(&refusal), Some((Bounded::SlotKeys, 65, 64)));
    let mut world = World::new();
    let (kept, refusal) = register_slots(&mut world, 16 << 10);
    let what = too_large(&refusal).map(|found| found.0);
    assert_eq!((kept, what), (7, Some(Bounded::Row(RowKind::Node))));
    let refused = world.state.nodes().get(&1).unwrap();
    assert_eq!(refused.slot_keys.len(), 7);
}

#[test]
fn a_slot_has_as_many_transport_keys_as_its_row_takes() {
    let mut world = World::new();
    for generation in 1..100 {
        let Op::AddTransportKey(mut add) = transport(generation + 1, u32::from(generation)) else {
            panic!()
        };
        add.check = vec![0; 40_000];
        let before = world.rows();
        let outcome = world.run(Op::AddTransportKey(add));
        if let Outcome::Refused(refusal) = outcome {
            let what = too_large(&refusal).map(|found| found.0);
            assert_eq!((generation, what), (4, Some(Bounded::Row(RowKind::Slot))));
            assert_eq!(world.rows(), before, "the one before is still current");
            world.ok(prepare_under(4));
            return;
        }
    }
    panic!("a hundred transport keys are kept")
}

fn prepare_under(transport: u8) -> Op {
    let Op::PrepareVersion(mut prepare) = prepare(0, 1) else {
        panic!()
    };
    prepare.material.transport_id = TransportId([transport; 16]);
    Op::PrepareVersion(prepare)
}
