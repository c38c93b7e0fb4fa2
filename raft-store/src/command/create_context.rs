//! `CreateContext`: a name applications may use, bound to a slot and a binding mode for good.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Done, Existing, Refusal, require_cluster};
use crate::names::{ContextName, ContextUid, SlotName};
use crate::state::ClusterState;
use crate::state::context::{BindingMode, Context, RotationPolicy};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CreateContext {
    /// Its name.
    pub name: ContextName,
    /// Its random identity.
    pub uid: ContextUid,
    /// The slot that holds its keys.
    pub slot: SlotName,
    /// What its ciphertexts are bound to.
    pub binding: BindingMode,
    /// Rotation and retention.
    pub policy: RotationPolicy,
}

impl CreateContext {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_cluster(state)?;
        if let Some(known) = state.contexts.get(&self.name) {
            // The same wish from another node is no conflict; another slot or binding is.
            if known.slot == self.slot && known.binding == self.binding {
                return Ok(Done::Ok);
            }
            let (context, slot) = (self.name.clone(), known.slot.clone());
            return Err(Existing::Context { context, slot }.into());
        }
        state.contexts.put(
            self.name.clone(),
            Context {
                uid: self.uid,
                slot: self.slot.clone(),
                binding: self.binding,
                policy: self.policy.clone(),
                highest_version: 0,
                active_version: None,
                created_at: cx.at,
            },
        )?;
        Ok(Done::Ok)
    }
}
