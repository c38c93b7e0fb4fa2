//! The nodes a client may ask, and which of them it asks first: the one that last answered.

use std::sync::atomic::{AtomicUsize, Ordering};

use http::Uri;
use http::uri::Authority;

use super::error::BuildError;

/// The port of the API unless an endpoint says otherwise.
const DEFAULT_PORT: u16 = 8443;

/// One node's address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    /// `https://host:port`.
    base: String,
}

impl Endpoint {
    /// Takes `https://host:port`, `host:port` or `host`.
    pub(super) fn parse(text: &str) -> Result<Self, BuildError> {
        let refused = |reason: &str| BuildError::Endpoint {
            endpoint: text.to_owned(),
            reason: reason.to_owned(),
        };
        let rest = match text.split_once("://") {
            Some(("https", rest)) => rest,
            Some(_) => return Err(refused("the API speaks only https")),
            None => text,
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let authority = rest.parse::<Authority>().map_err(|_| refused("not an address"))?;
        if authority.host().is_empty() || authority.as_str().contains('@') {
            return Err(refused("not an address"));
        }
        let base = match authority.port_u16() {
            Some(_) => format!("https://{authority}"),
            None if authority.as_str() == authority.host() => format!("https://{authority}:{DEFAULT_PORT}"),
            None => return Err(refused("the port is no port")),
        };
        Ok(Self { base })
    }

    pub(super) fn as_str(&self) -> &str {
        &self.base
    }

    pub(super) fn uri(&self, path: &str) -> Result<Uri, http::uri::InvalidUri> {
        format!("{}{path}", self.base).parse()
    }
}

/// All nodes of one client. Shared by its clones, so that one learns from another's failure.
pub(super) struct Endpoints {
    list: Vec<Endpoint>,
    preferred: AtomicUsize,
}

impl Endpoints {
    pub(super) fn new(list: Vec<Endpoint>) -> Result<Self, BuildError> {
        if list.is_empty() {
            return Err(BuildError::NoEndpoint);
        }
        Ok(Self {
            list,
            preferred: AtomicUsize::new(0),
        })
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    /// Where a call begins.
    pub(super) fn first(&self) -> usize {
        self.preferred.load(Ordering::Relaxed)
    }

    /// Any number names an endpoint: they go round.
    pub(super) fn get(&self, index: usize) -> &Endpoint {
        &self.list[index % self.list.len()]
    }

    /// This one answered: calls begin here from now on.
    pub(super) fn prefer(&self, index: usize) {
        self.preferred.store(index % self.list.len(), Ordering::Relaxed);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &str> {
        self.list.iter().map(Endpoint::as_str)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_read_in_every_usual_form() {
        for (text, base) in [
            ("https://127.0.0.1:8443", "https://127.0.0.1:8443"),
            ("https://node-1:9443/", "https://node-1:9443"),
            ("node-1:9443", "https://node-1:9443"),
            ("node-1", "https://node-1:8443"),
            ("[::1]:8453", "https://[::1]:8453"),
        ] {
            let endpoint = Endpoint::parse(text).unwrap();
            assert_eq!(endpoint.as_str(), base);
            assert_eq!(
                endpoint.uri("/encrypt").unwrap().to_string(),
                format!("{base}/encrypt")
            );
        }
    }

    #[test]
    fn what_is_no_endpoint_is_refused_by_name() {
        for text in [
            "",
            "http://node-1:8443",
            "https://",
            "node 1",
            "node-1:x",
            "user@node-1",
            "https://a/b",
        ] {
            let error = Endpoint::parse(text).unwrap_err();
            assert!(error.to_string().contains(&format!("{text:?}")), "{error}");
        }
    }

    #[test]
    fn a_client_without_endpoints_is_refused() {
        assert!(matches!(Endpoints::new(Vec::new()), Err(BuildError::NoEndpoint)));
    }

    #[test]
    fn endpoints_go_round_and_the_last_good_one_comes_first() {
        let list = ["a", "b", "c"]
            .map(|host| Endpoint::parse(host).unwrap())
            .to_vec();
        let endpoints = Endpoints::new(list).unwrap();
        assert_eq!(endpoints.get(4).as_str(), "https://b:8443");
        endpoints.prefer(5);
        assert_eq!(endpoints.get(endpoints.first()).as_str(), "https://c:8443");
    }
}
