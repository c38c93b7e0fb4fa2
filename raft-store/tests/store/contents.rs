//! All that a store holds, as whoever opens it finds it: the oracle of what was damaged.

use std::path::Path;

use openraft::RaftLogReader;
use openraft::storage::{RaftLogStorage, RaftStateMachine};
use raft_store::codec;
use raft_store::state::ClusterState;
use raft_store::state::table::{Row, RowKey, Table};
use raft_store::storage::Control;
use raft_store::{LogId, SnapshotMeta, StoredMembership, Vote};

use crate::common::try_open;

/// A row of the state: kind, key, value.
type StateRow = (u8, Vec<u8>, Vec<u8>);

/// What a store holds, and says of itself.
pub(crate) struct Contents {
    pub(crate) control: Control,
    vote: Vote,
    /// Every entry of the log, encoded.
    entries: Vec<u8>,
    applied: Option<LogId>,
    membership: StoredMembership,
    rows: Vec<StateRow>,
    /// How many requests are remembered: their rows are seen by the digest alone.
    requests: usize,
    digest: u128,
    /// Meta and bytes of the snapshot that is handed to others.
    pub(crate) snapshot: Option<(SnapshotMeta, Vec<u8>)>,
}

impl Contents {
    /// Opens a store; why, if it is refused.
    pub(crate) async fn of(dir: &Path) -> Result<Self, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let mut store = try_open(dir).map_err(|e| text(&e))?;
        let control = store.control.get();
        let entries = store.log.try_get_log_entries(..).await.map_err(|e| text(&e))?;
        let vote = store.log.read_vote().await.map_err(|e| text(&e))?;
        let snapshot = store.machine.get_current_snapshot().await.map_err(|e| text(&e))?;
        let snapshot = match snapshot {
            Some(kept) => {
                let bytes = std::fs::read(&kept.snapshot.path).map_err(|e| text(&e))?;
                Some((kept.meta, bytes))
            }
            None => None,
        };
        // The state may lag: what the log holds above it is applied again, as openraft does.
        let applied = store.machine.applied_state().await.map_err(|e| text(&e))?.0;
        let behind: Vec<_> = entries
            .iter()
            .filter(|e| Some(e.log_id) > applied)
            .cloned()
            .collect();
        store.machine.apply(behind).await.map_err(|e| text(&e))?;
        let (applied, membership) = store.machine.applied_state().await.map_err(|e| text(&e))?;
        let published = store.machine.published().load_full();
        Ok(Self {
            control,
            vote: vote.unwrap_or_default(),
            entries: codec::encode(&entries).map_err(|e| text(&e))?,
            applied,
            membership,
            rows: rows(&published.state),
            requests: published.state.requests().len(),
            digest: published.digest,
            snapshot,
        })
    }

    /// What is not as it was.
    pub(crate) fn differs_from(&self, was: &Self) -> Vec<&'static str> {
        let parts = [
            ("control", self.control == was.control),
            ("vote", self.vote == was.vote),
            ("log", self.entries == was.entries),
            ("applied", self.applied == was.applied),
            ("membership", self.membership == was.membership),
            ("state", self.rows == was.rows && self.requests == was.requests),
            ("digest", self.digest == was.digest),
            ("snapshot", self.snapshot == was.snapshot),
        ];
        let other = parts.into_iter().filter(|(_, same)| !same);
        other.map(|(part, _)| part).collect()
    }

    /// Kinds of rows that the state has: what a reference has none of is not compared.
    pub(crate) fn kinds(&self) -> std::collections::BTreeSet<u8> {
        self.rows.iter().map(|(kind, ..)| *kind).collect()
    }
}

fn table<K: RowKey, V: Row>(table: &Table<K, V>, rows: &mut Vec<StateRow>) {
    for (key, value) in table.iter() {
        rows.push((u8::from(V::KIND), key.encode(), codec::encode(&**value).unwrap()));
    }
}

fn single<V: Row>(value: Option<&V>, rows: &mut Vec<StateRow>) {
    rows.extend(value.map(|value| (u8::from(V::KIND), Vec::new(), codec::encode(value).unwrap())));
}

/// The state row by row, as readers see it.
fn rows(state: &ClusterState) -> Vec<StateRow> {
    let mut rows = Vec::new();
    single(state.meta(), &mut rows);
    single(state.acl(), &mut rows);
    table(state.contexts(), &mut rows);
    table(state.versions(), &mut rows);
    table(state.slots(), &mut rows);
    table(state.nodes(), &mut rows);
    table(state.reports(), &mut rows);
    table(state.revocations(), &mut rows);
    table(state.join_tokens(), &mut rows);
    table(state.uses(), &mut rows);
    table(state.uncounted(), &mut rows);
    table(state.leases(), &mut rows);
    table(state.recoveries(), &mut rows);
    single(state.replication(), &mut rows);
    rows
}
