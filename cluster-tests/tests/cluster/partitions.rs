//! Cut links: an isolated leader changes nothing and serves what it may for as long as it may, whoever hears no
//! quorum leaves readiness within its bound, nobody becomes ready alone, and whoever comes back is ready only with
//! what it missed.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::failpoints::{IMPORTS, arm};
use cluster_tests::{Node, Playground, until};
use hsm_api::admin::{ListKeksResponse, MemberRole, NodeRole};
use hsm_api::client::Retry;
use hsm_api::data::{Batch, DecryptRequest, EncryptRequest, ItemResult};
use hsm_api::{Client, ClientError, ErrorCode};

use crate::common::{
    CONTEXT, Sealed, check_settled, context_on, formed_with, open, open_everywhere, seal, seal_under,
    versions,
};

/// `staleness.ready_ms`, and what noticing may add on a busy machine.
const STALE_WITHIN: Duration = Duration::from_millis(5000 + 2500);
/// The first of these alone.
const READY: Duration = Duration::from_secs(5);
/// `cluster.raft.election_max_ms`, and the same: a leader that hears nobody appends nothing from then on.
const NO_QUORUM_AFTER: Duration = Duration::from_millis(1200 + 2000);
/// What the isolated leader of a test is given as `staleness.encrypt_ms` and `staleness.decrypt_ms`.
const ENCRYPT_BOUND: Duration = Duration::from_secs(20);
const DECRYPT_BOUND: Duration = Duration::from_secs(40);
/// The same, of the nodes of a minority.
const SHORT_ENCRYPT_BOUND: Duration = Duration::from_secs(8);
const SHORT_DECRYPT_BOUND: Duration = Duration::from_secs(13);
/// Around a bound: frames that were on their way, and what a busy machine takes to handle them.
const AROUND: Duration = Duration::from_secs(2);
/// Until a node has heard of something, or has come as far as it can.
pub(crate) const FOLLOWS: Duration = Duration::from_secs(60);
/// How long it stays alone.
const ALONE: Duration = Duration::from_secs(60);

async fn last_log(node: &Node) -> Result<f64> {
    node.metrics()
        .await?
        .sum("hsm_raft_last_log_index")
        .context("no last log index")
}

/// What an isolated node said at one moment, counted from its last word of a quorum.
#[derive(Debug)]
struct Sample {
    asked: Duration,
    answered: Duration,
    ready: u16,
    ready_if_stale: u16,
    last_log: f64,
    encrypt: Result<(), Option<ErrorCode>>,
    decrypt: Result<(), Option<ErrorCode>>,
    /// Whether the answer to encrypt was marked; `None`: it was refused.
    marked: Option<bool>,
}

pub(crate) fn code_of(outcome: Result<(), anyhow::Error>) -> Result<(), Option<ErrorCode>> {
    outcome.map_err(|error| error.downcast_ref::<ClientError>().and_then(ClientError::code))
}

impl Sample {
    async fn take(node: &Node, client: &Client, sealed: &Sealed, cut: Instant) -> Result<Self> {
        let asked = cut.elapsed();
        let health = node.patient();
        let encrypted = client.encrypt(&EncryptRequest::new(CONTEXT, b"alone")).await;
        let sample = Self {
            asked,
            marked: encrypted.as_ref().ok().map(|answer| answer.meta.stale),
            ready: health.get("/readyz").await?.status,
            ready_if_stale: health.get("/readyz?stale=ok").await?.status,
            last_log: last_log(node).await?,
            encrypt: encrypted.map(drop).map_err(|error| error.code()),
            decrypt: code_of(open(client, CONTEXT, sealed).await),
            answered: Duration::ZERO,
        };
        Ok(Self {
            answered: cut.elapsed(),
            ..sample
        })
    }

    /// An operation succeeds until its bound, and is refused as stale after it.
    fn check_bound(
        &self,
        what: &str,
        outcome: &Result<(), Option<ErrorCode>>,
        bound: Duration,
    ) -> Result<()> {
        if self.answered < bound - AROUND {
            ensure!(outcome.is_ok(), "{what} before {bound:?}: {self:?}");
        } else if self.asked > bound + AROUND {
            ensure!(
                *outcome == Err(Some(ErrorCode::Stale)),
                "{what} after {bound:?}: {self:?}"
            );
        }
        Ok(())
    }

