//! What an unchanged client of version 1 sees, on version 1's configuration and token: answers, refusals with their statuses and
//! texts, limits, `/health` with and without the token, metrics. And what its operator's scripts do there.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use cluster_tests::http2::{Answer, Connection, REFUSED_STREAM};
use cluster_tests::metrics::{Metrics, Sample};
use cluster_tests::until;
use hsm_api::client::{HealthClient, Method};
use hsm_api::{Client, paths};
use serde_json::{Value, json};

use crate::cli::called;
use crate::common::CONTEXT;
use crate::site::{Site, version_1s_site};
use crate::v1_service::{FIRST, JSON, ciphertexts_open, make_keys, post, sealed, write_list};

/// From a committed change until every node goes by it.
const SEEN: Duration = Duration::from_secs(30);
/// From a start to an answer.
const ANSWERED: Duration = Duration::from_secs(60);
/// Requests of one client at once, where they are few.
const BURST: usize = 20;
/// Streams of one connection, where they are few.
const STREAMS: u32 = 2;
/// Every version that clients can name, those that encrypt among them.
const KEY_IDS: [&str; 5] = [
    "kek-2fa-v1",
    "kek-2fa-v2",
    "kek-exchange-key-v1",
    "kek-exchange-key-v2",
    "kek-exchange-key-v3",
];
/// The one that a script makes later.
const ROTATED: &str = "kek-2fa-v3";
/// Version 1's metrics with its labels.
const METRICS: [(&str, &[&str]); 9] = [
    ("hsm_requests_total", &["client_cn", "endpoint", "status"]),
    ("hsm_acl_failures_total", &[]),
    ("hsm_revocation_failures_total", &[]),
    ("hsm_encrypt_operations_total", &["context", "status"]),
    ("hsm_decrypt_operations_total", &["context", "status"]),
    ("hsm_request_duration_seconds_count", &["endpoint"]),
    ("hsm_rate_limit_hits_total", &["client_cn"]),
    ("hsm_errors_total", &["operation"]),
    ("hsm_active_connections", &[]),
];

/// Version 1's document about a node whose keys are all alike: the first ones, and those made since.
fn health(status: &str, hsm_available: bool, keys: &str, since: &[&str]) -> Value {
    let keys: serde_json::Map<String, Value> = KEY_IDS
        .iter()
        .chain(since)
        .map(|label| ((*label).to_owned(), json!(keys)))
        .collect();
    json!({ "status": status, "hsm_available": hsm_available, "kek_status": keys })
}

async fn speaks_version_1(site: &Site) -> Result<()> {
    let trading = site.client("trading-1")?;
    let body = json!({ "context": CONTEXT, "plaintext": STANDARD.encode(b"new") });
    let (status, answer) = post(&trading, paths::ENCRYPT, &body).await?;
    ensure!(
        status == 200 && answer["key_id"] == "kek-exchange-key-v3",
        "{answer}"
    );
    // A wrong key, in version 1's words.
    let ciphertext = sealed(&FIRST, CONTEXT, "Trading", b"old");
    let body = json!({
        "context": CONTEXT, "ciphertext": STANDARD.encode(&ciphertext), "key_id": "kek-exchange-key-v2",
    });
    let (status, answer) = post(&trading, paths::DECRYPT, &body).await?;
    ensure!(
        (status, &answer["error"]) == (400, &json!("decryption failed")),
        "{answer}"
    );
    let body = json!({ "context": "2fa", "plaintext": "" });
    let (status, answer) = post(&trading, paths::ENCRYPT, &body).await?;
    let refused = json!("access denied: insufficient permissions");
    ensure!((status, &answer["error"]) == (403, &refused), "{answer}");

    let answer = trading
        .request(Method::GET, paths::HEALTH, &[], Vec::new())
        .await?;
    let said: Value = serde_json::from_str(&answer.text())?;
    ensure!(
        answer.status == 200 && said == health("healthy", true, "available", &[]),
        "{} {said:#}",
        answer.status
    );
    let metrics = trading.metrics().await?.into_body();
    counts_clients(site, &metrics).await
}

