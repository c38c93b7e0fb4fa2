//! What somebody gets who has carried a token away, and a node that finds another token in a slot's place.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use cluster_tests::{Node, Playground, until};
use hsm_api::ErrorCode;
use hsm_api::admin::{SlotState, SlotStatus};
use hsm_api::data::{DecryptRequest, EncryptRequest};
use hsm_core::names::{KeyUid, TransportId};
use hsm_core::replication::{ReplicationKey, SealedKeyContext};
use raft_store::names::Incarnation;
use raft_store::storage::{Store, StoreOptions};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use crate::common::{CONTEXT, Sealed, open, seal};
use crate::pkcs11::{Token, copy_folder, relabel, token_folder};

/// From a start to an answer that will stay.
const ANSWERED: Duration = Duration::from_secs(60);

/// A KEK that gives nothing away, whatever is asked of it: CKA_VALUE, and wrapping under the transport key and
/// under a key of the robber's own.
fn closed_kek(label: &str) -> Value {
    json!({
        "label": label,
        "sensitive": true,
        "extractable": false,
        "value": "refused",
        "wrapped": ["KeyUnextractable", "KeyUnextractable"],
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copied_token_and_its_pin_give_no_key_out() -> Result<()> {
    let cluster = Playground::start(3).await?;
    cluster.client("admin")?.rotate(CONTEXT, None).await?;
    cluster.dev("down", &[]).await?;
    let refused = "TemplateInconsistent";
    // On one node the transport key was made, on the others it came by grant.
    for node in cluster.nodes() {
        let copy = cluster.scratch().join(format!("copy-{}", node.number));
        copy_folder(&node.dir.join("tokens"), &copy)?;
        for (slot, labels) in [
            ("exchange", &["kek-exchange-key-v1", "kek-exchange-key-v2"][..]),
            ("2fa", &["kek-2fa-v1"][..]),
        ] {
            let found = Token::of(&cluster, &node, slot).copied_to(&copy)?.rob()?;
            let keks: Vec<Value> = labels.iter().map(|label| closed_kek(label)).collect();
            let expected = json!({
                "keks": keks,
                "transport_keys": [{
                    "value": "refused",
                    "readable": [refused, refused, refused, refused],
                    "closed": { "value": "refused", "wrapped": "KeyUnextractable" },
                }],
                "private_keys": ["refused"],
            });
            ensure!(
                found == expected,
                "{}, slot {slot}: {found:#}\ninstead of {expected:#}",
                node.id()
            );
        }
    }
    cluster.passed();
    Ok(())
}

/// The wrapped keys of a slot, out of a stopped node's state, as the replication key opens them.
fn wrapped_keys(cluster: &Playground, node: &Node, slot: &str) -> Result<Vec<Zeroizing<Vec<u8>>>> {
    let copy = cluster.scratch().join(format!("state-{}-{slot}", node.number));
    copy_folder(&node.dir.join("data"), &copy)?;
    let opened = Store::open(StoreOptions {
        dir: copy,
        node_name: node.id(),
        incarnation: Incarnation([7; 16]),
        cache_bytes: 1 << 20,
        on_barrier: None,
        on_fatal: Box::new(|why| panic!("{why}")),
    })?;
    let published = opened.machine.published().load_full();
    let state = &published.state;
    let cluster_id = state.meta().context("no cluster")?.cluster_id.0;
    let key = fs::read_to_string(cluster.dir().join("secrets/replication.key"))?;
    let key = ReplicationKey::parse(&key)?.for_cluster(&cluster_id);
    let mut wrapped = Vec::new();
    for (name, version) in state.versions().iter() {
        let home = state.contexts().get(&name.context).context("no context")?;
        if home.slot.as_str() != slot {
            continue;
        }
        let material = version.material.as_ref().context("no sealed key")?;
        let sealed_for = SealedKeyContext {
            cluster_id,
            slot,
            context: name.context.as_str(),
            version: name.version,
            key_uid: KeyUid::from_bytes(version.key_uid.0),
            transport_id: TransportId::from_bytes(material.transport_id.0),
            check_record: &material.check_record,
        };
        wrapped.push(key.open_key(&sealed_for, &material.sealed_key)?);
    }
    Ok(wrapped)
}

/// With the whole disk of a node, the replication key and one slot's PIN: that slot's own keys come out of their
/// seals into the token and no further, the other slot's do not even do that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sealed_keys_open_in_their_own_slots_token_alone_and_stay_closed_there() -> Result<()> {
    let cluster = Playground::start(3).await?;
    cluster.client("admin")?.rotate(CONTEXT, None).await?;
    cluster.dev("down", &[]).await?;
    let refused = "TemplateInconsistent";
    for node in cluster.nodes() {
        let copy = cluster.scratch().join(format!("tokens-{}", node.number));
        copy_folder(&node.dir.join("tokens"), &copy)?;
        for (slot, other, count) in [("exchange", "2fa", 2), ("2fa", "exchange", 1)] {
            let wrapped = wrapped_keys(&cluster, &node, slot)?;
            ensure!(wrapped.len() == count, "{} keys in {slot}", wrapped.len());
            for wrapped in wrapped {
                let own = Token::of(&cluster, &node, slot).copied_to(&copy)?;
                let found = own.unwrap(&wrapped)?;
                let expected = json!([{
                    "readable": [refused, refused, refused, refused],
                    "closed": { "value": "refused", "wrapped": "KeyUnextractable" },
                }]);
                ensure!(found == expected, "{}, slot {slot}: {found:#}", node.id());
                let foreign = Token::of(&cluster, &node, other).copied_to(&copy)?;
                let found = foreign.unwrap(&wrapped)?;
                // SoftHSM 2.6.1 for a wrapped key whose integrity check (RFC 3394) fails.
                let expected = json!([{
                    "readable": [refused, refused, refused, refused],
                    "closed": "GeneralError",
                }]);
                ensure!(
                    found == expected,
                    "{}, a key of slot {slot} in the token of slot {other}: {found:#}",
                    node.id()
                );
            }
        }
    }
    cluster.passed();
    Ok(())
}

/// Nobody decrypts or encrypts on this node: each call ends with one of these.
async fn refuses(
    cluster: &Playground,
    node: &Node,
    profile: &str,
    context: &str,
    sealed: &Sealed,
    expected: &[ErrorCode],
) -> Result<()> {
    let client = cluster.client_on(profile, node.number)?;
    let what = format!("{expected:?} from {} for {context}", node.id());
    until(&what, ANSWERED, async || {
        let request = DecryptRequest::new(context, sealed.ciphertext.clone());
        match client.decrypt(&request).await {
            Ok(_) => Some(Err(anyhow!("{} decrypted for {context}", node.id()))),
            // Until its start gate opens it answers something else.
            Err(error) => error
                .code()
                .filter(|code| expected.contains(code))
                .map(|_| Ok(())),
        }
    })
    .await??;
    let outcome = client.encrypt(&EncryptRequest::new(context, b"x")).await;
    let code = outcome.err().and_then(|error| error.code());
    ensure!(
        code.is_some_and(|code| expected.contains(&code)),
        "{} answers an encryption for {context} with {code:?}",
        node.id()
    );
    Ok(())
}

async fn slot_on(cluster: &Playground, node: &Node, slot: &str) -> Result<SlotStatus> {
    let status = cluster.status(node.number).await.context("no status")?;
    let found = status.slots.into_iter().find(|status| status.slot == slot);
    found.with_context(|| format!("no slot {slot} in the status of {}", node.id()))
}

/// The slot does not serve, and says why.
async fn fails(cluster: &Playground, node: &Node, slot: &str, why: &str) -> Result<()> {
    let status = slot_on(cluster, node, slot).await?;
    let reason = status.reason.clone().unwrap_or_default();
    ensure!(
        status.state != SlotState::Ready && reason.contains(why),
        "{status:?}"
    );
    Ok(())
}

async fn status_of(node: &Node, path: &str) -> Result<u16> {
    Ok(node.patient().get(path).await?.status)
}

/// The other slot of this node serves as ever.
async fn other_slot_serves(cluster: &Playground, node: &Node, own: &Sealed) -> Result<()> {
    until("the other slot", ANSWERED, async || {
        let status = status_of(node, "/readyz?slot=2fa").await.ok()?;
        (status == 200).then_some(())
    })
    .await?;
    open(&cluster.client_on("2fa-1", node.number)?, "2fa", own).await
}

fn files_in(folder: &Path) -> Result<Vec<String>> {
    let names = fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names: Vec<String> = names.collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}

pub(crate) async fn another_token_in_a_slots_place_opens_nothing() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let leader = cluster.leader().await?;
    let others = cluster.others(leader.node);
    let (node, lender) = (others[0].clone(), others[1].clone());
    let exchange = seal(
        &cluster.client_on("trading-1", leader.node)?,
        CONTEXT,
        b"exchange",
    )
    .await?;
    let own = seal(&cluster.client_on("2fa-1", leader.node)?, "2fa", b"2fa").await?;
    let config = node.config()?;
    let tokens = node.dir.join("tokens");
    let kept = cluster.scratch().join("kept");
    node.kill().await?;
    copy_folder(&tokens, &kept)?;
    // Another node's, because SoftHSM itself gives up when two folders have one serial number.
    let foreign = token_folder(&lender.dir.join("tokens"), "slot-2fa")?;
    let place = token_folder(&tokens, "slot-exchange")?;
    let put = || -> Result<()> {
        fs::remove_dir_all(&place)?;
        copy_folder(&foreign, &place)
    };
    let others_serve = async || -> Result<()> {
        for other in cluster.others(node.number) {
            open(&cluster.client_on("trading-1", other.number)?, CONTEXT, &exchange).await?;
            open(&cluster.client_on("2fa-1", other.number)?, "2fa", &own).await?;
            ensure!(other.is_ready().await, "{} is not ready", other.id());
        }
        Ok(())
    };

    // As it is: one label has no token, the other has two.
    put()?;
    cluster.start_node(node.number).await?;
    let failed = [ErrorCode::SlotFailed];
    refuses(&cluster, &node, "trading-1", CONTEXT, &exchange, &failed).await?;
    refuses(&cluster, &node, "2fa-1", "2fa", &own, &failed).await?;
    fails(&cluster, &node, "exchange", "\"slot-exchange\"").await?;
    fails(&cluster, &node, "2fa", "2 tokens have the label").await?;
    ensure!(status_of(&node, "/livez").await? == 200, "the node is down");
    ensure!(!node.is_ready().await, "a node without slots is ready");
    others_serve().await?;

    // Under the slot's label: its PIN is another one.
    node.kill().await?;
    put()?;
    relabel(&place, "slot-2fa", "slot-exchange")?;
    cluster.start_node(node.number).await?;
    let locked = [ErrorCode::SlotLocked];
    refuses(&cluster, &node, "trading-1", CONTEXT, &exchange, &locked).await?;
    fails(&cluster, &node, "exchange", "refused the PIN").await?;
    ensure!(
        status_of(&node, "/readyz?slot=exchange").await? == 503,
        "the slot is ready"
    );
    other_slot_serves(&cluster, &node, &own).await?;
    others_serve().await?;

    // With its PIN too. The node has the state, the replication key and a grant; the token's own key is not the
    // one that this node registered.
    node.kill().await?;
    put()?;
    relabel(&place, "slot-2fa", "slot-exchange")?;
    let before = files_in(&place)?;
    ensure!(config.contains("HSM_PIN_EXCHANGE"), "{config}");
    node.set_config(&config.replace("HSM_PIN_EXCHANGE", "HSM_PIN_2FA"))?;
    let said = node.log().len();
    cluster.start_node(node.number).await?;
    refuses(&cluster, &node, "trading-1", CONTEXT, &exchange, &failed).await?;
    fails(&cluster, &node, "exchange", "the token was replaced").await?;
    other_slot_serves(&cluster, &node, &own).await?;
    for word in ["another token than before", "the token was replaced"] {
        until(&format!("{word:?} in its log"), ANSWERED, async || {
            let log = node.log();
            log.get(said..)
                .is_some_and(|log| log.contains(word))
                .then_some(())
        })
        .await?;
    }
    let status = slot_on(&cluster, &node, "exchange").await?;
    ensure!(status.missing_keys > 0, "{status:?}");
    // What an alert goes by.
    until("hsm_keys_missing", ANSWERED, async || {
        let metrics = node.metrics().await.ok()?;
        let missing = metrics.with_label("hsm_keys_missing", "slot", "exchange")?;
        (missing > 0.0).then_some(())
    })
    .await?;
    ensure!(
        status_of(&node, "/readyz?slot=exchange").await? == 503,
        "the slot is ready"
    );
    ensure!(
        !node.is_ready().await,
        "the node is ready without the slot's keys"
    );
    let after = files_in(&place)?;
    ensure!(
        before == after,
        "the foreign token was changed: {before:?}, {after:?}"
    );
    others_serve().await?;

    // The same slot's token of another node, with the very keys: it is another node's all the same.
    node.kill().await?;
    fs::remove_dir_all(&tokens)?;
    copy_folder(&kept, &tokens)?;
    node.set_config(&config)?;
    fs::remove_dir_all(&place)?;
    copy_folder(
        &token_folder(&lender.dir.join("tokens"), "slot-exchange")?,
        &place,
    )?;
    cluster.start_node(node.number).await?;
    refuses(&cluster, &node, "trading-1", CONTEXT, &exchange, &failed).await?;
    fails(&cluster, &node, "exchange", "the token was replaced").await?;
    other_slot_serves(&cluster, &node, &own).await?;
    others_serve().await?;

    // A copy beside its original: SoftHSM aborts over that. The node is up and says which two.
    node.kill().await?;
    fs::remove_dir_all(&tokens)?;
    copy_folder(&kept, &tokens)?;
    let twin = tokens.join("twin");
    copy_folder(&place, &twin)?;
    cluster.start_node(node.number).await?;
    refuses(&cluster, &node, "trading-1", CONTEXT, &exchange, &failed).await?;
    fails(&cluster, &node, "exchange", "are one token").await?;
    ensure!(status_of(&node, "/livez").await? == 200, "the node is down");
    others_serve().await?;
    fs::remove_dir_all(&twin)?;
    // Without a restart: the module was never loaded, and is tried again.
    node.wait_ready(Duration::from_secs(60)).await?;
    open(&cluster.client_on("trading-1", node.number)?, CONTEXT, &exchange).await?;
    open(&cluster.client_on("2fa-1", node.number)?, "2fa", &own).await?;
    cluster.passed();
    Ok(())
}
