//! Probes and metrics without client certificates, on a thread and runtime of their own: however
//! busy requests and consensus are, a probe is answered. It tells about the node and never
//! changes it (but for failpoints, in builds made for tests).

mod routes;
mod server;

use std::borrow::Cow;

use hsm_api::data::HealthResponse;

#[cfg(test)]
pub(crate) use self::routes::registered;
pub use self::server::{HealthServer, bind, start};

/// What probes ask. Called on the health thread; may take a lock, must not wait for a peer.
pub trait HealthSource: Send + Sync + 'static {
    /// Whether the node may be sent requests, judged now.
    fn readiness(&self, query: &ReadyQuery) -> Readiness;

    /// v1's document, with the labels of keys.
    fn v1_health(&self) -> HealthResponse;

    /// Prometheus text, with contexts as labels.
    fn render_metrics(&self) -> String;

    /// The applied index, and the digest of all rows of the replicated state at it. Nodes at one index have one digest.
    #[cfg(feature = "failpoints")]
    fn state_hash(&self) -> (u64, u128);
}

/// What `/readyz` was asked.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ReadyQuery {
    /// `slot=S`: only what this slot needs.
    pub slot: Option<String>,
    /// `stale=ok`: out of readiness is enough, as long as the node is inside its staleness bound.
    pub stale_ok: bool,
}

/// The answer of `/readyz`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Readiness {
    /// 200 or 503.
    pub ready: bool,
    /// Everything that was looked at, for `?verbose`.
    pub checks: Vec<Check>,
}

/// One thing that readiness depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// Stable, in snake case: `fresh`, `start_gate`, `slot:exchange`.
    pub code: Cow<'static, str>,
    /// Whether it holds.
    pub ok: bool,
    /// For people.
    pub detail: String,
}

impl Readiness {
    /// Ready if every check holds.
    #[must_use]
    pub fn of(checks: Vec<Check>) -> Self {
        Self {
            ready: checks.iter().all(|check| check.ok),
            checks,
        }
    }
}

impl Check {
    /// Makes a check.
    pub fn new(code: impl Into<Cow<'static, str>>, ok: bool, detail: impl Into<String>) -> Self {
        Self {
            code: code.into(),
            ok,
            detail: detail.into(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests;
