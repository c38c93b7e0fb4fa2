//! A context whose versions are in two slots: version 1 of `moved-key` in that of `exchange-key`, version 2, which
//! encrypts, in that of `order-key`.

use std::time::Duration;

use hsm_core::envelope::{Header, Purpose};

use super::fake::{Trouble, sealed_under, v1_ciphertext};
use super::*;

const OLD: (u8, u32) = (5, 1);

/// Under version 1, as it was made before the move.
fn old(purpose: Purpose) -> String {
    STANDARD.encode(sealed_under("moved-key", OLD, purpose, b"secret"))
}

fn item(ciphertext: &str) -> Value {
    json!({"context": "moved-key", "ciphertext": ciphertext, "aad": "YQ=="})
}

async fn code(node: &FakeNode, path: &str, body: Value) -> Option<&'static str> {
    let answer = ask(node, &trading(), path, body).await;
    answer.code().map(ErrorCode::as_str)
}

fn encrypt() -> Value {
    json!({"context": "moved-key", "plaintext": "YQ=="})
}

/// What a ciphertext, of data or a data key, says of itself, and holds.
async fn opened(node: &FakeNode, ciphertext: &Value) -> (Purpose, u32, String) {
    let ciphertext = ciphertext.as_str().unwrap();
    let header = Header::parse(&STANDARD.decode(ciphertext).unwrap()).unwrap().0;
    let mut question = item(ciphertext);
    if header.purpose == Purpose::DataKey {
        question["purpose"] = json!("datakey");
    }
    let answer = ask(node, &trading(), "/decrypt", question).await;
    let plaintext = answer.json()["plaintext"].as_str().unwrap().to_owned();
    (header.purpose, header.version, plaintext)
}

#[tokio::test]
async fn a_rewrap_brings_an_old_ciphertext_from_the_one_slot_to_the_other() {
    let node = FakeNode::new();
    for purpose in [Purpose::Data, Purpose::DataKey] {
        let old = old(purpose);
        assert_eq!(
            opened(&node, &json!(old)).await,
            (purpose, 1, "c2VjcmV0".to_owned())
        );
        let answer = ask(&node, &trading(), "/rewrap", item(&old)).await.json();
        assert_eq!(
            (&answer["key_id"], &answer["key_version"]),
            (&json!("kek-moved-key-v2"), &json!(2))
        );
        assert!(answer.get("plaintext").is_none());
        let moved = opened(&node, &answer["ciphertext"]).await;
        assert_eq!(moved, (purpose, 2, "c2VjcmV0".to_owned()));
    }
    let v1 = STANDARD.encode(v1_ciphertext("moved-key", "Trading", b"secret"));
    let body = json!({"context": "moved-key", "ciphertext": v1, "key_id": "kek-moved-key-v1"});
    let answer = ask(&node, &trading(), "/rewrap", body).await.json();
    let body = json!({"context": "moved-key", "ciphertext": answer["ciphertext"]});
    let plain = ask(&node, &trading(), "/decrypt", body).await.json();
    assert_eq!(plain["plaintext"], "c2VjcmV0");
    // What does not open is encrypted nowhere.
    let mut wrong = item(&old(Purpose::Data));
    wrong["aad"] = json!("");
    assert_eq!(code(&node, "/rewrap", wrong).await, Some("authentication_failed"));
}

#[tokio::test]
async fn the_trouble_of_one_slot_is_that_of_its_versions_only() {
    let node = FakeNode::new();
    let new = ask(&node, &trading(), "/rewrap", item(&old(Purpose::Data))).await;
    let new = new.json()["ciphertext"].as_str().unwrap().to_owned();
    for (trouble, expected) in [
        (Trouble::Locked, "slot_locked"),
        (Trouble::Failed, "slot_failed"),
        (Trouble::Hangs, "token_timeout"),
    ] {
        let (refused, old) = (Some(expected), old(Purpose::Data));
        let questions = [
            ("/encrypt", encrypt()),
            ("/decrypt", item(&new)),
            ("/decrypt", item(&old)),
            ("/rewrap", item(&old)),
            ("/rewrap", item(&new)),
        ];
        for (slot, answers) in [
            (&node.token, [None, None, refused, refused, None]),
            (&node.orders, [refused, refused, None, refused, refused]),
        ] {
            slot.trouble(Some(trouble));
            for ((path, body), answer) in questions.iter().zip(answers) {
                let found = code(&node, path, body.clone()).await;
                assert_eq!(found, answer, "{path} {body}");
            }
            slot.trouble(None);
            slot.give_up();
        }
    }
}

