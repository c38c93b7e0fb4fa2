//! How often this process has used each key version, counted where a slot's answers come by. Counting takes no lock:
//! a map that is only ever replaced, and atomics. A key gets its place with its first use.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use arc_swap::ArcSwap;
use hsm_core::names::KeyUid;
use hsm_core::{Ciphertext, Work};
use raft_store::names::UnixMillis;

use crate::clock;

/// What a piece of work uses if it succeeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Used {
    encrypts: Option<KeyUid>,
    decrypts: Option<KeyUid>,
}

impl Used {
    pub(super) fn by(work: &Work) -> Self {
        let (encrypts, decrypts) = match work {
            Work::Encrypt(job) => (Some(job.key_uid), None),
            Work::DataKey(job) => (Some(job.key_uid), None),
            Work::DecryptV2(job) => (None, Some(job.header.key_uid)),
            Work::DecryptV1(job) => (None, Some(job.key_uid)),
            Work::Rewrap(job) => {
                let opened = match &job.from {
                    Ciphertext::V2(from) => from.header.key_uid,
                    Ciphertext::V1(from) => from.key_uid,
                };
                (Some(job.key_uid), Some(opened))
            }
        };
        Self { encrypts, decrypts }
    }
}

/// The uses of a key since the process began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Total {
    /// Encryptions.
    pub encryptions: u64,
    /// Decryptions.
    pub decryptions: u64,
    /// When the last of them was.
    pub last_used: UnixMillis,
}

#[derive(Default)]
struct Counter {
    encryptions: AtomicU64,
    decryptions: AtomicU64,
    last_used: AtomicI64,
}

type Counters = HashMap<KeyUid, Arc<Counter>>;

/// See the module.
#[derive(Default)]
pub struct Uses {
    counters: ArcSwap<Counters>,
}

impl Uses {
    pub(super) fn count(&self, used: Used) {
        let now = clock::unix_millis();
        if let Some(key) = used.encrypts {
            self.add(key, |counter| &counter.encryptions, now);
        }
        if let Some(key) = used.decrypts {
            self.add(key, |counter| &counter.decryptions, now);
        }
    }

    fn add(&self, key: KeyUid, which: impl Fn(&Counter) -> &AtomicU64, now: UnixMillis) {
        let counters = self.counters.load();
        match counters.get(&key) {
            Some(counter) => count(counter, &which, now),
            None => count(&self.place(key), &which, now),
        }
    }

    /// A key's first use.
    fn place(&self, key: KeyUid) -> Arc<Counter> {
        let fresh = Arc::new(Counter::default());
        let before = self.counters.rcu(|counters| {
            let mut counters = Counters::clone(counters);
            counters.entry(key).or_insert_with(|| Arc::clone(&fresh));
            counters
        });
        // Somebody else may have been quicker.
        before.get(&key).cloned().unwrap_or(fresh)
    }

    /// What every key that was used has come to.
    pub fn totals(&self) -> Vec<(KeyUid, Total)> {
        let total = |counter: &Counter| Total {
            encryptions: counter.encryptions.load(Ordering::Relaxed),
            decryptions: counter.decryptions.load(Ordering::Relaxed),
            last_used: counter.last_used.load(Ordering::Relaxed),
        };
        let counters = self.counters.load();
        counters
            .iter()
            .map(|(key, counter)| (*key, total(counter)))
            .collect()
    }
}

fn count(counter: &Counter, which: impl Fn(&Counter) -> &AtomicU64, now: UnixMillis) {
    which(counter).fetch_add(1, Ordering::Relaxed);
    counter.last_used.store(now, Ordering::Relaxed);
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const OLD: KeyUid = KeyUid::from_bytes([1; 16]);
    const NEW: KeyUid = KeyUid::from_bytes([2; 16]);

    fn used(encrypts: Option<KeyUid>, decrypts: Option<KeyUid>) -> Used {
        Used { encrypts, decrypts }
    }

    #[test]
    fn uses_add_up_and_say_when_the_last_was() {
        let uses = Uses::default();
        assert!(uses.totals().is_empty());
        let before = clock::unix_millis();
        // As a rewrap does.
        uses.count(used(Some(NEW), Some(OLD)));
        uses.count(used(Some(NEW), None));
        let totals: BTreeMap<[u8; 16], Total> = uses
            .totals()
            .into_iter()
            .map(|(key, total)| (*key.as_bytes(), total))
            .collect();
        let (old, new) = (totals[&[1; 16]], totals[&[2; 16]]);
        assert_eq!((old.encryptions, old.decryptions), (0, 1));
        assert_eq!((new.encryptions, new.decryptions), (2, 0));
        assert!(old.last_used >= before && new.last_used >= before);
    }

    #[test]
    fn no_use_is_lost_among_threads_that_all_come_first() {
        let uses = Uses::default();
        std::thread::scope(|scope| {
            for thread in 0..8_u8 {
                let uses = &uses;
                scope.spawn(move || {
                    for turn in 0..500_u16 {
                        let key = KeyUid::from_bytes([(turn % 50) as u8; 16]);
                        uses.count(if thread % 2 == 0 {
                            used(Some(key), None)
                        } else {
                            used(None, Some(key))
                        });
                    }
                });
            }
        });
        let totals = uses.totals();
        assert_eq!(totals.len(), 50);
        for (_, total) in totals {
            assert_eq!((total.encryptions, total.decryptions), (40, 40));
        }
    }
}
