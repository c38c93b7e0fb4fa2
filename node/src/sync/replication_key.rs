//! The replication keys of this node, and which of them is the cluster's. A wrong one is named when the
//! node starts or joins, never found in a failing import. A node has two while the cluster's is replaced.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use hsm_core::replication::{ClusterKey, ReplicationKey};
use raft_store::names::ClusterId;
use raft_store::state::ClusterMeta;
use raft_store::state::replication::ReplicationKeyId;

/// This node has another replication key than its cluster.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{source_key}: this node's replication key has id {found} in cluster {cluster}, whose keys are sealed \
     under {expected}: give this node the same replication key as the others and restart it; while the key is being \
     replaced it needs both"
)]
pub struct WrongReplicationKey {
    /// The configuration key that names the source.
    pub source_key: String,
    /// The cluster.
    pub cluster: ClusterId,
    /// Ids of this node's keys there.
    pub found: String,
    /// Committed id.
    pub expected: String,
}

/// Derives the keys of a cluster once its id is known.
pub struct Replication {
    /// The one that a cluster is founded and joined with first.
    keys: Vec<ReplicationKey>,
    source_key: String,
    derived: Mutex<Option<(ClusterId, Derived)>>,
}

/// In the order of the keys.
type Derived = Arc<[Arc<ClusterKey>]>;

impl Replication {
    /// Takes the key over; `source_key` is the configuration key it was read through, for messages.
    pub fn new(key: ReplicationKey, source_key: impl Into<String>) -> Self {
        Self {
            keys: vec![key],
            source_key: source_key.into(),
            derived: Mutex::new(None),
        }
    }

    /// With the key that was, or is still, the cluster's beside it.
    #[must_use]
    pub fn beside(self, previous: ReplicationKey, source_key: &str) -> Self {
        let mut keys = self.keys;
        keys.push(previous);
        Self {
            keys,
            source_key: format!("{} and {source_key}", self.source_key),
            derived: Mutex::new(None),
        }
    }

    /// The public id of the first key in a cluster: committed at its foundation, compared at join.
    pub fn trk_id(&self, cluster: ClusterId) -> ReplicationKeyId {
        let keys = self.derive(cluster);
        keys.first().map(|key| key.trk_id()).unwrap_or_default()
    }

    /// The public ids of all keys in a cluster.
    pub fn ids(&self, cluster: ClusterId) -> BTreeSet<ReplicationKeyId> {
        self.derive(cluster).iter().map(|key| key.trk_id()).collect()
    }

    /// The key besides the cluster's, if this node has one.
    pub fn other(&self, meta: &ClusterMeta) -> Option<Arc<ClusterKey>> {
        let keys = self.derive(meta.cluster_id);
        keys.iter().find(|key| key.trk_id() != meta.trk_id).cloned()
    }

    /// The keys of the cluster.
    ///
    /// # Errors
    /// When the cluster was made with another replication key.
    pub fn for_cluster(&self, meta: &ClusterMeta) -> Result<Arc<ClusterKey>, WrongReplicationKey> {
        let keys = self.derive(meta.cluster_id);
        if let Some(key) = keys.iter().find(|key| key.trk_id() == meta.trk_id) {
            return Ok(Arc::clone(key));
        }
        let found: Vec<String> = keys.iter().map(|key| hex::encode(key.trk_id())).collect();
        Err(WrongReplicationKey {
            source_key: self.source_key.clone(),
            cluster: meta.cluster_id,
            found: found.join(" and "),
            expected: hex::encode(meta.trk_id),
        })
    }

    fn derive(&self, cluster: ClusterId) -> Derived {
        let mut derived = self.derived.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, keys)) = &*derived
            && *known == cluster
        {
            return Arc::clone(keys);
        }
        let keys = self.keys.iter().map(|key| Arc::new(key.for_cluster(&cluster.0)));
        let keys: Derived = keys.collect();
        *derived = Some((cluster, Arc::clone(&keys)));
        keys
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
    fn of_two_keys_the_clusters_is_used_whichever_it_is() {
        let key = |digits: &str| ReplicationKey::parse(&digits.repeat(32)).unwrap();
        let cluster = ClusterId([4; 16]);
        let [old, new] = ["11", "22"].map(|digits| Replication::new(key(digits), "x").trk_id(cluster));
        let both = Replication::new(key("22"), "env A").beside(key("11"), "env B");
        assert_eq!(both.ids(cluster), BTreeSet::from([old, new]));
        for (ours, other) in [(old, new), (new, old)] {
            let meta = meta(ours);
            assert_eq!(both.for_cluster(&meta).ok().unwrap().trk_id(), ours);
            assert_eq!(both.other(&meta).unwrap().trk_id(), other);
        }
        let error = both.for_cluster(&meta([9; 8])).err().unwrap().to_string();
        for part in [
            "env A and env B: ",
            &hex::encode(old),
            &hex::encode(new),
            "needs both",
        ] {
            assert!(error.contains(part), "{error} does not say {part}");
        }
        let alone = Replication::new(key("11"), "x");
        assert!(alone.other(&meta(old)).is_none());
    }

    #[test]
    fn each_cluster_has_keys_of_its_own() {
        let key = Replication::new(ReplicationKey::parse(&"11".repeat(32)).unwrap(), "x");
        let first = key.trk_id(ClusterId([1; 16]));
        assert_ne!(first, key.trk_id(ClusterId([2; 16])));
        assert_eq!(first, key.trk_id(ClusterId([1; 16])));
    }
}
