//! The comparison of one slot's token with the replicated state. Pure: the same picture gives the same
//! plan, so that whatever a node died in, the next start goes on from there.

mod transport;

use std::collections::BTreeMap;

use raft_store::command::MAX_CLAIMS;
use raft_store::names::{KeyUid, RaftId, SlotName};
use raft_store::state::ClusterState;
use raft_store::state::context::{KeyVersion, VersionKey, VersionState};
use raft_store::state::node::NodeStatus;

use super::held::{Held, HeldKek};
use super::plan::{Action, Plan, Problem};
use super::wanted::{concerns, is_at_hand, is_served, versions};
use crate::tls::PeerVerifier;

/// Acknowledgements in one command, well below its 64 KiB.
const ACKS_PER_COMMAND: usize = MAX_CLAIMS;

/// Everything the decision looks at.
#[derive(Clone, Copy)]
pub struct Picture<'a> {
    /// The replicated state.
    pub state: &'a ClusterState,
    /// This node.
    pub me: RaftId,
    /// Whether it leads.
    pub leader: bool,
    /// Verifies who vouches for a slot's key; a standalone node has none, nor a key to vouch with.
    pub trust: Option<&'a PeerVerifier>,
    /// Whether it has the cluster's replication key.
    pub can_open: bool,
    /// The slot.
    pub slot: &'a SlotName,
    /// What its token holds; `None` while the token cannot be asked.
    pub held: Option<&'a Held>,
}

/// What is worth a warning although nothing has to be done now.
pub fn warning(state: &ClusterState, slot: &SlotName) -> Option<Problem> {
    transport::without_recovery(state, slot)
}

/// Decides what this node's slot needs next.
pub fn decide(picture: &Picture<'_>) -> Plan {
    let mut plan = Plan::default();
    let Some(meta) = picture.state.meta() else {
        return plan;
    };
    let Some(node) = picture.state.nodes().get(&picture.me) else {
        return plan;
    };
    if matches!(node.status, NodeStatus::Removed { .. }) {
        return plan;
    }
    let versions = versions(picture.state, picture.slot);
    let replaced = |held: &Held| transport::is_replaced(picture, held, &versions);
    let Some(held) = picture.held.filter(|held| !replaced(held)) else {
        let lacking = versions
            .iter()
            .filter(|(_, version)| is_served(version, picture.me));
        plan.missing = u32::try_from(lacking.count()).unwrap_or(u32::MAX);
        // Nothing is done in a token that is not ours.
        plan.problems.extend(picture.held.map(|_| Problem::TokenReplaced));
        return plan;
    };
    transport::own_key(picture, &mut plan);
    transport::keys(picture, held, &versions, &mut plan);
    keys(picture, held, &versions, &mut plan);
    transport::grants(picture, meta, held, &mut plan);
    let states = versions
        .iter()
        .map(|(_, version)| (version.key_uid, version.state))
        .collect();
    leftovers(held, &states, &mut plan);
    destroyed(picture, held, &versions, &mut plan);
    unknown(picture, held, &states, &mut plan);
    plan
}

/// What each version needs next.
fn keys(picture: &Picture<'_>, held: &Held, versions: &[(VersionKey, &KeyVersion)], plan: &mut Plan) {
    let mut acks = Vec::new();
    for (key, version) in versions {
        if !is_at_hand(version.state) || !concerns(version, picture.me) {
            continue;
        }
        let kek = held.keks.get(&version.key_uid);
        if !version.state.is_readable() {
            out_of_use(key, version, kek, plan);
            continue;
        }
        let ready = match kek {
            Some(HeldKek {
                problem: None,
                proven,
                loaded,
                ..
            }) => usable(key, version, *proven, *loaded, plan),
            _ => {
                import(picture, held, key, version, kek, plan);
                false
            }
        };
        if ready && !version.acks.contains(&picture.me) {
            acks.push((key.context.clone(), key.version, version.key_uid));
        }
        if !ready && is_served(version, picture.me) {
            plan.missing += 1;
        }
    }
    plan.actions.extend(
        acks.chunks(ACKS_PER_COMMAND)
            .map(|chunk| Action::Ack(chunk.to_vec())),
    );
}

/// Keeps what decrypts nothing now ready for the moment in which it is enabled, or its destruction undone: otherwise
/// every node would be out of service then, if only for as long as it takes to load it. What is not in the token, or not
/// what it should be, waits until then.
fn out_of_use(key: &VersionKey, version: &KeyVersion, kek: Option<&HeldKek>, plan: &mut Plan) {
    if let Some(HeldKek {
        problem: None,
        proven,
        loaded,
        ..
    }) = kek
    {
        usable(key, version, *proven, *loaded, plan);
    }
}

