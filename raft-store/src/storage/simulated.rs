//! A disk that is not there, for simulations: rows and control file in memory, where what was written and what was synced are
//! kept apart. When the power goes, what was not synced is lost but for a beginning of it; the power can go between any two
//! writes of one operation, and in the middle of a write to the control file. A disk can be made to lie about what it has
//! synced, so that whoever uses it can be shown to notice.
//!
//! Snapshots are files: each is synced before anybody is told of it, so there is nothing to lose.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::error::StoreFailure;
use super::frame::{UnpackedRow, Unpacker, VOTE, chunk_key};
use super::lock;
use super::rows::{Changes, RowStore};
use super::writer::LOG_TREE;

/// Writes that a lying disk has not synced yet, at most: the operating system writes back what is older by itself.
const UNSYNCED_OF_A_LIAR: usize = 8;

type Tree = BTreeMap<Vec<u8>, Vec<u8>>;

/// What a disk says is synced and is not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lie {
    /// Nothing.
    #[default]
    None,
    /// Everything that was written lately.
    Everything,
    /// A vote, until something else is synced.
    Votes,
}

/// Something written.
enum Written {
    Rows {
        tree: String,
        pairs: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    },
    Dropped(String),
    Slot {
        number: usize,
        bytes: Vec<u8>,
    },
}

#[derive(Clone, Default)]
struct Contents {
    trees: BTreeMap<String, Tree>,
    /// The two slots of the control file.
    control: [Vec<u8>; 2],
}

impl Contents {
    fn take(&mut self, written: &Written) {
        match written {
            Written::Rows { tree, pairs } => {
                let tree = self.trees.entry(tree.clone()).or_default();
                for (key, value) in pairs {
                    match value {
                        Some(value) => tree.insert(key.clone(), value.clone()),
                        None => tree.remove(key),
                    };
                }
            }
            Written::Dropped(tree) => {
                self.trees.remove(tree);
            }
            Written::Slot { number, bytes } => self.control[*number].clone_from(bytes),
        }
    }
}

#[derive(Default)]
struct Inner {
    /// What is read.
    now: Contents,
    /// What is there after the power was gone.
    synced: Contents,
    /// What makes the one of the other, in order.
    unsynced: Vec<Written>,
    /// Counts how often the power came back: who wrote before writes nothing any more.
    power: u64,
    is_off: bool,
    /// Writes until the power goes.
    cut_after: Option<u64>,
    lie: Lie,
    /// A vote was written, and its sync is being left out.
    vote_waits: bool,
    barriers: u64,
    write_time: Duration,
}

impl Inner {
    /// One more write, or one more look.
    fn step(&mut self, power: u64, is_write: bool) -> Result<(), StoreFailure> {
        if is_write && self.cut_after == Some(0) {
            self.is_off = true;
        }
        if self.is_off || self.power != power {
            let off = std::io::Error::other("the power is off");
            return Err(StoreFailure::io("use the simulated disk")(off));
        }
        if is_write && let Some(left) = &mut self.cut_after {
            *left -= 1;
        }
        Ok(())
    }

    fn write(&mut self, written: Written) {
        self.now.take(&written);
        self.unsynced.push(written);
    }

    /// Syncs the oldest writes but for `kept` of them.
    fn sync_but(&mut self, kept: usize) {
        let count = self.unsynced.len().saturating_sub(kept);
        for written in self.unsynced.drain(..count) {
            self.synced.take(&written);
        }
    }
}

/// See the module. Clones are the same disk.
#[derive(Clone, Default)]
pub struct SimulatedDisk(Arc<Mutex<Inner>>);

impl fmt::Debug for SimulatedDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimulatedDisk").finish_non_exhaustive()
    }
}

