//! What requests take of memory besides their bodies: heads, and answers whose clients have not read them yet.
//! Every request pays for that out of its principal's part, so that one that asks and does not read is refused
//! before it fills the node.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::response::Response;
use hsm_api::{ErrorCode, paths};
use hyper::body::{Frame, SizeHint};

use super::problem::ApiError;
use super::shares::{Full, Share, Shares};
use crate::identity::Principal;

/// Over all connections.
const BUDGET: usize = 256 << 20;
/// One principal gets this part of it at most.
const PRINCIPALS_PART: usize = 8;
/// Of administrators' calls, which applications cannot fill.
const ADMIN_BUDGET: usize = 32 << 20;
/// A request in hand, apart from the text of its head: its task, its stream, the head of its answer.
const REQUEST: usize = 4 << 10;
/// A header, apart from its text.
const HEADER: usize = 64;

/// See the module.
pub(super) struct Footprints {
    data: Arc<Shares>,
    admin: Arc<Shares>,
}

/// Of an answer that pays for its bytes itself.
#[derive(Clone)]
pub(super) struct PaysItself;

impl Footprints {
    pub(super) fn new() -> Self {
        Self::with(BUDGET, ADMIN_BUDGET)
    }

    fn with(data: usize, admin: usize) -> Self {
        Self {
            data: Shares::new(data, data / PRINCIPALS_PART),
            admin: Shares::new(admin, admin / PRINCIPALS_PART),
        }
    }

    /// A request's own memory.
    pub(super) fn enter(&self, principal: &Principal, request: &Request) -> Result<Share, ApiError> {
        let is_admin = request.uri().path().starts_with(paths::ADMIN_PREFIX);
        let shares = if is_admin { &self.admin } else { &self.data };
        let mut share = shares.open(principal);
        share.take(REQUEST + head(request)).map_err(overloaded)?;
        Ok(share)
    }

    #[cfg(test)]
    pub(super) fn taken(&self) -> usize {
        self.data.taken().0 + self.admin.taken().0
    }
}

fn head(request: &Request) -> usize {
    let uri = request.uri();
    let headers = request.headers().iter();
    let headers = headers.map(|(name, value)| HEADER + name.as_str().len() + value.len());
    uri.path().len() + uri.query().map_or(0, str::len) + headers.sum::<usize>()
}

/// Takes memory for an answer, unless it has its own.
pub(super) fn pay(response: &mut Response, share: &mut Share) -> Result<(), ApiError> {
    if response.extensions_mut().remove::<PaysItself>().is_some() {
        return Ok(());
    }
    let size = response.body().size_hint();
    let bytes = size.upper().unwrap_or(size.lower());
    share
        .take(usize::try_from(bytes).unwrap_or(usize::MAX))
        .map_err(overloaded)
}

/// Until its last byte is gone, an answer holds what its request has taken: memory, and a place among those in hand. A
/// connection keeps the bytes when the body itself is gone.
pub(super) fn holding(response: Response, (memory, place): (Share, Option<Share>)) -> Response {
    response.map(|body| {
        Body::new(Holding {
            body,
            taken: Arc::new(Taken {
                _memory: memory,
                _place: place,
            }),
        })
    })
}

struct Taken {
    _memory: Share,
    _place: Option<Share>,
}

struct Holding {
    body: Body,
    taken: Arc<Taken>,
}

impl HttpBody for Holding {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self.get_mut();
        let taken = &this.taken;
        Pin::new(&mut this.body).poll_frame(cx).map_ok(|frame| {
            frame.map_data(|bytes| {
                Bytes::from_owner(Held {
                    bytes,
                    _taken: Arc::clone(taken),
                })
            })
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

struct Held {
    bytes: Bytes,
    _taken: Arc<Taken>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

fn overloaded(full: Full) -> ApiError {
    let error = ApiError::new(ErrorCode::Overloaded);
    match full {
        Full::Everybody => error.operator("too many requests and unread answers in memory"),
        Full::Principal => error
            .detail("this client's requests and unread answers fill its part of the memory for them")
            .operator("one principal's requests and unread answers fill its part of the memory for them"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;
    use crate::http::tests::fake::principal;

    fn request(path: &str) -> Request {
        axum::http::Request::get(path)
            .header("x", "value")
            .body(Body::empty())
            .unwrap()
    }

    #[test]
    fn a_head_is_paid_for_by_its_length() {
        assert_eq!(head(&request("/health?x=y")), 7 + 3 + HEADER + 1 + 5);
    }

    #[tokio::test]
    async fn an_unread_answer_holds_what_its_request_has_taken() {
        let footprints = Footprints::with(1 << 20, 1 << 20);
        let mut share = footprints
            .enter(&principal("a", None), &request("/health"))
            .unwrap();
        let mut response = Response::new(Body::from("12345"));
        pay(&mut response, &mut share).unwrap();
        let response = holding(response, (share, None));
        let taken = REQUEST + head(&request("/health")) + 5;
        assert_eq!(footprints.taken(), taken);
        assert_eq!(response.body().size_hint().exact(), Some(5));
        // HTTP/2 keeps the bytes when the body itself is gone.
        let frame = response.into_body().frame().await.unwrap().unwrap();
        let bytes = frame.into_data().ok().unwrap();
        assert_eq!((&bytes[..], footprints.taken()), (&b"12345"[..], taken));
        drop(bytes);
        assert_eq!(footprints.taken(), 0);
    }

    #[test]
    fn a_principal_with_unread_answers_is_refused_and_others_and_administrators_are_not() {
        let footprints = Footprints::with(16 * REQUEST, 16 * REQUEST);
        let (a, b) = (principal("a", None), principal("b", None));
        let refused = |who: &Principal, path: &str| footprints.enter(who, &request(path)).err();
        let held = footprints.enter(&a, &request("/health")).unwrap();
        let code = refused(&a, "/health").map(|error| error.code());
        assert_eq!(code, Some(ErrorCode::Overloaded));
        assert!(refused(&b, "/health").is_none());
        assert!(refused(&a, "/admin/v1/whoami").is_none());
        let mut share = held;
        let mut large = Response::new(Body::from(vec![0; 2 * REQUEST]));
        assert!(pay(&mut large, &mut share).is_err());
        large.extensions_mut().insert(PaysItself);
        assert!(pay(&mut large, &mut share).is_ok());
    }
}
