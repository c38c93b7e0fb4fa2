//! Peers that refuse this node: whether their word means that it must never run again. Nobody who is not a member by
//! this node's own state ends it, and no single member but its leader.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use raft_store::MemberNode;
use raft_store::names::RaftId;
use raft_store::storage::Poison;

use super::handshake;
use super::membership::member_of;
use super::shared::Shared;
use super::wire::TurnedAway;
use crate::clock;
use crate::lock::lock;

/// Members that have to agree before a node believes that it must never run again, unless its leader says so.
const BELIEVED: usize = 2;
/// Without word of a quorum for this long a node asks the members whether they refuse it, and between two rounds of that.
const ASK_EVERY: Duration = Duration::from_secs(5);

/// Who says that this node must never run again, for each reason.
#[derive(Default)]
pub(super) struct Accusers {
    removed: BTreeSet<RaftId>,
    rolled_back: BTreeSet<RaftId>,
}

impl Accusers {
    /// Whether that is more than one node's mistake or lie: the leader says so, or two members, or the only
    /// other one. Nobody else is heard.
    fn add(
        &mut self,
        poison: &Poison,
        accuser: RaftId,
        leader: Option<RaftId>,
        members: &BTreeSet<RaftId>,
    ) -> bool {
        if !members.contains(&accuser) {
            return false;
        }
        let accusers = match poison {
            Poison::Removed => &mut self.removed,
            Poison::RolledBack { .. } => &mut self.rolled_back,
        };
        accusers.insert(accuser);
        leader == Some(accuser) || accusers.intersection(members).count() >= BELIEVED.min(members.len())
    }
}

impl Shared {
    /// `accuser`, under the certificate of `name`, refuses this node. If its word means that this directory
    /// must never run again, and is to be believed: remember it, then end the process. True if it would be, were it not
    /// one member's alone.
    pub(super) fn accused(&self, accuser: RaftId, name: &str, reason: &TurnedAway) -> bool {
        if let TurnedAway::OtherEpoch { ours, .. } = reason {
            self.note_epoch_of(accuser, name, *ours, reason);
            return false;
        }
        let Some(poison) = handshake::poison_of(&self.control.get(), reason) else {
            return false;
        };
        if !self.is_member(accuser, name) {
            self.note_accusation(
                name,
                accuser,
                reason,
                "a refusal by nobody who is a member is ignored",
            );
            return false;
        }
        if !self.is_believed(accuser, &poison) {
            let what = "one member refuses this node; waiting for another's word";
            self.note_accusation(name, accuser, reason, what);
            return true;
        }
        if self.removed.borrow().is_some() {
            // It is on its way out.
            return false;
        }
        let why = poison.to_string();
        if let Err(error) = self.control.poison(poison.clone()) {
            tracing::error!(%error, "cannot remember that this node must not run again");
        }
        let text = format!("this node may not run with this data directory: {why}");
        // One that was removed may finish what it has begun: everybody knows what it knows. Unless nobody sees to its end.
        let removed = matches!(poison, Poison::Removed);
        if removed && self.removed.send(Some(text.clone())).is_ok() {
            return false;
        }
        (self.options.on_fatal)(text);
        false
    }

    /// Asks the members whether they refuse this node, if it has heard of no quorum for long. One that was removed while it was
    /// away may never hear of it otherwise: Raft's membership has lost it, so nobody calls it; and a learner does not stand
    /// for election, so it calls nobody. `began`: when this node could first have heard of one.
    pub(super) fn ask_if_lost(self: &Arc<Self>, began: Instant) {
        let now = clock::now();
        let unheard = self
            .staleness(now)
            .unwrap_or_else(|| now.saturating_duration_since(began));
        let ended = self.gate.shut_by().is_some() || self.removed.borrow().is_some();
        if unheard < ASK_EVERY || ended {
            return;
        }
        if let Some(running) = self.raft.get() {
            self.ask_others_than(running.id);
        }
    }

