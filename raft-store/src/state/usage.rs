//! How often key versions are used, and when last: who still needs an old one? The nodes count, each report adds up
//! here. Sums and times only: whether a use is recent is asked of them, never whether anything is to be destroyed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::table::{Row, RowKind};
use crate::names::{RaftId, UnixMillis};

/// What a node counted of one version since its report before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UseCount {
    /// Encryptions.
    pub encryptions: u64,
    /// Decryptions.
    pub decryptions: u64,
    /// When the last of them was, by the node's wall clock.
    pub last_used: UnixMillis,
}

impl UseCount {
    /// Whether it counts nothing.
    pub fn is_none(self) -> bool {
        self.encryptions == 0 && self.decryptions == 0
    }
}

/// What a node has counted of a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeUse {
    /// The number of its last report that counted any: neither it nor an older one counts again.
    pub seq: u64,
    /// The sums of all its reports. The last use is that of this last report, by the node's wall clock or by the one
    /// of the leader that took the report, whichever was later: one clock that is behind makes no use long ago, and
    /// what one that was ahead had said is corrected by the next report.
    pub count: UseCount,
}

/// The uses of a version in the whole cluster, under the version's key. They stay when it is destroyed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionUse {
    /// Encryptions, of all `nodes` together.
    pub encryptions: u64,
    /// Decryptions, of all `nodes` together.
    pub decryptions: u64,
    /// When the last of them was: the latest of `nodes` and of `last_by_removed`.
    pub last_used: UnixMillis,
    /// What each node of the cluster has counted of it. Everything above follows from it.
    pub nodes: BTreeMap<RaftId, NodeUse>,
    /// The last use by nodes that were removed since, as each said it, but no later than its removal.
    pub last_by_removed: Option<UnixMillis>,
}

impl VersionUse {
    /// Adds what a node's report counted, once, however often the report arrives. `at`: when a leader took it.
    pub(crate) fn add(&mut self, node: RaftId, seq: u64, count: UseCount, at: UnixMillis) {
        let known = self.nodes.get(&node);
        if known.is_some_and(|last| last.seq >= seq) {
            return;
        }
        let before = known.map_or_else(UseCount::default, |last| last.count);
        let count = UseCount {
            encryptions: before.encryptions.saturating_add(count.encryptions),
            decryptions: before.decryptions.saturating_add(count.decryptions),
            last_used: count.last_used.max(at),
        };
        self.nodes.insert(node, NodeUse { seq, count });
        self.derive();
    }

    /// Forgets what a node has counted, which was removed at `at`. That somebody needed the version until then is no
    /// less true, so the time of its last use stays; if it said one that was yet to come, its removal takes that back.
    pub(crate) fn drop_node(&mut self, node: RaftId, at: UnixMillis) {
        let Some(dropped) = self.nodes.remove(&node) else {
            return;
        };
        let last = dropped.count.last_used.min(at);
        self.last_by_removed = self.last_by_removed.max(Some(last));
        self.derive();
    }

    /// Makes the sums what the nodes' entries say.
    fn derive(&mut self) {
        let counts = || self.nodes.values().map(|node| node.count);
        let encryptions = counts().fold(0, |sum: u64, count| sum.saturating_add(count.encryptions));
        let decryptions = counts().fold(0, |sum: u64, count| sum.saturating_add(count.decryptions));
        let last = counts().map(|count| count.last_used).chain(self.last_by_removed);
        let last_used = last.max().unwrap_or_default();
        (self.encryptions, self.decryptions, self.last_used) = (encryptions, decryptions, last_used);
    }
}

impl Row for VersionUse {
    const KIND: RowKind = RowKind::Use;
}

/// Until when a node that counts uses did not, under its raft id: what it used before, nobody knows. A node that has
/// counted since its first report has no such row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uncounted {
    /// When its first report came that counts, by its wall clock or the leader's, whichever was later.
    pub until: UnixMillis,
}

impl Row for Uncounted {
    const KIND: RowKind = RowKind::Uncounted;
}
