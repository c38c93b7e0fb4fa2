//! The replicated state: what every node agrees on. Pure data; changed only by [`crate::command`].
//!
//! A `ClusterState` is cheap to clone (persistent tables), so readers take a snapshot and never lock.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::codec::CodecError;
use crate::names::{ClusterId, ContextName, NodeName, RaftId, SlotName, UnixMillis};

pub mod access;
pub mod context;
pub mod frozen;
pub mod lease;
pub mod node;
pub mod recovery;
pub mod replication;
pub mod requests;
pub mod slot;
pub mod table;
pub mod usage;

use access::{Acl, Revocation, RevocationKey};
use context::{Context, Destruction, KeyOrigin, KeyVersion, VersionKey, VersionState};
use lease::{MAX_INVOCATIONS, VersionLease};
use node::{JoinToken, Node, NodeReport, NodeStatus};
use recovery::Recovery;
use replication::Replication;
use requests::Requests;
use slot::Slot;
use table::{LoadError, Row, RowChange, RowKind, Table};
use usage::{Uncounted, VersionUse};

/// The feature level this release understands. Raised when a command variant is added, and when others have to know
/// that a node does something. What a leader proposes goes by
/// [`Op::min_feature_level`](crate::command::Op::min_feature_level).
///
/// - 1: the first one.
/// - 2: the life of a key version after `decrypt_only`.
/// - 3: the node counts uses of key versions and reports them; access control is changed while the cluster runs.
/// - 4: a node rejects a grant that it cannot open, encrypts by leases of invocations, adopts keys of version 1, and takes
///   revocations from members that do not lead.
/// - 5: members leave the cluster; the quorum may have been recovered by one survivor, in a new epoch; transport keys and
///   the replication key are replaced.
pub const FEATURE_LEVEL: u32 = 5;
/// The level from which on a node counts uses. That one of a lower level reports none says nothing.
pub const COUNTS_USES: u32 = 3;
/// The level from which on a node knows [`RejectGrant`](crate::command::RejectGrant).
pub const REJECTS_GRANTS: u32 = 4;
/// The level from which on a node knows that members leave.
pub const REMOVES_NODES: u32 = 5;
/// The level from which on a node knows [`RecoverQuorum`](crate::command::RecoverQuorum).
pub(crate) const RECOVERS_QUORUMS: u32 = 5;
/// The level from which on a node takes part when a transport key or the replication key is replaced.
pub const REKEYS: u32 = 5;
/// The level of a new cluster, whatever the release that made it: a log gives the same state under every release.
pub(crate) const FIRST_FEATURE_LEVEL: u32 = 1;

/// The cluster's identity; one row, made by `CreateCluster`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterMeta {
    /// Random identity.
    pub cluster_id: ClusterId,
    /// Name in the SANs of cluster certificates.
    pub name: String,
    /// Raised by restore and recovery; nodes of an older epoch are refused.
    pub epoch: u64,
    /// The level that it was made with. What may be proposed goes by what the members report:
    /// [`ClusterState::below_level`].
    pub feature_level: u32,
    /// Identifies the replication key that everything is sealed under, all but what is still to be sealed anew:
    /// [`Replication::former`].
    pub trk_id: [u8; 8],
    /// When it was made.
    pub created_at: UnixMillis,
}

impl Row for ClusterMeta {
    const KIND: RowKind = RowKind::Meta;
}

/// Everything the nodes agree on.
#[derive(Clone, Default)]
pub struct ClusterState {
    pub(crate) meta: Table<(), ClusterMeta>,
    pub(crate) contexts: Table<ContextName, Context>,
    pub(crate) versions: Table<VersionKey, KeyVersion>,
    pub(crate) slots: Table<SlotName, Slot>,
    pub(crate) nodes: Table<RaftId, Node>,
    pub(crate) reports: Table<RaftId, NodeReport>,
    pub(crate) acl: Table<(), Acl>,
    pub(crate) revocations: Table<RevocationKey, Revocation>,
    pub(crate) join_tokens: Table<u64, JoinToken>,
    pub(crate) uses: Table<VersionKey, VersionUse>,
    pub(crate) uncounted: Table<RaftId, Uncounted>,
    pub(crate) leases: Table<VersionKey, VersionLease>,
    pub(crate) recoveries: Table<u64, Recovery>,
    pub(crate) replication: Table<(), Replication>,
    pub(crate) requests: Requests,
}

