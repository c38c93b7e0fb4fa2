//! Leaders that go on without a vote, answer without a quorum or fall silent, and a node that answers before it has caught up.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cluster_tests::{Stalls, until};
use hsm_api::Client;
use hsm_api::admin::{RevocationMatch, RevokeRequest, SlotState, UnrevokeRequest};
use hsm_api::client::Retry;
use hsm_api::data::DecryptRequest;

use super::scene::{CONTEXT, HARDLY, PROCESS, SOON, Scene, WATCHED};
use crate::ending::{CALM_BEGINS, CALM_ENDS, DISTURBED, STOOD_STILL};
use crate::history::{Answer, Operation};
use crate::workload::Sealed;

/// Whose certificates the watch encrypts with.
const CLIENTS: [&str; 2] = ["trading-1", "2fa-1"];
/// Some elections, if no leader is heard.
const QUIET: Duration = Duration::from_secs(8);
/// Calms at most: one in which the machine stood still says nothing.
const CALMS: u32 = 3;
/// `cluster.fence_after_ms`, and a little more: as long as a node has to be silent to be left out of a rotation.
const FENCED: Duration = Duration::from_millis(8_500);
/// Who is revoked.
const GONE: &str = "chaos-gone";
/// More entries than a leader sends at once (64): what comes behind them is in a frame of its own.
const BACKLOG: u32 = 80;
/// Each time that something is appended, on the node that comes back. Less than `cluster.raft.election_min_ms`: it is to follow.
const APPEND_MS: u32 = 700;
/// Longer than the oracle gives a node that cannot hear of a revocation.
const IN_FORCE: Duration = Duration::from_secs(16);

/// All are killed, and the one that led is started alone: it has to win a new term before it leads again, and cannot.
pub(super) async fn a_killed_leader_comes_back_alone(scene: &mut Scene) -> Result<()> {
    let leader = scene.leader().await?;
    tokio::time::sleep(WATCHED).await;
    let all = scene.cluster.members();
    scene.kill(&all).await?;
    scene.start_node(leader).await?;
    scene.status(leader).await?;
    tokio::time::sleep(WATCHED).await;
    for node in scene.others(&[leader]) {
        scene.start_node(node).await?;
    }
    scene.ready(&all).await
}

/// The others have elected another leader and rotated. The old one, which still takes itself for the leader, is asked for
/// what only a quorum can say.
pub(super) async fn an_isolated_leader_is_asked(scene: &mut Scene) -> Result<()> {
    let old = scene.leader().await?;
    scene.clients.retired(PROCESS, CONTEXT, Some(old)).await;
    scene.cluster.links().separate(&[old])?;
    let new = scene.leader_but(&[old]).await?;
    // A rotation that had to wait for that itself would have little time left.
    tokio::time::sleep(FENCED).await;
    scene
        .clients
        .rotate(PROCESS, CONTEXT, Some(new), "by-the-others")
        .await
        .context("a rotation without the old leader")?;
    scene.clients.retired(PROCESS, CONTEXT, Some(new)).await;
    for _ in 0..3 {
        scene.clients.retired(PROCESS, CONTEXT, Some(old)).await;
    }
    scene.cluster.links().heal()?;
    scene.ready(&[old]).await
}

/// A leader is cut off until there is another one, and hears of it. Whoever looks only at who is ready, and starts those that are not
/// there, sees nothing else.
pub(super) async fn a_leader_is_replaced_and_heard_again(scene: &mut Scene) -> Result<()> {
    let old = scene.leader().await?;
    scene.cluster.links().separate(&[old])?;
    scene.leader_but(&[old]).await?;
    scene.cluster.links().heal()?;
    // With the bug it never is.
    let _ = scene.ready_within(&[old], HARDLY).await;
    tokio::time::sleep(WATCHED).await;
    Ok(())
}

/// A certificate is revoked while a node is away, with a lot to append before that and after. It comes back, slowly, and the
/// certificate's owner asks it. What it hears of a leader it notes once the first frame is appended, so the revocation must not be in
/// that one; and it answers while it appends the next, which it does on another thread.
pub(super) async fn a_node_that_missed_a_revocation_comes_back(scene: &mut Scene) -> Result<()> {
    let leader = scene.leader().await?;
    let away = scene.others(&[leader])[0];
    let sealed = scene.seal(leader).await?;
    let playground = scene.cluster.playground();
    let identity = playground.pki().issue(GONE, Some("Trading"))?;
    let gone = playground
        .pki()
        .client(Some(&identity), &[scene.cluster.node(away).endpoint()])?;
    ask(scene, &gone, away, &sealed).await;
    scene.kill(&[away]).await?;
    let admin = playground
        .client_on("admin", leader)?
        .with_retry(Retry::Until(SOON));
    backlog(&admin, "before").await?;
    revoke(scene, &admin).await?;
    let revoked = Instant::now();
    backlog(&admin, "after").await?;
    let missed = scene.status(leader).await?.applied_index;
    tokio::time::sleep(IN_FORCE.saturating_sub(revoked.elapsed())).await;

    // It hears of nobody until it appends slowly.
    scene.cluster.links().separate(&[away])?;
    scene.start_node(away).await?;
    // What it may do wrong it does before it has applied anything, so its tokens have to be open by then.
    let _ = until("slots that serve", HARDLY, async || {
        let status = scene.cluster.status(away).await?;
        let mut slots = status.slots.iter();
        slots.all(|slot| slot.state == SlotState::Ready).then_some(())
    })
    .await;
    let slowly = format!("sleep({APPEND_MS})");
    scene.arm(&[away], "store::before_append", &slowly).await?;
    scene.cluster.links().heal()?;
    until("a node that has caught up", SOON, async || {
        ask(scene, &gone, away, &sealed).await;
        let applied = scene.cluster.status(away).await?.applied_index;
        (applied >= missed).then_some(())
    })
    .await?;
    scene.arm(&[away], "store::before_append", "off").await?;
    ask(scene, &gone, away, &sealed).await;
    scene.ready(&[away]).await
}