    /// Greets every other member: whoever refuses this node too says so. No more often than [`ASK_EVERY`], whatever one
    /// member says: each time costs connections to all others.
    pub(super) fn ask_others_than(self: &Arc<Self>, accuser: RaftId) {
        {
            let now = clock::now();
            let mut asked = lock(&self.peers_seen.asked_others);
            if asked.is_some_and(|at| now.saturating_duration_since(at) < ASK_EVERY) {
                return;
            }
            *asked = Some(now);
        }
        let published = self.published.load();
        let own = self.control.get().raft_id;
        let others = published.state.nodes().iter();
        let others = others.filter(|(id, node)| **id != own && **id != accuser && node.is_member());
        let others: Vec<(RaftId, MemberNode)> = others.map(|(id, node)| (*id, member_of(node))).collect();
        let shared = Arc::clone(self);
        tokio::spawn(async move {
            for (id, node) in others {
                let address = shared.options.peer_address(&node);
                // Connections from before know nothing of a tombstone.
                shared.pool.forget(&(id, address.clone()), clock::now());
                match shared.connect(id, &address).await {
                    Ok(connection) => shared.pool.put(&(id, address), connection),
                    Err(error) => {
                        tracing::debug!(%error, raft_id = id, "a member was asked whether it refuses this node too");
                    }
                }
            }
        });
    }

    /// A peer says that it is of another epoch than this node. The word of one voter that this node's own log names is
    /// enough to stop, until the next start, that this node changes or serves anything: the only voter of a new epoch is
    /// alone at first, and a voter could do this node more harm than that. It is not enough to end the directory.
    fn note_epoch_of(&self, peer: RaftId, name: &str, epoch: u64, reason: &TurnedAway) {
        let own = self.control.get().epoch;
        if epoch <= own {
            return;
        }
        if self.voter(peer).is_none_or(|voter| voter != name) {
            let what = "the word of nobody who votes that this node's epoch has ended is ignored";
            self.note_accusation(name, peer, reason, what);
            return;
        }
        if self.gate.end_epoch(epoch) {
            let why = super::ProposeError::EpochEnded { epoch };
            self.note_older_copy(name, peer, why);
        }
    }

    fn is_member(&self, id: RaftId, name: &str) -> bool {
        let published = self.published.load();
        let node = published.state.nodes().get(&id);
        node.is_some_and(|node| node.is_member() && node.name.as_str() == name)
    }

    /// See [`Accusers::add`]. The leader is who this node last voted for and saw elected.
    fn is_believed(&self, accuser: RaftId, poison: &Poison) -> bool {
        let control = self.control.get();
        let leader = control
            .vote
            .as_ref()
            .filter(|vote| vote.committed)
            .and_then(|vote| vote.leader_id.voted_for());
        let published = self.published.load();
        let members = published
            .state
            .nodes()
            .iter()
            .filter(|(id, node)| **id != control.raft_id && node.is_member())
            .map(|(id, _)| *id)
            .collect();
        lock(&self.peers_seen.accusers).add(poison, accuser, leader, &members)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROLLED_BACK: Poison = Poison::RolledBack {
        durable_index: 1,
        seen_index: 9,
    };

    #[test]
    fn two_members_or_the_leader_are_believed_each_reason_by_itself() {
        let members = BTreeSet::from([2, 3, 4]);
        let mut accusers = Accusers::default();
        assert!(!accusers.add(&Poison::Removed, 2, None, &members));
        assert!(
            !accusers.add(&Poison::Removed, 2, Some(3), &members),
            "twice is no other"
        );
        assert!(!accusers.add(&ROLLED_BACK, 3, None, &members), "another reason");
        assert!(accusers.add(&ROLLED_BACK, 4, Some(4), &members));
        assert!(accusers.add(&Poison::Removed, 3, None, &members));
        assert!(Accusers::default().add(&Poison::Removed, 2, None, &BTreeSet::from([2])));
    }

    #[test]
    fn who_is_no_member_is_not_heard_even_as_the_leader() {
        let mut accusers = Accusers::default();
        for members in [BTreeSet::new(), BTreeSet::from([2]), BTreeSet::from([2, 3])] {
            assert!(!accusers.add(&Poison::Removed, 9, Some(9), &members));
            assert!(!accusers.add(&ROLLED_BACK, 9, Some(9), &members));
        }
        // Nor does somebody count who was a member once.
        assert!(!accusers.add(&Poison::Removed, 2, None, &BTreeSet::from([2, 3])));
        assert!(!accusers.add(&Poison::Removed, 4, None, &BTreeSet::from([3, 4])));
    }
}
