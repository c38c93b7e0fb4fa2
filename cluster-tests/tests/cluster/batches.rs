//! Batches over several slots, rewrapping after a rotation and for others, and data keys, on real nodes and tokens.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use cluster_tests::shim::{SOFTHSM, Shim};
use cluster_tests::{Playground, until};
use hsm_api::client::Method;
use hsm_api::data::{
    Batch, DataKeyBits, DataKeyRequest, DecryptRequest, DecryptResponse, EncryptRequest, EncryptResponse,
    ItemResult, RewrapRequest,
};
use hsm_api::{Base64, Client, ClientError, ErrorCode, paths};

use crate::common::{CONTEXT, formed_with, open, seal, seal_under};
use crate::sessions::{LOG, THREADS, sessions, single_requests_have_several};

const PRIVATE: &str = "2fa";
/// What takes milliseconds, on a machine that stands still now and then.
const SOON: Duration = Duration::from_secs(30);
const ITEMS: usize = 1000;

/// The context of an item: every other one, each in a slot of its own.
fn context(number: usize) -> &'static str {
    if number.is_multiple_of(2) {
        CONTEXT
    } else {
        PRIVATE
    }
}

fn code<T>(outcome: Result<T, ClientError>) -> Option<ErrorCode> {
    outcome.err().and_then(|error| error.code())
}

/// Status and code of each item that was refused.
type Refusals = Vec<Option<(u16, Option<ErrorCode>)>>;

fn refusals<T>(batch: &[ItemResult<T>]) -> Refusals {
    let refusal = |result: &ItemResult<T>| {
        let error = result.as_err()?;
        Some((error.status, error.error_code()))
    };
    batch.iter().map(refusal).collect()
}

/// What [`refusals`] has to say, in the order of the items.
fn expected<const N: usize>(codes: [Option<ErrorCode>; N]) -> Refusals {
    let refusal = |code: Option<ErrorCode>| code.map(|code| (code.status(), Some(code)));
    codes.into_iter().map(refusal).collect()
}

fn sealed(number: usize, result: &ItemResult<EncryptResponse>) -> Result<&EncryptResponse> {
    match result {
        ItemResult::Ok(sealed) => Ok(sealed),
        ItemResult::Err(error) => bail!("item {number}: {error:?}"),
    }
}

/// One item of the batch that is opened, and the code that it has to get.
fn item(number: usize, sealed: &EncryptResponse) -> (DecryptRequest, Option<ErrorCode>) {
    let mut bytes = sealed.ciphertext.as_slice().to_vec();
    match number % 10 {
        3 => {
            let end = bytes.len() - 1;
            bytes[end] ^= 1;
            let request = DecryptRequest::new(context(number), bytes);
            (request, Some(ErrorCode::AuthenticationFailed))
        }
        6 => {
            bytes.truncate(40);
            let request = DecryptRequest::new(context(number), bytes);
            (request, Some(ErrorCode::CiphertextTooShort))
        }
        8 => (
            DecryptRequest::new("no-such-context", bytes),
            Some(ErrorCode::AccessDenied),
        ),
        9 => (
            DecryptRequest::new(context(number), bytes).as_data_key(),
            Some(ErrorCode::NotADataKey),
        ),
        _ => (DecryptRequest::new(context(number), bytes), None),
    }
}

