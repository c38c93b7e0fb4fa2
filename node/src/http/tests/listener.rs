//! The accept loop over real sockets and TLS, asked in plain HTTP/1.1.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;

use super::super::*;
use super::running::{AT_ONCE, Running, SOON, Setup, ask, closed, until};
use crate::config::Drain;
use crate::identity::Authority;
use crate::policy::RevocationKey;

const BRIEF: Duration = Duration::from_millis(50);

async fn start(max_connections: usize) -> Running {
    Setup::new(max_connections).start().await
}

#[tokio::test]
async fn a_client_is_served_on_a_connection_it_keeps() {
    let running = start(10).await;
    let mut stream = running.connect(&running.client()).await;
    for _ in 0..3 {
        let answer = ask(&mut stream).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
    assert_eq!(running.open.count(), 1);
}

#[tokio::test]
async fn a_taken_port_names_its_key() {
    let running = start(1).await;
    let error = bind("server.listen", running.address)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("server.listen: 127.0.0.1:"), "{error}");
    assert!(error.contains("in use by another process"), "{error}");
}

#[tokio::test]
async fn a_drain_lets_an_idle_connection_ask_once_more() {
    let running = start(10).await;
    let mut stream = running.connect(&running.client()).await;
    assert!(ask(&mut stream).await.starts_with("HTTP/1.1 200 "));
    let (drain, open) = (Arc::clone(&running.node.drain), running.open.clone());
    let draining = tokio::spawn(async move {
        let notice = Duration::from_millis(10);
        drain.run(Drain { notice, ..AT_ONCE }, &open).await;
    });
    running.node.drain.signal().reached(Phase::Closing).await;
    let answer = ask(&mut stream).await;
    assert!(
        answer.starts_with("HTTP/1.1 200 ") && answer.contains("connection: close"),
        "{answer}"
    );
    drop(stream);
    timeout(SOON, draining).await.unwrap().unwrap();
    assert_eq!(running.open.count(), 0);
}

#[tokio::test]
async fn a_drain_cuts_what_stays_open() {
    let running = start(10).await;
    let mut stream = running.connect(&running.client()).await;
    assert!(ask(&mut stream).await.starts_with("HTTP/1.1 200 "));
    let times = Drain {
        timeout: BRIEF,
        ..AT_ONCE
    };
    // It is at rest, and nobody waits for it any longer.
    let drained = timeout(SOON / 2, running.node.drain.run(times, &running.open)).await;
    drained.expect("it was waited for");
    closed(&mut stream).await;
}

