//! The rows underneath: a small trait, so that sled can be replaced, and its sled implementation.

use std::collections::BTreeMap;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use super::control::sync_parent;
use super::error::StoreFailure;
use super::frame::{self, Form, UnpackedRow, Unpacker};
use crate::seeded::bug;

/// Pairs that a copy writes at a time.
const COPIED_AT_ONCE: usize = 256;

/// A set of changes to one tree, applied together or not at all.
#[derive(Default)]
pub(super) struct Changes {
    /// Physical keys with what they hold from now on; `None`: nothing. Of two for one key the later counts.
    pub(super) pairs: Vec<(Vec<u8>, Option<Vec<u8>>)>,
}

impl Changes {
    /// Writes a row. `old_len` is the length of the row it replaces, so that no chunk of it remains.
    pub(super) fn put(
        &mut self,
        form: Form,
        key: &[u8],
        value: &[u8],
        old_len: Option<usize>,
    ) -> Result<(), StoreFailure> {
        let pairs = frame::pack(form, key, value)?;
        let kept = pairs.len() as u16;
        for (key, frame) in pairs {
            self.pairs.push((key, Some(frame)));
        }
        for number in kept..old_len.map_or(0, frame::chunks_of) {
            self.pairs.push((frame::chunk_key(key, number), None));
        }
        Ok(())
    }

    /// Removes a row of the given length.
    pub(super) fn remove(&mut self, key: &[u8], old_len: usize) {
        for number in 0..frame::chunks_of(old_len) {
            self.pairs.push((frame::chunk_key(key, number), None));
        }
    }
}

/// What storage needs of the rows underneath.
pub(super) trait RowStore: Send + Sync + 'static {
    /// Applies changes to a tree; visible at once, durable after [`Self::barrier`].
    fn write(&self, tree: &str, changes: Changes) -> Result<(), StoreFailure>;
    /// Visits the rows of a tree whose keys begin at `from`, in order, until `visit` says stop.
    fn scan(
        &self,
        tree: &str,
        from: &[u8],
        visit: &mut dyn FnMut(UnpackedRow) -> Result<bool, StoreFailure>,
    ) -> Result<(), StoreFailure>;
    /// One row.
    fn get(&self, tree: &str, key: &[u8]) -> Result<Option<UnpackedRow>, StoreFailure>;
    /// Removes a whole tree.
    fn drop_tree(&self, tree: &str) -> Result<(), StoreFailure>;
    /// Names of all trees.
    fn trees(&self) -> Vec<String>;
    /// Returns once everything written before is on disk.
    fn barrier(&self) -> Result<(), StoreFailure>;
    /// Barriers passed.
    fn barriers(&self) -> u64;
    /// Bytes on disk.
    fn size_on_disk(&self) -> Result<u64, StoreFailure>;
}

/// How often sled's own thread looks for what it can clean, in milliseconds. It takes up one segment (512 KiB) each time,
/// whatever else waits (`SegmentCleaner::pop` in sled 0.34.7 ends the round with the first one that it has emptied), and
/// every segment keeps a page or two that nobody writes again, such as those of tombstones. So this is a limit of how much
/// may be written in the long run before the file grows without end: 5 MiB a second. A rotation with a destruction takes
/// about 40 KiB. What it costs while nothing is written is an fsync of a clean file.
const CLEAN_EVERY_MS: u64 = 100;

/// Called before each barrier; what it returns is called after it. Lets the node measure: this crate
/// knows no clock.
pub type BarrierHook = Box<dyn Fn() -> Box<dyn FnOnce() + Send> + Send + Sync>;

/// Rows in sled.
pub(super) struct SledRows {
    db: sled::Db,
    /// Own descriptor of sled's file: sled's flush ends in `sync_file_range`, which does not reach the disk.
    file: File,
    blobs: Blobs,
    barriers: AtomicU64,
    on_barrier: Option<BarrierHook>,
}

