//! Who may administer. Rules come from the replicated state once there is one; before, from the
//! configuration, because somebody has to be allowed to found or join a cluster.

use raft_store::state::ClusterState;

use super::call::{AdminBody, CallError};
use super::seed::Seed;
use crate::identity::Principal;
use crate::policy::{Denial, Policy, Revocations, Role};

/// What an administrator wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// `cluster init`.
    Init,
    /// `cluster join`.
    Join,
    /// What `cluster join` shows first. Makes key pairs where there are none.
    SlotKeys,
    /// `cluster token`.
    CreateJoinToken,
    /// `cluster status`.
    Status,
    /// `cluster members`.
    Members,
    /// `create-kek`.
    CreateKey,
    /// `rotate`.
    Rotate,
    /// `list-kek`.
    ListKeys,
    /// `rotation-status`.
    RotationStatus,
    /// `slot unlock`.
    UnlockSlot,
    /// `whoami`.
    WhoAmI,
    /// `acl get`.
    GetAcl,
    /// `acl test`, and `acl set --dry-run`.
    TestAcl,
    /// `acl set`.
    SetAcl,
    /// `revoke`.
    Revoke,
    /// `unrevoke`.
    Unrevoke,
    /// `revocations`.
    ListRevocations,
    /// `key disable`.
    KeyDisable,
    /// `key enable`.
    KeyEnable,
    /// `key destroy`.
    KeyDestroy,
    /// `key undo-destroy`.
    KeyUndoDestroy,
    /// `key usage`.
    KeyUsage,
    /// `cleanup-old-versions`.
    KeyCleanup,
    /// `key adopt`.
    KeyAdopt,
    /// `key move`.
    KeyMove,
    /// `key release`.
    KeyRelease,
    /// `cluster remove`, and `cluster replace`, which does it with a successor.
    RemoveNode,
    /// `cluster remove --cancel`.
    KeepNode,
    /// `cluster transfer-leader`.
    TransferLeader,
    /// `cluster rekey transport`.
    RekeyTransport,
    /// `cluster rekey replication`.
    RekeyReplication,
    /// `cluster rekey status`.
    RekeyStatus,
}

/// Who may act on keys.
const OPERATE: &[Role] = &[Role::Admin, Role::Operator];
/// Who may read.
const READ: &[Role] = &[Role::Admin, Role::Operator, Role::Auditor];

impl Act {
    /// The name in the audit.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Init => "cluster.init",
            Self::Join => "cluster.join",
            Self::SlotKeys => "cluster.slot_keys",
            Self::CreateJoinToken => "cluster.token",
            Self::Status => "cluster.status",
            Self::Members => "cluster.members",
            Self::CreateKey => "key.create",
            Self::Rotate => "key.rotate",
            Self::ListKeys => "key.list",
            Self::RotationStatus => "key.rotation_status",
            Self::UnlockSlot => "slot.unlock",
            Self::WhoAmI => "whoami",
            Self::GetAcl => "acl.get",
            Self::TestAcl => "acl.test",
            Self::SetAcl => "acl.set",
            Self::Revoke => "revocations.add",
            Self::Unrevoke => "revocations.remove",
            Self::ListRevocations => "revocations.list",
            Self::KeyDisable => "key.disable",
            Self::KeyEnable => "key.enable",
            Self::KeyDestroy => "key.destroy",
            Self::KeyUndoDestroy => "key.undo_destroy",
            Self::KeyUsage => "key.usage",
            Self::KeyCleanup => "key.cleanup",
            Self::KeyAdopt => "key.adopt",
            Self::KeyMove => "key.move",
            Self::KeyRelease => "key.release",
            Self::RemoveNode => "cluster.remove",
            Self::KeepNode => "cluster.keep",
            Self::TransferLeader => "cluster.transfer_leader",
            Self::RekeyTransport => "cluster.rekey_transport",
            Self::RekeyReplication => "cluster.rekey_replication",
            Self::RekeyStatus => "cluster.rekey_status",
        }
    }

    /// The roles that suffice; `None`: every certificate that is not revoked.
    fn roles(self) -> Option<&'static [Role]> {
        match self {
            Self::Init
            | Self::Join
            | Self::SlotKeys
            | Self::CreateJoinToken
            | Self::UnlockSlot
            | Self::KeyDestroy
            | Self::SetAcl
            | Self::Revoke
            | Self::Unrevoke
            | Self::RemoveNode
            | Self::KeepNode
            | Self::TransferLeader
            | Self::RekeyTransport
            | Self::RekeyReplication => Some(&[Role::Admin]),
            Self::ListRevocations => Some(&[Role::Admin, Role::Auditor]),
            Self::CreateKey
            | Self::Rotate
            | Self::KeyDisable
            | Self::KeyEnable
            | Self::KeyUndoDestroy
            | Self::KeyCleanup
            | Self::KeyAdopt
            | Self::KeyMove
            | Self::KeyRelease => Some(OPERATE),
            Self::Status
            | Self::Members
            | Self::ListKeys
            | Self::RotationStatus
            | Self::KeyUsage
            | Self::GetAcl
            | Self::TestAcl
            | Self::RekeyStatus => Some(READ),
            Self::WhoAmI => None,
        }
    }

    /// Whether it changes anything.
    pub(super) fn changes(self) -> bool {
        match self {
            Self::Init
            | Self::Join
            | Self::SlotKeys
            | Self::CreateJoinToken
            | Self::CreateKey
            | Self::Rotate
            | Self::UnlockSlot
            | Self::KeyDisable
            | Self::KeyEnable
            | Self::KeyDestroy
            | Self::KeyUndoDestroy
            | Self::KeyCleanup
            | Self::KeyAdopt
            | Self::KeyMove
            | Self::KeyRelease
            | Self::SetAcl
            | Self::Revoke
            | Self::Unrevoke
            | Self::RemoveNode
            | Self::KeepNode
            | Self::TransferLeader
            | Self::RekeyTransport
            | Self::RekeyReplication => true,
            Self::Status
            | Self::Members
            | Self::ListKeys
            | Self::RotationStatus
            | Self::WhoAmI
            | Self::KeyUsage
            | Self::GetAcl
            | Self::TestAcl
            | Self::ListRevocations
            | Self::RekeyStatus => false,
        }
    }
}