/// A connection with half of a request on it.
async fn half_asked(running: &Running, body: &[u8]) -> TlsStream<TcpStream> {
    let taken = || running.state.footprints().taken();
    // What was asked before is over.
    until(|| taken() == 0).await;
    let mut stream = running.connect(&running.client()).await;
    let length = body.len();
    let head = format!("POST /encrypt HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&body[..length / 2]).await.unwrap();
    until(|| taken() > 0).await;
    stream
}

#[tokio::test]
async fn a_drain_waits_for_a_request_in_hand_and_for_nobody_at_rest() {
    let running = start(10).await;
    let mut rest = running.connect(&running.client()).await;
    let mut silent = running.connect(&running.client()).await;
    assert!(ask(&mut rest).await.starts_with("HTTP/1.1 200 "));
    let body = br#"{"context":"exchange-key","plaintext":"YQ=="}"#;
    let mut busy = half_asked(&running, body).await;
    let (drain, open) = (Arc::clone(&running.node.drain), running.open.clone());
    let draining = tokio::spawn(async move {
        let times = Drain {
            timeout: BRIEF,
            ..AT_ONCE
        };
        drain.run(times, &open).await;
    });
    closed(&mut rest).await;
    closed(&mut silent).await;
    let refused = async {
        while TcpStream::connect(running.address).await.is_ok() {
            tokio::time::sleep(BRIEF).await;
        }
    };
    timeout(SOON / 2, refused)
        .await
        .expect("somebody is still let in");
    assert_eq!(running.node.drain.signal().phase(), Phase::Finishing);

    busy.write_all(&body[body.len() / 2..]).await.unwrap();
    let mut answer = vec![0; 16 * 1024];
    let length = timeout(SOON / 2, busy.read(&mut answer)).await.unwrap().unwrap();
    let answer = String::from_utf8_lossy(&answer[..length]);
    assert!(
        answer.starts_with("HTTP/1.1 200 ") && answer.contains("connection: close"),
        "{answer}"
    );
    timeout(SOON, draining).await.unwrap().unwrap();
    assert_eq!(running.open.count(), 0);
}

#[tokio::test]
async fn a_drain_cuts_a_request_that_is_in_hand_for_too_long() {
    let running = start(10).await;
    let mut busy = half_asked(&running, b"{}").await;
    let times = Drain {
        timeout: BRIEF,
        finish: BRIEF,
        ..AT_ONCE
    };
    let drained = timeout(SOON / 2, running.node.drain.run(times, &running.open)).await;
    drained.expect("it was waited for");
    closed(&mut busy).await;
}

#[tokio::test]
async fn a_drain_waits_for_nobody_who_is_revoked() {
    let running = start(10).await;
    let mut revoked = running.connect(&running.client()).await;
    let mut other = running.connect(&running.other_client()).await;
    for stream in [&mut revoked, &mut other] {
        assert!(ask(stream).await.starts_with("HTTP/1.1 200 "));
    }
    let (drain, open) = (Arc::clone(&running.node.drain), running.open.clone());
    let draining = tokio::spawn(async move {
        let times = Drain {
            timeout: Duration::from_secs(60),
            ..AT_ONCE
        };
        drain.run(times, &open).await;
    });
    running.node.drain.signal().reached(Phase::Closing).await;
    running.revoke(RevocationKey::CommonName("trading-1".to_owned()));
    closed(&mut revoked).await;
    let answer = ask(&mut other).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    drop(other);
    timeout(SOON, draining).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_connection_ends_with_its_certificate() {
    let running = start(10).await;
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let cert = running.client_ending(now + Duration::from_secs(3));
    let mut stream = running.connect(&cert).await;
    assert!(ask(&mut stream).await.starts_with("HTTP/1.1 200 "));
    closed(&mut stream).await;
}

#[tokio::test]
async fn beyond_the_limit_clients_wait_for_a_place() {
    let running = start(1).await;
    let mut first = running.connect(&running.client()).await;
    assert!(ask(&mut first).await.starts_with("HTTP/1.1 200 "));
    let mut second = running.connect(&running.client()).await;
    let answer = ask(&mut second);
    tokio::pin!(answer);
    let early = timeout(Duration::from_millis(200), answer.as_mut()).await;
    assert!(early.is_err(), "{early:?}");
    drop(first);
    let answer = timeout(SOON, answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test]
async fn a_connection_without_a_request_is_closed() {
    let mut setup = Setup::new(10);
    // Long enough for a machine that stands still before it asks.
    setup.http2.idle_timeout = Duration::from_secs(3);
    let running = setup.start().await;
    let mut silent = running.connect(&running.client()).await;
    let mut served = running.connect(&running.client()).await;
    assert!(ask(&mut served).await.starts_with("HTTP/1.1 200 "));
    closed(&mut silent).await;
    closed(&mut served).await;
    timeout(SOON, running.open.none_left()).await.unwrap();
}

#[tokio::test]
async fn strangers_in_handshake_keep_no_client_out() {
    let mut setup = Setup::new(10);
    setup.open = OpenConnections::with(10, 10, 16);
    let running = setup.start().await;
    let mut strangers = Vec::new();
    for _ in 0..16 {
        strangers.push(TcpStream::connect(running.address).await.unwrap());
    }
    // Less than the handshake's own time-out, which ends strangers too.
    let served = timeout(Duration::from_secs(5), async {
        let mut stream = running.connect(&running.client()).await;
        ask(&mut stream).await
    });
    let answer = served.await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn clients_that_come_all_at_once_are_all_served() {
    let mut setup = Setup::new(400);
    setup.open = OpenConnections::with(400, 400, 16);
    let running = Arc::new(setup.start().await);
    let cert = Arc::new(running.client());
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..200 {
        let (running, cert) = (Arc::clone(&running), Arc::clone(&cert));
        clients.spawn(async move {
            let mut stream = running.connect(&cert).await;
            ask(&mut stream).await
        });
    }
    while let Some(answer) = clients.join_next().await {
        let answer = answer.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
}

#[tokio::test]
async fn a_revoked_certificate_is_told_so_and_takes_no_place() {
    let running = start(1).await;
    running
        .node
        .revoke(RevocationKey::CommonName("trading-1".to_owned()));
    let mut revoked = running.connect(&running.client()).await;
    let mut other = running.connect(&running.other_client()).await;
    assert!(ask(&mut other).await.starts_with("HTTP/1.1 200 "));
    let answer = ask(&mut revoked).await;
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    assert!(answer.contains("connection: close"), "{answer}");
    let text = format!("{answer}{}", rest(&mut revoked).await);
    assert!(text.contains(r#""error":"certificate revoked""#), "{text}");
}

#[tokio::test]
async fn an_open_connection_ends_when_its_certificate_is_revoked() {
    let running = start(10).await;
    let mut revoked = running.connect(&running.client()).await;
    let mut other = running.connect(&running.other_client()).await;
    for stream in [&mut revoked, &mut other] {
        assert!(ask(stream).await.starts_with("HTTP/1.1 200 "));
    }
    running.revoke(RevocationKey::CommonName("trading-1".to_owned()));
    closed(&mut revoked).await;
    assert!(ask(&mut other).await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn connections_end_when_a_ca_above_their_certificates_is_revoked() {
    let running = start(10).await;
    let (lost, kept) = (running.intermediate("Lost"), running.intermediate("Kept"));
    let (below_lost, below_kept) = (lost.client("a", "Trading"), kept.client("b", "Trading"));
    let mut revoked = running.connect_below(&below_lost, &lost).await;
    let mut other = running.connect_below(&below_kept, &kept).await;
    for stream in [&mut revoked, &mut other] {
        assert!(ask(stream).await.starts_with("HTTP/1.1 200 "));
    }
    let ca = Authority::from_der(&lost.der).unwrap();
    running.revoke(RevocationKey::Serial {
        issuer: ca.issuer_dn,
        serial: ca.serial,
    });
    closed(&mut revoked).await;
    assert!(ask(&mut other).await.starts_with("HTTP/1.1 200 "));
    let mut again = running.connect_below(&below_lost, &lost).await;
    let answer = ask(&mut again).await;
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
}

#[tokio::test]
async fn a_principal_with_all_its_places_is_told_so_and_leaves_another_one_its_own() {
    let mut setup = Setup::new(4);
    setup.open = OpenConnections::with(4, 2, 10);
    let running = setup.start().await;
    let cert = running.client();
    // The third is beyond its part, of what nobody uses.
    let mut held = Vec::new();
    for _ in 0..3 {
        let mut stream = running.connect(&cert).await;
        assert!(ask(&mut stream).await.starts_with("HTTP/1.1 200 "));
        held.push(stream);
    }
    let mut other = running.connect(&running.other_client()).await;
    assert!(ask(&mut other).await.starts_with("HTTP/1.1 200 "));
    let mut fourth = running.connect(&cert).await;
    let answer = ask(&mut fourth).await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.contains("retry-after: 1"), "{answer}");
    drop((held, other));
    // Places are free as soon as the server has seen them go.
    let again = timeout(SOON, async {
        loop {
            let mut stream = running.connect(&cert).await;
            let answer = ask(&mut stream).await;
            if answer.starts_with("HTTP/1.1 200 ") {
                return;
            }
        }
    });
    again.await.unwrap();
}

/// Until the server has closed the connection.
async fn rest(stream: &mut TlsStream<TcpStream>) -> String {
    let mut rest = Vec::new();
    // Some close without a word of TLS; what came before counts.
    let _ = timeout(SOON, stream.read_to_end(&mut rest)).await.unwrap();
    String::from_utf8_lossy(&rest).into_owned()
}

#[tokio::test]
async fn a_client_that_still_sends_reads_why_it_is_refused() {
    let running = start(10).await;
    let mut stream = running.connect(&running.client()).await;
    let piece = [b'x'; 16 * 1024];
    let head = format!(
        "POST /nowhere HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        20 * piece.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        stream.write_all(&piece).await.unwrap();
    }
    stream.flush().await.unwrap();
    let answer = rest(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
}
