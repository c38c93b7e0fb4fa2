//! Leaders that die inside a change of the membership, whoever leaves by it: the next one finishes it, and nothing is done by
//! hand.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use cluster_tests::failpoints::{IMPORTS, arm, kill_leader_at};
use cluster_tests::{Node, Playground, Stalls, until};
use hsm_api::admin::{MemberRole, RemovalState, RemoveNodeRequest, RemoveNodeResponse};
use hsm_api::client::{Answer, Retry};
use hsm_api::{Client, ClientError, ErrorCode};

use crate::common::{CONTEXT, open, seal};
use crate::members::{SOON, check_gone_for_good, check_voters, join, members};

/// The steps, in the order in which a leader passes them. The first two are on its own disk at most.
const POINTS: [&str; 9] = [
    "store::joint_proposed",
    "store::joint_applied",
    "store::uniform_proposed",
    "membership::before_bury",
    "membership::before_change",
    "store::uniform_applied",
    "membership::after_change",
    IN_NOTICE,
    "membership::after_bury",
];

/// Whoever leaves votes no more, and is sent the log until balancers know that.
const IN_NOTICE: &str = "membership::in_notice";

/// Where a leader dies that leaves itself: it hands over, and somebody else stands in its place.
const HANDS_OVER: [&str; 2] = ["store::before_vote", "store::after_vote"];

/// Which of them are tried; by the time of day unless this variable says it.
const SEED: &str = "HSM_MEMBERSHIP_SEED";

/// Longer than that, and heartbeats are missed, whoever leads.
const STOOD_STILL: Duration = Duration::from_millis(400);

/// Entries that a learner may lack which has come to the log's end.
const LAG: u64 = 5;

/// Who leaves.
#[derive(Clone, Copy, Debug)]
enum Who {
    Follower,
    /// A follower, for a sixth node that joins, in one change.
    Replaced,
    Leader,
}

/// Somebody leaves, and the leader dies at this point.
type Round = (Who, &'static str);

/// One of each kind, at points of which each is as likely as the others, and one in which the next leader finds a learner that
/// leaves.
fn drawn(mut seed: usize) -> [[Round; 2]; 2] {
    let mut points = POINTS.to_vec();
    let mut draw = || {
        let many = points.len();
        let point = points.remove(seed % many);
        seed /= many;
        point
    };
    let (replaced, first) = (draw(), draw());
    let hands_over = HANDS_OVER[seed % HANDS_OVER.len()];
    [
        [(Who::Replaced, replaced), (Who::Follower, first)],
        [(Who::Leader, hands_over), (Who::Follower, IN_NOTICE)],
    ]
}

fn seed() -> Result<usize> {
    match std::env::var(SEED) {
        Ok(text) => text.parse().context(SEED),
        Err(_) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
            Ok(usize::try_from(now.as_secs())?)
        }
    }
}

/// A leader that had its failpoint did not come to it: another one was elected meanwhile, and nothing was shown.
#[derive(Debug)]
struct NotReached;

impl std::fmt::Display for NotReached {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("not reached")
    }
}

/// Those rounds, and once more on another cluster if a leader was overtaken while the machine stood still.
async fn shown(rounds: [Round; 2], stalls: &Stalls) -> Result<()> {
    let began = Instant::now();
    match of_five(rounds).await {
        Err(error)
            if error.downcast_ref::<NotReached>().is_some()
                && stalls.between(began, Instant::now()) > STOOD_STILL =>
        {
            println!("once more: {error:#}");
            of_five(rounds).await
        }
        ended => ended,
    }
}

