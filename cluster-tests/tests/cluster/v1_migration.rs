//! docs/migration-from-v1.md from its first step to its last, by its own commands: alone on version 1's token with version 1's
//! configuration as it was, the way back, a slot for each context, rewrapped ciphertexts, a cluster of three, and the old slot
//! emptied and taken out. What a single step does when something is wrong is in `v1_adoption.rs`, `moves.rs` and `joining.rs`; what
//! version 1's clients and scripts see, in `v1_users.rs`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::until;
use hsm_api::ErrorCode;
use hsm_api::admin::{CreateKekRequest, KeyState};
use hsm_api::data::{Batch, DecryptRequest, ItemResult, RewrapRequest, RewrapResponse};
use serde_json::Value;
use tokio::process::Child;

use crate::common::{CONTEXT, Sealed, context_on, open, open_everywhere, seal_under};
use crate::pkcs11::{copy_folder, token_folder};
use crate::site::{PATIENT, Site, version_1s_site_among};
use crate::v1_service::{
    KEYS, LABEL, TWO_FACTOR, ciphertexts_open, make_keys, make_token, sealed, to_seal, token, write_list,
};

const READY: Duration = Duration::from_secs(60);
/// From a committed change until every node goes by it.
const SEEN: Duration = Duration::from_secs(30);
/// Each context, and the slot that it gets for itself.
const SLOTS: [(&str, &str); 2] = [(CONTEXT, "exchange"), ("2fa", "2fa")];
/// What is in the old slot in the end.
const OLD: [&str; 5] = [
    "exchange-key/v1",
    "exchange-key/v2",
    "exchange-key/v3",
    "2fa/v1",
    "2fa/v2",
];
/// Destruction waits for a second only.
const BRISK: &str = "keys: {destroy: {min_wait_seconds: 1}}\n";
/// From the command until the keys are out of every token. The wait begins anew under another leader, which takes half a
/// minute.
const GONE: Duration = Duration::from_secs(150);

/// hsmctl on one node, until it has done what it is told: a slot that has just been opened is of use once its node has
/// reported it.
async fn hsmctl(site: &Site, number: u32, arguments: &[&str]) -> Result<Value> {
    let cluster = site.playground();
    let endpoint = cluster.node(number).endpoint();
    let place = ["--endpoint", endpoint.as_str(), "-o", "json"];
    let all = [arguments, &place[..]].concat();
    let what = format!("hsmctl {}", arguments.join(" "));
    let mut said = String::new();
    let done = until(&what, READY, async || {
        match cluster.hsmctl(&all).await {
            Ok(output) if output.code == Some(0) => return Some(output.stdout),
            Ok(output) => said = output.stderr,
            Err(error) => said = format!("{error:#}"),
        }
        None
    })
    .await;
    let answer = done.with_context(|| said)?;
    serde_json::from_slice(&answer).with_context(|| what)
}

/// The versions of a context, as node 1 lists them: number, slot, holders if it was adopted.
async fn versions(site: &Site, context: &str) -> Result<Vec<(u32, String, Vec<String>)>> {
    let info = context_on(site.playground(), 1, context).await?;
    let versions = info.versions.into_iter();
    Ok(versions
        .map(|version| (version.version, version.slot, version.holders))
        .collect())
}

/// The token in an earlier state, version 1's list, and a ciphertext of the version that was made for new ones.
struct Kept {
    token: PathBuf,
    list: String,
    of_the_old_slot: Sealed,
}

/// Steps 1 and 2: a copy, and a first start with what version 1 had.
async fn alone_on_the_old_token(site: &Site) -> Result<(Child, Kept)> {
    make_keys(site)?;
    let list = write_list(site, &[1, 2])?;
    let copy = site.folder.join("tokens-before-the-first-start");
    copy_folder(&site.folder.join("tokens"), &copy)?;
    ensure!(
        !site.config.contains("\ncluster:") && site.config.contains("slot_id: hsm-token"),
        "that is not version 1's configuration:\n{}",
        site.config
    );
    let node = site.start().await?;
    site.wait_ready().await?;
    ciphertexts_open(site).await?;
    let of_the_old_slot = seal_under(&site.client("trading-1")?, CONTEXT, b"alone", 3).await?;
    let own = "hsm-node-1".to_owned();
    let adopted = |version: u32| (version, "default".to_owned(), vec![own.clone()]);
    let made = |version: u32| (version, "default".to_owned(), Vec::<String>::new());
    let found = versions(site, CONTEXT).await?;
    ensure!(found == [adopted(1), adopted(2), made(3)], "{found:?}");
    let found = versions(site, "2fa").await?;
    ensure!(found == [adopted(1), made(2)], "{found:?}");
    let token = token_folder(&copy, LABEL)?;
    Ok((
        node,
        Kept {
            token,
            list,
            of_the_old_slot,
        },
    ))
}

