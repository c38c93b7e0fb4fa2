//! Batches: every item has the answer that it would have had alone, in its place.

use std::sync::atomic::Ordering;

use hsm_api::data::{BATCH_MAX_BYTES, BATCH_MAX_ITEMS};

use super::fake::{Trouble, envelope_of_key, v1_ciphertext};
use super::*;

/// The results of a batch.
fn items(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.response.status(), 200, "{:?}", answer.code());
    answer.json()["batch"].as_array().unwrap().clone()
}

async fn ask_batch(node: &FakeNode, path: &str, batch: &[Value]) -> Vec<Value> {
    items(&ask(node, &trading(), path, json!({ "batch": batch })).await)
}

fn codes(results: &[Value]) -> Vec<&str> {
    results
        .iter()
        .map(|result| result["code"].as_str().unwrap_or("ok"))
        .collect()
}

#[tokio::test]
async fn what_is_encrypted_in_a_batch_decrypts_in_one_in_the_same_order() {
    let node = FakeNode::new();
    let texts: Vec<String> = (0..BATCH_MAX_ITEMS).map(|n| format!("text {n}")).collect();
    let contexts = ["exchange-key", "order-key"];
    let batch: Vec<Value> = texts
        .iter()
        .zip(contexts.iter().cycle())
        .map(|(text, context)| json!({"context": context, "plaintext": STANDARD.encode(text)}))
        .collect();
    let sealed = ask_batch(&node, "/encrypt", &batch).await;
    assert_eq!(sealed.len(), texts.len());
    assert_eq!(sealed[0]["status"], 200);
    assert_eq!(sealed[0]["key_id"], "kek-exchange-key-v2");
    assert_eq!(sealed[1]["key_id"], "kek-order-key-v1");
    assert_eq!(
        (&sealed[0]["key_version"], &sealed[1]["key_version"]),
        (&json!(2), &json!(1))
    );

    let batch: Vec<Value> = sealed
        .iter()
        .zip(contexts.iter().cycle())
        .map(|(sealed, context)| json!({"context": context, "ciphertext": sealed["ciphertext"]}))
        .collect();
    for (opened, text) in ask_batch(&node, "/decrypt", &batch).await.iter().zip(&texts) {
        assert_eq!(
            *opened,
            json!({"status": 200, "plaintext": STANDARD.encode(text)})
        );
    }
    // One job for each slot and batch.
    assert_eq!(node.token.batches(), [500, 500]);
    assert_eq!(node.orders.batches(), [500, 500]);
}

