//! The threads that encrypt and decrypt: each takes a few jobs from the queue and does one after the other. A
//! batch is one job: nothing comes between its items, and none of them costs another its answer.

use std::sync::Arc;
use std::time::Instant;

use super::job::{Job, Load, batch_time};
use super::perform::Worker;
use super::sessions::Sessions;
use super::shared::Shared;
use super::work::Work;
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
        while shared.queue.fill(desk) {
            while let Some(job) = desk.next() {
                if job.queued.elapsed() > shared.deadline {
                    job.refuse(OpError::Deadline);
                } else if !shared.state.is_ready() {
                    job.refuse(OpError::SlotNotReady(shared.state.get()));
                } else {
                    one_job(&mut worker, job);
                }
            }
        }
    }
    sessions.give_back(shared);
}

/// Does a job and answers it, unless the watchdog has done so meanwhile.
fn one_job(worker: &mut Worker<'_>, job: Job) {
    let desk = worker.desk;
    desk.begin(job.done);
    let outcome = match job.load {
        Load::One(work) => worker.item(&work),
        Load::Batch(works) => Err(batch(worker, works)),
    };
    if let Some(done) = desk.end() {
        done.answer(outcome);
    }
}

/// Does the items in their order until one is not to be begun any more. Gives the answer of the rest.
fn batch(worker: &mut Worker<'_>, works: Vec<Work>) -> OpError {
    let shared = worker.shared;
    let (began, time) = (Instant::now(), batch_time(shared.deadline, works.len()));
    for work in works {
        if began.elapsed() > time {
            break;
        }
        if !shared.state.is_ready() {
            return OpError::SlotNotReady(shared.state.get());
        }
        let outcome = match work.check() {
            Ok(()) => worker.item(&work),
            Err(error) => Err(error),
        };
        // An item of an answered batch is done for nobody.
        if !worker.desk.item_ends(outcome) {
            break;
        }
    }
    OpError::Deadline
}
