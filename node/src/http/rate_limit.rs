//! Requests per principal. Memory is bounded: a principal that has its whole burst again is forgotten, and beyond
//! the limit strangers share one allowance.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::Response;
use hsm_api::{ErrorCode, headers};

use super::bucket::{Bucket, Rate, seconds};
use super::problem::ApiError;
use super::shares::Account;
use crate::config::RateLimit;
use crate::identity::Principal;

/// Principals remembered at once.
const MAX_PRINCIPALS: usize = 16_384;
const SHARDS: usize = 16;

static LIMIT: HeaderName = HeaderName::from_static(headers::RATELIMIT_LIMIT);
static REMAINING: HeaderName = HeaderName::from_static(headers::RATELIMIT_REMAINING);
static RESET: HeaderName = HeaderName::from_static(headers::RATELIMIT_RESET);
static POLICY: HeaderName = HeaderName::from_static(headers::RATELIMIT_POLICY);

/// The limiter of all principals.
pub(super) struct RateLimiter {
    rate: Rate,
    began: Instant,
    capacity: usize,
    hasher: RandomState,
    shards: Vec<Mutex<HashMap<Account, Allowance>>>,
    shared: Allowance,
    /// Of every answer the same.
    limit: HeaderValue,
    policy: Option<HeaderValue>,
}

/// What one principal may still ask for. Clones are the same.
#[derive(Clone, Default)]
pub(super) struct Allowance(Arc<Bucket>);

impl RateLimiter {
    /// One allowance per principal.
    pub(super) fn new(limit: RateLimit) -> Self {
        Self::with_capacity(limit, MAX_PRINCIPALS)
    }

    fn with_capacity(limit: RateLimit, capacity: usize) -> Self {
        let RateLimit {
            requests_per_second,
            burst,
        } = limit;
        Self {
            rate: Rate::of(limit),
            began: Instant::now(),
            capacity: (capacity / SHARDS).max(1),
            hasher: RandomState::new(),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            shared: Allowance::default(),
            limit: HeaderValue::from(burst.get()),
            policy: HeaderValue::try_from(format!("{requests_per_second};w=1;burst={burst}")).ok(),
        }
    }

    /// A principal's, or that of all for whom there is no room.
    pub(super) fn allowance(&self, principal: &Principal) -> Allowance {
        let account = Account::of(principal);
        let index = (self.hasher.hash_one(&account) as usize) % SHARDS;
        let Some(shard) = self.shards.get(index) else {
            return self.shared.clone();
        };
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(allowance) = shard.get(&account) {
            return allowance.clone();
        }
        if shard.len() >= self.capacity {
            let now = self.now();
            // One that a request has in hand is about to be taken from: forgotten now, it would be full again.
            shard.retain(|_, allowance| !allowance.0.is_full(now) || Arc::strong_count(&allowance.0) > 1);
        }
        if shard.len() >= self.capacity {
            return self.shared.clone();
        }
        shard.entry(account).or_default().clone()
    }

    /// Takes one request.
    ///
    /// # Errors
    /// `rate_limited`, with the time after which there is one.
    pub(super) fn take(&self, allowance: &Allowance, principal: &Principal) -> Result<(), ApiError> {
        self.charge(allowance, principal, (1, 1), 1)
    }

    /// Takes what a request of `items` costs beyond the one that it was let in for. One that costs more than three
    /// quarters of the burst needs those, and is paid for by whatever comes next: if it needed the whole burst, any
    /// other request of its principal would lock it out, and two such requests each other.
    ///
    /// # Errors
    /// `rate_limited`, with the time after which there is a quarter of the burst more than the request needs, so that
    /// what else its principal does meanwhile does not refuse it again.
    pub(super) fn take_items(&self, principal: &Principal, items: usize) -> Result<(), ApiError> {
        let items = u64::try_from(items).unwrap_or(u64::MAX);
        let Some(more) = items.checked_sub(1).filter(|more| *more > 0) else {
            return Ok(());
        };
        let spare = self.rate.burst() / 4;
        let need = items.min(self.rate.burst() - spare) - 1;
        let whole = items.saturating_add(spare);
        self.charge(&self.allowance(principal), principal, (more, need), whole)
    }