impl SledRows {
    /// Opens sled below `dir`. sled panics on damage it does not expect; that is caught.
    pub(super) fn open(
        dir: &Path,
        cache_bytes: u64,
        on_barrier: Option<BarrierHook>,
    ) -> Result<Result<Self, String>, StoreFailure> {
        remove_interrupted_snapshot(dir)?;
        // Before sled opens: it removes blob files that are ahead of its log, and with them what happened.
        refuse_blobs(dir)?;
        let opened = catch_unwind(AssertUnwindSafe(|| {
            sled::Config::new()
                .path(dir)
                .cache_capacity(cache_bytes)
                .mode(sled::Mode::LowSpace)
                .flush_every_ms(Some(CLEAN_EVERY_MS))
                .open()
        }));
        let db = match opened {
            Err(panic) => return Ok(Err(panic_message(panic.as_ref()))),
            Ok(result) => result.map_err(StoreFailure::sled("open"))?,
        };
        let path = dir.join("db");
        let file = File::options()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(StoreFailure::io(format!("open {}", path.display())))?;
        sync_parent(&path)?;
        sync_parent(dir)?;
        Ok(Ok(Self {
            db,
            file,
            blobs: Blobs::open(dir)?,
            barriers: AtomicU64::new(0),
            on_barrier,
        }))
    }

    /// Writes everything that there is into an empty store, byte by byte; durable after its barrier. Gives back how many
    /// pairs there are.
    pub(super) fn copy_to(&self, other: &Self) -> Result<u64, StoreFailure> {
        let mut pairs = 0;
        for name in self.trees() {
            let from = self.tree(&name)?;
            // sled has one of its own, which nothing is written to.
            if from.is_empty() {
                continue;
            }
            let to = other.tree(&name)?;
            let (mut batch, mut held) = (sled::Batch::default(), 0);
            for pair in from.iter() {
                let (key, value) = pair.map_err(StoreFailure::sled("read"))?;
                batch.insert(key, value);
                (held, pairs) = (held + 1, pairs + 1);
                if held == COPIED_AT_ONCE {
                    let full = std::mem::take(&mut batch);
                    to.apply_batch(full).map_err(StoreFailure::sled("write"))?;
                    held = 0;
                    fail::fail_point!("compact::in_copy");
                }
            }
            to.apply_batch(batch).map_err(StoreFailure::sled("write"))?;
        }
        Ok(pairs)
    }

    /// Whether both have the same trees with the same pairs in them, byte by byte.
    pub(super) fn is_same_as(&self, other: &Self) -> Result<bool, StoreFailure> {
        let filled = |rows: &Self| {
            let mut names = BTreeMap::new();
            for name in rows.trees() {
                let tree = rows.tree(&name)?;
                if !tree.is_empty() {
                    names.insert(name, tree);
                }
            }
            Ok::<_, StoreFailure>(names)
        };
        let (ours, theirs) = (filled(self)?, filled(other)?);
        if !ours.keys().eq(theirs.keys()) {
            return Ok(false);
        }
        for (ours, theirs) in ours.values().zip(theirs.values()) {
            let (mut ours, mut theirs) = (ours.iter(), theirs.iter());
            loop {
                let read = StoreFailure::sled("read");
                match (ours.next().transpose(), theirs.next().transpose()) {
                    (Err(error), _) | (_, Err(error)) => return Err(read(error)),
                    (Ok(None), Ok(None)) => break,
                    (Ok(ours), Ok(theirs)) if ours == theirs => {}
                    _ => return Ok(false),
                }
            }
        }
        Ok(true)
    }

    fn tree(&self, name: &str) -> Result<sled::Tree, StoreFailure> {
        self.db.open_tree(name).map_err(StoreFailure::sled("open a tree"))
    }
}

impl RowStore for SledRows {
    fn write(&self, tree: &str, changes: Changes) -> Result<(), StoreFailure> {
        let mut batch = sled::Batch::default();
        for (key, value) in changes.pairs {
            match value {
                Some(value) => batch.insert(key, value),
                None => batch.remove(key),
            }
        }
        self.tree(tree)?
            .apply_batch(batch)
            .map_err(StoreFailure::sled("write"))
    }

