//! The listener over real sockets and TLS, and clients of both versions of HTTP.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use axum::body::{Body, Bytes};
use axum::http::{Request, Response};
use futures_util::stream;
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::super::*;
use super::fake::FakeNode;
use crate::config::{ApiTlsFiles, Drain, Http2, Proxies, TrustedProxy};
use crate::identity::Principal;
use crate::identity::test_certs::{TestCa, TestCert};
use crate::policy::{Policy, RevocationKey};

/// Whatever has to happen happens within this time, on the slowest machine too.
pub(super) const SOON: Duration = Duration::from_secs(30);

/// A drain without notice, and with time enough.
pub(super) const AT_ONCE: Drain = Drain {
    notice: Duration::ZERO,
    timeout: SOON,
    finish: SOON,
};

/// How the listener is set up.
pub(super) struct Setup {
    pub(super) open: OpenConnections,
    pub(super) http2: Http2,
    pub(super) stalled: Duration,
    pub(super) min_index_wait: Duration,
    /// Requests of one principal at once.
    pub(super) burst: u32,
    /// Whose connections begin with a PROXY header.
    pub(super) proxy_protocol_from: &'static [&'static str],
}

impl Setup {
    pub(super) fn new(max_connections: usize) -> Self {
        Self {
            open: OpenConnections::new(max_connections),
            http2: Http2 {
                max_concurrent_streams: 100,
                idle_timeout: Duration::from_secs(60),
            },
            stalled: STALLED,
            min_index_wait: Duration::from_millis(100),
            burst: 100_000,
            proxy_protocol_from: &[],
        }
    }

    pub(super) async fn start(self) -> Running {
        let (listener, running) = self.prepare();
        tokio::spawn(listener.serve(running.open.listen()));
        running
    }

    /// The address listens, and nobody serves yet.
    pub(super) fn prepare(self) -> (ApiListener, Running) {
        let dir = tempfile::tempdir().unwrap();
        let ca = TestCa::new("Clients");
        std::fs::write(dir.path().join("ca.crt"), &ca.pem).unwrap();
        ca.server("server", None).write(dir.path(), "server");
        let proxy = ca.client("edge-1", "Trading");
        let files = ApiTlsFiles {
            ca_path: dir.path().join("ca.crt"),
            cert_path: dir.path().join("server.crt"),
            key_path: dir.path().join("server.key"),
            admin_client_ca_path: None,
        };
        let tls = crate::tls::load_api(&files, None, false).unwrap();
        let node = FakeNode::patient(self.min_index_wait);
        let socket = bind("server.listen", "127.0.0.1:0".parse().unwrap()).unwrap();
        let address = socket.local_addr().unwrap();
        let policies = watch::Sender::new(node.policy());
        let (state, router) = node.state_and_router(self.burst);
        let listener = ApiListener {
            socket,
            tls: Arc::new(ArcSwap::from_pointee(tls)),
            router,
            data: Arc::new(node.clone()),
            policies: policies.subscribe(),
            http2: self.http2,
            proxies: proxies(&proxy, self.proxy_protocol_from),
            stalled: self.stalled,
            drain: node.drain.signal(),
            open: self.open.clone(),
        };
        let running = Running {
            node,
            state,
            address,
            open: self.open,
            policies,
            ca,
            proxy,
            _dir: dir,
        };
        (listener, running)
    }
}

/// As the configuration would have it.
fn proxies(proxy: &TestCert, proxy_protocol_from: &[&str]) -> Proxies {
    let pin = Principal::from_der(&proxy.der).unwrap().spki_sha256;
    let trusted = TrustedProxy {
        name: "edge".into(),
        spki_sha256: pin,
    };
    let networks = proxy_protocol_from.iter().map(|text| (*text).to_owned());
    Proxies {
        trusted: vec![trusted],
        ..Proxies::resolve(None, Some(networks.collect())).unwrap()
    }
}

pub(super) struct Running {
    pub(super) node: FakeNode,
    pub(super) state: ApiState,
    pub(super) address: SocketAddr,
    pub(super) open: OpenConnections,
    policies: watch::Sender<Arc<Policy>>,
    pub(super) ca: TestCa,
    /// A trusted proxy, whose own OU is in a mapping.
    pub(super) proxy: TestCert,
    _dir: tempfile::TempDir,
}

impl Running {
    pub(super) fn client(&self) -> TestCert {
        self.ca.client("trading-1", "Trading")
    }

    pub(super) fn other_client(&self) -> TestCert {
        self.ca.client("trading-2", "Trading")
    }

    /// Revokes as the replicated state does: requests and open connections see it.
    pub(super) fn revoke(&self, key: RevocationKey) {
        self.node.revoke(key);
        self.policies.send_replace(self.node.policy());
    }

    pub(super) fn client_ending(&self, at: Duration) -> TestCert {
        self.ca.ending("trading-1", "Trading", at)
    }

    /// A connection that asked for no version of HTTP.
    pub(super) async fn connect(&self, cert: &TestCert) -> TlsStream<TcpStream> {
        self.handshake(cert, &[]).await
    }

    /// A connection whose client sends the certificate of the CA in between, too.
    pub(super) async fn connect_below(&self, cert: &TestCert, ca: &TestCa) -> TlsStream<TcpStream> {
        self.handshake_with(cert, &[&cert.der, &ca.der], &[]).await
    }

    /// A CA below the one that the node knows.
    pub(super) fn intermediate(&self, cn: &str) -> TestCa {
        self.ca.intermediate(cn)
    }

