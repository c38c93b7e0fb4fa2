//! Requests that come through a trusted proxy, and connections that a balancer passes on: over real sockets and TLS.

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;

use super::log_lines::Lines;
use super::running::{Running, SOON, Setup, closed};
use super::*;
use crate::http::client_cert::tests::encode;
use crate::http::proxy_protocol::tests::encode as proxy_header;
use crate::identity::test_certs::{TestCa, TestCert};

type Stream = TlsStream<TcpStream>;

const DECRYPT: &str = "/decrypt";
const ENCRYPT: &str = "/encrypt";

async fn start() -> Running {
    Setup::new(10).start().await
}

/// One HTTP/1.1 request with these lines in its head; status and body of the answer.
async fn ask(stream: &mut Stream, path: &str, lines: &[String], body: &Value) -> (u16, Value) {
    let body = body.to_string();
    let lines: String = lines.iter().map(|line| format!("{line}\r\n")).collect();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\n{lines}content-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).await.unwrap();
    let (mut answer, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        let read = timeout(SOON, stream.read(&mut piece)).await.unwrap().unwrap();
        assert_ne!(read, 0, "closed after {:?}", String::from_utf8_lossy(&answer));
        answer.extend_from_slice(&piece[..read]);
        if let Some(whole) = whole(&answer) {
            return whole;
        }
    }
}

fn whole(answer: &[u8]) -> Option<(u16, Value)> {
    let text = std::str::from_utf8(answer).unwrap();
    let (head, body) = text.split_once("\r\n\r\n")?;
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    (body.len() >= length.parse().ok()?).then(|| (status, serde_json::from_str(body).unwrap()))
}

fn shows(cert: &TestCert) -> Vec<String> {
    vec![format!("Client-Cert: {}", encode(&cert.der))]
}

fn plain(context: &str) -> Value {
    json!({"context": context, "plaintext": "YQ=="})
}

/// The code that an encryption is answered with.
async fn code(stream: &mut Stream, lines: &[String]) -> Option<ErrorCode> {
    let (status, body) = ask(stream, ENCRYPT, lines, &plain("exchange-key")).await;
    let code: Option<ErrorCode> = body["code"].as_str().map(|code| code.parse().unwrap());
    assert_eq!(status, code.map_or(200, ErrorCode::status), "{body}");
    code
}

#[tokio::test]
async fn each_request_of_a_pooled_connection_is_its_own_clients() {
    let running = start().await;
    let trading = shows(&running.client());
    let owner = shows(&running.ca.client("2fa-1", "2FA"));
    let colleague = shows(&running.ca.client("2fa-2", "2FA"));
    let mut stream = running.connect(&running.proxy).await;
    for _ in 0..3 {
        assert_eq!(code(&mut stream, &trading).await, None);
        assert_eq!(code(&mut stream, &owner).await, Some(ErrorCode::AccessDenied));
    }
    // `2fa` is private: for its CN alone.
    let (_, sealed) = ask(&mut stream, ENCRYPT, &owner, &plain("2fa")).await;
    let question = json!({"context": "2fa", "ciphertext": sealed["ciphertext"]});
    for (who, answer) in [
        (&trading, json!("access_denied")),
        (&colleague, json!("authentication_failed")),
        (&owner, Value::Null),
    ] {
        let (_, opened) = ask(&mut stream, DECRYPT, who, &question).await;
        assert_eq!(opened["code"], answer, "{opened}");
    }
    assert_eq!(running.open.count(), 1);
}

