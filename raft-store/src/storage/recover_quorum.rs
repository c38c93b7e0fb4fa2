//! Most voters are lost for good: makes the node of this store the only voter of a new epoch. Everything is decided and
//! checked in memory first; then one batch of sled holds the vote, a membership of this node alone and the command that
//! begins the epoch, so that there is one moment at which it happens. `control` follows, and where it was killed before
//! it did, the next open brings it up (`recover::own_recovery`).
//!
//! The log is kept whole, and all of it becomes committed by the node's next start: an entry that was acknowledged may be
//! among those of which this node never heard that they were. One of which nobody knew the outcome may come true by it.

use std::collections::{BTreeMap, BTreeSet};

use openraft::{CommittedLeaderId, EntryPayload, Membership};

use super::control::Control;
use super::error::StoreFailure;
use super::frame::{LOG, VOTE};
use super::machine;
use super::open::Opened;
use super::rows::Changes;
use super::writer::{LOG_TREE, log_key};
use crate::command::{Command, Op, Origin, Outcome, RecoverQuorum, Refusal, RequestId};
use crate::names::{RaftId, UnixMillis};
use crate::state::ClusterState;
use crate::{Entry, LogId, MemberNode, StoredMembership, Vote, codec};

/// What a stopped node has of its cluster, with everything in its log taken for committed.
#[derive(Clone)]
pub struct Outlook {
    /// Who it is, and what it has promised.
    pub control: Control,
    /// The last entry of its log.
    pub last_log: LogId,
    /// The last one that it had applied, and so knew to be committed.
    pub applied: Option<LogId>,
    /// The state after all of the log.
    pub state: ClusterState,
    /// The membership after all of the log.
    pub membership: StoredMembership,
    /// When the last command of the log was proposed, by its leader's clock; `None` if there is none left in the log.
    pub last_change: Option<UnixMillis>,
    /// The epoch of a recovery that is in the log already, and that the node has not been started with yet.
    pub recovered: Option<u64>,
}

/// Why there is nothing to recover here, or why it cannot be.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The store has failed.
    #[error(transparent)]
    Store(#[from] StoreFailure),
    /// It belongs to no cluster.
    #[error("this node belongs to no cluster: there is no quorum to recover")]
    NoCluster,
    /// It is no member.
    #[error(
        "this node was still joining: it has not proven that it holds every key, and is no survivor; recover on a member, or \
         restore the data directory of one"
    )]
    NotMember,
    /// It needs nobody.
    #[error("this node is the only voter, and so has a quorum by itself: start it")]
    OnlyVoter,
    /// It was done already.
    #[error("this node is the only voter of epoch {0} already, and was not started since: start it")]
    Recovered(u64),
    /// The state refuses it.
    #[error("the state of this node refuses the recovery: {0}")]
    Refused(Refusal),
}

/// A recovery that is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// The new epoch.
    pub epoch: u64,
    /// Where the log ends now.
    pub last_log: LogId,
}

/// What a recovery adds to the log: a membership and a command.
const ENTRIES: u64 = 2;

/// Two entries that end the log.
struct Ending {
    vote: Vote,
    entries: [Entry; 2],
    epoch: u64,
}

impl Opened {
    /// What this node has of its cluster. Changes nothing.
    ///
    /// # Errors
    /// It belongs to no cluster, or its log cannot be read.
    pub fn outlook(&self) -> Result<Outlook, RecoverError> {
        let control = self.control.get();
        let Some(last_log) = self.log.last().filter(|_| control.is_founded()) else {
            return Err(RecoverError::NoCluster);
        };
        let loaded = self.machine.loaded();
        let (mut state, mut membership) = (loaded.state.clone(), loaded.row.membership.clone());
        let mut voters = membership.voter_ids().collect();
        let applied = loaded.row.applied;
        let mut last_change = None;
        for entry in self.log.read(0, last_log.index + 1)? {
            if let EntryPayload::Normal(command) = &entry.payload {
                last_change = Some(command.at);
            }
            if Some(entry.log_id) > applied {
                machine::advance(&mut state, &mut membership, &mut voters, entry);
            }
        }
        Ok(Outlook {
            control,
            last_log,
            applied,
            state,
            membership,
            last_change,
            // Nothing has followed it: a node that was started since has gone on.
            recovered: self
                .recovering
                .as_ref()
                .filter(|op| op.last_index + ENTRIES == last_log.index)
                .map(|op| op.epoch),
        })
    }

