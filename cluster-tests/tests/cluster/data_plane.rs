//! Encrypting here and decrypting there: every version on every node, every size, who may open what.

use std::time::Duration;

use anyhow::{Result, ensure};
use cluster_tests::Playground;
use hsm_api::client::{Method, Retry};
use hsm_api::data::{DecryptRequest, EncryptRequest};
use hsm_api::{Base64, ErrorCode, headers, paths};

use crate::common::{CONTEXT, open, open_everywhere, seal, seal_under};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_version_and_size_decrypts_on_every_node() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let sizes = [0, 1, 64 * 1024];
    let mut acknowledged = Vec::new();
    for version in 1..=3 {
        for node in cluster.nodes() {
            let client = cluster.client_on("trading-1", node.number)?;
            // A follower hears of an activation a moment after it was acknowledged.
            seal_under(&client, CONTEXT, b"applied", version).await?;
            for size in sizes {
                let plaintext: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
                let sealed = seal(&client, CONTEXT, &plaintext).await?;
                ensure!(
                    sealed.version == version,
                    "{} encrypts under version {}",
                    node.id(),
                    sealed.version
                );
                ensure!(
                    sealed.key_id == format!("kek-{CONTEXT}-v{version}"),
                    "key_id {}",
                    sealed.key_id
                );
                acknowledged.push(sealed);
            }
        }
        if version < 3 {
            cluster.client("admin")?.rotate(CONTEXT, None).await?;
        }
    }
    open_everywhere(&cluster, "trading-1", CONTEXT, &acknowledged).await?;
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ciphertext_opens_only_for_whom_and_with_what_it_was_made() -> Result<()> {
    let cluster = Playground::start(1).await?;
    let trading_1 = cluster.client("trading-1")?;
    let refused = |outcome: Result<_, hsm_api::ClientError>| match outcome {
        Ok(_) => None,
        Err(error) => error.code(),
    };

    // Shared: anyone of the unit. Private: the certificate's name alone, whoever renews it.
    let shared = seal(&trading_1, CONTEXT, b"for the unit").await?;
    open(&cluster.client("trading-2")?, CONTEXT, &shared).await?;
    let own = seal(&cluster.client("2fa-1")?, "2fa", b"for one").await?;
    open(&cluster.client("2fa-1")?, "2fa", &own).await?;
    let endpoints = [cluster.node(1).endpoint()];
    let renewed = cluster.pki().issue("2fa-1", Some("2FA"))?;
    open(&cluster.pki().client(Some(&renewed), &endpoints)?, "2fa", &own).await?;
    let colleague = cluster.pki().issue("2fa-2", Some("2FA"))?;
    let colleague = cluster.pki().client(Some(&colleague), &endpoints)?;
    let outcome = colleague
        .decrypt(&DecryptRequest::new("2fa", own.ciphertext.clone()))
        .await;
    assert_eq!(refused(outcome), Some(ErrorCode::AuthenticationFailed));

    // Associated data is needed again, and exactly.
    let request = EncryptRequest::new(CONTEXT, b"with aad").with_aad(b"order 42");
    let sealed = trading_1.encrypt(&request).await?.into_body();
    let ask = |aad: Option<&[u8]>| {
        let mut request = DecryptRequest::new(CONTEXT, sealed.ciphertext.clone());
        request.aad = aad.map(Base64::from);
        request
    };
    let opened = trading_1.decrypt(&ask(Some(b"order 42"))).await?;
    assert_eq!(opened.plaintext.as_slice(), b"with aad");
    for aad in [None, Some(&b"order 43"[..]), Some(&b""[..])] {
        let outcome = trading_1.decrypt(&ask(aad)).await;
        assert_eq!(refused(outcome), Some(ErrorCode::AuthenticationFailed), "{aad:?}");
    }

    // v1's clients send the key_id back; it may not contradict the ciphertext.
    let with_key_id =
        |key_id: &str| DecryptRequest::new(CONTEXT, shared.ciphertext.clone()).with_key_id(key_id);
    trading_1.decrypt(&with_key_id(&shared.key_id)).await?;
    let outcome = trading_1.decrypt(&with_key_id("kek-exchange-key-v9")).await;
    assert_eq!(refused(outcome), Some(ErrorCode::KeyIdMismatch));

    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_flipped_bit_is_the_callers_fault() -> Result<()> {
    let cluster = Playground::start(1).await?;
    // A version above the known ones is asked for at the leader, a limited number of times a second.
    let client = cluster
        .client("trading-1")?
        .with_retry(Retry::Until(Duration::from_secs(20)));
    let sealed = seal(&client, CONTEXT, b"sixteen bytes ok").await?;
    let envelope = sealed.ciphertext.as_slice();
    for bit in 0..envelope.len() * 8 {
        let mut altered = envelope.to_vec();
        altered[bit / 8] ^= 1 << (bit % 8);
        let outcome = client.decrypt(&DecryptRequest::new(CONTEXT, altered)).await;
        let Err(error) = outcome else {
            anyhow::bail!(
                "bit {bit} of {} was flipped, and it decrypted",
                envelope.len() * 8
            );
        };
        let code = error.code();
        let expected = matches!(
            code,
            Some(
                ErrorCode::AuthenticationFailed
                    | ErrorCode::UnknownKeyVersion
                    | ErrorCode::NotADataCiphertext
                    | ErrorCode::WrongContext
                    | ErrorCode::CiphertextTooShort
            )
        );
        ensure!(expected && error.status() == Some(400), "bit {bit}: {error}");
    }
    open(&client, CONTEXT, &sealed).await?;
    // None of it was the token's fault.
    ensure!(
        cluster.node(1).is_ready().await,
        "not ready after altered ciphertexts"
    );
    let metrics = cluster.node(1).metrics().await?;
    assert_eq!(metrics.with_label("hsm_slot_state", "state", "failed"), Some(0.0));
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_says_who_made_it_and_from_which_state() -> Result<()> {
    let cluster = Playground::start(1).await?;
    let client = cluster.client("trading-1")?;
    let body = br#"{"context":"exchange-key","plaintext":"aGVsbG8="}"#;
    let answer = client
        .request(
            Method::POST,
            paths::ENCRYPT,
            &[("content-type", "application/json")],
            body.to_vec(),
        )
        .await?;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.header(headers::X_HSM_NODE), Some("hsm-node-1"));
    let index = answer.header(headers::X_HSM_INDEX).unwrap_or_default();
    let index: hsm_api::StateIndex = index.parse()?;
    ensure!(index.index > 0, "index {index}");
    ensure!(answer.header(headers::X_REQUEST_ID).is_some(), "no request id");
    // curl sends a form's content type; v1 did not mind.
    let curl = [("content-type", "application/x-www-form-urlencoded")];
    let answer = client
        .request(Method::POST, paths::ENCRYPT, &curl, body.to_vec())
        .await?;
    assert_eq!(answer.status, 200, "{}", answer.text());
    cluster.passed();
    Ok(())
}
