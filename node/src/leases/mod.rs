//! Invocations of AES-GCM that this node may make: given by the cluster in advance ([`raft_store::state::lease`]), taken
//! one by one before each call of a token. Whatever was given belongs to this run of the process; what it has not used
//! when it ends is lost, and counts as used.
//!
//! ```text
//!  state ──look──> meters ──take──> encrypt, datakey, rewrap
//!    ▲                │ half of it is gone
//!    └── leader <── driver: a new claim, as large as the peak of the last minutes asks for
//! ```
//!
//! Only the state says what was given: an answer that is lost loses nothing, and a claim names what it has seen, so that
//! it is met once however often it arrives.

mod driver;
mod empty;
mod meter;
mod pace;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use raft_store::command::Claim;
use raft_store::names::{Boot, ContextName, KeyUid, RaftId};
use raft_store::state::ClusterState;
use raft_store::state::context::{KeyVersion, VersionKey, VersionState};
use raft_store::state::lease::{VersionLease, largest_among, smallest};
use raft_store::state::table::Table;
use tokio::sync::Notify;

pub use self::driver::{Proposer, drive};
use self::empty::Empty;
pub use self::meter::Meter;
use self::pace::Pace;

/// What a node has to have left beyond its staleness bound, for the time in which it notices and asks.
const SPARE: Duration = Duration::from_secs(60);

/// See the module.
pub struct Leases {
    boot: Boot,
    /// How long what is left has to last at the peak rate, in seconds.
    cover_s: u64,
    books: Mutex<Books>,
    low: Arc<Notify>,
}

#[derive(Default)]
struct Books {
    /// A meter stays for as long as the process: one that is made anew would give out twice.
    meters: HashMap<KeyUid, Arc<Meter>>,
    paces: BTreeMap<ContextName, Pace>,
    empty: Empty,
    /// The leader gives invocations to no node at the moment.
    drought: bool,
    /// What was last looked at, so that it is not looked at again.
    seen: Table<VersionKey, VersionLease>,
}

impl Books {
    /// The peak rate of a context, in invocations a second.
    fn peak(&self, context: &ContextName) -> u64 {
        self.paces.get(context).map_or(0, Pace::peak)
    }
}

/// Whether invocations are made under a version, or about to be.
fn encrypts(version: &KeyVersion) -> bool {
    matches!(version.state, VersionState::Pending | VersionState::Active)
}

/// The version of each context that is encrypted under.
fn active(state: &ClusterState) -> impl Iterator<Item = (VersionKey, &KeyVersion)> {
    state.contexts().iter().filter_map(move |(name, context)| {
        let number = context.active_version?;
        let key = VersionKey {
            context: name.clone(),
            version: number,
        };
        Some((key, state.version(name, number)?))
    })
}

impl Leases {
    /// Of a run that goes on encrypting for `encrypt_bound` without a quorum.
    #[must_use]
    pub fn new(boot: Boot, encrypt_bound: Duration) -> Arc<Self> {
        Arc::new(Self {
            boot,
            cover_s: encrypt_bound.saturating_add(SPARE).as_secs(),
            books: Mutex::default(),
            low: Arc::default(),
        })
    }

    /// The run that it is given to.
    #[must_use]
    pub fn boot(&self) -> Boot {
        self.boot
    }

    fn books(&self) -> std::sync::MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn meter_in(&self, books: &mut Books, key: KeyUid) -> Arc<Meter> {
        let meter = books.meters.entry(key);
        Arc::clone(meter.or_insert_with(|| Arc::new(Meter::new(Arc::clone(&self.low)))))
    }

    /// The meter of a key, for whoever encrypts with it.
    #[must_use]
    pub fn meter(&self, key: KeyUid) -> Arc<Meter> {
        self.meter_in(&mut self.books(), key)
    }

    /// Takes over what the state says was given. To be called before a key is published that encrypts: its meter is
    /// full from the first request on.
    pub fn look(&self, state: &ClusterState, me: RaftId) {
        let mut books = self.books();
        if books.seen.is_clone_of(state.leases()) {
            return;
        }
        for (key, lease) in state.leases().iter() {
            let given = lease.given(me, self.boot);
            let Some(version) = state.versions().get(key).filter(|_| given > 0) else {
                continue;
            };
            self.meter_in(&mut books, version.key_uid).raise(given);
        }
        books.seen = state.leases().clone();
    }

    /// Something else than the state has changed: which keys this node holds, or which slots are open.
    pub fn look_again(&self) {
        self.low.notify_one();
    }

    /// How many invocations this node should have of a version, at their fullest. Claimed anew at half, so that what is
    /// left never falls below what the bound needs at the peak rate. A limit that is small has small leases.
    fn target(&self, state: &ClusterState, context: &ContextName, peak: u64) -> u64 {
        let limit = state.max_invocations(context);
        let needed = peak.saturating_mul(self.cover_s).saturating_mul(2);
        let most = largest_among(limit, state.members());
        needed.max(smallest(limit)).min(most)
    }

