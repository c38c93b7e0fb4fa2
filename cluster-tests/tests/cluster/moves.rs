//! A context that moves to another slot: new versions there, old ones readable where they are, rewraps from the one to the
//! other, each slot's trouble its own, and in the end the old slot out of the configuration.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::shim::{SOFTHSM, Shim};
use cluster_tests::{Playground, until};
use hsm_api::admin::{ContextInfo, CreateKekRequest, KeyState, MoveKeyRequest, MoveKeyResponse};
use hsm_api::data::{Batch, DecryptRequest, EncryptRequest, ItemResult, RewrapRequest};
use hsm_api::{Client, ErrorCode};

use crate::common::{
    CONTEXT, Sealed, context_on, formed_with, open, open_everywhere, seal, seal_under, settled_everywhere,
};
use crate::key_life::{GONE, READY, after, code, refused_everywhere};

const OLD: &str = "exchange";
const NEW: &str = "2fa";
/// The other context that is in the old slot.
const NEIGHBOUR: &str = "order-key";
/// Until a slot that was sick serves again: it tests itself every 3 s.
const WELL: Duration = Duration::from_secs(60);
/// From the beginning of a trouble to the first refusal: the next call meets it.
const SICK: Duration = Duration::from_secs(30);

fn to(slot: &str) -> MoveKeyRequest {
    MoveKeyRequest {
        slot: slot.to_owned(),
    }
}

/// The slot of each version.
fn slots(info: &ContextInfo) -> Vec<(u32, &str)> {
    let versions = info.versions.iter();
    versions
        .map(|version| (version.version, version.slot.as_str()))
        .collect()
}

fn moved(context: &str) -> MoveKeyResponse {
    MoveKeyResponse {
        context: context.to_owned(),
        slot: NEW.to_owned(),
        version: 2,
        key_id: format!("kek-{context}-v2"),
        previous_version: Some(1),
    }
}

fn rewrap(sealed: &Sealed) -> RewrapRequest {
    RewrapRequest::new(CONTEXT, sealed.ciphertext.clone())
}

fn decrypt(sealed: &Sealed) -> DecryptRequest {
    DecryptRequest::new(CONTEXT, sealed.ciphertext.clone())
}

/// What a batch opens, by code, in its order.
async fn codes(client: &Client, batch: &[&Sealed]) -> Result<Vec<Option<ErrorCode>>> {
    let batch = Batch::new(batch.iter().map(|sealed| decrypt(sealed)));
    let answer = client.decrypt_batch(&batch).await?.into_body();
    let code = |result: &ItemResult<_>| match result {
        ItemResult::Ok(_) => None,
        ItemResult::Err(error) => error.error_code(),
    };
    Ok(answer.batch.iter().map(code).collect())
}

/// Every token of this slot fails, on all nodes.
fn sicken(shim: &Shim, slot: &str) -> Result<()> {
    let calls = ["C_EncryptInit", "C_DecryptInit", "C_OpenSession"];
    let rules = calls.map(|call| format!("{call} fail 30 slot-{slot}"));
    shim.obey(&rules.each_ref().map(String::as_str))
}

/// Old ciphertexts are refused with the old slot's trouble, and nothing else is.
async fn only_old_ones_are_refused(cluster: &Playground, old: &Sealed, new: &Sealed) -> Result<()> {
    for node in cluster.nodes() {
        let client = cluster.client_on("trading-1", node.number)?;
        let what = format!("{} refuses version 1", node.id());
        until(&what, SICK, async || {
            (code(client.decrypt(&decrypt(old)).await) == Some(ErrorCode::SlotFailed)).then_some(())
        })
        .await?;
        let made = seal(&client, CONTEXT, b"meanwhile").await?;
        ensure!(made.version == 2, "{}: version {}", node.id(), made.version);
        for sealed in [&made, new] {
            open(&client, CONTEXT, sealed).await.with_context(|| node.id())?;
        }
        client.rewrap(&rewrap(new)).await.with_context(|| node.id())?;
        let refused = code(client.rewrap(&rewrap(old)).await);
        assert_eq!(refused, Some(ErrorCode::SlotFailed), "{}", node.id());
        assert_eq!(
            codes(&client, &[old, new]).await?,
            [Some(ErrorCode::SlotFailed), None],
            "{}",
            node.id()
        );
    }
    Ok(())
}

