//! `RecoverQuorum`: most voters are lost for good, and a survivor goes on alone, in a new epoch. Proposed by nobody: the
//! stopped survivor's own directory gets it as the end of its log, after the membership that has this node alone
//! (`storage/recover_quorum.rs`).

use serde::{Deserialize, Serialize};

use super::bury_node::bury;
use super::{ApplyContext, Conflict, Done, Forbidden, Invalid, Missing, Refusal, require_leader};
use crate::names::{ContextName, RaftId};
use crate::state::context::Context;
use crate::state::node::{Node, NodeStatus};
use crate::state::recovery::Recovery;
use crate::state::{ClusterMeta, ClusterState};

/// Version numbers that are left out in every context. The lost voters may have given the next ones, and what was encrypted
/// under those, and keys in tokens that are still somewhere, have their names.
pub const LEFT_OUT_VERSIONS: u32 = 100;

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecoverQuorum {
    /// The new epoch.
    pub epoch: u64,
    /// Who goes on.
    pub survivor: RaftId,
    /// Term of the last entry that it had.
    pub last_term: u64,
    /// Index of the last entry that it had. Whatever was committed beyond it is lost.
    pub last_index: u64,
    /// The last index that it had applied, and so knew to be committed. What lies between the two becomes committed by
    /// this, whether or not a majority ever had it.
    pub applied_index: u64,
}

impl RecoverQuorum {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        const OPERATION: &str = "recover_quorum";
        require_leader(state, cx, OPERATION)?;
        // A leader of others cannot throw them out with it: the membership before it has to have been changed, on this
        // very node's disk.
        if cx.leader != self.survivor || !cx.voters.iter().eq([&self.survivor]) {
            let operation = OPERATION.to_owned();
            return Err(Forbidden::Driver { operation }.into());
        }
        let Some(meta) = state.meta().cloned() else {
            return Err(Missing::Cluster.into());
        };
        if self.epoch != meta.epoch + 1 {
            let (epoch, current) = (self.epoch, meta.epoch);
            return Err(Invalid::Epoch { epoch, current }.into());
        }
        let Some(survivor) = state.nodes.get(&self.survivor).cloned() else {
            return Err(Missing::Node(self.survivor).into());
        };
        if !survivor.is_member() {
            let node = survivor.name.clone();
            return Err(Conflict::NotProven { node }.into());
        }
        // It may have been asked to leave: whoever is left alone stays.
        let stays = Node {
            status: NodeStatus::Member,
            ..Node::clone(&survivor)
        };
        state.nodes.put(self.survivor, stays)?;
        let others = state.nodes.iter().filter(|(_, node)| node.is_standing());
        let left_out: Vec<RaftId> = others
            .map(|(id, _)| *id)
            .filter(|id| *id != self.survivor)
            .collect();
        for id in &left_out {
            bury(state, *id, cx)?;
        }
        let contexts: Vec<(ContextName, Context)> = state
            .contexts
            .iter()
            .map(|(name, context)| (name.clone(), Context::clone(context)))
            .collect();
        for (name, context) in contexts {
            let highest_version = context.highest_version.saturating_add(LEFT_OUT_VERSIONS);
            let context = Context {
                highest_version,
                ..context
            };
            state.contexts.put(name, context)?;
        }
        let epoch = self.epoch;
        state.meta.put((), ClusterMeta { epoch, ..meta })?;
        let recovery = Recovery {
            at: cx.at,
            survivor: self.survivor,
            last_term: self.last_term,
            last_index: self.last_index,
            applied_index: self.applied_index,
            left_out,
        };
        state.recoveries.put(epoch, recovery)?;
        Ok(Done::Ok)
    }
}
