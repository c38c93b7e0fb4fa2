//! Rows as earlier builds wrote them. Never changed: what lies on disk is read with them, and upgraded. A type that
//! one of them is made of is frozen here too before it changes.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::access::{Acl, RoleEntry};
use super::context::{
    BindingMode, Context, Destruction, KeyMaterial, KeyOrigin, KeyVersion, RotationPolicy, VersionState,
};
use super::lease::MAX_INVOCATIONS;
use super::node::{NodeReport, SlotReport};
use super::slot::{Grant, Grantee, Rejected, Slot, TransportGeneration, TransportMode, TransportState};
use crate::names::{
    Boot, ContextName, ContextUid, Incarnation, KeyUid, RaftId, SlotName, TransportId, UnixMillis,
};

/// Access control before there was more than a unit's contexts; also what
/// [`CreateCluster`](crate::command::CreateCluster) carries, because a configuration says no more.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AclV1 {
    /// See [`Acl::mappings`].
    pub mappings: BTreeMap<String, BTreeSet<ContextName>>,
    /// See [`Acl::roles`].
    pub roles: Vec<RoleEntry>,
}

impl From<AclV1> for Acl {
    fn from(before: AclV1) -> Self {
        Self {
            mappings: before.mappings,
            roles: before.roles,
            operations: BTreeMap::new(),
            rules: Vec::new(),
        }
    }
}

/// Rotation and retention before invocations had a limit; also what
/// [`CreateContextV1`](crate::command::CreateContextV1) carries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotationPolicyV1 {
    /// See [`RotationPolicy::interval_days`].
    pub interval_days: u32,
    /// See [`RotationPolicy::max_versions`].
    pub max_versions: u32,
    /// See [`RotationPolicy::cleanup_after_days`].
    pub cleanup_after_days: u32,
}

impl From<RotationPolicyV1> for RotationPolicy {
    fn from(before: RotationPolicyV1) -> Self {
        Self {
            interval_days: before.interval_days,
            max_versions: before.max_versions,
            cleanup_after_days: before.cleanup_after_days,
            max_invocations: MAX_INVOCATIONS,
        }
    }
}

/// A context before invocations had a limit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextV1 {
    /// See [`Context::uid`].
    pub uid: ContextUid,
    /// See [`Context::slot`].
    pub slot: SlotName,
    /// See [`Context::binding`].
    pub binding: BindingMode,
    /// See [`Context::policy`].
    pub policy: RotationPolicyV1,
    /// See [`Context::highest_version`].
    pub highest_version: u32,
    /// See [`Context::active_version`].
    pub active_version: Option<u32>,
    /// See [`Context::created_at`].
    pub created_at: UnixMillis,
}

impl From<ContextV1> for Context {
    fn from(before: ContextV1) -> Self {
        Self {
            uid: before.uid,
            slot: before.slot,
            binding: before.binding,
            policy: before.policy.into(),
            highest_version: before.highest_version,
            active_version: before.active_version,
            created_at: before.created_at,
        }
    }
}

/// Where a key came from before an adopted one had a check record. No command made an adopted one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KeyOriginV1 {
    /// See [`KeyOrigin::Generated`].
    Generated,
    /// See [`KeyOrigin::Adopted`].
    Adopted {
        /// The nodes that proved they hold it.
        holders: BTreeSet<RaftId>,
    },
}

impl From<KeyOriginV1> for KeyOrigin {
    fn from(before: KeyOriginV1) -> Self {
        match before {
            KeyOriginV1::Generated => Self::Generated,
            KeyOriginV1::Adopted { holders } => Self::Adopted {
                holders,
                check_record: Vec::new(),
            },
        }
    }
}

/// A key version before there was a way to its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyVersionV1 {
    /// See [`KeyVersion::key_uid`].
    pub key_uid: KeyUid,
    /// See [`KeyVersion::label`].
    pub label: String,
    /// See [`KeyVersion::state`]. No command made one `disabled`, or anything after that.
    pub state: VersionState,
    /// See [`KeyVersion::origin`].
    pub origin: KeyOriginV1,
    /// See [`KeyVersion::material`].
    pub material: Option<KeyMaterial>,
    /// See [`KeyVersion::acks`].
    pub acks: BTreeSet<RaftId>,
    /// See [`KeyVersion::created_at`].
    pub created_at: UnixMillis,
    /// See [`KeyVersion::activated_at`].
    pub activated_at: Option<UnixMillis>,
    /// See [`KeyVersion::ended_at`].
    pub ended_at: Option<UnixMillis>,
    /// See [`KeyVersion::note`].
    pub note: String,
}