impl SimulatedDisk {
    /// An empty disk.
    #[must_use]
    pub fn new(lie: Lie) -> Self {
        let disk = Self::default();
        disk.inner().lie = lie;
        disk
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.0)
    }

    /// The power goes after so many further writes; whoever writes then gets an error, and so does everybody after.
    pub fn cut_after(&self, writes: u64) {
        self.inner().cut_after = Some(writes);
    }

    /// Whether the power went at a write.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.inner().is_off
    }

    /// The power goes, if it has not yet, and comes back. Of the writes that were not synced, oldest first, as many are
    /// there as `kept` says of how many there were. Says how many were lost.
    pub fn crash(&self, kept: impl FnOnce(usize) -> usize) -> usize {
        let mut inner = self.inner();
        let count = inner.unsynced.len();
        let lost = count - kept(count).min(count);
        inner.sync_but(lost);
        inner.unsynced.clear();
        inner.now = inner.synced.clone();
        inner.power += 1;
        inner.is_off = false;
        inner.cut_after = None;
        inner.vote_waits = false;
        lost
    }

    /// What one operation of the writer takes from now on.
    pub fn set_write_time(&self, time: Duration) {
        self.inner().write_time = time;
    }

    /// What one operation of the writer takes.
    #[must_use]
    pub fn write_time(&self) -> Duration {
        self.inner().write_time
    }

    /// The disk as whoever opens it now sees it, until the power goes.
    pub(super) fn rows(&self) -> SimulatedRows {
        SimulatedRows {
            power: self.inner().power,
            disk: self.clone(),
        }
    }
}

/// A disk under power.
#[derive(Clone, Debug)]
pub(super) struct SimulatedRows {
    disk: SimulatedDisk,
    power: u64,
}

impl SimulatedRows {
    fn step(&self, is_write: bool) -> Result<MutexGuard<'_, Inner>, StoreFailure> {
        let mut inner = self.disk.inner();
        inner.step(self.power, is_write)?;
        Ok(inner)
    }

    /// The slots of the control file.
    pub(super) fn slots(&self) -> Result<[Vec<u8>; 2], StoreFailure> {
        Ok(self.step(false)?.now.control.clone())
    }

    /// Writes a slot and syncs it; the control file is a file of its own. If the power goes now, half of it is written.
    pub(super) fn write_slot(&self, number: u64, bytes: Vec<u8>) -> Result<(), StoreFailure> {
        let number = usize::from(number % 2 == 1);
        let mut inner = match self.step(true) {
            Ok(inner) => inner,
            Err(failure) => {
                self.tear(number, &bytes);
                return Err(failure);
            }
        };
        let written = Written::Slot { number, bytes };
        let lie = inner.lie;
        match lie {
            Lie::Everything => {
                inner.write(written);
                inner.sync_but(UNSYNCED_OF_A_LIAR);
            }
            Lie::Votes if std::mem::take(&mut inner.vote_waits) => inner.write(written),
            Lie::None | Lie::Votes => {
                inner.now.take(&written);
                inner.synced.take(&written);
            }
        }
        Ok(())
    }

    fn tear(&self, number: usize, bytes: &[u8]) {
        let mut inner = self.disk.inner();
        // Only the write at which the power went.
        if inner.is_off && inner.power == self.power && inner.cut_after.take().is_some() {
            inner.synced.control[number] = bytes[..bytes.len() / 2].to_vec();
        }
    }
}

impl RowStore for SimulatedRows {
    fn write(&self, tree: &str, changes: Changes) -> Result<(), StoreFailure> {
        let mut inner = self.step(true)?;
        let vote = chunk_key(&[VOTE.kind], 0);
        if inner.lie == Lie::Votes && tree == LOG_TREE {
            inner.vote_waits = changes.pairs.iter().any(|(key, _)| *key == vote);
        }
        inner.write(Written::Rows {
            tree: tree.to_owned(),
            pairs: changes.pairs,
        });
        Ok(())
    }

