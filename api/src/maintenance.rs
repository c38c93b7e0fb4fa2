//! What `hsm-node` says of work on the directory of a stopped node, as JSON on its standard output: `hsmctl node` reads
//! it. No route answers with it.

use serde::{Deserialize, Serialize};

use crate::admin::MemberRole;

/// Of `hsm-node recover-quorum`: what it would do, or has done, and what may be lost by it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuorumRecovery {
    /// Name of the node that goes on alone.
    pub node_id: String,
    /// Its raft id.
    pub raft_id: u64,
    /// Its directory.
    pub data_dir: String,
    /// Id of the cluster, hex.
    pub cluster_id: String,
    /// The epoch that ends.
    pub epoch: u64,
    /// The one that begins.
    pub new_epoch: u64,
    /// Whether it was done; false of a dry run.
    pub done: bool,
    /// Whether an earlier run had done it, and this one changed nothing.
    pub done_before: bool,
    /// The last entry that this node has of its cluster. Of two survivors, the one with the higher term, and of the same
    /// term the higher index, has lost less.
    pub last_log: LogPoint,
    /// The last entry that it knew to be committed.
    pub applied: LogPoint,
    /// Entries between the two: they become committed, also those of which nobody had an answer.
    pub uncertain_entries: u64,
    /// When the last change in its log was made, by the clock of the leader of then; absent if the log has none left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_change_at: Option<String>,
    /// When the directory last promised anything to a leader or a candidate, by its file's time. It had contact until then
    /// at least.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_written_at: Option<String>,
    /// Who is left out: their directories are of an epoch that has ended.
    pub left_out: Vec<LeftOut>,
    /// Key versions, as CONTEXT/vN, that this node has not acknowledged to hold. It imports those whose sealed keys it
    /// can open.
    pub unproven_keys: Vec<String>,
    /// Adopted key versions, as CONTEXT/vN, that are only in tokens of nodes that are left out.
    pub keys_elsewhere: Vec<String>,
}

/// A place in a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogPoint {
    /// The term of the leader that appended it.
    pub term: u64,
    /// Its index.
    pub index: u64,
}

/// A node that has no part in the new epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// Its name.
    pub node_id: String,
    /// Its raft id, which is never given again.
    pub raft_id: u64,
    /// What it was to the cluster.
    pub role: MemberRole,
    /// When it last reported anything that this node knows of, by its own clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_report_at: Option<String>,
}

/// Of `hsm-node compact`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compaction {
    /// Name of the node.
    pub node_id: String,
    /// Its directory.
    pub data_dir: String,
    /// Whether the store was written anew; false of a dry run.
    pub done: bool,
    /// Bytes of its files before.
    pub bytes_before: u64,
    /// Bytes of them now.
    pub bytes_after: u64,
    /// Bytes of the rows that there are.
    pub live_bytes: u64,
}
