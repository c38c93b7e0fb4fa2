//! Users of version 1: its configuration, its token with the keys that it made, its list of them, its clients. First on
//! the old machine alone, then in a cluster of which some nodes have the old token and others have not.

use std::fs;
use std::path::Path;
use std::time::Duration;

use aes_gcm::aead::{Aead, Payload};
use aes_gcm::{Aes256Gcm, KeyInit};
use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use cluster_tests::metrics::{Metrics, Sample};
use cluster_tests::{Playground, until};
use hsm_api::admin::{CreateKekRequest, DestroyKeyRequest, KeyOrigin, KeyState, KeyVersionInfo};
use hsm_api::client::{HealthClient, Method, RawResponse, Retry};
use hsm_api::data::{DecryptRequest, RewrapRequest};
use hsm_api::{Client, ErrorCode, paths};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::common::{CONTEXT, context_on, formed_with, open, seal, seal_under};
use crate::examples::{Site, version_1s_site};
use crate::pkcs11::Token;

/// From a start that is refused to its end.
const REFUSED: Duration = Duration::from_secs(30);
/// From a committed change until every node goes by it.
const SEEN: Duration = Duration::from_secs(10);
const READY: Duration = Duration::from_secs(60);
/// Requests of one client at once, where they are few.
const BURST: usize = 20;
const JSON: (&str, &str) = ("content-type", "application/json");

const FIRST: [u8; 32] = [0x11; 32];
const SECOND: [u8; 32] = [0x22; 32];
const TWO_FACTOR: [u8; 32] = [0x33; 32];

/// As version 1 encrypted, made without it: `nonce ‖ ciphertext ‖ tag`, bound to the first OU or the CN.
fn sealed(key: &[u8; 32], context: &str, bound_to: &str, plaintext: &[u8]) -> Vec<u8> {
    let aad = Sha256::digest([context.as_bytes(), b"\0", bound_to.as_bytes()].concat());
    let nonce = *b"v1 nonce 012";
    let sealed = Aes256Gcm::new_from_slice(key).unwrap().encrypt(
        (&nonce).into(),
        Payload {
            msg: plaintext,
            aad: &aad,
        },
    );
    [nonce.to_vec(), sealed.unwrap()].concat()
}

/// Version 1's own request, and what its clients read of the answer.
async fn v1_post(client: &Client, path: &str, body: &Value) -> Result<(u16, Value)> {
    let text = body.to_string().into_bytes();
    let answer: RawResponse = client.request(Method::POST, path, &[JSON], text).await?;
    Ok((answer.status, serde_json::from_str(&answer.text())?))
}

async fn v1_opens(
    client: &Client,
    context: &str,
    key_id: &str,
    ciphertext: &[u8],
    text: &[u8],
) -> Result<()> {
    let body = json!({ "context": context, "ciphertext": STANDARD.encode(ciphertext), "key_id": key_id });
    let answer = v1_post(client, paths::DECRYPT, &body).await?;
    ensure!(
        answer == (200, json!({ "plaintext": STANDARD.encode(text) })),
        "{key_id}: {answer:?}"
    );
    Ok(())
}

/// As version 1 wrote it, with checksums that prove nothing.
fn metadata(exchange: &[u32]) -> String {
    let version = |number: &u32| {
        format!(
            "      - label: kek-exchange-key-v{number}\n        version: {number}\n        created_at: \
             2024-0{number}-01T00:00:00Z\n        checksum: 00ff\n"
        )
    };
    let versions: String = exchange.iter().map(version).collect();
    let current = exchange.iter().max().unwrap();
    format!(
        "rotation:\n  exchange-key:\n    current: kek-exchange-key-v{current}\n    rotation_interval_days: 45\n    \
         versions:\n{versions}  2fa:\n    current: kek-2fa-v1\n    versions:\n      - label: kek-2fa-v1\n        \
         version: 1\n"
    )
}

fn count(labels: &[String], wanted: &str) -> usize {
    labels.iter().filter(|label| *label == wanted).count()
}

