//! Leases of invocations: what is given is in the state, once, and never more than there is.

use proptest::prelude::*;

use super::*;
use crate::codec::MAX_COMMAND_BYTES;
use crate::state::frozen::RotationPolicyV1;
use crate::state::lease::{MAX_INVOCATIONS, NodeLease, VersionLease, ceiling, largest};
use crate::state::usage::UseCount;

const LIMIT: u64 = 2000;

fn boot(run: u8) -> Boot {
    Boot([run; 16])
}

fn claim(version: u32, seen: u64, count: u64) -> Claim {
    Claim {
        context: context(),
        version,
        key_uid: uid(version),
        held: false,
        seen,
        count,
    }
}

fn lease(node: RaftId, run: u8, claims: Vec<Claim>) -> Op {
    let boot = boot(run);
    Op::LeaseInvocations(LeaseInvocations { node, boot, claims })
}

impl World {
    /// Members 1 to 3, of which 1 votes, and version 1 of `c` active under a small limit.
    fn leasing() -> Self {
        let mut world = Self::empty();
        world.ok(Op::CreateCluster(cluster()));
        world.ok(transport(1, 0));
        world.ok(create(LIMIT));
        for id in [2, 3] {
            let node = node(&format!("n{id}"), id as u8);
            world.state.nodes.put(id, node).unwrap();
        }
        world.ok(prepare(0, 1));
        for node in [1, 2, 3] {
            world.ack(node, 1);
        }
        world.ok(activate(1, &[]));
        world
    }

    fn row(&self, version: u32) -> VersionLease {
        self.state.lease(&key(version))
    }

    fn given(&self, node: RaftId, run: u8, version: u32) -> u64 {
        self.row(version).given(node, boot(run))
    }
}

fn create(max_invocations: u64) -> Op {
    Op::CreateContext(CreateContext {
        name: context(),
        uid: ContextUid([1; 16]),
        slot: slot(),
        binding: BindingMode::Shared,
        policy: RotationPolicy {
            max_invocations,
            ..RotationPolicy::default()
        },
    })
}

#[test]
fn a_node_is_given_what_it_asks_for_and_finds_it_in_the_state() {
    let mut world = World::leasing();
    assert!(world.state.leases().is_empty());
    world.ok_as(2, lease(2, 1, vec![claim(1, 0, 60)]));
    world.ok_as(3, lease(3, 1, vec![claim(1, 0, 70)]));
    world.ok_as(2, lease(2, 1, vec![claim(1, 60, 40)]));
    let expected = VersionLease {
        leased: 171,
        short: false,
        nodes: BTreeMap::from([
            (
                2,
                NodeLease {
                    boot: boot(1),
                    given: 100,
                },
            ),
            (
                3,
                NodeLease {
                    boot: boot(1),
                    given: 70,
                },
            ),
        ]),
    };
    assert_eq!(world.row(1), expected, "the check record is one of them");
}

#[test]
fn an_acknowledgement_and_the_first_lease_are_one_entry() {
    let mut world = World::leasing();
    world.ok(prepare(1, 2));
    let held = Claim {
        held: true,
        ..claim(2, 0, 60)
    };
    world.ok_as(2, lease(2, 1, vec![held.clone()]));
    assert!(world.version(2).acks.contains(&2));
    assert_eq!(world.given(2, 1, 2), 60);
    // Who restarts has acknowledged already, and begins with nothing.
    world.ok_as(2, lease(2, 2, vec![held]));
    assert_eq!((world.given(2, 1, 2), world.given(2, 2, 2)), (0, 60));
    assert_eq!(world.row(2).leased, 121);
}

#[test]
fn a_request_that_arrives_again_under_another_id_is_met_once() {
    let mut world = World::leasing();
    let op = lease(1, 1, vec![claim(1, 0, 60)]);
    world.ok(op.clone());
    let before = world.rows();
    world.ok(op);
    assert_eq!(world.rows(), before);
}

