//! Who may talk to whom: each connection's identities are checked against certificate and state before
//! openraft sees a message, because openraft trusts its peers' ids.

use raft_store::names::{Boot, ClusterId, RaftId};
use raft_store::state::node::NodeStatus;
use raft_store::storage::{Control, Poison, Published};

use super::wire::{Hello, PROTOCOL, TurnedAway};
use crate::seeded::bug;

/// One run of this node's process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    /// Random.
    pub(super) boot: Boot,
    /// Where the durable log ended when it began.
    pub(super) log_index: u64,
}

/// What this node says of itself.
pub(super) fn hello(control: &Control, run: Run) -> Hello {
    Hello {
        protocol: PROTOCOL,
        cluster_id: control.cluster_id,
        epoch: control.epoch,
        name: control.node_name.clone(),
        raft_id: control.raft_id,
        incarnation: control.incarnation,
        boot: run.boot,
        log_index: run.log_index,
    }
}

/// What the state says of a peer whose identity holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// A member, or about to become one.
    Known,
    /// Registered, if at all, by an entry that is not applied here yet.
    Later,
}

/// Checks a peer that says it is a member. `certificate` is the name in its verified certificate.
pub(super) fn check_member(
    ours: &Control,
    published: &Published,
    certificate: &str,
    peer: &Hello,
) -> Result<Standing, TurnedAway> {
    check_name(certificate, peer)?;
    if ours.cluster_id == ClusterId::default() {
        return Err(TurnedAway::Uninitialised);
    }
    if peer.cluster_id != ours.cluster_id {
        return Err(TurnedAway::OtherCluster);
    }
    if peer.epoch != ours.epoch {
        return Err(TurnedAway::OtherEpoch {
            ours: ours.epoch,
            theirs: peer.epoch,
        });
    }
    let applied = published.applied.map_or(0, |id| id.index);
    let Some(node) = published.state.nodes().get(&peer.raft_id) else {
        // A raft id is the index of the entry that gave it (the founder's, which is lower, comes with the
        // first command): a node that has not applied that entry cannot know the peer yet, and must not
        // shut out a leader it lags behind.
        return if bug("bug::go_away_without_tombstone") {
            Err(TurnedAway::Removed {
                raft_id: peer.raft_id,
                incarnation: peer.incarnation,
            })
        } else if applied < peer.raft_id || published.state.meta().is_none() {
            Ok(Standing::Later)
        } else {
            Err(TurnedAway::Unknown(peer.raft_id))
        };
    };
    if let NodeStatus::Removed { .. } = node.status {
        return Err(TurnedAway::Removed {
            raft_id: peer.raft_id,
            incarnation: node.incarnation,
        });
    }
    if node.name.as_str() != peer.name {
        return Err(TurnedAway::OtherName {
            certificate: certificate.into(),
            said: node.name.to_string(),
        });
    }
    if node.incarnation != peer.incarnation {
        return Err(TurnedAway::OtherIncarnation {
            raft_id: peer.raft_id,
        });
    }
    match published.state.reports().get(&peer.raft_id) {
        // Reports name an index that was committed and durable then: a later run whose log began before it
        // has lost what it had acknowledged. Within one run nothing is lost, and greetings may be late.
        Some(report) if report.boot != peer.boot => check_log(peer, report.durable_index)?,
        _ => {}
    }
    Ok(Standing::Known)
}

/// Refuses a run that began with less than the peer was seen with before.
pub(super) fn check_log(peer: &Hello, seen_index: u64) -> Result<(), TurnedAway> {
    if peer.log_index >= seen_index {
        return Ok(());
    }
    Err(TurnedAway::RolledBack {
        raft_id: peer.raft_id,
        incarnation: peer.incarnation,
        log_index: peer.log_index,
        seen_index,
    })
}

/// Checks that the certificate is for the node that is named.
pub(super) fn check_name(certificate: &str, peer: &Hello) -> Result<(), TurnedAway> {
    if peer.protocol != PROTOCOL {
        return Err(TurnedAway::Protocol {
            ours: PROTOCOL,
            theirs: peer.protocol,
        });
    }
    if certificate != peer.name {
        return Err(TurnedAway::OtherName {
            certificate: certificate.into(),
            said: peer.name.clone(),
        });
    }
    Ok(())
}

/// Checks that the peer that answers is the one that was dialled.
pub(super) fn check_dialled(target: RaftId, peer: &Hello) -> Result<(), TurnedAway> {
    if peer.raft_id == target {
        Ok(())
    } else {
        Err(TurnedAway::Unknown(target))
    }
}

/// Whether being turned away means that this directory must never run again. Only its own incarnation
/// is meant: a word about another filling of this node does not concern it.
pub(super) fn poison_of(ours: &Control, away: &TurnedAway) -> Option<Poison> {
    match away {
        TurnedAway::Removed { raft_id, incarnation }
            if *raft_id == ours.raft_id && *incarnation == ours.incarnation =>
        {
            Some(Poison::Removed)
        }
        TurnedAway::RolledBack {
            raft_id,
            incarnation,
            log_index,
            seen_index,
        } if *raft_id == ours.raft_id && *incarnation == ours.incarnation => Some(Poison::RolledBack {
            durable_index: *log_index,
            seen_index: *seen_index,
        }),
        _ => None,
    }
}