fn check(number: usize, result: &ItemResult<DecryptResponse>, expected: Option<ErrorCode>) -> Result<()> {
    match (result, expected) {
        (ItemResult::Ok(opened), None) => ensure!(
            opened.plaintext.as_slice() == format!("text {number}").as_bytes(),
            "item {number} is another one's"
        ),
        (ItemResult::Err(error), Some(code)) => ensure!(
            error.error_code() == Some(code) && error.status == code.status(),
            "item {number}: {error:?} instead of {code}"
        ),
        (result, expected) => bail!("item {number}: {result:?} instead of {expected:?}"),
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_items_over_two_slots_are_answered_in_order_on_every_node() -> Result<()> {
    let folder = tempfile::Builder::new().prefix("hsm-batches-").tempdir()?;
    let shim = Shim::build(folder.path(), "shim", Path::new(SOFTHSM))?;
    let both = |config: &str| {
        let mappings = (
            "Trading: [exchange-key, order-key]",
            "Trading: [exchange-key, order-key, 2fa]",
        );
        config
            .replace(mappings.0, mappings.1)
            .replace("contexts: [", &format!("threads: {THREADS}, contexts: ["))
            .replace(SOFTHSM, &shim.library().display().to_string())
    };
    let cluster = formed_with(Playground::builder(), both).await?;
    shim.obey(&[LOG])?;
    for node in cluster.nodes() {
        let client = cluster.client_on("trading-1", node.number)?;
        let texts = (0..ITEMS).map(|n| EncryptRequest::new(context(n), format!("text {n}").into_bytes()));
        let answer = client.encrypt_batch(&Batch::new(texts)).await?.into_body();
        ensure!(
            answer.batch.len() == ITEMS,
            "{} of {ITEMS} answers",
            answer.batch.len()
        );
        // However many threads a slot has, a batch is one session's.
        assert_eq!(sessions(&shim, &node)?, [ITEMS / 2; 2], "{}", node.id());
        let mut items = Vec::new();
        for (number, result) in answer.batch.iter().enumerate() {
            let sealed = sealed(number, result)?;
            ensure!(
                sealed.key_id == format!("kek-{}-v1", context(number)),
                "item {number}: {}",
                sealed.key_id
            );
            items.push(item(number, sealed));
        }
        let requests = Batch::new(items.iter().map(|(request, _)| request.clone()));
        for other in cluster.nodes() {
            let client = cluster.client_on("trading-1", other.number)?;
            let opened = client.decrypt_batch(&requests).await?.into_body();
            ensure!(
                opened.batch.len() == ITEMS,
                "{} of {ITEMS} answers",
                opened.batch.len()
            );
            for (number, (result, (_, expected))) in opened.batch.iter().zip(&items).enumerate() {
                check(number, result, *expected).with_context(|| other.id())?;
            }
        }
    }
    single_requests_have_several(&cluster, &cluster.node(1), &shim).await?;
    // Hundreds of bad ciphertexts cost the tokens nothing.
    for node in cluster.nodes() {
        node.wait_ready(SOON).await?;
        let metrics = node.metrics().await?;
        assert_eq!(metrics.with_label("hsm_slot_state", "state", "failed"), Some(0.0));
    }
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_is_refused_as_a_whole_only_for_what_concerns_all_of_it() -> Result<()> {
    let cluster = Playground::start(1).await?;
    let client = cluster.client("trading-1")?;
    let item = r#"{"plaintext":"YQ=="}"#;
    let body = |items: &[String], beside: &str| {
        format!(
            r#"{{"context":"exchange-key",{beside}"batch":[{}]}}"#,
            items.join(",")
        )
    };
    let post = async |body: String| {
        client
            .request(
                Method::POST,
                paths::ENCRYPT,
                &[("content-type", "application/json")],
                body,
            )
            .await
    };
    let many = vec![item.to_owned(); ITEMS + 1];
    let large = vec![format!(r#"{{"plaintext":"{}"}}"#, "A".repeat(64 << 10)); 70];
    for (text, code) in [
        (body(&many, ""), ErrorCode::BatchTooLarge),
        (body(&large, ""), ErrorCode::BodyTooLarge),
        (body(&[], r#""plaintext":"YQ==","#), ErrorCode::InvalidArgument),
        (r#"{"batch":5}"#.to_owned(), ErrorCode::InvalidJson),
        (r#"{"batch":[{]}"#.to_owned(), ErrorCode::InvalidJson),
    ] {
        let answer = post(text).await?;
        let problem = answer.problem().context("no problem")?;
        ensure!(
            problem.code == code.as_str() && answer.status == code.status(),
            "{} instead of {code}",
            answer.text()
        );
    }
    // Each item is read as version 1 read a request, and a bad one has an answer of its own.
    let items = [
        item,
        r#"{"PlainText":"Y\r\nQ==","other":{"a":[1]}}"#,
        r#"{"plaintext":5}"#,
        r#"{"plaintext":"%"}"#,
        r#"{"context":"2fa","plaintext":""}"#,
        "7",
        // 1.2 MB, more than a single request may have.
        &format!(r#"{{"plaintext":"{}"}}"#, "A".repeat(1_200_000)),
    ];
    let answer = post(body(&items.map(str::to_owned), "")).await?;
    ensure!(answer.status == 200, "{}", answer.text());
    let answer: serde_json::Value = serde_json::from_str(&answer.text())?;
    let results = answer["batch"].as_array().context("no batch")?;
    let codes: Vec<&str> = results
        .iter()
        .map(|result| result["code"].as_str().unwrap_or("ok"))
        .collect();
    assert_eq!(
        codes,
        [
            "ok",
            "ok",
            "invalid_json",
            "invalid_base64_plaintext",
            "access_denied",
            "invalid_json",
            "ok"
        ]
    );
    assert_eq!(results[3]["error"], "invalid base64 plaintext");
    assert_eq!(results[3]["status"], 400);
    cluster
        .node(1)
        .wait_ready(SOON)
        .await
        .context("after a bad batch")?;
    cluster.passed();
    Ok(())
}

async fn rewrapped(client: &Client, request: &RewrapRequest, version: u32) -> Result<Base64> {
    // A follower hears of an activation a moment after it was acknowledged.
    let what = format!("a rewrap to version {version}");
    until(&what, SOON, async || {
        let moved = client.rewrap(request).await.ok()?.into_body();
        (moved.key_version == version).then_some(moved.ciphertext)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_rotation_everything_can_be_brought_under_the_new_version() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let trading = cluster.client("trading-1")?;
    let request = EncryptRequest::new(CONTEXT, b"of version 1").with_aad(b"order 42");
    let old = trading.encrypt(&request).await?.into_body();
    assert_eq!(old.key_version, 1);
    cluster.client("admin")?.rotate(CONTEXT, None).await?;
    for node in cluster.nodes() {
        let client = cluster.client_on("trading-1", node.number)?;
        let rewrap = RewrapRequest::new(CONTEXT, old.ciphertext.clone()).with_aad(b"order 42");
        let moved = rewrapped(&client, &rewrap, 2).await?;
        for other in cluster.nodes() {
            let reader = cluster.client_on("trading-2", other.number)?;
            let decrypt = DecryptRequest::new(CONTEXT, moved.clone()).with_aad(b"order 42");
            let opened = reader.decrypt(&decrypt).await?;
            ensure!(opened.plaintext.as_slice() == b"of version 1", "{}", other.id());
        }
        // What is under the new version already is made anew, and what does not open says so.
        let again = RewrapRequest::new(CONTEXT, moved.clone()).with_aad(b"order 42");
        ensure!(
            rewrapped(&client, &again, 2).await? != moved,
            "a nonce was used twice"
        );
        let wrong = client.rewrap(&RewrapRequest::new(CONTEXT, moved.clone())).await;
        assert_eq!(code(wrong), Some(ErrorCode::AuthenticationFailed));

        let good = RewrapRequest::new("", old.ciphertext.clone()).with_aad(b"order 42");
        let batch = Batch::new([
            good.clone(),
            RewrapRequest::new("", b"no ciphertext"),
            good.clone(),
            RewrapRequest::new("", old.ciphertext.clone()),
            RewrapRequest::new(PRIVATE, old.ciphertext.clone()).with_aad(b"order 42"),
            good,
        ]);
        let answer = client
            .rewrap_batch(&batch.with_context(CONTEXT))
            .await?
            .into_body();
        let versions: Vec<Option<u32>> = answer
            .batch
            .iter()
            .map(|result| result.as_ok().map(|moved| moved.key_version))
            .collect();
        assert_eq!(
            versions,
            [Some(2), None, Some(2), None, None, Some(2)],
            "{:?}",
            answer.batch
        );
        assert_eq!(
            refusals(&answer.batch),
            expected([
                None,
                Some(ErrorCode::CiphertextTooShort),
                None,
                Some(ErrorCode::AuthenticationFailed),
                Some(ErrorCode::AccessDenied),
                None,
            ])
        );
    }
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_rewraps_private_data_for_its_principal_and_is_on_record() -> Result<()> {
    let with_operator = |config: &str| {
        let auditor = "  auditor: [{ou: Auditor}]\n";
        config.replace(auditor, &format!("{auditor}  operator: [{{ou: Operator}}]\n"))
    };
    let cluster = formed_with(Playground::builder().nodes(1), with_operator).await?;
    let endpoints = [cluster.node(1).endpoint()];
    let client_of = |name: &str, unit: &str| {
        let identity = cluster.pki().issue(name, Some(unit))?;
        cluster.pki().client(Some(&identity), &endpoints)
    };
    let (owner, operator) = (cluster.client("2fa-1")?, client_of("operator-1", "Operator")?);
    let heir = client_of("2fa-2", "2FA")?;
    let own = seal(&owner, PRIVATE, b"for one").await?;
    cluster.client("admin")?.rotate(PRIVATE, None).await?;
    seal_under(&owner, PRIVATE, b"applied", 2).await?;

    let plain = RewrapRequest::new(PRIVATE, own.ciphertext.clone());
    // Nobody else can: neither a colleague, nor an operator who does not say whose it is.
    assert_eq!(
        code(heir.rewrap(&plain).await),
        Some(ErrorCode::AuthenticationFailed)
    );
    assert_eq!(
        code(operator.rewrap(&plain).await),
        Some(ErrorCode::UnknownOrganizationalUnit)
    );
    let named = plain.clone().of("2FA", "2fa-1");
    assert_eq!(code(heir.rewrap(&named).await), Some(ErrorCode::RoleRequired));

    for client in [&operator, &cluster.client("admin")?] {
        let mut moved = own.clone();
        moved.ciphertext = rewrapped(client, &named, 2).await?;
        open(&owner, PRIVATE, &moved).await?;
        let request = DecryptRequest::new(PRIVATE, moved.ciphertext.clone());
        assert_eq!(
            code(client.decrypt(&request).await),
            Some(ErrorCode::UnknownOrganizationalUnit),
            "who rewraps does not read"
        );
        assert_eq!(
            code(heir.decrypt(&request).await),
            Some(ErrorCode::AuthenticationFailed)
        );
    }
    let mut inherited = own.clone();
    let rebind = named.clone().rebound_to("2FA", "2fa-2");
    inherited.ciphertext = rewrapped(&operator, &rebind, 2).await?;
    open(&heir, PRIVATE, &inherited).await?;
    let request = DecryptRequest::new(PRIVATE, inherited.ciphertext.clone());
    assert_eq!(
        code(owner.decrypt(&request).await),
        Some(ErrorCode::AuthenticationFailed)
    );

    // The log is written a moment after the answer.
    let audit = until("four audit lines", SOON, async || {
        let log = cluster.node(1).log();
        let lines = log
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        // Whoever may not rewrap his own has a line of another kind.
        let for_others = |line: &serde_json::Value| line["message"] == "rewrap for others";
        let audit: Vec<serde_json::Value> = lines.filter(for_others).collect();
        (audit.len() >= 4).then_some(audit)
    })
    .await?;
    let outcomes: Vec<&str> = audit.iter().filter_map(|line| line["outcome"].as_str()).collect();
    assert_eq!(outcomes, ["refused", "done", "done", "done"], "{audit:?}");
    for line in &audit[1..] {
        assert_eq!(line["target"], "audit");
        assert_eq!(line["resource"], PRIVATE);
        assert_eq!(line["versions"], "1 to 2");
        assert_eq!(line["encrypted_for"], "CN=\"2fa-1\" OU=\"2FA\"");
    }
    assert_eq!(audit[3]["rebound_to"], "CN=\"2fa-2\" OU=\"2FA\"");
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_data_key_comes_out_of_decrypt_only_when_it_is_asked_for() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let client = cluster.client("trading-1")?;
    let made = client
        .datakey(&DataKeyRequest::new(CONTEXT).with_aad(b"order 42"))
        .await?
        .into_body();
    let key = made.plaintext.context("no key in the answer")?;
    ensure!(key.as_slice().len() == 32, "{} bytes", key.as_slice().len());
    let request = DecryptRequest::new(CONTEXT, made.ciphertext).with_aad(b"order 42");
    for node in cluster.nodes() {
        let client = cluster.client_on("trading-2", node.number)?;
        assert_eq!(
            code(client.decrypt(&request).await),
            Some(ErrorCode::NotADataCiphertext)
        );
        let opened = client.decrypt(&request.clone().as_data_key()).await?;
        ensure!(
            opened.plaintext.as_slice() == key.as_slice(),
            "{}: another key",
            node.id()
        );
    }
    let data = seal(&client, CONTEXT, b"no key").await?;
    let as_key = DecryptRequest::new(CONTEXT, data.ciphertext.clone()).as_data_key();
    assert_eq!(code(client.decrypt(&as_key).await), Some(ErrorCode::NotADataKey));

    // It stays one when it is rewrapped.
    let rewrap = RewrapRequest::new(CONTEXT, request.ciphertext.clone()).with_aad(b"order 42");
    let mut moved = request.clone();
    moved.ciphertext = client.rewrap(&rewrap).await?.into_body().ciphertext;
    assert_eq!(
        code(client.decrypt(&moved).await),
        Some(ErrorCode::NotADataCiphertext)
    );
    let opened = client.decrypt(&moved.as_data_key()).await?;
    ensure!(
        opened.plaintext.as_slice() == key.as_slice(),
        "another key after the rewrap"
    );

    let short = DataKeyRequest::new(CONTEXT).with_bits(DataKeyBits::Bits128);
    let made = client.datakey(&short).await?.into_body();
    ensure!(
        made.plaintext.is_some_and(|key| key.as_slice().len() == 16),
        "not 128 bits"
    );
    let kept_back = client
        .datakey(&DataKeyRequest::new(CONTEXT).sealed_only())
        .await?;
    ensure!(kept_back.plaintext.is_none(), "the key is in the answer");
    // What cannot be made costs the other items of a batch nothing.
    let good = DataKeyRequest::new(CONTEXT);
    let made = client
        .datakey_batch(&Batch::new([
            good.clone(),
            DataKeyRequest::new(PRIVATE),
            good.clone(),
            good.clone().with_bits(DataKeyBits::Unknown),
            DataKeyRequest::new("no-such-context"),
            good.clone().with_bits(DataKeyBits::Bits256),
            good,
        ]))
        .await?
        .into_body();
    assert_eq!(
        refusals(&made.batch),
        expected([
            None,
            Some(ErrorCode::AccessDenied),
            None,
            Some(ErrorCode::InvalidArgument),
            Some(ErrorCode::AccessDenied),
            None,
            None,
        ])
    );
    let mut keys: Vec<Vec<u8>> = made
        .batch
        .iter()
        .filter_map(|result| Some(result.as_ok()?.plaintext.as_ref()?.as_slice().to_vec()))
        .collect();
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), 4, "two keys are the same");
    cluster.passed();
    Ok(())
}
