//! The routes as a client sees them, with a node and a token that live in memory.

mod batches;
mod ends;
pub(super) mod fake;
mod http2;
mod index;
mod invocations;
mod limits;
mod listener;
mod log_lines;
mod min_index;
mod moved;
mod openapi;
mod proxied;
mod proxied_http2;
mod rewraps;
mod running;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hsm_api::{ErrorCode, Problem};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

use self::fake::{FakeNode, principal};
use super::*;
use crate::identity::Principal;
use crate::policy::RevocationKey;

struct Answer {
    response: Response<()>,
    body: Vec<u8>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn code(&self) -> Option<ErrorCode> {
        serde_json::from_slice::<Problem>(&self.body)
            .ok()
            .and_then(|p| p.error_code())
    }

    fn header(&self, name: &str) -> &str {
        self.response
            .headers()
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }
}

async fn send(router: &Router, caller: Option<&Principal>, mut request: Request<Body>) -> Answer {
    if let Some(caller) = caller {
        request.extensions_mut().insert(caller.clone());
    }
    let response = router.clone().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes().to_vec();
    Answer {
        response: Response::from_parts(parts, ()),
        body,
    }
}

fn post(path: &str, body: &Value) -> Request<Body> {
    Request::post(path).body(Body::from(body.to_string())).unwrap()
}

async fn ask(node: &FakeNode, caller: &Principal, path: &str, body: Value) -> Answer {
    send(&node.router(), Some(caller), post(path, &body)).await
}

fn trading() -> Principal {
    principal("trading-1", Some("Trading"))
}

async fn encrypted(node: &FakeNode, context: &str, plaintext: &[u8]) -> Value {
    let body = json!({"context": context, "plaintext": STANDARD.encode(plaintext)});
    let answer = ask(node, &trading(), "/encrypt", body).await;
    assert_eq!(answer.response.status(), 200, "{:?}", answer.code());
    answer.json()
}

#[tokio::test]
async fn what_is_encrypted_decrypts() {
    let node = FakeNode::new();
    for plaintext in [&b""[..], b"x", &[7; 65_536]] {
        let answer = encrypted(&node, "exchange-key", plaintext).await;
        assert_eq!(answer["key_id"], "kek-exchange-key-v2");
        assert_eq!(answer["key_version"], 2);
        let question = json!({"context": "exchange-key", "ciphertext": answer["ciphertext"]});
        let opened = ask(&node, &trading(), "/decrypt", question).await;
        assert_eq!(opened.response.status(), 200);
        let text = opened.json()["plaintext"].as_str().unwrap().to_owned();
        assert_eq!(STANDARD.decode(text).unwrap(), plaintext);
    }
}

#[tokio::test]
async fn every_answer_has_the_common_headers() {
    let node = FakeNode::new();
    let body = json!({"context": "exchange-key", "plaintext": ""});
    let answer = ask(&node, &trading(), "/encrypt", body).await;
    assert_eq!(answer.header("content-type"), "application/json");
    assert_eq!(answer.header("x-hsm-node"), "hsm-node-1");
    assert_eq!(answer.header("x-hsm-index"), "3.42");
    assert_eq!(answer.header("x-request-id").len(), 26);
    assert_eq!(answer.header("x-hsm-stale"), "");
    let missing = ask(&node, &trading(), "/nowhere", json!({})).await;
    assert_eq!(
        (missing.response.status(), missing.code()),
        (StatusCode::NOT_FOUND, Some(ErrorCode::NotFound))
    );
    assert_eq!(missing.header("x-hsm-index"), "3.42");
    assert_eq!(missing.json()["request_id"], missing.header("x-request-id"));
}

