//! What a store finds when it is opened: log and state as sled has them, compared with what was promised; and a
//! snapshot that was received but not installed when the process ended.

use std::path::Path;

use openraft::EntryPayload;

use super::control::Control;
use super::error::StoreFailure;
use super::frame::{Form, LOG, POINTER, PURGED, VOTE};
use super::log::LogIndex;
use super::machine::{self, Loaded, META_TREE};
use super::rows::RowStore;
use super::snapshot;
use super::writer::{self, Core, LOG_TREE};
use crate::command::{Command, Op, RecoverQuorum};
use crate::state::table::RowKind;
use crate::{Entry, LogId, SnapshotMeta, Vote, codec};

/// The log as found.
pub(super) struct FoundLog {
    pub(super) index: LogIndex,
    pub(super) vote: Option<Vote>,
    /// Recoveries of the quorum that an entry names, with the entry's id: the last one, if there is any.
    pub(super) recovery: Option<(LogId, RecoverQuorum)>,
    /// Ids of all entries, to compare with what is promised and applied.
    ids: Vec<LogId>,
}

impl FoundLog {
    fn id_at(&self, index: u64) -> Option<LogId> {
        let at = self.ids.binary_search_by_key(&index, |id| id.index);
        at.ok().map(|at| self.ids[at])
    }
}

/// Reads the whole log: entries must begin after what was purged and follow each other, in index and in leader.
pub(super) fn read_log(rows: &dyn RowStore) -> Result<FoundLog, StoreFailure> {
    let (mut entries, mut vote, mut purged): (Vec<(Entry, usize)>, Option<Vote>, Option<LogId>) =
        (Vec::new(), None, None);
    rows.scan(LOG_TREE, &[], &mut |row| {
        let value = &row.value;
        match row.form {
            LOG => entries.push((codec::decode(value)?, value.len())),
            VOTE => vote = Some(codec::decode(value)?),
            PURGED => purged = Some(codec::decode(value)?),
            other => return Err(other.unknown()),
        }
        Ok(true)
    })?;
    let mut index = LogIndex {
        purged,
        first: purged.map_or(0, |id| id.index + 1),
        ..LogIndex::default()
    };
    let mut ids = Vec::with_capacity(entries.len());
    let mut recovery = None;
    let mut before = purged;
    for (entry, length) in entries {
        let id = entry.log_id;
        let follows = match before {
            Some(before) => id.index == before.index + 1 && id >= before,
            None => id.index == 0,
        };
        if !follows {
            return Err(StoreFailure::Damaged(match before {
                Some(before) => format!("log entry {id} does not follow {before}"),
                None => format!("the log begins with entry {id}, and nothing before it was purged"),
            }));
        }
        before = Some(id);
        ids.push(id);
        if let EntryPayload::Normal(Command {
            op: Op::RecoverQuorum(op),
            ..
        }) = &entry.payload
        {
            recovery = Some((id, op.clone()));
        }
        index.push(entry, length);
    }
    index.shrink(u64::MAX);
    Ok(FoundLog {
        index,
        vote,
        recovery,
        ids,
    })
}

/// A recovery of the quorum that this node's own directory was given, and that is not applied yet: it was killed before
/// `control` had the new epoch, or was not started since.
pub(super) fn own_recovery<'a>(
    control: &Control,
    found: &'a FoundLog,
    applied: Option<LogId>,
) -> Option<&'a RecoverQuorum> {
    let (id, op) = found.recovery.as_ref()?;
    let own = op.survivor == control.raft_id && id.leader_id.node_id == control.raft_id;
    (own && Some(*id) > applied).then_some(op)
}

/// sled may hold more than was promised, never less.
pub(super) fn check_promise(control: &Control, found: &FoundLog) -> Result<(), String> {
    if control.vote.is_some()
        && found
            .vote
            .partial_cmp(&control.vote)
            .is_none_or(std::cmp::Ordering::is_lt)
    {
        return Err(format!(
            "the vote {:?} was saved, sled has {:?}",
            control.vote, found.vote
        ));
    }
    if found.index.purged < control.last_purged {
        return Err(format!(
            "the log was purged up to {:?}, sled says {:?}",
            control.last_purged, found.index.purged
        ));
    }
    let Some(promised) = control.last_log else {
        return Ok(());
    };
    let there =
        found.index.purged >= Some(promised) || found.id_at(promised.index).is_some_and(|id| id >= promised);
    if there {
        return Ok(());
    }
    Err(format!(
        "log entry {promised} was acknowledged and is missing; the log ends at {:?}",
        found.index.last
    ))
}

