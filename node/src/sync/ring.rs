//! The key ring: replicated state joined with what the tokens really hold. A key is readable here only if it was proven
//! in its slot's token and its session copies are made.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use raft_store::names::{ContextName, KeyUid, RaftId, SlotName};
use raft_store::state::ClusterState;
use raft_store::state::context::{Context, KeyVersion, VersionState};

use super::convert::{to_token_binding, to_token_key};
use super::wanted::concerns;
use crate::keyring::{
    ActiveKey, ContextKeys, KeySlot, MissingKey, MissingWhy, ReadableKey, RetiredKey, RetiredWhy, TokenOps,
};
use crate::leases::Leases;
use crate::seeded::bug;

/// Where a slot's keys are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// In a token that was looked into, and these are proven and loaded.
    Token(Arc<BTreeSet<KeyUid>>),
    /// In a token that was not looked into yet.
    Unseen,
    /// Behind a slot that is not open: what it would answer is the slot's state.
    Closed,
}

/// A slot, as the ring is made of it.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) ops: &'a Arc<dyn TokenOps>,
    pub(super) source: &'a Source,
}

impl Place<'_> {
    fn named(self, slot: &SlotName) -> KeySlot {
        KeySlot {
            name: slot.to_arc(),
            ops: Arc::clone(self.ops),
        }
    }
}

/// The keys of all contexts, each in its slot, which `place` finds.
pub(super) fn contexts<'a>(
    state: &ClusterState,
    me: RaftId,
    place: impl Fn(&SlotName) -> Place<'a>,
    leases: &Leases,
) -> HashMap<ContextName, ContextKeys> {
    let contexts = state.contexts().iter();
    contexts
        .map(|(name, context)| (name.clone(), keys(state, me, (name, context), &place, leases)))
        .collect()
}

fn keys<'a>(
    state: &ClusterState,
    me: RaftId,
    (name, context): (&ContextName, &Context),
    place: impl Fn(&SlotName) -> Place<'a>,
    leases: &Leases,
) -> ContextKeys {
    let active = context.active_version.and_then(|version| {
        let key = state.version(name, version)?;
        Some(ActiveKey {
            slot: place(&key.slot).named(&key.slot),
            key_uid: to_token_key(key.key_uid),
            version,
            key_id: key.label.clone(),
            meter: leases.meter(key.key_uid),
        })
    });
    let mut keys = ContextKeys {
        binding: to_token_binding(context.binding),
        active,
        readable: HashMap::new(),
        by_key_id: HashMap::new(),
        highest_known: context.highest_version,
        missing: HashMap::new(),
        retired: HashMap::new(),
    };
    for (version, key) in state.versions_of(name) {
        let over = matches!(key.state, VersionState::Destroying | VersionState::Destroyed);
        let forgotten = over && bug("bug::forget_session_copies");
        let retired = if forgotten { None } else { retired(key.state) };
        if retired.is_none() && !forgotten && !key.state.is_readable() {
            continue;
        }
        let (uid, key_id) = (to_token_key(key.key_uid), key.label.clone());
        keys.by_key_id.insert(key_id.clone(), uid);
        if let Some(why) = retired {
            keys.retired.insert(uid, RetiredKey { version, key_id, why });
            continue;
        }
        let here = place(&key.slot);
        let lacks = if forgotten {
            None
        } else {
            missing(key, me, here.source)
        };
        match lacks {
            None => {
                let slot = here.named(&key.slot);
                keys.readable.insert(
                    uid,
                    ReadableKey {
                        slot,
                        version,
                        key_id,
                    },
                );
            }
            Some(why) => {
                keys.missing.insert(uid, MissingKey { version, key_id, why });
            }
        }
    }
    keys
}

/// Why a version decrypts nothing, wherever its key is. The label of one that was abandoned is free again.
fn retired(state: VersionState) -> Option<RetiredWhy> {
    match state {
        VersionState::Disabled | VersionState::DestroyScheduled => Some(RetiredWhy::Disabled),
        VersionState::Destroying | VersionState::Destroyed => Some(RetiredWhy::Destroyed),
        VersionState::Pending
        | VersionState::Active
        | VersionState::DecryptOnly
        | VersionState::Abandoned => None,
    }
}

