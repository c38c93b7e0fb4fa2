//! `PrepareVersion`: a rotation's first phase. The sealed key is in state; every member imports it.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Done, Refusal};
use crate::names::{ContextName, KeyUid};
use crate::state::ClusterState;
use crate::state::context::{Context, KeyMaterial, KeyOrigin, KeyVersion, VersionKey, VersionState};
use crate::state::slot::TransportState;

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrepareVersion {
    /// The context.
    pub context: ContextName,
    /// The highest version the proposer saw: compare and set, so that no number is ever shared.
    pub expected_highest: u32,
    /// The new version's number, above the highest.
    pub version: u32,
    /// Its `CKA_ID`.
    pub key_uid: KeyUid,
    /// Its label.
    pub label: String,
    /// Wrapped, sealed key and check record.
    pub material: KeyMaterial,
}

impl PrepareVersion {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        let Some(context) = state.contexts.get(&self.context).cloned() else {
            return Err(Refusal::NotFound(format!("context {}", self.context)));
        };
        if context.highest_version != self.expected_highest {
            return Err(Refusal::Conflict(format!(
                "context {} is at version {}",
                self.context, context.highest_version
            )));
        }
        if self.version <= context.highest_version {
            return Err(Refusal::Invalid(format!(
                "version {} is not above the highest",
                self.version
            )));
        }
        if let Some((number, _)) = state
            .versions_of(&self.context)
            .find(|(_, v)| v.state == VersionState::Pending)
        {
            return Err(Refusal::Conflict(format!(
                "version {number} of {} is still pending",
                self.context
            )));
        }
        let current = state.slots.get(&context.slot).and_then(|slot| {
            slot.transport(self.material.transport_id)
                .map(|t| t.state == TransportState::Current)
        });
        if current != Some(true) {
            return Err(Refusal::Conflict(format!(
                "transport key {} is not the current one of slot {}",
                self.material.transport_id, context.slot
            )));
        }
        let taken = state
            .versions
            .values()
            .any(|v| v.key_uid == self.key_uid || v.label == self.label);
        if taken {
            return Err(Refusal::Exists(format!(
                "a version with label {} or its key_uid",
                self.label
            )));
        }
        state.versions.put(
            VersionKey {
                context: self.context.clone(),
                version: self.version,
            },
            KeyVersion {
                key_uid: self.key_uid,
                label: self.label.clone(),
                state: VersionState::Pending,
                origin: KeyOrigin::Generated,
                material: Some(self.material.clone()),
                acks: BTreeSet::new(),
                created_at: cx.at,
                activated_at: None,
                ended_at: None,
                note: String::new(),
            },
        );
        state.contexts.put(
            self.context.clone(),
            Context {
                highest_version: self.version,
                ..Context::clone(&context)
            },
        );
        Ok(Done::Version {
            context: self.context.clone(),
            version: self.version,
        })
    }
}
