//! Members that leave: under load, the leader too, replaced in one change; what becomes of them, and of who must not go.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::playground::Output;
use cluster_tests::{Load, Node, Playground, until};
use hsm_api::admin::{JoinRequest, JoinTokenRequest, MemberRole, MembersResponse};
use hsm_api::client::Retry;
use serde_json::Value;

use crate::common::{CONTEXT, json, open, seal, seal_under};

/// A join, a start, an end, on a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(60);
/// hsmctl's exit code for what the state forbids.
const CONFLICT: Option<i32> = Some(4);
/// What `quorum_at_risk` says.
const AT_RISK: &str = "without breaking the quorum";

/// `hsmctl cluster VERB NODE …`, confirmed.
async fn leave(cluster: &Playground, verb: &str, node: &Node, more: &[&str]) -> Result<Output> {
    let id = node.id();
    let args = ["cluster", verb, &id, "--confirm", &id, "-o", "json"];
    cluster.hsmctl(&[&args[..], more].concat()).await
}

async fn removed(cluster: &Playground, node: &Node) -> Result<Value> {
    // A leader whose machine has just stood still has heard nobody for a second; nothing was changed then.
    let mut last = String::new();
    let asked = until("a removal", SOON, async || {
        match leave(cluster, "remove", node, &[]).await {
            Ok(refused) if refused.code == CONFLICT && refused.stderr.contains(AT_RISK) => {
                last = refused.stderr;
                None
            }
            asked => Some(asked),
        }
    })
    .await;
    let printed = asked.with_context(|| last.clone())?.and_then(Output::ok);
    let done = json(&printed.with_context(|| format!("remove {}", node.id()))?)?;
    ensure!(done["state"] == "removed", "{done}");
    Ok(done)
}

/// Asked for until it is done: a step of a hand-over has a second, and a machine may stand still for as long.
async fn transferred(cluster: &Playground, to: Option<&Node>) -> Result<Value> {
    let name = to.map(Node::id);
    let mut args = vec!["cluster", "transfer-leader"];
    args.extend(name.as_deref());
    args.extend(["-o", "json"]);
    let mut last = String::new();
    let done = until("a hand-over", SOON, async || {
        match cluster.hsmctl(&args).await.and_then(Output::ok) {
            Ok(printed) => Some(printed),
            Err(error) => {
                last = format!("{error:#}");
                None
            }
        }
    })
    .await;
    json(&done.with_context(|| last.clone())?)
}

/// Members as one of these nodes has them.
pub(crate) async fn members(cluster: &Playground, nodes: &[Node]) -> Result<MembersResponse> {
    let asked = nodes.first().context("nobody to ask")?;
    let client = cluster.client_on("admin", asked.number)?;
    Ok(client.members().await?.into_body())
}

/// Whether exactly these vote and nobody else belongs to the cluster, as the first of them has it; else what it has.
async fn are_voters(cluster: &Playground, nodes: &[Node]) -> Result<Result<(), String>> {
    let answer = members(cluster, nodes).await?;
    let mut voters: Vec<String> = answer
        .members
        .iter()
        .filter(|member| member.role == MemberRole::Voter)
        .map(|member| member.node_id.clone())
        .collect();
    voters.sort_unstable();
    let expected: Vec<String> = nodes.iter().map(Node::id).collect();
    let client = cluster.client_on("admin", nodes[0].number)?;
    let status = client.cluster_status().await?.into_body();
    let count = u32::try_from(nodes.len())?;
    let is_so = voters == expected
        && answer.members.len() == expected.len()
        && (status.voters, status.majority) == (count, count / 2 + 1);
    Ok(if is_so {
        Ok(())
    } else {
        Err(format!("{answer:?}, {status:?}"))
    })
}

/// A follower hears of what is committed with the next heartbeat.
pub(crate) async fn check_voters(cluster: &Playground, nodes: &[Node]) -> Result<()> {
    let mut last = String::new();
    let met = until("the voters", SOON, async || {
        match are_voters(cluster, nodes).await {
            Ok(Ok(())) => return Some(()),
            Ok(Err(seen)) => last = seen,
            Err(error) => last = format!("{error:#}"),
        }
        None
    })
    .await;
    met.with_context(|| last.clone())
}

