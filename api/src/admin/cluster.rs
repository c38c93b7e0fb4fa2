//! The admin routes about the cluster itself: making it, joining it, its members and its state.

use serde::{Deserialize, Serialize};

use crate::wire::{SecretText, words};

words! {
    /// What a node is doing in its Raft, as it sees itself.
    pub enum NodeRole {
        /// It leads.
        Leader = "leader",
        /// A voter that follows a leader.
        Follower = "follower",
        /// It receives the log and does not vote yet.
        Learner = "learner",
        /// It asks for votes: there is no leader it knows.
        Candidate = "candidate",
        /// It belongs to no cluster.
        Uninitialised = "uninitialised",
    }
}

words! {
    /// What a member is to the cluster.
    pub enum MemberRole {
        /// It counts for the quorum.
        Voter = "voter",
        /// It receives the log and does not count.
        Learner = "learner",
    }
}

words! {
    /// State of a slot on one node.
    pub enum SlotState {
        /// No token with this label.
        Absent = "absent",
        /// The token waits for its PIN.
        Locked = "locked",
        /// It serves.
        Ready = "ready",
        /// It does not, and `reason` says why.
        Failed = "failed",
        /// Its node is silent: what that last reported is old news.
        Silent = "silent",
    }
}

words! {
    /// Whether a member is heard.
    pub enum MemberState {
        /// The leader hears it.
        Heard = "heard",
        /// The leader has not heard it for longer than readiness allows (`staleness.ready_ms`), or the node
        /// that answers hears no leader itself.
        Silent = "silent",
    }
}

/// `POST /admin/v1/cluster/init`: everything comes from that node's configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterInitRequest {}

/// Answer of `POST /admin/v1/cluster/init`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterInitResponse {
    /// Id of the new cluster, hex.
    pub cluster_id: String,
    /// Its epoch.
    pub epoch: u64,
    /// Raft id of its first member.
    pub raft_id: u64,
}

/// `POST /admin/v1/cluster/tokens`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinTokenRequest {
    /// How long the token lives; the node has a default and a maximum.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<u64>,
    /// Only this node may use it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_id: Option<String>,
}

/// Answer of `POST /admin/v1/cluster/tokens`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JoinTokenResponse {
    /// Used once, by one node.
    pub token: SecretText,
    /// SHA-256 of the cluster CA's certificate, hex: the joiner checks the cluster with it.
    pub cluster_ca_sha256: String,
    /// When the token dies.
    pub expires_at: String,
}

/// `POST /admin/v1/cluster/join`, sent to the joining node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JoinRequest {
    /// From [`JoinTokenResponse`].
    pub token: SecretText,
    /// From [`JoinTokenResponse`].
    pub cluster_ca_sha256: String,
    /// `host:port` of members' cluster listeners, tried in order.
    pub leader_addresses: Vec<String>,
}

/// Answer of `POST /admin/v1/cluster/join`, once the node votes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinResponse {
    /// Raft id of the new member.
    pub raft_id: u64,
    /// Id of the cluster, hex.
    pub cluster_id: String,
    /// What it is now.
    pub role: MemberRole,
    /// Its slots' node keys as they are registered, to be compared with [`SlotKeysResponse`].
    pub slots: Vec<SlotFingerprint>,
}

/// Answer of `GET /admin/v1/cluster/slot-keys`: of a node that does not vote yet its tokens' own keys, made if
/// there were none; of a voter those that are registered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotKeysResponse {
    /// In the order of their names.
    pub slots: Vec<SlotFingerprint>,
}

/// A node's own public key in one slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotFingerprint {
    /// Name of the slot.
    pub slot: String,
    /// SHA-256 of the DER `SubjectPublicKeyInfo`, hex.
    pub spki_sha256: String,
}

/// Answer of `GET /admin/v1/cluster/status`: one node's view, its own first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// Id of the cluster, hex; empty while uninitialised.
    pub cluster_id: String,
    /// Name of the cluster.
    pub cluster_name: String,
    /// Epoch of the cluster.
    pub epoch: u64,
    /// Name of this node.
    pub node_id: String,
    /// Raft id of this node; 0 while uninitialised.
    pub raft_id: u64,
    /// What it does.
    pub role: NodeRole,
    /// Its Raft term.
    pub term: u64,
    /// The leader it knows.
    pub leader: Option<LeaderRef>,
    /// Index of its last log entry.
    pub last_log_index: u64,
    /// The highest committed index it knows.
    pub committed_index: u64,
    /// Index of the last entry it applied.
    pub applied_index: u64,
    /// Leader: how long ago a quorum last answered.
    pub quorum_ack_age_ms: Option<u64>,
    /// How old its state may be.
    pub staleness_ms: Option<u64>,
    /// What `/readyz` says.
    pub ready: bool,
    /// Why not, if not.
    #[serde(default)]
    pub not_ready: Vec<NotReadyReason>,
    /// Its slots.
    pub slots: Vec<SlotStatus>,
    /// How many more voters may fail before the quorum is lost: those that are silent or behind have failed already. Only the
    /// leader knows who is behind.
    pub failure_tolerance: u32,
    /// How many voters there are; 0 from a node that does not say.
    #[serde(default)]
    pub voters: u32,
    /// How many of them have to agree to a change; 0 from a node that does not say.
    #[serde(default)]
    pub majority: u32,
    /// Names of the voters that are silent, see [`MemberState`].
    #[serde(default)]
    pub silent_voters: Vec<String>,
    /// From the leader: names of the voters that are not silent and that nothing commits with all the same: they are sent a
    /// snapshot, lack much of the log, or have missed a few heartbeats.
    #[serde(default)]
    pub behind_voters: Vec<String>,
    /// What is in use and known to removed nodes; nothing from a node that does not say.
    #[serde(default)]
    pub known_to_removed: KnownToRemoved,
}