impl AdminBody {
    /// The act it is.
    #[must_use]
    pub fn act(&self) -> Act {
        match self {
            Self::Rotate { .. } => Act::Rotate,
            Self::CreateKey { .. } => Act::CreateKey,
            Self::CreateJoinToken { .. } => Act::CreateJoinToken,
            Self::SetKeyUse { enable: true, .. } => Act::KeyEnable,
            Self::SetKeyUse { enable: false, .. } => Act::KeyDisable,
            Self::DestroyKey { .. } => Act::KeyDestroy,
            Self::UndoDestroy { .. } => Act::KeyUndoDestroy,
            Self::Cleanup { .. } => Act::KeyCleanup,
            Self::Access(body) => body.act(),
            Self::AdoptKeys(_) => Act::KeyAdopt,
            Self::MoveKey { .. } => Act::KeyMove,
            Self::ReleaseKey { .. } => Act::KeyRelease,
            Self::RemoveNode { .. } => Act::RemoveNode,
            Self::KeepNode { .. } => Act::KeepNode,
            Self::TransferLeader { .. } => Act::TransferLeader,
            Self::RekeyTransport { .. } => Act::RekeyTransport,
            Self::RekeyReplication => Act::RekeyReplication,
        }
    }
}

/// Whether a caller may.
///
/// # Errors
/// `certificate_revoked` or `role_required`.
pub fn authorise(policy: &Policy, principal: &Principal, act: Act) -> Result<(), CallError> {
    // On one node: whether the leader relies on it.
    fail::fail_point!("admin::allow_everybody", |_| Ok(()));
    let allowed = match act.roles() {
        Some(roles) => policy.require_role(principal, roles),
        None => policy.check_certificate(principal),
    };
    allowed.map_err(CallError::from)
}

impl From<Denial> for CallError {
    fn from(denial: Denial) -> Self {
        Self::new(denial.code(), denial.to_string())
    }
}

/// The policy of the replicated state; `None` before there is a cluster.
#[must_use]
pub fn state_policy(state: &ClusterState) -> Option<Policy> {
    let revocations = Revocations::of_state(state.revocations());
    Some(Policy::of(state.acl()?, revocations))
}