    /// What to say and ask of a version that this node holds. Of one that does not encrypt nothing is asked.
    #[must_use]
    pub fn claim(
        &self,
        state: &ClusterState,
        me: RaftId,
        (key, version): (&VersionKey, &KeyVersion),
        held: bool,
    ) -> Claim {
        let lease = state.leases().get(key);
        let count = if encrypts(version) {
            let mut books = self.books();
            let meter = self.meter_in(&mut books, version.key_uid);
            let left = meter.left();
            // What was used up before the driver came to it went faster than anybody has measured.
            let least = if left == 0 { meter.last() } else { 0 };
            let peak = books.peak(&key.context).max(least);
            self.target(state, &key.context, peak).saturating_sub(left)
        } else {
            0
        };
        Claim {
            context: key.context.clone(),
            version: key.version,
            key_uid: version.key_uid,
            held,
            seen: lease.map_or(0, |lease| lease.given(me, self.boot)),
            count,
        }
    }

    /// The versions of which half is gone, and of which the cluster has some left. `holds` says whether this node can
    /// encrypt with it, or will once it is active.
    fn wanting(
        &self,
        state: &ClusterState,
        me: RaftId,
        holds: impl Fn(&VersionKey, &KeyVersion) -> bool,
    ) -> Vec<Claim> {
        let low = |key: &VersionKey, version: &KeyVersion| {
            let mut books = self.books();
            let meter = self.meter_in(&mut books, version.key_uid);
            let half = self.target(state, &key.context, books.peak(&key.context)) / 2;
            meter.wake_at(half);
            meter.left() <= half
        };
        state
            .versions()
            .iter()
            .map(|(key, version)| (key, &**version))
            // Whoever has not acknowledged it yet claims its first lease with that.
            .filter(|(_, version)| encrypts(version) && version.acks.contains(&me))
            .filter(|&(key, version)| holds(key, version) && low(key, version))
            .filter(|&(key, _)| state.lease_part(key) > 0)
            .map(|version| self.claim(state, me, version, false))
            .collect()
    }

    /// Notes how fast each context encrypts, and what has been empty for long. To be called about once a second.
    fn sample(&self, state: &ClusterState, now: Instant) {
        let mut books = self.books();
        let mut encrypting = HashSet::new();
        for (key, version) in active(state) {
            let (uid, name) = (version.key_uid, &key.context);
            encrypting.insert(uid);
            let meter = self.meter_in(&mut books, uid);
            match books.paces.get_mut(name) {
                Some(pace) => pace.note(uid, meter.taken(), now),
                None => {
                    let pace = Pace::new(uid, meter.taken(), now);
                    books.paces.insert(name.clone(), pace);
                }
            }
            if books.empty.for_long(uid, &meter, now) && books.empty.is_news(uid) {
                let (version, to_be_given) = (key.version, state.lease_part(&key));
                tracing::warn!(
                    context = %name, version, to_be_given,
                    "no invocations of the active key version are left here: this node encrypts nothing under it"
                );
            }
        }
        books.empty.keep(|uid| encrypting.contains(uid));
    }

    /// What this node has left of the active version of each context.
    #[must_use]
    pub fn left(&self, state: &ClusterState) -> Vec<(ContextName, u64)> {
        let mut books = self.books();
        active(state)
            .map(|(key, version)| (key.context, self.meter_in(&mut books, version.key_uid).left()))
            .collect()
    }

    /// Notes whether the leader refuses claims for a reason that is every node's: it has no room on its disk, or is
    /// stopping.
    fn note_drought(&self, drought: bool) {
        self.books().drought = drought;
    }

    /// How many versions this node would have to encrypt under, now or in a moment, without having been given a single
    /// invocation in this run, although there are some left. `of` says which versions are asked about.
    #[must_use]
    pub fn lacking(&self, state: &ClusterState, me: RaftId, of: impl Fn(&VersionKey) -> bool) -> u32 {
        let mut books = self.books();
        let lacking = state.versions().iter().filter(|&(key, version)| {
            let asked = match version.state {
                VersionState::Active => true,
                // Whoever acknowledges has its first lease with the same entry. Without one it is another run's word.
                VersionState::Pending => version.acks.contains(&me),
                _ => false,
            };
            let lease = || state.leases().get(key);
            asked
                && of(key)
                && lease().is_none_or(|lease| lease.given(me, self.boot) == 0)
                // What an older run's late claim took out of the state this run has all the same.
                && self.meter_in(&mut books, version.key_uid).given() == 0
                && state.lease_part(key) > 0
        });
        u32::try_from(lacking.count()).unwrap_or(u32::MAX)
    }

    /// How many active versions this node has used up what it had of, and got no more for a while, although there are
    /// some left: it cannot reach the leader, or what it says does not come through. None while the leader gives none
    /// to anybody: then no other node does better.
    #[must_use]
    pub fn starved(&self, state: &ClusterState, now: Instant, of: impl Fn(&VersionKey) -> bool) -> u32 {
        let mut books = self.books();
        if books.drought {
            return 0;
        }
        let starved = active(state).filter(|(key, version)| {
            let meter = self.meter_in(&mut books, version.key_uid);
            of(key) && books.empty.for_long(version.key_uid, &meter, now) && state.lease_part(key) > 0
        });
        u32::try_from(starved.count()).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests;