#[tokio::test]
async fn bad_input_gets_its_code() {
    let node = FakeNode::new();
    let good = encrypted(&node, "exchange-key", b"secret").await;
    let good = good["ciphertext"].as_str().unwrap();
    let order = encrypted(&node, "order-key", b"secret").await;
    let of_other_context = order["ciphertext"].as_str().unwrap();
    let v1 = STANDARD.encode([7_u8; 40]);
    let decrypt = |ciphertext: &str| json!({"context": "exchange-key", "ciphertext": ciphertext});
    for (path, body, code) in [
        (
            "/encrypt",
            json!({"context": "2fa", "plaintext": ""}),
            ErrorCode::AccessDenied,
        ),
        (
            "/encrypt",
            json!({"context": "no-such", "plaintext": ""}),
            ErrorCode::AccessDenied,
        ),
        ("/encrypt", json!({"plaintext": ""}), ErrorCode::AccessDenied),
        (
            "/encrypt",
            json!({"context": "empty-key", "plaintext": ""}),
            ErrorCode::ContextHasNoKey,
        ),
        (
            "/encrypt",
            json!({"context": "exchange-key", "plaintext": "?"}),
            ErrorCode::InvalidBase64Plaintext,
        ),
        (
            "/encrypt",
            json!({"context": "exchange-key", "aad": "?"}),
            ErrorCode::InvalidBase64Aad,
        ),
        ("/encrypt", json!([]), ErrorCode::InvalidJson),
        ("/decrypt", decrypt("?"), ErrorCode::InvalidBase64Ciphertext),
        ("/decrypt", decrypt("YWJj"), ErrorCode::CiphertextTooShort),
        ("/decrypt", decrypt(&v1), ErrorCode::UnknownKeyVersion),
        ("/decrypt", decrypt(of_other_context), ErrorCode::WrongContext),
        (
            "/decrypt",
            json!({"context": "exchange-key", "ciphertext": good, "key_id": "kek-exchange-key-v1"}),
            ErrorCode::KeyIdMismatch,
        ),
        (
            "/decrypt",
            json!({"context": "exchange-key", "ciphertext": good, "aad": "YQ=="}),
            ErrorCode::AuthenticationFailed,
        ),
        (
            "/decrypt",
            json!({"context": "exchange-key", "ciphertext": v1, "key_id": "kek-exchange-key-v1", "aad": "YQ=="}),
            ErrorCode::AuthenticationFailed,
        ),
    ] {
        let answer = ask(&node, &trading(), path, body.clone()).await;
        assert_eq!(answer.code(), Some(code), "{path} {body}");
        assert_eq!(answer.response.status().as_u16(), code.status(), "{path} {body}");
        assert_eq!(answer.header("content-type"), "application/problem+json");
        let text = match code {
            // Not the caller's fault: in v1 that was a failed encryption.
            ErrorCode::ContextHasNoKey => "encryption failed",
            code => code.v1_text(),
        };
        assert_eq!(answer.json()["error"], text);
    }
}

#[tokio::test]
async fn any_flipped_bit_is_the_callers_fault() {
    let node = FakeNode::new();
    let good = encrypted(&node, "exchange-key", b"x").await;
    let good = STANDARD.decode(good["ciphertext"].as_str().unwrap()).unwrap();
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        for key_id in ["", "kek-exchange-key-v2"] {
            let body = json!({
                "context": "exchange-key", "ciphertext": STANDARD.encode(&bad), "key_id": key_id,
            });
            let answer = ask(&node, &trading(), "/decrypt", body).await;
            let status = answer.response.status();
            assert_eq!(status, 400, "bit {bit} {key_id:?}: {:?}", answer.code());
        }
    }
}

#[tokio::test]
async fn a_v1_ciphertext_opens_with_its_key_id() {
    let node = FakeNode::new();
    let body = json!({
        "Context": "exchange-key",
        "ciphertext": STANDARD.encode(fake::v1_ciphertext("exchange-key", "Trading", b"old")),
        "key_id": "kek-exchange-key-v1",
        "unknown": 1,
    });
    let answer = ask(&node, &trading(), "/decrypt", body).await;
    assert_eq!(answer.json(), json!({"plaintext": "b2xk"}));
}

#[tokio::test]
async fn callers_are_told_apart_as_in_v1() {
    let node = FakeNode::new();
    node.revoke(RevocationKey::CommonName("gone".to_owned()));
    let body = json!({"context": "exchange-key", "plaintext": ""});
    for (caller, code) in [
        (principal("gone", Some("Trading")), ErrorCode::CertificateRevoked),
        (principal("x", None), ErrorCode::NoOrganizationalUnit),
        (
            principal("x", Some("Nobody")),
            ErrorCode::UnknownOrganizationalUnit,
        ),
        (principal("x", Some("2FA")), ErrorCode::AccessDenied),
    ] {
        let answer = ask(&node, &caller, "/encrypt", body.clone()).await;
        assert_eq!(answer.code(), Some(code));
        assert_eq!(answer.json()["error"], code.v1_text());
    }
    let answer = send(&node.router(), None, post("/encrypt", &body)).await;
    assert_eq!(answer.code(), Some(ErrorCode::NoClientCertificate));
}

#[tokio::test]
async fn a_foreign_context_and_an_unknown_one_get_the_same_body() {
    let node = FakeNode::new();
    let mut bodies = Vec::new();
    for context in ["2fa", "no-such"] {
        let request = Request::post("/encrypt")
            .header("x-request-id", "same")
            .body(Body::from(json!({"context": context}).to_string()))
            .unwrap();
        bodies.push(send(&node.router(), Some(&trading()), request).await.body);
    }
    assert_eq!(bodies[0], bodies[1]);
}

