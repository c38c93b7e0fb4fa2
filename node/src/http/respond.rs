//! The outermost layer of every route: request id, guards, identity, the common headers, the
//! body of errors, metrics, the memory that it takes and the lines in the log. Handlers below it only answer the question.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{Extensions, HeaderValue, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hsm_api::{ErrorCode, StateIndex, paths};
use tracing::Level;

use super::access::{Answered, Asked};
use super::caller::{Caller, Seen};
use super::data_plane::Freshness;
use super::drain::Phase;
use super::footprint::PaysItself;
use super::lent::Lent;
use super::min_index::Wanted;
use super::problem::ApiError;
use super::rate_limit::Allowance;
use super::request_id::RequestId;
use super::service::ApiState;
use super::shares::Share;
use super::trace_id::TraceId;
use super::trusted::Via;
use super::{PeerAddr, footprint, guards, min_index, refusals};
use crate::identity::Principal;
use crate::policy::Op;
use crate::{log_budget, metrics};

/// Wraps every route.
pub(super) async fn wrap(State(state): State<ApiState>, mut request: Request, next: Next) -> Response {
    let began = Instant::now();
    let id = RequestId::of(request.headers());
    let endpoint = endpoint(request.uri().path());
    let version = request.version();
    let asked = Asked::of(&request, endpoint);
    let mut counted = None;
    let caller = Caller::of(&mut request);
    let peer = request.extensions().get::<PeerAddr>().map(|peer| peer.0);
    let trace = TraceId::of(request.headers());
    request.extensions_mut().insert(id.clone());
    request.extensions_mut().insert(trace.clone());

    let lent = Lent::of(&mut request);
    let mut index = state.data().index();
    let mut expelled = false;
    let (mut response, mut footprint, place) = match guard(&state, &caller, &request, &mut counted) {
        Ok(Passed { share, place, wanted }) => {
            let answered = async {
                let reached = min_index::reach(&state, caller.principal().ok(), wanted).await?;
                Ok::<_, ApiError>((reached, next.run(request).await))
            };
            let response = match caller.carry_out(answered).await {
                Ok((reached, response)) => {
                    index = reached;
                    response
                }
                Err(error) => {
                    expelled = error.code() == ErrorCode::CertificateRevoked;
                    error.into_response()
                }
            };
            (response, Some(share), place)
        }
        Err(error) => (error.into_response(), None, None),
    };
    if let Some(ServedFrom(newer)) = response.extensions_mut().remove() {
        index = newer;
    }
    let mut error = response.extensions_mut().remove::<ApiError>();
    if error.is_none() {
        error = framework_error(&response);
    }
    if error.is_none()
        && let Some(share) = &mut footprint
    {
        error = footprint::pay(&mut response, share).err();
    }
    let code = error.as_ref().map_or("", |error| error.code().as_str());
    if let Some(error) = error {
        // Of whoever was thrown out in the middle of his request nothing is read any more: he could go on for long.
        let cut = expelled && lent.is_some();
        if let Some(lent) = lent.filter(|_| !expelled) {
            lent.discard().await;
        }
        count(&error, endpoint);
        log(&error, (&id, &trace), endpoint, caller.seen(), peer);
        caller.audit(&error, (&id, &trace), endpoint, peer);
        let allow = response.headers_mut().remove(header::ALLOW);
        response = error.render(&id);
        if cut {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(header::CONNECTION, close);
        }
        if let Some(allow) = allow {
            response.headers_mut().insert(header::ALLOW, allow);
        }
    }
    if let Some(share) = footprint {
        response = footprint::holding(response, (share, place));
    }
    common_headers(&state, &mut response, &id, index, version);
    if let Some(counted) = counted {
        state.tell_limit(&counted, &mut response);
    }
    let client = caller.principal().ok().map(|client| client.cn.as_str());
    let (status, took) = (response.status().as_u16(), began.elapsed());
    metrics::request(endpoint, client, status, took);
    if let Some(asked) = asked {
        asked.record(&Answered {
            id: &id,
            trace: &trace,
            seen: caller.seen(),
            peer,
            status,
            code,
            took,
        });
    }
    tracing::debug!(
        request_id = id.as_str(),
        trace_id = trace.as_str(),
        endpoint,
        status,
        micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
        "request"
    );
    response
}

/// What an answer was made from, where that is known better than from when its request came: a state that it
/// contains at least, or the change that it is about. An extension of answers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ServedFrom(pub(crate) StateIndex);

/// A request that may go on.
struct Passed {
    /// What its memory is taken from.
    share: Share,
    /// Among those in hand, of one that came through a proxy.
    place: Option<Share>,
    /// What it has to wait for first.
    wanted: Option<Wanted>,
}

