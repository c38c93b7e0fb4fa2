//! Trusted proxies: they end TLS for their clients and say with each request whose certificate they have seen. A proxy
//! is known by its key, and is nobody itself: what it sends without a client's certificate is nobody's.

use std::sync::Arc;

use arc_swap::ArcSwap;
use axum::http::{HeaderMap, HeaderValue};
use hsm_api::ErrorCode;
use hsm_api::headers::{CLIENT_CERT, CLIENT_CERT_CHAIN};
use rustls_pki_types::{CertificateDer, UnixTime};
use sha2::{Digest, Sha256};

use super::client_cert::{self, Malformed};
use super::problem::ApiError;
use super::vouched::{Key, Vouched};
use crate::config::TrustedProxy;
use crate::identity::{self, Principal};
use crate::metrics;
use crate::tls::{ApiTls, VouchedError};

/// All trusted proxies, and the certificates that they have shown.
pub(super) struct TrustedProxies {
    list: Vec<TrustedProxy>,
    tls: Arc<ArcSwap<ApiTls>>,
    vouched: Vouched,
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
    pub(super) fn new(list: Vec<TrustedProxy>, tls: Arc<ArcSwap<ApiTls>>) -> Arc<Self> {
        Arc::new(Self {
            list,
            tls,
            vouched: Vouched::new(),
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

    /// Whose certificate is shown. What is not remembered has to be `admitted`: verifying costs as much as a handshake.
    fn shown(
        &self,
        headers: &HeaderMap,
        admitted: impl FnOnce() -> Result<(), ApiError>,
    ) -> Result<Principal, ApiError> {
        let key = key(headers);
        let tls = self.tls.load_full();
        let now = UnixTime::now();
        let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        if let Some(known) = self.vouched.find(&key, &tls, seconds) {
            return Ok(known);
        }
        admitted()?;
        let chain = chain(headers)?;
        metrics::client_cert_verification();
        let principal = tls.vouched(&chain, now).map_err(refused)?;
        if self.known(&principal).is_some() {
            return Err(ApiError::new(ErrorCode::ClientCertRefused)
                .detail("the certificate in Client-Cert is a proxy's own, which has no rights")
                .operator(principal.to_string()));
        }
        // Of one that cannot be read it is not known when it ends.
        let end = |der: &CertificateDer<'_>| identity::not_after(der).unwrap_or(i64::MIN);
        let ends = chain.iter().map(end).min().unwrap_or(i64::MIN);
        self.vouched.remember(key, &tls, principal.clone(), seconds, ends);
        Ok(principal)
    }
}

impl Via {
    /// What logs call the proxy.
    pub(super) fn name(&self) -> &str {
        &self.0.name
    }

    /// The proxy itself: whose rate it is that it shows new certificates at, and nothing else.
    pub(super) fn proxy(&self) -> &Principal {
        &self.0.proxy
    }

    /// Whose request it is.
    pub(super) fn client(
        &self,
        headers: &HeaderMap,
        admitted: impl FnOnce() -> Result<(), ApiError>,
    ) -> Result<Principal, ApiError> {
        self.0.all.shown(headers, admitted)
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
