//! A slot's transport key is replaced while its leaders are killed, a node is away and another one comes: nobody who
//! asks notices, and in the end the old transport key is in no token.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::failpoints::{kill_at, kill_leader_at};
use cluster_tests::{Leader, Load, Node, Playground, until};
use hsm_api::admin::{
    KeyState, RekeyPhase, RekeyTransportRequest, SlotRekey, TransportKeyInfo, TransportKeyState,
};
use hsm_api::client::Retry;

use crate::common::{
    CONTEXT, Sealed, formed_with, open, open_everywhere_soon, seal, seal_under, settled_everywhere,
};
use crate::key_life::after;
use crate::pkcs11::Token;
use crate::rekey::rekey_status;

const SLOT: &str = "exchange";
/// From a request until its leader is dead.
const REACHED: Duration = Duration::from_secs(60);
/// An election, the silence after which a dead node is left out, and the rotations.
const REKEYED: Duration = Duration::from_secs(60);
/// A destruction: its wait begins anew under another leader, which takes half a minute.
const ENDED: Duration = Duration::from_secs(150);

/// The steps at which a leader is killed, in the order in which it takes them; a rekey for each.
const POINTS: [&str; 3] = [
    // It has made a key, and nobody knows of it: whoever leads next makes another one, without it.
    "rekey::before_offer",
    "rekey::before_activate_commit",
    "rekey::after_activate_commit",
];

async fn slot_on(cluster: &Playground, number: u32) -> Result<SlotRekey> {
    let mut slots = rekey_status(cluster, number).await?.slots.into_iter();
    slots.find(|slot| slot.slot == SLOT).context("no slot")
}

fn current(slot: &SlotRekey) -> Result<TransportKeyInfo> {
    let mut keys = slot.transport_keys.iter();
    let found = keys.find(|key| key.state == TransportKeyState::Current);
    found.cloned().context("no current transport key")
}

/// Until this node says that the slot has this generation and every context a version under it.
async fn rekeyed(cluster: &Playground, number: u32, generation: u32) -> Result<SlotRekey> {
    let what = format!("generation {generation} of slot {SLOT} on node {number}");
    until(&what, REKEYED, async || {
        let slot = slot_on(cluster, number).await.ok()?;
        let done = matches!(slot.phase, RekeyPhase::Waiting | RekeyPhase::Settled);
        (done && current(&slot).ok()?.generation == generation).then_some(slot)
    })
    .await
}

async fn begin(cluster: &Playground, number: u32, key: &str) -> Result<()> {
    let client = cluster.client_on("admin", number)?;
    let client = client.with_retry(Retry::Until(REKEYED));
    let request = RekeyTransportRequest {
        slot: SLOT.to_owned(),
        restart: false,
    };
    client.rekey_transport(&request, Some(key)).await?;
    Ok(())
}

/// A rekey whose leader dies at a point; it comes back when the others are done.
async fn round(
    cluster: &Playground,
    load: &Load,
    point: &str,
    generation: u32,
    sealed: &mut Vec<Sealed>,
) -> Result<()> {
    let Leader { node: number, .. } = kill_leader_at(cluster, &cluster.nodes(), point).await?;
    let (leader, others) = (cluster.node(number), cluster.others(number));
    // What was sent to the leader itself may fail with it; nothing else may.
    load.pause(number).await;
    begin(cluster, others[0].number, point).await?;
    leader
        .wait_gone(REACHED)
        .await
        .with_context(|| format!("{point} not reached"))?;
    rekeyed(cluster, others[0].number, generation).await?;
    let client = cluster.client_on("trading-1", others[0].number)?;
    sealed.push(seal(&client, CONTEXT, point.as_bytes()).await?);
    // Who was away serves only with what it has missed, and opens it at the first attempt.
    cluster.start_node(number).await?;
    cluster.wait_ready(std::slice::from_ref(&leader)).await?;
    let client = cluster.client_on("trading-1", number)?;
    for one in sealed.iter() {
        open(&client, CONTEXT, one)
            .await
            .with_context(|| format!("version {} on {}, just ready", one.version, leader.id()))?;
    }
    load.resume(number).await;
    let so_far = load.so_far();
    ensure!(so_far.failed == 0, "{point}: {:#?}", so_far.failures);
    Ok(())
}

/// Has every retired version of the slot destroyed.
async fn destroy_retired(cluster: &Playground) -> Result<()> {
    let admin = cluster.client("admin")?.with_retry(Retry::Until(REKEYED));
    for context in admin.list_keks().await?.into_body().contexts {
        let retired = context.versions.iter().filter(|version| {
            version.slot == SLOT && matches!(version.state, KeyState::DecryptOnly | KeyState::Disabled)
        });
        for version in retired {
            let (name, number) = (&context.context, version.version);
            admin.destroy_key(name, number, &after(1), None).await?;
        }
    }
    Ok(())
}