/// The reverse.
async fn only_old_ones_are_opened(cluster: &Playground, old: &Sealed, new: &Sealed) -> Result<()> {
    for node in cluster.nodes() {
        let client = cluster.client_on("trading-1", node.number)?;
        let what = format!("{} encrypts nothing", node.id());
        until(&what, SICK, async || {
            let refused = code(client.encrypt(&EncryptRequest::new(CONTEXT, b"x")).await);
            (refused == Some(ErrorCode::SlotFailed)).then_some(())
        })
        .await?;
        open(&client, CONTEXT, old).await.with_context(|| node.id())?;
        for sealed in [old, new] {
            let refused = code(client.rewrap(&rewrap(sealed)).await);
            assert_eq!(refused, Some(ErrorCode::SlotFailed), "{}", node.id());
        }
        assert_eq!(
            codes(&client, &[old, new]).await?,
            [None, Some(ErrorCode::SlotFailed)],
            "{}",
            node.id()
        );
    }
    Ok(())
}

/// Until everything is served on every node.
async fn all_is_well(cluster: &Playground, old: &Sealed) -> Result<()> {
    for node in cluster.nodes() {
        let client = cluster.client_on("trading-1", node.number)?;
        until(&format!("{} is well", node.id()), WELL, async || {
            open(&client, CONTEXT, old).await.ok()?;
            client.rewrap(&rewrap(old)).await.ok().map(drop)
        })
        .await?;
        node.wait_ready(WELL).await?;
    }
    Ok(())
}

/// Brings an old ciphertext under the new version, on every node, alone and in a batch; one of them is returned.
async fn rewrapped_everywhere(cluster: &Playground, old: &Sealed) -> Result<Sealed> {
    let mut last = None;
    for node in cluster.nodes() {
        let client = cluster.client_on("trading-1", node.number)?;
        let new = seal_under(&client, CONTEXT, b"after the move", 2).await?;
        let one = client.rewrap(&rewrap(old)).await?.into_body();
        let batch = Batch::new([rewrap(old), rewrap(&new), rewrap(old)]);
        let many = client.rewrap_batch(&batch).await?.into_body().batch;
        let many: Vec<_> = many.iter().filter_map(ItemResult::as_ok).collect();
        ensure!(many.len() == 3, "{}: {many:?}", node.id());
        let sealed = |answer: &hsm_api::data::RewrapResponse, plaintext: &[u8]| Sealed {
            plaintext: plaintext.to_vec(),
            ciphertext: answer.ciphertext.clone(),
            key_id: answer.key_id.clone(),
            version: answer.key_version,
        };
        let all = [
            sealed(&one, &old.plaintext),
            sealed(many[0], &old.plaintext),
            sealed(many[1], &new.plaintext),
            sealed(many[2], &old.plaintext),
        ];
        ensure!(all.iter().all(|sealed| sealed.version == 2), "{}", node.id());
        open_everywhere(cluster, "trading-2", CONTEXT, &all).await?;
        last = all.into_iter().next();
    }
    last.context("no node")
}

/// The first version of both contexts goes, and with it all that was in the old slot.
async fn the_old_slot_is_emptied(cluster: &Playground) -> Result<()> {
    for context in [CONTEXT, NEIGHBOUR] {
        let admin = cluster.client("admin")?;
        admin.destroy_key(context, 1, &after(1), None).await?;
        for node in cluster.nodes() {
            let what = format!("version 1 of {context} destroyed on {}", node.id());
            until(&what, GONE, async || {
                let info = context_on(cluster, node.number, context).await.ok()?;
                let first = info.versions.iter().find(|version| version.version == 1)?;
                (first.state == KeyState::Destroyed).then_some(())
            })
            .await?;
        }
    }
    Ok(())
}

/// The follower that is asked goes on with the next leader. The one that died has the move in its store and no version
/// of the new slot, and comes back to both.
#[cfg(feature = "failpoints")]
async fn the_leader_dies_between_the_move_and_its_version(cluster: &Playground) -> Result<()> {
    let point = "rotation::after_move_commit";
    let leader = cluster_tests::failpoints::kill_leader_at(cluster, &cluster.nodes(), point).await?;
    let doomed = cluster.node(leader.node);
    let asked = cluster.others(leader.node)[0].clone();
    let client = cluster.client_on("admin", asked.number)?;
    let done = client
        .move_key(CONTEXT, &to(NEW), Some("move"))
        .await
        .with_context(|| format!("{} died, {} was asked", doomed.id(), asked.id()))?;
    assert_eq!(done.into_body(), moved(CONTEXT));
    doomed.wait_gone(SICK).await?;
    cluster.start_node(doomed.number).await?;
    doomed
        .wait_ready(READY)
        .await
        .with_context(|| format!("{}: {}", doomed.id(), doomed.log()))
}