/// A node that runs and belongs to no cluster joins the one of these.
pub(crate) async fn join(cluster: &Playground, members: &[Node], node: &Node) -> Result<u64> {
    let asked = members.first().context("nobody to ask")?;
    let admin = cluster
        .client_on("admin", asked.number)?
        .with_retry(Retry::Until(SOON));
    let request = JoinTokenRequest {
        ttl_seconds: Some(300),
        node_id: Some(node.id()),
    };
    let token = admin.create_join_token(&request).await?.into_body();
    let addresses = members
        .iter()
        .map(|member| format!("127.0.0.1:{}", member.cluster_port));
    let request = JoinRequest {
        token: token.token,
        cluster_ca_sha256: token.cluster_ca_sha256,
        leader_addresses: addresses.collect(),
    };
    let joining = cluster
        .client_on("admin", node.number)?
        .with_retry(Retry::Until(SOON));
    let joined = joining.join(&request).await.with_context(|| node.id())?;
    Ok(joined.into_body().raft_id)
}

/// It was told that it was removed, finished what it had begun, and never runs again with its directory.
pub(crate) async fn check_gone_for_good(cluster: &Playground, node: &Node) -> Result<()> {
    node.wait_gone(SOON).await?;
    let log = node.log();
    for said in [
        "this node was removed from its cluster",
        "draining connections",
        "ended for good",
    ] {
        ensure!(log.contains(said), "{}: it did not say {said:?}", node.id());
    }
    let before = log.len();
    let again = cluster.start_node(node.number).await;
    ensure!(again.is_err(), "{} runs again", node.id());
    let log = node.log();
    let said = log.get(before..).unwrap_or_default();
    ensure!(
        said.contains("it was removed from the cluster") && said.contains("empty directory"),
        "{}: {said}",
        node.id()
    );
    Ok(())
}

async fn unharmed(loads: Vec<Load>) -> Result<()> {
    for load in loads {
        let report = load.stop().await;
        ensure!(
            report.failed == 0,
            "{} failures: {:#?}",
            report.failed,
            report.failures
        );
        ensure!(report.decrypted > 20, "hardly any load: {report:?}");
    }
    Ok(())
}

