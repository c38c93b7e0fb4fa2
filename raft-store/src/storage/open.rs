//! Opening a store: everything promised in `control` must be there, or the store is refused.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{Flock, FlockArg};

use super::StoreFigures;
use super::control::{Control, ControlFile, Poison};
use super::error::{OpenError, StoreFailure};
use super::frame::{KIND_LOG, KIND_POINTER, KIND_PURGED, KIND_VOTE};
use super::log::{LogIndex, LogStore};
use super::machine::{self, Loaded, META_TREE, StateMachine};
use super::rows::{BarrierHook, RowStore, SledRows, panic_message};
use super::snapshot;
use super::writer::{Core, LOG_TREE, OnFatal, Writer};
use crate::names::{ClusterId, Incarnation, RaftId};
use crate::state::table::RowKind;
use crate::{Entry, LogId, SnapshotMeta, Vote, codec};

/// How a store is opened.
pub struct StoreOptions {
    /// The data directory; made with mode 0700 if it does not exist.
    pub dir: PathBuf,
    /// The configured node name; must be the one in `control`.
    pub node_name: String,
    /// Random; used only if the directory is new.
    pub incarnation: Incarnation,
    /// sled's page cache, bytes.
    pub cache_bytes: u64,
    /// See [`BarrierHook`].
    pub on_barrier: Option<BarrierHook>,
    /// Called once when the store fails; must stop the process.
    pub on_fatal: OnFatal,
}

/// An open store.
pub struct Opened {
    /// Log and vote, for openraft.
    pub log: LogStore,
    /// The state machine, for openraft.
    pub machine: StateMachine,
    /// Identity and figures, for the node.
    pub control: ControlHandle,
}

/// Opens stores.
pub struct Store;

/// The node's hold on an open store beside openraft: identity, figures, the snapshot directory.
#[derive(Clone)]
pub struct ControlHandle {
    core: Arc<Core>,
    dir: PathBuf,
}

impl ControlHandle {
    /// What the store has promised.
    pub fn get(&self) -> Control {
        self.core.control()
    }

    /// Gives the node its identity in a cluster; durable when this returns. Blocks on the disk.
    pub fn join_cluster(
        &self,
        cluster_id: ClusterId,
        epoch: u64,
        raft_id: RaftId,
    ) -> Result<(), StoreFailure> {
        let promised = self.core.settle(|control| {
            control.cluster_id = cluster_id;
            control.epoch = epoch;
            control.raft_id = raft_id;
        });
        self.core.fatal(promised)
    }

    /// Marks the node so that it never runs again with this directory. Blocks on the disk.
    pub fn poison(&self, poison: Poison) -> Result<(), StoreFailure> {
        let promised = self.core.settle(|control| control.poison = Some(poison));
        self.core.fatal(promised)
    }

    /// Where snapshots lie; what is received is written there.
    pub fn snapshot_dir(&self) -> PathBuf {
        self.dir.join("snapshots")
    }

    /// Figures for metrics and for the reserve.
    pub fn figures(&self) -> StoreFigures {
        let (free, total) = nix::sys::statvfs::statvfs(&self.dir).map_or((u64::MAX, u64::MAX), |stat| {
            let unit = stat.fragment_size();
            (
                stat.blocks_available().saturating_mul(unit),
                stat.blocks().saturating_mul(unit),
            )
        });
        // 5 % of a large disk is far more than needed: the reserve is the smaller of the two, at least 256 MiB
        // on file systems that have that much.
        let reserve = (total / 20).min(256 << 20);
        StoreFigures {
            sled_bytes: self.core.rows.size_on_disk().unwrap_or(0),
            barriers: self.core.rows.barriers(),
            free_bytes: free,
            below_reserve: free < reserve,
        }
    }
}

impl Store {
    /// Opens or makes the store in `options.dir`. Blocks on the disk.
    pub fn open(options: StoreOptions) -> Result<Opened, OpenError> {
        let dir = options.dir.clone();
        // sled may also panic while it is read; neither must take the process down without a reason.
        let opened = catch_unwind(AssertUnwindSafe(|| open(options)));
        opened.unwrap_or_else(|panic| {
            Err(OpenError::SledPanic {
                dir,
                message: panic_message(panic.as_ref()),
            })
        })
    }
}

