//! What is refused before it costs memory, and who pays for what: over the routes, without a socket.

use axum::body::{Body, Bytes};
use axum::http::{Request, Version};
use futures_util::FutureExt;
use hsm_api::ErrorCode;
use http_body_util::BodyExt;
use serde_json::json;
use tower::ServiceExt;

use super::fake::{FakeNode, Trouble, principal};
use super::{post, send, trading};

fn never(path: &str) -> Request<Body> {
    let nothing = futures_util::stream::pending::<Result<Bytes, std::io::Error>>();
    // In HTTP/1 what is still being sent is read away first.
    let request = Request::post(path).version(Version::HTTP_2);
    request.body(Body::from_stream(nothing)).unwrap()
}

#[tokio::test]
async fn whoever_may_use_nothing_is_answered_before_the_body_has_come() {
    let router = FakeNode::new().router();
    for path in ["/encrypt", "/decrypt", "/rewrap", "/datakey"] {
        for (ou, code) in [
            (None, ErrorCode::NoOrganizationalUnit),
            (Some("Nobody"), ErrorCode::UnknownOrganizationalUnit),
        ] {
            let caller = principal("x", ou);
            let answer = send(&router, Some(&caller), never(path)).now_or_never();
            let answer = answer.expect("it waits for the body");
            assert_eq!(answer.code(), Some(code));
            assert_eq!(answer.json()["error"], code.v1_text());
        }
        let waiting = send(&router, Some(&trading()), never(path)).now_or_never();
        assert!(waiting.is_none());
    }
}

#[tokio::test]
async fn requests_of_every_route_are_counted_once() {
    let node = FakeNode::new();
    let router = node.limited_router(3);
    let get = |path: &str| {
        let request = Request::get(path).header("x-hsm-request", "1");
        request.body(Body::empty()).unwrap()
    };
    let body = json!({"context": "exchange-key", "plaintext": ""});
    let calls = || [get("/admin/v1/whoami"), post("/encrypt", &body), get("/nowhere")];
    for (request, status) in calls().into_iter().zip([200, 200, 404]) {
        let answer = send(&router, Some(&trading()), request).await;
        assert_eq!(answer.response.status(), status);
    }
    for request in calls() {
        let answer = send(&router, Some(&trading()), request).await;
        assert_eq!(answer.code(), Some(ErrorCode::RateLimited));
    }
    let other = principal("trading-2", Some("Trading"));
    let answer = send(&router, Some(&other), get("/admin/v1/whoami")).await;
    assert_eq!(answer.response.status(), 200);
    // What watches an application shows its certificate.
    let mut served = 0;
    for path in ["/health", "/metrics"].into_iter().cycle().take(200) {
        let answer = send(&router, Some(&trading()), get(path)).await;
        match answer.code() {
            None => served += 1,
            code => assert_eq!(code, Some(ErrorCode::RateLimited)),
        }
    }
    assert!((100..200).contains(&served), "{served}");
}

/// `RateLimit-Limit`, `-Remaining`, `-Reset` and `-Policy`.
fn limits_of(answer: &super::Answer) -> [String; 4] {
    ["limit", "remaining", "reset", "policy"]
        .map(|name| answer.header(&format!("ratelimit-{name}")).to_owned())
}

#[tokio::test]
async fn whatever_was_counted_says_what_is_left() {
    let node = FakeNode::new();
    let router = node.limited_router(4);
    let get = |path: &str| Request::get(path).body(Body::empty()).unwrap();
    let encrypt = |context: &str| post("/encrypt", &json!({"context": context, "plaintext": ""}));
    let policy = "1;w=1;burst=4";
    for (request, status, remaining, reset) in [
        (encrypt("exchange-key"), 200, "3", "1"),
        (encrypt("no-such"), 403, "2", "2"),
        (get("/nowhere"), 404, "1", "3"),
        (get("/admin/v1/whoami"), 403, "0", "4"),
        // Now the time at which to come back.
        (encrypt("exchange-key"), 429, "0", "1"),
    ] {
        let answer = send(&router, Some(&trading()), request).await;
        assert_eq!(answer.response.status(), status);
        assert_eq!(limits_of(&answer), ["4", remaining, reset, policy], "{status}");
    }
    // These have an allowance of their own, or were refused before anybody counted.
    let answer = send(&router, Some(&trading()), get("/health")).await;
    assert_eq!(limits_of(&answer), [""; 4]);
    let answer = send(&router, None, encrypt("exchange-key")).await;
    assert_eq!(limits_of(&answer), [""; 4]);
}

#[tokio::test]
async fn an_unread_answer_of_any_route_holds_memory_of_its_principal() {
    let (state, router) = FakeNode::new().state_and_router(100_000);
    for path in ["/health", "/nowhere"] {
        let mut request = Request::get(path).body(Body::empty()).unwrap();
        request.extensions_mut().insert(trading());
        let response = router.clone().oneshot(request).await.unwrap();
        assert!(state.footprints().taken() > 4096, "{path}");
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        assert!(!bytes.is_empty());
        drop(bytes);
        assert_eq!(state.footprints().taken(), 0, "{path}");
    }
}

#[tokio::test]
async fn an_answer_holds_its_part_of_the_memory_until_it_is_gone() {
    let node = FakeNode::new();
    let (state, router) = node.state_and_router(100_000);
    let body = json!({"context": "exchange-key", "plaintext": "YQ=="});
    let mut request = post("/encrypt", &body);
    request.extensions_mut().insert(trading());
    let response = router.oneshot(request).await.unwrap();
    let taken = body.to_string().len();
    assert_eq!(state.bodies().taken(), taken);
    // HTTP/2 keeps the bytes when the body itself is gone.
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(state.bodies().taken(), taken);
    drop(bytes);
    assert_eq!(state.bodies().taken(), 0);
}

#[tokio::test]
async fn a_job_that_nobody_waits_for_holds_its_part_until_it_is_done() {
    let node = FakeNode::new();
    let (state, router) = node.state_and_router(100_000);
    node.token.trouble(Some(Trouble::Hangs));
    for path in ["/encrypt", "/decrypt", "/rewrap"] {
        let v1 = super::fake::v1_ciphertext("exchange-key", "Trading", b"old");
        let body = json!({
            "context": "exchange-key",
            "plaintext": "YQ==",
            "ciphertext": base64::Engine::encode(&base64::engine::general_purpose::STANDARD, v1),
            "key_id": "kek-exchange-key-v1",
        });
        let answer = send(&router, Some(&trading()), post(path, &body)).await;
        assert_eq!(answer.code(), Some(ErrorCode::TokenTimeout));
        assert_eq!(state.bodies().taken(), body.to_string().len(), "{path}");
        node.token.give_up();
        assert_eq!(state.bodies().taken(), 0, "{path}");
    }
}