    fn scan(
        &self,
        tree: &str,
        from: &[u8],
        visit: &mut dyn FnMut(UnpackedRow) -> Result<bool, StoreFailure>,
    ) -> Result<(), StoreFailure> {
        let mut unpacker = Unpacker::default();
        for pair in self.tree(tree)?.range(from..) {
            let (key, value) = pair.map_err(StoreFailure::sled("read"))?;
            if let Some(row) = unpacker.push(&key, &value)?
                && !visit(row)?
            {
                return Ok(());
            }
        }
        unpacker.finish()
    }

    fn get(&self, tree: &str, key: &[u8]) -> Result<Option<UnpackedRow>, StoreFailure> {
        let mut found = None;
        self.scan(tree, key, &mut |row| {
            if row.key == key {
                found = Some(row);
            }
            Ok(false)
        })?;
        Ok(found)
    }

    fn drop_tree(&self, tree: &str) -> Result<(), StoreFailure> {
        self.db
            .drop_tree(tree)
            .map(|_| ())
            .map_err(StoreFailure::sled("drop a tree"))
    }

    fn trees(&self) -> Vec<String> {
        self.db
            .tree_names()
            .iter()
            .map(|name| String::from_utf8_lossy(name).into_owned())
            .collect()
    }

    fn barrier(&self) -> Result<(), StoreFailure> {
        let done = self.on_barrier.as_ref().map(|hook| hook());
        self.db.flush().map_err(StoreFailure::sled("flush"))?;
        self.blobs.check()?;
        if !bug("bug::skip_sync_data") {
            self.file.sync_data().map_err(StoreFailure::io("sync sled/db"))?;
        }
        self.barriers.fetch_add(1, Ordering::Relaxed);
        if let Some(done) = done {
            done();
        }
        Ok(())
    }

    fn barriers(&self) -> u64 {
        self.barriers.load(Ordering::Relaxed)
    }

    fn size_on_disk(&self) -> Result<u64, StoreFailure> {
        self.db.size_on_disk().map_err(StoreFailure::sled("size"))
    }
}

pub(super) fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_string()))
        .unwrap_or_else(|| "panic".into())
}

/// Names of the entries of `dir`, empty when it does not exist.
fn names(dir: &Path) -> Result<Vec<PathBuf>, StoreFailure> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(StoreFailure::io(format!("read {}", dir.display()))(error)),
    };
    entries
        .map(|entry| {
            Ok(entry
                .map_err(StoreFailure::io(format!("read {}", dir.display())))?
                .path())
        })
        .collect()
}

/// A crash while sled writes its start-up snapshot leaves `snap.*.generating`, which sled would take for its newest
/// and trip over. Nothing is lost with it, whether or not a complete one lies beside: a snapshot is an index of the
/// log that sled makes anew. The one before goes only after the new one has its final name, and without any sled
/// reads its log from the beginning (`read_snapshot_or_default`, `write_snapshot` in sled 0.34.7). Should it then
/// hold less than it did, `control`, the log's sequence or the state's digest say so.
fn remove_interrupted_snapshot(dir: &Path) -> Result<(), StoreFailure> {
    for path in names(dir)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("snap.") && name.ends_with(".generating") {
            std::fs::remove_file(&path).map_err(StoreFailure::io(format!("remove {}", path.display())))?;
        }
    }
    Ok(())
}

/// Blob files are not synced with the log: a store that has one may have lost it.
fn refuse_blobs(dir: &Path) -> Result<(), StoreFailure> {
    match names(&dir.join("blobs"))?.first() {
        None => Ok(()),
        Some(blob) => Err(StoreFailure::Damaged(format!(
            "sled spilled a value into {}",
            blob.display()
        ))),
    }
}

/// Watches the directory of blob files. Its time of change costs one `fstat`, which every barrier can afford; it is
/// read again only when that is another than at the start.
struct Blobs {
    dir: PathBuf,
    open: File,
    since: SystemTime,
}