/// `counted` is the allowance that the request was taken from.
fn guard(
    state: &ApiState,
    caller: &Caller,
    request: &Request,
    counted: &mut Option<Allowance>,
) -> Result<Passed, ApiError> {
    guards::same_origin(request.headers(), request.uri())?;
    if let Some(TurnedAway(error)) = request.extensions().get::<TurnedAway>() {
        return Err(error.clone());
    }
    let principal = caller.principal()?;
    // Before anything is counted: whoever has stolen a certificate would spend what is its successor's.
    state.data().policy().check_certificate(principal)?;
    state.limit(principal, request.uri().path(), counted)?;
    caller.check_way(request.uri().path())?;
    if request.uri().path().starts_with(paths::ADMIN_PREFIX) {
        guards::admin(request.method(), request.headers())?;
    }
    Ok(Passed {
        wanted: min_index::wanted(request.uri(), request.headers())?,
        place: caller.enter()?,
        share: state.footprints().enter(principal, request)?,
    })
}

/// What every request is answered on a connection that has got no place. An extension of such requests.
#[derive(Clone)]
pub(super) struct TurnedAway(pub(super) ApiError);

/// What axum itself refuses (a body it could not read, a path it could not take apart) comes as
/// plain text; callers get one form of error only.
fn framework_error(response: &Response) -> Option<ApiError> {
    let media = response.headers().get(header::CONTENT_TYPE);
    if media.is_some_and(|media| !media.as_bytes().starts_with(b"text/plain")) {
        return None;
    }
    let code = match response.status().as_u16() {
        400 | 422 => ErrorCode::InvalidArgument,
        404 => ErrorCode::NotFound,
        405 => ErrorCode::MethodNotAllowed,
        413 => ErrorCode::BodyTooLarge,
        415 => ErrorCode::UnsupportedMediaType,
        503 => ErrorCode::NotReady,
        500.. => ErrorCode::Internal,
        _ => return None,
    };
    Some(ApiError::new(code))
}

/// The route as a label: one of a fixed few, whatever path was asked for.
fn endpoint(path: &str) -> &'static str {
    match path {
        paths::ENCRYPT => paths::ENCRYPT,
        paths::DECRYPT => paths::DECRYPT,
        paths::REWRAP => paths::REWRAP,
        paths::DATAKEY => paths::DATAKEY,
        paths::HEALTH => paths::HEALTH,
        paths::METRICS => paths::METRICS,
        paths::OPENAPI => paths::OPENAPI,
        path if path.starts_with("/admin/v1/cluster/") => "/admin/v1/cluster",
        path if path.starts_with(paths::KEYS) => paths::KEYS,
        path if path.starts_with(paths::ADMIN_PREFIX) => "/admin/v1",
        _ => "other",
    }
}