pub(crate) async fn a_cluster_grows_to_five_and_shrinks_to_three_and_nobody_notices() -> Result<()> {
    let mut cluster = Playground::start(1).await?;
    let first = seal(&cluster.client("trading-1")?, CONTEXT, b"by one").await?;
    let mut loads = vec![Load::start(&cluster)?];
    for size in 2..=5 {
        cluster.add_node(true).await?;
        if size % 2 == 1 {
            check_voters(&cluster, &cluster.nodes()).await?;
            loads.push(Load::start(&cluster)?);
        }
    }
    // The leader itself, then another: a balancer has taken each out before.
    let mut left = cluster.nodes();
    let leader = cluster.leader().await?;
    let mut out = Vec::new();
    for number in [leader.node, if leader.node == 5 { 4 } else { 5 }] {
        let node = cluster.node(number);
        for load in &loads {
            load.pause(number).await;
        }
        let done = removed(&cluster, &node).await?;
        let rotated = done["rotated"].as_array().context("nothing was rotated")?;
        ensure!(
            rotated.iter().any(|one| one["context"] == CONTEXT) && done["to_rotate"] == serde_json::json!([]),
            "{done}"
        );
        ensure!(
            done["rekeyed"].as_array().is_some_and(|slots| !slots.is_empty()),
            "the transport keys that it knows were not replaced: {done}"
        );
        left.retain(|other| other.number != number);
        out.push(node);
    }
    check_voters(&cluster, &left).await?;
    let next = cluster.leader_among(&left).await?;
    ensure!(next.term > leader.term && next.node != leader.node, "{next:?}");
    until("two tombstones that hold nothing", SOON, async || {
        let answer = members(&cluster, &left).await.ok()?;
        let rotated = answer.removed.iter().all(|one| one.held.is_empty());
        (answer.removed.len() == 2 && rotated).then_some(())
    })
    .await?;
    unharmed(loads).await?;
    for node in &left {
        open(&cluster.client_on("trading-1", node.number)?, CONTEXT, &first).await?;
    }
    for node in &out {
        check_gone_for_good(&cluster, node).await?;
    }
    // Refusals: somebody who has gone, somebody who never was, and whoever is needed.
    let gone = leave(&cluster, "remove", &out[0], &[]).await?;
    ensure!(
        gone.code == CONFLICT && gone.stderr.contains("removed already"),
        "{gone:?}"
    );
    let nobody = cluster
        .hsmctl(&["cluster", "remove", "nobody", "--confirm", "nobody"])
        .await?;
    ensure!(
        nobody.code == CONFLICT && nobody.stderr.contains("nobody"),
        "{nobody:?}"
    );
    let (dead, needed) = {
        let mut followers = left.iter().filter(|node| node.number != next.node).cloned();
        (
            followers.next().context("no follower")?,
            followers.next().context("one follower")?,
        )
    };
    dead.kill().await?;
    // Until the leader has missed it.
    until("a refusal", SOON, async || {
        let refused = leave(&cluster, "remove", &needed, &["--dry-run"]).await.ok()?;
        (refused.code == CONFLICT && refused.stderr.contains("of 2 voters that would be left 1 answer"))
            .then_some(())
    })
    .await?;
    let refused = leave(&cluster, "remove", &needed, &[]).await?;
    ensure!(
        refused.code == CONFLICT && refused.stderr.contains(AT_RISK),
        "{refused:?}"
    );
    let still = members(&cluster, &[cluster.node(next.node)]).await?.members;
    ensure!(
        still.len() == 3 && still.iter().all(|member| member.leaving.is_none()),
        "{still:?}"
    );
    // The dead one may go, finds out when it comes back, and its name joins again with an empty directory only.
    removed(&cluster, &dead).await?;
    left.retain(|node| node.number != dead.number);
    check_voters(&cluster, &left).await?;
    // Whether it still listens when it is looked at is a matter of moments.
    let _ = cluster.start_node(dead.number).await;
    check_gone_for_good(&cluster, &dead).await?;
    let before = members(&cluster, &left).await?;
    let tombstone = before.removed.iter().find(|one| one.node_id == dead.id());
    let old_id = tombstone.context("no tombstone")?.raft_id;
    std::fs::remove_dir_all(dead.dir.join("data"))?;
    cluster.start_node(dead.number).await?;
    let new_id = join(&cluster, &left, &dead).await?;
    ensure!(new_id > old_id, "raft id {new_id} after {old_id}");
    dead.wait_ready(SOON).await?;
    open(&cluster.client_on("trading-1", dead.number)?, CONTEXT, &first).await?;
    cluster.passed();
    Ok(())
}

/// A new node joins in the place of this one, in one change. Whether the one that left led until then, and handed over first.
async fn replaced(cluster: &Playground, left: &mut Vec<Node>, old: &Node, key: &str) -> Result<bool> {
    let new = cluster.prepare_node().await?;
    cluster.start_node(new.number).await?;
    let id = new.id();
    let asked = ["--with", &id, "--idempotency-key", key];
    let said: Vec<usize> = left.iter().map(|node| node.log().len()).collect();
    leave(cluster, "replace", old, &asked).await?.ok()?;
    join(cluster, left, &new).await?;
    new.wait_ready(SOON).await?;
    // Whoever has only just been elected may have heard nobody.
    let again = until("the answer to the same request", SOON, async || {
        let answer = leave(cluster, "replace", old, &asked).await;
        let too_early = |output: &Output| output.code == CONFLICT && output.stderr.contains(AT_RISK);
        (!answer.as_ref().is_ok_and(too_early)).then_some(answer)
    });
    let done = json(&again.await??.ok()?)?;
    ensure!(
        done["state"] == "removed" && done["rotated"].as_array().is_some_and(|all| !all.is_empty()),
        "{done}"
    );
    // Of whoever led then; the new node's log begins later.
    let (mut log, mut of_old) = (new.log(), String::new());
    for (node, begins) in left.iter().zip(said) {
        let all = node.log();
        let since = all.get(begins..).unwrap_or_default();
        log.push_str(since);
        if node.number == old.number {
            of_old.push_str(since);
        }
    }
    left.retain(|node| node.number != old.number);
    left.push(new);
    check_voters(cluster, left).await?;
    ensure!(
        log.contains("Swap {") && !log.contains("Promote("),
        "{} was not replaced in one change",
        old.id()
    );
    ensure!(
        !of_old.contains("Swap {"),
        "{} took itself out instead of having another one lead first",
        old.id()
    );
    check_gone_for_good(cluster, old).await?;
    Ok(of_old.contains("HandOver("))
}