/// Starts with lists that the token does not agree with.
async fn refuses_to_lose_a_key(site: &Site, list: &Path) -> Result<()> {
    ends_unstarted(site, "metadata.yaml is not there").await?;
    // Cut short: the token has more.
    fs::write(list, metadata(&[2]))?;
    ends_unstarted(
        site,
        "kek-exchange-key-v1: it is in the token and not in the list",
    )
    .await?;
    fs::write(list, metadata(&[1, 2, 3]))?;
    ends_unstarted(site, "kek-exchange-key-v3 (version 3 of exchange-key)").await
}

/// Exit code 78, with the reason in the log.
async fn ends_unstarted(site: &Site, why: &str) -> Result<()> {
    let mut node = site.command()?.stdout(std::process::Stdio::null()).spawn()?;
    let status = tokio::time::timeout(REFUSED, node.wait()).await??;
    ensure!(status.code() == Some(78), "{why}: it ended with {status}");
    ensure!(site.log().contains(why), "no word of {why:?}");
    Ok(())
}

/// A first start that is killed in its middle, again and again: the next one finds what was done, and goes on.
#[cfg(feature = "failpoints")]
async fn is_cut_off(site: &Site) -> Result<()> {
    use std::os::unix::process::ExitStatusExt;

    let marker = site.folder.join("data/v1-metadata");
    for point in [
        "v1_keys::after_version",
        "sync::before_adopt",
        "rotation::after_prepare_commit",
        "v1_keys::before_marker",
    ] {
        let mut node = site
            .command()?
            .env("HSM_FAILPOINTS", format!("{point}=kill"))
            .stdout(std::process::Stdio::null())
            .spawn()?;
        let status = tokio::time::timeout(READY, node.wait())
            .await
            .with_context(|| format!("{point} was not reached"))??;
        ensure!(status.signal() == Some(9), "{point}: it ended with {status}");
        ensure!(
            !marker.exists(),
            "{point}: it has noted that the list was read to its end"
        );
    }
    Ok(())
}

async fn reads_what_version_1_encrypted(site: &Site) -> Result<()> {
    let trading = site.client("trading-1")?;
    for (key_id, key) in [("kek-exchange-key-v1", FIRST), ("kek-exchange-key-v2", SECOND)] {
        let ciphertext = sealed(&key, CONTEXT, "Trading", key_id.as_bytes());
        v1_opens(&trading, CONTEXT, key_id, &ciphertext, key_id.as_bytes()).await?;
    }
    let own = sealed(&TWO_FACTOR, "2fa", "2fa-1", b"123456");
    v1_opens(&site.client("2fa-1")?, "2fa", "kek-2fa-v1", &own, b"123456").await
}

