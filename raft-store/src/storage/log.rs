//! The Raft log and vote as openraft sees them. The tail is cached, so that replication reads memory;
//! everything is written by the writer thread.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::ops::{Bound, RangeBounds};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

use openraft::storage::{LogFlushed, LogState, RaftLogStorage};
use openraft::{EntryPayload, OptionalSend, RaftLogId, RaftLogReader, StorageError, StorageIOError};

use super::error::StoreFailure;
use super::frame::LOG;
use super::writer::{Core, LOG_TREE, WriteOp, Writer, log_key};
use crate::names::RaftId;
use crate::seeded::bug;
use crate::{Entry, LogId, TypeConfig, Vote, codec};

type Failure = StorageError<RaftId>;

/// Encoded bytes of entries kept in memory; entries not yet durable are kept beyond it.
const CACHE_BYTES: usize = 16 << 20;
/// Bytes of entries sent to a follower in one frame; the frame may be 1 MiB.
const FRAME_BYTES: usize = 768 << 10;

/// The log's shape: what exists, how long each entry is, and the cached tail.
#[derive(Default)]
pub(super) struct LogIndex {
    pub(super) purged: Option<LogId>,
    pub(super) last: Option<LogId>,
    /// Index of the first entry that exists.
    pub(super) first: u64,
    /// Encoded length of each entry from `first`.
    pub(super) lengths: VecDeque<u32>,
    /// Their sum.
    pub(super) bytes: u64,
    /// The tail: entries up to the last one.
    pub(super) cache: VecDeque<Arc<Entry>>,
    pub(super) cached_bytes: usize,
}

impl LogIndex {
    fn next(&self) -> u64 {
        self.first + self.lengths.len() as u64
    }

    fn cache_first(&self) -> u64 {
        self.next() - self.cache.len() as u64
    }

    fn length(&self, index: u64) -> usize {
        let at = index
            .checked_sub(self.first)
            .and_then(|at| usize::try_from(at).ok());
        at.and_then(|at| self.lengths.get(at))
            .map_or(0, |len| *len as usize)
    }

    pub(super) fn push(&mut self, entry: Entry, length: usize) {
        if self.lengths.is_empty() {
            self.first = entry.log_id.index;
        }
        self.last = Some(entry.log_id);
        self.lengths.push_back(length as u32);
        self.bytes += length as u64;
        self.cache.push_back(Arc::new(entry));
        self.cached_bytes += length;
    }

    /// Forgets cached entries that are durable, down to the limit.
    pub(super) fn shrink(&mut self, durable: u64) {
        while self.cached_bytes > CACHE_BYTES && !self.cache.is_empty() && self.cache_first() <= durable {
            self.cached_bytes -= self.length(self.cache_first());
            self.cache.pop_front();
        }
    }

    fn pop_back(&mut self) -> Option<(u64, usize)> {
        let index = self.next().checked_sub(1)?;
        let length = self.lengths.pop_back()? as usize;
        self.bytes -= length as u64;
        if self.cache.pop_back().is_some() {
            self.cached_bytes -= length;
        }
        Some((index, length))
    }

    fn pop_front(&mut self) -> Option<(u64, usize)> {
        let cached = self.cache.len() == self.lengths.len();
        let length = self.lengths.pop_front()? as usize;
        self.bytes -= length as u64;
        if cached && self.cache.pop_front().is_some() {
            self.cached_bytes -= length;
        }
        self.first += 1;
        Some((self.first - 1, length))
    }

    /// Takes out everything from `from` on; gives back what has to be removed.
    pub(super) fn cut(&mut self, from: u64) -> Vec<(u64, usize)> {
        let mut gone = Vec::new();
        while self.next() > from {
            let Some(entry) = self.pop_back() else { break };
            gone.push(entry);
        }
        gone
    }

    /// Takes out everything up to `upto`, which is purged from now on; gives back what has to be removed.
    pub(super) fn purge(&mut self, upto: LogId) -> Vec<(u64, usize)> {
        let mut gone = Vec::new();
        while !self.lengths.is_empty() && self.first <= upto.index {
            let Some(entry) = self.pop_front() else { break };
            gone.push(entry);
        }
        if self.lengths.is_empty() {
            self.first = self.first.max(upto.index + 1);
        }
        self.purged = self.purged.max(Some(upto));
        self.last = self.last.max(Some(upto));
        gone
    }
}

/// Log and vote. Clones share the log.
#[derive(Clone)]
pub struct LogStore {
    core: Arc<Core>,
    writer: Writer,
    index: Arc<Mutex<LogIndex>>,
}

