//! Rotations whose leader is killed at each of their steps: one version at most, finished or given up in time,
//! and nobody on the survivors notices.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::failpoints::{PREPARED, ROTATION, kill_leader_at};
use cluster_tests::lanes::lanes;
use cluster_tests::{Leader, Load, Node, Playground, Stalls, scenario, until};
use hsm_api::admin::{ContextInfo, JoinTokenRequest, KeyState};
use hsm_api::client::Retry;

use crate::common::{
    CONTEXT, Sealed, check_settled, context_on, in_state, made, open, open_everywhere, seal, seal_under,
    settled_everywhere, settled_on,
};

/// From the request to the point.
const REACHED: Duration = Duration::from_secs(60);
/// Finished or abandoned, once the leader is dead.
const SETTLED: Duration = Duration::from_secs(15);
/// The follower that was asked, its client's one attempt included.
const ANSWERED: Duration = Duration::from_secs(15);
/// The last point: the leader may answer before it dies.
const ACTIVATED: &str = "rotation::after_activate_commit";

/// A leader that dies as soon as it reaches a point of a rotation.
struct Doomed<'a> {
    cluster: &'a Playground,
    load: &'a Load,
    point: &'static str,
    leader: Leader,
    others: Vec<Node>,
    /// The context, as a survivor had it before.
    before: ContextInfo,
    /// Time in which nobody could do anything counts for nobody.
    stalls: Stalls,
}

impl<'a> Doomed<'a> {
    async fn at(cluster: &'a Playground, load: &'a Load, point: &'static str) -> Result<Self> {
        // Of one that is overtaken before anybody asks it nothing dies.
        let leader = kill_leader_at(cluster, &cluster.nodes(), point).await?;
        let others = cluster.others(leader.node);
        let before = context_on(cluster, others[0].number, CONTEXT).await?;
        // What was sent to the leader itself may fail with it; nothing else may.
        load.pause(leader.node).await;
        Ok(Self {
            cluster,
            load,
            point,
            leader,
            others,
            before,
            stalls: Stalls::watch()?,
        })
    }

    /// Until it is dead and another node leads; when it died, and who leads.
    async fn dies(&self) -> Result<(Instant, Leader)> {
        self.cluster
            .node(self.leader.node)
            .wait_gone(REACHED)
            .await
            .with_context(|| format!("{} not reached", self.point))?;
        let killed = Instant::now();
        let next = self.cluster.leader_among(&self.others).await?;
        ensure!(
            next.term > self.leader.term,
            "{}: {next:?} after {:?}",
            self.point,
            self.leader
        );
        Ok((killed, next))
    }

    /// It comes back; then all nodes agree, everything acknowledged before the kill, without it and since opens on all
    /// of them, and nobody has noticed anything.
    async fn comes_back(&self, acknowledged: &mut Vec<Sealed>) -> Result<()> {
        for node in &self.others {
            let client = self.cluster.client_on("trading-1", node.number)?;
            acknowledged.push(seal(&client, CONTEXT, self.point.as_bytes()).await?);
        }
        let back = self.cluster.node(self.leader.node);
        self.cluster.start_node(back.number).await?;
        self.cluster.wait_ready(std::slice::from_ref(&back)).await?;
        // What is ready serves, at the first attempt: what others have made without it, too.
        let client = self.cluster.client_on("trading-1", back.number)?;
        let first = seal(&client, CONTEXT, self.point.as_bytes()).await;
        let newest = acknowledged.last().context("nothing was sealed without it")?;
        open(&client, CONTEXT, newest)
            .await
            .with_context(|| format!("version {} on {}, just ready", newest.version, back.id()))?;
        acknowledged.push(first.with_context(|| format!("{}, just ready", back.id()))?);
        self.cluster.wait_ready(&self.cluster.nodes()).await?;
        let active = check_settled(&settled_everywhere(self.cluster, CONTEXT).await?)?;
        for node in self.cluster.nodes() {
            let client = self.cluster.client_on("trading-1", node.number)?;
            let sealed = seal_under(&client, CONTEXT, self.point.as_bytes(), active).await;
            acknowledged.push(sealed.with_context(|| node.id())?);
        }
        open_everywhere(self.cluster, "trading-1", CONTEXT, acknowledged).await?;
        self.load.resume(self.leader.node).await;
        let so_far = self.load.so_far();
        ensure!(so_far.failed == 0, "{:#?}", so_far.failures);
        Ok(())
    }
}

/// One ciphertext of every node.
async fn seal_everywhere(cluster: &Playground, acknowledged: &mut Vec<Sealed>) -> Result<()> {
    for node in cluster.nodes() {
        let client = cluster.client_on("trading-1", node.number)?;
        acknowledged.push(seal(&client, CONTEXT, b"before all kills").await?);
    }
    Ok(())
}

async fn nobody_noticed(load: Load) -> Result<()> {
    let report = load.stop().await;
    ensure!(
        report.failed == 0,
        "{} failures: {:#?}",
        report.failed,
        report.failures
    );
    ensure!(report.decrypted > 100, "hardly any load: {report:?}");
    Ok(())
}

