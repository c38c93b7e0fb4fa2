//! Dealing the steps of a plan.

use std::collections::{BTreeMap, BTreeSet};

use super::{Fault, FaultKind, Meanwhile, Plan, Shape, Step, Trouble, Victims};
use crate::cluster::spare;
use crate::random::Random;

/// Clock steps, in seconds: five minutes and four hundred days, both ways.
const CLOCK_STEPS: [i64; 4] = [300, -300, 400 * 86_400, -400 * 86_400];
/// `CKR_GENERAL_ERROR`, `CKR_DEVICE_ERROR`, `CKR_DEVICE_REMOVED`, `CKR_SESSION_HANDLE_INVALID`, `CKR_USER_NOT_LOGGED_IN`.
const ERRORS: [u32; 5] = [0x05, 0x30, 0x32, 0xB3, 0x101];
/// A slot may have eight transport keys that are not destroyed, and clients keep versions under the first of them. There are
/// two slots, and each step makes two keys in one of them; one that had no effect may have made them too, and is repeated.
const MOST_REKEYED: u32 = 4;
/// The same where nodes are removed as well, some of them with a new transport key in each slot.
const MOST_REKEYED_BESIDE_REMOVALS: u32 = 2;
/// One removal of so many replaces the keys that the node had: of six, which is as many as there can be, two.
const ROTATES_ONCE_IN: u32 = 3;
/// What breaks while members change: each comes before any comes again.
const MEANWHILE: [Meanwhile; 6] = [
    Meanwhile::LeaderKilled,
    Meanwhile::LeaderCutOff,
    Meanwhile::LeaderKilledAt(0),
    Meanwhile::NodeKilled,
    Meanwhile::LeaderPaused,
    Meanwhile::Nothing,
];
/// What the place of a pause between its shortest and its longest is drawn from.
const PAUSES: u64 = 1_500;
/// What a step takes besides its own time: finding a leader, starting nodes, getting ready.
const OVERHEAD_MS: u64 = 3_000;
/// Of the time of a run, what its steps may take: each of them has to come, and real ones may take longer than is counted on, or be
/// repeated.
const PLANNED: f64 = 0.6;
/// Steps are dealt for so much more time than a run has, for real ones that take less than is counted on: a node that is down is back in one
/// second where three are counted on.
const RESERVE: f64 = 3.0;

/// What is drawn for each step, all of it, always.
struct Drawn {
    /// Of [`PAUSES`].
    pause: u64,
    pick: u32,
    coin: bool,
    /// Of a thousand.
    first: u32,
    /// Of a thousand.
    second: u32,
    lasts: u64,
}

impl Drawn {
    fn from(random: &mut Random) -> Self {
        let mut number = |limit: u64| u32::try_from(random.below(limit)).unwrap_or_default();
        Self {
            pause: u64::from(number(PAUSES)),
            pick: number(5040),
            coin: number(2) == 1,
            first: number(1000),
            second: number(1000),
            lasts: u64::from(number(1000)),
        }
    }

    /// Between two bounds, by the first number.
    fn between(&self, low: u32, high: u32) -> u32 {
        low + (high - low) * self.first / 999
    }

