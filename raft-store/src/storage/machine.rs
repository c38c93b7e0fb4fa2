//! The state machine as openraft sees it: applies committed entries to [`ClusterState`], writes the
//! touched rows in one batch, and publishes a snapshot of the state for readers.
//!
//! The batch is not flushed on its own: the log's barrier acknowledged the entries, and after a crash
//! they are applied again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use openraft::storage::RaftStateMachine;
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder, StorageError, StorageIOError};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use super::error::StoreFailure;
use super::frame::{Form, POINTER};
use super::lock;
use super::rows::{Changes, RowStore};
use super::snapshot::{self, Contents};
use super::writer::Core;
use crate::command::{self, ApplyContext, Outcome};
use crate::names::RaftId;
use crate::state::ClusterState;
use crate::state::table::{RowChange, RowKind};
use crate::{Entry, LogId, Snapshot, SnapshotFile, SnapshotMeta, StoredMembership, TypeConfig, codec};

type Failure = StorageError<RaftId>;

pub(super) const META_TREE: &str = "meta";
/// Rows written at a time while a snapshot is installed.
const INSTALL_BATCH: usize = 256;

/// The state at an index, as readers see it.
#[derive(Clone, Default)]
pub struct Published {
    /// The state.
    pub state: ClusterState,
    /// The last entry applied to it.
    pub applied: Option<LogId>,
    /// Raft's membership in force.
    pub membership: StoredMembership,
    /// Order-independent digest of all rows: equal states have equal digests.
    pub digest: u128,
    /// Last entry applied since the start that was no report; 0 = none.
    pub changed: u64,
}

/// The row that says how far a state tree has come.
#[derive(Clone, Default, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct AppliedRow {
    pub(super) applied: Option<LogId>,
    pub(super) membership: StoredMembership,
    pub(super) digest: u128,
}

impl RowChange {
    pub(super) fn form(&self) -> Form {
        Form {
            kind: self.kind.into(),
            version: self.version,
        }
    }
}

/// Hash of one row; a tree's digest is the sum of its rows' hashes.
pub(super) fn row_hash(form: Form, key: &[u8], value: &[u8]) -> u128 {
    let mut hash = Sha256::new();
    hash.update([form.kind, form.version]);
    hash.update((key.len() as u32).to_be_bytes());
    hash.update(key);
    hash.update(value);
    let digest = hash.finalize();
    let mut first = [0; 16];
    first.copy_from_slice(&digest[..16]);
    u128::from_be_bytes(first)
}

/// Hash and length of each row as stored, so that a batch knows what it replaces.
pub(super) type RowSizes = BTreeMap<Vec<u8>, (u128, usize)>;

/// A state tree in memory.
#[derive(Default)]
pub(super) struct Loaded {
    pub(super) state: ClusterState,
    pub(super) row: AppliedRow,
    pub(super) sizes: RowSizes,
    /// Sum of the lengths.
    pub(super) bytes: u64,
    pub(super) applied_len: Option<usize>,
    pub(super) tree: String,
    /// See [`Published::changed`].
    pub(super) changed: u64,
}

/// See the module.
pub struct StateMachine {
    core: Arc<Core>,
    dir: PathBuf,
    now: Loaded,
    published: Arc<ArcSwap<Published>>,
    applied: watch::Sender<u64>,
    current: Arc<Mutex<Option<SnapshotMeta>>>,
}

fn physical(kind: RowKind, key: &[u8]) -> Vec<u8> {
    [&[kind as u8], key].concat()
}

impl Loaded {
    /// Adds row changes to a batch and to sizes and digest.
    fn record(&mut self, rows: Vec<RowChange>, changes: &mut Changes) -> Result<(), StoreFailure> {
        for row in rows {
            let physical = physical(row.kind, &row.key);
            let old = self.sizes.remove(&physical);
            let digest = self.row.digest.wrapping_sub(old.map_or(0, |(hash, _)| hash));
            self.bytes -= old.map_or(0, |(_, len)| len as u64);
            match &row.value {
                Some(value) => {
                    let hash = row_hash(row.form(), &row.key, value);
                    self.row.digest = digest.wrapping_add(hash);
                    changes.put(row.form(), &physical, value, old.map(|(_, len)| len))?;
                    self.bytes += value.len() as u64;
                    self.sizes.insert(physical, (hash, value.len()));
                }
                None => {
                    self.row.digest = digest;
                    if let Some((_, len)) = old {
                        changes.remove(&physical, len);
                    }
                }
            }
        }
        Ok(())
    }

    /// Adds the applied row to a batch.
    fn record_applied(&mut self, changes: &mut Changes) -> Result<(), StoreFailure> {
        let bytes = codec::encode(&self.row)?;
        changes.put(
            RowKind::Applied.into(),
            &physical(RowKind::Applied, &[]),
            &bytes,
            self.applied_len,
        )?;
        self.applied_len = Some(bytes.len());
        Ok(())
    }

