use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use hsm_api::data::{HealthStatus, KekStatus};

use super::*;

struct Source;

impl HealthSource for Source {
    fn readiness(&self, query: &ReadyQuery) -> Readiness {
        let failed = query.slot.as_deref() == Some("2fa");
        Readiness::of(vec![
            Check::new("fresh", query.stale_ok, "heard of a quorum\n9 s ago"),
            Check::new("slot:2fa", !failed, "token lost"),
        ])
    }

    fn v1_health(&self) -> HealthResponse {
        HealthResponse {
            status: HealthStatus::Degraded,
            hsm_available: true,
            kek_status: BTreeMap::from([("kek-2fa-v1".to_owned(), KekStatus::Unavailable)]),
        }
    }

    fn render_metrics(&self) -> String {
        "hsm_raft_term 7\nx_total{context=\"2fa-context\",status=\"success\"} 3\n".to_owned()
    }

    #[cfg(feature = "failpoints")]
    fn state_hash(&self) -> (u64, u128) {
        (7, 0xabc)
    }
}

fn ask(request: &str) -> String {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let server = start(socket, Arc::new(Source), None).unwrap();
    ask_at(server.address, request)
}

fn ask_at(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn get(path: &str) -> String {
    ask(&format!(
        "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    ))
}

#[test]
fn livez_says_ok_and_nothing_else() {
    let answer = get("/livez");
    assert!(
        answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("\r\n\r\nok\n"),
        "{answer}"
    );
}

#[cfg(feature = "failpoints")]
#[test]
fn a_build_for_tests_says_the_states_digest() {
    let answer = get("/debug/state-hash");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{answer}");
    let said: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(said["index"], 7);
    assert_eq!(said["digest"], format!("{:032x}", 0xabc));
}

#[cfg(not(feature = "failpoints"))]
#[test]
fn only_a_build_for_tests_says_the_states_digest() {
    let answer = get("/debug/state-hash");
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
}

#[test]
fn readyz_passes_its_question_on_and_names_what_fails() {
    let answer = get("/readyz");
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(
        answer.ends_with("[-] fresh: heard of a quorum 9 s ago\nnot ready\n"),
        "{answer}"
    );
    let answer = get("/readyz?verbose&stale=ok");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(answer.contains("[+] fresh: ") && answer.ends_with("[+] slot:2fa: token lost\nready\n"));
    let answer = get("/readyz?stale=ok&slot=2fa");
    assert!(
        answer.starts_with("HTTP/1.1 503 ") && answer.contains("[-] slot:2fa"),
        "{answer}"
    );
}

#[test]
fn metrics_and_v1s_health_are_here_too_and_name_nothing() {
    let answer = get("/metrics");
    assert!(
        answer.ends_with("\r\n\r\nhsm_raft_term 7\nx_total{status=\"success\"} 3\n"),
        "{answer}"
    );
    let answer = get("/health");
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    let document = "{\"status\":\"degraded\",\"hsm_available\":true,\"kek_status\":{}}";
    assert!(answer.ends_with(document), "{answer}");
}

#[test]
fn anything_else_is_refused() {
    assert!(get("/encrypt").starts_with("HTTP/1.1 404 "));
    let post = "POST /readyz HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    let wrong = ask(post);
    assert!(
        wrong.starts_with("HTTP/1.1 405 ") && wrong.contains("\r\nallow: GET,HEAD\r\n"),
        "{wrong}"
    );
    let foreign = "GET /metrics HTTP/1.1\r\nhost: x\r\norigin: https://evil\r\nconnection: close\r\n\r\n";
    assert!(ask(foreign).starts_with("HTTP/1.1 403 "));
}

/// As docs/openapi.json has it of this listener.
#[test]
fn no_answer_has_the_headers_of_the_apis() {
    let refused = "GET /nowhere HTTP/1.1\r\nhost: x\r\n\r\n".to_owned();
    let answered = registered()
        .into_iter()
        .map(|(method, path)| format!("{method} {path} HTTP/1.1\r\nhost: x\r\n\r\n"));
    for request in answered.chain([refused]) {
        let answer = ask(&request);
        let (head, _) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains("\r\ncache-control: no-store"), "{answer}");
        assert!(!head.contains("\r\nx-hsm-"), "{answer}");
    }
}

/// HTTP/1.1 would keep it for further questions.
#[test]
fn a_connection_ends_with_its_answer() {
    let answer = ask("GET /livez HTTP/1.1\r\nhost: x\r\n\r\n");
    assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
}

#[test]
fn connections_that_ask_nothing_do_not_keep_their_places_from_probes() {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let patience = Duration::from_millis(50);
    let server = server::start_with(socket, Arc::new(Source), None, patience).unwrap();
    let connect = |_| TcpStream::connect(server.address).unwrap();
    let idle: Vec<TcpStream> = (0..server::MAX_CONNECTIONS).map(connect).collect();
    for mut stream in idle {
        // The server ends it.
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
    let probe = "GET /livez HTTP/1.1\r\nhost: x\r\n\r\n";
    assert!(ask_at(server.address, probe).starts_with("HTTP/1.1 200 "));
}

#[test]
fn connections_that_ask_nothing_make_room_for_a_probe() {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let server = start(socket, Arc::new(Source), None).unwrap();
    let connect = |_| TcpStream::connect(server.address).unwrap();
    let idle: Vec<TcpStream> = (0..server::MAX_CONNECTIONS + 12).map(connect).collect();
    let began = std::time::Instant::now();
    let probe = "GET /readyz?stale=ok HTTP/1.1\r\nhost: x\r\n\r\n";
    assert!(ask_at(server.address, probe).starts_with("HTTP/1.1 200 "));
    // Well before their own time is over.
    assert!(began.elapsed() < Duration::from_secs(5));
    drop(idle);
}

#[test]
fn a_taken_port_names_its_key() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let error = bind(taken.local_addr().unwrap()).unwrap_err().to_string();
    assert!(error.starts_with("server.health_listen: 127.0.0.1:"), "{error}");
    assert!(error.contains("in use by another process"), "{error}");
}
