//! Jobs of the data path and the callbacks that answer them. Every accepted job is answered
//! exactly once, by whoever takes its callback first.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::work::{Output, Work};
use crate::error::OpError;

/// How a job is answered: once, on one of the slot's threads.
pub type OnDone = Box<dyn FnOnce(Result<Output, OpError>) + Send>;

/// How a batch is answered: once, on one of the slot's threads, with one outcome for each item, in their order.
pub type OnBatchDone = Box<dyn FnOnce(Vec<Result<Output, OpError>>) + Send>;

/// The time that a batch gets where one job gets `one`: a batch of fewer than a hundred items as much, and once
/// more for every hundred.
#[must_use]
pub fn batch_time(one: Duration, items: usize) -> Duration {
    one.saturating_mul(u32::try_from(1 + items / 100).unwrap_or(u32::MAX))
}

/// How many times the time that it gets a batch may take in all, turns of others included: a caller waits as much
/// longer than a call may take. With it, two batches and the single jobs beside them share a thread to the end.
pub const SHARED_BY: u32 = 3;

/// The longest from a batch's arrival to its answer, where one job gets `one`: whoever submits it has to wait so long.
#[must_use]
pub fn batch_wait(one: Duration, items: usize) -> Duration {
    batch_time(one, items).saturating_mul(SHARED_BY)
}

/// Longest turn of a batch. Whoever else has work for the thread waits for one turn, and for the call that is
/// running. A token that takes 10 µs for a call does a thousand small items in one turn.
const TURN: Duration = Duration::from_millis(25);

/// How long a batch goes on before others have a turn, and they before it has the next one: [`TURN`], or a quarter
/// of a short deadline.
pub(crate) fn turn(deadline: Duration) -> Duration {
    TURN.min(deadline / 4)
}

/// What one thread does, with one session.
pub(crate) enum Load {
    One(Work),
    Batch(Items),
}

/// The items of a batch that are still to be done, in their order.
pub(crate) struct Items {
    pub(crate) works: std::vec::IntoIter<Work>,
    /// How many there were.
    pub(crate) of: usize,
    /// How long its turns took that are over.
    pub(crate) spent: Duration,
}

impl Items {
    /// Whether the next item is not to be begun any more: in a turn that has lasted for `turn`, of a batch that came
    /// `waited` ago. The turns of others cost it none of its own time, but nobody waits for it for ever.
    pub(crate) fn is_over(&self, turn: Duration, waited: Duration, deadline: Duration) -> bool {
        self.spent + turn > batch_time(deadline, self.of) || self.is_late(waited, deadline)
    }

    /// Whether one more call might end after its caller has gone, who would never see what was done before.
    fn is_late(&self, waited: Duration, deadline: Duration) -> bool {
        waited.saturating_add(deadline) > batch_wait(deadline, self.of)
    }
}

pub(crate) enum Done {
    One(OnDone),
    Batch(Batch),
}

/// A batch and the answers of its items so far. They stand where the watchdog can reach them: an item that hangs
/// must not cost those before it their answers.
pub(crate) struct Batch {
    answers: Vec<Result<Output, OpError>>,
    items: usize,
    done: OnBatchDone,
}

impl Batch {
    /// The answer of the next item.
    pub(crate) fn push(&mut self, outcome: Result<Output, OpError>) {
        if self.answers.len() < self.items {
            self.answers.push(outcome);
        }
    }

    /// Answers, every item that has no answer with this error.
    fn answer(mut self, rest: &OpError) {
        self.answers.resize_with(self.items, || Err(rest.clone()));
        (self.done)(self.answers);
    }
}

impl Done {
    /// Answers. Of a batch only errors come here: each is the answer of every item that has none. A panic in the
    /// callback is the caller's own and must not end the slot's thread.
    pub(crate) fn answer(self, outcome: Result<Output, OpError>) {
        let answer = || match self {
            Self::One(done) => done(outcome),
            Self::Batch(batch) => batch.answer(&outcome.err().unwrap_or(OpError::Deadline)),
        };
        let _ = catch_unwind(AssertUnwindSafe(answer));
    }
}

/// When a job came, and when its caller goes, where that is known.
#[derive(Clone, Copy)]
pub(crate) struct Term {
    queued: Instant,
    until: Option<Instant>,
}

impl Term {
    fn new(until: Option<Instant>) -> Self {
        Self {
            queued: Instant::now(),
            until,
        }
    }

    pub(crate) fn waited(&self) -> Duration {
        self.queued.elapsed()
    }

    /// Whether a call that takes so long, and begins now, would end after the caller has gone.
    pub(crate) fn is_too_short(&self, call: Duration) -> bool {
        let left = |until: Instant| until.saturating_duration_since(Instant::now());
        self.until.is_some_and(|until| left(until) < call)
    }
}

pub(crate) struct Job {
    pub(crate) load: Load,
    pub(crate) done: Done,
    pub(crate) term: Term,
}