/// A round at every point, a third of them on a cluster of their own each: most of a round is an election.
async fn at_every_point(
    round: impl AsyncFn(&Playground, &Load, &'static str, &mut Vec<Sealed>) -> Result<()>,
) -> Result<()> {
    let (stalls, began) = (Stalls::watch()?, Instant::now());
    let rounds = async |points: &'static [&'static str]| -> Result<()> {
        let cluster = Playground::start(3).await?;
        let load = Load::start(&cluster)?;
        let mut acknowledged = Vec::new();
        seal_everywhere(&cluster, &mut acknowledged).await?;
        for point in points {
            round(&cluster, &load, point, &mut acknowledged)
                .await
                .with_context(|| (*point).to_owned())?;
        }
        nobody_noticed(load).await?;
        cluster.passed();
        Ok(())
    };
    let points: &'static [&'static str] = &ROTATION;
    let (early, rest) = points.split_at(points.len() / 3);
    let (middle, late) = rest.split_at(rest.len() / 2);
    tokio::try_join!(rounds(early), rounds(middle), rounds(late))?;
    let stood_still = stalls.few_since(began)?;
    println!(
        "{} rounds; the machine stood still for {stood_still:?}",
        points.len()
    );
    // Nothing is deducted here but from bounds of many seconds.
    if let Err(error) = stalls.fewer_since(began) {
        println!("{error:#}");
    }
    Ok(())
}

#[test]
fn a_leader_that_dies_in_a_rotation_leaves_one_version_or_none() -> Result<()> {
    lanes([
        vec![scenario!(
            a_rotate_makes_one_version_wherever_the_leader_dies_however_often_it_is_sent
        )],
        vec![scenario!(a_rotation_that_nobody_repeats_is_finished_or_given_up)],
    ])
}

/// Sent once to a follower, which goes on by itself; then repeated by a client that has not heard the answer.
async fn a_rotate_makes_one_version_wherever_the_leader_dies_however_often_it_is_sent() -> Result<()> {
    at_every_point(sent_once_and_repeated).await
}

async fn sent_once_and_repeated(
    cluster: &Playground,
    load: &Load,
    point: &'static str,
    acknowledged: &mut Vec<Sealed>,
) -> Result<()> {
    let doomed = Doomed::at(cluster, load, point).await?;
    let client = cluster.client_on("admin", doomed.others[0].number)?;
    let begun = Instant::now();
    let rotate = tokio::spawn(async move { client.rotate(CONTEXT, Some(point)).await });
    let (killed, next) = doomed.dies().await?;
    let answer = rotate
        .await?
        .with_context(|| format!("{point}: sent once to a follower"))?;
    let answered = doomed.stalls.running_since(begun);
    ensure!(answered < ANSWERED, "{point}: answered after {answered:?}");
    let info = settled_on(cluster, next.node, CONTEXT, answer.version)
        .await
        .with_context(|| point.to_owned())?;
    let (took, clock) = (doomed.stalls.running_since(killed), killed.elapsed());
    println!(
        "{point}: version {} after {took:?}, by the clock {clock:?}",
        answer.version
    );
    ensure!(took <= SETTLED, "{point}: settled {took:?} after the kill");
    ensure!(
        made(&info) == made(&doomed.before) + 1,
        "{point}: not one version: {info:?} after {:?}",
        doomed.before
    );
    // Whoever is asked again, under the same key, knows the same answer.
    for node in &doomed.others {
        let client = cluster.client_on("admin", node.number)?;
        let again = client
            .rotate(CONTEXT, Some(point))
            .await
            .with_context(|| format!("{point}: repeated on {}", node.id()))?;
        ensure!(
            again.version == answer.version,
            "{point}: repeated on {}: version {} after {}",
            node.id(),
            again.version,
            answer.version
        );
    }
    doomed.comes_back(acknowledged).await
}

/// The leader is asked itself, and nobody asks again: what it had begun is another leader's to end.
async fn a_rotation_that_nobody_repeats_is_finished_or_given_up() -> Result<()> {
    at_every_point(sent_once_to_the_leader).await
}

async fn sent_once_to_the_leader(
    cluster: &Playground,
    load: &Load,
    point: &'static str,
    acknowledged: &mut Vec<Sealed>,
) -> Result<()> {
    // Before it was proposed nobody knows of it; from then on it has a number, for good.
    let prepared = ROTATION
        .iter()
        .skip_while(|step| **step != PREPARED)
        .any(|step| *step == point);
    let doomed = Doomed::at(cluster, load, point).await?;
    let client = cluster.client_on("admin", doomed.leader.node)?;
    let rotate = tokio::spawn(async move { client.rotate(CONTEXT, None).await });
    let (killed, next) = doomed.dies().await?;
    let answer = rotate.await?;
    ensure!(
        answer.is_err() || point == ACTIVATED,
        "{point}: answered with {answer:?}"
    );
    // Once the new leader has done something itself, it knows everything that was committed before.
    let request = JoinTokenRequest {
        ttl_seconds: Some(60),
        node_id: None,
    };
    cluster
        .client_on("admin", next.node)?
        .with_retry(Retry::Until(REACHED))
        .create_join_token(&request)
        .await
        .with_context(|| format!("{point}: a change under {next:?}"))?;
    let info = until("no pending version", 2 * SETTLED, async || {
        let info = context_on(cluster, next.node, CONTEXT).await.ok()?;
        in_state(&info, KeyState::Pending).is_empty().then_some(info)
    })
    .await
    .with_context(|| point.to_owned())?;
    let (took, clock) = (doomed.stalls.running_since(killed), killed.elapsed());
    let active = check_settled(&info).with_context(|| point.to_owned())?;
    println!("{point}: version {active} after {took:?}, by the clock {clock:?}");
    ensure!(took <= SETTLED, "{point}: settled {took:?} after the kill");
    let grown = info.versions.len() - doomed.before.versions.len();
    ensure!(
        grown == usize::from(prepared),
        "{point}: {grown} versions more: {info:?}"
    );
    if let Ok(answer) = answer {
        ensure!(
            active == answer.version,
            "{point}: version {} was acknowledged, {active} is active",
            answer.version
        );
    }
    doomed.comes_back(acknowledged).await
}
