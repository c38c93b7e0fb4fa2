//! The routes of the API listener. Admin routes are made elsewhere and handed in; everything
//! here is put around them too.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Router};
use hsm_api::data::{BATCH_MAX_BYTES, HealthResponse, HealthStatus};
use hsm_api::{ErrorCode, paths};

use super::body::BodyLimits;
use super::data_plane::{DataPlane, Freshness};
use super::datakey::DataKey;
use super::decrypt::Decrypt;
use super::drain::DrainSignal;
use super::encrypt::Encrypt;
use super::footprint::Footprints;
use super::lookups::Lookups;
use super::min_index::Waiting;
use super::operation::handle;
use super::problem::ApiError;
use super::rate_limit::{Allowance, RateLimiter};
use super::rewrap::{NAMERS, Rewrap};
use super::routes::Routes;
use super::trusted::Via;
use super::{openapi, respond};
use crate::config::RateLimit;
use crate::health::HealthSource;
use crate::identity::Principal;
use crate::metrics::without_names;
use crate::policy::Op;

/// One principal's `/health` and `/metrics`, apart from its other requests.
const PROBES: RateLimit = RateLimit {
    requests_per_second: NonZeroU32::MIN.saturating_add(49),
    burst: NonZeroU32::MIN.saturating_add(99),
};

/// What the routes are made from.
pub struct ApiParts {
    /// The node, as the data plane sees it.
    pub data: Arc<dyn DataPlane>,
    /// For `/health` and `/metrics`.
    pub health: Arc<dyn HealthSource>,
    /// Requests per principal.
    pub rate_limit: RateLimit,
    /// Bytes of a request's body, unless it is a batch.
    pub max_body_bytes: usize,
    /// How long a request waits for a token; a little longer than the slot's own deadline.
    pub token_timeout: Duration,
    /// How long a request waits for the state that it asks for (`X-HSM-Min-Index`).
    pub min_index_wait: Duration,
    /// Shutdown.
    pub drain: DrainSignal,
}

/// State of all routes; cheap to clone.
#[derive(Clone)]
pub struct ApiState(Arc<Inner>);

struct Inner {
    parts: ApiParts,
    limiter: RateLimiter,
    /// Of [`PROBES`].
    probes: RateLimiter,
    footprints: Footprints,
    bodies: BodyLimits,
    waiting: Waiting,
    lookups: Lookups,
    node_header: Option<HeaderValue>,
}

impl ApiState {
    /// Takes the parts.
    #[must_use]
    pub fn new(parts: ApiParts) -> Self {
        Self(Arc::new(Inner {
            limiter: RateLimiter::new(parts.rate_limit),
            probes: RateLimiter::new(PROBES),
            footprints: Footprints::new(),
            lookups: Lookups::new(),
            // What a single request may have is looked at when it is known that it is one.
            bodies: BodyLimits::data(parts.max_body_bytes, BATCH_MAX_BYTES),
            waiting: Waiting::new(parts.min_index_wait),
            node_header: HeaderValue::from_str(parts.data.node_id()).ok(),
            parts,
        }))
    }

    pub(super) fn data(&self) -> &dyn DataPlane {
        &*self.0.parts.data
    }

    pub(super) fn bodies(&self) -> &BodyLimits {
        &self.0.bodies
    }

    pub(super) fn lookups(&self) -> &Lookups {
        &self.0.lookups
    }

    pub(super) fn max_body_bytes(&self) -> usize {
        self.0.parts.max_body_bytes
    }

    pub(super) fn token_timeout(&self) -> Duration {
        self.0.parts.token_timeout
    }

    pub(super) fn drain(&self) -> &DrainSignal {
        &self.0.parts.drain
    }

    pub(super) fn node_header(&self) -> Option<HeaderValue> {
        self.0.node_header.clone()
    }

    pub(super) fn waiting(&self) -> &Waiting {
        &self.0.waiting
    }

    pub(super) fn footprints(&self) -> &Footprints {
        &self.0.footprints
    }

