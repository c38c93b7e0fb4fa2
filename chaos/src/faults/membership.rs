//! A new node joins and an old one is removed, and the leader is killed while that goes on. Whatever is interrupted is asked
//! for again, as a person would.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::{Node, until};
use hsm_api::admin::{JoinRequest, JoinTokenRequest, MemberRole};
use hsm_api::client::Retry;
use nix::sys::signal::Signal;

use super::{Done, one_of, replication, token};
use crate::cluster::Cluster;
use crate::history::Recorder;
use crate::oracles::members;
use crate::schedule::{Effect, FaultKind};

/// For one change, with all that it is interrupted by. One that takes longer has failed, and not the harness: the cluster had a
/// quorum for nearly all of the time.
const CHANGED: Duration = Duration::from_secs(240);
/// Of one request to a joining node, which answers once it votes.
const JOIN: Duration = Duration::from_secs(70);
/// For a list of members: a leader may be elected meanwhile.
const ASKED: Duration = Duration::from_secs(15);
/// From the beginning of a change to the kill.
const INTO_IT: Duration = Duration::from_millis(300);

pub(super) async fn carry_out(
    kill_leader: bool,
    pick: u32,
    cluster: &Cluster,
    recorder: &Recorder,
) -> Result<Done> {
    let old = one_of(&cluster.members(), pick).context("no node is left")?;
    let node = cluster.prepare_node().await.context("make a new node")?;
    // The replication key may have been replaced since the others were made.
    let theirs = cluster.node(old).config()?;
    node.set_config(&replication::as_another(&node.config()?, &theirs)?)?;
    cluster
        .start_node(node.number)
        .await
        .context("start a new node")?;
    // A token that is made by a wrong clock is refused by a right one.
    let clocks = cluster.right_clocks().await;
    let (joined, killed) = tokio::join!(join(&node, cluster), kill(kill_leader, cluster));
    drop(clocks);
    let killed = killed?;
    if let Err(error) = joined {
        return Ok(failed(&node.id(), "does not join", &error));
    }
    cluster.admit(node.number);
    members::note(cluster, recorder).await;
    if cluster.tries(FaultKind::TokenOlder) {
        token::keep_copy(&node)?;
    }
    cluster.start_stopped().await?;
    let old = cluster.node(old);
    let (removed, killed_again) = tokio::join!(remove(&old, cluster), kill(kill_leader, cluster));
    let killed_again = killed_again?;
    if let Err(error) = removed {
        return Ok(failed(&old.id(), "is not removed", &error));
    }
    cluster.dismiss(old.number);
    old.kill().await?;
    let before = voters(cluster).await;
    // Once more, as by a script that has not heard the answers: one is a member already, the other is none any more.
    let repeated = [
        join_once(&node, cluster).await.err(),
        remove_once(&old, cluster).await.err(),
    ];
    let after = voters(cluster).await;
    members::note(cluster, recorder).await;
    let said = repeated.map(|failed| failed.map_or("done".to_owned(), |error| format!("{error:#}")));
    let what = format!(
        "{} joined, {} was removed; leaders killed meanwhile: {killed:?} {killed_again:?}; asked for once more: {said:?}",
        node.id(),
        old.id()
    );
    Ok(match (before, after) {
        (Ok(before), Ok(after)) if before == after => Done::counted(what),
        (before, after) => {
            let is = format!("the voters were {before:?}; after both were asked for once more: {after:?}");
            Done::cluster_failed(what, &is)
        }
    })
}

/// Names of the voters with their raft ids, once somebody says that they are those who belong to the cluster.
async fn voters(cluster: &Cluster) -> Result<BTreeMap<String, u64>> {
    let nodes = cluster.nodes();
    let wanted: BTreeSet<String> = nodes.iter().map(Node::id).collect();
    let endpoints: Vec<String> = nodes.iter().map(Node::endpoint).collect();
    let admin = cluster.playground().pki().identity("admin")?;
    let client = cluster.playground().pki().client(Some(&admin), &endpoints)?;
    let client = client.with_retry(Retry::Until(ASKED));
    until(&format!("the voters {wanted:?}"), CHANGED, async || {
        let members = client.members().await.ok()?.into_body().members;
        let voters = members
            .into_iter()
            .filter(|member| member.role == MemberRole::Voter);
        let voters: BTreeMap<String, u64> = voters.map(|member| (member.node_id, member.raft_id)).collect();
        voters.keys().eq(&wanted).then_some(voters)
    })
    .await
}

