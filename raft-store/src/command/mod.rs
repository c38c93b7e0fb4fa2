//! Commands: everything that changes the replicated state, one per file. `apply` is pure; the proposer
//! puts times, identifiers and blobs into the command. Variants are only ever added at the end.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::names::{ContextName, RaftId, UnixMillis};
use crate::state::ClusterState;
use crate::state::access::RevocationKey;
use crate::state::context::{KeyVersion, VersionKey, VersionState};
use crate::state::node::Node;
use crate::state::requests::Seen;

mod abandon_version;
mod ack_destroyed;
mod ack_versions;
mod activate_version;
mod add_revocations;
mod add_transport_key;
mod admit_node;
mod adopt_version;
mod advance_waits;
mod begin_destroy;
mod create_cluster;
mod create_context;
mod create_join_token;
mod destruction;
mod grant_transport_key;
mod lease_invocations;
mod level;
mod move_context;
mod prepare_version;
mod refusal;
mod register_node;
mod register_slot_key;
mod reject_grant;
mod release_version;
mod remove_revocations;
mod report_node;
mod schedule_destroy;
mod set_acl;
mod set_version_use;
mod stamp;
#[cfg(test)]
mod tests;
mod undo_destroy;

pub use abandon_version::AbandonVersion;
pub use ack_destroyed::AckDestroyed;
pub use ack_versions::AckVersions;
pub use activate_version::ActivateVersion;
pub use add_revocations::AddRevocations;
pub use add_transport_key::AddTransportKey;
pub use admit_node::AdmitNode;
pub use adopt_version::{AdoptVersion, MAX_ADOPTED};
pub use advance_waits::{AdvanceWaits, MAX_ADVANCE_MS, SeenWait};
pub use begin_destroy::BeginDestroy;
pub use create_cluster::CreateCluster;
pub use create_context::{CreateContext, CreateContextV1};
pub use create_join_token::CreateJoinToken;
pub use grant_transport_key::GrantTransportKey;
pub use lease_invocations::{Claim, LeaseInvocations, MAX_CLAIMS};
pub use move_context::MoveContext;
pub use prepare_version::PrepareVersion;
pub use refusal::{Bounded, Conflict, Existing, Forbidden, Invalid, Missing, Refusal};
pub use register_node::RegisterNode;
pub use register_slot_key::RegisterSlotKey;
pub use reject_grant::RejectGrant;
pub use release_version::ReleaseVersion;
pub use remove_revocations::RemoveRevocations;
pub use report_node::{ReportNode, ReportNodeV1};
pub use schedule_destroy::{
    DEFAULT_MIN_WAIT_MS, LEAST_WAIT_MS, MAX_WAIT_MS, MIN_WAIT_FLOOR_MS, ScheduleDestroy,
};
pub use set_acl::SetAcl;
pub use set_version_use::SetVersionUse;
pub use stamp::stamp_at;
pub use undo_destroy::UndoDestroy;

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

