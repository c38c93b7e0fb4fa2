//! Encrypting here and decrypting there: every version on every node, every size, who may open what.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::{Playground, until};
use hsm_api::admin::CreateKekRequest;
use hsm_api::client::{Method, Retry};
use hsm_api::data::{DataKeyRequest, DecryptRequest, EncryptRequest, RewrapRequest};
use hsm_api::{Base64, Client, ErrorCode, headers, paths};

use crate::common::{CONTEXT, Sealed, formed_with, open, open_everywhere, seal, seal_under};

/// A context that the playground has no key of.
const UNBOUND: &str = "order-key";
/// From a start until a node is ready, and until it has compared its configuration with the state.
const STARTED: Duration = Duration::from_secs(60);

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
    let cluster = formed_with(Playground::builder().nodes(1), |config| {
        // Both units may use everything: what else is refused is refused for what it is bound to.
        config
            .replacen(&mode_of(UNBOUND, "shared"), &mode_of(UNBOUND, "none"), 1)
            .replacen(
                "Trading: [exchange-key, order-key]",
                "Trading: [exchange-key, order-key, 2fa]",
                1,
            )
            .replacen("\"2FA\": [2fa]", "\"2FA\": [2fa, exchange-key, order-key]", 1)
    })
    .await?;
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

    let two_factor_1 = cluster.client("2fa-1")?;
    for (client, context, sealed) in [(&two_factor_1, CONTEXT, &shared), (&trading_1, "2fa", &own)] {
        let outcome = client
            .decrypt(&DecryptRequest::new(context, sealed.ciphertext.clone()))
            .await;
        assert_eq!(
            refused(outcome),
            Some(ErrorCode::AuthenticationFailed),
            "{context}"
        );
    }
    binds_to_nobody(&cluster, &trading_1, &two_factor_1).await?;

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

    a_binding_is_for_good(&cluster, &shared).await?;
    cluster.passed();
    Ok(())
}

/// A context's line in the playground's configuration.
fn mode_of(context: &str, mode: &str) -> String {
    format!("\"{context}\": {{type: aes, mode: {mode}}}")
}

/// With the mode `none`, whoever may use the context opens what anybody of it has sealed.
async fn binds_to_nobody(cluster: &Playground, one: &Client, other: &Client) -> Result<()> {
    let admin = cluster.client("admin")?.with_retry(Retry::Until(STARTED));
    admin.create_kek(&CreateKekRequest::new(UNBOUND), None).await?;
    let sealed = seal_under(one, UNBOUND, b"for everybody", 1).await?;
    open(other, UNBOUND, &sealed).await?;
    let request = RewrapRequest::new(UNBOUND, sealed.ciphertext.clone());
    let rewrapped = Sealed {
        ciphertext: other.rewrap(&request).await?.into_body().ciphertext,
        ..sealed
    };
    open(one, UNBOUND, &rewrapped).await?;
    let made = one.datakey(&DataKeyRequest::new(UNBOUND)).await?.into_body();
    let plaintext = made.plaintext.context("a data key without its plaintext")?;
    let request = DecryptRequest::new(UNBOUND, made.ciphertext).as_data_key();
    let opened = other.decrypt(&request).await?;
    ensure!(
        opened.plaintext.as_slice() == plaintext.as_slice(),
        "the data key is another one"
    );
    Ok(())
}

/// What a configuration says later of a context that exists is reported, and changes nothing.
async fn a_binding_is_for_good(cluster: &Playground, before: &Sealed) -> Result<()> {
    let node = cluster.node(1);
    let differs = async || {
        let metrics = node.metrics().await.ok()?;
        metrics.with_label("hsm_config_differs", "section", "bindings")
    };
    ensure!(differs().await == Some(0.0), "a binding differs already");
    node.kill().await?;
    let config = node.config()?;
    let (made, later) = (mode_of(CONTEXT, "shared"), mode_of(CONTEXT, "private"));
    let changed = config.replacen(&made, &later, 1);
    ensure!(
        changed != config,
        "the playground's configuration has changed:\n{config}"
    );
    node.set_config(&changed)?;
    cluster.start_node(1).await?;
    node.wait_ready(STARTED).await?;
    until("hsm_config_differs of bindings", STARTED, async || {
        (differs().await? == 1.0).then_some(())
    })
    .await?;
    let (first, second) = (cluster.client("trading-1")?, cluster.client("trading-2")?);
    let after = seal(&first, CONTEXT, b"after").await?;
    // A private one would open for its own name alone.
    for sealed in [before, &after] {
        open(&second, CONTEXT, sealed).await?;
    }
    let two_factor = cluster.client("2fa-1")?;
    for sealed in [before, &after] {
        let request = DecryptRequest::new(CONTEXT, sealed.ciphertext.clone());
        let code = two_factor
            .decrypt(&request)
            .await
            .err()
            .and_then(|error| error.code());
        ensure!(code == Some(ErrorCode::AuthenticationFailed), "{code:?}");
    }
    Ok(())
}

