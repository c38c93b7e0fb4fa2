//! The bounded queue between callers and a slot's threads, and what each thread has taken from
//! it. Jobs stay where others can reach them until their call begins, and batches between their turns, so that a
//! thread that hangs takes none with it.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::job::{Done, Job};
use super::watchdog::CallClock;
use super::work::Output;
use crate::error::OpError;
use crate::module::lock;

/// Most jobs a thread takes at once: few enough that another thread is not left idle.
const HANDFUL: usize = 16;

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

/// What one thread has taken.
#[derive(Default)]
struct Taken {
    /// Single jobs.
    singles: VecDeque<Job>,
    /// Batches that are not done. They stay with their thread, whose session is theirs, and have turns.
    batches: VecDeque<Job>,
}

/// What one thread has in hand.
#[derive(Default)]
pub(crate) struct Desk {
    taken: Mutex<Taken>,
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

    pub(crate) fn next_single(&self) -> Option<Job> {
        lock(&self.taken).singles.pop_front()
    }

    /// The batch whose turn it is.
    pub(crate) fn next_batch(&self) -> Option<Job> {
        lock(&self.taken).batches.pop_front()
    }

    /// Batches that come to their end before their turn: a ring of many goes round too slowly for that.
    pub(crate) fn take_late(&self, deadline: Duration) -> VecDeque<Job> {
        let mut taken = lock(&self.taken);
        if !taken.batches.iter().any(|batch| batch.is_late(deadline)) {
            return VecDeque::new();
        }
        let batches = std::mem::take(&mut taken.batches);
        let (late, left) = batches.into_iter().partition(|batch| batch.is_late(deadline));
        taken.batches = left;
        late
    }

    /// A batch that has given way waits for its next turn, behind the others.
    pub(crate) fn put_back(&self, batch: Job) {
        lock(&self.taken).batches.push_back(batch);
    }

    /// Items that batches here have still to do, without the one whose turn it is.
    fn unfinished(&self) -> usize {
        lock(&self.taken).batches.iter().map(Job::items).sum()
    }