    fn fault(&self, kind: FaultKind) -> Fault {
        let (leader, pick) = (self.coin, self.pick);
        let one_of = |count: usize| self.first as usize % count;
        match kind {
            FaultKind::KillLeader => Fault::Kill(Victims::Leader, pick),
            FaultKind::KillFollower => Fault::Kill(Victims::Follower, pick),
            FaultKind::KillMinority => Fault::Kill(Victims::Minority, pick),
            FaultKind::KillAll => Fault::Kill(Victims::All, pick),
            FaultKind::Pause => Fault::Pause {
                leader,
                pick,
                tenths: self.between(5, 30),
            },
            FaultKind::LeaderInMinority => Fault::Partition(Shape::LeaderInMinority, pick),
            FaultKind::LeaderInMajority => Fault::Partition(Shape::LeaderInMajority, pick),
            FaultKind::OneWay => Fault::Partition(
                Shape::OneWay {
                    from_leader: self.coin,
                },
                pick,
            ),
            FaultKind::Bridge => Fault::Partition(Shape::Bridge, pick),
            FaultKind::IsolateUntilSnapshot => Fault::IsolateUntilSnapshot(pick),
            FaultKind::Delay => Fault::Delay {
                delay_ms: self.between(5, 80),
                jitter_ms: self.second / 10,
            },
            FaultKind::Loss => Fault::Loss {
                lost_permille: self.between(5, 50),
                reset_permille: 1 + self.second / 250,
            },
            FaultKind::ByteRate => Fault::ByteRate {
                bytes_per_second: self.between(4_000, 50_000),
            },
            FaultKind::DiskFull => Fault::DiskFull { leader, pick },
            FaultKind::SlowFsync => Fault::SlowFsync {
                leader,
                pick,
                ms: self.between(20, 300),
            },
            FaultKind::FailingFsync => Fault::FailingFsync { leader, pick },
            FaultKind::LostWrites => Fault::LostWrites { all: self.coin, pick },
            FaultKind::TornTail => Fault::TornTail {
                on_stopped: self.coin,
                pick,
                permille: self.first,
            },
            FaultKind::ClockStep => Fault::ClockStep {
                seconds: CLOCK_STEPS[one_of(CLOCK_STEPS.len())],
            },
            FaultKind::TokenDeleted => Fault::Token(Trouble::Deleted { running: self.coin }, pick),
            FaultKind::TokenOlder => Fault::Token(Trouble::Older, pick),
            FaultKind::TokenUnreadable => Fault::Token(Trouble::Unreadable, pick),
            FaultKind::TokenSlow => Fault::Token(
                Trouble::Slow {
                    ms: self.between(50, 500),
                },
                pick,
            ),
            FaultKind::TokenHung => Fault::Token(Trouble::Hung, pick),
            FaultKind::TokenErrors => Fault::Token(
                Trouble::Errors {
                    code: ERRORS[one_of(ERRORS.len())],
                },
                pick,
            ),
            FaultKind::JoinRemove => Fault::JoinRemove {
                meanwhile: Meanwhile::Nothing,
                rotate: false,
                pick,
            },
            FaultKind::Failpoint => Fault::Failpoint {
                point: self.first,
                pick,
            },
            FaultKind::Transfer => Fault::Transfer {
                named: self.coin,
                pick,
            },
            FaultKind::Rekey => Fault::Rekey {
                kill_leader: self.coin,
                point: self.first,
            },
            FaultKind::RekeyReplication => Fault::RekeyReplication {
                kill_leader: self.coin,
                point: self.first,
            },
        }
    }

    fn step(&self, number: u32, kind: FaultKind, pause_ms: u32) -> Step {
        // Shortest, and what comes to it: a partition has to outlast an election, a token's trouble the looks at it.
        let (least, more) = match kind {
            FaultKind::KillLeader | FaultKind::KillFollower | FaultKind::KillMinority => (0, 3_000),
            FaultKind::KillAll | FaultKind::LostWrites | FaultKind::TornTail => (0, 2_000),
            FaultKind::Pause
            | FaultKind::IsolateUntilSnapshot
            | FaultKind::JoinRemove
            | FaultKind::Transfer
            | FaultKind::Rekey
            | FaultKind::RekeyReplication => (0, 1),
            FaultKind::Failpoint => (6_000, 4_000),
            kind if kind.is_partition() => (3_000, 3_000),
            _ => (4_000, 4_000),
        };
        let longest = u64::from(pause_ms);
        let shortest = longest / 4;
        Step {
            number,
            pause_ms: shortest + (longest - shortest) * self.pause / PAUSES,
            fault: self.fault(kind),
            lasts_ms: least + more * self.lasts / 1000,
        }
    }
}

/// What is dealt for a time is the beginning of what is dealt for a longer one: what is beyond [`PLANNED`] is the run's reserve.
pub(super) fn deal(seed: u64, minutes: f64, kinds: &BTreeSet<FaultKind>, nodes: u32, pause_ms: u32) -> Plan {
    let wanted = steps(seed, minutes * PLANNED, kinds, nodes, pause_ms).len();
    let mut all = steps(seed, minutes * RESERVE, kinds, nodes, pause_ms);
    let more = all.split_off(wanted.min(all.len()));
    Plan {
        seed,
        steps: all,
        more,
    }
}