impl LogStore {
    pub(super) fn new(core: Arc<Core>, writer: Writer, index: LogIndex) -> Self {
        Self {
            core,
            writer,
            index: Arc::new(Mutex::new(index)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, LogIndex> {
        self.index
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The last entry that there is, or was.
    pub(super) fn last(&self) -> Option<LogId> {
        let index = self.lock();
        index.last.max(index.purged)
    }

    /// Entries from sled, for readers that fell behind the cache.
    fn read_rows(&self, start: u64, end: u64) -> Result<Vec<Entry>, StoreFailure> {
        let mut entries = Vec::new();
        self.core.rows.scan(LOG_TREE, &log_key(start), &mut |row| {
            if row.key >= log_key(end) {
                return Ok(false);
            }
            if row.form != LOG {
                return Err(row.form.unknown());
            }
            entries.push(codec::decode(&row.value)?);
            Ok(true)
        })?;
        Ok(entries)
    }

    pub(super) fn read(&self, start: u64, end: u64) -> Result<Vec<Entry>, StoreFailure> {
        let (start, end, cache_first, cached) = {
            let index = self.lock();
            let (start, end) = (start.max(index.first), end.min(index.next()));
            let cache_first = index.cache_first();
            let skip = usize::try_from(start.saturating_sub(cache_first)).unwrap_or(usize::MAX);
            let take = usize::try_from(end.saturating_sub(start.max(cache_first))).unwrap_or(0);
            let cached: Vec<Arc<Entry>> = index.cache.iter().skip(skip).take(take).cloned().collect();
            (start, end, cache_first, cached)
        };
        let mut entries = if start < end.min(cache_first) {
            self.read_rows(start, end.min(cache_first))?
        } else {
            Vec::new()
        };
        entries.extend(cached.iter().map(|entry| Entry::clone(entry)));
        Ok(entries)
    }
}

fn read_error(failure: StoreFailure) -> Failure {
    StorageIOError::read_logs(&failure).into()
}

fn write_error(failure: StoreFailure) -> Failure {
    StorageIOError::write_logs(&failure).into()
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: R,
    ) -> Result<Vec<Entry>, Failure> {
        let start = match range.start_bound() {
            Bound::Included(i) => *i,
            Bound::Excluded(i) => i + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(i) => i + 1,
            Bound::Excluded(i) => *i,
            Bound::Unbounded => u64::MAX,
        };
        self.read(start, end).map_err(read_error)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, Failure> {
        let end = {
            let index = self.lock();
            let mut bytes = 0;
            // At least one entry, however large; then as many as fit into a frame.
            (start..end)
                .take_while(|i| {
                    bytes += index.length(*i);
                    *i == start || bytes <= FRAME_BYTES
                })
                .last()
                .map_or(end, |last| last + 1)
        };
        self.read(start, end).map_err(read_error)
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, Failure> {
        let index = self.lock();
        Ok(LogState {
            last_purged_log_id: index.purged,
            last_log_id: index.last.max(index.purged),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), Failure> {
        let vote = *vote;
        let saved = self.writer.call(|reply| WriteOp::Vote { vote, reply }).await;
        saved.map_err(|failure| StorageIOError::write_vote(&failure).into())
    }

    /// Our own committed vote comes back uncommitted: openraft would otherwise resume leadership in the
    /// old term without an election, and a log that lost its tail would reuse log ids unnoticed.
    async fn read_vote(&mut self) -> Result<Option<Vote>, Failure> {
        let control = self.core.control();
        if bug("bug::keep_restarted_leaders_term") {
            return Ok(control.vote);
        }
        Ok(control.vote.map(|vote| Vote {
            committed: vote.committed && vote.leader_id.node_id != control.raft_id,
            ..vote
        }))
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<TypeConfig>) -> Result<(), Failure>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut encoded = Vec::new();
        let mut proposed = None;
        let last = {
            let mut index = self.lock();
            for entry in entries {
                if index
                    .purged
                    .is_some_and(|purged| entry.log_id.index <= purged.index)
                {
                    // What was purged is in the state; its entry is not wanted again.
                    continue;
                }
                if !index.lengths.is_empty() && entry.log_id.index != index.next() {
                    let gap =
                        StoreFailure::Damaged(format!("{} appended after {:?}", entry.log_id, index.last));
                    return Err(write_error(gap));
                }
                if let EntryPayload::Membership(membership) = &entry.payload {
                    let joint = membership.get_joint_config().len() > 1;
                    proposed = Some(if joint {
                        "store::joint_proposed"
                    } else {
                        "store::uniform_proposed"
                    });
                }
                let bytes = codec::encode(&entry)
                    .map_err(|e| StorageIOError::write_log_entry(*entry.get_log_id(), &e))?;
                encoded.push((entry.log_id.index, bytes));
                let length = encoded.last().map_or(0, |(_, bytes)| bytes.len());
                index.push(entry, length);
            }
            index.shrink(self.core.durable.load(Ordering::Acquire));
            self.core.log_bytes.store(index.bytes, Ordering::Relaxed);
            index.last
        };
        let (Some(last), false) = (last, encoded.is_empty()) else {
            callback.log_io_completed(Ok(()));
            return Ok(());
        };
        self.writer
            .send(WriteOp::Append {
                entries: encoded,
                last,
                done: callback,
            })
            .map_err(write_error)?;
        if let Some(point) = proposed {
            let _: &str = point;
            fail::fail_point!(point);
        }
        Ok(())
    }

    async fn truncate(&mut self, log_id: LogId) -> Result<(), Failure> {
        let before = log_id.index.checked_sub(1);
        let kept = match before {
            Some(index) => self
                .read(index, index + 1)
                .map_err(read_error)?
                .first()
                .map(|entry| entry.log_id),
            None => None,
        };
        let (remove, last) = {
            let mut index = self.lock();
            let remove = index.cut(log_id.index);
            index.last = kept.max(index.purged);
            self.core.log_bytes.store(index.bytes, Ordering::Relaxed);
            (remove, index.last)
        };
        let done = self
            .writer
            .call(|reply| WriteOp::Truncate { remove, last, reply })
            .await;
        done.map_err(write_error)
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), Failure> {
        let (remove, last) = {
            let mut index = self.lock();
            let remove = index.purge(upto);
            self.core.log_bytes.store(index.bytes, Ordering::Relaxed);
            (remove, index.last)
        };
        let done = self
            .writer
            .call(|reply| WriteOp::Purge {
                remove,
                upto,
                last,
                reply,
            })
            .await;
        done.map_err(write_error)
    }
}
