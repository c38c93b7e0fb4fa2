//! What the node holds of an open store beside openraft: identity, poison, figures, the snapshot directory.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::StoreFigures;
use super::control::{Control, Poison};
use super::error::StoreFailure;
use super::writer::Core;
use crate::names::{ClusterId, RaftId};

/// See the module.
#[derive(Clone)]
pub struct ControlHandle {
    core: Arc<Core>,
    dir: PathBuf,
}

impl ControlHandle {
    pub(super) fn new(core: Arc<Core>, dir: PathBuf) -> Self {
        Self { core, dir }
    }

    /// What all parts of the store share.
    pub(super) fn core(&self) -> &Core {
        &self.core
    }

    /// What the store has promised.
    pub fn get(&self) -> Control {
        self.core.control()
    }

    /// Gives the node its identity in a cluster; durable when this returns. False, and nothing is changed, if it
    /// has another one already. Blocks on the disk.
    pub fn join_cluster(
        &self,
        cluster_id: ClusterId,
        epoch: u64,
        raft_id: RaftId,
    ) -> Result<bool, StoreFailure> {
        let mut free = false;
        let promised = self.core.settle(|control| {
            let own = (control.cluster_id, control.epoch, control.raft_id);
            free = control.raft_id == 0 || own == (cluster_id, epoch, raft_id);
            if free {
                control.cluster_id = cluster_id;
                control.epoch = epoch;
                control.raft_id = raft_id;
            }
        });
        self.core.fatal(promised)?;
        Ok(free)
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
        let room = room(&self.dir);
        let (log, state) = (&self.core.log_bytes, &self.core.state_bytes);
        StoreFigures {
            sled_bytes: self.core.rows.size_on_disk().unwrap_or(0),
            live_bytes: log.load(Ordering::Relaxed) + state.load(Ordering::Relaxed),
            barriers: self.core.rows.barriers(),
            free_bytes: room.free,
            below_reserve: room.below_reserve,
            below_last: room.below_last,
        }
    }
}

/// What is free on a file system.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Room {
    pub(super) free: u64,
    below_reserve: bool,
    below_last: bool,
}

/// Whether there is no room for anything; false of a file system that cannot be asked.
pub(super) fn is_full(dir: &Path) -> bool {
    nix::sys::statvfs::statvfs(dir).is_ok() && room(dir).below_last
}

/// A file system that cannot be asked has no room: whoever asks is about to add to it.
pub(super) fn room(dir: &Path) -> Room {
    let Ok(stat) = nix::sys::statvfs::statvfs(dir) else {
        return Room {
            free: 0,
            below_reserve: true,
            below_last: true,
        };
    };
    let unit = stat.fragment_size();
    let free = stat.blocks_available().saturating_mul(unit);
    judge(free, stat.blocks().saturating_mul(unit))
}

/// 5 % of a large disk is far more than needed: the reserve is the smaller of the two, at least 256 MiB on file
/// systems that have that much. A quarter of it is kept for what must still be written while somebody makes room.
fn judge(free: u64, total: u64) -> Room {
    let reserve = (total / 20).min(256 << 20);
    Room {
        free,
        below_reserve: free < reserve,
        below_last: free < reserve / 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_256_mib_or_a_twentieth_of_a_small_disk_and_its_last_quarter_is_kept_longest() {
        const MIB: u64 = 1 << 20;
        for (free, total, below_reserve, below_last) in [
            (256 * MIB, 100_000 * MIB, false, false),
            (256 * MIB - 1, 100_000 * MIB, true, false),
            (64 * MIB, 100_000 * MIB, true, false),
            (64 * MIB - 1, 100_000 * MIB, true, true),
            (50 * MIB, 1000 * MIB, false, false),
            (50 * MIB - 1, 1000 * MIB, true, false),
            (12 * MIB, 1000 * MIB, true, true),
            (0, 0, false, false),
        ] {
            let expected = Room {
                free,
                below_reserve,
                below_last,
            };
            assert_eq!(judge(free, total), expected, "{free} of {total}");
        }
    }

    #[test]
    fn a_file_system_that_cannot_be_asked_has_no_room() {
        let nowhere = room(Path::new("/nowhere/at/all"));
        assert!(nowhere.free == 0 && nowhere.below_reserve && nowhere.below_last);
        assert!(room(Path::new("/")).free > 0);
    }
}