/// How much of what is in use nodes know that were removed. `GET /admin/v1/cluster/members` names the contexts,
/// `GET /admin/v1/cluster/rekey` the other keys.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownToRemoved {
    /// Contexts whose active key version one of them holds.
    pub versions: u32,
    /// Slots whose transport key one of them may have.
    pub transport_keys: u32,
    /// Whether one of them has the cluster's replication key.
    pub replication_key: bool,
}

/// The leader as a node knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaderRef {
    /// Its raft id.
    pub raft_id: u64,
    /// Its name.
    pub node_id: String,
}

/// One reason for not being ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotReadyReason {
    /// Stable, snake case.
    pub code: String,
    /// For people.
    pub detail: String,
}

/// A slot of the node that answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotStatus {
    /// Its name in the configuration.
    pub slot: String,
    /// Its token's label.
    pub label: String,
    /// Its state.
    pub state: SlotState,
    /// Why it is not ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Key versions the state names and the token lacks.
    pub missing_keys: u32,
}

/// `POST /admin/v1/slots/{slot}/unlock`, to the node whose slot it is. The answer is a [`SlotStatus`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnlockSlotRequest {
    /// Try the PIN although the token reports wrong ones. Never a PIN that was refused, never the last
    /// attempt, never a locked one.
    #[serde(default)]
    pub retry: bool,
}

words! {
    /// How far a removal has come.
    pub enum RemovalState {
        /// It could be done; asked with `dry_run`.
        Possible = "possible",
        /// The node takes part until its successor has joined and proven every key.
        Waiting = "waiting",
        /// It belongs to the cluster no more.
        Removed = "removed",
        /// It was to leave, and stays.
        Kept = "kept",
    }
}

/// `POST /admin/v1/cluster/members/{node}/remove`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveNodeRequest {
    /// The node that takes its place, in the same change of the membership. It may yet have to join.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub successor: Option<String>,
    /// Although a key that was adopted from version 1 is in this node's token only, and goes with it.
    #[serde(default)]
    pub lose_keys: bool,
    /// Only say whether it could be done.
    #[serde(default)]
    pub dry_run: bool,
}

/// Answer of `POST /admin/v1/cluster/members/{node}/remove`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveNodeResponse {
    /// The node.
    pub node_id: String,
    /// Its raft id.
    pub raft_id: u64,
    /// How far it has come.
    pub state: RemovalState,
    /// Who takes its place, while that is waited for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub successor: Option<String>,
    /// Contexts whose active key version it holds: they are to be rotated once it is removed.
    pub held: Vec<String>,
    /// Voters without it.
    pub voters: u32,
    /// How many of them have to agree to a change.
    pub majority: u32,
    /// How many of them may fail before the quorum is lost: those that are silent have failed already.
    pub failure_tolerance: u32,
}

/// `POST /admin/v1/cluster/members/{node}/keep`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepNodeRequest {}

/// Answer of `POST /admin/v1/cluster/members/{node}/keep`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepNodeResponse {
    /// The node.
    pub node_id: String,
    /// Its raft id.
    pub raft_id: u64,
}

/// `POST /admin/v1/cluster/transfer-leader`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferLeaderRequest {
    /// Raft id of the leader that is to be relieved; once another node leads, it is done. The present one if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<u64>,
    /// Name of the voter that shall lead; the best if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
}

/// Answer of `POST /admin/v1/cluster/transfer-leader`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferLeaderResponse {
    /// Name of the node that leads now.
    pub leader: String,
    /// Its raft id.
    pub raft_id: u64,
    /// Name of the one that led before.
    pub before: String,
}

/// Answer of `GET /admin/v1/cluster/members`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MembersResponse {
    /// In order of their raft ids.
    pub members: Vec<Member>,
    /// Nodes that were members, or began to join, and are removed for good; in order of their raft ids.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<RemovedMember>,
}

/// A node that was removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemovedMember {
    /// Its name, which another node may have by now.
    pub node_id: String,
    /// Its raft id, which nobody else ever gets.
    pub raft_id: u64,
    /// When it was removed.
    pub removed_at: String,
    /// Contexts whose active key version it still holds: they are to be rotated.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held: Vec<String>,
}

/// That a member is to leave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaving {
    /// Since when.
    pub since: String,
    /// The node that takes its place, once it has joined and proven every key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub successor: Option<String>,
}

/// One member. What only a leader knows is absent in a follower's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its name.
    pub node_id: String,
    /// Its raft id.
    pub raft_id: u64,
    /// What it is to the cluster.
    pub role: MemberRole,
    /// Whether it is heard; absent from a node that does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<MemberState>,
    /// `host:port` of its API.
    pub api_address: String,
    /// `host:port` of its cluster listener.
    pub cluster_address: String,
    /// Whether it leads.
    pub is_leader: bool,
    /// How far its log is known to agree with the leader's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub matched_index: Option<u64>,
    /// Entries it lacks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag: Option<u64>,
    /// How long ago it last answered the leader.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seen_ms: Option<u64>,
    /// Its slots, as it last reported them; all silent if it is.
    pub slots: Vec<MemberSlot>,
    /// Of a learner, what keeps it from being let in, with what to do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held_back: Vec<String>,
    /// Of a member that is to leave.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leaving: Option<Leaving>,
    /// When it joined.
    pub joined_at: String,
}

/// A slot as a member reported it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberSlot {
    /// Its name.
    pub slot: String,
    /// Its state.
    pub state: SlotState,
}
