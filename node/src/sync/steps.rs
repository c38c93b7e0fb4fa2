//! Taking one step in a token: the blocking half of every action. A step that concerns the cluster ends
//! in a proposal, which is made afterwards. Nothing is imported under a transport key that is not the
//! committed one, and no sealed record is trusted before it has been opened with the replication key.

mod transport;

use std::sync::Arc;

use hsm_core::replication::{ClusterKey, SealError, SealedKeyContext};
use hsm_core::{AdoptKek, HsmError, ImportKek, Slot};
use raft_store::command::{AckDestroyed, LeaseInvocations, Op};
use raft_store::names::{ContextName, KeyUid, RaftId, SlotName, TransportId};
use raft_store::state::context::{KeyMaterial, KeyVersion, VersionKey, VersionState};
use raft_store::state::slot::TransportGeneration;
use raft_store::state::{ClusterMeta, ClusterState};
use zeroize::Zeroizing;

use super::convert::{to_token_key, to_token_transport};
use super::held::{Effect, kek_use};
use super::plan::Action;
use super::slot_key::{ClusterSigner, SlotKeyError};
use super::wanted::is_at_hand;
#[cfg(feature = "failpoints")]
use crate::failpoints;
use crate::leases::Leases;

/// What a step works with; owned, so that it can go to a blocking thread.
pub(super) struct Workbench {
    pub(super) slot: Slot,
    pub(super) name: SlotName,
    pub(super) state: ClusterState,
    pub(super) me: RaftId,
    pub(super) cluster_key: Option<Arc<ClusterKey>>,
    /// This node's other replication key, if it has two: what is sealed under that one is opened too.
    pub(super) other_key: Option<Arc<ClusterKey>>,
    pub(super) signer: Option<Arc<ClusterSigner>>,
    /// The token's own public key, if it has one yet.
    pub(super) node_spki: Option<Vec<u8>>,
    /// Id of a transport key this node would make; the same one until it is committed.
    pub(super) new_transport: TransportId,
    pub(super) leases: Arc<Leases>,
}

/// What a step came to.
pub(super) struct Outcome {
    pub(super) effect: Effect,
    pub(super) proposal: Option<Op>,
}

