//! The items of a batch: each is read and decided by itself, those of one slot go to it as one job, the jobs of
//! several slots run at once, and every item has the answer that it would have had alone, in its place. Rewraps from one
//! slot to another go to the second with all that was opened for it, as one more job.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hsm_api::ErrorCode;
use hsm_core::{OpError, Output, Work, batch_time};
use serde_json::value::RawValue;
use tokio::sync::oneshot;
use zeroize::Zeroizing;

use super::asking::{Asking, Ending, Onward, Operation, Step, Task};
use super::data_plane::AboveKnown;
use super::job::{Patience, answered, slot_error};
use super::json::{self, NotJson, Text};
use super::opening::above_known;
use super::problem::ApiError;
use super::reply::{self, Success};
use super::respond;
use super::shares::Share;
use crate::config::ContextName;
use crate::keyring::KeySlot;
use crate::metrics;
use crate::policy::Op;

/// Items that are read in one go; others who wait for the same thread come in between.
const AT_ONCE: usize = 64;

/// An item and what has become of it.
enum Item {
    /// It was refused before a slot was asked.
    Refused(ApiError),
    /// Its outcome is still to come.
    Open(Box<Open>),
}

struct Open {
    ending: Ending,
    /// A version that this node does not know.
    above: Option<(ContextName, u32)>,
    /// What is to be done with what its slot gives.
    onward: Option<Onward>,
    outcome: Option<Result<Output, ApiError>>,
}

/// What one slot is asked for.
struct Group {
    slot: KeySlot,
    works: Vec<Work>,
    /// The places of their items.
    places: Vec<usize>,
}

/// A job under way, or why it was not taken.
struct Running {
    slot_name: Arc<str>,
    places: Vec<usize>,
    began: Instant,
    answer: Result<oneshot::Receiver<Result<Outcomes, OpError>>, OpError>,
}

/// One for each item, and the time that they took together.
type Outcomes = (Vec<Result<Output, OpError>>, Duration);

/// Does what the items ask for, and gives an answer for each in their order. `context` is for those that name none.
pub(super) async fn answers<O: Operation<N>, const N: usize>(
    asking: &Asking<'_>,
    list: &[&RawValue],
    context: &str,
    part: &Arc<Share>,
) -> Vec<Zeroizing<Vec<u8>>> {
    let patience = Patience::new(asking.state.token_timeout(), list.len());
    let mut items = Vec::with_capacity(list.len());
    let mut groups = Vec::new();
    for (place, item) in list.iter().enumerate() {
        if place % AT_ONCE == AT_ONCE - 1 {
            tokio::task::yield_now().await;
        }
        items.push(match prepare::<O, N>(asking, item, context) {
            Ok(step) => open(step, place, &mut groups),
            Err(error) => Item::Refused(error),
        });
    }
    let start_all = |groups: Vec<Group>| -> Vec<Running> {
        let groups = groups.into_iter();
        groups.map(|group| start(group, &patience, part)).collect()
    };
    let running = start_all(groups);
    ask(asking, &mut items).await;
    for job in running {
        finish(asking, O::OP, job, &patience, &mut items).await;
    }
    for job in start_all(go_on(&patience, &mut items)) {
        finish(asking, O::OP, job, &patience, &mut items).await;
    }
    let answer = |item| answer::<O, N>(asking, close(asking, O::OP, item));
    items.into_iter().map(answer).collect()
}

fn prepare<'a, O: Operation<N>, const N: usize>(
    asking: &Asking<'_>,
    item: &'a RawValue,
    context: &'a str,
) -> Result<Step, ApiError> {
    let known = O::MEMBERS;
    let read = json::members(item.get(), &known);
    let mut members = read.map_err(|NotJson| ApiError::new(ErrorCode::InvalidJson))?;
    if let Some(own) = members.first_mut()
        && own.as_str().is_empty()
    {
        *own = Text::Borrowed(context);
    }
    O::prepare(asking, &members)
}

fn open(step: Step, place: usize, groups: &mut Vec<Group>) -> Item {
    let (ending, above, onward) = match step {
        Step::Run(Task {
            slot,
            work,
            onward,
            ending,
        }) => {
            put(groups, slot, work, place);
            (ending, None, onward)
        }
        Step::Ask {
            context,
            version,
            ending,
        } => (ending, Some((context, version)), None),
    };
    Item::Open(Box::new(Open {
        ending,
        above,
        onward,
        outcome: None,
    }))
}

/// Puts an item's work with that of the others in its slot.
fn put(groups: &mut Vec<Group>, slot: KeySlot, work: Work, place: usize) {
    match groups.iter_mut().find(|group| group.slot.name == slot.name) {
        Some(group) => {
            group.works.push(work);
            group.places.push(place);
        }
        None => groups.push(Group {
            slot,
            works: vec![work],
            places: vec![place],
        }),
    }
}

/// What is left to be done once the first slots have answered. Who was not opened is encrypted nowhere. The plaintexts
/// are no longer than their ciphertexts, which the request has paid for.
fn go_on(patience: &Patience, items: &mut [Item]) -> Vec<Group> {
    let is_left = |item: &&Item| matches!(item, Item::Open(open) if open.onward.is_some());
    let enough = patience.is_enough(items.iter().filter(is_left).count());
    let mut groups = Vec::new();
    for (place, item) in items.iter_mut().enumerate() {
        let Item::Open(open) = item else { continue };
        let Some(onward) = open.onward.take() else {
            continue;
        };
        let opened = open.outcome.take().unwrap_or_else(|| Err(no_outcome()));
        let further = |opened| enough.clone().and_then(|()| onward.with(opened));
        match opened.and_then(further) {
            Ok((slot, work)) => put(&mut groups, slot, work, place),
            Err(error) => {
                open.ending.not_encrypted();
                open.outcome = Some(Err(error));
            }
        }
    }
    groups
}

