//! Ciphertexts of the v1 service: `nonce ‖ ciphertext ‖ tag`, with a `key_id`. They are made in a stopped node's
//! token by plain PKCS#11, so that nothing of this project but the keys has a part in them; and by another
//! implementation of AES-GCM, under a key that is known because a shim made it.

use std::path::Path;
use std::time::Duration;

use aes_gcm::aead::{Aead, Payload};
use aes_gcm::{Aes256Gcm, KeyInit};
use anyhow::{Context, Result, anyhow, ensure};
use cluster_tests::shim::{SOFTHSM, Shim};
use cluster_tests::{Node, Playground, until};
use hsm_api::client::Retry;
use hsm_api::data::{DecryptRequest, RewrapRequest};
use hsm_api::{Client, ErrorCode};

use crate::common::{CONTEXT, Sealed, context_on, formed_with, open, seal, settled_on};
use crate::pkcs11::{Token, Vector};
use crate::victim::objects;

const READY: Duration = Duration::from_secs(60);

/// `SHA-256(context ‖ 0x00 ‖ X)` of v1, computed with Python's hashlib: the context, X, and the digest.
const SHARED: &str = "fc86400a275c2b59f339a0dddd4e61112e7aedfc7278a0d1a94b8c276c636003"; // exchange-key, Trading
const SHARED_BY_NAME: &str = "8c208f321706a962277e0823efd9b06dac17399618d21de570d3fa5b6483826e"; // …, trading-1
const PRIVATE: &str = "a3d69989cb42e67983aecdb9737f05673676a0431024dc967aa37b1116b4c7bc"; // 2fa, 2fa-1
const PRIVATE_BY_UNIT: &str = "3a0efcd63e128f52eddd6ef1f176ce615608b44cc570d62e419fde3f0f6cb04c"; // 2fa, 2FA

const SIZES: [usize; 9] = [0, 1, 15, 16, 17, 24, 32, 4096, 65_536];
/// The first bytes of a v2 header with everything in it right: magic, suite, purpose, binding, length of the IV.
const LIKE_V2: [u8; 8] = [0xf5, b'H', b'S', b'2', 1, 1, 1, 12];

/// A v1 ciphertext and what is in it.
struct V1 {
    plaintext: Vec<u8>,
    ciphertext: Vec<u8>,
}

fn nonce(first: [u8; 8], number: usize) -> [u8; 12] {
    let number = u32::try_from(number).unwrap();
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&first);
    nonce[8..].copy_from_slice(&number.to_be_bytes());
    nonce
}

/// Every size, each with an ordinary nonce and with one that looks like a v2 envelope.
fn vectors(aad: &'static str) -> Vec<Vector> {
    let mut vectors = Vec::new();
    for first in [*b"v1 nonce", LIKE_V2] {
        for size in SIZES {
            vectors.push(Vector {
                nonce: nonce(first, vectors.len()),
                aad: aad.to_owned(),
                plaintext: (0..size).map(|at| (at % 251) as u8).collect(),
            });
        }
    }
    vectors
}

/// Sealed in the token.
fn make(token: &Token, key: &str, aad: &'static str) -> Result<Vec<V1>> {
    let vectors = vectors(aad);
    let sealed = token.seal(key, &vectors)?;
    ensure!(
        sealed.len() == vectors.len(),
        "{} of {} were sealed",
        sealed.len(),
        vectors.len()
    );
    let made = vectors.into_iter().zip(sealed).map(|(vector, ciphertext)| V1 {
        plaintext: vector.plaintext,
        ciphertext,
    });
    Ok(made.collect())
}

fn ask(context: &str, ciphertext: &[u8], key_id: &str) -> DecryptRequest {
    DecryptRequest::new(context, ciphertext).with_key_id(key_id)
}

async fn opens(client: &Client, context: &str, key_id: &str, all: &[V1]) -> Result<()> {
    for v1 in all {
        let answer = client
            .decrypt(&ask(context, &v1.ciphertext, key_id))
            .await
            .with_context(|| format!("{key_id}, {} bytes", v1.plaintext.len()))?;
        ensure!(
            answer.plaintext.as_slice() == v1.plaintext,
            "{key_id}, {} bytes: something else came out",
            v1.plaintext.len()
        );
    }
    Ok(())
}

