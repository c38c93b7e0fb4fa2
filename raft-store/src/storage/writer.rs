//! The one thread that writes log and vote: rows, then sled's barrier, then the control file, and only
//! then the acknowledgement. Appends that arrived together share one barrier.

use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::fcntl::Flock;
use openraft::storage::LogFlushed;
use tokio::sync::oneshot;

use super::control::{Control, ControlFile};
use super::error::StoreFailure;
use super::frame::{LOG, PURGED, VOTE};
use super::rows::{Changes, RowStore};
use crate::seeded::bug;
use crate::{LogId, TypeConfig, Vote, codec};

pub(super) const LOG_TREE: &str = "log";
/// Writes that may wait. openraft sends few at a time; a full queue blocks it, which is right.
const QUEUE: usize = 256;

/// What an operation answers.
pub(super) type Reply = oneshot::Sender<Result<(), StoreFailure>>;

pub(super) enum WriteOp {
    /// Encoded entries by index; the last one's id.
    Append {
        entries: Vec<(u64, Vec<u8>)>,
        last: LogId,
        done: LogFlushed<TypeConfig>,
    },
    /// A vote.
    Vote { vote: Vote, reply: Reply },
    /// Entries to remove (index, length) and the last one that stays.
    Truncate {
        remove: Vec<(u64, usize)>,
        last: Option<LogId>,
        reply: Reply,
    },
    /// Entries to remove and the last of them.
    Purge {
        remove: Vec<(u64, usize)>,
        upto: LogId,
        last: Option<LogId>,
        reply: Reply,
    },
}

/// Called once, when the store fails. Must stop the process.
pub(super) type OnFatal = Box<dyn Fn(String) + Send + Sync>;

/// What all parts of an open store share.
pub(super) struct Core {
    pub(super) rows: Box<dyn RowStore>,
    control: Mutex<(ControlFile, Control)>,
    stopped: AtomicBool,
    on_fatal: OnFatal,
    /// Highest index known durable; entries up to it may leave the cache.
    pub(super) durable: AtomicU64,
    /// Bytes of the rows that there are, of log and state: what sled's file would be without what is old in it.
    pub(super) log_bytes: AtomicU64,
    pub(super) state_bytes: AtomicU64,
    /// The directory's lock, held as long as any part of the store lives. A simulated disk has none.
    _lock: Option<Flock<File>>,
}

impl Core {
    pub(super) fn new(
        rows: Box<dyn RowStore>,
        file: ControlFile,
        control: Control,
        on_fatal: OnFatal,
        lock: Option<Flock<File>>,
    ) -> Self {
        let durable = AtomicU64::new(control.last_log.map_or(0, |id| id.index));
        Self {
            rows,
            control: Mutex::new((file, control)),
            stopped: AtomicBool::new(false),
            on_fatal,
            durable,
            log_bytes: AtomicU64::new(0),
            state_bytes: AtomicU64::new(0),
            _lock: lock,
        }
    }

    fn lock(&self) -> MutexGuard<'_, (ControlFile, Control)> {
        self.control
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// What the store has promised.
    pub(super) fn control(&self) -> Control {
        self.lock().1.clone()
    }

    /// Changes the promise; durable when this returns.
    pub(super) fn promise(&self, change: impl FnOnce(&mut Control)) -> Result<(), StoreFailure> {
        let mut guard = self.lock();
        let mut next = guard.1.clone();
        change(&mut next);
        if next == guard.1 {
            return Ok(());
        }
        guard.0.write(&next)?;
        guard.1 = next;
        Ok(())
    }

    /// Changes the promise in memory alone: what a vote is that was answered before it was on the disk.
    fn promise_unsynced(&self, change: impl FnOnce(&mut Control)) {
        change(&mut self.lock().1);
    }

