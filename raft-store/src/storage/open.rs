//! Opening a store: everything promised in `control` must be there, or the store is refused.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::fcntl::{Flock, FlockArg};

use super::compact::{self, Compacted};
use super::control::{Control, ControlFile, sync_parent};
use super::error::{OpenError, StoreFailure};
use super::handle::{self, ControlHandle};
use super::log::LogStore;
use super::machine::StateMachine;
use super::recover::{self, FoundLog};
use super::rows::{BarrierHook, RowStore, SledRows, panic_message};
#[cfg(feature = "simulation")]
use super::simulated::SimulatedDisk;
use super::sled_watch;
use super::swap;
use super::writer::{Core, OnFatal, Writer};
use crate::Vote;
use crate::command::RecoverQuorum;
use crate::names::Incarnation;
use crate::seeded::bug;

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
    /// A recovery of the quorum on this very node that its state does not have yet: this start is the first one since.
    pub recovering: Option<RecoverQuorum>,
}

/// Opens stores.
pub struct Store;

impl Store {
    /// Opens or makes the store in `options.dir`. Blocks on the disk. From then on errors of sled end the process
    /// (see `install_log_hook`).
    pub fn open(options: StoreOptions) -> Result<Opened, OpenError> {
        let opened = watched(&options.dir.clone(), || open(options))?;
        sled_watch::arm();
        Ok(opened)
    }

    /// Opens or makes the store on a disk that is not there; snapshots are files in `options.dir` all the same. Inside
    /// a runtime, whose time is the disk's.
    ///
    /// # Errors
    /// As [`Store::open`].
    #[cfg(feature = "simulation")]
    pub fn open_simulated(options: StoreOptions, disk: &SimulatedDisk) -> Result<Opened, OpenError> {
        let dir = options.dir.clone();
        let fail = |failure| OpenError::of(&dir, failure);
        make_dir(&dir.join("snapshots")).map_err(fail)?;
        let rows = disk.rows();
        let fresh = || Control::fresh(options.node_name.clone(), options.incarnation);
        let (file, control) = ControlFile::simulated(rows.clone(), fresh).map_err(fail)?;
        if let Some(poison) = &control.poison {
            let reason = poison.to_string();
            return Err(OpenError::Poisoned { dir, reason });
        }
        let promised = control.vote.is_some() || control.last_log.is_some();
        let under = Underneath {
            rows: Box::new(rows),
            file,
            control,
            lock: None,
        };
        let disk = disk.clone();
        build(options, under, promised, |core| {
            Ok(Writer::start_task(core, disk))
        })
    }

    /// Opens the store in `options.dir` for maintenance: as [`Self::open`], but makes none where there is none.
    pub fn open_existing(options: StoreOptions) -> Result<Opened, OpenError> {
        require_used(&options.dir)?;
        Self::open(options)
    }

    /// Writes everything that the store in `options.dir` holds into a new sled, and puts that in the old one's place.
    /// Blocks on the disk. Whenever it is killed, the next open finds the same contents. `rewrite` false: only proves the
    /// store whole and says what it takes.
    pub fn compact(options: StoreOptions, rewrite: bool) -> Result<Compacted, OpenError> {
        require_used(&options.dir)?;
        watched(&options.dir.clone(), || compact::compact(options, rewrite))
    }
}

/// Nothing is made where no node has run.
fn require_used(dir: &Path) -> Result<(), OpenError> {
    match Control::peek(dir) {
        Ok(Some(_)) => Ok(()),
        Ok(None) => Err(OpenError::Unused(dir.to_path_buf())),
        Err(failure) => Err(OpenError::of(dir, failure)),
    }
}

/// Runs what opens a sled, and adds what sled said to a refusal.
fn watched<T>(dir: &Path, work: impl FnOnce() -> Result<T, OpenError>) -> Result<T, OpenError> {
    // sled may also panic while it is read; neither must take the process down without a reason.
    let (done, mut said) = sled_watch::listen(|| catch_unwind(AssertUnwindSafe(work)));
    let done = done.unwrap_or_else(|panic| {
        let (dir, message) = (dir.to_path_buf(), panic_message(panic.as_ref()));
        Err(OpenError::SledPanic { dir, message })
    });
    done.map_err(|refused| {
        said.extend(sled_watch::take_early());
        let refused = refused.with_words_of_sled(&said);
        if handle::is_full(dir) {
            refused.without_room()
        } else {
            refused
        }
    })
}

fn open(mut options: StoreOptions) -> Result<Opened, OpenError> {
    let dir = options.dir.clone();
    let fail = |failure| OpenError::of(&dir, failure);
    let lost = |what: String| OpenError::lost(&dir, what);

    make_dir(&dir).map_err(fail)?;
    let lock = lock_dir(&dir)?;
    swap::finish(&dir).map_err(fail)?;
    make_dir(&dir.join("snapshots")).map_err(fail)?;

    let sled_dir = dir.join("sled");
    let (file, control) = open_control(&options, &sled_dir)?;
    let promised = control.vote.is_some() || control.last_log.is_some();
    if promised && !sled_dir.join("db").exists() {
        return Err(lost("`sled/db` is missing".into()));
    }
    make_dir(&sled_dir).map_err(fail)?;
    let rows = open_rows(&dir, &sled_dir, options.cache_bytes, options.on_barrier.take())?;
    let under = Underneath {
        rows: Box::new(rows),
        file,
        control,
        lock: Some(lock),
    };
    build(options, under, promised, Writer::start)
}

/// What a store is built on.
struct Underneath {
    rows: Box<dyn RowStore>,
    file: ControlFile,
    control: Control,
    lock: Option<Flock<File>>,
}

