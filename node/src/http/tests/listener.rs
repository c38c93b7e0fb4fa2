//! The accept loop over real sockets and TLS, asked in plain HTTP/1.1.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::super::*;
use super::fake::FakeNode;
use crate::config::{ApiTlsFiles, Http2};
use crate::identity::test_certs::{TestCa, TestCert};

struct Running {
    node: FakeNode,
    address: SocketAddr,
    open: OpenConnections,
    ca: TestCa,
    _dir: tempfile::TempDir,
}

async fn start(max_connections: usize) -> Running {
    let dir = tempfile::tempdir().unwrap();
    let ca = TestCa::new("Clients");
    std::fs::write(dir.path().join("ca.crt"), &ca.pem).unwrap();
    ca.server("server", None).write(dir.path(), "server");
    let files = ApiTlsFiles {
        ca_path: dir.path().join("ca.crt"),
        cert_path: dir.path().join("server.crt"),
        key_path: dir.path().join("server.key"),
        admin_client_ca_path: None,
    };
    let tls = crate::tls::load_api(&files, None, false).unwrap();
    let node = FakeNode::new();
    let socket = bind("server.listen", "127.0.0.1:0".parse().unwrap())
        .await
        .unwrap();
    let address = socket.local_addr().unwrap();
    let open = OpenConnections::new(max_connections);
    let listener = ApiListener {
        socket,
        tls: Arc::new(ArcSwap::from_pointee(tls)),
        router: node.router(),
        http2: Http2 {
            max_concurrent_streams: 100,
            idle_timeout: Duration::from_secs(60),
        },
        drain: node.drain.signal(),
        open: open.clone(),
    };
    tokio::spawn(listener.serve());
    Running {
        node,
        address,
        open,
        ca,
        _dir: dir,
    }
}

impl Running {
    fn client(&self) -> TestCert {
        self.ca.client("trading-1", "Trading")
    }

    async fn connect(&self, cert: &TestCert) -> TlsStream<TcpStream> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from(self.ca.der.clone())).unwrap();
        let chain = vec![CertificateDer::from(cert.der.clone())];
        let key = PrivateKeyDer::from_pem_slice(cert.key_pem.as_bytes()).unwrap();
        let config = ClientConfig::builder_with_provider(crate::tls::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .unwrap();
        let stream = TcpStream::connect(self.address).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await
            .unwrap()
    }
}

/// One request on an open connection; the status line and headers, or empty if it was closed.
async fn ask(stream: &mut TlsStream<TcpStream>) -> String {
    let body = r#"{"context":"exchange-key","plaintext":"YQ=="}"#;
    let request = format!(
        "POST /encrypt HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    if stream.write_all(request.as_bytes()).await.is_err() {
        return String::new();
    }
    let mut answer = vec![0; 16 * 1024];
    match tokio::time::timeout(Duration::from_secs(5), stream.read(&mut answer)).await {
        Ok(Ok(length)) => String::from_utf8_lossy(&answer[..length]).into_owned(),
        _ => String::new(),
    }
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
        drain
            .run(Duration::from_millis(10), Duration::from_secs(10), &open)
            .await;
    });
    running.node.drain.signal().reached(Phase::Closing).await;
    let answer = ask(&mut stream).await;
    assert!(
        answer.starts_with("HTTP/1.1 200 ") && answer.contains("connection: close"),
        "{answer}"
    );
    drop(stream);
    tokio::time::timeout(Duration::from_secs(5), draining)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(running.open.count(), 0);
}

#[tokio::test]
async fn a_drain_cuts_what_stays_open() {
    let running = start(10).await;
    let mut stream = running.connect(&running.client()).await;
    assert!(ask(&mut stream).await.starts_with("HTTP/1.1 200 "));
    running
        .node
        .drain
        .run(Duration::ZERO, Duration::from_millis(50), &running.open)
        .await;
    let mut byte = [0; 1];
    let read = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut byte))
        .await
        .unwrap();
    assert!(!matches!(read, Ok(1..)), "the connection is still open");
}

#[tokio::test]
async fn a_connection_ends_with_its_certificate() {
    let running = start(10).await;
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let cert = running
        .ca
        .ending("trading-1", "Trading", now + Duration::from_secs(3));
    let mut stream = running.connect(&cert).await;
    assert!(ask(&mut stream).await.starts_with("HTTP/1.1 200 "));
    let mut byte = [0; 1];
    let read = tokio::time::timeout(Duration::from_secs(20), stream.read(&mut byte)).await;
    assert!(
        !matches!(read.unwrap(), Ok(1..)),
        "the connection outlived its certificate"
    );
}

#[tokio::test]
async fn beyond_the_limit_clients_wait_for_a_place() {
    let running = start(1).await;
    let mut first = running.connect(&running.client()).await;
    assert!(ask(&mut first).await.starts_with("HTTP/1.1 200 "));
    let cert = running.client();
    let second = running.connect(&cert);
    tokio::pin!(second);
    assert!(
        tokio::time::timeout(Duration::from_millis(200), second.as_mut())
            .await
            .is_err()
    );
    drop(first);
    let mut second = tokio::time::timeout(Duration::from_secs(5), second)
        .await
        .unwrap();
    assert!(ask(&mut second).await.starts_with("HTTP/1.1 200 "));
}
