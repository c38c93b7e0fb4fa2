//! A kind of change that a release has brought is proposed only once every member runs that release, or a later one: a
//! node that does not know it would stop at the entry, and again at every start.

use raft_store::command::Op;
use raft_store::names::RaftId;
use raft_store::state::ClusterState;

use super::ProposeError;

/// Refuses what a member does not understand.
pub(super) fn check(state: &ClusterState, op: &Op) -> Result<(), ProposeError> {
    check_level(state, op.name(), needed(op), op.takes_out())
}

fn needed(op: &Op) -> u32 {
    // A kind of change stands for one that this release has brought, whether it has brought any or not.
    fail::fail_point!("levels::set_acl_is_new", matches!(op, Op::SetAcl(_)), |_| {
        raft_store::state::FEATURE_LEVEL
    });
    op.min_feature_level()
}

/// What takes a node out needs not be understood by that one, which may be the last of its release, and dead.
fn check_level(
    state: &ClusterState,
    operation: &str,
    level: u32,
    takes_out: Option<RaftId>,
) -> Result<(), ProposeError> {
    let out = takes_out
        .and_then(|id| state.nodes().get(&id))
        .map(|node| &node.name);
    let mut below = state.below_level(level);
    match below.find(|(node, _)| Some(&node.name) != out) {
        None => Ok(()),
        Some((node, understands)) => Err(ProposeError::NotUnderstood {
            operation: operation.to_owned(),
            level,
            node: node.name.to_string(),
            understands,
        }),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use hsm_api::ErrorCode;
    use raft_store::state::FEATURE_LEVEL;

    use super::*;
    use crate::admin::call::CallError;
    use crate::rotation::testing::World;

    #[test]
    fn what_one_member_does_not_understand_is_proposed_by_nobody() {
        let mut world = World::new(3);
        // The founder has reported nothing in this state, so nobody knows that it understands more than the first.
        let refused =
            |world: &World, level| check_level(&world.state, "rekey_slot", level, None).unwrap_err();
        assert!(check_level(&world.state, "rekey_slot", 1, None).is_ok());
        let why = refused(&world, FEATURE_LEVEL).to_string();
        assert!(
            why.contains("rekey_slot") && why.contains("n1") && why.contains("understands 1"),
            "{why}"
        );
        // A node that is taken out is not asked: it may be the last one of its release, and dead.
        assert!(check_level(&world.state, "remove_node", FEATURE_LEVEL, Some(1)).is_ok());
        world.report_clock(1, 0);
        assert!(check_level(&world.state, "rekey_slot", FEATURE_LEVEL, None).is_ok());
        // The next release's.
        assert!(matches!(
            refused(&world, FEATURE_LEVEL + 1),
            ProposeError::NotUnderstood { level, understands, .. }
                if level == FEATURE_LEVEL + 1 && understands == FEATURE_LEVEL
        ));
        let asked = CallError::from(refused(&world, FEATURE_LEVEL + 1));
        assert_eq!(asked.code, ErrorCode::Conflict);
        // Who joins holds nobody up.
        world.join();
        assert!(check_level(&world.state, "rekey_slot", FEATURE_LEVEL, None).is_ok());
    }

    #[test]
    fn everything_that_this_release_proposes_can_be_proposed_from_the_first_entry_on() {
        let world = World::new(3);
        for op in &world.log {
            assert!(check(&world.state, op).is_ok(), "{}", op.name());
        }
    }
}
