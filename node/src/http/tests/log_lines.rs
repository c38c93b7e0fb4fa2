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

/// Of those with this principal.
fn audited(lines: &Lines, cn: &str) -> Vec<Value> {
    let name = format!("CN={cn} ");
    let of = |line: &Value| {
        line["target"] == "audit"
            && line["principal"]
                .as_str()
                .is_some_and(|who| who.starts_with(&name))
    };
    lines.all().into_iter().filter(of).collect()
}

#[tokio::test]
async fn who_is_refused_for_what_he_is_has_a_line_with_the_reason_in_the_audit() {
    let lines = Lines::default();
    let _logged_here = lines.collect();
    let node = FakeNode::new();
    node.revoke(RevocationKey::CommonName("refused-gone".to_owned()));
    let of = |context: &str| json!({"context": context, "plaintext": ""});
    let decrypt = json!({"context": "2fa", "ciphertext": ""});
    for (cn, ou, path, body, resource, code, reason) in [
        (
            "refused-gone",
            Some("Trading"),
            "/encrypt",
            of("2fa"),
            "",
            "certificate_revoked",
            "is revoked",
        ),
        (
            "refused-gone",
            Some("Trading"),
            "/health",
            of(""),
            "/health",
            "certificate_revoked",
            "is revoked",
        ),
        (
            "refused-plain",
            None,
            "/encrypt",
            of("2fa"),
            "",
            "no_organizational_unit",
            "has no organ",
        ),
        (
            "refused-odd",
            Some("Odd"),
            "/datakey",
            of("2fa"),
            "",
            "unknown_organizational_unit",
            "\"Odd\" is in no",
        ),
        (
            "refused-1",
            Some("Trading"),
            "/encrypt",
            of("2fa"),
            "2fa",
            "access_denied",
            "may not encrypt under",
        ),
        (
            "refused-1",
            Some("Trading"),
            "/decrypt",
            decrypt,
            "2fa",
            "access_denied",
            "may not decrypt under",
        ),
        (
            "refused-1",
            Some("Trading"),
            "/encrypt",
            of("made-up"),
            "",
            "access_denied",
            "knows no such context",
        ),
    ] {
        let who = principal(cn, ou);
        let before = audited(&lines, cn).len();
        let answer = ask(&node, &who, path, body.clone()).await;
        let new = audited(&lines, cn).split_off(before);
        assert_eq!(new.len(), 1, "{cn} {path} {body}: {new:#?}");
        for (field, value) in [
            ("resource", resource),
            ("code", code),
            ("outcome", "refused"),
            ("level", "WARN"),
            ("issuer", "CN=CA"),
            ("request_id", answer.header("x-request-id")),
        ] {
            assert_eq!(new[0][field], value, "{cn} {path} {body}: {field}");
        }
        let action = match path {
            "/health" => "request".to_owned(),
            path => format!("data.{}", &path[1..]),
        };
        assert_eq!(new[0]["action"], action.as_str());
        assert!(
            new[0]["reason"].as_str().unwrap().contains(reason),
            "{:#?}",
            new[0]
        );
        // Nothing of the kind is written twice until it is counted, and nothing of it is in the answer.
        ask(&node, &who, path, body).await;
        assert_eq!(audited(&lines, cn).len(), before + 1);
        assert!(!String::from_utf8_lossy(&answer.body).contains("no such context"));
    }
    // An answer that is no refusal has none.
    ask(
        &node,
        &principal("refused-not", Some("Trading")),
        "/encrypt",
        of("exchange-key"),
    )
    .await;
    assert!(audited(&lines, "refused-not").is_empty());
}

#[tokio::test]
async fn items_that_are_refused_are_in_the_audit_like_requests() {
    let lines = Lines::default();
    let _logged_here = lines.collect();
    let node = FakeNode::new();
    let item = |context: &str| json!({"context": context, "plaintext": ""});
    let batch =
        json!({"batch": [item("exchange-key"), item("2fa"), item("2fa"), item("made-up"), item("2fa")]});
    let who = principal("refused-items", Some("Trading"));
    let answer = ask(&node, &who, "/encrypt", batch).await;
    assert_eq!(answer.response.status(), 200);
    let lines = audited(&lines, "refused-items");
    let resources: Vec<_> = lines
        .iter()
        .map(|line| line["resource"].as_str().unwrap())
        .collect();
    assert_eq!(resources, ["2fa", ""]);
}
