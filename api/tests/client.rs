//! The client against scripted servers over real TLS: what it sends, where it goes next, and what
//! it never does.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hsm_api::client::{Client, ClientBuilder, ClientError, Method, Retry};
use hsm_api::data::{Batch, DataKeyRequest, DecryptRequest, EncryptRequest, EncryptResponse, RewrapRequest};
use hsm_api::{ErrorCode, Problem, StateIndex};
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// What a server saw of one request.
struct Seen {
    path: String,
    headers: HeaderMap,
    body: Vec<u8>,
}

/// A server that answers every request with what `script` makes of its number and body.
struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    async fn start(
        pki: &Pki,
        script: impl Fn(usize, &Seen) -> (u16, String) + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(pki.server_config()));
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let (log, script) = (Arc::clone(&seen), Arc::new(script));
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (acceptor, log, script) = (acceptor.clone(), Arc::clone(&log), Arc::clone(&script));
                tokio::spawn(async move {
                    let Ok(tls) = acceptor.accept(tcp).await else {
                        return;
                    };
                    let service = service_fn(move |request: Request<Incoming>| {
                        let (log, script) = (Arc::clone(&log), Arc::clone(&script));
                        async move {
                            let (head, body) = request.into_parts();
                            let body = body.collect().await.unwrap().to_bytes().to_vec();
                            let seen = Seen {
                                path: head.uri.to_string(),
                                headers: head.headers,
                                body,
                            };
                            let mut log = log.lock().unwrap();
                            let (status, answer) = script(log.len(), &seen);
                            log.push(seen);
                            let response = Response::builder()
                                .status(status)
                                .header("x-hsm-node", "hsm-node-1")
                                .header("x-hsm-index", "1.42")
                                .header("x-request-id", "01J")
                                .body(Full::new(Bytes::from(answer)))
                                .unwrap();
                            Ok::<_, Infallible>(response)
                        }
                    });
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(tls), service)
                        .await;
                });
            }
        });
        Self { address, seen }
    }

    fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    fn requests(&self) -> usize {
        self.seen.lock().unwrap().len()
    }
}

struct Pki {
    ca: CertifiedIssuer<'static, KeyPair>,
}

impl Pki {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self {
            ca: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap(),
        }
    }

    fn issue(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        (
            params.signed_by(&key, &self.ca).unwrap().pem(),
            key.serialize_pem(),
        )
    }

    fn server_config(&self) -> rustls::ServerConfig {
        let (cert, key) = self.issue("127.0.0.1");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.ca.der().clone()).unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .unwrap();
        rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(
                vec![CertificateDer::from_pem_slice(cert.as_bytes()).unwrap()],
                PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
            )
            .unwrap()
    }

    fn client(&self) -> ClientBuilder {
        let (cert, key) = self.issue("client");
        Client::builder().ca_pem(self.ca.pem()).identity_pem(cert, key)
    }
}

/// An address at which nobody listens.
async fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("https://{}", listener.local_addr().unwrap())
}

fn encrypted() -> String {
    let answer = EncryptResponse {
        ciphertext: b"sealed".into(),
        key_id: "kek-exchange-key-v1".into(),
        key_version: 1,
    };
    serde_json::to_string(&answer).unwrap()
}

fn problem(code: ErrorCode) -> (u16, String) {
    (
        code.status(),
        serde_json::to_string(&Problem::new(code, "because", "01J")).unwrap(),
    )
}

fn request() -> EncryptRequest {
    EncryptRequest::new("exchange-key", b"abc")
}