/// What a flipped bit of a byte of an envelope may be answered with. Bytes 0 to 7 say what it is, 8 to 23 which key, 24 to
/// 27 its version; IV, ciphertext and tag follow.
fn codes_of_a_flip(byte: usize, with_key_id: bool) -> &'static [ErrorCode] {
    use ErrorCode::{AuthenticationFailed, NotADataCiphertext, UnknownKeyVersion};
    match (byte, with_key_id) {
        // No envelope any more, one that does not come out as data, or one that is bound to somebody else.
        (0..8, false) => &[UnknownKeyVersion, NotADataCiphertext, AuthenticationFailed],
        (8..24, false) => &[UnknownKeyVersion],
        // What is no envelope of the context is taken for version 1's, under the key that is named.
        (0..8, true) => &[NotADataCiphertext, AuthenticationFailed],
        _ => &[AuthenticationFailed],
    }
}

async fn open_with_key_id(client: &Client, sealed: &Sealed) -> Result<()> {
    let request = DecryptRequest::new(CONTEXT, sealed.ciphertext.clone()).with_key_id(&sealed.key_id);
    let opened = client.decrypt(&request).await?;
    ensure!(
        opened.plaintext.as_slice() == sealed.plaintext,
        "it decrypted to something else"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_flipped_bit_is_the_callers_fault() -> Result<()> {
    let cluster = Playground::start(1).await?;
    let client = cluster.client("trading-1")?;
    let sealed = seal(&client, CONTEXT, b"sixteen bytes ok").await?;
    let envelope = sealed.ciphertext.as_slice();
    // Each is asked once: the first answer has to be final. Version 1's clients send the key_id along.
    for key_id in [None, Some(sealed.key_id.as_str())] {
        for bit in 0..envelope.len() * 8 {
            let mut altered = envelope.to_vec();
            altered[bit / 8] ^= 1 << (bit % 8);
            let mut request = DecryptRequest::new(CONTEXT, altered);
            request.key_id = key_id.map(str::to_owned);
            let flipped = format!("bit {bit} of {}, key_id {key_id:?}", envelope.len() * 8);
            let error = client.decrypt(&request).await.err();
            let error = error.with_context(|| format!("{flipped}: it decrypted"))?;
            let code = error.code().with_context(|| format!("{flipped}: {error}"))?;
            let expected = codes_of_a_flip(bit / 8, key_id.is_some());
            ensure!(
                error.status() == Some(400) && expected.contains(&code),
                "{flipped}: {error}"
            );
        }
    }
    open(&client, CONTEXT, &sealed).await?;
    open_with_key_id(&client, &sealed).await?;
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
    // And what a node serves as its description is the one that is checked in.
    let described = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
    let answer = client
        .request(Method::GET, paths::OPENAPI, &[], Vec::new())
        .await?;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.header("content-type"), Some("application/json"));
    ensure!(
        answer.body.as_slice() == std::fs::read(&described)?,
        "{} is something else than {}",
        paths::OPENAPI,
        described.display()
    );
    // Every path of it that only reads says from which state it answers, to an application and to the administrator,
    // whether it may or not.
    let document: serde_json::Value = serde_json::from_slice(answer.body.as_slice())?;
    let mut seen = 0;
    for (path, item) in document["paths"].as_object().context("no paths")? {
        let of_the_api = item.get("servers").is_none();
        if !of_the_api || item.get("get").is_none() || path.contains('{') {
            continue;
        }
        for who in ["trading-1", "admin"] {
            let asked = cluster.client(who)?;
            let answer = asked
                .request(Method::GET, path, &[(headers::X_HSM_REQUEST, "1")], Vec::new())
                .await?;
            let index = answer.header(headers::X_HSM_INDEX);
            let index = index.with_context(|| format!("{who} {path}: {}", answer.status))?;
            index.parse::<hsm_api::StateIndex>()?;
            seen += 1;
        }
    }
    ensure!(seen > 20, "only {seen} answers were looked at");
    cluster.passed();
    Ok(())
}
