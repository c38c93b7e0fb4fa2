//! Rewrapping, for oneself and for others, and data keys.

use super::fake::v1_ciphertext;
use super::log_lines::Lines;
use super::*;

fn operator() -> Principal {
    principal("operator-1", Some("Operator"))
}

fn owner() -> Principal {
    principal("2fa-1", Some("2FA"))
}

/// As the caller encrypts it under the context.
async fn sealed(node: &FakeNode, caller: &Principal, context: &str) -> Value {
    let body = json!({"context": context, "plaintext": "b2xk", "aad": "YQ=="});
    let answer = ask(node, caller, "/encrypt", body).await;
    assert_eq!(answer.response.status(), 200);
    answer.json()["ciphertext"].clone()
}

/// What the caller reads of a ciphertext, or the code of the refusal.
async fn opened(node: &FakeNode, caller: &Principal, context: &str, ciphertext: &Value) -> String {
    let body = json!({"context": context, "ciphertext": ciphertext, "aad": "YQ=="});
    let answer = ask(node, caller, "/decrypt", body).await;
    let json = answer.json();
    let member = if answer.response.status() == 200 {
        "plaintext"
    } else {
        "code"
    };
    json[member].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_ciphertext_of_either_format_comes_under_the_active_version() {
    let node = FakeNode::new();
    let v1 = STANDARD.encode(v1_ciphertext("exchange-key", "Trading", b"old"));
    let body = json!({"context": "exchange-key", "ciphertext": v1, "key_id": "kek-exchange-key-v1"});
    let answer = ask(&node, &trading(), "/rewrap", body).await.json();
    assert_eq!(answer["key_id"], "kek-exchange-key-v2");
    assert_eq!(answer["key_version"], 2);
    assert!(answer.get("plaintext").is_none() && answer.get("status").is_none());
    let body = json!({"context": "exchange-key", "ciphertext": answer["ciphertext"]});
    let plain = ask(&node, &trading(), "/decrypt", body).await;
    assert_eq!(plain.json(), json!({"plaintext": "b2xk"}));

    // Its associated data stays, and is needed.
    let first = sealed(&node, &trading(), "exchange-key").await;
    let rewrap = |aad: &str| json!({"context": "exchange-key", "ciphertext": first, "aad": aad});
    let moved = ask(&node, &trading(), "/rewrap", rewrap("YQ==")).await.json();
    let read = opened(&node, &trading(), "exchange-key", &moved["ciphertext"]).await;
    assert_eq!(read, "b2xk");
    let answer = ask(&node, &trading(), "/rewrap", rewrap("")).await;
    assert_eq!(answer.code(), Some(ErrorCode::AuthenticationFailed));
}

#[tokio::test]
async fn one_rewraps_what_is_ones_own() {
    let node = FakeNode::new();
    let of_owner = sealed(&node, &owner(), "2fa").await;
    let body = json!({"context": "2fa", "ciphertext": of_owner, "aad": "YQ=="});
    for (caller, code) in [
        (owner(), None),
        (
            principal("2fa-2", Some("2FA")),
            Some(ErrorCode::AuthenticationFailed),
        ),
        (trading(), Some(ErrorCode::AccessDenied)),
        (
            principal("x", Some("Nobody")),
            Some(ErrorCode::UnknownOrganizationalUnit),
        ),
        // A role is no mapping.
        (operator(), Some(ErrorCode::UnknownOrganizationalUnit)),
    ] {
        let answer = ask(&node, &caller, "/rewrap", body.clone()).await;
        assert_eq!(answer.code(), code, "{caller}");
    }
}

#[tokio::test]
async fn an_operator_rewraps_private_data_for_its_owner_and_reads_nothing_of_it() {
    let node = FakeNode::new();
    let of_owner = sealed(&node, &owner(), "2fa").await;
    let body = json!({
        "context": "2fa", "ciphertext": of_owner, "aad": "YQ==", "principal": {"CN": "2fa-1", "ou": "2FA"},
    });
    let answer = ask(&node, &operator(), "/rewrap", body.clone()).await;
    assert_eq!(answer.response.status(), 200, "{:?}", answer.code());
    let moved = answer.json()["ciphertext"].clone();
    assert_eq!(opened(&node, &owner(), "2fa", &moved).await, "b2xk");
    let refused = opened(&node, &operator(), "2fa", &moved).await;
    assert_eq!(refused, "unknown_organizational_unit");

    // Of somebody else it is not.
    let mut wrong = body.clone();
    wrong["principal"]["CN"] = json!("2fa-2");
    let answer = ask(&node, &operator(), "/rewrap", wrong).await;
    assert_eq!(answer.code(), Some(ErrorCode::AuthenticationFailed));

    // Who has no role may name nobody, not even himself.
    for caller in [owner(), trading(), principal("x", Some("2FA"))] {
        let answer = ask(&node, &caller, "/rewrap", body.clone()).await;
        assert_eq!(answer.code(), Some(ErrorCode::RoleRequired), "{caller}");
        assert_eq!(answer.response.status(), 403);
    }
    let nobody = principal("x", Some("Nobody"));
    let answer = ask(&node, &nobody, "/rewrap", body).await;
    assert_eq!(answer.code(), Some(ErrorCode::UnknownOrganizationalUnit));
}

#[tokio::test]
async fn an_operator_hands_data_on_to_another_principal() {
    let node = FakeNode::new();
    let of_owner = sealed(&node, &owner(), "2fa").await;
    let of_trading = sealed(&node, &trading(), "exchange-key").await;
    let rewrap = |context: &str, ciphertext: &Value, principal: Value, rebind: Value| {
        json!({
            "context": context, "ciphertext": ciphertext, "aad": "YQ==", "principal": principal,
            "rebind": rebind,
        })
    };
    let body = rewrap("2fa", &of_owner, json!({"cn": "2fa-1"}), json!({"cn": "2fa-2"}));
    let moved = ask(&node, &operator(), "/rewrap", body).await.json()["ciphertext"].clone();
    assert_eq!(
        opened(&node, &principal("2fa-2", Some("2FA")), "2fa", &moved).await,
        "b2xk"
    );
    assert_eq!(
        opened(&node, &owner(), "2fa", &moved).await,
        "authentication_failed"
    );

    for (context, ciphertext, principal, rebind, code) in [
        // What the context binds to has to be named, and somebody.
        (
            "2fa",
            &of_owner,
            json!({"cn": "2fa-1"}),
            json!({"ou": "2FA"}),
            ErrorCode::InvalidArgument,
        ),
        (
            "exchange-key",
            &of_trading,
            json!({"ou": "Trading"}),
            json!({"cn": "trading-2"}),
            ErrorCode::InvalidArgument,
        ),
        (
            "2fa",
            &of_owner,
            json!({}),
            json!({"cn": "2fa-2"}),
            ErrorCode::InvalidArgument,
        ),
        (
            "2fa",
            &of_owner,
            json!({"cn": "2fa-1"}),
            json!({"cn": ""}),
            ErrorCode::InvalidArgument,
        ),
        ("2fa", &of_owner, json!(5), json!(null), ErrorCode::InvalidJson),
        (
            "2fa",
            &of_owner,
            json!("2fa-1"),
            json!(null),
            ErrorCode::InvalidJson,
        ),
        (
            "2fa",
            &of_owner,
            json!({"cn": 5}),
            json!(null),
            ErrorCode::InvalidJson,
        ),
        // Without the old principal it is the operator's own, which needs the mapping.
        (
            "2fa",
            &of_owner,
            json!(null),
            json!({"cn": "2fa-2"}),
            ErrorCode::UnknownOrganizationalUnit,
        ),
        (
            "empty-key",
            &of_owner,
            json!({"cn": "2fa-1"}),
            json!(null),
            ErrorCode::ContextHasNoKey,
        ),
        (
            "no-such",
            &of_owner,
            json!({"cn": "2fa-1"}),
            json!(null),
            ErrorCode::ContextHasNoKey,
        ),
    ] {
        let body = rewrap(context, ciphertext, principal, rebind);
        let answer = ask(&node, &operator(), "/rewrap", body.clone()).await;
        assert_eq!(answer.code(), Some(code), "{body}");
    }
}

#[tokio::test]
async fn who_rewraps_for_others_is_in_the_audit_without_any_data() {
    let lines = Lines::default();
    let _logged_here = lines.collect();
    let node = FakeNode::new();
    let of_owner = sealed(&node, &owner(), "2fa").await;
    let item = |principal: &str, rebind: Value| {
        json!({
            "context": "2fa", "ciphertext": of_owner, "aad": "YQ==", "principal": {"cn": principal},
            "rebind": rebind,
        })
    };
    let batch = json!({"batch": [
        item("2fa-1", json!(null)),
        item("2fa-1", json!({"cn": "2fa-2\nforged"})),
        item("2fa-3", json!(null)),
    ]});
    let caller = principal("audited", Some("Operator"));
    let answer = ask(&node, &caller, "/rewrap", batch).await;
    let request_id = answer.header("x-request-id").to_owned();
    let stranger = principal("stranger", Some("2FA"));
    ask(&node, &stranger, "/rewrap", item("2fa-1", json!(null))).await;
    // Whoever rewraps his own leaves no line.
    let own = json!({"context": "2fa", "ciphertext": of_owner, "aad": "YQ=="});
    ask(&node, &owner(), "/rewrap", own).await;

    let audit: Vec<Value> = lines
        .all()
        .into_iter()
        .filter(|line| line["target"] == "audit")
        .collect();
    let outcomes: Vec<&str> = audit
        .iter()
        .map(|line| line["outcome"].as_str().unwrap())
        .collect();
    assert_eq!(outcomes, ["done", "done", "failed", "refused"]);
    for line in &audit[..3] {
        for (field, value) in [
            ("action", "data.rewrap"),
            ("resource", "2fa"),
            ("request_id", request_id.as_str()),
            ("versions", "1 to 1"),
            ("issuer", "CN=CA"),
        ] {
            assert_eq!(line[field], value, "{field} in {line}");
        }
        assert!(
            line["principal"].as_str().unwrap().contains("CN=audited"),
            "{line}"
        );
    }
    assert_eq!(audit[0]["encrypted_for"], "CN=\"2fa-1\" OU=\"\"");
    assert_eq!(audit[0]["rebound_to"], "");
    assert_eq!(audit[1]["rebound_to"], "CN=\"2fa-2\u{fffd}forged\" OU=\"\"");
    assert_eq!(audit[2]["code"], "authentication_failed");
    assert_eq!(audit[3]["code"], "role_required");
    let text = audit.iter().map(Value::to_string).collect::<String>();
    for secret in ["b2xk", "YQ==", of_owner.as_str().unwrap()] {
        assert!(!text.contains(secret), "{text}");
    }
}

#[tokio::test]
async fn a_data_key_comes_out_only_where_one_is_asked_for() {
    let node = FakeNode::new();
    let context = "exchange-key";
    let make = async |body: Value| ask(&node, &trading(), "/datakey", body).await;
    let made = make(json!({"context": context, "aad": "YQ=="})).await.json();
    assert_eq!(made["key_id"], "kek-exchange-key-v2");
    assert_eq!(made["key_version"], 2);
    let key = made["plaintext"].as_str().unwrap();
    assert_eq!(STANDARD.decode(key).unwrap().len(), 32);

    let decrypt = async |path: &str, ciphertext: &Value, purpose: &str| {
        let body = json!({"context": context, "ciphertext": ciphertext, "aad": "YQ==", "purpose": purpose});
        ask(&node, &trading(), path, body).await
    };
    let opened = decrypt("/decrypt", &made["ciphertext"], "datakey").await;
    assert_eq!(opened.json(), json!({"plaintext": key}));
    for purpose in ["", "data"] {
        let refused = decrypt("/decrypt", &made["ciphertext"], purpose).await;
        assert_eq!(refused.code(), Some(ErrorCode::NotADataCiphertext));
    }
    let data = sealed(&node, &trading(), context).await;
    let refused = decrypt("/decrypt", &data, "datakey").await;
    assert_eq!(refused.code(), Some(ErrorCode::NotADataKey));
    assert_eq!(refused.json()["error"], "decryption failed");

    // A data key is rewrapped as one.
    let moved = decrypt("/rewrap", &made["ciphertext"], "").await.json();
    let opened = decrypt("/decrypt", &moved["ciphertext"], "datakey").await;
    assert_eq!(opened.json(), json!({"plaintext": key}));
    let refused = decrypt("/decrypt", &moved["ciphertext"], "").await;
    assert_eq!(refused.code(), Some(ErrorCode::NotADataCiphertext));
}

#[tokio::test]
async fn a_data_key_has_the_length_that_was_asked_for_and_stays_back_if_it_was_not() {
    let node = FakeNode::new();
    for (bits, plaintext, length) in [
        (json!("256"), json!("true"), Some(32)),
        (json!("128"), json!(null), Some(16)),
        (json!(128), json!(true), Some(16)),
        (json!(null), json!("false"), None),
        (json!(256), json!(false), None),
    ] {
        let body = json!({"context": "exchange-key", "bits": bits, "plaintext": plaintext});
        let answer = ask(&node, &trading(), "/datakey", body.clone()).await;
        assert_eq!(answer.response.status(), 200, "{body}");
        let json = answer.json();
        let key = json
            .get("plaintext")
            .map(|key| STANDARD.decode(key.as_str().unwrap()).unwrap().len());
        assert_eq!(key, length, "{body}");
        assert!(json["ciphertext"].as_str().is_some());
    }
    for (member, value, code) in [
        ("bits", json!("512"), ErrorCode::InvalidArgument),
        ("bits", json!(-1), ErrorCode::InvalidJson),
        ("plaintext", json!("no"), ErrorCode::InvalidArgument),
        ("plaintext", json!([]), ErrorCode::InvalidJson),
        ("aad", json!("?"), ErrorCode::InvalidBase64Aad),
    ] {
        let mut body = json!({"context": "exchange-key"});
        body[member] = value;
        let answer = ask(&node, &trading(), "/datakey", body.clone()).await;
        assert_eq!(answer.code(), Some(code), "{body}");
    }
    for (context, code) in [
        ("2fa", ErrorCode::AccessDenied),
        ("empty-key", ErrorCode::ContextHasNoKey),
    ] {
        let answer = ask(&node, &trading(), "/datakey", json!({"context": context})).await;
        assert_eq!(answer.code(), Some(code));
    }
}
