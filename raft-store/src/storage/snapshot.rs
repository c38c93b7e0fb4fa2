//! Snapshots as plain files: written beside, synced, renamed, and their directory synced, before
//! anyone is told. A reader accepts a file whole or not at all.
//!
//! ```text
//! magic "HSMSNAP1"
//! block: SnapshotMeta, encoded
//! block per row: (kind, version, key, value), encoded
//! u32 0xFFFFFFFF, then u64 number of rows, u128 digest of the rows, both big endian
//! u32 crc32c of everything before, big endian
//! block = u32 length big endian, contents
//! ```

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::control::sync_parent;
use super::error::StoreFailure;
use super::frame::Form;
use super::machine::row_hash;
use crate::state::table::{RowChange, RowKind};
use crate::{LogId, SnapshotFile, SnapshotMeta, codec};

const MAGIC: [u8; 8] = *b"HSMSNAP1";
const END: u32 = u32::MAX;
/// A snapshot larger than this is refused: nothing this service stores comes near.
pub(super) const MAX_SNAPSHOT_BYTES: u64 = 1 << 30;
const MAX_BLOCK: u32 = 4 * 1024 * 1024;

/// A snapshot as read.
pub(super) struct Contents {
    pub(super) meta: SnapshotMeta,
    pub(super) rows: Vec<RowChange>,
    pub(super) digest: u128,
}

impl Contents {
    /// Refuses a snapshot that is not the announced one.
    pub(super) fn check_meta(&self, announced: &SnapshotMeta) -> Result<(), StoreFailure> {
        if self.meta == *announced {
            return Ok(());
        }
        Err(StoreFailure::Damaged(format!(
            "the snapshot is {}, announced was {announced}",
            self.meta
        )))
    }
}

/// Where the snapshot that ends at `last` lies.
pub(super) fn path_of(dir: &Path, last: Option<LogId>) -> PathBuf {
    let (term, index) = last.map_or((0, 0), |id| (id.leader_id.term, id.index));
    dir.join(format!("{index:020}-{term:010}.snapshot"))
}

/// Writes a snapshot of `rows`; it is durable under its final name when this returns.
pub(super) fn write(
    dir: &Path,
    meta: &SnapshotMeta,
    rows: &[RowChange],
) -> Result<SnapshotFile, StoreFailure> {
    let mut receiver = SnapshotReceiver::create(dir, meta)?;
    write_to(&mut receiver, meta, rows)?;
    receiver.finish_unchecked()
}

/// Writes the contents of a snapshot's file.
pub(super) fn write_to(out: impl Write, meta: &SnapshotMeta, rows: &[RowChange]) -> Result<(), StoreFailure> {
    let mut out = Summing { out, crc: 0 };
    let failed = |e: std::io::Error| StoreFailure::io("write a snapshot")(e);
    out.write_all(&MAGIC).map_err(failed)?;
    out.block(&codec::encode(meta)?).map_err(failed)?;
    let mut digest = 0u128;
    for row in rows {
        let value = row.value.as_deref().unwrap_or_default();
        digest = digest.wrapping_add(row_hash(row.form(), &row.key, value));
        let (kind, version) = (u8::from(row.kind), row.version);
        out.block(&codec::encode(&(kind, version, &row.key, value))?)
            .map_err(failed)?;
    }
    out.write_all(&END.to_be_bytes()).map_err(failed)?;
    out.write_all(&(rows.len() as u64).to_be_bytes())
        .map_err(failed)?;
    out.write_all(&digest.to_be_bytes()).map_err(failed)?;
    let crc = out.crc;
    out.write_all(&crc.to_be_bytes()).map_err(failed)
}

/// Reads and checks a whole snapshot.
pub(super) fn read(path: &Path) -> Result<Contents, StoreFailure> {
    let file = File::open(path).map_err(StoreFailure::io(format!("open {}", path.display())))?;
    read_from(BufReader::new(file), path)
}

/// Reads and checks the contents of a snapshot's file, which messages call `path`.
pub(super) fn read_from(input: impl Read, path: &Path) -> Result<Contents, StoreFailure> {
    let bad = |why: &str| StoreFailure::Damaged(format!("snapshot {}: {why}", path.display()));
    let mut input = Summed { input, crc: 0 };
    if input.take::<8>().ok_or_else(|| bad("it is cut off"))? != MAGIC {
        return Err(bad("it is no snapshot"));
    }
    let head = input
        .block()
        .ok_or_else(|| bad("it is cut off"))?
        .ok_or_else(|| bad("it has no meta"))?;
    let meta: SnapshotMeta = codec::decode(&head).map_err(|e| bad(&e.to_string()))?;
    let (mut raw, mut digest) = (Vec::new(), 0u128);
    while let Some(block) = input.block().ok_or_else(|| bad("it is cut off or damaged"))? {
        let (kind, version, key, value): (u8, u8, Vec<u8>, Vec<u8>) =
            codec::decode(&block).map_err(|e| bad(&e.to_string()))?;
        let form = Form { kind, version };
        digest = digest.wrapping_add(row_hash(form, &key, &value));
        raw.push((form, key, value));
    }
    let count = u64::from_be_bytes(input.take().ok_or_else(|| bad("it is cut off"))?);
    let stored = u128::from_be_bytes(input.take().ok_or_else(|| bad("it is cut off"))?);
    let crc = input.crc;
    let stored_crc = u32::from_be_bytes(input.take().ok_or_else(|| bad("it is cut off"))?);
    if count != raw.len() as u64 || stored != digest || stored_crc != crc {
        return Err(bad("its checksum is wrong"));
    }
    // Only now: what is damaged is not to be taken for another release's.
    let rows = raw.into_iter().map(known_row).collect::<Result<_, _>>()?;
    Ok(Contents { meta, rows, digest })
}