/// The transport keys in the token of a node that does not run.
fn in_token(cluster: &Playground, node: &Node) -> Result<Vec<String>> {
    let mut labels = Token::of(cluster, node, SLOT).labels()?;
    labels.retain(|label| label.starts_with("transport-"));
    Ok(labels)
}

pub(crate) async fn a_transport_key_is_replaced_whoever_dies_and_the_old_one_ends_in_every_token()
-> Result<()> {
    let mut cluster = formed_with(Playground::builder(), |config| {
        config.replacen("logging:", "keys: {destroy: {min_wait_seconds: 1}}\nlogging:", 1)
    })
    .await?;
    let mut sealed = vec![seal(&cluster.client("trading-1")?, CONTEXT, b"before").await?];
    let load = Load::start(&cluster)?;
    let mut generation = current(&slot_on(&cluster, 1).await?)?.generation;
    for point in POINTS {
        generation += 1;
        round(&cluster, &load, point, generation, &mut sealed)
            .await
            .with_context(|| point.to_owned())?;
    }
    let report = load.stop().await;
    ensure!(report.failed == 0 && report.decrypted > 20, "{report:#?}");
    // Node 1 may lag behind the one that said that the last rekey was done.
    until("superseded transport keys with versions", REKEYED, async || {
        let slot = slot_on(&cluster, 1).await.ok()?;
        let superseded = slot.transport_keys.iter();
        let superseded =
            superseded.filter(|key| key.state == TransportKeyState::Superseded && key.versions > 0);
        (superseded.count() == POINTS.len()).then_some(())
    })
    .await?;
    // Whoever joins gets the old ones too: older ciphertexts are its to open.
    let fourth = cluster.add_node(true).await?;
    let client = cluster.client_on("trading-1", fourth.number)?;
    for one in &sealed {
        open(&client, CONTEXT, one)
            .await
            .with_context(|| format!("version {}", one.version))?;
    }

    // The leader dies as it is about to end the first of them.
    let Leader { node: number, .. } =
        kill_leader_at(&cluster, &cluster.nodes(), "rekey::before_destroy_commit").await?;
    let (dead, others) = (cluster.node(number), cluster.others(number));
    // Another one dies between the removal from its token and the word of it.
    let removing = &others[1];
    kill_at(removing, "rekey::before_remove_transport").await?;
    // With two of four away nothing is asked for: that one is back before the last destruction may have been.
    let deaths = async {
        dead.wait_gone(REKEYED).await?;
        removing.wait_gone(REKEYED).await?;
        cluster.start_node(removing.number).await
    };
    tokio::try_join!(destroy_retired(&cluster), deaths)?;
    let owed = format!("destructions that only {} owes", dead.id());
    until(&owed, ENDED, async || {
        let slot = slot_on(&cluster, others[0].number).await.ok()?;
        let mut old = slot.transport_keys.iter();
        let owes = |key: &TransportKeyInfo| {
            key.state == TransportKeyState::Current
                || (key.state == TransportKeyState::Destroying && key.waiting_for == [dead.id()])
        };
        old.all(owes).then_some(())
    })
    .await?;
    cluster.start_node(number).await?;
    cluster.wait_ready(&cluster.nodes()).await?;
    let last = until("the end of the old transport keys", ENDED, async || {
        let slot = slot_on(&cluster, number).await.ok()?;
        (slot.phase == RekeyPhase::Settled).then_some(slot)
    })
    .await?;
    let kept = current(&last)?;
    ensure!(kept.generation == generation, "{last:#?}");
    let admin = cluster.client("admin")?.with_retry(Retry::Until(REKEYED));
    let version = admin.rotate(CONTEXT, None).await?.version;
    settled_everywhere(&cluster, CONTEXT).await?;
    let client = cluster.client_on("trading-1", fourth.number)?;
    let newest = seal_under(&client, CONTEXT, b"after", version).await?;
    open_everywhere_soon(&cluster, "trading-1", CONTEXT, &[newest]).await?;
    // Not even the leader that had made one and died before it said so has left it behind.
    cluster.dev("down", &[]).await?;
    let expected = format!("transport-{}", &kept.id[..8]);
    for node in cluster.nodes() {
        let found = in_token(&cluster, &node)?;
        ensure!(
            found == [expected.clone()],
            "{}: {found:?}, not {expected}",
            node.id()
        );
    }
    cluster.passed();
    Ok(())
}
