//! The steps that concern transport keys: who a key belongs to, who gets it, and that it is the one the
//! cluster committed to.

use std::collections::BTreeMap;

use hsm_core::replication::GrantContext;
use hsm_core::{HsmError, TRANSPORT_CHECK_LEN};
use raft_store::command::{
    AckTransportKey, AddTransportKey, GrantTransportKey, OfferTransportKey, Op, RegisterSlotKey, RejectGrant,
};
use raft_store::names::{RaftId, TransportId};
use raft_store::state::REJECTS_GRANTS;
use raft_store::state::slot::{Grant, Grantee, TransportGeneration, TransportMode};
use sha2::{Digest, Sha256};

use super::{Outcome, StepError, Workbench, done, propose};
#[cfg(feature = "failpoints")]
use crate::failpoints;
use crate::sync::convert::to_token_transport;
use crate::sync::held::Effect;
use crate::sync::slot_key::{self, SlotKeyContext};

/// A transport key that is in no state yet.
struct MadeTransport {
    check: Vec<u8>,
    grants: BTreeMap<Grantee, Grant>,
}

impl Workbench {
    pub(super) fn register(&self) -> Result<Outcome, StepError> {
        fail::fail_point!("sync::grant_junk", |_| propose(
            Effect::Nothing,
            failpoints::junk_grant(&self.state, &self.name)
        ));
        let signer = self
            .signer
            .as_ref()
            .ok_or(StepError::NoKey("it has no cluster certificate"))?;
        let context = SlotKeyContext::new(self.meta()?, self.me, &self.name);
        let spki = self.slot.node_key()?;
        let key = signer.sign(&context, &spki)?;
        #[cfg(feature = "failpoints")]
        let key = failpoints::other_key(key);
        let op = RegisterSlotKey {
            node: self.me,
            slot: self.name.clone(),
            key,
        };
        propose(Effect::NodeKey(spki), Op::RegisterSlotKey(op))
    }

    pub(super) fn create_transport(&self) -> Result<Outcome, StepError> {
        let (id, made) = (self.new_transport, self.make_transport()?);
        let op = AddTransportKey {
            slot: self.name.clone(),
            id,
            expected_generation: self.newest_generation(),
            mode: TransportMode::Standard,
            check: made.check.clone(),
            grants: made.grants,
        };
        propose(Effect::Transport(id, made.check), Op::AddTransportKey(op))
    }

    /// The key that a rekey asks for. Only once every member has said that it holds it is anything wrapped under it.
    pub(super) fn offer_transport(&self) -> Result<Outcome, StepError> {
        let slot = self.state.slots().get(&self.name);
        if !slot.is_some_and(|slot| slot.awaits_transport()) {
            return Err(StepError::Gone("the wish for another transport key"));
        }
        let id = self.new_transport;
        let (effect, made) = match self.members_keys()? {
            Some(recipients) => (Effect::Nothing, self.make_for(id, &recipients)?),
            // A node that began alone, without a cluster key to vouch with: nobody takes part but its own token.
            None => {
                let made = self.make_transport()?;
                (Effect::Transport(id, made.check.clone()), made)
            }
        };
        fail::fail_point!("rekey::before_offer");
        let slot = self.name.clone();
        tracing::info!(target: "audit", epoch = crate::logging::epoch(), %slot, transport = %id, "a transport key was made for a rekey");
        let op = OfferTransportKey {
            slot,
            id,
            expected_generation: self.newest_generation(),
            mode: TransportMode::Standard,
            check: made.check,
            grants: made.grants,
        };
        propose(effect, Op::OfferTransportKey(op))
    }

    /// The nodes whose slot keys hold, with the keys, this one among them; `None` if it has nothing to vouch with, and is
    /// alone. Whoever has, and whose own key does not hold, makes nothing: the key would stay in its token alone.
    fn members_keys(&self) -> Result<Option<BTreeMap<RaftId, Vec<u8>>>, StepError> {
        let meta = self.meta()?;
        let Some(signer) = &self.signer else {
            return Ok(None);
        };
        let mut found = BTreeMap::new();
        for (id, node) in self.state.nodes().iter() {
            let Some(key) = node.slot_keys.get(&self.name).filter(|_| node.is_standing()) else {
                continue;
            };
            let context = SlotKeyContext::new(meta, *id, &self.name);
            // One that does not hold is said by the comparison, which grants it nothing either.
            if slot_key::verify(&context, node.name.as_str(), key, signer.trust()).is_ok() {
                found.insert(*id, key.spki.clone());
            }
        }
        if !found.contains_key(&self.me) {
            return Err(StepError::NoKey(
                "the cluster's CA does not vouch for its own slot key",
            ));
        }
        Ok(Some(found))
    }

