//! Meters of active versions that are empty, and since when. A node that hears its leader and gets no invocations from
//! it looks well otherwise.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use raft_store::names::KeyUid;

use super::Meter;

/// How long a meter is empty before that counts: a claim is met within milliseconds, and is made again after less. Longer
/// than a node is fresh by default: a leader that is lost is no reason of its own.
pub(super) const LONG: Duration = Duration::from_secs(6);

/// See the module. Nothing is known of a meter that was never given anything: such a version lacks its first lease.
#[derive(Debug, Default)]
pub(super) struct Empty(HashMap<KeyUid, Since>);

#[derive(Debug)]
struct Since {
    at: Instant,
    /// What was given by then: with another sum it was filled in between.
    given: u64,
    said: bool,
}

impl Empty {
    /// Whether a meter has been empty for long, as far as anybody has looked. To be asked at least once a second.
    pub(super) fn for_long(&mut self, key: KeyUid, meter: &Meter, now: Instant) -> bool {
        let given = meter.given();
        if given == 0 || meter.left() > 0 {
            self.0.remove(&key);
            return false;
        }
        let begun = || Since {
            at: now,
            given,
            said: false,
        };
        let since = self.0.entry(key).or_insert_with(begun);
        if since.given != given {
            *since = begun();
        }
        now.saturating_duration_since(since.at) > LONG
    }

    /// Whether nobody was told yet that this meter is empty; from now on he is.
    pub(super) fn is_news(&mut self, key: KeyUid) -> bool {
        let since = self.0.get_mut(&key);
        since.is_some_and(|since| !std::mem::replace(&mut since.said, true))
    }

    /// Forgets all but these.
    pub(super) fn keep(&mut self, is_active: impl Fn(&KeyUid) -> bool) {
        self.0.retain(|key, _| is_active(key));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const KEY: KeyUid = KeyUid([1; 16]);
    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_meter_is_empty_for_long_only_if_nothing_filled_it_meanwhile() {
        let (mut empty, begin) = (Empty::default(), Instant::now());
        let meter = Meter::new(Arc::default());
        let mut at = |ms: u32, meter: &Meter| empty.for_long(KEY, meter, begin + ms * MS);
        assert!(
            !at(0, &meter) && !at(60_000, &meter),
            "it was never given anything"
        );
        meter.raise(1);
        assert!(!at(60_000, &meter));
        assert!(meter.take());
        assert!(!at(60_000, &meter) && !at(66_000, &meter));
        assert!(at(66_001, &meter));
        // Filled and used up again between two looks.
        meter.raise(2);
        assert!(meter.take());
        assert!(!at(66_002, &meter) && !at(72_002, &meter));
        assert!(at(72_003, &meter));
        // One that no token was called for.
        meter.give_back();
        assert!(!at(72_004, &meter));
        assert!(meter.take());
        assert!(!at(72_005, &meter));
    }

    #[test]
    fn it_is_said_once_until_it_is_filled() {
        let (mut empty, now) = (Empty::default(), Instant::now());
        let meter = Meter::new(Arc::default());
        assert!(!empty.is_news(KEY));
        for given in [1, 2] {
            meter.raise(given);
            assert!(meter.take());
            assert!(!empty.for_long(KEY, &meter, now));
            assert_eq!([empty.is_news(KEY), empty.is_news(KEY)], [true, false]);
        }
        empty.keep(|_| false);
        assert!(empty.0.is_empty());
    }
}