    fn publish(&self) -> Published {
        Published {
            state: self.state.clone(),
            applied: self.row.applied,
            membership: self.row.membership.clone(),
            digest: self.row.digest,
            changed: self.changed,
        }
    }
}

impl StateMachine {
    pub(super) fn new(core: Arc<Core>, dir: PathBuf, now: Loaded, current: Option<SnapshotMeta>) -> Self {
        let published = Arc::new(ArcSwap::from_pointee(now.publish()));
        let (applied, _) = watch::channel(now.row.applied.map_or(0, |id| id.index));
        Self {
            core,
            dir,
            now,
            published,
            applied,
            current: Arc::new(Mutex::new(current)),
        }
    }

    /// The published state: one load, no lock.
    pub fn published(&self) -> Arc<ArcSwap<Published>> {
        Arc::clone(&self.published)
    }

    /// What is applied.
    pub(super) fn loaded(&self) -> &Loaded {
        &self.now
    }

    /// The applied index, for waiting.
    pub fn applied(&self) -> watch::Receiver<u64> {
        self.applied.subscribe()
    }

    fn publish(&self) {
        self.core.state_bytes.store(self.now.bytes, Ordering::Relaxed);
        self.published.store(Arc::new(self.now.publish()));
        self.applied
            .send_replace(self.now.row.applied.map_or(0, |id| id.index));
    }

    fn apply_entries(&mut self, entries: impl Iterator<Item = Entry>) -> Result<Vec<Outcome>, StoreFailure> {
        self.core.check_running()?;
        let mut outcomes = Vec::new();
        let mut voters: BTreeSet<RaftId> = self.now.row.membership.voter_ids().collect();
        for entry in entries {
            if !is_report(&entry) {
                self.now.changed = entry.log_id.index;
            }
            let id = entry.log_id;
            let (state, membership) = (&mut self.now.state, &mut self.now.row.membership);
            outcomes.push(advance(state, membership, &mut voters, entry));
            self.now.row.applied = Some(id);
        }
        let mut changes = Changes::default();
        let rows = self.now.state.drain()?;
        self.now.record(rows, &mut changes)?;
        self.now.record_applied(&mut changes)?;
        self.core.rows.write(&self.now.tree, changes)?;
        self.publish();
        Ok(outcomes)
    }
}

/// What one entry does to the state, to the membership and to its voters.
pub(super) fn advance(
    state: &mut ClusterState,
    membership: &mut StoredMembership,
    voters: &mut BTreeSet<RaftId>,
    entry: Entry,
) -> Outcome {
    match entry.payload {
        EntryPayload::Blank => Outcome::Nothing,
        EntryPayload::Membership(next) => {
            *membership = StoredMembership::new(Some(entry.log_id), next);
            *voters = membership.voter_ids().collect();
            let joint = membership.membership().get_joint_config().len() > 1;
            let point = if joint {
                "store::joint_applied"
            } else {
                "store::uniform_applied"
            };
            let _: &str = point;
            fail::fail_point!(point);
            Outcome::Nothing
        }
        EntryPayload::Normal(command) => {
            let cx = ApplyContext {
                index: entry.log_id.index,
                at: command.at,
                origin: &command.origin,
                leader: entry.log_id.leader_id.node_id,
                voters,
            };
            command::apply(state, &command, &cx)
        }
    }
}

/// Keeps a received snapshot's file where ours lie; tests hand over files of other stores.
fn adopt(dir: &Path, meta: &SnapshotMeta, file: &SnapshotFile) -> Result<PathBuf, StoreFailure> {
    if file.path.parent() == Some(dir) {
        return Ok(file.path.clone());
    }
    let bytes = std::fs::read(&file.path).map_err(StoreFailure::io("read a snapshot"))?;
    let mut receiver = snapshot::SnapshotReceiver::create(dir, meta)?;
    receiver.push(&bytes)?;
    Ok(receiver.finish()?.path)
}

/// Runs what reads and waits for the disk off the consensus thread, which has heartbeats to send meanwhile.
async fn off_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreFailure> + Send + 'static,
) -> Result<T, StoreFailure> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|e| Err(StoreFailure::Damaged(format!("the snapshot task failed: {e}"))))
}

fn is_report(entry: &Entry) -> bool {
    matches!(&entry.payload, EntryPayload::Normal(command) if command.op.is_report())
}

