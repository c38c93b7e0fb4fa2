//! The Rust client: mTLS, several endpoints, fail-over, retries that are safe. It must never
//! repeat a mutation under another `Idempotency-Key`, nor send to another node what is meant for
//! one.
//!
//! ```no_run
//! # async fn f(ca: Vec<u8>, cert: Vec<u8>, key: Vec<u8>) -> Result<(), Box<dyn std::error::Error>> {
//! use hsm_api::client::Client;
//! use hsm_api::data::{DecryptRequest, EncryptRequest};
//!
//! let client = Client::builder()
//!     .endpoints(["https://node-1:8443", "https://node-2:8443"])
//!     .ca_pem(ca)
//!     .identity_pem(cert, key)
//!     .build()?;
//! let sealed = client.encrypt(&EncryptRequest::new("exchange-key", b"order 42")).await?;
//! let opened = client
//!     .decrypt(&DecryptRequest::new("exchange-key", sealed.ciphertext.clone()))
//!     .await?;
//! assert_eq!(opened.plaintext.as_slice(), b"order 42");
//! # Ok(())
//! # }
//! ```

mod answer;
mod builder;
mod calls;
mod endpoints;
mod error;
mod failures;
mod health;
mod retry;
mod tls;
mod transport;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use hyper::body::Bytes;
use tokio::time::Instant;
use ulid::Ulid;

pub use answer::{Answer, Meta, RawResponse};
pub use builder::ClientBuilder;
pub use error::{ApiError, BuildError, ClientError};
pub use health::HealthClient;
pub use http::Method;
pub use retry::Retry;

use endpoints::{Endpoint, Endpoints};
use failures::Failures;
use retry::{Plan, Step};
use transport::{Call, Transport};

use crate::headers::StateIndex;

/// A client of the API. Clones are cheap and share connections and what is known of endpoints.
#[derive(Clone)]
pub struct Client {
    transport: Transport,
    endpoints: Arc<Endpoints>,
    retry: Retry,
    request_timeout: Duration,
    min_index: Option<StateIndex>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("endpoints", &self.endpoints().collect::<Vec<_>>())
            .field("retry", &self.retry)
            .finish_non_exhaustive()
    }
}

/// Whether a client can be made for this address: `https://host:port`, `host:port` or `host`. Nobody is asked.
///
/// # Errors
/// [`BuildError::Endpoint`], which names it.
pub fn check_endpoint(endpoint: &str) -> Result<(), BuildError> {
    Endpoint::parse(endpoint).map(drop)
}

impl Client {
    /// Begins a client.
    pub fn builder() -> ClientBuilder {
        ClientBuilder::new()
    }

    /// The same client, for this endpoint alone; it need not be one of the present ones.
    pub fn on(&self, endpoint: &str) -> Result<Self, BuildError> {
        let endpoints = Arc::new(Endpoints::new(vec![Endpoint::parse(endpoint)?])?);
        Ok(Self {
            endpoints,
            ..self.clone()
        })
    }

    /// The same client with other retries.
    #[must_use]
    pub fn with_retry(&self, retry: Retry) -> Self {
        Self {
            retry,
            ..self.clone()
        }
    }

    /// The same client, whose calls are answered only from states at least as new as this one: the index of an
    /// answer that it has seen ([`Meta::index`]). A node that is not there yet waits a moment for it, then another one
    /// is asked. An index of another epoch is refused at once, by every node: forget it then.
    #[must_use]
    pub fn with_min_index(&self, index: StateIndex) -> Self {
        Self {
            min_index: Some(index),
            ..self.clone()
        }
    }

    /// The endpoints, as `https://host:port`.
    pub fn endpoints(&self) -> impl Iterator<Item = &str> {
        self.endpoints.iter()
    }

    /// Sends exactly this to the first endpoint, once, whatever it is: no header is added but
    /// `Host` and `Content-Length`, nothing is repeated, every status is an `Ok`. For tests of
    /// bad input.
    pub async fn request(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Vec<u8>>,
    ) -> Result<RawResponse, ClientError> {
        let mut map = HeaderMap::with_capacity(headers.len());
        for (name, value) in headers {
            let name = HeaderName::from_bytes(name.as_bytes())
                .map_err(|error| ClientError::Request(format!("header {name:?}: {error}")))?;
            let value = header_value(name.as_str(), value)?;
            map.append(name, value);
        }
        let call = Call {
            method,
            path: path.to_owned(),
            headers: map,
            body: Bytes::from(body.into()),
            limit: self.request_timeout,
            first_endpoint_only: true,
        };
        self.transport
            .send(self.endpoints.get(0), &call, call.limit)
            .await
    }

    /// Sends a call until it succeeds, fails for good, or its time is over. Gives the answer and
    /// the number of attempts.
    async fn run(&self, call: &Call) -> Result<(RawResponse, u32), ClientError> {
        let started = Instant::now();
        let (budget, pinned) = match self.retry {
            Retry::None => (None, true),
            Retry::Until(budget) => (Some(budget), call.first_endpoint_only),
        };
        let mut plan = Plan::new(if pinned { 1 } else { self.endpoints.len() });
        let mut at = if pinned { 0 } else { self.endpoints.first() };
        let mut attempts = 0;
        let mut failures = Failures::new(if pinned { 1 } else { self.endpoints.len() });
        loop {
            let left = budget.map_or(call.limit, |budget| budget.saturating_sub(started.elapsed()));
            attempts += 1;
            let error = match self
                .transport
                .send(self.endpoints.get(at), call, call.limit.min(left))
                .await
            {
                Ok(response) if response.is_success() => {
                    if !pinned {
                        self.endpoints.prefer(at);
                    }
                    return Ok((response, attempts));
                }
                Ok(response) => {
                    let meta = response.meta(attempts);
                    ClientError::Api(Box::new(ApiError::read(&response, meta)))
                }
                Err(error) => error,
            };
            let Some(budget) = budget else { return Err(error) };
            // Nothing that another endpoint says makes this one's answer, or the request, readable.
            if matches!(error, ClientError::Decode { .. } | ClientError::Request(_)) {
                return Err(error);
            }
            let step = plan.after(&error);
            failures.note(at, error);
            let pause = match step {
                Step::GiveUp => return Err(failures.into_error()),
                Step::Same(pause) => pause,
                Step::Next(pause) => {
                    if !pinned {
                        at += 1;
                    }
                    pause
                }
            };
            let pause = pause + jitter(pause);
            if started.elapsed() + pause >= budget {
                return Err(failures.into_error());
            }
            tokio::time::sleep(pause).await;
        }
    }
}

/// Up to a quarter more, so that clients that failed together do not come back together.
fn jitter(pause: Duration) -> Duration {
    let random = u32::from(Ulid::new().to_bytes()[15]);
    pause * random / 1024
}

fn header_value(name: &str, value: &str) -> Result<HeaderValue, ClientError> {
    HeaderValue::from_str(value)
        .map_err(|_| ClientError::Request(format!("header {name}: the value has characters HTTP forbids")))
}
