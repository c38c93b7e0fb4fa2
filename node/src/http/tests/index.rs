//! `X-HSM-Index` is in every answer: on every route, and whatever became of the request.

use axum::Router;
use axum::body::Body;
use axum::http::{Method, Request};
use hsm_api::ErrorCode;
use serde_json::json;

use super::fake::{FakeNode, principal};
use super::{send, trading};
use crate::http::respond::TurnedAway;
use crate::http::service::routes;
use crate::http::{ApiError, Routes, router};
use crate::identity::Principal;
use crate::policy::RevocationKey;

/// Methods and paths as they are registered.
fn all() -> Vec<(Method, &'static str)> {
    let admin = crate::admin::routes::registered();
    routes().list().iter().cloned().chain(admin).collect()
}

/// The node's own routes; those of administrators answer by themselves, and what is around them is the node's.
fn whole(node: &FakeNode, burst: u32) -> Router {
    async fn done() -> &'static str {
        "{}"
    }
    let admin =
        crate::admin::routes::registered()
            .into_iter()
            .fold(Routes::default(), |routes, (method, path)| match method {
                Method::POST => routes.post(path, done),
                _ => routes.get(path, done),
            });
    let (state, _) = node.state_and_router(burst);
    router(state, admin.into_router())
}

fn request(method: &Method, path: &str) -> Request<Body> {
    let path = path
        .replace("{context}", "exchange-key")
        .replace("{version}", "1")
        .replace("{slot}", "exchange");
    let body = match *method {
        Method::POST => Body::from(json!({"context": "exchange-key", "plaintext": ""}).to_string()),
        _ => Body::empty(),
    };
    Request::builder()
        .method(method)
        .uri(path)
        .header("x-hsm-request", "1")
        .header("content-type", "application/json")
        .body(body)
        .unwrap()
}

/// The status, of an answer that has the index.
async fn status(router: &Router, caller: Option<&Principal>, request: Request<Body>) -> u16 {
    let asked = format!("{} {}", request.method(), request.uri());
    let answer = send(router, caller, request).await;
    let status = answer.response.status().as_u16();
    assert_eq!(answer.header("x-hsm-index"), "3.42", "{asked}: {status}");
    status
}

#[tokio::test]
async fn every_route_says_from_which_state_it_answers() {
    let router = whole(&FakeNode::new(), 100_000);
    for (method, path) in all() {
        let answered = status(&router, Some(&trading()), request(&method, path)).await;
        // A body that is another route's is refused; whoever is asked answers.
        assert!(matches!(answered, 200 | 400), "{method} {path}: {answered}");
    }
}

#[tokio::test]
async fn every_refusal_says_it_too_on_every_route() {
    let node = FakeNode::new();
    node.revoke(RevocationKey::CommonName("gone".to_owned()));
    let router = whole(&node, 100_000);
    let (gone, trading) = (principal("gone", Some("Trading")), trading());
    for (method, path) in all() {
        let at = format!("{method} {path}");
        let asked = || request(&method, path);
        assert_eq!(status(&router, None, asked()).await, 401, "{at}");
        assert_eq!(status(&router, Some(&gone), asked()).await, 403, "{at}");
        let mut foreign = asked();
        foreign
            .headers_mut()
            .insert("origin", "https://evil".parse().unwrap());
        assert_eq!(status(&router, Some(&trading), foreign).await, 403, "{at}");
        let nowhere = request(&method, &format!("{path}/nowhere"));
        assert_eq!(status(&router, Some(&trading), nowhere).await, 404, "{at}");
        let wrong = request(&Method::DELETE, path);
        assert_eq!(status(&router, Some(&trading), wrong).await, 405, "{at}");
        // On a connection that has got no place.
        let mut turned_away = asked();
        let overloaded = ApiError::new(ErrorCode::Overloaded);
        turned_away.extensions_mut().insert(TurnedAway(overloaded));
        assert_eq!(status(&router, Some(&trading), turned_away).await, 503, "{at}");
    }
}

/// Probes have an allowance of their own, of a hundred at once.
#[tokio::test]
async fn whoever_asks_too_much_is_told_it_on_every_route() {
    let router = whole(&FakeNode::new(), 1);
    for (number, (method, path)) in all().into_iter().enumerate() {
        let caller = principal(&format!("app-{number}"), Some("Trading"));
        let mut last = 0;
        for _ in 0..1000 {
            last = status(&router, Some(&caller), request(&method, path)).await;
            if last == 429 {
                break;
            }
        }
        assert_eq!(last, 429, "{method} {path}");
    }
}

/// What the data plane alone is refused for.
#[tokio::test]
async fn a_node_that_may_not_answer_says_it_too() {
    let node = FakeNode::new();
    node.refuse(ErrorCode::Stale);
    let router = whole(&node, 100_000);
    for path in ["/encrypt", "/decrypt", "/rewrap", "/datakey"] {
        let answered = status(&router, Some(&trading()), request(&Method::POST, path)).await;
        assert_eq!(answered, 503, "{path}");
    }
}