/// Proves and loads what is held. True once it can be used: only then is it acknowledged, because from
/// then on other nodes may encrypt with it.
fn usable(
    key: &VersionKey,
    version: &KeyVersion,
    proven: bool,
    loaded: Option<bool>,
    plan: &mut Plan,
) -> bool {
    if !proven {
        plan.actions.push(Action::Prove(key.clone()));
        return false;
    }
    // A pending version is loaded for encryption at once, so that activating it takes nothing but the
    // entry that does it.
    let encrypts = matches!(version.state, VersionState::Pending | VersionState::Active);
    match loaded {
        Some(true) if !encrypts => plan.actions.push(Action::Retire(version.key_uid)),
        Some(true) => {}
        Some(false) if !encrypts => {}
        Some(false) | None => {
            plan.actions.push(Action::Load(version.key_uid, encrypts));
            return false;
        }
    }
    true
}

fn import(
    picture: &Picture<'_>,
    held: &Held,
    key: &VersionKey,
    version: &KeyVersion,
    kek: Option<&HeldKek>,
    plan: &mut Plan,
) {
    if let Some(HeldKek {
        label,
        problem: Some(why),
        ..
    }) = kek
    {
        let (uid, label, why) = (version.key_uid, label.clone(), why.clone());
        plan.problems.push(Problem::Quarantined { uid, label, why });
    }
    let obstacle = match &version.material {
        None => Some("it is not in this token and cannot be replicated".to_owned()),
        Some(_) if !picture.can_open => Some("this node has another replication key".to_owned()),
        Some(material) => {
            let slot = picture.state.slots().get(picture.slot);
            let generation = slot.and_then(|slot| slot.transport(material.transport_id));
            match generation {
                Some(generation) if transport::trusted(held, generation) => None,
                _ => Some(format!(
                    "its transport key {} is not in this token",
                    material.transport_id
                )),
            }
        }
    };
    match obstacle {
        None => plan.actions.push(Action::Import {
            key: key.clone(),
            replace: kek.is_some(),
        }),
        Some(why) => {
            let (context, version) = (key.context.clone(), key.version);
            plan.problems.push(Problem::Missing {
                context,
                version,
                why,
            });
        }
    }
}

/// Copies nobody may use any more, and objects whose tombstone is in the state.
fn leftovers(held: &Held, states: &BTreeMap<KeyUid, VersionState>, plan: &mut Plan) {
    for (uid, kek) in &held.keks {
        match states.get(uid) {
            Some(VersionState::Abandoned | VersionState::Destroying | VersionState::Destroyed) => {
                plan.actions.push(Action::Remove(*uid));
                plan.destructions += 1;
            }
            Some(state) if is_at_hand(*state) => {}
            _ if kek.loaded.is_some() => plan.actions.push(Action::Unload(*uid)),
            _ => {}
        }
    }
}

/// What is being destroyed and not in this token is acknowledged, whoever removed it and whether it was ever there:
/// this token may have been another node's. The step itself looks once more, by each key's id.
fn destroyed(picture: &Picture<'_>, held: &Held, versions: &[(VersionKey, &KeyVersion)], plan: &mut Plan) {
    let owed: Vec<_> = versions
        .iter()
        .filter(|(_, version)| version.state == VersionState::Destroying)
        .filter(|(_, version)| !version.acks.contains(&picture.me))
        .filter(|(_, version)| !held.keks.contains_key(&version.key_uid))
        .map(|(key, version)| (key.context.clone(), key.version, version.key_uid))
        .collect();
    plan.actions.extend(
        owed.chunks(ACKS_PER_COMMAND)
            .map(|chunk| Action::AckDestroyed(chunk.to_vec())),
    );
}

/// Reported, never destroyed: it may be another cluster's, or v1's.
fn unknown(picture: &Picture<'_>, held: &Held, states: &BTreeMap<KeyUid, VersionState>, plan: &mut Plan) {
    for (uid, kek) in held.keks.iter().filter(|(uid, _)| !states.contains_key(uid)) {
        plan.problems.push(Problem::Unknown {
            what: format!("key {uid} ({:?})", kek.label),
        });
    }
    let slot = picture.state.slots().get(picture.slot);
    for id in held.transport.keys() {
        if slot.is_none_or(|slot| slot.transport(*id).is_none()) {
            plan.problems.push(Problem::Unknown {
                what: format!("transport key {id}"),
            });
        }
    }
    plan.problems
        .extend(held.foreign.iter().map(|what| Problem::Unknown {
            what: format!("object {what}"),
        }));
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests;