impl From<KeyVersionV1> for KeyVersionV3 {
    fn from(before: KeyVersionV1) -> Self {
        Self {
            key_uid: before.key_uid,
            label: before.label,
            state: before.state,
            origin: before.origin.into(),
            material: before.material,
            acks: before.acks,
            created_at: before.created_at,
            activated_at: before.activated_at,
            ended_at: before.ended_at,
            note: before.note,
            destruction: None,
        }
    }
}

/// A key version before an adopted one had a check record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyVersionV2 {
    /// See [`KeyVersion::key_uid`].
    pub key_uid: KeyUid,
    /// See [`KeyVersion::label`].
    pub label: String,
    /// See [`KeyVersion::state`].
    pub state: VersionState,
    /// See [`KeyVersion::origin`].
    pub origin: KeyOriginV1,
    /// See [`KeyVersion::material`].
    pub material: Option<KeyMaterial>,
    /// See [`KeyVersion::acks`].
    pub acks: BTreeSet<RaftId>,
    /// See [`KeyVersion::created_at`].
    pub created_at: UnixMillis,
    /// See [`KeyVersion::activated_at`].
    pub activated_at: Option<UnixMillis>,
    /// See [`KeyVersion::ended_at`].
    pub ended_at: Option<UnixMillis>,
    /// See [`KeyVersion::note`].
    pub note: String,
    /// See [`KeyVersion::destruction`].
    pub destruction: Option<Destruction>,
}

impl From<KeyVersionV2> for KeyVersionV3 {
    fn from(before: KeyVersionV2) -> Self {
        Self {
            key_uid: before.key_uid,
            label: before.label,
            state: before.state,
            origin: before.origin.into(),
            material: before.material,
            acks: before.acks,
            created_at: before.created_at,
            activated_at: before.activated_at,
            ended_at: before.ended_at,
            note: before.note,
            destruction: before.destruction,
        }
    }
}

/// A key version before it said in which slot it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyVersionV3 {
    /// See [`KeyVersion::key_uid`].
    pub key_uid: KeyUid,
    /// See [`KeyVersion::label`].
    pub label: String,
    /// See [`KeyVersion::state`].
    pub state: VersionState,
    /// See [`KeyVersion::origin`].
    pub origin: KeyOrigin,
    /// See [`KeyVersion::material`].
    pub material: Option<KeyMaterial>,
    /// See [`KeyVersion::acks`].
    pub acks: BTreeSet<RaftId>,
    /// See [`KeyVersion::created_at`].
    pub created_at: UnixMillis,
    /// See [`KeyVersion::activated_at`].
    pub activated_at: Option<UnixMillis>,
    /// See [`KeyVersion::ended_at`].
    pub ended_at: Option<UnixMillis>,
    /// See [`KeyVersion::note`].
    pub note: String,
    /// See [`KeyVersion::destruction`].
    pub destruction: Option<Destruction>,
}

impl KeyVersionV3 {
    /// Where its context was.
    pub fn in_slot(self, slot: SlotName) -> KeyVersion {
        KeyVersion {
            key_uid: self.key_uid,
            label: self.label,
            slot,
            state: self.state,
            origin: self.origin,
            material: self.material,
            acks: self.acks,
            created_at: self.created_at,
            activated_at: self.activated_at,
            ended_at: self.ended_at,
            note: self.note,
            destruction: self.destruction,
        }
    }
}

/// A node's report before it counted uses; also what [`ReportNodeV1`](crate::command::ReportNodeV1) carries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeReportV1 {
    /// See [`NodeReport::seq`].
    pub seq: u64,
    /// See [`NodeReport::incarnation`].
    pub incarnation: Incarnation,
    /// See [`NodeReport::boot`].
    pub boot: Boot,
    /// See [`NodeReport::clock`].
    pub clock: UnixMillis,
    /// See [`NodeReport::durable_index`].
    pub durable_index: u64,
    /// See [`NodeReport::proven_at`].
    pub proven_at: Option<u64>,
    /// See [`NodeReport::feature_level`].
    pub feature_level: u32,
    /// See [`NodeReport::slots`].
    pub slots: BTreeMap<SlotName, SlotReport>,
}