    /// Makes a key that stays in no token: whoever it is granted to, this node too, takes it once it is committed. So a
    /// leader that dies here leaves nothing behind, and one that dies later is needed by nobody.
    fn make_for(
        &self,
        id: TransportId,
        recipients: &BTreeMap<RaftId, Vec<u8>>,
    ) -> Result<MadeTransport, StepError> {
        let spkis: Vec<Vec<u8>> = recipients.values().cloned().collect();
        let offered = self.slot.offer_transport_key(&spkis)?;
        let epoch = self.meta()?.epoch;
        let mut grants = BTreeMap::new();
        for ((node, spki), wrapped) in recipients.iter().zip(offered.grants) {
            let wrapped = match wrapped {
                Ok(wrapped) => wrapped,
                Err(error) if *node == self.me => return Err(error.into()),
                // Its own trouble: a holder tries it again, and says why that fails.
                Err(_) => continue,
            };
            let context = self.grant_context(id, *node, spki, epoch)?;
            let blob = self.key()?.seal_grant(&context, &wrapped)?;
            grants.insert(Grantee::Node(*node), Grant { epoch, blob });
        }
        let check = offered.check.to_vec();
        Ok(MadeTransport { check, grants })
    }

    /// Said only of the committed key, which is in the token this moment.
    pub(super) fn acknowledge_transport(&self, id: TransportId) -> Result<Outcome, StepError> {
        self.compare(self.generation(id)?)?;
        propose(Effect::Nothing, self.ack_of_transport(id, false))
    }

    /// Destroys a transport key whose generation has ended, by the state as this step sees it.
    pub(super) fn remove_transport(&self, id: TransportId) -> Result<(), StepError> {
        if !self.generation(id)?.state.is_ended() {
            return Err(StepError::Gone("the end of the transport key"));
        }
        let objects = self.slot.destroy_transport_key(to_token_transport(id))?;
        if objects > 0 {
            let (slot, epoch) = (self.name.as_str(), crate::logging::epoch());
            tracing::info!(target: "audit", epoch, slot, transport = %id, objects, "superseded transport key destroyed");
        }
        Ok(())
    }

    /// Nothing is acknowledged on the word of an earlier look: the key is searched for by its id, here and now.
    pub(super) fn acknowledge_transport_gone(&self, id: TransportId) -> Result<Outcome, StepError> {
        self.remove_transport(id)?;
        propose(Effect::TransportGone(id), self.ack_of_transport(id, true))
    }

    fn ack_of_transport(&self, id: TransportId, gone: bool) -> Op {
        Op::AckTransportKey(AckTransportKey {
            node: self.me,
            slot: self.name.clone(),
            id,
            gone,
        })
    }

    fn newest_generation(&self) -> u32 {
        let slot = self.state.slots().get(&self.name);
        slot.map_or(0, |slot| slot.newest_generation())
    }

    /// Makes the key, or finds it made, and grants it to this node itself.
    fn make_transport(&self) -> Result<MadeTransport, StepError> {
        let id = self.new_transport;
        let check = self.slot.create_transport_key(to_token_transport(id))?.to_vec();
        let own = self
            .state
            .nodes()
            .get(&self.me)
            .and_then(|node| node.slot_keys.get(&self.name));
        let grants = match own {
            // So that a token that loses it gets it back like anybody else's.
            Some(own) => {
                let grant = self.sealed_grant(id, self.me, &own.spki)?;
                BTreeMap::from([(Grantee::Node(self.me), grant)])
            }
            None => BTreeMap::new(),
        };
        Ok(MadeTransport { check, grants })
    }

