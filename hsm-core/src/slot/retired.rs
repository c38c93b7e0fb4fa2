//! Sessions that were given up: they stay open, because session copies may belong to them and because
//! SoftHSM 2.6.1 crashes when a session is closed while others work. How many is bounded.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// So many within [`WINDOW`], and something must be badly wrong with the module.
const MAX_RECENT: usize = 16;
/// Short, because what is wrong with a token for a moment takes a session with each call, and has to be over soon after it has passed.
const WINDOW: Duration = Duration::from_secs(60);
/// So many in a slot's life, and only a restart helps: tokens bound their sessions too.
const MAX_EVER: usize = 1024;

/// Unusable sessions, kept; generic so that it can be tested without a token.
pub(crate) struct Retired<S> {
    kept: Vec<S>,
    recent: VecDeque<Instant>,
}

impl<S> Default for Retired<S> {
    fn default() -> Self {
        Self {
            kept: Vec::new(),
            recent: VecDeque::new(),
        }
    }
}

impl<S> Retired<S> {
    /// Whether one more may be given up now.
    pub(crate) fn has_room(&mut self, now: Instant) -> bool {
        while self
            .recent
            .front()
            .is_some_and(|at| now.saturating_duration_since(*at) > WINDOW)
        {
            self.recent.pop_front();
        }
        self.recent.len() < MAX_RECENT && self.kept.len() < MAX_EVER
    }

    /// Whether none may be given up any more, ever.
    pub(crate) fn is_full(&self) -> bool {
        self.kept.len() >= MAX_EVER
    }

    /// Keeps one more.
    pub(crate) fn keep(&mut self, session: S, now: Instant) {
        self.kept.push(session);
        self.recent.push_back(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_may_be_given_up_now_and_then_but_not_one_after_the_other() {
        let (mut retired, mut now) = (Retired::default(), Instant::now());
        for _ in 0..MAX_RECENT {
            assert!(retired.has_room(now));
            retired.keep((), now);
        }
        assert!(!retired.has_room(now));
        now += WINDOW + Duration::from_secs(1);
        assert!(retired.has_room(now));
        for _ in MAX_RECENT..MAX_EVER {
            retired.keep((), now);
            now += WINDOW;
        }
        assert!(retired.is_full());
        now += WINDOW * 2;
        assert!(!retired.has_room(now));
    }
}
