//! The comparison of one slot's token with the replicated state. Pure: the same picture gives the same
//! plan, so that whatever a node died in, the next start goes on from there.

mod transport;

use std::collections::{BTreeMap, BTreeSet};

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
    leftovers(held, &states, &versions, &mut plan);
    adopted_leftovers(held, &versions, &mut plan);
    transport::ended(picture, held, &mut plan);
    destroyed(picture, held, &versions, &mut plan);
    unknown(picture, held, &states, &versions, &mut plan);
    plan
}

/// What each version needs next.
fn keys(picture: &Picture<'_>, held: &Held, versions: &[(VersionKey, &KeyVersion)], plan: &mut Plan) {
    let mut acks = Vec::new();
    for (key, version) in versions {
        // A copy of the token that an adopted key was found in serves too, once it has proven that it does.
        let here = concerns(version, picture.me) || is_found(held, version);
        if !is_at_hand(version.state) || !here {
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
            _ if version.origin.is_adopted() => {
                adopt(held, key, version, kek, plan);
                false
            }
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

/// Whether the token has what could be this version, if it was adopted: a copy that adoption made, or a key of its
/// label.
fn is_found(held: &Held, version: &KeyVersion) -> bool {
    version.origin.is_adopted()
        && (held.keks.contains_key(&version.key_uid) || held.labelled.contains(&version.label))
}

/// What keeps a key object out of use.
fn quarantined(version: &KeyVersion, kek: Option<&HeldKek>, plan: &mut Plan) {
    if let Some(HeldKek {
        label,
        problem: Some(why),
        ..
    }) = kek
    {
        let (uid, label, why) = (version.key_uid, label.clone(), why.clone());
        plan.problems.push(Problem::Quarantined { uid, label, why });
    }
}

fn adopt(held: &Held, key: &VersionKey, version: &KeyVersion, kek: Option<&HeldKek>, plan: &mut Plan) {
    quarantined(version, kek, plan);
    if held.labelled.contains(&version.label) {
        plan.actions.push(Action::Adopt {
            key: key.clone(),
            replace: kek.is_some(),
        });
        return;
    }
    plan.problems.push(Problem::Missing {
        context: key.context.clone(),
        version: key.version,
        why: format!(
            "it was adopted from version 1, and neither its copy nor the key {:?} is in this token any more; bring \
             them back with a copy of the token's folder",
            version.label
        ),
    });
}

fn import(
    picture: &Picture<'_>,
    held: &Held,
    key: &VersionKey,
    version: &KeyVersion,
    kek: Option<&HeldKek>,
    plan: &mut Plan,
) {
    quarantined(version, kek, plan);
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
fn leftovers(
    held: &Held,
    states: &BTreeMap<KeyUid, VersionState>,
    versions: &[(VersionKey, &KeyVersion)],
    plan: &mut Plan,
) {
    let adopted: BTreeSet<KeyUid> = versions
        .iter()
        .filter(|(_, version)| version.origin.is_adopted())
        .map(|(_, version)| version.key_uid)
        .collect();
    for (uid, kek) in &held.keks {
        match states.get(uid) {
            // By steps of their own, which look for the original.
            Some(VersionState::Abandoned | VersionState::Destroying | VersionState::Destroyed)
                if adopted.contains(uid) => {}
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

/// Adopted versions whose end has come, with the keys of version 1. Those are known by their label alone until the
/// check record says which of them it is, so they are looked for once, and again if the copy comes back.
fn adopted_leftovers(held: &Held, versions: &[(VersionKey, &KeyVersion)], plan: &mut Plan) {
    for (key, version) in versions {
        if version.state == VersionState::Abandoned && version.origin.is_adopted() {
            released(held, key, version, plan);
            continue;
        }
        let over = matches!(version.state, VersionState::Destroying | VersionState::Destroyed);
        if over && version.origin.is_adopted() && is_left(held, version) {
            plan.actions.push(Action::RemoveAdopted(key.clone()));
            plan.destructions += 1;
        }
    }
}

/// A copy whose original is gone may be the only key there is, so nobody's readiness waits for its end.
fn released(held: &Held, key: &VersionKey, version: &KeyVersion, plan: &mut Plan) {
    let uid = version.key_uid;
    if !held.keks.contains_key(&uid) {
        return;
    }
    if held.kept.get(&uid) == Some(&held.labelled.contains(&version.label)) {
        let label = version.label.clone();
        plan.problems.push(Problem::CopyKept { uid, label });
    } else {
        plan.actions.push(Action::RemoveCopy(key.clone()));
    }
}

/// Whether a key that is to be destroyed may still be in the token, as far as the last look says.
fn is_left(held: &Held, version: &KeyVersion) -> bool {
    let copy = held.keks.contains_key(&version.key_uid);
    copy || is_found(held, version) && !held.gone.contains(&version.key_uid)
}

/// What is being destroyed and not in this token is acknowledged, whoever removed it and whether it was ever there:
/// this token may have been another node's. The step itself looks once more, by each key's id.
fn destroyed(picture: &Picture<'_>, held: &Held, versions: &[(VersionKey, &KeyVersion)], plan: &mut Plan) {
    let owed: Vec<_> = versions
        .iter()
        .filter(|(_, version)| version.state == VersionState::Destroying)
        .filter(|(_, version)| !version.acks.contains(&picture.me) && concerns(version, picture.me))
        .filter(|(_, version)| !is_left(held, version))
        .map(|(key, version)| (key.context.clone(), key.version, version.key_uid))
        .collect();
    plan.actions.extend(
        owed.chunks(ACKS_PER_COMMAND)
            .map(|chunk| Action::AckDestroyed(chunk.to_vec())),
    );
}

/// Reported, never destroyed: it may be another cluster's, or v1's.
fn unknown(
    picture: &Picture<'_>,
    held: &Held,
    states: &BTreeMap<KeyUid, VersionState>,
    versions: &[(VersionKey, &KeyVersion)],
    plan: &mut Plan,
) {
    // The keys of version 1 that versions were made of stay in the token beside their copies.
    let originals: BTreeSet<&str> = versions
        .iter()
        .filter(|(_, version)| version.origin.is_adopted() && !version.state.is_over())
        .map(|(_, version)| version.label.as_str())
        .collect();
    let stray = |uid: &KeyUid, kek: &HeldKek| {
        let is_original = kek.problem.is_some() && originals.contains(kek.label.as_str());
        !states.contains_key(uid) && !is_original
    };
    for (uid, kek) in held.keks.iter().filter(|(uid, kek)| stray(uid, kek)) {
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
    let foreign = held
        .foreign
        .iter()
        .filter(|object| !originals.contains(object.label.as_str()));
    plan.problems.extend(foreign.map(|object| Problem::Unknown {
        what: format!("object {}", object.what),
    }));
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests;
