//! Requests per principal. Memory is bounded: a principal that has been quiet long enough to have
//! its whole burst again is forgotten, and beyond the limit strangers share one allowance.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use governor::clock::Clock;
use governor::{DefaultDirectRateLimiter, Quota};
use hsm_api::ErrorCode;

use super::problem::ApiError;
use super::shares::Account;
use crate::config::RateLimit;
use crate::identity::Principal;

/// Principals remembered at once.
const MAX_PRINCIPALS: usize = 16_384;
const SHARDS: usize = 16;

struct Entry {
    limiter: Arc<DefaultDirectRateLimiter>,
    used: Instant,
}

/// The limiter of all principals.
pub struct RateLimiter {
    quota: Quota,
    /// After this long without a request an allowance is whole again.
    refill: Duration,
    capacity: usize,
    hasher: RandomState,
    shards: Vec<Mutex<HashMap<Account, Entry>>>,
    shared: DefaultDirectRateLimiter,
}

impl RateLimiter {
    /// One allowance per principal.
    #[must_use]
    pub fn new(limit: RateLimit) -> Self {
        Self::with_capacity(limit, MAX_PRINCIPALS)
    }

    fn with_capacity(limit: RateLimit, capacity: usize) -> Self {
        let quota = Quota::per_second(limit.requests_per_second).allow_burst(limit.burst);
        let seconds = f64::from(limit.burst.get()) / f64::from(limit.requests_per_second.get().max(1));
        Self {
            quota,
            refill: Duration::from_secs_f64(seconds) + Duration::from_secs(1),
            capacity: (capacity / SHARDS).max(1),
            hasher: RandomState::new(),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            shared: DefaultDirectRateLimiter::direct(quota),
        }
    }

    /// Takes one request from a principal's allowance.
    ///
    /// # Errors
    /// `rate_limited`.
    pub fn check(&self, principal: &Principal) -> Result<(), ApiError> {
        let allowed = match self.limiter(principal) {
            Some(limiter) => limiter.check().is_ok(),
            None => self.shared.check().is_ok(),
        };
        if allowed {
            return Ok(());
        }
        crate::metrics::rate_limit_hit();
        Err(ApiError::new(ErrorCode::RateLimited).operator(principal.to_string()))
    }

    /// Takes more from a principal's allowance, of which this request has taken one already. What is more than
    /// its whole burst is as much as that: it could never be had at once.
    ///
    /// # Errors
    /// `rate_limited`, with the time after which there is so much.
    pub fn check_more(&self, principal: &Principal, more: usize) -> Result<(), ApiError> {
        let rest_of_burst = self.quota.burst_size().get() - 1;
        let more = u32::try_from(more).unwrap_or(u32::MAX).min(rest_of_burst);
        let Some(more) = NonZeroU32::new(more) else {
            return Ok(());
        };
        let waiting = match self.limiter(principal) {
            Some(limiter) => take(&limiter, more),
            None => take(&self.shared, more),
        };
        let Some(waiting) = waiting else { return Ok(()) };
        crate::metrics::rate_limit_hit();
        let seconds = u32::try_from(waiting.as_millis().div_ceil(1000)).unwrap_or(u32::MAX);
        Err(ApiError::new(ErrorCode::RateLimited)
            .retry_after(seconds.max(1))
            .operator(principal.to_string()))
    }

    /// `None` where there is no room for another principal.
    fn limiter(&self, principal: &Principal) -> Option<Arc<DefaultDirectRateLimiter>> {
        let account = Account::of(principal);
        let index = (self.hasher.hash_one(&account) as usize) % SHARDS;
        let shard = self.shards.get(index)?;
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if let Some(entry) = shard.get_mut(&account) {
            entry.used = now;
            return Some(Arc::clone(&entry.limiter));
        }
        if shard.len() >= self.capacity {
            shard.retain(|_, entry| now.duration_since(entry.used) < self.refill);
        }
        if shard.len() >= self.capacity {
            return None;
        }
        let limiter = Arc::new(DefaultDirectRateLimiter::direct(self.quota));
        shard.insert(
            account,
            Entry {
                limiter: Arc::clone(&limiter),
                used: now,
            },
        );
        Some(limiter)
    }
}

