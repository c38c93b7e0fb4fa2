//! Contexts and their key versions.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::frozen::{ContextV1, KeyVersionV1, KeyVersionV2, KeyVersionV3};
use super::lease::MAX_INVOCATIONS;
use super::table::{LoadError, Row, RowKey, RowKind, unknown_version};
use crate::codec;
use crate::names::{ContextName, ContextUid, KeyUid, RaftId, SlotName, TransportId, UnixMillis};

/// What of the caller's certificate is bound into each ciphertext of a context. Fixed at creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BindingMode {
    /// Nothing.
    None,
    /// The first OU: every certificate of the unit can decrypt.
    Shared,
    /// The CN: only the same name can decrypt. v1's default.
    Private,
}

/// When versions are replaced and put away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotationPolicy {
    /// Days after activation at which a new version is due; 0 = never by age.
    pub interval_days: u32,
    /// Versions kept readable whatever their age.
    pub max_versions: u32,
    /// Days since retirement before `cleanup` may disable a version.
    pub cleanup_after_days: u32,
    /// AES-GCM invocations under one version in the whole cluster, [`MAX_INVOCATIONS`] at most. A new version is due
    /// before nine tenths of them are given out.
    pub max_invocations: u64,
}

impl Default for RotationPolicy {
    fn default() -> Self {
        Self {
            interval_days: 90,
            max_versions: 3,
            cleanup_after_days: 30,
            max_invocations: MAX_INVOCATIONS,
        }
    }
}

/// A context: one name, one line of key versions, one slot for those that are still to come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Context {
    /// Immutable identity.
    pub uid: ContextUid,
    /// The slot in which its next versions are made. Those there are stay where they are: [`KeyVersion::slot`].
    pub slot: SlotName,
    /// What ciphertexts are bound to.
    pub binding: BindingMode,
    /// Rotation and retention.
    pub policy: RotationPolicy,
    /// Highest version number ever given out; never decreases, never reused.
    pub highest_version: u32,
    /// The active version, if any.
    pub active_version: Option<u32>,
    /// When it was created.
    pub created_at: UnixMillis,
}

impl Row for Context {
    const KIND: RowKind = RowKind::Context;

    fn decode(version: u8, bytes: &[u8]) -> Result<Self, LoadError> {
        match version {
            1 => Ok(codec::decode::<ContextV1>(bytes)?.into()),
            2 => Ok(codec::decode(bytes)?),
            other => Err(unknown_version(Self::KIND, other)),
        }
    }
}

/// The state of a key version. Undoing a destruction makes the version what it was when it was scheduled. What was adopted
/// can also be released while it is retired or disabled: it is abandoned then.
///
/// ```text
/// pending ──activate──> active ──next version active──> decrypt_only <──disable, enable──> disabled
///    │                                                       ▲                               ▲
///    └──abandon──> abandoned                                 └───────────────┬───────────────┘
///                                                                            │ schedule, undo
///                                                                            ▼
///                                                                    destroy_scheduled
///                                                                            │ the wait is over
///                                                                            ▼
///                                              destroyed <──all nodes──  destroying
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VersionState {
    /// Made by the leader, being imported by the members. Readable where imported.
    Pending,
    /// New ciphertexts use it.
    Active,
    /// Retired: decrypts only.
    DecryptOnly,
    /// Decrypts nothing until enabled again.
    Disabled,
    /// Will be destroyed after its wait; can be undone.
    DestroyScheduled,
    /// Being removed from every token; no use anywhere.
    Destroying,
    /// Gone from the tokens of all nodes that were there; the row is its tombstone.
    Destroyed,
    /// Never became active, or was adopted and given back to version 1; its number is not used again.
    Abandoned,
}

impl VersionState {
    /// Whether a version may go from this state to `next`. The table is the drawing above.
    pub fn may_become(self, next: VersionState) -> bool {
        use VersionState::*;
        matches!(
            (self, next),
            (Pending, Active | Abandoned)
                | (Active, DecryptOnly)
                | (DecryptOnly, Disabled | DestroyScheduled)
                | (Disabled, DecryptOnly | DestroyScheduled)
                | (DestroyScheduled, Disabled | DecryptOnly | Destroying)
                | (Destroying, Destroyed)
        )
    }

    /// Whether nodes hold it in their tokens and decrypt with it.
    pub fn is_readable(self) -> bool {
        matches!(
            self,
            VersionState::Pending | VersionState::Active | VersionState::DecryptOnly
        )
    }

    /// Whether nothing can be done with it any more: its row is a tombstone.
    pub fn is_over(self) -> bool {
        matches!(self, VersionState::Destroyed | VersionState::Abandoned)
    }

    /// The state's name in API and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            VersionState::Pending => "pending",
            VersionState::Active => "active",
            VersionState::DecryptOnly => "decrypt_only",
            VersionState::Disabled => "disabled",
            VersionState::DestroyScheduled => "destroy_scheduled",
            VersionState::Destroying => "destroying",
            VersionState::Destroyed => "destroyed",
            VersionState::Abandoned => "abandoned",
        }
    }
}

/// Where a version's key comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KeyOrigin {
    /// Made inside a token of this cluster and replicated.
    Generated,
    /// Found in a token of version 1: it cannot be extracted, so it is of use only where that token is, or a copy of
    /// it. It decrypts and never encrypts.
    Adopted {
        /// The nodes whose tokens hold it: the one that found it, and those that have proven since that they do.
        holders: BTreeSet<RaftId>,
        /// Made by the node that found it. It stays with the tombstone: whoever finds a key of the version's label
        /// later destroys it only if this proves that it is that key.
        check_record: Vec<u8>,
    },
}

