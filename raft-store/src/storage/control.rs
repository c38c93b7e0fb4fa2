//! The control file: what the store has promised, kept outside sled so that a sled that forgets is
//! found out. Written after sled's barrier and before anything is acknowledged.
//!
//! ```text
//! two slots, at offsets 0 and 4096, written in turn; the valid one with the higher `sequence` counts
//!   0  magic "HSMCTRL"    7
//!   7  version '1'        1
//!   8  sequence           u64 big endian
//!  16  length             u32 big endian
//!  20  Control, encoded   `length` bytes
//!  ..  crc32c             u32 big endian, over everything before
//! ```

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::StoreFailure;
#[cfg(feature = "simulation")]
use super::simulated::SimulatedRows;
use crate::codec;
use crate::names::{ClusterId, Incarnation, RaftId};
use crate::seeded::bug;
use crate::{LogId, Vote};

const MAGIC: [u8; 7] = *b"HSMCTRL";
/// Version of the layout and of [`Control`]'s encoding.
const VERSION: u8 = b'1';
const HEAD: usize = 20;
const SLOT: u64 = 4096;
const MAX_BODY: usize = SLOT as usize - HEAD - 4;
/// Further looks at a file that its node may be writing: it writes one slot after the other, and whoever reads meanwhile
/// may meet each of them half-way.
const PEEKS: usize = 5;

/// Why a node may not run again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Poison {
    /// It was removed from its cluster.
    Removed,
    /// Its directory is older than what the cluster has seen of it.
    RolledBack {
        /// What this directory holds.
        durable_index: u64,
        /// What the cluster has seen.
        seen_index: u64,
    },
}

impl std::fmt::Display for Poison {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Poison::Removed => f.write_str("it was removed from the cluster"),
            Poison::RolledBack {
                durable_index,
                seen_index,
            } => write!(
                f,
                "its data directory is an older copy: it ends at log index {durable_index}, the cluster has \
                 seen it at {seen_index}"
            ),
        }
    }
}

/// What the store has promised.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Control {
    /// The node's configured name.
    pub node_name: String,
    /// Which filling of this directory this is. Random.
    pub incarnation: Incarnation,
    /// The cluster, zero before one is founded or joined.
    pub cluster_id: ClusterId,
    /// The cluster's epoch.
    pub epoch: u64,
    /// The node's raft id, 0 before it has one.
    pub raft_id: RaftId,
    /// The last vote saved.
    pub vote: Option<Vote>,
    /// The last log entry that is durable.
    pub last_log: Option<LogId>,
    /// The last log entry purged.
    pub last_purged: Option<LogId>,
    /// Set once the node must never run again.
    pub poison: Option<Poison>,
}

impl Control {
    pub(super) fn fresh(node_name: String, incarnation: Incarnation) -> Self {
        Self {
            node_name,
            incarnation,
            cluster_id: ClusterId::default(),
            epoch: 0,
            raft_id: 0,
            vote: None,
            last_log: None,
            last_purged: None,
            poison: None,
        }
    }

    /// What the directory of a node says, without its lock: for whoever looks at it while the node may be running.
    /// `None`: it is new. Changes nothing.
    ///
    /// # Errors
    /// It cannot be read, or neither slot is what was written.
    pub fn peek(dir: &Path) -> Result<Option<Self>, StoreFailure> {
        let path = dir.join("control");
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreFailure::io(format!("open {}", path.display()))(error)),
        };
        let mut found = newest(&file, &path);
        for _ in 0..PEEKS {
            if !matches!(found, Err(StoreFailure::Damaged(_))) {
                break;
            }
            found = newest(&file, &path);
        }
        found.map(|(_, control)| Some(control))
    }

    /// Whether the node has founded or joined a cluster.
    pub fn is_founded(&self) -> bool {
        self.cluster_id != ClusterId::default()
    }
}

/// What the slots lie in.
#[derive(Debug)]
enum Medium {
    File(File),
    #[cfg(feature = "simulation")]
    Simulated(SimulatedRows),
}

/// The open file.
#[derive(Debug)]
pub(super) struct ControlFile {
    medium: Medium,
    path: PathBuf,
    sequence: u64,
}

