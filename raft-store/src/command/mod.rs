//! Commands: everything that changes the replicated state, one per file. `apply` is pure; the proposer
//! puts times, identifiers and blobs into the command. Variants are only ever added at the end.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::names::{ContextName, RaftId, UnixMillis};
use crate::state::ClusterState;
use crate::state::replication::ReplicationKeyId;
use crate::state::requests::Seen;

mod abandon_version;
mod ack_destroyed;
mod ack_transport_key;
mod ack_versions;
mod activate_transport_key;
mod activate_version;
mod add_revocations;
mod add_transport_key;
mod admit_node;
mod adopt_version;
mod advance_waits;
mod begin_destroy;
mod bury_node;
mod create_cluster;
mod create_context;
mod create_join_token;
mod destroy_transport_key;
mod destruction;
mod grant_transport_key;
mod keep_node;
mod lease_invocations;
mod level;
mod move_context;
mod offer_transport_key;
mod op;
mod prepare_version;
mod recover_quorum;
mod refusal;
mod register_node;
mod register_slot_key;
mod reject_grant;
mod rekey_replication;
mod rekey_transport;
mod release_version;
mod remove_node;
mod remove_revocations;
mod report_node;
mod report_replication_keys;
mod require;
mod reseal_keys;
mod schedule_destroy;
mod set_acl;
mod set_version_use;
mod stamp;
#[cfg(test)]
mod tests;
mod undo_destroy;

pub use abandon_version::AbandonVersion;
pub use ack_destroyed::AckDestroyed;
pub use ack_transport_key::AckTransportKey;
pub use ack_versions::AckVersions;
pub use activate_transport_key::ActivateTransportKey;
pub use activate_version::ActivateVersion;
pub use add_revocations::AddRevocations;
pub use add_transport_key::AddTransportKey;
pub use admit_node::AdmitNode;
pub use adopt_version::{AdoptVersion, MAX_ADOPTED};
pub use advance_waits::{AdvanceWaits, MAX_ADVANCE_MS, SeenWait};
pub use begin_destroy::BeginDestroy;
pub use bury_node::BuryNode;
pub use create_cluster::CreateCluster;
pub use create_context::{CreateContext, CreateContextV1};
pub use create_join_token::CreateJoinToken;
pub use destroy_transport_key::DestroyTransportKey;
pub use grant_transport_key::GrantTransportKey;
pub use keep_node::KeepNode;
pub use lease_invocations::{Claim, LeaseInvocations, MAX_CLAIMS};
pub use move_context::MoveContext;
pub use offer_transport_key::OfferTransportKey;
pub use op::Op;
pub use prepare_version::PrepareVersion;
pub use recover_quorum::{LEFT_OUT_VERSIONS, RecoverQuorum};
pub use refusal::{Bounded, Conflict, Existing, Forbidden, Invalid, Missing, Refusal};
pub use register_node::RegisterNode;
pub use register_slot_key::RegisterSlotKey;
pub use reject_grant::RejectGrant;
pub use rekey_replication::RekeyReplication;
pub use rekey_transport::{MAX_LIVE_TRANSPORT_KEYS, RekeyTransport};
pub use release_version::ReleaseVersion;
pub use remove_node::RemoveNode;
pub use remove_revocations::RemoveRevocations;
pub use report_node::{ReportNode, ReportNodeV1};
pub use report_replication_keys::ReportReplicationKeys;
pub use reseal_keys::{ResealKeys, ResealedGrant, ResealedKey};
pub use schedule_destroy::{
    DEFAULT_MIN_WAIT_MS, LEAST_WAIT_MS, MAX_WAIT_MS, MIN_WAIT_FLOOR_MS, ScheduleDestroy,
};
pub use set_acl::SetAcl;
pub use set_version_use::SetVersionUse;
pub use stamp::stamp_at;
pub use undo_destroy::UndoDestroy;

