//! Requests that ask for a state at least as new as one their caller has seen.

use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::Request;
use futures_util::stream;
use hsm_api::ErrorCode;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::fake::{FakeNode, principal};
use super::running::{SOON, Setup, small, until};
use super::{Answer, post, send, trading};
use crate::http::ApiState;
use crate::identity::Principal;
use crate::policy::RevocationKey;

/// Longer than any test takes.
const FOREVER: Duration = Duration::from_secs(600);
/// One caller's part of the places, and of those for callers whom the policy does not know.
const OWN_PART: usize = 56;
const STRANGERS_PART: usize = 8;

/// A node whose requests wait until they are answered.
fn patient() -> (FakeNode, ApiState, Router) {
    let node = FakeNode::patient(FOREVER);
    let (state, router) = node.state_and_router(100_000);
    (node, state, router)
}

fn with_min(mut request: Request<Body>, index: &str) -> Request<Body> {
    let value = index.parse().unwrap();
    request.headers_mut().insert("x-hsm-min-index", value);
    request
}

fn encrypt(index: &str) -> Request<Body> {
    let body = json!({"context": "exchange-key", "plaintext": ""});
    with_min(post("/encrypt", &body), index)
}

fn spawn(router: &Router, caller: Principal, request: Request<Body>) -> JoinHandle<Answer> {
    let router = router.clone();
    tokio::spawn(async move { send(&router, Some(&caller), request).await })
}

async fn answered(asked: JoinHandle<Answer>) -> Answer {
    timeout(SOON, asked).await.expect("no answer").unwrap()
}

#[tokio::test]
async fn a_state_that_is_there_is_answered_from_at_once_on_every_route_that_has_one() {
    let (node, _, router) = patient();
    let sealed = super::encrypted(&node, "exchange-key", b"x").await;
    let ciphertext = &sealed["ciphertext"];
    let one = json!({"context": "exchange-key", "plaintext": ""});
    for (path, body) in [
        ("/encrypt", one.clone()),
        ("/encrypt", json!({"batch": [one]})),
        (
            "/decrypt",
            json!({"context": "exchange-key", "ciphertext": ciphertext}),
        ),
        (
            "/rewrap",
            json!({"context": "exchange-key", "ciphertext": ciphertext}),
        ),
        ("/datakey", json!({"context": "exchange-key"})),
    ] {
        for index in ["3.42", "3.0"] {
            let answer = send(&router, Some(&trading()), with_min(post(path, &body), index)).await;
            assert_eq!(answer.response.status(), 200, "{path}: {:?}", answer.code());
            assert_eq!(answer.header("x-hsm-index"), "3.42");
        }
        let too_new = send(&router, Some(&trading()), with_min(post(path, &body), "4.1")).await;
        assert_eq!(too_new.code(), Some(ErrorCode::IndexEpochChanged), "{path}");
    }
}

#[tokio::test]
async fn each_refusal_has_its_code_and_comes_at_once() {
    let (_, state, router) = patient();
    for (index, status, code) in [
        ("42", 400, ErrorCode::InvalidArgument),
        ("3.x", 400, ErrorCode::InvalidArgument),
        ("2.42", 412, ErrorCode::IndexEpochChanged),
        ("4.42", 412, ErrorCode::IndexEpochChanged),
        ("3.10043", 412, ErrorCode::MinIndexTooFar),
    ] {
        let answer = answered(spawn(&router, trading(), encrypt(index))).await;
        assert_eq!(
            (answer.response.status().as_u16(), answer.code()),
            (status, Some(code)),
            "{index}"
        );
        assert_eq!(answer.header("retry-after"), "", "{index}");
        assert_eq!(answer.header("x-hsm-index"), "3.42");
    }
    assert_eq!(state.waiting().count(), 0);
}