/// `2fa` has key 4 in version 1 and is not this caller's.
#[tokio::test]
async fn a_key_of_a_foreign_context_and_one_that_nobody_has_get_the_same_answer() {
    let node = FakeNode::new();
    let v1 = STANDARD.encode([7_u8; 40]);
    let envelope = |uid: u8, version: u32| STANDARD.encode(fake::envelope_of_key(uid, version));
    for (foreign, nobodys) in [
        ((v1.clone(), "kek-2fa-v1"), (v1.clone(), "kek-2fa-v2")),
        ((envelope(4, 1), ""), (envelope(9, 1), "")),
        // Above the highest version of the context that is asked for: the leader has to be.
        ((envelope(4, 7), ""), (envelope(9, 7), "")),
    ] {
        let mut answers = Vec::new();
        for (ciphertext, key_id) in [foreign, nobodys] {
            let body = json!({"context": "exchange-key", "ciphertext": ciphertext, "key_id": key_id});
            let request = Request::post("/decrypt")
                .header("x-request-id", "same")
                .body(Body::from(body.to_string()))
                .unwrap();
            let answer = send(&node.router(), Some(&trading()), request).await;
            assert_eq!(answer.code(), Some(ErrorCode::UnknownKeyVersion), "{body}");
            let headers = answer.response.headers().clone();
            answers.push((answer.response.status(), headers, answer.body));
        }
        assert_eq!(answers[0], answers[1]);
    }
}

#[tokio::test]
async fn a_wrong_method_a_foreign_page_and_a_large_body_are_refused() {
    let node = FakeNode::new();
    let router = node.router();
    let request = Request::get("/encrypt").body(Body::empty()).unwrap();
    let answer = send(&router, Some(&trading()), request).await;
    assert_eq!(answer.code(), Some(ErrorCode::MethodNotAllowed));
    assert_eq!(answer.json()["error"], "only POST allowed");
    assert_eq!(answer.header("allow"), "POST");

    let request = Request::post("/encrypt")
        .header("origin", "https://evil")
        .body(Body::empty())
        .unwrap();
    assert_eq!(
        send(&router, Some(&trading()), request).await.code(),
        Some(ErrorCode::ForeignOrigin)
    );

    let request = Request::post("/encrypt")
        .body(Body::from(vec![b'x'; 5 << 20]))
        .unwrap();
    assert_eq!(
        send(&router, Some(&trading()), request).await.code(),
        Some(ErrorCode::BodyTooLarge)
    );
}

#[tokio::test]
async fn admin_routes_are_guarded_and_see_who_calls() {
    let node = FakeNode::new();
    let router = node.router();
    let request = Request::get("/admin/v1/whoami").body(Body::empty()).unwrap();
    let answer = send(&router, Some(&trading()), request).await;
    assert_eq!(answer.code(), Some(ErrorCode::RequestHeaderMissing));
    let request = Request::get("/admin/v1/whoami")
        .header("x-hsm-request", "1")
        .header("x-request-id", "r-7")
        .body(Body::empty())
        .unwrap();
    let answer = send(&router, Some(&trading()), request).await;
    assert_eq!(answer.body, b"trading-1 r-7");
}

#[tokio::test]
async fn too_many_requests_are_told_to_wait() {
    let node = FakeNode::new();
    let router = node.limited_router(2);
    let body = json!({"context": "exchange-key", "plaintext": ""});
    let mut last = None;
    for _ in 0..3 {
        last = Some(send(&router, Some(&trading()), post("/encrypt", &body)).await);
    }
    let last = last.unwrap();
    assert_eq!(last.code(), Some(ErrorCode::RateLimited));
    assert_eq!(last.header("retry-after"), "1");
}

#[tokio::test]
async fn the_nodes_own_troubles_have_their_codes() {
    let node = FakeNode::new();
    let question = || json!({"context": "exchange-key", "plaintext": ""});
    for (trouble, code) in [
        (fake::Trouble::Locked, ErrorCode::SlotLocked),
        (fake::Trouble::Failed, ErrorCode::SlotFailed),
        (fake::Trouble::QueueFull, ErrorCode::Overloaded),
        (fake::Trouble::Hangs, ErrorCode::TokenTimeout),
        (fake::Trouble::Gone, ErrorCode::SlotFailed),
    ] {
        node.token.trouble(Some(trouble));
        let answer = ask(&node, &trading(), "/encrypt", question()).await;
        assert_eq!(answer.code(), Some(code));
        // Version 1 had a token and no queue.
        let text = match code {
            ErrorCode::Overloaded => "overloaded",
            _ => "encryption failed",
        };
        assert_eq!(answer.json()["error"], text, "{code}");
    }
    node.token.trouble(None);
    node.stale(true);
    assert_eq!(
        ask(&node, &trading(), "/encrypt", question())
            .await
            .header("x-hsm-stale"),
        "true"
    );
    node.refuse(ErrorCode::Stale);
    let answer = ask(&node, &trading(), "/encrypt", question()).await;
    assert_eq!(
        (answer.code(), answer.response.status().as_u16()),
        (Some(ErrorCode::Stale), 503)
    );
}