fn no_outcome() -> ApiError {
    ApiError::internal("no outcome of an item")
}

fn start(group: Group, patience: &Patience, part: &Arc<Share>) -> Running {
    let (done, answer) = oneshot::channel();
    let (held, began) = (Arc::clone(part), Instant::now());
    let submitted = group.slot.ops.run_batch(
        group.works,
        patience.until(),
        Box::new(move |outcomes| {
            let _ = done.send(Ok((outcomes, began.elapsed())));
            // A job whose caller has gone is in memory until here.
            drop(held);
        }),
    );
    Running {
        slot_name: group.slot.name,
        places: group.places,
        began,
        answer: submitted.map(|()| answer),
    }
}

/// Waits for a job, for no longer than the slot goes on with it, nor than the whole request waits. It runs on while others
/// are waited for.
async fn finish(asking: &Asking<'_>, op: Op, job: Running, patience: &Patience, items: &mut [Item]) {
    let its_own = batch_time(asking.state.token_timeout(), job.places.len());
    let ended = match job.answer {
        Ok(answer) => {
            let left = its_own.saturating_sub(job.began.elapsed()).min(patience.left());
            let ended = answered(answer, left).await;
            // What nobody waited for any longer is the slowest of all.
            let took = ended
                .as_ref()
                .map_or_else(|_| job.began.elapsed(), |(_, took)| *took);
            metrics::slot_job(job.slot_name, op.as_str(), took);
            ended
        }
        Err(error) => {
            for place in &job.places {
                not_encrypted(items, *place);
            }
            Err(slot_error(error))
        }
    };
    match ended {
        Ok((outcomes, _)) => {
            for (place, outcome) in job.places.into_iter().zip(outcomes) {
                if matches!(outcome, Err(OpError::NotBegun)) {
                    not_encrypted(items, place);
                }
                end(items, place, outcome.map_err(slot_error));
            }
        }
        Err(error) => {
            for place in job.places {
                end(items, place, Err(error.clone()));
            }
        }
    }
}

/// No slot has begun with an item. Of what was to be encrypted elsewhere, that is still to be said.
fn not_encrypted(items: &[Item], place: usize) {
    if let Some(Item::Open(open)) = items.get(place)
        && open.onward.is_none()
    {
        open.ending.not_encrypted();
    }
}

fn end(items: &mut [Item], place: usize, outcome: Result<Output, ApiError>) {
    if let Some(Item::Open(open)) = items.get_mut(place) {
        open.outcome = Some(outcome);
    }
}

/// Asks the leader about versions that this node does not know: in each context from the lowest one up, until there
/// is no such version. Then there is none above it either; and who has no quorum now has none for the next one.
async fn ask(asking: &Asking<'_>, items: &mut [Item]) {
    let unknown: BTreeSet<(ContextName, u32)> = items.iter().filter_map(above).collect();
    let mut answers: BTreeMap<(ContextName, u32), AboveKnown> = BTreeMap::new();
    let mut last: Option<(ContextName, AboveKnown)> = None;
    for (context, version) in unknown {
        let answer = match &last {
            Some((_, same @ (AboveKnown::NoQuorum | AboveKnown::Busy))) => *same,
            Some((of, AboveKnown::Unknown)) if *of == context => AboveKnown::Unknown,
            _ => asking.look_up(context.as_str(), version).await,
        };
        last = Some((context.clone(), answer));
        answers.insert((context, version), answer);
    }
    for item in items {
        if let Item::Open(open) = item
            && let Some(above) = &open.above
            && let Some(answer) = answers.get(above)
        {
            open.outcome = Some(Err(above_known(*answer, above.1)));
        }
    }
}

fn above(item: &Item) -> Option<(ContextName, u32)> {
    match item {
        Item::Open(open) => open.above.clone(),
        Item::Refused(_) => None,
    }
}

fn close(asking: &Asking<'_>, op: Op, item: Item) -> Result<Success, ApiError> {
    match item {
        Item::Refused(error) => Err(error),
        Item::Open(open) => {
            let Open { ending, outcome, .. } = *open;
            let outcome = outcome.unwrap_or_else(|| Err(no_outcome()));
            ending.close(asking, op, outcome)
        }
    }
}

fn answer<O: Operation<N>, const N: usize>(
    asking: &Asking<'_>,
    outcome: Result<Success, ApiError>,
) -> Zeroizing<Vec<u8>> {
    let answer = outcome.and_then(|success| success.json(true));
    let code = answer
        .as_ref()
        .map_or_else(|error| error.code().as_str(), |_| "ok");
    metrics::batch_item(O::OP.as_str(), code);
    match answer {
        Ok(json) => json,
        Err(error) => {
            let error = respond::data_error(error, O::OP, O::V1_FAILED);
            respond::item_refused(&error, asking.request, O::PATH, asking.principal);
            reply::failure(&error)
        }
    }
}