#[tokio::test]
async fn an_answer_comes_with_its_headers() {
    let pki = Pki::new();
    let server = Server::start(&pki, |_, _| (200, encrypted())).await;
    let client = pki.client().endpoint(server.url()).build().unwrap();
    let answer = client.encrypt(&request()).await.unwrap();
    assert_eq!(
        (answer.key_version, answer.ciphertext.as_slice()),
        (1, b"sealed".as_slice())
    );
    assert_eq!(answer.meta.index, Some(StateIndex { epoch: 1, index: 42 }));
    assert_eq!(answer.meta.node.as_deref(), Some("hsm-node-1"));
    assert_eq!(
        (answer.meta.endpoint.as_str(), answer.meta.attempts),
        (server.url().as_str(), 1)
    );
    let seen = server.seen.lock().unwrap();
    assert_eq!(seen[0].path, "/encrypt");
    assert_eq!(seen[0].headers["content-type"], "application/json");
    assert_eq!(seen[0].body, br#"{"context":"exchange-key","plaintext":"YWJj"}"#);
}

#[tokio::test]
async fn a_minimum_is_sent_with_every_call_and_a_node_that_is_not_there_yet_is_left_for_another() {
    let pki = Pki::new();
    let behind = Server::start(&pki, |_, _| problem(ErrorCode::MinIndexNotReached)).await;
    let ahead = Server::start(&pki, |_, _| (200, encrypted())).await;
    let client = pki
        .client()
        .endpoints([behind.url(), ahead.url()])
        .build()
        .unwrap();
    let index = StateIndex { epoch: 1, index: 42 };
    let sealed = client.with_min_index(index).encrypt(&request()).await.unwrap();
    assert_eq!((sealed.meta.attempts, sealed.meta.stale), (2, false));
    // Reads and changes of administrators too; what they are answered here is no answer to them.
    let asking = client.on(&ahead.url()).unwrap().with_min_index(index);
    let _ = asking.list_keks().await;
    let _ = asking.rotate("c", None).await;
    let _ = client.on(&ahead.url()).unwrap().list_keks().await;
    let seen = ahead.seen.lock().unwrap();
    let sent: Vec<_> = seen
        .iter()
        .map(|seen| Some(seen.headers.get("x-hsm-min-index")?.to_str().unwrap()))
        .collect();
    assert_eq!(sent, [Some("1.42"), Some("1.42"), Some("1.42"), None]);
}

#[tokio::test]
async fn a_batch_is_sent_once_whatever_its_items_are_answered() {
    let pki = Pki::new();
    let server = Server::start(&pki, |_, seen| {
        let answer = match seen.path.as_str() {
            "/decrypt" => {
                r#"{"batch":[{"status":200,"plaintext":"YWJj"},
                {"status":503,"code":"overloaded","error":"overloaded","retryable":true}]}"#
            }
            "/datakey" => r#"{"ciphertext":"YQ==","key_id":"k","key_version":1,"plaintext":"YWJj"}"#,
            "/rewrap" => r#"{"ciphertext":"YQ==","key_id":"k","key_version":2}"#,
            _ => r#"{"batch":[{"status":200,"ciphertext":"YQ==","key_id":"k","key_version":1}]}"#,
        };
        (200, answer.to_owned())
    })
    .await;
    let client = pki.client().endpoint(server.url()).build().unwrap();
    let batch = Batch::new([request()]);
    let sealed = client.encrypt_batch(&batch).await.unwrap();
    assert_eq!(sealed.batch[0].as_ok().unwrap().key_version, 1);
    let batch = Batch::new([DecryptRequest::new("", b"a"), DecryptRequest::new("2fa", b"b")]);
    let opened = client.decrypt_batch(&batch.with_context("c")).await.unwrap();
    assert_eq!(opened.batch[0].as_ok().unwrap().plaintext.as_slice(), b"abc");
    let error = opened.batch[1].as_err().unwrap();
    assert_eq!(error.error_code(), Some(ErrorCode::Overloaded));
    let rewrap = RewrapRequest::new("c", b"a");
    assert_eq!(client.rewrap(&rewrap).await.unwrap().key_version, 2);
    let moved = client.rewrap_batch(&Batch::new([rewrap])).await;
    assert!(
        matches!(moved, Err(ClientError::Decode { .. })),
        "one answer is no batch"
    );
    let made = client.datakey(&DataKeyRequest::new("c")).await.unwrap();
    assert_eq!(made.plaintext.as_ref().unwrap().as_slice(), b"abc");
    let seen = server.seen.lock().unwrap();
    let paths: Vec<&str> = seen.iter().map(|seen| seen.path.as_str()).collect();
    assert_eq!(paths, ["/encrypt", "/decrypt", "/rewrap", "/rewrap", "/datakey"]);
    assert_eq!(
        seen[0].body,
        br#"{"batch":[{"context":"exchange-key","plaintext":"YWJj"}]}"#
    );
}

#[tokio::test]
async fn a_dead_endpoint_is_passed_over_and_then_forgotten() {
    let pki = Pki::new();
    let server = Server::start(&pki, |_, _| (200, encrypted())).await;
    let client = pki
        .client()
        .endpoints([nobody().await, server.url()])
        .build()
        .unwrap();
    assert_eq!(client.encrypt(&request()).await.unwrap().meta.attempts, 2);
    assert_eq!(client.encrypt(&request()).await.unwrap().meta.attempts, 1);
}

#[tokio::test]
async fn when_nobody_answers_everybody_is_named() {
    let pki = Pki::new();
    let (first, second) = (nobody().await, nobody().await);
    let client = pki
        .client()
        .endpoints([first.clone(), second.clone()])
        .retry(Retry::Until(Duration::from_secs(2)))
        .build()
        .unwrap();
    let error = client.encrypt(&request()).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, ClientError::NoneAnswered { .. }), "{text}");
    assert!(text.contains(&first) && text.contains(&second), "{text}");
}

#[tokio::test]
async fn without_retries_there_is_one_attempt_at_one_endpoint() {
    let pki = Pki::new();
    let good = Server::start(&pki, |_, _| (200, encrypted())).await;
    let client = pki
        .client()
        .endpoints([nobody().await, good.url()])
        .retry(Retry::None)
        .build()
        .unwrap();
    for _ in 0..3 {
        assert!(matches!(
            client.encrypt(&request()).await,
            Err(ClientError::Connect { .. })
        ));
    }
    assert_eq!(good.requests(), 0);

    let sick = Server::start(&pki, |_, _| problem(ErrorCode::NoQuorum)).await;
    let client = client.on(&sick.url()).unwrap();
    assert_eq!(
        client.encrypt(&request()).await.unwrap_err().code(),
        Some(ErrorCode::NoQuorum)
    );
    assert_eq!(sick.requests(), 1);
}