#[tokio::test]
async fn a_version_from_the_future_is_asked_for() {
    let node = FakeNode::new();
    let ciphertext = STANDARD.encode(fake::envelope_of_unknown_key(9));
    let body = || json!({"context": "exchange-key", "ciphertext": ciphertext});
    for (answer, code) in [
        (AboveKnown::OnItsWay, ErrorCode::KeyVersionNotReady),
        (AboveKnown::Unknown, ErrorCode::UnknownKeyVersion),
        (AboveKnown::NoQuorum, ErrorCode::NoQuorum),
        (AboveKnown::Busy, ErrorCode::Overloaded),
    ] {
        node.above_known(answer);
        assert_eq!(
            ask(&node, &trading(), "/decrypt", body()).await.code(),
            Some(code)
        );
    }
}

/// A token's calls are counted where it is called: on the slot's threads, of which there are none here.
#[tokio::test]
async fn every_outcome_under_a_known_context_is_counted_and_no_token_call() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let _counted_here = ::metrics::set_default_local_recorder(&recorder);
    let node = FakeNode::new();
    let sealed = encrypted(&node, "exchange-key", b"x").await;
    let moved = encrypted(&node, "order-key", b"x").await;
    let v1 = STANDARD.encode([7_u8; 40]);
    for ciphertext in [
        &sealed["ciphertext"],
        &moved["ciphertext"],
        &json!("YWJj"),
        &json!(v1),
    ] {
        let body = json!({"context": "exchange-key", "ciphertext": ciphertext});
        ask(&node, &trading(), "/decrypt", body).await;
    }
    node.token.trouble(Some(fake::Trouble::Locked));
    let body = json!({"context": "exchange-key", "plaintext": ""});
    ask(&node, &trading(), "/encrypt", body).await;
    let handle = recorder.handle();
    handle.run_upkeep();
    let text = handle.render();
    for line in [
        "hsm_decrypt_operations_total{context=\"exchange-key\",status=\"success\"} 1",
        "hsm_decrypt_operations_total{context=\"exchange-key\",status=\"error\"} 3",
        "hsm_encrypt_operations_total{context=\"exchange-key\",status=\"success\"} 1",
        "hsm_encrypt_operations_total{context=\"exchange-key\",status=\"error\"} 1",
        "hsm_slot_job_duration_seconds_count{slot=\"exchange\",operation=\"decrypt\"} 1",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    assert!(!text.contains("hsm_token_call"), "{text}");
}

#[tokio::test]
async fn draining_closes_http1_connections_with_their_answers() {
    let node = FakeNode::new();
    let body = json!({"context": "exchange-key", "plaintext": ""});
    node.drain.advance(Phase::Notice);
    let answer = ask(&node, &trading(), "/encrypt", body.clone()).await;
    assert_eq!(
        (answer.response.status().as_u16(), answer.header("connection")),
        (200, "")
    );
    node.drain.advance(Phase::Closing);
    let answer = ask(&node, &trading(), "/encrypt", body).await;
    assert_eq!(
        (answer.response.status().as_u16(), answer.header("connection")),
        (200, "close")
    );
}

/// The fake cluster has given the role metrics to somebody.
#[tokio::test]
async fn only_who_watches_reads_whose_contexts_there_are() {
    let node = FakeNode::new();
    for (unit, named) in [("Trading", false), ("Watch", true), ("Operator", true)] {
        let caller = principal("x", Some(unit));
        let get = |path: &str| Request::get(path).body(Body::empty()).unwrap();
        let metrics = send(&node.router(), Some(&caller), get("/metrics")).await;
        let text = String::from_utf8(metrics.body).unwrap();
        assert_eq!(text.contains("2fa"), named, "{unit}: {text}");
        assert!(text.contains("status=\"success\"} 3"), "{unit}: {text}");
        let health = send(&node.router(), Some(&caller), get("/health")).await;
        assert_eq!(health.response.status(), StatusCode::OK);
        let keys = health.json()["kek_status"].as_object().map(serde_json::Map::len);
        assert_eq!(keys, Some(usize::from(named)), "{unit}");
    }
}
