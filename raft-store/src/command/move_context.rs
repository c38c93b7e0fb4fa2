//! `MoveContext`: the next versions of a context are made in another slot. Those there are stay where they are, readable
//! as before; nothing is copied from one token to another.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Conflict, Done, Missing, Refusal, require_admin, require_slot_keys};
use crate::names::{ContextName, SlotName};
use crate::state::ClusterState;
use crate::state::context::{Context, KeyVersion, VersionKey, VersionState};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MoveContext {
    /// The context.
    pub context: ContextName,
    /// The slot that the proposer saw it in: compare and set.
    pub from: SlotName,
    /// The slot of its next versions.
    pub to: SlotName,
}

impl MoveContext {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_admin(cx, "move_context")?;
        let Some(context) = state.contexts.get(&self.context) else {
            return Err(Missing::Context(self.context.clone()).into());
        };
        if context.slot != self.from || context.slot == self.to {
            let (context, slot) = (self.context.clone(), context.slot.clone());
            return Err(Conflict::ContextSlot { context, slot }.into());
        }
        if let Some((version, _)) = state
            .versions_of(&self.context)
            .find(|(_, version)| version.state == VersionState::Pending)
        {
            let context = self.context.clone();
            return Err(Conflict::Pending { context, version }.into());
        }
        let slot = state.slots.get(&self.to);
        if slot.and_then(|slot| slot.current_transport()).is_none() {
            return Err(Missing::Slot(self.to.clone()).into());
        }
        require_slot_keys(state, &self.to)?;
        let moved = Context {
            slot: self.to.clone(),
            ..Context::clone(context)
        };
        self.place_versions(state)?;
        state.contexts.put(self.context.clone(), moved)?;
        Ok(Done::Ok)
    }

    /// Writes every version's row again, over and done with or not. One from before version 4 does not say where its key is
    /// and is read as lying where its context is: from this entry on that would be the wrong slot.
    fn place_versions(&self, state: &mut ClusterState) -> Result<(), Refusal> {
        let versions: Vec<(u32, KeyVersion)> = state
            .versions_of(&self.context)
            .map(|(number, version)| (number, version.clone()))
            .collect();
        for (version, row) in versions {
            let context = self.context.clone();
            state.versions.put(VersionKey { context, version }, row)?;
        }
        Ok(())
    }
}