/// A cluster of five bears two that leave, one after the other.
async fn of_five(rounds: [Round; 2]) -> Result<()> {
    let mut cluster = Playground::start(5).await?;
    let first = seal(&cluster.client("trading-1")?, CONTEXT, b"by five").await?;
    let mut left = cluster.nodes();
    for (who, point) in rounds {
        let begun = Instant::now();
        let done = round(&mut cluster, &mut left, who, point).await;
        done.with_context(|| format!("{who:?}, {point}"))?;
        println!("{who:?}, {point}: {:.1?}", begun.elapsed());
    }
    for node in &left {
        open(&cluster.client_on("trading-1", node.number)?, CONTEXT, &first).await?;
    }
    cluster.passed();
    Ok(())
}

/// Who has died, and who leaves.
struct Killed {
    doomed: Node,
    leaves: Node,
}

async fn round(cluster: &mut Playground, left: &mut Vec<Node>, who: Who, point: &'static str) -> Result<()> {
    let Killed { doomed, leaves } = match who {
        Who::Follower | Who::Leader => removed(cluster, left, who, point).await?,
        Who::Replaced => replaced(cluster, left, point).await?,
    };
    let cluster: &Playground = cluster;
    left.retain(|node| node.number != leaves.number);
    let survivors = without(left, doomed.number);
    // Nobody does anything about it.
    until("its end", SOON, async || {
        let answer = members(cluster, &survivors).await.ok()?;
        let mut gone = answer.removed.iter();
        gone.any(|one| one.node_id == leaves.id()).then_some(())
    })
    .await?;
    if doomed.number == leaves.number {
        // Whether it still listens when it is looked at is a matter of moments.
        let _ = cluster.start_node(doomed.number).await;
        check_gone_for_good(cluster, &doomed).await?;
    } else {
        leaves.wait_gone(SOON).await.context("it was not told")?;
        cluster.start_node(doomed.number).await?;
        doomed.wait_ready(SOON).await?;
    }
    check_voters(cluster, left).await?;
    let asked = survivors.first().context("nobody is left")?;
    cluster
        .client_on("admin", asked.number)?
        .with_retry(Retry::Until(SOON))
        .rotate(CONTEXT, None)
        .await?;
    Ok(())
}

fn without(nodes: &[Node], number: u32) -> Vec<Node> {
    let others = nodes.iter().filter(|node| node.number != number);
    others.cloned().collect()
}