impl Blobs {
    /// Begins to watch; refuses what is there.
    fn open(sled_dir: &Path) -> Result<Self, StoreFailure> {
        let path = sled_dir.join("blobs");
        let what = || format!("look at {}", path.display());
        let open = File::open(&path).map_err(StoreFailure::io(what()))?;
        let since = changed(&open).map_err(StoreFailure::io(what()))?;
        refuse_blobs(sled_dir)?;
        let dir = sled_dir.to_path_buf();
        Ok(Self { dir, open, since })
    }

    fn check(&self) -> Result<(), StoreFailure> {
        let now = changed(&self.open).map_err(StoreFailure::io("look at sled/blobs"))?;
        if now == self.since {
            return Ok(());
        }
        refuse_blobs(&self.dir)
    }
}

fn changed(dir: &File) -> std::io::Result<SystemTime> {
    dir.metadata()?.modified()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::frame::LOG;
    use super::*;

    // Tests wait with a deadline; the ban on clocks is for what the crate itself does.
    #[allow(clippy::disallowed_methods)]
    fn open(dir: &Path) -> Result<SledRows, StoreFailure> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match SledRows::open(dir, 1 << 20, None) {
                // sled gives its lock back a moment after it is dropped.
                Err(StoreFailure::Sled { source, .. })
                    if source.to_string().contains("lock") && Instant::now() < deadline =>
                {
                    std::thread::yield_now();
                }
                opened => return opened.map(|rows| rows.unwrap_or_else(|why| panic!("{why}"))),
            }
        }
    }

    fn write(rows: &SledRows, number: u8) {
        let mut changes = Changes::default();
        changes.put(LOG, &[number], &[7; 100], None).unwrap();
        rows.write("log", changes).unwrap();
        rows.barrier().unwrap();
    }

    fn count(rows: &SledRows) -> usize {
        let mut count = 0;
        rows.scan("log", &[], &mut |_| {
            count += 1;
            Ok(true)
        })
        .unwrap();
        count
    }

    /// sled makes its first snapshot when it is opened for the second time: until then there is none.
    #[test]
    fn an_interrupted_snapshot_of_sled_is_in_nobodys_way_the_first_one_neither() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = || {
            let names = names(dir.path()).unwrap().into_iter();
            names
                .filter(|path| path.to_string_lossy().contains("/snap."))
                .count()
        };
        for round in 0..3 {
            let rows = open(dir.path()).unwrap();
            assert_eq!(count(&rows), usize::from(round), "nothing is missing");
            write(&rows, round);
            drop(rows);
            assert_eq!(snapshots(), usize::from(round > 0));
            // Half of it, and of a later moment than any complete one.
            std::fs::write(dir.path().join("snap.7FFFFFFFFFFFFFFF.generating"), b"half").unwrap();
        }
    }

    #[test]
    fn a_file_among_sleds_blobs_refuses_the_start() {
        let dir = tempfile::tempdir().unwrap();
        write(&open(dir.path()).unwrap(), 1);
        // Ahead of the log, where sled would remove it; before its end; and none of sled's names.
        for name in ["9223372036854775807", "0", "stray"] {
            let blob = dir.path().join("blobs").join(name);
            std::fs::write(&blob, b"x").unwrap();
            let why = open(dir.path()).err().unwrap().to_string();
            assert!(why.contains("blobs") && why.contains(name), "{why}");
            std::fs::remove_file(&blob).unwrap();
        }
        assert_eq!(count(&open(dir.path()).unwrap()), 1);
    }

    #[test]
    fn a_blob_that_appears_while_the_store_runs_fails_the_next_barrier() {
        let dir = tempfile::tempdir().unwrap();
        let rows = open(dir.path()).unwrap();
        write(&rows, 1);
        let blob = dir.path().join("blobs/4096");
        // A change within the clock's step of the one before leaves the directory's time as it was.
        while changed(&rows.blobs.open).unwrap() == rows.blobs.since {
            std::fs::write(&blob, b"x").unwrap();
            std::fs::remove_file(&blob).unwrap();
        }
        rows.barrier().unwrap();
        std::fs::write(&blob, b"x").unwrap();
        let why = rows.barrier().unwrap_err().to_string();
        assert!(why.contains("blobs/4096"), "{why}");
    }
}