/// Everything that it refuses, with its statuses and texts.
async fn refuses_as_version_1(site: &Site) -> Result<()> {
    let denied = "access denied: insufficient permissions";
    let unknown = "access denied: unknown organizational unit";
    let encrypt = json!({ "context": CONTEXT, "plaintext": "" }).to_string();
    for (ou, text) in [
        (None, "certificate has no OU"),
        (Some("Elsewhere"), unknown),
        // Its mapping is empty.
        (Some("Database"), denied),
        (Some("2FA"), denied),
    ] {
        let client = site.client_named("anyone", ou)?;
        refused(&client, (Method::POST, paths::ENCRYPT), &encrypt, (403, text)).await?;
    }
    // The list of revoked certificates is in force a moment after the node is ready.
    until("the refusal of who is in revoked_file", SEEN, async || {
        let gone = site.client_named("gone", Some("Trading")).ok()?;
        let revoked = (403, "certificate revoked");
        refused(&gone, (Method::POST, paths::ENCRYPT), &encrypt, revoked)
            .await
            .ok()
    })
    .await?;

    let trading = site.client("trading-1")?;
    let unencoded = json!({ "context": CONTEXT, "plaintext": "%%%" }).to_string();
    let unknown_context = json!({ "context": "no-such-key", "plaintext": "" }).to_string();
    for (body, status, text) in [
        ("", 400, "invalid JSON"),
        ("{\"context\":", 400, "invalid JSON"),
        ("[]", 400, "invalid JSON"),
        (unencoded.as_str(), 400, "invalid base64 plaintext"),
        (unknown_context.as_str(), 403, denied),
    ] {
        refused(&trading, (Method::POST, paths::ENCRYPT), body, (status, text)).await?;
    }
    let decrypt = |ciphertext: &str, key_id: &str| {
        json!({ "context": CONTEXT, "ciphertext": ciphertext, "key_id": key_id }).to_string()
    };
    let mut altered = sealed(&FIRST, CONTEXT, "Trading", b"old");
    altered[20] ^= 1;
    let others = sealed(&FIRST, CONTEXT, "Elsewhere", b"old");
    let first = "kek-exchange-key-v1";
    for (body, text) in [
        ("{".to_owned(), "invalid JSON"),
        (decrypt("%%%", first), "invalid base64 ciphertext"),
        (decrypt("", first), "decryption failed"),
        (decrypt("AAAA", first), "decryption failed"),
        (decrypt(&STANDARD.encode(&altered), first), "decryption failed"),
        (decrypt(&STANDARD.encode(&others), first), "decryption failed"),
        (
            decrypt(&STANDARD.encode(&others), "kek-exchange-key-v9"),
            "decryption failed",
        ),
    ] {
        refused(&trading, (Method::POST, paths::DECRYPT), &body, (400, text)).await?;
    }
    for path in [paths::ENCRYPT, paths::DECRYPT] {
        for method in [Method::GET, Method::PUT, Method::DELETE] {
            refused(&trading, (method, path), "", (405, "only POST allowed")).await?;
        }
    }
    Ok(())
}

/// One request, and how it is refused: the status, and the text that version 1's clients read.
async fn refused(
    client: &Client,
    (method, path): (Method, &str),
    body: &str,
    (status, text): (u16, &str),
) -> Result<()> {
    let what = format!("{method} {path} {body}");
    let answer = client.request(method, path, &[JSON], body).await?;
    let said: Value = serde_json::from_str(&answer.text()).with_context(|| what.clone())?;
    ensure!(
        answer.status == status && said["error"] == text,
        "{what}: {} {said}",
        answer.status
    );
    Ok(())
}

