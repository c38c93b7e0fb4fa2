//! `AdoptVersion`: a key that version 1 made and that a node has found in its token becomes a version. It decrypts at
//! once and never encrypts: how often version 1 encrypted under it, nobody knows.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::prepare_version::MAX_LABEL;
use super::stamp::stamp;
use super::{
    ApplyContext, Bounded, Done, Existing, Forbidden, Invalid, Missing, Origin, Refusal, standing_node,
};
use crate::names::{ContextName, KeyUid, RaftId, SlotName, UnixMillis};
use crate::state::ClusterState;
use crate::state::context::{Context, KeyOrigin, KeyVersion, VersionKey, VersionState};

/// The highest number a version may be adopted under. Numbers after it are the context's next ones, and must not run
/// out because of a number that somebody made up.
pub const MAX_ADOPTED: u32 = 1_000_000;

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdoptVersion {
    /// The context.
    pub context: ContextName,
    /// Its number, as version 1 counted: it need not be the next one.
    pub version: u32,
    /// The `CKA_ID` that its copies in tokens have, fresh and random.
    pub key_uid: KeyUid,
    /// The label of version 1's object, which its ciphertexts name as `key_id`.
    pub label: String,
    /// The slot in whose token it was found. It need not be the one in which the context's next versions are made.
    pub slot: SlotName,
    /// Made under the key by the node that found it: every other copy is proven with it.
    pub check_record: Vec<u8>,
    /// The node that found it.
    pub holder: RaftId,
    /// The highest number that version 1 gave a key of this context, as far as the list or the token says; 0: no other
    /// than this one is known. The context's next version is above it, so that no label of version 1's is ever given
    /// to another key.
    pub floor: u32,
    /// When version 1 made it, if its list says so. For people: how long ago it was retired counts from now.
    pub created_at: Option<UnixMillis>,
}

impl AdoptVersion {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        // Only the node that was asked can have looked into its token.
        let found_by = match cx.origin {
            Origin::Admin(admin) => Some(admin.via_node),
            Origin::Node(node) => Some(*node).filter(|node| *node == cx.leader),
        };
        if found_by != Some(self.holder) {
            return Err(Forbidden::NotItself { node: self.holder }.into());
        }
        standing_node(state, self.holder)?;
        let Some(context) = state.contexts.get(&self.context).cloned() else {
            return Err(Missing::Context(self.context.clone()).into());
        };
        // Its holder has to have the slot for as long as the version is not over.
        if self.slot != context.slot && !state.slots.contains(&self.slot) {
            return Err(Missing::Slot(self.slot.clone()).into());
        }
        let numbers = [self.version, self.floor.max(1)];
        if let Some(wrong) = numbers.iter().find(|number| !(1..=MAX_ADOPTED).contains(*number)) {
            return Err(Invalid::VersionNumber {
                context: self.context.clone(),
                version: *wrong,
                next: context.highest_version.saturating_add(1),
            }
            .into());
        }
        Bounded::Label.check(self.label.len(), MAX_LABEL)?;
        let key = VersionKey {
            context: self.context.clone(),
            version: self.version,
        };
        if let Some(known) = state.versions.get(&key) {
            let label = known.label.clone();
            return Err(Existing::Version { label }.into());
        }
        let uid_taken = state.versions.values().any(|v| v.key_uid == self.key_uid);
        if state.label_taken(&self.label) || uid_taken {
            let label = self.label.clone();
            return Err(Existing::Version { label }.into());
        }
        let at = stamp(state, cx);
        // What lies ahead is no time at which it can have been made.
        let made = self.created_at.filter(|made| (1..at).contains(made));
        state.versions.put(
            key,
            KeyVersion {
                key_uid: self.key_uid,
                label: self.label.clone(),
                slot: self.slot.clone(),
                state: VersionState::DecryptOnly,
                origin: KeyOrigin::Adopted {
                    holders: BTreeSet::from([self.holder]),
                    check_record: self.check_record.clone(),
                },
                material: None,
                acks: BTreeSet::new(),
                created_at: made.unwrap_or(at),
                activated_at: None,
                ended_at: Some(at),
                note: String::new(),
                destruction: None,
            },
        )?;
        state.contexts.put(
            self.context.clone(),
            Context {
                highest_version: context.highest_version.max(self.version).max(self.floor),
                ..Context::clone(&context)
            },
        )?;
        Ok(Done::Version {
            context: self.context.clone(),
            version: self.version,
        })
    }
}