    fn grant_context(
        &self,
        id: TransportId,
        node: RaftId,
        spki: &[u8],
        epoch: u64,
    ) -> Result<GrantContext<'_>, StepError> {
        Ok(GrantContext {
            cluster_id: self.meta()?.cluster_id.0,
            epoch,
            slot: self.name.as_str(),
            transport_id: to_token_transport(id),
            raft_id: node,
            spki_sha256: Sha256::digest(spki).into(),
        })
    }

    fn sealed_grant(&self, id: TransportId, node: RaftId, spki: &[u8]) -> Result<Grant, StepError> {
        let epoch = self.meta()?.epoch;
        let context = self.grant_context(id, node, spki, epoch)?;
        // Of a key that is being made there is no generation yet.
        let generation = self.generation(id).ok();
        let key = to_token_transport(id);
        #[cfg(feature = "failpoints")]
        let key = failpoints::planted(&self.slot, key)?;
        let wrapped = if generation.is_some_and(|generation| generation.rejected.contains_key(&node)) {
            self.slot.grant_transport_key_anew(key, spki)?
        } else {
            self.slot.grant_transport_key(key, spki)?
        };
        let blob = self.key()?.seal_grant(&context, &wrapped)?;
        Ok(Grant { epoch, blob })
    }

    pub(super) fn grant(&self, id: TransportId, node: RaftId) -> Result<Outcome, StepError> {
        let recipient = self
            .state
            .nodes()
            .get(&node)
            .and_then(|node| node.slot_keys.get(&self.name));
        let recipient = recipient.ok_or(StepError::Gone("the node's slot key"))?;
        self.compare(self.generation(id)?)?;
        let grant = self.sealed_grant(id, node, &recipient.spki)?;
        #[cfg(feature = "failpoints")]
        let grant = failpoints::unopenable(grant);
        let slot = self.name.clone();
        // Said before it is proposed: what may have happened must not be missing from the audit.
        let spki_sha256 = hex::encode(Sha256::digest(&recipient.spki));
        tracing::info!(target: "audit", epoch = crate::logging::epoch(), %slot, transport = %id, node, spki_sha256, "granting a transport key");
        let op = GrantTransportKey {
            slot,
            id,
            grantee: Grantee::Node(node),
            grant,
        };
        propose(Effect::Nothing, Op::GrantTransportKey(op))
    }

    pub(super) fn accept(&self, id: TransportId) -> Result<Outcome, StepError> {
        let generation = self.generation(id)?;
        let sealed = generation
            .grants
            .get(&Grantee::Node(self.me))
            .ok_or(StepError::Gone("the grant"))?;
        let own = self.node_spki.as_deref();
        let own = own.ok_or(StepError::Gone("this token's own key"))?;
        let context = self.grant_context(id, self.me, own, sealed.epoch)?;
        let blob = self.opened(|key| key.open_grant(&context, &sealed.blob))?;
        let expected = committed_check(generation)?;
        self.slot
            .accept_transport_key(to_token_transport(id), &blob, &expected)?;
        tracing::info!(target: "audit", epoch = crate::logging::epoch(), slot = self.name.as_str(), transport = %id, "transport key accepted");
        done(Effect::Transport(id, generation.check.clone()))
    }

    /// Who made this node's grant: noted of every one but the first.
    pub(in crate::sync) fn granter(&self, id: TransportId) -> Option<RaftId> {
        self.generation(id).ok()?.rejected.get(&self.me)?.latest
    }

    /// What is said of this node's grant once it has failed too often: another holder shall make another one. `None`
    /// if there is no such holder, and while there is a node whose release would stop at it.
    pub(in crate::sync) fn rejection(&self, id: TransportId) -> Option<Op> {
        let generation = self.generation(id).ok()?;
        let grant = generation.grants.get(&Grantee::Node(self.me))?;
        let rejected = generation.rejected.get(&self.me);
        let is_spent = |node: &RaftId| {
            rejected.is_some_and(|before| before.granters.contains(node) || before.latest == Some(*node))
        };
        let mut holders = generation.grants.keys();
        let has_other = holders
            .any(|holder| matches!(holder, Grantee::Node(node) if *node != self.me && !is_spent(node)));
        // Whoever has never reported has only just joined, with the release it has now.
        let knows = |id: &RaftId| {
            let report = self.state.reports().get(id);
            report.is_none_or(|report| report.feature_level >= REJECTS_GRANTS)
        };
        let mut nodes = self.state.nodes().iter();
        let all_know = nodes.all(|(id, node)| !node.is_standing() || knows(id));
        (has_other && all_know).then(|| {
            Op::RejectGrant(RejectGrant {
                node: self.me,
                slot: self.name.clone(),
                id,
                grant: grant.clone(),
            })
        })
    }

    /// Refuses a transport key that is not, this moment, the committed one.
    pub(super) fn compare(&self, generation: &TransportGeneration) -> Result<(), StepError> {
        let id = to_token_transport(generation.id);
        let expected = committed_check(generation)?;
        match self.slot.transport_check(id)? {
            Some(found) if found == expected => Ok(()),
            Some(_) => Err(HsmError::TransportCheck { id: id.to_string() }.into()),
            None => Err(HsmError::NotFound {
                what: "transport key",
                id: id.to_string(),
            }
            .into()),
        }
    }
}

fn committed_check(generation: &TransportGeneration) -> Result<[u8; TRANSPORT_CHECK_LEN], StepError> {
    let check = <[u8; TRANSPORT_CHECK_LEN]>::try_from(generation.check.as_slice());
    check.map_err(|_| StepError::Check(generation.id, generation.check.len()))
}
