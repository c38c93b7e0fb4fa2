//! The same small histories judged by stateright's tester: both say the same, of those that are right and of those that
//! are not.

use std::collections::BTreeMap;
use std::fmt::Debug;

use stateright::semantics::{ConsistencyTester, LinearizabilityTester, SequentialSpec};

use super::*;

/// Enough that each kind of answer is wrong in hundreds of them.
const HISTORIES: u64 = 4000;
const CLIENTS: u64 = 4;
const OPERATIONS: u64 = 8;
/// Of the questions of a history one in so many is never answered, and so many of them at most.
#[derive(Clone, Copy)]
struct Lost {
    one_in: u64,
    most: u32,
}
const SOME: Lost = Lost {
    one_in: 8,
    most: u32::MAX,
};
/// As many as there can be in one history before the other judge, who tries them everywhere, takes minutes.
const MANY: Lost = Lost { one_in: 2, most: 3 };
/// Of so many histories one has many.
const MANY_IN: u64 = 4;

/// A specification of ours as one of stateright's.
#[derive(Clone)]
struct Theirs<S: Sequential> {
    spec: S,
    state: S::State,
}

/// An answer; what is invoked for itself is answered by nobody.
#[derive(Clone, Debug, PartialEq)]
struct Answered<O>(Option<O>);

impl<S> SequentialSpec for Theirs<S>
where
    S: Sequential,
    S::Op: PartialEq,
{
    type Op = S::Op;
    type Ret = Answered<S::Op>;

    /// Of what has no answer. Where it can do nothing, it does nothing.
    fn invoke(&mut self, op: &S::Op) -> Self::Ret {
        if let Some(next) = self.spec.step(&self.state, op) {
            self.state = next;
        }
        Answered(None)
    }

    fn is_valid_step(&mut self, _: &S::Op, ret: &Self::Ret) -> bool {
        let Some(op) = &ret.0 else { return true };
        let Some(next) = self.spec.step(&self.state, op) else {
            return false;
        };
        self.state = next;
        true
    }
}

/// Something that happened to a client.
#[derive(Clone, Debug)]
enum Event<O> {
    /// It asked for this, of which the answer is not known.
    Invoke(u64, O),
    /// It was answered.
    Return(u64, O),
}

/// What clients do to a real one, and how the answers are made wrong.
trait World {
    type Spec: Sequential<Op: Clone + Debug + PartialEq> + Clone;

    fn spec() -> Self::Spec;
    /// A question, in the form that has no answer.
    fn question(random: &mut Random, number: u64) -> <Self::Spec as Sequential>::Op;
    /// Its right answer, if it is to succeed.
    fn answer(
        state: &<Self::Spec as Sequential>::State,
        question: &<Self::Spec as Sequential>::Op,
    ) -> Option<<Self::Spec as Sequential>::Op>;
    /// Any answer.
    fn guess(
        random: &mut Random,
        question: &<Self::Spec as Sequential>::Op,
    ) -> <Self::Spec as Sequential>::Op;
}

/// A question is in force at some moment until its answer.
struct Asked<O> {
    question: O,
    answer: Option<O>,
}

/// Clients that wait for each answer; now and then one never gets it, and another one takes its place.
fn history<W: World>(random: &mut Random, mut lost: Lost) -> Vec<Event<<W::Spec as Sequential>::Op>> {
    let spec = W::spec();
    let mut state = spec.start();
    let mut events = Vec::new();
    let mut asked: BTreeMap<u64, Asked<_>> = BTreeMap::new();
    let mut clients: Vec<u64> = (0..CLIENTS).collect();
    let (mut begun, mut newest) = (0, CLIENTS);
    while begun < OPERATIONS || !asked.is_empty() {
        let place = usize::try_from(random.below(CLIENTS)).unwrap();
        let client = clients[place];
        let Some(waiting) = asked.get_mut(&client) else {
            if begun < OPERATIONS {
                let question = W::question(random, begun);
                events.push(Event::Invoke(client, question.clone()));
                let answer = None;
                asked.insert(client, Asked { question, answer });
                begun += 1;
            }
            continue;
        };
        let Some(answer) = &waiting.answer else {
            if lost.most > 0 && random.below(lost.one_in) == 0 {
                lost.most -= 1;
                // It is never answered, and was done or not.
                if random.below(2) == 0
                    && let Some(next) = spec.step(&state, &waiting.question)
                {
                    state = next;
                }
                asked.remove(&client);
                (clients[place], newest) = (newest, newest + 1);
                continue;
            }
            match W::answer(&state, &waiting.question) {
                Some(answer) => {
                    state = spec.step(&state, &answer).expect("the right answer is possible");
                    waiting.answer = Some(answer);
                }
                // It would be refused, which says nothing: it is as if it had never been asked for.
                None => {
                    let is_it = |event: &Event<_>| matches!(event, Event::Invoke(who, _) if *who == client);
                    let at = events.iter().rposition(is_it).unwrap();
                    events.remove(at);
                    asked.remove(&client);
                }
            }
            continue;
        };
        let told = if random.below(6) == 0 {
            W::guess(random, &waiting.question)
        } else {
            answer.clone()
        };
        events.push(Event::Return(client, told));
        asked.remove(&client);
    }
    events
}

fn ours<S: Sequential<Op: Clone>>(spec: &S, events: &[Event<S::Op>]) -> Verdict {
    let mut calls: Vec<Call<S::Op>> = Vec::new();
    let mut waiting: BTreeMap<u64, usize> = BTreeMap::new();
    for (at, event) in (1..).zip(events) {
        match event {
            Event::Invoke(client, question) => {
                waiting.insert(*client, calls.len());
                calls.push(open(at, question.clone()));
            }
            Event::Return(client, answer) => {
                let place = waiting.remove(client).unwrap();
                (calls[place].completed, calls[place].op) = (Some(at), answer.clone());
            }
        }
    }
    check(spec, &calls, STEPS)
}

