//! What a refusal says to people: the thing, its value, and what to do about it where anything can be done.

use std::fmt;

use super::{Bounded, Conflict, Existing, Forbidden, Invalid, Missing, Refusal};
use crate::state::table::RowKind;

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Conflict(why) => write!(f, "conflict: {why}"),
            Refusal::Exists(what) => write!(f, "{what}"),
            Refusal::NotFound(what) => write!(f, "{what} does not exist"),
            Refusal::Forbidden(why) => write!(f, "forbidden: {why}"),
            Refusal::Invalid(why) => write!(f, "invalid: {why}"),
            Refusal::KeyReused => f.write_str("the idempotency key was used for another request; take a new one"),
            Refusal::KeyExpired => f.write_str(
                "the answer to this idempotency key is no longer kept; look what was done, then take a new one",
            ),
        }
    }
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Conflict::HighestVersion { context, highest } => {
                write!(f, "context {context} is at version {highest}")
            }
            Conflict::Pending { context, version } => {
                write!(
                    f,
                    "version {version} of {context} is still pending; wait until it is active or abandoned"
                )
            }
            Conflict::VersionState {
                context,
                version,
                state,
            } => {
                write!(f, "version {version} of {context} is {}", state.as_str())
            }
            Conflict::Holders {
                context,
                version,
                holders,
                voters,
            } => write!(
                f,
                "version {version} of {context} is held by {holders} of {voters} voters; a majority has to hold it, \
                 and everybody else has to be accounted for"
            ),
            Conflict::TransportGeneration { slot, generation } => {
                write!(f, "slot {slot} has transport generation {generation}")
            }
            Conflict::TransportNotCurrent { slot, id } => {
                write!(f, "transport key {id} is not the current one of slot {slot}")
            }
            Conflict::NoSlotKey { node, slot } => {
                write!(
                    f,
                    "node {node} has no key for slot {slot}; it registers one when its token is ready"
                )
            }
            Conflict::OtherSlotKey { node, slot } => write!(
                f,
                "node {node} already registered another key for slot {slot}; a new token needs a new node_id"
            ),
            Conflict::NodeRemoved { node } => write!(
                f,
                "node {node} was removed; with an empty data_dir it may join again, under a new node_id or the same"
            ),
            Conflict::NotAcknowledged {
                node,
                context,
                version,
            } => write!(
                f,
                "node {node} has not acknowledged version {version} of {context}; its token has to import it first"
            ),
            Conflict::NotProven { node } => {
                write!(
                    f,
                    "node {node} has not proven every key; its tokens have to be ready first"
                )
            }
            Conflict::OpenJoinTokens { open } => {
                write!(f, "{open} join tokens are open; wait until some expire")
            }
            Conflict::Active { context, version } => {
                write!(
                    f,
                    "version {version} of {context} is active; rotate {context} first"
                )
            }
            Conflict::UsedRecently {
                context,
                version,
                ago_ms,
            } => write!(
                f,
                "version {version} of {context} was used, or adopted, {} ago; move whoever needs it to a newer one, or override this",
                time(*ago_ms)
            ),
            Conflict::WaitNotOver {
                context,
                version,
                elapsed_ms,
                wait_ms,
            } => write!(
                f,
                "version {version} of {context} has waited {} of {}; only time under a leader counts",
                time(*elapsed_ms),
                time(*wait_ms)
            ),
            Conflict::OtherWait {
                context,
                version,
                scheduled_by,
                elapsed_ms,
            } => write!(
                f,
                "the wait of version {version} of {context} was begun by entry {scheduled_by} and has come to {}",
                time(*elapsed_ms)
            ),
            Conflict::OtherAcl { digest } => write!(
                f,
                "access control was changed since it was read, its digest is {}; read it again and make the change \
                 there",
                hex::encode(digest)
            ),
            Conflict::NotCountedYet {
                context,
                version,
                node,
                counted_ms: None,
            } => write!(
                f,
                "node {node} has not reported that it counts uses, so nobody knows whether version {version} of \
                 {context} is in use; upgrade the node, or override this"
            ),
            Conflict::NotCountedYet {
                context,
                version,
                node,
                counted_ms: Some(counted_ms),
            } => write!(
                f,
                "node {node} has counted uses for {} only, so nobody knows whether version {version} of {context} \
                 was used before; wait, or override this",
                time(*counted_ms)
            ),
            Conflict::OwesDestruction {
                node,
                context,
                version,
            } => write!(
                f,
                "node {node} has not acknowledged that version {version} of {context} is gone from its token; it has \
                 to remove it first"
            ),
            Conflict::NoOtherGranter { node, slot } => write!(
                f,
                "node {node} cannot open its grant of the transport key of slot {slot}, and no other holder can grant \
                 it; look at what the node's log says of it"
            ),
            Conflict::ContextSlot { context, slot } => write!(
                f,
                "new versions of {context} are made in slot {slot}; look where it is, then ask again"
            ),
            Conflict::NodeLeaves { node } => write!(
                f,
                "node {node} is leaving, and that comes first; wait until it has left, or keep it with: \
                 hsmctl cluster remove {node} --cancel"
            ),
            Conflict::LastVoter { node } => write!(
                f,
                "node {node} is the only voter: without it there is no cluster; let another one join first, or put one in \
                 its place with: hsmctl cluster replace {node} --with NODE"
            ),
            Conflict::SuccessorVotes { node } => write!(
                f,
                "node {node} votes already: it has a place of its own and takes no other's; remove the old node instead"
            ),
            Conflict::LastHolder {
                node,
                context,
                version,
            } => write!(
                f,
                "version {version} of {context} is in the token of node {node} only, and goes with it; adopt it on another \
                 node first, or re-wrap what was encrypted under it and destroy it, or say that it may be lost"
            ),
            Conflict::NotLeaving { node } => write!(f, "node {node} was not asked to leave"),
            Conflict::StillVotes { node } => write!(f, "node {node} still votes"),
            Conflict::RekeyOpen { slot } => write!(
                f,
                "the next transport key of slot {slot} is on its way to the members already; look how far it is with: \
                 hsmctl cluster rekey status"
            ),
            Conflict::LiveTransportKeys { slot, live } => write!(
                f,
                "slot {slot} has {live} transport keys that versions need; destroy old versions first (hsmctl key \
                 destroy)"
            ),
            Conflict::TransportState { slot, id, state } => {
                write!(f, "transport key {id} of slot {slot} is {}; look again", state.as_str())
            }
            Conflict::TransportHolders {
                slot,
                id,
                holders,
                voters,
            } => write!(
                f,
                "transport key {id} of slot {slot} is held by {holders} of {voters} voters; a majority has to hold it, \
                 and everybody else has to be accounted for"
            ),
            Conflict::TransportInUse {
                slot,
                id,
                context,
                version,
            } => write!(
                f,
                "version {version} of {context} is wrapped under transport key {id} of slot {slot}; the version has to \
                 be destroyed first"
            ),
            Conflict::ReplicationKey { current } => write!(
                f,
                "the cluster's replication key has id {}; look again",
                hex::encode(current)
            ),
            Conflict::ResealOpen => f.write_str(
                "what was sealed under the replication key before is still being sealed anew; look how far it is with: \
                 hsmctl cluster rekey status",
            ),
            Conflict::RetiredReplicationKey { id } => write!(
                f,
                "the replication key with id {} was the cluster's before; take a new one (openssl rand -hex 32)",
                hex::encode(id)
            ),
            Conflict::LacksReplicationKey { node, id } => write!(
                f,
                "node {node} has not said that it has the replication key with id {}; give it the key beside the one it \
                 has, and restart it",
                hex::encode(id)
            ),
        }
    }
}

