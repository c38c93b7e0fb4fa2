//! Whether a history is linearizable: is there an order of its operations, each at a moment between its invocation and its
//! completion, in which every answer is right? The search is Wing and Gong's with Lowe's memory of the configurations that it
//! has been in ("Testing for linearizability", 2017). An operation whose outcome is unknown has no completion: it takes
//! effect at any later moment, or never.
//!
//! Unknown outcomes are what makes a search long: each may take effect anywhere. Three things keep it short, and none of them
//! changes what is found:
//! - Of those that are the same but for when they were invoked only the earliest is tried. In an order with another one in its
//!   place the two can change places: it was invoked before, and nothing waits for the completion of either.
//! - They are tried last, where nothing else explains the next completion.
//! - One that changes nothing is not tried: an order with it is one without it.
//!
//! The search is exponential at worst all the same, so its steps are counted and bounded.

use std::collections::HashSet;
use std::hash::Hash;

/// What operations do one after the other.
pub(super) trait Sequential {
    /// What they act on.
    type State: Clone + Eq + Hash;
    /// An operation with its answer, if that is known. What is equal does the same.
    type Op: PartialEq;

    /// Before the first of them.
    fn start(&self) -> Self::State;

    /// After an operation; none if it cannot have been answered so.
    fn step(&self, state: &Self::State, op: &Self::Op) -> Option<Self::State>;
}

/// An operation in time. Times that are equal count as overlapping.
#[derive(Debug, Clone)]
pub(super) struct Call<O> {
    /// When it was invoked.
    pub(super) invoked: u64,
    /// When it was completed; none: its outcome is unknown.
    pub(super) completed: Option<u64>,
    /// What it was.
    pub(super) op: O,
}

/// What came of the search.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// There is such an order.
    Linearizable,
    /// There is none: however the operations before it are ordered, the answer of this one (by its place among the calls) is
    /// wrong in the longest of the orders that were tried.
    Not {
        /// Its place.
        stuck: usize,
    },
    /// The search was given up.
    Undecided,
}

/// Invocations and completions of what was completed, in their order, as a list from which those that are placed are taken out and
/// put back.
struct Events {
    /// Of each event its call; completions follow at `calls + call`.
    next: Vec<usize>,
    previous: Vec<usize>,
    calls: usize,
}

impl Events {
    /// Ahead of all events, and after them.
    fn head(&self) -> usize {
        2 * self.calls
    }

    fn new<O>(calls: &[Call<O>]) -> Self {
        let count = calls.len();
        let mut order: Vec<(u64, bool, usize)> = Vec::with_capacity(2 * count);
        for (place, call) in calls.iter().enumerate() {
            if let Some(completed) = call.completed {
                order.push((call.invoked, false, place));
                order.push((completed, true, place + count));
            }
        }
        // What is invoked at the time of a completion overlaps it.
        order.sort_unstable();
        let mut events = Self {
            next: vec![0; 2 * count + 1],
            previous: vec![0; 2 * count + 1],
            calls: count,
        };
        let mut last = events.head();
        for (_, _, event) in order {
            events.next[last] = event;
            events.previous[event] = last;
            last = event;
        }
        let head = events.head();
        events.next[last] = head;
        events.previous[head] = last;
        events
    }

    fn take(&mut self, event: usize) {
        let (before, after) = (self.previous[event], self.next[event]);
        self.next[before] = after;
        self.previous[after] = before;
    }

    /// The reverse of [`Events::take`], in the reverse order.
    fn put_back(&mut self, event: usize) {
        let (before, after) = (self.previous[event], self.next[event]);
        self.next[before] = event;
        self.previous[after] = event;
    }
}

/// Calls of unknown outcome that are the same but for when they were invoked.
struct Alike {
    /// In the order of their invocations.
    calls: Vec<usize>,
    /// As many of them are placed, the first ones.
    placed: usize,
}

/// All of them, in the order of the first invocations.
fn alike<O: PartialEq>(calls: &[Call<O>]) -> Vec<Alike> {
    let mut open: Vec<usize> = (0..calls.len())
        .filter(|call| calls[*call].completed.is_none())
        .collect();
    open.sort_by_key(|call| calls[*call].invoked);
    let mut all: Vec<Alike> = Vec::new();
    for call in open {
        let same = |alike: &Alike| calls[alike.calls[0]].op == calls[call].op;
        match all.iter().position(same) {
            Some(place) => all[place].calls.push(call),
            None => all.push(Alike {
                calls: vec![call],
                placed: 0,
            }),
        }
    }
    all
}