/// Reads the state tree the pointer names and checks it against its digest.
pub(super) fn read_state(rows: &dyn RowStore, promised: bool) -> Result<Loaded, StoreFailure> {
    let pointer = rows.get(META_TREE, &[POINTER.kind])?;
    let tree = match pointer {
        Some(row) if row.form == POINTER => String::from_utf8_lossy(&row.value).into_owned(),
        Some(row) => return Err(row.form.unknown()),
        None if promised => {
            return Err(StoreFailure::Damaged(
                "the pointer to the state is missing".into(),
            ));
        }
        None => {
            machine::point_to(rows, "state-0")?;
            "state-0".to_string()
        }
    };
    let mut loaded = Loaded {
        tree: tree.clone(),
        ..Loaded::default()
    };
    let mut digest = 0u128;
    rows.scan(&tree, &[], &mut |row| {
        let (form, value) = (row.form, &row.value);
        if form == Form::from(RowKind::Applied) {
            loaded.row = codec::decode(value)?;
            loaded.applied_len = Some(value.len());
            return Ok(true);
        }
        let kind = RowKind::from_byte(form.kind).filter(|kind| *kind != RowKind::Applied);
        let kind = kind.ok_or_else(|| form.unknown())?;
        let hash = machine::row_hash(form, &row.key[1..], value);
        digest = digest.wrapping_add(hash);
        loaded.state.load(kind, form.version, &row.key[1..], value)?;
        loaded.bytes += value.len() as u64;
        loaded.sizes.insert(row.key, (hash, value.len()));
        Ok(true)
    })?;
    if digest != loaded.row.digest {
        return Err(StoreFailure::Damaged(
            "the state's rows are not those that were written".into(),
        ));
    }
    // A tree beside the one pointed to is a half-installed or half-dropped snapshot. Not before the one pointed to
    // is known to be whole: until then it may be the only one that is.
    for other in rows.trees() {
        if other.starts_with("state-") && other != tree {
            rows.drop_tree(&other)?;
        }
    }
    loaded.state = std::mem::take(&mut loaded.state).loaded();
    Ok(loaded)
}

/// A complete snapshot above the applied state was received but not installed when the process ended.
pub(super) fn install_newer(
    core: &Core,
    dir: &Path,
    now: &mut Loaded,
    purged: Option<LogId>,
) -> Result<Option<SnapshotMeta>, StoreFailure> {
    for path in snapshot::list(dir)? {
        match snapshot::read(&path) {
            Ok(contents) => {
                let meta = contents.meta.clone();
                if meta.last_log_id > now.row.applied {
                    *now = machine::install(core, &now.tree, contents)?;
                }
                snapshot::remove_older(dir, &path)?;
                return Ok(Some(meta));
            }
            // Not needed: everything it covers is in the state. openraft makes a new one.
            Err(StoreFailure::Damaged(_)) if now.row.applied >= purged => {
                std::fs::remove_file(&path)
                    .map_err(StoreFailure::io(format!("remove {}", path.display())))?;
            }
            Err(failure) => return Err(failure),
        }
    }
    Ok(None)
}

/// Brings the log to the state, by Raft's rule for a snapshot: if the entry at its end is not its last one, no entry
/// belongs with it; otherwise what it covers is not wanted any more. openraft does the same before it installs one,
/// so this is what a crash in between, or an install at this start, has left to do.
pub(super) fn fit_log(
    core: &Core,
    found: &mut FoundLog,
    applied: Option<LogId>,
    installed: bool,
) -> Result<(), StoreFailure> {
    let Some(applied) = applied.filter(|applied| found.index.purged < Some(*applied)) else {
        return Ok(());
    };
    let fits = found.id_at(applied.index) == Some(applied);
    if fits && !installed {
        return Ok(());
    }
    if !fits {
        let gone = found.index.cut(0);
        found.index.last = found.index.purged;
        writer::truncate(core, &gone, found.index.last)?;
        fail::fail_point!("store::between_cut_and_purge");
    }
    let gone = found.index.purge(applied);
    writer::purge(core, &gone, applied, found.index.last)
}
