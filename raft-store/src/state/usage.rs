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

/// What a node last reported of a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeUse {
    /// The number of that report: neither it nor an older one counts again.
    pub seq: u64,
    /// What it counted.
    pub count: UseCount,
}

/// The uses of a version in the whole cluster, under the version's key. They stay when it is destroyed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionUse {
    /// Encryptions.
    pub encryptions: u64,
    /// Decryptions.
    pub decryptions: u64,
    /// When the last of them was, by the wall clock of the node that says the latest.
    pub last_used: UnixMillis,
    /// What each node of the cluster last reported of it.
    pub nodes: BTreeMap<RaftId, NodeUse>,
}

impl VersionUse {
    /// Adds what a node's report counted, once, however often the report arrives.
    pub(crate) fn add(&mut self, node: RaftId, seq: u64, count: UseCount) {
        if self.nodes.get(&node).is_some_and(|last| last.seq >= seq) {
            return;
        }
        self.encryptions = self.encryptions.saturating_add(count.encryptions);
        self.decryptions = self.decryptions.saturating_add(count.decryptions);
        self.last_used = self.last_used.max(count.last_used);
        self.nodes.insert(node, NodeUse { seq, count });
    }
}

impl Row for VersionUse {
    const KIND: RowKind = RowKind::Use;
}