/// The rules in force on a node: the state's, or the seed's before there is a state. Roles and rules of an issuer
/// that is no CA of this node's files are left out: an intermediate CA may bear any such name.
#[must_use]
pub fn rules(state: &ClusterState, seed: &Seed) -> Policy {
    let mut policy = state_policy(state).unwrap_or_else(|| seed.policy());
    policy.keep_issuers(&seed.issuers);
    policy
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use hsm_api::ErrorCode;
    use raft_store::state::access::{Acl, RevocationKey};

    use super::*;
    use crate::admin::service::tests::caller;
    use crate::rotation::testing::{ISSUER, World};

    const ALL: [Act; 33] = [
        Act::Init,
        Act::Join,
        Act::SlotKeys,
        Act::CreateJoinToken,
        Act::Status,
        Act::Members,
        Act::CreateKey,
        Act::Rotate,
        Act::ListKeys,
        Act::RotationStatus,
        Act::UnlockSlot,
        Act::WhoAmI,
        Act::KeyDisable,
        Act::KeyEnable,
        Act::KeyDestroy,
        Act::KeyUndoDestroy,
        Act::KeyUsage,
        Act::KeyCleanup,
        Act::KeyAdopt,
        Act::KeyMove,
        Act::KeyRelease,
        Act::GetAcl,
        Act::TestAcl,
        Act::SetAcl,
        Act::Revoke,
        Act::Unrevoke,
        Act::ListRevocations,
        Act::RemoveNode,
        Act::KeepNode,
        Act::TransferLeader,
        Act::RekeyTransport,
        Act::RekeyReplication,
        Act::RekeyStatus,
    ];

    fn allowed(ou: &str, issuer: &str) -> Vec<&'static str> {
        let policy = state_policy(&World::new(1).state).unwrap();
        let may = |act: &Act| authorise(&policy, &caller(ou, issuer), *act).is_ok();
        ALL.iter().filter(|act| may(act)).map(|act| act.name()).collect()
    }

    #[test]
    fn each_role_may_what_it_is_for() {
        assert_eq!(allowed("Admin", ISSUER).len(), ALL.len());
        let reads = [
            "cluster.status",
            "cluster.members",
            "key.list",
            "key.rotation_status",
            "whoami",
            "key.usage",
            "acl.get",
            "acl.test",
            "cluster.rekey_status",
        ];
        let mut audits = reads.to_vec();
        audits.insert(reads.len() - 1, "revocations.list");
        assert_eq!(allowed("Audit", ISSUER), audits);
        let operator = allowed("Ops", ISSUER);
        let operates = [
            "key.create",
            "key.rotate",
            "key.disable",
            "key.enable",
            "key.undo_destroy",
            "key.cleanup",
            "key.adopt",
            "key.move",
            "key.release",
        ];
        assert_eq!(operator.len(), reads.len() + operates.len());
        assert!(operates.iter().all(|act| operator.contains(act)));
        assert_eq!(allowed("Trading", ISSUER), ["whoami"]);
    }

    #[test]
    fn a_refusal_names_every_role_that_would_do() {
        let policy = state_policy(&World::new(1).state).unwrap();
        for act in ALL.iter().filter(|act| act.roles().is_some()) {
            let refusal = authorise(&policy, &caller("Trading", ISSUER), *act).unwrap_err();
            assert!(
                refusal.detail.starts_with("needs one of the roles admin"),
                "{}: {refusal}",
                act.name()
            );
        }
    }

    #[test]
    fn another_cas_certificates_have_no_role() {
        assert_eq!(allowed("Admin", "CN=Other CA"), ["whoami"]);
    }

    #[test]
    fn the_state_rules_once_there_is_one() {
        let admin = caller("Boss", "CN=Seed CA");
        let acl = Acl {
            roles: vec![crate::policy::RoleEntry {
                role: Role::Admin,
                issuer: "CN=Seed CA".to_owned(),
                ou: Some("Boss".to_owned()),
                cn: None,
                spki_sha256: None,
            }],
            ..Acl::default()
        };
        let seed = Seed {
            acl,
            issuers: vec!["CN=Seed CA".to_owned(), ISSUER.to_owned()],
            ..Seed::default()
        };
        let before = rules(&ClusterState::default(), &seed);
        assert!(authorise(&before, &admin, Act::Init).is_ok());
        let after = rules(&World::new(1).state, &seed);
        assert_eq!(
            authorise(&after, &admin, Act::Init).unwrap_err().code,
            ErrorCode::RoleRequired
        );
    }

    /// The cluster's rules may name a CA that has been taken out of this node's files since. An application
    /// CA that may make intermediate CAs could give one of them that name.
    #[test]
    fn an_issuer_that_is_no_ca_of_this_node_has_no_roles_here() {
        let world = World::new(1);
        let admin = caller("Admin", ISSUER);
        let asked = |issuers: Vec<String>| {
            let seed = Seed {
                issuers,
                ..Seed::default()
            };
            authorise(&rules(&world.state, &seed), &admin, Act::Rotate).is_ok()
        };
        assert!(asked(vec![ISSUER.to_owned()]));
        assert!(!asked(vec!["CN=New CA".to_owned()]));
    }

    #[test]
    fn a_revoked_certificate_may_not_even_ask_who_it_is() {
        let revoked = (RevocationKey::CommonName("someone".to_owned()), String::new());
        let policy = Seed {
            revocations: [revoked].into_iter().collect(),
            ..Seed::default()
        }
        .policy();
        let error = authorise(&policy, &caller("Admin", ISSUER), Act::WhoAmI).unwrap_err();
        assert_eq!(error.code, ErrorCode::CertificateRevoked);
        assert!(error.is_refusal());
    }
}
