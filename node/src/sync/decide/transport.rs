//! A slot's transport keys: who has to make one, who is granted one, which one may be used.

use raft_store::names::{RaftId, SlotName, TransportId};
use raft_store::state::context::{KeyVersion, VersionKey};
use raft_store::state::node::NodeStatus;
use raft_store::state::slot::{Grantee, TransportGeneration, TransportState};
use raft_store::state::{ClusterMeta, ClusterState};

use super::Picture;
use crate::sync::held::Held;
use crate::sync::plan::{Action, Plan, Problem};
use crate::sync::slot_key::{self, SlotKeyContext};

/// The public key registered for this slot by a node.
fn registered<'a>(picture: &Picture<'a>, node: RaftId) -> Option<&'a [u8]> {
    let node = picture.state.nodes().get(&node)?;
    node.slot_keys.get(picture.slot).map(|key| key.spki.as_slice())
}

/// Whether this is another token than the slot's, whatever its label and PIN say. A registered slot key
/// never changes, so this does not either. A standalone node registers none: there it is a token without
/// any of the transport keys and KEKs that the state names.
pub(super) fn is_replaced(
    picture: &Picture<'_>,
    held: &Held,
    versions: &[(VersionKey, &KeyVersion)],
) -> bool {
    match registered(picture, picture.me) {
        Some(known) => held.node_spki.as_deref() != Some(known),
        None if picture.trust.is_some() => false,
        None => {
            let slot = picture.state.slots().get(picture.slot);
            let named = slot.map_or(&[][..], |slot| slot.transport.as_slice());
            let kept = || {
                named
                    .iter()
                    .any(|generation| held.transport.contains_key(&generation.id))
                    || versions
                        .iter()
                        .any(|(_, version)| held.keks.contains_key(&version.key_uid))
            };
            named.iter().any(|generation| !generation.state.is_ended()) && !kept()
        }
    }
}

pub(super) fn own_key(picture: &Picture<'_>, plan: &mut Plan) {
    if registered(picture, picture.me).is_none() && picture.trust.is_some() {
        plan.actions.push(Action::RegisterSlotKey);
    }
}

/// The generations that new keys, or keys in use, are wrapped under, and the one that is offered.
fn needed<'a>(
    picture: &Picture<'a>,
    versions: &[(VersionKey, &KeyVersion)],
) -> impl Iterator<Item = &'a TransportGeneration> {
    let generations = picture
        .state
        .slots()
        .get(picture.slot)
        .map(|slot| slot.transport.as_slice());
    let used: Vec<TransportId> = versions
        .iter()
        .filter(|(_, version)| version.state.is_readable())
        .filter_map(|(_, version)| version.material.as_ref().map(|material| material.transport_id))
        .collect();
    generations
        .unwrap_or_default()
        .iter()
        .filter(move |generation| match generation.state {
            TransportState::Current | TransportState::Offered => true,
            TransportState::Superseded => used.contains(&generation.id),
            TransportState::Destroying | TransportState::Destroyed => false,
        })
}

/// What people should know of a slot although nothing is wrong: its current transport key is in the nodes'
/// tokens and nowhere else.
pub(super) fn without_recovery(state: &ClusterState, slot: &SlotName) -> Option<Problem> {
    let current = state.slots().get(slot)?.current_transport()?;
    let apart = |grantee: &Grantee| matches!(grantee, Grantee::Recovery(_) | Grantee::Backup(_));
    let id = current.id;
    (!current.grants.keys().any(apart)).then_some(Problem::NoRecovery { id })
}

/// Whether the token holds the very transport key that the cluster committed to.
pub(super) fn trusted(held: &Held, generation: &TransportGeneration) -> bool {
    !generation.state.is_ended()
        && matches!(held.transport.get(&generation.id), Some(Ok(check)) if *check == generation.check)
}