fn missing(key: &KeyVersion, me: RaftId, source: &Source) -> Option<MissingWhy> {
    match source {
        // An adopted key in a copy of the token too, before the cluster has heard of it.
        Source::Token(serving) if serving.contains(&key.key_uid) => None,
        _ if !concerns(key, me) => Some(MissingWhy::NotReplicable),
        Source::Closed => None,
        Source::Unseen | Source::Token(_) => Some(MissingWhy::NotImportedYet),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::time::Duration;

    use hsm_core::SlotState;
    use raft_store::names::Boot;

    use super::super::held::{Effect, Held};
    use super::super::testing::{Cluster, ME, context};
    use super::*;
    use crate::keyring::ClosedSlot;

    fn ring(cluster: &Cluster, source: &Source) -> ContextKeys {
        ring_of(cluster, |_| source)
    }

    /// What `source` says of each slot.
    fn ring_of<'s>(cluster: &Cluster, source: impl Fn(&SlotName) -> &'s Source) -> ContextKeys {
        let ops: Arc<dyn TokenOps> = Arc::new(ClosedSlot(SlotState::Locked));
        let leases = Leases::new(Boot([1; 16]), Duration::from_secs(60));
        let place = |slot: &SlotName| Place {
            ops: &ops,
            source: source(slot),
        };
        contexts(&cluster.state, ME, place, &leases)
            .remove(&context("a"))
            .unwrap()
    }

    fn token(held: &Held) -> Source {
        Source::Token(Arc::new(held.serving()))
    }

    fn cluster() -> Cluster {
        let mut cluster = Cluster::founded();
        cluster.registered(ME).transport(&[]).context("a");
        cluster.active("a", 1);
        cluster.pending("a", 2);
        cluster
    }

    #[test]
    fn a_key_is_readable_once_it_is_proven_and_loaded() {
        let cluster = cluster();
        let first = cluster.state.version(&context("a"), 1).unwrap().key_uid;
        let mut held = Held::default();
        for (effect, readable) in [
            (Effect::Proven(first, "x".to_owned()), false),
            (Effect::Loaded(first, true), true),
        ] {
            held.apply(effect);
            let keys = ring(&cluster, &token(&held));
            assert_eq!(keys.readable.contains_key(&to_token_key(first)), readable);
            assert_eq!(keys.missing.len(), if readable { 1 } else { 2 });
            assert_eq!(keys.active.as_ref().unwrap().version, 1);
            assert_eq!((keys.highest_known, keys.by_key_id.len()), (2, 2));
            assert_eq!(keys.active.unwrap().key_id, "kek-a-v1");
        }
        held.apply(Effect::Unusable(first, "twice".to_owned()));
        assert!(ring(&cluster, &token(&held)).readable.is_empty());
    }

    #[test]
    fn each_key_is_where_its_version_is_and_as_readable_as_that_slot_shows_it() {
        let mut cluster = Cluster::founded();
        cluster.registered(ME).transport(&[]).context("a");
        let first = cluster.active("a", 1);
        cluster.transport_in("2fa", 1).move_to("a", "2fa");
        let second = cluster.active("a", 2);
        let token = |key| Source::Token(Arc::new(BTreeSet::from([key])));
        let (old, new, lost) = (token(first), token(second), Source::Token(Arc::default()));
        let seen = |old: &Source, new: &Source| {
            let of = |slot: &SlotName| if slot.as_str() == "2fa" { new } else { old };
            let keys = ring_of(&cluster, of);
            let active = keys.active.as_ref().unwrap();
            assert_eq!((active.version, &*active.slot.name), (2, "2fa"));
            let slot_of = |key| {
                keys.readable
                    .get(&to_token_key(key))
                    .map(|key| key.slot.name.to_string())
            };
            (slot_of(first), slot_of(second))
        };
        let (exchange, two_fa) = (Some("exchange".to_owned()), Some("2fa".to_owned()));
        assert_eq!(seen(&old, &new), (exchange.clone(), two_fa.clone()));
        assert_eq!(seen(&lost, &new), (None, two_fa.clone()));
        assert_eq!(seen(&old, &lost), (exchange, None));
        // What one slot's token holds says nothing about another's keys.
        assert_eq!(seen(&new, &old), (None, None));
    }

    #[test]
    fn a_closed_slot_answers_with_its_own_state_and_an_unseen_token_with_not_yet() {
        let cluster = cluster();
        assert_eq!(ring(&cluster, &Source::Closed).readable.len(), 2);
        let unseen = ring(&cluster, &Source::Unseen);
        assert!(unseen.readable.is_empty());
        assert!(
            unseen
                .missing
                .values()
                .all(|key| key.why == MissingWhy::NotImportedYet)
        );
    }

    #[test]
    fn a_version_out_of_use_is_known_and_readable_nowhere_until_it_is_enabled() {
        let mut cluster = Cluster::founded();
        cluster.registered(ME).transport(&[]).context("a");
        let first = cluster.active("a", 1);
        cluster.active("a", 2);
        let mut held = Held::default();
        held.apply(Effect::Proven(first, "x".to_owned()));
        held.apply(Effect::Loaded(first, false));
        let uid = to_token_key(first);
        let seen = |cluster: &Cluster| {
            let keys = ring(cluster, &token(&held));
            assert_eq!(keys.by_key_id["kek-a-v1"], uid);
            let readable = keys.readable.contains_key(&uid);
            (readable, keys.retired.get(&uid).map(|key| (key.version, key.why)))
        };
        assert_eq!(seen(&cluster), (true, None));
        cluster.set_use("a", 1, VersionState::Disabled);
        assert_eq!(seen(&cluster), (false, Some((1, RetiredWhy::Disabled))));
        cluster.set_use("a", 1, VersionState::DecryptOnly);
        assert_eq!(seen(&cluster), (true, None));
        cluster.schedule_destroy("a", 1);
        assert_eq!(seen(&cluster), (false, Some((1, RetiredWhy::Disabled))));
        cluster.begin_destroy("a", 1);
        assert_eq!(seen(&cluster), (false, Some((1, RetiredWhy::Destroyed))));
        cluster.ack_destroyed(ME, "a", 1);
        assert_eq!(seen(&cluster), (false, Some((1, RetiredWhy::Destroyed))));
    }

    #[test]
    fn an_abandoned_version_is_in_no_ring() {
        let mut cluster = cluster();
        cluster.abandon("a", 2);
        let keys = ring(&cluster, &Source::Closed);
        assert_eq!(
            (keys.readable.len(), keys.missing.len(), keys.by_key_id.len()),
            (1, 0, 1)
        );
        assert_eq!(keys.highest_known, 2);
    }
}