/// Step 3, as far as it can be gone without version 1: what that program needs is there. Each key under its label, once,
/// and of use for its ciphertexts; its list as it left it.
fn version_1_finds_everything_where_it_was(site: &Site, kept: &Kept) -> Result<()> {
    let token = token(site);
    for (key_id, key) in KEYS {
        let (context, bound_to) = if key == TWO_FACTOR {
            ("2fa", "2fa-1")
        } else {
            (CONTEXT, "Trading")
        };
        let text = key_id.as_bytes();
        let made = token.seal(key_id, &[to_seal(context, bound_to, text)])?;
        ensure!(
            made == [sealed(&key, context, bound_to, text)],
            "{key_id}: it is another key by now"
        );
    }
    ensure!(site.read("metadata.yaml") == kept.list, "its list was written to");
    Ok(())
}

/// The one slot under its name, and others beside it.
fn write_slots(site: &mut Site) {
    let slots = "  slots:\n    default: {label: hsm-token, pin_env: HSM_PIN, insecure_pin: true}\n    \
                 exchange: {label: slot-exchange, pin_file: secrets/exchange.pin, contexts: [exchange-key, order-key]}\n    \
                 2fa: {label: slot-2fa, pin_file: secrets/2fa.pin, contexts: [2fa]}\n";
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
}

/// Step 5: both contexts move. New versions are made in the new slots, what is old is read where it is.
async fn a_slot_for_each_context(site: &mut Site, kept: &Kept) -> Result<Child> {
    for (_, slot) in SLOTS {
        site.token(&format!("slot-{slot}"), &format!("secrets/{slot}.pin"))?;
    }
    write_slots(site);
    let node = site.start().await?;
    site.wait_ready().await?;
    ciphertexts_open(site).await?;
    for (context, slot) in SLOTS {
        let key = format!("move-{context}");
        let moved = ["key", "move", context, "--to", slot, "--idempotency-key", &key];
        let moved = hsmctl(site, 1, &moved).await?;
        let before = versions(site, context).await?;
        let (version, in_slot, _) = before.last().context("no version")?;
        ensure!(
            moved["version"] == *version && in_slot == slot,
            "{moved:#}: {before:?}"
        );
        ensure!(
            before.iter().rev().skip(1).all(|(_, slot, _)| slot == "default"),
            "{before:?}"
        );
    }
    // What is new is made in its slot from the start.
    let admin = site.client("admin")?.with_retry(PATIENT);
    let made = admin
        .create_kek(&CreateKekRequest::new("order-key"), None)
        .await?;
    let found = versions(site, "order-key").await?;
    ensure!(
        found == [(made.version, "exchange".to_owned(), Vec::<String>::new())],
        "{found:?}"
    );
    let trading = site.client("trading-1")?;
    open(&trading, CONTEXT, &kept.of_the_old_slot).await?;
    ciphertexts_open(site).await?;
    Ok(node)
}

fn rewrapped(answer: &RewrapResponse, plaintext: &[u8]) -> Sealed {
    Sealed {
        plaintext: plaintext.to_vec(),
        ciphertext: answer.ciphertext.clone(),
        key_id: answer.key_id.clone(),
        version: answer.key_version,
    }
}