pub(crate) async fn a_context_moves_to_another_slot_and_the_old_one_can_go() -> Result<()> {
    let folder = tempfile::Builder::new().prefix("hsm-moves-").tempdir()?;
    let shim = Shim::build(folder.path(), "shim", Path::new(SOFTHSM))?;
    let cluster = formed_with(Playground::builder(), |config| {
        config
            .replace(SOFTHSM, &shim.library().display().to_string())
            .replacen("logging:", "keys: {destroy: {min_wait_seconds: 1}}\nlogging:", 1)
    })
    .await?;
    let old = seal(&cluster.client("trading-1")?, CONTEXT, b"before the move").await?;

    let foreseen = cluster
        .hsmctl(&["key", "move", CONTEXT, "--to", NEW, "--dry-run"])
        .await?
        .ok()?;
    let foreseen = String::from_utf8_lossy(&foreseen);
    ensure!(
        foreseen.contains("version 1 would only decrypt, in slot exchange"),
        "{foreseen}"
    );
    let admin = |number| cluster.client_on("admin", number);
    for (slot, refused) in [(OLD, ErrorCode::Conflict), ("nowhere", ErrorCode::NotFound)] {
        let outcome = admin(1)?.move_key(CONTEXT, &to(slot), None).await;
        assert_eq!(code(outcome), Some(refused), "{slot}");
    }
    #[cfg(feature = "failpoints")]
    the_leader_dies_between_the_move_and_its_version(&cluster).await?;
    // Asked of one node, repeated at another: one version.
    for number in [2, 3] {
        let done = admin(number)?.move_key(CONTEXT, &to(NEW), Some("move")).await?;
        assert_eq!(done.into_body(), moved(CONTEXT));
    }
    let info = settled_everywhere(&cluster, CONTEXT).await?;
    assert_eq!(
        (info.slot.as_str(), slots(&info)),
        (NEW, vec![(1, OLD), (2, NEW)])
    );

    let new = rewrapped_everywhere(&cluster, &old).await?;
    open_everywhere(&cluster, "trading-2", CONTEXT, &[old.clone(), new.clone()]).await?;

    sicken(&shim, OLD)?;
    only_old_ones_are_refused(&cluster, &old, &new).await?;
    shim.obey(&[])?;
    all_is_well(&cluster, &old).await?;
    sicken(&shim, NEW)?;
    only_old_ones_are_opened(&cluster, &old, &new).await?;
    shim.obey(&[])?;
    all_is_well(&cluster, &old).await?;

    let third = cluster.node(3);
    third.kill().await?;
    cluster.start_node(3).await?;
    third.wait_ready(READY).await?;
    open_everywhere(&cluster, "trading-1", CONTEXT, &[old.clone(), new.clone()]).await?;

    cluster
        .client("admin")?
        .create_kek(&CreateKekRequest::new(NEIGHBOUR), None)
        .await?;
    let admin = cluster.client("admin")?;
    // That the slot is well again has to be reported first.
    let done = until("a move", WELL, async || {
        match admin.move_key(NEIGHBOUR, &to(NEW), None).await {
            Err(error) if error.code() == Some(ErrorCode::SlotFailed) => None,
            moved => Some(moved),
        }
    })
    .await??;
    assert_eq!(done.into_body(), moved(NEIGHBOUR));
    the_old_slot_is_emptied(&cluster).await?;
    // What a node serves follows the state that says so.
    refused_everywhere(&cluster, &old, ErrorCode::KeyVersionDestroyed).await?;
    // One node after the other does without the old slot, while the others still serve it.
    for node in cluster.nodes() {
        node.kill().await?;
        let config = node.config()?;
        let line = format!("    \"{OLD}\": {{");
        let without: Vec<&str> = config.lines().filter(|text| !text.starts_with(&line)).collect();
        let without = without.join("\n") + "\n";
        ensure!(without.len() < config.len(), "no slot was taken out of\n{config}");
        node.set_config(&without.replace("contexts: [2fa]", "contexts: [2fa, exchange-key, order-key]"))?;
        cluster.start_node(node.number).await?;
        node.wait_ready(READY)
            .await
            .with_context(|| format!("without slot {OLD}: {}", node.log()))?;
    }
    open_everywhere(&cluster, "trading-1", CONTEXT, &[new]).await?;
    cluster.passed();
    Ok(())
}
