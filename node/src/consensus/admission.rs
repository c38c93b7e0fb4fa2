//! Whom to let in and whom to believe, where this node's own state is not enough: members it cannot know
//! yet, a peer's progress that only its leader knows, and words of peers that would end this node. Nobody who
//! is not a member by this node's own state ends it, and no single member but its leader.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use openraft::ServerState;
use raft_store::Vote;
use raft_store::names::{Boot, RaftId};
use raft_store::state::node::NodeStatus;
use raft_store::storage::{Poison, Published};
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::ProposeError;
use super::handshake::{self, Standing};
use super::membership::member_of;
use super::shared::Shared;
use super::wire::{Hello, Request, Response, TurnedAway, Vouched};

/// Asking one member whether another is one.
const ASK: Duration = Duration::from_secs(1);
/// Members that are vouched for and not applied yet: more than a cluster has nodes.
const MAX_VOUCHED: usize = 64;
/// Peers whose runs are remembered: more than a cluster ever has nodes.
const MAX_RUNS: usize = 1024;
/// Peers for which others are asked at a time, each once: one that greets again and again takes no other's turn.
const MAX_ASKING: usize = 4;
/// How long a greeting waits for its turn.
const WAIT: Duration = Duration::from_millis(500);
/// Terms that a peer may be ahead. At an election every millisecond it takes seven weeks to get there.
const MAX_LEAP: u64 = 1 << 32;
/// Members that have to agree before a node believes that it must never run again, unless its leader says so.
const BELIEVED: usize = 2;

/// What was learned of peers since this run began.
#[derive(Default)]
pub(super) struct Peers {
    /// The run of each peer that was greeted last, and whose log was long enough.
    boots: Mutex<BTreeMap<RaftId, Boot>>,
    /// Members by the word of members, never more than that.
    vouched: Mutex<BTreeMap<RaftId, Vouched>>,
    asking: Asking,
    accusers: Mutex<Accusers>,
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

/// What members say of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    Registered,
    Member,
}

/// Who says that this node must never run again, for each reason.
#[derive(Default)]
struct Accusers {
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

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The peers for which others are asked now, by the names in their certificates.
#[derive(Default)]
struct Asking {
    names: Mutex<BTreeSet<String>>,
    over: Notify,
}

impl Asking {
    /// A turn, for which is waited a little.
    async fn turn(&self, name: &str) -> Option<Turn<'_>> {
        let taken = async {
            loop {
                // Before looking: a turn that ends from here on is heard of.
                let over = self.over.notified();
                if let Some(turn) = self.take(name) {
                    return turn;
                }
                over.await;
            }
        };
        tokio::time::timeout(WAIT, taken).await.ok()
    }

    fn take(&self, name: &str) -> Option<Turn<'_>> {
        let mut names = lock(&self.names);
        if names.len() >= MAX_ASKING || !names.insert(name.to_owned()) {
            return None;
        }
        let name = name.to_owned();
        Some(Turn { of: self, name })
    }
}