/// Builds a store on what was opened: everything that `control` promises must be there.
fn build(
    options: StoreOptions,
    under: Underneath,
    promised: bool,
    start: impl FnOnce(Arc<Core>) -> Result<Writer, StoreFailure>,
) -> Result<Opened, OpenError> {
    let dir = options.dir;
    let fail = |failure| OpenError::of(&dir, failure);
    let lost = |what: String| OpenError::lost(&dir, what);
    let snapshots = dir.join("snapshots");
    let Underneath {
        rows,
        file,
        control,
        lock,
    } = under;
    let mut found = recover::read_log(&*rows).map_err(fail)?;
    if !bug("bug::ignore_control_file") {
        recover::check_promise(&control, &found).map_err(lost)?;
    }
    let core = Core::new(rows, file, control, options.on_fatal, lock);
    promise_found(&core, &found).map_err(fail)?;

    let mut now = recover::read_state(&*core.rows, promised).map_err(fail)?;
    let (before, purged) = (now.row.applied, found.index.purged);
    let current = recover::install_newer(&core, &snapshots, &mut now, purged).map_err(fail)?;
    let applied = now.row.applied;
    if applied < purged {
        return Err(lost(format!(
            "the log begins after index {}, the state ends at {}",
            purged.map_or(0, |id| id.index),
            applied.map_or(0, |id| id.index)
        )));
    }
    // A recovery of the quorum is done once it is in the log; `control` may have been killed before it heard of it.
    let recovering = recover::own_recovery(&core.control(), &found, applied).cloned();
    if let Some(op) = recovering.as_ref().filter(|op| op.epoch > core.control().epoch) {
        core.settle(|control| control.epoch = op.epoch).map_err(fail)?;
    }
    recover::fit_log(&core, &mut found, applied, applied > before).map_err(fail)?;
    let last = found.index.last.map_or(0, |id| id.index);
    core.durable.store(last, Ordering::Release);
    core.log_bytes.store(found.index.bytes, Ordering::Relaxed);
    core.state_bytes.store(now.bytes, Ordering::Relaxed);
    let core = Arc::new(core);
    let writer = start(Arc::clone(&core)).map_err(fail)?;
    Ok(Opened {
        log: LogStore::new(Arc::clone(&core), writer, found.index),
        machine: StateMachine::new(Arc::clone(&core), snapshots, now, current),
        control: ControlHandle::new(core, dir),
        recovering,
    })
}

/// sled in `sled_dir` of the data directory `dir`.
pub(super) fn open_rows(
    dir: &Path,
    sled_dir: &Path,
    cache_bytes: u64,
    on_barrier: Option<BarrierHook>,
) -> Result<SledRows, OpenError> {
    let opened =
        SledRows::open(sled_dir, cache_bytes, on_barrier).map_err(|failure| OpenError::of(dir, failure))?;
    opened.map_err(|message| OpenError::SledPanic {
        dir: dir.to_path_buf(),
        message,
    })
}

/// The control file of this node, made if the directory is new.
pub(super) fn open_control(
    options: &StoreOptions,
    sled_dir: &Path,
) -> Result<(ControlFile, Control), OpenError> {
    let dir = &options.dir;
    let path = dir.join("control");
    let fail = |failure| OpenError::of(dir, failure);
    let (file, control) = match ControlFile::open(&path).map_err(fail)? {
        Some(found) => found,
        None if sled_dir.join("db").exists() => {
            return Err(OpenError::lost(dir, "`control` is missing beside `sled/db`"));
        }
        None => {
            let control = Control::fresh(options.node_name.clone(), options.incarnation);
            (ControlFile::create(&path, &control).map_err(fail)?, control)
        }
    };
    if control.node_name != options.node_name {
        return Err(OpenError::OtherNode {
            dir: dir.clone(),
            found: control.node_name,
            expected: options.node_name.clone(),
        });
    }
    if let Some(poison) = &control.poison {
        return Err(OpenError::Poisoned {
            dir: dir.clone(),
            reason: poison.to_string(),
        });
    }
    Ok((file, control))
}

/// sled may be ahead of `control`: a crash came between the two. Promises what is there.
fn promise_found(core: &Core, found: &FoundLog) -> Result<(), StoreFailure> {
    let (vote, last, purged) = (found.vote, found.index.last, found.index.purged);
    core.promise(|control| {
        control.vote = control.vote.max_by_vote(vote);
        control.last_log = last.max(purged);
        control.last_purged = purged;
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

/// Makes a directory and those above it, closed to others; each is durable in the one above when this returns.
pub(super) fn make_dir(dir: &Path) -> Result<(), StoreFailure> {
    if dir.is_dir() {
        return Ok(());
    }
    if let Some(above) = dir.parent().filter(|above| !above.as_os_str().is_empty()) {
        make_dir(above)?;
    }
    match DirBuilder::new().mode(0o700).create(dir) {
        // Another process was faster; which of the two goes on is the lock's question.
        Err(_) if dir.is_dir() => {}
        made => made.map_err(StoreFailure::io(format!("create {}", dir.display())))?,
    }
    sync_parent(dir)
}

pub(super) fn lock_dir(dir: &Path) -> Result<Flock<File>, OpenError> {
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_new_directory_is_closed_to_others_at_every_level() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("a/b");
        make_dir(&dir).unwrap();
        make_dir(&dir).unwrap();
        for made in [dir.parent().unwrap(), dir.as_path()] {
            let mode = made.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o700, "{}", made.display());
        }
        std::fs::write(top.path().join("file"), b"").unwrap();
        let why = make_dir(&top.path().join("file")).unwrap_err().to_string();
        assert!(why.contains("create") && why.contains("file"), "{why}");
    }
}
