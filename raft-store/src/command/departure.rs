//! What leaves the state with a node that does not belong to the cluster any more. Its row stays, as a tombstone: its
//! raft id is never given again. Destructions that it owed are settled by the caller, once for all who go.

use super::{Refusal, standing_node};
use crate::names::{RaftId, UnixMillis};
use crate::state::ClusterState;
use crate::state::node::{Node, NodeStatus};

/// Makes the row of a node its tombstone, and forgets what it had reported. What it counted is forgotten with the next
/// report of whoever counts on.
pub(super) fn depart(state: &mut ClusterState, id: RaftId, at: UnixMillis) -> Result<(), Refusal> {
    let node = standing_node(state, id)?.clone();
    let status = NodeStatus::Removed { at };
    state.nodes.put(id, Node { status, ..node })?;
    state.reports.remove(&id);
    state.uncounted.remove(&id);
    Ok(())
}
