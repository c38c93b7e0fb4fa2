//! The admin routes about keys: creating, listing, rotating, moving.

use serde::{Deserialize, Serialize};

use crate::wire::words;

words! {
    /// Where a key version stands in its life.
    pub enum KeyState {
        /// Being imported by every node.
        Pending = "pending",
        /// It encrypts.
        Active = "active",
        /// It only decrypts.
        DecryptOnly = "decrypt_only",
        /// It does nothing, and can come back.
        Disabled = "disabled",
        /// It will be destroyed after a wait that can be undone.
        DestroyScheduled = "destroy_scheduled",
        /// Being removed from every token.
        Destroying = "destroying",
        /// Gone from every token.
        Destroyed = "destroyed",
        /// It was never activated, or was adopted and released; its number is not used again.
        Abandoned = "abandoned",
    }
}

words! {
    /// Where a key version comes from.
    pub enum KeyOrigin {
        /// Made by this cluster, on every node.
        Generated = "generated",
        /// Found in a token of v1; not replicable.
        Adopted = "adopted",
    }
}

words! {
    /// Whom ciphertexts of a context are bound to.
    pub enum BindingMode {
        /// Nobody.
        None = "none",
        /// The first OU of the certificate.
        Shared = "shared",
        /// The CN of the certificate.
        Private = "private",
    }
}

/// `POST /admin/v1/keys`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateKekRequest {
    /// Created too, if the node's configuration maps it to a slot.
    pub context: String,
    /// Label in the token, for people; the default is `kek-<context>-v<N>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Must be the next one, which is the default: for those who want to be sure of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u32>,
    /// Bits; only 256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u32>,
}

impl CreateKekRequest {
    /// The next version of a context, with the default label.
    pub fn new(context: impl Into<String>) -> Self {
        Self {
            context: context.into(),
            label: None,
            version: None,
            size: None,
        }
    }
}

/// Answer of `POST /admin/v1/keys`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateKekResponse {
    /// Its context.
    pub context: String,
    /// Its number.
    pub version: u32,
    /// Its label.
    pub key_id: String,
    /// Its state, normally active.
    pub state: KeyState,
}

/// Answer of `GET /admin/v1/keys`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListKeksResponse {
    /// In order of their names.
    pub contexts: Vec<ContextInfo>,
}

/// A context and its key versions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextInfo {
    /// Its name.
    pub context: String,
    /// The slot that its next versions are made in. Each of those there are names its own.
    pub slot: String,
    /// Whom its ciphertexts are bound to.
    pub binding: BindingMode,
    /// The version that encrypts.
    pub active_version: Option<u32>,
    /// All versions, oldest first.
    pub versions: Vec<KeyVersionInfo>,
}

/// One key version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyVersionInfo {
    /// Its number.
    pub version: u32,
    /// Its label, v1's `key_id`.
    pub key_id: String,
    /// Its `CKA_ID`, hex.
    pub key_uid: String,
    /// The slot whose tokens hold it.
    #[serde(default)]
    pub slot: String,
    /// Its state.
    pub state: KeyState,
    /// When it was made.
    pub created_at: String,
    /// When it began to encrypt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activated_at: Option<String>,
    /// When it stopped encrypting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retired_at: Option<String>,
    /// Names of the nodes that hold it and have proven it; from `destroying` on, of those that have removed it.
    pub acks: Vec<String>,
    /// Where it comes from.
    pub origin: KeyOrigin,
    /// Of an adopted one, names of the nodes whose tokens hold it; there are no others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub holders: Vec<String>,
    /// Its way to its end, once that is scheduled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destruction: Option<DestructionInfo>,
    /// What was given out of it; absent where nothing is encrypted under it, or never was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub invocations: Option<Invocations>,
}

/// AES-GCM invocations under a key version in the whole cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invocations {
    /// Those that were given to nodes, used or not: nine tenths of `limit` at most.
    pub leased: u64,
    /// The limit of its context.
    pub limit: u64,
}