impl Job {
    pub(crate) fn one(work: Work, until: Option<Instant>, done: OnDone) -> Self {
        Self {
            load: Load::One(work),
            done: Done::One(done),
            term: Term::new(until),
        }
    }

    pub(crate) fn batch(works: Vec<Work>, until: Option<Instant>, done: OnBatchDone) -> Self {
        let batch = Batch {
            answers: Vec::with_capacity(works.len()),
            items: works.len(),
            done,
        };
        Self {
            load: Load::Batch(Items {
                of: works.len(),
                works: works.into_iter(),
                spent: Duration::ZERO,
            }),
            done: Done::Batch(batch),
            term: Term::new(until),
        }
    }

    /// How many things it is still to do.
    pub(crate) fn items(&self) -> usize {
        match &self.load {
            Load::One(_) => 1,
            Load::Batch(items) => items.works.len().max(1),
        }
    }

    /// Whether a batch has had a turn.
    pub(crate) fn is_begun(&self) -> bool {
        matches!(&self.load, Load::Batch(items) if !items.spent.is_zero())
    }

    /// Whether it is a batch that comes to its end between two turns.
    pub(crate) fn is_late(&self, deadline: Duration) -> bool {
        let is_over =
            |items: &Items| items.is_late(self.term.waited(), deadline) || self.term.is_too_short(deadline);
        matches!(&self.load, Load::Batch(items) if is_over(items))
    }

    pub(crate) fn is_batch(&self) -> bool {
        matches!(self.load, Load::Batch(_))
    }

    pub(crate) fn refuse(self, error: OpError) {
        self.done.answer(Err(error));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_batch_gets_more_time_with_every_hundred_items() {
        let one = Duration::from_secs(2);
        for (items, seconds) in [(0, 2), (1, 2), (99, 2), (100, 4), (1000, 22)] {
            assert_eq!(batch_time(one, items), Duration::from_secs(seconds), "{items}");
        }
        assert_eq!(batch_time(Duration::MAX, usize::MAX), Duration::MAX);
    }

    #[test]
    fn the_turns_of_others_cost_a_batch_none_of_its_time_but_it_does_not_wait_for_ever() {
        let one = Duration::from_secs(2);
        let seconds = Duration::from_secs;
        let items = |spent| Items {
            works: Vec::new().into_iter(),
            of: 1000,
            spent: seconds(spent),
        };
        // It gets 22 s, and may take 66: the last call begins early enough to end by then.
        for (spent, turn, waited, over) in [
            (0, 0, 0, false),
            (12, 10, 60, false),
            (12, 11, 23, true),
            (23, 0, 23, true),
            (1, 0, 64, false),
            (1, 0, 65, true),
        ] {
            let is_over = items(spent).is_over(seconds(turn), seconds(waited), one);
            assert_eq!(is_over, over, "{spent} + {turn} s of {waited} s");
        }
        assert_eq!(batch_wait(Duration::MAX, 1), Duration::MAX);
    }

    #[test]
    fn a_batch_is_late_when_one_more_call_might_end_after_its_caller_has_gone() {
        let call = Duration::from_secs(60);
        let job = |until| Job::batch(Vec::new(), until, Box::new(|_| ()));
        let now = Instant::now();
        assert!(!job(None).is_late(call));
        assert!(!job(Some(now + 2 * call)).is_late(call));
        assert!(job(Some(now + call / 2)).is_late(call));
        assert!(
            job(Some(now)).is_late(Duration::from_millis(1)),
            "its caller is gone"
        );
    }

    #[test]
    fn a_turn_is_short_beside_any_deadline() {
        for (deadline, turn_of_it) in [(2000, 25), (100, 25), (40, 10)] {
            let deadline = Duration::from_millis(deadline);
            assert_eq!(turn(deadline), Duration::from_millis(turn_of_it));
        }
    }

    #[test]
    fn an_end_in_the_middle_of_a_batch_leaves_the_answers_that_there_are() {
        let (send, receive) = channel();
        let mut batch = Batch {
            answers: Vec::new(),
            items: 3,
            done: Box::new(move |outcomes| send.send(outcomes).unwrap()),
        };
        batch.push(Ok(Output::Envelope(vec![7])));
        Done::Batch(batch).answer(Err(OpError::Deadline));
        let outcomes = receive.recv().unwrap();
        assert!(matches!(&outcomes[0], Ok(Output::Envelope(bytes)) if *bytes == [7]));
        for outcome in &outcomes[1..] {
            assert!(matches!(outcome, Err(OpError::Deadline)));
        }
        assert_eq!(outcomes.len(), 3);
    }

    #[test]
    fn a_batch_that_is_refused_has_an_answer_for_every_item() {
        let (send, receive) = channel();
        let done: OnBatchDone = Box::new(move |outcomes| send.send(outcomes.len()).unwrap());
        let mut job = Job::batch(Vec::new(), None, done);
        if let Done::Batch(batch) = &mut job.done {
            batch.items = 5;
        }
        assert!(job.is_batch());
        job.refuse(OpError::QueueFull);
        assert_eq!(receive.recv().unwrap(), 5);
    }
}