impl fmt::Display for Existing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Existing::Cluster(id) => write!(f, "cluster {id} exists already"),
            Existing::Context { context, slot } => write!(
                f,
                "context {context} exists already (slot {slot}, another slot or binding mode); choose another name"
            ),
            Existing::TransportKey(id) => write!(f, "transport key {id} exists already"),
            Existing::Version { label } => write!(
                f,
                "a version with label {label} or its key_uid exists already; choose another label"
            ),
            Existing::Node(name) => write!(
                f,
                "node_id {name} exists already, with another data directory; give this node another node_id"
            ),
        }
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Missing::Cluster => f.write_str("the cluster"),
            Missing::Context(context) => write!(f, "context {context}"),
            Missing::Version { context, version } => write!(f, "version {version} of {context}"),
            Missing::Slot(slot) => write!(f, "slot {slot}"),
            Missing::Node(id) => write!(f, "node {id}"),
            Missing::TransportKey { slot, id } => write!(f, "transport key {id} of slot {slot}"),
        }
    }
}

impl fmt::Display for Forbidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Forbidden::JoinToken => f.write_str("the join token is unknown, used or expired; make a new one"),
            Forbidden::JoinTokenOfAnother { node } => {
                write!(f, "the join token is not for node_id {node}; make one that is")
            }
            Forbidden::NotItself { node } => write!(f, "only node {node} may say this of itself"),
            Forbidden::Incarnation { node } => write!(
                f,
                "node {node} was registered with another data directory; join under a new node_id"
            ),
            Forbidden::Removed { node } => write!(f, "node {node} was removed; join under a new node_id"),
            Forbidden::Grantor { slot, id } => write!(
                f,
                "transport key {id} of slot {slot} may be granted only by a node that was granted it"
            ),
            Forbidden::Grantee { slot, id } => {
                write!(
                    f,
                    "a node may grant transport key {id} of slot {slot} only to nodes"
                )
            }
            Forbidden::Operation { operation } => write!(f, "{operation} may not be sent by a node"),
            Forbidden::Driver { operation } => {
                write!(f, "{operation} may only be proposed by the leader for itself")
            }
            Forbidden::RejectedGrantor { slot, id } => write!(
                f,
                "transport key {id} of slot {slot} is granted to this node by another holder: it could not open the \
                 grant that this one made"
            ),
            Forbidden::Revoked => f.write_str("the certificate that asks is revoked"),
        }
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Invalid::JoinTokenExpired => {
                f.write_str("the join token would be expired at once; give it more time, and check the clock")
            }
            Invalid::VersionNumber {
                context,
                version,
                next,
            } => {
                write!(
                    f,
                    "version {version} of {context} is not the next one, which is {next}"
                )
            }
            Invalid::Epoch { epoch, current } => write!(
                f,
                "it names epoch {epoch}, the cluster is in epoch {current}; catch up and do it again"
            ),
            Invalid::TooLarge { what, size, most } => {
                write!(f, "{size} {what}, at most {most} are kept; {}", what.remedy())
            }
            Invalid::Key { kind } => write!(
                f,
                "the key of a row of kind {kind} holds a character that it must not; leave it out"
            ),
            Invalid::Wait {
                wait_ms,
                least_ms,
                most_ms,
            } => write!(
                f,
                "a wait of {} is not allowed; choose one from {} to {}",
                time(*wait_ms),
                time(*least_ms),
                time(*most_ms)
            ),
            Invalid::Use { state } => write!(
                f,
                "no version is set to {}; choose disabled, or decrypt_only to enable it",
                state.as_str()
            ),
            Invalid::NoAdmin => f.write_str(
                "it makes nobody an administrator, and nobody could change it any more; give somebody the role admin",
            ),
            Invalid::WaitOrder { context, version } => write!(
                f,
                "the wait of version {version} of {context} is named twice or too late; name each once, ascending by \
                 context and version"
            ),
        }
    }
}

