//! Nodes that leave: the membership driver's part about them. A node that is asked to leave is taken out of Raft's voters,
//! alone or together with the one that takes its place, then out of Raft, and buried in the state last: until then it is a
//! member to everybody, and whoever leads finds in the state what is to be done.

use std::sync::Arc;
use std::time::{Duration, Instant};

use raft_store::MemberNode;
use raft_store::command::{BuryNode, Op, Origin, RequestId};
use raft_store::names::{NodeName, RaftId};
use raft_store::state::ClusterState;
use raft_store::state::node::{Node, NodeStatus};

use super::connection::CallFailure;
use super::membership::{Membership, Step, member_of};
use super::quorum;
use super::shared::Shared;
use crate::clock;
use crate::rotation::reach;

/// Attempts to tell a removed node that it has to go. One that is away finds out by itself: with no word of a quorum it asks
/// the members that it knows ([`Shared::ask_if_lost`]).
const TOLD: usize = 5;
/// Between them.
const PAUSE: Duration = Duration::from_millis(300);

/// The next step for nodes that leave.
pub(super) fn decide(state: &ClusterState, raft: &Membership) -> Option<Step> {
    state.nodes().iter().find_map(|(id, node)| match &node.status {
        // A learner that never joined is buried while Raft still sends it the log.
        NodeStatus::Removed { .. } if raft.nodes.contains_key(id) && !raft.voters.contains(id) => {
            Some(Step::Forget(*id))
        }
        NodeStatus::Leaving { successor, .. } => of_leaving(state, raft, *id, successor.as_ref()),
        _ => None,
    })
}

fn of_leaving(
    state: &ClusterState,
    raft: &Membership,
    id: RaftId,
    successor: Option<&NodeName>,
) -> Option<Step> {
    if !raft.voters.contains(&id) {
        return Some(if raft.nodes.contains_key(&id) {
            Step::Forget(id)
        } else {
            Step::Bury(id)
        });
    }
    let place = match successor {
        None => None,
        Some(name) => successor_of(state, raft, name)?,
    };
    // What was so when an administrator asked may not be so any more: then it waits.
    quorum::without(&raft.voters, &raft.heard, id, place).ok()?;
    // A leader does not take itself out while another can lead.
    if raft.id == Some(id) && raft.voters.len() > 1 {
        return Some(Step::HandOver(id));
    }
    Some(match place {
        None => Step::Expel(id),
        Some(new) => Step::Swap { old: id, new },
    })
}

/// Who takes the place, once it can; nobody has to if it votes by now. `None`: it cannot yet.
fn successor_of(state: &ClusterState, raft: &Membership, name: &NodeName) -> Option<Option<RaftId>> {
    let (id, node) = state.node_named(name)?;
    if raft.voters.contains(&id) {
        return Some(None);
    }
    let ready = node.status == NodeStatus::Member && raft.nodes.contains_key(&id) && raft.heard.contains(&id);
    ready.then_some(Some(id))
}

/// Whether a node is to take another's place: it does not vote before that one stops.
pub(super) fn takes_a_place(state: &ClusterState, raft: &Membership, name: &NodeName) -> bool {
    let waits = |node: &Node| matches!(&node.status, NodeStatus::Leaving { successor: Some(successor), .. } if successor == name);
    let mut nodes = state.nodes().iter();
    nodes.any(|(id, node)| raft.voters.contains(id) && waits(node))
}

impl Shared {
    /// Makes a node that is out of Raft's membership a tombstone, and tells it.
    pub(super) async fn bury(self: &Arc<Self>, id: RaftId) -> Result<(), String> {
        reach("membership::before_bury").await;
        let own = self.raft.get().ok_or("raft is not running")?.id;
        let nonce = clock::random_id();
        let request = RequestId::Node { node: own, nonce };
        let op = Op::BuryNode(BuryNode { node: id });
        let buried = self.propose(request, [0; 32], Origin::Node(own), op).await;
        buried.map_err(|error| error.to_string())?;
        reach("membership::after_bury").await;
        let peer = self.name_of(id).unwrap_or_default();
        tracing::info!(target: "audit", epoch = crate::logging::epoch(), peer, raft_id = id, "node removed");
        self.tell_removed(id);
        Ok(())
    }

    /// Has a node told that its tombstone is applied here, if it is. A few attempts: it may be gone already.
    pub(super) fn tell_removed(self: &Arc<Self>, id: RaftId) {
        let published = self.published.load();
        let known = published.state.nodes().get(&id);
        let Some(node) = known
            .filter(|node| !node.is_standing())
            .map(|node| member_of(node))
        else {
            return;
        };
        let shared = Arc::clone(self);
        tokio::spawn(async move { shared.send_away(id, node).await });
    }