/// Step 4: a unit's ciphertexts by any client of it, many at a time; one client's own by that client.
async fn everything_is_rewrapped(site: &Site) -> Result<(Vec<Sealed>, Sealed)> {
    let old = KEYS[..2].iter().map(|(key_id, key)| {
        let ciphertext = sealed(key, CONTEXT, "Trading", key_id.as_bytes());
        RewrapRequest::new(CONTEXT, ciphertext).with_key_id(*key_id)
    });
    let answer = site
        .client("trading-2")?
        .rewrap_batch(&Batch::new(old))
        .await?
        .into_body();
    let shared: Vec<Sealed> = answer
        .batch
        .iter()
        .filter_map(ItemResult::as_ok)
        .zip(&KEYS)
        .map(|(answer, (key_id, _))| rewrapped(answer, key_id.as_bytes()))
        .collect();
    ensure!(
        shared.len() == 2 && shared.iter().all(|sealed| sealed.version == 4),
        "{answer:?}"
    );
    let own = sealed(&TWO_FACTOR, "2fa", "2fa-1", b"123456");
    let request = RewrapRequest::new("2fa", own).with_key_id("kek-2fa-v1");
    let answer = site.client("2fa-1")?.rewrap(&request).await?.into_body();
    let own = rewrapped(&answer, b"123456");
    ensure!(own.version == 3, "{answer:?}");
    Ok((shared, own))
}

/// Step 6: the node gets a place in a cluster, which it did not have when it was founded, and lets the others have the
/// replication key that it made.
async fn gets_its_place_in_a_cluster(site: &mut Site, mut node: Child) -> Result<Child> {
    node.kill().await?;
    site.lend(&[
        ("cluster-ca.crt", "cluster-ca.crt"),
        ("node1-cluster.crt", "nodes/hsm-node-1/cluster.crt"),
        ("node1-cluster.key", "nodes/hsm-node-1/cluster.key"),
    ])?;
    site.config.push_str(&format!(
        "\ncluster:\n  mode: active-active\n  node_id: hsm-node-1\n  name: playground\n  listen: {}\n  api_advertise: {}\n  \
         tls: {{ca_path: pki/cluster-ca.crt, cert_path: pki/node1-cluster.crt, key_path: pki/node1-cluster.key}}\n  \
         token_replication: {{encryption_key_file: data/replication.key}}\n{BRISK}",
        site.cluster(),
        site.api()
    ));
    let key = std::fs::read_to_string(site.folder.join("data/replication.key"))?;
    std::fs::write(site.playground().dir().join("secrets/replication.key"), key)?;
    let node = site.start().await?;
    site.wait_ready().await?;
    Ok(node)
}

/// A node that is to join gets a slot for version 1's token.
fn prepare(site: &Site, number: u32, pin: &Path) -> Result<()> {
    let node = site.playground().node(number);
    let mut config = node.config()?;
    for (before, added) in [
        (
            "  keys:\n",
            format!("    \"default\": {{label: {LABEL}, pin_file: {pin:?}, insecure_pin: true}}\n"),
        ),
        ("logging:", BRISK.to_owned()),
    ] {
        ensure!(
            config.contains(before),
            "the playground's configuration has changed:\n{config}"
        );
        config = config.replacen(before, &format!("{added}{before}"), 1);
    }
    node.set_config(&config)
}

async fn joins(site: &Site, number: u32) -> Result<()> {
    let cluster = site.playground();
    let node = cluster.node(number);
    cluster.start_node(number).await?;
    let token = hsmctl(site, 1, &["cluster", "token", "--node", &node.id()]).await?;
    let file = site.keep(&format!("secrets/join-{number}.json"), &token.to_string())?;
    let file = file.to_str().context("folder is not UTF-8")?;
    let leader = site.cluster();
    let join = [
        "cluster",
        "join",
        "--leader",
        &leader,
        "--token-file",
        file,
        "--yes",
    ];
    hsmctl(site, number, &join).await?;
    node.wait_ready(READY).await
}

/// Node 2 comes with a copy of version 1's token, node 3 with one that never had its keys.
async fn two_nodes_join(site: &Site, kept: &Kept) -> Result<()> {
    let cluster = site.playground();
    let pin = site.folder.join("secrets/v1.pin");
    for number in [2, 3] {
        prepare(site, number, &pin)?;
    }
    copy_folder(&kept.token, &cluster.node(2).dir.join("tokens/version-1"))?;
    make_token(&cluster.node(3).dir.join("softhsm2.conf"))?;
    for number in [2, 3] {
        joins(site, number).await?;
    }
    // The first node had no address when it was founded. The others know the one that it has now, and change things through it.
    let members = cluster
        .client_on("admin", 3)?
        .members()
        .await?
        .into_body()
        .members;
    let first = members.iter().find(|member| member.node_id == "hsm-node-1");
    let address = first.map(|member| member.cluster_address.clone());
    ensure!(address == Some(site.cluster()), "{members:?}");
    let rotated = ["rotate", "order-key", "--idempotency-key", "in-the-cluster"];
    let rotated = hsmctl(site, 3, &rotated).await?;
    ensure!(rotated["version"] == 2, "{rotated:#}");
    Ok(())
}

