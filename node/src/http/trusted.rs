//! Trusted proxies: they end TLS for their clients and say with each request whose certificate they have seen. A proxy
//! is known by its key, and is nobody itself: what it sends without a client's certificate is nobody's.

use std::num::NonZeroU32;
use std::sync::Arc;

use arc_swap::ArcSwap;
use axum::http::{HeaderMap, HeaderValue};
use hsm_api::ErrorCode;
use hsm_api::headers::{CLIENT_CERT, CLIENT_CERT_CHAIN};
use rustls_pki_types::{CertificateDer, UnixTime};
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio::time::sleep;

use super::client_cert::{self, Malformed};
use super::problem::ApiError;
use super::rate_limit::RateLimiter;
use super::revocation;
use super::shares::{Share, Shares};
use super::vouched::{Key, Vouched};
use crate::config::{RateLimit, TrustedProxy};
use crate::identity::Principal;
use crate::metrics;
use crate::policy::Policy;
use crate::tls::{ApiTls, VouchedError};

/// Chains that are verified for one proxy: each costs as much as a handshake. As many at once as are remembered, for when
/// a node starts.
const VERIFICATIONS: RateLimit = RateLimit {
    requests_per_second: NonZeroU32::MIN.saturating_add(999),
    burst: NonZeroU32::MIN.saturating_add(4095),
};
/// Seconds for which a refusal is remembered. The certificate may become good: its time begins, or a clock is set.
const REFUSED: i64 = 5;
/// One client gets this part of what one proxy may have in hand, which is a request on each of its connections.
const CLIENTS_PART: usize = 4;

/// All trusted proxies, and the certificates that they have shown.
pub(super) struct TrustedProxies {
    list: Vec<TrustedProxy>,
    tls: Arc<ArcSwap<ApiTls>>,
    policies: watch::Receiver<Arc<Policy>>,
    vouched: Vouched<Principal>,
    /// Apart, so that nobody's bad certificates take the places of good ones.
    refused: Vouched<ApiError>,
    verifications: RateLimiter,
    /// Requests in hand, by client.
    in_hand: Arc<Shares>,
}

/// The proxy that a request has come through. An extension of such requests, in place of a [`Principal`].
#[derive(Clone)]
pub(super) struct Via(Arc<Inner>);

struct Inner {
    name: Arc<str>,
    proxy: Principal,
    all: Arc<TrustedProxies>,
}

impl TrustedProxies {
    /// Each has `part` connections in any case.
    pub(super) fn new(
        list: Vec<TrustedProxy>,
        tls: Arc<ArcSwap<ApiTls>>,
        policies: watch::Receiver<Arc<Policy>>,
        part: usize,
    ) -> Arc<Self> {
        Self::with(list, tls, policies, part, VERIFICATIONS)
    }

    fn with(
        list: Vec<TrustedProxy>,
        tls: Arc<ArcSwap<ApiTls>>,
        policies: watch::Receiver<Arc<Policy>>,
        part: usize,
        verifications: RateLimit,
    ) -> Arc<Self> {
        Arc::new(Self {
            list,
            tls,
            policies,
            vouched: Vouched::new(),
            refused: Vouched::new(),
            verifications: RateLimiter::new(verifications),
            in_hand: Shares::new(usize::MAX, (part / CLIENTS_PART).max(1)),
        })
    }

    /// The proxy whose connection it is, if it is one's.
    pub(super) fn via(self: &Arc<Self>, who: &Principal) -> Option<Via> {
        let known = self.known(who)?;
        Some(Via(Arc::new(Inner {
            name: Arc::clone(&known.name),
            proxy: who.clone(),
            all: Arc::clone(self),
        })))
    }

    fn known(&self, who: &Principal) -> Option<&TrustedProxy> {
        self.list
            .iter()
            .find(|proxy| proxy.spki_sha256 == who.spki_sha256)
    }

