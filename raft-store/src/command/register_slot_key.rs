//! `RegisterSlotKey`: a node names its public key for a slot, once and for all for its raft id. Who vouches for it
//! may be renewed: another epoch's signature, or another certificate's.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Bounded, Conflict, Done, Refusal, require_self, standing_node};
use crate::names::{RaftId, SlotName};
use crate::state::ClusterState;
use crate::state::node::{Node, SlotKey};
use crate::state::slot::check_epoch;

/// Bytes of a public key (SPKI): RSA-8192 takes half.
const MAX_SPKI: usize = 2 << 10;
/// Bytes of a signature.
const MAX_SIGNATURE: usize = 1 << 10;
/// Certificates in a chain, the node's own included.
const MAX_CHAIN: usize = 4;
/// Their size together: the node's row stays small.
const MAX_CHAIN_BYTES: usize = 16 << 10;
/// Slots of one node.
const MAX_SLOTS: usize = 64;

/// See the module. The signature is verified by whoever acts on the key; `apply` does no cryptography.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RegisterSlotKey {
    /// The node.
    pub node: RaftId,
    /// The slot.
    pub slot: SlotName,
    /// The key and its signature.
    pub key: SlotKey,
}

impl RegisterSlotKey {
    pub(super) fn apply(&self, state: &mut ClusterState, cx: &ApplyContext<'_>) -> Result<Done, Refusal> {
        require_self(cx, self.node)?;
        let mut node = Node::clone(standing_node(state, self.node)?);
        let key = &self.key;
        if let Some(known) = node.slot_keys.get(&self.slot) {
            if known.spki != key.spki {
                let (node, slot) = (node.name.clone(), self.slot.clone());
                return Err(Conflict::OtherSlotKey { node, slot }.into());
            }
            // A command that was long under way must not take a newer signature back.
            if known == key || key.epoch < known.epoch {
                return Ok(Done::Ok);
            }
        }
        check_epoch(key.epoch, state.epoch())?;
        Bounded::SlotPublicKey.check(key.spki.len(), MAX_SPKI)?;
        Bounded::SlotSignature.check(key.signature.len(), MAX_SIGNATURE)?;
        Bounded::Certificates.check(key.signer_chain.len(), MAX_CHAIN)?;
        let bytes = key.signer_chain.iter().map(Vec::len).sum();
        Bounded::CertificateBytes.check(bytes, MAX_CHAIN_BYTES)?;
        node.slot_keys.insert(self.slot.clone(), key.clone());
        Bounded::SlotKeys.check(node.slot_keys.len(), MAX_SLOTS)?;
        state.nodes.put(self.node, node)?;
        Ok(Done::Ok)
    }
}
