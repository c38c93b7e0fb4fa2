//! Whom to let in, and who may speak Raft, where this node's own state is not enough: members it cannot know yet
//! (`vouching.rs`), and a peer's progress that only its leader knows.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use openraft::ServerState;
use raft_store::Vote;
use raft_store::names::{Boot, RaftId};
use raft_store::state::node::NodeStatus;

use super::ProposeError;
use super::accusations::Accusers;
use super::handshake::{self, Standing};
use super::shared::Shared;
use super::vouching::{Asking, Word};
use super::wire::{Hello, TurnedAway, Vouched};
use crate::lock::lock;

/// Peers whose runs are remembered: more than a cluster ever has nodes.
const MAX_RUNS: usize = 1024;
/// Terms that a peer may be ahead. At an election every millisecond it takes seven weeks to get there.
const MAX_LEAP: u64 = 1 << 32;

/// What was learned of peers since this run began.
#[derive(Default)]
pub(super) struct Peers {
    /// The run of each peer that was greeted last, and whose log was long enough.
    boots: Mutex<BTreeMap<RaftId, Boot>>,
    /// Members by the word of members, never more than that.
    pub(super) vouched: Mutex<BTreeMap<RaftId, Vouched>>,
    pub(super) asking: Asking,
    pub(super) accusers: Mutex<Accusers>,
    /// When the others were last asked whether they refuse this node too.
    pub(super) asked_others: Mutex<Option<Instant>>,
}

impl Peers {
    /// Compares a new run of a peer with what it has acknowledged, once: nothing that it acknowledges itself
    /// comes before its first greeting.
    fn compare(&self, peer: &Hello, acknowledged: impl FnOnce() -> u64) -> Result<(), TurnedAway> {
        let mut boots = lock(&self.boots);
        if boots.get(&peer.raft_id) == Some(&peer.boot) {
            return Ok(());
        }
        // A joiner that knows nobody yet greets whoever has a certificate, under any id. A run that cannot be
        // remembered is not compared: at its next greeting it would be with its own acknowledgements.
        if boots.len() >= MAX_RUNS && !boots.contains_key(&peer.raft_id) {
            return Ok(());
        }
        handshake::check_log(peer, acknowledged())?;
        boots.insert(peer.raft_id, peer.boot);
        Ok(())
    }
}

