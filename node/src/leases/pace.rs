//! How fast a context encrypts here: the peak of its recent past, which fades by half in about six minutes.

use std::time::{Duration, Instant};

use raft_store::names::KeyUid;

/// Less than this is no measure of a rate.
const LEAST: Duration = Duration::from_millis(500);
/// What is left of a peak after each note.
const FADES: u64 = 512;

/// See the module.
#[derive(Debug)]
pub(super) struct Pace {
    key: KeyUid,
    taken: u64,
    at: Instant,
    peak: u64,
}

impl Pace {
    pub(super) fn new(key: KeyUid, taken: u64, now: Instant) -> Self {
        Self {
            key,
            taken,
            at: now,
            peak: 0,
        }
    }

    /// Notes what was taken under the active key so far. A new key has the pace of the one before.
    pub(super) fn note(&mut self, key: KeyUid, taken: u64, now: Instant) {
        let since = now.saturating_duration_since(self.at);
        if self.key == key && since < LEAST {
            return;
        }
        if self.key == key {
            let ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX).max(1);
            let rate = taken.saturating_sub(self.taken).saturating_mul(1000).div_ceil(ms);
            let faded = self.peak - self.peak.div_ceil(FADES);
            self.peak = rate.max(faded);
        }
        (self.key, self.taken, self.at) = (key, taken, now);
    }

    /// Invocations a second.
    pub(super) fn peak(&self) -> u64 {
        self.peak
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: KeyUid = KeyUid([1; 16]);
    const NEW: KeyUid = KeyUid([2; 16]);

    #[test]
    fn the_peak_rises_at_once_fades_slowly_and_goes_over_to_the_next_key() {
        let begin = Instant::now();
        let at = |seconds: u64| begin + Duration::from_secs(seconds);
        let mut pace = Pace::new(OLD, 100, begin);
        pace.note(OLD, 5100, at(1));
        assert_eq!(pace.peak(), 5000);
        // Too soon to say.
        pace.note(OLD, 9000, at(1) + LEAST / 2);
        assert_eq!(pace.peak(), 5000);
        pace.note(OLD, 6100, at(2));
        assert_eq!(pace.peak(), 4990);
        pace.note(NEW, 70, at(3));
        assert_eq!(pace.peak(), 4990);
        pace.note(NEW, 12_070, at(5));
        assert_eq!(pace.peak(), 6000);
        for second in 6..366 {
            pace.note(NEW, 12_070, at(second));
        }
        assert!((2500..3500).contains(&pace.peak()), "{}", pace.peak());
        for second in 366..10_000 {
            pace.note(NEW, 12_070, at(second));
        }
        assert_eq!(pace.peak(), 0);
    }
}
