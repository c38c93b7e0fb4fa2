//! Whether a history is linearizable: is there an order of its operations, each at a moment between its invocation and its
//! completion, in which every answer is right? The search is Wing and Gong's with Lowe's memory of the configurations that it
//! has been in ("Testing for linearizability", 2017). An operation whose outcome is unknown has no completion: it takes
//! effect at any later moment, or never.
//!
//! The search is exponential at worst, so its steps are counted and bounded.

use std::collections::HashSet;
use std::hash::Hash;

/// What operations do one after the other.
pub(super) trait Sequential {
    /// What they act on.
    type State: Clone + Eq + Hash;
    /// An operation with its answer, if that is known.
    type Op;

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

/// Invocations and completions in their order, as a list from which those that are placed are taken out and put back.
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
            order.push((call.invoked, false, place));
            if let Some(completed) = call.completed {
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

/// Searches, for so many steps at most.
pub(super) fn check<S: Sequential>(spec: &S, calls: &[Call<S::Op>], steps: u64) -> Verdict {
    let mut events = Events::new(calls);
    let head = events.head();
    let mut left = calls.iter().filter(|call| call.completed.is_some()).count();
    let mut state = spec.start();
    let mut placed = 0_u128;
    let mut seen: HashSet<(u128, S::State)> = HashSet::new();
    // What was placed, with the state before it.
    let mut path: Vec<(usize, S::State)> = Vec::new();
    let (mut deepest, mut stuck) = (0, 0);
    let mut event = events.next[head];
    let mut done = 0_u64;
    while left > 0 {
        done += 1;
        if done > steps {
            return Verdict::Undecided;
        }
        let is_call = event < calls.len();
        if is_call {
            let call = event;
            let next = spec.step(&state, &calls[call].op);
            if let Some(next) = next
                && seen.insert((placed ^ name(call), next.clone()))
            {
                placed ^= name(call);
                path.push((call, std::mem::replace(&mut state, next)));
                events.take(call);
                if calls[call].completed.is_some() {
                    events.take(call + calls.len());
                    left -= 1;
                }
                event = events.next[head];
            } else {
                event = events.next[event];
            }
            continue;
        }
        // A completion of what is not placed, or the end: something before was placed wrongly.
        if event != head && path.len() >= deepest {
            (deepest, stuck) = (path.len(), event - calls.len());
        }
        let Some((call, before)) = path.pop() else {
            return Verdict::Not { stuck };
        };
        state = before;
        placed ^= name(call);
        if calls[call].completed.is_some() {
            events.put_back(call + calls.len());
            left += 1;
        }
        events.put_back(call);
        event = events.next[call];
    }
    Verdict::Linearizable
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "wgl_tests.rs"]
mod tests;
