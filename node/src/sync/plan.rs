//! What a comparison of token and state comes to: steps to take, and what people have to know.

use raft_store::names::{ContextName, KeyUid, RaftId, TransportId};
use raft_store::state::context::VersionKey;

/// One step. Details are looked up in the state when it is taken, so that a step decided long ago
/// does nothing that the state does not want any more.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// Name this token's public key to the cluster.
    RegisterSlotKey,
    /// Make the slot's first transport key.
    CreateTransport,
    /// Make the transport key that a rekey asks for.
    OfferTransport,
    /// Take the transport key that was granted to this node.
    AcceptTransport(TransportId),
    /// Tell the cluster that an offered transport key is in this token.
    AckTransport(TransportId),
    /// Destroy a transport key that no version needs any more.
    RemoveTransport(TransportId),
    /// Tell the cluster that such a key is not in this token.
    AckTransportGone(TransportId),
    /// Prove a key that is in the token.
    Prove(VersionKey),
    /// Bring a key into the token.
    Import {
        /// Which.
        key: VersionKey,
        /// An object with its id is there and must not be used: it goes first.
        replace: bool,
    },
    /// Make a copy of the key of version 1 that became this version.
    Adopt {
        /// Which.
        key: VersionKey,
        /// An object with its id is there and must not be used: it goes first.
        replace: bool,
    },
    /// Make session copies; whether they may encrypt.
    Load(KeyUid, bool),
    /// Replace session copies by ones that cannot encrypt, once nothing that was under way needs them.
    Retire(KeyUid),
    /// Tell the cluster what is proven and can be used here.
    Ack(Vec<(ContextName, u32, KeyUid)>),
    /// Grant a transport key to a node.
    Grant(TransportId, RaftId),
    /// Give session copies up.
    Unload(KeyUid),
    /// Destroy the object of a version that was abandoned or destroyed.
    Remove(KeyUid),
    /// Destroy the copy of an adopted version that was given back to version 1, if version 1's own key is there.
    RemoveCopy(VersionKey),
    /// Destroy an adopted version that was destroyed: its copy, and the key of version 1.
    RemoveAdopted(VersionKey),
    /// Tell the cluster that these versions, which are being destroyed, are not in this token.
    AckDestroyed(Vec<(ContextName, u32, KeyUid)>),
}

/// Versions named in one action, for logs: the first, and how many more.
fn some_of(versions: &[(ContextName, u32, KeyUid)]) -> String {
    let first = versions
        .first()
        .map(|(context, version, _)| format!("{context} v{version}"));
    match versions.len() {
        0 | 1 => first.unwrap_or_default(),
        count => format!("{} and {} more", first.unwrap_or_default(), count - 1),
    }
}

impl Action {
    /// The step's name in logs.
    pub fn name(&self) -> &'static str {
        match self {
            Action::RegisterSlotKey => "register_slot_key",
            Action::CreateTransport => "create_transport_key",
            Action::OfferTransport => "offer_transport_key",
            Action::AcceptTransport(_) => "accept_transport_key",
            Action::AckTransport(_) => "acknowledge_transport_key",
            Action::RemoveTransport(_) => "remove_transport_key",
            Action::AckTransportGone(_) => "acknowledge_transport_destruction",
            Action::Prove(_) => "prove_key",
            Action::Import { .. } => "import_key",
            Action::Adopt { .. } => "adopt_key",
            Action::Load(..) => "load_key",
            Action::Retire(_) => "retire_key",
            Action::Ack(_) => "acknowledge",
            Action::Grant(..) => "grant_transport_key",
            Action::Unload(_) => "unload_key",
            Action::Remove(_) => "remove_key",
            Action::RemoveCopy(_) => "remove_adopted_copy",
            Action::RemoveAdopted(_) => "remove_adopted_key",
            Action::AckDestroyed(_) => "acknowledge_destruction",
        }
    }

    /// What it is about, for logs.
    pub fn subject(&self) -> String {
        match self {
            Action::RegisterSlotKey | Action::CreateTransport | Action::OfferTransport => String::new(),
            Action::AcceptTransport(id)
            | Action::AckTransport(id)
            | Action::RemoveTransport(id)
            | Action::AckTransportGone(id) => id.to_string(),
            Action::Prove(key)
            | Action::Import { key, .. }
            | Action::Adopt { key, .. }
            | Action::RemoveCopy(key)
            | Action::RemoveAdopted(key) => format!("{} v{}", key.context, key.version),
            Action::Load(uid, _) | Action::Retire(uid) | Action::Unload(uid) | Action::Remove(uid) => {
                uid.to_string()
            }
            Action::Ack(versions) | Action::AckDestroyed(versions) => some_of(versions),
            Action::Grant(id, node) => format!("{id} to node {node}"),
        }
    }
}

