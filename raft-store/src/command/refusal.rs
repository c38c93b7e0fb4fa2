//! Why a command is refused: kinds, names and numbers. A refusal is remembered with its request, so it is part of
//! the replicated state and of its digest; the text for people is made from it when it is shown, and may change.
//! Variants are only ever added at the end.

mod text;

use serde::{Deserialize, Serialize};

use crate::names::{ClusterId, ContextName, NodeName, RaftId, SlotName, TransportId};
use crate::state::context::VersionState;
use crate::state::replication::ReplicationKeyId;
use crate::state::slot::TransportState;
use crate::state::table::RowKind;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// The state is not what the proposer saw. Look again.
    Conflict(Conflict),
    /// The thing exists already.
    Exists(Existing),
    /// There is no such thing.
    NotFound(Missing),
    /// The origin may not do this.
    Forbidden(Forbidden),
    /// The command makes no sense.
    Invalid(Invalid),
    /// The idempotency key was used with another body.
    KeyReused,
    /// The answer to this idempotency key is no longer kept.
    KeyExpired,
}

/// What is otherwise than the proposer saw or needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Conflict {
    /// A context's highest version.
    HighestVersion {
        /// The context.
        context: ContextName,
        /// Its highest version.
        highest: u32,
    },
    /// A version of the context is pending.
    Pending {
        /// The context.
        context: ContextName,
        /// Its pending version.
        version: u32,
    },
    /// A version's state does not allow it.
    VersionState {
        /// The context.
        context: ContextName,
        /// The version.
        version: u32,
        /// Its state.
        state: VersionState,
    },
    /// Too few hold the version, or somebody is unaccounted for.
    Holders {
        /// The context.
        context: ContextName,
        /// The version.
        version: u32,
        /// Voters that acknowledged it.
        holders: u64,
        /// Voters.
        voters: u64,
    },
    /// A slot's newest transport generation.
    TransportGeneration {
        /// The slot.
        slot: SlotName,
        /// Its newest generation.
        generation: u32,
    },
    /// New keys are wrapped under the current transport key only.
    TransportNotCurrent {
        /// The slot.
        slot: SlotName,
        /// The key that is not.
        id: TransportId,
    },
    /// The node has no key to grant to.
    NoSlotKey {
        /// The node.
        node: NodeName,
        /// The slot.
        slot: SlotName,
    },
    /// The node registered another key.
    OtherSlotKey {
        /// The node.
        node: NodeName,
        /// The slot.
        slot: SlotName,
    },
    /// The node is no learner any more.
    NodeRemoved {
        /// The node.
        node: NodeName,
    },
    /// The learner has not acknowledged a version that it would have to serve.
    NotAcknowledged {
        /// The learner.
        node: NodeName,
        /// The context.
        context: ContextName,
        /// The version.
        version: u32,
    },
    /// The learner has not reported that it holds every key.
    NotProven {
        /// The learner.
        node: NodeName,
    },
    /// As many join tokens are open as are kept.
    OpenJoinTokens {
        /// How many.
        open: u64,
    },
    /// A version is the active one.
    Active {
        /// The context.
        context: ContextName,
        /// Its active version.
        version: u32,
    },
    /// A version is still in use.
    UsedRecently {
        /// The context.
        context: ContextName,
        /// The version.
        version: u32,
        /// Milliseconds since its last use.
        ago_ms: u64,
    },
    /// The wait before a destruction is not over.
    WaitNotOver {
        /// The context.
        context: ContextName,
        /// The version.
        version: u32,
        /// Milliseconds that have passed.
        elapsed_ms: u64,
        /// Milliseconds that have to.
        wait_ms: u64,
    },
    /// A wait is another than the proposer saw, or further.
    OtherWait {
        /// The context.
        context: ContextName,
        /// The version.
        version: u32,
        /// The entry that scheduled it.
        scheduled_by: u64,
        /// Milliseconds that have passed.
        elapsed_ms: u64,
    },
    /// Access control is another than was read.
    OtherAcl {
        /// The digest of the one there is.
        digest: [u8; 32],
    },
    /// Nobody can know whether a version is still in use: a node counts no uses, or has not for long enough.
    NotCountedYet {
        /// The context.
        context: ContextName,
        /// The version.
        version: u32,
        /// The node.
        node: NodeName,
        /// Milliseconds for which it has; none if it does not.
        counted_ms: Option<u64>,
    },
    /// The learner has yet to acknowledge that a version is gone from its token.
    OwesDestruction {
        /// The learner.
        node: NodeName,
        /// The context.
        context: ContextName,
        /// The version.
        version: u32,
    },
    /// No other holder of a transport key could grant it to the node.
    NoOtherGranter {
        /// The node.
        node: NodeName,
        /// The slot.
        slot: SlotName,
    },
    /// The slot in which a context's next versions are made.
    ContextSlot {
        /// The context.
        context: ContextName,
        /// Its slot.
        slot: SlotName,
    },
    /// Another node is asked to leave, and one goes after the other.
    NodeLeaves {
        /// The one that does.
        node: NodeName,
    },
    /// Nobody would vote without it.
    LastVoter {
        /// The node.
        node: NodeName,
    },
    /// Who is to take a place has one, or is the one that leaves.
    SuccessorVotes {
        /// The node that was to take it.
        node: NodeName,
    },
    /// A key that was adopted is in no other node's token.
    LastHolder {
        /// The node.
        node: NodeName,
        /// The context.
        context: ContextName,
        /// The version.
        version: u32,
    },
    /// The node was not asked to leave.
    NotLeaving {
        /// The node.
        node: NodeName,
    },
    /// The node counts for a majority still.
    StillVotes {
        /// The node.
        node: NodeName,
    },
    /// The slot's next transport key is on its way.
    RekeyOpen {
        /// The slot.
        slot: SlotName,
    },
    /// A slot has as many transport keys as are kept.
    LiveTransportKeys {
        /// The slot.
        slot: SlotName,
        /// How many.
        live: u64,
    },
    /// A transport key's state does not allow it.
    TransportState {
        /// The slot.
        slot: SlotName,
        /// The key.
        id: TransportId,
        /// Its state.
        state: TransportState,
    },
    /// Too few hold the transport key, or somebody is unaccounted for.
    TransportHolders {
        /// The slot.
        slot: SlotName,
        /// The key.
        id: TransportId,
        /// Voters that hold it.
        holders: u64,
        /// Voters.
        voters: u64,
    },
    /// A version is wrapped under the transport key.
    TransportInUse {
        /// The slot.
        slot: SlotName,
        /// The key.
        id: TransportId,
        /// The version's context.
        context: ContextName,
        /// The version.
        version: u32,
    },
    /// The cluster's replication key is another than the proposer saw, or meant.
    ReplicationKey {
        /// The cluster's.
        current: ReplicationKeyId,
    },
    /// What is sealed under the replication key before is still being sealed anew.
    ResealOpen,
    /// The replication key was the cluster's before.
    RetiredReplicationKey {
        /// The key.
        id: ReplicationKeyId,
    },
    /// A node has not said that it has the replication key.
    LacksReplicationKey {
        /// The node.
        node: NodeName,
        /// The key.
        id: ReplicationKeyId,
    },
}