#[test]
fn nobody_leases_for_another_and_who_joins_or_was_removed_is_given_nothing() {
    let mut world = World::leasing();
    let forbidden = world.refused_as(2, lease(1, 1, vec![claim(1, 0, 60)]));
    assert_eq!(forbidden, Forbidden::NotItself { node: 1 }.into());
    let joining = world.join("n9", 9);
    let held = Claim {
        held: true,
        ..claim(1, 0, 60)
    };
    world.ok_as(joining, lease(joining, 1, vec![held]));
    assert!(world.version(1).acks.contains(&joining), "what it holds counts");
    assert!(world.state.leases().is_empty());
    world.remove(3);
    let removed = world.refused_as(3, lease(3, 1, vec![claim(1, 0, 60)]));
    assert!(matches!(removed, Refusal::Forbidden(Forbidden::Removed { .. })));
}

#[test]
fn only_a_version_that_encrypts_or_is_about_to_is_leased() {
    let mut world = World::leasing();
    world.ok(prepare(1, 2));
    let other_key = Claim {
        key_uid: uid(9),
        ..claim(1, 0, 60)
    };
    world.ok(lease(1, 1, vec![other_key, claim(7, 0, 60), claim(2, 0, 60)]));
    assert_eq!(world.state.leases().len(), 1);
    for node in [1, 2, 3] {
        world.ack(node, 2);
    }
    world.ok(activate(2, &[]));
    world.ok(lease(1, 1, vec![claim(1, 0, 60)]));
    assert_eq!(world.given(1, 1, 1), 0, "it is retired");
}

#[test]
fn a_retired_version_keeps_its_sum_and_an_abandoned_one_nothing() {
    let mut world = World::leasing();
    world.ok(lease(1, 1, vec![claim(1, 0, 60)]));
    world.ok(prepare(1, 2));
    for node in [1, 2, 3] {
        world.ack(node, 2);
    }
    world.ok(activate(2, &[]));
    let closed = VersionLease {
        leased: 61,
        short: false,
        nodes: BTreeMap::new(),
    };
    assert_eq!(world.row(1), closed);
    world.ok(prepare(2, 3));
    world.ok(lease(1, 1, vec![claim(3, 0, 60)]));
    world.ok(abandon(3));
    assert!(!world.state.leases().contains(&key(3)));
    // Its sum outlives the key, as its uses do, and is no larger for it.
    world.ok(Op::ScheduleDestroy(schedule(1, VersionState::DecryptOnly)));
    let expected = vec![world.seen(1)];
    world.ok(advance(LEAST_WAIT_MS, expected));
    world.ok(begin(1));
    for node in [1, 2, 3] {
        world.ok_as(node, ack_destroyed(node, 1));
    }
    assert_eq!(world.version_state(1), VersionState::Destroyed);
    assert_eq!(world.row(1), closed);
    assert!(crate::codec::size(&closed) < 32);
}

#[test]
fn what_was_counted_before_there_were_leases_is_taken_first() {
    let mut world = World::leasing();
    let count = UseCount {
        encryptions: 500,
        ..UseCount::default()
    };
    let report = NodeReport {
        uses: BTreeMap::from([(key(1), count)]),
        ..report(1, 1)
    };
    world.ok(Op::ReportNode(ReportNode { node: 1, report }));
    assert_eq!(world.state.lease_part(&key(1)), (1800 - 501) / 3);
    world.ok(lease(1, 1, vec![claim(1, 0, 60)]));
    assert_eq!(world.row(1).leased, 561);
    assert!(!world.state.is_used_up(&key(1)));
    // From now on it is the leases that count.
    let report = NodeReport {
        uses: BTreeMap::from([(key(1), count)]),
        ..super::report(2, 1)
    };
    world.ok(Op::ReportNode(ReportNode { node: 1, report }));
    world.ok(lease(1, 1, vec![claim(1, 60, 60)]));
    assert_eq!(world.row(1).leased, 621);
}

#[test]
fn a_version_that_was_used_up_before_there_were_leases_is_so_although_nobody_can_ask_for_any() {
    let mut world = World::leasing();
    let uses = |encryptions| UseCount {
        encryptions,
        ..UseCount::default()
    };
    let told = |seq, encryptions| {
        let report = NodeReport {
            uses: BTreeMap::from([(key(1), uses(encryptions))]),
            ..report(seq, 1)
        };
        Op::ReportNode(ReportNode { node: 1, report })
    };
    world.ok(told(1, 1796));
    assert_eq!(world.state.lease_part(&key(1)), 1);
    assert!(!world.state.is_used_up(&key(1)), "each member can be given one");
    world.ok(told(2, 1));
    assert_eq!(world.state.lease_part(&key(1)), 0);
    assert!(world.state.leases().is_empty() && world.state.is_used_up(&key(1)));
}

