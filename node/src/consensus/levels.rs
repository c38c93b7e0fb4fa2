//! A kind of change that a release has brought is proposed only once every member runs that release, or a later one: a
//! node that does not know it would stop at the entry, and again at every start.

use std::collections::BTreeSet;

use raft_store::command::Op;
use raft_store::names::{NodeName, RaftId};
use raft_store::state::ClusterState;

use super::ProposeError;

/// Refuses what a member does not understand. `silent`: whom this leader has not heard from for long.
pub(super) fn check(
    state: &ClusterState,
    op: &Op,
    silent: impl FnOnce() -> BTreeSet<RaftId>,
) -> Result<(), ProposeError> {
    let not_asked = op.takes_out().map(|out| {
        let mut not_asked = silent();
        not_asked.insert(out);
        not_asked
    });
    let level = op.min_feature_level();
    check_level(state, op.name(), level, &not_asked.unwrap_or_default())
}

/// What takes a node out needs not be understood by that one, which may be of an earlier release, and dead; nor by others
/// that are: two of them would keep each other in. One that comes back with its old binary stops at the entry, and says
/// which release it needs.
fn check_level(
    state: &ClusterState,
    operation: &str,
    level: u32,
    not_asked: &BTreeSet<RaftId>,
) -> Result<(), ProposeError> {
    let is_asked = |name: &NodeName| {
        let id = state.node_named(name).map(|(id, _)| id);
        id.is_none_or(|id| !not_asked.contains(&id))
    };
    let mut below = state.below_level(level);
    match below.find(|(node, _)| is_asked(&node.name)) {
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
    use raft_store::command::{BuryNode, KeepNode, RemoveNode};
    use raft_store::state::FEATURE_LEVEL;

    use super::*;
    use crate::admin::call::CallError;
    use crate::rotation::testing::World;

    #[test]
    fn what_one_member_does_not_understand_is_proposed_by_nobody() {
        let mut world = World::new(3);
        // The founder has reported nothing in this state, so nobody knows that it understands more than the first.
        let asked = |world: &World, level| check_level(&world.state, "rekey_slot", level, &BTreeSet::new());
        let refused = |world: &World, level| asked(world, level).unwrap_err();
        assert!(asked(&world, 1).is_ok());
        let why = refused(&world, FEATURE_LEVEL).to_string();
        assert!(
            why.contains("rekey_slot") && why.contains("n1") && why.contains("understands 1"),
            "{why}"
        );
        // A node that is taken out is not asked: it may be the last one of its release, and dead.
        assert!(check_level(&world.state, "remove_node", FEATURE_LEVEL, &[1].into()).is_ok());
        world.report_clock(1, 0);
        assert!(asked(&world, FEATURE_LEVEL).is_ok());
        // The next release's.
        assert!(matches!(
            refused(&world, FEATURE_LEVEL + 1),
            ProposeError::NotUnderstood { level, understands, .. }
                if level == FEATURE_LEVEL + 1 && understands == FEATURE_LEVEL
        ));
        let why = CallError::from(refused(&world, FEATURE_LEVEL + 1));
        assert_eq!(why.code, ErrorCode::Conflict);
        // Who joins holds nobody up.
        world.join();
        assert!(asked(&world, FEATURE_LEVEL).is_ok());
    }

    #[test]
    fn everything_that_this_release_proposes_can_be_proposed_from_the_first_entry_on() {
        let world = World::new(3);
        for op in &world.log {
            assert!(check(&world.state, op, BTreeSet::new).is_ok(), "{}", op.name());
        }
    }

    #[test]
    fn two_dead_members_of_an_earlier_release_do_not_keep_each_other_in() {
        let mut world = World::new(5);
        let ids: Vec<RaftId> = world.voters.iter().copied().collect();
        world.report_clock(1, 0);
        let dead = [ids[3], ids[4]];
        for node in dead {
            world.report_level(node, FEATURE_LEVEL - 1);
        }
        let silent = || BTreeSet::from(dead);
        for node in dead {
            let remove = Op::RemoveNode(RemoveNode {
                node,
                successor: None,
                lose_keys: false,
            });
            assert!(check(&world.state, &remove, silent).is_ok());
            let one = || BTreeSet::from([node]);
            assert!(
                check(&world.state, &remove, one).is_err(),
                "the other one answers, and would stop at it"
            );
            assert!(check(&world.state, &remove, BTreeSet::new).is_err());
            let bury = Op::BuryNode(BuryNode { node });
            assert!(check(&world.state, &bury, silent).is_ok());
            // Whoever takes back that it leaves, stays, and would stop at it.
            let keep = Op::KeepNode(KeepNode { node });
            assert!(check(&world.state, &keep, silent).is_err());
        }
    }
}
