//! Linearizability of the metadata. Two kinds of registers are in it:
//!
//! - the active version of a context. A rotation counts it up and answers with the new and the old one; a clean-up that only
//!   looks (`cleanup-old-versions --dry-run`) reads it: the leader asks a quorum before it answers, and the highest retired
//!   version is the one before the active one, where no version is ever taken out of use otherwise;
//! - the value in access control, which is compared and set.
//!
//! Reads of one node's state (`GET /admin/v1/keys`, `GET /admin/v1/acl`) are not linearizable and do not claim to be; they
//! say from which index they are made, and the other oracles hold them to it.

use std::collections::{BTreeMap, BTreeSet};

use super::Found;
use super::observed::Observed;
use super::wgl::{Call, Sequential, Verdict, check};
use crate::history::{Answer, Done, History, Operation, Outcome};

pub(super) const NAME: &str = "register";
/// Of one search; a few seconds, and a few hundred megabytes at most.
const STEPS: u64 = 5_000_000;

/// In the place of a version where a context has none yet; numbers begin with one.
const NONE: u32 = 0;

/// A value that is compared and set; zero at first.
#[derive(Debug, Clone)]
pub(super) struct Cell;

/// What is done with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum CellOp {
    /// It was this and is that from then on.
    Swap { from: u64, to: u64 },
    /// It was this; none: nobody heard the answer.
    Read { value: Option<u64> },
}

impl Sequential for Cell {
    type State = u64;
    type Op = CellOp;

    fn start(&self) -> u64 {
        0
    }

    fn step(&self, state: &u64, op: &CellOp) -> Option<u64> {
        match op {
            CellOp::Swap { from, to } => (from == state).then_some(*to),
            CellOp::Read { value } => value.is_none_or(|value| value == *state).then_some(*state),
        }
    }
}

/// The active version of a context: a place among all versions that were ever active.
#[derive(Debug, Clone)]
pub(super) struct Versions {
    /// Those, in their order.
    pub(super) order: Vec<u32>,
    /// Those of them that somebody knows to have made: nobody else has made them.
    claimed: BTreeSet<u32>,
}

/// What is done with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum VersionOp {
    /// The next one was made active; which one that was, as far as it is known.
    Rotate {
        version: Option<u32>,
        previous: Option<u32>,
    },
    /// This was the highest that was active before.
    Retired { highest: Option<u32> },
    /// This was active; none: nobody heard the answer.
    Active { version: Option<u32> },
}

impl Versions {
    /// In any order; the lowest is active at first.
    #[must_use]
    pub(super) fn of(versions: impl IntoIterator<Item = u32>) -> Self {
        let order: BTreeSet<u32> = versions.into_iter().collect();
        Self {
            order: order.into_iter().collect(),
            claimed: BTreeSet::new(),
        }
    }

    /// Somebody knows to have made these.
    #[must_use]
    pub(super) fn claimed_by(mut self, versions: impl IntoIterator<Item = u32>) -> Self {
        self.claimed.extend(versions);
        self
    }

    /// Whether a rotation of which nobody knows what it has made can have made anything.
    fn has_unclaimed(&self) -> bool {
        self.order
            .iter()
            .skip(1)
            .any(|version| !self.claimed.contains(version))
    }
}

impl Sequential for Versions {
    type State = usize;
    type Op = VersionOp;

    fn start(&self) -> usize {
        0
    }

    fn step(&self, state: &usize, op: &VersionOp) -> Option<usize> {
        let now = self.order.get(*state)?;
        match op {
            VersionOp::Rotate { version, previous } => {
                let next = self.order.get(state + 1)?;
                let fits = match version {
                    Some(version) => version == next,
                    None => !self.claimed.contains(next),
                };
                let follows = previous.is_none_or(|previous| previous == *now);
                (fits && follows).then_some(state + 1)
            }
            VersionOp::Retired { highest } => {
                let before = state.checked_sub(1).map(|before| self.order[before]);
                (*highest == before.filter(|before| *before != NONE)).then_some(*state)
            }
            VersionOp::Active { version } => version.is_none_or(|version| version == *now).then_some(*state),
        }
    }
}

/// Judges all registers.
pub(super) fn judge(history: &History, observed: &Observed, found: &mut Found) {
    for context in contexts(history) {
        versions(&context, history, observed, found);
    }
    access(history, observed, found);
}

fn contexts(history: &History) -> BTreeSet<String> {
    let of = |done: &Done| match &done.operation {
        Operation::Rotate { context, .. } | Operation::Create { context, .. } => Some(context.clone()),
        _ => None,
    };
    history.changes.iter().filter_map(of).collect()
}