/// A place among those, given back when dropped.
struct Turn<'a> {
    of: &'a Asking,
    name: String,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.of.names).remove(&self.name);
        self.of.over.notify_waiters();
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
                NodeStatus::Member if same => return true,
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
    fn voter(&self, id: RaftId) -> Option<String> {
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
        known.is_some_and(|node| node.status == NodeStatus::Member) || self.voter(id).is_some()
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

    /// What a member that this node knows says of a peer that its own state lacks, or lags behind with.
    async fn word_of_members(self: &Arc<Self>, peer: &Hello) -> Option<Word> {
        let word = |known: &Vouched| {
            let same = known.name == peer.name && known.incarnation == peer.incarnation;
            same.then_some(if known.member {
                Word::Member
            } else {
                Word::Registered
            })
        };
        // Only members are remembered: who is registered may be one a moment later.
        let remembered = || lock(&self.peers_seen.vouched).get(&peer.raft_id).map(word);
        if let Some(known) = remembered() {
            return known;
        }
        let published = self.published.load_full();
        if !published.state.nodes().contains(&self.control.get().raft_id) {
            // A joiner that has not received its own registration knows nobody it could ask; it has no key
            // yet, and takes none that the members' signatures do not vouch for.
            return Some(Word::Member);
        }
        let _turn = self.peers_seen.asking.turn(&peer.name).await?;
        // Another greeting of the same peer may have been answered meanwhile.
        if let Some(known) = remembered() {
            return known;
        }
        let known = self.ask_members(&published, peer).await?;
        if known.member {
            let mut vouched = lock(&self.peers_seen.vouched);
            if vouched.len() >= MAX_VOUCHED {
                vouched.clear();
            }
            vouched.insert(peer.raft_id, known.clone());
        }
        word(&known)
    }

    /// What members say of a peer's raft id: the first who has it as a member counts, some may lag behind.
    async fn ask_members(self: &Arc<Self>, published: &Published, peer: &Hello) -> Option<Vouched> {
        let (own, id) = (self.control.get().raft_id, peer.raft_id);
        let mut asked = JoinSet::new();
        for (member, node) in published.state.nodes().iter() {
            if *member == own || node.status != NodeStatus::Member {
                continue;
            }
            let (shared, member) = (Arc::clone(self), *member);
            let known = published.membership.membership().get_node(&member).cloned();
            let known = known.unwrap_or_else(|| member_of(node));
            let address = self.options.peer_address(&known);
            asked.spawn(async move { shared.call(member, &address, &Request::Vouch(id), ASK).await });
        }
        let mut registered = None;
        while let Some(answer) = asked.join_next().await {
            match answer {
                Ok(Ok(Response::Vouch(Some(known)))) if known.member => return Some(known),
                Ok(Ok(Response::Vouch(Some(known)))) => registered = Some(known),
                _ => {}
            }
        }
        registered
    }

    /// This node's word on a raft id: what its state says.
    pub(super) fn vouch(&self, id: RaftId) -> Option<Vouched> {
        let published = self.published.load();
        let node = published.state.nodes().get(&id)?;
        (!matches!(node.status, NodeStatus::Removed { .. })).then(|| Vouched {
            name: node.name.to_string(),
            incarnation: node.incarnation,
            member: node.status == NodeStatus::Member,
        })
    }

    /// `accuser`, under the certificate of `name`, refuses this node. If its word means that this directory
    /// must never run again, and is to be believed: remember it, then end the process.
    pub(super) fn accused(&self, accuser: RaftId, name: &str, reason: &TurnedAway) {
        let Some(poison) = handshake::poison_of(&self.control.get(), reason) else {
            return;
        };
        if !self.is_member(accuser, name) {
            self.note_accusation(
                name,
                accuser,
                reason,
                "a refusal by nobody who is a member is ignored",
            );
            return;
        }
        if !self.is_believed(accuser, &poison) {
            let what = "one member refuses this node; waiting for another's word";
            self.note_accusation(name, accuser, reason, what);
            return;
        }
        let why = poison.to_string();
        if let Err(error) = self.control.poison(poison) {
            tracing::error!(%error, "cannot remember that this node must not run again");
        }
        (self.options.on_fatal)(format!("this node may not run with this data directory: {why}"));
    }

    fn is_member(&self, id: RaftId, name: &str) -> bool {
        let published = self.published.load();
        let node = published.state.nodes().get(&id);
        node.is_some_and(|node| node.status == NodeStatus::Member && node.name.as_str() == name)
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
            .filter(|(id, node)| **id != control.raft_id && node.status == NodeStatus::Member)
            .map(|(id, _)| *id)
            .collect();
        lock(&self.peers_seen.accusers).add(poison, accuser, leader, &members)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use raft_store::names::{ClusterId, Incarnation};

    use super::super::wire::PROTOCOL;
    use super::*;

    #[tokio::test]
    async fn a_peer_that_greets_again_and_again_takes_no_other_peers_turn() {
        let asking = Asking::default();
        let loud = asking.turn("loud").await.unwrap();
        assert!(asking.turn("loud").await.is_none());
        let others: Vec<_> = (0..MAX_ASKING - 1)
            .map(|number| asking.take(&number.to_string()).unwrap())
            .collect();
        assert!(asking.turn("late").await.is_none());
        // Who waits has the turn of whoever is answered first.
        let (late, ()) = tokio::join!(asking.turn("late"), async { drop(loud) });
        assert!(late.is_some());
        drop((late, others));
        assert!(lock(&asking.names).is_empty());
    }

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
