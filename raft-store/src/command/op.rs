//! The operations that a command may carry, by name: one variant for each file of this folder that changes the state.
//! A variant's position is its encoding, so that one is only ever added at the end.

use serde::{Deserialize, Serialize};

use super::{
    AbandonVersion, AckDestroyed, AckTransportKey, AckVersions, ActivateTransportKey, ActivateVersion,
    AddRevocations, AddTransportKey, AdmitNode, AdoptVersion, AdvanceWaits, BeginDestroy, BuryNode,
    CreateCluster, CreateContext, CreateContextV1, CreateJoinToken, DestroyTransportKey, GrantTransportKey,
    KeepNode, LeaseInvocations, MoveContext, OfferTransportKey, PrepareVersion, RecoverQuorum, RegisterNode,
    RegisterSlotKey, RejectGrant, RekeyReplication, RekeyTransport, ReleaseVersion, RemoveNode,
    RemoveRevocations, ReportNode, ReportNodeV1, ReportReplicationKeys, ResealKeys, ScheduleDestroy, SetAcl,
    SetVersionUse, UndoDestroy,
};
use crate::names::RaftId;

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
    /// A member is to leave.
    RemoveNode(RemoveNode),
    /// A member that was to leave stays.
    KeepNode(KeepNode),
    /// A leaving node is out of Raft's membership: its row becomes a tombstone.
    BuryNode(BuryNode),
    /// A survivor goes on alone, in a new epoch.
    RecoverQuorum(RecoverQuorum),
    /// A slot is to get its next transport key.
    RekeyTransport(RekeyTransport),
    /// The transport key that a rekey asked for.
    OfferTransportKey(OfferTransportKey),
    /// A node holds an offered transport key, or has removed one that is being destroyed.
    AckTransportKey(AckTransportKey),
    /// New versions are wrapped under the offered transport key.
    ActivateTransportKey(ActivateTransportKey),
    /// A superseded transport key leaves state and tokens.
    DestroyTransportKey(DestroyTransportKey),
    /// A node says which replication keys it has.
    ReportReplicationKeys(ReportReplicationKeys),
    /// Everything is sealed under another replication key.
    RekeyReplication(RekeyReplication),
    /// Records that are sealed anew.
    ResealKeys(ResealKeys),
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
            Op::RemoveNode(_) => "remove_node",
            Op::KeepNode(_) => "keep_node",
            Op::BuryNode(_) => "bury_node",
            Op::RecoverQuorum(_) => "recover_quorum",
            Op::RekeyTransport(_) => "rekey_transport",
            Op::OfferTransportKey(_) => "offer_transport_key",
            Op::AckTransportKey(_) => "ack_transport_key",
            Op::ActivateTransportKey(_) => "activate_transport_key",
            Op::DestroyTransportKey(_) => "destroy_transport_key",
            Op::ReportReplicationKeys(_) => "report_replication_keys",
            Op::RekeyReplication(_) => "rekey_replication",
            Op::ResealKeys(_) => "reseal_keys",
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
                | Op::AckTransportKey(_)
                | Op::ReportReplicationKeys(_)
        )
    }

    /// The node that it takes out of the cluster. Whether that one understands it is nobody's concern: it would only keep
    /// itself in.
    #[must_use]
    pub fn takes_out(&self) -> Option<RaftId> {
        match self {
            Op::RemoveNode(op) => Some(op.node),
            Op::BuryNode(op) => Some(op.node),
            _ => None,
        }
    }

    /// Whether it is a node's report. They are outside the request window: their own sequence number makes them
    /// idempotent.
    pub(crate) fn is_report(&self) -> bool {
        matches!(self, Op::ReportNode(_) | Op::ReportNodeV1(_))
    }
}