async fn code(client: &Client, request: &DecryptRequest) -> Option<ErrorCode> {
    let outcome = client.decrypt(request).await;
    outcome.err().and_then(|error| error.code())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn v1_ciphertexts_open_on_every_node_for_whom_they_were_made() -> Result<()> {
    let cluster = Playground::start(3).await?;
    // An old version as well as the active one.
    cluster.client("admin")?.rotate(CONTEXT, None).await?;
    let leader = cluster.leader().await?;
    let node = cluster.others(leader.node)[0].clone();
    node.kill().await?;
    let (exchange, private) = (
        Token::of(&cluster, &node, "exchange"),
        Token::of(&cluster, &node, "2fa"),
    );
    let [old, active, own_key] = ["kek-exchange-key-v1", "kek-exchange-key-v2", "kek-2fa-v1"];
    let of_old = make(&exchange, old, SHARED)?;
    let of_active = make(&exchange, active, SHARED)?;
    let of_name = make(&exchange, old, SHARED_BY_NAME)?;
    let own = make(&private, own_key, PRIVATE)?;
    let of_unit = make(&private, own_key, PRIVATE_BY_UNIT)?;
    cluster.start_node(node.number).await?;
    cluster.wait_ready(&cluster.nodes()).await?;

    let colleague = cluster.pki().issue("2fa-2", Some("2FA"))?;
    for node in cluster.nodes() {
        // Shared: for everyone of the unit.
        for profile in ["trading-1", "trading-2"] {
            let client = cluster.client_on(profile, node.number)?;
            opens(&client, CONTEXT, old, &of_old)
                .await
                .with_context(|| node.id())?;
            opens(&client, CONTEXT, active, &of_active)
                .await
                .with_context(|| node.id())?;
        }
        // Private: for one name.
        let owner = cluster.client_on("2fa-1", node.number)?;
        opens(&owner, "2fa", own_key, &own)
            .await
            .with_context(|| node.id())?;

        let refused = Some(ErrorCode::AuthenticationFailed);
        let other = cluster.pki().client(Some(&colleague), &[node.endpoint()])?;
        for v1 in &own {
            let found = code(&other, &ask("2fa", &v1.ciphertext, own_key)).await;
            ensure!(
                found == refused,
                "{}: a colleague's decryption: {found:?}",
                node.id()
            );
        }
        let trading = cluster.client_on("trading-1", node.number)?;
        let (v1, end) = (&of_old[3], of_old[3].ciphertext.len() - 1);
        let rewrap = RewrapRequest::new(CONTEXT, v1.ciphertext.as_slice()).with_key_id(old);
        let moved = trading.rewrap(&rewrap).await?.into_body();
        ensure!(moved.key_id == active, "rewrapped under {}", moved.key_id);
        let opened = trading
            .decrypt(&DecryptRequest::new(CONTEXT, moved.ciphertext))
            .await?;
        ensure!(
            opened.plaintext.as_slice() == v1.plaintext,
            "{}: something else came out of the rewrapped one",
            node.id()
        );
        let mut altered = v1.ciphertext.clone();
        altered[end] ^= 1;
        for (what, client, request) in [
            (
                "made for a name",
                &trading,
                ask(CONTEXT, &of_name[3].ciphertext, old),
            ),
            (
                "made for a unit",
                &owner,
                ask("2fa", &of_unit[3].ciphertext, own_key),
            ),
            ("another version", &trading, ask(CONTEXT, &v1.ciphertext, active)),
            ("altered", &trading, ask(CONTEXT, &altered, old)),
            ("cut", &trading, ask(CONTEXT, &v1.ciphertext[..end], old)),
            (
                "with associated data",
                &trading,
                ask(CONTEXT, &v1.ciphertext, old).with_aad(b"order 42"),
            ),
        ] {
            let found = code(client, &request).await;
            ensure!(found == refused, "{}: {what}: {found:?}", node.id());
        }
        for (what, request, expected) in [
            (
                "no key_id",
                DecryptRequest::new(CONTEXT, v1.ciphertext.as_slice()),
                ErrorCode::UnknownKeyVersion,
            ),
            (
                "an unknown key_id",
                ask(CONTEXT, &v1.ciphertext, "kek-exchange-key-v77"),
                ErrorCode::UnknownKeyVersion,
            ),
            (
                "a key_id of a context that is not this caller's",
                ask(CONTEXT, &v1.ciphertext, own_key),
                ErrorCode::UnknownKeyVersion,
            ),
            (
                "27 bytes",
                ask(CONTEXT, &[7; 27], old),
                ErrorCode::CiphertextTooShort,
            ),
        ] {
            let found = code(&trading, &request).await;
            ensure!(found == Some(expected), "{}: {what}: {found:?}", node.id());
        }
        // None of it was the token's fault.
        node.wait_ready(READY).await?;
        seal(&trading, CONTEXT, b"afterwards").await?;
    }
    cluster.passed();
    Ok(())
}

/// Sealed by the aes-gcm crate.
fn make_apart(key: &[u8; 32], aad: &'static str) -> Result<Vec<V1>> {
    let cipher = Aes256Gcm::new_from_slice(key)?;
    let sealed = vectors(aad).into_iter().map(|vector| {
        let aad = hex::decode(vector.aad)?;
        let payload = Payload {
            msg: &vector.plaintext,
            aad: &aad,
        };
        let body = cipher.encrypt((&vector.nonce).into(), payload);
        let body = body.map_err(|error| anyhow!("{error}"))?;
        Ok(V1 {
            ciphertext: [vector.nonce.as_slice(), &body].concat(),
            plaintext: vector.plaintext,
        })
    });
    sealed.collect()
}

async fn slot_answers(node: &Node, slot: &str, status: u16) -> Result<()> {
    let what = format!("{status} from slot {slot} of {}", node.id());
    until(&what, READY, async || {
        let answer = node.health().get(&format!("/readyz?slot={slot}")).await.ok()?;
        (answer.status == status).then_some(())
    })
    .await
}

/// A rotation whose key has these bytes, because the slot's shim makes it of them.
async fn rotate_to(cluster: &Playground, shim: &Shim, context: &str, key: [u8; 32]) -> Result<()> {
    shim.obey(&[&format!("C_GenerateKey value {}", hex::encode(key))])?;
    let rotated = cluster.client("admin")?.rotate(context, None).await?.into_body();
    shim.obey(&[])?;
    ensure!(rotated.version == 2, "{rotated:?}");
    Ok(())
}

/// Both slots reach their tokens through shims, which can be told which bytes a new key has; slot `2fa` has a second
/// module of its own behind its shim.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_modules_serve_their_slots_and_vectors_of_another_implementation_open() -> Result<()> {
    let folder = tempfile::Builder::new().prefix("hsm-modules-").tempdir()?;
    let shim = Shim::build(folder.path(), "shim", Path::new(SOFTHSM))?;
    // Another file is another library to the loader, with a state of its own.
    let second = folder.path().join("second.so");
    std::fs::copy(SOFTHSM, &second)?;
    let second_shim = Shim::build(folder.path(), "second-shim", &second)?;
    let cluster = formed_with(Playground::builder().nodes(3), |config| {
        let with = |config: String, label: &str, library: &Path| {
            let label = format!("label: {label},");
            config.replace(&label, &format!("{label} pkcs11_lib: {library:?},"))
        };
        let config = with(config.to_owned(), "slot-exchange", shim.library());
        with(config, "slot-2fa", second_shim.library())
    })
    .await?;
    for node in cluster.nodes() {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", node.pid().context("no process")?))?;
        let modules = [Path::new("libsofthsm2.so"), &second];
        for library in [shim.library(), second_shim.library()].into_iter().chain(modules) {
            let name = library.to_str().context("no text")?;
            ensure!(maps.contains(name), "{} has not loaded {name}", node.id());
        }
    }

    let (key, own_key): ([u8; 32], [u8; 32]) = (
        std::array::from_fn(|at| 0xa0 ^ at as u8),
        std::array::from_fn(|at| 0x50 ^ at as u8),
    );
    rotate_to(&cluster, &shim, CONTEXT, key).await?;
    rotate_to(&cluster, &second_shim, "2fa", own_key).await?;
    let (key_id, own_id) = ("kek-exchange-key-v2", "kek-2fa-v2");
    let (shared, named) = (make_apart(&key, SHARED)?, make_apart(&key, SHARED_BY_NAME)?);
    let (private, of_unit) = (
        make_apart(&own_key, PRIVATE)?,
        make_apart(&own_key, PRIVATE_BY_UNIT)?,
    );
    let colleague = cluster.pki().issue("2fa-2", Some("2FA"))?;
    for node in cluster.nodes() {
        // What names no version of the cluster waits for no news of one.
        for context in [CONTEXT, "2fa"] {
            settled_on(&cluster, node.number, context, 2).await?;
        }
        // Shared: for everyone of the unit.
        for profile in ["trading-1", "trading-2"] {
            let client = cluster.client_on(profile, node.number)?;
            opens(&client, CONTEXT, key_id, &shared)
                .await
                .with_context(|| node.id())?;
        }
        // Private: for one name.
        let owner = cluster.client_on("2fa-1", node.number)?;
        opens(&owner, "2fa", own_id, &private)
            .await
            .with_context(|| node.id())?;
        let trading = cluster.client_on("trading-1", node.number)?;
        let other = cluster.pki().client(Some(&colleague), &[node.endpoint()])?;
        for (what, client, request) in [
            (
                "bound to a name",
                &trading,
                ask(CONTEXT, &named[3].ciphertext, key_id),
            ),
            (
                "bound to a unit",
                &owner,
                ask("2fa", &of_unit[3].ciphertext, own_id),
            ),
            (
                "a colleague's",
                &other,
                ask("2fa", &private[3].ciphertext, own_id),
            ),
        ] {
            let found = code(client, &request).await;
            ensure!(
                found == Some(ErrorCode::AuthenticationFailed),
                "{}: {what}: {found:?}",
                node.id()
            );
        }
    }
    a_key_that_is_not_as_ordered_is_kept_nowhere(&cluster, &shim).await?;

    // One module's device fails: its slot alone stops, on every node, and comes back with it.
    let exchange = seal(&cluster.client("trading-1")?, CONTEXT, b"exchange").await?;
    let own = seal(&cluster.client("2fa-1")?, "2fa", b"2fa").await?;
    shim.obey(&[
        "C_EncryptInit fail 30",
        "C_DecryptInit fail 30",
        "C_OpenSession fail 30",
    ])?;
    for node in cluster.nodes() {
        slot_answers(&node, "exchange", 503).await?;
        other_module_serves(&cluster, &node, &own).await?;
    }
    shim.obey(&[])?;
    for node in cluster.nodes() {
        slot_answers(&node, "exchange", 200).await?;
        open(&cluster.client_on("trading-1", node.number)?, CONTEXT, &exchange).await?;
        other_module_serves(&cluster, &node, &own).await?;
    }
    cluster.passed();
    Ok(())
}

