//! Administrators' calls as they travel to the leader, and what comes back. Who asked is part of a
//! call; whether that suffices is decided by the leader, never by the node that forwards.

use std::fmt;

use hsm_api::ErrorCode;
use raft_store::command::{AdminOrigin, Conflict, Forbidden, Refusal, RequestId};
use raft_store::names::{ContextName, NodeName, RaftId, SlotName};
use raft_store::state::context::BindingMode;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::access::AccessBody;
use super::adopt::AdoptOrder;
use crate::consensus::ProposeError;
use crate::identity::Authority;

/// An administrator's call. The leader authorises it again with its own policy.
#[derive(Clone, Serialize, Deserialize)]
pub struct AdminCall {
    /// Identity of the request; kept over all attempts.
    pub id: RequestId,
    /// SHA-256 of what was asked.
    pub body_hash: [u8; 32],
    /// Who asked, as the node the client spoke to saw it.
    pub origin: AdminOrigin,
    /// SHA-256 of the asker's public key: roles may be bound to it.
    pub spki_sha256: [u8; 32],
    /// The CAs that the asker's certificate hangs on: one of them may be revoked.
    pub authorities: Vec<Authority>,
    /// The client's address, for the audit.
    pub source: String,
    /// The request's id, for logs.
    pub request_id: String,
    /// The trace it belongs to, for logs.
    pub trace_id: String,
    /// 0 where it arrived, 1 at the leader: a call travels once.
    pub hop: u8,
    /// What is asked.
    pub body: AdminBody,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// A retired version is disabled, or enabled again.
    SetKeyUse {
        /// The context.
        context: ContextName,
        /// The version.
        version: u32,
        /// Which of the two.
        enable: bool,
    },
    /// A retired version is destroyed after a wait.
    DestroyKey {
        /// The context.
        context: ContextName,
        /// The version.
        version: u32,
        /// How long it can be undone, in milliseconds; absent: as the leader's configuration says.
        wait_ms: Option<u64>,
        /// Whether a version that was used recently is destroyed all the same.
        override_recent_use: bool,
    },
    /// A destruction that still waits is taken back.
    UndoDestroy {
        /// The context.
        context: ContextName,
        /// The version.
        version: u32,
    },
    /// Versions that nobody needs any more are disabled, by each context's policy.
    Cleanup {
        /// Only this context's; absent: all.
        context: Option<ContextName>,
        /// Only say which.
        dry_run: bool,
    },
    /// Something about access control or revocations.
    Access(AccessBody),
    /// Keys that version 1 made become versions.
    AdoptKeys(AdoptOrder),
    /// A new version of a context, in another slot.
    MoveKey {
        /// The context.
        context: ContextName,
        /// The slot.
        to: SlotName,
    },
    /// An adopted version is given back to version 1.
    ReleaseKey {
        /// The context.
        context: ContextName,
        /// The version.
        version: u32,
    },
    /// A node leaves the cluster.
    RemoveNode {
        /// The node.
        node: NodeName,
        /// The node that takes its place in the same change of the membership.
        successor: Option<NodeName>,
        /// Although an adopted key is in its token only.
        lose_keys: bool,
        /// Only say what would be done, or refuse it.
        dry_run: bool,
    },
    /// A node that was to leave stays.
    KeepNode {
        /// The node.
        node: NodeName,
    },
    /// Another node leads.
    TransferLeader {
        /// Who leads, as the asker knows: once that is another one, it is done.
        from: RaftId,
        /// Who shall; the best if absent.
        to: Option<NodeName>,
    },
    /// A slot gets its next transport key.
    RekeyTransport {
        /// The slot.
        slot: SlotName,
        /// Whether the one that is on its way is given up for another.
        restart: bool,
    },
    /// The leader's other replication key becomes the cluster's.
    RekeyReplication,
}

