//! Slots and their transport key generations.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::frozen::SlotV1;
use super::table::{LoadError, Row, RowKind, unknown_version};
use crate::codec;
use crate::command::{Bounded, Invalid, Refusal};
use crate::names::{RaftId, TransportId, UnixMillis};

/// How far a transport generation protects the keys wrapped under it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TransportMode {
    /// Root on a node can get the slot's keys out; see the security model.
    Standard,
    /// Keys carry `WRAP_WITH_TRUSTED`. Reserved.
    Hardened,
}

/// Whether a transport generation is used for new keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TransportState {
    /// New KEK versions are wrapped under it.
    Current,
    /// Older versions still name it.
    Superseded,
    /// Destroyed with the last version that named it.
    Destroyed,
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
}

/// A slot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// Its transport generations, oldest first.
    pub transport: Vec<TransportGeneration>,
}

impl Slot {
    /// The generation new keys are wrapped under.
    pub fn current_transport(&self) -> Option<&TransportGeneration> {
        self.transport
            .iter()
            .rev()
            .find(|t| t.state == TransportState::Current)
    }

    /// The generation `id`.
    pub fn transport(&self, id: TransportId) -> Option<&TransportGeneration> {
        self.transport.iter().find(|t| t.id == id)
    }
}

impl Row for Slot {
    const KIND: RowKind = RowKind::Slot;

    fn decode(version: u8, bytes: &[u8]) -> Result<Self, LoadError> {
        match version {
            1 => Ok(codec::decode::<SlotV1>(bytes)?.into()),
            2 => Ok(codec::decode(bytes)?),
            other => Err(unknown_version(Self::KIND, other)),
        }
    }
}