#[tokio::test]
async fn what_a_proxy_does_not_show_well_is_refused_and_its_connection_goes_on() {
    let running = start().await;
    let good = shows(&running.client());
    let [line] = &good[..] else { panic!("{good:?}") };
    let team = running.ca.intermediate("Team A");
    let member = team.client("trading-9", "Trading");
    let of_team = format!("Client-Cert-Chain: {}", encode(&team.der));
    let with = |more: &str| vec![line.clone(), more.to_owned()];
    let malformed = Some(ErrorCode::ClientCertMalformed);
    let refused = Some(ErrorCode::ClientCertRefused);
    let mut stream = running.connect(&running.proxy).await;
    for (lines, code_expected) in [
        // Its own certificate has an OU that may encrypt: that is nobody's.
        (vec![], Some(ErrorCode::ClientCertMissing)),
        (vec![of_team.clone()], Some(ErrorCode::ClientCertMissing)),
        (with(line), malformed),
        (with("Client-Cert: :MIIB:"), malformed),
        (vec!["Client-Cert: MIIB".to_owned()], malformed),
        (vec![format!("{line}, :MIIB:")], malformed),
        (with("Client-Cert-Chain: x"), malformed),
        (vec!["Client-Cert: :MIIB:".to_owned()], refused),
        (
            shows(&TestCa::new("Clients").client("trading-1", "Trading")),
            refused,
        ),
        (
            shows(&running.ca.issue("trading-1", Some("Trading"), &[], 1990)),
            refused,
        ),
        (
            shows(&running.ca.not_for_clients("trading-1", "Trading")),
            refused,
        ),
        (shows(&running.proxy), refused),
        (shows(&member), refused),
        (vec![shows(&member)[0].clone(), of_team.clone()], None),
    ] {
        assert_eq!(code(&mut stream, &lines).await, code_expected, "{lines:?}");
        assert_eq!(code(&mut stream, &good).await, None, "after {lines:?}");
    }
}

#[tokio::test]
async fn nobody_else_speaks_of_certificates_and_who_does_is_in_the_audit() {
    let lines = Lines::default();
    let _logged_here = lines.collect();
    let running = start().await;
    let mut stream = running.connect(&running.client()).await;
    let other = running.ca.client("2fa-1", "2FA");
    for line in [
        shows(&other)[0].clone(),
        "client-cert-chain: x".to_owned(),
        "Client-Cert: ".to_owned(),
    ] {
        assert_eq!(
            code(&mut stream, &[line]).await,
            Some(ErrorCode::ClientCertNotTrusted)
        );
    }
    assert_eq!(code(&mut stream, &[]).await, None);
    assert_eq!(lines.count("action", "client_cert.claim"), 3);
    let audited = lines.all();
    let line = audited.iter().find(|line| line["target"] == "audit").unwrap();
    assert!(
        line["principal"].as_str().unwrap().contains("CN=trading-1"),
        "{line}"
    );
    assert!(
        line["source"].as_str().unwrap().starts_with("127.0.0.1:"),
        "{line}"
    );
    assert_eq!(
        (&line["proxy"], &line["code"]),
        (&json!(""), &json!("client_cert_not_trusted"))
    );
}

#[tokio::test]
async fn nothing_is_administered_through_a_proxy() {
    let lines = Lines::default();
    let _logged_here = lines.collect();
    let running = start().await;
    let mut stream = running.connect(&running.proxy).await;
    let admin = [
        &shows(&running.ca.client("root", "Admin"))[..],
        &["x-hsm-request: 1".to_owned()],
    ]
    .concat();
    for path in [
        "/admin/v1/whoami",
        "/admin/v1/ceremonies",
        "/admin/v1/cluster/init",
    ] {
        let (status, body) = ask(&mut stream, path, &admin, &json!({})).await;
        assert_eq!(
            (status, body["code"].as_str()),
            (403, Some("admin_through_proxy")),
            "{path}"
        );
    }
    // Nor what only a role may do, on a path of applications.
    let rewrap = json!({"context": "2fa", "ciphertext": "YQ==", "principal": {"cn": "2fa-1", "ou": "2FA"}});
    let operator = shows(&running.ca.client("operator-1", "Trading"));
    let (status, body) = ask(&mut stream, "/rewrap", &operator, &rewrap).await;
    assert_eq!(
        (status, body["code"].as_str()),
        (403, Some("admin_through_proxy"))
    );
    let audited = lines.all();
    let audited: Vec<&Value> = audited.iter().filter(|line| line["target"] == "audit").collect();
    assert_eq!(audited.len(), 4, "{audited:#?}");
    for line in audited {
        assert_eq!(
            (&line["proxy"], &line["outcome"]),
            (&json!("edge"), &json!("refused")),
            "{line}"
        );
    }
}

/// What is under the prefix is what a proxy is refused.
#[test]
fn every_administrators_route_is_one_that_no_proxy_reaches() {
    for (method, path) in crate::admin::routes::registered() {
        assert!(path.starts_with(hsm_api::paths::ADMIN_PREFIX), "{method} {path}");
    }
}