/// A module that shows a key as another than was ordered: what the leader generates goes to nobody; what nodes import
/// they do not acknowledge and do not keep, and the rotation goes on once the module does as it is told.
async fn a_key_that_is_not_as_ordered_is_kept_nowhere(cluster: &Playground, shim: &Shim) -> Result<()> {
    let held = || -> Result<Vec<usize>> {
        let nodes = cluster.nodes();
        nodes
            .iter()
            .map(|node| objects(&node.dir.join("tokens")))
            .collect()
    };
    let before = held()?;
    let admin = cluster.client("admin")?;

    // CKA_SENSITIVE is false.
    shim.obey(&["C_GenerateKey shows 103=00"])?;
    let refused = admin.rotate(CONTEXT, None).await;
    shim.obey(&[])?;
    let refused = refused.err().context("a readable key was made a version")?;
    let detail = refused.refusal().map_or("", |refusal| refusal.detail.as_str());
    ensure!(
        refused.code() == Some(ErrorCode::SlotFailed) && detail.contains("CKA_SENSITIVE is false"),
        "{refused}"
    );
    ensure!(held()? == before, "{:?} objects instead of {before:?}", held()?);

    // CKA_EXTRACTABLE is true, of the object that is in the token already.
    shim.obey(&["C_CopyObject shows 162=01"])?;
    let patient = admin.with_retry(Retry::Until(READY));
    let rotation = tokio::spawn(async move { patient.rotate(CONTEXT, None).await });
    for node in cluster.nodes() {
        let what = format!("a refused import on {}", node.id());
        until(&what, READY, async || {
            let log = node.log();
            let refused =
                |line: &str| line.contains("CKA_EXTRACTABLE is true") && line.contains("step failed");
            log.lines().any(refused).then_some(())
        })
        .await?;
    }
    // Each try makes it and takes it back.
    until("tokens without it", READY, async || {
        (held().ok()? == before).then_some(())
    })
    .await?;
    for node in cluster.nodes() {
        let info = context_on(cluster, node.number, CONTEXT).await?;
        ensure!(info.active_version == Some(2), "{}: {info:?}", node.id());
    }
    ensure!(
        !rotation.is_finished(),
        "it has ended without a node that holds it"
    );
    shim.obey(&[])?;
    let rotated = rotation.await??.into_body();
    ensure!(rotated.version > 2, "{rotated:?}");
    let more: Vec<usize> = before.iter().map(|count| count + 1).collect();
    until("one object more in each token", READY, async || {
        (held().ok()? == more).then_some(())
    })
    .await
    .with_context(|| format!("{:?} instead of {more:?}", held()))?;
    Ok(())
}

async fn other_module_serves(cluster: &Playground, node: &Node, own: &Sealed) -> Result<()> {
    slot_answers(node, "2fa", 200).await?;
    let owner = cluster.client_on("2fa-1", node.number)?;
    open(&owner, "2fa", own).await?;
    seal(&owner, "2fa", b"meanwhile").await.map(drop)
}