/// All calls of one request are one operation: from the first of them to the first answer. The versions that they were
/// answered with have to be the same one.
#[derive(Debug)]
struct Request {
    invoked: u64,
    completed: Option<u64>,
    made: Option<(u32, Option<u32>)>,
    refused: bool,
}

fn requests(context: &str, history: &History, found: &mut Found) -> Vec<Request> {
    let mut requests: BTreeMap<&str, Request> = BTreeMap::new();
    for done in &history.changes {
        let (Operation::Rotate { context: of, key } | Operation::Create { context: of, key }) =
            &done.operation
        else {
            continue;
        };
        if of != context {
            continue;
        }
        let request = requests.entry(key).or_insert(Request {
            invoked: done.invoked,
            completed: None,
            made: None,
            refused: true,
        });
        request.invoked = request.invoked.min(done.invoked);
        match &done.outcome {
            Outcome::Ok(Answer::Rotated { version, previous }) => {
                request.refused = false;
                match request.made {
                    Some((other, _)) if other != *version => found.violation(
                        NAME,
                        format!(
                            "{context}: the request with the Idempotency-Key {key} was answered with version {other} and \
                             with version {version}"
                        ),
                    ),
                    Some((_, known)) => request.made = Some((*version, known.or(*previous))),
                    None => request.made = Some((*version, *previous)),
                }
                request.completed = earlier(request.completed, done.completed);
            }
            Outcome::Refused { .. } => {}
            Outcome::Ok(_) | Outcome::Unknown { .. } => request.refused = false,
        }
    }
    requests
        .into_values()
        .filter(|request| !request.refused)
        .collect()
}

fn versions(context: &str, history: &History, observed: &Observed, found: &mut Found) {
    let requests = requests(context, history, found);
    let mut calls: Vec<Call<VersionOp>> = Vec::new();
    let mut seen = BTreeSet::new();
    let mut claimed = BTreeSet::new();
    for request in &requests {
        if let Some((version, previous)) = request.made {
            seen.extend([Some(version), previous].into_iter().flatten());
            claimed.insert(version);
        }
        calls.push(Call {
            invoked: request.invoked,
            completed: request.completed,
            op: VersionOp::Rotate {
                version: request.made.map(|(version, _)| version),
                previous: request.made.and_then(|(_, previous)| previous),
            },
        });
    }
    for done in &history.changes {
        if let (Operation::Retired { context: of }, Outcome::Ok(Answer::Highest { version })) =
            (&done.operation, &done.outcome)
            && of == context
        {
            seen.extend(*version);
            calls.push(Call {
                invoked: done.invoked,
                completed: done.completed,
                op: VersionOp::Retired { highest: *version },
            });
        }
    }
    // What every node says at the end is a read after all the others.
    for keys in observed.nodes.iter().filter_map(|node| node.keys.as_ref()) {
        let Some(known) = keys.iter().find(|known| known.context == context) else {
            continue;
        };
        let activated = known.versions.iter().filter(|version| version.activated);
        seen.extend(activated.map(|version| version.number));
        if let Some(version) = known.active {
            calls.push(Call {
                invoked: u64::MAX,
                completed: Some(u64::MAX),
                op: VersionOp::Active {
                    version: Some(version),
                },
            });
        }
    }
    if seen.is_empty() {
        return;
    }
    let what = format!("the active version of {context}");
    // Somebody has made the first one: until then there was none.
    if seen.first().is_some_and(|first| claimed.contains(first)) {
        if observed.nodes.iter().all(|node| node.keys.is_none()) {
            let text = format!("{what}: no node has said at the end which versions there were before");
            found.undecided(NAME, text);
            return;
        }
        seen.insert(NONE);
    }
    let spec = Versions::of(seen).claimed_by(claimed);
    // Open for ever, they would be tried at every step of the search.
    if !spec.has_unclaimed() {
        let can_be = |call: &Call<VersionOp>| {
            call.completed.is_some() || !matches!(call.op, VersionOp::Rotate { version: None, .. })
        };
        calls.retain(can_be);
    }
    decide(&spec, &calls, &what, found);
}

