//! A client of the health listener, which speaks plain HTTP on the local host: for harnesses that
//! wait for a node, read its metrics, or set a failpoint. It carries no secret.

use std::time::Duration;

use http::{Method, Request, Uri};
use http_body_util::Full;
use hyper::body::Bytes;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

use super::answer::RawResponse;
use super::error::ClientError;
use super::transport::collect;
use crate::paths;

/// A health listener must answer at once: it has a runtime of its own. As long as nobody says otherwise.
const LIMIT: Duration = Duration::from_secs(2);

/// Asks one node's health listener. Every request has a connection of its own, so that a killed
/// node is seen as such.
#[derive(Clone)]
pub struct HealthClient {
    pool: legacy::Client<HttpConnector, Full<Bytes>>,
    base: String,
    limit: Duration,
}

impl HealthClient {
    /// For the listener at `host:port`.
    #[must_use]
    pub fn new(address: &str) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(LIMIT));
        let pool = legacy::Client::builder(TokioExecutor::new())
            .pool_max_idle_per_host(0)
            .retry_canceled_requests(false)
            .build(tcp);
        Self {
            pool,
            base: format!("http://{address}"),
            limit: LIMIT,
        }
    }

    /// With another time for one answer than two seconds.
    #[must_use]
    pub fn with_limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// `GET` of a path with its query, as `/readyz?verbose`. Every status is an `Ok`.
    pub async fn get(&self, path: &str) -> Result<RawResponse, ClientError> {
        self.send(Method::GET, path).await
    }

    /// `POST` without a body, as `/failpoints?name=N&action=A`. Every status is an `Ok`.
    pub async fn post(&self, path: &str) -> Result<RawResponse, ClientError> {
        self.send(Method::POST, path).await
    }

    /// Whether `/readyz` says so; a node that does not answer is not ready.
    pub async fn is_ready(&self) -> bool {
        self.get(paths::READYZ)
            .await
            .is_ok_and(|response| response.status == 200)
    }

    async fn send(&self, method: Method, path: &str) -> Result<RawResponse, ClientError> {
        let target = format!("{}{path}", self.base);
        let uri = target
            .parse::<Uri>()
            .map_err(|error| ClientError::Request(format!("{target:?}: {error}")))?;
        let mut request = Request::new(Full::new(Bytes::new()));
        *request.method_mut() = method;
        *request.uri_mut() = uri;
        let exchange = async {
            let response = self
                .pool
                .request(request)
                .await
                .map_err(|error| ClientError::transport(&self.base, error.is_connect(), &error))?;
            collect(response, &self.base).await
        };
        match tokio::time::timeout(self.limit, exchange).await {
            Ok(outcome) => outcome,
            Err(_) => Err(ClientError::Timeout {
                endpoint: self.base.clone(),
                after: self.limit,
            }),
        }
    }
}