#[test]
fn a_context_takes_no_limit_above_that_of_the_algorithm_and_an_old_one_has_that() {
    let mut world = World::empty();
    world.ok(Op::CreateCluster(cluster()));
    let size = MAX_INVOCATIONS + 1;
    let invalid = Invalid::TooLarge {
        what: Bounded::Invocations,
        size,
        most: MAX_INVOCATIONS,
    };
    assert_eq!(world.refused(create(size)), invalid.into());
    world.ok(Op::CreateContextV1(CreateContextV1 {
        name: context(),
        uid: ContextUid([1; 16]),
        slot: slot(),
        binding: BindingMode::Shared,
        policy: RotationPolicyV1 {
            interval_days: 7,
            max_versions: 3,
            cleanup_after_days: 30,
        },
    }));
    assert_eq!(world.state.max_invocations(&context()), MAX_INVOCATIONS);
    assert_eq!(world.state.contexts().get("c").unwrap().policy.interval_days, 7);
}

#[test]
fn a_command_with_as_many_claims_as_there_may_be_fits_into_the_log_and_one_more_is_refused() {
    let longest = ContextName::new(&"x".repeat(64)).unwrap();
    let claims = |count: usize| {
        let claim = Claim {
            context: longest.clone(),
            ..claim(1, 0, 1)
        };
        vec![claim; count]
    };
    let mut world = World::leasing();
    let full = world.command(lease(1, 1, claims(MAX_CLAIMS)), Origin::Node(1));
    assert!(crate::codec::encode(&full).unwrap().len() <= MAX_COMMAND_BYTES);
    world.ok(lease(1, 1, claims(MAX_CLAIMS)));
    let refused = world.refused(lease(1, 1, claims(MAX_CLAIMS + 1)));
    let invalid = Invalid::TooLarge {
        what: Bounded::Claims,
        size: MAX_CLAIMS as u64 + 1,
        most: MAX_CLAIMS as u64,
    };
    assert_eq!(refused, invalid.into());
}

proptest! {
    /// Three nodes that ask, ask again, restart and get old requests through, in any order: the sum holds all that any
    /// run of any of them was ever given, and stays below the ceiling. Each run's meter takes the largest sum that it
    /// ever saw under its name, so the meters of all runs together hold no more than was given out.
    #[test]
    fn the_sum_never_passes_its_ceiling_and_forgets_nothing_that_was_given(
        steps in prop::collection::vec((1..4_u64, 0..4_u8, 0..400_u64), 1..200),
    ) {
        let mut world = World::leasing();
        let mut runs = [1_u8; 3];
        let mut sent: Vec<(RaftId, Op)> = Vec::new();
        let mut given: u64 = 0;
        let mut meters: BTreeMap<(RaftId, u8), u64> = BTreeMap::new();
        for (node, kind, count) in steps {
            let run = &mut runs[node as usize - 1];
            let (by, op) = match kind {
                0 => {
                    *run += 1;
                    continue;
                }
                1 if !sent.is_empty() => sent[count as usize % sent.len()].clone(),
                _ => {
                    let seen = world.given(node, *run, 1);
                    (node, lease(node, *run, vec![claim(1, seen, count)]))
                }
            };
            let before = world.row(1);
            world.ok_as(by, op.clone());
            sent.push((by, op));
            let after = world.row(1);
            let more = after.leased - before.leased;
            given += more;
            prop_assert!(more <= largest(LIMIT));
            prop_assert_eq!(after.leased, 1 + given);
            prop_assert!(after.leased <= ceiling(LIMIT), "{:?}", after);
            prop_assert!(after.short || !before.short);
            let held: u64 = after.nodes.values().map(|lease| lease.given).sum();
            prop_assert!(held <= given);
            for (node, last) in (1..).zip(runs) {
                for run in 1..=last {
                    let meter = meters.entry((node, run)).or_default();
                    *meter = (*meter).max(world.given(node, run, 1));
                }
            }
            prop_assert!(meters.values().sum::<u64>() < after.leased, "{:?} of {:?}", meters, after);
        }
    }
}
