//! The bounded queue between callers and a slot's threads, and what each thread has taken from
//! it. Jobs stay where others can reach them until their call begins, so that a thread that
//! hangs takes none with it.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};

use super::job::{Done, Job};
use super::watchdog::CallClock;
use super::work::Output;
use crate::error::OpError;
use crate::module::lock;

/// Most jobs a thread takes at once: few enough that another thread is not left idle.
const BATCH: usize = 16;

struct Waiting {
    jobs: VecDeque<Job>,
    /// Items of all of them: a batch takes as long as it has items.
    items: usize,
    closed: bool,
}

pub(crate) struct Queue {
    waiting: Mutex<Waiting>,
    arrived: Condvar,
    capacity: usize,
    threads: usize,
}

/// What one thread has in hand.
#[derive(Default)]
pub(crate) struct Desk {
    batch: Mutex<VecDeque<Job>>,
    /// The callback of the call that is running, for whoever answers first.
    pub(crate) current: Mutex<Option<Done>>,
    pub(crate) clock: CallClock,
}

impl Desk {
    /// A call begins; from now on its callback can be taken by the watchdog.
    pub(crate) fn begin(&self, done: Done) {
        let mut current = lock(&self.current);
        *current = Some(done);
        self.clock.begin();
    }

    /// The call is over. `None` if the watchdog has answered it.
    pub(crate) fn end(&self) -> Option<Done> {
        let mut current = lock(&self.current);
        self.clock.end();
        current.take()
    }

    /// An item of a batch is over, and the next one begins. False if the watchdog has answered the batch.
    pub(crate) fn item_ends(&self, outcome: Result<Output, OpError>) -> bool {
        let mut current = lock(&self.current);
        let Some(Done::Batch(batch)) = current.as_mut() else {
            return false;
        };
        batch.push(outcome);
        self.clock.begin();
        true
    }

    /// Another call of the same job begins. False if the watchdog has answered the job.
    pub(crate) fn next_call(&self) -> bool {
        let current = lock(&self.current);
        if current.is_some() {
            self.clock.begin();
        }
        current.is_some()
    }

    pub(crate) fn next(&self) -> Option<Job> {
        lock(&self.batch).pop_front()
    }

    pub(crate) fn take_all(&self) -> VecDeque<Job> {
        std::mem::take(&mut *lock(&self.batch))
    }
}

impl Queue {
    pub(crate) fn new(capacity: usize, threads: usize) -> Self {
        Self {
            waiting: Mutex::new(Waiting {
                jobs: VecDeque::new(),
                items: 0,
                closed: false,
            }),
            arrived: Condvar::new(),
            capacity,
            threads: threads.max(1),
        }
    }

    pub(crate) fn push(&self, job: Job) -> Result<(), OpError> {
        let mut waiting = lock(&self.waiting);
        let items = waiting.items.saturating_add(job.items());
        // A batch that is larger than the whole queue waits for no place: behind nobody it is taken.
        if waiting.closed || (items > self.capacity && !waiting.jobs.is_empty()) {
            return Err(OpError::QueueFull);
        }
        waiting.items = items;
        waiting.jobs.push_back(job);
        drop(waiting);
        self.arrived.notify_one();
        Ok(())
    }

    pub(crate) fn depth(&self) -> usize {
        lock(&self.waiting).jobs.len()
    }