async fn speaks_version_1(site: &Site) -> Result<()> {
    let trading = site.client("trading-1")?;
    let body = json!({ "context": CONTEXT, "plaintext": STANDARD.encode(b"new") });
    let (status, answer) = v1_post(&trading, paths::ENCRYPT, &body).await?;
    ensure!(
        status == 200 && answer["key_id"] == "kek-exchange-key-v3",
        "{answer}"
    );
    // A wrong key, in version 1's words.
    let ciphertext = sealed(&FIRST, CONTEXT, "Trading", b"old");
    let body = json!({
        "context": CONTEXT, "ciphertext": STANDARD.encode(&ciphertext), "key_id": "kek-exchange-key-v2",
    });
    let (status, answer) = v1_post(&trading, paths::DECRYPT, &body).await?;
    ensure!(
        (status, &answer["error"]) == (400, &json!("decryption failed")),
        "{answer}"
    );
    let body = json!({ "context": "2fa", "plaintext": "" });
    let (status, answer) = v1_post(&trading, paths::ENCRYPT, &body).await?;
    let refused = json!("access denied: insufficient permissions");
    ensure!((status, &answer["error"]) == (403, &refused), "{answer}");

    let health = trading
        .request(Method::GET, paths::HEALTH, &[], Vec::new())
        .await?;
    let health: Value = serde_json::from_str(&health.text())?;
    let available = [
        "kek-2fa-v1",
        "kek-2fa-v2",
        "kek-exchange-key-v1",
        "kek-exchange-key-v2",
        "kek-exchange-key-v3",
    ]
    .map(|label| (label.to_owned(), json!("available")));
    let kek_status: serde_json::Map<String, Value> = available.into_iter().collect();
    let expected = json!({ "status": "healthy", "hsm_available": true, "kek_status": kek_status });
    ensure!(health == expected, "{health:#}");
    let metrics = trading.metrics().await?.into_body();
    for name in [
        "hsm_requests_total",
        "hsm_encrypt_operations_total",
        "hsm_decrypt_operations_total",
        "hsm_request_duration_seconds",
        "hsm_active_connections",
    ] {
        ensure!(metrics.contains(name), "no metric {name}");
    }
    counts_clients(site, &metrics).await?;
    // What is old is brought under today's key.
    let rewrap = RewrapRequest::new(CONTEXT, ciphertext.as_slice()).with_key_id("kek-exchange-key-v1");
    let moved = trading.rewrap(&rewrap).await?.into_body();
    ensure!(
        moved.key_version == 3,
        "rewrapped under version {}",
        moved.key_version
    );
    let opened = trading
        .decrypt(&DecryptRequest::new(CONTEXT, moved.ciphertext))
        .await?;
    ensure!(opened.plaintext.as_slice() == b"old", "something else came out");
    Ok(())
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
    let open = HealthClient::new(&site.health()).get(paths::METRICS).await?;
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
    let (status, answer) = v1_post(&quiet, paths::ENCRYPT, &body).await?;
    ensure!(status == 200, "{answer}");
    Ok(())
}

async fn moves_over(site: &mut Site) -> Result<()> {
    let token = Token::at(
        site.folder.join("softhsm2.conf"),
        "hsm-token",
        site.folder.join("secrets/v1.pin"),
    );
    fs::write(site.folder.join("secrets/v1.pin"), "1234")?;
    for (label, key) in [
        ("kek-exchange-key-v1", FIRST),
        ("kek-exchange-key-v2", SECOND),
        ("kek-2fa-v1", TWO_FACTOR),
    ] {
        token.make_v1(label, &key)?;
    }
    let list = site.folder.join("metadata.yaml");
    refuses_to_lose_a_key(site, &list).await?;
    fs::write(
        site.folder.join("pki/revoked.yaml"),
        "revoked:\n  - cn: gone\n    serial: \"1a\"\n    reason: left\n    date: \"2024-05-01\"\n",
    )?;

    let written = metadata(&[1, 2]);
    fs::write(&list, &written)?;
    #[cfg(feature = "failpoints")]
    is_cut_off(site).await?;
    let mut node = site.start().await?;
    site.wait_ready().await?;
    reads_what_version_1_encrypted(site).await?;
    speaks_version_1(site).await?;
    refuses_as_version_1(site).await?;
    let admin = site.client("admin")?;
    let keks = admin.list_keks().await?.into_body();
    for info in &keks.contexts {
        for version in &info.versions {
            let adopted = version.origin == KeyOrigin::Adopted;
            let expected = if adopted {
                KeyState::DecryptOnly
            } else {
                KeyState::Active
            };
            ensure!(version.state == expected, "{} {version:?}", info.context);
            ensure!(adopted == (version.holders.len() == 1), "{version:?}");
            if version.key_id == "kek-exchange-key-v2" {
                // As the list says.
                ensure!(version.created_at == "2024-02-01T00:00:00Z", "{version:?}");
            }
        }
    }
    let due = admin.rotation_status().await?.into_body();
    let days: Vec<u32> = due
        .contexts
        .iter()
        .map(|context| context.rotation_interval_days)
        .collect();
    ensure!(days == [90, 45], "rotation intervals: {days:?}");

    node.kill().await?;
    // For this start only, as few requests as a test can make.
    let config = site.config.clone();
    let rate = "requests_per_second: 50000\n  burst: 5000\n";
    let few = format!("requests_per_second: 1\n  burst: {BURST}\n");
    site.config = config.replacen(rate, &few, 1);
    ensure!(site.config != config, "the example has another rate:\n{config}");
    let node = site.start().await?;
    site.wait_ready().await?;
    reads_what_version_1_encrypted(site).await?;
    is_limited_as_by_version_1(site).await?;
    site.stop(node).await?;
    site.config = config;
    ensure!(fs::read_to_string(&list)? == written, "the list was written to");
    // Version 1 still finds its keys where it left them, and each once.
    let labels = token.labels()?;
    for label in ["kek-exchange-key-v1", "kek-exchange-key-v2", "kek-2fa-v1"] {
        ensure!(count(&labels, label) == 1, "{label}: {labels:?}");
        ensure!(
            count(&labels, &format!("adopted:{label}")) == 1,
            "{label}: {labels:?}"
        );
    }
    // The list has been read: another one is not.
    fs::write(&list, metadata(&[1, 2, 4]))?;
    let node = site.start().await?;
    site.wait_ready().await?;
    reads_what_version_1_encrypted(site).await?;
    ensure!(
        site.log().contains("hsm.metadata_file has changed"),
        "no word of the other list"
    );
    site.stop(node).await?;
    gets_slots_of_its_own(site).await
}