fn steps(seed: u64, minutes: f64, kinds: &BTreeSet<FaultKind>, nodes: u32, pause_ms: u32) -> Vec<Step> {
    let mut random = Random::new(seed);
    let mut steps: Vec<Step> = Vec::new();
    let mut possible: Vec<FaultKind> = kinds
        .iter()
        .copied()
        .filter(|kind| nodes >= 3 || !kind.needs_three())
        .collect();
    // A plan of nothing but weather has only that to go by.
    let breaks = possible.iter().any(|kind| !kind.is_weather());
    let mut planned = 0;
    let (from_seed, mut points, mut joins) = (u32::try_from(seed % 1000).unwrap_or_default(), 0_u32, 0_u32);
    let removes = possible.contains(&FaultKind::JoinRemove);
    let rekeys = if removes {
        MOST_REKEYED_BESIDE_REMOVALS
    } else {
        MOST_REKEYED
    };
    // Numbers of nodes are never used again; transport keys stay for as long as a version needs them.
    let mut left = BTreeMap::from([(FaultKind::JoinRemove, spare(nodes)), (FaultKind::Rekey, rekeys)]);
    let wanted = (minutes.max(0.0) * 60_000.0) as u64;
    while !possible.is_empty() && (steps.is_empty() || planned < wanted) {
        let whole = !steps.is_empty();
        let mut cards = possible.clone();
        shuffle(&mut cards, &mut random);
        for kind in cards {
            let drawn = Drawn::from(&mut random);
            // The first round is dealt whole.
            if whole && planned >= wanted {
                continue;
            }
            let number = u32::try_from(steps.len() + 1).unwrap_or(u32::MAX);
            let mut step = drawn.step(number, kind, pause_ms);
            // One after the other, from anywhere on: drawn anew each time, some would hardly ever come.
            match &mut step.fault {
                Fault::Failpoint { point, .. } => {
                    *point = from_seed.wrapping_add(points);
                    points += 1;
                }
                Fault::JoinRemove {
                    meanwhile, rotate, ..
                } => {
                    *meanwhile = breaks_meanwhile(from_seed.wrapping_add(joins), drawn.second);
                    *rotate = joins.is_multiple_of(ROTATES_ONCE_IN);
                    joins += 1;
                }
                _ => {}
            }
            if kind.is_weather() != breaks {
                planned += step.pause_ms + step.lasts_ms + OVERHEAD_MS;
            }
            if let Some(left) = left.get_mut(&kind) {
                *left = left.saturating_sub(1);
            }
            steps.push(step);
        }
        possible.retain(|kind| left.get(kind) != Some(&0));
        if breaks && possible.iter().all(|kind| kind.is_weather()) {
            break;
        }
    }
    steps
}

/// The one whose turn it is, at the line that was drawn.
fn breaks_meanwhile(turn: u32, line: u32) -> Meanwhile {
    match MEANWHILE[turn as usize % MEANWHILE.len()] {
        Meanwhile::LeaderKilledAt(_) => Meanwhile::LeaderKilledAt(line),
        other => other,
    }
}

