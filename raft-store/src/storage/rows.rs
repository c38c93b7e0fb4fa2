//! The rows underneath: a small trait, so that sled can be replaced, and its sled implementation.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::control::sync_parent;
use super::error::StoreFailure;
use super::frame::{self, UnpackedRow, Unpacker};

/// A set of changes to one tree, applied together or not at all.
#[derive(Default)]
pub(super) struct Changes {
    batch: sled::Batch,
}

impl Changes {
    /// Writes a row. `old_len` is the length of the row it replaces, so that no chunk of it remains.
    pub(super) fn put(
        &mut self,
        kind: u8,
        key: &[u8],
        value: &[u8],
        old_len: Option<usize>,
    ) -> Result<(), StoreFailure> {
        let pairs = frame::pack(kind, key, value)?;
        let kept = pairs.len() as u16;
        for (key, frame) in pairs {
            self.batch.insert(key, frame);
        }
        for number in kept..old_len.map_or(0, frame::chunks_of) {
            self.batch.remove(frame::chunk_key(key, number));
        }
        Ok(())
    }

    /// Removes a row of the given length.
    pub(super) fn remove(&mut self, key: &[u8], old_len: usize) {
        for number in 0..frame::chunks_of(old_len) {
            self.batch.remove(frame::chunk_key(key, number));
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

/// Called before each barrier; what it returns is called after it. Lets the node measure: this crate
/// knows no clock.
pub type BarrierHook = Box<dyn Fn() -> Box<dyn FnOnce() + Send> + Send + Sync>;

/// Rows in sled.
pub(super) struct SledRows {
    db: sled::Db,
    /// Own descriptor of sled's file: sled's flush ends in `sync_file_range`, which does not reach the disk.
    file: File,
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
        let opened = catch_unwind(AssertUnwindSafe(|| {
            sled::Config::new()
                .path(dir)
                .cache_capacity(cache_bytes)
                .mode(sled::Mode::LowSpace)
                .flush_every_ms(Some(500))
                .open()
        }));
        let db = match opened {
            Err(panic) => return Ok(Err(panic_message(panic.as_ref()))),
            Ok(Err(error @ sled::Error::Corruption { .. })) => {
                return Err(StoreFailure::Damaged(format!("sled: {error}")));
            }
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
        refuse_blobs(dir)?;
        Ok(Ok(Self {
            db,
            file,
            barriers: AtomicU64::new(0),
            on_barrier,
        }))
    }

    fn tree(&self, name: &str) -> Result<sled::Tree, StoreFailure> {
        self.db.open_tree(name).map_err(StoreFailure::sled("open a tree"))
    }
}

impl RowStore for SledRows {
    fn write(&self, tree: &str, changes: Changes) -> Result<(), StoreFailure> {
        self.tree(tree)?
            .apply_batch(changes.batch)
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
            if row.1 == key {
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
        self.file.sync_data().map_err(StoreFailure::io("sync sled/db"))?;
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

/// A crash while sled writes its own start-up snapshot leaves a half one, which it would then trip over.
fn remove_interrupted_snapshot(dir: &Path) -> Result<(), StoreFailure> {
    let snapshots: Vec<PathBuf> = names(dir)?
        .into_iter()
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("snap."))
        })
        .collect();
    let (half, whole): (Vec<_>, Vec<_>) = snapshots
        .into_iter()
        .partition(|path| path.extension().is_some_and(|e| e == "generating"));
    if half.is_empty() {
        return Ok(());
    }
    if whole.is_empty() {
        return Err(StoreFailure::Damaged(format!(
            "{} without a complete one beside it",
            half[0].display()
        )));
    }
    for path in half {
        std::fs::remove_file(&path).map_err(StoreFailure::io(format!("remove {}", path.display())))?;
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