/// Takes so much at once, or says how long it takes until there is so much.
fn take(limiter: &DefaultDirectRateLimiter, more: NonZeroU32) -> Option<Duration> {
    match limiter.check_n(more) {
        Ok(Ok(())) => None,
        Ok(Err(until)) => Some(until.wait_time_from(limiter.clock().now())),
        // Nobody asks for more than the burst.
        Err(_) => Some(Duration::from_secs(1)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::identity::Identity;

    fn principal(cn: &str, issuer: &str, fingerprint: u8) -> Principal {
        Principal::new(Identity {
            cn: cn.to_owned(),
            ou: Some("Trading".to_owned()),
            sans: Vec::new(),
            serial: "1".to_owned(),
            issuer_dn: issuer.to_owned(),
            fingerprint: [fingerprint; 32],
            spki_sha256: [0; 32],
            not_after: 0,
        })
    }

    fn limiter(burst: u32, capacity: usize) -> RateLimiter {
        let limit = RateLimit {
            requests_per_second: NonZeroU32::MIN,
            burst: NonZeroU32::new(burst).unwrap(),
        };
        RateLimiter::with_capacity(limit, capacity)
    }

    fn allowed(limiter: &RateLimiter, principal: &Principal) -> usize {
        (0..10).filter(|_| limiter.check(principal).is_ok()).count()
    }

    #[test]
    fn each_principal_has_an_allowance_of_its_own() {
        let limiter = limiter(3, 1000);
        assert_eq!(allowed(&limiter, &principal("a", "CN=CA", 1)), 3);
        assert_eq!(allowed(&limiter, &principal("b", "CN=CA", 2)), 3);
        assert_eq!(allowed(&limiter, &principal("a", "CN=Other", 3)), 3);
    }

    #[test]
    fn a_renewed_certificate_is_no_second_allowance() {
        let limiter = limiter(3, 1000);
        assert_eq!(allowed(&limiter, &principal("a", "CN=CA", 1)), 3);
        assert_eq!(allowed(&limiter, &principal("a", "CN=CA", 2)), 0);
    }

    #[test]
    fn a_refusal_says_when_to_come_back() {
        let limiter = limiter(1, 1000);
        let caller = principal("a", "CN=CA", 1);
        limiter.check(&caller).unwrap();
        let error = limiter.check(&caller).unwrap_err();
        assert_eq!(error.code(), ErrorCode::RateLimited);
    }

    #[test]
    fn many_at_once_take_as_many_and_never_more_than_the_burst() {
        let limiter = limiter(5, 1000);
        let (a, b) = (principal("a", "CN=CA", 1), principal("b", "CN=CA", 1));
        limiter.check(&a).unwrap();
        limiter.check_more(&a, 2).unwrap();
        assert_eq!(allowed(&limiter, &a), 2);
        limiter.check(&b).unwrap();
        limiter.check_more(&b, 1_000_000).unwrap();
        assert_eq!(allowed(&limiter, &b), 0);
        limiter.check_more(&b, 0).unwrap();
        let refused = limiter.check_more(&b, 3).unwrap_err();
        assert_eq!(refused.code(), ErrorCode::RateLimited);
    }

    #[test]
    fn the_number_of_principals_is_bounded() {
        let limiter = limiter(1, SHARDS);
        let served = (0..200)
            .filter(|n| limiter.check(&principal(&format!("c{n}"), "CN=CA", 0)).is_ok())
            .count();
        assert!(served <= SHARDS + 2, "{served} principals had an allowance");
        let held: usize = limiter
            .shards
            .iter()
            .map(|shard| shard.lock().unwrap().len())
            .sum();
        assert!(held <= SHARDS);
    }
}
