//! The replication keys of a cluster besides the one in [`ClusterMeta::trk_id`](super::ClusterMeta): who holds which,
//! which one is being replaced, and which ones nothing is sealed under any more. Of keys only the public ids are known
//! here.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::ClusterState;
use super::context::{KeyVersion, VersionKey};
use super::slot::Grantee;
use super::table::{Row, RowKind};
use crate::names::{RaftId, SlotName, TransportId, UnixMillis};

/// Public id of a replication key.
pub type ReplicationKeyId = [u8; 8];

/// Where a sealed record names its key: behind four bytes that say what it is. Sealed keys and grants alike.
const NAMED_AT: std::ops::Range<usize> = 4..12;

/// The replication key before the present one, while something is sealed under it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FormerKey {
    /// Its id.
    pub id: ReplicationKeyId,
    /// Since when it is not the present one.
    pub since: UnixMillis,
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replication {
    /// The keys that each node has said to hold. A node that has not holds the cluster's alone.
    pub held: BTreeMap<RaftId, BTreeSet<ReplicationKeyId>>,
    /// The key that is being replaced.
    pub former: Option<FormerKey>,
    /// Keys that were replaced, oldest first: nothing that names one is taken any more.
    pub retired: Vec<ReplicationKeyId>,
    /// Since when the present key is the cluster's. The first one was from the beginning.
    pub since: Option<UnixMillis>,
}

impl Replication {
    /// Whether nothing new may be sealed under a key.
    pub fn is_retired(&self, id: ReplicationKeyId) -> bool {
        self.retired.contains(&id) || self.former.as_ref().is_some_and(|former| former.id == id)
    }
}

impl Row for Replication {
    const KIND: RowKind = RowKind::Replication;
}

/// The replication key that a sealed record names; `None` if it is too short to name one.
pub fn named_by(record: &[u8]) -> Option<ReplicationKeyId> {
    record.get(NAMED_AT)?.try_into().ok()
}

/// A transport key's grant to a node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GrantKey {
    /// The slot.
    pub slot: SlotName,
    /// The transport key.
    pub id: TransportId,
    /// The node.
    pub node: RaftId,
}

impl ClusterState {
    /// Which replication keys there are besides the cluster's; `None` while there has been none.
    pub fn replication(&self) -> Option<&Replication> {
        self.replication.get(&()).map(|row| &**row)
    }

    /// The replication keys that a node holds, as far as it has said: the cluster's, unless it has said otherwise.
    pub fn replication_keys_of(&self, node: RaftId) -> BTreeSet<ReplicationKeyId> {
        let said = self.replication().and_then(|row| row.held.get(&node));
        let alone = || self.meta().map(|meta| meta.trk_id).into_iter().collect();
        said.cloned().unwrap_or_else(alone)
    }

    /// The versions whose keys are sealed under a replication key.
    pub fn keys_sealed_under(
        &self,
        id: ReplicationKeyId,
    ) -> impl Iterator<Item = (&VersionKey, &KeyVersion)> {
        // What is over has no key.
        self.versions
            .open()
            .map(|(key, version)| (key, &**version))
            .filter(move |(_, version)| {
                let material = version.material.as_ref();
                material.is_some_and(|material| named_by(&material.sealed_key) == Some(id))
            })
    }

    /// The grants that are sealed under a replication key, of nodes that were not removed: the others' nobody shall open.
    pub fn grants_sealed_under(&self, id: ReplicationKeyId) -> Vec<GrantKey> {
        let stands = |node: &RaftId| self.nodes().get(node).is_some_and(|known| known.is_standing());
        let mut found = Vec::new();
        for (name, slot) in self.slots().iter() {
            for generation in &slot.transport {
                for (grantee, grant) in &generation.grants {
                    if let Grantee::Node(node) = grantee
                        && named_by(&grant.blob) == Some(id)
                        && stands(node)
                    {
                        found.push(GrantKey {
                            slot: name.clone(),
                            id: generation.id,
                            node: *node,
                        });
                    }
                }
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_names_its_key_behind_its_magic() {
        let mut record = b"HSK1".to_vec();
        record.extend([7; 8]);
        assert_eq!(named_by(&record), Some([7; 8]));
        record.pop();
        assert_eq!(named_by(&record), None);
    }

    #[test]
    fn the_key_that_is_being_replaced_is_retired_already() {
        let row = Replication {
            former: Some(FormerKey { id: [2; 8], since: 0 }),
            retired: vec![[1; 8]],
            ..Replication::default()
        };
        assert!(row.is_retired([1; 8]) && row.is_retired([2; 8]) && !row.is_retired([3; 8]));
    }
}