/// The label of version 1 that is asked for: the API names who has encrypted, the health listener only adds it up.
async fn counts_clients(site: &Site, metrics: &str) -> Result<()> {
    let encryptions = |text: &str| -> Result<Vec<Sample>> {
        let metrics = Metrics::parse(text)?;
        let of_label = |sample: &&Sample, label: &str, value: &str| {
            sample.labels.get(label).is_some_and(|found| found == value)
        };
        let all = metrics.all("hsm_requests_total").filter(|sample| {
            of_label(sample, "endpoint", paths::ENCRYPT) && of_label(sample, "status", "200")
        });
        Ok(all.cloned().collect())
    };
    let named = encryptions(metrics)?;
    let own = named.iter().find(|sample| {
        sample
            .labels
            .get("client_cn")
            .is_some_and(|name| name == "trading-1")
    });
    ensure!(own.is_some_and(|own| own.value >= 1.0), "{named:?}");
    let open = HealthClient::new(&site.health())
        .with_limit(SEEN)
        .get(paths::METRICS)
        .await?;
    ensure!(!open.text().contains("client_cn"), "{}", open.text());
    let summed = encryptions(&open.text())?;
    let all: f64 = named.iter().map(|sample| sample.value).sum();
    ensure!(
        summed.len() == 1 && summed[0].value >= all,
        "{summed:?} of {named:?}"
    );
    Ok(())
}

/// Beyond its burst a client is told when to come again, and another one does not notice.
async fn is_limited_as_by_version_1(site: &Site) -> Result<()> {
    let busy = site.client_named("busy", Some("Trading"))?;
    let body = json!({ "context": CONTEXT, "plaintext": "" });
    let mut served = 0;
    let limited = loop {
        let text = body.to_string();
        let answer = busy.request(Method::POST, paths::ENCRYPT, &[JSON], text).await?;
        if answer.status != 200 {
            break answer;
        }
        served += 1;
        ensure!(served < 20 * BURST, "its rate is not limited");
    };
    ensure!(served >= BURST, "only {served} requests of {BURST}");
    let said: Value = serde_json::from_str(&limited.text())?;
    let again = limited.header("retry-after");
    ensure!(
        limited.status == 429 && said["error"] == "rate limit exceeded" && again == Some("1"),
        "{} {said}, Retry-After: {again:?}",
        limited.status
    );
    let quiet = site.client_named("quiet", Some("Trading"))?;
    let (status, answer) = post(&quiet, paths::ENCRYPT, &body).await?;
    ensure!(status == 200, "{answer}");
    Ok(())
}

/// All of version 1's metrics under their names, with its labels; and what counts refusals has counted this start's. Its
/// rate has been exceeded before.
async fn counts_as_version_1(site: &Site) -> Result<()> {
    ciphertexts_open(site).await?;
    let encrypt = json!({ "context": CONTEXT, "plaintext": "" }).to_string();
    for (name, unit, text) in [
        ("stranger", "2FA", "access denied: insufficient permissions"),
        ("gone", "Trading", "certificate revoked"),
    ] {
        let client = site.client_named(name, Some(unit))?;
        refused(&client, (Method::POST, paths::ENCRYPT), &encrypt, (403, text)).await?;
    }
    let text = site.client("admin")?.metrics().await?.into_body();
    let metrics = Metrics::parse(&text)?;
    for (name, labels) in METRICS {
        let has_labels = |sample: &Sample| {
            sample
                .labels
                .keys()
                .map(String::as_str)
                .eq(labels.iter().copied())
        };
        let found: Vec<_> = metrics.all(name).collect();
        ensure!(
            found.iter().copied().any(has_labels),
            "{name}{labels:?}: {found:?}"
        );
    }
    for name in ["hsm_acl_failures_total", "hsm_revocation_failures_total"] {
        ensure!(
            metrics.sum(name) == Some(1.0),
            "{name}: {:?} instead of 1",
            metrics.sum(name)
        );
    }
    let hits = metrics.with_label("hsm_rate_limit_hits_total", "client_cn", "busy");
    ensure!(hits == Some(1.0), "hsm_rate_limit_hits_total of busy: {hits:?}");
    Ok(())
}

