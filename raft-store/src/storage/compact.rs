//! Writes a store's sled anew, so that it takes the room of what is in it: sled 0.34 does not give back what it has
//! written over. The store is proven whole first, the copy is compared with it byte by byte after it was closed and
//! opened again, and only then takes its place (`swap`). `control` is not touched: it goes on promising the same.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use super::control::{Control, sync_parent};
use super::error::{OpenError, StoreFailure};
use super::handle;
use super::open::{StoreOptions, lock_dir, open_control, open_rows};
use super::recover;
use super::rows::{RowStore, SledRows};
use super::swap;

/// What sled's files and its first segments take besides rows.
const MARGIN: u64 = 32 << 20;
/// Between two attempts to open a sled that was just closed, and how many there are: it gives its lock back a moment
/// after it is dropped.
const PAUSE: Duration = Duration::from_millis(20);
const ATTEMPTS: u32 = 500;

/// What a compaction has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compacted {
    /// Bytes of sled's files before.
    pub before: u64,
    /// Bytes of them now; the same if nothing was written.
    pub after: u64,
    /// Bytes of the rows that there are.
    pub live: u64,
}

pub(super) fn compact(options: StoreOptions, rewrite: bool) -> Result<Compacted, OpenError> {
    let dir = options.dir.clone();
    let fail = |failure| OpenError::of(&dir, failure);
    // Held to the end: no node starts in between.
    let _lock = lock_dir(&dir)?;
    swap::finish(&dir).map_err(fail)?;
    let sled_dir = dir.join("sled");
    let (_, control) = open_control(&options, &sled_dir)?;
    if promised(&control) && !sled_dir.join("db").exists() {
        return Err(OpenError::lost(&dir, "`sled/db` is missing"));
    }
    let rows = open_rows(&dir, &sled_dir, options.cache_bytes, options.on_barrier)?;
    let live = check(&dir, &rows, &control)?;
    let before = bytes_in(&sled_dir).map_err(fail)?;
    if !rewrite {
        let after = before;
        return Ok(Compacted { before, after, live });
    }
    require_room(&dir, live)?;
    let beside = swap::beside(&dir);
    let written = write(&dir, &rows, &control, options.cache_bytes);
    if let Err(refused) = written {
        // The next open would do it too.
        let _ = swap::remove(&beside);
        return Err(refused);
    }
    // Closed before its folder has another name: it makes files by their paths.
    drop(rows);
    swap::swap(&dir).map_err(fail)?;
    let after = bytes_in(&sled_dir).map_err(fail)?;
    Ok(Compacted { before, after, live })
}

fn promised(control: &Control) -> bool {
    control.vote.is_some() || control.last_log.is_some()
}

/// Everything that was promised is there, and the state's rows are those that were written. Gives back the bytes of all
/// rows.
fn check(dir: &Path, rows: &SledRows, control: &Control) -> Result<u64, OpenError> {
    let fail = |failure| OpenError::of(dir, failure);
    let found = recover::read_log(rows).map_err(fail)?;
    recover::check_promise(control, &found).map_err(|what| OpenError::lost(dir, what))?;
    let state = recover::read_state(rows, promised(control)).map_err(fail)?;
    Ok(found.index.bytes + state.bytes)
}

/// The copy needs room beside the original.
fn require_room(dir: &Path, live: u64) -> Result<(), OpenError> {
    let (free, needed) = (
        handle::room(dir).free,
        live.saturating_mul(2).saturating_add(MARGIN),
    );
    if free >= needed {
        return Ok(());
    }
    let what = format!("write sled anew beside itself: {needed} bytes are needed, {free} are free");
    let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
    Err(OpenError::of(dir, StoreFailure::io(what)(full)))
}

/// Writes the copy; whole, durable and closed when this returns.
fn write(dir: &Path, rows: &SledRows, control: &Control, cache_bytes: u64) -> Result<(), OpenError> {
    let fail = |failure| OpenError::of(dir, failure);
    let beside = swap::beside(dir);
    super::open::make_dir(&beside).map_err(fail)?;
    fail::fail_point!("compact::before_copy");
    let copy = open_rows(dir, &beside, cache_bytes, None)?;
    rows.copy_to(&copy).map_err(fail)?;
    copy.barrier().map_err(fail)?;
    drop(copy);
    fail::fail_point!("compact::before_verify");
    // From its files: what is in memory proves nothing.
    let copy = open_again(dir, &beside, cache_bytes)?;
    if !rows.is_same_as(&copy).map_err(fail)? {
        let differs = StoreFailure::Io {
            what: "write sled anew".to_owned(),
            source: std::io::Error::other("the copy is not what was copied; nothing was changed"),
        };
        return Err(fail(differs));
    }
    check(dir, &copy, control)?;
    drop(copy);
    // Opening wrote more files. Each is durable before any has its final place.
    sync_all_in(&beside).map_err(fail)
}

/// Opens a sled that this process has just closed.
fn open_again(dir: &Path, sled_dir: &Path, cache_bytes: u64) -> Result<SledRows, OpenError> {
    for _ in 1..ATTEMPTS {
        match open_rows(dir, sled_dir, cache_bytes, None) {
            Err(OpenError::InUse(_)) => std::thread::sleep(PAUSE),
            opened => return opened,
        }
    }
    open_rows(dir, sled_dir, cache_bytes, None)
}

/// Bytes of all files below a folder.
fn bytes_in(folder: &Path) -> Result<u64, StoreFailure> {
    let mut bytes = 0;
    visit(folder, &mut |path| {
        let metadata = path.metadata();
        bytes += metadata
            .map_err(StoreFailure::io(format!("look at {}", path.display())))?
            .len();
        Ok(())
    })?;
    Ok(bytes)
}

fn sync_all_in(folder: &Path) -> Result<(), StoreFailure> {
    visit(folder, &mut |path| {
        let sync = || File::open(path)?.sync_all();
        sync().map_err(StoreFailure::io(format!("sync {}", path.display())))?;
        sync_parent(path)
    })?;
    // One without files, such as `blobs`, is an entry of this one.
    let sync = || File::open(folder)?.sync_all();
    sync().map_err(StoreFailure::io(format!("sync {}", folder.display())))?;
    sync_parent(folder)
}

/// Visits all files below a folder.
fn visit(folder: &Path, each: &mut dyn FnMut(&Path) -> Result<(), StoreFailure>) -> Result<(), StoreFailure> {
    let what = || format!("read {}", folder.display());
    for entry in std::fs::read_dir(folder).map_err(StoreFailure::io(what()))? {
        let path = entry.map_err(StoreFailure::io(what()))?.path();
        if path.is_dir() {
            visit(&path, each)?;
        } else {
            each(&path)?;
        }
    }
    Ok(())
}
