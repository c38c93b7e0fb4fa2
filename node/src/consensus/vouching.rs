//! Members that this node cannot know yet: it asks those it knows for their word, for few peers at a time, and gives its
//! own.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use raft_store::names::RaftId;
use raft_store::storage::Published;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::membership::member_of;
use super::shared::Shared;
use super::wire::{Hello, Request, Response, Vouched};
use crate::lock::lock;

/// Asking one member whether another is one.
const ASK: Duration = Duration::from_secs(1);
/// Members that are vouched for and not applied yet: more than a cluster has nodes.
const MAX_VOUCHED: usize = 64;
/// Peers for which others are asked at a time, each once: one that greets again and again takes no other's turn.
const MAX_ASKING: usize = 4;
/// How long a greeting waits for its turn.
const WAIT: Duration = Duration::from_millis(500);

/// What members say of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    Registered,
    Member,
}

/// The peers for which others are asked now, by the names in their certificates.
#[derive(Default)]
pub(super) struct Asking {
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
    /// What a member that this node knows says of a peer that its own state lacks, or lags behind with.
    pub(super) async fn word_of_members(self: &Arc<Self>, peer: &Hello) -> Option<Word> {
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
            if *member == own || !node.is_member() {
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
        node.is_standing().then(|| Vouched {
            name: node.name.to_string(),
            incarnation: node.incarnation,
            member: node.is_member(),
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
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
}
