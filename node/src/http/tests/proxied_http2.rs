//! Requests of several clients at once on one connection of a trusted proxy, over HTTP/2: none is another's, and none has
//! to wait for another's end.

use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{HeaderValue, Request};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::time::timeout;

use super::running::{Http2Client, Running, SOON, Setup, encrypt, endless, later, small};
use super::*;
use crate::http::client_cert::tests::encode;
use crate::identity::test_certs::TestCert;

/// A request of whoever has this certificate.
fn of(client: &TestCert, mut request: Request<Body>) -> Request<Body> {
    let shown = HeaderValue::from_str(&encode(&client.der)).unwrap();
    request.headers_mut().insert("client-cert", shown);
    request
}

fn get(path: &str) -> Request<Body> {
    Request::get(format!("https://localhost{path}"))
        .body(Body::empty())
        .unwrap()
}

async fn read(answer: Response<Incoming>) -> (u16, String) {
    let status = answer.status().as_u16();
    let body = timeout(SOON, answer.into_body().collect())
        .await
        .unwrap()
        .unwrap();
    (status, String::from_utf8(body.to_bytes().to_vec()).unwrap())
}

async fn ask(connection: &mut Http2Client, request: Request<Body>) -> (u16, String) {
    read(timeout(SOON, connection.send(request)).await.unwrap().unwrap()).await
}

fn whole_body(body: tokio::sync::oneshot::Sender<axum::body::Bytes>) {
    let text = r#"{"context":"exchange-key","plaintext":"YQ=="}"#;
    body.send(text.into()).unwrap();
}