impl ControlFile {
    /// Makes the file with its first contents, durable with its directory entry. Written beside first: a kill
    /// half-way leaves no `control`, and so a directory that is still new, instead of one without a valid slot.
    pub(super) fn create(path: &Path, control: &Control) -> Result<Self, StoreFailure> {
        let beside = path.with_extension("new");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)
            .map_err(StoreFailure::io(format!("create {}", beside.display())))?;
        let mut this = Self {
            medium: Medium::File(file),
            path: path.to_path_buf(),
            sequence: 0,
        };
        this.write(control)?;
        // Both slots from the start, so that a single damaged one never leaves none.
        this.write(control)?;
        fail::fail_point!("store::before_control");
        std::fs::rename(&beside, path).map_err(StoreFailure::io(format!("rename {}", beside.display())))?;
        sync_parent(path)?;
        Ok(this)
    }

    /// Opens the file and reads the newest valid slot; `None` when it does not exist.
    pub(super) fn open(path: &Path) -> Result<Option<(Self, Control)>, StoreFailure> {
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreFailure::io(format!("open {}", path.display()))(error)),
        };
        let (sequence, control) = newest(&file, path)?;
        Ok(Some((
            Self {
                medium: Medium::File(file),
                path: path.to_path_buf(),
                sequence,
            },
            control,
        )))
    }

    /// The control file of a disk that is not there; made if the disk is new.
    #[cfg(feature = "simulation")]
    pub(super) fn simulated(
        disk: SimulatedRows,
        fresh: impl FnOnce() -> Control,
    ) -> Result<(Self, Control), StoreFailure> {
        let mut newest: Option<(u64, Control)> = None;
        for slot in disk.slots()? {
            if let Some(found) = parse_slot(&slot)?
                && newest.as_ref().is_none_or(|(sequence, _)| found.0 > *sequence)
            {
                newest = Some(found);
            }
        }
        let mut this = Self {
            path: PathBuf::from("control"),
            sequence: newest.as_ref().map_or(0, |(sequence, _)| *sequence),
            medium: Medium::Simulated(disk),
        };
        if let Some((_, control)) = newest {
            return Ok((this, control));
        }
        let control = fresh();
        this.write(&control)?;
        this.write(&control)?;
        Ok((this, control))
    }

    /// Writes the next slot and waits until it is on disk.
    #[cfg_attr(not(feature = "simulation"), allow(clippy::match_single_binding))]
    pub(super) fn write(&mut self, control: &Control) -> Result<(), StoreFailure> {
        let what = || format!("write {}", self.path.display());
        let sequence = self.sequence + 1;
        let slot = slot(sequence, control)?;
        match &self.medium {
            Medium::File(file) => {
                file.write_all_at(&slot, (sequence % 2) * SLOT)
                    .map_err(StoreFailure::io(what()))?;
                if !bug("bug::skip_sync_data") {
                    file.sync_data().map_err(StoreFailure::io(what()))?;
                }
            }
            #[cfg(feature = "simulation")]
            Medium::Simulated(disk) => disk.write_slot(sequence % 2, slot)?,
        }
        self.sequence = sequence;
        Ok(())
    }
}

/// A slot as it is written.
pub(super) fn slot(sequence: u64, control: &Control) -> Result<Vec<u8>, StoreFailure> {
    let body = codec::encode(control).map_err(|e| StoreFailure::Damaged(e.to_string()))?;
    if body.len() > MAX_BODY {
        return Err(StoreFailure::Damaged(format!(
            "control of {} bytes does not fit",
            body.len()
        )));
    }
    let mut slot = Vec::with_capacity(HEAD + body.len() + 4);
    slot.extend_from_slice(&MAGIC);
    slot.push(VERSION);
    slot.extend_from_slice(&sequence.to_be_bytes());
    slot.extend_from_slice(&(body.len() as u32).to_be_bytes());
    slot.extend_from_slice(&body);
    slot.extend_from_slice(&crc32c::crc32c(&slot).to_be_bytes());
    Ok(slot)
}

/// The valid slot that was written last, and its sequence.
fn newest(file: &File, path: &Path) -> Result<(u64, Control), StoreFailure> {
    // A slot that a newer release wrote is refused even beside one that can be read: that one is older, and
    // what was promised since would be forgotten.
    let slots = [read_slot(file, 0)?, read_slot(file, SLOT)?];
    let newest = slots.into_iter().flatten().max_by_key(|(seq, _)| *seq);
    newest.ok_or_else(|| StoreFailure::Damaged(format!("{}: neither slot is valid", path.display())))
}

/// The slot at an offset.
fn read_slot(file: &File, at: u64) -> Result<Option<(u64, Control)>, StoreFailure> {
    let mut bytes = Vec::with_capacity(SLOT as usize);
    let mut here = file;
    let read = here
        .seek(SeekFrom::Start(at))
        .and_then(|_| here.take(SLOT).read_to_end(&mut bytes));
    match read {
        Ok(_) => parse_slot(&bytes),
        Err(_) => Ok(None),
    }
}

/// A slot's sequence and contents; `None` when it is not what was written.
pub(super) fn parse_slot(bytes: &[u8]) -> Result<Option<(u64, Control)>, StoreFailure> {
    let Some((version, sequence, body)) = frame_of(bytes) else {
        return Ok(None);
    };
    if version != VERSION {
        let what = format!("`control` in version {:?}", char::from(version));
        return Err(StoreFailure::Newer(what));
    }
    match codec::decode(body) {
        Ok(control) => Ok(Some((sequence, control))),
        Err(error) if error.is_unknown_variant() => Err(error.into()),
        Err(_) => Ok(None),
    }
}

/// Version, sequence and contents of a slot whose checksum is right. What lies behind it does not count.
fn frame_of(bytes: &[u8]) -> Option<(u8, u64, &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<HEAD>()?;
    let length = u32::from_be_bytes(head[16..20].try_into().ok()?) as usize;
    if head[..7] != MAGIC || length > MAX_BODY {
        return None;
    }
    let (body, rest) = rest.split_at_checked(length)?;
    let (crc, _) = rest.split_first_chunk::<4>()?;
    if crc32c::crc32c_append(crc32c::crc32c(head), body) != u32::from_be_bytes(*crc) {
        return None;
    }
    let sequence = u64::from_be_bytes(head[8..16].try_into().ok()?);
    Some((head[7], sequence, body))
}

/// Makes a new directory entry durable.
pub(super) fn sync_parent(path: &Path) -> Result<(), StoreFailure> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    let sync = || File::open(parent)?.sync_all();
    sync().map_err(StoreFailure::io(format!("sync {}", parent.display())))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "control_tests.rs"]
mod tests;