fn shuffle(cards: &mut [FaultKind], random: &mut Random) {
    for left in (2..=cards.len()).rev() {
        let pick = usize::try_from(random.below(left as u64)).unwrap_or_default();
        cards.swap(left - 1, pick);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::{PAUSE_MS, plan, plan_with_pauses};
    use super::*;

    fn all() -> BTreeSet<FaultKind> {
        FaultKind::ALL.iter().copied().collect()
    }

    #[test]
    fn the_plan_follows_from_the_seed_alone() {
        assert_eq!(plan(7, 10.0, &all(), 3), plan(7, 10.0, &all(), 3));
        assert_ne!(plan(7, 10.0, &all(), 3).steps, plan(8, 10.0, &all(), 3).steps);
        // A longer one begins as the shorter one does.
        let (short, long) = (plan(7, 5.0, &all(), 3), plan(7, 10.0, &all(), 3));
        let first = short.steps.len().min(FaultKind::ALL.len());
        assert_eq!(short.steps[..first], long.steps[..first]);
    }

    #[test]
    fn what_is_in_reserve_is_what_a_longer_plan_goes_on_with() {
        for minutes in [10.0, 60.0] {
            let short = plan(7, minutes, &all(), 3);
            let long = steps(7, minutes * RESERVE, &all(), 3, PAUSE_MS);
            let numbers = short.steps.iter().chain(&short.more).map(|step| step.number);
            assert!(numbers.eq(1..=long.len() as u32));
            assert_eq!([short.steps, short.more].concat(), long);
        }
        // One round takes longer than that already.
        assert!(plan(7, 0.1, &all(), 3).more.is_empty());
    }

    #[test]
    fn what_has_to_come_leaves_two_fifths_of_the_time_to_steps_that_take_longer() {
        for (minutes, kinds) in [
            (10.0, all()),
            (60.0, all()),
            (5.0, BTreeSet::from([FaultKind::KillLeader])),
        ] {
            let plan = plan(7, minutes, &kinds, 3);
            let breaks = plan.steps.iter().filter(|step| !step.fault.kind().is_weather());
            let each: Vec<u64> = breaks
                .map(|step| step.pause_ms + step.lasts_ms + OVERHEAD_MS)
                .collect();
            let (all, last): (u64, u64) = (each.iter().sum(), each.last().copied().unwrap_or_default());
            let wanted = (minutes * PLANNED * 60_000.0) as u64;
            assert!(
                all >= wanted && all - last < wanted,
                "{minutes}: {all} for {wanted}"
            );
            assert!(plan.more.len() > plan.steps.len());
        }
    }

    #[test]
    fn shorter_pauses_leave_room_for_more_of_the_same_steps() {
        let kinds = BTreeSet::from([FaultKind::KillLeader, FaultKind::KillAll]);
        let usual = plan(7, 60.0, &kinds, 3);
        assert_eq!(plan_with_pauses(7, 60.0, &kinds, 3, PAUSE_MS), usual);
        let hurried = plan_with_pauses(7, 60.0, &kinds, 3, 200);
        let count = |plan: &Plan, wanted: FaultKind| {
            let kinds = plan.steps.iter().map(|step| step.fault.kind());
            kinds.filter(|kind| *kind == wanted).count()
        };
        assert!(
            count(&usual, FaultKind::KillLeader) >= 180,
            "an hour has hundreds of kills: {}",
            count(&usual, FaultKind::KillLeader)
        );
        assert!(count(&hurried, FaultKind::KillAll) > count(&usual, FaultKind::KillAll) * 6 / 5);
        for (one, other) in usual.steps.iter().zip(&hurried.steps) {
            assert_eq!((&one.fault, one.lasts_ms), (&other.fault, other.lasts_ms));
            assert!((500..2_000).contains(&one.pause_ms) && (50..200).contains(&other.pause_ms));
        }
        assert!(
            plan_with_pauses(7, 1.0, &kinds, 3, 0)
                .steps
                .iter()
                .all(|step| step.pause_ms == 0)
        );
    }

    #[test]
    fn every_kind_comes_before_any_comes_again() {
        for seed in 0..50 {
            let plan = plan(seed, 0.1, &all(), 3);
            let kinds: BTreeSet<FaultKind> = plan.steps.iter().map(|step| step.fault.kind()).collect();
            assert_eq!(kinds, all(), "seed {seed}");
            assert_eq!(plan.steps.len(), FaultKind::ALL.len(), "seed {seed}");
        }
    }

    #[test]
    fn a_fault_is_of_the_kind_it_was_dealt_for_and_within_its_bounds() {
        for seed in 0..50 {
            for step in plan(seed, 60.0, &all(), 5).steps {
                match step.fault {
                    Fault::Pause { tenths, .. } => assert!((5..=30).contains(&tenths), "{tenths}"),
                    Fault::Delay { delay_ms, .. } => assert!((5..=80).contains(&delay_ms)),
                    Fault::ClockStep { seconds } => assert!(CLOCK_STEPS.contains(&seconds)),
                    _ => {}
                }
                assert!(step.pause_ms >= 500 && step.lasts_ms <= 10_000, "{step:?}");
            }
        }
        let mut random = Random::new(1);
        for kind in FaultKind::ALL {
            assert_eq!(Drawn::from(&mut random).fault(*kind).kind(), *kind);
        }
    }

    #[test]
    fn what_a_cluster_is_too_small_for_is_not_planned() {
        let plan = plan(1, 5.0, &all(), 1);
        assert!(!plan.steps.is_empty());
        assert!(plan.steps.iter().all(|step| !step.fault.kind().needs_three()));
        let impossible = BTreeSet::from([FaultKind::Bridge]);
        assert!(super::super::plan(1, 5.0, &impossible, 1).steps.is_empty());
    }

    #[test]
    fn no_more_nodes_join_than_there_are_numbers_for() {
        for seed in 0..20 {
            let kinds = BTreeSet::from([FaultKind::JoinRemove, FaultKind::KillAll]);
            let plan = plan(seed, 120.0, &kinds, 3);
            let joins = plan
                .steps
                .iter()
                .filter(|step| step.fault.kind() == FaultKind::JoinRemove);
            assert_eq!(joins.count(), spare(3) as usize);
            assert!(plan.steps.len() > 100);
        }
        // The weather does not go on for ever without them.
        let mixed = BTreeSet::from([FaultKind::JoinRemove, FaultKind::Delay]);
        assert!(plan(1, 120.0, &mixed, 3).steps.len() <= 2 * spare(3) as usize);
        // Alone they are all that there is.
        let alone = plan(1, 120.0, &BTreeSet::from([FaultKind::JoinRemove]), 3);
        assert_eq!(alone.steps.len(), spare(3) as usize);
    }

    #[test]
    fn every_point_comes_before_any_comes_again() {
        let kinds = BTreeSet::from([FaultKind::Failpoint]);
        let all = crate::faults::failpoint::points().len();
        for seed in [1, 999, u64::MAX] {
            let steps = plan(seed, 60.0, &kinds, 3).steps;
            let points = steps.iter().take(all).filter_map(|step| match step.fault {
                Fault::Failpoint { point, .. } => Some(point as usize % all),
                _ => None,
            });
            assert_eq!(points.collect::<BTreeSet<usize>>().len(), all, "seed {seed}");
        }
    }

    #[test]
    fn no_more_is_rekeyed_than_slots_have_room_for() {
        let mut kinds = BTreeSet::from([FaultKind::Rekey, FaultKind::KillAll]);
        let steps = plan(1, 60.0, &kinds, 3).steps;
        let rekeys = steps.iter().filter(|step| step.fault.kind() == FaultKind::Rekey);
        let rekeys = rekeys.count();
        assert_eq!(rekeys, MOST_REKEYED as usize);
        assert!(steps.len() > 100);
        // The first of each of two slots, two for each rekey of one of them and for one that is repeated, one for each removal that
        // rekeys.
        let keys = |rekeys: usize, removals: usize| 1 + rekeys.div_ceil(2) * 2 + 2 + removals;
        assert!(keys(rekeys, 0) < 8, "a slot has room for eight");
        kinds.insert(FaultKind::JoinRemove);
        let steps = plan(1, 120.0, &kinds, 3).steps;
        let count = |fits: fn(&Fault) -> bool| steps.iter().filter(|step| fits(&step.fault)).count();
        let rekeys = count(|fault| matches!(fault, Fault::Rekey { .. }));
        let removals = count(|fault| matches!(fault, Fault::JoinRemove { rotate: true, .. }));
        assert_eq!((rekeys, removals), (2, 2));
        assert!(keys(rekeys, removals) < 8, "a slot has room for eight");
    }

    #[test]
    fn everything_that_breaks_while_members_change_comes_before_anything_comes_again() {
        for seed in [1, 5, 999, u64::MAX] {
            let steps = plan(seed, 120.0, &BTreeSet::from([FaultKind::JoinRemove]), 3).steps;
            let breaks: Vec<Meanwhile> = steps
                .iter()
                .filter_map(|step| match step.fault {
                    Fault::JoinRemove { meanwhile, .. } => Some(meanwhile),
                    _ => None,
                })
                .collect();
            assert_eq!(breaks.len(), MEANWHILE.len(), "seed {seed}");
            for wanted in MEANWHILE {
                let of_that =
                    |one: &&Meanwhile| std::mem::discriminant(*one) == std::mem::discriminant(&wanted);
                assert_eq!(
                    breaks.iter().filter(of_that).count(),
                    1,
                    "seed {seed}: {wanted:?}"
                );
            }
        }
    }

    #[test]
    fn a_plan_of_weather_alone_has_its_length() {
        let weather = BTreeSet::from([FaultKind::Delay, FaultKind::Loss]);
        let steps = plan(3, 4.0, &weather, 3).steps;
        assert!((8..30).contains(&steps.len()), "{}", steps.len());
    }

    #[test]
    fn a_plan_reads_back_and_kinds_are_named_as_files_name_them() {
        let written = plan(9, 3.0, &all(), 3);
        let text = serde_json::to_string(&written).unwrap();
        assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), written);
        for kind in FaultKind::ALL {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        }
    }
}