async fn backlog(admin: &Client, when: &str) -> Result<()> {
    for number in 0..BACKLOG {
        let request = revocation(&format!("chaos-{when}-{number}"));
        admin.revoke(&request).await.context("a change to be missed")?;
    }
    Ok(())
}

fn revocation(cn: &str) -> RevokeRequest {
    RevokeRequest {
        what: Some(RevocationMatch {
            cn: Some(cn.to_owned()),
            ..RevocationMatch::default()
        }),
        certificate: None,
        reason: "chaos".to_owned(),
    }
}

async fn revoke(scene: &Scene, admin: &Client) -> Result<()> {
    let pending = scene
        .recorder
        .invoke(PROCESS, Operation::Revoke { cn: GONE.to_owned() });
    match admin.revoke(&revocation(GONE)).await {
        Ok(answer) => {
            pending.answered(Answer::Done, &answer.meta);
            Ok(())
        }
        Err(error) => {
            pending.failed(&error);
            Err(error).context("revoke")
        }
    }
}

/// As whoever is revoked. A node that has just come back has no invocations to encrypt with, so it is asked to decrypt.
async fn ask(scene: &Scene, gone: &Client, node: u32, sealed: &Sealed) {
    let operation = Operation::Ask {
        cn: GONE.to_owned(),
        node,
    };
    let pending = scene.recorder.invoke(PROCESS + 1, operation);
    match gone
        .decrypt(&DecryptRequest::new(CONTEXT, sealed.ciphertext.clone()))
        .await
    {
        Ok(answer) => pending.answered(Answer::Done, &answer.meta),
        Err(error) => pending.failed(&error),
    }
}

/// With five voters a leader says nothing to the others before it hands over. The one that is to follow cannot write its vote
/// down, so the hand-over fails; then each of the others leads and hands over to the next, and the last one to the first again.
/// Whoever leads from then on has tried to hand over before, and has to be heard by all; so it does not matter who does, nor
/// how soon the calm begins. Every entry would be word from it too, so nobody encrypts meanwhile, and no node has a use to report.
pub(super) async fn hand_overs_fail_and_succeed(scene: &mut Scene) -> Result<()> {
    let first = scene.leader().await?;
    let stuck = scene.others(&[first])[0];
    scene.arm(&[stuck], "store::before_vote", "pause").await?;
    // It has to fail.
    let _ = transfer(scene, stuck).await;
    scene.arm(&[stuck], "store::before_vote", "off").await?;
    scene.ready(&scene.cluster.members()).await?;
    // In the silence others may have elected somebody.
    let begins = scene.leader().await?;
    for node in scene.others(&[first, begins]) {
        let_lead(scene, node).await?;
    }
    let admin = scene
        .cluster
        .playground()
        .client("admin")?
        .with_retry(Retry::Until(SOON));
    for cn in CLIENTS {
        admin.revoke(&revocation(cn)).await.context("silence clients")?;
    }
    let_lead(scene, first).await?;
    tokio::time::sleep(WATCHED).await;
    for _ in 0..CALMS {
        if !calm(scene).await? {
            break;
        }
    }
    for cn in CLIENTS {
        let request = UnrevokeRequest {
            what: revocation(cn).what,
            certificate: None,
        };
        admin.unrevoke(&request).await.context("let clients in again")?;
    }
    Ok(())
}

/// A while in which nothing is done. Whether the machine stood still in it.
async fn calm(scene: &Scene) -> Result<bool> {
    let stalls = Stalls::watch()?;
    let begun = Instant::now();
    scene.recorder.note(CALM_BEGINS);
    tokio::time::sleep(QUIET).await;
    let stood_still = stalls.between(begun, Instant::now()) > STOOD_STILL;
    if stood_still {
        scene.recorder.note(DISTURBED);
    }
    scene.recorder.note(CALM_ENDS);
    Ok(stood_still)
}

/// Hands over until this one leads: a vote that comes late may have made another one the leader meanwhile.
async fn let_lead(scene: &Scene, node: u32) -> Result<()> {
    let what = format!("the leadership of node {node}");
    until(&what, SOON, async || {
        if scene.leader().await.ok()? == node {
            return Some(());
        }
        let _ = transfer(scene, node).await;
        None
    })
    .await
}

async fn transfer(scene: &Scene, to: u32) -> Result<()> {
    let name = scene.cluster.node(to).id();
    scene.hsmctl(&["cluster", "transfer-leader", &name]).await
}
