//! Nodes, their reports, and the tokens that let new ones join.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::COUNTS_USES;
use super::context::VersionKey;
use super::frozen::NodeReportV1;
use super::table::{LoadError, Row, RowKind, unknown_version};
use super::usage::UseCount;
use crate::codec;
use crate::names::{Boot, Incarnation, NodeName, RaftId, SlotName, UnixMillis};

/// A node's public key for one slot, signed by its cluster key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotKey {
    /// SubjectPublicKeyInfo (DER) of the RSA key pair in the node's token.
    pub spki: Vec<u8>,
    /// The epoch it was signed in, which the signature covers: it is verified with this one, whatever the
    /// cluster's is by then.
    pub epoch: u64,
    /// Signature by the node's cluster key over cluster id, epoch, raft id, slot and SPKI.
    pub signature: Vec<u8>,
    /// Certificate (DER) of the cluster key that signed, and its intermediates: whoever acts on the key
    /// verifies them against the cluster's CA, and needs nobody's word for whose key it is.
    pub signer_chain: Vec<Vec<u8>>,
}

/// Bytes of an address that are kept: a host name and a port (RFC 1035) take 259. Addresses go into Raft's
/// membership too, which is one entry for all nodes.
pub(crate) const MAX_ADDRESS: usize = 300;

/// Whether a node belongs to the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeStatus {
    /// Registered, a learner until it has proven every key.
    Joining,
    /// A voter, or about to be.
    Member,
    /// Removed for good; the row is its tombstone.
    Removed {
        /// When.
        at: UnixMillis,
    },
    /// Asked to leave. It votes and serves until it is out of Raft's membership.
    Leaving {
        /// When that was asked.
        at: UnixMillis,
        /// Who takes its place in the same change of the membership, once that node has proven every key. Nobody: it goes
        /// as soon as the others are a quorum without it.
        successor: Option<NodeName>,
    },
}

/// A node, keyed by its raft id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its configured name.
    pub name: NodeName,
    /// Which filling of its data directory this identity belongs to.
    pub incarnation: Incarnation,
    /// `host:port` of its API listener, for people and hints.
    pub api_address: String,
    /// `host:port` of its cluster listener.
    pub cluster_address: String,
    /// Its standing.
    pub status: NodeStatus,
    /// Its slot public keys, immutable for this raft id; only who vouches for one may be renewed.
    pub slot_keys: BTreeMap<SlotName, SlotKey>,
    /// When it was registered.
    pub registered_at: UnixMillis,
}

impl Node {
    /// Whether it is a member: one that is asked to leave is, until it has left.
    pub fn is_member(&self) -> bool {
        matches!(self.status, NodeStatus::Member | NodeStatus::Leaving { .. })
    }

    /// Whether it is asked to leave.
    pub fn is_leaving(&self) -> bool {
        matches!(self.status, NodeStatus::Leaving { .. })
    }

    /// Whether it belongs to the cluster: a member, or joining.
    pub fn is_standing(&self) -> bool {
        !matches!(self.status, NodeStatus::Removed { .. })
    }
}

impl Row for Node {
    const KIND: RowKind = RowKind::Node;
}

/// A slot as its node last reported it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotReport {
    /// Whether the node serves it: ready, and every readable version held.
    pub serving: bool,
    /// `absent`, `locked`, `ready` or `failed`.
    pub state: String,
    /// Readable versions it lacks.
    pub missing_keys: u32,
}

/// A node's latest report, keyed by its raft id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeReport {
    /// Counts the node's reports; older ones are ignored.
    pub seq: u64,
    /// Must be the node's registered incarnation.
    pub incarnation: Incarnation,
    /// Which run of its process reported: what a later run starts with is compared with this.
    pub boot: Boot,
    /// The node's wall clock when it reported.
    pub clock: UnixMillis,
    /// Last index that was committed and durable there. It only grows: a later run whose log ends below
    /// it has been rolled back.
    pub durable_index: u64,
    /// `Some(i)`: with state as of index i, every readable version is held and proven.
    pub proven_at: Option<u64>,
    /// The highest feature level it understands.
    pub feature_level: u32,
    /// Its slots.
    pub slots: BTreeMap<SlotName, SlotReport>,
    /// Uses of key versions since its report before, of at most [`MAX_USES`] versions. They are kept with the
    /// report, so that a node that never heard an answer sees which of its counts were taken.
    pub uses: BTreeMap<VersionKey, UseCount>,
}

/// Versions whose uses one report counts: with names of any length a third of what a report may be.
pub const MAX_USES: usize = 256;
/// Encryptions, and decryptions, of one version that one report counts: no node comes to so many between two reports,
/// and one that lies takes four billion reports to make a sum meaningless.
pub const MAX_COUNT: u64 = 1 << 32;

impl NodeReport {
    /// Whether the node counts uses: only then does a report that names none of a version say that there was none.
    pub fn counts_uses(&self) -> bool {
        self.feature_level >= COUNTS_USES
    }
}

impl Row for NodeReport {
    const KIND: RowKind = RowKind::Report;

    fn decode(version: u8, bytes: &[u8]) -> Result<Self, LoadError> {
        match version {
            1 => Ok(codec::decode::<NodeReportV1>(bytes)?.into()),
            2 => Ok(codec::decode(bytes)?),
            other => Err(unknown_version(Self::KIND, other)),
        }
    }
}

/// A one-time join token, keyed by the index that made it. Only a hash of its secret is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinToken {
    /// SHA-256 of the secret.
    pub secret_hash: [u8; 32],
    /// Good until then, by the clock of whoever proposes the use.
    pub expires_at: UnixMillis,
    /// If set, only a node of this name may use it.
    pub node: Option<NodeName>,
    /// Who used it.
    pub used_by: Option<RaftId>,
}

impl Row for JoinToken {
    const KIND: RowKind = RowKind::JoinToken;
}