use require::{
    in_other_state, known_version, refuse_retired, require_admin, require_cluster, require_leader,
    require_nobody_leaves, require_self, require_slot_keys, require_unrevoked, retired_version,
    standing_node, transport_in_state,
};

/// One proposed change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Command {
    /// Identity of the request; a repeat gets the stored answer.
    pub id: RequestId,
    /// SHA-256 of what was asked, so that a reused key with another body is told apart.
    pub body_hash: [u8; 32],
    /// On whose behalf.
    pub origin: Origin,
    /// Approvals by other certificates (dual control). Empty until it exists.
    pub approvals: Vec<Approval>,
    /// The proposer's wall clock. Nobody has compared it with any other: see `command/stamp.rs` for what ages go by.
    pub at: UnixMillis,
    /// What to do.
    pub op: Op,
}

/// A request's identity. Client keys and the nodes' own ids can never meet.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum RequestId {
    /// A client's `Idempotency-Key`, within its certificate identity and operation.
    Client {
        /// SHA-256 of the principal.
        principal: [u8; 32],
        /// Operation, such as `rotate exchange-key`.
        operation: String,
        /// The key as sent.
        key: String,
    },
    /// A node's own step.
    Node {
        /// The node.
        node: RaftId,
        /// Random, one per proposal.
        nonce: [u8; 16],
    },
}

/// On whose behalf a command is proposed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Origin {
    /// A member, for the operations of its own drivers.
    Node(RaftId),
    /// A person or machine with a certificate, through a member.
    Admin(AdminOrigin),
}

/// An administrator as seen by the node it spoke to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdminOrigin {
    /// SHA-256 of the certificate.
    pub fingerprint: [u8; 32],
    /// Last CN.
    pub cn: String,
    /// First OU.
    pub ou: String,
    /// Serial, lower-case hex.
    pub serial: String,
    /// Issuer's distinguished name.
    pub issuer: String,
    /// The member that saw it.
    pub via_node: RaftId,
    /// A signature with the administrator's key. Reserved.
    pub evidence: Option<Vec<u8>>,
}

/// Consent of another certificate. Reserved for dual control.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Approval {
    /// SHA-256 of the approver's certificate.
    pub fingerprint: [u8; 32],
    /// When.
    pub at: UnixMillis,
}

/// What `apply` may know besides the state: the entry's place, who appended it and Raft's membership at it.
#[derive(Debug)]
pub struct ApplyContext<'a> {
    /// The entry's index.
    pub index: u64,
    /// The command's time.
    pub at: UnixMillis,
    /// The command's origin.
    pub origin: &'a Origin,
    /// The leader that appended the entry, which the entry's log id names: no command can say so of itself.
    pub leader: RaftId,
    /// Voters of the membership in force.
    pub voters: &'a BTreeSet<RaftId>,
}

/// The answer to a command, stored with its request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    /// An entry that is no command.
    Nothing,
    /// Done.
    Done(Done),
    /// Refused; the state is unchanged.
    Refused(Refusal),
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Done {
    /// Nothing more to say.
    Ok,
    /// A node is registered under this raft id.
    Registered {
        /// The raft id.
        raft_id: RaftId,
    },
    /// A key version was prepared or changed.
    Version {
        /// Its context.
        context: ContextName,
        /// Its number.
        version: u32,
    },
    /// A join token was made.
    JoinToken {
        /// Its number, part of the token's text.
        number: u64,
    },
    /// A node leaves the cluster, or is out of it.
    Node {
        /// Its raft id.
        raft_id: RaftId,
    },
    /// A slot is to get its next transport key.
    TransportRekey {
        /// The generation that is replaced: the newest there was.
        generation: u32,
    },
    /// Another replication key is the cluster's.
    ReplicationRekey {
        /// It.
        key: ReplicationKeyId,
        /// The one before.
        former: ReplicationKeyId,
    },
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.op.name())
    }
}

