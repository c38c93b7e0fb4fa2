//! The admin routes about replacing a slot's transport key and the replication key.

use serde::{Deserialize, Serialize};

use crate::wire::words;

words! {
    /// Where a transport key is in its life.
    pub enum TransportKeyState {
        /// Made, and on its way to every member.
        Offered = "offered",
        /// New key versions are wrapped under it.
        Current = "current",
        /// Older versions need it still.
        Superseded = "superseded",
        /// It is being removed from every token.
        Destroying = "destroying",
        /// It is gone from every token.
        Destroyed = "destroyed",
    }
}

words! {
    /// How far a slot's rekey is.
    pub enum RekeyPhase {
        /// Nothing is being replaced.
        Settled = "settled",
        /// The leader makes the new transport key.
        Making = "making",
        /// Every member takes it.
        Granting = "granting",
        /// Contexts get versions that are wrapped under it.
        Rotating = "rotating",
        /// Older versions need the old transport key still.
        Waiting = "waiting",
        /// The old transport key is being removed from every token.
        Destroying = "destroying",
    }
}

/// `POST /admin/v1/cluster/rekey/transport`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RekeyTransportRequest {
    /// The slot.
    pub slot: String,
    /// Give up the transport key that is on its way, and make another one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub restart: bool,
}

/// Answer of `POST /admin/v1/cluster/rekey/transport`: the rekey is begun, and goes on by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RekeyTransportResponse {
    /// The slot.
    pub slot: String,
    /// The generation that is to be replaced.
    pub generation: u32,
}

/// `POST /admin/v1/cluster/rekey/replication`: the new key comes from the nodes' configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RekeyReplicationRequest {}

/// Answer of `POST /admin/v1/cluster/rekey/replication`: the new key is the cluster's, and what is sealed under the
/// former one is being sealed anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RekeyReplicationResponse {
    /// Public id of the cluster's replication key, hex.
    pub key: String,
    /// Public id of the one before, hex.
    pub former: String,
}

/// Answer of `GET /admin/v1/cluster/rekey`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RekeyStatus {
    /// In the order of their names.
    pub slots: Vec<SlotRekey>,
    /// The replication key.
    pub replication: ReplicationRekey,
}

/// How far a slot's rekey is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotRekey {
    /// Its name.
    pub slot: String,
    /// How far it is.
    pub phase: RekeyPhase,
    /// Its transport keys, oldest first.
    pub transport_keys: Vec<TransportKeyInfo>,
    /// Contexts that encrypt under a version that is wrapped under a superseded transport key.
    pub contexts_to_rotate: Vec<String>,
    /// Removed nodes that may have the current transport key: it was made before they left.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub known_to_removed: Vec<String>,
    /// What happens next, or what to do.
    pub next: String,
}

/// A transport key of a slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportKeyInfo {
    /// Its id, hex: `CKA_ID` of its object in every token.
    pub id: String,
    /// Counts from 1 within the slot.
    pub generation: u32,
    /// Where it is in its life.
    pub state: TransportKeyState,
    /// When it was made.
    pub created_at: String,
    /// Key versions that are wrapped under it.
    pub versions: u64,
    /// Members that have yet to take it, or to remove it.
    pub waiting_for: Vec<String>,
}

/// How far the replacement of the replication key is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicationRekey {
    /// Public id of the cluster's replication key, hex.
    pub key: String,
    /// Public id of the one before, hex, while something is sealed under it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub former: Option<String>,
    /// Records that are sealed under it.
    pub records_left: u64,
    /// The nodes' keys, in order of their raft ids.
    pub nodes: Vec<NodeReplicationKeys>,
    /// Removed nodes that have the cluster's replication key.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub known_to_removed: Vec<String>,
    /// Public id of the key, hex, that `cluster rekey replication` would make the cluster's now, if it is worth it: every node
    /// has it, and no removed one has said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_key: Option<String>,
    /// What happens next, or what to do.
    pub next: String,
}

/// The replication keys of one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeReplicationKeys {
    /// Its name.
    pub node_id: String,
    /// Public ids of its keys, hex, as it has said.
    pub keys: Vec<String>,
}