/// Its operator's scripts, with the configuration that they always named, do what they did: as the administrator that
/// two variables name, and without them not as somebody who happens to have a certificate.
fn is_administered_by_its_scripts(site: &Site) -> Result<()> {
    let clients = site.playground().pki().dir().join("clients");
    let hsm_admin = called(&site.folder, "hsm-admin")?;
    let run = |who: Option<&str>, arguments: &[&str]| -> Result<(Option<i32>, String)> {
        let mut command = Command::new(&hsm_admin);
        command
            .args(["-config", "config.yaml"])
            .args(arguments)
            .current_dir(&site.folder)
            .env_clear()
            .stdin(Stdio::null());
        if let Some(who) = who {
            command
                .env("HSMCTL_CERT", clients.join(format!("{who}.crt")))
                .env("HSMCTL_KEY", clients.join(format!("{who}.key")));
        }
        let output = command.output()?;
        let said = [output.stdout, output.stderr].concat();
        Ok((output.status.code(), String::from_utf8_lossy(&said).into_owned()))
    };
    let rotate: &[&str] = &["rotate", "2fa"];
    // The node's own certificate is a server's, and has no role.
    let (code, said) = run(None, rotate)?;
    ensure!(
        code == Some(1) && said.contains("name an administrator's certificate with --cert FILE --key FILE"),
        "{code:?}: {said}"
    );
    let (code, said) = run(Some("trading-1"), rotate)?;
    ensure!(
        code == Some(1) && said.contains("role_required"),
        "{code:?}: {said}"
    );
    for (arguments, shown) in [
        (&["list-kek"][..], &["kek-exchange-key-v2", "decrypt_only"][..]),
        (&["rotation-status"], &["exchange-key", "(45 days)"]),
        (rotate, &[ROTATED]),
        (&["list-kek", "-verbose"], &[ROTATED, "adopted"]),
        (
            &["cleanup-old-versions", "--dry-run"],
            &[
                "Version 1 would have deleted ",
                "one of the newest 3",
                "dry run: nothing was changed",
            ],
        ),
    ] {
        let (code, said) = run(Some("admin"), arguments)?;
        ensure!(
            code == Some(0) && shown.iter().all(|part| said.contains(part)),
            "hsm-admin {arguments:?}: {code:?}, without one of {shown:?}:\n{said}"
        );
    }
    // Who may do that, the first start said, and only that.
    let log = site.read("logs/error.log");
    let warned = log
        .matches("certificate of the issuer with the OU Admin becomes")
        .count();
    ensure!(warned == 1, "it was said {warned} times who administers");
    Ok(())
}

/// What its file says of HTTP/2: the number of streams holds, and is told; whatever has no effect is named in the log.
async fn http2_is_as_its_file_says(site: &Site) -> Result<()> {
    let cluster = site.playground();
    let who = cluster.pki().issue("streams", Some("Trading"))?;
    let mut client = Connection::open(&cluster.pki(), cluster.node(1).api_port, &who).await?;
    ensure!(
        client.max_streams() == Some(STREAMS),
        "SETTINGS_MAX_CONCURRENT_STREAMS: {:?}",
        client.max_streams()
    );
    for stream in [1, 3, 5] {
        client.begin(stream, paths::ENCRYPT).await?;
    }
    let refused = client.answer(5).await?;
    ensure!(
        refused == Answer::Reset(REFUSED_STREAM),
        "a third stream: {refused:?}"
    );
    let body = json!({ "context": CONTEXT, "plaintext": "" }).to_string();
    // Nothing happened to the two, and with the end of one there is room for another.
    for (ended, next) in [(1, 7), (3, 9)] {
        client.finish(ended, body.as_bytes()).await?;
        let answer = client.answer(ended).await?;
        ensure!(answer == Answer::Status(Some(200)), "stream {ended}: {answer:?}");
        client.begin(next, paths::ENCRYPT).await?;
    }
    client.finish(9, body.as_bytes()).await?;
    let answer = client.answer(9).await?;
    ensure!(answer == Answer::Status(Some(200)), "stream 9: {answer:?}");

    let log = site.log();
    let is_ignored = |key: &str| log.contains(&format!("configuration: server.http2.{key}: "));
    for key in [
        "initial_window_size",
        "max_frame_size",
        "max_header_list_size",
        "max_upload_buffer_per_conn",
        "max_upload_buffer_per_stream",
    ] {
        ensure!(is_ignored(key), "no word of server.http2.{key}");
    }
    for key in ["max_concurrent_streams", "idle_timeout_seconds"] {
        ensure!(!is_ignored(key), "server.http2.{key} is called ignored");
    }
    Ok(())
}

