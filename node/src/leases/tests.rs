use std::sync::Arc;

use raft_store::command::{CreateContext, LeaseInvocations, Op};
use raft_store::names::ContextUid;
use raft_store::state::context::{BindingMode, RotationPolicy};

use super::*;
use crate::rotation::testing::{World, context, slot};

const BOUND: Duration = Duration::from_secs(60);
const LIMIT: u64 = 20_000;

/// A run of this node.
pub(super) fn run(boot: u8) -> Arc<Leases> {
    Leases::new(Boot([boot; 16]), BOUND)
}

pub(super) fn key(name: &str, version: u32) -> VersionKey {
    VersionKey {
        context: context(name),
        version,
    }
}

/// Three members, and version 1 of `small` active under a small limit.
pub(super) fn world() -> World {
    world_of(3)
}

fn world_of(members: u64) -> World {
    let mut world = World::new(members);
    world.ok(Op::CreateContext(CreateContext {
        name: context("small"),
        uid: ContextUid([2; 16]),
        slot: slot("s"),
        binding: BindingMode::Shared,
        policy: RotationPolicy {
            max_invocations: LIMIT,
            ..RotationPolicy::default()
        },
    }));
    let version = world.prepare("small");
    world.activate("small", version);
    world
}

fn claims(leases: &Leases, world: &World) -> Vec<Claim> {
    leases.wanting(&world.state, 1, |_, _| true)
}

/// As the driver does, and the state lets it have.
fn lease(leases: &Leases, world: &mut World) {
    let claims = claims(leases, world);
    send(leases.boot, world, claims);
    leases.look(&world.state, 1);
}

fn send(boot: Boot, world: &mut World, claims: Vec<Claim>) {
    let op = LeaseInvocations {
        node: 1,
        boot,
        claims,
    };
    world.ok_as(1, Op::LeaseInvocations(op));
}

fn meter(leases: &Leases, world: &World, name: &str, version: u32) -> Arc<Meter> {
    leases.meter(world.state.version(&context(name), version).unwrap().key_uid)
}

fn take(meter: &Meter, count: u64) {
    for _ in 0..count {
        assert!(meter.take());
    }
}

#[test]
fn a_version_is_claimed_when_half_is_gone_and_filled_up_again() {
    let (mut world, leases) = (world(), run(1));
    let smallest = LIMIT / 64;
    lease(&leases, &mut world);
    let meter = meter(&leases, &world, "small", 1);
    assert_eq!(meter.left(), smallest);
    assert!(claims(&leases, &world).is_empty());
    take(&meter, smallest / 2 - 1);
    assert!(claims(&leases, &world).is_empty(), "more than half is left");
    take(&meter, 1);
    let claim = claims(&leases, &world).remove(0);
    assert_eq!((claim.seen, claim.count), (smallest, smallest / 2));
    lease(&leases, &mut world);
    assert_eq!(meter.left(), smallest);
}

#[test]
fn what_is_left_lasts_beyond_the_bound_at_the_peak_rate_and_at_least_the_usual_lease_is_held() {
    let mut world = World::new(3);
    let version = world.prepare("c");
    world.activate("c", version);
    let leases = run(1);
    assert_eq!(claims(&leases, &world)[0].count, 1 << 16);
    lease(&leases, &mut world);
    let meter = meter(&leases, &world, "c", 1);
    let begin = Instant::now();
    leases.sample(&world.state, begin);
    take(&meter, 10_000);
    leases.sample(&world.state, begin + Duration::from_secs(2));
    // 5000 a second, for 60 s of staleness and 60 s more; twice, because it is claimed when half is gone.
    let target = 5000 * 120 * 2;
    let claim = claims(&leases, &world).remove(0);
    assert_eq!(claim.count, target - meter.left());
    lease(&leases, &mut world);
    assert_eq!(meter.left(), target);
    // The next version begins with what this one needed.
    let next = world.prepare("c");
    let version = world.state.version(&context("c"), next).unwrap().clone();
    let claim = leases.claim(&world.state, 1, (&key("c", next), &version), true);
    assert_eq!((claim.held, claim.seen, claim.count), (true, 0, target));
}

