//! What callers leave in the log, and what they cannot keep out of it.

use super::*;
pub(super) use crate::test_log::Lines;

#[tokio::test]
async fn one_clients_refusals_leave_others_and_the_services_faults_their_lines() {
    const ASKED: usize = 500;
    let lines = Lines::default();
    let _logged_here = lines.collect();
    let node = FakeNode::new();
    let router = node.router();
    let body = json!({"context": "exchange-key", "plaintext": ""});
    let flood = principal("log-flood", Some("Nobody"));
    for _ in 0..ASKED {
        // Below the level that is written: must not cost what is above it.
        send(&router, Some(&flood), post("/nowhere", &body)).await;
    }
    for _ in 0..ASKED {
        send(&router, Some(&flood), post("/encrypt", &body)).await;
    }
    let written = lines.count("who", "log-flood");
    assert!((1..ASKED).contains(&written), "{written}");

    let other = principal("log-other", Some("Nobody"));
    send(&router, Some(&other), post("/encrypt", &body)).await;
    assert_eq!(lines.count("who", "log-other"), 1);
    node.refuse(ErrorCode::Stale);
    send(&router, Some(&trading()), post("/encrypt", &body)).await;
    assert_eq!(lines.count("code", "stale"), 1);
}

#[tokio::test]
async fn a_line_of_each_request_says_who_asked_for_what_and_how_it_ended_and_no_plaintext() {
    let lines = Lines::default();
    let _logged_here = lines.collect_access();
    let node = FakeNode::new();
    let router = node.router();
    let plaintext = STANDARD.encode("planted");
    let body = json!({"context": "exchange-key", "plaintext": plaintext});
    let answer = send(&router, Some(&trading()), post("/encrypt", &body)).await;
    send(
        &router,
        Some(&trading()),
        post(&format!("/{plaintext}?{plaintext}"), &body),
    )
    .await;
    send(&router, None, post("/encrypt", &body)).await;
    let all = lines.all();
    let shown: Vec<_> = all
        .iter()
        .map(|line| {
            let text = |field: &str| line[field].as_str().unwrap();
            let status = line["status"].as_u64().unwrap();
            (
                text("method"),
                text("path"),
                status,
                text("code"),
                text("client_cn"),
            )
        })
        .collect();
    assert_eq!(
        shown,
        [
            ("POST", "/encrypt", 200, "", "trading-1"),
            ("POST", "other", 404, "not_found", "trading-1"),
            ("POST", "/encrypt", 401, "no_client_certificate", ""),
        ]
    );
    assert_eq!(all[0]["client_ou"], "Trading");
    assert_eq!(all[0]["request_id"], answer.header("x-request-id"));
    assert!(all[0]["duration_ms"].as_f64().unwrap() > 0.0);
    assert!(!lines.text().contains(&plaintext), "{}", lines.text());
}
