//! Whom to let in and whom to believe, where this node's own state is not enough: members it cannot know
//! yet, a peer's progress that only its leader knows, and words of peers that would end this node.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use openraft::ServerState;
use raft_store::names::{Boot, RaftId};
use raft_store::state::node::NodeStatus;
use raft_store::storage::{Poison, Published};
use tokio::task::JoinSet;

use super::handshake::{self, Standing};
use super::shared::Shared;
use super::wire::{Hello, Request, Response, TurnedAway, Vouched};

/// Asking one member whether another is one.
const ASK: Duration = Duration::from_secs(1);
/// Members that are vouched for and not applied yet: more than a cluster has nodes.
const MAX_VOUCHED: usize = 64;
/// Greetings that may have others ask at a time.
const MAX_ASKING: usize = 4;
/// Members that have to agree before a node that is told it was rolled back believes it, unless its
/// leader says so.
const BELIEVED: usize = 2;

/// What was learned of peers since this run began.
#[derive(Default)]
pub(super) struct Peers {
    /// The run of each peer that was greeted last, and whose log was long enough.
    boots: Mutex<BTreeMap<RaftId, Boot>>,
    /// Members by the word of members.
    vouched: Mutex<BTreeMap<RaftId, Vouched>>,
    asking: Mutex<usize>,
    /// Who says that this node was rolled back.
    accusers: Mutex<BTreeSet<RaftId>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A place among those who ask, given back when dropped.
struct Turn<'a>(&'a Mutex<usize>);

impl<'a> Turn<'a> {
    fn take(asking: &'a Mutex<usize>) -> Option<Self> {
        let mut count = lock(asking);
        (*count < MAX_ASKING).then(|| {
            *count += 1;
            Self(asking)
        })
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *lock(self.0) -= 1;
    }
}

impl Shared {
    /// Checks a peer that greets as a member. `certificate` is the name in its verified certificate.
    pub(super) async fn admit(self: &Arc<Self>, certificate: &str, peer: &Hello) -> Result<(), TurnedAway> {
        match self.check(certificate, peer)? {
            Standing::Known => Ok(()),
            Standing::Later if self.is_in_membership(peer) || self.is_vouched_for(peer).await => Ok(()),
            Standing::Later => Err(TurnedAway::Unknown(peer.raft_id)),
        }
    }

    /// Checks a peer that was dialled because Raft's membership names it.
    pub(super) fn admit_dialled(
        &self,
        target: RaftId,
        certificate: &str,
        peer: &Hello,
    ) -> Result<(), TurnedAway> {
        handshake::check_dialled(target, peer)?;
        match self.check(certificate, peer)? {
            Standing::Known => Ok(()),
            Standing::Later if self.is_in_membership(peer) => Ok(()),
            Standing::Later => Err(TurnedAway::Unknown(peer.raft_id)),
        }
    }

    fn check(&self, certificate: &str, peer: &Hello) -> Result<Standing, TurnedAway> {
        let published = self.published.load();
        let standing = handshake::check_member(&self.control.get(), &published, certificate, peer)?;
        if standing == Standing::Known {
            self.check_progress(peer)?;
        }
        Ok(standing)
    }

    /// A leader knows what each peer has acknowledged to it, which is newer than any report. A new run of
    /// the peer is compared once, at its first greeting: nothing that it acknowledges itself comes earlier.
    fn check_progress(&self, peer: &Hello) -> Result<(), TurnedAway> {
        let mut boots = lock(&self.peers_seen.boots);
        if boots.get(&peer.raft_id) == Some(&peer.boot) {
            return Ok(());
        }
        handshake::check_log(peer, self.acknowledged_by(peer.raft_id))?;
        boots.insert(peer.raft_id, peer.boot);
        Ok(())
    }

    /// Committed entries that a peer has acknowledged to this leader. Others may be taken back.
    fn acknowledged_by(&self, peer: RaftId) -> u64 {
        let sample = self.sample.load();
        let Some(metrics) = sample.as_ref().map(|sample| &sample.metrics) else {
            return 0;
        };
        let Some(replication) = metrics
            .replication
            .as_ref()
            .filter(|_| metrics.state == ServerState::Leader)
        else {
            return 0;
        };
        let matched = replication.get(&peer).copied().flatten().map_or(0, |id| id.index);
        let committed = metrics.last_applied.map_or(0, |id| id.index);
        matched.min(committed)
    }

    /// Whether Raft's membership, which the log names before the state does, has this peer.
    fn is_in_membership(&self, peer: &Hello) -> bool {
        self.name_of(peer.raft_id).is_some_and(|name| name == peer.name)
    }