fn access(history: &History, observed: &Observed, found: &mut Found) {
    // The same request again is the same operation.
    let mut requests: BTreeMap<&str, Call<CellOp>> = BTreeMap::new();
    for done in &history.changes {
        let Operation::SetAcl { from, to, key } = &done.operation else {
            continue;
        };
        if matches!(done.outcome, Outcome::Refused { .. }) {
            continue;
        }
        let call = requests.entry(key).or_insert(Call {
            invoked: done.invoked,
            completed: None,
            op: CellOp::Swap { from: *from, to: *to },
        });
        call.invoked = call.invoked.min(done.invoked);
        call.completed = earlier(call.completed, done.completed);
    }
    let mut calls: Vec<Call<CellOp>> = requests.into_values().collect();
    for value in observed.nodes.iter().filter_map(|node| node.acl) {
        calls.push(Call {
            invoked: u64::MAX,
            completed: Some(u64::MAX),
            op: CellOp::Read { value: Some(value) },
        });
    }
    without_trace(&mut calls);
    decide(&Cell, &calls, "access control", found);
    older_reads(history, found);
}

/// Takes out what nobody knows to have happened and nobody has seen a trace of: after such a change there is none that could
/// come after it, so a history that is explained with it is explained without it. Open for ever, they would be tried at every
/// step of the search.
fn without_trace(calls: &mut Vec<Call<CellOp>>) {
    loop {
        let seen: BTreeSet<u64> = calls
            .iter()
            .filter_map(|call| match call.op {
                CellOp::Swap { from, .. } => Some(from),
                CellOp::Read { value } => value,
            })
            .collect();
        let before = calls.len();
        calls.retain(|call| match call.op {
            CellOp::Swap { to, .. } => call.completed.is_some() || seen.contains(&to),
            CellOp::Read { .. } => true,
        });
        if calls.len() == before {
            return;
        }
    }
}

fn earlier(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

/// A node that says that its state has a change must not answer with what was before it.
fn older_reads(history: &History, found: &mut Found) {
    // Every value is written once, over the one that it names: how far it is from the first is its place.
    let mut over: BTreeMap<u64, u64> = BTreeMap::new();
    let mut acknowledged: Vec<(u64, u64)> = Vec::new();
    for done in &history.changes {
        if let Operation::SetAcl { from, to, .. } = &done.operation {
            over.insert(*to, *from);
            if let (Outcome::Ok(_), Some(index)) = (&done.outcome, done.index) {
                acknowledged.push((index, *to));
            }
        }
    }
    let mut places: BTreeMap<u64, usize> = BTreeMap::from([(0, 0)]);
    // Numbers grow, so what a value was written over comes before it.
    for (to, from) in &over {
        if let Some(place) = places.get(from) {
            places.insert(*to, place + 1);
        }
    }
    acknowledged.sort_unstable();
    let floor = |index: u64| {
        let contained = acknowledged.iter().take_while(|(at, _)| *at <= index);
        contained
            .filter_map(|(_, value)| places.get(value))
            .max()
            .copied()
    };
    for done in &history.changes {
        let (Operation::ReadAcl { node }, Outcome::Ok(Answer::Value { value })) =
            (&done.operation, &done.outcome)
        else {
            continue;
        };
        let (Some(index), Some(place)) = (done.index, places.get(value)) else {
            continue;
        };
        if floor(index).is_some_and(|floor| *place < floor) {
            found.violation(
                NAME,
                format!(
                    "access control: node {node} answered with value {value} from a state of index {index}, which has a \
                     later one"
                ),
            );
        }
    }
}

fn decide<S: Sequential>(spec: &S, calls: &[Call<S::Op>], what: &str, found: &mut Found)
where
    S::Op: std::fmt::Debug,
{
    found.checked(NAME, calls.len() as u64);
    match check(spec, calls, STEPS) {
        Verdict::Linearizable => {}
        Verdict::Undecided => found.undecided(
            NAME,
            format!(
                "{what}: whether {} operations are linearizable was not decided in {STEPS} steps",
                calls.len()
            ),
        ),
        Verdict::Not { stuck } => {
            let call = &calls[stuck];
            let around = calls.iter().filter(|other| overlaps(call, other));
            let around: Vec<String> = around.take(8).map(|other| format!("{other:?}")).collect();
            found.violation(
                NAME,
                format!(
                    "{what} is not linearizable: {} operations, and no order explains {call:?}; at the same time: {}",
                    calls.len(),
                    around.join(", ")
                ),
            );
        }
    }
}

fn overlaps<O>(one: &Call<O>, other: &Call<O>) -> bool {
    let ends = |call: &Call<O>| call.completed.unwrap_or(u64::MAX);
    one.invoked <= ends(other) && other.invoked <= ends(one)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "register_tests.rs"]
mod tests;