    pub(crate) fn take_all(&self) -> VecDeque<Job> {
        let Taken { mut singles, batches } = std::mem::take(&mut *lock(&self.taken));
        singles.extend(batches);
        singles
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

    /// For a single job only what waits counts: batches under way give way to it. A batch has to fit beside what
    /// the batches on `desks` have still to do, which bounds what all of them can hold and how rare a turn becomes.
    pub(crate) fn push(&self, job: Job, desks: &[Desk]) -> Result<(), OpError> {
        let mut waiting = lock(&self.waiting);
        // Under this lock none is on its way from here to a desk.
        let unfinished = if job.is_batch() {
            desks.iter().map(Desk::unfinished).sum()
        } else {
            0
        };
        let items = waiting.items.saturating_add(job.items());
        // A batch that is larger than the whole queue waits for no place: behind nobody it is taken.
        let behind_nobody = waiting.jobs.is_empty() && unfinished == 0;
        if waiting.closed || (items.saturating_add(unfinished) > self.capacity && !behind_nobody) {
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

    /// Puts a fair share of what waits on `desk`, and waits for it if there is nothing to do. A thread with
    /// unfinished batches takes one job at a time, and waits for none: what it took would wait for their turns, and
    /// another thread may be idle. False once the queue is closed.
    pub(crate) fn fill(&self, desk: &Desk) -> bool {
        let mut waiting = lock(&self.waiting);
        let mut taken = loop {
            if waiting.closed {
                return false;
            }
            let taken = lock(&desk.taken);
            if !waiting.jobs.is_empty() || !taken.batches.is_empty() {
                break taken;
            }
            drop(taken);
            waiting = self.arrived.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        };
        let share = if taken.batches.is_empty() {
            waiting.jobs.len().div_ceil(self.threads).min(HANDFUL)
        } else {
            1
        };
        for _ in 0..share {
            let Some(job) = waiting.jobs.pop_front() else {
                break;
            };
            waiting.items = waiting.items.saturating_sub(job.items());
            if job.is_batch() {
                taken.batches.push_back(job);
                break;
            }
            taken.singles.push_back(job);
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
        Job::one(work(), None, done)
    }

    #[test]
    fn a_full_queue_refuses_and_keeps_what_it_has() {
        let (answers, _) = channel();
        let queue = Queue::new(2, 1);
        queue.push(job(&answers), &[]).unwrap();
        queue.push(job(&answers), &[]).unwrap();
        assert_eq!(queue.push(job(&answers), &[]).unwrap_err(), OpError::QueueFull);
        assert_eq!(queue.depth(), 2);
    }

    #[test]
    fn threads_share_what_waits() {
        let (answers, _) = channel();
        let queue = Queue::new(64, 2);
        for _ in 0..10 {
            queue.push(job(&answers), &[]).unwrap();
        }
        let desk = Desk::default();
        assert!(queue.fill(&desk));
        assert_eq!((queue.depth(), desk.take_all().len()), (5, 5));
    }

    #[test]
    fn a_thread_takes_nothing_that_stands_behind_a_batch() {
        let (answers, _) = channel();
        let queue = Queue::new(5, 1);
        queue.push(job(&answers), &[]).unwrap();
        let batch = Job::batch(vec![work(), work(), work()], None, Box::new(|_| {}));
        queue.push(batch, &[]).unwrap();
        queue.push(job(&answers), &[]).unwrap();
        let desk = Desk::default();
        assert!(queue.fill(&desk));
        assert_eq!((queue.depth(), desk.take_all().len()), (1, 2));
    }

    /// A desk with a batch that has given way with so many items left.
    fn desk_with(items: usize) -> Desk {
        let desk = Desk::default();
        let works = (0..items).map(|_| work()).collect();
        desk.put_back(Job::batch(works, None, Box::new(|_| ())));
        desk
    }

    #[test]
    fn beside_unfinished_batches_a_thread_takes_one_job_at_a_time_and_waits_for_none() {
        let (answers, _) = channel();
        let queue = Queue::new(64, 1);
        let desk = desk_with(3);
        for _ in 0..3 {
            queue.push(job(&answers), &[]).unwrap();
        }
        for left in [2, 1, 0] {
            assert!(queue.fill(&desk));
            assert!(desk.next_single().is_some() && desk.next_single().is_none());
            assert_eq!(queue.depth(), left);
        }
        assert!(queue.fill(&desk));
        assert!(desk.next_single().is_none());
        assert!(desk.next_batch().is_some() && desk.next_batch().is_none());
    }

    #[test]
    fn batches_have_their_turns_in_a_ring() {
        let (desk, queue) = (desk_with(3), Queue::new(64, 1));
        queue
            .push(Job::batch(vec![work(), work()], None, Box::new(|_| ())), &[])
            .unwrap();
        assert!(queue.fill(&desk));
        let mut turns = Vec::new();
        for _ in 0..4 {
            let batch = desk.next_batch().unwrap();
            turns.push(batch.items());
            desk.put_back(batch);
        }
        assert_eq!(turns, [3, 2, 3, 2]);
        assert_eq!(desk.take_all().len(), 2);
    }

    #[test]
    fn an_unfinished_batch_keeps_its_places_from_batches_and_from_no_single_job() {
        let (answers, _) = channel();
        let queue = Queue::new(10, 1);
        let desks = [desk_with(4), desk_with(3)];
        let batch = |items| Job::batch((0..items).map(|_| work()).collect(), None, Box::new(|_| ()));
        assert_eq!(queue.push(batch(4), &desks).unwrap_err(), OpError::QueueFull);
        queue.push(batch(3), &desks).unwrap();
        for _ in 0..7 {
            queue.push(job(&answers), &desks).unwrap();
        }
        assert_eq!(queue.push(job(&answers), &desks).unwrap_err(), OpError::QueueFull);
        // A batch that is larger than the queue comes after all of them.
        queue.take_all();
        assert_eq!(queue.push(batch(11), &desks).unwrap_err(), OpError::QueueFull);
        queue.push(batch(11), &[]).unwrap();
    }

    #[test]
    fn an_answered_batch_or_job_goes_no_further() {
        let (answers, answered) = channel();
        let desk = Desk::default();
        let done = Box::new(move |outcomes: Vec<Result<Output, OpError>>| {
            let errors: Vec<bool> = outcomes.iter().map(Result::is_err).collect();
            answers.send(errors).unwrap();
        });
        let batch = Job::batch(vec![work(), work()], None, done);
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
        assert_eq!(queue.push(job(&answers), &[]).unwrap_err(), OpError::QueueFull);
    }

    #[test]
    fn a_batch_fills_the_queue_with_its_items() {
        let queue = Queue::new(10, 1);
        let batch = |items| Job::batch((0..items).map(|_| work()).collect(), None, Box::new(|_| ()));
        // Behind nobody even one that is larger than the queue.
        queue.push(batch(1000), &[]).unwrap();
        assert_eq!(queue.push(batch(1), &[]).unwrap_err(), OpError::QueueFull);
        assert!(queue.fill(&Desk::default()));
        queue.push(batch(6), &[]).unwrap();
        queue.push(batch(4), &[]).unwrap();
        assert_eq!(queue.push(batch(1), &[]).unwrap_err(), OpError::QueueFull);
        assert_eq!((queue.depth(), queue.take_all().len()), (2, 2));
        queue.push(batch(10), &[]).unwrap();
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