/// The two that have its token are holders of version 1's keys, on the word of the check record; the third says so.
async fn the_old_token_has_two_holders(site: &Site) -> Result<()> {
    let holders = serde_json::json!(["hsm-node-1", "hsm-node-2"]);
    for (key_id, _) in KEYS {
        let named = key_id.replacen("kek-", "", 1).replacen("-v", "/v", 1);
        let mut shown = Value::Null;
        let held = until(&format!("both holders of {named}"), SEEN, async || {
            shown = hsmctl(site, 3, &["key", "show", &named]).await.ok()?;
            (shown["holders"] == holders).then_some(())
        })
        .await;
        held.with_context(|| format!("{shown:#}"))?;
        ensure!(
            shown["key_id"] == key_id && shown["state"] == "decrypt_only" && shown["origin"] == "adopted",
            "{shown:#}"
        );
    }
    Ok(())
}

/// Version 1's ciphertexts where its token is, everything else everywhere.
async fn every_ciphertext_opens(site: &Site, kept: &Kept, shared: &[Sealed], own: &Sealed) -> Result<()> {
    let cluster = site.playground();
    for node in cluster.nodes() {
        let trading = cluster.client_on("trading-1", node.number)?;
        for (key_id, key) in &KEYS[..2] {
            let ciphertext = sealed(key, CONTEXT, "Trading", key_id.as_bytes());
            let ask = DecryptRequest::new(CONTEXT, ciphertext).with_key_id(*key_id);
            // What a node serves follows the state that says so.
            let opened = until(
                &format!("an answer of {} for {key_id}", node.id()),
                SEEN,
                async || match trading.decrypt(&ask).await {
                    Ok(opened) => Some(Ok(opened.plaintext.as_slice().to_vec())),
                    Err(error) if node.number == 3 => Some(Err(error)),
                    Err(_) => None,
                },
            )
            .await?;
            match opened {
                Ok(opened) => ensure!(
                    node.number < 3 && opened == key_id.as_bytes(),
                    "{}: {key_id}: something else came out",
                    node.id()
                ),
                Err(error) => ensure!(
                    error.code() == Some(ErrorCode::KeyNotOnThisNode),
                    "{}: {key_id}: {error}",
                    node.id()
                ),
            }
        }
        let owner = cluster.client_on("2fa-1", node.number)?;
        open(&owner, "2fa", own).await.with_context(|| node.id())?;
        let new = seal_under(&trading, CONTEXT, b"in the cluster", 4).await?;
        open_everywhere(cluster, "trading-2", CONTEXT, &[new]).await?;
    }
    let shared = [shared, std::slice::from_ref(&kept.of_the_old_slot)].concat();
    open_everywhere(cluster, "trading-1", CONTEXT, &shared).await
}

/// The end of step 5: what was left is rewrapped, then one version after the other is destroyed.
async fn the_old_slot_is_emptied(site: &Site, kept: &Kept) -> Result<Sealed> {
    let left = &kept.of_the_old_slot;
    let request = RewrapRequest::new(CONTEXT, left.ciphertext.clone());
    let answer = site.client("trading-1")?.rewrap(&request).await?.into_body();
    let last = rewrapped(&answer, &left.plaintext);
    ensure!(last.version == 4, "{answer:?}");
    for version in OLD {
        let key = format!("destroy-{}", version.replace('/', "-"));
        let destroy = ["key", "destroy", version, "--confirm", version, "--wait", "1s"];
        // How long ago version 1 used its keys nobody knows, and the others have been used a moment ago.
        let meant = ["--override", "--idempotency-key", &key];
        hsmctl(site, 3, &[&destroy[..], &meant].concat()).await?;
    }
    let mut found = Vec::new();
    let gone = until("the end of all keys in the old slot", GONE, async || {
        found.clear();
        for context in [CONTEXT, "2fa"] {
            let info = context_on(site.playground(), 1, context).await.ok()?;
            let versions = info.versions.into_iter();
            found.extend(versions.filter(|held| held.slot == "default" && held.state != KeyState::Destroyed));
        }
        found.is_empty().then_some(())
    })
    .await;
    gone.with_context(|| format!("{found:?}"))?;
    Ok(last)
}