fn failed(node: &str, what: &str, error: &anyhow::Error) -> Done {
    Done {
        target: node.to_owned(),
        effect: Effect::cluster_failed(&format!("{node} {what} within {CHANGED:?}: {error:#}")),
    }
}

/// SIGKILL to the leader a moment later, and its start.
pub(super) async fn kill(wanted: bool, cluster: &Cluster) -> Result<Option<u32>> {
    if !wanted {
        return Ok(None);
    }
    tokio::time::sleep(INTO_IT).await;
    let Some(leader) = cluster.leader_now().await else {
        return Ok(None);
    };
    let node = cluster.node(leader.node);
    node.signal(Signal::SIGKILL)?;
    node.wait_gone(CHANGED).await?;
    tokio::time::sleep(INTO_IT).await;
    cluster.start_stopped().await?;
    Ok(Some(leader.node))
}

pub(crate) async fn join(node: &Node, cluster: &Cluster) -> Result<()> {
    let mut last = String::new();
    let joined = until("the join", CHANGED, async || {
        match join_once(node, cluster).await {
            Ok(()) => Some(()),
            Err(error) => {
                last = format!("{error:#}");
                is_member(node, cluster).await.unwrap_or(false).then_some(())
            }
        }
    })
    .await;
    joined.with_context(|| last)
}

async fn join_once(node: &Node, cluster: &Cluster) -> Result<()> {
    let playground = cluster.playground();
    let members = cluster.nodes();
    let endpoints: Vec<String> = members.iter().map(Node::endpoint).collect();
    let admin = playground.pki().identity("admin")?;
    let request = JoinTokenRequest {
        ttl_seconds: None,
        node_id: Some(node.id()),
    };
    let client = playground.pki().client(Some(&admin), &endpoints)?;
    // A token that a wrong clock has made is good for too long, or for no time at all.
    let _right = cluster.right_clocks().await;
    let token = client.create_join_token(&request).await?.into_body();
    let request = JoinRequest {
        token: token.token,
        cluster_ca_sha256: token.cluster_ca_sha256,
        leader_addresses: members
            .iter()
            .map(|member| playground.advertised(member))
            .collect(),
    };
    let joining = playground.client_on("admin", node.number)?;
    tokio::time::timeout(JOIN, joining.join(&request))
        .await
        .context("no answer")??;
    Ok(())
}

/// Whether a member votes, by what any other says.
async fn is_member(node: &Node, cluster: &Cluster) -> Result<bool> {
    let endpoints: Vec<String> = cluster
        .nodes()
        .iter()
        .filter(|other| other.number != node.number)
        .map(Node::endpoint)
        .collect();
    let admin = cluster.playground().pki().identity("admin")?;
    let client = cluster.playground().pki().client(Some(&admin), &endpoints)?;
    let members = client.members().await?.into_body().members;
    Ok(members
        .iter()
        .any(|member| member.node_id == node.id() && member.role == MemberRole::Voter))
}

pub(crate) async fn remove(node: &Node, cluster: &Cluster) -> Result<()> {
    let mut last = String::new();
    let removed = until("the removal", CHANGED, async || {
        let failed = remove_once(node, cluster).await.err();
        last = failed
            .as_ref()
            .map(|error| format!("{error:#}"))
            .unwrap_or_default();
        // What was interrupted may have been done.
        let there = is_member(node, cluster).await.ok()?;
        (!there).then_some(())
    })
    .await;
    removed.with_context(|| last)
}

/// By the program that a person uses. Which keys are made anew is the workload's to decide.
async fn remove_once(node: &Node, cluster: &Cluster) -> Result<()> {
    let id = node.id();
    let arguments = ["cluster", "remove", &id, "--confirm", &id, "--no-rotate"];
    let said = cluster.playground().hsmctl(&arguments).await?;
    ensure!(
        said.code == Some(0),
        "hsmctl cluster remove: {:?}: {}",
        said.code,
        said.stderr
    );
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_change_of_members_that_does_not_come_through_is_the_clusters_failure() {
        let done = failed("hsm-node-4", "does not join", &anyhow::anyhow!("no answer"));
        let failure = done.effect.failure().unwrap();
        assert!(
            failure.starts_with("hsm-node-4 does not join within"),
            "{failure}"
        );
        assert!(failure.ends_with("no answer"), "{failure}");
    }
}
