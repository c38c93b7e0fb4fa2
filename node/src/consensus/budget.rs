//! A bound on what each peer can cause: lines of the audit, attempts to join. A peer is known by the name in
//! its verified certificate, so that nobody spends another's share.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Peers remembered at a time: more than a cluster has nodes.
const PEERS: usize = 256;

struct Spent {
    since: Instant,
    times: u32,
    refused: u64,
}

/// See the module.
pub(super) struct Budget {
    times: u32,
    window: Duration,
    peers: Mutex<BTreeMap<String, Spent>>,
}

impl Budget {
    /// So many times for each peer in each window.
    pub(super) fn new(times: u32, window: Duration) -> Self {
        Self {
            times,
            window,
            peers: Mutex::default(),
        }
    }

    /// Takes one of a peer's times; `Some(n)` if it had one left, with how many it was refused since the last.
    pub(super) fn take(&self, peer: &str, now: Instant) -> Option<u64> {
        let over = |spent: &Spent| now.saturating_duration_since(spent.since) >= self.window;
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if peers.len() >= PEERS && !peers.contains_key(peer) {
            peers.retain(|_, spent| !over(spent));
            if peers.len() >= PEERS {
                return None;
            }
        }
        let spent = peers.entry(peer.to_owned()).or_insert(Spent {
            since: now,
            times: 0,
            refused: 0,
        });
        if over(spent) {
            (spent.since, spent.times) = (now, 0);
        }
        if spent.times >= self.times {
            spent.refused += 1;
            return None;
        }
        spent.times += 1;
        Some(std::mem::take(&mut spent.refused))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_secs(10);

    #[test]
    fn each_peer_has_a_share_of_its_own_and_what_was_refused_is_counted() {
        let (budget, now) = (Budget::new(2, WINDOW), Instant::now());
        assert_eq!([budget.take("a", now), budget.take("a", now)], [Some(0), Some(0)]);
        assert_eq!([budget.take("a", now), budget.take("a", now)], [None, None]);
        assert_eq!(budget.take("b", now), Some(0));
        assert_eq!(budget.take("a", now + WINDOW - Duration::from_millis(1)), None);
        assert_eq!(budget.take("a", now + WINDOW), Some(3));
        assert_eq!(budget.take("a", now + WINDOW), Some(0));
    }

    #[test]
    fn the_number_of_peers_is_bounded_and_idle_ones_are_forgotten() {
        let (budget, now) = (Budget::new(1, WINDOW), Instant::now());
        for peer in 0..PEERS {
            assert_eq!(budget.take(&peer.to_string(), now), Some(0));
        }
        assert_eq!(budget.take("one more", now), None);
        assert_eq!(budget.take("one more", now + WINDOW), Some(0));
        assert_eq!(budget.peers.lock().unwrap().len(), 1);
    }
}
