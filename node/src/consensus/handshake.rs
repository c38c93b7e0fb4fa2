//! Who may talk to whom: each connection's identities are checked against certificate and state before
//! openraft sees a message, because openraft trusts its peers' ids.

use raft_store::names::{ClusterId, RaftId};
use raft_store::state::node::NodeStatus;
use raft_store::storage::{Control, Poison, Published};

use super::wire::{Hello, PROTOCOL, TurnedAway};

/// What this node says of itself.
pub(super) fn hello(control: &Control) -> Hello {
    Hello {
        protocol: PROTOCOL,
        cluster_id: control.cluster_id,
        epoch: control.epoch,
        name: control.node_name.clone(),
        raft_id: control.raft_id,
        incarnation: control.incarnation,
        log_index: control.last_log.map_or(0, |id| id.index),
    }
}

/// Checks a peer that says it is a member. `certificate` is the name in its verified certificate.
pub(super) fn check_member(
    ours: &Control,
    published: &Published,
    certificate: &str,
    peer: &Hello,
) -> Result<(), TurnedAway> {
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
        // A raft id is the index of the entry that gave it: a node that has not applied that entry
        // cannot know the peer yet, and must not shut out a leader it lags behind.
        let may_know_later = applied < peer.raft_id || applied < 2;
        return if may_know_later {
            Ok(())
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
        // Reports name an index that was committed and durable then: a log that ends before it has lost
        // what it had acknowledged.
        Some(report) if peer.log_index < report.durable_index => Err(TurnedAway::RolledBack {
            incarnation: peer.incarnation,
            log_index: peer.log_index,
            seen_index: report.durable_index,
        }),
        _ => Ok(()),
    }
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
            incarnation,
            log_index,
            seen_index,
        } if *incarnation == ours.incarnation => Some(Poison::RolledBack {
            durable_index: *log_index,
            seen_index: *seen_index,
        }),
        _ => None,
    }
}
