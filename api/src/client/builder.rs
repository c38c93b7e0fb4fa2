//! How a client is made: endpoints, PEM, time-outs, retries. Everything that can be wrong with
//! them is found here, before the first request.

use std::sync::Arc;
use std::time::Duration;

use zeroize::Zeroizing;

use super::Client;
use super::endpoints::{Endpoint, Endpoints};
use super::error::BuildError;
use super::retry::Retry;
use super::tls::{self, Identity};
use super::transport::Transport;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Makes a [`Client`]; from [`Client::builder`].
#[must_use]
pub struct ClientBuilder {
    endpoints: Vec<String>,
    ca_pem: Vec<u8>,
    identity: Option<(Vec<u8>, Zeroizing<Vec<u8>>)>,
    retry: Retry,
    request_timeout: Duration,
    connect_timeout: Duration,
    keep_alive: bool,
}

impl ClientBuilder {
    pub(super) fn new() -> Self {
        Self {
            endpoints: Vec::new(),
            ca_pem: Vec::new(),
            identity: None,
            retry: Retry::default(),
            request_timeout: REQUEST_TIMEOUT,
            connect_timeout: CONNECT_TIMEOUT,
            keep_alive: true,
        }
    }

    /// Adds nodes, as `https://host:port` or `host:port`. The first is asked first.
    pub fn endpoints<T: Into<String>>(mut self, endpoints: impl IntoIterator<Item = T>) -> Self {
        self.endpoints.extend(endpoints.into_iter().map(Into::into));
        self
    }

    /// Adds one node.
    pub fn endpoint(self, endpoint: impl Into<String>) -> Self {
        self.endpoints([endpoint])
    }

    /// The CA the nodes' certificates come from, as PEM; several are allowed.
    pub fn ca_pem(mut self, pem: impl AsRef<[u8]>) -> Self {
        self.ca_pem = pem.as_ref().to_vec();
        self
    }

    /// The client's certificate (its chain after it) and its key, as PEM. Without an identity
    /// every node refuses the connection.
    pub fn identity_pem(mut self, cert: impl AsRef<[u8]>, key: impl AsRef<[u8]>) -> Self {
        self.identity = Some((cert.as_ref().to_vec(), Zeroizing::new(key.as_ref().to_vec())));
        self
    }

    /// Whether and how long failed calls are repeated; the default is 15 s.
    pub fn retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }

    /// Limit of one attempt, connecting included; the default is 5 s. Calls that wait for the
    /// cluster (mutations, joining) have longer ones of their own.
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.request_timeout = timeout;
        self
    }

    /// Limit of one TCP connect; the default is 2 s.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// Whether connections are kept for the next request; they are by default.
    pub fn keep_alive(mut self, keep_alive: bool) -> Self {
        self.keep_alive = keep_alive;
        self
    }

    /// The client. Connects to nothing yet.
    pub fn build(self) -> Result<Client, BuildError> {
        let list = self
            .endpoints
            .iter()
            .map(|text| Endpoint::parse(text))
            .collect::<Result<_, _>>()?;
        let endpoints = Arc::new(Endpoints::new(list)?);
        let identity = match &self.identity {
            Some((cert, key)) => Some(Identity::from_pem(cert, key)?),
            None => None,
        };
        let tls = tls::config(&self.ca_pem, identity)?;
        Ok(Client {
            transport: Transport::new(tls, self.connect_timeout, self.keep_alive),
            endpoints,
            retry: self.retry,
            request_timeout: self.request_timeout,
            min_index: None,
        })
    }
}