    /// Whose certificate a proxy shows.
    fn shown(&self, proxy: &Principal, headers: &HeaderMap) -> Result<Principal, ApiError> {
        let key = key(headers);
        let tls = self.tls.load_full();
        let now = UnixTime::now();
        let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        if let Some(known) = self.vouched.find(&key, &tls, seconds) {
            return Ok(known);
        }
        if let Some(refusal) = self.refused.find(&key, &tls, seconds) {
            return Err(refusal);
        }
        let chain = chain(headers)?;
        self.verifications
            .take(&self.verifications.allowance(proxy), proxy)?;
        metrics::client_cert_verification();
        match self.judge(&tls, &chain, now) {
            Ok(client) => {
                let ends = client.ends();
                self.vouched.remember(key, &tls, client.clone(), seconds, ends);
                Ok(client)
            }
            Err(refusal) => {
                let ends = seconds.saturating_add(REFUSED);
                self.refused.remember(key, &tls, refusal.clone(), seconds, ends);
                Err(refusal)
            }
        }
    }

    fn judge(
        &self,
        tls: &ApiTls,
        chain: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<Principal, ApiError> {
        let client = tls.vouched(chain, now).map_err(refused)?;
        if self.known(&client).is_some() {
            return Err(ApiError::new(ErrorCode::ClientCertRefused)
                .detail("the certificate in Client-Cert is a proxy's own, which has no rights")
                .operator(client.to_string()));
        }
        Ok(client)
    }
}

impl Via {
    /// What logs call the proxy.
    pub(super) fn name(&self) -> &str {
        &self.0.name
    }

    /// The proxy itself: whose log lines it is while its client is not known, and nothing else.
    pub(super) fn proxy(&self) -> &Principal {
        &self.0.proxy
    }

    /// Whose request it is.
    pub(super) fn client(&self, headers: &HeaderMap) -> Result<Principal, ApiError> {
        self.0.all.shown(&self.0.proxy, headers)
    }

    /// A place for one request of a client among those that are in hand, so that one client cannot fill the proxy's
    /// connections and starve the others behind it.
    ///
    /// # Errors
    /// `overloaded`
    pub(super) fn enter(&self, client: &Principal) -> Result<Share, ApiError> {
        let mut place = self.0.all.in_hand.open(client);
        // The sum has no bound of its own: connections have.
        place.take(1).map_err(|_| {
            ApiError::new(ErrorCode::Overloaded)
                .detail("this client has as many requests in hand as one may have through a proxy")
                .operator(format!(
                    "as many requests in hand as one client may have through a proxy: {client}"
                ))
        })?;
        Ok(place)
    }

    /// Ends when what a client has in hand has to end, because its certificate is revoked.
    pub(super) async fn expulsion(&self, client: &Principal) {
        revocation::revoked(self.0.all.policies.clone(), client).await;
        sleep(revocation::LAST_WORDS).await;
    }
}

/// Whether a request speaks of a client's certificate, which only trusted proxies may.
pub(super) fn speaks_of_certificates(headers: &HeaderMap) -> bool {
    headers.contains_key(CLIENT_CERT) || headers.contains_key(CLIENT_CERT_CHAIN)
}

/// Each value with its length, and each header apart: no two requests that are read differently have one key.
fn key(headers: &HeaderMap) -> Key {
    let mut hash = Sha256::new();
    for name in [CLIENT_CERT, CLIENT_CERT_CHAIN] {
        for value in headers.get_all(name) {
            hash.update((value.len() as u64).to_be_bytes());
            hash.update(value.as_bytes());
        }
        hash.update(u64::MAX.to_be_bytes());
    }
    hash.finalize().into()
}

/// The certificates that a request shows, leaf first.
fn chain(headers: &HeaderMap) -> Result<Vec<CertificateDer<'static>>, ApiError> {
    let mut given = headers.get_all(CLIENT_CERT).iter();
    let leaf = given
        .next()
        .ok_or_else(|| ApiError::new(ErrorCode::ClientCertMissing))?;
    if given.next().is_some() {
        return Err(malformed("Client-Cert: is there more than once"));
    }
    let leaf = client_cert::certificate(leaf.as_bytes()).map_err(|error| of("Client-Cert", error))?;
    let lines = headers
        .get_all(CLIENT_CERT_CHAIN)
        .iter()
        .map(HeaderValue::as_bytes);
    let above = client_cert::chain(lines).map_err(|error| of("Client-Cert-Chain", error))?;
    let all = std::iter::once(leaf).chain(above);
    Ok(all.map(CertificateDer::from).collect())
}