#[tokio::test]
async fn a_state_that_does_not_come_is_given_up() {
    let node = FakeNode::new();
    let (state, router) = node.state_and_router(100_000);
    let answer = answered(spawn(&router, trading(), encrypt("3.43"))).await;
    assert_eq!(
        (answer.response.status().as_u16(), answer.code()),
        (412, Some(ErrorCode::MinIndexNotReached))
    );
    assert_eq!(
        (answer.header("retry-after"), answer.header("x-hsm-index")),
        ("1", "3.42")
    );
    assert!(answer.json()["retryable"].as_bool().unwrap());
    assert_eq!(state.waiting().count(), 0);
}

#[tokio::test]
async fn the_entry_that_brings_the_state_wakes_who_waits_and_nothing_before_it() {
    let (node, state, router) = patient();
    let asked = spawn(&router, trading(), encrypt("3.45"));
    until(|| state.waiting().count() == 1).await;
    node.apply(3, 44);
    tokio::task::yield_now().await;
    assert!(!asked.is_finished());
    node.apply(3, 46);
    let answer = answered(asked).await;
    assert_eq!(
        (answer.response.status().as_u16(), answer.header("x-hsm-index")),
        (200, "3.46")
    );
    assert_eq!(state.waiting().count(), 0);
}

#[tokio::test]
async fn who_waits_is_told_when_the_epoch_changes() {
    let (node, state, router) = patient();
    let asked = spawn(&router, trading(), encrypt("3.45"));
    until(|| state.waiting().count() == 1).await;
    node.apply(4, 50);
    let answer = answered(asked).await;
    assert_eq!(answer.code(), Some(ErrorCode::IndexEpochChanged));
}

#[tokio::test]
async fn a_node_that_may_not_answer_lets_nobody_wait() {
    let (node, _, router) = patient();
    for code in [ErrorCode::Stale, ErrorCode::NotReady, ErrorCode::Uninitialised] {
        node.refuse(code);
        for index in ["3.45", "2.45", "3.99999"] {
            let answer = answered(spawn(&router, trading(), encrypt(index))).await;
            assert_eq!(answer.code(), Some(code), "{index}");
        }
    }
}

#[tokio::test]
async fn who_waits_has_sent_no_body_yet() {
    let (_, state, router) = patient();
    let never = stream::pending::<Result<Bytes, std::io::Error>>();
    let endless = Request::post("/encrypt").body(Body::from_stream(never)).unwrap();
    let asked = spawn(&router, trading(), with_min(endless, "3.43"));
    until(|| state.waiting().count() == 1).await;
    assert_eq!(state.bodies().taken(), 0);
    asked.abort();
    until(|| state.waiting().count() == 0).await;
}

#[tokio::test]
async fn who_may_not_come_in_or_comes_too_often_does_not_wait() {
    let node = FakeNode::patient(FOREVER);
    let router = node.limited_router(1);
    let nobody = send(&router, None, encrypt("3.x")).await;
    assert_eq!(nobody.code(), Some(ErrorCode::NoClientCertificate));
    let first = answered(spawn(&router, trading(), encrypt("3.42"))).await;
    assert_eq!(first.response.status(), 200);
    let again = answered(spawn(&router, trading(), encrypt("3.43"))).await;
    assert_eq!(again.code(), Some(ErrorCode::RateLimited));
    node.revoke(RevocationKey::CommonName("trading-2".to_owned()));
    let revoked = principal("trading-2", Some("Trading"));
    let answer = answered(spawn(&router, revoked, encrypt("3.43"))).await;
    assert_eq!(answer.code(), Some(ErrorCode::CertificateRevoked));
}

