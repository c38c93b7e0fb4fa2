//! The two things the replicated state must never ask for itself: the time, and randomness. Proposers ask
//! here and put the answer into their command. And the monotonic clock that goes with timers.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use raft_store::names::UnixMillis;

/// Milliseconds since the Unix epoch by this node's wall clock; 0 if the clock is before it.
pub fn unix_millis() -> UnixMillis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// Now by the monotonic clock that timers go by: silence and age are judged by the same one. In a simulation that is
/// another one than the machine's.
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// A time of RFC 3339 that is over by this node's wall clock.
pub fn past(text: &str) -> Option<UnixMillis> {
    let at = text.trim().parse::<jiff::Timestamp>().ok()?.as_millisecond();
    (1..unix_millis()).contains(&at).then_some(at)
}

/// Sixteen random bytes. Without randomness nothing here is safe, so the process ends.
pub fn random_id() -> [u8; 16] {
    let mut bytes = [0; 16];
    if getrandom::fill(&mut bytes).is_err() {
        crate::logging::last_words(Some("hsm-node: the operating system gives no random bytes"));
        std::process::abort();
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_that_is_none_or_still_to_come_is_left_out() {
        assert_eq!(past("2024-01-01T00:00:00Z"), Some(1_704_067_200_000));
        assert_eq!(past("2024-01-01T02:00:00.5+02:00"), Some(1_704_067_200_500));
        for text in [
            "",
            "yesterday",
            "2024-01-01",
            "1969-01-01T00:00:00Z",
            "9000-01-01T00:00:00Z",
        ] {
            assert_eq!(past(text), None, "{text}");
        }
    }
}