impl ClusterState {
    /// The cluster's identity; `None` before `CreateCluster`.
    pub fn meta(&self) -> Option<&ClusterMeta> {
        self.meta.get(&()).map(|meta| &**meta)
    }

    /// The current epoch, 0 before there is a cluster.
    pub fn epoch(&self) -> u64 {
        self.meta().map_or(0, |meta| meta.epoch)
    }

    /// All contexts.
    pub fn contexts(&self) -> &Table<ContextName, Context> {
        &self.contexts
    }

    /// All key versions, by context and number.
    pub fn versions(&self) -> &Table<VersionKey, KeyVersion> {
        &self.versions
    }

    /// The versions of one context, ascending.
    pub fn versions_of<'a>(
        &'a self,
        context: &ContextName,
    ) -> impl Iterator<Item = (u32, &'a KeyVersion)> + 'a {
        let key = |version| VersionKey {
            context: context.clone(),
            version,
        };
        self.versions
            .range(key(0)..=key(u32::MAX))
            .map(|(key, version)| (key.version, &**version))
    }

    /// One key version.
    pub fn version(&self, context: &ContextName, version: u32) -> Option<&KeyVersion> {
        self.versions
            .get(&VersionKey {
                context: context.clone(),
                version,
            })
            .map(|v| &**v)
    }

    /// Every version in one state, which is not one that it ends in.
    fn in_state(&self, wanted: VersionState) -> impl Iterator<Item = (&VersionKey, &KeyVersion)> {
        self.versions
            .open()
            .filter(move |(_, v)| v.state == wanted)
            .map(|(k, v)| (k, &**v))
    }

    /// Every pending version.
    pub fn pending(&self) -> impl Iterator<Item = (&VersionKey, &KeyVersion)> {
        self.in_state(VersionState::Pending)
    }

    /// Every version whose destruction waits and can be undone.
    pub fn destroy_scheduled(&self) -> impl Iterator<Item = (&VersionKey, &KeyVersion)> {
        self.in_state(VersionState::DestroyScheduled)
    }

    /// Every version that is being removed from the tokens.
    pub fn destroying(&self) -> impl Iterator<Item = (&VersionKey, &KeyVersion)> {
        self.in_state(VersionState::Destroying)
    }

    /// Who has yet to acknowledge that a version is gone from its token: every member, whenever it came, because its
    /// token may be one that was here before, and who joins and had acknowledged to hold it. Of one that was adopted
    /// its holders: nobody else can have got it from this cluster. Nobody, unless it is `destroying`.
    pub fn owing<'a>(&'a self, version: &'a KeyVersion) -> impl Iterator<Item = (RaftId, &'a Node)> {
        self.nodes
            .iter()
            .map(|(id, node)| (*id, &**node))
            .filter(move |(id, node)| owes(*id, node, version))
    }

    /// The destructions that a node has yet to acknowledge; of one that was removed, or never was, none.
    pub fn owed_by(&self, node: RaftId) -> impl Iterator<Item = (&VersionKey, &KeyVersion)> {
        let known = self.nodes.get(&node);
        self.destroying()
            .filter(move |(_, version)| known.is_some_and(|known| owes(node, known, version)))
    }

    /// Whether a node has yet to acknowledge a destruction: until then it is not ready.
    pub fn owes_destruction(&self, node: RaftId) -> bool {
        self.owed_by(node).next().is_some()
    }

    /// How often each key version was used, those that were destroyed too.
    pub fn uses(&self) -> &Table<VersionKey, VersionUse> {
        &self.uses
    }

    /// How often a key version was used; `None` if no node has reported a use.
    pub fn usage(&self, context: &ContextName, version: u32) -> Option<&VersionUse> {
        self.uses
            .get(&VersionKey {
                context: context.clone(),
                version,
            })
            .map(|used| &**used)
    }

    /// Until when nodes that count uses did not, by raft id.
    pub fn uncounted(&self) -> &Table<RaftId, Uncounted> {
        &self.uncounted
    }

    /// How many invocations of each key version were given out; of one that nobody asked for there is no row.
    pub fn leases(&self) -> &Table<VersionKey, VersionLease> {
        &self.leases
    }

    /// What was given out of a key version; without a row, what its check record and its counted uses have taken.
    pub fn lease(&self, key: &VersionKey) -> VersionLease {
        let known = self.leases.get(key).map(|lease| VersionLease::clone(lease));
        known.unwrap_or_else(|| {
            let used = self.uses.get(key).map_or(0, |used| used.encryptions);
            VersionLease::begin(used)
        })
    }

    /// The limit of invocations under one version of a context.
    pub fn max_invocations(&self, context: &ContextName) -> u64 {
        let known = self.contexts.get(context);
        known.map_or(MAX_INVOCATIONS, |context| context.policy.max_invocations)
    }

    /// What one member can be given of a version at most: an equal part of what is left. Once it is none, it stays so.
    pub fn lease_part(&self, key: &VersionKey) -> u64 {
        let left = self.lease(key).left(self.max_invocations(&key.context));
        left / self.members().max(1)
    }

    /// Whether a key version is to be replaced: a node was given less than it asked for, or none can be given any. Also
    /// of one that nobody has asked for, because what was counted before there were leases has taken all of it.
    pub fn is_used_up(&self, key: &VersionKey) -> bool {
        self.lease(key).is_due(self.max_invocations(&key.context)) || self.lease_part(key) == 0
    }

    /// How many nodes are members.
    pub fn members(&self) -> u64 {
        let nodes = self.nodes.values();
        nodes.filter(|node| node.is_member()).count() as u64
    }

    /// Every version whose key each member has to hold: made in this cluster and readable. What was adopted is
    /// only where it was found.
    pub fn held_by_members(&self) -> impl Iterator<Item = (&VersionKey, &KeyVersion)> {
        self.versions
            .open()
            .filter(|(_, v)| v.state.is_readable() && v.origin == KeyOrigin::Generated)
            .map(|(k, v)| (k, &**v))
    }

    /// The slots that a node has to have: those in which new versions are made, and those of every version that is not
    /// over and that it holds, or would. A node that is yet to join (`None`) holds nothing that was adopted.
    pub fn slots_needed_by(&self, node: Option<RaftId>) -> BTreeSet<SlotName> {
        let held = |version: &KeyVersion| match node {
            Some(node) => version.origin.concerns(node),
            None => !version.origin.is_adopted(),
        };
        let made_in = self.contexts.values().map(|context| &context.slot);
        let held_in = self
            .versions
            .open()
            .filter(|(_, version)| held(version))
            .map(|(_, version)| &version.slot);
        made_in.chain(held_in).cloned().collect()
    }

    /// A slot that a node has to have and has no key of its own for: nothing there can be granted to it.
    pub fn slot_without_key(&self, node: RaftId) -> Option<SlotName> {
        let known = self.nodes.get(&node)?;
        let mut needed = self.slots_needed_by(Some(node)).into_iter();
        needed.find(|slot| !known.slot_keys.contains_key(slot))
    }

    /// Whether a version goes by this label, or did: a ciphertext may name one that was destroyed, and must never
    /// be tried with another key. Only one that was abandoned gives its label back: nothing was encrypted under it here.
    pub fn label_taken(&self, label: &str) -> bool {
        self.versions
            .values()
            .any(|v| v.label == label && v.state != VersionState::Abandoned)
    }

    /// All slots that have a transport key.
    pub fn slots(&self) -> &Table<SlotName, Slot> {
        &self.slots
    }

    /// All nodes, tombstones included.
    pub fn nodes(&self) -> &Table<RaftId, Node> {
        &self.nodes
    }

    /// The node of this name that has not been removed.
    pub fn node_named(&self, name: &NodeName) -> Option<(RaftId, &Node)> {
        self.nodes
            .iter()
            .map(|(id, node)| (*id, &**node))
            .find(|(_, node)| node.name == *name && node.is_standing())
    }

    /// The nodes' latest reports.
    pub fn reports(&self) -> &Table<RaftId, NodeReport> {
        &self.reports
    }

    /// The members that do not understand a feature level, and the highest that each understands. One that has not
    /// reported yet may be of the first release. Who joins is asked once it is a member.
    pub fn below_level(&self, level: u32) -> impl Iterator<Item = (&Node, u32)> {
        let understands = move |id: &RaftId| {
            let report = self.reports.get(id);
            report.map_or(FIRST_FEATURE_LEVEL, |report| report.feature_level)
        };
        self.nodes
            .iter()
            .filter(|(_, node)| node.is_member())
            .map(move |(id, node)| (&**node, understands(id)))
            .filter(move |(_, understands)| *understands < level)
    }

    /// Access control.
    pub fn acl(&self) -> Option<&Acl> {
        self.acl.get(&()).map(|acl| &**acl)
    }

    /// Revocations.
    pub fn revocations(&self) -> &Table<RevocationKey, Revocation> {
        &self.revocations
    }

    /// Join tokens.
    pub fn join_tokens(&self) -> &Table<u64, JoinToken> {
        &self.join_tokens
    }

    /// Quorums that were recovered by one survivor, by the epoch that began so.
    pub fn recoveries(&self) -> &Table<u64, Recovery> {
        &self.recoveries
    }

    /// The idempotency window.
    pub fn requests(&self) -> &Requests {
        &self.requests
    }

    /// The rows touched since the last call, for storage.
    pub(crate) fn drain(&mut self) -> Result<Vec<RowChange>, CodecError> {
        let mut out = Vec::new();
        self.meta.drain(&mut out)?;
        self.contexts.drain(&mut out)?;
        self.versions.drain(&mut out)?;
        self.slots.drain(&mut out)?;
        self.nodes.drain(&mut out)?;
        self.reports.drain(&mut out)?;
        self.acl.drain(&mut out)?;
        self.revocations.drain(&mut out)?;
        self.join_tokens.drain(&mut out)?;
        self.uses.drain(&mut out)?;
        self.uncounted.drain(&mut out)?;
        self.leases.drain(&mut out)?;
        self.recoveries.drain(&mut out)?;
        self.replication.drain(&mut out)?;
        self.requests.drain(&mut out)?;
        Ok(out)
    }

    /// Every row, for snapshots.
    pub(crate) fn dump(&self) -> Result<Vec<RowChange>, CodecError> {
        let mut out = Vec::new();
        self.meta.dump(&mut out)?;
        self.contexts.dump(&mut out)?;
        self.versions.dump(&mut out)?;
        self.slots.dump(&mut out)?;
        self.nodes.dump(&mut out)?;
        self.reports.dump(&mut out)?;
        self.acl.dump(&mut out)?;
        self.revocations.dump(&mut out)?;
        self.join_tokens.dump(&mut out)?;
        self.uses.dump(&mut out)?;
        self.uncounted.dump(&mut out)?;
        self.leases.dump(&mut out)?;
        self.recoveries.dump(&mut out)?;
        self.replication.dump(&mut out)?;
        self.requests.dump(&mut out)?;
        Ok(out)
    }

    /// Puts one stored row back.
    pub(crate) fn load(
        &mut self,
        kind: RowKind,
        version: u8,
        key: &[u8],
        value: &[u8],
    ) -> Result<(), LoadError> {
        match kind {
            RowKind::Meta => self.meta.load(version, key, value),
            RowKind::Context => self.contexts.load(version, key, value),
            RowKind::Version if version < KeyVersion::VERSION => self.load_unplaced(version, key, value),
            RowKind::Version => self.versions.load(version, key, value),
            RowKind::Slot => self.slots.load(version, key, value),
            RowKind::Node => self.nodes.load(version, key, value),
            RowKind::Report => self.reports.load(version, key, value),
            RowKind::Acl => self.acl.load(version, key, value),
            RowKind::Revocation => self.revocations.load(version, key, value),
            RowKind::JoinToken => self.join_tokens.load(version, key, value),
            RowKind::Use => self.uses.load(version, key, value),
            RowKind::Uncounted => self.uncounted.load(version, key, value),
            RowKind::Lease => self.leases.load(version, key, value),
            RowKind::Recovery => self.recoveries.load(version, key, value),
            RowKind::Replication => self.replication.load(version, key, value),
            RowKind::Request => self.requests.load(version, key, value),
            RowKind::Applied => Err(LoadError::Damaged("an applied row among the state's".into())),
        }
    }

    /// Puts a key version back that does not say in which slot it is. Rows are read in the order of their kinds, so its
    /// context is there.
    fn load_unplaced(&mut self, version: u8, key: &[u8], value: &[u8]) -> Result<(), LoadError> {
        let contexts = &self.contexts;
        self.versions.load_by(key, |key| {
            let context = contexts.get(&key.context);
            let context = context.ok_or_else(|| {
                LoadError::Damaged(format!(
                    "a version row of context {}, which has none",
                    key.context
                ))
            })?;
            KeyVersion::decode_unplaced(version, value, &context.slot)
        })
    }

    /// Rebuilds derived indexes after the last [`Self::load`].
    pub(crate) fn loaded(mut self) -> Self {
        self.requests.index();
        self
    }
}