impl AdminBody {
    /// The operation an `Idempotency-Key` belongs to: the same key may be used for another one.
    #[must_use]
    pub fn operation(&self) -> String {
        match self {
            Self::Rotate { context } => format!("rotate {context}"),
            Self::CreateKey { context, .. } => format!("create-kek {context}"),
            Self::CreateJoinToken { .. } => "join-token".to_owned(),
            Self::SetKeyUse {
                context,
                version,
                enable: true,
            } => format!("key enable {context} v{version}"),
            Self::SetKeyUse { context, version, .. } => format!("key disable {context} v{version}"),
            Self::DestroyKey { context, version, .. } => format!("key destroy {context} v{version}"),
            Self::UndoDestroy { context, version } => format!("key undo-destroy {context} v{version}"),
            Self::Cleanup { context, .. } => match context {
                Some(context) => format!("cleanup-old-versions {context}"),
                None => "cleanup-old-versions".to_owned(),
            },
            Self::Access(body) => body.operation().to_owned(),
            Self::AdoptKeys(order) => format!("key adopt {}", order.context),
            Self::MoveKey { context, .. } => format!("key move {context}"),
            Self::ReleaseKey { context, version } => format!("key release {context} v{version}"),
            Self::RemoveNode {
                node,
                successor: None,
                ..
            } => format!("cluster remove {node}"),
            Self::RemoveNode { node, .. } => format!("cluster replace {node}"),
            Self::KeepNode { node } => format!("cluster keep {node}"),
            Self::TransferLeader { .. } => "cluster transfer-leader".to_owned(),
            Self::RekeyTransport { slot, .. } => format!("cluster rekey transport {slot}"),
            Self::RekeyReplication => "cluster rekey replication".to_owned(),
        }
    }
}

/// The leader's answer to a call that it has carried out.
#[derive(Clone, Debug, PartialEq)]
pub struct Executed {
    /// For the caller.
    pub answer: serde_json::Value,
    /// The leader's applied index by then: what was changed is in every state from there on.
    pub index: u64,
}

/// Why a call was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallError {
    /// The stable code.
    #[serde(serialize_with = "code_out", deserialize_with = "code_in")]
    pub code: ErrorCode,
    /// For the caller.
    pub detail: String,
}

impl CallError {
    /// An error with its explanation for the caller.
    #[must_use]
    pub fn new(code: ErrorCode, detail: impl Into<String>) -> Self {
        Self {
            code,
            detail: detail.into(),
        }
    }

    /// Whether it says that the caller may not do this, rather than that it did not work.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self.code.status(), 401 | 403)
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.detail)
    }
}

impl std::error::Error for CallError {}

impl From<Refusal> for CallError {
    fn from(refusal: Refusal) -> Self {
        let code = match &refusal {
            Refusal::Conflict(Conflict::NodeRemoved { .. }) => ErrorCode::NodeRemoved,
            Refusal::Conflict(Conflict::LastVoter { .. }) => ErrorCode::QuorumAtRisk,
            Refusal::Conflict(_) => ErrorCode::Conflict,
            Refusal::Exists(_) => ErrorCode::AlreadyExists,
            Refusal::NotFound(_) => ErrorCode::NotFound,
            Refusal::Forbidden(Forbidden::Revoked) => ErrorCode::CertificateRevoked,
            Refusal::Forbidden(_) => ErrorCode::RoleRequired,
            Refusal::Invalid(_) => ErrorCode::InvalidArgument,
            Refusal::KeyReused => ErrorCode::IdempotencyKeyReused,
            Refusal::KeyExpired => ErrorCode::IdempotencyExpired,
        };
        Self::new(code, refusal.to_string())
    }
}

