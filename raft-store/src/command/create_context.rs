//! `CreateContext`: a name applications may use, bound to a slot and a binding mode for good.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Bounded, Done, Existing, Refusal, require_cluster};
use crate::names::{ContextName, ContextUid, SlotName};
use crate::state::ClusterState;
use crate::state::context::{BindingMode, Context, RotationPolicy};
use crate::state::frozen::RotationPolicyV1;
use crate::state::lease::MAX_INVOCATIONS;

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
        Bounded::Invocations.check_number(self.policy.max_invocations, MAX_INVOCATIONS)?;
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

/// `CreateContext` before invocations had a limit. Nobody proposes it any more, but logs hold it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CreateContextV1 {
    /// See [`CreateContext::name`].
    pub name: ContextName,
    /// See [`CreateContext::uid`].
    pub uid: ContextUid,
    /// See [`CreateContext::slot`].
    pub slot: SlotName,
    /// See [`CreateContext::binding`].
    pub binding: BindingMode,
    /// See [`CreateContext::policy`].
    pub policy: RotationPolicyV1,
}

impl CreateContextV1 {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        let now = CreateContext {
            name: self.name.clone(),
            uid: self.uid,
            slot: self.slot.clone(),
            binding: self.binding,
            policy: self.policy.clone().into(),
        };
        now.apply(state, cx)
    }
}