/// Whether a node has yet to acknowledge that a version is gone from its token. A join may fail, and until somebody
/// removes what is left of it nobody speaks for it: it holds up what it had acknowledged to hold and nothing else. Once
/// it is a member, it owes like one.
fn owes(id: RaftId, node: &Node, version: &KeyVersion) -> bool {
    let held = |destruction: &Destruction| destruction.held_by.contains(&id);
    let asked = match node.status {
        NodeStatus::Member | NodeStatus::Leaving { .. } | NodeStatus::Joining
            if version.origin.is_adopted() =>
        {
            version.origin.concerns(id)
        }
        NodeStatus::Member | NodeStatus::Leaving { .. } => true,
        NodeStatus::Joining => version.destruction.as_ref().is_some_and(held),
        NodeStatus::Removed { .. } => false,
    };
    asked && version.state == VersionState::Destroying && !version.acks.contains(&id)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::state::table::RowKey;
    use context::VersionState::*;

    #[test]
    fn version_keys_sort_by_context_then_number_and_survive_encoding() {
        let key = |context: &str, version| VersionKey {
            context: ContextName::new(context).unwrap(),
            version,
        };
        let mut keys = [key("a", 256), key("a", 2), key("a-b", 1), key("a", u32::MAX)];
        keys.sort();
        let mut encoded: Vec<_> = keys.iter().map(RowKey::encode).collect();
        let in_order = encoded.clone();
        encoded.sort();
        assert_eq!(encoded, in_order);
        for key in keys {
            assert_eq!(VersionKey::decode(&key.encode()), Some(key));
        }
    }

    #[test]
    fn the_drawing_of_version_states_is_the_table() {
        let all = [
            Pending,
            Active,
            DecryptOnly,
            Disabled,
            DestroyScheduled,
            Destroying,
            Destroyed,
            Abandoned,
        ];
        let arrows = [
            (Pending, Active),
            (Pending, Abandoned),
            (Active, DecryptOnly),
            (DecryptOnly, Disabled),
            (DecryptOnly, DestroyScheduled),
            (Disabled, DecryptOnly),
            (Disabled, DestroyScheduled),
            (DestroyScheduled, DecryptOnly),
            (DestroyScheduled, Disabled),
            (DestroyScheduled, Destroying),
            (Destroying, Destroyed),
        ];
        for from in all {
            for to in all {
                let drawn = arrows.contains(&(from, to));
                assert_eq!(from.may_become(to), drawn, "{from:?} to {to:?}");
            }
            let readable = matches!(from, Pending | Active | DecryptOnly);
            assert_eq!(from.is_readable(), readable, "{from:?}");
            if from.is_over() {
                assert!(all.iter().all(|to| !from.may_become(*to)), "{from:?} is final");
            }
        }
    }
}