fn theirs<S>(spec: &S, events: &[Event<S::Op>]) -> bool
where
    S: Sequential + Clone,
    S::Op: Clone + Debug + PartialEq,
{
    let state = spec.start();
    let mut tester = LinearizabilityTester::new(Theirs {
        spec: spec.clone(),
        state,
    });
    for event in events {
        let taken = match event {
            Event::Invoke(client, question) => tester.on_invoke(*client, question.clone()).map(drop),
            Event::Return(client, answer) => {
                let answer = Answered(Some(answer.clone()));
                tester.on_return(*client, answer).map(drop)
            }
        };
        taken.unwrap();
    }
    tester.is_consistent()
}

fn both_say_the_same<W: World>(seed: u64) {
    let (mut random, mut right, mut both) = (Random::new(seed), 0, 0);
    for number in 0..HISTORIES {
        let lost = if number % MANY_IN == 0 { MANY } else { SOME };
        let events = history::<W>(&mut random, lost);
        let spec = W::spec();
        let (own, other) = (ours(&spec, &events), theirs(&spec, &events));
        let own_says = match own {
            Verdict::Linearizable => true,
            Verdict::Not { .. } => false,
            Verdict::Undecided => panic!("history {number} of seed {seed} is undecided: {events:?}"),
        };
        assert_eq!(own_says, other, "history {number} of seed {seed}: {events:?}");
        right += u64::from(own_says);
        let is_right_with_one = || ours(&spec, &each_once(&events)) == Verdict::Linearizable;
        both += u64::from(own_says && !is_right_with_one());
    }
    assert!(right > HISTORIES / 8, "{right} of {HISTORIES} are right");
    assert!(
        HISTORIES - right > HISTORIES / 16,
        "{right} of {HISTORIES} are right"
    );
    assert!(
        both > 0,
        "in none of {HISTORIES} have two unanswered questions that are the same to take effect both"
    );
}

/// Of those that were never answered and are the same only the first.
fn each_once<O: Clone + PartialEq>(events: &[Event<O>]) -> Vec<Event<O>> {
    let (mut kept, mut lost): (Vec<Event<O>>, Vec<&O>) = (Vec::new(), Vec::new());
    for (place, event) in events.iter().enumerate() {
        if let Event::Invoke(who, question) = event {
            let is_its = |later: &Event<O>| matches!(later, Event::Return(by, _) if by == who);
            if !events[place..].iter().any(is_its) {
                if lost.contains(&question) {
                    continue;
                }
                lost.push(question);
            }
        }
        kept.push(event.clone());
    }
    kept
}

struct Cells;

impl World for Cells {
    type Spec = Cell;

    fn spec() -> Cell {
        Cell
    }

    fn question(random: &mut Random, _: u64) -> CellOp {
        match random.below(4) {
            0 => swap(random.below(3), random.below(3)),
            // To and fro, so that the same one may have its effect twice.
            1 | 2 => {
                let from = random.below(2);
                swap(from, 1 - from)
            }
            _ => CellOp::Read { value: None },
        }
    }

    fn answer(state: &u64, question: &CellOp) -> Option<CellOp> {
        match question {
            CellOp::Swap { from, .. } => (from == state).then(|| question.clone()),
            CellOp::Read { .. } => Some(read(*state)),
        }
    }

    fn guess(random: &mut Random, question: &CellOp) -> CellOp {
        match question {
            CellOp::Swap { .. } => question.clone(),
            CellOp::Read { .. } => read(random.below(3)),
        }
    }
}

struct Rotations;

impl World for Rotations {
    type Spec = Versions;

    fn spec() -> Versions {
        // As many as there can be, with a gap; one of them somebody knows to have made.
        Versions::of([1, 2, 4, 5, 6, 7, 8, 9, 10, 11]).claimed_by([6])
    }

    fn question(random: &mut Random, _: u64) -> VersionOp {
        match random.below(2) {
            0 => VersionOp::Rotate {
                version: None,
                previous: None,
            },
            _ => VersionOp::Active { version: None },
        }
    }

    fn answer(state: &usize, question: &VersionOp) -> Option<VersionOp> {
        let order = Self::spec().order;
        match question {
            VersionOp::Rotate { .. } => Some(VersionOp::Rotate {
                version: Some(*order.get(state + 1)?),
                previous: Some(order[*state]),
            }),
            // Both kinds of reads are answered.
            _ if state % 2 == 1 => Some(VersionOp::Active {
                version: Some(order[*state]),
            }),
            _ => Some(VersionOp::Retired {
                highest: state.checked_sub(1).map(|before| order[before]),
            }),
        }
    }

    fn guess(random: &mut Random, question: &VersionOp) -> VersionOp {
        let order = Self::spec().order;
        let place = usize::try_from(random.below(4)).unwrap();
        let active = random.below(2) == 0;
        match question {
            VersionOp::Rotate { .. } => VersionOp::Rotate {
                version: Some(order[place + 1]),
                previous: Some(order[place]),
            },
            _ if active => VersionOp::Active {
                version: Some(order[place]),
            },
            _ => VersionOp::Retired {
                highest: place.checked_sub(1).map(|before| order[before]),
            },
        }
    }
}

#[test]
fn of_thousands_of_histories_of_swaps() {
    both_say_the_same::<Cells>(1);
    both_say_the_same::<Cells>(2);
}

#[test]
fn of_thousands_of_histories_of_rotations() {
    both_say_the_same::<Rotations>(3);
}