    fn scan(
        &self,
        tree: &str,
        from: &[u8],
        visit: &mut dyn FnMut(UnpackedRow) -> Result<bool, StoreFailure>,
    ) -> Result<(), StoreFailure> {
        let inner = self.step(false)?;
        let Some(tree) = inner.now.trees.get(tree) else {
            return Ok(());
        };
        let mut unpacker = Unpacker::default();
        for (key, value) in tree.range(from.to_vec()..) {
            if let Some(row) = unpacker.push(key, value)?
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
        self.step(true)?.write(Written::Dropped(tree.to_owned()));
        Ok(())
    }

    fn trees(&self) -> Vec<String> {
        self.disk.inner().now.trees.keys().cloned().collect()
    }

    fn barrier(&self) -> Result<(), StoreFailure> {
        let mut inner = self.step(true)?;
        inner.barriers += 1;
        let (lie, vote_waits) = (inner.lie, inner.vote_waits);
        match lie {
            Lie::Everything => inner.sync_but(UNSYNCED_OF_A_LIAR),
            Lie::Votes if vote_waits => {}
            Lie::None | Lie::Votes => inner.sync_but(0),
        }
        Ok(())
    }

    fn barriers(&self) -> u64 {
        self.disk.inner().barriers
    }

    fn size_on_disk(&self) -> Result<u64, StoreFailure> {
        Ok(0)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::frame::LOG;
    use super::*;

    fn write(rows: &SimulatedRows, number: u8) -> Result<(), StoreFailure> {
        let mut changes = Changes::default();
        changes.put(LOG, &[number], &[number; 10], None).unwrap();
        rows.write(LOG_TREE, changes)
    }

    fn vote(rows: &SimulatedRows) {
        let mut changes = Changes::default();
        changes.put(VOTE, &[VOTE.kind], &[1], None).unwrap();
        rows.write(LOG_TREE, changes).unwrap();
    }

    /// The keys that are there.
    fn found(disk: &SimulatedDisk) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        let visited = disk.rows().scan(LOG_TREE, &[], &mut |row| {
            found.push(row.key);
            Ok(true)
        });
        visited.unwrap();
        found
    }

    #[test]
    fn what_was_not_synced_is_lost_from_its_end() {
        let disk = SimulatedDisk::new(Lie::None);
        let rows = disk.rows();
        write(&rows, 1).unwrap();
        rows.barrier().unwrap();
        for number in 2..=4 {
            write(&rows, number).unwrap();
        }
        assert_eq!(found(&disk).len(), 4);
        assert_eq!(disk.crash(|count| count - 2), 2);
        assert_eq!(found(&disk), [vec![1], vec![2]]);
        assert!(write(&rows, 5).is_err(), "whoever wrote before is gone");
        assert_eq!(disk.crash(|count| count), 0);
        assert_eq!(found(&disk).len(), 2);
    }

    #[test]
    fn the_power_goes_between_two_writes_and_tears_the_control_file() {
        let disk = SimulatedDisk::new(Lie::None);
        let rows = disk.rows();
        rows.write_slot(0, vec![1; 10]).unwrap();
        disk.cut_after(2);
        write(&rows, 1).unwrap();
        rows.barrier().unwrap();
        assert!(rows.write_slot(1, vec![2; 10]).is_err() && disk.is_off());
        assert!(rows.write_slot(0, vec![3; 10]).is_err() && rows.barrier().is_err() && rows.slots().is_err());
        disk.crash(|_| 0);
        assert_eq!(found(&disk), [vec![1]]);
        assert_eq!(disk.rows().slots().unwrap(), [vec![1; 10], vec![2; 5]]);
    }

    #[test]
    fn a_disk_that_lies_forgets_what_it_said_was_synced() {
        let disk = SimulatedDisk::new(Lie::Everything);
        let rows = disk.rows();
        write(&rows, 1).unwrap();
        rows.barrier().unwrap();
        rows.write_slot(0, vec![1]).unwrap();
        assert_eq!(disk.crash(|_| 0), 2);
        assert!(found(&disk).is_empty() && disk.rows().slots().unwrap()[0].is_empty());

        let disk = SimulatedDisk::new(Lie::Votes);
        let rows = disk.rows();
        for is_synced in [false, true] {
            vote(&rows);
            rows.barrier().unwrap();
            rows.write_slot(0, vec![1]).unwrap();
            if is_synced {
                write(&rows, 1).unwrap();
                rows.barrier().unwrap();
            }
            let rows = disk.rows();
            assert_eq!(rows.slots().unwrap()[0], [1]);
            if is_synced {
                assert_eq!(disk.crash(|_| 0), 0);
                assert_eq!(found(&disk).len(), 2);
            }
        }
        vote(&disk.rows());
        disk.rows().barrier().unwrap();
        disk.rows().write_slot(0, vec![2]).unwrap();
        assert_eq!(disk.crash(|_| 0), 2);
        assert_eq!(disk.rows().slots().unwrap()[0], [1]);
    }
}