fn of(header: &str, error: Malformed) -> ApiError {
    malformed(format!("{header}: {error}"))
}

fn malformed(detail: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::ClientCertMalformed).detail(detail)
}

/// As a handshake would have refused it.
fn refused(error: VouchedError) -> ApiError {
    ApiError::new(ErrorCode::ClientCertRefused).detail(format!("Client-Cert: {error}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::http::client_cert::tests::encode;
    use crate::http::tests::fake::principal;
    use crate::http::vouched::tests::cas_of;
    use crate::identity::test_certs::TestCa;

    /// Trusted proxies for each of which so many chains are verified, and no more for now.
    fn proxies(ca: &TestCa, verifications: u32) -> Arc<TrustedProxies> {
        let tls = Arc::new(ArcSwap::new(cas_of(ca)));
        let policies = watch::Sender::new(Arc::<Policy>::default()).subscribe();
        let limit = RateLimit {
            requests_per_second: NonZeroU32::MIN,
            burst: NonZeroU32::new(verifications).unwrap(),
        };
        TrustedProxies::with(Vec::new(), tls, policies, 64, limit)
    }

    fn headers(der: &[u8]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(CLIENT_CERT, HeaderValue::from_str(&encode(der)).unwrap());
        headers
    }

    fn code(proxies: &TrustedProxies, proxy: &Principal, headers: &HeaderMap) -> Option<ErrorCode> {
        proxies.shown(proxy, headers).err().map(|error| error.code())
    }

    #[test]
    fn each_proxy_has_chains_verified_at_a_rate_of_its_own() {
        let ca = TestCa::new("Clients");
        let proxies = proxies(&ca, 3);
        let (edge, other) = (principal("edge", None), principal("other", None));
        let good = headers(&ca.client("trading-1", "Trading").der);
        assert_eq!(code(&proxies, &edge, &good), None);
        for number in 0..2 {
            let bad = headers(&[0x30, number]);
            assert_eq!(code(&proxies, &edge, &bad), Some(ErrorCode::ClientCertRefused));
        }
        let new = headers(&ca.client("trading-2", "Trading").der);
        assert_eq!(code(&proxies, &edge, &new), Some(ErrorCode::RateLimited));
        assert_eq!(code(&proxies, &other, &new), None);
        // What is known costs nothing.
        assert_eq!(code(&proxies, &edge, &good), None);
        assert_eq!(code(&proxies, &edge, &new), None);
    }

    #[test]
    fn a_refusal_is_remembered_and_what_cannot_be_read_costs_no_verification() {
        let ca = TestCa::new("Clients");
        let proxies = proxies(&ca, 2);
        let edge = principal("edge", None);
        let bad = headers(&[0x30]);
        for _ in 0..10 {
            assert_eq!(code(&proxies, &edge, &bad), Some(ErrorCode::ClientCertRefused));
            let missing = code(&proxies, &edge, &HeaderMap::new());
            assert_eq!(missing, Some(ErrorCode::ClientCertMissing));
            let mut twice = bad.clone();
            twice.append(CLIENT_CERT, HeaderValue::from_static(":MA==:"));
            let malformed = code(&proxies, &edge, &twice);
            assert_eq!(malformed, Some(ErrorCode::ClientCertMalformed));
        }
        let good = headers(&ca.client("trading-1", "Trading").der);
        assert_eq!(
            code(&proxies, &edge, &good),
            None,
            "ten refusals cost more than one"
        );
    }

    #[test]
    fn one_client_has_a_quarter_of_what_a_proxy_may_have_in_hand() {
        let ca = TestCa::new("Clients");
        let proxies = proxies(&ca, 1);
        let via = Via(Arc::new(Inner {
            name: "edge".into(),
            proxy: principal("edge", None),
            all: Arc::clone(&proxies),
        }));
        let (a, b) = (principal("a", None), principal("b", None));
        let mut held: Vec<Share> = (0..16).map(|_| via.enter(&a).unwrap()).collect();
        let refused = via.enter(&a).err().map(|error| error.code());
        assert_eq!(refused, Some(ErrorCode::Overloaded));
        assert!(via.enter(&b).is_ok());
        held.pop();
        assert!(via.enter(&a).is_ok());
    }
}
