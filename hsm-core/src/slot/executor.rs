//! The threads that encrypt and decrypt: each takes a few jobs from the queue and does one after the other. A
//! batch is done by one thread with one session, and none of its items costs another its answer; but it gives way:
//! while other jobs wait, it and they have turns of the same length ([`turn`]), and several batches have theirs in
//! a ring. So half of a busy thread's time is for single jobs, and the other half for its batches.

use std::sync::Arc;
use std::time::Instant;

use super::job::{Items, Job, Load, Term, turn};
use super::perform::Worker;
use super::sessions::Sessions;
use super::shared::Shared;
use crate::error::OpError;

/// Thread `index` of a slot.
pub(crate) fn run(shared: &Arc<Shared>, index: usize, mut sessions: Sessions) {
    if let Some(desk) = shared.desks.get(index) {
        let mut worker = Worker {
            shared,
            desk,
            index,
            sessions: &mut sessions,
        };
        serve(&mut worker);
        // A batch between two turns, when nobody else is left to answer it.
        for job in desk.take_all() {
            job.refuse(OpError::SlotNotReady(shared.state.get()));
        }
    }
    sessions.give_back(shared);
}

/// Serves until the queue is closed.
fn serve(worker: &mut Worker<'_>) {
    let (shared, desk) = (worker.shared, worker.desk);
    let turn = turn(shared.deadline);
    let mut since = Instant::now();
    while shared.queue.fill(desk) {
        for late in desk.take_late(shared.deadline) {
            late.refuse(OpError::NotBegun);
        }
        let mut idle = true;
        while let Some(job) = desk.next_single() {
            idle = false;
            go_on(worker, job);
        }
        if (idle || since.elapsed() >= turn)
            && let Some(batch) = desk.next_batch()
        {
            go_on(worker, batch);
            since = Instant::now();
        }
    }
}

/// Begins a job, or goes on with a batch.
fn go_on(worker: &mut Worker<'_>, job: Job) {
    let shared = worker.shared;
    let waited_too_long = !job.is_begun() && job.term.waited() > shared.deadline;
    if waited_too_long || job.term.is_too_short(shared.deadline) {
        job.refuse(OpError::NotBegun);
    } else if !shared.state.is_ready() {
        job.refuse(OpError::SlotNotReady(shared.state.get()));
    } else {
        one_turn(worker, job);
    }
}

/// Does a job, or a batch's turn of it, and answers it when it is done, unless the watchdog has done so meanwhile.
fn one_turn(worker: &mut Worker<'_>, job: Job) {
    let Job { load, done, term } = job;
    let desk = worker.desk;
    desk.begin(done);
    let outcome = match load {
        Load::One(work) => worker.item(&work, term),
        Load::Batch(items) => match batch(worker, items, term) {
            End::Over(error) => Err(error),
            End::GaveWay(items) => {
                if let Some(done) = desk.end() {
                    let load = Load::Batch(items);
                    desk.put_back(Job { load, done, term });
                }
                return;
            }
        },
    };
    if let Some(done) = desk.end() {
        done.answer(outcome);
    }
}

/// How a turn of a batch ended.
enum End {
    /// Nothing more is done of it; the answer of items that have none.
    Over(OpError),
    /// Others have a turn before its next item.
    GaveWay(Items),
}

/// Does items in their order until the turn is over, or one is not to be begun any more.
fn batch(worker: &mut Worker<'_>, mut items: Items, term: Term) -> End {
    let (shared, began) = (worker.shared, Instant::now());
    let turn = turn(shared.deadline);
    while let Some(work) = items.works.next() {
        let is_over = items.is_over(began.elapsed(), term.waited(), shared.deadline);
        if is_over || term.is_too_short(shared.deadline) {
            break;
        }
        if !shared.state.is_ready() {
            return End::Over(OpError::SlotNotReady(shared.state.get()));
        }
        let outcome = match work.check() {
            Ok(()) => worker.item(&work, term),
            Err(error) => Err(error),
        };
        // An item of an answered batch is done for nobody.
        if !worker.desk.item_ends(outcome) {
            break;
        }
        let took = began.elapsed();
        if took >= turn && !items.works.as_slice().is_empty() {
            items.spent += took;
            return End::GaveWay(items);
        }
    }
    End::Over(OpError::NotBegun)
}
