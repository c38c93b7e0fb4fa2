//! A kind of change that a release has brought is proposed only once every member runs that release, or a later one: a
//! node that does not know it would stop at the entry, and again at every start.

use raft_store::command::Op;
use raft_store::state::ClusterState;

use super::ProposeError;

/// Refuses what a member does not understand.
pub(super) fn check(state: &ClusterState, op: &Op) -> Result<(), ProposeError> {
    check_level(state, op.name(), needed(op))
}

fn needed(op: &Op) -> u32 {
    // A kind of change stands for one that this release has brought, whether it has brought any or not.
    fail::fail_point!("levels::set_acl_is_new", matches!(op, Op::SetAcl(_)), |_| {
        raft_store::state::FEATURE_LEVEL
    });
    op.min_feature_level()
}

fn check_level(state: &ClusterState, operation: &str, level: u32) -> Result<(), ProposeError> {
    match state.below_level(level).next() {
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
        let refused = |world: &World, level| check_level(&world.state, "rekey_slot", level).unwrap_err();
        assert!(check_level(&world.state, "rekey_slot", 1).is_ok());
        let why = refused(&world, FEATURE_LEVEL).to_string();
        assert!(
            why.contains("rekey_slot") && why.contains("n1") && why.contains("understands 1"),
            "{why}"
        );
        world.report_clock(1, 0);
        assert!(check_level(&world.state, "rekey_slot", FEATURE_LEVEL).is_ok());
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
        assert!(check_level(&world.state, "rekey_slot", FEATURE_LEVEL).is_ok());
    }

    #[test]
    fn everything_that_this_release_proposes_can_be_proposed_from_the_first_entry_on() {
        let world = World::new(3);
        for op in &world.log {
            assert!(check(&world.state, op).is_ok(), "{}", op.name());
        }
    }
}