/// A key version's way to its end. Times are for people; what counts is `elapsed_seconds`, which only a leader's
/// monotonic clock brings forward.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DestructionInfo {
    /// When it was scheduled.
    pub scheduled_at: String,
    /// The state it has again if this is undone.
    pub undone: KeyState,
    /// How long it can be undone.
    pub wait_seconds: u64,
    /// How much of that has passed under leaders.
    pub elapsed_seconds: u64,
    /// When the wait was over, and the key left the state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub begun_at: Option<String>,
    /// When the last node had removed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<String>,
    /// Names of the nodes that have yet to remove it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub owing: Vec<String>,
    /// Names of nodes that had acknowledged to hold it and have not joined: each holds up the end until it joins after
    /// all, even if its join has failed for good.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub joining: Vec<String>,
    /// Old logs, snapshots and backups may still hold the key, sealed under a transport key that lives.
    pub remnants_sealed: bool,
}

/// `POST /admin/v1/keys/{context}/versions/{version}/disable`, `…/enable` and `…/release`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyUseRequest {}

/// `POST /admin/v1/keys/{context}/versions/{version}/destroy`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DestroyKeyRequest {
    /// How long it can be undone; the nodes have a default and a minimum.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_seconds: Option<u64>,
    /// Whether a version that was used recently is destroyed all the same.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub override_recent_use: bool,
}

/// `POST /admin/v1/keys/{context}/versions/{version}/undo-destroy`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UndoDestroyRequest {}

/// Answer of a change of one key version: what it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyVersionResponse {
    /// Its context.
    pub context: String,
    /// The version; its members stand beside the context's name.
    #[serde(flatten)]
    pub info: KeyVersionInfo,
}

/// Answer of `GET /admin/v1/keys/usage`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyUsageResponse {
    /// Every version, by context and number.
    pub versions: Vec<KeyUsage>,
}

/// How often a key version was used in the whole cluster, as far as its nodes have reported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyUsage {
    /// Its context.
    pub context: String,
    /// Its number.
    pub version: u32,
    /// Its label.
    pub key_id: String,
    /// Its state.
    pub state: KeyState,
    /// Encryptions.
    pub encryptions: u64,
    /// Decryptions.
    pub decryptions: u64,
    /// When the last of them was, by the clock of the node that says the latest; absent if there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used: Option<String>,
    /// Names of the nodes that used it, with when each last did.
    #[serde(default)]
    pub nodes: Vec<NodeUsage>,
    /// What was given out of it; absent where nothing is encrypted under it, or never was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub invocations: Option<Invocations>,
}

/// A node's last reported use of a key version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeUsage {
    /// The node.
    pub node_id: String,
    /// When, by its clock.
    pub last_used: String,
}

/// `POST /admin/v1/keys/cleanup`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CleanupRequest {
    /// Only this context; absent: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<String>,
    /// Say what would be disabled, and disable nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
}

/// Answer of a clean-up: every retired version, what became of it, and why. Nothing is ever destroyed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CleanupResponse {
    /// Whether it was only looked at.
    pub dry_run: bool,
    /// By context and number.
    pub versions: Vec<CleanupVersion>,
}

/// One retired version in a clean-up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CleanupVersion {
    /// Its context.
    pub context: String,
    /// Its number.
    pub version: u32,
    /// Its label.
    pub key_id: String,
    /// Its slot.
    #[serde(default)]
    pub slot: String,
    /// Whether it is disabled now, or would be.
    pub disabled: bool,
    /// Why it stays, for people; empty if it is disabled.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub kept_because: String,
    /// Whether version 1, which counted the days since a version was made, would have deleted it.
    pub deleted_by_v1: bool,
}

/// Keys that one call adopts at most.
pub const ADOPT_MAX_KEYS: usize = 64;

