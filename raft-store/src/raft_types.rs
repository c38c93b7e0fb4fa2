//! openraft's type parameters, fixed in one place.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::command::{Command, Outcome};
use crate::names::RaftId;

openraft::declare_raft_types!(
    /// The type parameters of the one Raft group this service runs.
    pub TypeConfig:
        D = Command,
        R = Outcome,
        NodeId = RaftId,
        Node = MemberNode,
        Entry = openraft::Entry<TypeConfig>,
        SnapshotData = SnapshotFile,
);

/// What Raft's own membership entries carry of a node: enough to reach it before any state is known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberNode {
    /// The node's configured name, as in the SAN of its cluster certificate.
    pub name: String,
    /// `host:port` of its cluster listener.
    pub cluster_address: String,
}

impl std::fmt::Display for MemberNode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.name, self.cluster_address)
    }
}

/// A complete snapshot under its final, durable name.
#[derive(Clone, Debug)]
pub struct SnapshotFile {
    /// Where it lies.
    pub path: PathBuf,
}

/// A log id of this cluster.
pub type LogId = openraft::LogId<RaftId>;
/// A vote of this cluster.
pub type Vote = openraft::Vote<RaftId>;
/// A log entry of this cluster.
pub type Entry = openraft::Entry<TypeConfig>;
/// A membership with the log id that established it.
pub type StoredMembership = openraft::StoredMembership<RaftId, MemberNode>;
/// What a snapshot covers.
pub type SnapshotMeta = openraft::SnapshotMeta<RaftId, MemberNode>;
/// A snapshot: meta and file.
pub type Snapshot = openraft::Snapshot<TypeConfig>;
