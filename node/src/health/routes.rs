//! The health listener's few routes, as a function from request to answer. Nobody shows a certificate
//! here, so no answer names a key or a context; on the API, v1's two documents do. None has the headers of the API's
//! answers: what watches a node asks for no state of the cluster.

use std::collections::BTreeMap;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::Response;
use hsm_api::data::HealthResponse;
use hsm_api::{ErrorCode, paths};

use super::{HealthSource, ReadyQuery};
use crate::http::{ApiError, METRICS_TYPE, RequestId, guards, v1_health};
use crate::metrics::without_names;

/// What answers a `GET` or `HEAD` of one path.
type Handler = fn(&dyn HealthSource, &Uri) -> Response;

/// Everything that is answered. What were answered elsewhere would be in no list, and so not be missed in
/// `docs/openapi.json`; so it is with failpoints and the state's digest, which only builds for tests have.
const ROUTES: &[(&str, Handler)] = &[
    (paths::LIVEZ, livez),
    (paths::READYZ, readyz),
    (paths::METRICS, metrics),
    (paths::HEALTH, health),
];

/// For the test that compares them with the description of the API.
#[cfg(test)]
pub(crate) fn registered() -> Vec<(Method, &'static str)> {
    ROUTES.iter().map(|(path, _)| (Method::GET, *path)).collect()
}

/// Answers one request, which ends its connection. Bodies are not read: no route needs one.
pub(super) fn answer(source: &dyn HealthSource, method: &Method, uri: &Uri, headers: &HeaderMap) -> Response {
    let mut response = match route(source, method, uri, headers) {
        Ok(response) => response,
        Err(error) => {
            let mut response = error.render(&RequestId::of(headers));
            if error.code() == ErrorCode::MethodNotAllowed {
                let allowed = HeaderValue::from_static("GET,HEAD");
                response.headers_mut().insert(header::ALLOW, allowed);
            }
            response
        }
    };
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

fn route(
    source: &dyn HealthSource,
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
) -> Result<Response, ApiError> {
    guards::same_origin(headers, uri)?;
    #[cfg(feature = "failpoints")]
    if uri.path() == paths::FAILPOINTS && *method == Method::POST {
        return failpoint(uri);
    }
    #[cfg(feature = "failpoints")]
    if uri.path() == paths::STATE_HASH && *method == Method::GET {
        return Ok(state_hash(source));
    }
    let Some((_, handler)) = ROUTES.iter().find(|(path, _)| *path == uri.path()) else {
        return Err(ApiError::new(ErrorCode::NotFound));
    };
    if !matches!(*method, Method::GET | Method::HEAD) {
        return Err(ApiError::new(ErrorCode::MethodNotAllowed).v1_text("only GET allowed"));
    }
    Ok(handler(source, uri))
}

fn livez(_: &dyn HealthSource, _: &Uri) -> Response {
    text(StatusCode::OK, "ok\n")
}

fn metrics(source: &dyn HealthSource, _: &Uri) -> Response {
    let unnamed = without_names(&source.render_metrics());
    let mut response = text(StatusCode::OK, unnamed);
    let media = HeaderValue::from_static(METRICS_TYPE);
    response.headers_mut().insert(header::CONTENT_TYPE, media);
    response
}

fn health(source: &dyn HealthSource, _: &Uri) -> Response {
    v1_health(&HealthResponse {
        kek_status: BTreeMap::new(),
        ..source.v1_health()
    })
}

fn text(status: StatusCode, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    response
}

/// The value of a key of the query; `Some("")` for a key alone.
fn value<'q>(query: &'q str, wanted: &str) -> Option<&'q str> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == wanted).then_some(value)
    })
}

fn readyz(source: &dyn HealthSource, uri: &Uri) -> Response {
    let query = uri.query().unwrap_or_default();
    let asked = ReadyQuery {
        slot: value(query, "slot").map(str::to_owned),
        stale_ok: value(query, "stale") == Some("ok"),
    };
    let readiness = source.readiness(&asked);
    let verbose = value(query, "verbose").is_some_and(|value| !matches!(value, "0" | "false"));
    let mut body = String::new();
    for check in readiness.checks.iter().filter(|check| verbose || !check.ok) {
        let mark = if check.ok { '+' } else { '-' };
        // One line a check, whatever a detail holds.
        let detail = check.detail.replace(['\n', '\r'], " ");
        body.push_str(&format!("[{mark}] {}: {detail}\n", check.code));
    }
    body.push_str(if readiness.ready { "ready\n" } else { "not ready\n" });
    let status = if readiness.ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    text(status, body)
}

/// `POST /failpoints?name=N&action=A`: only in builds with feature `failpoints`.
#[cfg(feature = "failpoints")]
fn failpoint(uri: &Uri) -> Result<Response, ApiError> {
    let query = uri.query().unwrap_or_default();
    let given = |key: &str| {
        value(query, key)
            .filter(|value| !value.is_empty())
            .ok_or_else(|| ApiError::new(ErrorCode::InvalidArgument).detail(format!("{key} is missing")))
    };
    let (name, action) = (given("name")?, given("action")?);
    crate::failpoints::arm(name, &unescape(action))
        .map_err(|error| ApiError::new(ErrorCode::InvalidArgument).detail(error))?;
    Ok(text(StatusCode::OK, "ok\n"))
}

/// `GET /debug/state-hash`: only in builds with feature `failpoints`.
#[cfg(feature = "failpoints")]
fn state_hash(source: &dyn HealthSource) -> Response {
    let (index, digest) = source.state_hash();
    text(
        StatusCode::OK,
        format!("{{\"index\":{index},\"digest\":\"{digest:032x}\"}}\n"),
    )
}

/// Actions hold parentheses, arrows and per cents: `50%off`, `1*return(x)->off`.
#[cfg(feature = "failpoints")]
fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, tail)) = rest.split_first() {
        rest = tail;
        let mut decoded = [0_u8; 1];
        match tail.split_at_checked(2) {
            Some((pair, after)) if *byte == b'%' && hex::decode_to_slice(pair, &mut decoded).is_ok() => {
                out.push(decoded[0]);
                rest = after;
            }
            _ => out.push(*byte),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}