#[tokio::test]
async fn each_item_is_answered_as_it_would_be_alone() {
    let node = FakeNode::new();
    let good = encrypted(&node, "exchange-key", b"secret").await["ciphertext"].clone();
    let order = encrypted(&node, "order-key", b"secret").await["ciphertext"].clone();
    let v1 = STANDARD.encode(v1_ciphertext("exchange-key", "Trading", b"old"));
    let unknown = STANDARD.encode(envelope_of_key(9, 1));
    let decrypt = |ciphertext: &Value| json!({"context": "exchange-key", "ciphertext": ciphertext});
    for (path, batch) in [
        (
            "/encrypt",
            vec![
                json!({"context": "exchange-key", "plaintext": "YQ=="}),
                json!({"context": "exchange-key", "plaintext": 5}),
                json!({"context": "exchange-key", "plaintext": "?"}),
                json!({"context": "exchange-key", "plaintext": "YQ==", "aad": "?"}),
                json!({"context": "2fa", "plaintext": "YQ=="}),
                json!({"context": "no-such", "plaintext": "YQ=="}),
                json!({"context": "empty-key", "plaintext": "YQ=="}),
                json!({"plaintext": "YQ=="}),
                json!(5),
                json!(null),
                json!("x"),
                json!([]),
                json!({"CONTEXT": "exchange-key", "Plaintext": "Y\r\nQ=\n=", "extra": {"deep": [1]}}),
            ],
        ),
        (
            "/decrypt",
            vec![
                decrypt(&good),
                decrypt(&json!("?")),
                decrypt(&json!("YWJj")),
                decrypt(&json!(v1)),
                decrypt(&order),
                decrypt(&json!(unknown)),
                json!({"context": "exchange-key", "ciphertext": v1, "key_id": "kek-exchange-key-v1"}),
                json!({"context": "exchange-key", "ciphertext": v1, "key_id": "kek-exchange-key-v1", "aad": "YQ=="}),
                json!({"context": "exchange-key", "ciphertext": good, "key_id": "kek-exchange-key-v1"}),
                json!({"context": "exchange-key", "ciphertext": good, "aad": "YQ=="}),
                json!({"context": "exchange-key", "ciphertext": good, "purpose": "datakey"}),
                json!({"context": "exchange-key", "ciphertext": good, "purpose": "?"}),
                decrypt(&good),
            ],
        ),
    ] {
        let results = ask_batch(&node, path, &batch).await;
        assert_eq!(results.len(), batch.len());
        for (item, result) in batch.into_iter().zip(results) {
            let alone = ask(&node, &trading(), path, item.clone()).await;
            let mut expected = alone.json();
            let status = alone.response.status().as_u16();
            assert_eq!(result["status"], status, "{item}");
            if status == 200 {
                expected["status"] = json!(200);
                assert_eq!(result, expected, "{item}");
            } else {
                for member in ["code", "error", "detail", "retryable"] {
                    assert_eq!(result[member], expected[member], "{member} of {item}");
                }
            }
        }
    }
}

#[tokio::test]
async fn a_context_for_all_is_for_those_items_that_name_none() {
    let node = FakeNode::new();
    let body = json!({
        "context": "order-key",
        "batch": [{"plaintext": ""}, {"context": "exchange-key", "plaintext": ""}, {"context": "", "plaintext": ""}],
    });
    let answer = ask(&node, &trading(), "/encrypt", body).await;
    let ids: Vec<Value> = items(&answer).iter().map(|item| item["key_id"].clone()).collect();
    assert_eq!(
        ids,
        ["kek-order-key-v1", "kek-exchange-key-v2", "kek-order-key-v1"]
    );
    assert_eq!(answer.header("content-type"), "application/json");
}