/// Replaces the state by a snapshot: a new tree is written whole, then one pointer row is flipped.
pub(super) fn install(core: &Core, old_tree: &str, contents: Contents) -> Result<Loaded, StoreFailure> {
    fail::fail_point!("store::before_install");
    let number = old_tree
        .rsplit('-')
        .next()
        .and_then(|n| n.parse::<u64>().ok())
        .unwrap_or(0);
    let tree = format!("state-{}", number + 1);
    core.rows.drop_tree(&tree)?;
    let mut next = Loaded {
        tree: tree.clone(),
        ..Loaded::default()
    };
    let mut rows = contents.rows.into_iter().peekable();
    while rows.peek().is_some() {
        let batch: Vec<RowChange> = rows.by_ref().take(INSTALL_BATCH).collect();
        for row in &batch {
            let value = row.value.as_deref().unwrap_or_default();
            next.state.load(row.kind, row.version, &row.key, value)?;
        }
        let mut changes = Changes::default();
        next.record(batch, &mut changes)?;
        core.rows.write(&tree, changes)?;
        fail::fail_point!("store::in_install");
    }
    next.state = next.state.loaded();
    if next.row.digest != contents.digest {
        return Err(StoreFailure::Damaged(
            "the snapshot's rows repeat or are missing".into(),
        ));
    }
    next.row.applied = contents.meta.last_log_id;
    next.changed = contents.meta.last_log_id.map_or(0, |id| id.index);
    next.row.membership = contents.meta.last_membership;
    let mut changes = Changes::default();
    next.record_applied(&mut changes)?;
    core.rows.write(&tree, changes)?;
    core.rows.barrier()?;
    fail::fail_point!("store::before_pointer");
    point_to(&*core.rows, &tree)?;
    fail::fail_point!("store::after_pointer");
    core.rows.drop_tree(old_tree)?;
    Ok(next)
}

/// Names the tree that is the state; durable when this returns.
pub(super) fn point_to(rows: &dyn RowStore, tree: &str) -> Result<(), StoreFailure> {
    let mut changes = Changes::default();
    changes.put(POINTER, &[POINTER.kind], tree.as_bytes(), None)?;
    rows.write(META_TREE, changes)?;
    rows.barrier()
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), Failure> {
        Ok((self.now.row.applied, self.now.row.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Outcome>, Failure>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        fail::fail_point!("store::before_apply");
        let applied = self.apply_entries(entries.into_iter());
        self.core
            .fatal(applied)
            .map_err(|failure| StorageIOError::write_state_machine(&failure).into())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        SnapshotBuilder {
            core: Arc::clone(&self.core),
            dir: self.dir.clone(),
            from: self.now.publish(),
            current: Arc::clone(&self.current),
        }
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<SnapshotFile>, Failure> {
        Ok(Box::new(SnapshotFile {
            path: self.dir.join("unnamed.partial"),
        }))
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        file: Box<SnapshotFile>,
    ) -> Result<(), Failure> {
        let (core, dir, announced) = (Arc::clone(&self.core), self.dir.clone(), meta.clone());
        let old_tree = self.now.tree.clone();
        let installed = off_thread(move || {
            core.check_running()?;
            let path = adopt(&dir, &announced, &file)?;
            let contents = snapshot::read(&path)?;
            contents.check_meta(&announced)?;
            let installed = install(&core, &old_tree, contents)?;
            snapshot::remove_older(&dir, &path)?;
            Ok(installed)
        });
        self.now = self
            .core
            .fatal(installed.await)
            .map_err(|failure| StorageIOError::write_snapshot(Some(meta.signature()), &failure))?;
        *lock(&self.current) = Some(meta.clone());
        self.publish();
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, Failure> {
        let meta = lock(&self.current).clone();
        Ok(meta.map(|meta| Snapshot {
            snapshot: Box::new(SnapshotFile {
                path: snapshot::path_of(&self.dir, meta.last_log_id),
            }),
            meta,
        }))
    }
}

/// Writes a snapshot of one published state, off the consensus thread.
pub struct SnapshotBuilder {
    core: Arc<Core>,
    dir: PathBuf,
    from: Published,
    current: Arc<Mutex<Option<SnapshotMeta>>>,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    async fn build_snapshot(&mut self) -> Result<Snapshot, Failure> {
        let from = self.from.clone();
        let id = from.applied;
        let meta = SnapshotMeta {
            last_log_id: id,
            last_membership: from.membership.clone(),
            snapshot_id: id.map_or_else(|| "empty".into(), |id| format!("{}-{}", id.leader_id, id.index)),
        };
        let (dir, for_file) = (self.dir.clone(), meta.clone());
        let written = off_thread(move || {
            let rows = from.state.dump()?;
            fail::fail_point!("store::before_snapshot");
            let file = snapshot::write(&dir, &for_file, &rows)?;
            fail::fail_point!("store::after_snapshot");
            snapshot::remove_older(&dir, &file.path)?;
            Ok(file)
        });
        let file = self
            .core
            .fatal(written.await)
            .map_err(|failure| StorageIOError::write_snapshot(Some(meta.signature()), &failure))?;
        let mut current = lock(&self.current);
        if current
            .as_ref()
            .is_none_or(|known| known.last_log_id <= meta.last_log_id)
        {
            *current = Some(meta.clone());
        }
        Ok(Snapshot {
            meta,
            snapshot: Box::new(file),
        })
    }
}