/// A start without the token that it served from before. Version 1's probes see which keys are gone, and its clients are
/// answered.
async fn says_which_keys_are_gone(site: &Site) -> Result<()> {
    let expected = (503, health("degraded", false, "unavailable", &[ROTATED]));
    let trading = site.client("trading-1")?;
    let mut last = None;
    let degraded = until("every key unavailable in /health", ANSWERED, async || {
        let answer = trading
            .request(Method::GET, paths::HEALTH, &[], Vec::new())
            .await
            .ok()?;
        let said = (answer.status, serde_json::from_str::<Value>(&answer.text()).ok()?);
        let found = (said == expected).then_some(());
        last = Some(said);
        found
    })
    .await;
    degraded.with_context(|| format!("{last:?}"))?;
    // Whoever shows no certificate is told no names.
    let open = HealthClient::new(&site.health())
        .with_limit(SEEN)
        .get(paths::HEALTH)
        .await?;
    let said: Value = serde_json::from_str(&open.text())?;
    let unnamed = json!({ "status": "degraded", "hsm_available": false, "kek_status": {} });
    ensure!(
        (open.status, &said) == (503, &unnamed),
        "{} {said:#}",
        open.status
    );
    // Not 400, which its clients take for a ciphertext that is lost.
    let ciphertext = STANDARD.encode(sealed(&FIRST, CONTEXT, "Trading", b"old"));
    let body = json!({ "context": CONTEXT, "ciphertext": ciphertext, "key_id": "kek-exchange-key-v1" });
    until("a refusal by the slot", SEEN, async || {
        let (status, said) = post(&trading, paths::DECRYPT, &body).await.ok()?;
        let by_slot = said["code"].as_str()?.starts_with("slot_") && said["error"].is_string();
        (status == 503 && by_slot).then_some(())
    })
    .await
}

async fn serves_its_clients(site: &mut Site) -> Result<()> {
    make_keys(site)?;
    write_list(site, &[1, 2])?;
    fs::write(
        site.folder.join("pki/revoked.yaml"),
        "revoked:\n  - cn: gone\n    serial: \"1a\"\n    reason: left\n    date: \"2024-05-01\"\n",
    )?;
    let mut node = site.start().await?;
    site.wait_ready().await?;
    ciphertexts_open(site).await?;
    speaks_version_1(site).await?;
    refuses_as_version_1(site).await?;

    node.kill().await?;
    // For this start only, as few requests and streams as a test can make.
    let config = site.config.clone();
    for (from, to) in [
        (
            "requests_per_second: 50000\n  burst: 5000\n",
            format!("requests_per_second: 1\n  burst: {BURST}\n"),
        ),
        (
            "max_concurrent_streams: \"2000\"",
            format!("max_concurrent_streams: \"{STREAMS}\""),
        ),
    ] {
        ensure!(
            config.contains(from),
            "the example has changed, there is no {from:?}:\n{config}"
        );
        site.config = site.config.replacen(from, &to, 1);
    }
    let mut node = site.start().await?;
    site.wait_ready().await?;
    is_limited_as_by_version_1(site).await?;
    counts_as_version_1(site).await?;
    http2_is_as_its_file_says(site).await?;
    is_administered_by_its_scripts(site)?;

    node.kill().await?;
    site.config = config;
    let tokens = site.folder.join("tokens");
    fs::rename(&tokens, site.folder.join("tokens-elsewhere"))?;
    fs::create_dir(&tokens)?;
    let mut node = site.start().await?;
    says_which_keys_are_gone(site).await?;
    node.kill().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unchanged_client_of_version_1_sees_what_it_knows() -> Result<()> {
    let mut site = version_1s_site()
        .await?
        .with("\nhsm:\n", "\nmetrics: {client_cn: true}\nhsm:\n")?;
    let served = serves_its_clients(&mut site).await;
    served.with_context(|| site.log())?;
    site.passed();
    Ok(())
}
