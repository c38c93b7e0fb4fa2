//! The replication key of this node, and whether it is the cluster's. A wrong one is named when the
//! node starts or joins, never found in a failing import.

use std::sync::{Arc, Mutex, PoisonError};

use hsm_core::replication::{ClusterKey, ReplicationKey};
use raft_store::names::ClusterId;
use raft_store::state::ClusterMeta;

/// This node has another replication key than its cluster.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{source_key}: this node's replication key has id {found} in cluster {cluster}, whose keys are sealed \
     under {expected}: give this node the same replication key as the others and restart it"
)]
pub struct WrongReplicationKey {
    /// The configuration key that names the source.
    pub source_key: String,
    /// The cluster.
    pub cluster: ClusterId,
    /// Id of this node's key there.
    pub found: String,
    /// Committed id.
    pub expected: String,
}

/// Derives the keys of a cluster once its id is known.
pub struct Replication {
    key: ReplicationKey,
    source_key: String,
    derived: Mutex<Option<(ClusterId, Arc<ClusterKey>)>>,
}

impl Replication {
    /// Takes the key over; `source_key` is the configuration key it was read through, for messages.
    pub fn new(key: ReplicationKey, source_key: impl Into<String>) -> Self {
        Self {
            key,
            source_key: source_key.into(),
            derived: Mutex::new(None),
        }
    }

    /// The public id of this key in a cluster: committed at its foundation, compared at join.
    pub fn trk_id(&self, cluster: ClusterId) -> [u8; 8] {
        self.derive(cluster).trk_id()
    }

    /// The keys of the cluster.
    ///
    /// # Errors
    /// When the cluster was made with another replication key.
    pub fn for_cluster(&self, meta: &ClusterMeta) -> Result<Arc<ClusterKey>, WrongReplicationKey> {
        let key = self.derive(meta.cluster_id);
        if key.trk_id() == meta.trk_id {
            return Ok(key);
        }
        Err(WrongReplicationKey {
            source_key: self.source_key.clone(),
            cluster: meta.cluster_id,
            found: hex::encode(key.trk_id()),
            expected: hex::encode(meta.trk_id),
        })
    }

    fn derive(&self, cluster: ClusterId) -> Arc<ClusterKey> {
        let mut derived = self.derived.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, key)) = &*derived
            && *known == cluster
        {
            return Arc::clone(key);
        }
        let key = Arc::new(self.key.for_cluster(&cluster.0));
        *derived = Some((cluster, Arc::clone(&key)));
        key
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn meta(trk_id: [u8; 8]) -> ClusterMeta {
        ClusterMeta {
            cluster_id: ClusterId([4; 16]),
            name: "test".to_owned(),
            epoch: 1,
            feature_level: 1,
            trk_id,
            created_at: 0,
        }
    }

    #[test]
    fn the_wrong_key_is_named_with_its_source_and_both_ids() {
        let right = Replication::new(ReplicationKey::parse(&"11".repeat(32)).unwrap(), "env A");
        let wrong = Replication::new(ReplicationKey::parse(&"22".repeat(32)).unwrap(), "env B");
        let meta = meta(right.trk_id(ClusterId([4; 16])));
        assert!(right.for_cluster(&meta).is_ok());
        let error = wrong.for_cluster(&meta).err().unwrap().to_string();
        assert!(error.starts_with("env B: "), "{error}");
        assert!(error.contains(&hex::encode(meta.trk_id)), "{error}");
        assert!(!error.contains("2222"), "{error}");
    }

    #[test]
    fn each_cluster_has_keys_of_its_own() {
        let key = Replication::new(ReplicationKey::parse(&"11".repeat(32)).unwrap(), "x");
        let first = key.trk_id(ClusterId([1; 16]));
        assert_ne!(first, key.trk_id(ClusterId([2; 16])));
        assert_eq!(first, key.trk_id(ClusterId([1; 16])));
    }
}