    async fn handshake(&self, cert: &TestCert, alpn: &[&[u8]]) -> TlsStream<TcpStream> {
        self.handshake_with(cert, &[&cert.der], alpn).await
    }

    async fn handshake_with(
        &self,
        cert: &TestCert,
        chain: &[&Vec<u8>],
        alpn: &[&[u8]],
    ) -> TlsStream<TcpStream> {
        self.behind_with(&[], cert, chain, alpn).await.unwrap()
    }

    /// A connection that begins with these bytes.
    pub(super) async fn behind(
        &self,
        preface: &[u8],
        cert: &TestCert,
        alpn: &[&[u8]],
    ) -> std::io::Result<TlsStream<TcpStream>> {
        self.behind_with(preface, cert, &[&cert.der], alpn).await
    }

    async fn behind_with(
        &self,
        preface: &[u8],
        cert: &TestCert,
        chain: &[&Vec<u8>],
        alpn: &[&[u8]],
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from(self.ca.der.clone())).unwrap();
        let chain = chain
            .iter()
            .map(|der| CertificateDer::from((*der).clone()))
            .collect();
        let key = PrivateKeyDer::from_pem_slice(cert.key_pem.as_bytes()).unwrap();
        let mut config = ClientConfig::builder_with_provider(crate::tls::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .unwrap();
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        let mut stream = TcpStream::connect(self.address).await?;
        stream.write_all(preface).await?;
        let name = ServerName::try_from("localhost").unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, stream).await
    }

    pub(super) async fn http2(&self, cert: &TestCert) -> Http2Client {
        self.http2_with_window(cert, 1 << 20).await
    }

    /// A client that takes `window` bytes of each answer before it has read any.
    pub(super) async fn http2_with_window(&self, cert: &TestCert, window: u32) -> Http2Client {
        let stream = self.handshake(cert, &[b"h2"]).await;
        let mut builder = Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .initial_stream_window_size(window);
        let (requests, connection) = builder.handshake(TokioIo::new(stream)).await.unwrap();
        Http2Client {
            requests,
            connection: tokio::spawn(connection),
        }
    }
}

pub(super) struct Http2Client {
    pub(super) requests: SendRequest<Body>,
    /// Ends with the connection.
    pub(super) connection: JoinHandle<hyper::Result<()>>,
}

impl Http2Client {
    /// Sends a request; the answer is awaited apart.
    pub(super) fn send(
        &mut self,
        request: Request<Body>,
    ) -> impl Future<Output = hyper::Result<Response<Incoming>>> + use<> {
        self.requests.send_request(request)
    }

    /// One request and the status of its answer.
    pub(super) async fn ask(&mut self, request: Request<Body>) -> u16 {
        let answer = timeout(SOON, self.send(request)).await.unwrap().unwrap();
        answer.status().as_u16()
    }

    /// Waits until the server has ended the connection.
    pub(super) async fn ended(self) {
        let _ = timeout(SOON, self.connection)
            .await
            .expect("the connection is still open");
    }
}

/// `POST /encrypt` with a body.
pub(super) fn encrypt(body: Body) -> Request<Body> {
    Request::post("https://localhost/encrypt").body(body).unwrap()
}

/// A small plaintext to be encrypted.
pub(super) fn small() -> Request<Body> {
    encrypt(Body::from(r#"{"context":"exchange-key","plaintext":"YQ=="}"#))
}

/// A request whose body never comes.
pub(super) fn endless() -> Request<Body> {
    let nothing = stream::pending::<Result<Bytes, std::io::Error>>();
    encrypt(Body::from_stream(nothing))
}

/// A request whose body comes when it is sent.
pub(super) fn later() -> (oneshot::Sender<Bytes>, Request<Body>) {
    let (sender, body) = oneshot::channel();
    let body = stream::once(async move { Ok::<Bytes, std::io::Error>(body.await.unwrap_or_default()) });
    (sender, encrypt(Body::from_stream(body)))
}

/// Waits for something to come about.
pub(super) async fn until(it_is_so: impl Fn() -> bool) {
    let met = async {
        while !it_is_so() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, met).await.expect("it did not come about");
}

/// One HTTP/1.1 request on an open connection; the status line and headers, or empty if it was closed.
pub(super) async fn ask(stream: &mut TlsStream<TcpStream>) -> String {
    let body = r#"{"context":"exchange-key","plaintext":"YQ=="}"#;
    let request = format!(
        "POST /encrypt HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    if stream.write_all(request.as_bytes()).await.is_err() {
        return String::new();
    }
    let mut answer = vec![0; 16 * 1024];
    match timeout(SOON, stream.read(&mut answer)).await {
        Ok(Ok(length)) => String::from_utf8_lossy(&answer[..length]).into_owned(),
        _ => String::new(),
    }
}

/// Waits until the server has closed a connection on which nothing is to be read.
pub(super) async fn closed(stream: &mut TlsStream<TcpStream>) {
    let mut byte = [0; 1];
    let read = timeout(SOON, stream.read(&mut byte))
        .await
        .expect("the connection is still open");
    assert!(!matches!(read, Ok(1..)), "something was sent");
}

/// Until the server has closed the connection.
pub(super) async fn rest(stream: &mut TlsStream<TcpStream>) -> String {
    let mut rest = Vec::new();
    // Some close without a word of TLS; what came before counts.
    let _ = timeout(SOON, stream.read_to_end(&mut rest)).await.unwrap();
    String::from_utf8_lossy(&rest).into_owned()
}