#[tokio::test]
async fn the_places_are_bounded_for_each_caller_and_for_all() {
    let (node, state, router) = patient();
    let callers: Vec<Principal> = (0..5)
        .map(|n| principal(&format!("trading-{n}"), Some("Trading")))
        .collect();
    let mut waiting = Vec::new();
    for (caller, places) in callers.iter().zip([OWN_PART, OWN_PART, OWN_PART, OWN_PART, 0]) {
        for _ in 0..places {
            waiting.push(spawn(&router, caller.clone(), encrypt("3.43")));
        }
    }
    until(|| state.waiting().count() == 4 * OWN_PART).await;
    for caller in [&callers[0], &callers[4]] {
        let refused = answered(spawn(&router, caller.clone(), encrypt("3.43"))).await;
        assert_eq!(refused.code(), Some(ErrorCode::MinIndexNotReached));
        assert_eq!(refused.header("retry-after"), "1");
        // Only who would have to wait needs a place.
        let served = answered(spawn(&router, caller.clone(), encrypt("3.42"))).await;
        assert_eq!(served.response.status(), 200);
    }
    node.apply(3, 43);
    for asked in waiting {
        assert_eq!(answered(asked).await.response.status(), 200);
    }
    assert_eq!(state.waiting().count(), 0);
}

#[tokio::test]
async fn callers_whom_the_policy_does_not_know_yet_wait_for_the_one_that_knows_them_in_places_of_their_own() {
    let (node, state, router) = patient();
    let stranger = principal("new-1", Some("New"));
    let asked: Vec<_> = (0..STRANGERS_PART)
        .map(|_| spawn(&router, stranger.clone(), encrypt("3.43")))
        .collect();
    until(|| state.waiting().count() == STRANGERS_PART).await;
    let refused = answered(spawn(&router, stranger.clone(), encrypt("3.43"))).await;
    assert_eq!(refused.code(), Some(ErrorCode::MinIndexNotReached));
    let known = spawn(&router, trading(), encrypt("3.43"));
    until(|| state.waiting().count() == STRANGERS_PART + 1).await;
    node.admit("New");
    for asked in asked {
        assert_eq!(answered(asked).await.response.status(), 200);
    }
    assert_eq!(answered(known).await.response.status(), 200);
    // Without the minimum it would have been refused; and whoever is still not known is.
    let other = principal("other-1", Some("Other"));
    let answer = answered(spawn(&router, other, encrypt("3.43"))).await;
    assert_eq!(answer.code(), Some(ErrorCode::UnknownOrganizationalUnit));
}

#[tokio::test]
async fn administrators_wait_too_and_probes_do_not() {
    let (node, state, router) = patient();
    let get = |path: &str| {
        let request = Request::get(path)
            .header("x-hsm-request", "1")
            .body(Body::empty());
        with_min(request.unwrap(), "3.43")
    };
    let whoami = spawn(
        &router,
        principal("op-1", Some("Operator")),
        get("/admin/v1/whoami"),
    );
    until(|| state.waiting().count() == 1).await;
    for path in ["/health", "/metrics", "/openapi.json"] {
        let answer = answered(spawn(&router, trading(), get(path))).await;
        assert_eq!(answer.response.status(), 200, "{path}");
    }
    node.apply(3, 43);
    assert_eq!(answered(whoami).await.response.status(), 200);
}

async fn patiently() -> super::running::Running {
    let mut setup = Setup::new(10);
    setup.min_index_wait = FOREVER;
    setup.start().await
}

#[tokio::test]
async fn whoever_hangs_up_keeps_no_place() {
    let running = patiently().await;
    let waiting = || running.state.waiting().count();
    let mut stream = running.connect(&running.client()).await;
    let request =
        b"POST /encrypt HTTP/1.1\r\nhost: localhost\r\nx-hsm-min-index: 3.43\r\ncontent-length: 2\r\n\r\n{}";
    stream.write_all(request).await.unwrap();
    stream.flush().await.unwrap();
    until(|| waiting() == 1).await;
    drop(stream);
    until(|| waiting() == 0).await;

    let mut client = running.http2(&running.client()).await;
    let asked = client.send(with_min(small(), "3.43"));
    let asked = tokio::spawn(asked);
    until(|| waiting() == 1).await;
    asked.abort();
    until(|| waiting() == 0).await;
    assert_eq!(client.ask(small()).await, 200);
}