fn known_row((form, key, value): (Form, Vec<u8>, Vec<u8>)) -> Result<RowChange, StoreFailure> {
    match RowKind::from_byte(form.kind) {
        Some(kind) if form.version <= kind.version() => Ok(RowChange {
            kind,
            version: form.version,
            key,
            value: Some(value),
        }),
        _ => Err(form.unknown()),
    }
}

/// Complete snapshots, newest first. Partial ones are removed.
pub(super) fn list(dir: &Path) -> Result<Vec<PathBuf>, StoreFailure> {
    let what = || format!("read {}", dir.display());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(StoreFailure::io(what()))? {
        let path = entry.map_err(StoreFailure::io(what()))?.path();
        match path.extension().and_then(|e| e.to_str()) {
            Some("snapshot") => found.push(path),
            Some("partial") => {
                std::fs::remove_file(&path)
                    .map_err(StoreFailure::io(format!("remove {}", path.display())))?;
            }
            _ => {}
        }
    }
    found.sort();
    found.reverse();
    Ok(found)
}

/// Removes all complete snapshots older than `keep`. One that is gone already was removed by whoever wrote a newer
/// one at the same time.
pub(super) fn remove_older(dir: &Path, keep: &Path) -> Result<(), StoreFailure> {
    for path in std::fs::read_dir(dir)
        .map_err(StoreFailure::io("read snapshots"))?
        .flatten()
        .map(|e| e.path())
    {
        if path.extension().is_some_and(|e| e == "snapshot") && *path < *keep {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(StoreFailure::io(format!("remove {}", path.display()))(error));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// A snapshot being written or received, under a `.partial` name of its own: two that are received at once, of the
/// same state even, never mix. Dropped unfinished, it takes its file with it; what a crash leaves goes at the next
/// open.
#[derive(Debug)]
pub struct SnapshotReceiver {
    out: BufWriter<File>,
    meta: SnapshotMeta,
    partial: PathBuf,
    path: PathBuf,
    written: u64,
}

impl SnapshotReceiver {
    /// Begins a file for the snapshot that `meta` describes.
    pub fn create(dir: &Path, meta: &SnapshotMeta) -> Result<Self, StoreFailure> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = path_of(dir, meta.last_log_id);
        let partial = path.with_extension(format!("{number}.partial"));
        let file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&partial)
            .map_err(StoreFailure::io(format!("create {}", partial.display())))?;
        Ok(Self {
            out: BufWriter::new(file),
            meta: meta.clone(),
            partial,
            path,
            written: 0,
        })
    }

    /// Adds bytes as they arrive; refuses past the limit.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), StoreFailure> {
        self.write_all(bytes)
            .map_err(StoreFailure::io(format!("write {}", self.partial.display())))
    }

    /// Checks the whole file, and that it is the snapshot that was announced, and gives it its final name; durable
    /// when this returns.
    pub fn finish(mut self) -> Result<SnapshotFile, StoreFailure> {
        self.out.flush().map_err(StoreFailure::io("write a snapshot"))?;
        read(&self.partial)?.check_meta(&self.meta)?;
        self.finish_unchecked()
    }

    fn finish_unchecked(mut self) -> Result<SnapshotFile, StoreFailure> {
        let what = || format!("finish {}", self.path.display());
        self.out.flush().map_err(StoreFailure::io(what()))?;
        self.out.get_ref().sync_all().map_err(StoreFailure::io(what()))?;
        fail::fail_point!("store::before_snapshot_name");
        std::fs::rename(&self.partial, &self.path).map_err(StoreFailure::io(what()))?;
        sync_parent(&self.path)?;
        Ok(SnapshotFile {
            path: self.path.clone(),
        })
    }
}

impl Drop for SnapshotReceiver {
    fn drop(&mut self) {
        // Finished, it has its final name; and what cannot be removed now is removed at the next open.
        let _ = std::fs::remove_file(&self.partial);
    }
}

impl Write for SnapshotReceiver {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.written += bytes.len() as u64;
        if self.written > MAX_SNAPSHOT_BYTES {
            return Err(std::io::Error::other("the snapshot is larger than 1 GiB"));
        }
        self.out.write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

struct Summing<W> {
    out: W,
    crc: u32,
}

impl<W: Write> Summing<W> {
    fn write_all(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.crc = crc32c::crc32c_append(self.crc, bytes);
        self.out.write_all(bytes)
    }
    fn block(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.write_all(&(bytes.len() as u32).to_be_bytes())?;
        self.write_all(bytes)
    }
}

struct Summed<R> {
    input: R,
    crc: u32,
}

impl<R: Read> Summed<R> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes).ok()?;
        self.crc = crc32c::crc32c_append(self.crc, &bytes);
        Some(bytes)
    }
    /// `None`: cut off. `Some(None)`: the end mark.
    fn block(&mut self) -> Option<Option<Vec<u8>>> {
        let length = u32::from_be_bytes(self.take()?);
        if length == END {
            return Some(None);
        }
        if length > MAX_BLOCK {
            return None;
        }
        let mut bytes = vec![0; length as usize];
        self.input.read_exact(&mut bytes).ok()?;
        self.crc = crc32c::crc32c_append(self.crc, &bytes);
        Some(Some(bytes))
    }
}
