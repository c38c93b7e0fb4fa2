//! The API listener: from the accepted connection to the answer. Nothing here knows consensus or
//! PKCS#11; it asks the node through [`DataPlane`] and slots through the key ring.

mod access;
mod activity;
mod asking;
mod batch;
mod body;
pub(crate) mod brief;
mod bucket;
mod caller;
pub mod client_cert;
mod connection;
mod data_plane;
mod datakey;
mod decrypt;
mod drain;
mod encrypt;
mod footprint;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod go_base64;
pub mod guards;
mod job;
mod json;
mod lent;
mod linger;
mod listener;
mod lookups;
mod min_index;
mod named;
mod openapi;
mod opening;
mod operation;
mod places;
mod preface;
pub mod problem;
pub mod proxy_protocol;
mod rate_limit;
mod refusals;
mod reply;
pub mod request_id;
mod resolve;
mod respond;
mod revocation;
mod rewrap;
mod routes;
mod service;
mod shares;
mod text;
pub mod trace_id;
mod trusted;
mod vouched;

use std::net::SocketAddr;

pub use self::body::BodyLimits;
pub use self::data_plane::{AboveKnown, DataPlane, Freshness};
pub use self::drain::{DrainControl, DrainSignal, Phase};
#[cfg(test)]
pub(crate) use self::listener::bind;
pub use self::listener::{ApiListener, ListenError, Reserved, STALLED};
pub use self::places::{Counted, HANDSHAKES, OpenConnections};
pub use self::problem::ApiError;
pub(crate) use self::refusals::say_refusals_left_out;
pub use self::request_id::RequestId;
pub(crate) use self::respond::ServedFrom;
pub use self::routes::Routes;
pub use self::service::{ApiParts, ApiState, router};
pub(crate) use self::service::{METRICS_TYPE, v1_health};
pub use self::trace_id::TraceId;

/// The client's address, as a balancer has said it where one stands between. An extension of every request; for logs,
/// never identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerAddr(pub SocketAddr);

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests;
