//! What a node tells the cluster of its replication keys: nothing, as long as it has the cluster's alone. One that has
//! another beside it says so, and says when it has not any more, so that people see where a replacement stands before
//! and after it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use raft_store::command::{Op, ReportReplicationKeys};
use raft_store::names::RaftId;
use raft_store::state::ClusterState;
use raft_store::state::replication::ReplicationKeyId;
use tokio::time::timeout;

use crate::consensus::ProposeError;
use crate::rotation::Cluster;
use crate::sync::Replication;

/// Between looks while nothing is applied.
const LOOK: Duration = Duration::from_secs(1);
/// After a proposal that was not made: there is no leader, or a member's release does not know it.
const AFTER_ERROR: Duration = Duration::from_secs(2);

/// Reports until the consensus of this node ends.
pub async fn report(cluster: Arc<dyn Cluster>, replication: Arc<Replication>) {
    let mut applied = cluster.applied();
    let mut said = String::new();
    let mut told = BTreeSet::new();
    loop {
        applied.borrow_and_update();
        let published = cluster.published();
        let me = cluster.raft_id();
        let left = retired(&published.state, &replication);
        for id in left.difference(&told) {
            tracing::warn!(
                key = hex::encode(id),
                "this node still has a replication key that was replaced: take it out of its configuration \
                 (cluster.token_replication.previous_encryption_key_env or previous_encryption_key_file) and restart it"
            );
        }
        told = left;
        if let Some(op) = me.and_then(|me| news(&published.state, me, &replication)) {
            if let Err(error) = cluster.propose_as_node(op).await {
                say(&error, &mut said);
                tokio::time::sleep(AFTER_ERROR).await;
                continue;
            }
            said.clear();
        }
        if let Ok(Err(_)) = timeout(LOOK, applied.changed()).await {
            return;
        }
    }
}

/// What the state does not know of this node's keys.
fn news(state: &ClusterState, me: RaftId, replication: &Replication) -> Option<Op> {
    let meta = state.meta()?;
    state.nodes().get(&me).filter(|node| node.is_standing())?;
    let held = replication.ids(meta.cluster_id);
    (state.replication_keys_of(me) != held).then_some(Op::ReportReplicationKeys(ReportReplicationKeys {
        node: me,
        held,
    }))
}

/// The keys of this node that were replaced, and that nothing is sealed under any more: it has them for nothing, and
/// whoever reads its configuration can open old logs and backups with them.
fn retired(state: &ClusterState, replication: &Replication) -> BTreeSet<ReplicationKeyId> {
    let (Some(meta), Some(row)) = (state.meta(), state.replication()) else {
        return BTreeSet::new();
    };
    let mut held = replication.ids(meta.cluster_id);
    held.retain(|id| row.retired.contains(id));
    held
}

/// Once for each reason; while leaders change there is nothing to say.
fn say(error: &ProposeError, said: &mut String) {
    let why = error.to_string();
    if *said == why {
        return;
    }
    if matches!(error, ProposeError::NotUnderstood { .. }) {
        tracing::warn!(
            why,
            "the cluster is not told yet that this node has two replication keys"
        );
    } else {
        tracing::debug!(why, "the cluster is not told of this node's replication keys yet");
    }
    *said = why;
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use hsm_core::replication::ReplicationKey;
    use raft_store::command::ResealKeys;

    use super::*;
    use crate::rotation::testing::{FakeCluster, World, replication_key};

    fn other_key() -> ReplicationKey {
        ReplicationKey::parse(&"cd".repeat(32)).unwrap()
    }

    #[test]
    fn a_key_that_was_replaced_is_told_of_once_nothing_is_sealed_under_it() {
        let mut world = World::new(1);
        let meta = world.state.meta().unwrap().clone();
        let both = Replication::new(other_key(), "x").beside(replication_key(), "y");
        world.rekey_replication(both.trk_id(meta.cluster_id));
        assert!(retired(&world.state, &both).is_empty(), "it is needed");
        world.ok(Op::ResealKeys(ResealKeys::default()));
        assert_eq!(retired(&world.state, &both), BTreeSet::from([meta.trk_id]));
        let alone = Replication::new(other_key(), "x");
        assert!(retired(&world.state, &alone).is_empty());
    }

    #[tokio::test]
    async fn a_node_says_that_it_has_two_keys_and_when_it_has_one_again() {
        let cluster = FakeCluster::new(World::new(1));
        let alone = Replication::new(replication_key(), "x");
        assert!(
            news(&cluster.published().state, 1, &alone).is_none(),
            "nothing is replaced"
        );
        let both = Replication::new(other_key(), "x").beside(replication_key(), "y");
        let as_dyn = || Arc::clone(&cluster) as Arc<dyn Cluster>;
        let held = |keys: usize| {
            let cluster = Arc::clone(&cluster);
            async move {
                let mut applied = cluster.applied();
                while cluster.published().state.replication_keys_of(1).len() != keys {
                    applied.changed().await.unwrap();
                }
            }
        };
        let reporting = tokio::spawn(report(as_dyn(), Arc::new(both)));
        timeout(Duration::from_secs(10), held(2)).await.unwrap();
        reporting.abort();
        let reporting = tokio::spawn(report(as_dyn(), Arc::new(alone)));
        timeout(Duration::from_secs(10), held(1)).await.unwrap();
        reporting.abort();
    }
}
