//! The health listener's few routes, as a function from request to answer. Nobody shows a certificate
//! here, so no answer names a key or a context; on the API, v1's two documents do.

use std::collections::BTreeMap;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::Response;
use hsm_api::data::HealthResponse;
use hsm_api::{ErrorCode, paths};

use super::{HealthSource, ReadyQuery};
use crate::http::{ApiError, METRICS_TYPE, RequestId, guards, v1_health};
use crate::metrics::without_names;

/// Answers one request, which ends its connection. Bodies are not read: no route needs one.
pub(super) fn answer(source: &dyn HealthSource, method: &Method, uri: &Uri, headers: &HeaderMap) -> Response {
    let mut response = match route(source, method, uri, headers) {
        Ok(response) => response,
        Err(error) => error.render(&RequestId::of(headers)),
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
    let reads = matches!(*method, Method::GET | Method::HEAD);
    match uri.path() {
        #[cfg(feature = "failpoints")]
        paths::FAILPOINTS if *method == Method::POST => failpoint(uri),
        paths::LIVEZ | paths::READYZ | paths::METRICS | paths::HEALTH if !reads => {
            Err(ApiError::new(ErrorCode::MethodNotAllowed).v1_text("only GET allowed"))
        }
        paths::LIVEZ => Ok(text(StatusCode::OK, "ok\n")),
        paths::READYZ => Ok(readyz(source, uri.query().unwrap_or_default())),
        paths::METRICS => {
            let unnamed = without_names(&source.render_metrics());
            let mut response = text(StatusCode::OK, unnamed);
            response
                .headers_mut()
                .insert(header::CONTENT_TYPE, HeaderValue::from_static(METRICS_TYPE));
            Ok(response)
        }
        paths::HEALTH => Ok(v1_health(&HealthResponse {
            kek_status: BTreeMap::new(),
            ..source.v1_health()
        })),
        _ => Err(ApiError::new(ErrorCode::NotFound)),
    }
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

fn readyz(source: &dyn HealthSource, query: &str) -> Response {
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