#[tokio::test]
async fn streams_of_two_clients_at_once_are_each_their_own() {
    let running = Setup::new(10).start().await;
    let trading = running.client();
    let owner = running.ca.client("2fa-1", "2FA");
    let mut proxy = running.http2(&running.proxy).await;
    // All of them are open before the first one has its body.
    let mut open = Vec::new();
    for number in 0..20 {
        let (who, expected) = if number % 2 == 0 {
            (&trading, 200)
        } else {
            (&owner, 403)
        };
        let (body, request) = later();
        open.push((body, proxy.send(of(who, request)), expected));
    }
    assert_eq!(proxy.ask(small()).await, 401);
    let mut answers = Vec::new();
    for (body, answer, expected) in open.into_iter().rev() {
        whole_body(body);
        answers.push((answer, expected));
    }
    for (answer, expected) in answers {
        let answer = timeout(SOON, answer).await.unwrap().unwrap();
        assert_eq!(answer.status().as_u16(), expected);
    }
    // `2fa` is private: for its CN alone.
    let sealed = encrypt(Body::from(r#"{"context":"2fa","plaintext":"YQ=="}"#));
    let (status, sealed) = ask(&mut proxy, of(&owner, sealed)).await;
    assert_eq!(status, 200, "{sealed}");
    let ciphertext = serde_json::from_str::<Value>(&sealed).unwrap()["ciphertext"].clone();
    let question = json!({"context": "2fa", "ciphertext": ciphertext}).to_string();
    for (who, expected) in [(&trading, 403), (&owner, 200)] {
        let request = Request::post("https://localhost/decrypt").body(Body::from(question.clone()));
        assert_eq!(proxy.ask(of(who, request.unwrap())).await, expected);
    }
    assert_eq!(running.open.count(), 1);
}

#[tokio::test]
async fn what_a_revoked_client_has_in_hand_ends_and_the_others_go_on() {
    let running = Setup::new(10).start().await;
    let (gone, other) = (running.client(), running.other_client());
    let mut proxy = running.http2(&running.proxy).await;
    let stuck = proxy.send(of(&gone, endless()));
    let (late, request) = later();
    let spared = proxy.send(of(&other, request));
    // The server has seen those before when it answers these.
    for client in [&gone, &other] {
        assert_eq!(proxy.ask(of(client, small())).await, 200);
    }
    running.revoke(RevocationKey::CommonName("trading-1".to_owned()));
    let revoked = Instant::now();
    let (status, body) = read(timeout(SOON, stuck).await.unwrap().unwrap()).await;
    assert_eq!(status, 403);
    assert!(body.contains("certificate_revoked"), "{body}");
    // A second, and what a busy machine needs.
    assert!(
        revoked.elapsed() < Duration::from_secs(4),
        "{:?}",
        revoked.elapsed()
    );
    whole_body(late);
    let spared = timeout(SOON, spared).await.unwrap().unwrap();
    assert_eq!(spared.status(), 200);
    assert_eq!(proxy.ask(of(&gone, small())).await, 403);
    assert_eq!(running.open.count(), 1);
}

#[tokio::test]
async fn a_client_that_does_not_end_its_requests_leaves_the_others_theirs() {
    let running = Setup::new(10).start().await;
    let (busy, other) = (running.client(), running.other_client());
    let mut proxy = running.http2(&running.proxy).await;
    let most = running.open.each() / 4;
    let held: Vec<_> = (0..most).map(|_| proxy.send(of(&busy, endless()))).collect();
    let refused = async {
        loop {
            let (status, body) = ask(&mut proxy, of(&busy, small())).await;
            if status == 503 {
                return body;
            }
        }
    };
    let refused = timeout(SOON, refused).await.expect("it may hold all of them");
    assert!(
        refused.contains("overloaded") && refused.contains("through a proxy"),
        "{refused}"
    );
    for _ in 0..3 {
        assert_eq!(proxy.ask(of(&other, small())).await, 200);
    }
    // On a connection of its own it holds nothing.
    let mut direct = running.http2(&busy).await;
    assert_eq!(direct.ask(small()).await, 200);
    drop(held);
    let again = async { while proxy.ask(of(&busy, small())).await != 200 {} };
    timeout(SOON, again)
        .await
        .expect("what it held is not given back");
}

#[tokio::test]
async fn an_answer_that_is_not_read_ends_a_proxys_connection_when_the_others_have_theirs() {
    let mut setup = Setup::new(10);
    setup.stalled = Duration::from_millis(300);
    let running = setup.start().await;
    let (deaf, other) = (running.client(), running.other_client());
    let mut proxy = running.http2_with_window(&running.proxy, 64).await;
    let (late, request) = later();
    let spared = proxy.send(of(&other, request));
    // More than the window lets out.
    let unread = timeout(SOON, proxy.send(of(&deaf, small())))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(unread.status(), 200);
    // Told to go away, and open until the others are done.
    tokio::time::sleep(Duration::from_millis(900)).await;
    whole_body(late);
    let (status, body) = read(timeout(SOON, spared).await.unwrap().unwrap()).await;
    assert_eq!(status, 200, "{body}");
    proxy.ended().await;
    drop(unread);
}

/// The fake cluster has given the role metrics to somebody: it counts on a connection of one's own.
#[tokio::test]
async fn probes_and_metrics_come_through_a_proxy_without_names() {
    let running: Running = Setup::new(10).start().await;
    let watch = running.ca.client("watch-1", "Watch");
    let mut proxy = running.http2(&running.proxy).await;
    let mut direct = running.http2(&watch).await;
    let (status, text) = ask(&mut proxy, of(&watch, get("/metrics"))).await;
    assert_eq!(status, 200, "{text}");
    assert!(
        !text.contains("2fa") && text.contains("status=\"success\"} 3"),
        "{text}"
    );
    let (_, text) = ask(&mut direct, get("/metrics")).await;
    assert!(text.contains("2fa"), "{text}");

    for (through_proxy, expected) in [(true, 0), (false, 1)] {
        let (status, body) = if through_proxy {
            ask(&mut proxy, of(&watch, get("/health"))).await
        } else {
            ask(&mut direct, get("/health")).await
        };
        let body: Value = serde_json::from_str(&body).unwrap();
        let named = body["kek_status"].as_object().map_or(0, serde_json::Map::len);
        assert_eq!((status, named), (200, expected), "{body}");
    }
    // The proxy itself is nobody here either.
    for path in ["/metrics", "/health"] {
        assert_eq!(proxy.ask(get(path)).await, 401);
    }
}
