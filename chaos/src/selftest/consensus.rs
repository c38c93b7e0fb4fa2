//! Leaders that go on without a vote, answer without a quorum or fall silent, and a node that answers before it has caught up.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cluster_tests::{Stalls, until};
use hsm_api::Client;
use hsm_api::admin::{RevocationMatch, RevokeRequest, UnrevokeRequest};
use hsm_api::client::Retry;
use hsm_api::data::DecryptRequest;

use super::scene::{CONTEXT, PROCESS, SOON, Scene, WATCHED};
use crate::ending::{CALM_BEGINS, CALM_ENDS, DISTURBED, STOOD_STILL};
use crate::history::{Answer, Operation};
use crate::workload::Sealed;

/// Whose certificates the watch encrypts with.
const CLIENTS: [&str; 2] = ["trading-1", "2fa-1"];
/// Two elections, if the leader is not heard.
const QUIET: Duration = Duration::from_secs(6);
/// Who is revoked.
const GONE: &str = "chaos-gone";
/// More entries than a leader sends at once: those who miss them apply them in several steps.
const BACKLOG: u32 = 150;
/// Each step of applying, on the node that comes back.
const STEP_MS: u32 = 1500;
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
    // The old leader has to be silent for long enough to be left out.
    scene
        .clients
        .rotate(PROCESS, CONTEXT, Some(new), "by the others")
        .await
        .context("a rotation without the old leader")?;
    scene.clients.retired(PROCESS, CONTEXT, Some(new)).await;
    for _ in 0..3 {
        scene.clients.retired(PROCESS, CONTEXT, Some(old)).await;
    }
    scene.cluster.links().heal()?;
    scene.ready(&[old]).await
}

/// A certificate is revoked while a node is away. It comes back with a lot to apply, slowly, and the certificate's owner asks it.
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
    revoke(scene, &admin).await?;
    let revoked = Instant::now();
    for number in 0..BACKLOG {
        let request = revocation(&format!("chaos-backlog-{number}"));
        admin.revoke(&request).await.context("a change to be missed")?;
    }
    let missed = scene.status(leader).await?.applied_index;
    tokio::time::sleep(IN_FORCE.saturating_sub(revoked.elapsed())).await;

    // It hears of nobody until it applies slowly.
    scene.cluster.links().separate(&[away])?;
    scene.start_node(away).await?;
    let slowly = format!("sleep({STEP_MS})");
    scene.arm(&[away], "store::before_apply", &slowly).await?;
    scene.cluster.links().heal()?;
    until("a node that has caught up", SOON, async || {
        ask(scene, &gone, away, &sealed).await;
        let applied = scene.cluster.status(away).await?.applied_index;
        (applied >= missed).then_some(())
    })
    .await?;
    scene.arm(&[away], "store::before_apply", "off").await?;
    ask(scene, &gone, away, &sealed).await;
    scene.ready(&[away]).await
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
/// down, so the hand-over fails; then another one leads, and hands over to the first again, which has to be heard by all.
/// Every entry would be word from it too, so nobody encrypts meanwhile, and no node has a use to report.
pub(super) async fn a_hand_over_fails_and_another_succeeds(scene: &mut Scene) -> Result<()> {
    let first = scene.leader().await?;
    let stuck = scene.others(&[first])[0];
    scene.arm(&[stuck], "store::before_vote", "pause").await?;
    // It has to fail.
    let _ = transfer(scene, stuck).await;
    scene.arm(&[stuck], "store::before_vote", "off").await?;
    scene.ready(&scene.cluster.members()).await?;
    // In the silence others may have elected somebody.
    let_lead(scene, stuck).await?;
    let admin = scene
        .cluster
        .playground()
        .client("admin")?
        .with_retry(Retry::Until(SOON));
    for cn in CLIENTS {
        admin.revoke(&revocation(cn)).await.context("silence clients")?;
    }
    let_lead(scene, first).await?;
    let stalls = Stalls::watch()?;
    let begun = Instant::now();
    scene.recorder.note(CALM_BEGINS);
    tokio::time::sleep(QUIET).await;
    if stalls.between(begun, Instant::now()) > STOOD_STILL {
        scene.recorder.note(DISTURBED);
    }
    scene.recorder.note(CALM_ENDS);
    for cn in CLIENTS {
        let request = UnrevokeRequest {
            what: revocation(cn).what,
            certificate: None,
        };
        admin.unrevoke(&request).await.context("let clients in again")?;
    }
    Ok(())
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