/// Where a search is.
#[derive(Clone, Copy)]
struct Cursor {
    /// An invocation: that call is tried. A completion of what is not placed: something has to come before it.
    event: usize,
    /// Of those with an unknown outcome: at a completion they are tried one after the other.
    alike: usize,
}

impl Cursor {
    fn at(event: usize) -> Self {
        Self { event, alike: 0 }
    }
}

/// Names a call in the sum that names a set of them. A set is taken for another one with a chance of one in 2^128 for each
/// pair that is compared.
fn name(call: usize) -> u128 {
    let word = |salt: u64| {
        let mut word = (call as u64).wrapping_mul(2).wrapping_add(salt);
        word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        u128::from(word ^ (word >> 31))
    };
    word(0) << 64 | word(1)
}

/// What can be placed at a cursor.
enum Next {
    /// This call, if the state fits.
    Try(usize),
    /// Nothing here.
    Skip,
    /// Nothing any more.
    Stuck,
}

fn next<O>(cursor: Cursor, calls: &[Call<O>], open: &[Alike]) -> Next {
    let Some(completion) = cursor.event.checked_sub(calls.len()) else {
        return Next::Try(cursor.event);
    };
    // What is invoked at the time of a completion overlaps it.
    let completed = calls[completion].completed;
    let in_time = |call: usize| completed.is_some_and(|completed| calls[call].invoked <= completed);
    match open.get(cursor.alike) {
        // Those behind it were invoked later still.
        Some(alike) if in_time(alike.calls[0]) => {
            let call = alike.calls.get(alike.placed).copied();
            call.filter(|call| in_time(*call)).map_or(Next::Skip, Next::Try)
        }
        _ => Next::Stuck,
    }
}

/// Searches, for so many steps at most.
pub(super) fn check<S: Sequential>(spec: &S, calls: &[Call<S::Op>], steps: u64) -> Verdict {
    let mut events = Events::new(calls);
    let mut open = alike(calls);
    let head = events.head();
    let mut left = calls.iter().filter(|call| call.completed.is_some()).count();
    let mut state = spec.start();
    let mut placed = 0_u128;
    let mut seen: HashSet<(u128, S::State)> = HashSet::new();
    // What was placed, where that was found, and the state before it.
    let mut path: Vec<(usize, Cursor, S::State)> = Vec::new();
    let (mut deepest, mut stuck) = (0, 0);
    let mut cursor = Cursor::at(events.next[head]);
    let mut done = 0_u64;
    while left > 0 {
        done += 1;
        if done > steps {
            return Verdict::Undecided;
        }
        let is_open = cursor.event >= calls.len();
        let call = match next(cursor, calls, &open) {
            Next::Try(call) => Some(call),
            Next::Skip => None,
            Next::Stuck => {
                // Something before was placed wrongly.
                if path.len() >= deepest {
                    (deepest, stuck) = (path.len(), cursor.event - calls.len());
                }
                let Some((call, was, before)) = path.pop() else {
                    return Verdict::Not { stuck };
                };
                (state, cursor) = (before, was);
                placed ^= name(call);
                if calls[call].completed.is_some() {
                    events.put_back(call + calls.len());
                    events.put_back(call);
                    left += 1;
                    cursor.event = events.next[call];
                } else {
                    open[cursor.alike].placed -= 1;
                    cursor.alike += 1;
                }
                continue;
            }
        };
        let after = call.and_then(|call| Some((call, spec.step(&state, &calls[call].op)?)));
        // What is open and does nothing need not be placed.
        match after.filter(|(_, after)| !is_open || *after != state) {
            Some((call, after)) if seen.insert((placed ^ name(call), after.clone())) => {
                placed ^= name(call);
                path.push((call, cursor, std::mem::replace(&mut state, after)));
                if is_open {
                    open[cursor.alike].placed += 1;
                } else {
                    events.take(call);
                    events.take(call + calls.len());
                    left -= 1;
                }
                cursor = Cursor::at(events.next[head]);
            }
            _ if is_open => cursor.alike += 1,
            _ => cursor.event = events.next[cursor.event],
        }
    }
    Verdict::Linearizable
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "wgl_tests.rs"]
mod tests;
