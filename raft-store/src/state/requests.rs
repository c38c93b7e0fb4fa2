//! The idempotency window: what each recent request was answered, so that a repeat gets the same
//! answer and changes nothing. Bounded by count; what left it is still recognised for a while.
//!
//! After that a repeat is taken for a new request: a key says nothing about when it was first used, so nobody can
//! know, and a floor would refuse every new key as well. What it asks for is compared with the state once more
//! (`expected_highest`, `expected_generation`, names and labels), so it repeats no change unseen.

use serde::{Deserialize, Serialize};

use super::table::{LoadError, Row, RowChange, RowKind, Table};
use crate::codec::CodecError;
use crate::command::{Outcome, Refusal, RequestId};
use crate::seeded::bug;

/// How long requests of one kind are remembered. Clients' and nodes' own have windows apart: however many
/// steps the nodes take, no client's answer is pushed out by them.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Requests whose answers are kept.
    pub answers: usize,
    /// Requests that are recognised, those with answers included; the others get `idempotency_expired`.
    pub recognised: usize,
}

/// Clients' requests: operators repeat by hand, minutes later.
pub const CLIENTS: Bounds = Bounds {
    answers: 4096,
    recognised: 65_536,
};
/// The nodes' own steps: a driver repeats within seconds, or looks again.
pub const NODES: Bounds = Bounds {
    answers: 1024,
    recognised: 4096,
};

/// A remembered request, keyed by the log index that first carried it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Who asked, under which key.
    pub id: RequestId,
    /// Hash of what was asked.
    pub body_hash: [u8; 32],
    /// The answer; dropped when the request leaves the window.
    pub outcome: Option<Outcome>,
}

impl Row for Request {
    const KIND: RowKind = RowKind::Request;
}

/// What the window says of a request.
#[derive(Debug, PartialEq)]
pub enum Seen {
    /// Never seen: go on.
    New,
    /// The same request: this was the answer.
    Repeat(Outcome),
    /// The same key with another body.
    OtherBody,
    /// Seen, but its answer has left the window.
    Expired,
}

/// The requests of one kind, oldest first.
#[derive(Clone, Default)]
struct Window {
    answered: rpds::QueueSync<u64>,
    forgotten: rpds::QueueSync<u64>,
}

/// The windows.
#[derive(Clone, Default)]
pub struct Requests {
    rows: Table<u64, Request>,
    by_id: rpds::HashTrieMapSync<RequestId, u64>,
    clients: Window,
    nodes: Window,
}

impl Requests {
    /// Looks a request up.
    pub fn look_up(&self, id: &RequestId, body_hash: &[u8; 32]) -> Seen {
        if bug("bug::no_deduplication") {
            return Seen::New;
        }
        let Some(row) = self.by_id.get(id).and_then(|index| self.rows.get(index)) else {
            return Seen::New;
        };
        if row.body_hash != *body_hash {
            return Seen::OtherBody;
        }
        row.outcome.clone().map_or(Seen::Expired, Seen::Repeat)
    }

    /// How many are recognised.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    fn window(&mut self, id: &RequestId) -> (&mut Window, Bounds) {
        match id {
            RequestId::Client { .. } => (&mut self.clients, CLIENTS),
            RequestId::Node { .. } => (&mut self.nodes, NODES),
        }
    }

    /// Keeps an answer; refuses an id that is too long to be kept.
    pub(crate) fn remember(
        &mut self,
        index: u64,
        id: RequestId,
        body_hash: [u8; 32],
        outcome: Outcome,
    ) -> Result<(), Refusal> {
        let (window, bounds) = self.window(&id);
        window.answered.enqueue_mut(index);
        let unanswered = (window.answered.len() > bounds.answers)
            .then(|| take(&mut window.answered))
            .flatten();
        if let Some(index) = unanswered {
            window.forgotten.enqueue_mut(index);
        }
        let unknown = (window.answered.len() + window.forgotten.len() > bounds.recognised)
            .then(|| take(&mut window.forgotten))
            .flatten();
        self.by_id.insert_mut(id.clone(), index);
        let outcome = Some(outcome);
        self.rows.put(
            index,
            Request {
                id,
                body_hash,
                outcome,
            },
        )?;
        if let Some((index, row)) = unanswered.and_then(|index| Some((index, self.rows.get(&index)?))) {
            let forgotten = Request {
                outcome: None,
                ..Request::clone(row)
            };
            self.rows.put(index, forgotten)?;
        }
        if let Some((index, row)) = unknown.and_then(|index| Some((index, self.rows.get(&index)?))) {
            let id = row.id.clone();
            self.by_id.remove_mut(&id);
            self.rows.remove(&index);
        }
        Ok(())
    }

    pub(crate) fn drain(&mut self, out: &mut Vec<RowChange>) -> Result<(), CodecError> {
        self.rows.drain(out)
    }

    pub(crate) fn dump(&self, out: &mut Vec<RowChange>) -> Result<(), CodecError> {
        self.rows.dump(out)
    }

    pub(crate) fn load(&mut self, version: u8, key: &[u8], value: &[u8]) -> Result<(), LoadError> {
        self.rows.load(version, key, value)
    }

    /// Rebuilds what is derived, after all rows were loaded.
    pub(crate) fn index(&mut self) {
        let rows: Vec<_> = self
            .rows
            .iter()
            .map(|(index, row)| (*index, row.id.clone(), row.outcome.is_some()))
            .collect();
        (self.clients, self.nodes) = Default::default();
        for (index, id, answered) in &rows {
            let (window, _) = self.window(id);
            let queue = if *answered {
                &mut window.answered
            } else {
                &mut window.forgotten
            };
            queue.enqueue_mut(*index);
        }
        self.by_id = rows.into_iter().map(|(index, id, _)| (id, index)).collect();
    }
}

fn take(queue: &mut rpds::QueueSync<u64>) -> Option<u64> {
    let first = queue.peek().copied()?;
    queue.dequeue_mut();
    Some(first)
}