    /// Dials a removed node: what greets it finds its tombstone, and says so.
    async fn send_away(self: Arc<Self>, id: RaftId, node: MemberNode) {
        let address = self.options.peer_address(&node);
        for _ in 0..TOLD {
            // Connections from before know nothing of a tombstone.
            self.pool.forget(&(id, address.clone()), Instant::now());
            match self.connect(id, &address).await {
                Ok(connection) => drop(connection),
                Err(CallFailure::Away { .. }) => return,
                Err(error) => tracing::debug!(%error, raft_id = id, "a removed node does not answer"),
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use raft_store::command::{KeepNode, RemoveNode};

    use super::super::membership::{self, tests::raft_of};
    use super::*;
    use crate::rotation::testing::World;

    const VOTERS: [RaftId; 3] = [1, 2, 3];

    /// Voters 1 to 3, whatever their raft ids are, of which one is asked to leave.
    fn of_three(leaves: usize, successor: Option<&str>) -> (World, Vec<RaftId>) {
        let mut world = World::new(VOTERS.len() as u64);
        let voters: Vec<RaftId> = world.voters.iter().copied().collect();
        leave(&mut world, voters[leaves], successor);
        (world, voters)
    }

    fn leave(world: &mut World, node: RaftId, successor: Option<&str>) {
        world.ok(Op::RemoveNode(RemoveNode {
            node,
            successor: successor.and_then(|name| NodeName::new(name).ok()),
            lose_keys: false,
        }));
    }

    fn all(world: &World) -> BTreeSet<RaftId> {
        world.state.nodes().iter().map(|(id, _)| *id).collect()
    }

    fn next(world: &World, heard: &BTreeSet<RaftId>) -> Option<Step> {
        membership::decide(&world.state, &raft_of(world, heard))
    }

    #[test]
    fn a_voter_is_expelled_then_buried() {
        let (mut world, voters) = of_three(2, None);
        let heard = all(&world);
        assert_eq!(next(&world, &heard), Some(Step::Expel(voters[2])));
        world.voters.remove(&voters[2]);
        let mut raft = raft_of(&world, &heard);
        assert_eq!(
            membership::decide(&world.state, &raft),
            Some(Step::Forget(voters[2])),
            "a learner still"
        );
        raft.learners.remove(&voters[2]);
        raft.nodes.remove(&voters[2]);
        assert_eq!(
            membership::decide(&world.state, &raft),
            Some(Step::Bury(voters[2]))
        );
        world.ok(Op::BuryNode(BuryNode { node: voters[2] }));
        assert_eq!(membership::decide(&world.state, &raft), None);
    }

    #[test]
    fn nobody_is_expelled_whose_vote_is_needed() {
        let (world, voters) = of_three(2, None);
        let heard = BTreeSet::from([voters[0], voters[2]]);
        assert_eq!(next(&world, &heard), None, "the other one has died since");
        let heard = BTreeSet::from([voters[0], voters[1]]);
        assert_eq!(next(&world, &heard), Some(Step::Expel(voters[2])));
    }

    #[test]
    fn a_leader_steps_aside_before_it_is_taken_out() {
        let (world, voters) = of_three(0, None);
        assert_eq!(next(&world, &all(&world)), Some(Step::HandOver(voters[0])));
        let alone = BTreeSet::from([voters[0], voters[1]]);
        assert_eq!(
            next(&world, &alone),
            None,
            "of the two that would be left one is dead"
        );
    }

    #[test]
    fn a_successor_takes_the_place_in_one_change_and_not_before_it_has_proven_every_key() {
        let mut world = World::new(3);
        let voters: Vec<RaftId> = world.voters.iter().copied().collect();
        let name = format!("n{}", world.index + 3);
        leave(&mut world, voters[2], Some(&name));
        assert_eq!(next(&world, &all(&world)), None, "it has not joined yet");
        let new = world.join();
        assert_eq!(format!("n{new}"), name);
        assert_eq!(next(&world, &all(&world)), None, "it has proven nothing yet");
        world.prove(new);
        assert_eq!(next(&world, &all(&world)), Some(Step::Admit(new)));
        world.admit(new);
        let swap = Step::Swap { old: voters[2], new };
        assert_eq!(
            next(&world, &all(&world)),
            Some(swap),
            "and it is not promoted alone"
        );
        let silent = BTreeSet::from([voters[0], voters[1], voters[2]]);
        assert_eq!(next(&world, &silent), None, "a dead one takes no place");
        // Not after all: both vote then.
        world.ok(Op::KeepNode(KeepNode { node: voters[2] }));
        assert_eq!(next(&world, &all(&world)), Some(Step::Promote(new)));
    }

    #[test]
    fn the_only_voter_is_replaced_without_anybody_to_hand_over_to() {
        let mut world = World::new(1);
        let name = format!("n{}", world.index + 3);
        leave(&mut world, 1, Some(&name));
        let new = world.join();
        world.admit(new);
        assert_eq!(next(&world, &all(&world)), Some(Step::Swap { old: 1, new }));
    }

    #[test]
    fn a_learner_that_never_joined_is_forgotten() {
        let mut world = World::new(1);
        let failed = world.join();
        leave(&mut world, failed, None);
        assert_eq!(next(&world, &all(&world)), Some(Step::Forget(failed)));
    }

    #[test]
    fn a_joint_configuration_is_finished_before_anybody_leaves() {
        let (world, _) = of_three(2, None);
        let mut raft = raft_of(&world, &all(&world));
        raft.joint = true;
        assert_eq!(membership::decide(&world.state, &raft), Some(Step::FinishJoint));
    }
}