    /// Changes who the node is, or whether it may run: in both slots of the file, because no row of sled
    /// says it again, and one flipped bit must not take it back.
    pub(super) fn settle(&self, change: impl FnOnce(&mut Control)) -> Result<(), StoreFailure> {
        let mut guard = self.lock();
        let mut next = guard.1.clone();
        change(&mut next);
        guard.0.write(&next)?;
        guard.0.write(&next)?;
        guard.1 = next;
        Ok(())
    }

    /// Passes a success on; a failure ends the store first.
    pub(super) fn fatal<T>(&self, result: Result<T, StoreFailure>) -> Result<T, StoreFailure> {
        if let Err(failure) = &result
            && !self.stopped.swap(true, Ordering::SeqCst)
        {
            (self.on_fatal)(failure.to_string());
        }
        result
    }

    pub(super) fn check_running(&self) -> Result<(), StoreFailure> {
        if self.stopped.load(Ordering::SeqCst) {
            Err(StoreFailure::Stopped)
        } else {
            Ok(())
        }
    }
}

/// The way to the writer thread. The thread ends when the last sender is gone.
#[derive(Clone)]
pub(super) enum Writer {
    Thread(SyncSender<WriteOp>),
    /// A task of the simulation, in whose time a thread has no part.
    #[cfg(feature = "simulation")]
    Task(tokio::sync::mpsc::UnboundedSender<WriteOp>),
}

impl Writer {
    pub(super) fn start(core: Arc<Core>) -> Result<Self, StoreFailure> {
        let (queue, ops) = sync_channel(QUEUE);
        std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || run(&core, &ops))
            .map_err(StoreFailure::io("start the writer thread"))?;
        Ok(Self::Thread(queue))
    }

    /// Writes in a task, each time after what the disk takes for it.
    #[cfg(feature = "simulation")]
    pub(super) fn start_task(core: Arc<Core>, disk: super::simulated::SimulatedDisk) -> Self {
        let (queue, mut ops) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut next: Option<WriteOp> = ops.recv().await;
            while let Some(op) = next.take() {
                tokio::time::sleep(disk.write_time()).await;
                next = carry_out(&core, op, || ops.try_recv().ok());
                if next.is_none() {
                    next = ops.recv().await;
                }
            }
        });
        Self::Task(queue)
    }

    #[cfg_attr(not(feature = "simulation"), allow(clippy::match_single_binding))]
    pub(super) fn send(&self, op: WriteOp) -> Result<(), StoreFailure> {
        match self {
            Self::Thread(queue) => queue.send(op).map_err(|_| StoreFailure::Stopped),
            #[cfg(feature = "simulation")]
            Self::Task(queue) => queue.send(op).map_err(|_| StoreFailure::Stopped),
        }
    }

    /// Sends an operation and waits for its end.
    pub(super) async fn call(&self, op: impl FnOnce(Reply) -> WriteOp) -> Result<(), StoreFailure> {
        let (reply, answer) = oneshot::channel();
        self.send(op(reply))?;
        answer.await.unwrap_or(Err(StoreFailure::Stopped))
    }
}

fn run(core: &Core, ops: &Receiver<WriteOp>) {
    let mut next = ops.recv().ok();
    while let Some(op) = next.take() {
        next = carry_out(core, op, || ops.try_recv().ok()).or_else(|| ops.recv().ok());
    }
}