/// The same node, from one slot to many: the old token under the name that its slot had, and another beside it.
async fn gets_slots_of_its_own(site: &mut Site) -> Result<()> {
    site.token("slot-orders", "secrets/orders.pin")?;
    let slots = "  slots:\n    default: {label: hsm-token, pin_env: HSM_PIN, insecure_pin: true, contexts: [exchange-key, 2fa]}\n    \
                 orders: {label: slot-orders, pin_file: secrets/orders.pin, contexts: [order-key]}\n";
    let mut config = String::new();
    for line in site.config.lines() {
        match line.split(':').next() {
            Some("  slot_id") => config.push_str(slots),
            Some("  pin" | "  metadata_file") => {}
            _ => {
                config.push_str(line);
                config.push('\n');
            }
        }
    }
    site.config = config;
    let node = site.start().await?;
    site.wait_ready().await?;
    reads_what_version_1_encrypted(site).await?;
    let admin = site.client("admin")?.with_retry(Retry::Until(READY));
    let made = admin
        .create_kek(&CreateKekRequest::new("order-key"), None)
        .await?;
    ensure!(made.version == 1, "version {}", made.version);
    let keks = admin.list_keks().await?.into_body();
    let slots: Vec<_> = keks
        .contexts
        .iter()
        .map(|context| (context.context.as_str(), context.slot.as_str()))
        .collect();
    let expected = [
        ("2fa", "default"),
        ("exchange-key", "default"),
        ("order-key", "orders"),
    ];
    ensure!(slots == expected, "{slots:?}");
    site.stop(node).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn version_1s_users_move_over_with_their_token_and_their_keys() -> Result<()> {
    let mut site = version_1s_site()
        .await?
        .with("\nhsm:\n", "\nmetrics: {client_cn: true}\nhsm:\n")?;
    let moved = moves_over(&mut site).await;
    moved.with_context(|| site.log())?;
    site.passed();
    Ok(())
}

/// The label is none of the form that version 1 gave.
const OLD: &str = "old exchange key";

async fn adopted_on(cluster: &Playground, number: u32) -> Result<KeyVersionInfo> {
    let info = context_on(cluster, number, CONTEXT).await?;
    let mut versions = info.versions.into_iter();
    versions
        .find(|version| version.key_id == OLD)
        .with_context(|| format!("node {number} knows no version {OLD:?}"))
}

/// Until every node says so of the adopted version.
async fn becomes(
    cluster: &Playground,
    what: &str,
    is: impl Fn(&KeyVersionInfo) -> bool,
    within: Duration,
) -> Result<KeyVersionInfo> {
    until(what, within, async || {
        let mut last = None;
        for node in cluster.nodes() {
            last = Some(adopted_on(cluster, node.number).await.ok().filter(&is)?);
        }
        last
    })
    .await
}

/// Disabled it decrypts nowhere, also after a restart; enabled it decrypts again.
async fn is_disabled_over_a_restart(cluster: &Playground, version: u32, ask: &DecryptRequest) -> Result<()> {
    let admin = cluster.client_on("admin", 3)?.with_retry(Retry::Until(READY));
    admin.disable_key(CONTEXT, version, None).await?;
    let disabled = |version: &KeyVersionInfo| version.state == KeyState::Disabled;
    becomes(cluster, "it is disabled", disabled, SEEN).await?;
    let first = cluster.node(1);
    first.kill().await?;
    cluster.start_node(1).await?;
    first.wait_ready(READY).await?;
    let client = cluster.client_on("trading-1", 1)?;
    until("node 1 refuses it as disabled", SEEN, async || {
        let error = client.decrypt(ask).await.err()?;
        (error.code() == Some(ErrorCode::KeyVersionDisabled)).then_some(())
    })
    .await?;
    admin.enable_key(CONTEXT, version, None).await?;
    until("node 1 opens it again", SEEN, async || {
        client.decrypt(ask).await.ok()
    })
    .await?;
    Ok(())
}

async fn refuses(cluster: &Playground, arguments: &[&str], why: &str) -> Result<()> {
    let refused = cluster.hsmctl(arguments).await?;
    ensure!(
        refused.code != Some(0) && refused.stderr.contains(why),
        "{why:?} is not why: {:?}: {}",
        refused.code,
        refused.stderr
    );
    Ok(())
}

async fn answers(cluster: &Playground, arguments: &[&str]) -> Result<Value> {
    let answer = cluster.hsmctl(arguments).await?.ok()?;
    Ok(serde_json::from_slice(&answer)?)
}

/// Of two keys of a context that does not exist yet, the first alone, then the second; the first is given back.
async fn adopts_one_by_one(cluster: &Playground, endpoint: &str) -> Result<()> {
    let adopt = |label: &'static str, more: &[&'static str]| {
        let place = ["--slot", "exchange", "--endpoint", endpoint, "-o", "json"];
        let key = ["key", "adopt", "--context", "later", "--label", label];
        [&key[..], &place[..], more].concat()
    };
    // To whom was it bound, and what of the other key?
    let (first, second) = ("kek-later-v1", "kek-later-v2");
    refuses(cluster, &adopt(first, &[]), "--mode shared, private").await?;
    refuses(cluster, &adopt(first, &["--mode", "shared"]), second).await?;
    let made = answers(cluster, &adopt(first, &["--mode", "shared", "--only"])).await?;
    ensure!(
        made["versions"][0]["version"] == 1 && made["active_version"] == 3 && made["binding"] == "shared",
        "{made:#}"
    );
    let otherwise = adopt(second, &["--mode", "private"]);
    refuses(cluster, &otherwise, "shared, for good, and not private").await?;
    let made = answers(cluster, &adopt(second, &[])).await?;
    ensure!(
        made["versions"][0]["version"] == 2 && made["active_version"] == 3,
        "{made:#}"
    );
    let release = [
        "key",
        "release",
        "later/v1",
        "--confirm",
        "later/v1",
        "-o",
        "json",
    ];
    let released = answers(cluster, &release).await?;
    ensure!(released["state"] == "abandoned", "{released:#}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_adopted_key_serves_where_its_token_is_and_ends_there() -> Result<()> {
    let cluster = formed_with(Playground::builder(), |config| {
        config.replacen("logging:", "keys: {destroy: {min_wait_seconds: 1}}\nlogging:", 1)
    })
    .await?;
    // Version 1's token on node 1, a copy of it on node 2, none on node 3.
    for node in &cluster.nodes()[..2] {
        node.kill().await?;
        let token = Token::of(&cluster, node, "exchange");
        token.make_v1(OLD, &FIRST)?;
        if node.number == 1 {
            token.make_v1("kek-later-v1", &SECOND)?;
            token.make_v1("kek-later-v2", &TWO_FACTOR)?;
        }
        cluster.start_node(node.number).await?;
        node.wait_ready(READY).await?;
    }
    let first = cluster.node(1).endpoint();
    let adopt = [
        "key",
        "adopt",
        "--context",
        CONTEXT,
        "--label",
        OLD,
        "--endpoint",
        &first,
        "-o",
        "json",
    ];
    let dry = cluster
        .hsmctl(&[&adopt[..], &["--dry-run"]].concat())
        .await?
        .ok()?;
    let dry: Value = serde_json::from_slice(&dry)?;
    let expected = json!([{ "version": 2, "key_id": OLD, "new": true, "proven": false }]);
    ensure!(dry["versions"] == expected && dry["dry_run"] == true, "{dry:#}");
    ensure!(adopted_on(&cluster, 1).await.is_err(), "a dry run adopted it");
    let refused = cluster.hsmctl_as("trading-1", &adopt, &[]).await?;
    ensure!(refused.code != Some(0), "a client adopted a key");
    let absent = [
        "key",
        "adopt",
        "--context",
        CONTEXT,
        "--label",
        "no such key",
        "--endpoint",
        &first,
    ];
    let absent = cluster.hsmctl(&absent).await?;
    ensure!(
        absent.code != Some(0) && absent.stderr.contains("no such key"),
        "{:?}: {}",
        absent.code,
        absent.stderr
    );

    let repeatable = [&adopt[..], &["--idempotency-key", "adopt-once"]].concat();
    for _ in 0..2 {
        let made = cluster.hsmctl(&repeatable).await?.ok()?;
        let made: Value = serde_json::from_slice(&made)?;
        let expected = json!([{ "version": 2, "key_id": OLD, "new": true, "proven": true }]);
        ensure!(made["versions"] == expected, "{made:#}");
        ensure!(made["active_version"] == 1, "{made:#}");
    }
    let both = ["hsm-node-1", "hsm-node-2"].map(str::to_owned);
    let held = becomes(
        &cluster,
        "both tokens are holders",
        |version| version.holders == both,
        SEEN,
    )
    .await?;
    ensure!(held.state == KeyState::DecryptOnly, "{held:?}");

    let ciphertext = sealed(&FIRST, CONTEXT, "Trading", b"4111");
    let ask = || DecryptRequest::new(CONTEXT, ciphertext.as_slice()).with_key_id(OLD);
    for number in [1, 2] {
        let client = cluster.client_on("trading-1", number)?;
        let what = format!("node {number} opens it");
        let opened = until(&what, SEEN, async || client.decrypt(&ask()).await.ok()).await?;
        ensure!(opened.plaintext.as_slice() == b"4111", "something else came out");
    }
    is_disabled_over_a_restart(&cluster, held.version, &ask()).await?;
    let third = cluster.client_on("trading-1", 3)?;
    // The state says so on every node; what a node serves follows it.
    let refusal = until("node 3 knows that it has no such key", SEEN, async || {
        let error = third.decrypt(&ask()).await.err()?;
        let refusal = error.api()?.clone();
        (refusal.code == Some(ErrorCode::KeyNotOnThisNode)).then_some(refusal)
    })
    .await?;
    ensure!(
        refusal.status == 503 && refusal.retryable && refusal.retry_after == Some(Duration::from_secs(1)),
        "{refusal:?}"
    );
    // It lacks nothing that it could have: it is ready, healthy, and encrypts.
    let node = cluster.node(3);
    ensure!(node.is_ready().await, "{}", node.checks().await);
    let health = third.request(Method::GET, paths::HEALTH, &[], Vec::new()).await?;
    ensure!(health.status == 200, "{}", health.text());
    seal_under(&third, CONTEXT, b"meanwhile", 1).await?;
    // A client of all nodes finds one that has it.
    let everybody = cluster.client("trading-1")?.with_retry(Retry::Until(SEEN));
    for _ in 0..6 {
        everybody.decrypt(&ask()).await?;
    }
    // What is rewrapped is everybody's.
    let moved = cluster
        .client_on("trading-1", 1)?
        .rewrap(&RewrapRequest::new(CONTEXT, ciphertext.as_slice()).with_key_id(OLD))
        .await?
        .into_body();
    let opened = third
        .decrypt(&DecryptRequest::new(CONTEXT, moved.ciphertext))
        .await?;
    ensure!(opened.plaintext.as_slice() == b"4111", "something else came out");

    adopts_one_by_one(&cluster, &first).await?;

    // Its end: the copies, and what they were made of, on both nodes.
    let admin = cluster.client_on("admin", 3)?.with_retry(Retry::Until(READY));
    let destroy = DestroyKeyRequest {
        wait_seconds: Some(1),
        override_recent_use: true,
    };
    admin.destroy_key(CONTEXT, held.version, &destroy, None).await?;
    let gone = |version: &KeyVersionInfo| version.state == KeyState::Destroyed;
    becomes(&cluster, "it is destroyed", gone, READY).await?;
    let sealed = seal(&third, CONTEXT, b"after").await?;
    cluster.dev("down", &[]).await?;
    for node in cluster.nodes() {
        let labels = Token::of(&cluster, &node, "exchange").labels()?;
        let left: Vec<_> = labels.iter().filter(|label| label.contains(OLD)).collect();
        ensure!(left.is_empty(), "{}: {left:?}", node.id());
        let later = |label: &str| (count(&labels, label), count(&labels, &format!("adopted:{label}")));
        let there = usize::from(node.number == 1);
        // The first was given back.
        let expected = ((there, 0), (there, there));
        let seen = (later("kek-later-v1"), later("kek-later-v2"));
        ensure!(seen == expected, "{}: {labels:?}", node.id());
    }
    cluster.up().await?;
    open(&cluster.client_on("trading-1", 1)?, CONTEXT, &sealed).await?;
    cluster.passed();
    Ok(())
}

/// It was given its place in a cluster from its first start on, and founded one of itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_moved_over_alone_becomes_a_cluster() -> Result<()> {
    let cluster = Playground::builder().unformed().start().await?;
    let first = cluster.node(1);
    first.kill().await?;
    Token::of(&cluster, &first, "exchange").make_v1(OLD, &FIRST)?;
    let config = first.config()?;
    let alone = config.replace("mode: active-active", "mode: standalone");
    ensure!(
        alone != config,
        "the playground's configuration has changed:\n{config}"
    );
    first.set_config(&alone)?;
    cluster.start_node(1).await?;
    first.wait_ready(READY).await?;
    let endpoint = first.endpoint();
    let list = cluster.scratch().join("metadata.yaml");
    fs::write(
        &list,
        format!("rotation: {{{CONTEXT}: {{current: {OLD}, versions: [{{label: {OLD}, version: 1}}]}}}}\n"),
    )?;
    let list = list.to_str().context("folder is not UTF-8")?;
    let adopt = [
        "key",
        "adopt",
        "--metadata-file",
        list,
        "--endpoint",
        &endpoint,
        "-o",
        "json",
    ];
    let made = cluster.hsmctl(&adopt).await?.ok()?;
    let made: Value = serde_json::from_slice(&made)?;
    ensure!(
        made[0]["versions"][0]["version"] == 1 && made[0]["active_version"] == 2,
        "{made:#}"
    );
    let ciphertext = sealed(&FIRST, CONTEXT, "Trading", b"4111");
    let ask = || DecryptRequest::new(CONTEXT, ciphertext.as_slice()).with_key_id(OLD);
    let trading = cluster.client_on("trading-1", 1)?;
    let opened = trading.decrypt(&ask()).await?;
    ensure!(opened.plaintext.as_slice() == b"4111", "something else came out");
    let new = seal_under(&trading, CONTEXT, b"new", 2).await?;

    first.kill().await?;
    first.set_config(&config)?;
    cluster.up().await?;
    for node in cluster.nodes() {
        let client = cluster.client_on("trading-1", node.number)?;
        open(&client, CONTEXT, &new).await.with_context(|| node.id())?;
        let answer = client.decrypt(&ask()).await;
        let code = answer.as_ref().err().and_then(|error| error.code());
        let expected = (node.number > 1).then_some(ErrorCode::KeyNotOnThisNode);
        ensure!(code == expected, "{}: {code:?}", node.id());
    }
    cluster.passed();
    Ok(())
}