/// Asked for again only while the leader has not heard enough of the others, which a machine that stands still does to it;
/// nothing was changed then.
async fn ask(
    client: Client,
    node: String,
    request: RemoveNodeRequest,
    key: String,
) -> Result<Answer<RemoveNodeResponse>, ClientError> {
    let deadline = Instant::now() + SOON;
    loop {
        let answer = client.remove_node(&node, &request, Some(&key)).await;
        let code = answer.as_ref().err().and_then(ClientError::code);
        if code != Some(ErrorCode::QuorumAtRisk) || Instant::now() > deadline {
            return answer;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Its own for each round: the same point is tried more than once.
fn key(leaves: &Node, point: &str) -> String {
    format!("{} leaves {point}", leaves.id()).replace([':', ' '], "-")
}

/// A follower leaves, or the leader itself.
async fn removed(cluster: &Playground, left: &[Node], who: Who, point: &'static str) -> Result<Killed> {
    let leader = kill_leader_at(cluster, left, point).await?;
    let doomed = cluster.node(leader.node);
    let others = without(left, leader.node);
    let asked = others.first().context("nobody")?;
    let leaves = match who {
        Who::Leader => doomed.clone(),
        _ => others.last().context("nobody")?.clone(),
    };
    // One attempt: the node that is asked goes on by itself, until its time is up.
    let client = cluster.client_on("admin", asked.number)?;
    let removing = tokio::spawn(ask(
        client,
        leaves.id(),
        RemoveNodeRequest::default(),
        key(&leaves, point),
    ));
    doomed.wait_gone(SOON).await.context(NotReached)?;
    let answer = removing.await?;
    ensure!(
        answer.is_ok() || answer.as_ref().is_err_and(ClientError::outcome_unknown),
        "{answer:?}"
    );
    Ok(Killed { doomed, leaves })
}

/// A sixth node takes a follower's place. It is held where it has to import the keys until the leader has its failpoint: to
/// make it a learner is a change of the membership too.
async fn replaced(cluster: &mut Playground, left: &mut Vec<Node>, point: &'static str) -> Result<Killed> {
    let new = cluster.add_node(false).await?;
    let cluster: &Playground = cluster;
    let before: &[Node] = left;
    let leads = cluster.leader_among(before).await?;
    let others = without(before, leads.node);
    let leaves = others.last().context("nobody")?.clone();
    let asked = others.first().context("nobody")?.number;
    let request = RemoveNodeRequest {
        successor: Some(new.id()),
        ..RemoveNodeRequest::default()
    };
    let client = cluster.client_on("admin", asked)?.with_retry(Retry::Until(SOON));
    let waiting = ask(client, leaves.id(), request, key(&leaves, point))
        .await?
        .into_body();
    ensure!(waiting.state == RemovalState::Waiting, "{waiting:?}");

    let said: Vec<usize> = before.iter().map(|node| node.log().len()).collect();
    arm(&new, IMPORTS, "pause").await?;
    let killing = async {
        until("a learner that has the log", SOON, async || {
            let leader = cluster.leader_among(before).await.ok()?;
            let all = members(cluster, &[cluster.node(leader.node)]).await.ok()?;
            let learner = all.members.into_iter().find(|one| one.node_id == new.id())?;
            (learner.role == MemberRole::Learner && learner.lag? <= LAG).then_some(())
        })
        .await?;
        let leader = kill_leader_at(cluster, before, point).await?;
        arm(&new, IMPORTS, "off").await?;
        let doomed = cluster.node(leader.node);
        doomed.wait_gone(SOON).await.context(NotReached)?;
        anyhow::Ok(doomed)
    };
    // Whoever asked the new node may be told that the leader has gone; it joins all the same.
    let (joined, doomed) = tokio::join!(join(cluster, before, &new), killing);
    let doomed = doomed?;
    let ready = new.wait_ready(SOON).await;
    ready.with_context(|| format!("its join: {joined:?}"))?;
    let promoted = before.iter().zip(said).any(|(node, begins)| {
        let log = node.log();
        log.get(begins..).unwrap_or_default().contains("Promote(")
    });
    ensure!(!promoted, "{} was not replaced in one change", leaves.id());
    left.push(new);
    Ok(Killed { doomed, leaves })
}

pub(crate) async fn a_leader_that_dies_inside_a_joint_change_leaves_nothing_to_do() -> Result<()> {
    let seed = seed()?;
    // Said of a run that has passed too: what was tried differs from run to run.
    println!("{SEED}={seed}");
    let stalls = Stalls::watch()?;
    for rounds in drawn(seed) {
        let done = shown(rounds, &stalls).await;
        done.with_context(|| format!("{SEED}={seed}"))?;
    }
    Ok(())
}

/// What `make membership` runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes some minutes: make membership"]
async fn leaders_die_at_every_step_of_every_way_to_leave() -> Result<()> {
    let stalls = Stalls::watch()?;
    for point in POINTS {
        shown([(Who::Replaced, point), (Who::Follower, point)], &stalls).await?;
    }
    shown(HANDS_OVER.map(|point| (Who::Leader, point)), &stalls).await
}

#[test]
fn every_step_is_drawn_by_some_seed_for_each_way_to_leave() {
    let all: Vec<Round> = (0..2 * 9 * 8).flat_map(drawn).flatten().collect();
    let has = |point: &str, is: fn(Who) -> bool| all.iter().any(|(who, at)| is(*who) && *at == point);
    for point in POINTS {
        assert!(has(point, |who| matches!(who, Who::Follower)), "{point}");
        assert!(has(point, |who| matches!(who, Who::Replaced)), "{point}");
    }
    for point in HANDS_OVER {
        assert!(has(point, |who| matches!(who, Who::Leader)), "{point}");
    }
}
