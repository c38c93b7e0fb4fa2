//! Slots and their transport key generations.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::ClusterState;
use super::context::{KeyVersion, VersionKey};
use super::frozen::{SlotV1, SlotV2};
use super::node::Node;
use super::table::{LoadError, Row, RowKind, unknown_version};
use crate::codec::{self, CodecError};
use crate::command::{Bounded, Invalid, Refusal};
use crate::names::{RaftId, SlotName, TransportId, UnixMillis};

/// How far a transport generation protects the keys wrapped under it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TransportMode {
    /// Root on a node can get the slot's keys out; see the security model.
    Standard,
    /// Keys carry `WRAP_WITH_TRUSTED`. Reserved.
    Hardened,
}

/// Where a transport generation is in its life.
///
/// ```text
///              offered ──every member holds it──> current ──the next one is current──> superseded
///                 │                                                                         │
///   the rekey begins again                                                no version is wrapped under it
///                 │                                                                         ▼
///                 └────────────────────────────────> destroying <───────────────────────────┘
///                                                        │ all nodes
///                                                        ▼
///                                                    destroyed
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TransportState {
    /// New KEK versions are wrapped under it.
    Current,
    /// Older versions still name it.
    Superseded,
    /// Gone from the tokens of all nodes that were there; the entry is its tombstone.
    Destroyed,
    /// Made by a rekey, and on its way into every member's token. Nothing is wrapped under it yet.
    Offered,
    /// Being removed from every token: no version names it any more.
    Destroying,
}

impl TransportState {
    /// The state's name in API and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            TransportState::Current => "current",
            TransportState::Superseded => "superseded",
            TransportState::Destroyed => "destroyed",
            TransportState::Offered => "offered",
            TransportState::Destroying => "destroying",
        }
    }

    /// Whether it is on its way out of the tokens, or gone: it is granted to nobody and used for nothing.
    pub fn is_ended(self) -> bool {
        matches!(self, TransportState::Destroying | TransportState::Destroyed)
    }
}

/// Who a transport key was granted to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Grantee {
    /// A node's slot key pair.
    Node(RaftId),
    /// A recovery key pair kept off-line.
    Recovery(String),
    /// A backup recipient.
    Backup(String),
}

/// A transport key wrapped to a grantee.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// The epoch it was sealed in: it is opened with this one, whatever the cluster's is by then.
    pub epoch: u64,
    /// The wrapped key, sealed under the replication key.
    pub blob: Vec<u8>,
}

/// Bytes of a grant's blob that are kept: RSA-4096 and its seal take a tenth.
const MAX_GRANT: usize = 8 << 10;

impl Grant {
    /// Refuses one that is too large, or sealed for an epoch that is yet to come.
    pub(crate) fn check(&self, current: u64) -> Result<(), Refusal> {
        Bounded::Grant.check(self.blob.len(), MAX_GRANT)?;
        check_epoch(self.epoch, current)
    }
}

/// Refuses an epoch that is yet to come: only what the cluster has been in can have been signed or sealed for.
pub(crate) fn check_epoch(epoch: u64, current: u64) -> Result<(), Refusal> {
    if epoch > current {
        return Err(Invalid::Epoch { epoch, current }.into());
    }
    Ok(())
}

/// What a node could not open of a transport key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejected {
    /// Whose grants: none of theirs is taken again.
    pub granters: BTreeSet<RaftId>,
    /// Who made the grant that there is now. Nobody knows it of the first one that was rejected.
    pub latest: Option<RaftId>,
}

/// One transport key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportGeneration {
    /// Its identity: `CKA_ID`, and what sealed keys name.
    pub id: TransportId,
    /// Counts from 1 within the slot.
    pub generation: u32,
    /// Its protection.
    pub mode: TransportMode,
    /// A public constant wrapped under it: a node that holds another key computes another value.
    pub check: Vec<u8>,
    /// Whether it is current.
    pub state: TransportState,
    /// The key wrapped to each grantee.
    pub grants: BTreeMap<Grantee, Grant>,
    /// When it was made.
    pub created_at: UnixMillis,
    /// Nodes that could not open a grant of theirs.
    pub rejected: BTreeMap<RaftId, Rejected>,
    /// The nodes that hold it, as far as a rekey has asked; from `destroying` on, those that have removed it.
    pub acks: BTreeSet<RaftId>,
    /// When the last node had removed it.
    pub ended_at: Option<UnixMillis>,
}