impl From<ProposeError> for CallError {
    fn from(error: ProposeError) -> Self {
        let code = match error {
            ProposeError::Refused(refusal) => return refusal.into(),
            ProposeError::NotLeader { .. } => ErrorCode::NotLeader,
            ProposeError::NoQuorum => ErrorCode::NoQuorum,
            ProposeError::Unknown => ErrorCode::OutcomeUnknown,
            ProposeError::TooLarge { .. } => ErrorCode::InvalidArgument,
            ProposeError::Busy => ErrorCode::Overloaded,
            ProposeError::Draining => ErrorCode::NodeDraining,
            ProposeError::Uninitialised => ErrorCode::Uninitialised,
            ProposeError::NoSpace | ProposeError::OlderCopy { .. } | ProposeError::EpochEnded { .. } => {
                ErrorCode::NotReady
            }
            ProposeError::NotUnderstood { .. } => ErrorCode::Conflict,
            ProposeError::Fatal(_) => ErrorCode::Internal,
        };
        Self::new(code, error.to_string())
    }
}

fn code_out<S: Serializer>(code: &ErrorCode, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(code.as_str())
}

fn code_in<'de, D: Deserializer<'de>>(d: D) -> Result<ErrorCode, D::Error> {
    let text = String::deserialize(d)?;
    text.parse()
        .map_err(|_| serde::de::Error::custom(format!("unknown error code {text}")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use raft_store::command::Existing;
    use serde_json::json;

    use super::*;

    #[test]
    fn an_error_survives_its_journey_by_its_stable_code() {
        let error = CallError::new(ErrorCode::NoQuorum, "d");
        assert_eq!(
            serde_json::to_value(&error).unwrap(),
            json!({"code": "no_quorum", "detail": "d"})
        );
        let bytes = raft_store::codec::encode(&error).unwrap();
        assert_eq!(raft_store::codec::decode::<CallError>(&bytes).unwrap(), error);
        let unknown = json!({"code": "moon_phase", "detail": "d"});
        assert!(serde_json::from_value::<CallError>(unknown).is_err());
    }

    #[test]
    fn what_may_be_repeated_says_so() {
        for (error, code) in [
            (ProposeError::NotLeader { leader: None }, ErrorCode::NotLeader),
            (ProposeError::NoQuorum, ErrorCode::NoQuorum),
            (ProposeError::Unknown, ErrorCode::OutcomeUnknown),
            (ProposeError::Busy, ErrorCode::Overloaded),
            (ProposeError::Draining, ErrorCode::NodeDraining),
            (ProposeError::NoSpace, ErrorCode::NotReady),
            (ProposeError::OlderCopy { node: 7 }, ErrorCode::NotReady),
            (ProposeError::EpochEnded { epoch: 2 }, ErrorCode::NotReady),
        ] {
            let call = CallError::from(error);
            assert_eq!(call.code, code);
            assert!(call.code.retryable(), "{call}");
        }
    }

    #[test]
    fn refusals_keep_their_meaning() {
        let refused = |refusal| CallError::from(ProposeError::Refused(refusal)).code;
        assert_eq!(refused(Refusal::KeyReused), ErrorCode::IdempotencyKeyReused);
        assert_eq!(refused(Refusal::KeyExpired), ErrorCode::IdempotencyExpired);
        let label = "x".to_owned();
        let exists = Existing::Version { label }.into();
        assert_eq!(refused(exists), ErrorCode::AlreadyExists);
        let conflict = Conflict::OpenJoinTokens { open: 1 }.into();
        assert_eq!(refused(conflict), ErrorCode::Conflict);
        let node = NodeName::new("n2").unwrap();
        let removed = Conflict::NodeRemoved { node: node.clone() }.into();
        assert_eq!(refused(removed), ErrorCode::NodeRemoved);
        let last = Conflict::LastVoter { node }.into();
        assert_eq!(refused(last), ErrorCode::QuorumAtRisk);
        assert!(CallError::new(ErrorCode::RoleRequired, "").is_refusal());
        let revoked = Forbidden::Revoked.into();
        assert_eq!(refused(revoked), ErrorCode::CertificateRevoked);
        assert!(!CallError::new(ErrorCode::Conflict, "").is_refusal());
    }
}
