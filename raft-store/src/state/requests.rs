//! The idempotency window: what each recent request was answered, so that a repeat gets the same
//! answer and changes nothing. Bounded by count; what left it is still recognised for a while.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::table::{Row, RowChange, RowKind, Table};
use crate::codec::CodecError;
use crate::command::{Outcome, RequestId};

/// Requests whose answers are kept.
pub const WINDOW: usize = 4096;
/// Requests that are still recognised, answered `idempotency_expired`.
pub const RECOGNISED: usize = 65_536;

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

/// The window.
#[derive(Clone, Default)]
pub struct Requests {
    rows: Table<u64, Request>,
    by_id: rpds::HashTrieMapSync<RequestId, u64>,
    /// First index whose answer is still kept.
    answers_from: u64,
    /// How many answers are kept.
    answers: usize,
}

impl Requests {
    /// Looks a request up.
    pub fn look_up(&self, id: &RequestId, body_hash: &[u8; 32]) -> Seen {
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

    pub(crate) fn remember(&mut self, index: u64, id: RequestId, body_hash: [u8; 32], outcome: Outcome) {
        self.by_id.insert_mut(id.clone(), index);
        self.rows.put(
            index,
            Request {
                id,
                body_hash,
                outcome: Some(outcome),
            },
        );
        self.answers += 1;
        self.expire();
        while self.rows.len() > RECOGNISED {
            let Some((&oldest, row)) = self.rows.first() else {
                break;
            };
            let id = row.id.clone();
            self.by_id.remove_mut(&id);
            self.rows.remove(&oldest);
        }
    }

    /// Drops the answer of the one request that leaves the window when another enters it.
    fn expire(&mut self) {
        if self.answers <= WINDOW {
            return;
        }
        let Some((&index, row)) = self.rows.range(self.answers_from..).next() else {
            return;
        };
        let forgotten = Request {
            outcome: None,
            ..Request::clone(row)
        };
        self.answers_from = index + 1;
        self.answers -= 1;
        self.rows.put(index, forgotten);
    }

    pub(crate) fn drain(&mut self, out: &mut Vec<RowChange>) -> Result<(), CodecError> {
        self.rows.drain(out)
    }

    pub(crate) fn dump(&self, out: &mut Vec<RowChange>) -> Result<(), CodecError> {
        self.rows.dump(out)
    }

    pub(crate) fn load(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        self.rows.load(key, value)
    }

    /// Rebuilds what is derived, after all rows were loaded.
    pub(crate) fn index(&mut self) {
        let ids: BTreeMap<u64, RequestId> = self.rows.iter().map(|(i, r)| (*i, r.id.clone())).collect();
        self.by_id = ids.into_iter().map(|(index, id)| (id, index)).collect();
        self.answers = self.rows.values().filter(|row| row.outcome.is_some()).count();
        self.answers_from = self
            .rows
            .iter()
            .find(|(_, row)| row.outcome.is_some())
            .map_or(0, |(index, _)| *index);
    }
}
