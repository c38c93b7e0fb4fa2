//! The control file: what the store has promised, kept outside sled so that a sled that forgets is
//! found out. Written after sled's barrier and before anything is acknowledged.
//!
//! ```text
//! two slots, at offsets 0 and 4096, written in turn; the valid one with the higher `sequence` counts
//!   0  magic "HSMCTRL1"   8
//!   8  sequence           u64 big endian
//!  16  length             u32 big endian
//!  20  Control, encoded   `length` bytes
//!  ..  crc32c             u32 big endian, over everything before
//! ```

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::StoreFailure;
use crate::codec;
use crate::names::{ClusterId, Incarnation, RaftId};
use crate::{LogId, Vote};

const MAGIC: [u8; 8] = *b"HSMCTRL1";
const HEAD: usize = 20;
const SLOT: u64 = 4096;
const MAX_BODY: usize = SLOT as usize - HEAD - 4;

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
}

/// The open file.
#[derive(Debug)]
pub(super) struct ControlFile {
    file: File,
    path: PathBuf,
    sequence: u64,
}

impl ControlFile {
    /// Makes the file with its first contents, durable with its directory entry.
    pub(super) fn create(path: &Path, control: &Control) -> Result<Self, StoreFailure> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(StoreFailure::io(format!("create {}", path.display())))?;
        let mut this = Self {
            file,
            path: path.to_path_buf(),
            sequence: 0,
        };
        this.write(control)?;
        // Both slots from the start, so that a single damaged one never leaves none.
        this.write(control)?;
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
        let newest = [0, SLOT]
            .into_iter()
            .filter_map(|at| read_slot(&file, at))
            .max_by_key(|(seq, _)| *seq);
        let Some((sequence, control)) = newest else {
            return Err(StoreFailure::Damaged(format!(
                "{}: neither slot is valid",
                path.display()
            )));
        };
        Ok(Some((
            Self {
                file,
                path: path.to_path_buf(),
                sequence,
            },
            control,
        )))
    }

    /// Writes the next slot and waits until it is on disk.
    pub(super) fn write(&mut self, control: &Control) -> Result<(), StoreFailure> {
        let what = || format!("write {}", self.path.display());
        let body = codec::encode(control).map_err(|e| StoreFailure::Damaged(e.to_string()))?;
        if body.len() > MAX_BODY {
            return Err(StoreFailure::Damaged(format!(
                "control of {} bytes does not fit",
                body.len()
            )));
        }
        let sequence = self.sequence + 1;
        let mut slot = Vec::with_capacity(HEAD + body.len() + 4);
        slot.extend_from_slice(&MAGIC);
        slot.extend_from_slice(&sequence.to_be_bytes());
        slot.extend_from_slice(&(body.len() as u32).to_be_bytes());
        slot.extend_from_slice(&body);
        slot.extend_from_slice(&crc32c::crc32c(&slot).to_be_bytes());
        self.file
            .write_all_at(&slot, (sequence % 2) * SLOT)
            .map_err(StoreFailure::io(what()))?;
        self.file.sync_data().map_err(StoreFailure::io(what()))?;
        self.sequence = sequence;
        Ok(())
    }
}

fn read_slot(file: &File, at: u64) -> Option<(u64, Control)> {
    let mut head = [0; HEAD];
    file.read_exact_at(&mut head, at).ok()?;
    let length = u32::from_be_bytes(head[16..20].try_into().ok()?) as usize;
    if head[..8] != MAGIC || length > MAX_BODY {
        return None;
    }
    let mut rest = vec![0; length + 4];
    file.read_exact_at(&mut rest, at + HEAD as u64).ok()?;
    let (body, crc) = rest.split_at(length);
    if crc32c::crc32c_append(crc32c::crc32c(&head), body) != u32::from_be_bytes(crc.try_into().ok()?) {
        return None;
    }
    Some((
        u64::from_be_bytes(head[8..16].try_into().ok()?),
        codec::decode(body).ok()?,
    ))
}

/// Makes a new directory entry durable.
pub(super) fn sync_parent(path: &Path) -> Result<(), StoreFailure> {
    let parent = path.parent().unwrap_or(Path::new("."));
    let sync = || File::open(parent)?.sync_all();
    sync().map_err(StoreFailure::io(format!("sync {}", parent.display())))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use openraft::{CommittedLeaderId, LeaderId};

    fn example() -> Control {
        Control {
            node_name: "hsm-node-1".into(),
            incarnation: Incarnation([7; 16]),
            cluster_id: ClusterId([9; 16]),
            epoch: 1,
            raft_id: 3,
            vote: Some(Vote {
                leader_id: LeaderId::new(4, 3),
                committed: true,
            }),
            last_log: Some(LogId::new(CommittedLeaderId::new(4, 3), 17)),
            last_purged: Some(LogId::new(CommittedLeaderId::new(2, 1), 5)),
            poison: None,
        }
    }

    #[test]
    fn golden_bytes_of_control() {
        let bytes = codec::encode(&example()).unwrap();
        assert_eq!(
            hex::encode(&bytes),
            concat!(
                "0a00000000000000",
                "68736d2d6e6f64652d31",
                "07070707070707070707070707070707",
                "09090909090909090909090909090909",
                "0100000000000000",
                "0300000000000000",
                "01",
                "0400000000000000",
                "0300000000000000",
                "01",
                "01",
                "0400000000000000",
                "0300000000000000",
                "1100000000000000",
                "01",
                "0200000000000000",
                "0100000000000000",
                "0500000000000000",
                "00"
            )
        );
        assert_eq!(codec::decode::<Control>(&bytes).unwrap(), example());
    }

    #[test]
    fn a_damaged_newest_slot_falls_back_to_the_other_and_two_damaged_ones_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let mut file = ControlFile::create(&path, &example()).unwrap();
        let newer = Control {
            raft_id: 99,
            ..example()
        };
        file.write(&newer).unwrap();
        assert_eq!(ControlFile::open(&path).unwrap().unwrap().1, newer);
        let raw = OpenOptions::new().write(true).open(&path).unwrap();
        raw.write_all_at(b"x", (file.sequence % 2) * SLOT + 30).unwrap();
        let (mut again, control) = ControlFile::open(&path).unwrap().unwrap();
        assert_eq!(control, example());
        again.write(&newer).unwrap();
        assert_eq!(ControlFile::open(&path).unwrap().unwrap().1, newer);
        raw.write_all_at(b"x", 30).unwrap();
        raw.write_all_at(b"x", SLOT + 30).unwrap();
        assert!(ControlFile::open(&path).is_err());
    }
}
