//! `ResealKeys`: the leader has sealed records anew, under the replication key that is the cluster's now. Each names the
//! digest of the one it replaces, so that nothing that has changed meanwhile is overwritten. With the last of them the
//! former key is retired: nothing names it any more.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{ApplyContext, Done, Missing, Refusal, require_leader};
use crate::names::{ContextName, RaftId, SlotName, TransportId};
use crate::state::ClusterState;
use crate::state::context::{KeyMaterial, KeyVersion, VersionKey};
use crate::state::replication::{Replication, ReplicationKeyId, named_by};
use crate::state::slot::{Grant, Grantee, Slot};

/// Retired keys that are remembered; the oldest go first.
const MAX_RETIRED: usize = 256;

/// A version's key, sealed anew.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResealedKey {
    /// The context.
    pub context: ContextName,
    /// The version.
    pub version: u32,
    /// SHA-256 of the record it replaces.
    pub replaces: [u8; 32],
    /// The new record.
    pub sealed_key: Vec<u8>,
}

/// A grant, sealed anew.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResealedGrant {
    /// The slot.
    pub slot: SlotName,
    /// The transport key.
    pub id: TransportId,
    /// To whom it is granted.
    pub node: RaftId,
    /// SHA-256 of the record it replaces.
    pub replaces: [u8; 32],
    /// The new record.
    pub blob: Vec<u8>,
}

/// See the module. With nothing in it, it only looks whether there is nothing left.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ResealKeys {
    /// Versions' keys.
    pub keys: Vec<ResealedKey>,
    /// Grants.
    pub grants: Vec<ResealedGrant>,
}

impl ResealKeys {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_leader(state, cx, "reseal_keys")?;
        let trk_id = state.meta().ok_or(Missing::Cluster)?.trk_id;
        let Some(former) = state.replication().and_then(|row| row.former.clone()) else {
            return Ok(Done::Ok);
        };
        for key in &self.keys {
            key.apply(state, trk_id)?;
        }
        for grant in &self.grants {
            grant.apply(state, trk_id)?;
        }
        let is_left = state.keys_sealed_under(former.id).next().is_some()
            || !state.grants_sealed_under(former.id).is_empty();
        if !is_left {
            let mut row = state.replication().cloned().unwrap_or_default();
            row.retired.push(former.id);
            let surplus = row.retired.len().saturating_sub(MAX_RETIRED);
            row.retired.drain(..surplus);
            state.replication.put((), Replication { former: None, ..row })?;
        }
        Ok(Done::Ok)
    }
}

/// Whether a new record takes the place of this one.
fn replaces(old: &[u8], digest: &[u8; 32], new: &[u8], trk_id: ReplicationKeyId) -> bool {
    named_by(new) == Some(trk_id) && <[u8; 32]>::from(Sha256::digest(old)) == *digest
}

impl ResealedKey {
    fn apply(&self, state: &mut ClusterState, trk_id: ReplicationKeyId) -> Result<(), Refusal> {
        let key = VersionKey {
            context: self.context.clone(),
            version: self.version,
        };
        let Some(version) = state.versions.get(&key).map(|row| KeyVersion::clone(row)) else {
            return Ok(());
        };
        let Some(material) = &version.material else {
            return Ok(());
        };
        if !replaces(&material.sealed_key, &self.replaces, &self.sealed_key, trk_id) {
            return Ok(());
        }
        let material = KeyMaterial {
            sealed_key: self.sealed_key.clone(),
            ..material.clone()
        };
        let resealed = KeyVersion {
            material: Some(material),
            ..version
        };
        state.versions.put(key, resealed)
    }
}

impl ResealedGrant {
    fn apply(&self, state: &mut ClusterState, trk_id: ReplicationKeyId) -> Result<(), Refusal> {
        let Some(mut slot) = state.slots.get(&self.slot).map(|slot| Slot::clone(slot)) else {
            return Ok(());
        };
        let generation = slot.transport.iter_mut().find(|it| it.id == self.id);
        let grant = generation.and_then(|it| it.grants.get_mut(&Grantee::Node(self.node)));
        let Some(grant) = grant.filter(|it| replaces(&it.blob, &self.replaces, &self.blob, trk_id)) else {
            return Ok(());
        };
        let resealed = Grant {
            blob: self.blob.clone(),
            ..grant.clone()
        };
        resealed.check(state.epoch())?;
        *grant = resealed;
        state.slots.put(self.slot.clone(), slot)
    }
}