impl Shared {
    /// Checks a peer that greets as a member. `certificate` is the name in its verified certificate.
    pub(super) async fn admit(self: &Arc<Self>, certificate: &str, peer: &Hello) -> Result<(), TurnedAway> {
        let checked = self.check(certificate, peer);
        self.look_at_own_log(certificate, peer, &checked);
        match checked? {
            Standing::Known => {}
            Standing::Later if self.is_in_membership(peer) || self.word_of_members(peer).await.is_some() => {}
            Standing::Later => return Err(TurnedAway::Unknown(peer.raft_id)),
        }
        self.check_progress(peer)
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
            Standing::Known => {}
            Standing::Later if self.is_in_membership(peer) => {}
            Standing::Later => return Err(TurnedAway::Unknown(peer.raft_id)),
        }
        self.check_progress(peer)
    }

    fn check(&self, certificate: &str, peer: &Hello) -> Result<Standing, TurnedAway> {
        let published = self.published.load();
        handshake::check_member(&self.control.get(), &published, certificate, peer)
    }

    /// A founder's directory from when it was alone makes a leader of itself, and nobody else's word reaches it.
    /// But raft ids are given by the log: while this node is the only voter and leads, every id of its cluster is
    /// in its state. A peer of this cluster and epoch under another id proves that the log went on elsewhere.
    fn look_at_own_log(&self, certificate: &str, peer: &Hello, checked: &Result<Standing, TurnedAway>) {
        // Its name, cluster and epoch hold then, if its certificate is of this cluster at all.
        let unknown = matches!(checked, Ok(Standing::Later) | Err(TurnedAway::Unknown(_)));
        if !unknown || certificate.is_empty() || !self.leads_alone() {
            return;
        }
        let published = self.published.load();
        let applied = published.applied.map_or(0, |id| id.index);
        let last = self.control.get().last_log.map_or(0, |id| id.index);
        // What is in the log and not applied yet may be its registration.
        let may_be_known = applied < peer.raft_id && peer.raft_id <= last;
        if published.state.meta().is_none() || may_be_known || !self.gate.shut(peer.raft_id) {
            return;
        }
        let why = ProposeError::OlderCopy { node: peer.raft_id };
        self.note_older_copy(&peer.name, peer.raft_id, why);
    }

    /// Whether this node leads and nobody else votes.
    fn leads_alone(&self) -> bool {
        let sample = self.sample.load();
        let Some(metrics) = sample.as_ref().map(|sample| &sample.metrics) else {
            return false;
        };
        let mut voters = metrics.membership_config.voter_ids();
        metrics.state == ServerState::Leader && voters.all(|id| id == metrics.id)
    }

    /// A leader knows what each peer has acknowledged to it, which is newer than any report. Also for a peer
    /// that is not in the state yet: what this run acknowledges from here on must not count against it later.
    fn check_progress(&self, peer: &Hello) -> Result<(), TurnedAway> {
        self.peers_seen
            .compare(peer, || self.acknowledged_by(peer.raft_id))
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
    pub(super) fn name_of(&self, id: RaftId) -> Option<String> {
        if let Some(node) = self.published.load().state.nodes().get(&id) {
            return Some(node.name.to_string());
        }
        let sample = self.sample.load();
        let membership = sample.as_ref()?.metrics.membership_config.membership();
        membership.get_node(&id).map(|node| node.name.clone())
    }

    /// Whether Raft's own messages are taken from a peer: openraft asks nobody who its peers are, so whoever
    /// may send them can depose the leader and write what he likes into every log. A member may, by this node's
    /// state; and one that this node, lagging behind, does not know as a member yet, if Raft's membership has it
    /// as a voter or another member says that it is one. A node that has only registered may not.
    pub(super) async fn may_speak_raft(self: &Arc<Self>, peer: &Hello) -> bool {
        let published = self.published.load_full();
        if let Some(node) = published.state.nodes().get(&peer.raft_id) {
            let same = node.name.as_str() == peer.name && node.incarnation == peer.incarnation;
            match node.status {
                NodeStatus::Member | NodeStatus::Leaving { .. } if same => return true,
                NodeStatus::Joining if same => {}
                _ => return false,
            }
        }
        self.votes(peer) || self.word_of_members(peer).await == Some(Word::Member)
    }

    /// Whether Raft's membership, which the log names before the state does, has this peer as a voter.
    fn votes(&self, peer: &Hello) -> bool {
        self.voter(peer.raft_id).is_some_and(|name| name == peer.name)
    }

    /// The name of a voter of Raft's membership.
    pub(super) fn voter(&self, id: RaftId) -> Option<String> {
        let sample = self.sample.load();
        let membership = &sample.as_ref()?.metrics.membership_config;
        let named = membership.membership().get_node(&id);
        membership.voter_ids().any(|voter| voter == id).then_some(())?;
        named.map(|node| node.name.clone())
    }

    /// Whether a node that this one sends Raft's messages to has a say in who leads: with its answers it could
    /// depose a leader as well as with messages of its own.
    pub(super) fn has_a_say(&self, id: RaftId) -> bool {
        let published = self.published.load();
        let known = published.state.nodes().get(&id);
        known.is_some_and(|node| node.is_member()) || self.voter(id).is_some()
    }

    /// Refuses a term that no elections lead to. A vote is stored before anything is known of it, and openraft
    /// counts one further from it at every election: at the end of the numbers it stops, for good.
    pub(super) fn check_term(&self, vote: &Vote) -> Result<(), String> {
        let own = self.control.get().vote.map_or(0, |vote| vote.leader_id.term);
        let term = vote.leader_id.term;
        if term <= own.saturating_add(MAX_LEAP) {
            return Ok(());
        }
        Err(format!("term {term} is absurd, this node is in term {own}"))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use raft_store::names::{ClusterId, Incarnation};

    use super::super::wire::PROTOCOL;
    use super::*;

    #[test]
    fn a_run_is_compared_with_what_was_acknowledged_before_it_and_never_with_its_own() {
        let peers = Peers::default();
        let hello = |boot, log_index| Hello {
            protocol: PROTOCOL,
            cluster_id: ClusterId([1; 16]),
            epoch: 1,
            name: "n2".into(),
            raft_id: 2,
            incarnation: Incarnation([2; 16]),
            boot: Boot([boot; 16]),
            log_index,
        };
        peers.compare(&hello(1, 5), || 0).unwrap();
        // Greeted again after it has acknowledged more than it began with.
        peers.compare(&hello(1, 5), || 100).unwrap();
        peers.compare(&hello(2, 100), || 100).unwrap();
        let older = peers.compare(&hello(3, 99), || 100).unwrap_err();
        assert!(
            matches!(older, TurnedAway::RolledBack { seen_index: 100, .. }),
            "{older}"
        );
        // Nor is one accused that there was no room to remember.
        let stranger = |raft_id| Hello {
            raft_id,
            ..hello(1, 5)
        };
        for id in 3..2 * MAX_RUNS as RaftId {
            peers.compare(&stranger(id), || 0).unwrap();
        }
        peers.compare(&stranger(9999), || 100).unwrap();
        assert!(lock(&peers.boots).len() <= MAX_RUNS);
    }
}