/// The operations. Append only: the position is the encoding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Op {
    /// The first command of a cluster.
    CreateCluster(CreateCluster),
    /// A node that holds a join token gets its raft id.
    RegisterNode(RegisterNode),
    /// A learner that has proven every key becomes a member.
    AdmitNode(AdmitNode),
    /// A node's public key for a slot.
    RegisterSlotKey(RegisterSlotKey),
    /// A new transport generation of a slot.
    AddTransportKey(AddTransportKey),
    /// A transport key wrapped to one more node.
    GrantTransportKey(GrantTransportKey),
    /// A new context, as it was before invocations had a limit.
    CreateContextV1(CreateContextV1),
    /// A rotation's first phase.
    PrepareVersion(PrepareVersion),
    /// A node has imported and proven versions.
    AckVersions(AckVersions),
    /// A rotation's second phase.
    ActivateVersion(ActivateVersion),
    /// A pending version that cannot finish is given up.
    AbandonVersion(AbandonVersion),
    /// A one-time join token.
    CreateJoinToken(CreateJoinToken),
    /// Revocations are added.
    AddRevocations(AddRevocations),
    /// A node reports, as it did before it counted uses.
    ReportNodeV1(ReportNodeV1),
    /// A retired version is taken out of use, or put back.
    SetVersionUse(SetVersionUse),
    /// A retired version is to be destroyed after a wait.
    ScheduleDestroy(ScheduleDestroy),
    /// A version is not to be destroyed after all.
    UndoDestroy(UndoDestroy),
    /// Time has passed for the waits before destructions.
    AdvanceWaits(AdvanceWaits),
    /// A version's wait is over: it leaves state and tokens.
    BeginDestroy(BeginDestroy),
    /// A node has removed versions from its tokens.
    AckDestroyed(AckDestroyed),
    /// A node reports.
    ReportNode(ReportNode),
    /// Other access control.
    SetAcl(SetAcl),
    /// Revocations are taken back.
    RemoveRevocations(RemoveRevocations),
    /// A node cannot open the transport key that it was granted.
    RejectGrant(RejectGrant),
    /// A new context.
    CreateContext(CreateContext),
    /// A node is given invocations, and may acknowledge versions with it.
    LeaseInvocations(LeaseInvocations),
    /// A key that version 1 made becomes a version.
    AdoptVersion(AdoptVersion),
    /// A context's next versions are made in another slot.
    MoveContext(MoveContext),
    /// An adopted version is given back to version 1.
    ReleaseVersion(ReleaseVersion),
}

impl Op {
    /// The operation's name in logs, metrics and errors.
    pub fn name(&self) -> &'static str {
        match self {
            Op::CreateCluster(_) => "create_cluster",
            Op::RegisterNode(_) => "register_node",
            Op::AdmitNode(_) => "admit_node",
            Op::RegisterSlotKey(_) => "register_slot_key",
            Op::AddTransportKey(_) => "add_transport_key",
            Op::GrantTransportKey(_) => "grant_transport_key",
            Op::CreateContextV1(_) => "create_context_v1",
            Op::PrepareVersion(_) => "prepare_version",
            Op::AckVersions(_) => "ack_versions",
            Op::ActivateVersion(_) => "activate_version",
            Op::AbandonVersion(_) => "abandon_version",
            Op::CreateJoinToken(_) => "create_join_token",
            Op::AddRevocations(_) => "add_revocations",
            Op::ReportNodeV1(_) => "report_node_v1",
            Op::SetVersionUse(_) => "set_version_use",
            Op::ScheduleDestroy(_) => "schedule_destroy",
            Op::UndoDestroy(_) => "undo_destroy",
            Op::AdvanceWaits(_) => "advance_waits",
            Op::BeginDestroy(_) => "begin_destroy",
            Op::AckDestroyed(_) => "ack_destroyed",
            Op::ReportNode(_) => "report_node",
            Op::SetAcl(_) => "set_acl",
            Op::RemoveRevocations(_) => "remove_revocations",
            Op::RejectGrant(_) => "reject_grant",
            Op::CreateContext(_) => "create_context",
            Op::LeaseInvocations(_) => "lease_invocations",
            Op::AdoptVersion(_) => "adopt_version",
            Op::MoveContext(_) => "move_context",
            Op::ReleaseVersion(_) => "release_version",
        }
    }

    /// Whether a member that is not the leader may send it to the leader for itself.
    /// Everything else needs an administrator or the leader's own drivers.
    pub fn forwardable_from_node(&self) -> bool {
        matches!(
            self,
            Op::AckVersions(_)
                | Op::AckDestroyed(_)
                | Op::ReportNode(_)
                | Op::ReportNodeV1(_)
                | Op::RegisterSlotKey(_)
                | Op::GrantTransportKey(_)
                | Op::RejectGrant(_)
                | Op::LeaseInvocations(_)
                | Op::AddRevocations(_)
        )
    }

    /// Whether it is a node's report. They are outside the request window: their own sequence number makes them
    /// idempotent.
    pub(crate) fn is_report(&self) -> bool {
        matches!(self, Op::ReportNode(_) | Op::ReportNodeV1(_))
    }
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
    }
}

