//! Revocations that a member adds in its own name, because they stand in its files. The leader takes its word, as it does
//! for an administrator's call; so whatever a member revokes is in the leader's audit as that member's act, no more is
//! kept than of administrators, and what is revoked already makes no entry in the log.

use std::sync::Arc;

use raft_store::command::{AddRevocations, Bounded, Done, Invalid, Op, Origin, Refusal, RequestId};
use raft_store::names::RaftId;
use raft_store::state::ClusterState;
use raft_store::state::access::RevocationKey;

use super::ProposeError;
use super::shared::Shared;
use crate::admin::access::{MAX_KEPT, listed};
use crate::admin::audit::plain;
use crate::admin::seeding::missing;

impl Shared {
    /// `node` is the TLS peer, or this node itself.
    pub(super) async fn revoke_for_member(
        self: &Arc<Self>,
        id: RequestId,
        node: RaftId,
        asked: AddRevocations,
    ) -> Result<Done, ProposeError> {
        let lacking = lacking(&self.published.load().state, &asked);
        let lacking = lacking.map_err(ProposeError::Refused)?;
        if lacking.is_empty() {
            return Ok(Done::Ok);
        }
        let shared = Arc::clone(self);
        // In a task of its own: a member that hangs up must not take the line with it.
        let revoking = self
            .runtime
            .spawn(async move { shared.revoke(id, node, lacking).await });
        revoking
            .await
            .unwrap_or_else(|error| Err(ProposeError::Fatal(error.to_string())))
    }

    async fn revoke(
        self: &Arc<Self>,
        id: RequestId,
        node: RaftId,
        revocations: Vec<(RevocationKey, String)>,
    ) -> Result<Done, ProposeError> {
        let added = revocations.len();
        let resource = plain(&listed(revocations.iter().map(|(key, _)| key)));
        let op = Op::AddRevocations(AddRevocations { revocations });
        let proposed = self.propose(id, [0; 32], Origin::Node(node), op).await;
        let outcome = match &proposed {
            Ok(_) => "done",
            Err(ProposeError::Unknown) => "unknown",
            // What is refused has a line of its own.
            Err(_) => return proposed,
        };
        let peer = self.name_of(node).unwrap_or_default();
        tracing::info!(
            target: "audit",
            epoch = crate::logging::epoch(),
            peer,
            raft_id = node,
            action = "revocations.add",
            resource,
            place = "leader",
            added,
            outcome,
            "revocations added for a member"
        );
        proposed
    }
}

/// What the state does not have yet, if there is room for it. Reasons are made what administrators have to write: one
/// line of bounded length, because people are shown it.
fn lacking(state: &ClusterState, asked: &AddRevocations) -> Result<Vec<(RevocationKey, String)>, Refusal> {
    let mut lacking = missing(&asked.revocations, state);
    has_room(state.revocations().len(), lacking.len())?;
    for (_, reason) in &mut lacking {
        *reason = plain(reason);
    }
    Ok(lacking)
}

fn has_room(kept: usize, more: usize) -> Result<(), Refusal> {
    let wanted = kept.saturating_add(more);
    if more == 0 || wanted <= MAX_KEPT {
        return Ok(());
    }
    let refused = Invalid::TooLarge {
        what: Bounded::Revocations,
        size: wanted as u64,
        most: MAX_KEPT as u64,
    };
    Err(refused.into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::rotation::testing::World;

    fn revoke(cn: &str, reason: &str) -> AddRevocations {
        AddRevocations {
            revocations: vec![(RevocationKey::CommonName(cn.to_owned()), reason.to_owned())],
        }
    }

    #[test]
    fn a_member_adds_what_is_lacking_in_one_line_of_bounded_length() {
        let mut world = World::new(1);
        world.ok(Op::AddRevocations(revoke("a", "lost")));
        assert!(lacking(&world.state, &revoke("a", "stolen")).unwrap().is_empty());
        let added = lacking(&world.state, &revoke("b", "\u{1b}[2J\nlost")).unwrap();
        assert_eq!(added[0].1, "\u{fffd}[2J\u{fffd}lost");
        let long = lacking(&world.state, &revoke("b", &"x".repeat(60_000))).unwrap();
        assert!(long[0].1.len() < 1000);
    }

    #[test]
    fn members_add_no_more_than_administrators() {
        assert_eq!(has_room(MAX_KEPT - 1, 1), Ok(()));
        assert_eq!(has_room(MAX_KEPT, 0), Ok(()));
        let refusal = has_room(MAX_KEPT - 1, 2).unwrap_err().to_string();
        assert!(
            refusal.contains("50001 revoked certificates, at most 50000"),
            "{refusal}"
        );
    }
}