/// What exists already.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Existing {
    /// The cluster.
    Cluster(ClusterId),
    /// A context, with another slot or binding.
    Context {
        /// Its name.
        context: ContextName,
        /// Its slot.
        slot: SlotName,
    },
    /// A transport key.
    TransportKey(TransportId),
    /// A version under this label or `key_uid`.
    Version {
        /// The label.
        label: String,
    },
    /// A node of this name.
    Node(NodeName),
}

/// What there is not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Missing {
    /// A cluster.
    Cluster,
    /// A context.
    Context(ContextName),
    /// A version.
    Version {
        /// Its context.
        context: ContextName,
        /// Its number.
        version: u32,
    },
    /// A slot.
    Slot(SlotName),
    /// A node.
    Node(RaftId),
    /// A transport key.
    TransportKey {
        /// Its slot.
        slot: SlotName,
        /// Its id.
        id: TransportId,
    },
}

/// What the origin may not do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Forbidden {
    /// Register with a token that is not good.
    JoinToken,
    /// Register with another node's token.
    JoinTokenOfAnother {
        /// The node that used it.
        node: NodeName,
    },
    /// Speak for a node that is not itself.
    NotItself {
        /// The node.
        node: RaftId,
    },
    /// Speak as another filling of a node's data directory.
    Incarnation {
        /// The node.
        node: NodeName,
    },
    /// Anything, for or to a removed node.
    Removed {
        /// The node.
        node: NodeName,
    },
    /// Grant a transport key that it was not granted itself.
    Grantor {
        /// The slot.
        slot: SlotName,
        /// The transport key.
        id: TransportId,
    },
    /// Grant a transport key to anything but a node.
    Grantee {
        /// The slot.
        slot: SlotName,
        /// The transport key.
        id: TransportId,
    },
    /// Ask for an operation that no node asks for.
    Operation {
        /// Its name.
        operation: String,
    },
    /// Ask for an operation that only the leader's own driver asks for.
    Driver {
        /// Its name.
        operation: String,
    },
    /// Grant a transport key to a node that could not open its grant before.
    RejectedGrantor {
        /// The slot.
        slot: SlotName,
        /// The transport key.
        id: TransportId,
    },
    /// Anything, with a certificate that is revoked.
    Revoked,
}

