//! How the listener begins, and how it and its connections end, without anybody who was let in being sent away, and
//! without the loss of an answer.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;

use super::super::*;
use super::listener::start;
use super::running::{AT_ONCE, Running, SOON, Setup, ask, rest, until};
use crate::policy::RevocationKey;

/// As from a balancer that looks at no `/readyz`: one connection after the other, until one is refused.
#[tokio::test]
async fn whoever_is_let_in_while_a_listener_ends_is_served() {
    let running = start(100).await;
    let asked = AtomicUsize::new(0);
    let client = || async {
        let cert = running.client();
        loop {
            match running.behind(&[], &cert, &[]).await {
                Ok(mut stream) => {
                    let answer = ask(&mut stream).await;
                    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer:?}");
                    asked.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => return,
                Err(error) => panic!("a client that was let in was sent away: {error}"),
            }
        }
    };
    let clients = join_all((0..4).map(|_| client()));
    let drained = async {
        until(|| asked.load(Ordering::Relaxed) > 20).await;
        running.node.drain.run(AT_ONCE, &running.open).await;
    };
    timeout(SOON, async { tokio::join!(clients, drained) })
        .await
        .unwrap();
    assert_eq!(running.open.count(), 0);
    assert_eq!(running.node.drain.signal().phase(), Phase::Stopped);
}

#[tokio::test]
async fn an_address_that_is_only_reserved_refuses_connections() {
    let taken = start(1).await;
    let error = Reserved::new("server.listen", taken.address).unwrap_err();
    assert!(error.to_string().contains("in use"), "{error}");
    let reserved = reserve_any();
    let address = reserved.address();
    let refused = TcpStream::connect(address).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    let _open = reserved.open().unwrap();
    TcpStream::connect(address).await.unwrap();
}

fn reserve_any() -> Reserved {
    Reserved::new("server.listen", "127.0.0.1:0".parse().unwrap()).unwrap()
}

/// Neither to another node, nor to any other program that says `SO_REUSEADDR`, as most do.
#[tokio::test]
async fn nobody_else_is_given_an_address_that_is_reserved() {
    let refused = |address: SocketAddr| {
        let error = Reserved::new("server.listen", address).unwrap_err();
        assert!(error.to_string().contains("in use"), "{error}");
        let other = TcpSocket::new_v4().unwrap();
        other.set_reuseaddr(true).unwrap();
        assert_eq!(other.bind(address).unwrap_err().kind(), ErrorKind::AddrInUse);
    };
    let reserved = reserve_any();
    let address = reserved.address();
    refused(address);
    let listener = reserved.open().unwrap();
    refused(address);
    // As a node leaves it that has closed a connection first.
    let client = TcpStream::connect(address).await.unwrap();
    let (accepted, _) = listener.accept().await.unwrap();
    drop(accepted);
    let mut client = client.into_std().unwrap();
    client.set_nonblocking(false).unwrap();
    assert_eq!(std::io::Read::read(&mut client, &mut [0]).unwrap(), 0);
    drop((client, listener));
    let again = Reserved::new("server.listen", address).unwrap();
    refused(address);
    again.open().unwrap();
}

/// As in a sandbox.
#[tokio::test]
async fn whoever_is_here_already_is_served_where_no_packet_filter_is_allowed() {
    let (listener, running) = Setup::new(10).prepare();
    let ending = async {
        let common = listener.common();
        let refused = Err(ErrorKind::PermissionDenied.into());
        listener.let_in_the_last(&common, refused).await;
    };
    // It has connected before anybody looks who is here.
    let client = async {
        let mut stream = running.behind(&[], &running.client(), &[]).await.unwrap();
        ask(&mut stream).await
    };
    let both = async { tokio::join!(client, ending) };
    let (answer, ()) = timeout(SOON, both).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer:?}");
}

#[tokio::test]
async fn a_shutdown_waits_for_a_listener_that_has_yet_to_run_for_the_first_time() {
    let (listener, running) = Setup::new(10).prepare();
    let serving = listener.serve(running.open.listen());
    assert!(running.open.none_left().now_or_never().is_none());
    drop(serving);
    assert!(running.open.none_left().now_or_never().is_some());
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

/// What a client reads that has sent more than the one request with which its connection ends: all of it is written, and
/// the node is done with the connection, before the client reads any. The connection must not have been reset.
async fn read_late(running: &Running, mut stream: TlsStream<TcpStream>, body: &str) -> String {
    let post = |body: &str| {
        let length = body.len();
        format!("POST /encrypt HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n{body}")
    };
    let sent = post(body) + &post(&"x".repeat(128 * 1024));
    stream.write_all(sent.as_bytes()).await.unwrap();
    stream.flush().await.unwrap();
    until(|| running.open.count() == 0).await;
    let mut answer = Vec::new();
    let end = timeout(SOON, stream.read_to_end(&mut answer)).await.unwrap();
    // A reset stands behind what had arrived before it.
    let reset = stream.get_ref().0.take_error().unwrap();
    assert!(
        end.is_ok() && reset.is_none(),
        "{end:?} and {reset:?} after {} bytes",
        answer.len()
    );
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn a_client_that_gets_no_place_is_told_why_without_a_reset() {
    let running = start(10).await;
    running
        .node
        .revoke(RevocationKey::CommonName("trading-1".to_owned()));
    let revoked = running.connect(&running.client()).await;
    let answer = read_late(&running, revoked, "{}").await;
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    assert!(answer.contains(r#""error":"certificate revoked""#), "{answer}");
}

#[tokio::test]
async fn a_long_answer_arrives_whole_although_more_was_sent_on_a_connection_that_ends() {
    let running = start(10).await;
    let mut stream = running.connect(&running.client()).await;
    assert!(ask(&mut stream).await.starts_with("HTTP/1.1 200 "));
    running.node.drain.advance(Phase::Closing);
    let plaintext = "YWFh".repeat(16 * 1024);
    let item = format!(r#"{{"context":"exchange-key","plaintext":"{plaintext}"}}"#);
    // More than a client's receive buffer takes, and less than a server's send buffer does.
    let batch = format!(r#"{{"batch":[{}]}}"#, vec![item; 8].join(","));
    let answer = read_late(&running, stream, &batch).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(
        head.starts_with("HTTP/1.1 200 ") && head.contains("connection: close"),
        "{head}"
    );
    let mut lines = head.lines();
    let length = lines.find_map(|line| line.strip_prefix("content-length: "));
    assert_eq!(length, Some(body.len().to_string().as_str()), "{head}");
    assert!(body.len() > batch.len(), "{} bytes", body.len());
}
