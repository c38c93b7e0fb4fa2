//! One attempt at one endpoint: connect, TLS, send, read the whole answer, all within a time
//! limit. It never repeats anything by itself.

use std::time::Duration;

use http::{HeaderMap, Method, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Bytes, Incoming};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use zeroize::Zeroizing;

use super::answer::RawResponse;
use super::endpoints::Endpoint;
use super::error::ClientError;

/// Larger answers are no answers of this API.
const MAX_ANSWER: usize = 16 << 20;
/// Shorter than any server keeps an idle connection, so that a request seldom meets its end.
const IDLE: Duration = Duration::from_secs(10);
/// Idle connections kept for each endpoint.
const MAX_IDLE: usize = 256;

/// A request that can be sent several times.
pub(super) struct Call {
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    /// For one attempt.
    pub(super) limit: Duration,
    /// It is about one node: no other may be asked.
    pub(super) first_endpoint_only: bool,
}

/// The pool of TLS connections.
#[derive(Clone)]
pub(super) struct Transport {
    pool: legacy::Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

impl Transport {
    pub(super) fn new(tls: rustls::ClientConfig, connect_timeout: Duration, keep_alive: bool) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(connect_timeout));
        let https = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_only()
            .enable_http1()
            .wrap_connector(tcp);
        let pool = legacy::Client::builder(TokioExecutor::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(if keep_alive { MAX_IDLE } else { 0 })
            // Repeating is `retry`'s decision; a client told not to must not do it behind its back.
            .retry_canceled_requests(false)
            .build(https);
        Self { pool }
    }

    pub(super) async fn send(
        &self,
        endpoint: &Endpoint,
        call: &Call,
        limit: Duration,
    ) -> Result<RawResponse, ClientError> {
        match tokio::time::timeout(limit, self.exchange(endpoint, call)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(ClientError::Timeout {
                endpoint: endpoint.as_str().to_owned(),
                after: limit,
            }),
        }
    }

    async fn exchange(&self, endpoint: &Endpoint, call: &Call) -> Result<RawResponse, ClientError> {
        let uri = endpoint
            .uri(&call.path)
            .map_err(|error| ClientError::Request(format!("path {:?}: {error}", call.path)))?;
        let mut request = Request::new(Full::new(call.body.clone()));
        *request.method_mut() = call.method.clone();
        *request.uri_mut() = uri;
        *request.headers_mut() = call.headers.clone();
        let response = self
            .pool
            .request(request)
            .await
            .map_err(|error| ClientError::transport(endpoint.as_str(), error.is_connect(), &error))?;
        collect(response, endpoint.as_str()).await
    }
}

/// Reads an answer to its end.
pub(super) async fn collect(
    response: Response<Incoming>,
    endpoint: &str,
) -> Result<RawResponse, ClientError> {
    let (head, mut body) = response.into_parts();
    let expected = body
        .size_hint()
        .exact()
        .and_then(|size| usize::try_from(size).ok())
        .unwrap_or(4096);
    let mut bytes = Zeroizing::new(Vec::<u8>::with_capacity(expected.min(MAX_ANSWER)));
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| ClientError::transport(endpoint, false, &error))?;
        let Some(data) = frame.data_ref() else { continue };
        if bytes.len() + data.len() > MAX_ANSWER {
            return Err(ClientError::Decode {
                endpoint: endpoint.to_owned(),
                status: head.status.as_u16(),
                reason: format!("larger than {MAX_ANSWER} bytes"),
            });
        }
        append(&mut bytes, data);
    }
    Ok(RawResponse::new(
        head.status.as_u16(),
        head.headers,
        bytes,
        endpoint.to_owned(),
    ))
}

/// Grows without leaving an unwiped copy behind, as `Vec` would.
fn append(bytes: &mut Zeroizing<Vec<u8>>, data: &[u8]) {
    let needed = bytes.len() + data.len();
    if needed > bytes.capacity() {
        let mut larger = Zeroizing::new(Vec::<u8>::with_capacity(needed.max(bytes.capacity() * 2)));
        larger.extend_from_slice(bytes.as_slice());
        *bytes = larger;
    }
    bytes.extend_from_slice(data);
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn appending_keeps_every_byte() {
        let mut bytes = Zeroizing::new(Vec::<u8>::with_capacity(2));
        for chunk in [b"a".as_slice(), b"", b"bcd", b"efghijkl"] {
            append(&mut bytes, chunk);
        }
        assert_eq!(bytes.as_slice(), b"abcdefghijkl");
    }
}