/// What makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Invalid {
    /// A join token that nobody could use.
    JoinTokenExpired,
    /// A version that is not the next.
    VersionNumber {
        /// The context.
        context: ContextName,
        /// The number.
        version: u32,
        /// The next one.
        next: u32,
    },
    /// Signed or sealed for an epoch that is yet to come.
    Epoch {
        /// The epoch named.
        epoch: u64,
        /// The cluster's.
        current: u64,
    },
    /// More than is kept.
    TooLarge {
        /// Of what.
        what: Bounded,
        /// How much.
        size: u64,
        /// How much is kept.
        most: u64,
    },
    /// A key that its stored bytes would not give back.
    Key {
        /// Of which row.
        kind: RowKind,
    },
    /// A wait before a destruction that is too short or too long.
    Wait {
        /// The wait, in milliseconds.
        wait_ms: u64,
        /// The shortest.
        least_ms: u64,
        /// The longest.
        most_ms: u64,
    },
    /// A state that is no use of a retired version.
    Use {
        /// The state.
        state: VersionState,
    },
    /// Access control that makes nobody an administrator.
    NoAdmin,
    /// A wait that is named twice, or out of order.
    WaitOrder {
        /// The context.
        context: ContextName,
        /// The version.
        version: u32,
    },
}

/// What has a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Bounded {
    /// Bytes of a row.
    Row(RowKind),
    /// Bytes of a row's key.
    RowKey(RowKind),
    /// Bytes of a version's label.
    Label,
    /// Bytes of a granted transport key.
    Grant,
    /// Bytes of a slot's public key.
    SlotPublicKey,
    /// Bytes of its signature.
    SlotSignature,
    /// Certificates of the signer's chain.
    Certificates,
    /// Bytes of the signer's chain.
    CertificateBytes,
    /// Slots a node has keys for.
    SlotKeys,
    /// Bytes of a node's address.
    Address,
    /// Versions whose uses a report counts.
    Uses,
    /// Milliseconds that waits advance at a time.
    Advance,
    /// Uses of one version that a report counts.
    UseCount,
    /// Versions that a node asks for invocations of at a time.
    Claims,
    /// Invocations under one version.
    Invocations,
    /// Certificates that are revoked.
    Revocations,
    /// Replication keys of one node.
    ReplicationKeys,
}

impl Bounded {
    /// Refuses more than `most`.
    pub(crate) fn check(self, size: usize, most: usize) -> Result<(), Refusal> {
        self.check_number(size as u64, most as u64)
    }

    /// As [`Self::check`], of what has 64 bits on every machine.
    pub(crate) fn check_number(self, size: u64, most: u64) -> Result<(), Refusal> {
        if size <= most {
            return Ok(());
        }
        Err(Invalid::TooLarge {
            what: self,
            size,
            most,
        }
        .into())
    }
}

impl From<Conflict> for Refusal {
    fn from(why: Conflict) -> Self {
        Refusal::Conflict(why)
    }
}

impl From<Existing> for Refusal {
    fn from(what: Existing) -> Self {
        Refusal::Exists(what)
    }
}

impl From<Missing> for Refusal {
    fn from(what: Missing) -> Self {
        Refusal::NotFound(what)
    }
}

impl From<Forbidden> for Refusal {
    fn from(why: Forbidden) -> Self {
        Refusal::Forbidden(why)
    }
}

impl From<Invalid> for Refusal {
    fn from(why: Invalid) -> Self {
        Refusal::Invalid(why)
    }
}

#[cfg(test)]
mod tests;