#[tokio::test]
async fn a_mutation_is_repeated_under_its_key() {
    let pki = Pki::new();
    let server = Server::start(&pki, |number, _| match number {
        0 => problem(ErrorCode::OutcomeUnknown),
        _ => {
            let answer = r#"{"context":"2fa","version":2,"key_id":"kek-2fa-v2","previous_version":1}"#;
            (200, answer.to_owned())
        }
    })
    .await;
    let client = pki.client().endpoint(server.url()).build().unwrap();
    let answer = client.rotate("2fa", None).await.unwrap();
    assert_eq!((answer.version, answer.meta.attempts), (2, 2));
    client.rotate("2fa", Some("mine")).await.unwrap();
    let seen = server.seen.lock().unwrap();
    let keys: Vec<_> = seen
        .iter()
        .map(|seen| seen.headers["idempotency-key"].to_str().unwrap())
        .collect();
    assert_eq!((keys[0].len(), keys[0] == keys[1], keys[2]), (26, true, "mine"));
    assert!(seen.iter().all(|seen| seen.path == "/admin/v1/keys/2fa/rotate"));
    assert!(seen.iter().all(|seen| seen.headers["x-hsm-request"] == "1"));
}

#[tokio::test]
async fn initialising_is_never_sent_to_another_node() {
    let pki = Pki::new();
    let first = Server::start(&pki, |_, _| problem(ErrorCode::NotReady)).await;
    let other = Server::start(&pki, |_, _| problem(ErrorCode::NotReady)).await;
    let client = pki
        .client()
        .endpoints([first.url(), other.url()])
        .retry(Retry::Until(Duration::from_secs(2)))
        .build()
        .unwrap();
    assert_eq!(
        client.cluster_init().await.unwrap_err().code(),
        Some(ErrorCode::NotReady)
    );
    assert!(first.requests() > 1);
    assert_eq!(other.requests(), 0);
}

#[tokio::test]
async fn the_callers_own_fault_is_not_repeated() {
    let pki = Pki::new();
    let server = Server::start(&pki, |_, _| problem(ErrorCode::AuthenticationFailed)).await;
    let client = pki.client().endpoint(server.url()).build().unwrap();
    let error = client
        .decrypt(&DecryptRequest::new("exchange-key", b"x"))
        .await
        .unwrap_err();
    let api = error.api().unwrap();
    assert_eq!(
        (api.status, api.detail.as_str(), api.retryable),
        (400, "because", false)
    );
    assert_eq!(
        (api.node.as_deref(), api.request_id.as_deref()),
        (Some("hsm-node-1"), Some("01J"))
    );
    assert_eq!(server.requests(), 1);
}

#[tokio::test]
async fn a_silent_node_costs_one_time_out_and_another_answers() {
    let pki = Pki::new();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = Server::start(&pki, |_, _| (200, encrypted())).await;
    let client = pki
        .client()
        .endpoints([format!("https://{}", silent.local_addr().unwrap()), server.url()])
        .request_timeout(Duration::from_secs(2))
        .build()
        .unwrap();
    assert_eq!(client.encrypt(&request()).await.unwrap().meta.attempts, 2);
}

#[tokio::test]
async fn a_foreign_ca_and_a_missing_identity_are_refused_at_once() {
    let (pki, foreign) = (Pki::new(), Pki::new());
    let reached = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&reached);
    let server = Server::start(&pki, move |_, _| {
        flag.store(true, Ordering::SeqCst);
        (200, encrypted())
    })
    .await;
    let wrong_ca = foreign.client().endpoint(server.url()).build().unwrap();
    assert!(matches!(
        wrong_ca.encrypt(&request()).await,
        Err(ClientError::Tls { .. })
    ));
    let nameless = Client::builder()
        .ca_pem(pki.ca.pem())
        .endpoint(server.url())
        .retry(Retry::None)
        .build()
        .unwrap();
    assert!(nameless.encrypt(&request()).await.unwrap_err().api().is_none());
    assert!(!reached.load(Ordering::SeqCst));
}

#[tokio::test]
async fn a_raw_request_is_sent_as_it_is() {
    let pki = Pki::new();
    let server = Server::start(&pki, |_, _| problem(ErrorCode::InvalidJson)).await;
    let client = pki.client().endpoint(server.url()).build().unwrap();
    let answer = client
        .request(Method::PUT, "/encrypt?x=1", &[("X-Odd", "yes")], "{broken")
        .await
        .unwrap();
    assert_eq!(
        (answer.status, answer.problem().unwrap().error.as_str()),
        (400, "invalid JSON")
    );
    let seen = server.seen.lock().unwrap();
    assert_eq!(
        (seen[0].path.as_str(), seen[0].body.as_slice()),
        ("/encrypt?x=1", b"{broken".as_slice())
    );
    assert_eq!(seen[0].headers["x-odd"], "yes");
    assert!(!seen[0].headers.contains_key("content-type") && !seen[0].headers.contains_key("x-hsm-request"));
}
