use super::super::register::{Cell, CellOp, VersionOp, Versions};
use super::*;
use crate::random::Random;

#[path = "wgl_tests/against_stateright.rs"]
mod against_stateright;

const STEPS: u64 = 10_000_000;

fn call<O>(invoked: u64, completed: u64, op: O) -> Call<O> {
    Call {
        invoked,
        completed: Some(completed),
        op,
    }
}

/// Of an unknown outcome.
fn open<O>(invoked: u64, op: O) -> Call<O> {
    Call {
        invoked,
        completed: None,
        op,
    }
}

fn swap(from: u64, to: u64) -> CellOp {
    CellOp::Swap { from, to }
}

fn read(value: u64) -> CellOp {
    CellOp::Read { value: Some(value) }
}

fn verdict(calls: &[Call<CellOp>]) -> Verdict {
    check(&Cell, calls, STEPS)
}

#[test]
fn without_operations_everything_is_right() {
    assert_eq!(verdict(&[]), Verdict::Linearizable);
    assert_eq!(verdict(&[open(1, swap(5, 6))]), Verdict::Linearizable);
}

#[test]
fn one_after_the_other_is_judged_in_that_order() {
    let good = [
        call(1, 2, read(0)),
        call(3, 4, swap(0, 7)),
        call(5, 6, read(7)),
        call(7, 8, swap(7, 8)),
        call(9, 10, read(8)),
    ];
    assert_eq!(verdict(&good), Verdict::Linearizable);
    let mut stale = good.to_vec();
    stale[4] = call(9, 10, read(7));
    assert_eq!(verdict(&stale), Verdict::Not { stuck: 4 });
    // The order of the list says nothing, that of the times does.
    stale.reverse();
    assert_eq!(verdict(&stale), Verdict::Not { stuck: 0 });
}

#[test]
fn what_overlaps_may_be_in_any_order() {
    for value in [0, 7] {
        let calls = [call(1, 10, swap(0, 7)), call(2, 9, read(value))];
        assert_eq!(verdict(&calls), Verdict::Linearizable);
    }
    // Not in both at once.
    let calls = [call(1, 10, swap(0, 7)), call(2, 3, read(7)), call(4, 5, read(0))];
    assert!(matches!(verdict(&calls), Verdict::Not { .. }));
}

#[test]
fn of_two_swaps_of_one_value_only_one_succeeds() {
    let lost = [
        call(1, 10, swap(0, 1)),
        call(2, 9, swap(0, 2)),
        call(11, 12, read(2)),
    ];
    assert!(matches!(verdict(&lost), Verdict::Not { .. }));
}

#[test]
fn what_is_unknown_happens_late_or_never() {
    let unknown = open(1, swap(0, 7));
    let never = [unknown.clone(), call(5, 6, read(0)), call(7, 8, read(0))];
    assert_eq!(verdict(&never), Verdict::Linearizable);
    let late = [unknown.clone(), call(5, 6, read(0)), call(7, 8, read(7))];
    assert_eq!(verdict(&late), Verdict::Linearizable);
    let taken_back = [unknown, call(5, 6, read(7)), call(7, 8, read(0))];
    assert!(matches!(verdict(&taken_back), Verdict::Not { .. }));
    // Not before it was asked for.
    let early = [open(5, swap(0, 7)), call(1, 2, read(7))];
    assert!(matches!(verdict(&early), Verdict::Not { .. }));
}

#[test]
fn a_search_that_takes_too_long_is_undecided() {
    // Which of them happened is open, and nothing that they could have led to is ever read.
    let mut calls: Vec<Call<CellOp>> = (0..30).map(|place| open(1, swap(0, place + 1))).collect();
    calls.extend((0..30).map(|place| open(1, swap(place + 1, 100 + place))));
    calls.push(call(100, 101, read(99)));
    assert_eq!(check(&Cell, &calls, 1000), Verdict::Undecided);
    assert!(matches!(check(&Cell, &calls[..0], 0), Verdict::Linearizable));
}

/// The largest that a long run makes: thousands of operations, three at a time, some of them unknown.
#[test]
fn a_long_history_is_decided_within_the_bound() {
    let mut random = Random::new(3);
    let (mut calls, mut value) = (Vec::new(), 0);
    for number in 1..4000_u64 {
        let at = number * 10;
        // They overlap their neighbours; each happens in its turn.
        let (from, to) = (at - random.below(9), at + random.below(9));
        match random.below(10) {
            0 => calls.push(open(from, swap(1_000_000, number))),
            1..=3 => {
                calls.push(call(from, to, swap(value, number)));
                value = number;
            }
            _ => calls.push(call(from, to, read(value))),
        }
    }
    assert_eq!(check(&Cell, &calls, STEPS), Verdict::Linearizable);
    calls.push(call(50_000, 50_001, read(value + 1)));
    assert!(matches!(check(&Cell, &calls, STEPS), Verdict::Not { .. }));
}