#[tokio::test]
async fn a_batch_of_old_and_new_ciphertexts_takes_one_job_more() {
    let node = FakeNode::new();
    let new = ask(&node, &trading(), "/rewrap", item(&old(Purpose::Data))).await;
    let new = new.json()["ciphertext"].as_str().unwrap().to_owned();
    let mut wrong = item(&old(Purpose::Data));
    wrong["aad"] = json!("Yg==");
    let foreign = json!({"context": "exchange-key", "ciphertext": new, "aad": "YQ=="});
    let batch = json!({"batch": [
        item(&old(Purpose::Data)), item(&new), wrong, foreign, item(&old(Purpose::DataKey)), json!(5),
    ]});
    let answer = ask(&node, &trading(), "/rewrap", batch.clone()).await.json();
    let results = answer["batch"].as_array().unwrap();
    let codes: Vec<&str> = results
        .iter()
        .map(|result| result["code"].as_str().unwrap_or("ok"))
        .collect();
    assert_eq!(
        codes,
        [
            "ok",
            "ok",
            "authentication_failed",
            "wrong_context",
            "ok",
            "invalid_json"
        ]
    );
    for (place, purpose) in [(0, Purpose::Data), (1, Purpose::Data), (4, Purpose::DataKey)] {
        let moved = opened(&node, &results[place]["ciphertext"]).await;
        assert_eq!(moved, (purpose, 2, "c2VjcmV0".to_owned()), "{place}");
    }
    // Three to be opened in the one; in the other, one that was there and then the two that were opened.
    assert_eq!(
        (node.token.batches(), node.orders.batches()),
        (vec![3], vec![1, 2])
    );

    // A slot that takes nothing fails its items alone.
    for (slot, expected) in [
        (&node.token, ["overloaded", "ok", "overloaded"]),
        (
            &node.orders,
            ["overloaded", "overloaded", "authentication_failed"],
        ),
    ] {
        slot.trouble(Some(Trouble::QueueFull));
        let answer = ask(&node, &trading(), "/rewrap", batch.clone()).await.json();
        let results = answer["batch"].as_array().unwrap();
        let codes = [0, 1, 2].map(|place| results[place]["code"].as_str().unwrap_or("ok"));
        assert_eq!(codes, expected);
        slot.trouble(None);
    }
}

#[tokio::test]
async fn an_invocation_is_used_once_the_second_slot_was_asked() {
    let node = FakeNode::with_invocations(10);
    let old = item(&old(Purpose::Data));
    let batch = json!({"batch": [old, old]});
    let mut wrong = old.clone();
    wrong["aad"] = json!("");
    for (path, body) in [("/rewrap", &old), ("/rewrap", &batch)] {
        for (slot, trouble) in [
            (&node.token, Trouble::QueueFull),
            (&node.token, Trouble::Hangs),
            (&node.orders, Trouble::QueueFull),
        ] {
            slot.trouble(Some(trouble));
            ask(&node, &trading(), path, body.clone()).await;
            slot.trouble(None);
            slot.give_up();
            assert_eq!(node.meter.left(), 10, "{body}");
        }
    }
    ask(&node, &trading(), "/rewrap", wrong).await;
    assert_eq!(node.meter.left(), 10, "what did not open was not encrypted");
    ask(&node, &trading(), "/rewrap", old.clone()).await;
    ask(&node, &trading(), "/rewrap", batch.clone()).await;
    assert_eq!(node.meter.left(), 7);
    // Nobody knows what became of it in a token that hangs.
    node.orders.trouble(Some(Trouble::Hangs));
    ask(&node, &trading(), "/rewrap", old).await;
    ask(&node, &trading(), "/rewrap", batch).await;
    assert_eq!(node.meter.left(), 4);
    node.orders.give_up();
}

/// A request has the time of one, whatever number of slots it goes through.
#[tokio::test]
async fn a_second_slot_is_not_asked_when_the_first_has_left_no_time_for_it() {
    let node = FakeNode::with_invocations(10);
    let old = item(&old(Purpose::Data));
    // Of 100 ms; a call may take a third.
    node.token.trouble(Some(Trouble::Slow(Duration::from_millis(80))));
    assert_eq!(code(&node, "/rewrap", old.clone()).await, Some("token_timeout"));
    let batch = json!({"batch": [old, old]});
    let answer = ask(&node, &trading(), "/rewrap", batch.clone()).await.json();
    for place in [0, 1] {
        assert_eq!(answer["batch"][place]["code"], "token_timeout", "{answer:#}");
    }
    assert!(node.orders.batches().is_empty());
    assert_eq!(node.meter.left(), 10, "nothing was encrypted");
    // With enough of it left, it is.
    node.token.trouble(None);
    let answer = ask(&node, &trading(), "/rewrap", batch).await.json();
    assert_eq!(answer["batch"][1]["key_version"], 2, "{answer:#}");
}

/// The slots of a request share its time, whenever each of them is asked.
#[tokio::test]
async fn what_a_slot_has_no_time_to_begin_is_a_timeout_and_costs_no_invocation() {
    let node = FakeNode::with_invocations(10);
    let old = item(&old(Purpose::Data));
    let batch = json!({"batch": [old, old, old]});
    // One in the second slot; or two in the first, and both of them then in the second.
    for (slot, items, expected) in [
        (&node.orders, 1, ["ok", "token_timeout", "token_timeout"]),
        (&node.token, 2, ["ok", "ok", "token_timeout"]),
    ] {
        let left = node.meter.left();
        slot.trouble(Some(Trouble::OutOfTime(items)));
        let answer = ask(&node, &trading(), "/rewrap", batch.clone()).await.json();
        let codes = [0, 1, 2].map(|place| answer["batch"][place]["code"].as_str().unwrap_or("ok"));
        assert_eq!(codes, expected);
        assert_eq!(left - node.meter.left(), items as u64);
        assert!(node.token.until().is_some());
        assert_eq!(
            node.token.until(),
            node.orders.until(),
            "both end with the request"
        );
        slot.trouble(None);
    }
    for (path, body, slot) in [
        ("/rewrap", old.clone(), &node.token),
        ("/rewrap", old, &node.orders),
        ("/encrypt", encrypt(), &node.orders),
    ] {
        let left = node.meter.left();
        slot.trouble(Some(Trouble::OutOfTime(0)));
        assert_eq!(code(&node, path, body).await, Some("token_timeout"), "{path}");
        assert_eq!(node.meter.left(), left, "{path}");
        slot.trouble(None);
    }
}