/// Applies one command. A refusal leaves no trace but its remembered answer, and one that says that the answer
/// itself is too large leaves none.
pub fn apply(state: &mut ClusterState, command: &Command, cx: &ApplyContext<'_>) -> Outcome {
    let windowed = !command.op.is_report();
    if windowed {
        match state.requests().look_up(&command.id, &command.body_hash) {
            Seen::New => {}
            Seen::Repeat(outcome) => return outcome,
            Seen::OtherBody => return Outcome::Refused(Refusal::KeyReused),
            Seen::Expired => return Outcome::Refused(Refusal::KeyExpired),
        }
    }
    // A clone shares its rows: going back costs nothing, and no half-applied command can remain.
    let before = state.clone();
    let mut outcome = match run(state, &command.op, cx) {
        Ok(done) => Outcome::Done(done),
        Err(refusal) => {
            *state = before.clone();
            Outcome::Refused(refusal)
        }
    };
    if windowed {
        let (id, body_hash) = (command.id.clone(), command.body_hash);
        let kept = state.requests.remember(cx.index, id, body_hash, outcome.clone());
        // An answer that cannot be kept would let a repeat do it again.
        if let Err(refusal) = kept {
            *state = before;
            outcome = Outcome::Refused(refusal);
        }
    }
    outcome
}

fn run(state: &mut ClusterState, op: &Op, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
    require_unrevoked(state, cx)?;
    match op {
        Op::CreateCluster(op) => op.apply(state, cx),
        Op::RegisterNode(op) => op.apply(state, cx),
        Op::AdmitNode(op) => op.apply(state, cx),
        Op::RegisterSlotKey(op) => op.apply(state, cx),
        Op::AddTransportKey(op) => op.apply(state, cx),
        Op::GrantTransportKey(op) => op.apply(state, cx),
        Op::CreateContextV1(op) => op.apply(state, cx),
        Op::PrepareVersion(op) => op.apply(state, cx),
        Op::AckVersions(op) => op.apply(state, cx),
        Op::ActivateVersion(op) => op.apply(state, cx),
        Op::AbandonVersion(op) => op.apply(state, cx),
        Op::CreateJoinToken(op) => op.apply(state, cx),
        Op::AddRevocations(op) => op.apply(state, cx),
        Op::ReportNodeV1(op) => op.apply(state, cx),
        Op::SetVersionUse(op) => op.apply(state, cx),
        Op::ScheduleDestroy(op) => op.apply(state, cx),
        Op::UndoDestroy(op) => op.apply(state, cx),
        Op::AdvanceWaits(op) => op.apply(state, cx),
        Op::BeginDestroy(op) => op.apply(state, cx),
        Op::AckDestroyed(op) => op.apply(state, cx),
        Op::ReportNode(op) => op.apply(state, cx),
        Op::SetAcl(op) => op.apply(state, cx),
        Op::RemoveRevocations(op) => op.apply(state, cx),
        Op::RejectGrant(op) => op.apply(state, cx),
        Op::CreateContext(op) => op.apply(state, cx),
        Op::LeaseInvocations(op) => op.apply(state, cx),
        Op::AdoptVersion(op) => op.apply(state, cx),
        Op::MoveContext(op) => op.apply(state, cx),
        Op::ReleaseVersion(op) => op.apply(state, cx),
        Op::RemoveNode(op) => op.apply(state, cx),
        Op::KeepNode(op) => op.apply(state, cx),
        Op::BuryNode(op) => op.apply(state, cx),
        Op::RecoverQuorum(op) => op.apply(state, cx),
        Op::RekeyTransport(op) => op.apply(state, cx),
        Op::OfferTransportKey(op) => op.apply(state, cx),
        Op::AckTransportKey(op) => op.apply(state, cx),
        Op::ActivateTransportKey(op) => op.apply(state, cx),
        Op::DestroyTransportKey(op) => op.apply(state, cx),
        Op::ReportReplicationKeys(op) => op.apply(state, cx),
        Op::RekeyReplication(op) => op.apply(state, cx),
        Op::ResealKeys(op) => op.apply(state, cx),
    }
}