    /// `whole` is what is there when a request that is refused should come again.
    fn charge(
        &self,
        allowance: &Allowance,
        principal: &Principal,
        (cost, need): (u64, u64),
        whole: u64,
    ) -> Result<(), ApiError> {
        let now = self.now();
        if allowance.0.take(self.rate, now, cost, need) {
            return Ok(());
        }
        crate::metrics::rate_limit_hit(&principal.cn);
        let wait = seconds(allowance.0.wait(self.rate, now, whole));
        Err(ApiError::new(ErrorCode::RateLimited)
            .retry_after(u32::try_from(wait).unwrap_or(u32::MAX).max(1))
            .operator(principal.to_string()))
    }

    /// Says in an answer how its principal stands now, as `docs/api.md` has it. A refusal names one time only:
    /// when to come back.
    pub(super) fn tell(&self, allowance: &Allowance, response: &mut Response) {
        let now = self.now();
        let refused = response.status() == StatusCode::TOO_MANY_REQUESTS;
        let headers = response.headers_mut();
        let come_back = headers.get(header::RETRY_AFTER).filter(|_| refused).cloned();
        let reset = come_back.unwrap_or_else(|| {
            HeaderValue::from(seconds(allowance.0.wait(self.rate, now, self.rate.burst())))
        });
        let remaining = HeaderValue::from(allowance.0.remaining(self.rate, now));
        headers.insert(&LIMIT, self.limit.clone());
        headers.insert(&REMAINING, remaining);
        headers.insert(&RESET, reset);
        if let Some(policy) = &self.policy {
            headers.insert(&POLICY, policy.clone());
        }
    }

