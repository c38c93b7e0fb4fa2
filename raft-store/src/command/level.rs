//! Which nodes understand a command. A node that meets a variant that it does not know stops, and rightly: it must not
//! skip it. So a leader proposes one only once every member has reported a release that knows it.

use super::Op;
use crate::state::{FIRST_FEATURE_LEVEL, RECOVERS_QUORUMS, REKEYS, REMOVES_NODES};

impl Op {
    /// The feature level ([`crate::state::FEATURE_LEVEL`]) that every member has to have reported before this is
    /// proposed. Whatever the first release proposes has the first one. A variant that is added later, or that says
    /// more than before, names the level that it came with.
    #[must_use]
    pub fn min_feature_level(&self) -> u32 {
        // Every variant by its name: whoever adds one has to decide.
        match self {
            Op::CreateCluster(_)
            | Op::RegisterNode(_)
            | Op::AdmitNode(_)
            | Op::RegisterSlotKey(_)
            | Op::AddTransportKey(_)
            | Op::GrantTransportKey(_)
            | Op::CreateContextV1(_)
            | Op::PrepareVersion(_)
            | Op::AckVersions(_)
            | Op::ActivateVersion(_)
            | Op::AbandonVersion(_)
            | Op::CreateJoinToken(_)
            | Op::AddRevocations(_)
            | Op::ReportNodeV1(_)
            | Op::SetVersionUse(_)
            | Op::ScheduleDestroy(_)
            | Op::UndoDestroy(_)
            | Op::AdvanceWaits(_)
            | Op::BeginDestroy(_)
            | Op::AckDestroyed(_)
            | Op::ReportNode(_)
            | Op::SetAcl(_)
            | Op::RemoveRevocations(_)
            | Op::RejectGrant(_)
            | Op::CreateContext(_)
            | Op::LeaseInvocations(_)
            | Op::AdoptVersion(_)
            | Op::MoveContext(_)
            | Op::ReleaseVersion(_) => FIRST_FEATURE_LEVEL,
            Op::RemoveNode(_) | Op::KeepNode(_) | Op::BuryNode(_) => REMOVES_NODES,
            Op::RecoverQuorum(_) => RECOVERS_QUORUMS,
            Op::RekeyTransport(_)
            | Op::OfferTransportKey(_)
            | Op::AckTransportKey(_)
            | Op::ActivateTransportKey(_)
            | Op::DestroyTransportKey(_)
            | Op::ReportReplicationKeys(_)
            | Op::RekeyReplication(_)
            | Op::ResealKeys(_) => REKEYS,
        }
    }
}
