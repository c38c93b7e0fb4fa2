//! Invocations are taken before a token is called, one for each new ciphertext, and never more than there are.

use super::fake::Trouble;
use super::*;

fn encrypt() -> Value {
    json!({"context": "exchange-key", "plaintext": "YQ=="})
}

async fn code(node: &FakeNode, path: &str, body: Value) -> Option<ErrorCode> {
    ask(node, &trading(), path, body).await.code()
}

#[tokio::test]
async fn each_new_ciphertext_takes_one_and_decryption_none() {
    let node = FakeNode::with_invocations(4);
    let sealed = encrypted(&node, "exchange-key", b"a").await["ciphertext"].clone();
    let open = json!({"context": "exchange-key", "ciphertext": sealed});
    assert_eq!(
        code(&node, "/datakey", json!({"context": "exchange-key"})).await,
        None
    );
    assert_eq!(code(&node, "/rewrap", open.clone()).await, None);
    for _ in 0..3 {
        assert_eq!(code(&node, "/decrypt", open.clone()).await, None);
    }
    assert_eq!(node.meter.left(), 1);
    // What is refused before a token would be asked takes none.
    let foreign = json!({"context": "2fa", "plaintext": "YQ=="});
    assert_eq!(
        code(&node, "/encrypt", foreign).await,
        Some(ErrorCode::AccessDenied)
    );
    let nonsense = json!({"context": "exchange-key", "plaintext": "?"});
    assert_eq!(
        code(&node, "/encrypt", nonsense).await,
        Some(ErrorCode::InvalidBase64Plaintext)
    );
    assert_eq!(node.meter.left(), 1);
    assert_eq!(code(&node, "/encrypt", encrypt()).await, None);
    for (path, body) in [
        ("/encrypt", encrypt()),
        ("/datakey", json!({"context": "exchange-key"})),
        ("/rewrap", open.clone()),
    ] {
        let answer = ask(&node, &trading(), path, body).await;
        assert_eq!(answer.code(), Some(ErrorCode::InvocationsExhausted), "{path}");
        assert_eq!(
            (answer.response.status().as_u16(), answer.header("retry-after")),
            (503, "1")
        );
        assert_eq!(answer.json()["retryable"], true);
    }
    assert_eq!(code(&node, "/decrypt", open).await, None);
}

#[tokio::test]
async fn in_a_batch_those_items_are_refused_for_which_there_is_none() {
    let node = FakeNode::with_invocations(3);
    let mut batch = vec![encrypt(); 5];
    batch.insert(1, json!({"context": "exchange-key", "plaintext": "?"}));
    let answer = ask(&node, &trading(), "/encrypt", json!({ "batch": batch })).await;
    let codes: Vec<String> = answer.json()["batch"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| item["code"].as_str().unwrap_or("ok").to_owned())
        .collect();
    let exhausted = "invocations_exhausted";
    assert_eq!(
        codes,
        ["ok", "invalid_base64_plaintext", "ok", "ok", exhausted, exhausted]
    );
}

#[tokio::test]
async fn what_no_slot_has_taken_is_given_back_and_what_hangs_in_a_token_is_used() {
    let node = FakeNode::with_invocations(10);
    node.token.trouble(Some(Trouble::QueueFull));
    assert_eq!(
        code(&node, "/encrypt", encrypt()).await,
        Some(ErrorCode::Overloaded)
    );
    let batch = json!({"batch": vec![encrypt(); 4]});
    assert_eq!(
        ask(&node, &trading(), "/encrypt", batch).await.json()["batch"][3]["code"],
        "overloaded"
    );
    assert_eq!(node.meter.left(), 10);
    node.token.trouble(Some(Trouble::Hangs));
    assert_eq!(
        code(&node, "/encrypt", encrypt()).await,
        Some(ErrorCode::TokenTimeout)
    );
    assert_eq!(node.meter.left(), 9);
}