    fn now(&self) -> u64 {
        // Enough for five hundred years.
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::num::NonZeroU32;
    use std::time::Duration;

    use axum::body::Body;

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

    fn take(limiter: &RateLimiter, principal: &Principal) -> Result<(), ApiError> {
        limiter.take(&limiter.allowance(principal), principal)
    }

    fn allowed(limiter: &RateLimiter, principal: &Principal) -> usize {
        (0..10).filter(|_| take(limiter, principal).is_ok()).count()
    }

    fn retry_after(refused: Result<(), ApiError>) -> String {
        let refused = refused.unwrap_err();
        assert_eq!(refused.code(), ErrorCode::RateLimited);
        let answer = refused.render(&crate::http::RequestId::from_text("r"));
        answer.headers()["retry-after"].to_str().unwrap().to_owned()
    }

    /// Limit, remaining, reset, policy.
    fn told(limiter: &RateLimiter, principal: &Principal, mut answer: Response) -> [String; 4] {
        limiter.tell(&limiter.allowance(principal), &mut answer);
        ["limit", "remaining", "reset", "policy"].map(|name| {
            let value = &answer.headers()[format!("ratelimit-{name}")];
            value.to_str().unwrap().to_owned()
        })
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
    fn a_refusal_says_when_all_of_it_can_be_had() {
        let limiter = limiter(5, 1000);
        let caller = principal("a", "CN=CA", 1);
        assert_eq!(allowed(&limiter, &caller), 5);
        assert_eq!(retry_after(take(&limiter, &caller)), "1");
        // When the request comes again it costs three, and one may have been taken by another.
        assert_eq!(retry_after(limiter.take_items(&caller, 3)), "4");
        assert_eq!(retry_after(limiter.take_items(&caller, 1000)), "5");
    }

    #[test]
    fn many_at_once_cost_as_many_and_more_than_the_burst_is_owed() {
        let limiter = limiter(5, 1000);
        let (a, b) = (principal("a", "CN=CA", 1), principal("b", "CN=CA", 1));
        take(&limiter, &a).unwrap();
        limiter.take_items(&a, 3).unwrap();
        assert_eq!(allowed(&limiter, &a), 2);
        take(&limiter, &b).unwrap();
        limiter.take_items(&b, 100).unwrap();
        assert_eq!(retry_after(take(&limiter, &b)), "96");
        limiter.take_items(&b, 1).unwrap();
        limiter.take_items(&b, 0).unwrap();
    }

    #[test]
    fn with_a_burst_of_one_a_batch_passes_and_is_owed() {
        let limiter = limiter(1, 1000);
        let caller = principal("a", "CN=CA", 1);
        take(&limiter, &caller).unwrap();
        limiter.take_items(&caller, 10).unwrap();
        assert_eq!(retry_after(take(&limiter, &caller)), "10");
    }

    /// Seconds pass.
    fn pass(limiter: &mut RateLimiter, seconds: u64) {
        limiter.began = limiter.began.checked_sub(Duration::from_secs(seconds)).unwrap();
    }

    /// A request of so many items: when to come again, if it is refused.
    fn batch(limiter: &RateLimiter, principal: &Principal, items: usize) -> Option<u64> {
        let taken = take(limiter, principal).and_then(|()| limiter.take_items(principal, items));
        taken.is_err().then(|| retry_after(taken).parse().unwrap())
    }

    #[test]
    fn two_batches_beyond_the_burst_do_not_lock_each_other_out() {
        let mut limiter = limiter(16, 1000);
        let caller = principal("a", "CN=CA", 1);
        // Both have arrived before either of them is counted.
        let mut waiting = 2;
        let mut rounds = 0;
        while waiting > 0 {
            rounds += 1;
            assert!(rounds <= 2, "{waiting} of two are still refused");
            for _ in 0..waiting {
                take(&limiter, &caller).unwrap();
            }
            let refused: Vec<u64> = (0..waiting)
                .filter_map(|_| {
                    let taken = limiter.take_items(&caller, 100);
                    taken.is_err().then(|| retry_after(taken).parse().unwrap())
                })
                .collect();
            waiting = refused.len();
            pass(&mut limiter, refused.into_iter().max().unwrap_or(0));
        }
    }

    #[test]
    fn a_batch_gets_in_while_its_principal_asks_for_single_ones_too() {
        for items in [8, 12, 16, 100] {
            let mut limiter = limiter(16, 1000);
            let caller = principal("a", "CN=CA", 1);
            assert_eq!(batch(&limiter, &caller, 100), None);
            let (mut again, mut second) = (0, 0);
            // Two thirds of what comes in.
            loop {
                if second == again {
                    match batch(&limiter, &caller, items) {
                        None => break,
                        Some(wait) => again = second + wait,
                    }
                }
                if second % 3 > 0 {
                    let _ = take(&limiter, &caller);
                }
                pass(&mut limiter, 1);
                second += 1;
                assert!(second < 1000, "a batch of {items} is locked out");
            }
        }
    }

    #[test]
    fn a_bucket_in_hand_is_not_forgotten_before_it_is_taken_from() {
        let limiter = limiter(1, SHARDS);
        let caller = principal("a", "CN=CA", 1);
        let in_hand = limiter.allowance(&caller);
        for n in 0..200 {
            limiter.allowance(&principal(&format!("c{n}"), "CN=CA", 0));
        }
        limiter.take(&in_hand, &caller).unwrap();
        assert!(take(&limiter, &caller).is_err(), "it was full again");
    }

    #[test]
    fn an_answer_says_what_is_left_and_a_refusal_when_to_come_back() {
        let limiter = limiter(5, 1000);
        let caller = principal("a", "CN=CA", 1);
        let answer = || Response::new(Body::empty());
        let policy = "1;w=1;burst=5";
        assert_eq!(told(&limiter, &caller, answer()), ["5", "5", "0", policy]);
        take(&limiter, &caller).unwrap();
        take(&limiter, &caller).unwrap();
        assert_eq!(told(&limiter, &caller, answer()), ["5", "3", "2", policy]);
        limiter.take_items(&caller, 4).unwrap();
        assert_eq!(told(&limiter, &caller, answer()), ["5", "0", "5", policy]);
        let refused = take(&limiter, &caller).unwrap_err();
        let refused = refused.render(&crate::http::RequestId::from_text("r"));
        assert_eq!(told(&limiter, &caller, refused), ["5", "0", "1", policy]);
        // Another refusal has a time of its own.
        let busy = ApiError::new(ErrorCode::Overloaded).render(&crate::http::RequestId::from_text("r"));
        assert_eq!(told(&limiter, &caller, busy), ["5", "0", "5", policy]);
    }

    #[test]
    fn whoever_owes_is_not_forgotten_and_whoever_does_not_is() {
        let limiter = limiter(1, SHARDS);
        let debtor = principal("debtor", "CN=CA", 1);
        take(&limiter, &debtor).unwrap();
        limiter.take_items(&debtor, 1_000_000).unwrap();
        for n in 0..200 {
            // Nothing was taken: its bucket is full.
            limiter.allowance(&principal(&format!("c{n}"), "CN=CA", 0));
        }
        assert!(take(&limiter, &debtor).is_err());
        let held: usize = limiter
            .shards
            .iter()
            .map(|shard| shard.lock().unwrap().len())
            .sum();
        assert!(held <= SHARDS, "{held}");
    }

    #[test]
    fn the_number_of_principals_is_bounded() {
        let limiter = limiter(1, SHARDS);
        let served = (0..200)
            .filter(|n| take(&limiter, &principal(&format!("c{n}"), "CN=CA", 0)).is_ok())
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
