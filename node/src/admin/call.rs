//! Administrators' calls as they travel to the leader, and what comes back.

use hsm_api::ErrorCode;
use raft_store::command::{AdminOrigin, RequestId};
use raft_store::names::{ContextName, NodeName, SlotName};
use raft_store::state::context::BindingMode;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An administrator's call. The leader authorises it again with its own policy.
#[derive(Clone, Serialize, Deserialize)]
pub struct AdminCall {
    /// Identity of the request; kept over all attempts.
    pub id: RequestId,
    /// SHA-256 of what was asked.
    pub body_hash: [u8; 32],
    /// Who asked, as the node the client spoke to saw it.
    pub origin: AdminOrigin,
    /// The client's address, for the audit.
    pub source: String,
    /// The request's id, for logs.
    pub request_id: String,
    /// 0 where it arrived, 1 at the leader: a call travels once.
    pub hop: u8,
    /// What is asked.
    pub body: AdminBody,
}

/// What is asked.
#[derive(Clone, Serialize, Deserialize)]
pub enum AdminBody {
    /// A new version of a context.
    Rotate {
        /// The context.
        context: ContextName,
    },
    /// The first version of a context, which is made if need be.
    CreateKey {
        /// The context.
        context: ContextName,
        /// Its label; `kek-<context>-v<N>` if absent.
        label: Option<String>,
        /// Its number; the next one if absent.
        version: Option<u32>,
        /// The slot, from the configuration of the node asked; needed for a new context.
        slot: Option<SlotName>,
        /// The binding mode of a new context.
        binding: BindingMode,
    },
    /// A one-time join token.
    CreateJoinToken {
        /// How long it is good.
        ttl_seconds: u64,
        /// If set, only for a node of this name.
        node: Option<NodeName>,
    },
}

/// Why a call was not carried out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CallError {
    /// The stable code.
    #[serde(serialize_with = "code_out", deserialize_with = "code_in")]
    pub code: ErrorCode,
    /// For the caller.
    pub detail: String,
}

fn code_out<S: Serializer>(code: &ErrorCode, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(code.as_str())
}

fn code_in<'de, D: Deserializer<'de>>(d: D) -> Result<ErrorCode, D::Error> {
    let text = String::deserialize(d)?;
    text.parse().map_err(|_| serde::de::Error::custom(format!("unknown error code {text}")))
}