pub(super) fn keys(
    picture: &Picture<'_>,
    held: &Held,
    versions: &[(VersionKey, &KeyVersion)],
    plan: &mut Plan,
) {
    let own_holds = registered(picture, picture.me).is_some();
    let slot = picture.state.slots().get(picture.slot);
    let current = slot.and_then(|slot| slot.current_transport());
    let vouched = own_holds || picture.trust.is_none();
    let may_create = picture.leader && picture.can_open && vouched;
    if current.is_none() && may_create {
        plan.actions.push(Action::CreateTransport);
    }
    if slot.is_some_and(|slot| slot.awaits_transport()) && may_create {
        plan.actions.push(Action::OfferTransport);
    }
    for generation in needed(picture, versions) {
        let id = generation.id;
        match held.transport.get(&id) {
            Some(Ok(check)) if *check != generation.check => {
                let why = "its check differs".to_owned();
                plan.problems.push(Problem::TransportDiffers { id, why });
            }
            Some(Ok(_)) => {
                let is_news = is_asked_for(generation) && !generation.acks.contains(&picture.me);
                plan.actions.extend(is_news.then_some(Action::AckTransport(id)));
            }
            Some(Err(why)) => plan
                .problems
                .push(Problem::TransportDiffers { id, why: why.clone() }),
            None if !generation.grants.contains_key(&Grantee::Node(picture.me)) => {
                plan.problems.push(Problem::NoGrant { id });
            }
            None if own_holds && picture.can_open => plan.actions.push(Action::AcceptTransport(id)),
            // Not registered yet, or the replication key is the wrong one, which is said elsewhere.
            None => {}
        }
    }
}

/// Whether nodes say that they hold it. Of a key that was there before anybody could replace it nobody has asked.
fn is_asked_for(generation: &TransportGeneration) -> bool {
    match generation.state {
        TransportState::Offered => true,
        // Who was left out when it became current says so when it is back, for people to see.
        TransportState::Current => !generation.acks.is_empty(),
        TransportState::Superseded | TransportState::Destroying | TransportState::Destroyed => false,
    }
}

/// Transport keys whose end has come. One that is being destroyed and not in this token is acknowledged, whoever removed
/// it and whether it was ever there; the step itself looks once more.
pub(super) fn ended(picture: &Picture<'_>, held: &Held, plan: &mut Plan) {
    let slot = picture.state.slots().get(picture.slot);
    let ended = slot.iter().flat_map(|slot| &slot.transport);
    for generation in ended.filter(|generation| generation.state.is_ended()) {
        let id = generation.id;
        if held.transport.contains_key(&id) {
            plan.actions.push(Action::RemoveTransport(id));
            plan.destructions += 1;
        } else if generation.state == TransportState::Destroying && !generation.acks.contains(&picture.me) {
            plan.actions.push(Action::AckTransportGone(id));
        }
    }
}

/// Transport keys held here, for every node whose slot key holds.
pub(super) fn grants(picture: &Picture<'_>, meta: &ClusterMeta, held: &Held, plan: &mut Plan) {
    let slot = picture
        .state
        .slots()
        .get(picture.slot)
        .filter(|_| picture.can_open);
    // A standalone node knows no cluster CA, and has nobody to grant to.
    let (Some(slot), Some(trust)) = (slot, picture.trust) else {
        return;
    };
    for generation in slot
        .transport
        .iter()
        .filter(|generation| trusted(held, generation))
    {
        for (id, node) in picture.state.nodes().iter() {
            if matches!(node.status, NodeStatus::Removed { .. }) {
                continue;
            }
            let Some(key) = node.slot_keys.get(picture.slot) else {
                continue;
            };
            if generation.grants.contains_key(&Grantee::Node(*id)) {
                continue;
            }
            // It could not open what this node sent it: another holder's turn.
            let rejected = generation.rejected.get(id);
            if rejected.is_some_and(|rejected| rejected.granters.contains(&picture.me)) {
                continue;
            }
            let context = SlotKeyContext::new(meta, *id, picture.slot);
            match slot_key::verify(&context, node.name.as_str(), key, trust) {
                Ok(()) => plan.actions.push(Action::Grant(generation.id, *id)),
                Err(why) => {
                    let problem = Problem::BadSlotKey {
                        node: *id,
                        name: node.name.to_string(),
                        why: why.to_string(),
                    };
                    if !plan.problems.contains(&problem) {
                        plan.problems.push(problem);
                    }
                }
            }
        }
    }
}