    fn check(&self, encrypt_bound: Duration, decrypt_bound: Duration) -> Result<()> {
        self.check_bound("encrypt", &self.encrypt, encrypt_bound)?;
        self.check_bound("decrypt", &self.decrypt, decrypt_bound)?;
        if self.asked > STALE_WITHIN {
            ensure!(self.ready == 503, "ready for fresh requests: {self:?}");
            ensure!(self.marked != Some(false), "not marked: {self:?}");
        } else if self.answered < READY - AROUND {
            ensure!(self.marked == Some(false), "marked while fresh: {self:?}");
        }
        if self.answered < decrypt_bound - AROUND {
            ensure!(
                self.ready_if_stale == 200,
                "not ready for stale requests: {self:?}"
            );
        } else if self.asked > decrypt_bound + AROUND {
            ensure!(self.ready_if_stale == 503, "ready for stale requests: {self:?}");
        }
        Ok(())
    }
}

/// Samples of a node, until one that is asked for so long after its last word of a quorum.
async fn watch(
    node: Node,
    client: Client,
    sealed: Sealed,
    cut: Instant,
    long: Duration,
) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    loop {
        let sample = Sample::take(&node, &client, &sealed, cut).await?;
        let last = sample.asked >= long;
        samples.push(sample);
        if last {
            return Ok(samples);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Samples that were asked for and answered in a time.
fn within(samples: &[Sample], from: Duration, to: Duration) -> usize {
    let there = |sample: &&Sample| sample.asked > from && sample.answered < to;
    samples.iter().filter(there).count()
}

/// A configuration with these as `staleness.encrypt_ms` and `staleness.decrypt_ms`.
fn with_bounds(config: &str, encrypt: Duration, decrypt: Duration) -> String {
    format!(
        "{config}staleness: {{encrypt_ms: {}, decrypt_ms: {}}}\n",
        encrypt.as_millis(),
        decrypt.as_millis()
    )
}

/// Rotates on one node again and again; gives each call's start and how it failed.
async fn rotate_in_vain(client: Client, cut: Instant) -> Result<Vec<(Duration, ClientError)>> {
    let mut refusals = Vec::new();
    while cut.elapsed() < ALONE {
        let asked = cut.elapsed();
        match client.rotate(CONTEXT, None).await {
            Ok(answer) => anyhow::bail!("an isolated leader activated version {}", answer.version),
            Err(error) => refusals.push((asked, error)),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(refusals)
}

/// A node's applied index, keys and members.
type Known = (u64, ListKeksResponse, Vec<(u64, String, MemberRole)>);

async fn known(cluster: &Playground) -> Result<Vec<Known>> {
    let mut all = Vec::new();
    for node in cluster.nodes() {
        let client = cluster.client_on("admin", node.number)?;
        let members = client.members().await?.into_body().members;
        let members = members
            .into_iter()
            .map(|member| (member.raft_id, member.node_id, member.role))
            .collect();
        let keys = client.list_keks().await?.into_body();
        let status = client.cluster_status().await?;
        ensure!(
            status.last_log_index == status.applied_index,
            "{} still applies",
            node.id()
        );
        all.push((status.applied_index, keys, members));
    }
    Ok(all)
}

/// Until all nodes have applied the same, and know the same.
async fn wait_agreed(cluster: &Playground) -> Result<()> {
    let agreed = until("nodes that agree", FOLLOWS, async || {
        let all = known(cluster).await.ok()?;
        all.windows(2).all(|pair| pair[0] == pair[1]).then_some(())
    })
    .await;
    match agreed {
        Ok(()) => Ok(()),
        Err(error) => Err(error.context(format!("{:#?}", known(cluster).await))),
    }
}
pub(crate) async fn an_isolated_leader_changes_nothing_and_serves_within_its_bounds() -> Result<()> {
    let cluster = formed_with(Playground::builder().relayed(), |config| {
        with_bounds(config, ENCRYPT_BOUND, DECRYPT_BOUND)
    })
    .await?;
    let leader = cluster.leader().await?;
    let node = cluster.node(leader.node);
    let client = cluster.client_on("trading-1", leader.node)?;
    let mut acknowledged = vec![seal(&client, CONTEXT, b"before").await?];
    let before = last_log(&node).await?;
    cluster.relays()?.isolate(leader.node);
    let cut = cluster.last_heard(leader.node).await?;

    // Retried rotates for a minute, eight at a time; each is tried again and again inside the node, too.
    let mut rotations = Vec::new();
    for _ in 0..8 {
        let admin = cluster.client_on("admin", leader.node)?;
        rotations.push(tokio::spawn(rotate_in_vain(admin, cut)));
    }
    let watched = tokio::spawn(watch(node.clone(), client, acknowledged[0].clone(), cut, ALONE));
    // Meanwhile the others have a leader of their own, and change things once the silent one may be left out.
    let others = cluster.others(leader.node);
    let next = cluster.leader_among(&others).await?;
    ensure!(
        next.node != leader.node && next.term > leader.term,
        "{next:?} after {leader:?}"
    );
    let admin = cluster
        .client_on("admin", next.node)?
        .with_retry(Retry::Until(Duration::from_secs(40)));
    let trading = cluster.client_on("trading-1", next.node)?;
    for _ in 0..2 {
        let version = admin.rotate(CONTEXT, None).await?.version;
        acknowledged.push(seal_under(&trading, CONTEXT, b"meanwhile", version).await?);
    }
    ensure!(
        cut.elapsed() < ALONE,
        "the majority needed {:?} for two rotations",
        cut.elapsed()
    );

    let mut refusals = Vec::new();
    for rotation in rotations {
        refusals.extend(rotation.await??);
    }
    for (asked, error) in &refusals {
        // Only of what it was asked before it noticed may it be in doubt.
        ensure!(
            *asked < NO_QUORUM_AFTER
                || error.code() == Some(ErrorCode::NoQuorum) && error.status() == Some(503),
            "asked after {asked:?}: {error}"
        );
    }
    let late = refusals.iter().filter(|(asked, _)| *asked >= NO_QUORUM_AFTER);
    ensure!(late.count() >= 8, "hardly any rotates: {refusals:?}");
    let samples = watched.await??;
    // However slow the machine is: before and after each of the bounds it was looked at.
    for (from, to) in [
        (Duration::ZERO, ENCRYPT_BOUND - AROUND),
        (ENCRYPT_BOUND + AROUND, DECRYPT_BOUND - AROUND),
        (DECRYPT_BOUND + AROUND, ALONE),
    ] {
        let looks = within(&samples, from, to);
        ensure!(
            looks >= 3,
            "only {looks} samples from {from:?} to {to:?}: {samples:#?}"
        );
    }
    for sample in &samples {
        sample.check(ENCRYPT_BOUND, DECRYPT_BOUND)?;
    }
    let noticed: Vec<f64> = samples
        .iter()
        .filter(|sample| sample.asked > NO_QUORUM_AFTER)
        .map(|sample| sample.last_log)
        .collect();
    ensure!(
        noticed.windows(2).all(|pair| pair[0] == pair[1]),
        "an isolated leader appended: {noticed:?}"
    );
    // What alerts go by: HsmNodeStale, and HsmNoLeader, to which it is no leader any more.
    let metrics = node.metrics().await?;
    let stale = metrics.sum("hsm_staleness_seconds").context("no staleness")?;
    let quorum = metrics
        .sum("hsm_raft_quorum_ack_age_seconds")
        .context("no age of a quorum")?;
    ensure!(
        stale > 15.0 && !(0.0..10.0).contains(&quorum),
        "after {ALONE:?} its metrics say {stale} s and {quorum} s"
    );
    let grown = last_log(&node).await? - before;
    ensure!(
        grown < 100.0,
        "the log of an isolated leader grew by {grown} entries"
    );

    // Healed, it follows, and has what the majority has: nothing of its own, nothing lost.
    let there = context_on(&cluster, next.node, CONTEXT).await?;
    cluster.relays()?.heal();
    until("the old leader follows", FOLLOWS, async || {
        let status = cluster.status(leader.node).await?;
        (status.role == NodeRole::Follower && status.term >= next.term).then_some(())
    })
    .await?;
    cluster.wait_ready(&cluster.nodes()).await?;
    wait_agreed(&cluster).await?;
    let here = context_on(&cluster, leader.node, CONTEXT).await?;
    check_settled(&here)?;
    ensure!(
        versions(&here) == versions(&there),
        "{here:?} instead of {there:?}"
    );
    acknowledged.push(seal(&cluster.client("trading-1")?, CONTEXT, b"healed").await?);
    open_everywhere(&cluster, "trading-1", CONTEXT, &acknowledged).await?;
    let admin = cluster.client("admin")?.with_retry(Retry::Until(FOLLOWS));
    let version = admin.rotate(CONTEXT, None).await?.version;
    ensure!(
        here.versions.iter().all(|held| held.version < version),
        "version {version} once more"
    );
    cluster.passed();
    Ok(())
}

/// A node that knows of a version and lacks its key says so, in a batch of the one item that needs it alone.
async fn it_says_what_it_has_not_imported(
    cluster: &Playground,
    node: &Node,
    held: &Sealed,
    newest: &Sealed,
) -> Result<()> {
    let not_ready = ErrorCode::KeyVersionNotReady;
    let client = cluster.client_on("trading-1", node.number)?;
    let decrypt = |sealed: &Sealed| DecryptRequest::new(CONTEXT, sealed.ciphertext.clone());
    // Until the news has come it encrypts under the version that it knows.
    let encrypted = until("a version that it does not hold", FOLLOWS, async || {
        let refused = client.encrypt(&EncryptRequest::new(CONTEXT, b"x")).await.err()?;
        // What has not been answered in time says nothing.
        refused.code().is_some().then_some(refused)
    })
    .await?;
    let decrypted = client.decrypt(&decrypt(newest)).await.err();
    let decrypted = decrypted.context("it opens what it has no key for")?;
    for refused in [encrypted, decrypted] {
        let said = refused.api().with_context(|| refused.to_string())?;
        ensure!(
            said.status == 503 && said.code == Some(not_ready) && said.retryable,
            "{refused}"
        );
        ensure!(
            said.retry_after == Some(Duration::from_secs(1)),
            "to be repeated after {:?}",
            said.retry_after
        );
    }
    let batch = Batch::new([decrypt(held), decrypt(newest), decrypt(held)]);
    let opened = client.decrypt_batch(&batch).await?.into_body().batch;
    let refused = opened.get(1).and_then(ItemResult::as_err);
    let refused = refused.with_context(|| format!("{opened:?}"))?;
    ensure!(
        refused.status == 503 && refused.error_code() == Some(not_ready) && refused.retryable,
        "{refused:?}"
    );
    let texts: Vec<&[u8]> = opened
        .iter()
        .filter_map(ItemResult::as_ok)
        .map(|opened| opened.plaintext.as_slice())
        .collect();
    ensure!(texts == [&held.plaintext; 2], "{opened:?}");
    ensure!(!node.is_ready().await, "ready without a key");
    Ok(())
}

/// The moment of the first 200 is what a balancer goes by: whatever was encrypted elsewhere opens here at once.
pub(crate) async fn a_healed_node_is_ready_only_with_what_it_missed() -> Result<()> {
    let cluster = Playground::builder().relayed().start().await?;
    let mut missed = vec![seal(&cluster.client("trading-1")?, CONTEXT, b"before").await?];
    for round in 0..2 {
        // A node that has been alone comes back with a higher term: another one may lead.
        let leader = cluster.leader().await?;
        let node = cluster.others(leader.node)[0].clone();
        let client = cluster.client_on("trading-1", node.number)?;
        let trading = cluster.client_on("trading-1", leader.node)?;
        let admin = cluster
            .client_on("admin", leader.node)?
            .with_retry(Retry::Until(Duration::from_secs(40)));
        cluster.relays()?.isolate(node.number);
        // The first rotation waits until the silent member may be left out, the others add to what it misses.
        for _ in 0..4 {
            let version = admin.rotate(CONTEXT, None).await?.version;
            missed.push(seal_under(&trading, CONTEXT, b"missed", version).await?);
        }
        ensure!(!node.is_ready().await, "round {round}: ready in isolation");
        let newest = missed.last().context("nothing was sealed")?;
        // A connection is there already; the new version cannot be, and nobody can say that there is one.
        open(&client, CONTEXT, &missed[0]).await?;
        let unknown = code_of(open(&client, CONTEXT, newest).await);
        ensure!(
            unknown == Err(Some(ErrorCode::NoQuorum)),
            "round {round}: of what it cannot know it says {unknown:?}"
        );

        let held_back = cfg!(feature = "failpoints") && round == 1;
        if held_back {
            arm(&node, IMPORTS, "pause").await?;
        }
        let healed = Instant::now();
        cluster.relays()?.heal();
        if held_back {
            it_says_what_it_has_not_imported(&cluster, &node, &missed[0], newest).await?;
            arm(&node, IMPORTS, "off").await?;
        }
        while !node.is_ready().await {
            ensure!(
                healed.elapsed() < FOLLOWS,
                "round {round}: {}",
                node.checks().await
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        open(&client, CONTEXT, newest)
            .await
            .with_context(|| format!("round {round}: ready {:?} after the heal", healed.elapsed()))?;
        let sealed = seal(&client, CONTEXT, b"back").await?;
        ensure!(
            sealed.version == newest.version,
            "round {round}: it encrypts under version {} instead of {}",
            sealed.version,
            newest.version
        );
        for sealed in &missed {
            open(&client, CONTEXT, sealed)
                .await
                .with_context(|| format!("round {round}: version {}", sealed.version))?;
        }
        missed.push(sealed);
        cluster.wait_ready(&cluster.nodes()).await?;
    }
    open_everywhere(&cluster, "trading-1", CONTEXT, &missed).await?;
    cluster.passed();
    Ok(())
}

pub(crate) async fn a_minority_of_five_is_stale_in_time_and_still_answers() -> Result<()> {
    let cluster = formed_with(Playground::builder().nodes(5).relayed(), |config| {
        with_bounds(config, SHORT_ENCRYPT_BOUND, SHORT_DECRYPT_BOUND)
    })
    .await?;
    let leader = cluster.leader().await?;
    let follower = cluster.others(leader.node)[0].number;
    let minority = [cluster.node(leader.node), cluster.node(follower)];
    let sealed = seal(&cluster.client("trading-1")?, CONTEXT, b"before").await?;

    cluster.relays()?.separate(&[leader.node, follower]);
    // The two still hear each other: a leader's frames alone make nobody fresh.
    let mut watched = Vec::new();
    for node in &minority {
        let client = cluster.client_on("trading-1", node.number)?;
        let cut = cluster.last_heard(node.number).await?;
        let long = SHORT_DECRYPT_BOUND + 2 * AROUND;
        watched.push(tokio::spawn(watch(
            node.clone(),
            client,
            sealed.clone(),
            cut,
            long,
        )));
    }
    for (node, watched) in minority.iter().zip(watched) {
        let samples = watched.await?.with_context(|| node.id())?;
        for sample in &samples {
            sample
                .check(SHORT_ENCRYPT_BOUND, SHORT_DECRYPT_BOUND)
                .with_context(|| node.id())?;
        }
        // Out of the balancer, and yet the application that reaches it was served; and it was asked past both bounds.
        let served =
            |sample: &Sample| sample.ready == 503 && sample.marked == Some(true) && sample.decrypt.is_ok();
        let late = |sample: &Sample| sample.asked > SHORT_DECRYPT_BOUND + AROUND;
        ensure!(
            samples.iter().any(served) && samples.iter().any(late),
            "{}: {samples:#?}",
            node.id()
        );
    }
    let majority: Vec<Node> = cluster
        .nodes()
        .into_iter()
        .filter(|node| minority.iter().all(|other| other.number != node.number))
        .collect();
    let next = cluster.leader_among(&majority).await?;
    ensure!(next.term > leader.term, "{next:?} after {leader:?}");
    cluster.wait_ready(&majority).await?;
    cluster.relays()?.heal();
    cluster.wait_ready(&cluster.nodes()).await?;
    cluster.passed();
    Ok(())
}