/// Carries an operation out. Gives back one that it took from the queue meanwhile, whose turn is next.
fn carry_out(core: &Core, op: WriteOp, mut queued: impl FnMut() -> Option<WriteOp>) -> Option<WriteOp> {
    match op {
        WriteOp::Append { entries, last, done } => {
            let (mut entries, mut last, mut waiting) = (entries, last, vec![done]);
            let mut other = None;
            // Appends that queued up behind the last barrier go to disk together.
            while waiting.len() < QUEUE {
                match queued() {
                    Some(WriteOp::Append {
                        entries: more,
                        last: later,
                        done,
                    }) => {
                        entries.extend(more);
                        last = later;
                        waiting.push(done);
                    }
                    Some(next) => {
                        other = Some(next);
                        break;
                    }
                    None => break,
                }
            }
            let result = core.fatal(core.check_running().and_then(|()| append(core, &entries, last)));
            let error = result.err().map(|e| e.to_string());
            for done in waiting {
                done.log_io_completed(error.clone().map_or(Ok(()), |e| Err(std::io::Error::other(e))));
            }
            return other;
        }
        WriteOp::Vote { vote, reply } => answer(core, reply, || save_vote(core, vote)),
        WriteOp::Truncate { remove, last, reply } => {
            answer(core, reply, || truncate(core, &remove, last));
        }
        WriteOp::Purge {
            remove,
            upto,
            last,
            reply,
        } => answer(core, reply, || purge(core, &remove, upto, last)),
    }
    None
}

fn answer(core: &Core, reply: Reply, work: impl FnOnce() -> Result<(), StoreFailure>) {
    let result = core.fatal(core.check_running().and_then(|()| work()));
    // openraft may have given up waiting; the write stands all the same.
    let _ = reply.send(result);
}

pub(super) fn log_key(index: u64) -> Vec<u8> {
    [&[LOG.kind], index.to_be_bytes().as_slice()].concat()
}

fn append(core: &Core, entries: &[(u64, Vec<u8>)], last: LogId) -> Result<(), StoreFailure> {
    fail::fail_point!("store::before_append");
    let mut changes = Changes::default();
    for (index, bytes) in entries {
        changes.put(LOG, &log_key(*index), bytes, None)?;
    }
    core.rows.write(LOG_TREE, changes)?;
    core.rows.barrier()?;
    core.promise(|control| control.last_log = Some(last))?;
    core.durable.store(last.index, Ordering::Release);
    fail::fail_point!("store::after_append");
    Ok(())
}

fn save_vote(core: &Core, vote: Vote) -> Result<(), StoreFailure> {
    fail::fail_point!("store::before_vote");
    let mut changes = Changes::default();
    changes.put(VOTE, &[VOTE.kind], &codec::encode(&vote)?, None)?;
    core.rows.write(LOG_TREE, changes)?;
    if bug("bug::skip_vote_flush") {
        core.promise_unsynced(|control| control.vote = Some(vote));
        return Ok(());
    }
    core.rows.barrier()?;
    core.promise(|control| control.vote = Some(vote))?;
    fail::fail_point!("store::after_vote");
    Ok(())
}

/// The promise shrinks *before* the rows go: a crash between the two leaves a log longer than promised,
/// which is no loss. Everything else grows the promise after the rows.
pub(super) fn truncate(
    core: &Core,
    remove: &[(u64, usize)],
    last: Option<LogId>,
) -> Result<(), StoreFailure> {
    core.promise(|control| control.last_log = last)?;
    core.durable
        .store(last.map_or(0, |id| id.index), Ordering::Release);
    let mut changes = Changes::default();
    for (index, len) in remove {
        changes.remove(&log_key(*index), *len);
    }
    core.rows.write(LOG_TREE, changes)?;
    core.rows.barrier()
}

pub(super) fn purge(
    core: &Core,
    remove: &[(u64, usize)],
    upto: LogId,
    last: Option<LogId>,
) -> Result<(), StoreFailure> {
    fail::fail_point!("store::before_purge");
    let mut changes = Changes::default();
    changes.put(PURGED, &[PURGED.kind], &codec::encode(&upto)?, None)?;
    for (index, len) in remove {
        changes.remove(&log_key(*index), *len);
    }
    core.rows.write(LOG_TREE, changes)?;
    core.rows.barrier()?;
    fail::fail_point!("store::between_purge_and_promise");
    core.promise(|control| {
        control.last_purged = Some(upto);
        control.last_log = last.max(Some(upto));
    })?;
    core.durable.fetch_max(upto.index, Ordering::AcqRel);
    fail::fail_point!("store::after_purge");
    Ok(())
}
