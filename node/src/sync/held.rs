//! What one token holds, as last seen: the token's side of the comparison with the state. Looking
//! blocks; the picture itself is plain data.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use hsm_core::{HsmError, KekUse, Slot};
use raft_store::names::{KeyUid, TransportId};

use super::convert::{to_state_key, to_state_transport, to_token_transport};

/// A key object in the token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeldKek {
    /// Its label.
    pub label: String,
    /// Why it must not be used.
    pub problem: Option<String>,
    /// Its check record was decrypted by this process, with the object as it is in the token.
    pub proven: bool,
    /// Its session copies, and whether they may encrypt.
    pub loaded: Option<bool>,
}

/// An object that is of no use here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Foreign {
    /// Its label.
    pub label: String,
    /// What it is, for people.
    pub what: String,
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// The token's own public key (SPKI, DER), if it has one yet.
    pub node_spki: Option<Vec<u8>>,
    /// Transport keys with their checks, or why one cannot be used.
    pub transport: BTreeMap<TransportId, Result<Vec<u8>, String>>,
    /// Keys by id.
    pub keks: BTreeMap<KeyUid, HeldKek>,
    /// Objects of other kinds.
    pub foreign: Vec<Foreign>,
    /// Labels of AES keys that this service did not make: version 1's are found among them.
    pub labelled: BTreeSet<String>,
    /// Keys that this process has removed, or has looked for by their id and not found, since the slot was opened.
    pub gone: BTreeSet<KeyUid>,
    /// Copies of released keys whose originals are not in the token, and whether it had a key of their label then: with
    /// that unchanged, nothing is looked for again before the slot is opened anew.
    pub kept: BTreeMap<KeyUid, bool>,
}

/// How a token step changed the token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Not at all.
    Nothing,
    /// It has this key pair of its own.
    NodeKey(Vec<u8>),
    /// It holds a transport key with this check.
    Transport(TransportId, Vec<u8>),
    /// It holds no such transport key.
    TransportGone(TransportId),
    /// It holds a proven key under this label.
    Proven(KeyUid, String),
    /// A key has session copies; whether they may encrypt.
    Loaded(KeyUid, bool),
    /// A key has no session copies.
    Unloaded(KeyUid),
    /// These keys are not in the token, nor are copies of them.
    Gone(Vec<KeyUid>),
    /// The copy of a released key is kept, unloaded: the original of this label is not in the token.
    Kept(KeyUid, String),
    /// A key turned out to be unusable.
    Unusable(KeyUid, String),
    /// An adopted key is not in the token any more, and whether keys of version 1's label are, which were not it.
    AdoptedGone {
        /// The key.
        uid: KeyUid,
        /// The label.
        label: String,
        /// Whether that is still some other key's.
        others: bool,
    },
}

impl Held {
    /// Looks into the token and changes nothing in it: it may be somebody else's. `before` is what is
    /// known of session copies and proofs, neither of which the token shows. Blocks.
    pub fn look(slot: &Slot, before: Option<&Held>) -> Result<Self, HsmError> {
        let node_spki = slot.find_node_key()?;
        let inventory = slot.objects()?;
        let mut transport = BTreeMap::new();
        for id in inventory.transport_keys {
            let id = to_state_transport(id);
            if let Entry::Vacant(place) = transport.entry(id) {
                place.insert(check_of(slot, id)?);
            }
        }
        let keks = inventory.keks.into_iter().map(|key| {
            let uid = to_state_key(key.key_uid);
            let known = before.and_then(|before| before.keks.get(&uid));
            // A quarantined key has lost its copies, and proofs of it say nothing.
            let known = known.filter(|_| key.problem.is_none());
            let kek = HeldKek {
                label: key.label,
                problem: key
                    .problem
                    .or_else(|| known.and_then(|known| known.problem.clone())),
                proven: known.is_some_and(|known| known.proven),
                loaded: known.and_then(|known| known.loaded),
            };
            (uid, kek)
        });
        let keks: BTreeMap<KeyUid, HeldKek> = keks.collect();
        // What is found is not gone, whoever brought it back.
        let gone = before.map(|before| before.gone.clone()).unwrap_or_default();
        let gone = gone.into_iter().filter(|uid| !keks.contains_key(uid)).collect();
        let kept = before.map(|before| before.kept.clone()).unwrap_or_default();
        let foreign = inventory.foreign.into_iter().map(|object| {
            let class = object
                .class
                .map_or("no class".to_owned(), |class| format!("class {class:#x}"));
            Foreign {
                what: format!("{:?} ({class}, id {})", object.label, object.id),
                label: object.label,
            }
        });
        Ok(Self {
            node_spki,
            transport,
            keks,
            foreign: foreign.collect(),
            labelled: inventory.labelled,
            gone,
            kept,
        })
    }