/// Something that no step can put right by itself, or that people should know. Said once.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Problem {
    /// The token is another one than the slot's; nothing else is planned for it.
    #[error(
        "this is not the slot's token, though its label is (its own key is not the one this node registered, or it \
         holds no key of the slot): the token was replaced; put the old token back and restart, or join a new node \
         under a new node_id with an empty data directory"
    )]
    TokenReplaced,
    /// A node's slot key does not hold.
    #[error("no transport key is granted to node {name} ({node}): {why}")]
    BadSlotKey {
        /// Its raft id.
        node: RaftId,
        /// Its name.
        name: String,
        /// What does not hold.
        why: String,
    },
    /// The token holds another transport key under a committed id.
    #[error(
        "transport key {id} in this token is not the committed one ({why}); it is never used: remove it from \
         the token with the vendor's tool, then it is accepted again from its grant"
    )]
    TransportDiffers {
        /// Its id.
        id: TransportId,
        /// How it differs.
        why: String,
    },
    /// The token lacks a transport key and nobody has granted it yet.
    #[error("transport key {id} was not granted to this node yet; a member that holds it does so by itself")]
    NoGrant {
        /// Its id.
        id: TransportId,
    },
    /// Only the nodes' tokens hold a transport key: whoever loses all of them loses every key.
    #[error(
        "transport key {id} is granted to nodes only, and to no recovery or backup key: if every node's token is \
         lost, every key of the slot is lost for good; keep copies of more than one token directory and its PIN apart"
    )]
    NoRecovery {
        /// Its id.
        id: TransportId,
    },
    /// A readable version is not usable here.
    #[error("{context} version {version}: {why}")]
    Missing {
        /// Its context.
        context: ContextName,
        /// Its number.
        version: u32,
        /// Why.
        why: String,
    },
    /// A key object is kept out of use.
    #[error("key {uid} ({label:?}) is quarantined: {why}")]
    Quarantined {
        /// Its id.
        uid: KeyUid,
        /// Its label.
        label: String,
        /// Why.
        why: String,
    },
    /// An adopted key was given back to version 1, whose own key is not there.
    #[error(
        "key {uid} of version 1 was released, and the original is not in this token; its copy is kept, out of use: bring \
         the key {label:?} back into the token and restart the node, or keep a copy of the token's folder"
    )]
    CopyKept {
        /// Its id.
        uid: KeyUid,
        /// The original's label.
        label: String,
    },
    /// An object the state does not know.
    #[error("the token holds {what}, which the cluster does not know; it is left alone")]
    Unknown {
        /// What it is.
        what: String,
    },
}

impl Problem {
    /// Somebody may be trying something: it belongs in the audit.
    pub fn is_security(&self) -> bool {
        matches!(
            self,
            Problem::TokenReplaced
                | Problem::BadSlotKey { .. }
                | Problem::TransportDiffers { .. }
                | Problem::Quarantined { .. }
        )
    }

    /// It may be what keys are missing for, and does not pass by itself.
    pub fn keeps_keys_away(&self) -> bool {
        matches!(
            self,
            Problem::TokenReplaced
                | Problem::TransportDiffers { .. }
                | Problem::Missing { .. }
                | Problem::Quarantined { .. }
        )
    }

    /// It is part of normal operation.
    pub fn is_passing(&self) -> bool {
        matches!(self, Problem::NoGrant { .. } | Problem::Unknown { .. })
    }
}

impl Plan {
    /// Whether the token is not the slot's and must not be used.
    pub fn disowns(&self) -> bool {
        self.problems.contains(&Problem::TokenReplaced)
    }
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Steps, those that matter most first.
    pub actions: Vec<Action>,
    /// What people have to know.
    pub problems: Vec<Problem>,
    /// Versions the node has to serve and does not, pending ones apart.
    pub missing: u32,
    /// Objects to be destroyed before the node is ready.
    pub destructions: u32,
}
