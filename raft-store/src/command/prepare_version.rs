//! `PrepareVersion`: a rotation's first phase. The sealed key is in state; every member imports it.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::stamp::stamp;
use super::{ApplyContext, Bounded, Conflict, Done, Existing, Invalid, Missing, Refusal, refuse_retired};
use crate::names::{ContextName, KeyUid};
use crate::state::ClusterState;
use crate::state::context::{Context, KeyMaterial, KeyOrigin, KeyVersion, VersionKey, VersionState};
use crate::state::slot::TransportState;

/// Bytes of a label: what a token keeps.
pub(super) const MAX_LABEL: usize = 255;

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrepareVersion {
    /// The context.
    pub context: ContextName,
    /// The highest version the proposer saw: compare and set, so that no number is ever shared.
    pub expected_highest: u32,
    /// The new version's number: the next one.
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
            return Err(Missing::Context(self.context.clone()).into());
        };
        if context.highest_version != self.expected_highest {
            return Err(Conflict::HighestVersion {
                context: self.context.clone(),
                highest: context.highest_version,
            }
            .into());
        }
        // Only a version that was abandoned, or a recovery, leaves a gap: whoever sees one knows what became of it.
        let next = context.highest_version.saturating_add(1);
        if self.version != next || next == context.highest_version {
            return Err(Invalid::VersionNumber {
                context: self.context.clone(),
                version: self.version,
                next,
            }
            .into());
        }
        Bounded::Label.check(self.label.len(), MAX_LABEL)?;
        if let Some((pending, _)) = state.pending().find(|(key, _)| key.context == self.context) {
            let (context, version) = (self.context.clone(), pending.version);
            return Err(Conflict::Pending { context, version }.into());
        }
        let current = state.slots.get(&context.slot).and_then(|slot| {
            slot.transport(self.material.transport_id)
                .map(|t| t.state == TransportState::Current)
        });
        if current != Some(true) {
            return Err(Conflict::TransportNotCurrent {
                slot: context.slot.clone(),
                id: self.material.transport_id,
            }
            .into());
        }
        refuse_retired(state, &self.material.sealed_key)?;
        let uid_taken = state.versions.values().any(|v| v.key_uid == self.key_uid);
        if state.label_taken(&self.label) || uid_taken {
            let label = self.label.clone();
            return Err(Existing::Version { label }.into());
        }
        let created_at = stamp(state, cx);
        state.versions.put(
            VersionKey {
                context: self.context.clone(),
                version: self.version,
            },
            KeyVersion {
                key_uid: self.key_uid,
                label: self.label.clone(),
                slot: context.slot.clone(),
                state: VersionState::Pending,
                origin: KeyOrigin::Generated,
                material: Some(self.material.clone()),
                acks: BTreeSet::new(),
                created_at,
                activated_at: None,
                ended_at: None,
                note: String::new(),
                destruction: None,
            },
        )?;
        state.contexts.put(
            self.context.clone(),
            Context {
                highest_version: self.version,
                ..Context::clone(&context)
            },
        )?;
        Ok(Done::Version {
            context: self.context.clone(),
            version: self.version,
        })
    }
}
