//! What came of client certificates that trusted proxies have shown, so that not every request pays for the
//! verification of a chain: whose the good ones are, and apart from those why others were refused. Nothing is
//! remembered beyond its end or a change of the CAs. Revocation is not asked here: it is looked at for every request.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::tls::ApiTls;

/// Certificates remembered at once.
const CERTIFICATES: usize = 4096;
const SHARDS: usize = 16;

/// SHA-256 of the headers as they came.
pub(super) type Key = [u8; 32];

/// See the module.
pub(super) struct Vouched<T> {
    hasher: RandomState,
    shards: Vec<Mutex<Shard<T>>>,
    /// Half of what a shard holds.
    half: usize,
}

/// What was used lately, and what was before: the old half goes when the young one is full. So whatever is in use stays.
struct Shard<T> {
    /// The CAs that all of it was verified by.
    by: Option<Arc<ApiTls>>,
    young: HashMap<Key, Entry<T>>,
    old: HashMap<Key, Entry<T>>,
}

impl<T> Shard<T> {
    fn of(by: Option<Arc<ApiTls>>) -> Self {
        Self {
            by,
            young: HashMap::new(),
            old: HashMap::new(),
        }
    }
}

struct Entry<T> {
    what: T,
    /// From when until when, in seconds since the Unix epoch: the wall clock may be set back.
    verified: i64,
    ends: i64,
}

impl<T: Clone> Vouched<T> {
    pub(super) fn new() -> Self {
        Self::with_capacity(CERTIFICATES)
    }

    fn with_capacity(capacity: usize) -> Self {
        Self {
            hasher: RandomState::new(),
            shards: (0..SHARDS).map(|_| Mutex::new(Shard::of(None))).collect(),
            half: (capacity / SHARDS / 2).max(1),
        }
    }

    /// What came of it by these CAs, if that has not ended since.
    pub(super) fn find(&self, key: &Key, by: &Arc<ApiTls>, now: i64) -> Option<T> {
        let mut shard = self.shard(key, by)?;
        if let Some(entry) = shard.young.get(key) {
            return entry.at(now);
        }
        let entry = shard.old.remove(key)?;
        let found = entry.at(now);
        if found.is_some() {
            shard.add(*key, entry, self.half);
        }
        found
    }

    /// Remembers what was found `now` and holds until `ends`.
    pub(super) fn remember(&self, key: Key, by: &Arc<ApiTls>, what: T, now: i64, ends: i64) {
        let Some(mut shard) = self.shard(&key, by) else {
            return;
        };
        if now < ends {
            let entry = Entry {
                what,
                verified: now,
                ends,
            };
            shard.add(key, entry, self.half);
        }
    }

    /// Emptied if it was of other CAs.
    fn shard(&self, key: &Key, by: &Arc<ApiTls>) -> Option<MutexGuard<'_, Shard<T>>> {
        let index = (self.hasher.hash_one(key) as usize) % SHARDS;
        let shard = self.shards.get(index)?;
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        let same = shard.by.as_ref().is_some_and(|known| Arc::ptr_eq(known, by));
        if !same {
            *shard = Shard::of(Some(Arc::clone(by)));
        }
        Some(shard)
    }
}

impl<T: Clone> Entry<T> {
    fn at(&self, now: i64) -> Option<T> {
        (self.verified..self.ends)
            .contains(&now)
            .then(|| self.what.clone())
    }
}

impl<T> Shard<T> {
    fn add(&mut self, key: Key, entry: Entry<T>, half: usize) {
        if self.young.len() >= half && !self.young.contains_key(&key) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, entry);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
pub(super) mod tests {
    use super::*;
    use crate::config::ApiTlsFiles;
    use crate::http::tests::fake::principal;
    use crate::identity::Principal;
    use crate::identity::test_certs::TestCa;

    fn cas() -> Arc<ApiTls> {
        cas_of(&TestCa::new("Clients"))
    }

    /// A node that knows this CA only.
    pub(in crate::http) fn cas_of(ca: &TestCa) -> Arc<ApiTls> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca.crt"), &ca.pem).unwrap();
        ca.server("server", None).write(dir.path(), "server");
        let files = ApiTlsFiles {
            ca_path: dir.path().join("ca.crt"),
            cert_path: dir.path().join("server.crt"),
            key_path: dir.path().join("server.key"),
            admin_client_ca_path: None,
        };
        Arc::new(crate::tls::load_api(&files, None, false).unwrap())
    }

    fn key(number: u64) -> Key {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&number.to_be_bytes());
        key
    }

    fn held(vouched: &Vouched<Principal>) -> usize {
        let in_shard = |shard: &Mutex<Shard<Principal>>| {
            let shard = shard.lock().unwrap();
            shard.young.len() + shard.old.len()
        };
        vouched.shards.iter().map(in_shard).sum()
    }

    #[test]
    fn a_certificate_is_remembered_until_its_end() {
        let (vouched, cas) = (Vouched::new(), cas());
        let who = principal("a", None);
        assert!(vouched.find(&key(1), &cas, 100).is_none());
        vouched.remember(key(1), &cas, who.clone(), 100, 200);
        assert_eq!(vouched.find(&key(1), &cas, 199), Some(who));
        assert_eq!(vouched.find(&key(2), &cas, 100), None);
        for other_time in [200, 1000, 99] {
            assert_eq!(vouched.find(&key(1), &cas, other_time), None);
        }
        vouched.remember(key(3), &cas, principal("b", None), 100, 100);
        assert_eq!(held(&vouched), 1);
    }

    #[test]
    fn other_cas_know_nothing_of_it() {
        let (vouched, old, new) = (Vouched::new(), cas(), cas());
        vouched.remember(key(1), &old, principal("a", None), 100, 200);
        assert_eq!(vouched.find(&key(1), &new, 150), None);
        assert_eq!(vouched.find(&key(1), &old, 150), None);
    }

    #[test]
    fn their_number_is_bounded_and_what_is_in_use_stays() {
        let (vouched, cas) = (Vouched::with_capacity(64), cas());
        let who = principal("in use", None);
        vouched.remember(key(0), &cas, who.clone(), 100, 200);
        for number in 1..1000 {
            vouched.remember(key(number), &cas, principal("passing", None), 100, 200);
            assert_eq!(vouched.find(&key(0), &cas, 150), Some(who.clone()), "{number}");
        }
        assert!(held(&vouched) <= 64, "{}", held(&vouched));
    }
}