#[test]
fn a_small_limit_has_leases_of_a_sixteenth_at_most() {
    let (mut world, leases) = (world(), run(1));
    lease(&leases, &mut world);
    let meter = meter(&leases, &world, "small", 1);
    let begin = Instant::now();
    leases.sample(&world.state, begin);
    take(&meter, 300);
    leases.sample(&world.state, begin + Duration::from_secs(1));
    lease(&leases, &mut world);
    assert_eq!(meter.left(), LIMIT / 16);
}

#[test]
fn nothing_is_asked_of_a_version_that_does_not_encrypt_or_has_nothing_left() {
    let (mut world, leases) = (world(), run(1));
    let version = world.state.version(&context("small"), 1).unwrap().clone();
    let next = world.prepare("small");
    world.activate("small", next);
    let retired = world.state.version(&context("small"), 1).unwrap().clone();
    assert_ne!(version.state, retired.state);
    let claim = leases.claim(&world.state, 1, (&key("small", 1), &retired), true);
    assert_eq!((claim.held, claim.count), (true, 0));
    let wanting: Vec<u32> = claims(&leases, &world)
        .iter()
        .map(|claim| claim.version)
        .collect();
    assert_eq!(wanting, [2]);
    // Until the cluster has none any more.
    let meter = meter(&leases, &world, "small", 2);
    let mut rounds = 0;
    while !claims(&leases, &world).is_empty() {
        lease(&leases, &mut world);
        take(&meter, meter.left());
        rounds += 1;
        assert!(rounds < 200, "it ends");
    }
    let row = world.state.lease(&key("small", 2));
    assert!(row.short && row.leased <= LIMIT * 9 / 10);
    assert_eq!(world.state.lease_part(&key("small", 2)), 0);
    assert_eq!(leases.lacking(&world.state, 1, |_| true), 0, "it was given some");
    assert_eq!(
        run(2).lacking(&world.state, 1, |_| true),
        0,
        "nobody can be given any"
    );
}

#[test]
fn another_run_has_nothing_of_what_the_one_before_had() {
    let mut world = world();
    let before = run(1);
    lease(&before, &mut world);
    let after = run(2);
    after.look(&world.state, 1);
    let meter = meter(&after, &world, "small", 1);
    assert!(!meter.take());
    let lacking = |leases: &Leases, world: &World| leases.lacking(&world.state, 1, |_| true);
    assert_eq!((lacking(&before, &world), lacking(&after, &world)), (0, 1));
    lease(&after, &mut world);
    assert_eq!(meter.left(), LIMIT / 64);
    assert_eq!(lacking(&after, &world), 0);
    assert_eq!(world.state.lease(&key("small", 1)).leased, 1 + 2 * (LIMIT / 64));
}

#[test]
fn what_was_used_up_before_anybody_came_to_it_is_claimed_as_if_it_had_been_a_second() {
    let mut world = World::new(3);
    let version = world.prepare("c");
    world.activate("c", version);
    let leases = run(1);
    lease(&leases, &mut world);
    let meter = meter(&leases, &world, "c", 1);
    let begin = Instant::now();
    leases.sample(&world.state, begin);
    // Idle until now: nobody has measured a rate.
    take(&meter, meter.left() - 1);
    assert_eq!(claims(&leases, &world)[0].count, (1 << 16) - 1);
    take(&meter, 1);
    assert_eq!(claims(&leases, &world)[0].count, (1 << 16) * 120 * 2);
    lease(&leases, &mut world);
    assert_eq!(meter.left(), (1 << 16) * 120 * 2);
    // By now somebody has, and that is what counts from here on.
    leases.sample(&world.state, begin + Duration::from_secs(8));
    assert_eq!(leases.books().peak(&context("c")), 1 << 13);
}