/// `POST /admin/v1/keys/adopt`: keys that version 1 made, in a token of the node that is asked. They become versions of
/// a context that only decrypt; a context without an active version gets one that encrypts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdoptKeysRequest {
    /// The context; made too, if it does not exist.
    pub context: String,
    /// The keys, at most [`ADOPT_MAX_KEYS`].
    pub keys: Vec<AdoptKey>,
    /// The slot whose token they are in; needed for a new context that the node's configuration does not place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<String>,
    /// Whom version 1 bound the context's ciphertexts to; needed for a new context that stands in no `hsm.keys` of the
    /// node's configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub binding: Option<BindingMode>,
    /// Although the token has further keys of the context that nobody has adopted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub only: bool,
    /// Leave out those of the keys that are not in the token; without it one that is not there refuses them all. If none is
    /// there, and the context does not exist, they are refused all the same.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skip_missing: bool,
    /// Look into the token, say what would be done, and do nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
}

/// A key of version 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdoptKey {
    /// Its label in the token, which version 1's clients name as `key_id`.
    pub label: String,
    /// Number of the version it becomes; the default is the one in a label of the form `kek-<context>-v<N>`, else the
    /// next one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u32>,
    /// `CKA_ID` in hex, where several keys in the token have the label.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// When version 1 made it, in RFC 3339, if its list says so. Only shown; a time that is none, or is still to come, is
    /// left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<String>,
}

/// Answer of `POST /admin/v1/keys/adopt`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdoptKeysResponse {
    /// The context.
    pub context: String,
    /// Its slot.
    pub slot: String,
    /// Whom its ciphertexts are bound to.
    pub binding: BindingMode,
    /// Whether it was only looked at.
    pub dry_run: bool,
    /// The keys, in the order of the request.
    pub versions: Vec<AdoptedVersion>,
    /// Those that were asked for, are not in the token, and were left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped: Vec<SkippedKey>,
    /// The version that encrypts; absent only before there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_version: Option<u32>,
}

/// A key of version 1 as a version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdoptedVersion {
    /// Its number.
    pub version: u32,
    /// Its label.
    pub key_id: String,
    /// Whether this call has adopted it, or would; false: it was adopted before.
    pub new: bool,
    /// Whether the node that was asked holds it and has proven it by now. It decrypts from then on.
    pub proven: bool,
}

/// A key that was to be adopted and is not in the token. What was encrypted under it cannot be decrypted there. Its number
/// is given to no other key if this call has adopted one that is new; otherwise nothing keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SkippedKey {
    /// Its label.
    pub key_id: String,
    /// The number that it was to have, if that was said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u32>,
}

/// `POST /admin/v1/keys/{context}/rotate`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotateRequest {}

/// Answer of a rotation, once the new version is active.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotateResponse {
    /// The context.
    pub context: String,
    /// The version that encrypts now.
    pub version: u32,
    /// Its label.
    pub key_id: String,
    /// The version that did before.
    pub previous_version: u32,
}

/// `POST /admin/v1/keys/{context}/move`: the next version is made in another slot, and made at once. Those there are stay
/// where they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveKeyRequest {
    /// The slot.
    pub slot: String,
}

/// Answer of a move, once the first version in the new slot is active.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveKeyResponse {
    /// The context.
    pub context: String,
    /// The slot of the new version.
    pub slot: String,
    /// The version that encrypts now.
    pub version: u32,
    /// Its label.
    pub key_id: String,
    /// The version that did before, if there was one. It goes on decrypting in its own slot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous_version: Option<u32>,
}

/// Answer of `GET /admin/v1/keys/rotation-status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotationStatusResponse {
    /// In order of their names.
    pub contexts: Vec<RotationStatus>,
}

/// Where a context stands in its rotation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotationStatus {
    /// Its name.
    pub context: String,
    /// The version that encrypts.
    pub active_version: Option<u32>,
    /// Since when.
    pub active_since: Option<String>,
    /// The version that is being imported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending_version: Option<u32>,
    /// Since when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending_since: Option<String>,
    /// Nodes that have proven the pending version, or without one the active version.
    #[serde(default)]
    pub acks: Vec<String>,
    /// Nodes that have not.
    #[serde(default)]
    pub missing: Vec<String>,
    /// The schedule.
    pub rotation_interval_days: u32,
    /// When its interval will have passed since activation: the leader rotates it then.
    pub next_rotation_due: Option<String>,
}