fn open(options: StoreOptions) -> Result<Opened, OpenError> {
    let dir = options.dir.clone();
    let fail = |failure| match failure {
        StoreFailure::Damaged(what) => OpenError::Lost {
            dir: dir.clone(),
            what,
        },
        // sled locks its file too, and gives the lock back a moment after it is dropped.
        StoreFailure::Sled {
            source: sled::Error::Io(source),
            ..
        } if source.to_string().contains("could not acquire lock") => OpenError::InUse(dir.clone()),
        failure => OpenError::Failure {
            dir: dir.clone(),
            failure,
        },
    };
    let lost = |what: String| OpenError::Lost {
        dir: dir.clone(),
        what,
    };

    make_dir(&dir).map_err(fail)?;
    let lock = lock_dir(&dir)?;
    let snapshots = dir.join("snapshots");
    make_dir(&snapshots).map_err(fail)?;

    let path = dir.join("control");
    let sled_dir = dir.join("sled");
    let (file, control) = match ControlFile::open(&path).map_err(fail)? {
        Some(found) => found,
        None if sled_dir.join("db").exists() => {
            return Err(lost("`control` is missing beside `sled/db`".into()));
        }
        None => {
            let control = Control::fresh(options.node_name.clone(), options.incarnation);
            (ControlFile::create(&path, &control).map_err(fail)?, control)
        }
    };
    if control.node_name != options.node_name {
        return Err(OpenError::OtherNode {
            dir,
            found: control.node_name,
            expected: options.node_name,
        });
    }
    if let Some(poison) = &control.poison {
        return Err(OpenError::Poisoned {
            dir,
            reason: poison.to_string(),
        });
    }
    let promised = control.vote.is_some() || control.last_log.is_some();
    if promised && !sled_dir.join("db").exists() {
        return Err(lost("`sled/db` is missing".into()));
    }
    let rows = SledRows::open(&sled_dir, options.cache_bytes, options.on_barrier)
        .map_err(fail)?
        .map_err(|message| OpenError::SledPanic {
            dir: dir.clone(),
            message,
        })?;

    let found = read_log(&rows).map_err(fail)?;
    check_promise(&control, &found).map_err(lost)?;
    let core = Core::new(Box::new(rows), file, control, options.on_fatal, lock);
    // sled may be ahead of `control`: a crash came between the two. Promise what is there.
    let (vote, last, purged) = (found.vote, found.index.last, found.index.purged);
    core.promise(|control| {
        control.vote = control.vote.max_by_vote(vote);
        control.last_log = last.max(purged);
        control.last_purged = purged;
    })
    .map_err(fail)?;

    let mut now = read_state(&core, promised).map_err(fail)?;
    let current = install_newer(&core, &snapshots, &mut now, purged).map_err(fail)?;
    if now.row.applied < purged {
        return Err(lost(format!(
            "the log begins after index {}, the state ends at {}",
            purged.map_or(0, |id| id.index),
            now.row.applied.map_or(0, |id| id.index)
        )));
    }
    let core = Arc::new(core);
    core.durable.store(
        last.map_or(0, |id| id.index),
        std::sync::atomic::Ordering::Release,
    );
    let writer = Writer::start(Arc::clone(&core)).map_err(fail)?;
    Ok(Opened {
        log: LogStore::new(Arc::clone(&core), writer, found.index),
        machine: StateMachine::new(Arc::clone(&core), snapshots, now, current),
        control: ControlHandle { core, dir },
    })
}

trait MaxVote {
    fn max_by_vote(self, other: Option<Vote>) -> Option<Vote>;
}

impl MaxVote for Option<Vote> {
    fn max_by_vote(self, other: Option<Vote>) -> Option<Vote> {
        if other.partial_cmp(&self) == Some(std::cmp::Ordering::Greater) {
            other
        } else {
            self
        }
    }
}

fn make_dir(dir: &Path) -> Result<(), StoreFailure> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(StoreFailure::io(format!("create {}", dir.display())))
}

fn lock_dir(dir: &Path) -> Result<Flock<File>, OpenError> {
    let path = dir.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|source| OpenError::Failure {
            dir: dir.into(),
            failure: StoreFailure::io(format!("open {}", path.display()))(source),
        })?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| OpenError::InUse(dir.into()))
}

struct FoundLog {
    index: LogIndex,
    vote: Option<Vote>,
    /// Ids of all entries, to compare with the promise.
    ids: Vec<LogId>,
}

/// Reads the whole log: entries must follow each other, in index and in leader.
fn read_log(rows: &SledRows) -> Result<FoundLog, StoreFailure> {
    let damaged = StoreFailure::Damaged;
    let (mut entries, mut vote, mut purged): (Vec<(Entry, usize)>, Option<Vote>, Option<LogId>) =
        (Vec::new(), None, None);
    let decoded = |e: codec::CodecError| damaged(e.to_string());
    rows.scan(LOG_TREE, &[], &mut |(kind, _, value)| {
        match kind {
            KIND_LOG => entries.push((codec::decode(&value).map_err(decoded)?, value.len())),
            KIND_VOTE => vote = Some(codec::decode(&value).map_err(decoded)?),
            KIND_PURGED => purged = Some(codec::decode(&value).map_err(decoded)?),
            other => return Err(damaged(format!("the log holds a row of unknown kind {other}"))),
        }
        Ok(true)
    })?;
    let mut index = LogIndex {
        purged,
        first: purged.map_or(0, |id| id.index + 1),
        ..LogIndex::default()
    };
    let mut ids = Vec::with_capacity(entries.len());
    let mut before = purged;
    for (entry, length) in entries {
        let id = entry.log_id;
        // Nothing purged yet: a log may begin above 0 only in tests of single parts.
        let follows = before.is_none_or(|before: LogId| id.index == before.index + 1 && id >= before);
        if !follows {
            return Err(damaged(format!("log entry {id} does not follow {before:?}")));
        }
        before = Some(id);
        ids.push(id);
        index.push(entry, length);
    }
    index.shrink(u64::MAX);
    Ok(FoundLog { index, vote, ids })
}