fn common_headers(
    state: &ApiState,
    response: &mut Response,
    id: &RequestId,
    index: StateIndex,
    version: Version,
) {
    let index = HeaderValue::try_from(index.to_string()).ok();
    let headers = response.headers_mut();
    let values = [
        (hsm_api::headers::X_REQUEST_ID, id.header_value()),
        (hsm_api::headers::X_HSM_INDEX, index),
        (hsm_api::headers::X_HSM_NODE, state.node_header()),
        ("cache-control", Some(HeaderValue::from_static("no-store"))),
    ];
    for (name, value) in values {
        if let Some(value) = value {
            headers.insert(name, value);
        }
    }
    // HTTP/2 has GOAWAY instead, which the listener sends.
    if version <= Version::HTTP_11 && state.drain().phase() >= Phase::Closing {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
}

/// Counts and logs what one item of a batch is refused for, as if it had come by itself.
pub(super) fn item_refused(
    error: &ApiError,
    request: &Extensions,
    endpoint: &'static str,
    principal: &Principal,
) {
    count(error, endpoint);
    if let (Some(id), Some(trace)) = (request.get::<RequestId>(), request.get::<TraceId>()) {
        let peer = request.get::<PeerAddr>().map(|peer| peer.0);
        let seen = Seen {
            principal: Some(principal),
            via: request.get::<Via>(),
        };
        log(error, (id, trace), endpoint, seen, peer);
        refusals::record(error, (id, trace), endpoint, seen, peer);
    }
}

/// Faults of the data plane are counted by [`data_error`].
fn count(error: &ApiError, endpoint: &'static str) {
    match error.code() {
        ErrorCode::CertificateRevoked => metrics::revocation_failure(),
        ErrorCode::Internal if endpoint.starts_with("/admin/v1") => metrics::error("admin"),
        ErrorCode::ClientCertMissing => metrics::client_cert_refusal("missing"),
        ErrorCode::ClientCertMalformed => metrics::client_cert_refusal("malformed"),
        ErrorCode::ClientCertRefused => metrics::client_cert_refusal("refused"),
        ErrorCode::ClientCertNotTrusted => metrics::client_cert_refusal("not_trusted"),
        ErrorCode::AdminThroughProxy => metrics::client_cert_refusal("admin"),
        code if code.status() == 403 => metrics::acl_failure(),
        _ => {}
    }
}

/// A caller's lines come out of his own budget, and what the service could not answer has another, which no
/// caller's mistakes can spend. A line of a level that is not written costs nothing.
fn log(
    error: &ApiError,
    (id, trace): (&RequestId, &TraceId),
    endpoint: &'static str,
    seen: Seen<'_>,
    peer: Option<SocketAddr>,
) {
    let status = error.status().as_u16();
    let may = match status {
        500 => tracing::enabled!(Level::ERROR) && log_budget::fault(error.code()),
        503 => tracing::enabled!(Level::WARN) && log_budget::fault(error.code()),
        401 | 403 => tracing::enabled!(Level::INFO) && log_budget::refusal(seen.accountable()),
        _ => tracing::enabled!(Level::DEBUG) && log_budget::refusal(seen.accountable()),
    };
    if !may {
        return;
    }
    let who = seen.principal.map(ToString::to_string).unwrap_or_default();
    let proxy = seen.proxy_name();
    let peer = peer.map(|peer| peer.to_string()).unwrap_or_default();
    let reason = error.operator_detail().unwrap_or_default();
    let code = error.code().as_str();
    let (request_id, trace_id, detail) = (id.as_str(), trace.as_str(), error.caller_detail());
    match status {
        500 => tracing::error!(
            request_id,
            trace_id,
            endpoint,
            status,
            code,
            detail,
            reason,
            who,
            proxy,
            peer,
            "request failed"
        ),
        503 => tracing::warn!(
            request_id,
            trace_id,
            endpoint,
            status,
            code,
            detail,
            reason,
            who,
            proxy,
            peer,
            "request not served"
        ),
        401 | 403 => tracing::info!(
            request_id,
            trace_id,
            endpoint,
            status,
            code,
            reason,
            who,
            proxy,
            peer,
            "request refused"
        ),
        _ => tracing::debug!(
            request_id,
            trace_id,
            endpoint,
            status,
            code,
            detail,
            reason,
            who,
            proxy,
            peer,
            "request refused"
        ),
    }
}

/// An error of the data plane: v1 has one text for each route and whatever its token or its keys could not do. It was a
/// 500 there; here its status says whether another attempt is worth it, and its code what is wrong.
pub(super) fn data_error(error: ApiError, op: Op, v1_failed: &'static str) -> ApiError {
    match error.code() {
        ErrorCode::Internal => {
            metrics::error(op.as_str());
            error.v1_text(v1_failed)
        }
        ErrorCode::SlotLocked
        | ErrorCode::SlotFailed
        | ErrorCode::TokenBusy
        | ErrorCode::TokenTimeout
        | ErrorCode::ContextHasNoKey => error.v1_text(v1_failed),
        _ => error,
    }
}

/// Bytes of an answer with what their request holds of the memory for bodies: a connection keeps them after
/// the handler is done, until its client has read them.
struct Held<B> {
    bytes: B,
    _part: Arc<Share>,
}

impl<B: AsRef<[u8]>> AsRef<[u8]> for Held<B> {
    fn as_ref(&self) -> &[u8] {
        self.bytes.as_ref()
    }
}

/// A JSON answer of the data plane, made from a state at least as new as `index`, marked if the node is out of
/// readiness.
pub(super) fn data_answer(
    body: impl AsRef<[u8]> + Send + 'static,
    part: Arc<Share>,
    freshness: Freshness,
    index: StateIndex,
) -> Response {
    let body = Bytes::from_owner(Held {
        bytes: body,
        _part: part,
    });
    let mut response = Response::new(Body::from(body));
    response.extensions_mut().insert(PaysItself);
    response.extensions_mut().insert(ServedFrom(index));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if freshness.degraded {
        headers.insert(hsm_api::headers::X_HSM_STALE, HeaderValue::from_static("true"));
    }
    response
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn no_path_makes_a_label_of_its_own() {
        for (path, label) in [
            ("/encrypt", "/encrypt"),
            ("/encrypt/", "other"),
            ("/rewrap", "/rewrap"),
            ("/datakey", "/datakey"),
            ("/openapi.json", "/openapi.json"),
            ("/admin/v1/keys/exchange-key/rotate", "/admin/v1/keys"),
            ("/admin/v1/cluster/status", "/admin/v1/cluster"),
            ("/admin/v1/whoami", "/admin/v1"),
            ("/%00", "other"),
        ] {
            assert_eq!(endpoint(path), label);
        }
    }
}
