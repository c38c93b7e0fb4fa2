//! The two things the replicated state must never ask for itself: the time, and randomness. Proposers ask
//! here and put the answer into their command.

use std::time::{SystemTime, UNIX_EPOCH};

use raft_store::names::UnixMillis;

/// Milliseconds since the Unix epoch by this node's wall clock; 0 if the clock is before it.
pub fn unix_millis() -> UnixMillis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
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