impl From<NodeReportV1> for NodeReport {
    fn from(before: NodeReportV1) -> Self {
        Self {
            seq: before.seq,
            incarnation: before.incarnation,
            boot: before.boot,
            clock: before.clock,
            durable_index: before.durable_index,
            proven_at: before.proven_at,
            feature_level: before.feature_level,
            slots: before.slots,
            uses: BTreeMap::new(),
        }
    }
}

/// A transport key before a grant of it could be rejected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportGenerationV1 {
    /// See [`TransportGeneration::id`].
    pub id: TransportId,
    /// See [`TransportGeneration::generation`].
    pub generation: u32,
    /// See [`TransportGeneration::mode`].
    pub mode: TransportMode,
    /// See [`TransportGeneration::check`].
    pub check: Vec<u8>,
    /// See [`TransportGeneration::state`].
    pub state: TransportState,
    /// See [`TransportGeneration::grants`].
    pub grants: BTreeMap<Grantee, Grant>,
    /// See [`TransportGeneration::created_at`].
    pub created_at: UnixMillis,
}

impl From<TransportGenerationV1> for TransportGeneration {
    fn from(before: TransportGenerationV1) -> Self {
        Self {
            id: before.id,
            generation: before.generation,
            mode: before.mode,
            check: before.check,
            state: before.state,
            grants: before.grants,
            created_at: before.created_at,
            rejected: BTreeMap::new(),
            acks: BTreeSet::new(),
            ended_at: None,
        }
    }
}

/// A slot before a grant of its transport keys could be rejected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotV1 {
    /// See [`Slot::transport`].
    pub transport: Vec<TransportGenerationV1>,
}

impl From<SlotV1> for Slot {
    fn from(before: SlotV1) -> Self {
        Self {
            transport: before.transport.into_iter().map(Into::into).collect(),
            rekey: None,
        }
    }
}

/// A transport key before one could be replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportGenerationV2 {
    /// See [`TransportGeneration::id`].
    pub id: TransportId,
    /// See [`TransportGeneration::generation`].
    pub generation: u32,
    /// See [`TransportGeneration::mode`].
    pub mode: TransportMode,
    /// See [`TransportGeneration::check`].
    pub check: Vec<u8>,
    /// See [`TransportGeneration::state`].
    pub state: TransportState,
    /// See [`TransportGeneration::grants`].
    pub grants: BTreeMap<Grantee, Grant>,
    /// See [`TransportGeneration::created_at`].
    pub created_at: UnixMillis,
    /// See [`TransportGeneration::rejected`].
    pub rejected: BTreeMap<RaftId, Rejected>,
}

impl TransportGenerationV2 {
    /// A transport key in this form, if it says all of it: nothing has happened to it that only a rekey does.
    fn of(now: &TransportGeneration) -> Option<Self> {
        let rekeyed = matches!(now.state, TransportState::Offered | TransportState::Destroying)
            || !now.acks.is_empty()
            || now.ended_at.is_some();
        (!rekeyed).then(|| Self {
            id: now.id,
            generation: now.generation,
            mode: now.mode,
            check: now.check.clone(),
            state: now.state,
            grants: now.grants.clone(),
            created_at: now.created_at,
            rejected: now.rejected.clone(),
        })
    }
}

impl From<TransportGenerationV2> for TransportGeneration {
    fn from(before: TransportGenerationV2) -> Self {
        Self {
            id: before.id,
            generation: before.generation,
            mode: before.mode,
            check: before.check,
            state: before.state,
            grants: before.grants,
            created_at: before.created_at,
            rejected: before.rejected,
            acks: BTreeSet::new(),
            ended_at: None,
        }
    }
}

/// A slot before its transport key could be replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotV2 {
    /// See [`Slot::transport`].
    pub transport: Vec<TransportGenerationV2>,
}

impl SlotV2 {
    /// A slot in this form, if it says all of it: nobody has asked for another transport key there.
    pub(crate) fn of(now: &Slot) -> Option<Self> {
        if now.rekey.is_some() {
            return None;
        }
        let generations = now.transport.iter().map(TransportGenerationV2::of);
        Some(Self {
            transport: generations.collect::<Option<_>>()?,
        })
    }
}

impl From<SlotV2> for Slot {
    fn from(before: SlotV2) -> Self {
        Self {
            transport: before.transport.into_iter().map(Into::into).collect(),
            rekey: None,
        }
    }
}