/// A configuration without the slot that begins so.
fn without_slot(config: &str, slot: &str) -> Result<String> {
    let lines = config.lines().filter(|line| !line.starts_with(slot));
    let without: String = lines.flat_map(|line| [line, "\n"]).collect();
    ensure!(without.len() < config.len(), "no slot is {slot:?} in:\n{config}");
    Ok(without)
}

/// And taken out of every configuration. Nothing of it is left in the old token, version 1's own keys neither.
async fn the_old_slot_goes(site: &mut Site, mut node: Child) -> Result<Child> {
    node.kill().await?;
    let mut left = token(site).labels()?;
    left.retain(|label| label.contains("kek-"));
    ensure!(left.is_empty(), "in the old token: {left:?}");
    site.config = without_slot(&site.config, "    default: {")?;
    let cluster = site.playground();
    for number in [2, 3] {
        let other = cluster.node(number);
        other.kill().await?;
        other.set_config(&without_slot(&other.config()?, "    \"default\": {")?)?;
    }
    let others = async {
        cluster.start_node(2).await?;
        cluster.start_node(3).await
    };
    let (node, ()) = tokio::try_join!(site.start(), others)?;
    site.wait_ready().await?;
    for number in [2, 3] {
        cluster.node(number).wait_ready(READY).await?;
    }
    Ok(node)
}

/// Everybody's, on every node; what nobody rewrapped is gone, and says so.
async fn what_was_rewrapped_is_left(site: &Site, kept: &Kept, shared: &[Sealed], own: &Sealed) -> Result<()> {
    let cluster = site.playground();
    open_everywhere(cluster, "trading-1", CONTEXT, shared).await?;
    open_everywhere(cluster, "2fa-1", "2fa", std::slice::from_ref(own)).await?;
    let (key_id, key) = KEYS[0];
    let of_version_1 = sealed(&key, CONTEXT, "Trading", b"old");
    let asks = [
        DecryptRequest::new(CONTEXT, of_version_1).with_key_id(key_id),
        DecryptRequest::new(CONTEXT, kept.of_the_old_slot.ciphertext.clone()),
    ];
    for node in cluster.nodes() {
        let trading = cluster.client_on("trading-1", node.number)?;
        for ask in &asks {
            let refused = trading.decrypt(ask).await.err().and_then(|error| error.code());
            ensure!(
                refused == Some(ErrorCode::KeyVersionDestroyed),
                "{}: {refused:?}",
                node.id()
            );
        }
    }
    Ok(())
}

async fn moves_over(site: &mut Site) -> Result<()> {
    let (mut node, kept) = alone_on_the_old_token(site).await?;
    node.kill().await?;
    version_1_finds_everything_where_it_was(site, &kept)?;
    let node = a_slot_for_each_context(site, &kept).await?;
    let (mut shared, own) = everything_is_rewrapped(site).await?;
    let node = gets_its_place_in_a_cluster(site, node).await?;
    ciphertexts_open(site).await?;
    two_nodes_join(site, &kept).await?;
    the_old_token_has_two_holders(site).await?;
    every_ciphertext_opens(site, &kept, &shared, &own).await?;
    shared.push(the_old_slot_is_emptied(site, &kept).await?);
    let mut node = the_old_slot_goes(site, node).await?;
    what_was_rewrapped_is_left(site, &kept, &shared, &own).await?;
    node.kill().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn version_1s_node_becomes_a_cluster_in_which_nothing_old_is_lost() -> Result<()> {
    let mut site = version_1s_site_among(3).await?;
    let moved = moves_over(&mut site).await;
    moved.with_context(|| site.log())?;
    site.passed();
    Ok(())
}
