//! Bad input: each kind gets its documented status and stable code, v1's clients their text, and the node
//! stays healthy.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::client::{alert_for, alert_for_tls12};
use cluster_tests::{Node, Pki, Playground, until};
use hsm_api::client::{Method, RawResponse};
use hsm_api::data::{DecryptRequest, EncryptRequest};
use hsm_api::{Client, ErrorCode, Problem, StateIndex, headers, paths};
use rustls::AlertDescription;
use serde_json::{Value, json};

use crate::access::change_acl;
use crate::common::{CONTEXT, open, seal, seal_under};

const JSON: (&str, &str) = ("content-type", "application/json");
const ADMIN: (&str, &str) = ("x-hsm-request", "1");

async fn post(client: &Client, path: &str, headers: &[(&str, &str)], body: &str) -> Result<RawResponse> {
    Ok(client
        .request(Method::POST, path, headers, body.as_bytes().to_vec())
        .await?)
}

/// The answer is this code, with its status, as a problem that v1's clients read too.
fn check(answer: &RawResponse, code: ErrorCode) -> Result<()> {
    let problem: Problem = answer
        .problem()
        .with_context(|| format!("{code}: no problem body: {}", answer.text()))?;
    ensure!(
        problem.code == code.as_str(),
        "{} instead of {code}: {}",
        problem.code,
        problem.detail
    );
    ensure!(
        answer.status == code.status(),
        "{code} with status {}",
        answer.status
    );
    ensure!(
        problem.status == code.status(),
        "{code}: status {} in the body",
        problem.status
    );
    ensure!(
        problem.error == code.v1_text(),
        "{code}: v1 text {:?}",
        problem.error
    );
    ensure!(
        answer.header("content-type") == Some("application/problem+json"),
        "{code}: content type {:?}",
        answer.header("content-type")
    );
    ensure!(!problem.request_id.is_empty(), "{code}: no request id");
    let index = answer.header(headers::X_HSM_INDEX);
    let index = index.with_context(|| format!("{code}: no index"))?;
    index.parse::<StateIndex>()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_kind_of_bad_input_has_its_answer() -> Result<()> {
    let cluster = Playground::start(1).await?;
    let trading = cluster.client("trading-1")?;
    let admin = cluster.client("admin")?;
    let body = r#"{"context":"exchange-key","plaintext":"aGVsbG8="}"#;

    // Bodies.
    for (text, code) in [
        ("", ErrorCode::InvalidJson),
        ("{", ErrorCode::InvalidJson),
        ("[]", ErrorCode::InvalidJson),
        (r#"{"context":7,"plaintext":""}"#, ErrorCode::InvalidJson),
        (
            r#"{"context":"exchange-key","plaintext":"%%%"}"#,
            ErrorCode::InvalidBase64Plaintext,
        ),
        (
            r#"{"context":"exchange-key","plaintext":"aGVsbG8"}"#,
            ErrorCode::InvalidBase64Plaintext,
        ),
        (
            r#"{"context":"exchange-key","plaintext":"","aad":"!"}"#,
            ErrorCode::InvalidBase64Aad,
        ),
    ] {
        let answer = post(&trading, paths::ENCRYPT, &[JSON], text).await?;
        check(&answer, code).with_context(|| format!("encrypt {text}"))?;
    }
    for (text, code) in [
        ("nothing", ErrorCode::InvalidJson),
        (
            r#"{"context":"exchange-key","ciphertext":"%"}"#,
            ErrorCode::InvalidBase64Ciphertext,
        ),
        (
            r#"{"context":"exchange-key","ciphertext":"aGVsbG8="}"#,
            ErrorCode::CiphertextTooShort,
        ),
        (
            r#"{"context":"exchange-key","ciphertext":""}"#,
            ErrorCode::CiphertextTooShort,
        ),
    ] {
        let answer = post(&trading, paths::DECRYPT, &[JSON], text).await?;
        check(&answer, code).with_context(|| format!("decrypt {text}"))?;
    }
    let large = format!(
        r#"{{"context":"exchange-key","plaintext":"{}"}}"#,
        "A".repeat(5 << 20)
    );
    check(
        &post(&trading, paths::ENCRYPT, &[JSON], &large).await?,
        ErrorCode::BodyTooLarge,
    )?;

    // Methods and paths.
    let answer = trading
        .request(Method::GET, paths::ENCRYPT, &[], Vec::new())
        .await?;
    check(&answer, ErrorCode::MethodNotAllowed)?;
    check(
        &post(&trading, "/nowhere", &[JSON], "{}").await?,
        ErrorCode::NotFound,
    )?;

    // Admin routes: who, and how. `init` would say that the cluster is there already, if it got so far.
    let init = paths::CLUSTER_INIT;
    check(
        &post(&trading, init, &[JSON, ADMIN], "{}").await?,
        ErrorCode::RoleRequired,
    )?;
    check(
        &post(&admin, init, &[JSON], "{}").await?,
        ErrorCode::RequestHeaderMissing,
    )?;
    check(
        &post(&admin, init, &[ADMIN, ("content-type", "text/plain")], "{}").await?,
        ErrorCode::UnsupportedMediaType,
    )?;
    check(
        &post(&admin, init, &[JSON, ADMIN], "{}").await?,
        ErrorCode::AlreadyInitialised,
    )?;

    // Pages of other origins, on every route.
    for (path, client) in [(paths::ENCRYPT, &trading), (init, &admin)] {
        for header in [
            ("origin", "https://evil.example"),
            ("sec-fetch-site", "cross-site"),
        ] {
            let answer = post(client, path, &[JSON, ADMIN, header], body).await?;
            check(&answer, ErrorCode::ForeignOrigin).with_context(|| format!("{path} {header:?}"))?;
        }
    }

    still_healthy(&cluster, &trading).await?;
    cluster.passed();
    Ok(())
}

/// Until lines of the log are written, and what was left out of them is said, every 5 s.
const SAID: Duration = Duration::from_secs(30);
/// Requests of one client that are refused for the same reason.
const FLOOD: u64 = 300;

/// What the audit says of the refused requests of one client, by its CN.
fn refusals(node: &Node, cn: &str) -> Vec<Value> {
    let name = format!("CN={cn} ");
    let log = node.log();
    let lines = log
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let of_client = |line: &Value| {
        line["target"] == "audit"
            && line["outcome"] == "refused"
            && line["principal"]
                .as_str()
                .is_some_and(|who| who.starts_with(&name))
    };
    lines.filter(of_client).collect()
}

/// The audit has one line of this kind, and it says why.
async fn audited(
    node: &Node,
    cn: &str,
    (action, resource): (&str, &str),
    code: ErrorCode,
    why: &str,
) -> Result<()> {
    let of_kind = || {
        let mut lines = refusals(node, cn);
        lines.retain(|line| {
            line["action"] == action && line["resource"] == resource && line["code"] == code.as_str()
        });
        lines
    };
    let what = format!("an audit line of {cn}: {action} {resource:?} {code}");
    let lines = until(&what, SAID, async || {
        Some(of_kind()).filter(|lines| !lines.is_empty())
    })
    .await?;
    ensure!(lines.len() == 1, "{what}: {lines:#?}");
    let line = &lines[0];
    ensure!(
        line["reason"].as_str().is_some_and(|reason| reason.contains(why)),
        "{what}: not because of {why:?}: {line}"
    );
    for field in ["request_id", "trace_id", "source", "issuer", "fingerprint"] {
        let text = line[field].as_str().unwrap_or_default();
        ensure!(!text.is_empty(), "{what}: no {field}: {line}");
    }
    Ok(())
}

/// The first one is written and the others are counted, however many there are.
async fn a_flood_is_counted(node: &Node, cn: &str) -> Result<()> {
    let what = format!("{FLOOD} refusals of {cn} in the audit");
    let lines = until(&what, SAID, async || {
        let lines = refusals(node, cn);
        let said = |line: &Value| line["left_out"].as_u64().unwrap_or(1);
        (lines.iter().map(said).sum::<u64>() == FLOOD).then_some(lines.len())
    })
    .await?;
    // A line and a count, of each 5 s.
    ensure!(lines <= 20, "{FLOOD} refusals made {lines} lines");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_not_learns_no_more_than_that() -> Result<()> {
    let cluster = Playground::start(1).await?;
    let trading = cluster.client("trading-1")?;
    let node = cluster.node(1);
    let endpoints = [node.endpoint()];
    let encrypt = async |client: &Client, context: &str| {
        let body = format!(r#"{{"context":"{context}","plaintext":"aGVsbG8="}}"#);
        post(client, paths::ENCRYPT, &[JSON], &body).await
    };

    // Somebody who does not stop.
    let insistent = cluster.pki().issue("insistent", Some("Trading"))?;
    let insistent = cluster.pki().client(Some(&insistent), &endpoints)?;
    for _ in 0..FLOOD {
        let answer = encrypt(&insistent, "2fa").await?;
        ensure!(answer.status == 403, "{}", answer.status);
    }

    // A foreign context and one that does not exist: the same answer but for the request's id.
    let foreign = encrypt(&trading, "2fa").await?;
    let unknown = encrypt(&trading, "no-such-context").await?;
    for answer in [&foreign, &unknown] {
        check(answer, ErrorCode::AccessDenied)?;
    }
    let bare = |answer: &RawResponse| {
        let mut problem = answer.problem().unwrap();
        problem.request_id.clear();
        problem
    };
    assert_eq!(bare(&foreign), bare(&unknown));
    let keks = cluster.client("admin")?.list_keks().await?.into_body();
    ensure!(
        keks.contexts.iter().all(|info| info.context != "no-such-context"),
        "an unknown context made a key"
    );

    // Units.
    check(
        &encrypt(&cluster.client("nobody")?, CONTEXT).await?,
        ErrorCode::UnknownOrganizationalUnit,
    )?;
    let without_unit = cluster.pki().issue("plain", None)?;
    let without_unit = cluster.pki().client(Some(&without_unit), &endpoints)?;
    check(
        &encrypt(&without_unit, CONTEXT).await?,
        ErrorCode::NoOrganizationalUnit,
    )?;

    // An operation that is not allowed, and a certificate that is not any more.
    change_acl(&cluster, |acl| {
        acl["mappings"]["Writers"] = json!({"contexts": [CONTEXT], "operations": ["encrypt"]});
    })
    .await?;
    let writer = cluster.pki().issue("writer", Some("Writers"))?;
    let writer = cluster.pki().client(Some(&writer), &endpoints)?;
    let sealed = seal(&writer, CONTEXT, b"written").await?;
    let body = json!({"context": CONTEXT, "ciphertext": sealed.ciphertext.to_string()});
    let answer = post(&writer, paths::DECRYPT, &[JSON], &body.to_string()).await?;
    check(&answer, ErrorCode::AccessDenied)?;
    let revoke = ["revoke", "--cn", "gone", "--reason", "lost"];
    cluster.hsmctl(&revoke).await?.ok()?;
    let gone = cluster.pki().issue("gone", Some("Trading"))?;
    let gone = cluster.pki().client(Some(&gone), &endpoints)?;
    check(&encrypt(&gone, CONTEXT).await?, ErrorCode::CertificateRevoked)?;

    // The audit has the reason that the callers were not told.
    let encrypts = "data.encrypt";
    for (cn, asked, code, why) in [
        (
            "trading-1",
            (encrypts, "2fa"),
            ErrorCode::AccessDenied,
            "may not encrypt under context \"2fa\"",
        ),
        (
            "trading-1",
            (encrypts, ""),
            ErrorCode::AccessDenied,
            "knows no such context",
        ),
        (
            "nobody",
            (encrypts, ""),
            ErrorCode::UnknownOrganizationalUnit,
            "\"Nobody\" is in no mapping",
        ),
        (
            "plain",
            (encrypts, ""),
            ErrorCode::NoOrganizationalUnit,
            "has no organizational unit",
        ),
        (
            "writer",
            ("data.decrypt", CONTEXT),
            ErrorCode::AccessDenied,
            "may not decrypt under",
        ),
        (
            "gone",
            (encrypts, ""),
            ErrorCode::CertificateRevoked,
            "is revoked",
        ),
    ] {
        audited(&node, cn, asked, code, why).await?;
    }

    // Roles: an auditor reads, and changes nothing; an officer does neither yet.
    let auditor = cluster.client("auditor")?;
    auditor.cluster_status().await?;
    auditor.list_keks().await?;
    for profile in ["auditor", "officer-1", "trading-1"] {
        let outcome = cluster.client(profile)?.rotate(CONTEXT, None).await;
        let code = outcome.err().and_then(|error| error.code());
        assert_eq!(code, Some(ErrorCode::RoleRequired), "{profile}");
    }

    // TLS itself: no HTTP answer, but an alert that says why (RFC 8446 section 6.2).
    let (pki, port) = (cluster.pki(), cluster.node(1).api_port);
    let (who, unit) = ("trading-1", Some("Trading"));
    for (what, identity, alert) in [
        ("no certificate", None, AlertDescription::CertificateRequired),
        (
            "a foreign CA",
            Some(pki.issue_cluster("hsm-node-1")?),
            AlertDescription::UnknownCA,
        ),
        (
            "a foreign CA of the CA's name",
            Some(Pki::foreign(who, unit)?),
            AlertDescription::DecryptError,
        ),
        (
            "one that has ended",
            Some(pki.issue_expired(who, unit)?),
            AlertDescription::CertificateExpired,
        ),
        (
            "one that is not for clients",
            Some(pki.issue_for_servers(who, unit)?),
            AlertDescription::UnsupportedCertificate,
        ),
    ] {
        let said = alert_for(&pki, identity.as_ref(), port).await;
        assert_eq!(said.context(what)?, alert, "{what}");
    }
    // 2: fatal, 70: protocol_version.
    assert_eq!(alert_for_tls12(port).await?, (2, 70));

    a_flood_is_counted(&node, "insistent").await?;
    still_healthy(&cluster, &trading).await?;
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ciphertexts_that_cannot_be_opened_here_say_why() -> Result<()> {
    let cluster = Playground::start(1).await?;
    let trading = cluster.client("trading-1")?;
    let sealed = seal(&trading, CONTEXT, b"of exchange-key").await?;
    // Every one of them is answered with its code and the status of that code.
    let code = async |request: DecryptRequest| status_and_code(trading.decrypt(&request).await.err());

    // order-key belongs to a slot and to this unit, and has no key yet.
    let outcome = trading.encrypt(&EncryptRequest::new("order-key", b"x")).await;
    assert_eq!(
        status_and_code(outcome.err()),
        Some((503, ErrorCode::ContextHasNoKey))
    );
    let made = cluster.hsmctl(&["create-kek", "--context", "order-key"]).await?;
    made.ok()?;
    cluster.node(1).wait_ready(SAID).await?;
    let of_order_key = seal_under(&trading, "order-key", b"of order-key", 1).await?;
    open(&trading, "order-key", &of_order_key).await?;
    let moved = DecryptRequest::new("order-key", sealed.ciphertext.clone());
    assert_eq!(code(moved).await, Some((400, ErrorCode::WrongContext)));

    // Bytes 8 to 23 of an envelope are its key's id, 24 to 27 the version: a key nobody has, and a
    // version nobody made.
    let mut unknown = sealed.ciphertext.as_slice().to_vec();
    unknown[8..24].fill(0x5a);
    assert_eq!(
        code(DecryptRequest::new(CONTEXT, unknown.clone())).await,
        Some((400, ErrorCode::UnknownKeyVersion))
    );
    unknown[24..28].copy_from_slice(&9_u32.to_be_bytes());
    assert_eq!(
        code(DecryptRequest::new(CONTEXT, unknown)).await,
        Some((400, ErrorCode::UnknownKeyVersion))
    );
    // v1's form needs its key_id, and one that exists.
    let v1 = vec![7_u8; 40];
    assert_eq!(
        code(DecryptRequest::new(CONTEXT, v1.clone())).await,
        Some((400, ErrorCode::UnknownKeyVersion))
    );
    let no_such = DecryptRequest::new(CONTEXT, v1.clone()).with_key_id("kek-exchange-key-v77");
    assert_eq!(code(no_such).await, Some((400, ErrorCode::UnknownKeyVersion)));
    let not_its_own = DecryptRequest::new(CONTEXT, v1).with_key_id(&sealed.key_id);
    assert_eq!(
        code(not_its_own).await,
        Some((400, ErrorCode::AuthenticationFailed))
    );
    let cut = sealed.ciphertext.as_slice()[..40].to_vec();
    assert_eq!(
        code(DecryptRequest::new(CONTEXT, cut)).await,
        Some((400, ErrorCode::CiphertextTooShort))
    );

    still_healthy(&cluster, &trading).await?;
    cluster.passed();
    Ok(())
}

fn status_and_code(error: Option<hsm_api::ClientError>) -> Option<(u16, ErrorCode)> {
    error.and_then(|error| Some((error.status()?, error.code()?)))
}

async fn still_healthy(cluster: &Playground, client: &Client) -> Result<()> {
    ensure!(
        cluster.node(1).is_ready().await,
        "not ready: {}",
        cluster.node(1).checks().await
    );
    let sealed = seal(client, CONTEXT, b"still here").await?;
    open(client, CONTEXT, &sealed).await
}
