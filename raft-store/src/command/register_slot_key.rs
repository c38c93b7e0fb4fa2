//! `RegisterSlotKey`: a node names its public key for a slot, once and for all for its raft id.

use serde::{Deserialize, Serialize};

use super::{ApplyContext, Done, Refusal, require_self};
use crate::names::{RaftId, SlotName};
use crate::state::ClusterState;
use crate::state::node::{Node, SlotKey};

/// Certificates in a chain, the node's own included.
const MAX_CHAIN: usize = 4;
/// Their size together: the node's row stays small.
const MAX_CHAIN_BYTES: usize = 16 << 10;

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
        let Some(node) = state.nodes.get(&self.node).cloned() else {
            return Err(Refusal::NotFound(format!("node {}", self.node)));
        };
        if let Some(known) = node.slot_keys.get(&self.slot) {
            if known.spki == self.key.spki {
                return Ok(Done::Ok);
            }
            return Err(Refusal::Conflict(format!(
                "node {} already registered another key for slot {}; a new token needs a new node identity",
                node.name, self.slot
            )));
        }
        let size = self.key.signer_chain.iter().map(Vec::len).sum::<usize>();
        if self.key.signer_chain.len() > MAX_CHAIN || size > MAX_CHAIN_BYTES {
            return Err(Refusal::Invalid(format!(
                "the certificate chain of node {} has {} certificates of {size} bytes; at most {MAX_CHAIN} of \
                 {MAX_CHAIN_BYTES} bytes are kept",
                node.name,
                self.key.signer_chain.len()
            )));
        }
        let mut node = Node::clone(&node);
        node.slot_keys.insert(self.slot.clone(), self.key.clone());
        state.nodes.put(self.node, node);
        Ok(Done::Ok)
    }
}