/// Why a step was not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum StepError {
    #[error(transparent)]
    Token(#[from] HsmError),
    #[error(transparent)]
    Sealed(#[from] SealError),
    #[error(transparent)]
    SlotKey(#[from] SlotKeyError),
    #[error("{0} is not in the state any more")]
    Gone(&'static str),
    #[error("this node has no key for that: {0}")]
    NoKey(&'static str),
    #[error("transport key {0}: its committed check has {1} bytes: the record is damaged or forged")]
    Check(TransportId, usize),
    #[error("the step ended abnormally: {0}")]
    Abnormal(String),
}

impl StepError {
    /// Somebody may have altered or forged something: it belongs in the audit.
    pub(super) fn is_security(&self) -> bool {
        matches!(
            self,
            Self::Sealed(SealError::Altered { .. })
                | Self::Sealed(SealError::OtherTransportKey { .. })
                | Self::Sealed(SealError::Format { .. })
                | Self::Token(HsmError::TransportCheck { .. })
                | Self::Check(..)
        )
    }

    /// What was granted is not the committed transport key, sealed and wrapped to this token: trying it again does
    /// not help, unless the token itself had a bad moment.
    pub(super) fn is_of_grant(&self) -> bool {
        matches!(
            self,
            Self::Sealed(
                SealError::Altered { .. }
                    | SealError::Format { .. }
                    | SealError::OtherTransportKey { .. }
                    | SealError::OtherReplicationKey { .. }
            ) | Self::Token(HsmError::TransportCheck { .. } | HsmError::Argument { what: "grant", .. })
        )
    }
}

fn done(effect: Effect) -> Result<Outcome, StepError> {
    Ok(Outcome {
        effect,
        proposal: None,
    })
}

fn propose(effect: Effect, op: Op) -> Result<Outcome, StepError> {
    Ok(Outcome {
        effect,
        proposal: Some(op),
    })
}

impl Workbench {
    /// Takes the step. Blocks.
    pub(super) fn take(&self, action: &Action) -> Result<Outcome, StepError> {
        match action {
            Action::RegisterSlotKey => self.register(),
            Action::CreateTransport => self.create_transport(),
            Action::OfferTransport => self.offer_transport(),
            Action::AcceptTransport(id) => self.accept(*id),
            Action::AckTransport(id) => self.acknowledge_transport(*id),
            Action::RemoveTransport(id) => {
                fail::fail_point!("rekey::before_remove_transport");
                self.remove_transport(*id)?;
                done(Effect::TransportGone(*id))
            }
            Action::AckTransportGone(id) => self.acknowledge_transport_gone(*id),
            Action::Prove(key) => self.prove(key),
            Action::Import { key, replace } => self.import(key, *replace),
            Action::Adopt { key, replace } => self.adopt(key, *replace),
            Action::Load(uid, encrypts) => self.load(*uid, *encrypts),
            Action::Retire(uid) => self.load(*uid, false),
            Action::Ack(versions) => {
                fail::fail_point!("sync::ack_as_other", |_| propose(
                    Effect::Nothing,
                    failpoints::ack_as_other(self.me, versions)
                ));
                propose(Effect::Nothing, self.acknowledge(versions))
            }
            Action::Grant(id, node) => self.grant(*id, *node),
            Action::Unload(uid) => {
                self.slot.unload_kek(to_token_key(*uid))?;
                done(Effect::Unloaded(*uid))
            }
            Action::Remove(uid) => {
                fail::fail_point!("sync::before_remove");
                self.remove(*uid)?;
                fail::fail_point!("sync::after_remove");
                done(Effect::Gone(vec![*uid]))
            }
            Action::RemoveCopy(key) => {
                fail::fail_point!("sync::before_remove");
                done(self.remove_copy(key)?)
            }
            Action::RemoveAdopted(key) => {
                fail::fail_point!("sync::before_remove");
                done(self.remove_adopted(key)?)
            }
            Action::AckDestroyed(versions) => self.acknowledge_destroyed(versions),
        }
    }

    /// Acknowledges what is held, and claims the first invocations with the same entry: a version is activated only
    /// once this node could encrypt under it.
    fn acknowledge(&self, versions: &[(ContextName, u32, KeyUid)]) -> Op {
        let claim = |(context, number, uid): &(ContextName, u32, KeyUid)| {
            let key = VersionKey {
                context: context.clone(),
                version: *number,
            };
            let version = self
                .state
                .versions()
                .get(&key)
                .filter(|version| version.key_uid == *uid)?;
            Some(self.leases.claim(&self.state, self.me, (&key, &**version), true))
        };
        Op::LeaseInvocations(LeaseInvocations {
            node: self.me,
            boot: self.leases.boot(),
            claims: versions.iter().filter_map(claim).collect(),
        })
    }

    /// Destroys whatever is in the token under this id, session copies first. The token is searched again afterwards.
    fn remove(&self, uid: KeyUid) -> Result<(), StepError> {
        let objects = self.slot.destroy_kek(to_token_key(uid))?;
        if objects > 0 {
            let (slot, epoch) = (self.name.as_str(), crate::logging::epoch());
            tracing::info!(target: "audit", epoch, slot, key = %uid, objects, "key of an ended version destroyed");
        }
        Ok(())
    }

    /// As [`Self::remove`], of a key that was given back to version 1, which has to have it.
    fn remove_copy(&self, key: &VersionKey) -> Result<Effect, StepError> {
        let (version, kek, record) = self.adopted(key)?;
        if version.state != VersionState::Abandoned {
            return Err(StepError::Gone("the release of the key version"));
        }
        let (uid, label) = (version.key_uid, version.label.clone());
        let Some(copies) = self.slot.release_adopted_kek(&kek, record)? else {
            return Ok(Effect::Kept(uid, label));
        };
        if copies > 0 {
            let (slot, epoch) = (self.name.as_str(), crate::logging::epoch());
            tracing::info!(
                target: "audit", epoch, slot, key = %uid, label, copies,
                "copy of a released key destroyed; version 1's own stays"
            );
        }
        Ok(Effect::Gone(vec![uid]))
    }

    /// As [`Self::remove`], and the key of version 1 that the version was made of.
    fn remove_adopted(&self, key: &VersionKey) -> Result<Effect, StepError> {
        let (version, kek, record) = self.adopted(key)?;
        let found = self.slot.destroy_adopted_kek(&kek, record)?;
        let (slot, epoch, label) = (
            self.name.as_str(),
            crate::logging::epoch(),
            version.label.as_str(),
        );
        if found.copies + found.originals > 0 {
            tracing::info!(
                target: "audit", epoch, slot, key = %version.key_uid, label, copies = found.copies,
                originals = found.originals, "adopted key of an ended version destroyed, with version 1's own"
            );
        }
        if found.others > 0 {
            tracing::warn!(
                slot,
                label,
                others = found.others,
                "keys of this label are not the one that was adopted; they are left alone"
            );
        }
        Ok(Effect::AdoptedGone {
            uid: version.key_uid,
            label: version.label.clone(),
            others: found.others > 0,
        })
    }

    /// Nothing is acknowledged on the word of an earlier look: each key is searched for by its id, here and now.
    fn acknowledge_destroyed(&self, versions: &[(ContextName, u32, KeyUid)]) -> Result<Outcome, StepError> {
        for (context, version, uid) in versions {
            let key = VersionKey {
                context: context.clone(),
                version: *version,
            };
            let known = self.state.version(context, *version);
            if known.is_some_and(|version| version.origin.is_adopted()) {
                self.remove_adopted(&key)?;
            } else {
                self.remove(*uid)?;
            }
        }
        let gone = versions.iter().map(|(_, _, uid)| *uid).collect();
        let op = AckDestroyed {
            node: self.me,
            versions: versions.to_vec(),
        };
        propose(Effect::Gone(gone), Op::AckDestroyed(op))
    }

    fn meta(&self) -> Result<&ClusterMeta, StepError> {
        self.state.meta().ok_or(StepError::Gone("the cluster"))
    }

    fn key(&self) -> Result<&ClusterKey, StepError> {
        self.cluster_key
            .as_deref()
            .ok_or(StepError::NoKey("the replication key is not the cluster's"))
    }

    /// Opens with the cluster's replication key, or with this node's other one: while one is being replaced, records name
    /// the one or the other.
    fn opened<T>(&self, open: impl Fn(&ClusterKey) -> Result<T, SealError>) -> Result<T, StepError> {
        match (open(self.key()?), self.other_key.as_deref()) {
            (Err(first @ SealError::OtherReplicationKey { .. }), Some(other)) => {
                // Of neither: what is said names the cluster's.
                open(other).map_err(|error| match error {
                    SealError::OtherReplicationKey { .. } => first.into(),
                    error => error.into(),
                })
            }
            (opened, _) => Ok(opened?),
        }
    }

    fn generation(&self, id: TransportId) -> Result<&TransportGeneration, StepError> {
        let slot = self.state.slots().get(&self.name);
        slot.and_then(|slot| slot.transport(id))
            .ok_or(StepError::Gone("the transport key"))
    }

    fn version(&self, key: &VersionKey) -> Result<(&KeyVersion, &KeyMaterial), StepError> {
        let version = self.state.version(&key.context, key.version);
        let version = version.filter(|version| is_at_hand(version.state));
        let version = version.ok_or(StepError::Gone("the key version"))?;
        let material = version
            .material
            .as_ref()
            .ok_or(StepError::Gone("the sealed key"))?;
        Ok((version, material))
    }

    /// Decrypts the check record with the object in the token. `import_kek` does that, and no more, for a
    /// key that is held; one that has vanished meanwhile is refused, because there is nothing to import.
    fn prove(&self, key: &VersionKey) -> Result<Outcome, StepError> {
        let known = self.state.version(&key.context, key.version);
        if known.is_some_and(|version| version.origin.is_adopted()) {
            return self.prove_adopted(key);
        }
        let (version, material) = self.version(key)?;
        let nothing = Zeroizing::new(Vec::new());
        let proven = self
            .slot
            .import_kek(&import_of(key, version, material, nothing, false));
        match proven {
            Ok(()) => done(Effect::Proven(version.key_uid, version.label.clone())),
            Err(error) => unusable(version.key_uid, error),
        }
    }

    /// A version that was adopted, as the token has to know it, and what proves it.
    fn adopted(&self, key: &VersionKey) -> Result<(&KeyVersion, AdoptKek, &[u8]), StepError> {
        let version = self.state.version(&key.context, key.version);
        let version = version.ok_or(StepError::Gone("the key version"))?;
        let record = version
            .check_record()
            .ok_or(StepError::Gone("the check record"))?;
        let kek = AdoptKek {
            key_uid: to_token_key(version.key_uid),
            version: key.version,
            context: key.context.to_string(),
            label: version.label.clone(),
        };
        Ok((version, kek, record))
    }

    /// Proves the copy that is there, of whatever is kept at hand: what is disabled now may be enabled at any moment.
    fn prove_adopted(&self, key: &VersionKey) -> Result<Outcome, StepError> {
        let (version, kek, record) = self.adopted(key)?;
        if !is_at_hand(version.state) {
            return Err(StepError::Gone("the key version"));
        }
        match self.slot.prove_adopted_kek(&kek, record) {
            Ok(()) => done(Effect::Proven(version.key_uid, version.label.clone())),
            Err(error) => unusable(version.key_uid, error),
        }
    }

    /// Makes the copy of a key of version 1, for what can be read now; one that is there is proven.
    fn adopt(&self, key: &VersionKey, replace: bool) -> Result<Outcome, StepError> {
        let (version, kek, record) = self.adopted(key)?;
        if !version.state.is_readable() {
            return Err(StepError::Gone("the key version"));
        }
        fail::fail_point!("sync::before_adopt");
        match self.slot.adopt_kek(&kek, record, replace) {
            Ok(()) => {}
            // Of a copy that is there; without one it says what is wrong with the original.
            Err(error @ (HsmError::Quarantined { .. } | HsmError::Attribute { .. })) if !replace => {
                return unusable(version.key_uid, error);
            }
            Err(error) => return Err(error.into()),
        }
        if replace {
            let (slot, key) = (self.name.as_str(), version.key_uid);
            tracing::warn!(target: "audit", epoch = crate::logging::epoch(), slot, %key, "a key object that must not be used was replaced");
        }
        done(Effect::Proven(version.key_uid, version.label.clone()))
    }

    fn import(&self, key: &VersionKey, replace: bool) -> Result<Outcome, StepError> {
        let (version, material) = self.version(key)?;
        if !version.state.is_readable() {
            return Err(StepError::Gone("the use of the key version"));
        }
        let context = SealedKeyContext {
            cluster_id: self.meta()?.cluster_id.0,
            slot: self.name.as_str(),
            context: key.context.as_str(),
            version: key.version,
            key_uid: to_token_key(version.key_uid),
            transport_id: to_token_transport(material.transport_id),
            check_record: &material.check_record,
        };
        let wrapped = self.opened(|key| key.open_key(&context, &material.sealed_key))?;
        self.compare(self.generation(material.transport_id)?)?;
        fail::fail_point!("rotation::before_import");
        self.slot
            .import_kek(&import_of(key, version, material, wrapped, replace))?;
        if replace {
            let (slot, key) = (self.name.as_str(), version.key_uid);
            tracing::warn!(target: "audit", epoch = crate::logging::epoch(), slot, %key, "a key object that must not be used was replaced");
        }
        fail::fail_point!("rotation::after_import");
        done(Effect::Proven(version.key_uid, version.label.clone()))
    }

    fn load(&self, uid: KeyUid, encrypts: bool) -> Result<Outcome, StepError> {
        match self.slot.load_kek(to_token_key(uid), kek_use(encrypts)) {
            Ok(()) => done(Effect::Loaded(uid, encrypts)),
            Err(error) => unusable(uid, error),
        }
    }
}

fn import_of(
    key: &VersionKey,
    version: &KeyVersion,
    material: &KeyMaterial,
    wrapped: Zeroizing<Vec<u8>>,
    replace: bool,
) -> ImportKek {
    ImportKek {
        key_uid: to_token_key(version.key_uid),
        version: key.version,
        context: key.context.to_string(),
        label: version.label.clone(),
        transport_id: to_token_transport(material.transport_id),
        wrapped,
        check_record: material.check_record.clone(),
        replace,
    }
}

/// An object that is not what it should be is a finding; anything else is a failure of the step.
fn unusable(uid: KeyUid, error: HsmError) -> Result<Outcome, StepError> {
    match error {
        HsmError::Quarantined { .. } | HsmError::CheckRecord { .. } | HsmError::Attribute { .. } => {
            done(Effect::Unusable(uid, error.to_string()))
        }
        error => Err(error.into()),
    }
}