/// sled may hold more than was promised, never less.
fn check_promise(control: &Control, found: &FoundLog) -> Result<(), String> {
    if control.vote.is_some()
        && found
            .vote
            .partial_cmp(&control.vote)
            .is_none_or(std::cmp::Ordering::is_lt)
    {
        return Err(format!(
            "the vote {:?} was saved, sled has {:?}",
            control.vote, found.vote
        ));
    }
    if found.index.purged < control.last_purged {
        return Err(format!(
            "the log was purged up to {:?}, sled says {:?}",
            control.last_purged, found.index.purged
        ));
    }
    let Some(promised) = control.last_log else {
        return Ok(());
    };
    let there = found.index.purged >= Some(promised)
        || found
            .ids
            .binary_search_by_key(&promised.index, |id| id.index)
            .is_ok_and(|at| found.ids[at] >= promised);
    if there {
        return Ok(());
    }
    Err(format!(
        "log entry {promised} was acknowledged and is missing; the log ends at {:?}",
        found.index.last
    ))
}

/// Reads the state tree the pointer names and checks it against its digest.
fn read_state(core: &Core, promised: bool) -> Result<Loaded, StoreFailure> {
    let pointer = core.rows.get(META_TREE, &[KIND_POINTER])?;
    let tree = match pointer {
        Some((_, _, value)) => String::from_utf8_lossy(&value).into_owned(),
        None if promised => {
            return Err(StoreFailure::Damaged(
                "the pointer to the state is missing".into(),
            ));
        }
        None => {
            machine::point_to(core, "state-0")?;
            "state-0".to_string()
        }
    };
    for other in core.rows.trees() {
        // A tree beside the one pointed to is a half-installed or half-dropped snapshot.
        if other.starts_with("state-") && other != tree {
            core.rows.drop_tree(&other)?;
        }
    }
    let mut loaded = Loaded {
        tree: tree.clone(),
        ..Loaded::default()
    };
    let (mut digest, mut stored) = (0u128, 0u128);
    core.rows.scan(&tree, &[], &mut |(kind, key, value)| {
        let kind = RowKind::from_byte(kind)
            .ok_or_else(|| StoreFailure::Damaged(format!("a state row of unknown kind {kind}")))?;
        if kind == RowKind::Applied {
            loaded.row = codec::decode(&value).map_err(|e| StoreFailure::Damaged(e.to_string()))?;
            loaded.applied_len = Some(value.len());
            stored = loaded.row.digest;
            return Ok(true);
        }
        let hash = machine::row_hash(kind as u8, &key[1..], &value);
        digest = digest.wrapping_add(hash);
        loaded
            .state
            .load(kind, &key[1..], &value)
            .ok_or_else(|| StoreFailure::Damaged(format!("a {kind:?} row does not decode")))?;
        loaded.sizes.insert(key, (hash, value.len()));
        Ok(true)
    })?;
    if digest != stored {
        return Err(StoreFailure::Damaged(
            "the state's rows are not those that were written".into(),
        ));
    }
    loaded.state = std::mem::take(&mut loaded.state).loaded();
    Ok(loaded)
}

/// A complete snapshot above the applied state was received but not installed when the process ended.
fn install_newer(
    core: &Core,
    dir: &Path,
    now: &mut Loaded,
    purged: Option<LogId>,
) -> Result<Option<SnapshotMeta>, StoreFailure> {
    for path in snapshot::list(dir)? {
        match snapshot::read(&path) {
            Ok(contents) => {
                let meta = contents.meta.clone();
                if meta.last_log_id > now.row.applied {
                    *now = machine::install(core, &now.tree, contents)?;
                }
                snapshot::remove_older(dir, &path)?;
                return Ok(Some(meta));
            }
            // Not needed: everything it covers is in the state. openraft makes a new one.
            Err(StoreFailure::Damaged(_)) if now.row.applied >= purged => {
                std::fs::remove_file(&path)
                    .map_err(StoreFailure::io(format!("remove {}", path.display())))?;
            }
            Err(failure) => return Err(failure),
        }
    }
    Ok(None)
}