#[tokio::test]
async fn a_revoked_client_costs_the_others_nothing_and_a_revoked_proxy_is_cut() {
    let running = start().await;
    let (gone, other) = (shows(&running.client()), shows(&running.other_client()));
    let mut stream = running.connect(&running.proxy).await;
    assert_eq!(code(&mut stream, &gone).await, None);
    running.revoke(RevocationKey::CommonName("trading-1".to_owned()));
    for _ in 0..3 {
        assert_eq!(
            code(&mut stream, &gone).await,
            Some(ErrorCode::CertificateRevoked)
        );
        assert_eq!(code(&mut stream, &other).await, None);
    }
    running.revoke(RevocationKey::CommonName("edge-1".to_owned()));
    closed(&mut stream).await;
    let mut stream = running.connect(&running.proxy).await;
    assert_eq!(
        code(&mut stream, &other).await,
        Some(ErrorCode::CertificateRevoked)
    );
}

/// Of HTTP/1 the connection goes with it: what it still sends is nobody's request.
#[tokio::test]
async fn a_client_that_is_revoked_while_it_sends_is_answered_without_its_rest() {
    let running = start().await;
    let mut stream = running.connect(&running.proxy).await;
    let shown = shows(&running.client()).join("\r\n");
    let head = format!(
        "POST {ENCRYPT} HTTP/1.1\r\nhost: localhost\r\n{shown}\r\nexpect: 100-continue\r\ncontent-length: 1000\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut piece = [0; 4096];
    let read = timeout(SOON, stream.read(&mut piece)).await.unwrap().unwrap();
    let word = String::from_utf8_lossy(&piece[..read]).into_owned();
    assert!(word.starts_with("HTTP/1.1 100"), "{word}");
    stream.write_all(b"{").await.unwrap();
    running.revoke(RevocationKey::CommonName("trading-1".to_owned()));
    let revoked = Instant::now();
    let mut answer = Vec::new();
    let ended = stream.read_to_end(&mut answer);
    // Some close without a word of TLS.
    let _ = timeout(SOON, ended).await.unwrap();
    let answer = String::from_utf8_lossy(&answer).to_ascii_lowercase();
    assert!(
        answer.starts_with("http/1.1 403") && answer.contains("certificate_revoked"),
        "{answer}"
    );
    assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
    // A second, and what a busy machine needs; what is read away is waited for for five.
    assert!(
        revoked.elapsed() < Duration::from_secs(4),
        "{:?}",
        revoked.elapsed()
    );
}

#[tokio::test]
async fn a_client_is_refused_from_the_moment_its_certificate_ends() {
    let running = start().await;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let brief = shows(&running.client_ending(now + Duration::from_secs(3)));
    let mut stream = running.connect(&running.proxy).await;
    assert_eq!(code(&mut stream, &brief).await, None);
    let ended = timeout(SOON, async {
        while code(&mut stream, &brief).await.is_none() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    ended.await.unwrap();
    assert_eq!(
        code(&mut stream, &brief).await,
        Some(ErrorCode::ClientCertRefused)
    );
    assert_eq!(code(&mut stream, &shows(&running.other_client())).await, None);
}

#[tokio::test]
async fn rates_are_the_clients_and_what_is_shown_badly_is_nobodys() {
    let mut setup = Setup::new(10);
    setup.burst = 20;
    let running = setup.start().await;
    let (busy, quiet) = (shows(&running.client()), shows(&running.other_client()));
    let mut stream = running.connect(&running.proxy).await;
    assert_eq!(code(&mut stream, &quiet).await, None);
    let limited = Some(ErrorCode::RateLimited);
    let mut answers = Vec::new();
    for _ in 0..100 {
        answers.push(code(&mut stream, &busy).await);
    }
    assert!(
        answers[..15].iter().all(Option::is_none) && answers.contains(&limited),
        "{answers:?}"
    );
    assert_eq!(code(&mut stream, &quiet).await, None);
    // How often chains are verified has a limit of its own, see `trusted.rs`.
    for _ in 0..100 {
        let bad = ["Client-Cert: :MIIB:".to_owned()];
        assert_eq!(code(&mut stream, &bad).await, Some(ErrorCode::ClientCertRefused));
        assert_eq!(code(&mut stream, &[]).await, Some(ErrorCode::ClientCertMissing));
    }
    assert_eq!(code(&mut stream, &quiet).await, None);
}

/// Whoever has stolen a certificate that is revoked must not spend what is its successor's.
#[tokio::test]
async fn a_revoked_certificate_spends_nothing_of_its_names_allowance() {
    let mut setup = Setup::new(10);
    setup.burst = 20;
    let running = setup.start().await;
    let (stolen, renewed) = (running.client(), running.client());
    let fingerprint = Principal::from_der(&stolen.der).unwrap().fingerprint;
    running.revoke(RevocationKey::Fingerprint(fingerprint));
    let mut stream = running.connect(&running.proxy).await;
    for _ in 0..50 {
        assert_eq!(
            code(&mut stream, &shows(&stolen)).await,
            Some(ErrorCode::CertificateRevoked)
        );
    }
    for _ in 0..15 {
        assert_eq!(code(&mut stream, &shows(&renewed)).await, None);
    }
}

#[tokio::test]
async fn a_proxy_that_gets_no_place_is_told_so_whomever_it_speaks_for() {
    let mut setup = Setup::new(10);
    setup.open = OpenConnections::with(2, 1, 16);
    let running = setup.start().await;
    let client = shows(&running.client());
    let mut first = running.connect(&running.proxy).await;
    let mut second = running.connect(&running.proxy).await;
    for stream in [&mut first, &mut second] {
        assert_eq!(code(stream, &client).await, None);
    }
    for lines in [&client[..], &[]] {
        let mut third = running.connect(&running.proxy).await;
        assert_eq!(code(&mut third, lines).await, Some(ErrorCode::Overloaded));
        closed(&mut third).await;
    }
    assert_eq!(code(&mut first, &client).await, None);
}

#[tokio::test]
async fn a_certificate_is_verified_once() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let _counted_here = ::metrics::set_default_local_recorder(&recorder);
    let running = start().await;
    let (first, second) = (shows(&running.client()), shows(&running.other_client()));
    for _ in 0..2 {
        let mut stream = running.connect(&running.proxy).await;
        for _ in 0..5 {
            assert_eq!(code(&mut stream, &first).await, None);
            assert_eq!(code(&mut stream, &second).await, None);
        }
        assert_eq!(code(&mut stream, &[]).await, Some(ErrorCode::ClientCertMissing));
    }
    let handle = recorder.handle();
    handle.run_upkeep();
    let text = handle.render();
    for line in [
        "hsm_client_cert_verifications_total 2",
        "hsm_client_cert_refusals_total{reason=\"missing\"} 2",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

async fn behind(running: &Running, header: &[u8]) -> Option<Stream> {
    let cert = running.client();
    let connecting = running.behind(header, &cert, &[]);
    timeout(SOON, connecting)
        .await
        .expect("neither open nor closed")
        .ok()
}

#[tokio::test]
async fn a_balancer_says_where_its_client_is_and_nobody_else_does() {
    let lines = Lines::default();
    let _logged_here = lines.collect();
    let client: SocketAddr = "192.0.2.7:40000".parse().unwrap();
    let mut setup = Setup::new(10);
    setup.proxy_protocol_from = &["127.0.0.0/8"];
    let running = setup.start().await;
    let mut stream = behind(&running, &proxy_header(client, &[])).await.unwrap();
    assert_eq!(code(&mut stream, &[]).await, None);
    let (status, _) = ask(&mut stream, ENCRYPT, &[], &plain("2fa")).await;
    assert_eq!((status, lines.count("peer", "192.0.2.7:40000")), (403, 1));
    let text = b"PROXY TCP4 192.0.2.7 127.0.0.1 40000 8443\r\n";
    for header in [&b""[..], text] {
        assert!(behind(&running, header).await.is_none(), "{header:?}");
    }
    assert_eq!(lines.count("reason", "does not begin with a PROXY header"), 1);
    assert_eq!(lines.count("reason", "version 1"), 1);

    let running = start().await;
    assert!(behind(&running, b"").await.is_some());
    for header in [&proxy_header(client, &[])[..], text] {
        assert!(behind(&running, header).await.is_none(), "{header:?}");
    }
    assert_eq!(
        lines.count("reason", "is not listed in server.proxy_protocol_from"),
        2
    );
}