/// Refuses unless the command comes from `node` itself.
fn require_self(cx: &ApplyContext<'_>, node: RaftId) -> Result<(), Refusal> {
    if *cx.origin == Origin::Node(node) {
        return Ok(());
    }
    Err(Forbidden::NotItself { node }.into())
}

/// Refuses unless an administrator asks for it.
fn require_admin(cx: &ApplyContext<'_>, operation: &str) -> Result<(), Refusal> {
    if matches!(cx.origin, Origin::Admin(_)) {
        return Ok(());
    }
    let operation = operation.to_owned();
    Err(Forbidden::Operation { operation }.into())
}

/// Refuses what an administrator asks for whose certificate is revoked by now. The leader has looked before it proposed;
/// of two who revoke each other at the same moment, only the first one's command counts.
fn require_unrevoked(state: &ClusterState, cx: &ApplyContext<'_>) -> Result<(), Refusal> {
    let Origin::Admin(admin) = cx.origin else {
        return Ok(());
    };
    let names = [
        RevocationKey::Fingerprint(admin.fingerprint),
        RevocationKey::Serial {
            issuer: admin.issuer.clone(),
            serial: admin.serial.clone(),
        },
        RevocationKey::CommonName(admin.cn.clone()),
    ];
    if names.iter().any(|name| state.revocations.contains(name)) {
        return Err(Forbidden::Revoked.into());
    }
    Ok(())
}

/// Refuses unless the command comes from a driver of the leader that appended it, which was not removed.
fn require_leader(state: &ClusterState, cx: &ApplyContext<'_>, operation: &str) -> Result<(), Refusal> {
    if *cx.origin != Origin::Node(cx.leader) {
        let operation = operation.to_owned();
        return Err(Forbidden::Driver { operation }.into());
    }
    standing_node(state, cx.leader)?;
    Ok(())
}

/// Refuses before there is a cluster.
fn require_cluster(state: &ClusterState) -> Result<(), Refusal> {
    state
        .meta()
        .map(|_| ())
        .ok_or(Refusal::NotFound(Missing::Cluster))
}

/// A node that has not been removed.
fn standing_node(state: &ClusterState, id: RaftId) -> Result<&Node, Refusal> {
    let node = state.nodes.get(&id).ok_or(Missing::Node(id))?;
    if !node.is_standing() {
        let node = node.name.clone();
        return Err(Forbidden::Removed { node }.into());
    }
    Ok(node)
}

/// A version with its key.
fn known_version(
    state: &ClusterState,
    context: &ContextName,
    number: u32,
) -> Result<(VersionKey, KeyVersion), Refusal> {
    let key = VersionKey {
        context: context.clone(),
        version: number,
    };
    if let Some(version) = state.versions.get(&key) {
        let version = KeyVersion::clone(version);
        return Ok((key, version));
    }
    let (context, version) = (key.context, number);
    Err(Missing::Version { context, version }.into())
}

/// A version that nothing is encrypted under any more, in the state that the proposer saw.
fn retired_version(
    state: &ClusterState,
    context: &ContextName,
    number: u32,
    expected: VersionState,
) -> Result<(VersionKey, KeyVersion), Refusal> {
    let (key, version) = known_version(state, context, number)?;
    let retired = matches!(version.state, VersionState::DecryptOnly | VersionState::Disabled);
    if !retired || version.state != expected {
        return Err(in_other_state(&key, version.state));
    }
    Ok((key, version))
}

/// The refusal of what a version in this state is not to be asked for.
fn in_other_state(key: &VersionKey, state: VersionState) -> Refusal {
    let (context, version) = (key.context.clone(), key.version);
    let why = match state {
        VersionState::Pending => Conflict::Pending { context, version },
        VersionState::Active => Conflict::Active { context, version },
        state => Conflict::VersionState {
            context,
            version,
            state,
        },
    };
    why.into()
}