    /// Waits for jobs and puts a fair share of them on `desk`. False once the queue is closed.
    pub(crate) fn fill(&self, desk: &Desk) -> bool {
        let mut waiting = lock(&self.waiting);
        loop {
            if waiting.closed {
                return false;
            }
            if !waiting.jobs.is_empty() {
                break;
            }
            waiting = self.arrived.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        let share = waiting.jobs.len().div_ceil(self.threads).min(BATCH);
        let mut taken = lock(&desk.batch);
        for _ in 0..share {
            let Some(job) = waiting.jobs.pop_front() else {
                break;
            };
            waiting.items = waiting.items.saturating_sub(job.items());
            let is_batch = job.is_batch();
            taken.push_back(job);
            // What is behind it would wait for all of its items, and another thread may be idle.
            if is_batch {
                break;
            }
        }
        true
    }

    /// Takes every waiting job, to be refused.
    pub(crate) fn take_all(&self) -> VecDeque<Job> {
        let mut waiting = lock(&self.waiting);
        waiting.items = 0;
        std::mem::take(&mut waiting.jobs)
    }

    /// Lets the threads end; nothing is accepted any more.
    pub(crate) fn close(&self) {
        lock(&self.waiting).closed = true;
        self.arrived.notify_all();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use super::super::work::{DecryptV1Job, Work};
    use super::*;
    use crate::names::KeyUid;

    fn work() -> Work {
        Work::DecryptV1(DecryptV1Job {
            key_uid: KeyUid::from_bytes([0; 16]),
            ciphertext: Vec::new(),
            context: "c".into(),
            binding_value: "".into(),
        })
    }

    fn job(answers: &Sender<OpError>) -> Job {
        let answers = answers.clone();
        let done = Box::new(move |outcome: Result<Output, OpError>| {
            let _ = answers.send(outcome.err().unwrap());
        });
        Job::one(work(), done)
    }

    #[test]
    fn a_full_queue_refuses_and_keeps_what_it_has() {
        let (answers, _) = channel();
        let queue = Queue::new(2, 1);
        queue.push(job(&answers)).unwrap();
        queue.push(job(&answers)).unwrap();
        assert_eq!(queue.push(job(&answers)).unwrap_err(), OpError::QueueFull);
        assert_eq!(queue.depth(), 2);
    }

    #[test]
    fn threads_share_what_waits() {
        let (answers, _) = channel();
        let queue = Queue::new(64, 2);
        for _ in 0..10 {
            queue.push(job(&answers)).unwrap();
        }
        let desk = Desk::default();
        assert!(queue.fill(&desk));
        assert_eq!((queue.depth(), desk.take_all().len()), (5, 5));
    }

    #[test]
    fn a_thread_takes_nothing_that_stands_behind_a_batch() {
        let (answers, _) = channel();
        let queue = Queue::new(5, 1);
        queue.push(job(&answers)).unwrap();
        let batch = Job::batch(vec![work(), work(), work()], Box::new(|_| {}));
        queue.push(batch).unwrap();
        queue.push(job(&answers)).unwrap();
        let desk = Desk::default();
        assert!(queue.fill(&desk));
        assert_eq!((queue.depth(), desk.take_all().len()), (1, 2));
    }

    #[test]
    fn an_answered_batch_or_job_goes_no_further() {
        let (answers, answered) = channel();
        let desk = Desk::default();
        let done = Box::new(move |outcomes: Vec<Result<Output, OpError>>| {
            let errors: Vec<bool> = outcomes.iter().map(Result::is_err).collect();
            answers.send(errors).unwrap();
        });
        let batch = Job::batch(vec![work(), work()], done);
        desk.begin(batch.done);
        assert!(desk.next_call());
        assert!(desk.item_ends(Ok(Output::Envelope(Vec::new()))));
        // As the watchdog does when the second item hangs.
        let done = lock(&desk.current).take().unwrap();
        done.answer(Err(OpError::Deadline));
        assert_eq!(answered.recv().unwrap(), [false, true]);
        assert!(!desk.item_ends(Ok(Output::Envelope(Vec::new()))));
        assert!(!desk.next_call());
        assert!(desk.end().is_none() && desk.clock.running().is_none());
    }

    #[test]
    fn a_closed_queue_ends_its_threads_and_takes_nothing() {
        let (answers, _) = channel();
        let queue = Queue::new(2, 1);
        queue.close();
        assert!(!queue.fill(&Desk::default()));
        assert_eq!(queue.push(job(&answers)).unwrap_err(), OpError::QueueFull);
    }

    #[test]
    fn a_batch_fills_the_queue_with_its_items() {
        let queue = Queue::new(10, 1);
        let batch = |items| Job::batch((0..items).map(|_| work()).collect(), Box::new(|_| ()));
        // Behind nobody even one that is larger than the queue.
        queue.push(batch(1000)).unwrap();
        assert_eq!(queue.push(batch(1)).unwrap_err(), OpError::QueueFull);
        assert!(queue.fill(&Desk::default()));
        queue.push(batch(6)).unwrap();
        queue.push(batch(4)).unwrap();
        assert_eq!(queue.push(batch(1)).unwrap_err(), OpError::QueueFull);
        assert_eq!((queue.depth(), queue.take_all().len()), (2, 2));
        queue.push(batch(10)).unwrap();
    }

    #[test]
    fn a_refused_job_is_answered_even_if_its_callback_panics() {
        let (answers, answered) = channel();
        job(&answers).refuse(OpError::Deadline);
        assert_eq!(answered.recv().unwrap(), OpError::Deadline);
        let done = Done::One(Box::new(|_| panic!("the caller's own fault")));
        done.answer(Err(OpError::Deadline));
    }
}
