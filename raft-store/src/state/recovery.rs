//! Quorums that were lost for good, and recovered by one survivor: one row for each, for ever, under the epoch that began
//! with it.

use serde::{Deserialize, Serialize};

use super::table::{Row, RowKind};
use crate::names::{RaftId, UnixMillis};

/// See the module. The nodes' names are in their tombstones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recovery {
    /// When, by the clock of the survivor's machine.
    pub at: UnixMillis,
    /// Who went on alone.
    pub survivor: RaftId,
    /// Term of the last entry that it had.
    pub last_term: u64,
    /// Index of the last entry that it had. Whatever was committed beyond it is lost.
    pub last_index: u64,
    /// The last index that it knew to be committed.
    pub applied_index: u64,
    /// Who was left out, in order: what these have is of an epoch that has ended.
    pub left_out: Vec<RaftId>,
}

impl Row for Recovery {
    const KIND: RowKind = RowKind::Recovery;
}