impl KeyOrigin {
    /// Whether a node has to hold a key of this origin: what was adopted is only where it was found.
    pub fn concerns(&self, node: RaftId) -> bool {
        match self {
            KeyOrigin::Generated => true,
            KeyOrigin::Adopted { holders, .. } => holders.contains(&node),
        }
    }

    /// Whether it was found in a token of version 1.
    pub fn is_adopted(&self) -> bool {
        matches!(self, KeyOrigin::Adopted { .. })
    }
}

/// What every node needs to import a version: present while the version can be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyMaterial {
    /// The transport generation it is wrapped under.
    pub transport_id: TransportId,
    /// The wrapped key, sealed under the replication key.
    pub sealed_key: Vec<u8>,
    /// The check record: a GCM ciphertext of a fixed text under the key.
    pub check_record: Vec<u8>,
}

/// A key version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyVersion {
    /// `CKA_ID` of its objects.
    pub key_uid: KeyUid,
    /// `CKA_LABEL`, the API's `key_id`.
    pub label: String,
    /// The slot whose tokens hold it, for good.
    pub slot: SlotName,
    /// Where it is in its life.
    pub state: VersionState,
    /// Where its key comes from.
    pub origin: KeyOrigin,
    /// What importing it takes; removed at destruction. What was adopted has none: it cannot be imported anywhere.
    pub material: Option<KeyMaterial>,
    /// The nodes that imported and proved it; from `destroying` on, those that have removed it.
    pub acks: BTreeSet<RaftId>,
    /// When it was prepared. This and the next two are the leader's wall clock, as far as the voters' reports do not
    /// contradict it.
    pub created_at: UnixMillis,
    /// When it became active.
    pub activated_at: Option<UnixMillis>,
    /// When it was retired or abandoned.
    pub ended_at: Option<UnixMillis>,
    /// Why it was abandoned, for people.
    pub note: String,
    /// Its way to the end, once that is scheduled and unless it is undone.
    pub destruction: Option<Destruction>,
}

impl KeyVersion {
    /// Reads a row from before version 4, which does not say where the key is: where its context was, because no context
    /// had moved yet.
    pub fn decode_unplaced(version: u8, bytes: &[u8], slot: &SlotName) -> Result<Self, LoadError> {
        let unplaced: KeyVersionV3 = match version {
            1 => codec::decode::<KeyVersionV1>(bytes)?.into(),
            2 => codec::decode::<KeyVersionV2>(bytes)?.into(),
            3 => codec::decode(bytes)?,
            other => return Err(unknown_version(RowKind::Version, other)),
        };
        Ok(unplaced.in_slot(slot.clone()))
    }

    /// The record that proves its key, wherever that came from; `None` once a generated key has left the state.
    pub fn check_record(&self) -> Option<&[u8]> {
        match (&self.material, &self.origin) {
            (Some(material), _) => Some(&material.check_record),
            (None, KeyOrigin::Adopted { check_record, .. }) => Some(check_record),
            (None, KeyOrigin::Generated) => None,
        }
    }
}

impl Row for KeyVersion {
    const KIND: RowKind = RowKind::Version;
    const ENDS: bool = true;

    fn is_over(&self) -> bool {
        self.state.is_over()
    }

    fn decode(version: u8, bytes: &[u8]) -> Result<Self, LoadError> {
        match version {
            // Whoever has the contexts reads them with `decode_unplaced`.
            1..=3 => Err(LoadError::Damaged(format!(
                "a {} row of version {version} without its context",
                Self::KIND
            ))),
            4 => Ok(codec::decode(bytes)?),
            other => Err(unknown_version(Self::KIND, other)),
        }
    }
}

/// A version's way to its end. The times are for people; what is waited for is `elapsed_ms`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Destruction {
    /// Index of the entry that scheduled it: tells this wait from one that was undone before it.
    pub scheduled_by: u64,
    /// When it was scheduled.
    pub scheduled_at: UnixMillis,
    /// What the version was until then, and is again if it is undone: `decrypt_only` or `disabled`.
    pub from: VersionState,
    /// How long it can be undone, in milliseconds.
    pub wait_ms: u64,
    /// How much of that has passed: monotonic time that leaders have reported, so that no wall clock, however
    /// wrong, destroys anything. Without a leader it stands still.
    pub elapsed_ms: u64,
    /// When the wait was over and the key left the state.
    pub begun_at: Option<UnixMillis>,
    /// The transport generation that its key was wrapped under, once the key has left the state: copies in old logs,
    /// snapshots and backups can be opened for as long as that one lives.
    pub sealed_under: Option<TransportId>,
    /// The nodes that had acknowledged to hold the version when the key left the state: of those that join, only they
    /// owe an acknowledgement that it is gone.
    pub held_by: BTreeSet<RaftId>,
    /// When the last node had acknowledged.
    pub ended_at: Option<UnixMillis>,
}

impl Destruction {
    /// Whether its wait is over.
    pub fn is_due(&self) -> bool {
        self.elapsed_ms >= self.wait_ms
    }
}

/// Key of a version's row: context, then number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct VersionKey {
    /// The context.
    pub context: ContextName,
    /// The version number, from 1.
    pub version: u32,
}

impl RowKey for VersionKey {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = self.context.as_str().as_bytes().to_vec();
        // Names hold no zero byte, so keys of one context stay together and in order.
        bytes.push(0);
        bytes.extend_from_slice(&self.version.to_be_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (name, number) = bytes.split_at_checked(bytes.len().checked_sub(5)?)?;
        let (&0, number) = number.split_first()? else {
            return None;
        };
        Some(Self {
            context: ContextName::new(std::str::from_utf8(name).ok()?).ok()?,
            version: u32::from_be_bytes(number.try_into().ok()?),
        })
    }
}