const LOST: VersionOp = VersionOp::Rotate {
    version: None,
    previous: None,
};

/// The largest that hours under faults make: ten thousand rotations and reads, of which every tenth is a rotation without an answer;
/// half of those have made a version, up to some hundred operations after they were asked for.
#[test]
fn a_thousand_rotations_without_an_answer_are_decided_in_some_steps_for_each_operation() {
    let mut random = Random::new(5);
    let (mut calls, mut active, mut claimed) = (Vec::new(), 1, Vec::new());
    for number in 1..10_000_u64 {
        let at = number * 10;
        let (from, to) = (at - random.below(9), at + random.below(9));
        match random.below(20) {
            0 => {
                active += 1;
                calls.push(open(at.saturating_sub(random.below(3000)), LOST));
            }
            1 => calls.push(open(from, LOST)),
            2..=4 => {
                active += 1;
                claimed.push(active);
                let made = VersionOp::Rotate {
                    version: Some(active),
                    previous: Some(active - 1),
                };
                calls.push(call(from, to, made));
            }
            _ => {
                let highest = (active > 1).then(|| active - 1);
                calls.push(call(from, to, VersionOp::Retired { highest }));
            }
        }
    }
    let spec = Versions::of(1..=active).claimed_by(claimed);
    let lost = calls.iter().filter(|call| call.completed.is_none()).count();
    assert!(lost > 800, "{lost}");
    let steps = 20 * calls.len() as u64;
    assert_eq!(check(&spec, &calls, steps), Verdict::Linearizable);
    let highest = Some(active - 2);
    let mut stale = calls.clone();
    stale.push(call(200_000, 200_001, VersionOp::Retired { highest }));
    let stuck = calls.len();
    assert_eq!(check(&spec, &stale, steps), Verdict::Not { stuck });
    // More versions than anybody has asked for.
    let mut asked = 0;
    calls.retain(|call| {
        asked += usize::from(call.completed.is_none());
        call.completed.is_some() || asked > lost * 2 / 3
    });
    assert!(matches!(check(&spec, &calls, steps), Verdict::Not { .. }));
}

#[test]
fn of_equal_ones_without_an_answer_as_many_take_effect_as_were_asked_for_by_then() {
    let spec = Versions::of([1, 2, 3]);
    let active = |from, to, version| {
        call(
            from,
            to,
            VersionOp::Active {
                version: Some(version),
            },
        )
    };
    let two = [open(1, LOST), open(20, LOST)];
    let judged = |reads: &[Call<VersionOp>]| check(&spec, &[&two[..], reads].concat(), STEPS);
    for reads in [
        vec![active(2, 3, 1), active(30, 31, 3)],
        vec![active(2, 3, 2), active(30, 31, 2)],
        vec![active(2, 3, 2), active(30, 31, 3)],
        // At the very time at which it is asked for.
        vec![active(2, 20, 3)],
    ] {
        assert_eq!(judged(&reads), Verdict::Linearizable, "{reads:?}");
    }
    // Before the second one was asked for there was no third version, in whatever order they are listed.
    let early = active(2, 19, 3);
    assert_eq!(judged(std::slice::from_ref(&early)), Verdict::Not { stuck: 2 });
    let listed = [early, two[1].clone(), two[0].clone()];
    assert_eq!(check(&spec, &listed, STEPS), Verdict::Not { stuck: 0 });
}

#[test]
fn versions_are_counted_up_one_by_one() {
    let spec = Versions::of([1, 2, 4]);
    let rotated = |version, previous| VersionOp::Rotate {
        version: Some(version),
        previous: Some(previous),
    };
    let good = [
        call(1, 2, rotated(2, 1)),
        call(3, 4, VersionOp::Retired { highest: Some(1) }),
        call(5, 6, rotated(4, 2)),
        call(7, 8, VersionOp::Active { version: Some(4) }),
    ];
    assert_eq!(check(&spec, &good, STEPS), Verdict::Linearizable);
    let mut stale = good.to_vec();
    stale.push(call(7, 8, VersionOp::Retired { highest: Some(1) }));
    assert!(matches!(check(&spec, &stale, STEPS), Verdict::Not { .. }));
    // Version 2 comes from nowhere.
    assert!(matches!(check(&spec, &good[1..], STEPS), Verdict::Not { .. }));
    let mut unknown = good[1..].to_vec();
    unknown.push(open(1, LOST));
    assert_eq!(check(&spec, &unknown, STEPS), Verdict::Linearizable);
}