#[test]
fn a_node_that_used_up_what_it_had_and_gets_no_more_is_starved_until_it_does_or_nobody_can() {
    let (mut world, leases) = (world(), run(1));
    let begin = Instant::now();
    let mut at = 0;
    let mut starved = |leases: &Leases, world: &World| {
        at += 7;
        leases.starved(&world.state, begin + Duration::from_secs(at), |_| true)
    };
    let (meter, key) = (meter(&leases, &world, "small", 1), key("small", 1));
    assert_eq!(
        [(); 2].map(|()| starved(&leases, &world)),
        [0, 0],
        "it lacks its first lease"
    );
    lease(&leases, &mut world);
    take(&meter, meter.left());
    assert_eq!([(); 2].map(|()| starved(&leases, &world)), [0, 1]);
    assert_eq!(leases.lacking(&world.state, 1, |_| true), 0);
    let now = begin + Duration::from_secs(3600);
    assert_eq!(leases.starved(&world.state, now, |asked| *asked != key), 0);
    assert_eq!(leases.left(&world.state), [(context("small"), 0)]);
    lease(&leases, &mut world);
    assert_eq!(starved(&leases, &world), 0);
    assert_eq!(leases.left(&world.state), [(context("small"), meter.left())]);
    // When nobody can be given any, no node is better off than this one.
    while world.state.lease_part(&key) > 0 {
        take(&meter, meter.left());
        lease(&leases, &mut world);
    }
    take(&meter, meter.left());
    assert_eq!([(); 2].map(|()| starved(&leases, &world)), [0, 0]);
}

#[test]
fn of_many_members_each_claims_no_more_than_all_of_them_can_have() {
    let mut world = world_of(9);
    let (leases, begin) = (run(1), Instant::now());
    lease(&leases, &mut world);
    let meter = meter(&leases, &world, "small", 1);
    leases.sample(&world.state, begin);
    take(&meter, 200);
    leases.sample(&world.state, begin + Duration::from_secs(1));
    lease(&leases, &mut world);
    assert_eq!(meter.left(), LIMIT * 9 / 10 / 36);
    assert!(claims(&leases, &world).is_empty() && !world.state.is_used_up(&key("small", 1)));
}

/// A claim of the run before arrives late, and takes this run's entry out of the state.
#[test]
fn an_old_claim_that_comes_through_gives_this_run_nothing_twice() {
    let mut world = world();
    let (before, after) = (run(1), run(2));
    let late = claims(&before, &world);
    lease(&after, &mut world);
    let meter = meter(&after, &world, "small", 1);
    let first = meter.left();
    take(&meter, first);
    send(before.boot, &mut world, late);
    assert_eq!(world.state.lease(&key("small", 1)).given(1, after.boot), 0);
    assert_eq!(
        after.lacking(&world.state, 1, |_| true),
        0,
        "what the state has forgotten, the meter has not"
    );
    // Of what it claims anew as much as it had counts for nothing; then it goes on.
    let (mut taken, mut rounds) = (first, 0);
    while taken == first {
        lease(&after, &mut world);
        let more = meter.left();
        take(&meter, more);
        taken += more;
        rounds += 1;
        assert!(rounds < 10);
    }
    assert!(taken < world.state.lease(&key("small", 1)).leased);
}

#[test]
fn a_pending_version_that_an_earlier_run_acknowledged_lacks_a_lease() {
    let (mut world, leases) = (world(), run(1));
    lease(&leases, &mut world);
    let next = world.prepare("small");
    assert!(
        claims(&leases, &world).is_empty(),
        "its acknowledgement will claim it"
    );
    assert_eq!(
        leases.lacking(&world.state, 1, |_| true),
        0,
        "it is not acknowledged yet"
    );
    world.ack(1, "small", next);
    assert_eq!(leases.lacking(&world.state, 1, |_| true), 1);
    assert_eq!(leases.lacking(&world.state, 1, |key| key.version != next), 0);
    lease(&leases, &mut world);
    assert_eq!(leases.lacking(&world.state, 1, |_| true), 0);
    world.activate("small", next);
    assert!(meter(&leases, &world, "small", next).take());
}