/// A time in the largest unit that gives a whole number.
fn time(ms: u64) -> String {
    let units = [
        (24 * 60 * 60 * 1000, "d"),
        (60 * 60 * 1000, "h"),
        (60 * 1000, "min"),
        (1000, "s"),
    ];
    let whole = |length: u64| ms >= length && ms.is_multiple_of(length);
    match units.into_iter().find(|(length, _)| whole(*length)) {
        Some((length, name)) => format!("{} {name}", ms / length),
        None => format!("{ms} ms"),
    }
}

impl Bounded {
    fn remedy(self) -> &'static str {
        match self {
            Bounded::Row(RowKind::Slot) => {
                "the slot has too many transport keys and grants: destroy versions that need an old one (hsmctl cluster \
                 rekey status)"
            }
            Bounded::Row(RowKind::Node) => "configure fewer slots, or shorten the certificate chain",
            Bounded::Row(RowKind::Request) => "shorten the Idempotency-Key",
            Bounded::Row(_) => "make the change smaller, or split it",
            Bounded::RowKey(_) => "shorten the name",
            Bounded::Label => "choose a shorter label",
            Bounded::Grant | Bounded::SlotPublicKey => "use a smaller slot key",
            Bounded::SlotSignature => "use a smaller cluster key",
            Bounded::Certificates | Bounded::CertificateBytes => "leave out what the CA does not need",
            Bounded::SlotKeys => "configure fewer slots",
            Bounded::Address => "advertise host:port, a host name has at most 253 bytes",
            Bounded::Uses | Bounded::UseCount => "the rest goes into the next report",
            Bounded::Claims => "the rest goes into the next request",
            Bounded::Invocations => "no key of AES-GCM takes more; write less",
            Bounded::Revocations => "take those back whose certificates have expired (hsmctl unrevoke)",
            Bounded::Advance => "advance in smaller steps",
            Bounded::ReplicationKeys => "configure the present key and the one before it",
        }
    }
}

impl fmt::Display for Bounded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bounded::Row(kind) => write!(f, "bytes in a row of kind {kind}"),
            Bounded::RowKey(kind) => write!(f, "bytes in the key of a row of kind {kind}"),
            Bounded::Label => f.write_str("bytes in a label"),
            Bounded::Grant => f.write_str("bytes in a granted transport key"),
            Bounded::SlotPublicKey => f.write_str("bytes in a slot's public key"),
            Bounded::SlotSignature => f.write_str("bytes in a slot key's signature"),
            Bounded::Certificates => f.write_str("certificates in the chain of a slot key's signer"),
            Bounded::CertificateBytes => f.write_str("bytes in the certificate chain of a slot key's signer"),
            Bounded::SlotKeys => f.write_str("slots of one node"),
            Bounded::Address => f.write_str("bytes in a node's address"),
            Bounded::Uses => f.write_str("versions with uses in a report"),
            Bounded::Advance => f.write_str("milliseconds in one step of a wait"),
            Bounded::UseCount => f.write_str("uses of one version in a report"),
            Bounded::Claims => f.write_str("versions in one request for invocations"),
            Bounded::Invocations => f.write_str("invocations under one key version"),
            Bounded::Revocations => f.write_str("revoked certificates"),
            Bounded::ReplicationKeys => f.write_str("replication keys of one node"),
        }
    }
}