    /// The name of a member by the state, or by Raft's membership.
    fn name_of(&self, id: RaftId) -> Option<String> {
        if let Some(node) = self.published.load().state.nodes().get(&id) {
            return Some(node.name.to_string());
        }
        let sample = self.sample.load();
        let membership = sample.as_ref()?.metrics.membership_config.membership();
        membership.get_node(&id).map(|node| node.name.clone())
    }

    /// Whether a member that this node knows knows this peer as one.
    async fn is_vouched_for(self: &Arc<Self>, peer: &Hello) -> bool {
        let said = Vouched {
            name: peer.name.clone(),
            incarnation: peer.incarnation,
        };
        if let Some(known) = lock(&self.peers_seen.vouched).get(&peer.raft_id) {
            return *known == said;
        }
        let published = self.published.load_full();
        if !published.state.nodes().contains(&self.control.get().raft_id) {
            // A joiner that has not received its own registration knows nobody it could ask; it has no key
            // yet, and takes none that the members' signatures do not vouch for.
            return true;
        }
        let Some(_turn) = Turn::take(&self.peers_seen.asking) else {
            return false;
        };
        let holds = self.ask_members(&published, peer.raft_id).await == Some(said.clone());
        if holds {
            let mut vouched = lock(&self.peers_seen.vouched);
            if vouched.len() >= MAX_VOUCHED {
                vouched.clear();
            }
            vouched.insert(peer.raft_id, said);
        }
        holds
    }

    /// The first member's word on a raft id.
    async fn ask_members(self: &Arc<Self>, published: &Published, id: RaftId) -> Option<Vouched> {
        let own = self.control.get().raft_id;
        let mut asked = JoinSet::new();
        for (member, node) in published.state.nodes().iter() {
            if *member == own || node.status != NodeStatus::Member {
                continue;
            }
            let (shared, member) = (Arc::clone(self), *member);
            let address = self.options.peer_address(&raft_store::MemberNode {
                name: node.name.to_string(),
                cluster_address: node.cluster_address.clone(),
            });
            asked.spawn(async move { shared.call(member, &address, &Request::Vouch(id), ASK).await });
        }
        while let Some(answer) = asked.join_next().await {
            if let Ok(Ok(Response::Vouch(Some(vouched)))) = answer {
                return Some(vouched);
            }
        }
        None
    }

    /// This node's word on a raft id: what its state says.
    pub(super) fn vouch(&self, id: RaftId) -> Option<Vouched> {
        let published = self.published.load();
        let node = published.state.nodes().get(&id)?;
        (!matches!(node.status, NodeStatus::Removed { .. })).then(|| Vouched {
            name: node.name.to_string(),
            incarnation: node.incarnation,
        })
    }

    /// `accuser`, under the certificate of `name`, refuses this node. If its word means that this directory
    /// must never run again, and is to be believed: remember it, then end the process.
    pub(super) fn accused(&self, accuser: RaftId, name: &str, reason: &TurnedAway) {
        let Some(poison) = handshake::poison_of(&self.control.get(), reason) else {
            return;
        };
        if self.name_of(accuser).as_deref() != Some(name) {
            tracing::warn!(target: "audit", name, %reason, "a refusal by no known member is ignored");
            return;
        }
        if matches!(poison, Poison::RolledBack { .. }) && !self.is_believed(accuser) {
            tracing::error!(target: "audit", name, %reason, "one member refuses this node; waiting for another's word");
            return;
        }
        let why = poison.to_string();
        if let Err(error) = self.control.poison(poison) {
            tracing::error!(%error, "cannot remember that this node must not run again");
        }
        (self.options.on_fatal)(format!("this node may not run with this data directory: {why}"));
    }

    /// Whether that this node was rolled back is more than one node's mistake: its leader says so, by the
    /// last vote it gave, or two members, or the only other one.
    fn is_believed(&self, accuser: RaftId) -> bool {
        let control = self.control.get();
        let leader = control
            .vote
            .as_ref()
            .filter(|vote| vote.committed)
            .and_then(|vote| vote.leader_id.voted_for());
        let published = self.published.load();
        let others: BTreeSet<RaftId> = published
            .state
            .nodes()
            .iter()
            .filter(|(id, node)| **id != control.raft_id && node.status == NodeStatus::Member)
            .map(|(id, _)| *id)
            .collect();
        if !others.contains(&accuser) {
            return false;
        }
        let mut accusers = lock(&self.peers_seen.accusers);
        accusers.insert(accuser);
        leader == Some(accuser) || accusers.len() >= BELIEVED.min(others.len())
    }
}