pub(crate) async fn leadership_moves_and_a_node_is_replaced_in_one_change() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let load = Load::start(&cluster)?;
    let before = cluster.leader().await?;
    let next = cluster
        .others(before.node)
        .into_iter()
        .next()
        .context("nobody else")?;
    // Leadership, to a name; nobody stops.
    let moved = transferred(&cluster, Some(&next)).await?;
    ensure!(moved["leader"] == next.id(), "{moved}");
    let leads = cluster.leader().await?;
    ensure!(leads.node == next.number && leads.term > before.term, "{leads:?}");
    cluster
        .client_on("admin", before.node)?
        .with_retry(Retry::Until(SOON))
        .rotate(CONTEXT, None)
        .await?;
    let unknown = cluster.hsmctl(&["cluster", "transfer-leader", "nobody"]).await?;
    ensure!(
        unknown.code == CONFLICT && unknown.stderr.contains("nobody"),
        "{unknown:?}"
    );
    // To the best: whoever it is, it was not leading.
    let led = cluster.leader().await?;
    let moved = transferred(&cluster, None).await?;
    let leader = cluster.leader().await?;
    ensure!(
        moved["leader"] != moved["before"] && leader.term > led.term,
        "{moved}, {leader:?} after {led:?}"
    );

    // The leader itself is to be replaced.
    let old = cluster.node(leader.node);
    load.pause(old.number).await;
    let new = "hsm-node-4";
    let asked = ["--with", new, "--idempotency-key", "swap"];
    let waiting = json(&leave(&cluster, "replace", &old, &asked).await?.ok()?)?;
    ensure!(
        waiting["state"] == "waiting" && waiting["successor"] == new,
        "{waiting}"
    );
    check_voters(&cluster, &cluster.nodes()).await?;
    // One at a time, and it can be taken back.
    let other = cluster
        .others(old.number)
        .into_iter()
        .next()
        .context("nobody else")?;
    let refused = leave(&cluster, "remove", &other, &[]).await?;
    ensure!(
        refused.code == CONFLICT && refused.stderr.contains("is leaving, and that comes first"),
        "{refused:?}"
    );
    let id = old.id();
    cluster
        .hsmctl(&["cluster", "remove", &id, "--cancel"])
        .await?
        .ok()?;
    // One that was overtaken while the new node joined was replaced as a follower: then the next leader is, by one more node.
    let mut left = cluster.nodes();
    let mut keys = ["swap-2", "swap-3", "swap-4"].into_iter();
    loop {
        let key = keys.next().context("no leader leads until it is replaced")?;
        let leads = cluster.leader_among(&left).await?;
        let old = cluster.node(leads.node);
        load.pause(old.number).await;
        if replaced(&cluster, &mut left, &old, key).await? {
            break;
        }
    }
    let newest = cluster
        .client_on("admin", left[0].number)?
        .with_retry(Retry::Until(SOON))
        .rotate(CONTEXT, None)
        .await?
        .version;
    for node in &left {
        let client = cluster.client_on("trading-1", node.number)?;
        seal_under(&client, CONTEXT, b"without it", newest).await?;
    }
    unharmed(vec![load]).await?;
    cluster.passed();
    Ok(())
}
