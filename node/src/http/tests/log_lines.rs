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
