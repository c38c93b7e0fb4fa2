//! A new node joins and an old one is removed, and something breaks while that goes on (`interruption.rs`). Whatever is interrupted
//! is asked for again, as a person would. Some removals replace the keys that the node had, too.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use cluster_tests::{Node, until};
use hsm_api::admin::{JoinRequest, JoinTokenRequest, MemberRole};
use hsm_api::client::Retry;
use tokio::time::sleep;

use super::interruption::{self, Interruption};
use super::{Done, one_of, operator, replication, token};
use crate::cluster::Cluster;
use crate::history::Recorder;
use crate::oracles::{keys_held, members};
use crate::schedule::{Effect, FaultKind, Meanwhile};

/// For one change, with all that it is interrupted by. One that takes longer has failed, and not the harness: the cluster had a
/// quorum for nearly all of the time.
const CHANGED: Duration = Duration::from_secs(240);
/// Of one request to a joining node, which answers once it votes.
const JOIN: Duration = Duration::from_secs(70);
/// Of a token: longer than the request that it is for.
const TOKEN_SECONDS: u64 = JOIN.as_secs() + 50;
/// Between two attempts to join.
const AGAIN: Duration = Duration::from_millis(500);
/// For a list of members: a leader may be elected meanwhile.
const ASKED: Duration = Duration::from_secs(15);

pub(super) async fn carry_out(
    (meanwhile, rotate): (Meanwhile, bool),
    pick: u32,
    cluster: &Cluster,
    recorder: &Recorder,
) -> Result<Done> {
    let others = cluster.members();
    let any = one_of(&others, pick).context("no node is left")?;
    let node = cluster.prepare_node().await.context("make a new node")?;
    // The replication key may have been replaced since the others were made.
    let theirs = cluster.node(any).config()?;
    node.set_config(&replication::as_another(&node.config()?, &theirs)?)?;
    cluster
        .start_node(node.number)
        .await
        .context("start a new node")?;
    let interruption = Interruption::prepare(meanwhile, pick, (&node, true), cluster).await?;
    let (joined, happened) = interruption.during(join(&node, cluster), cluster).await;
    let happened = happened?;
    if let Err(error) = joined {
        return Ok(failed(&node.id(), "does not join", &error));
    }
    cluster.admit(node.number);
    members::note(cluster, recorder).await;
    if cluster.tries(FaultKind::TokenOlder) {
        token::keep_copy_of_running(&node).await?;
    }
    cluster.start_stopped().await?;
    let leads = match meanwhile {
        Meanwhile::LeaderKilledAt(_) => cluster.leader_soon().await.map(|leader| leader.node),
        _ => None,
    };
    let old = who_goes(pick, &others, leads).context("no node is left")?;
    let old = cluster.node(old);
    // What is made then is made at some time from now on, and nobody is told of it.
    let own = if rotate {
        // Not to be repeated: the new node has joined.
        operator::versions_of_all(cluster, recorder)
            .await
            .map_err(|error| anyhow!("what is made meanwhile: {error:#}"))?
    } else {
        Vec::new()
    };
    let key = rotate.then(|| format!("remove-{}", recorder.number()));
    let key = key.as_deref();
    // Who is removed ends by itself, and does not start again.
    cluster.hold_down(old.number, true);
    let interruption = Interruption::prepare(meanwhile, pick, (&old, false), cluster).await?;
    let begins_ms = recorder.elapsed_ms();
    let (removed, happened_again) = interruption.during(removal(&old, key, cluster), cluster).await;
    let happened_again = happened_again?;
    if let Err(error) = removed {
        return Ok(failed(&old.id(), "is not removed", &error));
    }
    cluster.dismiss(old.number);
    old.kill().await?;
    if interruption::out_of_reach(old.number, happened_again.as_deref()) {
        recorder.note(&keys_held::out_of_reach(old.number, begins_ms));
    }
    cluster.hold_down(old.number, false);
    let replaced = match key {
        Some(key) => replace_keys(&old, key, cluster).await,
        None => Ok(()),
    };
    let before = voters(cluster).await;
    // Once more, as by a script that has not heard the answers: one is a member already, the other is none any more.
    let repeated = [
        join_once(&node, cluster).await.err(),
        remove_once(&old, key, cluster).await.err(),
    ];
    let after = voters(cluster).await;
    drop(own);
    members::note(cluster, recorder).await;
    let said = repeated.map(|failed| failed.map_or("done".to_owned(), |error| format!("{error:#}")));
    let what = format!(
        "{} joined, {} was removed, keys replaced: {rotate}; meanwhile: {happened:?}, {happened_again:?}; asked for once more: \
         {said:?}",
        node.id(),
        old.id()
    );
    Ok(match (before, after) {
        (Ok(before), Ok(after)) if before == after => {
            came(what, happened.is_some() || happened_again.is_some(), replaced)
        }
        (before, after) => {
            let is = format!("the voters were {before:?}; after both were asked for once more: {after:?}");
            Done::cluster_failed(what, &is)
        }
    })
}