    /// Takes a request from its principal's allowance, once for each, and leaves in `counted` what the caller is
    /// told of. What watches an application shows its certificate, and must not be refused because the application
    /// asks too much.
    pub(super) fn limit(
        &self,
        principal: &Principal,
        path: &str,
        counted: &mut Option<Allowance>,
    ) -> Result<(), ApiError> {
        if matches!(path, paths::HEALTH | paths::METRICS) {
            let probes = &self.0.probes;
            return probes.take(&probes.allowance(principal), principal);
        }
        let allowance = counted.insert(self.0.limiter.allowance(principal));
        self.0.limiter.take(allowance, principal)
    }

    /// Takes what a batch has beyond one item from its principal's allowance: each item counts as a request.
    pub(super) fn limit_batch(&self, principal: &Principal, items: usize) -> Result<(), ApiError> {
        self.0.limiter.take_items(principal, items)
    }

    /// Says in the answer to a request that was counted what its principal has left.
    pub(super) fn tell_limit(&self, counted: &Allowance, response: &mut Response) {
        self.0.limiter.tell(counted, response);
    }

    /// What can be decided before a byte of the body is read. The certificate itself has been
    /// looked at already; the context is not known yet.
    pub(super) fn admit(&self, principal: &Principal, op: Op) -> Result<Freshness, ApiError> {
        let freshness = self.data().freshness(op)?;
        let policy = self.data().policy();
        match policy.unit(principal) {
            // Who may name others needs nothing of his own.
            Err(_) if op == Op::Rewrap && policy.require_role(principal, NAMERS).is_ok() => {}
            unit => {
                unit?;
            }
        }
        Ok(freshness)
    }
}

/// All routes of the API listener. `admin` may take `Extension<Principal>` and
/// `Extension<RequestId>` in its handlers and return [`ApiError`]; it must have no fallback.
pub fn router(state: ApiState, admin: Router) -> Router {
    routes()
        .into_router()
        .with_state(state.clone())
        .merge(admin)
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(from_fn_with_state(state, respond::wrap))
}

/// All but the admin routes.
pub(super) fn routes() -> Routes<ApiState> {
    Routes::default()
        .post(paths::ENCRYPT, handle::<Encrypt, 3>)
        .post(paths::DECRYPT, handle::<Decrypt, 5>)
        .post(paths::REWRAP, handle::<Rewrap, 6>)
        .post(paths::DATAKEY, handle::<DataKey, 4>)
        .get(paths::HEALTH, health)
        .get(paths::METRICS, metrics)
        .get(paths::OPENAPI, openapi::show)
}

async fn not_found() -> ApiError {
    ApiError::new(ErrorCode::NotFound)
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    let error =
        ApiError::new(ErrorCode::MethodNotAllowed).detail(format!("{} does not take {method}", uri.path()));
    match uri.path() {
        paths::ENCRYPT | paths::DECRYPT | paths::REWRAP | paths::DATAKEY => error,
        _ => error.v1_text("method not allowed"),
    }
}

/// Whether an answer names contexts and keys. A role counts on a connection of one's own only: through a proxy only what
/// everybody reads.
fn reads_names(state: &ApiState, caller: &Principal, via: Option<Extension<Via>>) -> bool {
    let policy = state.data().policy();
    match via {
        Some(_) => !policy.names_are_kept(),
        None => policy.reads_names(caller),
    }
}

/// v1's document.
async fn health(
    State(state): State<ApiState>,
    Extension(caller): Extension<Principal>,
    via: Option<Extension<Via>>,
) -> Response {
    let mut document = state.0.parts.health.v1_health();
    if !reads_names(&state, &caller, via) {
        document.kek_status.clear();
    }
    v1_health(&document)
}

pub(crate) fn v1_health(document: &HealthResponse) -> Response {
    let status = match document.status {
        HealthStatus::Healthy => StatusCode::OK,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    match serde_json::to_vec(document) {
        Ok(body) => (status, [(header::CONTENT_TYPE, "application/json")], body).into_response(),
        Err(error) => ApiError::internal(format!("health: {error}")).into_response(),
    }
}

async fn metrics(
    State(state): State<ApiState>,
    Extension(caller): Extension<Principal>,
    via: Option<Extension<Via>>,
) -> Response {
    let mut text = state.0.parts.health.render_metrics();
    if !reads_names(&state, &caller, via) {
        text = without_names(&text);
    }
    ([(header::CONTENT_TYPE, METRICS_TYPE)], text).into_response()
}

/// The Prometheus text format.
pub(crate) const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
