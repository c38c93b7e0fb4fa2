//! Work on the directory of a stopped node. It takes the directory's lock, opens the store as a start would, and so proves
//! it whole, and refuses one that may never run again. It reads of the configuration only where the directory is and whose:
//! no secret, no certificate, no token.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::UNIX_EPOCH;

use hsm_api::admin::MemberRole;
use hsm_api::maintenance::{Compaction, LeftOut, LogPoint, QuorumRecovery};
use raft_store::LogId;
use raft_store::names::{Incarnation, RaftId, UnixMillis};
use raft_store::state::context::KeyVersion;
use raft_store::storage::{Outlook, RecoverError, Store, StoreOptions, install_log_hook, install_panic_hook};

use super::{StartFailure, die};
use crate::admin::views::rfc3339;
use crate::config::Place;
use crate::{clock, logging, secrets};

/// sled's page cache while it is worked on.
const CACHE_BYTES: u64 = 32 << 20;

/// Makes this survivor the only voter of a new epoch. `confirm`: its name again, unless it is a dry run.
///
/// # Errors
/// Why it is refused; nothing was changed then.
pub fn recover_quorum(
    path: &Path,
    confirm: Option<&str>,
    dry_run: bool,
) -> Result<QuorumRecovery, StartFailure> {
    let place = begin(path)?;
    let last_written = last_written(&place.data_dir);
    let opened = Store::open_existing(options(&place)).map_err(store)?;
    let outlook = opened.outlook()?;
    let found = report(&place, &outlook, last_written);
    if found.done_before {
        return Ok(found);
    }
    outlook.may_recover()?;
    if dry_run {
        return Ok(found);
    }
    if confirm != Some(place.node_id.as_str()) {
        return Err(StartFailure::Unconfirmed(place.node_id.to_string()));
    }
    let recovered = opened.recover_quorum(clock::unix_millis(), clock::random_id())?;
    tracing::warn!(
        node = %place.node_id, epoch = recovered.epoch, last_index = recovered.last_log.index,
        "this node is the only voter of a new epoch"
    );
    Ok(QuorumRecovery { done: true, ..found })
}

/// Writes the store anew, so that it takes no more room than its contents.
///
/// # Errors
/// Why it is refused; the store is as it was then.
pub fn compact(path: &Path, dry_run: bool) -> Result<Compaction, StartFailure> {
    let place = begin(path)?;
    let done = Store::compact(options(&place), !dry_run).map_err(store)?;
    Ok(Compaction {
        node_id: place.node_id.to_string(),
        data_dir: place.data_dir.display().to_string(),
        done: !dry_run,
        bytes_before: done.before,
        bytes_after: done.after,
        live_bytes: done.live,
    })
}

fn begin(path: &Path) -> Result<Place, StartFailure> {
    secrets::harden_process()?;
    let place = Place::load(path)?;
    logging::init(&place.logging)?;
    #[cfg(feature = "failpoints")]
    crate::failpoints::arm_from_environment().map_err(StartFailure::Failpoints)?;
    install_log_hook(|why| die(&why))?;
    install_panic_hook(|why| die(&why));
    Ok(place)
}

fn options(place: &Place) -> StoreOptions {
    StoreOptions {
        dir: place.data_dir.clone(),
        node_name: place.node_id.to_string(),
        incarnation: Incarnation(clock::random_id()),
        cache_bytes: CACHE_BYTES,
        on_barrier: None,
        on_fatal: Box::new(|why| die(&why)),
    }
}

fn store(error: raft_store::storage::OpenError) -> StartFailure {
    StartFailure::Consensus(error.into())
}

/// When `control` was last written, which every vote and every entry does. Before the store is opened.
fn last_written(data_dir: &Path) -> Option<UnixMillis> {
    let modified = data_dir.join("control").metadata().ok()?.modified().ok()?;
    let since = modified.duration_since(UNIX_EPOCH).ok()?;
    UnixMillis::try_from(since.as_millis()).ok()
}

fn point(id: LogId) -> LogPoint {
    LogPoint {
        term: id.leader_id.term,
        index: id.index,
    }
}

fn report(place: &Place, outlook: &Outlook, last_written: Option<UnixMillis>) -> QuorumRecovery {
    let (own, state) = (outlook.own(), &outlook.state);
    let mut last_log = point(outlook.last_log);
    let mut applied = outlook.applied.map_or(LogPoint { term: 0, index: 0 }, point);
    let (mut epoch, mut new_epoch) = (state.epoch(), outlook.next_epoch());
    let standing = state.nodes().iter().filter(|(_, node)| node.is_standing());
    let mut left_out: Vec<RaftId> = standing.map(|(id, _)| *id).filter(|id| *id != own).collect();
    // What an earlier run has done is told as that one would have told it.
    let done = outlook.recovered.and_then(|epoch| state.recoveries().get(&epoch));
    if let Some(done) = done {
        (epoch, new_epoch) = (epoch.saturating_sub(1), epoch);
        last_log = LogPoint {
            term: done.last_term,
            index: done.last_index,
        };
        applied.index = done.applied_index;
        left_out.clone_from(&done.left_out);
    }
    let voters: BTreeSet<RaftId> = outlook.membership.voter_ids().collect();
    let named = left_out
        .iter()
        .filter_map(|id| Some((*id, state.nodes().get(id)?)));
    let left_out = named
        .map(|(id, node)| LeftOut {
            node_id: node.name.to_string(),
            raft_id: id,
            role: if voters.contains(&id) || done.is_some() {
                MemberRole::Voter
            } else {
                MemberRole::Learner
            },
            last_report_at: state.reports().get(&id).map(|report| rfc3339(report.clock)),
        })
        .collect();
    let keys = |lacks: &dyn Fn(&KeyVersion) -> bool| -> Vec<String> {
        let lacking = state.versions().iter().filter(|(_, version)| lacks(version));
        lacking
            .map(|(key, _)| format!("{}/v{}", key.context, key.version))
            .collect()
    };
    QuorumRecovery {
        node_id: place.node_id.to_string(),
        raft_id: own,
        data_dir: place.data_dir.display().to_string(),
        cluster_id: outlook.control.cluster_id.to_string(),
        epoch,
        new_epoch,
        done: done.is_some(),
        done_before: done.is_some(),
        last_log,
        applied,
        uncertain_entries: last_log.index.saturating_sub(applied.index),
        last_change_at: outlook.last_change.map(rfc3339),
        last_written_at: last_written.map(rfc3339),
        left_out,
        unproven_keys: keys(&|version| {
            version.state.is_readable() && !version.origin.is_adopted() && !version.acks.contains(&own)
        }),
        keys_elsewhere: keys(&|version| !version.state.is_over() && !version.origin.concerns(own)),
    }
}

/// What a recovery is refused for is not the machine's fault, but for the store's.
pub(super) fn is_fatal(error: &RecoverError) -> bool {
    matches!(error, RecoverError::Store(_))
}
