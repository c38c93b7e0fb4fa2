//! The accept loop asked in HTTP/2.

use std::sync::Arc;
use std::time::Duration;

use axum::http::{Version, header};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::running::{AT_ONCE, SOON, Setup, encrypt, endless, later, small, until};
use crate::policy::RevocationKey;

/// Long enough for what must not happen.
const A_WHILE: Duration = Duration::from_millis(300);

#[tokio::test]
async fn a_plaintext_is_encrypted_over_http2() {
    let running = Setup::new(10).start().await;
    let mut client = running.http2(&running.client()).await;
    for _ in 0..3 {
        let answer = timeout(SOON, client.send(small())).await.unwrap().unwrap();
        assert_eq!(
            (answer.status().as_u16(), answer.version()),
            (200, Version::HTTP_2)
        );
        assert!(!answer.headers().contains_key(header::CONNECTION));
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["key_id"], "kek-exchange-key-v2");
    }
    assert_eq!(running.open.count(), 1);
}

#[tokio::test]
async fn a_body_that_is_announced_too_long_is_answered_before_it_comes() {
    let running = Setup::new(10).start().await;
    let mut client = running.http2(&running.client()).await;
    let mut request = endless();
    let length = header::HeaderValue::from_static("5242880");
    request.headers_mut().insert(header::CONTENT_LENGTH, length);
    // In HTTP/1 the body would be read away first, for up to 5 s.
    let answer = timeout(Duration::from_secs(4), client.send(request)).await;
    assert_eq!(answer.unwrap().unwrap().status(), 413);
    assert_eq!(client.ask(small()).await, 200);
}

#[tokio::test]
async fn a_drain_says_goodbye_and_lets_finish_what_has_begun() {
    let running = Setup::new(10).start().await;
    let mut idle = running.http2(&running.client()).await;
    let mut busy = running.http2(&running.client()).await;
    assert_eq!(idle.ask(small()).await, 200);
    let (body, request) = later();
    let begun = busy.send(request);
    // The server has seen the one before when it answers this one.
    assert_eq!(busy.ask(small()).await, 200);
    let (drain, open) = (Arc::clone(&running.node.drain), running.open.clone());
    let draining = tokio::spawn(async move {
        drain.run(AT_ONCE, &open).await;
    });
    idle.ended().await;
    body.send(r#"{"context":"exchange-key","plaintext":"YQ=="}"#.into())
        .unwrap();
    let answer = timeout(SOON, begun).await.unwrap().unwrap();
    assert_eq!(answer.status(), 200);
    drop(answer);
    busy.ended().await;
    timeout(SOON, draining).await.unwrap().unwrap();
    assert_eq!(running.open.count(), 0);
}

#[tokio::test]
async fn streams_beyond_the_limit_wait_for_one_to_end() {
    let mut setup = Setup::new(10);
    setup.http2.max_concurrent_streams = 2;
    let running = setup.start().await;
    let mut client = running.http2(&running.client()).await;
    // With the first answer the client has learnt the limit.
    assert_eq!(client.ask(small()).await, 200);
    let (body, request) = later();
    let (first, _second) = (client.send(request), client.send(endless()));
    let third = client.send(small());
    tokio::pin!(third);
    assert!(timeout(A_WHILE, third.as_mut()).await.is_err());
    body.send("{}".into()).unwrap();
    let answer = timeout(SOON, first).await.unwrap().unwrap();
    assert_eq!(answer.status(), 403);
    assert_eq!(timeout(SOON, third).await.unwrap().unwrap().status(), 200);
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_a_busy_one_is_not() {
    let mut setup = Setup::new(10);
    // Long enough for a machine that stands still before it asks.
    setup.http2.idle_timeout = Duration::from_secs(3);
    let running = setup.start().await;
    let mut idle = running.http2(&running.client()).await;
    let mut busy = running.http2(&running.client()).await;
    assert_eq!(idle.ask(small()).await, 200);
    let _in_hand = busy.send(endless());
    idle.ended().await;
    until(|| running.open.count() == 1).await;
    let early = timeout(Duration::from_secs(4), &mut busy.connection).await;
    assert!(early.is_err());
    assert_eq!(running.open.count(), 1);
}

#[tokio::test]
async fn a_client_that_does_not_read_its_answers_is_not_waited_for() {
    let mut setup = Setup::new(10);
    setup.stalled = Duration::from_millis(300);
    let running = setup.start().await;
    let plaintext = STANDARD.encode(vec![7; 100_000]);
    let request = || {
        let body = json!({"context": "exchange-key", "plaintext": plaintext});
        encrypt(axum::body::Body::from(body.to_string()))
    };
    // One byte may leave; then the client's window is shut.
    let mut deaf = running.http2_with_window(&running.client(), 1).await;
    let unread = timeout(SOON, deaf.send(request())).await.unwrap().unwrap();
    assert_eq!(unread.status(), 200);
    deaf.ended().await;
    // One that reads, and then has nothing to read, stays.
    let mut reader = running.http2(&running.client()).await;
    let answer = timeout(SOON, reader.send(request())).await.unwrap().unwrap();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    assert!(body.len() > 100_000);
    assert!(timeout(2 * A_WHILE, &mut reader.connection).await.is_err());
}

#[tokio::test]
async fn a_revoked_certificate_is_told_so_before_its_connection_ends() {
    let running = Setup::new(10).start().await;
    running
        .node
        .revoke(RevocationKey::CommonName("trading-1".to_owned()));
    let mut client = running.http2(&running.client()).await;
    assert_eq!(client.ask(small()).await, 403);
    client.ended().await;
}

#[tokio::test]
async fn a_revocation_answers_what_is_in_hand_for_a_second_and_ends_every_connection() {
    let running = Setup::new(10).start().await;
    let mut idle = running.http2(&running.client()).await;
    let mut busy = running.http2(&running.client()).await;
    let mut stuck = running.http2(&running.client()).await;
    assert_eq!(idle.ask(small()).await, 200);
    let (body, request) = later();
    let in_hand = busy.send(request);
    let never = stuck.send(endless());
    // The server has seen the one before when it answers this one.
    for client in [&mut busy, &mut stuck] {
        assert_eq!(client.ask(small()).await, 200);
    }
    running.revoke(RevocationKey::CommonName("trading-1".to_owned()));
    idle.ended().await;
    body.send(r#"{"context":"exchange-key","plaintext":"YQ=="}"#.into())
        .unwrap();
    let answer = timeout(SOON, in_hand).await.unwrap().unwrap();
    assert_eq!(answer.status(), 403);
    drop(answer);
    busy.ended().await;
    assert!(timeout(SOON, never).await.unwrap().is_err());
    stuck.ended().await;
    timeout(SOON, running.open.none_left()).await.unwrap();
    let mut other = running.http2(&running.other_client()).await;
    assert_eq!(other.ask(small()).await, 200);
}