impl TransportGeneration {
    /// From now on every node removes it: nobody is granted it, and the acknowledgements say who has.
    pub(crate) fn end(&mut self) {
        self.state = TransportState::Destroying;
        self.grants.clear();
        self.rejected.clear();
        self.acks.clear();
    }
}

/// A slot that is to get its next transport key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotRekey {
    /// The newest generation when it was asked for. A newer one is what came of it.
    pub after: u32,
    /// When it was asked for.
    pub requested_at: UnixMillis,
}

/// A slot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// Its transport generations, oldest first.
    pub transport: Vec<TransportGeneration>,
    /// The last rekey that was asked for.
    pub rekey: Option<SlotRekey>,
}

impl Slot {
    /// The generation new keys are wrapped under.
    pub fn current_transport(&self) -> Option<&TransportGeneration> {
        self.transport
            .iter()
            .rev()
            .find(|t| t.state == TransportState::Current)
    }

    /// The newest generation's number; 0 before there is one.
    pub fn newest_generation(&self) -> u32 {
        self.transport.last().map_or(0, |newest| newest.generation)
    }

    /// The generation that is on its way to the members.
    pub fn offered_transport(&self) -> Option<&TransportGeneration> {
        self.transport
            .iter()
            .find(|generation| generation.state == TransportState::Offered)
    }

    /// Whether a rekey waits for its transport key to be made.
    pub fn awaits_transport(&self) -> bool {
        let newest = self.newest_generation();
        self.rekey.as_ref().is_some_and(|rekey| rekey.after == newest)
    }

    /// The generation `id`.
    pub fn transport(&self, id: TransportId) -> Option<&TransportGeneration> {
        self.transport.iter().find(|t| t.id == id)
    }
}

impl ClusterState {
    /// Who has yet to acknowledge that a transport key is gone from its token: every member. Nobody, unless it is
    /// `destroying`. Whoever joins removes what it was granted before it is ready, and holds nothing up.
    pub fn owing_transport<'a>(
        &'a self,
        generation: &'a TransportGeneration,
    ) -> impl Iterator<Item = (RaftId, &'a Node)> {
        let is_open = generation.state == TransportState::Destroying;
        self.nodes
            .iter()
            .map(|(id, node)| (*id, &**node))
            .filter(move |(id, node)| is_open && node.is_member() && !generation.acks.contains(id))
    }

    /// The versions whose keys are wrapped under a transport key, whatever their state: while there is one, the key is
    /// needed to import it.
    pub fn wrapped_under<'a>(
        &'a self,
        slot: &'a SlotName,
        id: TransportId,
    ) -> impl Iterator<Item = (&'a VersionKey, &'a KeyVersion)> {
        // What is over has no key.
        self.versions
            .open()
            .map(|(key, version)| (key, &**version))
            .filter(move |(_, version)| {
                let material = version.material.as_ref();
                version.slot == *slot && material.is_some_and(|material| material.transport_id == id)
            })
    }
}

impl Row for Slot {
    const KIND: RowKind = RowKind::Slot;

    fn written(&self) -> Result<(u8, Vec<u8>), CodecError> {
        match SlotV2::of(self) {
            Some(before) => Ok((2, codec::encode(&before)?)),
            None => Ok((Self::VERSION, codec::encode(self)?)),
        }
    }

    fn written_size(&self) -> u64 {
        SlotV2::of(self).map_or_else(|| codec::size(self), |before| codec::size(&before))
    }

    fn decode(version: u8, bytes: &[u8]) -> Result<Self, LoadError> {
        match version {
            1 => Ok(codec::decode::<SlotV1>(bytes)?.into()),
            2 => Ok(codec::decode::<SlotV2>(bytes)?.into()),
            3 => Ok(codec::decode(bytes)?),
            other => Err(unknown_version(Self::KIND, other)),
        }
    }
}