    /// The keys that can be used: proven, loaded, and nothing is wrong with them.
    #[must_use]
    pub fn serving(&self) -> BTreeSet<KeyUid> {
        let usable = |kek: &HeldKek| kek.proven && kek.loaded.is_some() && kek.problem.is_none();
        let serving = self.keks.iter().filter(|(_, kek)| usable(kek));
        serving.map(|(uid, _)| *uid).collect()
    }

    /// Takes over what a step did.
    pub fn apply(&mut self, effect: Effect) {
        match effect {
            Effect::Nothing => {}
            Effect::NodeKey(spki) => self.node_spki = Some(spki),
            Effect::Transport(id, check) => {
                self.transport.insert(id, Ok(check));
            }
            Effect::TransportGone(id) => {
                self.transport.remove(&id);
            }
            Effect::Proven(uid, label) => {
                let kek = self.keks.entry(uid).or_default();
                kek.label = label;
                kek.problem = None;
                kek.proven = true;
                self.gone.remove(&uid);
            }
            Effect::Loaded(uid, encrypts) => {
                if let Some(kek) = self.keks.get_mut(&uid) {
                    kek.loaded = Some(encrypts);
                }
            }
            Effect::Unloaded(uid) => {
                if let Some(kek) = self.keks.get_mut(&uid) {
                    kek.loaded = None;
                }
            }
            Effect::Gone(uids) => {
                for uid in uids {
                    self.keks.remove(&uid);
                    self.gone.insert(uid);
                }
            }
            Effect::AdoptedGone { uid, label, others } => {
                self.keks.remove(&uid);
                self.gone.insert(uid);
                if !others {
                    self.labelled.remove(&label);
                    self.foreign.retain(|object| object.label != label);
                }
            }
            Effect::Kept(uid, label) => {
                if let Some(kek) = self.keks.get_mut(&uid) {
                    kek.loaded = None;
                }
                self.kept.insert(uid, self.labelled.contains(&label));
            }
            Effect::Unusable(uid, why) => {
                if let Some(kek) = self.keks.get_mut(&uid) {
                    let label = std::mem::take(&mut kek.label);
                    *kek = HeldKek {
                        label,
                        problem: Some(why),
                        ..HeldKek::default()
                    };
                }
            }
        }
    }
}

/// What is wrong with a transport key as it lies in the token must not hide the rest. Anything else is
/// the token's trouble now: then nothing is known, and it is looked at again.
fn check_of(slot: &Slot, id: TransportId) -> Result<Result<Vec<u8>, String>, HsmError> {
    match slot.transport_check(to_token_transport(id)) {
        Ok(Some(check)) => Ok(Ok(check.to_vec())),
        Ok(None) => Ok(Err("it was there a moment ago and cannot be found".to_owned())),
        Err(
            error @ (HsmError::Attribute { .. }
            | HsmError::Quarantined { .. }
            | HsmError::TransportCheck { .. }),
        ) => Ok(Err(error.to_string())),
        Err(error) => Err(error),
    }
}

/// How session copies are asked for.
pub fn kek_use(encrypts: bool) -> KekUse {
    if encrypts {
        KekUse::EncryptDecrypt
    } else {
        KekUse::DecryptOnly
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_change_the_picture() {
        let uid = KeyUid([1; 16]);
        let mut held = Held::default();
        held.apply(Effect::Loaded(uid, true));
        assert!(held.keks.is_empty(), "what is not held cannot be loaded");
        held.apply(Effect::Proven(uid, "kek-a-v1".to_owned()));
        held.apply(Effect::Loaded(uid, true));
        let expected = HeldKek {
            label: "kek-a-v1".to_owned(),
            problem: None,
            proven: true,
            loaded: Some(true),
        };
        assert_eq!(held.keks[&uid], expected);
        held.apply(Effect::Unusable(uid, "twice".to_owned()));
        let kek = &held.keks[&uid];
        assert_eq!(
            (kek.proven, kek.loaded, kek.problem.as_deref()),
            (false, None, Some("twice"))
        );
        held.apply(Effect::Gone(vec![uid]));
        assert!(held.keks.is_empty() && held.gone.contains(&uid));
        held.apply(Effect::Proven(uid, "kek-a-v1".to_owned()));
        assert!(held.gone.is_empty(), "it is there again");
    }
}