/// The one that is drawn, or the next one where that one leads and the leader is to die at a line of the removal: it would hand
/// over, and not come by the line.
fn who_goes(pick: u32, among: &[u32], leads: Option<u32>) -> Option<u32> {
    let drawn = one_of(among, pick);
    if drawn.is_some() && drawn == leads {
        return one_of(among, pick.wrapping_add(1));
    }
    drawn
}

/// Of a change of members that has come through.
fn came(what: String, interrupted: bool, replaced: Result<()>) -> Done {
    match replaced {
        // A slot has room for so many transport keys: that there is none left is no fault of the cluster.
        Err(error) => Done::not_counted(what, format!("the keys of the removed node stay: {error:#}")),
        Ok(()) => Done::counted_if(
            interrupted,
            what,
            "nothing has interrupted it: nobody led, or it was over by then",
        ),
    }
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
        effect: Effect::Failed(format!("{node} {what} within {CHANGED:?}: {error:#}")),
    }
}

pub(crate) async fn join(node: &Node, cluster: &Cluster) -> Result<()> {
    let mut last = String::new();
    let joined = until("the join", CHANGED, async || {
        match join_once(node, cluster).await {
            Ok(()) => Some(()),
            Err(error) => {
                last = format!("{error:#}");
                // Each attempt has made a token, and the cluster keeps so many.
                sleep(AGAIN).await;
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
        // Those that were of no use are soon gone.
        ttl_seconds: Some(TOKEN_SECONDS),
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
    removal(node, None, cluster).await
}

/// Under a key, the keys that the node had are begun to be replaced, too.
async fn removal(node: &Node, key: Option<&str>, cluster: &Cluster) -> Result<()> {
    let mut last = String::new();
    let removed = until("the removal", CHANGED, async || {
        let failed = remove_once(node, key, cluster).await.err();
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

/// The command again, under the key that it began under, does what is left of it.
async fn replace_keys(node: &Node, key: &str, cluster: &Cluster) -> Result<()> {
    let mut last = String::new();
    let replaced = until("other keys", CHANGED, async || {
        match remove_once(node, Some(key), cluster).await {
            Ok(()) => Some(()),
            Err(error) => {
                last = format!("{error:#}");
                None
            }
        }
    })
    .await;
    replaced.with_context(|| last)
}

fn removal_arguments<'a>(id: &'a str, key: Option<&'a str>) -> Vec<&'a str> {
    let mut arguments = vec!["cluster", "remove", id, "--confirm", id];
    match key {
        Some(key) => arguments.extend(["--idempotency-key", key]),
        None => arguments.push("--no-rotate"),
    }
    arguments
}

/// By the program that a person uses. Without a key for it, which keys are made anew is the workload's to decide.
async fn remove_once(node: &Node, key: Option<&str>, cluster: &Cluster) -> Result<()> {
    let id = node.id();
    let arguments = removal_arguments(&id, key);
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
    fn a_removal_replaces_keys_under_a_key_of_its_own_or_not_at_all() {
        assert_eq!(removal_arguments("n", None).last(), Some(&"--no-rotate"));
        let rotates = removal_arguments("n", Some("k"));
        assert!(
            rotates.ends_with(&["--idempotency-key", "k"]) && !rotates.contains(&"--no-rotate"),
            "{rotates:?}"
        );
    }

    #[test]
    fn who_is_to_die_at_a_line_of_a_removal_is_not_who_leaves() {
        let goes = |leads| who_goes(5, &[1, 2, 3], leads);
        assert_eq!(goes(None), Some(3));
        assert_eq!(goes(Some(2)), Some(3));
        assert_eq!(goes(Some(3)), Some(1));
        assert_eq!(who_goes(5, &[], None), None);
    }

    #[test]
    fn a_change_that_nothing_broke_or_that_left_keys_does_not_count() {
        let counts = |interrupted, replaced| came(String::new(), interrupted, replaced).effect;
        assert_eq!(counts(true, Ok(())), Effect::Counted);
        for not in [counts(false, Ok(())), counts(true, Err(anyhow!("no room")))] {
            assert!(not != Effect::Counted && not.failure().is_none(), "{not:?}");
        }
    }

    #[test]
    fn a_change_of_members_that_does_not_come_through_is_the_clusters_failure() {
        let done = failed("hsm-node-4", "does not join", &anyhow!("no answer"));
        let failure = done.effect.failure().unwrap();
        assert!(
            failure.starts_with("hsm-node-4 does not join within"),
            "{failure}"
        );
        assert!(failure.ends_with("no answer"), "{failure}");
    }
}