#[tokio::test]
async fn only_a_batch_that_cannot_be_taken_apart_fails_as_a_whole() {
    let node = FakeNode::new();
    let item = json!({"context": "exchange-key", "plaintext": ""});
    let many = |count: usize| json!({"batch": vec![item.clone(); count]}).to_string();
    for (body, code) in [
        (r#"{"batch": {}}"#.to_owned(), ErrorCode::InvalidJson),
        (r#"{"batch": [{]}"#.to_owned(), ErrorCode::InvalidJson),
        (
            r#"{"batch": [], "plaintext": 5}"#.to_owned(),
            ErrorCode::InvalidJson,
        ),
        (
            r#"{"batch": [], "plaintext": "YQ=="}"#.to_owned(),
            ErrorCode::InvalidArgument,
        ),
        (
            r#"{"batch": [], "aad": "YQ=="}"#.to_owned(),
            ErrorCode::InvalidArgument,
        ),
        (many(BATCH_MAX_ITEMS + 1), ErrorCode::BatchTooLarge),
    ] {
        let request = Request::post("/encrypt").body(Body::from(body)).unwrap();
        let answer = send(&node.router(), Some(&trading()), request).await;
        assert_eq!(answer.code(), Some(code));
        assert_eq!(answer.response.status().as_u16(), code.status());
    }
    let request = Request::post("/encrypt")
        .body(Body::from(many(BATCH_MAX_ITEMS)))
        .unwrap();
    let answer = send(&node.router(), Some(&trading()), request).await;
    assert!(items(&answer).iter().all(|item| item["status"] == 200));
    assert!(ask_batch(&node, "/encrypt", &[]).await.is_empty());
    assert!(node.token.batches().iter().all(|items| *items == BATCH_MAX_ITEMS));
}

/// A single body may have 1 MiB here.
#[tokio::test]
async fn a_batch_has_a_limit_of_its_own() {
    let node = FakeNode::new();
    let large =
        |bytes: usize| json!({"context": "exchange-key", "plaintext": STANDARD.encode(vec![7; bytes])});
    let single = ask(&node, &trading(), "/encrypt", large(1 << 20)).await;
    assert_eq!(single.code(), Some(ErrorCode::BodyTooLarge));
    assert!(single.json()["detail"].as_str().unwrap().contains("1048576"));
    let results = ask_batch(&node, "/encrypt", &[large(1 << 20), large(1 << 20)]).await;
    assert_eq!(codes(&results), ["ok", "ok"]);
    let over = json!({"batch": vec![large(BATCH_MAX_BYTES / 4); 4]});
    let answer = ask(&node, &trading(), "/encrypt", over).await;
    assert_eq!(answer.code(), Some(ErrorCode::BodyTooLarge));
    let both = [
        "4194304 bytes, which a batch may have",
        "a single request may have 1048576",
    ];
    let detail = answer.json()["detail"].as_str().unwrap().to_owned();
    assert!(both.iter().all(|limit| detail.contains(limit)), "{detail}");
    // What is no JSON is no batch either.
    let request = Request::post("/encrypt")
        .body(Body::from(vec![b'x'; 2 << 20]))
        .unwrap();
    let answer = send(&node.router(), Some(&trading()), request).await;
    assert_eq!(answer.code(), Some(ErrorCode::BodyTooLarge));
    let detail = answer.json()["detail"].as_str().unwrap().to_owned();
    assert!(
        detail.contains("no batch that can be read") && detail.contains("1048576"),
        "{detail}"
    );
}

#[tokio::test]
async fn a_foreign_context_and_an_unknown_one_get_the_same_result() {
    let node = FakeNode::new();
    for path in ["/encrypt", "/decrypt", "/rewrap", "/datakey"] {
        let batch = ["2fa", "no-such"].map(|context| json!({"context": context, "plaintext": "true"}));
        let results = ask_batch(&node, path, &batch).await;
        assert_eq!(codes(&results), ["access_denied", "access_denied"], "{path}");
        assert_eq!(results[0], results[1]);
    }
    // Nor is a key of a foreign context told from one that nobody has.
    let v1 = STANDARD.encode([7_u8; 40]);
    let by_label = |key_id: &str| json!({"context": "exchange-key", "ciphertext": v1, "key_id": key_id});
    let by_key = |uid: u8, version: u32| {
        let envelope = STANDARD.encode(envelope_of_key(uid, version));
        json!({"context": "exchange-key", "ciphertext": envelope})
    };
    for path in ["/decrypt", "/rewrap"] {
        for (foreign, nobodys) in [
            (by_label("kek-2fa-v1"), by_label("kek-2fa-v2")),
            (by_key(4, 1), by_key(9, 1)),
            (by_key(4, 7), by_key(9, 7)),
        ] {
            let results = ask_batch(&node, path, &[foreign, nobodys]).await;
            assert_eq!(codes(&results), ["unknown_key_version"; 2], "{path}");
            assert_eq!(results[0], results[1]);
        }
    }
}

#[tokio::test]
async fn the_trouble_of_one_slot_is_not_that_of_another() {
    let node = FakeNode::new();
    let batch = ["exchange-key", "order-key", "exchange-key"]
        .map(|context| json!({"context": context, "plaintext": ""}));
    for (trouble, code) in [
        (Trouble::Locked, "slot_locked"),
        (Trouble::Failed, "slot_failed"),
        (Trouble::QueueFull, "overloaded"),
        (Trouble::Hangs, "token_timeout"),
        (Trouble::Gone, "slot_failed"),
    ] {
        node.token.trouble(Some(trouble));
        let results = ask_batch(&node, "/encrypt", &batch).await;
        assert_eq!(codes(&results), [code, "ok", code]);
        node.token.give_up();
    }
}

#[tokio::test]
async fn a_stale_node_marks_or_refuses_the_whole_batch() {
    let node = FakeNode::new();
    let body = || json!({"batch": [{"context": "exchange-key", "plaintext": ""}]});
    node.stale(true);
    let answer = ask(&node, &trading(), "/encrypt", body()).await;
    assert_eq!((items(&answer).len(), answer.header("x-hsm-stale")), (1, "true"));
    node.refuse(ErrorCode::Stale);
    for path in ["/encrypt", "/decrypt", "/rewrap", "/datakey"] {
        let answer = ask(&node, &trading(), path, body()).await;
        assert_eq!(answer.code(), Some(ErrorCode::Stale), "{path}");
    }
}

#[tokio::test]
async fn the_leader_is_asked_once_for_what_nobody_knows() {
    let of = |version: u32| {
        let envelope = STANDARD.encode(envelope_of_key(9, version));
        json!({"context": "exchange-key", "ciphertext": envelope})
    };
    let batch: Vec<Value> = (3..40).rev().map(of).collect();
    for (answer, code, questions) in [
        (AboveKnown::Unknown, "unknown_key_version", 1),
        (AboveKnown::NoQuorum, "no_quorum", 1),
        (AboveKnown::Busy, "overloaded", 1),
        (AboveKnown::OnItsWay, "key_version_not_ready", batch.len()),
    ] {
        let node = FakeNode::new();
        node.above_known(answer);
        let results = ask_batch(&node, "/decrypt", &batch).await;
        assert!(codes(&results).iter().all(|found| *found == code), "{results:?}");
        assert_eq!(node.asked.load(Ordering::Relaxed), questions, "{code}");
    }
}

#[tokio::test]
async fn a_batch_takes_as_much_of_the_allowance_as_it_has_items_and_owes_what_is_more_than_all_of_it() {
    let node = FakeNode::new();
    let router = node.limited_router(5);
    let item = json!({"context": "exchange-key", "plaintext": ""});
    let batch = |items: usize| post("/encrypt", &json!({"batch": vec![item.clone(); items]}));
    let answer = send(&router, Some(&trading()), batch(3)).await;
    assert_eq!(items(&answer).len(), 3);
    let answer = send(&router, Some(&trading()), batch(3)).await;
    assert_eq!(answer.code(), Some(ErrorCode::RateLimited));
    // One is left when its own request is spent; it needs three, and one more may be taken meanwhile.
    assert_eq!(answer.header("retry-after"), "3");
    assert_eq!(answer.header("ratelimit-reset"), "3");
    assert_eq!(answer.header("ratelimit-remaining"), "1");
    let single = || post("/encrypt", &item);
    assert_eq!(
        send(&router, Some(&trading()), single()).await.response.status(),
        200
    );
    let answer = send(&router, Some(&trading()), single()).await;
    assert_eq!(answer.code(), Some(ErrorCode::RateLimited));
    let other = principal("trading-2", Some("Trading"));
    let answer = send(&router, Some(&other), batch(BATCH_MAX_ITEMS)).await;
    assert_eq!(items(&answer).len(), BATCH_MAX_ITEMS);
    assert_eq!(answer.header("ratelimit-remaining"), "0");
    // One a second: those that were let in have to be paid for first.
    for _ in 0..3 {
        let answer = send(&router, Some(&other), single()).await;
        assert_eq!(answer.code(), Some(ErrorCode::RateLimited));
        let wait: usize = answer.header("retry-after").parse().unwrap();
        assert!(
            (BATCH_MAX_ITEMS - 30..=BATCH_MAX_ITEMS - 4).contains(&wait),
            "{wait}"
        );
    }
}

#[tokio::test]
async fn a_batch_that_nobody_waits_for_holds_its_memory_until_it_is_done() {
    let node = FakeNode::new();
    let (state, router) = node.state_and_router(100_000);
    node.token.trouble(Some(Trouble::Hangs));
    let body = json!({"batch": vec![json!({"context": "exchange-key", "plaintext": "YQ=="}); 10]});
    let answer = send(&router, Some(&trading()), post("/encrypt", &body)).await;
    assert_eq!(codes(&items(&answer)), ["token_timeout"; 10]);
    // An item costs more than its text.
    assert!(state.bodies().taken() > body.to_string().len() + 10 * 512);
    node.token.give_up();
    assert_eq!(state.bodies().taken(), 0);
}

#[tokio::test]
async fn items_are_counted_and_logged_as_requests_of_their_own() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let _counted_here = ::metrics::set_default_local_recorder(&recorder);
    let lines = super::log_lines::Lines::default();
    let _logged_here = lines.collect();
    let node = FakeNode::new();
    let of = |context: &str, plaintext: &str| json!({"context": context, "plaintext": plaintext});
    let batch = [
        of("exchange-key", "YQ=="),
        of("exchange-key", "YQ=="),
        of("order-key", "YQ=="),
        of("2fa", "YQ=="),
        of("exchange-key", "?"),
    ];
    let caller = principal("batch-1", Some("Trading"));
    node.orders.trouble(Some(Trouble::Locked));
    let answer = ask(&node, &caller, "/encrypt", json!({ "batch": batch })).await;
    let results = items(&answer);
    assert_eq!(
        codes(&results),
        [
            "ok",
            "ok",
            "slot_locked",
            "access_denied",
            "invalid_base64_plaintext"
        ]
    );
    let handle = recorder.handle();
    handle.run_upkeep();
    let text = handle.render();
    for line in [
        "hsm_encrypt_operations_total{context=\"exchange-key\",status=\"success\"} 2",
        "hsm_encrypt_operations_total{context=\"order-key\",status=\"error\"} 1",
        "hsm_acl_failures_total 1",
        "hsm_requests_total{endpoint=\"/encrypt\",status=\"200\"} 1",
        "hsm_slot_job_duration_seconds_count{slot=\"exchange\",operation=\"encrypt\"} 1",
        "hsm_batch_items_total{operation=\"encrypt\",code=\"ok\"} 2",
        "hsm_batch_items_total{operation=\"encrypt\",code=\"slot_locked\"} 1",
        "hsm_batch_items_total{operation=\"encrypt\",code=\"access_denied\"} 1",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    let refused = lines
        .all()
        .into_iter()
        .find(|line| line["code"] == "access_denied")
        .unwrap();
    assert!(refused["reason"].as_str().unwrap().contains("2fa"), "{refused}");
    assert_eq!(refused["request_id"], answer.header("x-request-id"));
}

/// All of them are a 200 from outside: what the slot did not do in time must show in its metrics.
#[tokio::test]
async fn a_batch_that_timed_out_is_the_slowest_job_of_its_slot() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let _counted_here = ::metrics::set_default_local_recorder(&recorder);
    let node = FakeNode::new();
    let batch = vec![json!({"context": "exchange-key", "plaintext": "YQ=="}); 3];
    for trouble in [Trouble::Hangs, Trouble::QueueFull] {
        node.token.trouble(Some(trouble));
        ask_batch(&node, "/encrypt", &batch).await;
        node.token.give_up();
    }
    let handle = recorder.handle();
    handle.run_upkeep();
    let text = handle.render();
    let of_the_job = |what: &str| {
        let series =
            format!("hsm_slot_job_duration_seconds_{what}{{slot=\"exchange\",operation=\"encrypt\"}} ");
        let value = text.lines().find_map(|line| line.strip_prefix(&series));
        value.map(|value| value.parse::<f64>().unwrap())
    };
    // What was not taken is no job.
    assert_eq!(of_the_job("count"), Some(1.0), "{text}");
    assert!(of_the_job("sum").is_some_and(|seconds| seconds >= 0.1), "{text}");
    for line in [
        "hsm_batch_items_total{operation=\"encrypt\",code=\"token_timeout\"} 3",
        "hsm_batch_items_total{operation=\"encrypt\",code=\"overloaded\"} 3",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}