    /// Makes this node the only voter of a new epoch; durable when this returns. `at`: the wall clock; `nonce`: random.
    /// Killed at any moment, it was done or not; done again, it says so.
    ///
    /// # Errors
    /// See [`RecoverError`]. Nothing was changed, unless the store has failed.
    pub fn recover_quorum(self, at: UnixMillis, nonce: [u8; 16]) -> Result<Recovered, RecoverError> {
        let outlook = self.outlook()?;
        let ending = outlook.ending(at, nonce)?;
        outlook.check(&ending)?;
        let core = self.control.core();
        let mut changes = Changes::default();
        changes.put(VOTE, &[VOTE.kind], &encoded(&ending.vote)?, None)?;
        for entry in &ending.entries {
            changes.put(LOG, &log_key(entry.log_id.index), &encoded(entry)?, None)?;
        }
        let last_log = ending.entries[1].log_id;
        fail::fail_point!("recover::before_write");
        core.rows.write(LOG_TREE, changes)?;
        fail::fail_point!("recover::before_barrier");
        core.rows.barrier()?;
        fail::fail_point!("recover::before_control");
        core.settle(|control| {
            control.epoch = ending.epoch;
            control.vote = Some(ending.vote);
            control.last_log = Some(last_log);
        })?;
        fail::fail_point!("recover::after_control");
        let epoch = ending.epoch;
        Ok(Recovered { epoch, last_log })
    }
}

fn encoded<T: serde::Serialize>(value: &T) -> Result<Vec<u8>, StoreFailure> {
    Ok(codec::encode(value)?)
}

impl Outlook {
    /// This node's raft id.
    #[must_use]
    pub fn own(&self) -> RaftId {
        self.control.raft_id
    }

    /// Whether this node can go on alone, and has to.
    ///
    /// # Errors
    /// Why not.
    pub fn may_recover(&self) -> Result<(), RecoverError> {
        if let Some(epoch) = self.recovered {
            return Err(RecoverError::Recovered(epoch));
        }
        if self.state.meta().is_none() {
            return Err(RecoverError::NoCluster);
        }
        let own = self.state.nodes().get(&self.own());
        if own.is_none_or(|node| !node.is_member()) {
            return Err(RecoverError::NotMember);
        }
        if self.membership.voter_ids().all(|id| id == self.own()) {
            return Err(RecoverError::OnlyVoter);
        }
        Ok(())
    }

    /// The epoch that a recovery begins.
    #[must_use]
    pub fn next_epoch(&self) -> u64 {
        self.state.epoch() + 1
    }

    /// What a recovery adds to the log.
    fn ending(&self, at: UnixMillis, nonce: [u8; 16]) -> Result<Ending, RecoverError> {
        self.may_recover()?;
        let (own, epoch) = (self.own(), self.next_epoch());
        let voted = self.control.vote.map_or(0, |vote| vote.leader_id.term);
        // Above every term of which this node has a word: its log never goes back, and no leader of before may go on.
        let term = voted.max(self.last_log.leader_id.term) + 1;
        let id = |further| LogId::new(CommittedLeaderId::new(term, own), self.last_log.index + further);
        let known = self.membership.membership().get_node(&own).cloned();
        let known = known.or_else(|| {
            let node = self.state.nodes().get(&own)?;
            Some(MemberNode {
                name: node.name.to_string(),
                cluster_address: node.cluster_address.clone(),
            })
        });
        let here = known.unwrap_or_default();
        let alone = Membership::new(vec![BTreeSet::from([own])], BTreeMap::from([(own, here)]));
        let op = Op::RecoverQuorum(RecoverQuorum {
            epoch,
            survivor: own,
            last_term: self.last_log.leader_id.term,
            last_index: self.last_log.index,
            applied_index: self.applied.map_or(0, |id| id.index),
        });
        let command = Command {
            id: RequestId::Node { node: own, nonce },
            body_hash: [0; 32],
            origin: Origin::Node(own),
            approvals: Vec::new(),
            at,
            op,
        };
        Ok(Ending {
            vote: Vote::new_committed(term, own),
            entries: [
                Entry {
                    log_id: id(1),
                    payload: EntryPayload::Membership(alone),
                },
                Entry {
                    log_id: id(2),
                    payload: EntryPayload::Normal(command),
                },
            ],
            epoch,
        })
    }

    /// What is in the log is applied, whatever comes of it: so it is tried before.
    fn check(&self, ending: &Ending) -> Result<(), RecoverError> {
        let (mut state, mut membership) = (self.state.clone(), self.membership.clone());
        let mut voters = membership.voter_ids().collect();
        for entry in ending.entries.clone() {
            let outcome = machine::advance(&mut state, &mut membership, &mut voters, entry);
            if let Outcome::Refused(refusal) = outcome {
                return Err(RecoverError::Refused(refusal));
            }
        }
        Ok(())
    }
}
